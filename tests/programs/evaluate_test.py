"""Tests of sr_jax/evaluate.py: what the program writes and refuses."""

import datetime
import json
import pathlib
import re
import shutil
import statistics

import jax
import numpy as np
import pytest
import references
from PIL import Image
from tiny_models import contrasting_model, make_model, photo

from sr_jax import UserError, evaluate
from sr_jax.images import resize
from sr_jax.images.files import write_image
from sr_jax.metrics import load_niqe, niqe
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


def test_only_images_that_training_held_out_are_scored(tmp_path, photos):
  out = tmp_path / "out"
  run("--model", "bicubic", "--data", photos, "--hold_out", 2, "--output", out)
  results = json.loads((out / "results.json").read_text())
  # The second and the fourth in the order of names, as tests/data/sources_test.py has them.
  assert set(results["sets"]["photos"]["images"]) == {"a.png", "grey.png"}
  with pytest.raises(UserError, match="--hold_out=1 must be 2 or more, or 0"):
    run("--model", "bicubic", "--data", photos, "--hold_out", 1, "--output", out)
  with pytest.raises(UserError, match=r"give more, or --hold_out=0"):
    run("--model", "bicubic", "--data", photos / "deeper", "--hold_out", 2, "--output", out)


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
    ("theirs=sr:nowhere", "--model=theirs=sr:nowhere must name an existing folder"),
    ("theirs=sr:", "--model=theirs=sr: must name an existing folder"),
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
    ValueError, match="--output would write SR images into .*photos, which overlaps "
  ):
    run("--model", "bicubic", "--data", data, "--output", output)
  assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_no_scale(tmp_path, photos):
  with pytest.raises(ValueError, match="--scale=0 must be 1 or more"):
    run("--model", "bicubic", "--data", photos, "--output", tmp_path / "out", "--scale", 0)


def other_program(photos, folder, ending: str = "", scale: int = 4) -> None:
  """What another program might make of the LR images: nearest neighbours, with one bit set."""
  for path in sorted(photos.rglob("*.*")):
    hr = np.asarray(Image.open(path))
    hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
    lr = resize.imresize(hr, 1 / 4)
    sr = lr.repeat(scale, axis=0).repeat(scale, axis=1)
    name = f"{path.stem}_{path.suffix[1:]}" if path.name == "a.jpg" else path.stem
    write_image(folder / path.relative_to(photos).parent / f"{name}{ending}.png", sr)


@pytest.mark.parametrize("ending", ["", "_x4", "x4", "_SR", "_out", "_X4", "x4_sr", "_x4_OUT"])
def test_images_of_another_program_are_scored(tmp_path, photos, ending):
  (photos / "a.jpg").rename(photos / "a_jpg.jpg")  # of two images of one stem none is meant
  other_program(photos, tmp_path / "theirs", ending)
  run(
    "--model", f"bicubic,theirs=sr:{tmp_path / 'theirs'}", "--data", photos,
    "--output", tmp_path / "out",
  )  # fmt: skip
  results = json.loads((tmp_path / "out" / "theirs" / "results.json").read_text())
  images = results["sets"]["photos"]["images"]
  assert set(images) == {"a.png", "a_jpg.jpg", "deeper/a.png", "grey.png"}
  for name, scores in images.items():
    hr = np.asarray(Image.open(photos / name))
    hr = hr[: hr.shape[0] // 4 * 4, : hr.shape[1] // 4 * 4]
    sr = resize.imresize(hr, 1 / 4).repeat(4, axis=0).repeat(4, axis=1)
    key = "psnr_rgb" if hr.ndim == 3 else "psnr_y"
    assert scores[key] == pytest.approx(references.psnr(sr[4:-4, 4:-4], hr[4:-4, 4:-4]), abs=1e-9)
  assert "SR images in" in results["facts"]["model"]


def test_images_are_paired_by_a_file_where_names_do_not_tell(tmp_path, photos):
  other_program(photos, tmp_path / "theirs")
  arguments = ["--model", f"theirs=sr:{tmp_path / 'theirs'}", "--data", photos]
  with pytest.raises(ValueError, match="each HR image must have one SR image") as error:
    run(*arguments, "--output", tmp_path / "out")
  assert "a.png: its image a.png is that of a.jpg too" in str(error.value)
  # As Excel writes it: with a mark before the text, and with empty lines.
  (tmp_path / "pairs.csv").write_bytes(b"\xef\xbb\xbfa.jpg , a_jpg.png\r\na.png,a.png\r\n,\r\n")
  run(*arguments, "--pairs", tmp_path / "pairs.csv", "--output", tmp_path / "out")
  results = json.loads((tmp_path / "out" / "results.json").read_text())
  assert len(results["sets"]["photos"]["images"]) == 4
  for lines, message in (
    ("b.png,a.png\n", "names 'b.png', which is not .*its images are called a.jpg, a.png, deep"),
    ("caf\xe9.png,a.png\n", "in UTF-8"), ("a.png,a.png\n a.png,a.png\n", "each HR image once"),
    ("a.jpg\n", "line 1: 'a.jpg' must be HR,SR"),
    ("a.jpg,../../secret.png\n", "which is no file in"), ("a.jpg,none.png\n", "is no file in"),
  ):  # fmt: skip
    (tmp_path / "pairs.csv").write_text(lines, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
      run(*arguments, "--pairs", tmp_path / "pairs.csv", "--output", tmp_path / "again")


def test_sizes_that_differ_are_named_with_the_likely_reason_and_the_rest_is_scored(tmp_path):
  rng = np.random.default_rng(0)
  hr = {f"{i}.png": rng.integers(0, 256, (41, 62, 3)).astype(np.uint8) for i in range(6)}
  srs = {
    "0.png": hr["0.png"],  # as large as HR before it was cropped
    "1.png": hr["1.png"][:20, :30],
    "2.png": hr["2.png"][:10, :15],
    "3.png": hr["3.png"][:40, :60].transpose(1, 0, 2),
    "4.png": hr["4.png"][:33, :50],
    "5.png": hr["5.png"][:40, :60],
  }
  for name in hr:
    write_image(tmp_path / "set" / name, hr[name])
    write_image(tmp_path / "sr" / name, srs[name])
  (tmp_path / "set" / "6.png").write_bytes(b"no image")
  write_image(tmp_path / "sr" / "6.png", srs["5.png"])
  with pytest.raises(ValueError, match="5 of 7 images were not scored") as error:
    run(
      "--model", f"x=sr:{tmp_path / 'sr'},bicubic", "--data", tmp_path / "set",
      "--output", tmp_path / "out",
    )  # fmt: skip
  told = str(error.value)
  for reason in (
    "1.png.*SR is 30x20, HR 60x40: it was upscaled 2 times; give --scale=2",
    "2.png.*this is the LR image", "3.png.*it is turned",
    "4.png.*SR is 50x33, HR 60x40: upscale the LR image of HR cropped", "6.png.*whole",
  ):  # fmt: skip
    assert re.search(f"set/{reason}", told), (reason, told)
  for label in ("x", "bicubic"):
    results = json.loads((tmp_path / "out" / label / "results.json").read_text())
    assert set(results["sets"]["set"]["images"]) == {"0.png", "5.png"}
  assert (tmp_path / "out" / "report.html").is_file()


def test_lr_images_of_ones_own_are_upscaled_and_said(tmp_path):
  hr = photo(48, 64)
  write_image(tmp_path / "pair" / "HR" / "a.png", hr)
  write_image(tmp_path / "pair" / "LR" / "a.png", resize.imresize(hr, 1 / 4) // 2)
  shutil.copytree(tmp_path / "pair" / "LR", tmp_path / "other" / "dark")
  arguments = {
    "found": ["--data", tmp_path / "pair"],
    "given": ["--data", tmp_path / "pair" / "HR", "--lr", tmp_path / "other" / "dark"],
    "made": ["--data", tmp_path / "pair" / "HR"],
  }
  scores = {}
  for name, flags in arguments.items():
    run("--model", "bicubic", *flags, "--output", tmp_path / name)
    results = json.loads((tmp_path / name / "results.json").read_text())
    scores[name] = results["sets"]["pair"]["psnr_y"]
    own = "of pair: LR images of" in results["protocol"]["lr"]
    assert own == (name != "made")
    assert ("LR images of" in (tmp_path / name / "report.html").read_text()) == own
  assert scores["found"] == scores["given"] < scores["made"] - 5


def test_lr_images_of_hr_that_was_cropped_and_others_that_do_not_fit(tmp_path):
  """BSD100 is 481x321 with LR of 120x80; one LR image of another size costs no other its score."""
  hr = {name: photo(41, 54, seed=i) for i, name in enumerate(("a", "b", "far", "mono"))}
  hr |= {name: photo(41, 54, channels=0) for name in ("grey", "red")}
  lr = {name: resize.imresize(image[:40, :52], 1 / 4) for name, image in hr.items()}
  lr["far"], lr["red"] = lr["far"][:9], lr["a"]
  lr["grey"] = np.stack([lr["grey"]] * 3, axis=2)  # a program that saves all as RGB
  lr["mono"] = lr["mono"][:, :, 0]
  for name in hr:
    write_image(tmp_path / "pair" / "HR" / f"{name}.png", hr[name])
    write_image(tmp_path / "pair" / "LR" / f"{name}.png", lr[name])
  arguments = ["--model", "bicubic", "--output", tmp_path / "out"]
  with pytest.raises(ValueError, match="2 of 6 images were not scored") as error:
    run(*arguments, "--data", tmp_path / "pair")
  assert re.search("far.png: LR is 13x9 and must be 13x10, .*cropped to 52x40", str(error.value))
  assert "red.png: LR has colours, and HR is grey" in str(error.value)
  found = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]["pair"]["images"]
  assert set(found) == {"a.png", "b.png", "grey.png", "mono.png"}
  sr = np.asarray(Image.open(tmp_path / "out" / "pair" / "b.png"))
  np.testing.assert_array_equal(sr, resize.imresize(lr["b"], 4, "double_mirror"))
  expected = references.psnr(sr[4:-4, 4:-4], hr["b"][:40, :52][4:-4, 4:-4])
  assert found["b.png"]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)


def test_an_image_that_another_program_did_not_make_costs_no_other_its_score(tmp_path):
  for name in "abc":
    write_image(tmp_path / "set" / f"{name}.png", photo(40, 40))
    if name != "b":
      write_image(tmp_path / "sr" / f"{name}_x4.png", photo(40, 40, seed=1))
  with pytest.raises(ValueError, match="1 of 3 images were not scored:\n.*b.png: x has no image"):
    run("--model", f"bicubic,x=sr:{tmp_path / 'sr'}", "--data", tmp_path / "set",
        "--output", tmp_path / "out")  # fmt: skip
  results = json.loads((tmp_path / "out" / "x" / "results.json").read_text())
  assert set(results["sets"]["set"]["images"]) == {"a.png", "c.png"}
  (tmp_path / "none").mkdir()
  with pytest.raises(ValueError, match="each HR image must have one SR image"):
    run("--model", f"x=sr:{tmp_path / 'none'}", "--data", tmp_path / "set",
        "--output", tmp_path / "again")  # fmt: skip
  assert not (tmp_path / "again").exists()


def test_a_comma_in_a_path_and_repeated_flags(tmp_path):
  for name in ("a,b", "c=d"):
    write_image(tmp_path / name / "1.png", photo(40, 40))
  run("--model", "bicubic", "--data", tmp_path / "a,b", "--output", tmp_path / "one")
  run("--model", "bicubic", "--model", "again=bicubic", "--data", tmp_path / "a,b",
      "--data", tmp_path / "c=d", "--output", tmp_path / "two")  # fmt: skip
  results = json.loads((tmp_path / "two" / "again" / "results.json").read_text())
  assert list(results["sets"]) == ["a,b", "c=d"]


def test_images_without_a_reference_are_scored_by_niqe_alone(tmp_path, capsys):
  params = tmp_path / "niqe.npz"
  rng = np.random.default_rng(0)
  np.savez(
    params, mu_pris_param=rng.normal(size=(1, 36)), cov_pris_param=np.eye(36),
    gaussian_window=np.full((7, 7), 1 / 49),
  )  # fmt: skip
  write_image(tmp_path / "photos" / "a.png", photo(192, 288))
  write_image(tmp_path / "photos" / "small.png", photo(50, 50))
  arguments = [
    "--no-reference",
    "--data",
    str(tmp_path / "photos"),
    "--output",
    str(tmp_path / "o"),
  ]
  with pytest.raises(ValueError, match="1 images were not scored:\n  photos/small.png: .*larger"):
    evaluate.main([*arguments, "--niqe_params", str(params)])
  images = json.loads((tmp_path / "o" / "results.json").read_text())["sets"]["photos"]["images"]
  expected = niqe(photo(192, 288), 0, load_niqe(params))
  assert images == {"a.png": {"niqe": pytest.approx(expected)}}
  with pytest.raises(ValueError, match="give --niqe_params"):
    evaluate.main(arguments)


def test_groups_and_differences_come_out_of_one_evaluation(tmp_path, photos, model_path, capsys):
  arguments = [
    "--model", f"bicubic,a={model_path},b=bicubic", "--data", photos, "--output", tmp_path / "out",
  ]  # fmt: skip
  run(*arguments, "--group", "both=a,b", "--paired", "bicubic,b", "--paired", "bicubic,a")
  told = json.loads((tmp_path / "out" / "statistics.json").read_text())
  assert set(told["groups"]["both"]["photos"]) == set(ALWAYS)
  assert told["differences"]["b - bicubic"]["photos"]["psnr_y"] == [0, 0, 0]
  mean, low, high = told["differences"]["a - bicubic"]["photos"]["psnr_y"]
  sets = [
    json.loads((tmp_path / "out" / label / "results.json").read_text())["sets"]["photos"]
    for label in ("bicubic", "a")
  ]
  assert mean == pytest.approx(sets[1]["psnr_y"] - sets[0]["psnr_y"]) and low < mean < high
  assert "a - bicubic  photos  psnr_y" in capsys.readouterr().out
  # A group of runs, which need not be given twice.
  save_model(tmp_path / "other.safetensors", contrasting_model(seed=5))
  runs = f"{model_path},{tmp_path / 'other.safetensors'}"
  run("--model", f"a={model_path}", "--data", photos, "--output", tmp_path / "seeds",
      "--group", f"seeds={runs}")  # fmt: skip
  told = json.loads((tmp_path / "seeds" / "statistics.json").read_text())["groups"]["seeds"]
  values = [
    json.loads((tmp_path / "seeds" / label / "results.json").read_text())["sets"]["photos"]
    for label in ("a", "other")
  ]
  values = [value["psnr_y"] for value in values]
  assert values[0] != values[1]
  expected = [statistics.mean(values), statistics.stdev(values)]
  assert told["photos"]["psnr_y"] == pytest.approx(expected)
  with pytest.raises(ValueError, match="must be two of the models' labels: bicubic, a, b"):
    run(*arguments, "--paired", "a,c")


def test_what_cannot_be_written_paired_or_scored_is_told_before_any_scoring(tmp_path, monkeypatch):
  for name in ("a", "b"):
    write_image(tmp_path / name / f"{name}.png", np.zeros((16, 16, 3), np.uint8))
  (tmp_path / "file").write_text("")

  def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
      evaluate.main(["--metrics", "psnr", *arguments])
    return str(error.value)

  data, output = f"--data={tmp_path}/a", f"--output={tmp_path}/out"
  assert "there is no image to evaluate; a.png: 16x16 pixels, too few for --scale=99" in refused(
    "--model=bicubic", data, output, "--scale=99"
  )
  monkeypatch.setattr(evaluate.scoring, "evaluate_set", None)  # nothing is scored from here on
  for place in (f"{tmp_path}/file", f"{tmp_path}/file/out", "/proc/out"):
    assert f"--output={place} cannot be written" in refused(
      "--model=bicubic", data, f"--output={place}"
    )
  models = f"--model=bicubic,x=sr:{tmp_path}/a"
  assert "b.png: 0 images called b" in refused(models, f"--data={tmp_path}/a,{tmp_path}/b", output)
  assert f"--pairs={tmp_path}/no is no file" in refused(
    f"--model=x=sr:{tmp_path}/a", data, output, f"--pairs={tmp_path}/no"
  )
  assert f"--ma={tmp_path}/no cannot be read" in refused(
    "--model=bicubic", data, output, f"--ma={tmp_path}/no"
  )
  for empty in ("--model=", "--model=bicubic,", "--model=x="):
    assert "the name of a model is empty" in refused(empty, data, output)
