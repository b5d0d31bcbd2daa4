"""sr_jax.interpolate: one alpha, and sweeps, whose scores are those of sr_jax.evaluate."""

import json

import numpy as np
import pytest
from tiny_models import make_model

from sr_jax import UserError, evaluate, interpolate
from sr_jax.images.files import read_image, write_image
from sr_jax.models.read import read_model
from sr_jax.models.write import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Two models of one network, and a set with a colour and a grey image of one size."""
  folder = tmp_path_factory.mktemp("sweep")
  for i, name in enumerate(("psnr", "gan")):
    save_model(folder / f"{name}.safetensors", make_model("residualnet", seed=i, blocks=1))
  rng = np.random.default_rng(0)
  write_image(folder / "set" / "colour.png", rng.integers(0, 256, (48, 64, 3)).astype(np.uint8))
  write_image(folder / "set" / "grey.png", rng.integers(0, 256, (48, 64)).astype(np.uint8))
  return folder


def arguments(folder, output: str) -> list[str]:
  return [
    "--psnr", str(folder / "psnr.safetensors"), "--gan", str(folder / "gan.safetensors"),
    "--output", str(folder / output),
  ]  # fmt: skip


def test_a_sweep_has_the_scores_that_evaluate_gives_each_alpha(folder, capsys):
  interpolate.main([
    *arguments(folder, "out"), "--sweep", "0:1:0.5", "--data", str(folder / "set"),
    "--metrics", "psnr,ssim", "--select", "psnr_drop<=99",
  ])  # fmt: skip
  assert "alpha 1, the largest with psnr_drop<=99" in capsys.readouterr().out
  chosen = read_model(folder / "out" / "selected.safetensors")
  assert chosen.info["interpolation"]["alpha"] == 1
  for alpha in ("0", "0.5", "1"):
    file = f"alpha_{alpha}.safetensors"
    interpolate.main([*arguments(folder, file), "--alpha", alpha])
    evaluate.main([
      "--model", str(folder / file), "--data", str(folder / "set"), "--metrics", "psnr,ssim",
      "--output", str(folder / f"evaluated_{alpha}"),
    ])  # fmt: skip
    theirs, ours = (
      json.loads((place / "results.json").read_text())["sets"]["set"]
      for place in (folder / f"evaluated_{alpha}", folder / "out" / f"alpha_{alpha}")
    )
    for name in ("colour.png", "grey.png"):
      assert ours["images"][name].keys() == theirs["images"][name].keys()
      for key, value in theirs["images"][name].items():
        assert ours["images"][name][key] == pytest.approx(value, abs=2e-3), (alpha, name, key)
  assert (folder / "out" / "sweep.svg").read_text().startswith("<svg")
  strip = read_image(folder / "out" / "strip.png")
  assert strip.shape[1] == 5 * (2 * 96 + 8) + 8  # LR, three alphas, HR
  table = json.loads((folder / "out" / "table.json").read_text())["models"]
  assert list(table) == ["alpha 0", "alpha 0.5", "alpha 1"]


@pytest.mark.parametrize(
  "more, message",
  [
    (["--sweep", "0:1:0.5"], "go together"),
    (["--data", "x"], "go together"),
    (["--input", "x"], "go together"),
    (["--select", "rmse<=9"], "go together"),
    (["--sweep", "0:1:0.5", "--input", "x", "--select", "rmse<=9"], "--select goes with --data"),
    (["--sweep", "0:1:0.5", "--input", "x", "--data", "y"], "give one"),
  ],
)
def test_flags_that_go_together(folder, more, message, capsys):
  with pytest.raises(SystemExit):
    interpolate.main([*arguments(folder, "none"), *more])
  assert message in " ".join(capsys.readouterr().err.split())
  assert not (folder / "none").exists()


@pytest.mark.parametrize(
  "select, message",
  [
    ("niqe<=4", "niqe will not be computed; there are psnr_drop, rmse, psnr_y"),
    ("nonsense<=4", "nonsense will not be computed"),
    ("psnr_drop<=1", "needs alpha 0; begin with --sweep=0:1:0.1"),
  ],
)
def test_a_choice_that_cannot_be_made_is_told_before_anything_is_scored(folder, select, message):
  with pytest.raises(UserError, match=message):
    interpolate.main([
      *arguments(folder, "none"), "--sweep", "0.5:1:0.5", "--data", str(folder / "set"),
      "--metrics", "psnr", "--select", select,
    ])  # fmt: skip
  assert not (folder / "none").exists()


def test_photographs_that_cannot_be_shown(folder):
  (folder / "empty").mkdir()
  (folder / "torn.png").write_bytes(b"no image")
  sweep = [*arguments(folder, "none"), "--sweep", "0:1:0.01", "--input"]
  for names, message in (
    (["empty"], "there is no image in --input=.*empty"),
    (["torn.png"], "1 of 1 photographs are not shown:\n.*torn.png"),
    (["absent.png"], "absent.png"),
    (["set/grey.png"] * 30, "the page has room for 495 pixels at 101 alphas; give fewer, or a"),
  ):
    with pytest.raises((UserError, OSError), match=message):
      interpolate.main([*sweep, *(str(folder / name) for name in names)])
  assert not (folder / "none").exists()
