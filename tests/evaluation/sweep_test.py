"""Sweeps over alpha: which alphas, which of them is chosen, and the picture of the curves."""

import math
import re
from xml.etree import ElementTree

import pytest

from sr_jax import UserError
from sr_jax.evaluation import sweep


@pytest.mark.parametrize(
  "text, alphas",
  [
    ("0:1:0.25", [0, 0.25, 0.5, 0.75, 1]),
    ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
    ("0.2:0.5:0.2", [0.2, 0.4]),
    ("0.3:0.3:1", [0.3]),
  ],
)
def test_alphas_of_a_sweep(text, alphas):
  assert sweep.parse_alphas(text) == alphas


@pytest.mark.parametrize("text", ["", "0:1", "0:1:0", "1:0:0.1", "0:2:0.5", "a:b:c", "0:1:nan"])
def test_other_texts_are_refused_with_one_that_is_taken(text):
  with pytest.raises(UserError, match="try --sweep=0:1:0.1"):
    sweep.parse_alphas(text)


SCORES = {
  0.0: {"psnr_y": 30.0, "lpips_alex": 0.20},
  0.5: {"psnr_y": 29.8, "lpips_alex": 0.15},
  1.0: {"psnr_y": 28.0, "lpips_alex": 0.10},
}


@pytest.mark.parametrize(
  "condition, alpha",
  [
    ("psnr_drop<=0.3", 0.5), ("psnr_drop <= 5", 1.0), ("psnr_drop<=0", 0.0),
    ("psnr_y>=29.8", 0.5), ("lpips_alex<=0.1", 1.0),
  ],
)  # fmt: skip
def test_the_largest_alpha_that_keeps_the_condition(condition, alpha):
  assert sweep.select(condition, SCORES) == alpha


@pytest.mark.parametrize(
  "condition, message",
  [
    ("lpips_alex<=0.05", "no alpha has .*the nearest is 0.1"),
    ("psnr_y>=31", "the nearest is 30"),
    ("niqe<=4", "niqe was not computed; there are psnr_drop, psnr_y, lpips_alex"),
    ("psnr_drop=0.3", "must be SCORE<=NUMBER"),
    ("__import__('os')", "must be SCORE<=NUMBER"),
  ],
)
def test_what_cannot_be_chosen_by_is_refused(condition, message):
  with pytest.raises(UserError, match=message):
    sweep.select(condition, SCORES)
  with pytest.raises(UserError, match="needs alpha 0"):
    sweep.select("psnr_drop<=1", {0.5: SCORES[0.5]})


def test_means_are_over_the_images_of_all_sets():
  """20 dB are an error of 25.5 levels, 40 dB of 2.55."""
  sets = {
    "a": {"psnr_y": 0.0, "images": {"1": {"psnr_y": 20.0}, "2": {"psnr_y": 20.0}}},
    "b": {"psnr_y": 0.0, "images": {"1": {"psnr_y": 40.0}}},
  }
  means = sweep.over_all_sets(sets)
  assert means["psnr_y"] == pytest.approx(80 / 3)
  assert means["rmse"] == pytest.approx(((2 * 25.5**2 + 2.55**2) / 3) ** 0.5)


def test_the_picture_has_a_curve_for_each_set_in_the_right_direction():
  niqe = {alpha: {**scores, "niqe": 5 - alpha} for alpha, scores in SCORES.items()}
  root = ElementTree.fromstring(sweep.plot({"Set<5>": niqe, "B": niqe}))
  name = "{http://www.w3.org/2000/svg}"
  circles = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter(f"{name}circle")]
  assert len(circles) == 2 * 2 * 3  # LPIPS and NIQE, two sets, three alphas
  for start in range(0, 12, 3):
    (x0, y0), (x1, y1), (x2, y2) = circles[start : start + 3]
    assert x0 > x1 > x2 and y0 < y1 < y2  # less LPIPS to the left, more PSNR upwards
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.1, abs=0.01)
  texts = [t.text for t in root.iter(f"{name}text")]
  assert texts.count("Set<5>") == 2 and texts.count("0.5") == 4
  assert {"lpips_alex (less is better)", "niqe (less is better)"} <= set(texts)


def test_names_of_alphas_and_of_sets_do_not_lie_on_one_another():
  alphas = sweep.parse_alphas("0:1:0.02")
  scores = {a: {"psnr_y": 28 - 2 * a, "lpips_alex": 0.3 - 0.2 * a} for a in alphas}
  root = ElementTree.fromstring(sweep.plot({"a long name " * 5: scores, "b": scores}))
  texts = [
    (float(t.get("x")), float(t.get("y")), t.text)
    for t in root.iter("{http://www.w3.org/2000/svg}text")
    if t.get("fill") != "black" or t.get("text-anchor") == "start" and t.text != "PSNR-Y, dB"
  ]
  assert 2 * 5 + 2 < len(texts) < 2 * 25
  names = [(x, y) for x, y, text in texts if text in ("a long name " * 5, "b")]
  assert names[0][0] == names[1][0] and names[1][1] - names[0][1] >= 16
  curve = [(x, y) for x, y, text in texts if re.fullmatch(r"[\d.]+", text)]
  curve = curve[: len(curve) // 2]
  assert all(math.dist(one, other) > 30 for one, other in zip(curve, curve[1:], strict=False))


def test_without_lpips_and_niqe_there_is_nothing_to_draw_but_the_file_is_sound():
  text = sweep.plot({"a": {0.0: {"psnr_y": 30.0}}})
  assert not re.search("<circle", text) and ElementTree.fromstring(text) is not None
