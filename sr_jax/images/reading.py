"""Reads an image file whole: 8 and 16 bit and float, grey and colour, alpha, profile, every frame.

Pillow says what a file is and decodes what fits 8 bits; libvips decodes PNG, and AVIF of more bits.
Pixels are decoded in `decoding.py`, TIFFs are read in `tiff.py`. What training and scores read goes
through `files.py`, as 8-bit RGB.
"""

import errno
import logging
import os
import pathlib
import re

from PIL import ExifTags, Image

from sr_jax import UserError
from sr_jax.images import colours
from sr_jax.images import decoding
from sr_jax.images import exif as exif_data
from sr_jax.images import opening
from sr_jax.images import png
from sr_jax.images import tiff
from sr_jax.images.opening import Source
from sr_jax.images.picture import Frame, Header, Metadata, Picture

# A file that is called so should be an image: if it is none, it is damaged.
SUFFIXES = (
  ".apng .avif .avifs .bmp .dds .dib .gif .icns .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .mpo "
  ".pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .ras .sgi .tga .tif .tiff .webp .xbm .xpm"
).split()
for _chatty in ("pyvips", "tifffile"):  # what they would print, errors say in one line
  logging.getLogger(_chatty).setLevel(logging.CRITICAL)
MAX_PIXELS = 400_000_000


def read_header(source: Source) -> Header | None:
  """Says by its content what an image file is; None if it is none, or damaged from the start.

  Only TGA, which has no mark to know it by, is known by its suffix.

  Raises:
    OSError: the file cannot be opened.
  """
  _check_plain(source)
  try:
    if tiff.is_tiff(source):
      return tiff.read_header(source)
    with opening.opened(source) as image:
      sideways = _orientation(image) >= 5
      size = image.size if sideways else image.size[::-1]
      return Header(image.format, size, floats=image.mode == "F")
  except (FileNotFoundError, PermissionError, IsADirectoryError):
    raise
  except Exception:  # Pillow's plugins raise nearly anything on a damaged file
    return None


def read_picture(
  source: Source,
  *,
  max_pixels: int = MAX_PIXELS,
  first_frame: bool = False,
  to_srgb: bool = False,
) -> Picture:
  """Reads all of an image file.

  The rules where a file is not simply grey or RGB: 1-bit images become grey of 8 bits. A palette
  becomes RGB, or grey if all colours that are used are grey. CMYK and Lab become sRGB, by their
  profile where there is one. Whole numbers of more than 16 bits must fit 16. What is associated
  (multiplied) with alpha in a TIFF is divided by it.

  Args:
    source: a path, or the bytes of a file.
    max_pixels: a larger image is refused by its header, before a pixel is decoded; so are frames
      that have more together.
    first_frame: whether to read the first frame only.
    to_srgb: whether to convert the pixels to sRGB by the file's profile or gamma, and drop these.

  Raises:
    UserError: it is no readable image of the known formats, or it is too large.
    OSError: the file cannot be opened.
  """
  name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
  _check_plain(source)
  try:
    if tiff.is_tiff(source):
      return tiff.read(source, max_pixels, first_frame, to_srgb)
    with opening.opened(source) as image:
      return _read(image, source, max_pixels, first_frame, to_srgb)
  except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
    raise
  except UserError as error:
    raise UserError(f"{name}: {error}") from error
  except Exception as error:  # as in `read_header`
    told = " ".join(str(error).split()) or type(error).__name__
    told = told.removeprefix("unable to write to memory ")
    if "cannot identify image file" in told:
      told = "it is empty" if not _size(source) else "its content is no image that is known"
    told = re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", told)
    raise UserError(
      f"{name}: {told}; the file must be a whole image; repair or remove it"
    ) from error


def _check_plain(source: Source) -> None:
  """Refuses a pipe or a device, from which reading may never end."""
  if not isinstance(source, bytes) and not (os.path.isfile(source) or os.path.isdir(source)):
    os.stat(source)  # raises FileNotFoundError
    raise OSError(
      errno.EINVAL, "it is a pipe or a device; give a file, or --input - for standard input"
    )


def _size(source: Source) -> int:
  return len(source) if isinstance(source, bytes) else pathlib.Path(source).stat().st_size


def _read(
  image: Image.Image, source: Source, max_pixels: int, first_frame: bool, to_srgb: bool
) -> Picture:
  """Reads a file that Pillow has opened: every frame of an animation, else the main image."""
  animated = image.format in ("GIF", "WEBP", "PNG", "AVIF")
  count = min(getattr(image, "n_frames", 1), opening.MANY) if animated else 1
  metadata = _metadata(image)
  width, height = image.size
  opening.check_size(width * height * (1 if first_frame else count), image.size, count, max_pixels)
  poster = bool(image.info.get("default_image")) and count > 1 and not first_frame
  frames, notes = [], ()
  if count > 1 and first_frame:
    notes = (f"The first of {count} frames was taken.",)
  for number in range(1 if first_frame else count):
    if count > 1:
      image.seek(number)
    color, alpha = _decode(image, source, count)
    if to_srgb:
      color = colours.to_srgb(color, metadata)
    frames.append(Frame(color, alpha, float(image.info.get("duration", 0) or 0)))
  if to_srgb or image.mode in _CONVERTED:
    metadata = colours.without_profile(metadata)
  return Picture(image.format, tuple(frames), metadata, len(frames) > 1, poster, notes)


_CONVERTED = ("CMYK", "LAB", "YCbCr", "HSV")  # modes of Pillow that become sRGB


def _metadata(image: Image.Image) -> Metadata:
  """Reads what stands beside the pixels, before these are decoded."""
  info, chunks, exif = image.info, {}, _bytes(image.info, "exif")
  if image.format == "PNG":
    chunks = _png_chunks(image)
    exif = chunks.get(b"eXIf", [exif])[0]
  dpi = info.get("dpi")
  tags = image.getexif() if image.format in ("JPEG", "MPO") and exif else {}
  if not info.get("jfif_unit") and 282 in tags and 283 in tags:  # Pillow takes the first for both
    factor = 2.54 if tags.get(296) == 3 else 1
    dpi = (factor * tags[282], factor * tags[283])
  dpi = (float(dpi[0]), float(dpi[1])) if dpi and min(dpi) > 1 else None
  kept = [(name, data) for name in png.KEPT for data in chunks.get(name, ())]
  if _orientation(image) >= 5:
    dpi = dpi and dpi[::-1]
    kept = [(n, d[4:8] + d[:4] + d[8:] if n == b"pHYs" else d) for n, d in kept]
  comment = _bytes(info, "comment")
  if comment and image.format in ("JPEG", "MPO", "GIF"):
    kept.append(png.text_chunk("Comment", comment.decode("utf-8", "replace").rstrip("\0")))
  return Metadata(
    icc=_bytes(info, "icc_profile"),
    exif=exif_data.upright(exif),
    xmp=exif_data.upright_xmp(_bytes(info, "xmp")),
    dpi=dpi,
    png=tuple(kept),
    loop=int(info.get("loop", 1 if image.format == "GIF" else 0) or 0),
  )


def _bytes(info: dict, key: str) -> bytes:
  """Returns an entry of Pillow's `info` as bytes, b'' if it is absent."""
  value = info.get(key) or b""
  return value.encode() if isinstance(value, str) else bytes(value)


def _png_chunks(image: Image.Image) -> dict[bytes, list[bytes]]:
  before = image.fp.tell()
  chunks = png.read_chunks(image.fp)
  image.fp.seek(before)
  return chunks


def _decode(image: Image.Image, source: Source, count: int) -> decoding.Decoded:
  """Decodes the frame that an opened image stands at: its colour and its alpha, upright."""
  orientation = _orientation(image)
  if image.format == "PNG" and count == 1:
    color, alpha = decoding.by_vips(source)
    if image.mode == "P":
      color = colours.grey_if_grey(color)
  elif image.format == "AVIF" and count == 1 and decoding.load(source).format == "ushort":
    orientation = 1  # libheif turns it upright
    color, alpha = decoding.by_vips(source)
  elif image.format == "PPM" and (deep := decoding.deep_ppm(source)) is not None:
    color, alpha = deep, None
  else:
    image.load()
    color, alpha = decoding.of_pillow(image)
  return decoding.upright((color, alpha), orientation)


def _orientation(image: Image.Image) -> int:
  if image.format == "PNG":
    exif = _png_chunks(image).get(b"eXIf", [b""])[0]
    return exif_data.orientation(exif) if exif else 1
  value = image.getexif().get(ExifTags.Base.Orientation, 1)
  return value if value in range(1, 9) else 1
