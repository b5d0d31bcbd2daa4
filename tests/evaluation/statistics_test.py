"""Runs taken together, and the difference of two models."""

import json
import statistics as reference

import numpy as np
import pytest
import scipy.stats

from sr_jax import UserError
from sr_jax.evaluation import statistics


def test_a_group_has_mean_and_standard_deviation_of_its_runs():
  values = {"a": 28.0, "b": 28.4, "c": 28.9}
  results = {
    label: {"Set": {"psnr_y": value, "lpips_alex": 0.1, "images": {}}}
    for label, value in values.items()
  }
  del results["b"]["Set"]["lpips_alex"]  # a score that one of them lacks is left out
  rows = statistics.group_rows(results, {"seeds": ["a", "b", "c"]})
  assert rows == {
    "seeds": {"Set": {"psnr_y": (pytest.approx(28.4333333), reference.stdev(values.values()))}}
  }


def test_the_interval_is_that_of_the_mean_of_normal_differences():
  """For many images the bootstrap's interval is the textbook's, mean +- 1.96 s / sqrt(n)."""
  rng = np.random.default_rng(1)
  n = 400
  base, change = rng.normal(28, 3, n), rng.normal(0.2, 0.5, n)
  a = {str(i): {"psnr_y": base[i]} for i in range(n)}
  b = {str(i): {"psnr_y": base[i] + change[i], "niqe": 3.0} for i in range(n)}
  mean, low, high = statistics.paired(a, b)["psnr_y"]
  half = 1.96 * change.std(ddof=1) / n**0.5
  assert mean == pytest.approx(change.mean())
  assert low == pytest.approx(change.mean() - half, abs=0.1 * half)
  assert high == pytest.approx(change.mean() + half, abs=0.1 * half)
  assert list(statistics.paired(a, b)) == ["psnr_y"]
  assert statistics.paired(a, b) == statistics.paired(a, b)
  negative = statistics.paired(b, a)["psnr_y"]
  assert negative == (pytest.approx(-mean), pytest.approx(-high), pytest.approx(-low))


def test_the_interval_is_that_of_scipy():
  """Of few and skewed differences, where the textbook's interval is another; to a 50th of it."""
  rng = np.random.default_rng(3)
  differences = rng.gamma(1, 0.3, 14) - 0.2
  base = rng.normal(28, 3, 14)
  a = {str(i): {"psnr_y": base[i]} for i in range(14)}
  b = {str(i): {"psnr_y": base[i] + differences[i]} for i in range(14)}
  found = scipy.stats.bootstrap(
    (differences,), np.mean, n_resamples=50_000, method="percentile", rng=1
  ).confidence_interval
  _, low, high = statistics.paired(a, b)["psnr_y"]
  assert (low, high) == pytest.approx((found.low, found.high), abs=0.02 * (found.high - found.low))


def test_one_image_has_no_interval_and_equal_images_are_left_out():
  with pytest.raises(UserError, match="needs 2 or more"):
    statistics.paired({"x": {"psnr_y": 1.0}}, {"x": {"psnr_y": 2.0}, "y": {"psnr_y": 2.0}})
  a = {name: {"psnr_y": float("inf")} for name in "xyz"}
  assert statistics.paired(a, a) == {}


def test_a_set_of_one_image_costs_no_other_its_difference(tmp_path, caplog):
  sets = {"one": {"x": {"psnr_y": 1.0}}, "two": {"x": {"psnr_y": 1.0}, "y": {"psnr_y": 3.0}}}
  a = {name: {"psnr_y": 0.0, "images": images} for name, images in sets.items()}
  statistics.write(tmp_path / "s.json", {"a": a, "b": a}, {}, [("a", "b")])
  told = json.loads((tmp_path / "s.json").read_text())["differences"]
  assert told == {"b - a": {"two": {"psnr_y": [0, 0, 0]}}}
  assert "no difference b - a on one: 1 images" in caplog.text


@pytest.mark.parametrize(
  "entry, message",
  [
    ("seeds", "must be NAME=LABEL"), ("=a,b", "must be NAME=LABEL"), ("s=a", "two labels or more"),
    ("s=a,a", "two labels or more"), ("s=a,x", "no model is called 'x'; there are a, b"),
  ],
)  # fmt: skip
def test_groups_that_are_none(entry, message):
  with pytest.raises(UserError, match=message):
    statistics.parse_groups([entry], ["a", "b"])
  assert statistics.parse_groups(["s=a,b"], ["a", "b"]) == {"s": ["a", "b"]}
