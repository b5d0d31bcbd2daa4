"""`~` in any path that a person gives means the home folder, by whatever program it is read."""

import os

from PIL import Image
import pytest
from tiny_models import make_model

from sr_jax import convert, evaluate, interpolate, prepare, upscale
from sr_jax.models.read import load_model
from sr_jax.models.write import save_model


@pytest.fixture
def home(tmp_path, monkeypatch):
  """A home folder with a photograph and a model, and an empty current folder beside it."""
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home" / "photos").mkdir(parents=True)
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  Image.new("RGB", (32, 24), (90, 60, 30)).save(tmp_path / "home" / "photos" / "a.png")
  save_model(tmp_path / "home" / "model.safetensors", make_model("residualnet", blocks=1))
  return tmp_path / "home"


def test_every_program_knows_the_home_folder(home):
  model = "~/model.safetensors"
  load_model(model)
  convert.main(["--input", model, "--output", "~/out/model.npz"])
  convert.main(["--inspect", model])
  interpolate.main(["--psnr", model, "--gan", model, "--output", "~/out/half.npz"])
  upscale.main(["--model", model, "--input", "~/photos/a.png", "--output", "~/out/up",
                "--engine", "jax"])  # fmt: skip
  prepare.main(["--input", "~/photos", "--output", "~/out/pack"])
  prepare.main(["--verify", "~/out/pack"])
  evaluate.main(["--model", "bicubic", "--data", "~/photos", "--metrics", "psnr",
                 "--output", "~/out/scores"])  # fmt: skip
  for path in ("model.npz", "half.npz", "up/a.png", "pack/index.json", "scores/report.html"):
    assert (home / "out" / path).is_file(), path
  assert os.listdir() == []  # no folder that is called ~
