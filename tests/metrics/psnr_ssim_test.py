"""Tests of sr_jax/metrics/psnr_ssim.py, against scikit-image and the loops of references.py."""

import math

import jax
import numpy as np
import pytest
import references
import skimage.metrics

from sr_jax import metrics
from sr_jax.metrics.psnr_ssim import jitted_ssim, masked_psnr, masked_ssim


def noisy_pair(*shape: int) -> tuple[np.ndarray, np.ndarray]:
  rng = np.random.default_rng(1)
  a = np.cumsum(rng.normal(0, 6, shape), axis=1) + 128
  b = a + rng.normal(0, 10, shape)
  return tuple(np.clip(np.round(image), 0, 255).astype(np.uint8) for image in (a, b))


@pytest.mark.parametrize("shape", [(40, 53), (40, 53, 3)])
def test_equal_to_skimage(shape):
  a, b = noisy_pair(*shape)
  inner_a, inner_b = a[4:-4, 4:-4], b[4:-4, 4:-4]
  expected = skimage.metrics.peak_signal_noise_ratio(inner_a, inner_b, data_range=255)
  assert abs(metrics.psnr(a, b, border=4) - expected) < 1e-6
  expected = skimage.metrics.structural_similarity(
    inner_a.astype(float),
    inner_b.astype(float),
    gaussian_weights=True,
    sigma=1.5,
    use_sample_covariance=False,
    data_range=255,
    channel_axis=2 if len(shape) == 3 else None,
  )
  assert 0.3 < expected < 0.95  # neither end, where anything would agree
  assert abs(metrics.ssim(a, b, border=4) - expected) < 1e-6


def test_equal_to_loops():
  a, b = noisy_pair(19, 24)
  assert abs(metrics.psnr(a, b, border=0) - references.psnr(a, b)) < 1e-9
  assert abs(metrics.ssim(a, b, border=2) - references.ssim(a[2:-2, 2:-2], b[2:-2, 2:-2])) < 1e-9


@pytest.mark.parametrize(
  "masked, single", [(masked_psnr, metrics.psnr), (masked_ssim, metrics.ssim)]
)
def test_padding_changes_nothing(masked, single):
  rng = np.random.default_rng(3)
  a, b = noisy_pair(31, 45, 3)
  padded = rng.uniform(0, 255, (2, 50, 60, 3))
  padded[0, :31, :45], padded[1, :31, :45] = a, b
  with jax.enable_x64(True):
    score = jax.jit(masked)(*padded, np.array([31, 45], np.int32))
  assert score.dtype == np.float64
  assert float(score) == pytest.approx(single(a, b, border=0), rel=1e-12)


def test_images_of_a_bucket_share_a_program():
  sizes = jitted_ssim._cache_size()
  for shape in [(60, 20, 1), (129, 100, 1), (256, 40, 1), (140, 128, 1)]:
    metrics.ssim(*noisy_pair(*shape), border=0)
  assert jitted_ssim._cache_size() - sizes <= 2


def test_ssim_of_colour_is_the_mean_of_its_channels():
  a, b = noisy_pair(30, 31, 3)
  channels = [metrics.ssim(a[..., c], b[..., c], border=1) for c in range(3)]
  assert metrics.ssim(a, b, border=1) == pytest.approx(np.mean(channels), abs=1e-12)


def test_equal_images():
  a, _ = noisy_pair(20, 20, 3)
  assert metrics.psnr(a, a, border=4) == math.inf
  assert metrics.ssim(a, a, border=4) == pytest.approx(1, abs=1e-12)


def test_halving_the_error_adds_6_02_db():
  a = np.full((16, 16, 3), 100.0)
  error = np.random.default_rng(2).normal(0, 5, a.shape)
  gain = metrics.psnr(a, a + error / 2, border=0) - metrics.psnr(a, a + error, border=0)
  assert gain == pytest.approx(20 * math.log10(2), abs=1e-9)


def test_the_border_is_left_out_and_nothing_more():
  a, _ = noisy_pair(40, 40)
  b = a.copy()
  b[:4], b[-4:], b[:, :4], b[:, -4:] = 0, 0, 0, 0
  assert metrics.psnr(a, b, border=4) == math.inf
  assert metrics.psnr(a, b, border=3) < 40


def test_luma_is_bt601_in_studio_range():
  colors = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
  y = metrics.rgb_to_y(colors)
  assert y.dtype == np.float64
  np.testing.assert_allclose(y[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-12)
  np.testing.assert_allclose(y, metrics.rgb_to_y(colors.astype(np.float32)), atol=1e-12)


def test_grey_is_its_own_luma():
  grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
  np.testing.assert_array_equal(metrics.rgb_to_y(grey), grey.astype(float))


def test_mistakes_are_named():
  a, _ = noisy_pair(20, 20, 3)
  with pytest.raises(ValueError, match=r"\[20, 20, 3\] and \[19, 20, 3\] must be equal"):
    metrics.psnr(a, a[1:], border=0)
  with pytest.raises(ValueError, match="border=10 of a 20x20 image"):
    metrics.psnr(a, a, border=10)
  with pytest.raises(ValueError, match="border=5 of a 20x20 image must be 0 or more and leave"):
    metrics.ssim(a, a, border=5)
  with pytest.raises(ValueError, match="border=-1"):
    metrics.psnr(a, a, border=-1)
  with pytest.raises(ValueError, match=r"shape \[20, 20, 4\]"):
    metrics.rgb_to_y(np.zeros((20, 20, 4)))
