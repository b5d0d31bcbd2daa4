"""Reads and writes image files: the one place that decodes them and treats unusual ones.

All decoding is Pillow's, so that training, evaluation and upscaling see the same pixels (other
JPEG decoders differ by up to 15/255). Files are untrusted: only a short list of formats is read,
the size is taken from the header before a pixel is decoded, and output names never leave their
folder.
"""

import contextlib
import io
import os
import pathlib
import re
import threading
import uuid
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

from sr_jax import UserError

SUFFIXES = {
  ".png": "PNG",
  ".jpg": "JPEG",
  ".jpeg": "JPEG",
  ".bmp": "BMP",
  ".webp": "WEBP",
  ".tif": "TIFF",
  ".tiff": "TIFF",
}
# What a file may contain, whatever its suffix.
FORMATS = sorted(set(SUFFIXES.values()))
SAVE_OPTIONS = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
MAX_PIXELS = 100_000_000

PathLike = str | os.PathLike
_open_lock = threading.Lock()


def read_image(
  source: PathLike | bytes, *, keep_grey: bool = False, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
  """Read an image file as 8-bit RGB.

  EXIF orientation is applied. Grey, 1-bit, palette, CMYK and YCbCr files become RGB; embedded
  colour profiles are not. 16-bit grey is scaled to 8 bits with rounding, never clipped (16-bit
  RGB loses its low byte in Pillow). Opaque alpha is dropped. An image with any other alpha is
  composited over white, because the colours under transparent pixels are arbitrary. Of several
  frames the first is read.

  Args:
    source: a path, or the bytes of a file.
    keep_grey: whether to return a grey file as [H, W]; benchmarks take its values as Y.
    max_pixels: larger images are refused by their header, before they are decoded: a 50 kB file
      can hold a gigapixel.

  Returns:
    uint8 [H, W, 3], or [H, W] for a grey file with `keep_grey`.

  Raises:
    UserError: it is not a readable image of the known formats, or it is too large.
    OSError: the file cannot be opened.
  """
  color, alpha = _read(source, max_pixels)
  if alpha is not None:
    weight = alpha.astype(np.uint16)
    weight = weight if color.ndim == 2 else weight[..., None]
    color = ((color * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
  return color if keep_grey else _to_rgb(color)


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
  return _to_rgb(color), alpha


def image_size(source: PathLike | bytes) -> tuple[int, int]:
  """Read the size of an image from its header, without decoding a pixel.

  Args:
    source: a path, or the bytes of a file.

  Returns:
    Height and width of the image that `read_image` returns, turned upright; (0, 0) if the header
    cannot be read.
  """
  try:
    with _opened(source) as image:
      width, height = image.size
      sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
      return (width, height) if sideways else (height, width)
  except Exception:  # whatever Pillow raises, as in `_read`; decoding the file will report it
    return 0, 0


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
  temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
  try:
    options = SAVE_OPTIONS.get(SUFFIXES[suffix], {})
    Image.fromarray(array).save(temporary, SUFFIXES[suffix], **options)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def list_images(folder: PathLike) -> list[pathlib.Path]:
  """List the image files of a folder and its subfolders, recognised by their suffix in any case.

  Hidden files and folders are left out (a Mac leaves `._a.png` beside `a.png`).

  Returns:
    Paths that begin with `folder`, sorted by their parts, so that every machine has the same order.

  Raises:
    UserError: the folder does not exist.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise UserError(f"{str(folder)!r} must be an existing folder")
  found, seen = [], set()
  for root, folders, files in os.walk(folder, followlinks=True):
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    if (real := os.path.realpath(root)) in seen:  # a link led here again, perhaps from below
      folders.clear()
      continue
    seen.add(real)
    found += [
      pathlib.Path(root, name)
      for name in files
      if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
    ]
  return sorted(found)


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
  """Returns uint8 colour [H, W, 3] or grey [H, W], and alpha [H, W] unless it is opaque."""
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
  with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
    # Pillow has a limit of its own: a global variable, with other numbers than ours.
    with _open_lock:
      limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
      try:
        image = Image.open(file, formats=FORMATS)
      finally:
        Image.MAX_IMAGE_PIXELS = limit
    with image:
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
