"""Writes one's own photographs, upscaled at each alpha, as one page to choose alpha by eye.

The page has a slider over alpha, a wipe between the photograph and the upscaled one, and zoom. It
opens offline: every frame is in it. `alpha.html` beside this file is its frame, with the script;
`sr_jax.serve` shows the same page, and upscales what is dropped there.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sr_jax.evaluation.page import LOSSLESS, WEBP_MAX_SIDE, encode, escape, fill, to_json, uri

FRAME = pathlib.Path(__file__).with_name("alpha.html")
MAX_PIXELS = 24_000_000  # of all frames together: some 10 to 15 MB of lossy WebP
LOSSLESS_PIXELS = 6_000_000  # up to which they are lossless, some 10 MB
LOSSY = {"quality": 95, "method": 4}


def part(height: int, width: int, max_pixels: float, max_side: float) -> tuple[slice, slice]:
  """Finds the middle of an image that a page has room for, with the image's proportions.

  Args:
    height: of the image.
    width: of the image.
    max_pixels: how many pixels the part may have.
    max_side: how long its sides may be.
  """
  shrink = min(1.0, math.sqrt(max_pixels / (height * width)), max_side / max(height, width))
  rows, columns = (max(1, int(n * shrink)) for n in (height, width))
  top, left = (height - rows) // 2, (width - columns) // 2
  return slice(top, top + rows), slice(left, left + columns)


def room(photographs: int, alphas: int, scale: int) -> tuple[float, float]:
  """Returns how many LR pixels of each photograph a page has room for, and how long its sides."""
  return MAX_PIXELS / (photographs * alphas * scale**2), WEBP_MAX_SIDE // scale


def encode_photograph(
  name: str, whole: Sequence[int], lr: np.ndarray, srs: Sequence[np.ndarray], photographs: int
) -> dict[str, Any]:
  """Encodes what a page shows of one photograph.

  Args:
    name: what the page calls it.
    whole: height and width of the whole photograph.
    lr: the part that is shown, uint8 [h, w, 3].
    srs: this part upscaled at each alpha, uint8 [h*s, w*s, 3].
    photographs: how many the page shows.
  """
  height, width = srs[0].shape[:2]
  is_lossless = photographs * len(srs) * height * width <= LOSSLESS_PIXELS
  about = f"{name}: {whole[1]}×{whole[0]} pixels"
  if lr.shape[:2] != tuple(whole):
    about += (
      f", of which this page shows the middle {lr.shape[1]}×{lr.shape[0]}, to stay small; crop the "
      "photograph to what you want to see"
    )
  about += f". Enlarged to {width}×{height}, " + (
    "without loss."
    if is_lossless
    else f"as lossy WebP of quality {LOSSY['quality']}: to look at, not to measure."
  )
  how = LOSSLESS if is_lossless else LOSSY
  return {
    "name": name,
    "width": width,
    "height": height,
    "about": about,
    "before": uri(encode(lr, LOSSLESS)),
    "frames": [uri(encode(sr, how)) for sr in srs],
  }


def render(
  title: str, subtitle: str, alphas: Sequence[float], photographs: Sequence[Mapping[str, Any]]
) -> str:
  """Makes the page that holds all it shows.

  Args:
    title: the heading.
    subtitle: a line below it.
    alphas: in rising order.
    photographs: what `encode_photograph` returned, one at least.
  """
  data = {"alphas": list(alphas), "photos": list(photographs)}
  texts = {"title": escape(title), "subtitle": escape(subtitle), "data": to_json(data)}
  return fill(FRAME, {**texts, "connect": "'none'"})


def render_live(title: str, subtitle: str, scale: int, max_bytes: int, remedy: str) -> str:
  """Makes the page that sends photographs to the server that it came from.

  It sends a photograph's bytes to `photograph`, which answers with the photograph as PNG, and to
  `upscale?alpha=0.5`, which answers with the upscaled one; a failure is a line of text.

  Args:
    title: the heading.
    subtitle: a line below it.
    scale: of the models.
    max_bytes: how large a file may be.
    remedy: what to do about a larger one.
  """
  limits = {"bytes": max_bytes, "remedy": remedy}
  data = {"alphas": [i / 100 for i in range(101)], "photos": None, "scale": scale, "limits": limits}
  texts = {"title": escape(title), "subtitle": escape(subtitle), "data": to_json(data)}
  return fill(FRAME, {**texts, "connect": "'self'"})
