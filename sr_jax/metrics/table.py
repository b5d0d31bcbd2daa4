"""Every score, a row of one table: how it is computed, which way it points, how it is shown."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from sr_jax.metrics.psnr_ssim import SSIM_WINDOW

# One model's scores of an image, or their means over a set, by the keys of SCORES.
Scores = Mapping[str, float]
Table = Mapping[str, Mapping[str, Scores]]  # {model: {set: scores}}


class Score(NamedTuple):
  """A column of the table.

  Attributes:
    metric: the name by which `--metrics` asks for it; '' for what `--ma` adds.
    digits: after the decimal point.
    better: 1 where more is better, -1 where less is.
    how: a description of its computation, for the protocol.
    function: (sr, hr, border) -> float of one saved image, uint8 [H, W, 3] or [H, W]; NaN where the
      image has no such score, which leaves it out of the mean. None where `score_batch` or
      `perceptual_indices` computes it.
  """

  metric: str
  digits: int
  better: int
  how: str = ""
  function: Callable[[np.ndarray, np.ndarray, int], float] | None = None


_PSNR = "10 log10(255^2 / MSE), float64, mean over images; null (infinite) for equal images"
_SSIM = f"{SSIM_WINDOW}x{SSIM_WINDOW} Gaussian, sigma 1.5, valid area, per channel, float64, "
_SSIM += "mean over images"
_LPIPS = "LPIPS 0.1, {}, RGB, mean over images; a grey file as three equal channels"
_NIQE = "NIQE of Y, rounded, 96x96 blocks; images too small or flat for it are left out"

# In the order of columns.
SCORES = {
  "psnr_y": Score("psnr", 2, 1, _PSNR),
  "ssim_y": Score("ssim", 4, 1, _SSIM),
  "psnr_rgb": Score("psnr", 2, 1, _PSNR),
  "ssim_rgb": Score("ssim", 4, 1, _SSIM),
  "lpips_alex": Score("lpips_alex", 4, -1, _LPIPS.format("AlexNet")),
  "lpips_vgg": Score("lpips_vgg", 4, -1, _LPIPS.format("VGG16")),
  "niqe": Score("niqe", 4, -1, _NIQE),
  "ma": Score("", 4, 1),
  "pi": Score("", 4, -1, "((10 - Ma) + NIQE) / 2 of the set's means (PIRM 2018); Ma was given"),
  "rmse": Score("", 4, -1, "root of the set's mean squared error of Y (PIRM 2018)"),
}
METRICS = tuple(dict.fromkeys(score.metric for score in SCORES.values() if score.metric))
ALWAYS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")  # what is computed unasked
LPIPS = "lpips_alex"  # computed in training too, where its weights are installed
IN_TRAINING = (*ALWAYS, LPIPS)  # `checkpoint.best_metric` is one of these


def columns(table: Table) -> list[str]:
  """Returns the scores that any row has, in the order of SCORES."""
  there = {key for sets in table.values() for scores in sets.values() for key in scores}
  return [key for key in SCORES if key in there]


def protocol(there: Iterable[str], lr: Mapping[str, str] | None = None) -> dict[str, str]:
  """Says how scores are computed: what all have in common, and each of those that are there.

  Args:
    there: the scores.
    lr: {set: where its LR images come from}; '' or no entry for MATLAB's bicubic.
  """
  lr = {name: source for name, source in (lr or {}).items() if source}
  how = {
    "lr": "MATLAB bicubic of the HR image, uint8, rounded between rows and columns"
    + "".join(f"; of {name}: LR images of {source}" for name, source in lr.items()),
    "sr": "clipped to [0, 255], rounded half up, uint8",
    "crop_border": "scale",
    "y": "BT.601 studio range: 65.481 R + 128.553 G + 24.966 B + 16; a grey file as it stands",
  }
  there = {*ALWAYS, *there}
  for key, score in SCORES.items():
    if key in there and score.how:
      how[key if score.function else score.metric or key] = score.how
  return how


def direction(key: str) -> int:
  """1 where more is better, -1 where less is, 0 for what is no score."""
  return SCORES[key].better if key in SCORES else 0
