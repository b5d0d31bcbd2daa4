"""Tests of sr_jax/evaluate.py: what the program writes and refuses."""

import datetime
import json
import pathlib

import jax
import numpy as np
import pytest
import references
from PIL import Image
from tiny_models import contrasting_model, make_model, photo

from sr_jax import evaluate
from sr_jax.images.files import write_image
from sr_jax.metrics.table import ALWAYS, SCORES
from sr_jax.models.write import save_model


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
    write_image(folder / name, image)
  return folder


@pytest.fixture
def model_path(tmp_path) -> pathlib.Path:
  save_model(tmp_path / "tiny.safetensors", contrasting_model())
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
  assert set(results) == {"model", "scale", "facts", "made", "protocol", "sets"}
  assert results["made"]["jax"] == jax.__version__ and results["made"]["device"]
  assert datetime.date.fromisoformat(results["made"]["date"]) >= datetime.date(2026, 1, 1)
  assert results["facts"]["network"] == "rrdbnet" and len(results["facts"]["weights"]) == 16
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
  write_image(tmp_path / "more" / "HR" / "b.png", photo(40, 40, seed=5))
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
    ("bicubic,bicubic", r"--model: two entries would both write to .*bicubic; .*LABEL=MODEL"),
    ("a*b=bicubic,a?b=bicubic", r"--model: two entries would both write to .*a_b; .*LABEL=MODEL"),
    ("bicubic,nowhere.safetensors", "nowhere.safetensors does not exist"),
  ],
)
def test_bad_models_are_refused_before_anything_is_written(tmp_path, photos, models, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    run("--model", models, "--data", photos, "--output", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_models_of_two_scales_are_not_compared(tmp_path, photos):
  save_model(tmp_path / "x2.npz", make_model(scale=2))
  models = f"bicubic,{tmp_path / 'x2.npz'}"
  with pytest.raises(ValueError, match=r"has scales \[4, 2\]; compare models of one scale"):
    run("--model", models, "--data", photos, "--output", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_two_sets_of_one_name_are_refused(tmp_path, photos):
  other = tmp_path / "other" / "photos"
  write_image(other / "b.png", photo(40, 40))
  with pytest.raises(
    ValueError, match="--data: two entries would both write to photos; .*rename one"
  ):
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
    assert evaluate.split_label(spec) == (label, model)


NIQE = "weights/niqe_pris_params.npz"


def test_every_score_and_the_perceptual_index(shared, tmp_path, photos, capsys):
  big = photo(220, 230, seed=3)
  write_image(tmp_path / "set" / "big.png", big)
  (tmp_path / "ma.json").write_text(json.dumps({"bicubic": {"set": {"big.png": 6.5}}}))
  arguments = ["--model", "bicubic", "--data", tmp_path / "set", "--output", tmp_path / "out"]
  run(
    *arguments, "--niqe_params", shared / NIQE, "--ma", tmp_path / "ma.json",
    metrics="lpips_alex,niqe",
  )  # fmt: skip
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  scores = results["sets"]["set"]
  assert {"lpips_alex", "niqe", "ma", "pi", "rmse"} <= set(scores) & set(SCORES)
  assert "lpips_vgg" not in scores
  assert {"lpips_alex", "niqe", "pi"} <= set(results["protocol"])
  assert scores["pi"] == pytest.approx((10 - 6.5 + scores["niqe"]) / 2)
  sr = np.asarray(Image.open(tmp_path / "out" / "set" / "big.png")).astype(float)
  hr = big[:220, :228].astype(float)
  error = references.luma(sr[4:-4, 4:-4]) - references.luma(hr[4:-4, 4:-4])
  assert scores["rmse"] == pytest.approx(np.sqrt(np.mean(error**2)), rel=1e-6)
  assert scores["images"]["big.png"]["ma"] == 6.5
  head = capsys.readouterr().out.splitlines()[0].split()
  assert head == ["model", "set", *ALWAYS, "lpips_alex", "niqe", "ma", "pi", "rmse"]
  # By default what can be computed here: LPIPS, whose weights come installed.
  run(*arguments, metrics="")
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert set(results["sets"]["set"]) == {*ALWAYS, "lpips_alex", "lpips_vgg", "images"}


def test_images_too_small_for_niqe_are_left_out_of_its_mean(shared, tmp_path):
  for i, size in enumerate([(60, 60), (220, 220)]):
    write_image(tmp_path / "set" / f"{i}.png", photo(*size, seed=i))
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


def test_files_of_results_are_json_that_every_reader_takes(tmp_path):
  """A model that gives the HR image back: its PSNR is infinite, which JSON has no number for."""
  write_image(tmp_path / "flat" / "a.png", np.full((40, 40, 3), 77, np.uint8))
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


@pytest.mark.parametrize(
  "data, output", [("photos", "."), ("photos", "photos"), ("set/photos", "set")]
)
def test_no_photograph_is_overwritten(tmp_path, photos, monkeypatch, data, output):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "set").mkdir()
  (tmp_path / "set" / "photos").symlink_to(photos)
  before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
  with pytest.raises(
    ValueError, match="--output would write SR images into .*photos, which overlaps --data="
  ):
    run("--model", "bicubic", "--data", data, "--output", output)
  assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_no_scale(tmp_path, photos):
  with pytest.raises(ValueError, match="--scale=0 must be 1 or more"):
    run("--model", "bicubic", "--data", photos, "--output", tmp_path / "out", "--scale", 0)
