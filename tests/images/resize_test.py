"""Tests of sr_jax/images/resize.py."""

import re
from fractions import Fraction

import jax
import numpy as np
import pytest
import references

from sr_jax.data import sources
from sr_jax.images.files import list_images, read_image
from sr_jax.images import resize
from sr_jax import metrics

SCALES = [Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), Fraction(3, 4), 2, 3, 4]


def random_image(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("convention", resize.CONVENTIONS)
def test_golden_crops_are_exact(shared, convention):
  golden = np.load(shared / "golden" / "imresize_golden.npz")
  seen = 0
  for key in golden.files:
    match = re.fullmatch(rf"([ab])_(down|up)(\d)_{convention}", key)
    if match:
      letter, direction, factor = match[1], match[2], int(match[3])
      image = golden[f"crop_{letter}"]
      if direction == "up":
        image = image[:40, :44]
      result = resize.imresize(image, factor if direction == "up" else 1 / factor, convention)
      np.testing.assert_array_equal(result, golden[key], err_msg=key)
      seen += 1
  assert seen == (8 if convention == "double_mirror" else 6)


@pytest.mark.parametrize("convention", resize.CONVENTIONS)
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_equals_exact_fractions(scale, convention):
  border, round_between = resize.CONVENTIONS[convention]
  image = random_image(9, 14)
  exact = references.imresize(image, Fraction(scale), border, round_between)
  result = resize.imresize(image, scale, convention)
  assert result.dtype == np.uint8
  assert result.shape == exact.shape
  ties = 0
  for value, true in zip(result.ravel(), exact.ravel(), strict=True):
    if Fraction(scale).denominator == 3 and (true * 2).denominator == 1:
      ties += 1  # of thirds, which no float holds: either side is right
      assert abs(int(value) - true) <= Fraction(1, 2)
    else:
      assert value == references.round_half_up(true)
  assert ties < 3


def test_channels_are_apart():
  image = random_image(17, 23, 3)
  together = resize.imresize(image, 1 / 3)
  for c in range(3):
    np.testing.assert_array_equal(together[..., c], resize.imresize(image[..., c], 1 / 3))


def test_a_float_is_the_fraction_meant():
  image = random_image(50, 33)  # 50 * 0.2 is a little more than 10, as a float stands for it
  for n in (3, 5, 7, 49):
    result = resize.imresize(image, 1 / n)
    assert result.shape == (-(-50 // n), -(-33 // n))
    np.testing.assert_array_equal(result, resize.imresize(image, Fraction(1, n)))


@pytest.mark.parametrize("convention", resize.CONVENTIONS)
def test_a_flat_image_stays_flat(convention):
  for scale in SCALES:
    assert np.all(resize.imresize(np.full((5, 6), 201, np.uint8), scale, convention) == 201)


def test_device_form_rounds_as_the_reference_but_for_ties():
  source = sources.open_source("skimage:test")
  for scale in (1 / 4, 1 / 2):
    different = total = 0
    for i in range(len(source.names)):
      image = source.load(i)[0][:240, :320]
      batch = image[None].astype(np.float32) / 255
      sr = np.asarray(jax.jit(resize.downsample, static_argnums=1)(batch, scale))[0]
      rounded = np.clip(np.floor(sr * 255 + 0.5), 0, 255)
      error = np.abs(rounded - resize.imresize(image, scale, "double_mirror"))
      assert error.max() <= 1
      different += int(error.sum())
      total += error.size
    print(f"scale {scale}: {different} of {total} values differ by 1/255")
    assert different <= total * 1e-4


def test_mistakes_are_named():
  image = random_image(8, 8)
  with pytest.raises(ValueError, match=r"convention='cubic' must be one of uint8_mirror"):
    resize.imresize(image, 2, "cubic")
  with pytest.raises(ValueError, match=r"float64 \[8, 8\] must be a uint8"):
    resize.imresize(image / 255, 2)
  with pytest.raises(ValueError, match=r"scale=-1 must be positive"):
    resize.imresize(image, -1)


def test_set5_lr_equals_the_published_files(shared):
  folder = shared / "data" / "benchmark" / "Set5"
  source = sources.open_source(str(folder), str(folder / "LRx4_matlab"))
  for i in range(len(source.names)):
    hr, lr = source.load(i)
    hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
    np.testing.assert_array_equal(resize.imresize(hr, 1 / 4), lr)


@pytest.mark.parametrize(
  ("name", "expected"), [("Set5", 28.42), ("Set14", 26.00), ("BSD100", 25.96)]
)
def test_bicubic_baseline_is_the_published_one(shared, name, expected):
  """PSNR-Y x4 of ESRGAN's supplement, table 2."""
  scores = []
  for path in list_images(shared / "data" / "benchmark" / name / "HR"):
    hr = read_image(path, keep_grey=True)
    hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
    sr = resize.imresize(resize.imresize(hr, 1 / 4), 4, "double_mirror")
    scores.append(metrics.psnr(metrics.rgb_to_y(sr), metrics.rgb_to_y(hr), border=4))
  print(f"{name}: {np.mean(scores):.4f} dB of {len(scores)} images")
  assert abs(np.mean(scores) - expected) <= 0.02


@pytest.mark.parametrize("scale", [4, 2.5, 0.625, 1 / 3, 1])
@pytest.mark.parametrize("heights", [[1] * 23, [23], [5, 1, 17], [22, 1]])
def test_strips_are_resized_as_the_whole(scale, heights):
  image = np.random.default_rng(0).integers(0, 256, (23, 31, 3), np.uint8)
  expected = resize.imresize(image, scale, "double_mirror")
  strips = np.split(image, np.cumsum(heights)[:-1])
  result = np.concatenate(list(resize.resize_strips(strips, 23, scale)))
  assert result.shape == expected.shape and result.dtype == np.float64
  np.testing.assert_array_equal(np.clip(np.floor(result + 0.5), 0, 255), expected)
  rows = resize.resize_rows(image, scale, 2, 7)
  np.testing.assert_array_equal(rows, result[2:7])
