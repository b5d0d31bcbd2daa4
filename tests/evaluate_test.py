"""Tests of sr_jax/evaluate.py: what an upscaler returns, what is scored, what is written."""

import json
import math
import pathlib

import numpy as np
import pytest
import references
from PIL import Image
from tiny_models import apply, assert_same_pixels, contrasting_model, make_model, photo

from sr_jax import evaluate
from sr_jax import images
from sr_jax import model_file
from sr_jax import tables
from sr_jax.generators import GENERATORS

# LR heights and widths of Set14 at x4.
SET14 = [
  (120, 125), (144, 180), (128, 128), (72, 88), (90, 62), (69, 69), (90, 125),
  (88, 72), (128, 128), (128, 128), (128, 192), (128, 128), (164, 132), (97, 146),
]  # fmt: skip


def upscaler(model: model_file.Model) -> evaluate.Upscaler:
  module = model_file.build_generator(model.name, model.kwargs)
  return evaluate.make_upscaler(module, model.variables)


def to_uint8(sr: np.ndarray) -> np.ndarray:
  return np.floor(np.clip(sr, 0, 1) * 255 + 0.5).astype(np.uint8)


def assert_same_image(actual: np.ndarray, expected: np.ndarray) -> None:
  """The same pixels, of an image in which others would show."""
  assert expected.std() > 20 and np.mean((expected == 0) | (expected == 255)) < 0.2
  assert_same_pixels(actual, expected)


@pytest.mark.parametrize("name", GENERATORS)
def test_padding_changes_nothing(name):
  model = contrasting_model(name)
  upscale = upscaler(model)
  for size in ((13, 37), (33, 20)):
    lr = photo(*size)
    assert_same_image(upscale(lr), to_uint8(apply(model, lr)))


@pytest.mark.parametrize("dense", ["by_source", "winograd"])
def test_padding_changes_nothing_in_a_fast_form(dense):
  model = contrasting_model(dense=dense, features=8, growth=8, blocks=1)
  lr = photo(13, 37)
  assert_same_image(upscaler(model)(lr), to_uint8(apply(model, lr)))


@pytest.mark.parametrize("scale", [1, 2, 3, 8])
def test_padding_changes_nothing_at_any_scale(scale):
  model = contrasting_model("residualnet", scale=scale)
  lr = photo(7, 9)
  assert_same_image(upscaler(model)(lr), to_uint8(apply(model, lr)))


@pytest.mark.parametrize("unshuffle", [2, 4])
def test_sides_that_the_unshuffle_does_not_divide_are_continued(unshuffle):
  model = contrasting_model(scale=4 // unshuffle, input_unshuffle=unshuffle)
  upscale, scale = upscaler(model), model.kwargs["scale"]
  for height, width in ((13, 37), (34, 20)):
    lr = photo(height, width)
    even = np.pad(lr, [(0, -height % unshuffle), (0, -width % unshuffle), (0, 0)], mode="edge")
    assert even.shape[0] % unshuffle == even.shape[1] % unshuffle == 0
    expected = to_uint8(apply(model, even))[: height * scale, : width * scale]
    assert_same_image(upscale(lr), expected)


def test_few_programs_serve_a_test_set():
  model = make_model("residualnet", features=3, blocks=1)
  upscale = upscaler(model)
  for height, width in SET14:
    assert upscale(np.zeros((height, width, 3), np.uint8)).shape == (height * 4, width * 4, 3)
  module = model_file.build_generator(model.name, model.kwargs)
  assert evaluate._make_forward(module)._cache_size() <= 7
  upscaler(model)(np.zeros((120, 125, 3), np.uint8))  # as evaluation during training comes back
  assert evaluate._make_forward(module)._cache_size() <= 7


def test_sizes_are_padded_by_half_at_most():
  buckets = [evaluate._bucket(size) for size in range(1, 2000)]
  assert sorted(set(buckets))[:6] == [32, 48, 64, 96, 128, 192]
  for size, bucket in enumerate(buckets, 1):
    assert size <= bucket <= max(32, 1.5 * size)


def test_a_colour_model_takes_grey_images():
  model = contrasting_model()
  grey = photo(13, 20, channels=0)
  sr = upscaler(model)(grey)
  colour = to_uint8(apply(model, np.stack([grey] * 3, axis=2)))
  luma = np.asarray(Image.fromarray(colour).convert("L"))  # Pillow's fixed point, 16 bits
  assert sr.shape == (52, 80)
  assert_same_image(sr, luma)


def test_a_grey_model_takes_grey_and_colour_images():
  model = contrasting_model("msrresnet", out_channels=1)
  upscale = upscaler(model)
  grey = photo(13, 20, channels=0)
  sr = upscale(grey)
  assert_same_image(sr, to_uint8(apply(model, grey[:, :, None]))[:, :, 0])
  np.testing.assert_array_equal(upscale(np.stack([grey] * 3, axis=2)), np.stack([sr] * 3, axis=2))

  # A faint colour, so that nothing is clipped: its chroma stays, its luma is the model's.
  lr = (photo(13, 20) // 16 + np.array([130, 100, 110])).astype(np.uint8)
  y, cb, cr = np.moveaxis(np.asarray(Image.fromarray(lr).convert("YCbCr")).astype(int), 2, 0)
  sr_y, sr_cb, sr_cr = np.moveaxis(
    np.asarray(Image.fromarray(upscale(lr)).convert("YCbCr")).astype(int), 2, 0
  )
  expected = upscale(y.astype(np.uint8))
  inside = (expected > 40) & (expected < 215)
  assert inside.mean() > 0.3
  assert np.abs(sr_y - expected)[inside].max() <= 2
  assert np.abs(sr_cb[inside].mean() - cb.mean()) < 1
  assert np.abs(sr_cr[inside].mean() - cr.mean()) < 1


def test_models_of_other_channels_are_refused():
  model = make_model(out_channels=4)
  with pytest.raises(ValueError, match="makes 4 channels of 4; images have 3, grey ones 1"):
    upscaler(model)
  module = model_file.build_generator("rrdbnet", {**make_model().kwargs, "out_channels": 1})
  with pytest.raises(ValueError, match="makes 1 channels of 3"):
    evaluate.make_upscaler(module, make_model().variables)


def luma(rgb: np.ndarray) -> np.ndarray:
  r, g, b = np.moveaxis(rgb.astype(float), 2, 0)
  return (65.481 * r + 128.553 * g + 24.966 * b) / 255 + 16


def test_scores_of_colour_and_of_grey():
  hr, sr = photo(23, 26), photo(23, 26, seed=1)
  scores = evaluate.score(sr, hr, scale=4)
  assert list(scores) == ["psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"]
  a, b = sr[4:-4, 4:-4], hr[4:-4, 4:-4]
  assert scores["psnr_rgb"] == pytest.approx(references.psnr(a, b), abs=1e-9)
  assert scores["psnr_y"] == pytest.approx(references.psnr(luma(a), luma(b)), abs=1e-9)
  assert scores["ssim_y"] == pytest.approx(references.ssim(luma(a), luma(b)), abs=1e-9)
  channels = [references.ssim(a[..., c], b[..., c]) for c in range(3)]
  assert scores["ssim_rgb"] == pytest.approx(np.mean(channels), abs=1e-9)

  hr, sr = hr[:, :, 0], sr[:, :, 0]
  scores = evaluate.score(sr, hr, scale=2)
  assert list(scores) == ["psnr_y", "ssim_y"]
  assert scores["psnr_y"] == pytest.approx(references.psnr(sr[2:-2, 2:-2], hr[2:-2, 2:-2]))
  assert scores["ssim_y"] == pytest.approx(references.ssim(sr[2:-2, 2:-2], hr[2:-2, 2:-2]))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_border_is_the_scale(scale):
  hr = photo(30, 30)
  sr = hr.copy()
  sr[:scale], sr[-scale:], sr[:, :scale], sr[:, -scale:] = 0, 0, 0, 0
  assert evaluate.score(sr, hr, scale)["psnr_y"] == math.inf
  assert evaluate.score(sr, hr, scale - 1)["psnr_y"] < 40


def test_means_are_over_the_images():
  colours = [evaluate.TestImage(f"{i}.png", photo(24, 24, seed=i), None) for i in range(2)]
  grey = evaluate.TestImage("grey.png", photo(24, 24, channels=0), None)
  kept = []
  upscalers = {
    "a": lambda lr: photo(24, 24, seed=9) if lr.ndim == 3 else photo(24, 24, 0, seed=9),
    "b": lambda lr: photo(24, 24, seed=7) if lr.ndim == 3 else photo(24, 24, 0, seed=7),
  }
  test_images = [image._replace(lr=np.zeros(image.hr.shape)) for image in (*colours, grey)]
  scores = evaluate.evaluate_set(
    upscalers, iter(test_images), scale=4, keep=lambda *seen: kept.append(seen)
  )
  assert list(scores) == ["a", "b"]
  for label, seed in (("a", 9), ("b", 7)):
    means = scores[label]
    per_image = means.pop("images")
    assert list(per_image) == ["0.png", "1.png", "grey.png"]
    assert per_image["1.png"] == evaluate.score(photo(24, 24, seed=seed), colours[1].hr, 4)
    assert set(means) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb"}
    assert means["psnr_y"] == pytest.approx(sum(s["psnr_y"] for s in per_image.values()) / 3)
    rgb = [per_image[name]["ssim_rgb"] for name in ("0.png", "1.png")]
    assert means["ssim_rgb"] == pytest.approx(sum(rgb) / 2)  # a grey file has none
    assert [image.name for image, _, _ in kept] == ["0.png", "1.png", "grey.png"]
    np.testing.assert_array_equal(kept[1][1][label], photo(24, 24, seed=seed))
    assert kept[1][2][label] == per_image["1.png"]


def test_images_of_like_sizes_are_scored_together_and_named_in_order(monkeypatch):
  monkeypatch.setattr(evaluate.jax, "default_backend", lambda: "gpu")  # batches of 8
  sizes = [(24, 24), (40, 40), (25, 30), (24, 28), (40, 47)]
  hrs = [photo(*size, seed=i) for i, size in enumerate(sizes)]
  test_images = [evaluate.TestImage(str(i), hr, hr) for i, hr in enumerate(hrs)]
  seen = []
  monkeypatch.setattr(
    evaluate.metrics, "score_batch",
    lambda sr, *args, _real=evaluate.metrics.score_batch, **kw: (
      seen.append(sr.shape), _real(sr, *args, **kw))[1],
  )  # fmt: skip
  blurred = lambda lr: np.clip(lr.astype(int) + 9, 0, 255).astype(np.uint8)  # noqa: E731
  scores = evaluate.evaluate_set({"x": blurred}, test_images, scale=2)["x"]["images"]
  assert list(scores) == list("01234")
  assert sorted(seen) == [(8, 32, 32, 3), (8, 48, 48, 3)]  # one program a size
  for name, hr in zip(scores, hrs, strict=True):
    cut = slice(2, -2)
    expected = references.psnr(blurred(hr)[cut, cut], hr[cut, cut])
    assert scores[name]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be_scored_is_named():
  with pytest.raises(ValueError, match="no image to evaluate"):
    evaluate.evaluate_set({"x": lambda lr: lr}, [], 4)
  small = evaluate.TestImage("icon.png", photo(16, 16), photo(16, 16))
  with pytest.raises(ValueError, match="icon.png: border=4 of a 16x16 image"):
    evaluate.evaluate_set({"x": lambda lr: lr}, [small], 4)
  other = evaluate.TestImage("pair.png", photo(24, 24), photo(20, 24))
  with pytest.raises(ValueError, match=r"pair.png: .*are \[20, 24, 3\] and \[24, 24, 3\]"):
    evaluate.evaluate_set({"x": lambda lr: lr}, [other], 4)


@pytest.mark.parametrize(
  "name, psnr_y, ssim_y",  # ESRGAN, supplement, table 2
  [("Set5", 28.42, 0.8104), ("Set14", 26.00, 0.7027), ("BSD100", 25.96, 0.6675)],
)
def test_bicubic_scores_what_the_papers_say(shared, name, psnr_y, ssim_y):
  set_name, count, test_images = evaluate.open_test_set(str(shared / f"data/benchmark/{name}"), 4)
  scores = evaluate.evaluate_set({"x": evaluate.bicubic_upscaler(4)}, test_images, 4)["x"]
  assert set_name == name
  assert count == len(scores["images"]) == {"Set5": 5, "Set14": 14, "BSD100": 100}[name]
  assert scores["psnr_y"] == pytest.approx(psnr_y, abs=0.02)
  assert scores["ssim_y"] == pytest.approx(ssim_y, abs=0.001)


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
  """A folder of colour and grey files, sides no multiples of 4, three of one stem."""
  folder = tmp_path / "photos"
  files = {
    "a.png": photo(61, 54),
    "a.jpg": photo(52, 52, seed=1),
    "deeper/a.png": photo(52, 52, seed=2),
    "grey.png": photo(52, 66, channels=0),
  }
  for name, image in files.items():
    images.write_image(folder / name, image)
  return folder


@pytest.fixture
def model_path(tmp_path) -> pathlib.Path:
  model_file.save_model(tmp_path / "tiny.safetensors", contrasting_model())
  return tmp_path / "tiny.safetensors"


def run(*arguments, metrics: str = "psnr") -> None:
  evaluate.main([*map(str, arguments), "--metrics", metrics])


def check_files(results: dict, folder: pathlib.Path, photos: pathlib.Path) -> None:
  """What is scored is what lies in the folder."""
  written = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
  assert written == {"a.png", "a_1.png", "deeper/a.png", "grey.png"}
  names = {"a.jpg": "a.png", "a.png": "a_1.png", "deeper/a.png": "deeper/a.png"}
  assert set(results["images"]) == {*names, "grey.png"}
  for name, file in names.items():
    sr, hr = np.asarray(Image.open(folder / file)), np.asarray(Image.open(photos / name))
    hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
    expected = references.psnr(sr[4:-4, 4:-4], hr[4:-4, 4:-4])
    assert results["images"][name]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)
  sr, hr = np.asarray(Image.open(folder / "grey.png")), np.asarray(Image.open(photos / "grey.png"))
  expected = references.psnr(sr[4:-4, 4:-4], hr[:52, :64][4:-4, 4:-4])
  assert results["images"]["grey.png"]["psnr_y"] == pytest.approx(expected, abs=1e-9)
  assert set(results["images"]["grey.png"]) == {"psnr_y", "ssim_y"}


def test_the_program_with_one_model(tmp_path, photos, model_path, capsys):
  run("--model", model_path, "--data", photos, "--output", tmp_path / "out")
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert set(results) == {"model", "scale", "protocol", "sets"}
  assert (results["model"], results["scale"]) == (str(model_path), 4)
  assert results["protocol"]["crop_border"] == "scale"
  assert list(results["sets"]) == ["photos"]
  scores = results["sets"]["photos"]
  assert set(scores) == {"psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "images"}
  check_files(scores, tmp_path / "out" / "photos", photos)
  row = capsys.readouterr().out.splitlines()[1].split()
  assert row[:3] == ["tiny", "photos", f"{scores['psnr_y']:.2f}"]
  # LR, one model, HR; four images.
  assert Image.open(tmp_path / "out" / "comparison.png").size == (3 * 264 + 8, 4 * 326 + 8)


def test_the_program_with_several_models_and_sets(tmp_path, photos, model_path, capsys):
  images.write_image(tmp_path / "more" / "HR" / "b.png", photo(40, 40, seed=5))
  run(
    "--model", f"bicubic,tiny RRDB={model_path}", "--data", f"{photos},{tmp_path / 'more'}",
    "--output", tmp_path / "out",
  )  # fmt: skip
  for label, model in (("bicubic", "bicubic"), ("tiny RRDB", str(model_path))):
    results = json.loads((tmp_path / "out" / label / "results.json").read_text())
    assert results["model"] == model
    assert list(results["sets"]) == ["photos", "more"]
    check_files(results["sets"]["photos"], tmp_path / "out" / label / "photos", photos)
    assert (tmp_path / "out" / label / "more" / "b.png").exists()
  assert not (tmp_path / "out" / "results.json").exists()
  table = capsys.readouterr().out.splitlines()
  assert [line.split("  ")[0] for line in table[1:5]] == ["bicubic"] * 2 + ["tiny RRDB"] * 2
  assert Image.open(tmp_path / "out" / "comparison.png").size == (4 * 264 + 8, 4 * 326 + 8)


def test_bicubic_at_another_scale(tmp_path, photos):
  run("--model", "bicubic", "--data", photos, "--output", tmp_path / "out", "--scale", 3)
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert results["scale"] == 3
  assert Image.open(tmp_path / "out" / "photos" / "grey.png").size == (66, 51)


def test_the_same_command_again_changes_nothing(tmp_path, photos):
  for _ in range(2):
    run("--model", "bicubic", "--data", photos, "--output", tmp_path / "out")
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
  assert len(files) == 4 + 6  # results.json, table.md, .csv, .json, comparison.png, report.html
  run("--model", "bicubic", "--data", photos, "--output", tmp_path / "out")
  assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == files


@pytest.mark.parametrize(
  "models, message",
  [
    ("bicubic,../evil=bicubic", r"'../evil' must be a relative path without"),
    ("bicubic,/tmp/evil=bicubic", r"'/tmp/evil' must be a relative path"),
    ("bicubic,=bicubic", "name='' must be a relative path"),
    ("bicubic,bicubic", r"--model names two .*bicubic.*LABEL=MODEL"),
    ("a*b=bicubic,a?b=bicubic", r"--model names two .*a_b.*LABEL=MODEL"),
    ("bicubic,nowhere.safetensors", "nowhere.safetensors does not exist"),
  ],
)
def test_bad_models_are_refused_before_anything_is_written(tmp_path, photos, models, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    run("--model", models, "--data", photos, "--output", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_models_of_two_scales_are_not_compared(tmp_path, photos):
  model_file.save_model(tmp_path / "x2.npz", make_model(scale=2))
  models = f"bicubic,{tmp_path / 'x2.npz'}"
  with pytest.raises(ValueError, match=r"has scales \[4, 2\]; compare models of one scale"):
    run("--model", models, "--data", photos, "--output", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_two_sets_of_one_name_are_refused(tmp_path, photos):
  other = tmp_path / "other" / "photos"
  images.write_image(other / "b.png", photo(40, 40))
  with pytest.raises(ValueError, match="--data names two photos.*rename one"):
    run("--model", "bicubic", "--data", f"{photos},{other}", "--output", tmp_path / "out")


def test_labels(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs" / "lr=1e-4").mkdir(parents=True)
  (tmp_path / "runs" / "alpha_0.5").mkdir()
  (tmp_path / "half.npz").touch()
  for spec, label, model in (
    ("bicubic", "bicubic", "bicubic"),
    ("half.npz", "half", "half.npz"),
    ("GAN=half.npz", "GAN", "half.npz"),
    ("runs/alpha_0.5", "runs_alpha_0.5", "runs/alpha_0.5"),
    ("runs/lr=1e-4", "runs_lr=1e-4", "runs/lr=1e-4"),
    ("GAN=runs/lr=1e-4", "GAN", "runs/lr=1e-4"),
    ("/runs", "runs", "/runs"),
    ("../x", "x", "../x"),
    (".", tmp_path.name, "."),
  ):
    assert evaluate._label(spec) == (label, model)


NIQE = "weights/niqe_pris_params.npz"


def test_every_score_and_the_perceptual_index(shared, tmp_path, photos, capsys):
  big = photo(220, 230, seed=3)
  images.write_image(tmp_path / "set" / "big.png", big)
  (tmp_path / "ma.json").write_text(json.dumps({"bicubic": {"set": {"big.png": 6.5}}}))
  arguments = ["--model", "bicubic", "--data", tmp_path / "set", "--output", tmp_path / "out"]
  run(
    *arguments, "--niqe_params", shared / NIQE, "--ma", tmp_path / "ma.json",
    metrics="lpips_alex,niqe",
  )  # fmt: skip
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  scores = results["sets"]["set"]
  assert {"lpips_alex", "niqe", "ma", "pi", "rmse"} <= set(scores) & set(tables.DIGITS)
  assert "lpips_vgg" not in scores
  assert {"lpips_alex", "niqe", "pi"} <= set(results["protocol"])
  assert scores["pi"] == pytest.approx((10 - 6.5 + scores["niqe"]) / 2)
  sr = np.asarray(Image.open(tmp_path / "out" / "set" / "big.png")).astype(float)
  hr = big[:220, :228].astype(float)
  error = luma(sr[4:-4, 4:-4]) - luma(hr[4:-4, 4:-4])
  assert scores["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
  assert scores["images"]["big.png"]["ma"] == 6.5
  head = capsys.readouterr().out.splitlines()[0].split()
  assert head == ["model", "set", *evaluate.SCORES, "lpips_alex", "niqe", "ma", "pi", "rmse"]
  # By default what can be computed here: LPIPS, whose weights come installed.
  run(*arguments, metrics="")
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert set(results["sets"]["set"]) == {*evaluate.SCORES, "lpips_alex", "lpips_vgg", "images"}


def test_images_too_small_for_niqe_are_left_out_of_its_mean(shared, tmp_path):
  for i, size in enumerate([(60, 60), (220, 220)]):
    images.write_image(tmp_path / "set" / f"{i}.png", photo(*size, seed=i))
  run(
    "--model", "bicubic", "--data", tmp_path / "set", "--output", tmp_path / "out",
    "--niqe_params", shared / NIQE, metrics="niqe",
  )  # fmt: skip
  scores = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["set"]
  assert "niqe" not in scores["images"]["0.png"]
  assert scores["niqe"] == scores["images"]["1.png"]["niqe"]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--metrics", "psnr,lpips"], "'lpips' must be one of psnr, ssim, lpips_alex"),
    (["--metrics", "niqe"], "--metrics=niqe needs --niqe_params=FILE"),
    (["--ma", "ma.json"], "names the model 'GAN'; there are bicubic"),
    (["--ma", "list.json"], "must be JSON of the form"),
    (["--ma", "set.json"], "names the set 'Set9'; there are photos"),
    (["--ma", "null.json"], "must be JSON of the form"),
    (["--ma", "right.json", "--metrics", "psnr"], "needs NIQE; give --niqe_params"),
  ],
)
def test_bad_settings_are_refused(tmp_path, photos, monkeypatch, arguments, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "ma.json").write_text('{"GAN": {"set": {"a": 1}}}')
  (tmp_path / "list.json").write_text("[1]")
  (tmp_path / "set.json").write_text('{"bicubic": {"Set9": {"a": 1}}}')
  (tmp_path / "null.json").write_text('{"bicubic": {"photos": {"a": null}}}')
  (tmp_path / "right.json").write_text('{"bicubic": {"photos": {"a.png": 5.0}}}')
  with pytest.raises(ValueError, match=message):
    evaluate.main(["--model", "bicubic", "--data", str(photos), "--output", "out", *arguments])
  assert not (tmp_path / "out").exists()


def test_the_perceptual_index_needs_every_image():
  results = {"s": {"niqe": 4.0, "images": {"a": {"psnr_y": 20.0, "niqe": 4.0}, "b": {"psnr_y": 9}}}}
  with pytest.raises(ValueError, match="PI of s needs every image; b lacks a score in --ma"):
    evaluate.perceptual_indices(results, {"s": {"a": 5.0}})
  with pytest.raises(ValueError, match="b lacks a NIQE; give --niqe_params"):
    evaluate.perceptual_indices(results, {"s": {"a": 5.0, "b": 5.0}})
  with pytest.raises(ValueError, match="--ma names the set 't'; there are s"):
    evaluate.perceptual_indices(results, {"t": {}})


def test_files_of_results_are_json_that_every_reader_takes(tmp_path):
  """A model that gives the HR image back: its PSNR is infinite, which JSON has no number for."""
  images.write_image(tmp_path / "flat" / "a.png", np.full((40, 40, 3), 77, np.uint8))
  run("--model", "bicubic", "--data", tmp_path / "flat", "--output", tmp_path / "out")

  def refuse(constant):
    raise AssertionError(constant)

  for name in ("results.json", "table.json"):
    text = (tmp_path / "out" / name).read_text()
    loaded = json.loads(text, parse_constant=refuse)
    assert loaded
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert results["sets"]["flat"]["psnr_y"] is None
  assert "| inf |" in (tmp_path / "out" / "table.md").read_text()


def test_curves_of_a_run(tmp_path):
  lines = [
    '{"step": 1, "loss_g": 2.0, "timing": {"eta": 3}}',
    '{"step": 2, "loss_g": 1.5, "eval/psnr_y": 20}',
    '{"step": 3, "los',
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  curves = evaluate.read_curves(str(tmp_path))
  assert curves == {"loss_g": [(1, 2.0), (2, 1.5)], "eval/psnr_y": [(2, 20.0)]}
  assert evaluate.read_curves("bicubic") == {}


@pytest.mark.parametrize(
  "data, output", [("photos", "."), ("photos", "photos"), ("set/photos", "set")]
)
def test_no_photograph_is_overwritten(tmp_path, photos, monkeypatch, data, output):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "photos").symlink_to(photos)
  before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
  with pytest.raises(ValueError, match="--output would write SR images into .*photos"):
    run("--model", "bicubic", "--data", data, "--output", output)
  assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_no_scale(tmp_path, photos):
  with pytest.raises(ValueError, match="--scale=0 must be 1 or more"):
    run("--model", "bicubic", "--data", photos, "--output", tmp_path / "out", "--scale", 0)
