"""Writes pictures from strips of rows, so that the whole image is never in memory.

PNG is written by `png.py`, TIFF by tifffile, JPEG, WebP and AVIF by libvips, which reads rows from
a stream, and animated WebP and GIF by Pillow, which wants all frames at once.
"""

import contextlib
import errno
import io
import os
import pathlib
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin
import pyvips
import tifffile

from sr_jax import UserError
from sr_jax.images import exif as exif_data
from sr_jax.images import png
from sr_jax.images.picture import WHITE, Metadata
from sr_jax.machine import writing

PathLike = str | os.PathLike


NOTHING = Metadata()


class Format(NamedTuple):
  """What a format can hold.

  Attributes:
    suffixes: the first is what files get, the others are left as they are.
    largest: pixels a side.
    dtypes: of pixels; the last one takes what is deeper.
    alpha: whether it holds transparency.
    several: 'animation', 'pages' or '', what several images in a file are.
  """

  suffixes: tuple[str, ...]
  largest: int
  dtypes: tuple[str, ...]
  alpha: bool
  several: str


FORMATS = {
  "png": Format((".png", ".apng"), 2**31 - 1, ("uint8", "uint16"), True, "animation"),
  "jpg": Format((".jpg", ".jpeg", ".jpe", ".jfif"), 65_500, ("uint8",), False, ""),
  "webp": Format((".webp",), 16_383, ("uint8",), True, "animation"),
  "tiff": Format((".tif", ".tiff"), 2**31 - 1, ("uint8", "uint16", "float32"), True, "pages"),
  "avif": Format((".avif",), 16_384, ("uint8", "uint16"), True, ""),
  "gif": Format((".gif",), 65_535, ("uint8",), True, "animation"),
}
# By Pillow's name of a format that is read: the format that holds the same. Others become PNG.
SAME = {
  "PNG": "png",
  "JPEG": "jpg",
  "MPO": "jpg",
  "WEBP": "webp",
  "TIFF": "tiff",
  "AVIF": "avif",
  "GIF": "gif",
}
QUALITY = {"jpg": 95, "avif": 90}  # WebP is lossless unless a quality is asked for


class Layout(NamedTuple):
  """The images that are to be written.

  Attributes:
    sizes: height and width of each.
    channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
    dtype: of the pixels.
    durations: of an animation's frames, in milliseconds; empty for pages.
    poster: whether an animation's first frame is not part of it.
  """

  sizes: tuple[tuple[int, int], ...]
  channels: int
  dtype: np.dtype
  durations: tuple[float, ...] = ()
  poster: bool = False


def fit(layout: Layout, name: str) -> tuple[Layout, list[str]]:
  """Says as what a format holds images: fewer bits, no alpha.

  Args:
    layout: the images.
    name: a key of FORMATS.

  Returns:
    The layout that `write` takes for this format, and what is lost, in whole sentences.

  Raises:
    UserError: the format cannot hold images of this size, or several of them.
  """
  kind, notes = FORMATS[name], []
  height, width = (max(side) for side in zip(*layout.sizes, strict=True))
  if max(height, width) > kind.largest:
    others = [n for n in ("png", "tiff") if max(height, width) <= FORMATS[n].largest]
    raise UserError(
      f"{width}x{height} pixels are more than the {kind.largest} a side that {name} holds; "
      f"choose --format={others[0]}, or a smaller --outscale"
    )
  if len(layout.sizes) > 1:
    several = "animation" if layout.durations else "pages"
    # A document's pages can be seen one after the other; of an animation pages lose the times.
    if kind.several != several:
      best = "tiff" if several == "pages" else "png"
      raise UserError(
        f"{name} does not hold the {len(layout.sizes)} {'frames' if layout.durations else 'pages'} "
        f"of this file; choose --format={best}, or --first-frame"
      )
    if several == "animation" and len(set(layout.sizes)) > 1:
      raise UserError("the frames of an animation must have one size; choose --first-frame")
  dtype = layout.dtype.name
  if dtype not in kind.dtypes:
    bits = {"uint8": "8 bits", "uint16": "16 bits", "float32": "floats"}
    notes.append(f"{name} holds {bits[kind.dtypes[-1]]}: {bits[dtype]} were rounded once.")
    layout = layout._replace(dtype=np.dtype(kind.dtypes[-1]))
  if layout.channels in (2, 4) and not kind.alpha:
    notes.append(f"{name} holds no transparency: what is transparent became white.")
  return layout, notes


def lost(metadata: Metadata, name: str) -> list[str]:
  """Says what of a file's data, beside its pixels, a format does not hold, in whole sentences."""
  if name == "png":
    return []
  chunks, notes = dict(metadata.png), []
  told = metadata.icc or b"sRGB" in chunks
  gamma = int.from_bytes(chunks.get(b"gAMA", b""), "big")
  if gamma and not told and not 43_000 < gamma < 48_000:  # 45,455 is about sRGB's
    notes.append(
      f"{name} holds no gamma of a PNG: the colours will look different; --to-srgb converts them."
    )
  texts = [data for kind, data in metadata.png if kind in (b"tEXt", b"zTXt", b"iTXt")]
  if any(not data.startswith(b"XML:com.adobe.xmp\0") for data in texts):
    notes.append(f"{name} holds no texts as PNG does: they were left out.")
  return notes


def write(
  file: BinaryIO,
  name: str,
  layout: Layout,
  images: Sequence[Iterable[np.ndarray]],
  metadata: Metadata = NOTHING,
  quality: int | None = None,
) -> None:
  """Writes images into an opened file.

  Args:
    file: binary; for TIFF it is also read and sought in.
    name: a key of FORMATS.
    layout: as `fit` returns it.
    images: for each image strips of rows from the top down, [n, W, channels] of the layout's dtype.
    metadata: what is written beside the pixels, as far as the format holds it.
    quality: 1 to 100, of JPEG, WebP and AVIF; by default QUALITY.

  Raises:
    OSError: it cannot be written.
  """
  if name == "png":
    encoded = png.encode(
      images,
      (*layout.sizes[0], layout.channels),
      layout.dtype,
      chunks=_png_chunks(metadata, layout.channels),
      durations=layout.durations,
      loop=metadata.loop,
      poster=layout.poster,
    )
    for data in encoded:
      file.write(data)
  elif name == "tiff":
    _write_tiff(file, layout, images, metadata)
  elif name == "gif" or len(layout.sizes) > 1:
    _write_by_pillow(file, name, layout, images, metadata, quality)
  else:
    _write_by_vips(file, name, layout, images[0], metadata, quality)


@contextlib.contextmanager
def new_file(path: PathLike) -> Iterator[BinaryIO]:
  """Opens a file that is whole or not there: it gets its name when it has been written to the end.

  Folders are made as needed.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with writing.new_file(path) as file:
    yield file


def check_folder(folder: PathLike) -> None:
  """Checks that files can be written into a folder; it is made if it is not there.

  Raises:
    OSError: they cannot.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=folder) as file:
    file.write(b"\0")


def _profile(metadata: Metadata, channels: int) -> bytes:
  """The colour profile, unless it is one of other channels than the pixels have."""
  space = metadata.icc[16:20]
  fits = (b"GRAY",) if channels < 3 else (b"RGB ",)
  return metadata.icc if space in fits else b""


def _png_chunks(metadata: Metadata, channels: int) -> list[tuple[bytes, bytes]]:
  chunks = list(metadata.png)
  names = {name for name, _ in chunks}
  if icc := _profile(metadata, channels):
    chunks = [png.profile_chunk(icc), *(entry for entry in chunks if entry[0] != b"sRGB")]
  if metadata.dpi and b"pHYs" not in names:
    per_metre = [round(dpi / 0.0254).to_bytes(4, "big") for dpi in metadata.dpi]
    chunks.append((b"pHYs", b"".join(per_metre) + b"\1"))
  if metadata.exif:
    chunks.append((b"eXIf", metadata.exif))
  has_xmp = any(data.startswith(b"XML:com.adobe.xmp\0") for _, data in chunks)
  if metadata.xmp and not has_xmp:
    chunks.append(png.text_chunk("XML:com.adobe.xmp", metadata.xmp.decode("utf-8", "replace")))
  return chunks


_ROWS = 64  # of a TIFF's strip


def _write_tiff(
  file: BinaryIO, layout: Layout, images: Sequence[Iterable[np.ndarray]], metadata: Metadata
) -> None:
  size = sum(h * w for h, w in layout.sizes) * layout.channels * layout.dtype.itemsize
  large = size > 3 * 2**30
  options = {}
  if icc := _profile(metadata, layout.channels):
    options["iccprofile"] = icc
  if metadata.dpi:
    options |= {"resolution": metadata.dpi, "resolutionunit": "INCH"}
  tags = []
  if metadata.xmp:
    tags.append((700, 7, len(metadata.xmp), metadata.xmp, True))
  ifds = _exif_ifds(metadata.exif)
  for tag, value in ifds.pop(None, {}).items():
    text = str(value).encode("utf-8", "replace") + b"\0"
    tags.append((tag, 2, len(text), text, True))
  with tifffile.TiffWriter(file, bigtiff=large, byteorder="<") as writer:
    for (height, width), strips in zip(layout.sizes, images, strict=True):
      writer.write(
        _tiff_strips(strips, layout.dtype),
        shape=(height, width) if layout.channels == 1 else (height, width, layout.channels),
        dtype=layout.dtype,
        photometric="rgb" if layout.channels > 2 else "minisblack",
        extrasamples=["unassalpha"] if layout.channels in (2, 4) else None,
        planarconfig="contig" if layout.channels > 1 else None,
        compression="adobe_deflate",
        predictor=layout.dtype.kind == "u",
        rowsperstrip=_ROWS,
        metadata=None,
        software=False,
        extratags=tags,
        **options,
      )
      tags = []  # they are the first page's
  if ifds and not large:
    _append_ifds(file, ifds)


def _tiff_strips(strips: Iterable[np.ndarray], dtype: np.dtype) -> Iterator[bytes]:
  """Compresses rows in strips of _ROWS; whole numbers as differences of neighbours."""
  for rows in evenly(strips, _ROWS):
    if dtype.kind == "u":
      rows = np.concatenate([rows[:, :1], rows[:, 1:] - rows[:, :-1]], axis=1)
    yield zlib.compress(np.ascontiguousarray(rows, dtype.newbyteorder("<")).tobytes(), 6)


def evenly(strips: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
  """Cuts strips of rows anew, into strips of `count` rows; the last may have fewer."""
  waiting: list[np.ndarray] = []
  for strip in strips:
    while len(strip):
      missing = count - sum(map(len, waiting))
      waiting.append(strip[:missing])
      strip = strip[missing:]
      if len(waiting[-1]) == missing:
        yield np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
        waiting = []
  if waiting:
    yield np.concatenate(waiting)


def _exif_ifds(exif: bytes) -> dict[int | None, dict]:
  """Splits EXIF data: under None texts, which TIFF has as tags of its own, and two IFDs."""
  if not exif:
    return {}
  tags = Image.Exif()
  try:
    tags.load(exif)
    found = {ifd: dict(tags.get_ifd(ifd)) for ifd in exif_data.IFDS}
  except Exception:  # whatever Pillow raises on damaged data
    return {}
  texts = {int(tag): tags[tag] for tag in exif_data.DESCRIBING if tag in tags}
  return {None: texts} | {ifd: entries for ifd, entries in found.items() if entries}


def _append_ifds(file: BinaryIO, ifds: dict[int, dict]) -> None:
  """Writes EXIF's IFDs at the end of a little-endian TIFF, and its first IFD anew with them."""

  def append(data: bytes) -> int:
    file.seek(0, os.SEEK_END)
    file.write(b"\0" * (file.tell() % 2))
    start = file.tell()
    file.write(data)
    return start

  entries = []
  for tag, values in ifds.items():
    file.seek(0, os.SEEK_END)
    start = file.tell() + file.tell() % 2
    ifd = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    try:
      for key, value in values.items():
        ifd[key] = value
      data = ifd.tobytes(start)
    except Exception:  # an entry that Pillow read and cannot write
      continue
    entries.append(struct.pack("<HHII", tag, 4, 1, append(data)))
  file.seek(4)
  (first,) = struct.unpack("<I", file.read(4))
  file.seek(first)
  (count,) = struct.unpack("<H", file.read(2))
  entries += [file.read(12) for _ in range(count)]
  entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
  following = file.read(4)
  start = append(struct.pack("<H", len(entries)) + b"".join(entries) + following)
  file.seek(4)
  file.write(struct.pack("<I", start))


def _opaque(strips: Iterable[np.ndarray], dtype: np.dtype) -> Iterator[np.ndarray]:
  """Composites strips whose last channel is alpha over white."""
  white = WHITE[dtype]
  for strip in strips:
    alpha = strip[..., -1:].astype(np.float64) / white
    color = strip[..., :-1] * alpha + white * (1 - alpha)
    yield np.floor(color + 0.5).astype(dtype)


def _write_by_vips(
  file: BinaryIO,
  name: str,
  layout: Layout,
  strips: Iterable[np.ndarray],
  metadata: Metadata,
  quality: int | None,
) -> None:
  height, width = layout.sizes[0]
  channels = layout.channels
  if channels in (2, 4) and not FORMATS[name].alpha:
    strips, channels = _opaque(strips, layout.dtype), channels - 1
  stored = png.encode([strips], (height, width, channels), layout.dtype, level=0)
  errors: list[BaseException] = []
  source, target = pyvips.SourceCustom(), pyvips.TargetCustom()
  source.on_read(_reader(stored, errors))

  def on_write(data: bytes) -> int:
    try:
      file.write(data)
      return len(data)
    except OSError as error:
      errors.append(error)
      return -1

  target.on_write(on_write)
  try:
    image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error").copy()
    blobs = {
      "icc-profile-data": _profile(metadata, channels),
      "exif-data": exif_data.PREFIX + metadata.exif if metadata.exif else b"",
      "xmp-data": metadata.xmp,
    }
    for field, data in blobs.items():
      if data:
        image.set_type(pyvips.GValue.blob_type, field, data)
    x, y = metadata.dpi or (0, 0)
    # Of a file that says nothing, JPEG and EXIF say 72 dpi, as is usual.
    image = image.copy(xres=(x or 72) / 25.4, yres=(y or 72) / 25.4)
    if metadata.dpi:
      image.set_type(pyvips.GValue.gstr_type, "resolution-unit", "in")
    if name == "jpg":
      image.jpegsave_target(target, Q=quality or QUALITY[name])
    elif name == "webp" and quality is None:
      image.webpsave_target(target, lossless=True, exact=True)
    elif name == "webp":
      image.webpsave_target(target, Q=quality)
    else:
      depth = {"bitdepth": 8 if layout.dtype == np.uint8 else 12}
      image.heifsave_target(target, compression="av1", Q=quality or QUALITY[name], **depth)
  except pyvips.Error as error:
    if errors:
      raise errors[0] from None
    full = "No space left" in str(error)
    raise OSError(errno.ENOSPC if full else errno.EIO, " ".join(str(error).split())) from None
  if errors:
    raise errors[0]


def _reader(pieces: Iterator[bytes], errors: list[BaseException]) -> Callable[[int], bytes]:
  """Makes a function that returns up to n bytes of joined pieces.

  libvips calls it, which knows no exceptions: one of the pieces' ends the stream, and is kept.
  """
  waiting = memoryview(b"")

  def read(n: int) -> bytes:
    nonlocal waiting
    try:
      while not waiting:
        waiting = memoryview(next(pieces))
    except StopIteration:
      return b""
    except BaseException as error:
      errors.append(error)
      return b""
    data, waiting = waiting[:n], waiting[n:]
    return bytes(data)

  return read


def _write_by_pillow(
  file: BinaryIO,
  name: str,
  layout: Layout,
  images: Sequence[Iterable[np.ndarray]],
  metadata: Metadata,
  quality: int | None,
) -> None:
  frames = []
  for strips in list(images)[layout.poster :]:
    pixels = np.concatenate(list(strips))
    if name == "gif" and layout.channels in (2, 4):
      frames.append(_with_transparent_color(pixels))
    else:
      frames.append(Image.fromarray(pixels[..., 0] if layout.channels == 1 else pixels))
  options = {"exif": metadata.exif} if metadata.exif and name == "webp" else {}
  if icc := _profile(metadata, layout.channels):
    options["icc_profile"] = icc
  if len(frames) > 1:
    durations = [round(ms) for ms in layout.durations[layout.poster :]]
    options |= {"save_all": True, "append_images": frames[1:], "duration": durations}
    if name == "gif" and layout.channels in (2, 4):
      options["disposal"] = 2  # else a frame would show through the next one
    if name == "webp" or metadata.loop != 1:  # a GIF without the entry is shown once
      options["loop"] = metadata.loop
  if name == "webp":
    options |= {"lossless": quality is None, "quality": quality or 80, "exact": True}
  written = io.BytesIO()  # Pillow seeks, a pipe cannot
  frames[0].save(written, "WEBP" if name == "webp" else "GIF", **options)
  file.write(written.getbuffer())


def _with_transparent_color(pixels: np.ndarray) -> Image.Image:
  """An image with a palette whose last colour is transparent: what is less than half opaque."""
  height, width = pixels.shape[:2]
  opaque = pixels[..., -1] >= 128
  rgb = np.broadcast_to(pixels[..., :-1], (height, width, 3)) * opaque[..., None]
  packed = (rgb.astype(np.uint32) * [2**16, 2**8, 1]).sum(axis=2)
  colors, index = np.unique(packed, return_inverse=True)
  palette = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1).astype(np.uint8)
  if len(colors) > 255:
    reduced = Image.fromarray(rgb.astype(np.uint8)).quantize(255)
    palette, index = np.array(reduced.getpalette(), np.uint8).reshape(-1, 3), np.asarray(reduced)
  index = np.where(opaque, index.reshape(height, width), 255).astype(np.uint8)
  image = Image.fromarray(index).convert("P")
  image.putpalette(np.pad(palette[:255], ((0, 256 - len(palette[:255])), (0, 0))).tobytes())
  image.info["transparency"] = 255
  return image
