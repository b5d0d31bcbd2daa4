"""Tests of sr_jax/evaluation/scoring.py and test_sets.py: what is scored, over what
the means are, and what papers say.
"""

import math

import jax
import numpy as np
import pytest
import references
from tiny_models import photo

from sr_jax import metrics
from sr_jax.evaluation import scoring
from sr_jax.evaluation import test_sets
from sr_jax.upscaling.upscaler import bicubic_upscaler


def test_scores_of_colour_and_of_grey():
  hr, sr = photo(23, 26), photo(23, 26, seed=1)
  scores = scoring.score(sr, hr, scale=4)
  assert list(scores) == ["psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"]
  a, b = sr[4:-4, 4:-4], hr[4:-4, 4:-4]
  assert scores["psnr_rgb"] == pytest.approx(references.psnr(a, b), abs=1e-9)
  assert scores["psnr_y"] == pytest.approx(
    references.psnr(references.luma(a), references.luma(b)), abs=1e-9
  )
  assert scores["ssim_y"] == pytest.approx(
    references.ssim(references.luma(a), references.luma(b)), abs=1e-9
  )
  channels = [references.ssim(a[..., c], b[..., c]) for c in range(3)]
  assert scores["ssim_rgb"] == pytest.approx(np.mean(channels), abs=1e-9)

  hr, sr = hr[:, :, 0], sr[:, :, 0]
  scores = scoring.score(sr, hr, scale=2)
  assert list(scores) == ["psnr_y", "ssim_y"]
  assert scores["psnr_y"] == pytest.approx(references.psnr(sr[2:-2, 2:-2], hr[2:-2, 2:-2]))
  assert scores["ssim_y"] == pytest.approx(references.ssim(sr[2:-2, 2:-2], hr[2:-2, 2:-2]))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_border_is_the_scale(scale):
  hr = photo(30, 30)
  sr = hr.copy()
  sr[:scale], sr[-scale:], sr[:, :scale], sr[:, -scale:] = 0, 0, 0, 0
  assert scoring.score(sr, hr, scale)["psnr_y"] == math.inf
  assert scoring.score(sr, hr, scale - 1)["psnr_y"] < 40


def test_means_are_over_the_images():
  colours = [test_sets.TestImage(f"{i}.png", photo(24, 24, seed=i), None) for i in range(2)]
  grey = test_sets.TestImage("grey.png", photo(24, 24, channels=0), None)
  kept = []
  upscalers = {
    "a": lambda lr: photo(24, 24, seed=9) if lr.ndim == 3 else photo(24, 24, 0, seed=9),
    "b": lambda lr: photo(24, 24, seed=7) if lr.ndim == 3 else photo(24, 24, 0, seed=7),
  }
  test_images = [image._replace(lr=np.zeros(image.hr.shape)) for image in (*colours, grey)]
  scores = scoring.evaluate_set(
    upscalers, iter(test_images), scale=4, keep=lambda *seen: kept.append(seen)
  )
  assert list(scores) == ["a", "b"]
  for label, seed in (("a", 9), ("b", 7)):
    means = scores[label]
    per_image = means.pop("images")
    assert list(per_image) == ["0.png", "1.png", "grey.png"]
    assert per_image["1.png"] == scoring.score(photo(24, 24, seed=seed), colours[1].hr, 4)
    assert set(means) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
    assert means["psnr_y"] == pytest.approx(sum(s["psnr_y"] for s in per_image.values()) / 3)
    rgb = [per_image[name]["ssim_rgb"] for name in ("0.png", "1.png")]
    assert means["ssim_rgb"] == pytest.approx(sum(rgb) / 2)  # a grey file has none
    assert [image.name for image, _, _ in kept] == ["0.png", "1.png", "grey.png"]
    np.testing.assert_array_equal(kept[1][1][label], photo(24, 24, seed=seed))
    assert kept[1][2][label] == per_image["1.png"]


def test_images_of_like_sizes_are_scored_together_and_named_in_order(monkeypatch):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # batches of 8
  sizes = [(24, 24), (40, 40), (25, 30), (24, 28), (40, 47)]
  hrs = [photo(*size, seed=i) for i, size in enumerate(sizes)]
  test_images = [test_sets.TestImage(str(i), hr, hr) for i, hr in enumerate(hrs)]
  seen = []
  monkeypatch.setattr(
    metrics, "score_batch",
    lambda sr, *args, _real=metrics.score_batch, **kw: (
      seen.append(sr.shape), _real(sr, *args, **kw))[1],
  )  # fmt: skip
  blurred = lambda lr: np.clip(lr.astype(int) + 9, 0, 255).astype(np.uint8)  # noqa: E731
  scores = scoring.evaluate_set({"x": blurred}, test_images, scale=2)["x"]["images"]
  assert list(scores) == list("01234")
  assert sorted(seen) == [(8, 32, 32, 3), (8, 48, 48, 3)]  # one program a size
  for name, hr in zip(scores, hrs, strict=True):
    cut = slice(2, -2)
    expected = references.psnr(blurred(hr)[cut, cut], hr[cut, cut])
    assert scores[name]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)


def test_a_score_of_ones_own_leaves_out_images_that_have_none():
  """Where its function says NaN; the mean is over the others."""
  images = [test_sets.TestImage(f"{i}.png", photo(24, 24, seed=i), None) for i in range(3)]
  images = [image._replace(hr=photo(24, 24 + 4 * i)) for i, image in enumerate(images)]

  def width(sr, hr, border):
    return math.nan if hr.shape[1] == 28 else float(hr.shape[1] - border)

  extra = scoring.Extra(functions={"width": width})
  upscalers = {"x": lambda lr: photo(24, lr.shape[1])}
  images = [image._replace(lr=image.hr) for image in images]
  scores = scoring.evaluate_set(upscalers, images, 4, extra=extra)["x"]
  assert scores["width"] == (20 + 28) / 2
  assert ["width" in scores["images"][f"{i}.png"] for i in range(3)] == [True, False, True]


def test_what_cannot_be_scored_is_named():
  with pytest.raises(ValueError, match="no image to evaluate"):
    scoring.evaluate_set({"x": lambda lr: lr}, [], 4)
  small = test_sets.TestImage("icon.png", photo(16, 16), photo(16, 16))
  with pytest.raises(ValueError, match="icon.png: border=4 of a 16x16 image"):
    scoring.evaluate_set({"x": lambda lr: lr}, [small], 4)
  other = test_sets.TestImage("pair.png", photo(24, 24), photo(20, 24))
  with pytest.raises(ValueError, match=r"pair.png: .*they have \[20, 24, 3\] and \[24, 24, 3\]"):
    scoring.evaluate_set({"x": lambda lr: lr}, [other], 4)


@pytest.mark.parametrize(
  "name, psnr_y, ssim_y",  # ESRGAN, supplement, table 2
  [
    ("Set5", 28.42, 0.8104),
    ("Set14", 26.00, 0.7027),
    pytest.param("BSD100", 25.96, 0.6675, marks=pytest.mark.slow),
  ],
)
def test_bicubic_scores_what_the_papers_say(shared, name, psnr_y, ssim_y):
  test_set = test_sets.open_test_set(str(shared / f"data/benchmark/{name}"), 4)
  scores = scoring.evaluate_set({"x": bicubic_upscaler(4)}, test_set.images, 4)["x"]
  assert test_set.name == name
  assert (
    len(test_set.names) == len(scores["images"]) == {"Set5": 5, "Set14": 14, "BSD100": 100}[name]
  )
  assert scores["psnr_y"] == pytest.approx(psnr_y, abs=0.02)
  assert scores["ssim_y"] == pytest.approx(ssim_y, abs=0.001)


def test_the_perceptual_index_needs_every_image():
  results = {"s": {"niqe": 4.0, "images": {"a": {"psnr_y": 20.0, "niqe": 4.0}, "b": {"psnr_y": 9}}}}
  with pytest.raises(ValueError, match="PI of s needs every image; b lacks a score in --ma"):
    scoring.perceptual_indices(results, {"s": {"a": 5.0}})
  with pytest.raises(ValueError, match="b lacks a NIQE; give --niqe_params"):
    scoring.perceptual_indices(results, {"s": {"a": 5.0, "b": 5.0}})
  with pytest.raises(ValueError, match="--ma names the set 't'; there are s"):
    scoring.perceptual_indices(results, {"t": {}})
