"""Mistakes in the flags of the programs: told in one line, before a model is read, with a fix.

Each fix that is a whole value is tried: with it the program gets as far as to read its models.
"""

import importlib
import re

import pytest

from tiny_models import photo

from sr_jax import UserError
from sr_jax.data import packing, sources
from sr_jax.data.source import Flags
from sr_jax.images.files import write_image

READS = {"upscale": "read_model", "interpolate": "read_model", "convert": "read_network",
         "serve": "read_model", "evaluate": "read_model"}  # fmt: skip
INTERPOLATE = ["--psnr=a", "--gan=b"]
UPSCALE = ["--input=photos/0.png", "--output=out"]
SWEEP = [*INTERPOLATE, "--output=o", "--sweep=0:1:0.5"]


class Reached(Exception):
  """What the programs meet here where they would begin to work."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  write_image(tmp_path / "photos" / "0.png", photo(24, 32))
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path)

  def reached(*_, **__):
    raise Reached

  for program, name in READS.items():
    monkeypatch.setattr(importlib.import_module(f"sr_jax.{program}"), name, reached)
  monkeypatch.setattr(packing, "write_pack", reached)
  monkeypatch.setattr(packing, "build_pack", reached)
  return tmp_path


def told(program, arguments, capsys) -> str:
  """The error of a program; '' where it begins to work."""
  try:
    importlib.import_module(f"sr_jax.{program}").main(arguments)
  except Reached:
    return ""
  except SystemExit as stop:
    assert stop.code == 2, stop
    return capsys.readouterr().err.strip()
  except (UserError, OSError) as error:
    return str(error)
  raise AssertionError("it did its work")


@pytest.mark.parametrize(
  "program, right, wrong, rule",
  [
    ("upscale", [*UPSCALE, "--format=jpg"], "--format=jpeg", "invalid choice.*try --format=jpg;"),
    ("upscale", [*UPSCALE, "--format=png"], "--format=PNG", "invalid choice.*try --format=png;"),
    ("upscale", UPSCALE, "--scale=4", "did you mean --outscale by --scale"),
    ("upscale", UPSCALE, "--quality=90", "is of jpg, webp and avif.*try --format=jpg$"),
    ("upscale", [*UPSCALE, "--suffix=_x4"], "--suffix=a/b", "end of a name.*try --suffix=_x4$"),
    ("upscale", UPSCALE, "--mesh=2", "must be ROWSxCOLUMNS, such as 1x2"),
    ("upscale", [*UPSCALE, "--engine=openvino"], "--mesh=1x2", "not go with --mesh.*leave one"),
    ("interpolate", [*INTERPOLATE, "--output=o", "--alpha=0.5"], "--alpha=1.5",
     "0 is the PSNR model, 1 the GAN model; try --alpha=0.5$"),
    ("interpolate", [*INTERPOLATE, "--output=o", "--alpha=0.5"], "--alpha=nan", "try --alpha=0.5$"),
    ("interpolate", [*INTERPOLATE, "--output=o.safetensors"], "--output=o.txt",
     "suffix must be .safetensors, .*; try --output=o.safetensors$"),
    ("interpolate", [*SWEEP, "--data=photos", "--sweep=0:1:0.1"], "--sweep=0:1",
     "must be START:STOP:STEP; try --sweep=0:1:0.1$"),
    ("interpolate", [*SWEEP, "--data=photos"], "--alpha=0.3", "--sweep tries many; give one"),
    ("interpolate", [*SWEEP, "--input=photos"], "--input=nowhere", "does not exist; give photog"),
    ("convert", ["--input=a", "--output=o.npz", "--dtype=float16"], "--dtype=fp16",
     "must be one of float32, float16, bfloat16; try --dtype=float16$"),
    ("convert", ["--input=a", "--output=o.npz"], "--dtype=int8", "try --dtype=float"),
    ("convert", ["--input=a", "--output=o.safetensors"], "--output=o.ckpt",
     "suffix must be .*try --output=o.safetensors$"),
    ("convert", ["--input=a", "--output=o"], "--dtype=float16", "a run holds float32, and"),
    ("convert", ["--input=a", "--output=o.npz"], "--license=MIT", "goes with --card.*give --card"),
    ("prepare", ["--input=photos", "--output=p"], "--lr_input=nowhere", "must be an existing fold"),
    ("prepare", ["--input=photos", "--output=p"], "--example=3", "goes with --preview-degra"),
    ("prepare", ["--input=photos", "--output=p"], "--config=esrgan", "goes with --preview-degrada"),
    ("prepare", ["--input=photos", "--output=p.png", "--preview-degradations=2"], "--scale=2",
     "does not go with --preview-degradations"),
    ("prepare", ["--input=photos", "--output=p.png", "--preview-degradations=8"],
     "--preview-degradations=101", "from 1 to 100.*try --preview-degradations=8 --example=0$"),
    ("prepare", ["--input=photos", "--output=p"], "--convention=matlab", "try --convention="),
    ("serve", [*INTERPOLATE, "--port=0"], "--port=99999", "from 0 to 65535; try --port=0, which"),
    ("serve", [*INTERPOLATE, "--port=8100"], "--port=x", "invalid int value.*; try --port=8100;"),
    ("evaluate", ["--model=a", "--data=photos", "--output=o", "--engine=jax"], "--engine=jaxx",
     "try --engine=jax;"),
    ("main", [], "--cnofig=esrgan", "--config is required.*did you mean --config by --cnofig"),
  ],
)  # fmt: skip
def test_a_wrong_flag_is_told_and_without_it_the_program_works(
  folder, capsys, program, right, wrong, rule
):
  if right:
    assert told(program, right, capsys) == ""
  error = told(program, [*right, wrong], capsys)
  assert re.search(rule, error) and "\n" not in error and len(error) < 400, error
  fix = re.search(r"; try (--[\w-]+=\S+?)(;|,|$)", error)
  if fix and right:
    assert told(program, [*right, fix[1]], capsys) == ""


def test_a_flag_that_is_missing_may_be_misspelt(folder, capsys):
  error = told("upscale", ["--inptu=photos/0.png", "--output=o"], capsys)
  assert "required: --input; did you mean --input by --inptu?" in error
  error = told("upscale", [*UPSCALE, "--qqqq"], capsys)
  assert "unrecognized arguments: --qqqq; python" in error


def test_a_link_that_leads_round_is_told_in_one_line(folder):
  from sr_jax import convert

  (folder / "loop.safetensors").symlink_to("loop.safetensors")
  with pytest.raises(SystemExit, match="[Ss]ym.*link.*loop.safetensors"):
    convert.run(["--input=loop.safetensors", "--output=o.safetensors"])


def test_data_sets_that_are_not_prepared_name_the_flag_where_they_were_given(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  for flag in ("--data", "--config.eval.source"):
    with pytest.raises(UserError) as error:
      sources.open_source("tfds:div2k", flags=Flags(flag))
    assert str(error.value).startswith(f"{flag}=tfds:div2k: ")
    assert str(error.value).endswith(f"or give a folder of images: {flag}=DIR")
    assert "\n" not in str(error.value)


def test_a_folder_of_lr_images_that_is_not_there_is_told_by_its_own_flag(folder):
  with pytest.raises(UserError, match="^--lr=nowhere must be an existing folder"):
    sources.open_source("photos", "nowhere")


@pytest.mark.parametrize("name, meant", [("bicubc", "bicubic"), ("srgn", "srgan")])
def test_a_misspelt_model_is_answered_with_the_likely_one(name, meant):
  from sr_jax.models.read import read_model

  with pytest.raises(FileNotFoundError, match=f"{name} does not exist; did you mean {meant}[?]"):
    read_model(name)
