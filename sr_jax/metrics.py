"""PSNR and SSIM as the benchmarks of the field count them, in float64 on the host.

The protocol of the published x4 numbers: crop `scale` pixels at each side, convert to Y, PSNR and
SSIM per image, then the mean over the images of a set. The caller crops nothing itself: `border`
does it. Scores in RGB are 1.5 to 2 dB below those in Y; say which one you print.
"""

import math

import numpy as np
import scipy.ndimage

PEAK = 255.0


def rgb_to_y(image: np.ndarray) -> np.ndarray:
  """Convert RGB to luma of BT.601 in studio range, as MATLAB's `rgb2ycbcr`.

  Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, from 16 (black) to 235 (white), never rounded.
  A grey image is its own Y: the values as they stand, not squeezed into the studio range.

  Args:
    image: uint8 or float in [0, 255] (not [0, 1]), [..., H, W, 3], or grey [H, W].

  Returns:
    float64 [..., H, W].
  """
  image = np.asarray(image, np.float64)
  if image.ndim == 2:
    return image
  if image.ndim < 2 or image.shape[-1] != 3:
    raise ValueError(f"image of shape {list(image.shape)} must be [..., H, W, 3] or grey [H, W]")
  return image @ np.array([65.481, 128.553, 24.966]) / 255 + 16


def psnr(a: np.ndarray, b: np.ndarray, border: int) -> float:
  """Peak signal-to-noise ratio, 10 log10(255^2 / MSE).

  Args:
    a: uint8 or float in [0, 255], [H, W] or [H, W, C].
    b: the same shape.
    border: pixels left out at each side; the scale, by convention.

  Returns:
    Decibels, MSE over all pixels and channels; inf for equal images.

  Raises:
    ValueError: shapes that differ, or a border that leaves nothing.
  """
  a, b = _cropped(a, b, border, smallest=1)
  mse = np.mean(np.square(a - b))
  return math.inf if mse == 0 else 10 * math.log10(PEAK**2 / mse)


def ssim(a: np.ndarray, b: np.ndarray, border: int) -> float:
  """Structural similarity (Wang et al. 2004) with the constants of the authors' MATLAB code.

  11x11 Gaussian window of sigma 1.5, only where it fits whole ('valid'), population covariance,
  C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2. Channels are scored apart, then averaged. SRGAN's
  paper used another program (Daala), whose scores are higher.

  Args:
    a: uint8 or float in [0, 255], [H, W] or [H, W, C].
    b: the same shape.
    border: pixels left out at each side; the scale, by convention.

  Returns:
    Mean similarity, 1 for equal images.

  Raises:
    ValueError: shapes that differ, or fewer than 11 x 11 pixels inside the border.
  """
  a, b = _cropped(a, b, border, smallest=11)
  a, b = np.atleast_3d(a), np.atleast_3d(b)
  return float(np.mean([_ssim_channel(a[..., c], b[..., c]) for c in range(a.shape[-1])]))


def _ssim_channel(a: np.ndarray, b: np.ndarray) -> np.floating:
  c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
  mean_a, mean_b = _window_mean(a), _window_mean(b)
  variance_a = _window_mean(a * a) - mean_a**2
  variance_b = _window_mean(b * b) - mean_b**2
  covariance = _window_mean(a * b) - mean_a * mean_b
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
  return np.mean(luminance * structure)


def _window_mean(image: np.ndarray) -> np.ndarray:
  """Gaussian means of all whole 11x11 windows: [H, W] -> [H - 10, W - 10]."""
  kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  kernel /= kernel.sum()
  for axis in (0, 1):
    image = scipy.ndimage.correlate1d(image, kernel, axis)
  return image[5:-5, 5:-5]


def _cropped(
  a: np.ndarray, b: np.ndarray, border: int, smallest: int
) -> tuple[np.ndarray, np.ndarray]:
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or a.ndim not in (2, 3):
    raise ValueError(
      f"images of shapes {list(a.shape)} and {list(b.shape)} must be equal and [H, W] or "
      "[H, W, C]; crop HR to a multiple of the scale"
    )
  height, width = a.shape[:2]
  if border < 0 or min(height, width) - 2 * border < smallest:
    raise ValueError(
      f"border={border} of a {width}x{height} image must be 0 or more and leave at least "
      f"{smallest}x{smallest} pixels; score larger images or take a smaller border"
    )
  inside = slice(border, height - border), slice(border, width - border)
  return a[inside], b[inside]
