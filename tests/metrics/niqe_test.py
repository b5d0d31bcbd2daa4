"""Tests of sr_jax/metrics/niqe.py, against BasicSR's value and the loops of references.py."""

import math

import jax
import numpy as np
import pytest
import references
import skimage.data
from PIL import Image

from sr_jax.images import resize
from sr_jax import metrics
from sr_jax.metrics.niqe import halved, block_features, distance, rounded_luma


@pytest.fixture(scope="module")
def model() -> metrics.NIQEParams:
  """A model of the size of the real one, drawn at random."""
  rng = np.random.default_rng(0)
  factor = rng.normal(0, 0.1, (36, 36))
  tap = np.exp(-0.5 * (np.arange(-3, 4) * 6 / 7) ** 2)
  return metrics.NIQEParams(
    mean=rng.uniform(0, 1, 36),
    covariance=factor @ factor.T + 0.05 * np.eye(36),
    window=np.outer(tap, tap) / tap.sum() ** 2,
  )


def photograph(height: int, width: int) -> np.ndarray:
  return skimage.data.astronaut()[30 : 30 + height, 120 : 120 + width].copy()


def test_baboon_has_the_value_of_basicsr(shared):
  image = np.asarray(Image.open(shared / "data/benchmark/Set14/HR/baboon.png"))
  params = metrics.load_niqe(shared / "weights/niqe_pris_params.npz")
  # the value in BasicSR's own description of its metrics, with crop_border=0
  assert metrics.niqe(image, 0, params) == pytest.approx(5.7296, abs=1e-3)


def exact_luma(image: np.ndarray) -> np.ndarray:
  """In integers, rounded half up."""
  thousandths = image.astype(int) @ np.array([65481, 128553, 24966]) + 16000 * 255
  return (2 * thousandths + 255000) // 510000


@pytest.mark.parametrize("kind", ["colour", "grey", "partly flat"])
def test_equal_to_loops(kind, model):
  image = photograph(110, 300)
  if kind == "grey":
    image = image[..., 1]
  if kind == "partly flat":  # a block without texture, and one with some
    image[:, 100:240] = 255
  inside = image[4:-4, 4:-4]
  expected = references.niqe(inside if kind == "grey" else exact_luma(inside), *model)
  assert 0.5 < expected < 20
  assert metrics.niqe(image, 4, model) == pytest.approx(expected, abs=1e-6)


def test_a_tie_of_the_luma_is_rounded_up():
  colors = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), axis=-1).reshape(-1, 3)
  total = colors @ np.array([65481, 128553, 24966])  # 1000 * 255 * (Y - 16)
  ties = total % 255000 == 127500
  assert ties.sum() > 3
  y = rounded_luma(colors[ties].astype(np.uint8))
  np.testing.assert_array_equal(y, total[ties] // 255000 + 17)


def test_padding_changes_nothing(model):
  rng = np.random.default_rng(3)
  y = photograph(200, 300)[..., 0].astype(np.int32)
  padded = rng.integers(0, 256, (300, 400), np.int32)
  padded[:200, :300] = y
  size = np.array([200, 300], np.int32)
  with jax.enable_x64(True):
    compiled = jax.jit(block_features)
    alone = np.asarray(compiled(y, size, model.window))
    features = np.asarray(compiled(padded, size, model.window))
  assert alone.shape == (2 * 3, 36) and features.shape == (3 * 4, 36)
  features = features.reshape(3, 4, 36)
  np.testing.assert_allclose(features[:2, :3].reshape(-1, 36), alone, rtol=0, atol=1e-9)
  assert np.isnan(features[2]).all() and np.isnan(features[:, 3]).all()
  assert distance(features.reshape(-1, 36), model) == pytest.approx(distance(alone, model))


def test_halving_is_that_of_the_resize_module():
  image = np.random.default_rng(4).uniform(0, 255, (96, 192))
  with jax.enable_x64(True):
    expected = resize.downsample(image[None, :, :, None], 0.5)[0, :, :, 0]
    half = jax.jit(halved)(image, np.array([96, 192]))
    np.testing.assert_allclose(half, expected, atol=1e-10)


def test_an_image_without_texture_has_no_score(model):
  assert math.isnan(metrics.niqe(np.full((104, 200, 3), 77, np.uint8), 4, model))


def test_two_blocks_are_needed(model):
  assert metrics.niqe_possible(104, 200, border=4)
  assert not metrics.niqe_possible(103, 200, border=4)
  assert not metrics.niqe_possible(104, 199, border=4)
  assert not metrics.niqe_possible(6, 200, border=4)
  assert math.isfinite(metrics.niqe(photograph(104, 200), 4, model))
  with pytest.raises(ValueError, match="border=4 of a 199x104 image"):
    metrics.niqe(photograph(104, 199), 4, model)
  with pytest.raises(ValueError, match="border=-1"):
    metrics.niqe(photograph(104, 200), -1, model)


def test_other_images_are_named(model):
  with pytest.raises(ValueError, match=r"float64 \[192, 192, 3\] must be uint8"):
    metrics.niqe(np.zeros((192, 192, 3)), 0, model)
  with pytest.raises(ValueError, match=r"\[192, 192, 4\] must be uint8"):
    metrics.niqe(np.zeros((192, 192, 4), np.uint8), 0, model)


def test_the_model_is_read_from_basicsrs_file(model, tmp_path):
  path = tmp_path / "niqe_pris_params.npz"
  arrays = {
    "mu_pris_param": model.mean[None],
    "cov_pris_param": model.covariance,
    "gaussian_window": model.window,
  }
  np.savez(path, **arrays)
  for loaded, array in zip(metrics.load_niqe(path), model, strict=True):
    np.testing.assert_array_equal(loaded, array)

  with pytest.raises(FileNotFoundError, match="github.com/XPixelGroup/BasicSR"):
    metrics.load_niqe(tmp_path / "none.npz")
  np.savez(path, **{**arrays, "gaussian_window": np.ones((5, 5))})
  with pytest.raises(ValueError, match=r"gaussian_window is not a finite array of shape \(7, 7\)"):
    metrics.load_niqe(path)
  np.savez(path, mu_pris_param=model.mean[None])
  with pytest.raises(ValueError, match="cov_pris_param.*BasicSR's niqe_pris_params.npz"):
    metrics.load_niqe(path)
  np.savez(path, **{**arrays, "mu_pris_param": np.array([object()])})
  with pytest.raises(ValueError, match="cannot be read"):
    metrics.load_niqe(path)
  for content in (b"", b"PK\x03\x04cut off", b"no archive"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
      metrics.load_niqe(path)
  with open(path, "wb") as file:
    np.save(file, np.ones(3))
  with pytest.raises(ValueError, match="cannot be read"):
    metrics.load_niqe(path)
