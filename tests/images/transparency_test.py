"""Tests of images/transparency.py."""

import numpy as np

from sr_jax.images import transparency


def test_hidden_colours_become_those_of_the_nearest_visible_pixels():
  rng = np.random.default_rng(0)
  color = rng.integers(0, 256, (40, 30, 3), np.uint8)
  alpha = np.where(rng.random((40, 30)) < 0.05, 200, 0).astype(np.uint8)
  bled = transparency.bled(color, alpha)
  places = np.argwhere(alpha)
  for y in range(40):
    for x in range(30):
      squares = ((places - (y, x)) ** 2).sum(axis=1)
      nearest = places[squares == squares.min()]
      assert any((bled[y, x] == color[a, b]).all() for a, b in nearest)


def test_it_works_across_its_parts(monkeypatch):
  rng = np.random.default_rng(1)
  color = rng.integers(0, 65536, (100, 20), np.uint16)
  alpha = (rng.random((100, 20)) < 0.2).astype(np.uint16)
  whole = transparency.bled(color, alpha)
  monkeypatch.setattr(transparency, "ROWS", 16)
  np.testing.assert_array_equal(transparency.bled(color, alpha), whole)


def test_what_is_visible_or_wholly_hidden_stays():
  color = np.arange(12, dtype=np.uint8).reshape(3, 4)
  np.testing.assert_array_equal(transparency.bled(color, np.zeros_like(color)), color)
  np.testing.assert_array_equal(transparency.bled(color, np.ones_like(color)), color)
