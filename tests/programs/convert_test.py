"""Tests of sr_jax/convert.py, models/inspection.py and models/model_card.py: from form to form, and
what is said of a file.
"""

import hashlib
import json
import re

import numpy as np
import pytest
import safetensors
from tiny_models import assert_equal_trees, make_model

from sr_jax import convert
from sr_jax.formats import state_dicts
from sr_jax.models.model import Model
from sr_jax.models import catalog
from sr_jax.models.read import without_folders, read_model
from sr_jax.models.write import save_model
from sr_jax.networks.build import DISCRIMINATORS


def run(*arguments) -> None:
  convert.main([str(argument) for argument in arguments])


def trained_model(**kwargs) -> Model:
  """A model that knows where it comes from."""
  model = make_model(**kwargs)
  config = {
    "seed": 3,
    "data": {"source": "photos", "batch_size": 16, "hr_patch": 128},
    "pixel": {"weight": 0.01, "loss": "l1"},
    "perceptual": {"weight": 0.0},
    "learning_rate": {"schedule": "multi_step", "base": 1e-4, "milestones": [5, 6]},
  }
  return model._replace(
    info={**model.info, "ancestry": ["0123456789abcdef"], "step": 400, "config": config}
  )


def inspected(capsys, path) -> dict[str, str]:
  run("--inspect", path)
  return dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ""])
def test_every_form_and_back(tmp_path, suffix):
  model = trained_model()
  save_model(tmp_path / "start.safetensors", model)
  run("--input", tmp_path / "start.safetensors", "--output", tmp_path / f"there{suffix}")
  run("--input", tmp_path / f"there{suffix}", "--output", tmp_path / "back.safetensors")
  back = read_model(tmp_path / "back.safetensors")
  assert_equal_trees(back.variables, model.variables)
  back.info.pop("file")
  assert back.info == model.info
  run("--input", tmp_path / "back.safetensors", "--output", tmp_path / "again.safetensors")
  first, last = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("back", "again"))
  assert first == last


@pytest.mark.developer("torch")
def test_a_torch_file_and_back(tmp_path):
  import torch

  model = trained_model()
  save_model(tmp_path / "start.npz", model)
  run("--input", tmp_path / "start.npz", "--output", tmp_path / "there.pth")
  loaded = torch.load(tmp_path / "there.pth", weights_only=True)
  expected = state_dicts.to_state_dict(model.name, model.variables)
  assert set(loaded["params_ema"]) == set(expected)
  for key, tensor in loaded["params_ema"].items():
    np.testing.assert_array_equal(tensor.numpy(), expected[key])
  back = read_model(tmp_path / "there.pth")
  assert_equal_trees(back.variables, model.variables)
  assert back.info["ancestry"] == ["0123456789abcdef"] and back.info["step"] == 400


@pytest.mark.parametrize("dtype, bits", [("float16", 11), ("bfloat16", 8)])
def test_smaller_weights(tmp_path, dtype, bits):
  model = make_model()
  save_model(tmp_path / "wide.npz", model)
  run("--input", tmp_path / "wide.npz", "--output", tmp_path / "half.safetensors", "--dtype", dtype)
  with safetensors.safe_open(tmp_path / "half.safetensors", "numpy") as file:
    assert file.get_slice("conv_first.weight").get_dtype() == {"float16": "F16"}.get(dtype, "BF16")
    assert file.metadata()["architecture"] == "rrdbnet" and file.metadata()["scale"] == "4"
  back = read_model(tmp_path / "half.safetensors")
  assert back.info["file"]["dtype"] == dtype
  ours, theirs = (m.variables["params"]["conv_last"]["kernel"] for m in (model, back))
  assert 0 < np.abs(ours / theirs - 1).max() <= 2.0**-bits


def test_what_does_not_fit_half_is_named(tmp_path):
  model = make_model()
  model.variables["params"]["conv_hr"]["bias"][1] = 1e5
  with pytest.raises(ValueError, match="conv_hr.bias has values too large for float16; try bfloat"):
    save_model(tmp_path / "x.safetensors", model, dtype="float16")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "output, dtype, message",
  [
    ("x.npz", "bfloat16", "numpy's files have no bfloat16"),
    ("x.stablehlo", "float16", "computes in float32"),
    ("x.onnx", "bfloat16", "do not read bfloat16"),
    ("run", "float16", "a run holds float32"),
    ("x.npz", "int8", "--dtype=int8 must be one of float32, float16, bfloat16"),
    (
      "x.ckpt",
      "float32",
      "suffix must be .safetensors, .npz, .pth, .onnx, .stablehlo, or none",
    ),
  ],
)
def test_what_does_not_go_together(tmp_path, output, dtype, message):
  save_model(tmp_path / "m.npz", make_model())
  with pytest.raises(ValueError, match=message):
    run("--input", tmp_path / "m.npz", "--output", tmp_path / output, "--dtype", dtype)
  assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


def discriminator(name: str) -> dict[str, np.ndarray]:
  """Random weights of a small discriminator with BasicSR's names."""
  import jax
  import jax.numpy as jnp

  module = DISCRIMINATORS[name](features=4)
  image = jnp.zeros((1, 64, 64, 3))
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, train=False))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32), shapes)
  return state_dicts.discriminator_to_state_dict(variables)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_pass_through_unchanged(tmp_path, name, capsys):
  state = discriminator(name)
  np.savez(tmp_path / "d.npz", **state)
  run("--input", tmp_path / "d.npz", "--output", tmp_path / "d.safetensors")
  assert f"d.safetensors: {name} " in capsys.readouterr().out
  with safetensors.safe_open(tmp_path / "d.safetensors", "numpy") as file:
    assert set(file.keys()) == set(state)
    for key in set(state) - {"conv1.weight_v"}:
      if not key.endswith("weight_v"):  # follows from weight and u
        np.testing.assert_array_equal(file.get_tensor(key), state[key])
  assert inspected(capsys, tmp_path / "d.safetensors")["network"] == name
  for output in ("run", "x.onnx", "x.stablehlo"):
    with pytest.raises(ValueError, match=f"{output}: '{name}' is a discriminator"):
      run("--input", tmp_path / "d.npz", "--output", tmp_path / output)


def test_inspecting_a_generator(tmp_path, capsys):
  model = trained_model(growth=32, features=8)
  save_model(tmp_path / "m.safetensors", model)
  facts = inspected(capsys, tmp_path / "m.safetensors")
  data = (tmp_path / "m.safetensors").read_bytes()
  assert facts["sha256"] == hashlib.sha256(data).hexdigest()
  assert facts["size"] == f"{len(data):,} bytes"
  assert (facts["network"], facts["scale"], facts["growth"]) == ("rrdbnet", "4", "32")
  state = state_dicts.to_state_dict(model.name, model.variables)
  assert facts["parameters"] == f"{sum(map(np.size, state.values())):,}"
  assert (facts["dialect"], facts["dtype"]) == ("basicsr", "float32")
  assert facts["weights"] == model.info["digest"]
  assert facts["step"] == "400" and facts["spandrel"].startswith("reads it")
  assert facts["trained from"] == "0123456789abcdef"


def test_inspecting_a_run_and_other_files(tmp_path, capsys):
  save_model(tmp_path / "run", trained_model())
  assert inspected(capsys, tmp_path / "run")["network"] == "rrdbnet"
  for suffix in (".onnx", ".stablehlo"):
    if suffix == ".onnx":
      pytest.importorskip("onnx", reason="needs onnx (requirements-test.txt)")
    run("--input", tmp_path / "run", "--output", tmp_path / f"m{suffix}")
    capsys.readouterr()
    facts = inspected(capsys, tmp_path / f"m{suffix}")
    assert facts["sha256"] == catalog.sha256(tmp_path / f"m{suffix}")
    assert "input" in facts and "output" in facts


def test_inspecting_vgg(shared, capsys):
  facts = inspected(capsys, shared / "weights" / "vgg19_conv_compact.npz")
  assert (facts["network"], facts["convention"]) == ("vgg19", "caffe")
  assert facts["parameters"] == "20,024,384"  # Simonyan and Zisserman: E without its linear layers


def test_what_is_none_of_them_is_refused(tmp_path):
  np.savez(tmp_path / "x.npz", weight=np.zeros(3))
  for arguments in (["--inspect", "x.npz"], ["--input", "x.npz", "--output", "y.npz"]):
    with pytest.raises(ValueError, match="x.npz holds no generator that sr_jax knows"):
      run(*[str(tmp_path / a) if a.endswith("npz") else a for a in arguments])
  with pytest.raises(ValueError, match="--inspect=X stands alone"):
    run("--inspect", tmp_path / "x.npz", "--output", tmp_path / "y.npz")


def test_the_card_says_what_is_known_and_lists_the_rest(tmp_path, capsys):
  model = trained_model()
  save_model(tmp_path / "m.npz", model)
  run(
    "--input", tmp_path / "m.npz", "--output", tmp_path / "4x_mine.safetensors", "--card",
    "--author", "A | B <script>", "--license", "CC-BY-4.0",
  )  # fmt: skip
  said = capsys.readouterr().out
  assert said.splitlines()[-1] == "left for you to fill in: name, tags, description, images"
  file = tmp_path / "4x_mine.safetensors"
  digest = hashlib.sha256(file.read_bytes()).hexdigest()
  assert (tmp_path / "4x_mine.safetensors.sha256").read_text() == f"{digest}  {file.name}\n"

  entry = json.loads((tmp_path / "4x_mine.safetensors.openmodeldb.json").read_text())
  assert entry.pop("date").count("-") == 2
  assert entry == {
    "author": "A | B <script>",
    "license": "CC-BY-4.0",
    "architecture": "esrgan",
    "size": ["4nf", "2nb"],
    "scale": 4,
    "inputChannels": 3,
    "outputChannels": 3,
    "resources": [
      {
        "platform": "pytorch", "type": "safetensors", "size": file.stat().st_size,
        "sha256": digest, "urls": [],
      }
    ],
    "trainingIterations": 400,
    "trainingBatchSize": 16,
    "trainingHRSize": 128,
    "trainingOTF": False,
    "dataset": "photos",
    "pretrainedModelG": "0123456789abcdef",
  }  # fmt: skip
  card = (tmp_path / "4x_mine.safetensors.md").read_text()
  head, body = card.removeprefix("---\n").split("\n---\n")
  assert 'license: "cc-by-4.0"' in head.splitlines() and "- super-resolution" in head.splitlines()
  assert "<script>" not in body and "A \\| B &lt;script>" in body
  assert f"| sha256 | `{digest}` |" in body
  assert "| steps | 400 |" in body and "| pixel loss | weight 0.01, loss l1 |" in body
  assert "perceptual" not in body  # weight 0: it was not there
  assert "growth" in body.split("## Use")[1]  # spandrel refuses growth 3, and the card says so


@pytest.mark.parametrize("degradation", ["real_esrgan", "bicubic"])
def test_the_card_says_how_lr_images_were_made(tmp_path, degradation):
  model = trained_model()
  model.info["config"]["data"]["degradation"] = degradation
  save_model(tmp_path / "m.npz", model)
  run("--input", tmp_path / "m.npz", "--output", tmp_path / "n.safetensors", "--card")
  entry = json.loads((tmp_path / "n.safetensors.openmodeldb.json").read_text())
  assert entry["trainingOTF"] is (degradation == "real_esrgan")
  assert f"| LR images | {degradation} |" in (tmp_path / "n.safetensors.md").read_text()


def test_a_card_goes_with_a_generators_file(tmp_path):
  save_model(tmp_path / "m.npz", make_model())
  with pytest.raises(ValueError, match="--card describes a generator's file"):
    run("--input", tmp_path / "m.npz", "--output", tmp_path / "run", "--card")
  assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


def test_no_folder_of_the_user_gets_into_a_file(tmp_path):
  config = {
    "data": {"source": "/home/anna/holiday photos/", "cache_dir": "C:\\Users\\anna\\cache"},
    "init_from": "../anna/run", "psnr": {"data": {"source": "tfds:div2k/bicubic_x4"}},
    "perceptual": {"weights": "hf:timm/vgg19.tv_in1k", "layers": ["conv5_4:1.0"]},
  }  # fmt: skip
  published = without_folders(config)
  assert "anna" not in json.dumps(published)
  assert published["data"]["source"] == "holiday photos"
  assert published["psnr"]["data"]["source"] == "tfds:div2k/bicubic_x4"
  assert published["perceptual"] == config["perceptual"]
  several = {"a": "tfds:div2k/x4,/home/anna/x,/home/anna/y", "b": ("/home/anna/z", 3)}
  assert without_folders(several) == {"a": "tfds:div2k/x4,x,y", "b": ["z", 3]}
  schemes = {"a": "list:/home/anna/x.txt", "b": "gs://anna/run", "c": r"C:\Users\anna\x"}
  assert without_folders(schemes) == {"a": "list:x.txt", "b": "run", "c": "x"}


def test_a_folder_with_something_in_it_is_not_made_a_run(tmp_path):
  save_model(tmp_path / "m.npz", make_model())
  (tmp_path / "project").mkdir()
  (tmp_path / "project" / "config.json").write_text("mine")
  with pytest.raises(ValueError, match="project exists and is not empty; choose another --output"):
    run("--input", tmp_path / "m.npz", "--output", tmp_path / "project")
  assert (tmp_path / "project" / "config.json").read_text() == "mine"


def test_what_an_author_wrote_is_kept(tmp_path, capsys):
  save_model(tmp_path / "m.npz", make_model())
  arguments = ["--input", tmp_path / "m.npz", "--output", tmp_path / "x.npz", "--card"]
  run(*arguments)
  (tmp_path / "x.npz.md").write_text("my words")
  run(*arguments)
  assert (tmp_path / "x.npz.md").read_text() == "my words"
  assert "x.npz.md is left as it is" in capsys.readouterr().out


@pytest.mark.parametrize(
  "told",
  [
    {"info": {"config": "x"}},
    {"info": {"config": {"data": "x"}}},
    {"info": {"interpolation": "x"}},
    {"info": {"step": -1}},
    {"info": {"step": True}},
    {"architecture": "rrdbnet", "kwargs": {"residual_scale": "abc"}},
    {"architecture": "rrdbnet", "kwargs": {"remat": [1]}},
    {"architecture": "rrdbnet", "kwargs": {"unroll": 1.5}},
  ],
)
def test_metadata_of_strangers_are_one_clear_error(tmp_path, told):
  model = make_model()
  state = state_dicts.to_state_dict(model.name, model.variables)
  np.savez(tmp_path / "m.npz", **state, sr_jax=np.array(json.dumps(told)))
  with pytest.raises(ValueError, match="m.npz: its metadata"):
    read_model(tmp_path / "m.npz")
