"""Tests of sr_jax/upscale.py: files in, files out, tiles."""

import io
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
import tifffile
from tiny_models import assert_same_pixels, make_model, nearest_model

from sr_jax.images import writing
from sr_jax.images.files import write_image
from sr_jax.models.model import Model
from sr_jax.models.write import save_model
from sr_jax.networks.build import build_generator
from sr_jax import upscale
from sr_jax.upscaling import network as networks
from sr_jax.upscaling.upscaler import Upscaler, make_upscaler


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
  """Noise around a slope, uint8: [height, width, channels], or [height, width] for 0."""
  rng = np.random.default_rng(seed)
  image = np.linspace(40, 200, height * width).reshape(height, width, 1)
  image = image + rng.normal(0, 25, (height, width, max(channels, 1)))
  image = np.clip(image, 0, 255).astype(np.uint8)
  return image if channels else image[:, :, 0]


@pytest.fixture(scope="module")
def model() -> Model:
  """Each SR pixel sees 17 3x3 convolutions' worth of LR pixels, and four of a half and less."""
  model = make_model(blocks=1, growth=2)
  last = model.variables["params"]["conv_last"]  # grey on average, so that little is clipped
  last["kernel"] = last["kernel"] - last["kernel"].mean(axis=(0, 1, 2))
  last["bias"] = np.full(3, 0.5, np.float32)
  return model


@pytest.fixture(scope="module")
def upscaler(model) -> Upscaler:
  return make_upscaler(build_generator(model.name, model.kwargs), model.variables)


@pytest.fixture
def model_path(tmp_path, model) -> pathlib.Path:
  save_model(tmp_path / "model.npz", model)
  return tmp_path / "model.npz"


def run(model_path, source, output, *arguments) -> None:
  """With JAX, to whose images the results are equal; engines_test.py has the others."""
  upscale.main(
    ["--model", str(model_path), "--input", str(source), "--output", str(output), "--engine=jax"]
    + [str(argument) for argument in arguments]
  )


def read(path: pathlib.Path) -> np.ndarray:
  return np.asarray(Image.open(path))


def files(folder: pathlib.Path) -> list[str]:
  return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def nearest_path(tmp_path_factory) -> pathlib.Path:
  """A network that repeats each pixel four times four times, exactly."""
  path = tmp_path_factory.mktemp("model") / "nearest.npz"
  save_model(path, nearest_model())
  return path


def large(image: np.ndarray) -> np.ndarray:
  return image.repeat(4, axis=0).repeat(4, axis=1)


def test_one_file(tmp_path, model_path, upscaler, capsys):
  lr = photo(20, 30)
  write_image(tmp_path / "in" / "photo.bmp", lr)
  run(model_path, tmp_path / "in" / "photo.bmp", tmp_path / "out")
  assert files(tmp_path / "out") == ["photo.bmp.png"]
  assert_same_pixels(read(tmp_path / "out" / "photo.bmp.png"), upscaler(lr))
  assert capsys.readouterr().out == f"1 of 1 images upscaled x4 into {tmp_path / 'out'}\n"


def test_a_folder_of_many_kinds(tmp_path, nearest_path, capsys):
  rgb, rgba, grey = photo(20, 30), photo(21, 30, 4), photo(22, 30, 0)
  deep = photo(20, 30).astype(np.uint16) * 256 + 7
  write_image(tmp_path / "in" / "a.png", rgb)
  write_image(tmp_path / "in" / "a.bmp", grey)
  write_image(tmp_path / "in" / "a.webp", rgba)
  write_image(tmp_path / "in" / "sub" / "a.png", rgb[:10])
  tifffile.imwrite(tmp_path / "in" / "deep.tif", deep, photometric="rgb")
  tifffile.imwrite(tmp_path / "in" / "float.tif", grey.astype(np.float32) / 255)
  Image.fromarray(rgb).save(tmp_path / "in" / "no suffix", "PNG")
  (tmp_path / "in" / "notes.txt").write_text("no image")
  run(nearest_path, tmp_path / "in", tmp_path / "out")
  assert [name for name in files(tmp_path / "out") if "~" not in name] == [
    "a.bmp.png",
    "a.png",
    "a.webp.png",
    "deep.tif.png",
    "float.tif",
    "sub/a.png",
  ]
  (marked,) = [name for name in files(tmp_path / "out") if "~" in name]
  assert marked.startswith("no suffix~")
  for name, expected in (
    ("a.bmp.png", grey),
    ("a.png", rgb),
    (marked, rgb),
    ("sub/a.png", rgb[:10]),
  ):
    np.testing.assert_array_equal(read(tmp_path / "out" / name), large(expected))
  sr = read(tmp_path / "out" / "a.webp.png")
  visible = large(rgba[..., 3]) > 0
  np.testing.assert_array_equal(sr[..., :3][visible], large(rgba)[..., :3][visible])
  # Pillow's bicubic has the same kernel and other borders.
  alpha = Image.fromarray(rgba[:, :, 3]).resize((120, 84), Image.Resampling.BICUBIC)
  error = np.abs(sr[:, :, 3].astype(int) - np.asarray(alpha))
  assert error[12:-12, 12:-12].max() <= 2
  floats = tifffile.imread(tmp_path / "out" / "float.tif")
  np.testing.assert_allclose(floats, large(grey) / 255, atol=1e-6)
  imagecodecs = pytest.importorskip("imagecodecs")
  decoded = imagecodecs.png_decode((tmp_path / "out" / "deep.tif.png").read_bytes())
  np.testing.assert_array_equal(decoded, large(deep))
  captured = capsys.readouterr()
  assert "1 of 8 files are not images: notes.txt\n" in captured.err
  assert captured.out.startswith("7 of 7 images upscaled x4 into ")


def test_a_grey_model_takes_any_image(tmp_path):
  save_model(tmp_path / "grey.npz", nearest_model(channels=1))
  write_image(tmp_path / "in" / "rgb.png", photo(20, 30))
  write_image(tmp_path / "in" / "rgba.png", photo(20, 30, 4))
  write_image(tmp_path / "in" / "grey.png", photo(20, 30, 0))
  run(tmp_path / "grey.npz", tmp_path / "in", tmp_path / "out", "--tile", 16)
  assert read(tmp_path / "out" / "rgb.png").shape == (80, 120, 3)
  assert read(tmp_path / "out" / "rgba.png").shape == (80, 120, 4)
  np.testing.assert_array_equal(read(tmp_path / "out" / "grey.png"), large(photo(20, 30, 0)))


def test_tiles_from_the_command_line(tmp_path, model_path, upscaler, capsys):
  lr = photo(40, 100)
  write_image(tmp_path / "in" / "photo.png", lr)
  run(model_path, tmp_path / "in", tmp_path / "out", "--tile", 16, "--seams")
  assert_same_pixels(read(tmp_path / "out" / "photo.png"), upscaler(lr))
  assert "Along the seams the tiles differ from undivided ones by " in capsys.readouterr().err
  run(model_path, tmp_path / "in", tmp_path / "exact", "--tile", 16, "--tile-mode", "exact")
  assert_same_pixels(read(tmp_path / "exact" / "photo.png"), upscaler(lr))
  for tile in (15, -1, "x"):
    with pytest.raises(ValueError, match=f"--tile={tile} must be 16 or more"):
      run(model_path, tmp_path / "in", tmp_path / "out", "--tile", tile)


def test_names_are_functions_of_the_input_alone(tmp_path, nearest_path):
  """With and without a file beside it, in either order, an image keeps its output."""
  first, second = photo(20, 30), photo(20, 30, seed=1)
  write_image(tmp_path / "in" / "cover.webp", first)
  run(nearest_path, tmp_path / "in", tmp_path / "out")
  before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
  write_image(tmp_path / "in" / "cover.png", second)
  for _ in range(2):
    run(nearest_path, tmp_path / "in", tmp_path / "out")
    after = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    assert sorted(after) == ["cover.png", "cover.webp.png"]
    assert before.items() <= after.items()
    np.testing.assert_array_equal(read(tmp_path / "out" / "cover.png"), large(second))


def test_a_second_run_does_the_rest(tmp_path, nearest_path, capsys):
  for name in "abc":
    write_image(tmp_path / "in" / f"{name}.png", photo(20, 30))
  run(nearest_path, tmp_path / "in", tmp_path / "out")
  (tmp_path / "out" / "b.png").unlink()
  times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in ("a.png", "c.png")}
  capsys.readouterr()
  run(nearest_path, tmp_path / "in", tmp_path / "out", "--skip-existing")
  assert capsys.readouterr().out.startswith("1 of 3 images upscaled")
  assert files(tmp_path / "out") == ["a.png", "b.png", "c.png"]
  assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}


def test_several_inputs_patterns_and_suffixes(tmp_path, nearest_path):
  for name in ("a/x.png", "a/y.jpg", "b/x.webp", "b/x.png", "c/z.png"):
    write_image(tmp_path / name, photo(20, 30))
  inputs = [str(tmp_path / "a" / "x.png"), str(tmp_path / "b" / "*.webp"), str(tmp_path / "c")]
  upscale.main(
    ["--model", str(nearest_path), "--output", str(tmp_path / "out"), "--engine=jax"]
    + ["--suffix=_x4", "--input", *inputs]
  )
  assert files(tmp_path / "out") == ["x.webp_x4.png", "x_x4.png", "z_x4.png"]
  with pytest.raises(FileNotFoundError, match="matches no file"):
    run(nearest_path, tmp_path / "*.gif", tmp_path / "out")


def test_inputs_of_one_name_from_two_folders(tmp_path, nearest_path, capsys):
  for name in ("a/x.png", "b/x.png"):
    write_image(tmp_path / name, photo(20, 30, seed=ord(name[0])))
  with pytest.raises(SystemExit) as exit_with:
    upscale.main(
      ["--model", str(nearest_path), "--output", str(tmp_path / "out"), "--engine=jax"]
      + ["--input", str(tmp_path / "a" / "x.png"), str(tmp_path / "b" / "x.png")]
    )
  assert exit_with.value.code == 1
  np.testing.assert_array_equal(
    read(tmp_path / "out" / "x.png"), large(photo(20, 30, seed=ord("a")))
  )
  assert "is the output of" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("choice", "name", "kind"),
  [
    ("jpg", "a.png.jpg", "JPEG"),
    ("webp", "a.png.webp", "WEBP"),
    ("tiff", "a.png.tif", "TIFF"),
    ("avif", "a.png.avif", "AVIF"),
    ("same", "a.png", "PNG"),
  ],
)
def test_formats(tmp_path, nearest_path, choice, name, kind):
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  quality = ["--quality", 90] if kind in ("JPEG", "WEBP", "AVIF") else []
  run(nearest_path, tmp_path / "in", tmp_path / "out", "--format", choice, *quality)
  assert files(tmp_path / "out") == [name]
  with Image.open(tmp_path / "out" / name) as image:
    assert image.format == kind and image.size == (120, 80)
  output = tmp_path / "single" / f"out{pathlib.Path(name).suffix}"
  run(nearest_path, tmp_path / "in" / "a.png", output)
  with Image.open(output) as image:
    assert image.format == kind


def test_outscale_and_self_ensemble(tmp_path, nearest_path, capsys):
  lr = photo(20, 30)
  write_image(tmp_path / "in" / "a.png", lr)
  run(nearest_path, tmp_path / "in", tmp_path / "out", "--outscale", 2.5, "--self-ensemble")
  expected = Image.fromarray(large(lr)).resize((75, 50), Image.Resampling.BICUBIC)
  error = np.abs(read(tmp_path / "out" / "a.png").astype(int) - np.asarray(expected))
  assert error[4:-4, 4:-4].max() <= 8 and error.mean() < 0.5  # Pillow clips between the passes
  assert " upscaled x2.5 into " in capsys.readouterr().out
  for text in ("0", "-1", "x", "1/0", "nan"):
    with pytest.raises(ValueError, match=f"--outscale={text} must be a number"):
      run(nearest_path, tmp_path / "in", tmp_path / "out", f"--outscale={text}")


def test_an_image_over_several_devices(tmp_path, nearest_path):
  lr = photo(21, 33)  # what the mesh does not divide
  write_image(tmp_path / "in" / "a.png", lr)
  run(nearest_path, tmp_path / "in", tmp_path / "out", "--mesh=2x2")
  np.testing.assert_array_equal(read(tmp_path / "out" / "a.png"), large(lr))
  for mesh, match in (("2", "must be ROWSxCOLUMNS"), ("9x9", "needs 81 devices, and there are 8")):
    with pytest.raises(ValueError, match=match):
      run(nearest_path, tmp_path / "in", tmp_path / "out", f"--mesh={mesh}")


def test_animations_and_pages(tmp_path, nearest_path, capsys):
  frames = [photo(20, 30, seed=i) for i in range(3)]
  images = [Image.fromarray(frame) for frame in frames]
  (tmp_path / "in").mkdir()
  for name, options in (("a.webp", {"lossless": True}), ("a.png", {}), ("p.tif", {})):
    images[0].save(
      tmp_path / "in" / name, save_all=True, append_images=images[1:], duration=50, **options
    )
  run(nearest_path, tmp_path / "in", tmp_path / "out")
  assert files(tmp_path / "out") == ["a.png", "a.webp.png", "p.tif"]
  for name in files(tmp_path / "out"):
    with Image.open(tmp_path / "out" / name) as image:
      assert image.n_frames == 3
      for i, frame in enumerate(frames):
        image.seek(i)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), large(frame))
  run(nearest_path, tmp_path / "in", tmp_path / "first", "--first-frame", "--format=jpg")
  assert "The first of 3 frames was taken." in capsys.readouterr().err
  assert files(tmp_path / "first") == ["a.png.jpg", "a.webp.jpg", "p.tif.jpg"]


def test_standard_input_and_output(tmp_path, nearest_path, monkeypatch, capfdbinary):
  file = io.BytesIO()
  Image.fromarray(photo(20, 30)).save(file, "PNG")
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.getvalue())))
  written = io.TextIOWrapper(io.BytesIO())
  monkeypatch.setattr(sys, "stdout", written)
  run(nearest_path, "-", "-", "--format=tiff")
  data = written.buffer.getvalue()
  np.testing.assert_array_equal(tifffile.imread(io.BytesIO(data)), large(photo(20, 30)))
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.getvalue())))
  run(nearest_path, "-", tmp_path / "out")
  assert files(tmp_path / "out") == ["stdin.png"]


def test_no_photograph_is_overwritten(tmp_path, model_path, monkeypatch):
  folder = tmp_path / "in"
  write_image(folder / "a.png", photo(20, 30))
  write_image(folder / "sub" / "b.png", photo(20, 30))
  before = {name: (folder / name).read_bytes() for name in files(folder)}
  (tmp_path / "link").symlink_to(folder)
  monkeypatch.chdir(folder)
  for source, output in (
    (folder, folder),
    (folder, tmp_path / "link"),
    (folder, "."),
    (folder / "a.png", folder),
    (folder, folder / "sub"),
    (folder, folder / "new"),  # its images would be upscaled again by the same command
    ("a.png", "."),
  ):
    with pytest.raises(ValueError, match="is in the input's folder; choose another"):
      run(model_path, source, output)
  with pytest.raises(ValueError, match="--output=a.png is the input; choose another name"):
    run(model_path, "a.png", "a.png")
  assert {name: (folder / name).read_bytes() for name in files(folder)} == before
  run(model_path, folder / "a.png", folder / "new")  # one file beside a new folder is no trap
  assert files(folder / "new") == ["a.png"]
  run(model_path, "a.png", ".", "--suffix=_x4")
  assert (folder / "a_x4.png").exists()


def fails(*arguments) -> int:
  with pytest.raises(SystemExit) as exit_with:
    run(*arguments)
  return exit_with.value.code


def test_an_unreadable_file_does_not_stop_the_others(tmp_path, nearest_path, capsys):
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG and no more")
  (tmp_path / "in" / "empty.jpg").write_bytes(b"")
  write_image(tmp_path / "in" / "half.png", photo(64, 64))
  half = (tmp_path / "in" / "half.png").read_bytes()
  (tmp_path / "in" / "half.png").write_bytes(half[: len(half) // 2])
  (tmp_path / "in" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
  write_image(tmp_path / "in" / "con.png", photo(20, 30))
  write_image(tmp_path / "in" / "z.png", photo(20, 30))
  assert fails(nearest_path, tmp_path / "in", tmp_path / "out") == 1
  out = files(tmp_path / "out")
  assert [out[0], out[2]] == ["a.png", "z.png"] and out[1].startswith("con~") and len(out) == 3
  captured = capsys.readouterr()
  assert captured.out.splitlines()[-1].startswith("3 of 7 images upscaled x4 into ")
  assert captured.out.splitlines()[-1].endswith("; 4 failed")
  for name in ("broken.png", "empty.jpg", "half.png", "dangling.png"):
    assert captured.err.count(f"{tmp_path / 'in' / name}: ") == 1
  assert " at 0x" not in captured.err


def test_a_fault_of_the_code_fails_one_file(tmp_path, nearest_path, capsys, monkeypatch):
  for name in "abc":
    write_image(tmp_path / "in" / f"{name}.png", photo(20, 30))
  write = writing.write

  def faulty(file, *arguments):
    if not (tmp_path / "out" / "a.png").exists() or (tmp_path / "out" / "b.txt").exists():
      return write(file, *arguments)
    (tmp_path / "out" / "b.txt").write_text("")
    raise KeyError("b")

  monkeypatch.setattr(writing, "write", faulty)
  assert fails(nearest_path, tmp_path / "in", tmp_path / "out") == 1
  assert files(tmp_path / "out") == ["a.png", "b.txt", "c.png"]
  captured = capsys.readouterr()
  assert "b.png: 'b' (KeyError; with SR_JAX_TRACEBACK=1 it says where)" in captured.err
  assert captured.out.startswith("2 of 3 images upscaled")
  monkeypatch.setenv("SR_JAX_TRACEBACK", "1")
  (tmp_path / "out" / "b.txt").unlink()
  with pytest.raises(KeyError):
    run(nearest_path, tmp_path / "in", tmp_path / "out")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path, nearest_path, capsys):
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  os.mkfifo(tmp_path / "in" / "pipe.png")
  assert fails(nearest_path, tmp_path / "in", tmp_path / "out") == 1
  assert "pipe.png: it is a pipe or a device; give a file" in capsys.readouterr().err
  assert files(tmp_path / "out") == ["a.png"]


def test_no_result_leaves_the_output_folder(tmp_path, nearest_path, capsys):
  write_image(tmp_path / "in" / "sub" / "a.png", photo(20, 30))
  write_image(tmp_path / "in" / "b.png", photo(20, 30))
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "out" / "b.png").symlink_to(tmp_path / "elsewhere" / "b.png")
  assert fails(nearest_path, tmp_path / "in", tmp_path / "out") == 1
  assert not files(tmp_path / "elsewhere") and "must stay inside" in capsys.readouterr().err
  np.testing.assert_array_equal(read(tmp_path / "out" / "b.png"), large(photo(20, 30)))


def test_a_frame_that_a_format_cannot_hold_fails_before_it_is_computed(
  tmp_path, nearest_path, capsys, monkeypatch
):
  write_image(tmp_path / "in" / "wide.png", photo(2, 4200))
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  computed = []
  make = networks.make_tile_function
  monkeypatch.setattr(
    "sr_jax.upscaling.stream.make_tile_function",
    lambda *args: lambda tile, *rest: computed.append(tile.shape) or make(*args)(tile, *rest),
  )
  assert fails(nearest_path, tmp_path / "in", tmp_path / "out", "--format=webp") == 1
  assert files(tmp_path / "out") == ["a.png.webp"] and computed == [(20, 30, 3)]
  assert "16800x8 pixels are more than the 16383 a side that webp holds" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_with_a_count(tmp_path, nearest_path, capsys, monkeypatch):
  for name in "abc":
    write_image(tmp_path / "in" / f"{name}.png", photo(20, 30, seed=ord(name)))
  write = writing.write

  def full(file, name, layout, images, *rest):
    rows = [list(strips) for strips in images]
    if (rows[0][0][::4, ::4] == photo(20, 30, seed=ord("b"))[: len(rows[0][0]) // 4]).all():
      file.write(b"half")
      raise OSError(28, "No space left on device")
    write(file, name, layout, [iter(strips) for strips in rows], *rest)

  monkeypatch.setattr(writing, "write", full)
  assert fails(nearest_path, tmp_path / "in", tmp_path / "out") == 1
  captured = capsys.readouterr()
  assert "b.png: No space left on device" in captured.err
  assert captured.out.splitlines()[-1].endswith("; the disk is full: 1 left") or (
    captured.out.splitlines()[-1].endswith("; the disk is full: 0 left")
  )
  assert "a.png" in files(tmp_path / "out") and "b.png" not in files(tmp_path / "out")
  assert not [name for name in files(tmp_path / "out") if name.endswith(".tmp")]


def test_too_little_memory_makes_smaller_tiles(tmp_path, nearest_path, capsys, monkeypatch):
  write_image(tmp_path / "in" / "a.png", photo(40, 150))
  compute = networks.make_tile_function

  def limited(*args):
    def run(tile, shape, plain):
      if max(tile.shape[:2]) > 100:
        raise MemoryError("Unable to allocate 7.5 GiB")
      return compute(*args)(tile, shape, plain)

    return run

  monkeypatch.setattr("sr_jax.upscaling.stream.make_tile_function", limited)
  run(nearest_path, tmp_path / "in", tmp_path / "out")
  np.testing.assert_array_equal(read(tmp_path / "out" / "a.png"), large(photo(40, 150)))
  assert "from here on tiles are 28 pixels a side" in capsys.readouterr().err
  monkeypatch.setattr(
    "sr_jax.upscaling.stream.make_tile_function",
    lambda *args: lambda *rest: lambda: (_ for _ in ()).throw(MemoryError()),
  )
  assert fails(nearest_path, tmp_path / "in", tmp_path / "out2") == 1
  assert "a.png: the memory does not suffice" in capsys.readouterr().err


def test_a_network_that_makes_no_numbers_fails(tmp_path, capsys):
  model = nearest_model()
  for name in ("conv_hr", "conv_last"):  # finite weights, whose product overflows
    model.variables["params"][name]["kernel"] *= np.float32(1e25)
  save_model(tmp_path / "nan.npz", model)
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  assert fails(tmp_path / "nan.npz", tmp_path / "in", tmp_path / "out") == 1
  error = capsys.readouterr().err
  assert "computed again in plain float32" in error and "are not finite" in error
  assert not files(tmp_path / "out")


@pytest.mark.parametrize(
  "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has other signals")
def test_a_signal_leaves_whole_files_and_a_count(tmp_path, nearest_path, number):
  for i in range(300):
    write_image(tmp_path / "in" / f"{i:03}.png", photo(64, 64, seed=i))
  command = [sys.executable, "-m", "sr_jax.upscale", "--model", nearest_path, "--engine=jax"]
  command += ["--input", tmp_path / "in", "--output", tmp_path / "out"]
  process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  for _ in range(1200):
    if (tmp_path / "out" / "003.png").exists() or process.poll() is not None:
      break
    time.sleep(0.05)
  process.send_signal(number)
  out, error = process.communicate(timeout=60)
  assert process.returncode == 130, error
  assert "Traceback" not in error and "interrupted: " in out
  done = files(tmp_path / "out")
  assert 4 <= len(done) < 300 and not [name for name in done if name.endswith(".tmp")]
  assert out.startswith(f"{len(done)} of 300 images upscaled")
  for name in done:
    np.testing.assert_array_equal(
      read(tmp_path / "out" / name), large(photo(64, 64, seed=int(name[:3])))
    )


def test_what_is_missing_is_named(tmp_path, model_path):
  with pytest.raises(FileNotFoundError, match="--input=.*nowhere does not exist"):
    run(model_path, tmp_path / "nowhere", tmp_path / "out")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="no image or video in --input=.*empty"):
    run(model_path, tmp_path / "empty", tmp_path / "out")
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  with pytest.raises(FileNotFoundError, match="none.npz does not exist"):
    run(tmp_path / "none.npz", tmp_path / "in", tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_the_output_is_checked_before_anything_is_computed(tmp_path, model_path, monkeypatch):
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  (tmp_path / "file").write_text("")
  monkeypatch.setattr("sr_jax.upscaling.files.upscale_files", lambda *a, **k: pytest.fail("ran"))
  for output, options, match in (
    ("file", (), "--output=.*file is a file; give a folder"),
    ("file/sub", (), ""),
    ("out.bmp", (), "must end in one of .png"),
    ("out.pgn", (), "must end in one of .png.* for a folder of this name write .*out.pgn/"),
    ("out.mp4", (), "must end in .png or .apng for"),
    ("out.png", ("--format=jpg",), "is no jpg; leave out --format"),
  ):
    with pytest.raises((ValueError, OSError), match=match):
      run(model_path, tmp_path / "in" / "a.png", tmp_path / output, *options)
  with pytest.raises(pytest.fail.Exception, match="ran"):  # the fix that the error names
    run(model_path, tmp_path / "in" / "a.png", f"{tmp_path}/out.pgn/")
  with pytest.raises(ValueError, match="out.png is one file for several images; give a folder"):
    run(model_path, tmp_path / "in", tmp_path / "out.png")
  with pytest.raises(ValueError, match="--output=- takes a single image"):
    run(model_path, tmp_path / "in", "-")


SHARED = os.environ.get("SR_JAX_SHARED")


@pytest.mark.skipif(not SHARED, reason="SR_JAX_SHARED is not set")
def test_shared_cases(tmp_path, capsys):
  """All inputs that upscalers stumble over; the pixels of each kind are tested above."""
  cases = pathlib.Path(SHARED, "cases", "upscale")
  folders = [cases / name for name in ("A_bitdepth", "B_colour", "E6_abort")]
  with pytest.raises(SystemExit):
    upscale.main(
      ["--model", str(cases / "nearest_x4.safetensors"), "--output", str(tmp_path / "out")]
      + ["--engine=jax", "--input", *map(str, folders)]
    )
  captured = capsys.readouterr()
  assert captured.out.endswith("; 1 failed\n") and "a_zero.jpg: it is empty" in captured.err
  count = sum(len(list(folder.iterdir())) for folder in folders)
  assert captured.out.startswith(f"{count - 1} of {count} images")
