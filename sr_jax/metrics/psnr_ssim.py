"""PSNR and SSIM as the benchmarks of the field compute them.

The protocol of the published x4 numbers is to crop `scale` pixels at each side, to convert to Y, to
compute PSNR and SSIM of each image, and to take the mean over the images of a set. PSNR in RGB is
1.5 to 2 dB below that in Y; say which one you print.

`psnr` and `ssim` score one pair, in float64, wherever they run. `masked_psnr` and `masked_ssim` are
the same inside of a jitted function, for an image that is a corner of a larger array: one compiled
program serves images of many sizes. `batch.score_batch` scores whole sets with them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError

PEAK = 255.0
SSIM_WINDOW = 11  # pixels a side

# A single pair is padded to a multiple of this, so that images of a set share programs.
_BUCKET = 128


def rgb_to_y(image: np.ndarray) -> np.ndarray:
  """Converts RGB to the luma of BT.601 in studio range, as MATLAB's `rgb2ycbcr` does.

  Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, from 16 (black) to 235 (white), never rounded.
  The Y of a grey image is its values as they are, not squeezed into the studio range.

  Args:
    image: uint8 or float in [0, 255] (not [0, 1]), [..., H, W, 3], or grey [H, W].

  Returns:
    float64 [..., H, W].

  Raises:
    UserError: the image has another shape.
  """
  image = np.asarray(image, np.float64)
  if image.ndim == 2:
    return image
  if image.ndim < 2 or image.shape[-1] != 3:
    raise UserError(f"image of shape {list(image.shape)} must be [..., H, W, 3] or grey [H, W]")
  return luma(image)


def luma(image):
  """Applies the formula of `rgb_to_y` to a float array of numpy or jax: [..., 3] -> [...]."""
  return luma_difference(image) + 16


def luma_difference(difference):
  """Computes the difference of two images' luma from that of the images: [..., 3] -> [...].

  It is 0 where the images are equal, however a compiler rounds products within sums.
  """
  red, green, blue = difference[..., 0], difference[..., 1], difference[..., 2]
  return (65.481 * red + 128.553 * green + 24.966 * blue) / 255


def psnr(a: np.ndarray, b: np.ndarray, border: int) -> float:
  """Peak signal-to-noise ratio, 10 log10(255^2 / MSE).

  Args:
    a: uint8 or float in [0, 255], [H, W] or [H, W, C].
    b: the same shape.
    border: pixels left out at each side; by convention the scale.

  Returns:
    Decibels, with the MSE over all pixels and channels; inf for equal images.

  Raises:
    UserError: the shapes differ, or the border leaves nothing.
  """
  a, b, size = _prepared(a, b, border, smallest=1)
  with jax.enable_x64(True):
    return float(_jitted_psnr(a, b, size))


def ssim(a: np.ndarray, b: np.ndarray, border: int) -> float:
  """Structural similarity (Wang et al. 2004) with the constants of the authors' MATLAB code.

  The window is an 11x11 Gaussian of sigma 1.5, used only where it fits in whole ('valid'). The
  covariance is that of the population, C1 = (0.01 * 255)^2 and C2 = (0.03 * 255)^2. Channels are
  scored separately, then averaged. SRGAN's paper used another program (Daala), whose scores are
  higher.

  Args:
    a: uint8 or float in [0, 255], [H, W] or [H, W, C].
    b: the same shape.
    border: pixels left out at each side; by convention the scale.

  Returns:
    Mean similarity, 1 for equal images.

  Raises:
    UserError: the shapes differ, or there are less than 11 x 11 pixels inside the border.
  """
  a, b, size = _prepared(a, b, border, smallest=SSIM_WINDOW)
  with jax.enable_x64(True):
    return float(jitted_ssim(a, b, size))


def masked_psnr(a: jax.Array, b: jax.Array, size: jax.Array) -> jax.Array:
  """Computes `psnr` of the top left `size` of two arrays; what lies outside does not count.

  Args:
    a: float in [0, 255], [H, W, C]; float64 where digits beyond the sixth matter.
    b: the other image in the same form.
    size: int [2], height and width of the image itself, at most H and W.

  Returns:
    Scalar, dB.
  """
  error = jnp.where(_inside(a.shape[:2], size)[:, :, None], a - b, 0)
  mse = jnp.sum(error * error) / (size[0] * size[1] * a.shape[-1])
  return 10 * jnp.log10(PEAK**2 / mse)


def masked_ssim(a: jax.Array, b: jax.Array, size: jax.Array) -> jax.Array:
  """Computes `ssim` of the top left `size` of two arrays; what lies outside does not count.

  Args:
    a: float in [0, 255], [H, W, C], H and W at least 11; float64, because a variance is a small
      difference of large numbers.
    b: the other image in the same form.
    size: int [2], height and width of the image itself, from 11 to H and W.

  Returns:
    Scalar.
  """
  windows = size - (SSIM_WINDOW - 1)
  channels = jnp.moveaxis(a, -1, 0), jnp.moveaxis(b, -1, 0)
  # One channel at a time, because the five moments of one channel of a 2K image take 110 MB.
  scores = jax.lax.map(lambda pair: _ssim_channel(*pair, windows), channels)
  return jnp.mean(scores)


def _ssim_channel(a: jax.Array, b: jax.Array, windows: jax.Array) -> jax.Array:
  """Computes SSIM of one channel: [H, W] twice, and the windows [2] in the image, -> scalar."""
  c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
  mean_a, mean_b, mean_aa, mean_bb, mean_ab = _window_mean(jnp.stack([a, b, a * a, b * b, a * b]))
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  variances = mean_aa - mean_a**2 + mean_bb - mean_b**2
  structure = (2 * (mean_ab - mean_a * mean_b) + c2) / (variances + c2)
  scores = luminance * structure
  return jnp.sum(jnp.where(_inside(scores.shape, windows), scores, 0)) / (windows[0] * windows[1])


def _window_mean(images: jax.Array) -> jax.Array:
  """Computes Gaussian means of all whole 11x11 windows: [..., H, W] -> [..., H - 10, W - 10].

  They are sums of shifted images, because float64 convolutions are slow or missing on accelerators.
  """
  kernel = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
  kernel /= kernel.sum()
  height, width = images.shape[-2] - 10, images.shape[-1] - 10
  rows = sum(k * images[..., i : i + height, :] for i, k in enumerate(kernel))
  return sum(k * rows[..., i : i + width] for i, k in enumerate(kernel))


def _inside(shape: tuple[int, ...], size: jax.Array) -> jax.Array:
  """Makes a mask bool [H, W], true in the top left `size`."""
  return (jnp.arange(shape[0]) < size[0])[:, None] & (jnp.arange(shape[1]) < size[1])[None, :]


_jitted_psnr = jax.jit(masked_psnr)
jitted_ssim = jax.jit(masked_ssim)


def _prepared(
  a: np.ndarray, b: np.ndarray, border: int, smallest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Checks, crops, and pads to a bucket; returns float64 [H, W, C] twice, and the size [2]."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  if a.shape != b.shape or a.ndim not in (2, 3):
    raise UserError(
      f"images of shapes {list(a.shape)} and {list(b.shape)} must be equal and [H, W] or "
      "[H, W, C]; crop HR to a multiple of the scale"
    )
  check_border(*a.shape[:2], border, smallest)
  height, width = a.shape[0] - 2 * border, a.shape[1] - 2 * border
  inside = slice(border, border + height), slice(border, border + width)
  padding = [(0, -height % _BUCKET), (0, -width % _BUCKET), (0, 0)]
  a, b = (np.pad(np.atleast_3d(image[inside]), padding) for image in (a, b))
  return a, b, np.array([height, width], np.int32)


def check_border(height: int, width: int, border: int, smallest: int) -> None:
  """Raises UserError if the border leaves less than `smallest` pixels of a side."""
  if border < 0 or min(height, width) - 2 * border < smallest:
    raise UserError(
      f"border={border} of a {width}x{height} image must be 0 or more and leave at least "
      f"{smallest}x{smallest} pixels; score larger images or take a smaller border"
    )
