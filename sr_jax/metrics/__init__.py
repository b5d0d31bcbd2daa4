"""Scores of an upscaled image, as the benchmarks of the field compute them."""

from sr_jax.metrics.batch import perceptual_index, score_batch
from sr_jax.metrics.lpips import load_lpips, lpips, lpips_possible
from sr_jax.metrics.niqe import NIQEParams, load_niqe, niqe, niqe_possible
from sr_jax.metrics.psnr_ssim import psnr, rgb_to_y, ssim

__all__ = [
  "NIQEParams",
  "load_lpips",
  "load_niqe",
  "lpips",
  "lpips_possible",
  "niqe",
  "niqe_possible",
  "perceptual_index",
  "psnr",
  "rgb_to_y",
  "score_batch",
  "ssim",
]
