"""sr_jax/evaluation/alpha.py: what the page of one's own photographs holds, and how much of it.

tests/programs/serve_test.py uses the page in a browser.
"""

import json
import re

import headless
import numpy as np
import pytest
from tiny_models import photo

from sr_jax.evaluation import alpha


@pytest.mark.parametrize(
  "size, pixels, side, expected",
  [
    ((30, 40), 1200, 99, (0, 30, 0, 40)),
    ((300, 400), 1200, 999, (135, 165, 180, 220)),  # 30x40 in the middle
    ((10, 1000), 9999, 100, (4, 5, 450, 550)),  # no side may be longer
    ((1, 90_000), 1000, 500, (0, 1, 44750, 45250)),  # and none vanishes
  ],
)
def test_the_part_that_is_shown_is_the_middle(size, pixels, side, expected):
  rows, columns = alpha.part(*size, pixels, side)
  assert (rows.start, rows.stop, columns.start, columns.stop) == expected


def test_the_room_of_a_page_is_shared_by_photographs_and_alphas():
  pixels, side = alpha.room(2, 11, 4)
  rows, columns = alpha.part(3000, 4000, pixels, side)
  enlarged = (rows.stop - rows.start) * (columns.stop - columns.start) * 16
  assert 0.98 * alpha.MAX_PIXELS < 2 * 11 * enlarged <= alpha.MAX_PIXELS
  assert side * 4 <= 16383  # what WebP takes


def data_of(page: str) -> dict:
  return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def test_frames_are_lossless_while_they_are_small_and_the_page_says_which(monkeypatch):
  lr, srs = photo(24, 32), [photo(96, 128, seed=i) for i in range(3)]
  for limit, told in ((10**6, "without loss"), (9999, "as lossy WebP of quality 95")):
    monkeypatch.setattr(alpha, "LOSSLESS_PIXELS", limit)
    one = alpha.encode_photograph("a.png", (240, 320), lr, srs, 1)
    assert "a.png: 320×240 pixels, of which this page shows the middle 32×24" in one["about"]
    assert told in one["about"] and (one["width"], one["height"]) == (128, 96)
    errors = [
      np.abs(headless.decoded(frame) - sr.astype(int)).max()
      for frame, sr in zip(one["frames"], srs, strict=True)
    ]
    assert all(error == 0 for error in errors) == ("without" in told)
    np.testing.assert_array_equal(headless.decoded(one["before"]), lr)
  whole = alpha.encode_photograph("a.png", (24, 32), lr, srs, 1)
  assert "middle" not in whole["about"]


def test_names_of_photographs_are_text_and_never_markup():
  name = "</script><script>alert(1)</script>{{data}}<img src=x>"
  one = alpha.encode_photograph(name, (24, 32), photo(24, 32), [photo(96, 128)], 1)
  page = alpha.render(name, name, [0.5], [one])
  assert page.count("<script") == 2 and "<img src=x" not in page
  assert data_of(page)["photos"][0]["name"] == name
  live = alpha.render_live("t", "s", 4, 100, "shrink it")
  assert data_of(live)["limits"] == {"bytes": 100, "remedy": "shrink it"}
  assert len(data_of(live)["alphas"]) == 101 and data_of(live)["photos"] is None
