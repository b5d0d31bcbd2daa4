"""Scores of batches of images of different sizes, with one compiled program for each shape."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.metrics.lpips import Params, masked_lpips
from sr_jax.metrics.niqe import NIQEParams, block_features, distance, rounded_luma
from sr_jax.metrics import psnr_ssim
from sr_jax.metrics.psnr_ssim import luma, masked_psnr, masked_ssim


def score_batch(
  sr: np.ndarray,
  hr: np.ndarray,
  sizes: np.ndarray,
  grey: np.ndarray,
  border: int,
  *,
  lpips_params: Mapping[str, Params] | None = None,
  niqe_params: NIQEParams | None = None,
) -> dict[str, np.ndarray]:
  """Scores images that are padded to one shape, on the device, one after the other.

  The padding changes no score. A program is compiled once for each (N, H, W) and border: pad the
  images of a set to few sizes, and its last batch to N images.

  Args:
    sr: uint8 [N, H, W, 3], each image at the top left, the rest of any content; a grey image is
      stored as three equal channels. Of numpy or already on the device.
    hr: the same.
    sizes: int [N, 2], height and width of each image.
    grey: bool [N]; the Y of a grey image is its values as they stand.
    border: pixels left out at each side; the scale, by convention.
    lpips_params: {net: of `load_lpips(net)`}, to score LPIPS with each of them.
    niqe_params: of `load_niqe`, to score NIQE of `sr`.

  Returns:
    float64 [N] each: psnr_y, ssim_y, psnr_rgb, ssim_rgb; where asked for lpips_alex, lpips_vgg and
    niqe, NaN where the image is too small, see `lpips_possible` and `niqe_possible`. The RGB
    scores of grey images mean nothing.

  Raises:
    UserError: arrays that do not fit together, or an image without 11 x 11 pixels in the border.
  """
  sizes, grey = np.asarray(sizes, np.int32), np.asarray(grey, bool)
  _check(sr, hr, sizes, grey, border)
  with jax.enable_x64(True):
    scores = dict(pixel_scores(sr, hr, sizes, grey, border=border))
    if niqe_params is not None:
      features = np.asarray(niqe_features(sr, sizes, grey, niqe_params.window, border=border))
      scores["niqe"] = [distance(image, niqe_params) for image in features]
  for net, params in (lpips_params or {}).items():
    scores[f"lpips_{net}"] = lpips_scores(sr, hr, sizes, params, border=border)
  return {key: np.asarray(values, np.float64) for key, values in scores.items()}


def perceptual_index(ma: float, niqe: float) -> float:
  """Perceptual index of the PIRM 2018 challenge, ((10 - Ma) + NIQE) / 2; lower is better.

  Args:
    ma: score of Ma et al. (2017), from 0 to 10, mean over a set. Their MATLAB program gives it;
      nothing here does.
    niqe: mean over the same set, Y, with a border of 4: the challenge's evaluation took the means
      first.

  Returns:
    The index.
  """
  return ((10 - ma) + niqe) / 2


# lax.map goes image by image: the memory is one image's, however many there are.


@functools.partial(jax.jit, static_argnames="border")
def pixel_scores(sr, hr, sizes, grey, border):
  def one(image):
    sr, hr, size, grey = image
    sr, hr = (_cropped(x, border).astype(jnp.float64) for x in (sr, hr))
    sr_y, hr_y = (jnp.where(grey, x[..., 0], luma(x))[..., None] for x in (sr, hr))
    size = size - 2 * border
    return {
      "psnr_y": masked_psnr(sr_y, hr_y, size),
      "ssim_y": masked_ssim(sr_y, hr_y, size),
      "psnr_rgb": masked_psnr(sr, hr, size),
      "ssim_rgb": masked_ssim(sr, hr, size),
    }

  return jax.lax.map(one, (sr, hr, sizes, grey))


@functools.partial(jax.jit, static_argnames="border")
def niqe_features(sr, sizes, grey, window, border):
  def one(image):
    sr, size, grey = image
    sr = _cropped(sr, border)
    y = jnp.where(grey, sr[..., 0].astype(jnp.int32), rounded_luma(sr))
    return block_features(y, size - 2 * border, window)

  return jax.lax.map(one, (sr, sizes, grey))


@functools.partial(jax.jit, static_argnames="border")
def lpips_scores(sr, hr, sizes, params, border):
  def one(image):
    sr, hr, size = image
    return masked_lpips(_cropped(sr, border), _cropped(hr, border), size - 2 * border, params)

  return jax.lax.map(one, (sr, hr, sizes))


def _cropped(image: jax.Array, border: int) -> jax.Array:
  """Without the first rows and columns; the last are left out by the smaller size."""
  height, width = image.shape[:2]
  return image[border : height - border, border : width - border]


def _check(sr, hr, sizes: np.ndarray, grey: np.ndarray, border: int) -> None:
  if sr.dtype != np.uint8 or hr.dtype != np.uint8 or sr.ndim != 4 or sr.shape[-1] != 3:
    raise UserError(
      f"sr of {sr.dtype} {list(sr.shape)} and hr of {hr.dtype} {list(hr.shape)} must be uint8 "
      "[N, H, W, 3]; repeat a grey image to three channels"
    )
  if hr.shape != sr.shape or sizes.shape != (len(sr), 2) or grey.shape != (len(sr),):
    raise UserError(
      f"sr {list(sr.shape)}, hr {list(hr.shape)}, sizes {list(sizes.shape)} and grey "
      f"{list(grey.shape)} must be [N, H, W, 3] twice, [N, 2] and [N]"
    )
  for height, width in sizes.tolist():
    if height > sr.shape[1] or width > sr.shape[2]:
      raise UserError(
        f"an image of {width}x{height} must lie within the arrays of {sr.shape[2]}x{sr.shape[1]}"
      )
    psnr_ssim.check_border(height, width, border, psnr_ssim.SSIM_WINDOW)
