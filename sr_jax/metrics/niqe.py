"""NIQE: how far an image's statistics are from those of photographs; lower is better.

"Making a completely blind image quality analyzer" (Mittal, Soundararajan, Bovik, 2013), without a
reference image. It is computed as in BasicSR, whose numbers papers on ESRGAN report: Y rounded,
blocks of 96x96, the pristine model of the authors. Set14's baboon has 5.7296 with border 0.

`block_features` runs on the device, for an image that is a corner of a larger array; the distance
of 36 numbers from the pristine model is left to the host, whose linear algebra is float64.
"""

import math
import pathlib
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.machine.paths import user_path

BLOCK = 96

_SHAPES = {"mu_pris_param": (1, 36), "cov_pris_param": (36, 36), "gaussian_window": (7, 7)}
_SOURCE = (
  "NIQE needs BasicSR's niqe_pris_params.npz (Apache-2.0), which has the arrays mu_pris_param "
  "(1, 36), cov_pris_param (36, 36) and gaussian_window (7, 7): download "
  "basicsr/metrics/niqe_pris_params.npz of https://github.com/XPixelGroup/BasicSR"
)

# The taps of MATLAB's imresize(image, 0.5): Keys' cubic, widened twofold, at 1/4, 3/4, 5/4 and 7/4
# from its middle.
_HALVING = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256

# Moments of the generalised Gaussian by its shape alpha, from Gamma(k / alpha). The estimate of the
# shape is the one whose ratio is nearest to the measured ratio.
_ALPHA = 0.2 + 0.001 * np.arange(9801)
_GAMMA1, _GAMMA2, _GAMMA3 = ([math.gamma(k / alpha) for alpha in _ALPHA] for k in (1, 2, 3))
_RATIO = np.square(_GAMMA2) / (np.array(_GAMMA1) * _GAMMA3)
_SPREAD = np.sqrt(np.array(_GAMMA1) / _GAMMA3)
_MEAN = np.array(_GAMMA2) / _GAMMA1


class NIQEParams(NamedTuple):
  """The pristine model, float64.

  Attributes:
    mean: the mean of the features of photographs, [36].
    covariance: their covariance, [36, 36].
    window: the weights of the local mean and deviation, [7, 7], with sum 1.
  """

  mean: np.ndarray
  covariance: np.ndarray
  window: np.ndarray


def load_niqe(path: str | pathlib.Path) -> NIQEParams:
  """Loads the pristine model from BasicSR's file.

  Args:
    path: the path of niqe_pris_params.npz.

  Raises:
    FileNotFoundError: there is no such file; the error says where to get it.
    UserError: it is another file.
  """
  path = user_path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {str(path)!r}. {_SOURCE}")
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: np.asarray(file[name], np.float64) for name in _SHAPES}
  except (zipfile.BadZipFile, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
    raise UserError(f"{path} cannot be read: {error}. {_SOURCE}") from error
  for name, shape in _SHAPES.items():
    if arrays[name].shape != shape or not np.isfinite(arrays[name]).all():
      raise UserError(f"{path}: {name} is not a finite array of shape {shape}. {_SOURCE}")
  return NIQEParams(arrays["mu_pris_param"][0], arrays["cov_pris_param"], arrays["gaussian_window"])


def niqe_possible(height: int, width: int, border: int) -> bool:
  """Whether an image has two whole blocks of 96x96, which NIQE needs for their covariance."""
  blocks = [max(n - 2 * border, 0) // BLOCK for n in (height, width)]
  return blocks[0] * blocks[1] >= 2


def niqe(image: np.ndarray, border: int, params: NIQEParams) -> float:
  """Computes NIQE of one image, by a program for each shape; `score_batch` shares programs.

  Args:
    image: uint8, [H, W, 3], or grey [H, W], which is its own Y.
    border: pixels left out at each side; by convention the scale.
    params: what `load_niqe` returned.

  Returns:
    The distance; NaN if fewer than two blocks have any texture.

  Raises:
    UserError: it is not a uint8 image, or it is too small (see `niqe_possible`).
  """
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
    raise UserError(
      f"image of {image.dtype} {list(image.shape)} must be uint8 [H, W, 3] or grey [H, W]"
    )
  height, width = image.shape[:2]
  if border < 0 or not niqe_possible(height, width, border):
    raise UserError(
      f"border={border} of a {width}x{height} image must be 0 or more and leave two whole "
      f"{BLOCK}x{BLOCK} blocks for NIQE; score larger images"
    )
  image = image[border : height - border, border : width - border]
  with jax.enable_x64(True):
    features = _jitted_features(image, np.array(image.shape[:2], np.int32), params.window)
  return distance(np.asarray(features), params)


def distance(features: np.ndarray, params: NIQEParams) -> float:
  """Computes the distance of an image's features from the pristine model (eq. 10 of the paper).

  Args:
    features: what `block_features` returned, [B, 36]; NaN where a block has no such feature.
    params: what `load_niqe` returned.

  Returns:
    The distance; NaN if fewer than two blocks have all features.
  """
  whole = features[~np.isnan(features).any(axis=1)]
  if len(whole) < 2:
    return math.nan
  # As in BasicSR and the authors' code, a block without texture adds what it has to the mean.
  difference = np.nanmean(features, axis=0) - params.mean
  covariance = (params.covariance + np.cov(whole, rowvar=False)) / 2
  return float(np.sqrt(difference @ np.linalg.pinv(covariance) @ difference))


def rounded_luma(image: jax.Array) -> jax.Array:
  """Computes Y of uint8 RGB, rounded half up: [..., 3] -> int32 [...].

  The arithmetic is in integers: one pixel in 85,000 is a tie, which floats would decide differently
  on different devices.
  """
  red, green, blue = (image[..., i].astype(jnp.int32) for i in range(3))
  return (65481 * red + 128553 * green + 24966 * blue + 127500) // 255000 + 16


def block_features(image: jax.Array, size: jax.Array, window: jax.Array) -> jax.Array:
  """Computes the features of each 96x96 block of the top left `size` of an array.

  The image is cut to whole blocks. At two scales, its contrast is normalised and an asymmetric
  generalised Gaussian is fitted to a block's values, and to their products with each of four
  neighbours.

  Args:
    image: [H, W], Y rounded to whole numbers, from 0 to 255.
    size: int [2], height and width of the image itself, at most H and W.
    window: `NIQEParams.window`, [7, 7]. The features are computed in its dtype, float64.

  Returns:
    [B, 36], B = H // 96 * W // 96, row by row; NaN in blocks outside of the image.
  """
  rows, columns = (n // BLOCK for n in image.shape)
  if rows * columns == 0:
    return jnp.zeros((0, 36), window.dtype)
  image = image[: rows * BLOCK, : columns * BLOCK].astype(window.dtype)
  blocks = size // BLOCK
  size = jnp.maximum(blocks, 1) * BLOCK
  full = _normalised(image, size, window)
  half = _normalised(halved(image, size), size // 2, window)
  features = jnp.concatenate([_fits(_split(full, BLOCK)), _fits(_split(half, BLOCK // 2))], axis=1)
  inside = (jnp.arange(rows) < blocks[0])[:, None] & (jnp.arange(columns) < blocks[1])[None, :]
  return jnp.where(inside.reshape(-1, 1), features, jnp.nan)


_jitted_features = jax.jit(
  lambda image, size, window: block_features(
    rounded_luma(image) if image.ndim == 3 else image, size, window
  )
)


def _normalised(image: jax.Array, size: jax.Array, window: jax.Array) -> jax.Array:
  """Computes (image - local mean) / (local deviation + 1), with border pixels repeated outwards."""
  height, width = image.shape
  rows = jnp.clip(jnp.arange(-3, height + 3), 0, size[0] - 1)
  columns = jnp.clip(jnp.arange(-3, width + 3), 0, size[1] - 1)
  around = image[rows][:, columns]

  both = jnp.stack([around, around * around])
  mean, mean_square = sum(
    window[y, x] * both[:, y : y + height, x : x + width] for y in range(7) for x in range(7)
  )
  deviation = jnp.sqrt(jnp.abs(mean_square - mean * mean))
  difference = image - mean
  # In flat regions the value is +-1e-14, and its sign depends on the device's summation order. The
  # fit treats signs separately and leaves out zeros, so such values are set to zero.
  return jnp.where(jnp.abs(difference) < 1e-9, 0, difference) / (deviation + 1)


def halved(image: jax.Array, size: jax.Array) -> jax.Array:
  """Halves the top left `size`, even, as MATLAB's imresize, unrounded: [H, W] -> [H/2, W/2]."""
  for axis in (0, 1):
    length = image.shape[axis]
    index = jnp.arange(-3, length + 4)
    index = jnp.where(index < 0, -1 - index, index)  # the image is mirrored at its borders
    index = jnp.where(index < size[axis], index, jnp.maximum(2 * size[axis] - 1 - index, 0))
    around = jnp.take(image, index, axis=axis)
    image = sum(
      weight * jax.lax.slice_in_dim(around, tap, tap + length - 1, stride=2, axis=axis)
      for tap, weight in enumerate(_HALVING)
    )
  return image


def _split(image: jax.Array, block: int) -> jax.Array:
  """[R * block, C * block] -> [R * C, block, block]."""
  rows, columns = (n // block for n in image.shape)
  image = image.reshape(rows, block, columns, block).swapaxes(1, 2)
  return image.reshape(rows * columns, block, block)


def _fits(blocks: jax.Array) -> jax.Array:
  """Computes the 18 features of each block: [B, n, n] -> [B, 18]."""
  values = [blocks]
  for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
    # At its border a block's neighbours are those at its other side, as in the authors' code.
    values.append(blocks * jnp.roll(blocks, shift, axis=(1, 2)))
  alpha, mean, left, right = _fit(jnp.stack(values))
  features = [alpha[0], (left[0] + right[0]) / 2]
  for i in range(1, len(values)):
    features += [alpha[i], mean[i], left[i], right[i]]
  return jnp.stack(features, axis=1)


def _fit(values: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Fits an asymmetric generalised Gaussian by moments (Lasmar et al. 2009) to values [..., n, n].

  Returns:
    Shape alpha, mean, left and right spread beta, each [...]. If no value is negative, or none is
    positive, the spread of that side and the mean are NaN, and the shape is the smallest one.
  """

  def deviation(side):
    squares = jnp.where(side, values * values, 0).sum(axis=(-2, -1))
    return jnp.sqrt(squares / side.sum(axis=(-2, -1)))

  left, right = deviation(values < 0), deviation(values > 0)
  skew = left / right
  ratio = jnp.abs(values).mean(axis=(-2, -1)) ** 2 / (values * values).mean(axis=(-2, -1))
  ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
  table = jnp.asarray(_RATIO, values.dtype)
  above = jnp.clip(jnp.searchsorted(table, ratio), 1, len(_RATIO) - 1)
  nearest = jnp.where(ratio - table[above - 1] <= table[above] - ratio, above - 1, above)
  nearest = jnp.where(jnp.isnan(ratio), 0, nearest)  # where argmin finds the minimum of NaNs
  alpha, spread, mean = (
    jnp.asarray(column, values.dtype)[nearest] for column in (_ALPHA, _SPREAD, _MEAN)
  )
  left, right = left * spread, right * spread
  return alpha, (right - left) * mean, left, right
