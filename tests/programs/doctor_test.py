"""Tests of sr_jax/doctor: faults are planted, and the program must name each with its remedy.

Where it can be, the fault is a real one: a broken package on the path, a limit of the system, a
damaged file, a program called nvidia-smi. What a test need not wait for it leaves out by `--only`.
"""

import collections
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import shutil
import struct
import subprocess
import sys
import time
import venv
import zlib

import numpy as np
import pytest
from PIL import Image

from sr_jax.data.folders import SKIMAGE
from sr_jax.doctor import __main__
from sr_jax.doctor import accelerators
from sr_jax.doctor.environment import EXPLICIT
from sr_jax.doctor.finding import OK, Finding
from sr_jax.doctor import host
from sr_jax.doctor.packages import CUDA_PLUGINS, installed, requirements
from sr_jax.images import files
from sr_jax.images.files import read_image, write_image

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def sound_environment(monkeypatch, tmp_path):
  """The settings of the tests themselves, eight devices of one CPU, are findings too."""
  for name in list(os.environ):
    if name.startswith(("SLURM_", "XLA_", "CUDA_", "TF_")) or name.lower().endswith("_proxy"):
      monkeypatch.delenv(name)
  for name in ("JAX_PLATFORMS", "JAX_NUMPY_RANK_PROMOTION", "LD_LIBRARY_PATH", *EXPLICIT):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no nvidia-smi, unless one is planted there
  monkeypatch.chdir(tmp_path)


class Report:
  """What the program printed, and its exit status."""

  def __init__(self, status: int, out: str):
    self.status, self.out = status, out
    self.lines = out.splitlines()

  def finds(self, level: str, name: str, what: str, remedy: str) -> None:
    """The named fault stands there once, with these words, its remedy in the line below."""
    start = f"  {level.upper():8}{name}: "
    places = [i for i, line in enumerate(self.lines) if line.startswith(start)]
    assert len(places) == 1, self.out
    assert what in self.lines[places[0]], self.out
    assert self.lines[places[0] + 1].startswith(" " * 10 + "-> "), self.out
    assert remedy in self.lines[places[0] + 1], self.out
    assert self.status == (1 if "  FAULT   " in self.out else 0)

  def names(self) -> list[str]:
    """Of all warnings and faults."""
    found = [line.split()[1] for line in self.lines if line.startswith(("  WARNING ", "  FAULT "))]
    return [name.rstrip(":") for name in found]


@pytest.fixture
def diagnose(capsys):
  def run(*arguments) -> Report:
    status = __main__.main([str(argument) for argument in arguments])
    return Report(status, capsys.readouterr().out)

  return run


def program(*arguments, executable=sys.executable, prepare=None, **environment) -> Report:
  ran = subprocess.run(
    [executable, "-m", "sr_jax.doctor", *map(str, arguments)],
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, preexec_fn=prepare,
    env={**os.environ, **environment}, timeout=120,
  )  # fmt: skip
  return Report(ran.returncode, ran.stdout)


def plant_package(folder: pathlib.Path, name: str, code: str) -> str:
  """A package that is found before the installed one. Returns the PYTHONPATH."""
  (folder / name).mkdir(parents=True)
  (folder / name / "__init__.py").write_text(code)
  return str(folder)


def plant_version(monkeypatch, folder: pathlib.Path, **versions: str) -> None:
  """Installs the metadata of packages before the real ones."""
  for name, version in versions.items():
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (info / "METADATA").write_text(text)
  monkeypatch.syspath_prepend(folder)


def hide_packages(monkeypatch, *hidden: str) -> None:
  real = importlib.metadata.version

  def version(name: str) -> str:
    if name in hidden:
      raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

  monkeypatch.setattr(importlib.metadata, "version", version)


def plant_nvidia_smi(folder: pathlib.Path, output: str, status: int = 0) -> None:
  (folder / "bin").mkdir()
  script = folder / "bin/nvidia-smi"
  script.write_text(f'#!/bin/sh\necho "{output}"\nexit {status}\n')
  script.chmod(0o755)


def photographs(folder: pathlib.Path, count: int, side: int = 160) -> pathlib.Path:
  rng = np.random.default_rng(7)
  for i in range(count):
    pixels = rng.integers(0, 256, (side, side + 8, 3), np.uint8)
    write_image(folder / f"{i:02d}.png", pixels)
  return folder


# ---- healthy


@pytest.mark.slow  # starts all that it checks
def test_a_sound_machine_has_no_faults(tmp_path):
  photos = photographs(tmp_path / "photos", 3)
  report = program(
    "--data", photos, "--workdir", tmp_path / "runs/new", "--json", tmp_path / "report.json",
    JAX_PLATFORMS="cpu",
  )  # fmt: skip
  assert report.status == 0 and "no faults" in report.lines[-1], report.out
  facts = json.loads((tmp_path / "report.json").read_text())
  assert facts["faults"] == 0
  # A machine of one CPU, or one whose disk is nearly full, runs the tests too.
  assert set(report.names()) <= {"cpus-few", "memory-low", "disk-low", "package-optional"}
  assert [*dict.fromkeys(entry["check"] for entry in facts["findings"])] == list(__main__.CHECKS)
  assert "3 of 3 images" in report.out and "168x160 to 168x160: 3 RGB" in report.out
  assert f"jax {importlib.metadata.version('jax')}" in report.out
  assert not (tmp_path / "runs").exists()  # nothing is left behind
  assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "report.json"]


def test_some_of_the_checks(diagnose):
  report = diagnose("--only", "machine,disk")
  assert [line for line in report.lines if line and not line.startswith(" ")][:2] == [
    "machine", "disk",
  ]  # fmt: skip
  with pytest.raises(SystemExit) as stopped:
    diagnose("--only", "machines")
  assert stopped.value.code == 2


# ---- python and packages


def test_a_bare_python(tmp_path):
  venv.create(tmp_path / "bare", with_pip=False)
  report = program(executable=tmp_path / "bare/bin/python", PYTHONPATH="")
  report.finds("fault", "jax-missing", "No module named 'jax'", "requirements.txt")
  assert report.names().count("package-missing") >= 10
  assert report.names().count("check-impossible") == 2  # decoding, data
  assert "FAULT   package-missing: jax is not installed" in report.out
  assert "Traceback" not in report.out


def test_a_package_that_is_too_old(monkeypatch, tmp_path, diagnose):
  plant_version(monkeypatch, tmp_path, flax="0.8.5")
  bound = requirements()["flax"]
  report = diagnose("--only", "python")
  report.finds(
    "fault",
    "package-old",
    f"flax 0.8.5 is older than {bound}",
    f'install --upgrade "flax>={bound}"',
  )
  assert report.names() == ["package-old"]


def test_an_old_python(monkeypatch, diagnose):
  monkeypatch.setattr(platform, "python_version", lambda: "3.10.14")
  diagnose("--only", "python").finds("fault", "python-old", "3.10.14, must be 3.11", "new venv")


@pytest.mark.parametrize(
  "name, user",
  [("importlib_resources", "tensorflow-datasets"), ("tensorboard", "clu"), ("flatbuffers", "jax")],
)
def test_a_dependency_that_nobody_declares(monkeypatch, diagnose, name, user):
  hide_packages(monkeypatch, name)
  report = diagnose("--only", "python")
  report.finds("fault", "undeclared-dependency", f"{name} is not installed", f"pip install {name}")
  hide_packages(monkeypatch, name, user)
  assert "undeclared-dependency" not in diagnose("--only", "python").names()


@pytest.mark.parametrize("jaxlib", ["0.4.30", "99.0"])
def test_jaxlib_of_another_version(monkeypatch, tmp_path, diagnose, jaxlib):
  plant_version(monkeypatch, tmp_path, jaxlib=jaxlib)
  jax = importlib.metadata.version("jax")
  diagnose("--only", "python").finds(
    "fault", "jaxlib-mismatch", f"jaxlib {jaxlib} does not go with jax {jax}",
    f"pip install jax=={jax} jaxlib=={jax}",
  )  # fmt: skip


def test_a_cuda_plugin_of_another_version(monkeypatch, tmp_path, diagnose):
  jax = importlib.metadata.version("jax")
  plant_version(monkeypatch, tmp_path, **{"jax_cuda12_plugin": "0.5.1", "jax_cuda12_pjrt": jax})
  report = diagnose("--only", "python")
  report.finds(
    "fault", "cuda-plugin-mismatch", "jax-cuda12-plugin 0.5.1 must", f'install "jax[cuda12]=={jax}"'
  )
  assert "pjrt" not in report.out


def test_two_tensorflows(monkeypatch, tmp_path, diagnose):
  plant_version(monkeypatch, tmp_path, tensorflow="2.21.0", tensorflow_cpu="2.21.0")
  diagnose("--only", "python").finds(
    "fault", "tensorflow-twice", "tensorflow-cpu and tensorflow",
    "pip uninstall -y tensorflow-cpu tensorflow; pip install tensorflow-cpu",
  )  # fmt: skip


def test_tensorflow_for_gpus(monkeypatch, tmp_path, diagnose):
  plant_version(monkeypatch, tmp_path / "site", tensorflow="2.21.0")
  hide_packages(monkeypatch, "tensorflow-cpu")
  assert "tensorflow-gpu-build" not in diagnose("--only", "python").names()
  plant_nvidia_smi(tmp_path, "NVIDIA H100, 81559, 4, 570.1")
  diagnose("--only", "python").finds(
    "warning", "tensorflow-gpu-build", "build for GPUs", "pip install tensorflow-cpu"
  )


# ---- devices


def test_a_gpu_that_jax_does_not_see(tmp_path):
  if any(map(installed, CUDA_PLUGINS)):
    pytest.skip("JAX has its CUDA plugin here, and would see a GPU")
  plant_nvidia_smi(tmp_path, "NVIDIA H100 80GB, 81559, 70000, 535.104.05")
  report = program("--only", "devices")
  jax = importlib.metadata.version("jax")
  report.finds(
    "fault", "jax-sees-no-gpu", "nvidia-smi lists 1 x NVIDIA H100 80GB, but JAX sees only the CPU",
    f'pip install "jax[cuda12]=={jax}"',
  )  # fmt: skip
  report.finds("warning", "gpu-busy", "GPU 0 (70,000 of 81,559 MiB)", "nvidia-smi says who")


def fake_facts(**changes):
  facts = {"imports": {}, "platform": "cpu", "devices": [{"kind": "cpu", "bytes": 0}]}
  return {**facts, "sum": 10**6, "expected_sum": 10**6, "product_error": 6e-7, **changes}


@pytest.mark.parametrize(
  "variable, value, name", [("JAX_PLATFORMS", "cpu", "jax-platforms-cpu"),
                            ("CUDA_VISIBLE_DEVICES", "", "gpu-hidden")],
)  # fmt: skip
def test_a_gpu_that_a_variable_hides(monkeypatch, tmp_path, diagnose, variable, value, name):
  plant_nvidia_smi(tmp_path, "NVIDIA L4, 23034, 1, 550.54")
  monkeypatch.setenv(variable, value)
  monkeypatch.setattr(accelerators, "in_child", lambda *_: (fake_facts(), ""))
  report = diagnose("--only", "devices")
  report.finds("warning", name, variable, f"unset {variable}")
  assert report.names() == [name]


@pytest.mark.parametrize(
  "changes, name, what, remedy",
  [
    ({"sum": 999_999}, "wrong-result", "is 999999, must be 1000000", "CUDA_VISIBLE_DEVICES=0"),
    ({"product_error": 4e-4}, "imprecise", "right to 4e-04", "JAX_DEFAULT_MATMUL_PRECISION"),
    ({"product_error": float("nan")}, "imprecise", "right to nan", "unset"),
    ({"imports": {"orbax.checkpoint": "ImportError: x"}}, "package-broken",
     "import orbax.checkpoint fails: ImportError: x", "--force-reinstall orbax-checkpoint"),
  ],
)  # fmt: skip
def test_a_device_that_computes_wrongly(monkeypatch, diagnose, changes, name, what, remedy):
  monkeypatch.setattr(accelerators, "in_child", lambda *_: (fake_facts(**changes), ""))
  report = diagnose("--only", "devices")
  report.finds("fault", name, what, remedy)
  assert report.names() == [name]


def test_a_gpu_is_explained(monkeypatch, tmp_path, diagnose):
  h100 = {"kind": "NVIDIA H100", "bytes": int(59.4 * 2**30)}
  facts = fake_facts(platform="gpu", devices=[h100] * 8, product_error=3e-4)
  monkeypatch.setattr(accelerators, "in_child", lambda *_: (facts, ""))
  monkeypatch.setattr(
    shutil, "disk_usage", lambda _: collections.namedtuple("U", "total")(64 * 2**20)
  )
  report = diagnose("--only", "devices")
  assert "8 x NVIDIA H100 (gpu), 59.4 GiB of each for JAX: it takes 75 %" in report.out
  assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in report.out
  assert "JAX_DEFAULT_MATMUL_PRECISION=float32" in report.out  # TF32 is no fault there
  report.finds("warning", "shared-memory-small", "64 MiB, too little for NCCL", "--shm-size=8g")
  assert report.names() == ["shared-memory-small"]


@pytest.mark.parametrize(
  "output, status, plugin, level, name, what, remedy",
  [
    ("NVIDIA A100, 40960, 3, 470.82", 0, "jax_cuda12_plugin", "fault", "nvidia-driver-old",
     "driver is 470; JAX's plugin for CUDA 12 needs 525", "update the driver to 525"),
    ("NVIDIA A100, 40960, 3, 570.1", 0, "jax_cuda13_plugin", "fault", "nvidia-driver-old",
     "driver is 570; JAX's plugin for CUDA 13 needs 580", 'pip install "jax[cuda12]"'),
    ("couldn't communicate with the NVIDIA driver", 9, "", "warning", "nvidia-smi-fails",
     "couldn't communicate", "--gpus all"),
  ],
)  # fmt: skip
def test_drivers(
  monkeypatch, tmp_path, diagnose, output, status, plugin, level, name, what, remedy
):
  plant_nvidia_smi(tmp_path, output, status)
  if plugin:
    plant_version(monkeypatch, tmp_path / "site", **{plugin: importlib.metadata.version("jaxlib")})
  gpu = fake_facts(platform="gpu", devices=[{"kind": "A100", "bytes": 2**30}])
  monkeypatch.setattr(accelerators, "in_child", lambda *_: (gpu, ""))
  report = diagnose("--only", "devices")
  report.finds(level, name, what, remedy)
  assert report.names() == [name]


def test_a_flag_that_xla_does_not_know():
  report = program("--only", "devices", XLA_FLAGS="--xla_gpu_enable_magic=true")
  report.finds(
    "fault", "xla-flags-unknown", "--xla_gpu_enable_magic=true", "take the flag out of XLA_FLAGS"
  )


def test_a_platform_that_is_not_there():
  if any(map(installed, CUDA_PLUGINS)):
    pytest.skip("JAX has its CUDA plugin here")
  report = program("--only", "devices", JAX_PLATFORMS="cuda")
  report.finds("fault", "jax-platforms", "JAX_PLATFORMS=cuda", "unset JAX_PLATFORMS, or install")


def test_jax_that_hangs(tmp_path):
  path = plant_package(tmp_path, "jax", "import time\ntime.sleep(60)\n")
  begun = time.monotonic()
  report = program("--only", "devices", "--timeout", "2", PYTHONPATH=path)
  assert time.monotonic() - begun < 20
  report.finds("fault", "jax-hangs", "no answer in 2 s", "on a TPU pod start it on all hosts")


@pytest.mark.parametrize(
  "code, name, what, remedy",
  [
    ("raise RuntimeError('jaxlib version 9 is newer than and incompatible with jax version 8.')",
     "jaxlib-mismatch", "incompatible with jax version 8", "pip install --upgrade jax jaxlib"),
    ("raise RuntimeError('The TPU is already in use by process with pid 7.')",
     "accelerator-in-use", "process with pid 7", "lsof"),
    ("raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory')",
     "device-memory-taken", "RESOURCE_EXHAUSTED", "nvidia-smi"),
    ("import os\nos._exit(3)", "jax-does-not-start", "status 3", "unset LD_LIBRARY_PATH"),
  ],
)  # fmt: skip
def test_jax_that_does_not_start(monkeypatch, tmp_path, diagnose, code, name, what, remedy):
  monkeypatch.setenv("PYTHONPATH", plant_package(tmp_path, "jax", code))
  diagnose("--only", "devices").finds("fault", name, what, remedy)


# ---- tensorflow: that the real one sees no accelerator is in the test of a sound machine


TENSORFLOW = """
class config:
  set_visible_devices = staticmethod(lambda devices, kind: None)
  @staticmethod
  def list_logical_devices():
    return [type("Device", (), {"name": "/device:GPU:0", "device_type": "GPU"})]
class io:
  @staticmethod
  def decode_png(data):
    return type("Tensor", (), {"numpy": staticmethod(lambda: [0])})
"""


def test_tensorflow_that_sees_an_accelerator(monkeypatch, tmp_path, diagnose):
  plant_package(tmp_path, "tensorflow_datasets", "raise ImportError('no etils')")
  plant_package(tmp_path, "clu", "")
  (tmp_path / "clu/metric_writers.py").touch()
  monkeypatch.setenv("PYTHONPATH", plant_package(tmp_path, "tensorflow", TENSORFLOW))
  report = diagnose("--only", "tensorflow")
  report.finds(
    "fault", "tensorflow-sees-accelerator", "/device:GPU:0", "pip install tensorflow-cpu"
  )
  report.finds("fault", "tensorflow-wrong", "reads a PNG wrongly", "--force-reinstall tensorflow")
  report.finds("fault", "package-broken", "tensorflow_datasets fails: ImportError", "pip install")
  assert len(report.names()) == 3


def test_tensorflow_that_cannot_be_imported(monkeypatch, tmp_path, diagnose):
  path = plant_package(tmp_path, "tensorflow", "raise ImportError('libstdc++.so.6')")
  monkeypatch.setenv("PYTHONPATH", path)
  diagnose("--only", "tensorflow").finds(
    "fault", "tensorflow-broken", "libstdc++.so.6", "--config.data.input=device"
  )
  assert "tensorflow" not in diagnose("--only", "tensorflow", "--no-tensorflow").out


# ---- machine, disk, decoding


def test_few_open_files():
  def limit():
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 4096))

  report = program("--only", "machine", prepare=limit)
  report.finds("warning", "open-files-low", "200 files may be open", "ulimit -n 4096")


def test_one_cpu():
  if not hasattr(os, "sched_setaffinity"):
    pytest.skip("this system does not bind processes to CPUs")
  one = {min(os.sched_getaffinity(0))}
  report = program("--only", "machine", prepare=lambda: os.sched_setaffinity(0, one))
  report.finds("warning", "cpus-few", "1 of ", "--cpus-per-task")


def test_little_memory(monkeypatch, diagnose):
  limits = {
    "memory.max": str(3 * 2**30),
    "memory.current": str(2 * 2**30),
    "cpu.max": "50000 100000",
  }
  real = pathlib.Path.read_text

  def read(path, *args, **kwargs):
    return limits[path.name] if path.name in limits else real(path, *args, **kwargs)

  monkeypatch.setattr(pathlib.Path, "read_text", read)
  report = diagnose("--only", "machine")
  report.finds("warning", "memory-low", "1.0 GiB of memory free, of 3.0", "--mem=16G")
  report.finds("warning", "cpus-few", "0.5 CPUs by the container's quota", "docker --cpus=8")


def test_a_file_in_the_place_of_the_workdir(tmp_path, diagnose):
  (tmp_path / "runs").write_text("")
  report = diagnose("--only", "disk", "--workdir", tmp_path / "runs/esrgan")
  report.finds("fault", "not-a-folder", f"{tmp_path}/runs is no folder", "give another --workdir")


def test_a_folder_where_nobody_writes(monkeypatch, diagnose):
  if not pathlib.Path("/proc/self").exists():
    pytest.skip("this system has no /proc")
  monkeypatch.setattr(host, "TOO_LOW_DISK", 0)  # it has no free space either
  report = diagnose("--only", "disk", "--cache", "/proc/sr_jax")
  report.finds("fault", "not-writable", "--cache=/proc/sr_jax: cannot write", "another --cache")


def test_a_file_that_cannot_grow(tmp_path):
  def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

  report = program("--only", "disk", "--workdir", tmp_path, "--cache", tmp_path, prepare=limit)
  assert report.names() == ["not-writable"] * 2 and "File too large" in report.out, report.out
  assert report.status == 1 and not list(tmp_path.iterdir())


def test_a_disk_that_returns_other_bytes(monkeypatch, tmp_path, diagnose):
  monkeypatch.setattr(pathlib.Path, "read_bytes", lambda _: bytes(2**20))
  report = diagnose("--only", "disk", "--workdir", tmp_path, "--cache", tmp_path)
  assert report.names() == ["not-writable"] * 2 and "others read back" in report.out


@pytest.mark.parametrize(
  "free, level, name", [(2**29, "fault", "disk-full"), (3 * 2**30, "warning", "disk-low")]
)
def test_a_full_disk(monkeypatch, tmp_path, diagnose, free, level, name):
  real = shutil.disk_usage

  def usage(path):
    return real(path)._replace(free=free) if str(path).endswith("small") else real(path)

  monkeypatch.setattr(shutil, "disk_usage", usage)
  (tmp_path / "small").mkdir()
  report = diagnose("--only", "disk", "--workdir", tmp_path / "small/runs")
  report.finds(level, name, f"{free / 2**30:.1f} GiB free", "make room, or give a --workdir")


def test_a_bucket_is_not_tested(diagnose):
  diagnose("--only", "disk", "--workdir", "gs://bucket/runs").finds(
    "warning", "not-local", "gs://bucket/runs", "esrgan.py:demo"
  )


@pytest.mark.parametrize("codec, level", [("WEBP", "warning"), ("JPEG", "fault")])
def test_pillow_without_a_codec(monkeypatch, diagnose, codec, level):
  Image.init()
  monkeypatch.delitem(Image.SAVE, codec)
  report = diagnose("--only", "decoding")
  report.finds(level, "codec-missing", f"cannot write and read {codec}", "--force-reinstall pillow")


def test_a_png_that_is_off_by_one(monkeypatch, diagnose):
  real = read_image

  def read(data):
    pixels = real(data)
    if data[:4] == b"\x89PNG":
      pixels[3, 5, 1] ^= 1
    return pixels

  monkeypatch.setattr(files, "read_image", read)
  report = diagnose("--only", "decoding")
  report.finds("fault", "codec-wrong", "PNG comes back with a mean error", "pillow")
  assert len(report.names()) == 1


# ---- data


def audit(diagnose, folder, *arguments) -> Report:
  return diagnose("--only", "data", "--data", folder, "--cache", folder.parent, *arguments)


def test_no_data(diagnose, tmp_path):
  audit(diagnose, tmp_path / "nowhere").finds("fault", "no-data", "is no folder", "HR images")
  (tmp_path / "empty").mkdir()
  audit(diagnose, tmp_path / "empty").finds("fault", "no-images", "holds no images", "HR images")
  report = diagnose("--only", "data", "--data", "skimage:test")
  assert report.status == 0 and f"{len(SKIMAGE['test'])} images" in report.out
  diagnose("--only", "data", "--data", "skimage:other").finds("fault", "no-data", "other", "folder")


def test_damaged_images_are_named(diagnose, tmp_path):
  photos = photographs(tmp_path / "photos", 4)
  whole = (photos / "02.png").read_bytes()
  (photos / "02.png").write_bytes(whole[: len(whole) // 2])
  (photos / "sub").mkdir()
  (photos / "sub/empty.jpg").touch()
  report = audit(diagnose, photos)
  report.finds(
    "fault", "images-unreadable", "2 of 5 images, too many: training refuses the folder: 02.png (",
    "repair them from their source, or remove them",
  )  # fmt: skip
  assert "sub/empty.jpg (cannot identify" in report.out and "3 of 5 images of" in report.out
  photographs(photos / "more", 17)  # 2 of 22: training leaves them out
  assert audit(diagnose, photos).status == 0
  audit(diagnose, photos).finds("warning", "images-unreadable", "left out", "repair")


def test_images_smaller_than_the_crop(diagnose, tmp_path):
  photos = photographs(tmp_path / "photos/HR", 2).parent
  write_image(photos / "HR/small.png", np.zeros((96, 300, 3), np.uint8))
  audit(diagnose, photos).finds(
    "fault", "images-too-small", "small.png (300x96 < 128)", "--config.data.hr_patch below 128"
  )
  assert not audit(diagnose, photos, "--hr_patch", "96").names()


def test_a_bomb_is_not_decoded(diagnose, tmp_path):
  photos = photographs(tmp_path / "photos", 1)
  Image.new("1", (20_000, 20_000)).save(photos / "bomb.png")
  report = audit(diagnose, photos)
  report.finds("fault", "images-too-large", "bomb.png (20000x20000 pixels are more", "cut them")
  assert report.names() == ["images-too-large"]


def test_copies_and_names_that_collide(diagnose, tmp_path):
  photos = photographs(tmp_path / "photos", 3)
  shutil.copy(photos / "01.png", photos / "copy.png")
  write_image(photos / "02.bmp", np.zeros((160, 160, 3), np.uint8))
  report = audit(diagnose, photos)
  report.finds(
    "warning", "images-duplicate", "2 images are the same file: 01.png (and copy.png)", "remove"
  )
  report.finds(
    "warning", "names-collide", "2 images differ only in suffix or case: 02.bmp (and 02.png)",
    "rename one",
  )  # fmt: skip
  assert len(report.names()) == 2 and report.status == 0


def plant_deep_png(path: pathlib.Path, pixels: np.ndarray) -> None:
  """16-bit RGB, which Pillow cannot write."""
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
  chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
  path.write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + b"".join(
      struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
      for kind, data in chunks
    )
  )


def test_images_of_odd_kinds(diagnose, tmp_path):
  photos = photographs(tmp_path / "photos", 1)
  rng = np.random.default_rng(3)
  pixels = rng.integers(0, 256, (140, 150, 4), np.uint8)
  Image.fromarray(pixels, "RGBA").save(photos / "alpha.png")
  Image.fromarray(pixels, "CMYK").save(photos / "cmyk.jpg")
  Image.fromarray(pixels[..., 0]).save(photos / "grey.png")
  deep = rng.integers(0, 65536, (140, 150), np.uint16)
  Image.fromarray(deep).save(photos / "deep.png")
  plant_deep_png(photos / "deep_rgb.png", rng.integers(0, 65536, (140, 150, 3), np.uint16))
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(pixels[..., :3]).save(photos / "turned.jpg", exif=exif)
  report = audit(diagnose, photos)
  report.finds(
    "warning", "images-converted",
    "1 CMYK will be converted without their colour profile, 1 with alpha will be put on white, "
    "2 16-bit will be trained on with their bits", "8-bit RGB",
  )  # fmt: skip
  line = next(line for line in report.lines if "7 of 7 images" in line)
  counts = line.rpartition(": ")[2].split(", ")
  assert sorted(counts) == [
    "1 CMYK", "1 turned by EXIF", "1 with alpha", "2 16-bit", "2 grey", "4 RGB",
  ]  # fmt: skip


def test_a_cache_that_is_too_small(monkeypatch, diagnose, tmp_path):
  photos = photographs(tmp_path / "photos", 2)
  needed = 2 * 160 * 168 * 3 * 17 // 16
  free = needed
  real = shutil.disk_usage
  monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=free))
  assert not audit(diagnose, photos).names()
  free = needed - 1
  audit(diagnose, photos).finds("warning", "cache-too-small", "of the cache", "data.cache_dir")


# ---- environment


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}
STEP = {**SLURM, "SLURM_STEP_NODELIST": "n[1-2]"}
JAX = {
  "JAX_COORDINATOR_ADDRESS": "host0:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
}  # fmt: skip

HOST = {"JAX_COORDINATOR_ADDRESS": "host0.local:1234"}


@pytest.mark.parametrize(
  "variables, level, name, what, remedy",
  [
    (SLURM, "fault", "slurm-without-srun", "8 tasks (SLURM_NTASKS)", "srun python -m sr_jax.main"),
    ({**STEP, "SLURM_NTASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, "fault",
     "slurm-gpus-per-task", "CUDA_VISIBLE_DEVICES=2 with 4 tasks", "--gpus-per-node=4 --gpu-bind"),
    ({**STEP, "SLURM_TASKS_PER_NODE": "8(x2)", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "fault",
     "slurm-gpus-per-task", "CUDA_VISIBLE_DEVICES=0,1,2,3 with 8 tasks", "or one task a node"),
    ({**STEP, "http_proxy": "http://p:3128"}, "warning", "proxy", "http_proxy set: the proc",
     "unset http_proxy, or put"),
    ({"JAX_COORDINATOR_ADDRESS": "host0:1234"}, "fault", "processes-incomplete",
     "JAX_NUM_PROCESSES and JAX_PROCESS_ID not", "set JAX_NUM_PROCESSES and JAX_PROCESS_ID, or un"),
    ({**JAX, "JAX_COORDINATOR_ADDRESS": "host0"}, "fault", "coordinator-address",
     "host0 must be HOST:PORT", "JAX_COORDINATOR_ADDRESS=host0:8476"),
    ({**JAX, "JAX_PROCESS_ID": "2"}, "fault", "process-id", "JAX_PROCESS_ID=2 must be", "from 0"),
    ({**JAX, "https_proxy": "http://p:3128"}, "warning", "proxy", "https_proxy set", "unset https"),
    ({"JAX_DEBUG_NANS": "True"}, "warning", "variable-left-on", "JAX_DEBUG_NANS=True",
     "unset JAX_DEBUG_NANS"),
    ({"TF_FORCE_GPU_ALLOW_GROWTH": "true"}, "warning", "variable-left-on", "hidden from TensorFlow",
     "unset TF_FORCE_GPU_ALLOW_GROWTH"),
    ({"XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=8"}, "warning",
     "pretend-devices", "8 devices of one CPU",
     "take --xla_force_host_platform_device_count=8 out of XLA_FLAGS"),
    ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "75"}, "fault", "memory-fraction", "=75 must be a number",
     "XLA_PYTHON_CLIENT_MEM_FRACTION=.75"),
    ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, "warning", "slow-allocator", "slow", "unset"),
  ],
)  # fmt: skip
def test_variables(monkeypatch, diagnose, variables, level, name, what, remedy):
  for key, value in variables.items():
    monkeypatch.setenv(key, value)
  report = diagnose("--only", "environment")
  report.finds(level, name, what, remedy)
  assert report.names() == [name]


@pytest.mark.parametrize(
  "variables, cluster",
  [
    ({}, "no cluster"),
    ({**STEP, "SLURM_NTASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "cluster: SLURM"),
    ({**STEP, "http_proxy": "http://p:3128", "no_proxy": "*"}, "cluster: SLURM"),
    ({**JAX, "http_proxy": "http://p:3128", "no_proxy": "a,.local", **HOST}, "cluster: explicit"),
    ({"http_proxy": "http://p:3128"}, "no cluster"),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "CUDA_VISIBLE_DEVICES": "3"}, "no cluster"),
    ({"JAX_DEBUG_NANS": "0", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"}, "no cluster"),
  ],
)
def test_variables_that_are_fine(monkeypatch, diagnose, variables, cluster):
  for key, value in variables.items():
    monkeypatch.setenv(key, value)
  report = diagnose("--only", "environment")
  assert report.names() == [] and cluster in report.out


def test_a_cuda_beside_that_of_the_plugin(monkeypatch, tmp_path, diagnose):
  monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/cuda/lib64")
  with monkeypatch.context() as patch:
    hide_packages(patch, *CUDA_PLUGINS)
    assert not diagnose("--only", "environment").names()
  plant_version(monkeypatch, tmp_path, jax_cuda12_plugin="0.10.2")
  diagnose("--only", "environment").finds(
    "warning", "other-cuda", "/usr/local/cuda/lib64", "unset LD_LIBRARY_PATH"
  )


# ---- the doctor itself


def test_a_check_that_fails_is_a_finding(monkeypatch, diagnose):
  def broken(args):
    yield Finding(OK, "", "begun")
    raise KeyError("x")

  monkeypatch.setitem(__main__.CHECKS, "machine", broken)
  report = diagnose("--only", "machine,disk")
  report.finds("fault", "check-failed", "KeyError: 'x' (broken)", "python,environment,devices")
  assert "begun" in report.out and "written and read back" in report.out


def test_a_report_that_cannot_be_written(capsys, tmp_path):
  assert __main__.main(["--only", "machine", "--json", str(tmp_path / "none/r.json")]) == 1
  assert "error: --json: [Errno 2]" in capsys.readouterr().err
