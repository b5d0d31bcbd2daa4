"""Tests of benchmarks/precision.py: what it reads from two runs, and that it starts them."""

import json

import pytest

from benchmarks import precision
from sr_jax import cli


def lines(losses, psnr):
  curve = [{"step": 10 * (i + 1), "loss_g": loss} for i, loss in enumerate(losses)]
  return [*curve, {"step": 10 * len(losses), "eval/psnr_y": psnr}]


def test_the_last_fifth_of_the_steps_and_the_last_score_are_compared():
  runs = {
    "float32": lines([9, 9, 9, 9, 9, 9, 9, 9, 3, 1], 27.5),
    "bfloat16": lines([9, 9, 9, 9, 9, 9, 9, 9, 4, 2], 27.25),
  }
  assert precision.compare(runs) == {
    "psnr_y": {"float32": 27.5, "bfloat16": 27.25},
    "loss_g": {"float32": 2, "bfloat16": 3},
    "psnr_y_difference": -0.25,
  }
  del runs["bfloat16"][-1]
  with pytest.raises(ValueError, match="a run has no PSNR"):
    precision.compare(runs)


@pytest.mark.slow
def test_a_short_run_in_both(tmp_path, capsys):
  pytest.importorskip("ml_collections")
  arguments = [
    "--config=configs/esrgan_psnr.py:demo", "--source=skimage:train", "--held_out=skimage:test",
    "--steps=2", "--every=1", f"--output={tmp_path}", "--config.eval.max_images=1",
    "--config.data.hr_patch=16", "--config.data.batch_size=8", "--config.log.tensorboard=False",
    "--config.data.input=device",
  ]  # fmt: skip
  small = {"features": 4, "growth": 4, "blocks": 1}
  arguments += [f"--config.generator.kwargs.{key}={value}" for key, value in small.items()]
  precision.main(arguments)
  result = json.loads((tmp_path / "precision.json").read_text())
  assert set(result["psnr_y"]) == {"float32", "bfloat16"}
  first = [result["runs"][dtype][0]["loss_g"] for dtype in precision.DTYPES]
  assert first[0] != first[1] == pytest.approx(first[0], rel=2e-2)  # the same crops and weights
  assert "bfloat16 less float32" in capsys.readouterr().out


def test_a_run_that_fails_is_told(tmp_path):
  with pytest.raises(SystemExit, match="the run in float32 ended with status 1"):
    cli.guarded(precision.main)(
      ["--config=configs/esrgan_psnr.py:demo", "--source=/none", "--held_out=/none",
       f"--output={tmp_path}"]
    )  # fmt: skip
