"""Tests of sr_jax/prepare.py."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from sr_jax import UserError, cli
from sr_jax.data.pack import hr_image, lr_image, open_pack
from sr_jax.data import packing
from sr_jax.data import sources
from sr_jax.images.files import read_image, write_image
from sr_jax.images import resize
from sr_jax import prepare


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(4):
    image = rng.integers(0, 256, (40 + 4 * i, 56, 3), dtype=np.uint8)
    write_image(tmp_path / "data" / f"{i}.png", image)
  return tmp_path / "data"


def run(*arguments) -> None:
  prepare.main([str(argument) for argument in arguments])


def stamps(folder) -> dict[str, tuple[int, int]]:
  return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_a_pack_is_made_told_about_and_trained_on(folder, tmp_path, capsys):
  run("--input", folder, "--output", tmp_path / "packs" / "mine")
  said = capsys.readouterr().out
  pixels = (40 + 44 + 48 + 52) * 56
  total = pixels * 3 + pixels * 3 // 16
  assert f"4 images, 0.0 megapixels, {total:,} bytes on disk, at most 0 MiB of RAM" in said
  assert f"{total:,} bytes, scale 4, LR made by uint8_mirror_round_between, content " in said
  assert "sides from 56x40 to 56x52" in said
  assert f"--config.data.source={tmp_path / 'packs' / 'mine'}" in said
  pack = packing.build_pack(sources.open_source(str(tmp_path / "packs" / "mine")), 4)
  assert pack.digest in said
  for i in range(4):
    hr = read_image(folder / f"{i}.png")
    np.testing.assert_array_equal(hr_image(pack, i), hr)
    np.testing.assert_array_equal(lr_image(pack, i), resize.imresize(hr, 1 / 4))


def test_the_same_command_again_does_nothing(folder, tmp_path, capsys):
  run("--input", folder, "--output", tmp_path / "pack")
  before, said = stamps(tmp_path / "pack"), capsys.readouterr().out
  run("--input", folder, "--output", tmp_path / "pack")
  assert stamps(tmp_path / "pack") == before
  assert capsys.readouterr().out == said


def test_other_settings_and_other_files_are_not_overwritten(folder, tmp_path):
  run("--input", folder, "--output", tmp_path / "pack")
  before = stamps(tmp_path / "pack")
  for other in (["--scale", 2], ["--sub_images", "32/16"], ["--convention", "double_mirror"]):
    with pytest.raises(ValueError, match="pack of other images or settings; remove it, or"):
      run("--input", folder, "--output", tmp_path / "pack", *other)
  with pytest.raises(ValueError, match="holds other files, 0.png; remove it, or"):
    run("--input", folder, "--output", folder)
  assert stamps(tmp_path / "pack") == before
  assert len(list(folder.iterdir())) == 4
  (tmp_path / "empty").mkdir()
  run("--input", folder, "--output", tmp_path / "empty")
  os.truncate(tmp_path / "empty" / "lr.bin", 5)
  run("--input", folder, "--output", tmp_path / "empty")  # a damaged one is mended
  run("--verify", tmp_path / "empty")


def test_damage_is_found_and_named(folder, tmp_path, capsys):
  run("--input", folder, "--output", tmp_path / "pack")
  run("--verify", tmp_path / "pack")
  assert "every image has its sha256" in capsys.readouterr().out
  with open(tmp_path / "pack" / "hr.bin", "r+b") as file:
    file.seek(40 * 56 * 3 + 11)
    byte = file.read(1)[0]
    file.seek(40 * 56 * 3 + 11)
    file.write(bytes([byte ^ 1]))
  with pytest.raises(SystemExit) as error:
    cli.guarded(prepare.main)(["--verify", str(tmp_path / "pack")])
  assert "pack is damaged, 1 faults" in str(error.value)
  assert "1.png: HR pixels differ from their sha256" in str(error.value)
  with pytest.raises(ValueError, match="must be a pack, a folder with hr.bin, lr.bin, index.json"):
    run("--verify", folder)


def test_given_lr_images_and_scale(folder, tmp_path, capsys):
  for i in range(4):
    lr = np.full((20 + 2 * i, 28, 3), i, np.uint8)
    write_image(tmp_path / "LR" / f"{i}x2.png", lr)
  run("--input", folder, "--lr_input", tmp_path / "LR", "--scale", 2, "--output", tmp_path / "pack")
  assert "scale 2, LR given" in capsys.readouterr().out
  pack = open_pack(tmp_path / "pack")
  assert [int(lr_image(pack, i).max()) for i in range(4)] == [0, 1, 2, 3]


def test_sub_images(folder, tmp_path, capsys):
  run("--input", folder, "--output", tmp_path / "pack", "--sub_images", "32/16")
  assert "as 27 sub-images of 32, one every 16 pixels" in capsys.readouterr().out  # (2+2+2+3) x 3
  big = np.zeros((724, 960, 3), np.uint8)
  write_image(tmp_path / "big" / "a.png", big)
  run("--input", tmp_path / "big", "--output", tmp_path / "big_pack", "--sub_images")
  assert "as 9 sub-images of 480, one every 240 pixels" in capsys.readouterr().out


def test_odd_files_follow_the_policy(tmp_path):
  """Orientation is applied; CMYK and palette become RGB, 16 bits stay; alpha is put on white."""
  folder = tmp_path / "odd"
  folder.mkdir()
  color = np.full((40, 60, 3), (10, 200, 90), np.uint8)
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(color).save(folder / "a_turned.png", exif=exif)
  Image.new("CMYK", (60, 40), (0, 255, 255, 0)).save(folder / "b_cmyk.tif")
  palette = Image.new("P", (60, 40), 1)
  palette.putpalette([0, 0, 0, 10, 200, 90])
  palette.save(folder / "c_palette.png")
  deep = np.full((40, 60), 51400, np.uint16)
  Image.fromarray(deep).save(folder / "d_deep.png")
  clear = np.dstack([color, np.zeros((40, 60), np.uint8)])
  Image.fromarray(clear).save(folder / "e_clear.png")
  run("--input", folder, "--output", tmp_path / "pack")
  pack = open_pack(tmp_path / "pack")
  assert tuple(pack.hr_sizes[0]) == (60, 40)
  first = [tuple(hr_image(pack, i)[0, 0].tolist()) for i in range(5)]
  assert first == [
    tuple(257 * value for value in color)  # of 8 bits, in a pack of 16
    for color in ((10, 200, 90), (255, 0, 0), (10, 200, 90), (200, 200, 200), (255, 255, 255))
  ]
  assert pack.grey == (False, False, False, True, False)


def test_what_cannot_be_left_out_is_named(folder, tmp_path):
  (folder / "2.png").write_bytes(b"")
  with pytest.raises(ValueError, match="1 of 4 images .* unusable.*\n  2.png: "):
    run("--input", folder, "--output", tmp_path / "pack")
  assert not list(tmp_path.glob("pack*"))


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--verify", "a", "--input", "b"], "--verify=PACK stands alone"),
    (
      ["--sub_images", "480"],
      "--sub_images=480 must be SIZE/STEP in HR pixels; try --sub_images=480/240",
    ),
    (["--sub_images", "480/0"], "must be SIZE/STEP"),
    (["--sub_images", "30/16"], "must be multiples of scale=4"),
    (["--scale", "0"], "--scale=0 must be one of 1, 2, 3, 4, 8"),
    (["--convention", "lanczos"], "--convention=lanczos must be one of uint8_mirror_round_"),
    (["--input", "nowhere"], "--input=nowhere does not exist; it must be a folder of images"),
    (["--scale", "5"], "--scale=5 must be one of 1, 2, 3, 4, 8; try --scale=4"),
    (["--output", "gs://bucket/pack"], "--output=gs://bucket/pack must be a local path"),
  ],
)
def test_mistakes_are_named(folder, tmp_path, arguments, message):
  if "--verify" not in arguments:
    arguments = ["--input", str(folder), "--output", str(tmp_path / "pack"), *arguments]
  with pytest.raises(ValueError, match=re.escape(message)):
    run(*arguments)
  assert not (tmp_path / "pack").exists()


def test_a_pack_is_not_prepared_again(folder, tmp_path):
  run("--input", folder, "--output", tmp_path / "pack")
  with pytest.raises(ValueError, match="is a pack already; give the images"):
    run("--input", tmp_path / "pack", "--output", tmp_path / "other")


def test_without_arguments_it_says_what_is_needed(capsys):
  with pytest.raises(SystemExit):
    run()
  assert "--input and --output, or --verify" in capsys.readouterr().err


def test_draws_of_any_example_are_printed_from_its_number(tmp_path, capsys):
  run("--preview-degradations", 3, "--config", "realesrgan:demo", "--example", 2_000_000_001)
  said = capsys.readouterr().out
  assert (
    said.count("example 200000000") == 3 and "example 2000000003: step 250000000, row 3" in said
  )
  run("--preview-degradations", 1, "--config", "realesrgan:demo", "--example", 2_000_000_003)
  last = capsys.readouterr().out
  assert said.endswith(last) and "resize 96 -> " in last and "patch at LR" in last
  # A run's folder stands for its settings.
  config = prepare.read_config("realesrgan:demo")
  config.seed = 1
  (tmp_path / "config.json").write_text(config.to_json())
  run("--preview-degradations", 1, "--config", tmp_path, "--example", 2_000_000_003)
  assert capsys.readouterr().out.splitlines()[0] == last.splitlines()[0]
  for wrong in ((0.5,), (1, "--example", -1), (101,)):
    with pytest.raises((UserError, SystemExit)):
      run("--preview-degradations", *wrong)
  with pytest.raises(UserError, match="nothing is drawn"):
    run("--preview-degradations", 1, "--config", "esrgan:demo")


def test_a_sheet_of_degraded_examples_is_drawn(tmp_path, capsys):
  rng = np.random.default_rng(0)
  write_image(tmp_path / "data" / "a.png", rng.integers(0, 256, (100, 120, 3), np.uint8))
  config = prepare.read_config("realesrgan:demo")
  config.data.degradation = "bsr_light"  # compiles sooner
  (tmp_path / "config.json").write_text(config.to_json())
  output = tmp_path / "sheets" / "sheet.png"
  run("--preview-degradations", 2, "--config", tmp_path, "--input", tmp_path / "data", "--output",
      output)  # fmt: skip
  height, width, _ = read_image(output).shape
  assert height >= 2 * 64 and width > 2 * 64
  assert f"{output}: HR, LR and what was drawn, of 2 examples" in capsys.readouterr().out
