"""Tests of images/reading.py and writing.py: what goes in comes out, as other readers see it.

Files are made and read by imagecodecs, tifffile and Pillow, whichever the code does not use there.
"""

import io
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, PngImagePlugin
import pyvips

from sr_jax.images import exif as exif_data
from sr_jax.images import reading
from sr_jax.images import writing
from sr_jax.images.picture import Metadata

imagecodecs = pytest.importorskip("imagecodecs", reason="pip install imagecodecs")
SHAPES = {1: (21, 34), 2: (21, 34, 2), 3: (21, 34, 3), 4: (21, 34, 4)}


def noise(shape, dtype=np.uint8, seed=0):
  rng = np.random.default_rng(seed)
  if np.dtype(dtype).kind == "f":
    return rng.random(shape, np.float32)
  return rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def joined(frame) -> np.ndarray:
  """A frame as one array, as other readers return it."""
  if frame.alpha is None:
    return frame.color
  color = frame.color if frame.color.ndim == 3 else frame.color[..., None]
  return np.concatenate([color, frame.alpha[..., None]], axis=2)


def png(depth: int, kind: int, rows: list[bytes], width: int, **chunks: bytes) -> bytes:
  def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
  data = zlib.compress(b"".join(b"\0" + row for row in rows))
  extra = b"".join(chunk(name.encode(), value) for name, value in chunks.items())
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + extra
    + chunk(b"IDAT", data)
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_is_read_and_written_whole(channels, dtype):
  pixels = noise(SHAPES[channels], dtype)
  picture = reading.read_picture(imagecodecs.png_encode(pixels))
  np.testing.assert_array_equal(joined(picture.frames[0]), pixels)
  assert picture.frames[0].color.dtype == dtype
  data = written("png", [pixels])
  np.testing.assert_array_equal(imagecodecs.png_decode(data), pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_is_read_and_written_whole(channels, dtype):
  pixels = noise(SHAPES[channels], dtype)
  file = io.BytesIO()
  tifffile.imwrite(
    file,
    pixels,
    photometric="rgb" if channels > 2 else "minisblack",
    extrasamples=["unassalpha"] if channels in (2, 4) else None,
    planarconfig="contig" if channels == 2 else None,
  )
  picture = reading.read_picture(file.getvalue())
  np.testing.assert_array_equal(joined(picture.frames[0]), pixels)
  assert picture.frames[0].color.dtype == dtype
  data = written("tiff", [pixels])
  np.testing.assert_array_equal(tifffile.imread(io.BytesIO(data)), pixels)


@pytest.mark.parametrize(
  "options",
  [
    {"compression": "lzw", "predictor": True},
    {"compression": "zlib"},
    {"tile": (16, 16)},
    {"bigtiff": True},
    {"byteorder": ">"},
    {"planarconfig": "separate"},
    {"compression": "zstd"},
    {"compression": "zstd", "tile": (16, 16)},  # of which libvips makes noise
    {"compression": "lzma", "tile": (16, 16)},
  ],
  ids=str,
)
def test_forms_of_tiff(options):
  pixels, file = noise((40, 50, 3), np.uint16), io.BytesIO()
  stored = np.moveaxis(pixels, 2, 0) if "planarconfig" in options else pixels
  tifffile.imwrite(file, stored, photometric="rgb", **options)
  np.testing.assert_array_equal(reading.read_picture(file.getvalue()).frames[0].color, pixels)


def test_pages_that_go_in_a_circle_are_refused():
  file = io.BytesIO()
  tifffile.imwrite(file, noise((4, 4)))
  data = bytearray(file.getvalue())
  (first,) = struct.unpack_from("<I", data, 4)
  (entries,) = struct.unpack_from("<H", data, first)
  struct.pack_into("<I", data, first + 2 + 12 * entries, first)  # the next page is this one
  empty = b"II*\0" + struct.pack("<IHI", 8, 0, 8)
  for circle in (bytes(data), empty):
    assert reading.read_header(circle) is None
    with pytest.raises(ValueError, match="its list of pages leads back into itself"):
      reading.read_picture(circle)


def test_a_name_that_is_no_text(tmp_path):
  path = os.fsencode(tmp_path) + b"/\xe9.png"
  try:
    with open(path, "wb") as file:
      Image.fromarray(noise((8, 8, 3))).save(file, "PNG")
  except OSError:
    pytest.skip("the system refuses such names")
  picture = reading.read_picture(pathlib.Path(os.fsdecode(path)))
  np.testing.assert_array_equal(picture.frames[0].color, noise((8, 8, 3)))


def test_an_error_tells_of_its_own_file_alone():
  file = io.BytesIO()
  Image.fromarray(noise((64, 64, 3))).save(file, "PNG")
  pyvips.vips_lib.vips_foreign_find_load(b"/nowhere/another file.png")  # leaves an error behind
  with pytest.raises(ValueError, match="must be a whole image") as error:
    reading.read_picture(file.getvalue()[:3000])
  assert "another file" not in str(error.value)


def test_numbers_of_other_types():
  def read(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", **options)
    return reading.read_picture(file.getvalue()).frames[0].color

  values = np.arange(0, 63_000, 1000).reshape(7, 9)
  np.testing.assert_array_equal(read(values.astype(np.int32)), values)
  np.testing.assert_array_equal(read(values.astype(np.uint32)), values)
  doubles = noise((7, 9), np.float32).astype(np.float64)
  np.testing.assert_array_equal(read(doubles), doubles)
  with pytest.raises(ValueError, match="whole numbers from -1000 to 61000 must lie in 0 to 65535"):
    read(values.astype(np.int32) - 1000)


def test_multiplied_alpha_is_divided():
  straight = np.full((8, 8, 4), 40_000, np.uint16)
  straight[..., 3] = 20_000
  stored = straight.copy()
  stored[..., :3] = np.round(straight[..., :3].astype(float) * straight[..., 3:] / 65535)
  file = io.BytesIO()
  tifffile.imwrite(file, stored, photometric="rgb", extrasamples=["assocalpha"])
  frame = reading.read_picture(file.getvalue()).frames[0]
  assert np.abs(frame.color.astype(int) - 40_000).max() <= 2
  assert (frame.alpha == 20_000).all()


@pytest.mark.parametrize(
  ("data", "color", "alpha"),
  [
    (png(4, 0, [b"\x01\x7f"], 4, tRNS=b"\0\7"), [0, 17, 119, 255], [255, 255, 0, 255]),
    (png(2, 0, [b"\x1b"], 4, tRNS=b"\0\2"), [0, 85, 170, 255], [255, 255, 0, 255]),
    (png(1, 0, [b"\x50"], 4, tRNS=b"\0\1"), [0, 255, 0, 255], [255, 0, 255, 0]),
    (
      png(16, 0, [struct.pack(">3H", 100, 101, 65535)], 3, tRNS=struct.pack(">H", 101)),
      [100, 101, 65535],
      [65535, 0, 65535],
    ),
    (
      png(16, 2, [struct.pack(">6H", 1, 2, 3, 1, 2, 4)], 2, tRNS=struct.pack(">3H", 1, 2, 3)),
      [[1, 2, 3], [1, 2, 4]],
      [0, 65535],
    ),
    (
      png(8, 2, [bytes([1, 2, 3, 1, 2, 4])], 2, tRNS=struct.pack(">3H", 1, 2, 3)),
      [[1, 2, 3], [1, 2, 4]],
      [0, 255],
    ),
    (
      png(8, 3, [bytes([0, 1, 2])], 3, PLTE=bytes([9, 8, 7, 6, 5, 4, 3, 2, 1]), tRNS=b"\x80\0"),
      [[9, 8, 7], [6, 5, 4], [3, 2, 1]],
      [128, 0, 255],
    ),
  ],
  ids=["grey4", "grey2", "grey1", "grey16", "rgb16", "rgb8", "palette"],
)
def test_every_transparency_of_png(data, color, alpha):
  frame = reading.read_picture(data).frames[0]
  np.testing.assert_array_equal(frame.color[0], color)
  np.testing.assert_array_equal(frame.alpha[0], alpha)


def test_palettes_and_bits():
  grey = png(8, 3, [bytes([0, 1])], 2, PLTE=bytes([9, 9, 9, 200, 200, 200]))
  np.testing.assert_array_equal(reading.read_picture(grey).frames[0].color, [[9, 200]])
  bits = reading.read_picture(png(1, 0, [b"\x40"], 2)).frames[0].color
  np.testing.assert_array_equal(bits, [[0, 255]])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF8", "TIFF16", "WEBP"])
def test_images_are_turned_upright(orientation, kind):
  file, deep = io.BytesIO(), kind == "TIFF16"
  pixels = noise((12, 16, 3), np.uint16 if deep else np.uint8)
  if kind.startswith("TIFF"):
    tags = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(file, pixels, photometric="rgb", extratags=tags)
  else:
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(file, kind, exif=exif, **options)
  picture = reading.read_picture(file.getvalue())
  if kind == "JPEG":
    pixels = imagecodecs.jpeg_decode(file.getvalue())
  turned = {
    1: pixels,
    2: pixels[:, ::-1],
    3: pixels[::-1, ::-1],
    4: pixels[::-1],
    5: pixels.swapaxes(0, 1),
    6: np.rot90(pixels, -1),
    7: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90(pixels),
  }[orientation]
  np.testing.assert_array_equal(picture.frames[0].color, turned)
  header = reading.read_header(file.getvalue())
  assert header.size == turned.shape[:2] and header.format == kind.rstrip("0123456789")
  if picture.metadata.exif:
    assert exif_data.orientation(picture.metadata.exif) == 1


def written(name, images, metadata=Metadata(), quality=None, durations=(), poster=False) -> bytes:  # noqa: B008
  layout = writing.Layout(
    tuple(pixels.shape[:2] for pixels in images),
    1 if images[0].ndim == 2 else images[0].shape[2],
    images[0].dtype,
    durations,
    poster,
  )
  layout, _ = writing.fit(layout, name)
  strips = [
    (rows if rows.ndim == 3 else rows[..., None] for rows in np.array_split(pixels, 3))
    for pixels in images
  ]
  file = io.BytesIO()
  writing.write(file, name, layout, strips, metadata, quality)
  return file.getvalue()


def profile(name="sRGB") -> bytes:
  return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def camera_exif() -> bytes:
  exif = Image.Exif()
  exif[271], exif[306], exif[33432] = "Maker", "2026:11:30 21:00:00", "Somebody"
  exif.get_ifd(0x8769)[33434] = 0.01  # exposure time
  exif.get_ifd(0x8825)[1] = "N"
  return exif.tobytes().removeprefix(b"Exif\0\0")


METADATA = Metadata(
  icc=profile(), exif=camera_exif(), xmp=b"<x:xmpmeta>hello</x:xmpmeta>", dpi=(300.0, 150.0)
)


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "tiff", "avif"])
def test_metadata_are_kept(name):
  data = written(name, [noise((20, 30, 3))], METADATA)
  with Image.open(io.BytesIO(data)) as image:
    exif = image.getexif()
    assert image.info["icc_profile"] == METADATA.icc
    assert exif[271] == "Maker" and exif[33432] == "Somebody"
    assert exif.get_ifd(0x8769)[33434] == pytest.approx(0.01)
    assert exif.get_ifd(0x8825)[1] == "N"
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    assert b"hello" in (xmp.encode() if isinstance(xmp, str) else xmp)
    if name in ("png", "tiff"):
      assert image.info["dpi"] == pytest.approx((300, 150), abs=0.02)
    if name == "jpg":
      assert (exif[282], exif[283]) == (300, 150)
  metadata = reading.read_picture(data).metadata  # and our own reader finds them again
  assert metadata.icc == METADATA.icc and b"hello" in metadata.xmp
  if name in ("png", "tiff", "jpg"):
    assert metadata.dpi == pytest.approx((300, 150), abs=0.02)
  assert exif_data.orientation(metadata.exif) == 1 and b"Maker" in metadata.exif


@pytest.mark.parametrize("options", [{}, {"imagej": True}, {"ome": True}])
def test_a_description_of_a_tiff_s_arrays_is_not_kept(options, tmp_path):
  tifffile.imwrite(tmp_path / "a.tif", noise((8, 9, 3)), photometric="rgb", **options)
  picture = reading.read_picture(tmp_path / "a.tif")
  data = written("tiff", [noise((32, 36, 3))], picture.metadata)
  with tifffile.TiffFile(io.BytesIO(data)) as file:
    assert file.asarray().shape == (32, 36, 3)
    assert file.series[0].shape == (32, 36, 3)
    assert not file.pages[0].description


def test_a_person_s_description_of_a_tiff_is_kept(tmp_path):
  tifffile.imwrite(tmp_path / "a.tif", noise((8, 9, 3)), description="A lighthouse", metadata=None)
  picture = reading.read_picture(tmp_path / "a.tif")
  data = written("tiff", [noise((32, 36, 3))], picture.metadata)
  with tifffile.TiffFile(io.BytesIO(data)) as file:
    assert file.pages[0].description == "A lighthouse"


def test_text_and_gamma_of_png_are_kept():
  info = PngImagePlugin.PngInfo()
  info.add_text("parameters", "a lighthouse")
  info.add_text("packed", "word " * 100, zip=True)
  info.add_itxt("Title", "Leuchtturm ä", lang="de")
  info.add(b"gAMA", struct.pack(">I", 100_000))
  file = io.BytesIO()
  Image.fromarray(noise((8, 9, 3))).save(file, "PNG", pnginfo=info, dpi=(72, 72))
  picture = reading.read_picture(file.getvalue())
  data = written("png", [picture.frames[0].color], picture.metadata)
  with Image.open(io.BytesIO(data)) as image:
    assert image.info["gamma"] == 1.0 and image.info["dpi"] == pytest.approx((72, 72), abs=0.1)
    assert image.text == {
      "parameters": "a lighthouse",
      "packed": "word " * 100,
      "Title": "Leuchtturm ä",
    }


def test_a_profile_of_other_channels_is_not_embedded():
  data = written("png", [noise((8, 9))], Metadata(icc=profile()))
  assert "icc_profile" not in Image.open(io.BytesIO(data)).info


def test_to_srgb():
  wide = bytearray(profile())  # sRGB's profile whose red and green primaries are exchanged
  red, green = wide.find(b"rXYZ"), wide.find(b"gXYZ")
  wide[red : red + 4], wide[green : green + 4] = b"gXYZ", b"rXYZ"
  pixels = np.full((8, 9, 3), [200, 30, 60], np.uint8)
  for dtype, factor in ((np.uint8, 1), (np.uint16, 257)):
    deep = pixels.astype(dtype) * dtype(factor)
    data = written("png", [deep], Metadata(icc=bytes(wide)))
    picture = reading.read_picture(data, to_srgb=True)
    transform = ImageCms.buildTransform(
      ImageCms.ImageCmsProfile(io.BytesIO(wide)), ImageCms.createProfile("sRGB"), "RGB", "RGB"
    )
    expected = np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))
    color = picture.frames[0].color
    assert color.dtype == dtype and not picture.metadata.icc
    assert np.abs(color / factor - expected).max() <= 1.5
    assert np.abs(expected.astype(int) - pixels).max() > 50
  # Linear values: 0.5 is 188 of 255 in sRGB.
  linear = png(8, 0, [bytes([0, 128, 255])], 3, gAMA=struct.pack(">I", 100_000))
  picture = reading.read_picture(linear, to_srgb=True)
  np.testing.assert_array_equal(picture.frames[0].color, [[0, 188, 255]])
  assert not picture.metadata.png


def test_lossless_and_lossy_formats():
  smooth = np.linspace(0, 255, 40 * 60 * 3).reshape(40, 60, 3).astype(np.uint8)
  rgba = np.dstack([smooth, noise((40, 60))])
  for pixels in (smooth, rgba):
    data = written("webp", [pixels])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
  for name, quality, most in (("jpg", None, 6), ("avif", None, 10), ("webp", 90, 14)):
    data = written(name, [smooth], quality=quality)
    decoded = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert decoded.shape == smooth.shape and np.abs(decoded.astype(int) - smooth).mean() < most / 3
  assert len(written("jpg", [rgba[..., :3]], quality=30)) < len(written("jpg", [smooth]))
  over_white = np.asarray(
    Image.open(io.BytesIO(written("jpg", [np.full((16, 16, 4), 0, np.uint8)])))
  )
  assert over_white.min() >= 254
  grey = Image.open(io.BytesIO(written("jpg", [smooth[..., 0]])))
  assert grey.mode == "L"
  deep = noise((16, 16, 3), np.uint16) // 4096 * 4096
  avif = reading.read_picture(written("avif", [deep], quality=100)).frames[0].color
  assert avif.dtype == np.uint16


@pytest.mark.parametrize("name", ["png", "webp", "gif"])
def test_animations(name):
  frames = [np.full((12, 14, 3), 60 * i, np.uint8) for i in range(4)]
  frames[3] = frames[2]  # equal frames are not lost: their time is
  data = written(name, frames, Metadata(loop=3), durations=(100, 200, 300, 400))
  with Image.open(io.BytesIO(data)) as image:
    total = 0
    for i in range(image.n_frames):
      image.seek(i)
      image.load()
      total += image.info["duration"]
      color = np.asarray(image.convert("RGB")).astype(int)
      assert np.abs(color - frames[i]).max() <= 1
    assert total == 1000 and image.info["loop"] == 3
    assert name != "png" or image.n_frames == 4
  picture = reading.read_picture(data)
  assert picture.animated and sum(frame.duration for frame in picture.frames) == 1000
  first = reading.read_picture(data, first_frame=True)
  assert len(first.frames) == 1 and first.notes[0].startswith("The first of ")


@pytest.mark.parametrize("name", ["png", "webp", "gif"])
def test_transparent_animations(name):
  rng = np.random.default_rng(0)
  frames = []
  for _ in range(3):
    color = rng.integers(0, 256, (200, 3), np.uint8)[rng.integers(0, 200, (20, 30))]
    frames.append(np.dstack([color, np.where(rng.random((20, 30)) < 0.3, 0, 255)]).astype(np.uint8))
  data = written(name, frames, durations=(100, 100, 100))
  with Image.open(io.BytesIO(data)) as image:
    assert image.n_frames == 3
    for i, frame in enumerate(frames):
      image.seek(i)
      decoded = np.asarray(image.convert("RGBA"))
      np.testing.assert_array_equal(decoded[..., 3], frame[..., 3])
      np.testing.assert_array_equal(decoded[frame[..., 3] > 0], frame[frame[..., 3] > 0])


def test_the_poster_of_an_animated_png():
  frames = [np.full((12, 14, 3), 60 * i, np.uint8) for i in range(3)]
  data = written("png", frames, durations=(0, 100, 200), poster=True)
  with Image.open(io.BytesIO(data)) as image:
    assert image.info["default_image"] and image.n_frames == 3
  picture = reading.read_picture(data)
  assert picture.poster and len(picture.frames) == 3
  for frame, expected in zip(picture.frames, frames, strict=True):
    np.testing.assert_array_equal(frame.color, expected)


def test_pages_of_different_sizes_without_their_previews():
  pages = [noise((20, 30, 3), np.uint16), noise((40, 10, 3), np.uint16, seed=1)]
  file = io.BytesIO()
  with tifffile.TiffWriter(file) as tiff:
    for page in pages:
      tiff.write(page, photometric="rgb")
      tiff.write(page[::2, ::2], photometric="rgb", subfiletype=1)
  picture = reading.read_picture(file.getvalue())
  assert not picture.animated and reading.read_header(file.getvalue()).pages == 2
  data = written("tiff", [frame.color for frame in picture.frames])
  with tifffile.TiffFile(io.BytesIO(data)) as tiff:
    assert len(tiff.pages) == 2
    for page, expected in zip(tiff.pages, pages, strict=True):
      np.testing.assert_array_equal(page.asarray(), expected)


@pytest.mark.parametrize(
  ("name", "sizes", "durations", "match"),
  [
    ("webp", [(100, 16_384)], (), "16384x100 pixels are more than the 16383 .* --format=png"),
    ("jpg", [(65_501, 10)], (), "more than the 65500 a side"),
    ("jpg", [(8, 8)] * 2, (1.0, 1.0), "jpg does not hold the 2 frames .* --format=png"),
    ("png", [(8, 8)] * 2, (), "png does not hold the 2 pages .* --format=tiff"),
  ],
)
def test_the_limits_of_formats(name, sizes, durations, match):
  layout = writing.Layout(tuple(sizes), 3, np.dtype(np.uint8), durations)
  with pytest.raises(ValueError, match=match):
    writing.fit(layout, name)


def test_what_a_format_cannot_hold_is_said():
  layout = writing.Layout(((8, 8),), 4, np.dtype(np.float32))
  fitted, notes = writing.fit(layout, "jpg")
  assert fitted.dtype == np.uint8 and len(notes) == 2
  assert writing.fit(layout, "png")[0].dtype == np.uint16
  assert writing.fit(layout, "tiff") == (layout, [])


def test_data_that_a_format_cannot_hold_are_named():
  gamma = (b"gAMA", (100_000).to_bytes(4, "big"))
  linear = Metadata(png=(gamma, (b"tEXt", b"Title\0x")))
  assert writing.lost(linear, "png") == []
  assert [note.split(":")[0] for note in writing.lost(linear, "jpg")] == [
    "jpg holds no gamma of a PNG",
    "jpg holds no texts as PNG does",
  ]
  assert writing.lost(Metadata(png=(gamma, (b"sRGB", b"\0"))), "jpg") == []
  assert writing.lost(Metadata(png=((b"gAMA", (45_455).to_bytes(4, "big")),)), "webp") == []


def test_a_jpeg_without_a_resolution_says_72_dpi():
  layout = writing.Layout(((8, 8),), 3, np.dtype(np.uint8))
  for dpi, expected in ((None, 72), ((300.0, 300.0), 300)):
    file = io.BytesIO()
    writing.write(file, "jpg", layout, [[noise((8, 8, 3))]], Metadata(dpi=dpi))
    with Image.open(io.BytesIO(file.getvalue())) as image:
      assert round(image.info["dpi"][0]) == expected


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "AVIF"])
def test_damaged_files_are_refused_in_one_line(kind):
  file = io.BytesIO()
  Image.fromarray(noise((64, 64, 3))).save(file, kind)
  for damaged in (file.getvalue()[: len(file.getvalue()) // 2], file.getvalue()[:20], b""):
    with pytest.raises(ValueError, match="must be a whole image") as error:
      reading.read_picture(damaged)
    assert "\n" not in str(error.value) and " at 0x" not in str(error.value)


def test_images_are_known_by_their_content(tmp_path):
  for kind in (
    "PNG",
    "JPEG",
    "BMP",
    "WEBP",
    "TIFF",
    "GIF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "ICO",
    "DDS",
  ):
    Image.fromarray(noise((16, 16, 3))).save(tmp_path / "file.txt", kind)
    assert reading.read_header(tmp_path / "file.txt").format == kind
    assert reading.read_picture(tmp_path / "file.txt").frames[0].color.shape == (16, 16, 3)
  Image.fromarray(noise((16, 16, 3))).save(tmp_path / "file.tga", "TGA")
  assert reading.read_header(tmp_path / "file.tga").format == "TGA"
  for text in (b"", b"no image", b"%!PS-Adobe", b"<svg/>"):
    (tmp_path / "file.txt").write_bytes(text)
    assert reading.read_header(tmp_path / "file.txt") is None


def test_large_images_are_refused_by_their_header():
  file = io.BytesIO()
  Image.new("1", (20_000, 20_000)).save(file, "PNG")
  with pytest.raises(ValueError, match="20000x20000 pixels are more than max_pixels=1000"):
    reading.read_picture(file.getvalue(), max_pixels=1000)
  frames = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(3)]
  file = io.BytesIO()
  frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
  with pytest.raises(ValueError, match="20x20 pixels in 3 frames are more than max_pixels=1000"):
    reading.read_picture(file.getvalue(), max_pixels=1000)
  assert len(reading.read_picture(file.getvalue(), max_pixels=1000, first_frame=True).frames) == 1


def test_a_portable_map_of_16_bits():
  pixels = noise((5, 7, 3), np.uint16)
  data = b"P6\n# made by hand\n7 5\n65535\n" + pixels.astype(">u2").tobytes()
  np.testing.assert_array_equal(reading.read_picture(data).frames[0].color, pixels)


def test_a_file_is_whole_or_not_there(tmp_path):
  path = tmp_path / "new" / "file"
  with pytest.raises(OSError, match="No space"):
    with writing.new_file(path) as file:
      file.write(b"half")
      raise OSError(28, "No space left on device")
  assert not list(path.parent.iterdir())
  with writing.new_file(path) as file:
    file.write(b"all")
  assert path.read_bytes() == b"all" and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "tiff", "avif"])
def test_errors_of_the_disk_and_of_the_rows_come_through(name):
  class Full(io.BytesIO):
    def write(self, data):
      raise OSError(28, "No space left on device")

  layout = writing.Layout(((64, 64),), 3, np.dtype(np.uint8))
  with pytest.raises(OSError, match="No space left"):
    writing.write(Full(), name, layout, [iter([noise((64, 64, 3))])])

  def broken():
    yield noise((10, 64, 3))
    raise ArithmeticError("from the network")

  with pytest.raises(ArithmeticError, match="from the network"):
    writing.write(io.BytesIO(), name, layout, [broken()])
