"""Tests of sr_jax/evaluation/comparison.py: which pixels of the picture are which image."""

import numpy as np
import pytest

from sr_jax.evaluation import comparison

SCORES = {"psnr_y": 30.0, "ssim_y": 0.9}
CELL, GAP, ROW = 256, 8, 256 + 3 * 18 + 2 * 8


def cell(picture: np.ndarray, row: int, column: int, height: int, width: int) -> np.ndarray:
  """The pixels of a cell, one for each HR pixel."""
  top, left = row * ROW + GAP, GAP + column * (CELL + GAP)
  block = picture[top : top + height * 2, left : left + width * 2]
  np.testing.assert_array_equal(block, block[::2, ::2].repeat(2, axis=0).repeat(2, axis=1))
  return block[::2, ::2]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_a_row_shows_lr_the_models_and_hr():
  lr, hr, a, b = noise(15, 25, 3), *(noise(60, 100, 3, seed=i) for i in range(1, 4))
  panels = comparison.Panels()
  panels.add("Set/a", lr, hr, "A", a, SCORES)
  panels.add("Set/a", lr, hr, "B", b, SCORES)
  picture = panels.draw()
  assert picture.shape == (ROW + GAP, 4 * (CELL + GAP) + GAP, 3)
  large = lr.repeat(4, axis=0).repeat(4, axis=1)
  for column, image in enumerate((large, a, b, hr)):
    np.testing.assert_array_equal(cell(picture, 0, column, 60, 100), image)
  assert (picture[GAP + 120 : GAP + 250] == 255).all(), "a small image is not stretched"


def test_grey_images_and_rows_of_other_lengths():
  panels = comparison.Panels()
  grey = noise(40, 44)
  panels.add("Set/grey", noise(10, 11), grey, "A", grey, SCORES)
  panels.add("Set/b", noise(10, 10, 3), noise(40, 40, 3), "A", noise(40, 40, 3), SCORES)
  panels.add("Set/b", noise(10, 10, 3), noise(40, 40, 3), "B", noise(40, 40, 3), SCORES)
  picture = panels.draw()
  assert picture.shape == (2 * ROW + GAP, 4 * (CELL + GAP) + GAP, 3)
  shown = cell(picture, 0, 1, 40, 44)
  np.testing.assert_array_equal(shown, np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("y, x", [(10, 20), (200, 300), (130, 90)])
def test_the_crop_is_where_the_first_model_errs_most(y, x):
  hr = noise(256, 384, 3)
  sr, other = hr.copy(), hr.copy()
  sr[y : y + 20, x : x + 20] = ~sr[y : y + 20, x : x + 20]
  other[128:, :64] = 0
  panels = comparison.Panels()
  panels.add("Set/a", noise(64, 96, 3), hr, "A", sr, SCORES)
  panels.add("Set/a", noise(64, 96, 3), hr, "B", other, SCORES)
  picture = panels.draw()
  shown, truth = cell(picture, 0, 1, 128, 128), cell(picture, 0, 3, 128, 128)
  assert np.any(shown != truth, axis=2).sum() == 400, "all of the error, and the same place of HR"


def test_the_first_images_are_enough():
  panels = comparison.Panels(max_images=2)
  for label in ("A", "B"):
    for title in ("x", "y", "z"):
      panels.add(title, noise(10, 10, 3), noise(40, 40, 3), label, noise(40, 40, 3), SCORES)
  assert panels.draw().shape == (2 * ROW + GAP, 4 * (CELL + GAP) + GAP, 3)


def test_the_crop_is_the_worst_of_the_first_model_that_is_not_bicubic():
  lr, hr = noise(64, 64, 3), noise(256, 256, 3, seed=1)
  bicubic, model = hr.copy(), hr.copy()
  bicubic[:60, :60] = 255 - bicubic[:60, :60]
  model[192:, 192:] = 255 - model[192:, 192:]
  panels = comparison.Panels(crop=64)
  for label, sr in (("bicubic", bicubic), ("A", model)):
    panels.add("Set/a", lr, hr, label, sr, SCORES)
  shown = panels.draw()[GAP : GAP + 128, GAP + 3 * (128 + GAP) :][:, :128][::2, ::2]
  np.testing.assert_array_equal(shown, hr[192:, 192:])
