"""Reads an image file whole: 8 and 16 bit and float, grey and colour, alpha, profile, every frame.

Pillow says what a file is and decodes what fits 8 bits; libvips decodes PNG, and TIFF and AVIF of
more bits. What training and scores read goes through `files.py`, as 8-bit RGB.
"""

import contextlib
import errno
import io
import logging
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms
import pyvips
import tifffile

from sr_jax import UserError
from sr_jax.images import exif as exif_data
from sr_jax.images import png
from sr_jax.images.opening import open_unlimited
from sr_jax.images.picture import WHITE, Frame, Metadata, Picture

# What Pillow decodes by itself: nothing that calls another program, as it does for PostScript.
FORMATS = (
  "AVIF BMP CUR DDS DIB GIF ICNS ICO JPEG JPEG2000 PCX PNG PPM PSD QOI SGI SUN TIFF WEBP XBM XPM"
).split()
# A file that is called so should be an image: if it is none, it is damaged.
SUFFIXES = (
  ".apng .avif .avifs .bmp .dds .dib .gif .icns .ico .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .mpo "
  ".pbm .pcx .pfm .pgm .png .pnm .ppm .psd .qoi .ras .sgi .tga .tif .tiff .webp .xbm .xpm"
).split()
for _chatty in ("pyvips", "tifffile"):  # what they would print, errors say in one line
  logging.getLogger(_chatty).setLevel(logging.CRITICAL)
MAX_PIXELS = 400_000_000
_MANY = 10_000  # frames

PathLike = str | os.PathLike
Source = PathLike | bytes


class Header(NamedTuple):
  """What is known of an image file before a pixel is decoded.

  Attributes:
    format: 'PNG', 'JPEG', ..., as `Picture` has it.
    size: height and width of the first image, turned upright.
    pages: of a document; 1 for every other file.
    floats: whether its pixels are floats.
  """

  format: str
  size: tuple[int, int]
  pages: int = 1
  floats: bool = False


def read_header(source: Source) -> Header | None:
  """Says by its content what an image file is; None if it is none, or damaged from the start.

  Only TGA, which has no mark to know it by, is known by its suffix.

  Raises:
    OSError: the file cannot be opened.
  """
  _check_plain(source)
  try:
    if _is_tiff(source):
      return _tiff_header(source)
    with _opened(source) as image:
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
    if _is_tiff(source):
      return _read_tiff(source, max_pixels, first_frame, to_srgb)
    with _opened(source) as image:
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


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
  is_tga = not isinstance(source, bytes) and os.fspath(source).lower().endswith(".tga")
  with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
    try:
      image = open_unlimited(file, FORMATS)
    except Image.UnidentifiedImageError:
      if not is_tga:
        raise
      image = open_unlimited(file, ["TGA"])
    with image:
      yield image


def _read(
  image: Image.Image, source: Source, max_pixels: int, first_frame: bool, to_srgb: bool
) -> Picture:
  """Reads a file that Pillow has opened: every frame of an animation, else the main image."""
  animated = image.format in ("GIF", "WEBP", "PNG", "AVIF")
  count = min(getattr(image, "n_frames", 1), _MANY) if animated else 1
  metadata = _metadata(image)
  width, height = image.size
  _check_size(width * height * (1 if first_frame else count), image.size, count, max_pixels)
  poster = bool(image.info.get("default_image")) and count > 1 and not first_frame
  frames, notes = [], ()
  if count > 1 and first_frame:
    notes = (f"The first of {count} frames was taken.",)
  for number in range(1 if first_frame else count):
    if count > 1:
      image.seek(number)
    color, alpha = _decode(image, source, count)
    if to_srgb:
      color = _to_srgb(color, metadata)
    frames.append(Frame(color, alpha, float(image.info.get("duration", 0) or 0)))
  if to_srgb or image.mode in _CONVERTED:
    metadata = _without_profile(metadata)
  return Picture(image.format, tuple(frames), metadata, len(frames) > 1, poster, notes)


_CONVERTED = ("CMYK", "LAB", "YCbCr", "HSV")  # modes of Pillow that become sRGB


def _check_size(total: int, size: tuple[int, int], count: int, max_pixels: int) -> None:
  if total > max_pixels:
    several = f" in {count} frames" if total > size[0] * size[1] else ""
    raise UserError(
      f"{size[0]}x{size[1]} pixels{several} are more than max_pixels={max_pixels}; shrink the "
      f"image, or allow as many (sr_jax.upscale --max-pixels={total})"
    )


def _without_profile(metadata: Metadata) -> Metadata:
  colour = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
  rest = tuple(entry for entry in metadata.png if entry[0] not in colour)
  return metadata._replace(icc=b"", png=rest)


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


def _decode(image: Image.Image, source: Source, count: int) -> tuple[np.ndarray, np.ndarray | None]:
  """Decodes the frame that an opened image stands at: its colour and its alpha, upright."""
  orientation = _orientation(image)
  if image.format == "PNG" and count == 1:
    color, alpha = _by_vips(source)
    if image.mode == "P":
      color = _grey_if_grey(color)
  elif image.format == "AVIF" and count == 1 and _load(source).format == "ushort":
    orientation = 1  # libheif turns it upright
    color, alpha = _by_vips(source)
  elif image.format == "PPM" and (deep := _deep_ppm(source)) is not None:
    color, alpha = deep, None
  else:
    image.load()
    color, alpha = _of_pillow(image)
  return _upright(color, orientation), None if alpha is None else _upright(alpha, orientation)


def _orientation(image: Image.Image) -> int:
  if image.format == "PNG":
    exif = _png_chunks(image).get(b"eXIf", [b""])[0]
    return exif_data.orientation(exif) if exif else 1
  value = image.getexif().get(ExifTags.Base.Orientation, 1)
  return value if value in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Turns pixels that are stored by an EXIF orientation."""
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  return np.ascontiguousarray(pixels)


def _of_pillow(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
  mode = image.mode
  if mode in ("CMYK", "LAB"):
    return _by_profile(image), None
  if mode.startswith("I"):
    return _whole_numbers(np.asarray(image)), None
  if mode == "F":
    return np.array(image, np.float32), None
  grey = mode in ("1", "L", "LA", "La")
  if image.has_transparency_data:
    pixels = np.asarray(image.convert("RGBA"))
    alpha = np.ascontiguousarray(pixels[..., 3])
    color = np.ascontiguousarray(pixels[..., 0] if grey else pixels[..., :3])
    alpha = None if alpha.min() == 255 else alpha
  else:
    color, alpha = np.array(image.convert("L" if grey else "RGB")), None
  return _grey_if_grey(color) if mode == "P" else color, alpha


def _grey_if_grey(color: np.ndarray) -> np.ndarray:
  """RGB [H, W, 3] as grey [H, W] if no pixel has a colour."""
  if color.ndim == 3 and (color == color[..., :1]).all():
    return np.ascontiguousarray(color[..., 0])
  return color


def _by_vips(source: Source, **options) -> tuple[np.ndarray, np.ndarray | None]:
  """Decodes by libvips, which keeps 16 bits and floats, and knows every form of transparency."""
  loaded = _load(source, **options)
  if loaded.interpretation in ("cmyk", "lab", "labs", "labq", "xyz", "yxy"):
    loaded = loaded.colourspace("rgb16" if loaded.format == "ushort" else "srgb")
  return _split(loaded.numpy())


def _load(source: Source, **options) -> pyvips.Image:
  options = {"access": "sequential", "fail_on": "error", **options}
  pyvips.vips_lib.vips_error_clear()  # or an error tells what was wrong with other files, too
  try:
    os.fspath(source if not isinstance(source, bytes) else "").encode()
  except UnicodeEncodeError:  # a name that is no text, which libvips does not take
    source = pathlib.Path(source).read_bytes()
  if isinstance(source, bytes):
    return pyvips.Image.new_from_buffer(source, "", **options)
  return pyvips.Image.new_from_file(os.fspath(source), **options)


def _split(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  """Splits decoded [H, W] or [H, W, C] of any dtype into colour and alpha; further channels go."""
  pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
  if pixels.dtype.kind == "f":
    pixels = pixels.astype(np.float32)
  elif pixels.dtype not in WHITE:
    pixels = _whole_numbers(pixels)
  channels = min(pixels.shape[2], 4)
  color, alpha = pixels[..., :3] if channels > 2 else pixels[..., 0], None
  if channels in (2, 4):
    alpha = np.ascontiguousarray(pixels[..., channels - 1])
    if alpha.min() == WHITE[alpha.dtype]:
      alpha = None
  return np.ascontiguousarray(color), alpha


def _whole_numbers(values: np.ndarray) -> np.ndarray:
  """Whole numbers of other types as uint16."""
  low, high = int(values.min()), int(values.max())
  if low < 0 or high > 65535:
    raise UserError(f"whole numbers from {low} to {high} must lie in 0 to 65535, or be floats")
  return values.astype(np.uint16)


def _is_tiff(source: Source) -> bool:
  if isinstance(source, bytes):
    return source[:4] in _TIFF
  with open(source, "rb") as file:
    return file.read(4) in _TIFF


_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextlib.contextmanager
def _tiff(source: Source) -> Iterator[tifffile.TiffFile]:
  with tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
    file.pages.useframes = False
    yield file


def _tiff_header(source: Source) -> Header:
  with _tiff(source) as file:
    pages = [page for _, page in _pages(file)]
    size = pages[0].imagelength, pages[0].imagewidth
    sideways = pages[0].tags.valueof(274, 1) in (5, 6, 7, 8)
    floats = any(page.dtype is not None and page.dtype.kind == "f" for page in pages)
    return Header("TIFF", size[::-1] if sideways else size, len(pages), floats)


def _pages(file: tifffile.TiffFile) -> list[tuple[int, tifffile.TiffPage]]:
  """The pages of an opened TIFF but for previews of others, with their numbers.

  Raises:
    UserError: it has none, or the last of them leads back to one before.
  """
  pages, seen = [], set()
  for number in range(_MANY):
    try:
      page = file.pages[number]
    except IndexError:
      break
    if page.offset in seen:
      raise UserError("its list of pages leads back into itself; repair or remove it")
    seen.add(page.offset)
    pages.append((number, page))
  if not pages:
    raise UserError("it has no page; the file must be a whole image; repair or remove it")
  return [(number, page) for number, page in pages if not page.subfiletype & 1] or pages[:1]


def _read_tiff(source: Source, max_pixels: int, first_frame: bool, to_srgb: bool) -> Picture:
  """Reads the pages of a TIFF but for those that are previews of others."""
  with _tiff(source) as file:
    pages, notes = _pages(file), ()
    if first_frame and len(pages) > 1:
      notes, pages = (f"The first of {len(pages)} pages was taken.",), pages[:1]
    sizes = [(page.imagewidth, page.imagelength) for _, page in pages]
    _check_size(sum(w * h for w, h in sizes), sizes[0], len(pages), max_pixels)
    metadata = _tiff_metadata(source, pages[0][1])
    frames = []
    for number, page in pages:
      color, alpha = _tiff_page(source, page, number)
      if to_srgb:
        color = _to_srgb(color, metadata)
      orientation = page.tags.valueof(274, 1)
      frames.append(
        Frame(_upright(color, orientation), None if alpha is None else _upright(alpha, orientation))
      )
    if to_srgb or pages[0][1].photometric in _TIFF_CONVERTED:
      metadata = _without_profile(metadata)
  return Picture("TIFF", tuple(frames), metadata, notes=notes)


# Compressions of a TIFF that libvips decodes: none, CCITT's, LZW, JPEG, Deflate, PackBits, WebP. Of
# a tiled TIFF with another one it makes noise, and says nothing.
_TIFF_OF_VIPS = (1, 2, 3, 4, 5, 7, 8, 32946, 32773, 50001)
# Photometric interpretations that become sRGB: separated (CMYK), and three kinds of Lab.
_TIFF_CONVERTED = (5, 8, 9, 10)


def _tiff_metadata(source: Source, page: tifffile.TiffPage) -> Metadata:
  dpi = None
  per_inch = {2: 1, 3: 2.54}.get(int(page.tags.valueof(296, 2)))
  x, y = page.tags.valueof(282), page.tags.valueof(283)
  if per_inch and x and y and x[1] and y[1]:
    dpi = (per_inch * x[0] / x[1], per_inch * y[0] / y[1])
    dpi = dpi[::-1] if page.tags.valueof(274, 1) in (5, 6, 7, 8) else dpi
    dpi = dpi if min(dpi) > 1 else None
  exif = b""
  with contextlib.suppress(Exception):  # Pillow does not open every TIFF
    with _opened(source) as image:
      exif = exif_data.of_tiff(image)
  xmp = page.tags.valueof(700) or b""
  return Metadata(
    icc=page.iccprofile or b"",
    exif=exif,
    xmp=exif_data.upright_xmp(xmp.encode() if isinstance(xmp, str) else bytes(xmp)),
    dpi=dpi,
  )


def _tiff_page(
  source: Source, page: tifffile.TiffPage, number: int
) -> tuple[np.ndarray, np.ndarray | None]:
  """Decodes a page, as it is stored: by Pillow up to 8 bits, else libvips, at last by tifffile."""
  bits = page.bitspersample
  if max(bits if isinstance(bits, tuple) else (bits,)) <= 8 and page.compression != 50001:
    try:
      with _opened(source) as image:
        image.seek(number)
        turned = image.tag_v2.get(274, 1)
        image.load()  # which turns it upright: turned back, to be treated as all others
        color, alpha = _of_pillow(image)
        back = {6: 8, 8: 6}.get(turned, turned if turned in range(1, 9) else 1)
        return _upright(color, back), None if alpha is None else _upright(alpha, back)
    except Image.UnidentifiedImageError:
      pass  # a form that Pillow does not know
  told = f"its compression {int(page.compression)} is not known"
  if page.compression in _TIFF_OF_VIPS:
    try:
      return _by_vips(source, page=number)
    except pyvips.Error as error:
      told = " ".join(str(error).split()).removeprefix("unable to write to memory ")
      told += "; the file must be a whole image; repair or remove it"
  try:
    pixels = page.asarray()
  except ValueError as error:  # a compression that it does not know either
    if "imagecodecs" in str(error):
      told += "; pip install imagecodecs, which reads it"
    raise UserError(told) from None
  if page.planarconfig == 2 and pixels.ndim == 3:
    pixels = np.moveaxis(pixels, 0, 2)
  color, alpha = _split(pixels)
  if page.photometric == 0 and color.dtype.kind == "u":
    color = WHITE[color.dtype] - color
  if alpha is not None and page.extrasamples[:1] == (1,):
    color = _divided(color, alpha)
  return color, alpha


def _divided(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  """Divides colours by the alpha that they were multiplied with."""
  white = WHITE[color.dtype]
  weight = alpha if color.ndim == 2 else alpha[..., None]
  straight = color.astype(np.float64) * white / np.maximum(weight, white * 1e-9)
  if color.dtype.kind == "u":
    straight = np.floor(straight + 0.5)
  return np.clip(np.where(weight > 0, straight, 0), 0, white).astype(color.dtype)


def _deep_ppm(source: Source) -> np.ndarray | None:
  """Reads a binary PGM or PPM of 16 bits, which Pillow would round to 8; None for another."""
  with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
    magic, numbers = file.read(2), []
    if magic not in (b"P5", b"P6"):
      return None
    while len(numbers) < 3:
      line = file.readline(4096)
      if not line:
        return None
      numbers += [int(word) for word in line.split(b"#")[0].split()]
    width, height, top = numbers
    if top < 256:
      return None
    channels = 1 if magic == b"P5" else 3
    data = file.read(2 * width * height * channels)
  if len(data) < 2 * width * height * channels:
    raise UserError("the file is cut short; it must be a whole image; repair or remove it")
  pixels = np.frombuffer(data, ">u2").reshape(height, width, channels)
  if top < 65535:
    pixels = (pixels.astype(np.uint64) * 65535 + top // 2) // top
  pixels = pixels.astype(np.uint16)
  return pixels[..., 0] if channels == 1 else pixels


def _by_profile(image: Image.Image) -> np.ndarray:
  """CMYK or Lab as sRGB, by the file's profile if it has one of these."""
  srgb = ImageCms.createProfile("sRGB")
  if image.mode == "LAB":
    source = ImageCms.createProfile("LAB")
  else:
    source = None
    if icc := image.info.get("icc_profile"):
      profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
      source = profile if profile.profile.xcolor_space.strip() == "CMYK" else None
  if source is None:
    return np.array(image.convert("RGB"))
  transform = ImageCms.buildTransform(source, srgb, image.mode, "RGB")
  return np.array(ImageCms.applyTransform(image, transform))


def _to_srgb(color: np.ndarray, metadata: Metadata) -> np.ndarray:
  """Converts pixels to sRGB by a profile, or by a PNG's gamma; without either they are sRGB."""
  if not metadata.icc:
    return _by_gamma(color, dict(metadata.png))
  pixels = color if color.ndim == 3 else color[..., None]
  deep = color.dtype != np.uint8
  if color.dtype == np.float32:
    pixels = np.floor(np.clip(pixels, 0, 1) * 65535 + 0.5).astype(np.uint16)
  kind = ("b-w", "srgb", "grey16", "rgb16")[2 * deep + (color.ndim == 3)]
  loaded = pyvips.Image.new_from_array(pixels).copy(interpretation=kind)
  loaded.set_type(pyvips.GValue.blob_type, "icc-profile-data", metadata.icc)
  converted = loaded.icc_transform(
    "srgb", embedded=True, intent="relative", depth=16 if deep else 8
  ).numpy()
  if color.dtype == np.float32:
    converted = (converted / 65535).astype(np.float32)
  return _grey_if_grey(converted) if color.ndim == 2 else np.ascontiguousarray(converted[..., :3])


def _by_gamma(color: np.ndarray, chunks: dict[bytes, bytes]) -> np.ndarray:
  if b"sRGB" in chunks or len(chunks.get(b"gAMA", b"")) != 4:
    return color
  gamma = max(int.from_bytes(chunks[b"gAMA"], "big"), 1) / 1e5
  white = WHITE[color.dtype]
  linear = (color.astype(np.float64) / white) ** (1 / gamma)
  value = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
  return (np.floor(value * white + 0.5) if white > 1 else value).astype(color.dtype)
