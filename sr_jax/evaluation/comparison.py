"""Draws several models side by side in one picture: LR, each model with its scores, HR."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sr_jax.upscaling.upscaler import BASELINE

_ZOOM = 2  # HR pixels are drawn this large, as differences between upscalers are a pixel wide
_GAP = 8
_TEXT = 18


class Panels:
  """Collects the SR images of several models, model by model, and draws a row for each image.

  A row shows the same crop of each: the one where the first model that is not bicubic errs most.

  Args:
    max_images: how many images are drawn, the first ones.
    crop: side of the crops, HR pixels.
    steady: take the crop where the enlarged LR image errs most instead, which is the same for every
      model.
  """

  def __init__(self, max_images: int = 4, crop: int = 128, *, steady: bool = False):
    self._max_images, self._crop, self._steady = max_images, crop, steady
    self._rows: dict[str, list[tuple[str, np.ndarray, Mapping[str, float]]]] = {}
    self._ends: dict[str, tuple[np.ndarray, np.ndarray]] = {}

  def add(
    self,
    title: str,
    lr: np.ndarray,
    hr: np.ndarray,
    label: str,
    sr: np.ndarray,
    scores: Mapping[str, float],
  ) -> None:
    """Adds one model's image; images past the first few are ignored.

    Args:
      title: the title of the row.
      lr: uint8 [h, w, 3] or [h, w].
      hr: uint8 [H, W, 3] or [H, W].
      label: what the picture calls the model.
      sr: the model's SR image, of the shape of `hr`.
      scores: what `scoring.score` returned for it.
    """
    if title not in self._rows and len(self._rows) >= self._max_images:
      return
    self._ends[title] = (lr, hr)
    if self._steady:  # only what will be drawn is kept
      sr = sr[_worst_window(_enlarged(lr, hr), hr, self._crop)]
    self._rows.setdefault(title, []).append((label, sr, scores))

  def draw(self) -> np.ndarray:
    """Draws the picture, uint8 [H, W, 3]."""
    cell = self._crop * _ZOOM
    columns = 2 + max(len(row) for row in self._rows.values())
    row_height = cell + 3 * _TEXT + 2 * _GAP
    width = columns * (cell + _GAP) + _GAP
    canvas = Image.new("RGB", (width, len(self._rows) * row_height + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    for i, (title, row) in enumerate(self._rows.items()):
      lr, hr = self._ends[title]
      lr_large = _enlarged(lr, hr)
      judged = next((sr for label, sr, _ in row if label != BASELINE), row[0][1])
      window = _worst_window(lr_large if self._steady else judged, hr, self._crop)
      cells = [("LR", lr_large, f"{lr.shape[1]}x{lr.shape[0]}")]
      cells += [(label, sr, _describe(scores)) for label, sr, scores in row]
      cells += [("HR", hr, f"{title}  {hr.shape[1]}x{hr.shape[0]}")]
      top = i * row_height + _GAP
      for j, (label, image, caption) in enumerate(cells):
        left = _GAP + j * (cell + _GAP)
        whole = image.shape == hr.shape
        crop = Image.fromarray(image[window] if whole else image)
        size = (crop.width * _ZOOM, crop.height * _ZOOM)  # less than a cell for a small image
        canvas.paste(crop.resize(size, Image.Resampling.NEAREST), (left, top))
        draw.text((left, top + cell + 2), label, fill="black", font=font)
        draw.text((left, top + cell + 2 + _TEXT), caption, fill="#444444", font=small)
    return np.asarray(canvas)


def _enlarged(lr: np.ndarray, hr: np.ndarray) -> np.ndarray:
  """Repeats the pixels of an LR image, to the size of its HR image."""
  scale = hr.shape[0] // lr.shape[0]
  return lr.repeat(scale, axis=0).repeat(scale, axis=1)


def _describe(scores: Mapping[str, float]) -> str:
  if "lpips_alex" in scores:
    return f"{scores['psnr_y']:.2f} dB (Y)   LPIPS {scores['lpips_alex']:.3f}"
  return f"{scores['psnr_y']:.2f} dB   SSIM {scores['ssim_y']:.4f}   (Y)"


def _worst_window(sr: np.ndarray, hr: np.ndarray, size: int) -> tuple[slice, slice]:
  """Finds the window with the largest squared error, on a grid of half its size."""
  error = np.square(sr.astype(np.float32) - hr)
  error = error.mean(axis=2) if error.ndim == 3 else error
  height, width = min(size, error.shape[0]), min(size, error.shape[1])
  corners = [
    (y, x)
    for y in range(0, error.shape[0] - height + 1, max(height // 2, 1))
    for x in range(0, error.shape[1] - width + 1, max(width // 2, 1))
  ]
  y, x = max(corners, key=lambda c: error[c[0] : c[0] + height, c[1] : c[1] + width].sum())
  return slice(y, y + height), slice(x, x + width)
