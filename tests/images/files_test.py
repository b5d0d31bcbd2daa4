"""Tests of sr_jax/images/files.py: every odd file there is, and names that want out."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image, features

from sr_jax.images.files import (
  image_size,
  list_images,
  read_image,
  read_image_and_alpha,
  safe_output_path,
  write_image,
)

COLOR = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = COLOR[..., 0]


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def smooth(height: int = 16, width: int = 24) -> np.ndarray:
  y, x = np.mgrid[:height, :width]
  return np.stack([8 * y, 8 * x, 4 * (x + y)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_colour_is_read_as_it_is(kind):
  options = {"lossless": True} if kind == "WEBP" else {}
  read = read_image(encoded(Image.fromarray(COLOR), kind, **options))
  assert read.dtype == np.uint8
  np.testing.assert_array_equal(read, COLOR)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
  undo = {  # how a camera would have stored the upright image
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = Image.fromarray(np.ascontiguousarray(undo(COLOR)))
  np.testing.assert_array_equal(read_image(encoded(stored, exif=exif)), COLOR)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_read_from_the_header(orientation, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = orientation
  noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
  data = encoded(Image.fromarray(noise), "JPEG", exif=exif)
  assert image_size(data) == read_image(data).shape[:2]
  # Half of the file is enough, half of its header is not.
  (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
  assert image_size(tmp_path / "half.jpg") == image_size(data)
  assert image_size(data[:30]) == (0, 0)
  assert image_size(tmp_path / "nothing.png") == (0, 0)


def test_the_size_of_a_png_is_read_without_decoding_it(tmp_path):
  """Its EXIF data may come after the pixels, which are damaged here."""
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encoded(Image.fromarray(smooth(16, 24)), exif=exif)
  place, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
  chunk = data[place : place + 12 + int.from_bytes(data[place : place + 4], "big")]
  last = data[:place] + data[place + len(chunk) : end] + chunk + data[end:]
  pixels = last.index(b"IDAT") + 8
  broken = last[:pixels] + bytes(20) + last[pixels + 20 :]
  for file in (data, last, broken):
    assert image_size(file) == (24, 16)
  assert read_image(last).shape == (24, 16, 3)
  assert image_size(encoded(Image.fromarray(smooth(16, 24)))) == (16, 24)
  with pytest.raises(ValueError):
    read_image(broken)


@pytest.mark.parametrize(
  "kind, suffix",
  [
    ("GIF", ".gif"), ("TGA", ".tga"), ("PPM", ".ppm"), ("PPM", ".pnm"), ("JPEG", ".jfif"),
    ("JPEG", ".jpe"), ("AVIF", ".avif"), ("JPEG2000", ".jp2"),
  ],
)  # fmt: skip
def test_formats_that_are_only_read(tmp_path, kind, suffix):
  if (
    kind == "AVIF"
    and not features.check("avif")
    or kind == "JPEG2000"
    and not features.check("jpg_2000")
  ):
    pytest.skip(f"this Pillow has no {kind}")
  picture, path = smooth(16, 24), tmp_path / f"picture{suffix}"
  Image.fromarray(picture).save(path, kind)
  assert list_images(tmp_path) == [path]
  assert image_size(path) == (16, 24)
  difference = np.abs(read_image(path).astype(int) - picture)
  assert difference.max() <= (0 if kind in ("TGA", "PPM") else 24), kind
  with pytest.raises(ValueError, match="suffix must be one of"):
    write_image(path, picture)


def test_a_tga_is_one_by_its_suffix_alone(tmp_path):
  """It has no mark: anything could pass for it."""
  Image.fromarray(smooth()).save(tmp_path / "a.tga")
  (tmp_path / "a.png").write_bytes((tmp_path / "a.tga").read_bytes())
  with pytest.raises(ValueError, match="a.png"):
    read_image(tmp_path / "a.png")


def test_grey_files_become_rgb_unless_kept():
  for image in (
    Image.fromarray(GREY),
    Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (9, 6), 255)]),
  ):
    data = encoded(image)
    np.testing.assert_array_equal(read_image(data), np.stack([GREY] * 3, axis=-1))
    np.testing.assert_array_equal(read_image(data, keep_grey=True), GREY)
  assert read_image(encoded(Image.fromarray(COLOR)), keep_grey=True).shape == (6, 9, 3)


def test_one_bit_is_black_and_white():
  data = encoded(Image.fromarray(GREY > 99))
  np.testing.assert_array_equal(read_image(data, keep_grey=True), (GREY > 99) * 255)


def test_palette_is_looked_up():
  palette = Image.fromarray(COLOR).quantize(16)
  expected = np.asarray(palette.convert("RGB"))
  np.testing.assert_array_equal(read_image(encoded(palette)), expected)


def test_cmyk_jpeg_looks_like_its_rgb():
  data = encoded(Image.fromarray(smooth()).convert("CMYK"), "JPEG", quality=100, subsampling=0)
  assert Image.open(io.BytesIO(data)).mode == "CMYK"
  assert np.abs(read_image(data).astype(int) - smooth()).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
  values = np.array([[0, 128, 129, 255, 256, 257, 32767, 32768, 65406, 65407, 65535]], np.uint16)
  read = read_image(encoded(Image.fromarray(values), kind), keep_grey=True)
  np.testing.assert_array_equal(read, [[0, 0, 1, 1, 1, 1, 127, 128, 254, 255, 255]])


def test_32_bit_grey_must_fit_16_bits():
  values = np.array([[0, 65535]], np.int32)
  read = read_image(encoded(Image.fromarray(values), "TIFF"), keep_grey=True)
  np.testing.assert_array_equal(read, [[0, 255]])
  with pytest.raises(ValueError, match="grey values from 0 to 65536 must fit 16 bits"):
    read_image(encoded(Image.fromarray(values + np.int32([0, 1])), "TIFF"))
  with pytest.raises(ValueError, match="float pixels"):
    read_image(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_opaque_alpha_is_dropped():
  data = encoded(Image.fromarray(np.dstack([COLOR, np.full((6, 9), 255, np.uint8)])))
  np.testing.assert_array_equal(read_image(data), COLOR)
  rgb, alpha = read_image_and_alpha(data)
  np.testing.assert_array_equal(rgb, COLOR)
  assert alpha is None


@pytest.mark.parametrize("grey", [False, True])
def test_other_alpha_is_composited_over_white_or_kept_apart(grey):
  color = GREY if grey else COLOR
  data = encoded(Image.fromarray(np.dstack([color, GREY])))
  weight = GREY / 255 if grey else (GREY / 255)[..., None]
  expected = np.round(color * weight + 255 * (1 - weight))
  np.testing.assert_array_equal(read_image(data, keep_grey=True), expected)
  rgb, alpha = read_image_and_alpha(data)
  np.testing.assert_array_equal(rgb, np.stack([GREY] * 3, axis=-1) if grey else COLOR)
  np.testing.assert_array_equal(alpha, GREY)


def test_transparent_colours_of_png_become_white():
  color = COLOR.copy()
  color[2, 3] = 10, 20, 30
  data = encoded(Image.fromarray(color), transparency=(10, 20, 30))
  expected = color.copy()
  expected[2, 3] = 255
  np.testing.assert_array_equal(read_image(data), expected)
  assert read_image_and_alpha(data)[1].sum() == 255 * (6 * 9 - 1)
  palette = Image.fromarray(smooth()).quantize(4)
  index = np.asarray(palette)
  read = read_image(encoded(palette, transparency=1))
  np.testing.assert_array_equal(np.all(read == 255, axis=-1), index == 1)


def damaged_files() -> dict[str, bytes]:
  png = encoded(Image.fromarray(smooth(64, 64)))
  flipped = bytearray(png)
  flipped[len(png) // 2] ^= 1
  jpeg = encoded(Image.fromarray(smooth(64, 64)), "JPEG")
  return {
    "cut.png": png[: len(png) // 2],
    "flipped.png": bytes(flipped),
    "cut.jpg": jpeg[: len(jpeg) // 2],
    "empty.png": b"",
    "text.png": b"this is no image",
    "other.png": encoded(Image.fromarray(smooth()), "SGI"),  # Pillow knows 40 formats; not here
  }


@pytest.mark.parametrize("name", damaged_files())
def test_damaged_files_raise_and_name_the_file(tmp_path, name):
  (tmp_path / name).write_bytes(damaged_files()[name])
  with pytest.raises(ValueError, match=rf"{name}: .*remove, repair or shrink it"):
    read_image(tmp_path / name)


def test_a_missing_file_is_an_os_error(tmp_path):
  with pytest.raises(FileNotFoundError):
    read_image(tmp_path / "none.png")


def resident_bytes() -> int:
  with open("/proc/self/statm") as file:
    return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux' /proc")
def test_a_bomb_is_refused_from_its_header():
  data = encoded(Image.new("1", (20_000, 20_000)))
  assert len(data) < 100_000
  before = resident_bytes()
  with pytest.raises(ValueError, match="20000x20000 pixels are more than max_pixels=100000000"):
    read_image(data)
  assert resident_bytes() - before < 100_000_000


def test_the_limit_is_ours_not_pillows(monkeypatch):
  data = encoded(Image.fromarray(COLOR))
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert read_image(data, max_pixels=54).shape == (6, 9, 3)
  assert Image.MAX_IMAGE_PIXELS == 5
  with pytest.raises(ValueError, match="9x6 pixels are more than max_pixels=53"):
    read_image(data, max_pixels=53)


@pytest.mark.parametrize("array", [GREY, COLOR, np.dstack([COLOR, GREY])], ids=["L", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".PNG"])
def test_what_is_written_is_read(tmp_path, array, suffix):
  path = tmp_path / "new" / f"image{suffix}"
  write_image(path, array)
  rgb, alpha = read_image_and_alpha(path)
  np.testing.assert_array_equal(rgb, np.stack([GREY] * 3, axis=-1) if array is GREY else COLOR)
  assert (alpha is not None) == (array.shape[-1] == 4)
  assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_pipe_among_images_is_refused_and_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "a.png")
  assert image_size(tmp_path / "a.png") == (0, 0)
  with pytest.raises(ValueError, match="a.png: it is a pipe or a device"):
    read_image(tmp_path / "a.png")


def test_what_will_be_refused_is_not_planned_for(tmp_path):
  Image.new("1", (10_001, 10_000)).save(tmp_path / "a.png")
  assert image_size(tmp_path / "a.png") == (0, 0)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "image.png"
  write_image(path, COLOR)

  def full_disk(self, file, *args, **kwargs):
    file.write(b"half")
    raise OSError("No space left on device")

  monkeypatch.setattr(Image.Image, "save", full_disk)
  with pytest.raises(OSError, match="No space"):
    write_image(path, 255 - COLOR)
  np.testing.assert_array_equal(read_image(path), COLOR)
  assert [file.name for file in tmp_path.iterdir()] == ["image.png"]


def test_what_cannot_be_written_is_named(tmp_path):
  with pytest.raises(ValueError, match="a.xyz: the suffix must be one of .png"):
    write_image(tmp_path / "a.xyz", COLOR)
  with pytest.raises(ValueError, match="JPEG has no alpha"):
    write_image(tmp_path / "a.jpg", np.dstack([COLOR, GREY]))
  for array in (COLOR / 255, COLOR[..., :2], COLOR[..., :1], COLOR[None], GREY[0]):
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W\]"):
      write_image(tmp_path / "a.png", array)
  assert not list(tmp_path.iterdir())


def test_images_are_listed_in_one_order(tmp_path):
  for name in ("b.PNG", "a/z.jpeg", "a/b/y.Tif", "c.txt", ".hidden.png", ".git/x.png", "a.bmp"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
  (tmp_path / "a" / "loop").symlink_to(tmp_path)
  (tmp_path / "linked").symlink_to(tmp_path / "a" / "b")
  found = [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)]
  assert found == ["a/b/y.Tif", "a/z.jpeg", "a.bmp", "b.PNG"]  # each once, by parts
  with pytest.raises(ValueError, match="must be an existing folder"):
    list_images(tmp_path / "none")


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("a.png", "a.png"),
    ("sub/b.png", "sub/b.png"),
    ("./a.png", "a.png"),
    ("a..b.png", "a..b.png"),
    ("console.png", "console.png"),
    ("ä 1.png", "ä 1.png"),
    ('a<b>:"|?*.png', "a_b______.png"),
    ("a\nb\x00.png", "a_b_.png"),
    ("name. ", "name"),
    ("...", "_"),
    ("sub\\b.png", "sub/b.png"),
  ],
)
def test_names_are_made_safe(tmp_path, name, expected):
  assert safe_output_path(tmp_path, name) == tmp_path / expected


@pytest.mark.parametrize(
  "name",
  [
    "",
    ".",
    "/",
    "..",
    "../a.png",
    "a/../../b.png",
    "a\\..\\..\\b.png",
    "/etc/passwd",
    "\\\\server\\a.png",
    "C:\\a.png",
    "c:a.png",
    "NUL",
    "con.png",
    "sub/Com1.tar.gz",
    "lpt9 .png",
    "link/a.png",
    "link.png",
  ],
)
def test_names_that_lead_out_are_refused(tmp_path, name):
  output = tmp_path / "output"
  output.mkdir()
  (output / "link").symlink_to(tmp_path)
  (output / "link.png").symlink_to(tmp_path / "elsewhere.png")
  with pytest.raises(ValueError, match=r"must (be|not be|stay)"):
    safe_output_path(output, name)
