"""Tests of sr_jax/upscale.py: files in, files out, tiles."""

import pathlib

import numpy as np
import pytest
from PIL import Image
from tiny_models import assert_same_pixels, make_model

from sr_jax import cli
from sr_jax.images.files import write_image
from sr_jax.models.model import Model
from sr_jax.models.write import save_model
from sr_jax.networks.build import build_generator
from sr_jax import upscale
from sr_jax.upscaling import tiles
from sr_jax.upscaling.tiles import upscale_tiled
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


def nearest(lr: np.ndarray) -> np.ndarray:
  return lr.repeat(2, axis=0).repeat(2, axis=1)


@pytest.mark.parametrize("tile", [16, 33, 40, 1000])
@pytest.mark.parametrize("channels", [3, 0])
def test_tiles_fit_together(tile, channels):
  lr, seen = photo(70, 121, channels), []
  sr = upscale_tiled(nearest, lr, 2, tile, lambda done, total: seen.append((done, total)))
  np.testing.assert_array_equal(sr, nearest(lr))
  tiles = -(-70 // tile) * -(-121 // tile)
  assert seen == [(i, tiles) for i in range(1, tiles + 1)]


def test_tiles_see_their_surroundings():
  """Tiles of 16 with 32 pixels around them are 80 wide; nothing else is passed to the network."""
  lr, seen = photo(100, 200), []

  def remember(piece):
    seen.append(piece)
    return nearest(piece)

  upscale_tiled(remember, lr, 2, 16)
  assert max(piece.shape[0] for piece in seen) == max(piece.shape[1] for piece in seen) == 80
  np.testing.assert_array_equal(seen[0], lr[:48, :48])
  np.testing.assert_array_equal(seen[3], lr[:48, 16:96])


def test_tiles_equal_the_whole_where_the_network_sees_no_further(upscaler, monkeypatch):
  lr = photo(40, 150)
  whole = upscaler(lr)
  assert whole.std() > 20 and np.mean((whole == 0) | (whole == 255)) < 0.3
  assert_same_pixels(upscale_tiled(upscaler, lr, 4, 16), whole)
  monkeypatch.setattr(tiles, "OVERLAP", 2)
  error = np.abs(upscale_tiled(upscaler, lr, 4, 16).astype(int) - whole)
  assert error.max() > 1, "the overlap is what makes them equal"


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


def test_one_file(tmp_path, model_path, upscaler, capsys):
  lr = photo(20, 30)
  write_image(tmp_path / "in" / "photo.bmp", lr)
  run(model_path, tmp_path / "in" / "photo.bmp", tmp_path / "out")
  assert files(tmp_path / "out") == ["photo.png"]
  np.testing.assert_array_equal(read(tmp_path / "out" / "photo.png"), upscaler(lr))
  assert capsys.readouterr().out.startswith("1 of 1 images upscaled x4 into ")


def test_a_folder_of_many_kinds(tmp_path, model_path, upscaler):
  rgb, rgba, grey = photo(20, 30), photo(21, 30, 4), photo(22, 30, 0)
  write_image(tmp_path / "in" / "a.png", rgb)
  write_image(tmp_path / "in" / "a.jpg", grey)
  write_image(tmp_path / "in" / "a.tif", rgba)
  write_image(tmp_path / "in" / "sub" / "a.png", rgb[:10])
  (tmp_path / "in" / "notes.txt").write_text("no image")
  run(model_path, tmp_path / "in", tmp_path / "out")
  assert files(tmp_path / "out") == ["a.png", "a_1.png", "a_2.png", "sub/a.png"]

  decoded = read(tmp_path / "in" / "a.jpg")  # a grey file comes back as grey in colour
  expected = upscaler(np.stack([decoded] * 3, axis=2))
  np.testing.assert_array_equal(read(tmp_path / "out" / "a.png"), expected)
  np.testing.assert_array_equal(read(tmp_path / "out" / "a_1.png"), upscaler(rgb))
  np.testing.assert_array_equal(read(tmp_path / "out" / "sub" / "a.png"), upscaler(rgb[:10]))
  sr = read(tmp_path / "out" / "a_2.png")
  assert sr.shape == (84, 120, 4)
  np.testing.assert_array_equal(sr[:, :, :3], upscaler(rgba[:, :, :3]))
  # Pillow's bicubic has the same kernel and other borders.
  alpha = Image.fromarray(rgba[:, :, 3]).resize((120, 84), Image.Resampling.BICUBIC)
  error = np.abs(sr[:, :, 3].astype(int) - np.asarray(alpha))
  assert error[12:-12, 12:-12].max() <= 2


def test_a_grey_model_takes_any_image(tmp_path):
  save_model(tmp_path / "grey.npz", make_model("msrresnet", out_channels=1))
  write_image(tmp_path / "in" / "rgb.png", photo(20, 30))
  write_image(tmp_path / "in" / "rgba.png", photo(20, 30, 4))
  run(tmp_path / "grey.npz", tmp_path / "in", tmp_path / "out", "--tile", 16)
  assert read(tmp_path / "out" / "rgb.png").shape == (80, 120, 3)
  assert read(tmp_path / "out" / "rgba.png").shape == (80, 120, 4)


def test_tiles_from_the_command_line(tmp_path, model_path, upscaler):
  lr = photo(40, 100)
  write_image(tmp_path / "in" / "photo.png", lr)
  run(model_path, tmp_path / "in", tmp_path / "out", "--tile", 16)
  assert_same_pixels(read(tmp_path / "out" / "photo.png"), upscaler(lr))
  for tile in (15, -1):
    with pytest.raises(ValueError, match=f"--tile={tile} must be 16 or more"):
      run(model_path, tmp_path / "in", tmp_path / "out", "--tile", tile)


def test_twice_is_once(tmp_path, model_path):
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  write_image(tmp_path / "in" / "a.jpg", photo(20, 30, seed=1))
  run(model_path, tmp_path / "in", tmp_path / "out")
  before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
  run(model_path, tmp_path / "in", tmp_path / "out")
  after = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
  assert list(before) == ["a.png", "a_1.png"] and after == before


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
  assert {name: (folder / name).read_bytes() for name in files(folder)} == before
  run(model_path, folder / "a.png", folder / "new")  # one file beside a new folder is no trap
  assert files(folder / "new") == ["a.png"]


def test_an_unreadable_file_does_not_stop_the_others(tmp_path, model_path, capsys):
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG and no more")
  (tmp_path / "in" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
  write_image(tmp_path / "in" / "z.png", photo(20, 30))
  with pytest.raises(SystemExit) as exit_with:
    cli.guarded(upscale.main)(
      ["--model", str(model_path), "--input", str(tmp_path / "in")]
      + ["--output", str(tmp_path / "out")]
    )  # fmt: skip
  assert files(tmp_path / "out") == ["a.png", "z.png"]
  assert capsys.readouterr().out.startswith("2 of 4 images upscaled")
  lines = exit_with.value.code.splitlines()  # Python prints a text and exits with status 1
  assert lines[0] == "error: could not read:"
  assert [pathlib.Path(line.strip().split(": ")[0]).name for line in lines[1:]] == [
    "broken.png",
    "dangling.png",
  ]


def test_what_is_missing_is_named(tmp_path, model_path):
  with pytest.raises(FileNotFoundError, match="--input=.*nowhere does not exist"):
    run(model_path, tmp_path / "nowhere", tmp_path / "out")
  (tmp_path / "empty").mkdir()
  with pytest.raises(FileNotFoundError, match="no image in --input=.*empty"):
    run(model_path, tmp_path / "empty", tmp_path / "out")
  write_image(tmp_path / "in" / "a.png", photo(20, 30))
  with pytest.raises(FileNotFoundError, match="none.npz does not exist"):
    run(tmp_path / "none.npz", tmp_path / "in", tmp_path / "out")
  assert not (tmp_path / "out").exists()
