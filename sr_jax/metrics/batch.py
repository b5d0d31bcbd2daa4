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
from sr_jax.metrics.psnr_ssim import luma, luma_difference, masked_psnr, masked_ssim


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

  The padding changes no score. A program is compiled once for each (N, H, W) and border, so pad the
  images of a set to a few sizes, and its last batch to N images.

  Args:
    sr: uint8 [N, H, W, 3], each image at the top left, with anything in the rest; a grey image is
      stored as three equal channels. The array may be numpy's or on the device already.
    hr: the HR images in the same form.
    sizes: int [N, 2], height and width of each image.
    grey: bool [N], whether an image is grey; its Y is then its values as they are.
    border: pixels left out at each side; by convention the scale.
    lpips_params: {net: what `load_lpips(net)` returned}, to score LPIPS with each of these nets.
    niqe_params: what `load_niqe` returned, to score NIQE of `sr`; None for no NIQE.

  Returns:
    {score: float64 [N]}: psnr_y, ssim_y, psnr_rgb and ssim_rgb, and lpips_alex, lpips_vgg and niqe
    if they were asked for. LPIPS and NIQE are NaN where the image is too small (`lpips_possible`,
    `niqe_possible`) or, for NIQE, too flat. The RGB scores of grey images mean nothing.

  Raises:
    UserError: arrays do not fit together, or an image has less than 11 x 11 pixels within the
      border.
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
  """Computes the perceptual index of PIRM 2018, ((10 - Ma) + NIQE) / 2; lower is better.

  Like the challenge's evaluation, it is computed from the means over a set.

  Args:
    ma: the mean over a set of the score of Ma et al. (2017), from 0 to 10. Their MATLAB program
      computes it; nothing here does.
    niqe: the mean NIQE of the same set, of Y and with a border of 4.

  Returns:
    The index.
  """
  return ((10 - ma) + niqe) / 2


# lax.map goes image by image, so that memory is needed for one image, however many there are.


@functools.partial(jax.jit, static_argnames="border")
def pixel_scores(sr, hr, sizes, grey, border):
  """Computes PSNR and SSIM of padded images; call it with 64 bits enabled.

  Args:
    sr: uint8 [N, H, W, 3], each image at the top left.
    hr: the HR images in the same form.
    sizes: int32 [N, 2], height and width of each image.
    grey: bool [N], whether an image is grey.
    border: pixels left out at each side.

  Returns:
    {'psnr_y', 'ssim_y', 'psnr_rgb', 'ssim_rgb': float64 [N]}; PSNR in dB, SSIM at most 1.
  """

  def one(image):
    sr, hr, size, grey = image
    sr, hr = (_cropped(x, border).astype(jnp.float64) for x in (sr, hr))
    sr_y, hr_y = (jnp.where(grey, x[..., 0], luma(x))[..., None] for x in (sr, hr))
    error = sr - hr
    error_y = jnp.where(grey, error[..., 0], luma_difference(error))[..., None]
    size = size - 2 * border
    return {
      "psnr_y": masked_psnr(error_y, jnp.zeros_like(error_y), size),
      "ssim_y": masked_ssim(sr_y, hr_y, size),
      "psnr_rgb": masked_psnr(sr, hr, size),
      "ssim_rgb": masked_ssim(sr, hr, size),
    }

  return jax.lax.map(one, (sr, hr, sizes, grey))


@functools.partial(jax.jit, static_argnames="border")
def niqe_features(sr, sizes, grey, window, border):
  """Computes NIQE's features of padded images; call it with 64 bits enabled.

  Args:
    sr: uint8 [N, H, W, 3], each image at the top left.
    sizes: int32 [N, 2], height and width of each image.
    grey: bool [N], whether an image is grey.
    window: float64 [7, 7], `NIQEParams.window`.
    border: pixels left out at each side.

  Returns:
    float64 [N, B, 36], what `niqe.block_features` returns for each image.
  """

  def one(image):
    sr, size, grey = image
    sr = _cropped(sr, border)
    y = jnp.where(grey, sr[..., 0].astype(jnp.int32), rounded_luma(sr))
    return block_features(y, size - 2 * border, window)

  return jax.lax.map(one, (sr, sizes, grey))


@functools.partial(jax.jit, static_argnames="border")
def lpips_scores(sr, hr, sizes, params, border):
  """Computes LPIPS of padded images.

  Args:
    sr: uint8 [N, H, W, 3], each image at the top left.
    hr: the HR images in the same form.
    sizes: int32 [N, 2], height and width of each image.
    params: what `load_lpips` returned.
    border: pixels left out at each side.

  Returns:
    float32 [N], NaN where the image is too small for the network.
  """

  def one(image):
    sr, hr, size = image
    return masked_lpips(_cropped(sr, border), _cropped(hr, border), size - 2 * border, params)

  return jax.lax.map(one, (sr, hr, sizes))


def _cropped(image: jax.Array, border: int) -> jax.Array:
  """Cuts the border off an array [H, W, 3]; an image's own last rows are left out by its size."""
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
