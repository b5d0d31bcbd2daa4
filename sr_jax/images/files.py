"""Reads and writes image files: the one place that decodes them and treats unusual ones.

All decoding is Pillow's, so that training, evaluation and upscaling see the same pixels (other
JPEG decoders differ by up to 15/255), but for PNG and TIFF of 16 bits, which `reading.py` decodes.
Files are untrusted: only a short list of formats is read, the size is taken from the header before
a pixel is decoded, and output names never leave their folder.
"""

import contextlib
import io
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sr_jax import UserError
from sr_jax.images.opening import PathLike, bits_of, open_unlimited
from sr_jax.machine.writing import new_file

SUFFIXES = {
  ".png": "PNG",
  ".jpg": "JPEG",
  ".jpeg": "JPEG",
  ".bmp": "BMP",
  ".webp": "WEBP",
  ".tif": "TIFF",
  ".tiff": "TIFF",
}
# Formats that are read and not written; of several frames the first is read.
READABLE = {
  **SUFFIXES,
  ".jfif": "JPEG",
  ".jpe": "JPEG",
  ".gif": "GIF",
  ".tga": "TGA",
  ".ppm": "PPM",
  ".pgm": "PPM",
  ".pbm": "PPM",
  ".pnm": "PPM",
  ".jp2": "JPEG2000",
  ".avif": "AVIF",
}
# What a file may contain, whatever its suffix; but TGA, which has no mark to know it by, is only
# what a file's suffix says.
FORMATS = sorted(set(READABLE.values()) - {"TGA"})
SAVE_OPTIONS = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
MAX_PIXELS = 100_000_000


def read_image(
  source: PathLike | bytes,
  *,
  keep_grey: bool = False,
  keep_bits: bool = False,
  max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
  """Read an image file as RGB of 8 bits, or of the 16 that it has.

  EXIF orientation is applied. Grey, 1-bit, palette, CMYK and YCbCr files become RGB; embedded
  colour profiles are not. 16 bits are scaled to 8 with rounding, never clipped. Opaque alpha is
  dropped. An image with any other alpha is composited over white, because the colours under
  transparent pixels are arbitrary. Of several frames the first is read.

  Args:
    source: a path, or the bytes of a file.
    keep_grey: whether to return a grey file as [H, W]; benchmarks take its values as Y.
    keep_bits: whether to return a PNG or TIFF of 16 bits as it is; other formats have 8.
    max_pixels: larger images are refused by their header, before they are decoded: a 50 kB file
      can hold a gigapixel.

  Returns:
    uint8 [H, W, 3], or [H, W] for a grey file with `keep_grey`; uint16 where 16 bits are kept.

  Raises:
    UserError: it is not a readable image of the known formats, or it is too large.
    OSError: the file cannot be opened.
  """
  color, alpha = _read(source, max_pixels)
  if alpha is not None:
    white = np.iinfo(color.dtype).max
    weight = alpha.astype(np.uint16 if white == 255 else np.uint64)
    weight = weight if color.ndim == 2 else weight[..., None]
    color = ((color * weight + white * (white - weight) + white // 2) // white).astype(color.dtype)
  color = color if keep_bits else to_8_bits(color)
  return color if keep_grey else _to_rgb(color)


def to_8_bits(image: np.ndarray) -> np.ndarray:
  """Rounds an image to 8 bits: uint16 v becomes v / 257, uint8 stays as it is."""
  if image.dtype == np.uint8:
    return image
  return ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)


def to_16_bits(image: np.ndarray) -> np.ndarray:
  """Widens an image to 16 bits: uint8 v becomes 257 v, the same part of white; uint16 stays."""
  return image if image.dtype == np.uint16 else image * np.uint16(257)


def read_image_and_alpha(
  source: PathLike | bytes, *, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, np.ndarray | None]:
  """Read an image file and its alpha separately, so that both can be upscaled.

  The image is read as by `read_image`, but nothing is composited.

  Args:
    source: a path, or the bytes of a file.
    max_pixels: larger images are refused before they are decoded.

  Returns:
    uint8 RGB [H, W, 3], and uint8 alpha [H, W], or None if every pixel is opaque.

  Raises:
    UserError: it is not a readable image of the known formats, or it is too large.
    OSError: the file cannot be opened.
  """
  color, alpha = _read(source, max_pixels)
  return _to_rgb(to_8_bits(color)), None if alpha is None else to_8_bits(alpha)


def image_size(source: PathLike | bytes) -> tuple[int, int]:
  """Read the size of an image from its header, without decoding a pixel.

  Args:
    source: a path, or the bytes of a file.

  Returns:
    Height and width of the image that `read_image` returns, turned upright; (0, 0) if it returns
    none: the header cannot be read, or claims more than MAX_PIXELS.
  """
  try:
    with _opened(source) as image:
      width, height = image.size
      if width * height > MAX_PIXELS:  # it will be refused, and must not be planned for
        return 0, 0
      sideways = _header_exif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
      return (width, height) if sideways else (height, width)
  except Exception:  # whatever Pillow raises, as in `_read`; decoding the file will report it
    return 0, 0


def _header_exif(image: Image.Image) -> Image.Exif:
  """Reads an opened image's EXIF data without decoding a pixel, which Pillow does for a PNG."""
  if image.format != "PNG":
    return image.getexif()
  exif = Image.Image.getexif(image)  # of what stands before the pixels
  if ExifTags.Base.Orientation in exif:
    return exif
  file, before = image.fp, image.fp.tell()
  file.seek(8)  # after the signature; each chunk is its length, its name, its data and a checksum
  for _ in range(10_000):
    head = file.read(8)
    length, name = int.from_bytes(head[:4], "big"), head[4:]
    if len(head) < 8 or name == b"IEND":
      break
    if name == b"eXIf" and length < 2**20:
      exif.load(file.read(length))
      break
    file.seek(length + 4, os.SEEK_CUR)
  file.seek(before)
  return exif


def write_image(path: PathLike, array: np.ndarray) -> None:
  """Write an image file that is whole or not there.

  The file is written under another name and then renamed, so that a killed run or a full disk
  leaves no torn file.

  Args:
    path: the path of the file; its suffix says the format (png, jpg, bmp, webp, tif). Folders are
      made as needed.
    array: uint8 grey [H, W], RGB [H, W, 3] or RGBA [H, W, 4].

  Raises:
    UserError: the suffix is unknown, or the format cannot hold the array.
  """
  path = pathlib.Path(path)
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    raise UserError(f"{path}: the suffix must be one of {', '.join(SUFFIXES)}")
  array = np.asarray(array)
  channels = array.shape[2:]
  if array.dtype != np.uint8 or array.ndim < 2 or channels not in ((), (3,), (4,)):
    raise UserError(
      f"{path}: an array of {array.dtype} {list(array.shape)} must be uint8 [H, W], [H, W, 3] "
      "or [H, W, 4]; convert floats with np.floor(image * 255 + 0.5).astype(np.uint8)"
    )
  if channels == (4,) and SUFFIXES[suffix] == "JPEG":
    raise UserError(f"{path}: JPEG has no alpha channel; write a .png")
  path.parent.mkdir(parents=True, exist_ok=True)
  with new_file(path) as file:
    options = SAVE_OPTIONS.get(SUFFIXES[suffix], {})
    Image.fromarray(array).save(file, SUFFIXES[suffix], **options)


def list_files(folder: PathLike) -> list[pathlib.Path]:
  """Lists all files of a folder and its subfolders but hidden ones, in one order everywhere."""
  images, others = split_files(folder)
  return sorted(images + others)


def list_images(folder: PathLike) -> list[pathlib.Path]:
  """List the image files of a folder and its subfolders; the first that `split_files` returns."""
  return split_files(folder)[0]


def split_files(folder: PathLike) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
  """List the image files of a folder and its subfolders, and the other files in them.

  Images are recognised by their suffix, in any case. Hidden files and folders are left out of both
  (a Mac leaves `._a.png` beside `a.png`).

  Returns:
    Paths that begin with `folder`, sorted by their parts, so that every machine has the same order.

  Raises:
    UserError: the folder does not exist.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise UserError(f"{str(folder)!r} must be an existing folder")
  images, others, seen = [], [], set()
  for root, folders, files in os.walk(folder, followlinks=True):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    if (real := os.path.realpath(root)) in seen:  # a link led here again, perhaps from below
      folders.clear()
      continue
    seen.add(real)
    for name in files:
      if not name.startswith("."):
        readable = os.path.splitext(name)[1].lower() in READABLE
        (images if readable else others).append(pathlib.Path(root, name))
  return sorted(images), sorted(others)


def unused_path(path: pathlib.Path, taken: set[pathlib.Path]) -> pathlib.Path:
  """Number an output file so that it overwrites no other of the same run.

  Without a number, a.jpg and a.png of one folder would both be written to a.png.

  Args:
    path: the path to write to.
    taken: the paths that this run has written; the result is added to them.

  Returns:
    `path`, with _1, _2, ... before its suffix if it is taken.
  """
  number, unused = 0, path
  while unused in taken:
    number += 1
    unused = path.with_stem(f"{path.stem}_{number}")
  taken.add(unused)
  return unused


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)  # devices of Windows


def safe_output_path(output_dir: PathLike, name: str) -> pathlib.Path:
  """Build the path of an output file from an untrusted name, inside `output_dir`.

  Characters that some file system refuses become `_`; subfolders (`a/b.png`) are kept.

  Args:
    output_dir: a folder, which need not exist yet.
    name: the path of the file relative to it.

  Raises:
    UserError: the name is empty or absolute, contains `..` or a device name of Windows, or a
      symbolic link on the way leads out of `output_dir`.
  """
  parts = name.replace("\\", "/").split("/")
  parts = [re.sub(r'[\x00-\x1f\x7f<>:"|?*]', "_", part) for part in parts if part not in ("", ".")]
  if name[:1] in ("/", "\\") or re.match("[A-Za-z]:", name) or not parts or ".." in parts:
    raise UserError(f'name={name!r} must be a relative path without ".."; give a plain file name')
  parts = [part.rstrip(". ") or "_" for part in parts]
  if any(_RESERVED.fullmatch(part.split(".")[0].rstrip()) for part in parts):
    raise UserError(f"name={name!r} must not be a device name of Windows; rename the input")
  base = pathlib.Path(output_dir)
  path = base.joinpath(*parts)
  if not path.resolve().is_relative_to(base.resolve()):
    raise UserError(f"{str(path)!r} must stay inside {str(base)!r}; remove the symbolic link")
  return path


def _read(source: PathLike | bytes, max_pixels: int) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns colour [H, W, 3] or grey [H, W], and alpha [H, W] unless it is opaque.

  They are uint16 for PNG and TIFF of 16 bits, else uint8.
  """
  if bits_of(source) == 16:
    from sr_jax.images import reading  # not at the top: libvips is loaded where it is needed

    (frame,) = reading.read_picture(source, max_pixels=max_pixels, first_frame=True).frames
    return frame.color, frame.alpha
  name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
  try:
    with _opened(source) as image:
      width, height = image.size
      if width * height > max_pixels:
        raise UserError(f"{width}x{height} pixels are more than max_pixels={max_pixels}")
      return _decode(image)
  except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
    raise
  except Exception as error:  # Pillow's plugins raise nearly anything on a damaged file
    raise UserError(
      f"{name}: {error}; the file must be a whole {', '.join(FORMATS)} image of at most "
      f"{max_pixels} pixels; remove, repair or shrink it"
    ) from error


@contextlib.contextmanager
def _opened(source: PathLike | bytes) -> Iterator[Image.Image]:
  is_tga = not isinstance(source, bytes) and os.fspath(source).lower().endswith(".tga")
  formats = ["TGA"] if is_tga else FORMATS
  if not isinstance(source, bytes) and not (os.path.isfile(source) or os.path.isdir(source)):
    os.stat(source)  # raises FileNotFoundError
    raise UserError("it is a pipe or a device, from which reading may never end")
  with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
    with open_unlimited(file, formats) as image:
      yield image


def _decode(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
  image.load()
  ImageOps.exif_transpose(image, in_place=True)
  if image.mode.startswith("I"):  # `convert` would clip it to 255
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
      raise UserError(f"grey values from {values.min()} to {values.max()} must fit 16 bits")
    return ((values + 128) // 257).astype(np.uint8), None
  if image.mode == "F":
    raise UserError("float pixels must be stored as 8 or 16-bit integers")
  grey = image.mode in ("1", "L", "LA", "La")
  if image.has_transparency_data:
    pixels = np.asarray(image.convert("RGBA"))
    alpha = np.ascontiguousarray(pixels[..., -1])
    color = np.ascontiguousarray(pixels[..., 0] if grey else pixels[..., :3])
    return color, None if alpha.min() == 255 else alpha
  return np.array(image.convert("L" if grey else "RGB")), None


def _to_rgb(image: np.ndarray) -> np.ndarray:
  return np.stack([image] * 3, axis=-1) if image.ndim == 2 else image
