"""What earlier versions wrote is still read: runs, resumed too, model files and packs."""

import functools
import json
import pathlib
import shutil
import tarfile

import jax
import numpy as np
import pytest

from configs import esrgan
from configs import esrgan_psnr
from sr_jax import prepare
from sr_jax.data.pack import open_pack
from sr_jax.models import load_model
from sr_jax.models import write
from sr_jax.models.read import read_model
from sr_jax.models.write import save_model
from sr_jax.training.run import train_and_evaluate
import tiny_models

FIXTURES = pathlib.Path(__file__).resolve().parent / "fixtures"
WRITTEN = FIXTURES / "written_by_0"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
# Before checkpoints and model files said which format they have.
WRITTEN_LATER = FIXTURES / "written_by_1"
EXPECTED_LATER = json.loads((WRITTEN_LATER / "expected.json").read_text())
SETTINGS = {
  "data.source": "photos",
  "data.hr_patch": 32,
  "data.batch_size": 8,
  "data.input": "device",
  "generator.kwargs.features": 2,
  "generator.kwargs.blocks": 1,
  "log.tensorboard": False,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> pathlib.Path:
  """The folder with its runs unpacked; tests that change one copy it."""
  folder = tmp_path_factory.mktemp("compatibility") / "written"
  shutil.copytree(WRITTEN, folder)
  with tarfile.open(folder / "runs.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder


@pytest.fixture(scope="module")
def written_later(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("compatibility") / "written"
  shutil.copytree(WRITTEN_LATER, folder)
  shutil.copytree(WRITTEN / "photos", folder / "photos")
  with tarfile.open(folder / "runs.tar.xz") as archive:
    archive.extractall(folder, filter="data")
  return folder


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
  with np.load(WRITTEN / "expected.npz") as file:
    return dict(file)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, variables, lr):
  return module.apply(variables, lr, train=False)


def tiny(config, **overrides):
  """A recipe with those settings of the runs that decide what their checkpoints hold."""
  config.update_from_flattened_dict({**SETTINGS, **overrides})
  return config.lock()


@pytest.mark.parametrize("path", EXPECTED["models"])
def test_models_are_what_they_were(written, arrays, path):
  model, expected = read_model(written / path), EXPECTED["models"][path]
  assert model.name == expected["name"]
  today = {"dense": "algorithm"}  # what fields are called since
  assert model.kwargs == {today.get(key, key): x for key, x in expected["kwargs"].items()}
  assert {key: model.info[key] for key in ("digest", "ancestry", "step")} == {
    key: expected[key] for key in ("digest", "ancestry", "step")
  }
  module, variables = load_model(written / path)
  sr = apply(module, variables, arrays["lr"])
  np.testing.assert_allclose(sr, arrays[f"sr/{path}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", EXPECTED_LATER["models"])
def test_models_without_a_number_of_their_format_are_read(written_later, path):
  model, expected = read_model(written_later / path), EXPECTED_LATER["models"][path]
  assert [model.name, model.kwargs] == [expected["name"], expected["kwargs"]]
  for key in ("digest", "ancestry", "step"):
    assert model.info[key] == expected[key]
  module, variables = load_model(written_later / path)
  with np.load(WRITTEN_LATER / "expected.npz") as file:
    sr = apply(module, variables, file["lr"])
    np.testing.assert_allclose(sr, file[f"sr/{path}"], rtol=0, atol=1e-5)


def test_checkpoints_without_a_digest_of_their_manifest_are_gone_on_from(
  written_later, tmp_path, monkeypatch, capsys
):
  """Opened and not trained, which the next test but one does with an older one."""
  shutil.copytree(written_later, tmp_path / "copy")
  monkeypatch.chdir(tmp_path / "copy")
  manifest = json.loads(pathlib.Path("unfinished/checkpoints/2/manifest/metadata").read_text())
  assert manifest["format"] == 1 and "digest" not in manifest
  config = tiny(esrgan_psnr.get_config("residual"), total_steps=2, **{"eval.source": ""})
  assert train_and_evaluate(config, "unfinished") == ""
  assert "unfinished is finished: 2 steps. Nothing to do." in capsys.readouterr().out
  network = {"generator.kwargs.growth": 1, "discriminator.name": "unet"}
  config = tiny(esrgan.get_config("demo"), **network, **{"discriminator.kwargs.features": 1})
  with config.unlocked():
    config.psnr.generator = config.generator
  with config.unlocked():
    config.total_steps = 2
  assert train_and_evaluate(config, "run") == ""
  assert "run is finished: 2 steps. Nothing to do." in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_newer_format_of_model_files_is_refused(tmp_path, monkeypatch, suffix):
  path = tmp_path / f"model{suffix}"
  with monkeypatch.context() as patched:
    patched.setattr(write, "FORMAT", 99)
    save_model(path, tiny_models.make_model())
  with pytest.raises(ValueError, match="has format 99, this sr_jax reads up to 2; update sr_jax"):
    read_model(path)
  save_model(path, tiny_models.make_model())
  read_model(path)


def test_a_finished_run_is_finished(written, monkeypatch, capsys):
  monkeypatch.chdir(written)  # the configuration names the photos as they lie there
  before = {path: path.stat().st_mtime_ns for path in (written / "run").rglob("*")}
  discriminator = {"discriminator.name": "unet", "discriminator.kwargs.features": 1}
  networks = {"generator.kwargs.growth": 1, **discriminator}
  config = tiny(esrgan.get_config("demo"), total_steps=2, **{"eval.source": "photos", **networks})
  with config.unlocked():
    config.psnr.generator = config.generator
  assert train_and_evaluate(config, "run") == ""
  assert "run is finished: 2 steps. Nothing to do." in capsys.readouterr().out
  assert {path: path.stat().st_mtime_ns for path in (written / "run").rglob("*")} == before


def test_an_unfinished_run_goes_on_to_the_same_weights(
  written, arrays, tmp_path, monkeypatch, capsys, caplog
):
  steps, digests = EXPECTED["unfinished"]["steps"], EXPECTED["unfinished"]["digests"]
  shutil.copytree(written / "unfinished", tmp_path / "unfinished")
  shutil.copytree(written / "photos", tmp_path / "photos")
  monkeypatch.chdir(tmp_path)
  before = read_model("unfinished").info
  assert [before["step"], before["digest"]] == [steps[0], digests[0]]
  rate = {"learning_rate.base": 1e-3, "learning_rate.milestones": (3,)}
  rest = {**rate, "ema.decay": 0.9, "ema.warmup": True, "eval.source": ""}
  config = tiny(esrgan_psnr.get_config("residual"), total_steps=steps[1], **rest)
  assert train_and_evaluate(config, "unfinished") == ""
  assert f"resuming at step {steps[0]}" in capsys.readouterr().out
  assert "config.total_steps of unfinished was 2, is now 4" in caplog.text
  assert "training images are not those" not in caplog.text
  after = read_model("unfinished")
  assert after.info["step"] == steps[1]
  # Not by the digest: other processors, and more devices than the one of then, round otherwise.
  values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(after.variables)])
  np.testing.assert_allclose(values, arrays["continued"], rtol=0, atol=1e-5)


def test_a_pack_is_what_it_was(written, capsys):
  prepare.main(["--verify", str(written / "pack")])
  assert "every image has its sha256" in capsys.readouterr().out
  pack, expected = open_pack(written / "pack"), EXPECTED["pack"]
  assert [pack.digest, list(pack.names), pack.scale] == list(expected.values())


def test_images_are_packed_as_they_were(written, tmp_path):
  prepare.main(["--input", str(written / "photos"), "--output", str(tmp_path / "pack")])
  assert open_pack(tmp_path / "pack").digest == EXPECTED["pack"]["digest"]
  for file in ("hr.bin", "lr.bin"):
    assert (tmp_path / "pack" / file).read_bytes() == (written / "pack" / file).read_bytes()
