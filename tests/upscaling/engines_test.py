"""Tests of sr_jax/upscaling/engines.py: other programs compute what JAX computes, or JAX does."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import apply, assert_same_pixels, contrasting_model, make_model, photo

from sr_jax import evaluate
from sr_jax import formats
from sr_jax.images.files import read_image, write_image
from sr_jax.machine import cpus
from sr_jax.models.model import Model
from sr_jax.models.write import save_model
from sr_jax.networks.build import build_generator
from sr_jax.upscale import main
from sr_jax.upscaling import engines
from sr_jax.upscaling.upscaler import Upscaler, make_upscaler

onnx = pytest.importorskip("onnx", reason="the engines read .onnx files: pip install onnx")

ENGINES = [
  pytest.param("openvino", marks=pytest.mark.developer("openvino")),
  pytest.param(
    "onnxruntime",
    marks=pytest.mark.skipif(
      importlib.util.find_spec("onnxruntime") is None, reason="pip install onnxruntime"
    ),
  ),
]
TITLES = {"openvino": "OpenVINO ", "onnxruntime": "ONNX Runtime "}
NETWORKS = [
  ("rrdbnet", {}),
  ("rrdbnet", {"scale": 2, "input_unshuffle": 2}),
  ("srresnet", {}),
  ("msrresnet", {"scale": 3}),
  ("msrresnet", {"out_channels": 1}),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> pathlib.Path:
  """An empty cache; the folder that the networks go to."""
  monkeypatch.setenv("SR_JAX_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache" / "engines"


@pytest.fixture
def exports(monkeypatch) -> list[str]:
  """The networks that were exported, and not read from the cache."""
  seen, export = [], engines.export

  def count(model):
    seen.append(model.name)
    return export(model)

  monkeypatch.setattr(engines, "export", count)
  return seen


@pytest.fixture
def imitation(monkeypatch):
  """Puts an engine of one's own into the place of the others, which are 'not installed'."""

  def put(forward, name="json"):  # a module that is there
    monkeypatch.setattr(engines, "ENGINES", {name: lambda contents: ("Imitation 1.0", forward)})
    monkeypatch.setattr(engines, "CHOICES", ("auto", "jax", name))

  return put


def upscaler(model: Model, engine: engines.Engine) -> Upscaler:
  module = build_generator(model.name, model.kwargs)
  return make_upscaler(module, model.variables, engine.run)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=str)
def test_engines_compute_what_jax_computes(name, kwargs, engine):
  model = contrasting_model(name, blocks=1, **kwargs)
  title, forward = engines.ENGINES[engine](engines.export(model))
  assert title.startswith(TITLES[engine])
  opened = engines.open_engine(model, engine)
  assert opened.name == f"{title} (cpu)"
  upscale, jax_upscale = upscaler(model, opened), upscaler(model, engines.Engine("JAX"))
  channels = kwargs.get("out_channels", 3)
  lr = photo(12, 36, channels)  # sides that the unshuffle divides
  sr = forward(lr.transpose(2, 0, 1)[None].astype(np.float32) / 255)
  np.testing.assert_allclose(sr[0].transpose(1, 2, 0), apply(model, lr), rtol=0, atol=1e-5)
  for lr in (photo(13, 37), photo(13, 37, channels=0)):  # and sides that it does not divide
    sr, expected = upscale(lr), jax_upscale(lr)
    assert expected.std() > 5
    assert_same_pixels(sr, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_exported_once(engine, exports, cache, monkeypatch):
  model, lr = contrasting_model(), photo(9, 14)
  sr = engines.open_engine(model, engine).run(lr)
  (network,) = cache.glob("*.onnx")
  onnx.checker.check_model(onnx.load(network))
  assert sorted(p.suffix for p in cache.iterdir()) == [".json", ".onnx"]  # nothing half-written
  # The second time needs neither the package onnx nor JAX's answer.
  monkeypatch.setitem(sys.modules, "onnx", None)
  monkeypatch.setattr(engines, "difference", lambda *_: pytest.fail("compared again"))
  np.testing.assert_array_equal(engines.open_engine(model, engine).run(lr), sr)
  assert exports == ["rrdbnet"]


def test_other_networks_have_other_files(exports, imitation, cache, monkeypatch):
  """The digest is of the weights: other fields are other networks all the same."""
  imitation(lambda lr: lr)
  monkeypatch.setattr(engines, "difference", lambda *_: 0.0)
  first = make_model()
  for model in (
    first,
    first._replace(kwargs={**first.kwargs, "residual_scale": 0.5}),
    make_model(seed=1),
  ):
    engines.open_engine(model)
    engines.open_engine(model)
  monkeypatch.setattr(engines, "__version__", "another")
  engines.open_engine(first)
  assert len(exports) == len(list(cache.glob("*.onnx"))) == 4


def test_an_engine_that_was_not_compared_is(exports, imitation, monkeypatch):
  compared = []
  monkeypatch.setattr(engines, "difference", lambda forward, model: compared.append(forward) or 0.0)
  for title in ("One 1.0", "Two 1.0", "One 1.0", "One 2.0"):
    monkeypatch.setattr(engines, "ENGINES", {"json": lambda contents, t=title: (t, t)})
    engines.open_engine(make_model())
  assert compared == ["One 1.0", "Two 1.0", "One 2.0"] and len(exports) == 1


def cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("suffix", [".onnx", ".json"])
@pytest.mark.parametrize(
  "damage",
  [
    cut,
    pytest.param(flip_a_bit, marks=pytest.mark.slow),
    pytest.param(pathlib.Path.unlink, marks=pytest.mark.slow),
    lambda path: path.write_text('{"sha256": []}'),
  ],
  ids=["cut", "flipped", "absent", "other"],
)
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_a_damaged_file_is_made_anew(engine, damage, suffix, exports, cache):
  model, lr = contrasting_model(), photo(9, 14)
  sr = engines.open_engine(model, engine).run(lr)
  (path,) = cache.glob(f"*{suffix}")
  sound = path.read_bytes()
  damage(path)
  np.testing.assert_array_equal(engines.open_engine(model, engine).run(lr), sr)
  assert len(exports) == 2 and path.read_bytes() == sound


def test_the_networks_used_last_are_kept(exports, imitation, cache, monkeypatch):
  imitation(lambda lr: lr)
  monkeypatch.setattr(engines, "difference", lambda *_: 0.0)
  models = [make_model(seed=seed) for seed in range(10)]
  paths = [engines.cache_path(model) for model in models]
  for i, model in enumerate(models):
    engines.open_engine(model)
    for file in (paths[i], paths[i].with_suffix(".json")):
      os.utime(file, (i, i))
    engines.open_engine(models[0])  # now its files are the newest
  assert set(cache.glob("*.onnx")) == {paths[0], *paths[3:]} and len(exports) == 10


@pytest.mark.parametrize(
  "forward",
  [
    lambda lr: np.zeros((1, 3, 4 * lr.shape[2], 4 * lr.shape[3]), np.float32),
    lambda lr: np.full((1, 3, 4 * lr.shape[2], 4 * lr.shape[3]), np.nan, np.float32),
    lambda lr: lr,
  ],
  ids=["black", "nan", "too_small"],
)
def test_what_differs_from_jax_is_not_used(forward, imitation, cache):
  imitation(forward)
  model = contrasting_model()
  engine = engines.open_engine(model)
  assert engine.run is None and engine.name.startswith("JAX ")
  assert engine.note.startswith("; json: Imitation 1.0 differs from JAX by ")
  assert "\n" not in engine.note and not cache.exists()
  with pytest.raises(ValueError, match="Imitation 1.0 differs from JAX by .* more than 0.0001"):
    engines.open_engine(model, "json")


def test_a_ten_thousandth_is_near_enough(imitation):
  model = contrasting_model()

  def off_by(x):
    def forward(lr):
      sr = apply(model, lr[0].transpose(1, 2, 0) * 255)
      return sr.transpose(2, 0, 1)[None] + np.float32(x)

    return forward

  imitation(off_by(5e-5))
  assert engines.open_engine(model).name == "Imitation 1.0 (cpu)"
  imitation(off_by(2e-4))
  with pytest.raises(ValueError, match="differs from JAX by 0.0002"):
    engines.open_engine(make_model(seed=3)._replace(variables=model.variables), "json")


def test_what_cannot_be_exported_is_jaxs(imitation, monkeypatch):
  imitation(lambda lr: lr)
  monkeypatch.setitem(sys.modules, "onnx", None)
  monkeypatch.delitem(sys.modules, "sr_jax.formats.onnx_export", raising=False)
  monkeypatch.delattr(formats, "onnx_export", raising=False)
  engine = engines.open_engine(make_model())
  assert engine.run is None and "needs the package onnx: pip install onnx" in engine.note
  with pytest.raises(ImportError, match="pip install onnx"):
    engines.open_engine(make_model(), "json")


def test_the_second_engine_takes_what_the_first_cannot(monkeypatch):
  def fail(contents):
    raise RuntimeError("no such\noperation")

  monkeypatch.setattr(engines, "difference", lambda *_: 0.0)
  monkeypatch.setattr(engines, "ENGINES", {"json": fail, "math": lambda _: ("Second 1", None)})
  assert engines.open_engine(make_model()).name == "Second 1 (cpu)"
  monkeypatch.setattr(engines, "ENGINES", {"json": fail})
  assert engines.open_engine(make_model()).note == "; json: no such operation"


def test_without_an_engine_it_is_jax(monkeypatch):
  for name in ("openvino", "onnxruntime"):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"--engine={name} needs .*pip install {name} onnx"):
      engines.open_engine(make_model(), name)
  engine = engines.open_engine(make_model())
  assert engine.run is None and engine.name.startswith("JAX ") and "pip install" in engine.note
  with pytest.raises(ValueError, match="--engine='tensorrt' must be one of auto, jax, openvino"):
    engines.open_engine(make_model(), "tensorrt")


def test_an_accelerator_stays_with_jax(imitation, monkeypatch):
  imitation(lambda lr: pytest.fail("used"))
  monkeypatch.setattr(engines.jax, "default_backend", lambda: "gpu")
  engine = engines.open_engine(make_model())
  assert engine.run is None and engine.name.endswith(" (gpu)") and not engine.note


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, exports, imitation, monkeypatch):
  imitation(lambda lr: lr)
  monkeypatch.setattr(engines, "difference", lambda *_: 0.0)
  (tmp_path / "cache").write_text("a file where the folder should be")
  for _ in range(2):
    assert engines.open_engine(make_model()).run
  assert len(exports) == 2


def test_threads_are_no_more_than_the_process_may_use(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
  for quota, threads in (("max 100000", 6), ("250000 100000", 3), ("900000 100000", 6)):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self, text=quota: text)
    assert cpus.available() == threads


@pytest.mark.parametrize("engine", ENGINES)
def test_upscale_says_what_it_hands_over_to(engine, tmp_path, capsys):
  model = contrasting_model()
  save_model(tmp_path / "model.npz", model)
  write_image(tmp_path / "in" / "photo.png", photo(40, 50))
  arguments = ["--model", str(tmp_path / "model.npz"), "--input", str(tmp_path / "in")]
  for tile in ("0", "16"):
    main([*arguments, "--output", str(tmp_path / "out"), "--tile", tile, "--engine", engine])
    assert f"upscaling with {TITLES[engine]}" in capsys.readouterr().err
    sr = read_image(tmp_path / "out" / "photo.png")
    expected = upscaler(model, engines.Engine("JAX"))(photo(40, 50))
    assert_same_pixels(sr, expected)


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_scores_name_another_engine_than_jax(engine, tmp_path, capsys):
  save_model(tmp_path / "model.npz", contrasting_model())
  write_image(tmp_path / "hr" / "photo.png", photo(80, 96))
  arguments = ["--model", str(tmp_path / "model.npz"), "--data", str(tmp_path / "hr")]
  arguments += ["--metrics", "psnr", "--output"]
  evaluate.main([*arguments, str(tmp_path / "jax")])
  assert "upscaling" not in capsys.readouterr().err
  evaluate.main([*arguments, str(tmp_path / "engine"), "--engine", engine])
  jaxs, other = (
    json.loads((tmp_path / name / "results.json").read_text()) for name in ("jax", "engine")
  )
  assert "engine" not in jaxs["protocol"]
  assert other["protocol"].pop("engine").startswith(TITLES[engine])
  assert other["protocol"] == jaxs["protocol"]
  assert other["sets"]["hr"]["psnr_y"] == pytest.approx(jaxs["sets"]["hr"]["psnr_y"], abs=0.01)
  assert TITLES[engine] in (tmp_path / "engine" / "report.html").read_text()


@pytest.mark.developer("openvino")
def test_openvino_sends_no_messages():
  """Importing it would report to Google Analytics and write into the home folder."""
  code = """
import sys
from sr_jax import evaluate, upscale
from sr_jax.upscaling import engines
assert not {"openvino", "onnxruntime", "onnx"} & set(sys.modules)
try:
  engines.ENGINES["openvino"](b"no network")
except Exception:
  pass
assert "openvino" in sys.modules
assert not [name for name in sys.modules if name.startswith("openvino_telemetry.")]
"""
  root = pathlib.Path(__file__).resolve().parents[2]
  subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env={**os.environ})
