"""Tests of sr_jax/models/read.py and write.py: one model in every form, and what is none."""

import io
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_models
from tiny_models import assert_equal_trees, make_model

from sr_jax import UserError
from sr_jax import convert
from sr_jax import evaluate
from sr_jax import upscale
from sr_jax.formats import state_dicts
from sr_jax.images.files import write_image
from sr_jax.models.model import Model
from sr_jax.models.read import load_model, read_discriminator, read_model
from sr_jax.models.write import save_model
from sr_jax.networks.build import DISCRIMINATORS, GENERATORS, build_generator, in_channels
from sr_jax.networks import trees
from sr_jax.runs import checkpoint

SAVED = ["run", "model.safetensors", "model.npz"]


def write_run(run: pathlib.Path, model: Model, step: int = 7) -> None:
  """A run as training leaves it: a config of many fields, the model's among them."""
  run.mkdir(parents=True, exist_ok=True)
  kwargs = dict(model.kwargs)
  config = {
    "scale": kwargs.pop("scale"),
    "total_steps": 100,
    "generator": {"name": model.name, "kwargs": kwargs},
  }
  (run / "config.json").write_text(json.dumps(config))
  checkpoint.save_model(
    run, model.variables, step=step, extra={"info": model.info, "data": "a fingerprint"}
  )


def write_torch(path: pathlib.Path, model: Model, wrapper: str = "") -> None:
  import torch

  state = state_dicts.to_state_dict(model.name, model.variables)
  state = {key: torch.from_numpy(np.array(array)) for key, array in state.items()}
  torch.save({wrapper: state, "iter": 5} if wrapper else state, path)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("form", SAVED)
def test_every_generator_survives_every_form(tmp_path, name, form):
  model = make_model(name, scale=2)
  save_model(tmp_path / form, model)
  module, variables = load_model(tmp_path / form)
  assert module == GENERATORS[name](**model.kwargs)
  assert_equal_trees(variables, model.variables)


def test_a_run_of_training(tmp_path):
  model = make_model(residual_scale=0.3)
  write_run(tmp_path / "run", model)
  read = read_model(tmp_path / "run")
  assert (read.name, read.kwargs) == (model.name, model.kwargs)
  assert_equal_trees(read.variables, model.variables)
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert read.info == {**model.info, "step": 7, "config": config}


@pytest.mark.developer("torch")
@pytest.mark.parametrize("wrapper", ["", "params", "params_ema", "state_dict"])
def test_a_torch_file(tmp_path, wrapper):
  model = make_model("srresnet")
  write_torch(tmp_path / "model.pth", model, wrapper)
  module, variables = load_model(tmp_path / "model.pth")
  assert module == GENERATORS["srresnet"](**model.kwargs)
  assert_equal_trees(variables, model.variables)


@pytest.mark.developer("torch")
def test_averaged_weights_of_a_torch_file_come_first(tmp_path):
  import torch

  states = {}
  for seed, wrapper in enumerate(("params", "params_ema")):
    state = state_dicts.to_state_dict("rrdbnet", make_model(seed=seed).variables)
    states[wrapper] = {key: torch.from_numpy(np.array(a)) for key, a in state.items()}
  torch.save(states, tmp_path / "model.pth")
  _, variables = load_model(tmp_path / "model.pth")
  assert_equal_trees(variables, make_model(seed=1).variables)


def test_from_form_to_form_and_back(tmp_path):
  model = make_model(residual_scale=0.25)
  info = {**model.info, "ancestry": ["a1", "b2"], "step": 12, "interpolation": {"alpha": 0.8}}
  write_run(tmp_path / "first", model._replace(info=info), step=12)
  info["config"] = json.loads((tmp_path / "first" / "config.json").read_text())
  chain = ["first", "a.safetensors", "second", "b.npz", "c.safetensors"]
  for source, target in zip(chain, chain[1:], strict=False):
    convert.main(["--input", str(tmp_path / source), "--output", str(tmp_path / target)])
    read = read_model(tmp_path / target)
    assert_equal_trees(read.variables, model.variables)
    assert read.kwargs["residual_scale"] == 0.25
    read.info.pop("file", None)  # says how this very file is written
    assert read.info == info


def test_what_shapes_cannot_tell_is_kept(tmp_path):
  for name, field, value in (
    ("srresnet", "final_activation", "tanh"),
    ("residualnet", "residual_scale", 0.1),
    ("rrdbnet", "residual_scale", 0.3),
  ):
    for form in ("model.safetensors", "model.npz"):
      save_model(tmp_path / form, make_model(name, **{field: value}))
      module, _ = load_model(tmp_path / form)
      assert getattr(module, field) == value


def test_shapes_stand_over_what_is_told(tmp_path):
  model = make_model()
  lie = model._replace(kwargs={**model.kwargs, "blocks": 9, "scale": 2})
  save_model(tmp_path / "model.npz", lie)
  module, _ = load_model(tmp_path / "model.npz")
  assert (module.blocks, module.scale) == (2, 4)


@pytest.mark.parametrize("kwargs", [{"scale": 2, "input_unshuffle": 2}, {"out_channels": 1}])
def test_other_inputs(tmp_path, kwargs):
  model = make_model(**kwargs)
  for form in SAVED:
    save_model(tmp_path / form, model)
    module, variables = load_model(tmp_path / form)
    assert module == GENERATORS["rrdbnet"](**model.kwargs)
    assert_equal_trees(variables, model.variables)


@pytest.mark.parametrize(
  "form", [*SAVED, pytest.param("model.pth", marks=pytest.mark.developer("torch")), "training"]
)
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, form, value):
  """By all programs: whatever reads a model calls `read_model`."""
  model, path = make_model("srresnet"), tmp_path / form
  kernel = model.variables["params"]["conv_first"]["kernel"]
  kernel.flat[[3, 5]] = value
  write_run(path, model) if form == "training" else save_model(path, model)
  told = rf"conv_first/kernel must be finite, and 2 of its {kernel.size:,} values are NaN or Inf"
  write_image(tmp_path / "images" / "a.png", np.zeros((16, 16, 3), np.uint8))
  images, out = str(tmp_path / "images"), str(tmp_path / "out")
  programs = (
    lambda: load_model(path),
    lambda: convert.main(["--input", str(path), "--output", f"{out}.npz"]),
    lambda: evaluate.main(["--model", str(path), "--data", images, "--output", out]),
    lambda: upscale.main(["--model", str(path), "--input", images, "--output", out]),
  )
  for program in programs:
    with pytest.raises((UserError, SystemExit), match=told) as error:
      program()
    assert str(path) in str(error.value) and "\n" not in str(error.value)
  assert not (tmp_path / "out.npz").exists()


def test_a_discriminator_that_is_not_finite_is_refused(tmp_path):
  module = DISCRIMINATORS["vgg"](features=2)
  variables = jax.jit(module.init, static_argnames="train")(
    jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False
  )
  arrays = state_dicts.discriminator_to_state_dict(jax.tree.map(np.array, variables))
  name = next(name for name in arrays if name.endswith("running_var"))
  arrays[name].flat[0] = np.inf
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(x) for name, x in arrays.items()}, tmp_path / "d.safetensors"
  )
  with pytest.raises(UserError, match="d.safetensors: batch_stats/bn0_1/var must be finite"):
    read_discriminator(tmp_path / "d.safetensors")


@pytest.mark.developer("torch")
def test_the_digest_is_of_the_contents(tmp_path):
  model = make_model()
  write_run(tmp_path / "trained", model)
  write_torch(tmp_path / "model.pth", model)
  for form in SAVED:
    save_model(tmp_path / form, model._replace(info={"digest": "?", "ancestry": []}))
  digests = {
    read_model(tmp_path / form).info["digest"] for form in (*SAVED, "trained", "model.pth")
  }
  assert digests == {model.info["digest"]}
  assert len(model.info["digest"]) == 16

  changed = jax.tree.map(np.copy, model.variables)
  bias = changed["params"]["conv_last"]["bias"]
  bias[1] = np.nextafter(bias[1], 1, dtype=np.float32)
  assert trees.digest(changed) != model.info["digest"]
  for a, b in (
    ({"x": np.zeros((2, 3))}, {"y": np.zeros((2, 3))}),
    ({"x": np.zeros((2, 3))}, {"x": np.zeros((3, 2))}),
    ({"x": np.zeros(2), "y": np.ones(2)}, {"x": np.ones(2), "y": np.zeros(2)}),
  ):
    assert trees.digest(a) != trees.digest(b)


def test_half_and_bfloat16_files_are_read(tmp_path):
  state = state_dicts.to_state_dict("rrdbnet", make_model().variables)
  rounded = {key: array.astype(np.float16) for key, array in state.items()}
  np.savez(tmp_path / "half.npz", **rounded)
  _, variables = load_model(tmp_path / "half.npz")
  kernel = variables["params"]["conv_hr"]["kernel"]
  assert kernel.dtype == np.float32
  np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), rounded["conv_hr.weight"])

  rounded = {
    key: np.asarray(jax.numpy.asarray(array, jax.numpy.bfloat16)) for key, array in state.items()
  }
  safetensors.numpy.save_file(rounded, tmp_path / "brain.safetensors")
  _, variables = load_model(tmp_path / "brain.safetensors")
  kernel = variables["params"]["conv_hr"]["kernel"]
  np.testing.assert_allclose(kernel.transpose(3, 2, 0, 1), state["conv_hr.weight"], rtol=2**-8)


def test_a_published_file(shared, tmp_path):
  weights = shared / "weights" / "realesrgan_x4plus_anime_f16.npz"
  convert.main(["--input", str(weights), "--output", str(tmp_path / "anime.safetensors")])
  module, variables = load_model(tmp_path / "anime.safetensors")
  assert (module.blocks, module.features, module.growth, module.scale) == (6, 64, 32, 4)
  golden = np.load(shared / "golden" / "rrdb_golden.npz")  # computed with numpy and torch 2.13.0
  lr = golden["input_u8"][None].astype(np.float32) / 255
  sr = jax.jit(lambda v, lr: module.apply(v, lr, train=False))(variables, lr)[0]
  np.testing.assert_allclose(sr, golden["out_f32_realesrgan_x4plus_anime"], atol=1e-3)


def test_a_killed_save_leaves_no_torn_file(tmp_path, monkeypatch):
  path = tmp_path / "model.npz"
  save_model(path, make_model(seed=1))

  def fail(file, **arrays):
    file.write(b"half of")
    raise OSError("No space left on device")

  monkeypatch.setattr(np, "savez", fail)
  with pytest.raises(OSError, match="No space"):
    save_model(path, make_model(seed=2))
  assert read_model(path).info["digest"] == make_model(seed=1).info["digest"]


def test_a_run_is_not_overwritten(tmp_path):
  save_model(tmp_path / "run", make_model())
  with pytest.raises(ValueError, match="run is a run already; choose another --output"):
    save_model(tmp_path / "run", make_model())


@pytest.mark.parametrize("name", ["model.pdf", "run.v2"])
def test_unknown_suffixes_to_write(tmp_path, name):
  with pytest.raises(ValueError, match=rf"{name}: suffix must be .safetensors, .npz, .pth, .onnx"):
    save_model(tmp_path / name, make_model())
  assert not list(tmp_path.iterdir())


def test_unknown_suffixes_to_read(tmp_path):
  (tmp_path / "model.pdf").write_bytes(b"x")
  with pytest.raises(ValueError, match="model.pdf: refused, its suffix is none of .safetensors"):
    load_model(tmp_path / "model.pdf")


def test_what_is_missing_is_named(tmp_path):
  for name in ("model.npz", "no/run"):
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist; give a run's folder or"):
      load_model(tmp_path / name)
  (tmp_path / "run").mkdir()
  with pytest.raises(FileNotFoundError, match="run has no config.json"):
    load_model(tmp_path / "run")
  write_run(tmp_path / "other", make_model())
  (tmp_path / "other" / "config.json").rename(tmp_path / "run" / "config.json")
  with pytest.raises(FileNotFoundError, match="run has no checkpoints/"):
    load_model(tmp_path / "run")
  with pytest.raises(FileNotFoundError, match="other has no config.json"):
    load_model(tmp_path / "other")


@pytest.mark.parametrize(
  "config, message",
  [
    ("{", "config.json is not JSON"),
    ("[]", "config.json is no JSON object"),
    ("[" * 99_999, "config.json is not JSON"),
    (
      '{"scale": [], "generator": {"name": "rrdbnet", "kwargs": {}}}',
      "sets scale=.* must be a int",
    ),
    ('{"scale": 4, "generator": {"name": [], "kwargs": {}}}', "must be one of"),
    ('{"scale": 4, "generator": {"name": "rrdbnet", "kwargs": 3}}', "not the configuration of a r"),
    (
      '{"scale": 4, "generator": {"name": "rrdbnet", "kwargs": {"\\u001b[2J": 1}}}',
      r"config.json: its generator.kwargs sets \\x1b\[2J=1, but rrdbnet has no field",
    ),
    (
      '{"scale": 4, "generator": {"name": "rrdbnet", "kwargs": {}, "in_channels": "x"}}',
      "config.json is not the configuration of a run",
    ),
    ('{"scale": 4}', r"config.json is not the configuration of a run \(KeyError\('generator'\)"),
    (
      '{"scale": 4, "generator": {"name": "edsr", "kwargs": {}}}',
      "generator.name='edsr' must be one",
    ),
    (
      '{"scale": 4, "generator": {"name": "rrdbnet", "kwargs": {"features": 8}}}',
      "checkpoint of step 7 does not fit this configuration: model/params/body",
    ),
  ],
)
def test_a_config_that_does_not_fit(tmp_path, config, message):
  write_run(tmp_path, make_model())
  (tmp_path / "config.json").write_text(config)
  with pytest.raises(ValueError, match=message):
    load_model(tmp_path)


def npz(**arrays) -> bytes:
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def npy() -> bytes:
  file = io.BytesIO()
  np.save(file, np.zeros(3))
  return file.getvalue()


def told(metadata: str) -> bytes:
  return safetensors.numpy.save({"a": np.zeros(3)}, {"sr_jax": metadata})


@pytest.mark.parametrize(
  "name, contents",
  [
    *(
      (f"model{suffix}", data)
      for suffix in (".safetensors", ".npz", ".pth")
      for data in (b"", b"garbage " * 9)
    ),
    ("model.npz", b"PK\x03\x04 and no more"),
    ("model.npz", npy()),
    ("model.npz", npz(a=np.array([None]))),
    ("model.npz", npz(a=np.array(["text"]))),
    ("model.npz", npz(**{"conv_first.weight": np.zeros(3)})[:-9]),
    ("model.safetensors", told("{")),
    ("model.safetensors", told("[]")),
    ("model.safetensors", told('{"info": 3}')),
    ("model.safetensors", told('{"kwargs": []}')),
  ],
)
def test_garbage_is_one_clear_error(tmp_path, name, contents):
  (tmp_path / name).write_bytes(contents)
  with pytest.raises(ValueError, match=rf"{name}(: refused| holds no gener|: its metadata)"):
    load_model(tmp_path / name)


@pytest.mark.developer("torch")
def test_torch_files_of_other_things(tmp_path):
  import torch

  path = tmp_path / "model.pth"
  for contents in ([torch.zeros(3)], {1: torch.zeros(3)}, torch.zeros(3)):
    torch.save(contents, path)
    with pytest.raises(ValueError, match="model.pth holds no generator that sr_jax knows"):
      load_model(path)
  torch.save({"params": {"lstm": torch.zeros(3)}}, path)
  with pytest.raises(ValueError, match="model.pth holds no generator .* first key is 'lstm'"):
    load_model(path)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_a_discriminator_is_refused(tmp_path, name):
  net = DISCRIMINATORS[name](features=4)
  shapes = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)), train=False)
  )
  variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
  state = state_dicts.discriminator_to_state_dict(variables)
  np.savez(tmp_path / "model.npz", **state)
  with pytest.raises(ValueError, match="model.npz holds no generator that sr_jax knows"):
    load_model(tmp_path / "model.npz")


def test_another_architecture_is_not_believed(tmp_path):
  state = state_dicts.to_state_dict("rrdbnet", make_model().variables)
  metadata = {"architecture": "srresnet", "kwargs": {"final_activation": "tanh"}, "info": {}}
  path = tmp_path / "model.safetensors"
  path.write_bytes(safetensors.numpy.save(state, {"sr_jax": json.dumps(metadata)}))
  assert load_model(path)[0] == GENERATORS["rrdbnet"](**tiny_models.KWARGS["rrdbnet"])


def test_generators_are_built_by_name():
  module = build_generator("srresnet", {"blocks": 3, "scale": 2}, dtype="bfloat16")
  assert module == GENERATORS["srresnet"](blocks=3, scale=2, dtype=jax.numpy.dtype("bfloat16"))
  with pytest.raises(ValueError, match="'edsr' must be one of srresnet, msrresnet, rrdbnet"):
    build_generator("edsr", {})
  with pytest.raises(ValueError, match="'srresnet' has no field 'growth'; it has features, blocks"):
    build_generator("srresnet", {"growth": 32})
  for field in ("name", "parent", "dtype"):  # dtype is a matter of the machine, not of the model
    with pytest.raises(ValueError, match=f"has no field '{field}'"):
      build_generator("srresnet", {field: "float32"})


def test_shapes_are_compared_by_path():
  a = {"conv": {"kernel": np.zeros((3, 3)), "bias": np.zeros(3)}}
  trees.check_same_shapes({"a": a, "b": jax.tree.map(np.ones_like, a)})
  other = {"conv": {"kernel": np.zeros((3, 3)), "bias": np.zeros(1)}}  # tree.map would broadcast
  message = r"a and b are different networks: conv/bias is \(3,\) in a and \(1,\) in b"
  with pytest.raises(ValueError, match=message):
    trees.check_same_shapes({"a": a, "b": other})
  with pytest.raises(ValueError, match=r"conv/bias is absent in a and \(3,\) in b"):
    trees.check_same_shapes({"a": {"conv": {"kernel": np.zeros((3, 3))}}, "b": a})


def test_input_channels():
  assert in_channels(make_model().variables, {}) == 3
  model = make_model(out_channels=1, scale=1, input_unshuffle=4)
  assert in_channels(model.variables, model.kwargs) == 1
