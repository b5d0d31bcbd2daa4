"""Opens image files by Pillow, within limits, and says of how many bits PNG and TIFF files are."""

import contextlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from typing import BinaryIO

from PIL import Image

from sr_jax import UserError

PathLike = str | os.PathLike
Source = PathLike | bytes  # a path, or the bytes of a file
# What Pillow decodes by itself: nothing that calls another program, as it does for PostScript.
FORMATS = (
  "AVIF BMP CUR DDS DIB GIF ICNS ICO JPEG JPEG2000 PCX PNG PPM PSD QOI SGI SUN TIFF WEBP XBM XPM"
).split()
MANY = 10_000  # frames or pages that are looked at
_PNG, TIFF_MARKS = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_open_lock = threading.Lock()


def as_file(source: Source) -> BinaryIO:
  """Opens a path, or the bytes of a file as if they were one."""
  return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def open_unlimited(file: BinaryIO, formats: Sequence[str]) -> Image.Image:
  """Opens an image of given formats, of any size: whoever calls this looks at the size itself.

  Pillow has a limit of its own: a global variable, with other numbers than ours.
  """
  with _open_lock:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
      return Image.open(file, formats=formats)
    finally:
      Image.MAX_IMAGE_PIXELS = limit


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
  """Opens a file of a known format by Pillow; a TGA, which has no mark, by its suffix."""
  is_tga = not isinstance(source, bytes) and os.fspath(source).lower().endswith(".tga")
  with as_file(source) as file:
    try:
      image = open_unlimited(file, FORMATS)
    except Image.UnidentifiedImageError:
      if not is_tga:
        raise
      image = open_unlimited(file, ["TGA"])
    with image:
      yield image


def check_size(total: int, size: tuple[int, int], count: int, max_pixels: int) -> None:
  """Refuses `total` pixels in `count` frames, of which the first has `size` (width, height)."""
  if total > max_pixels:
    several = f" in {count} frames" if total > size[0] * size[1] else ""
    raise UserError(
      f"{size[0]}x{size[1]} pixels{several} are more than max_pixels={max_pixels}; shrink the "
      f"image, or allow as many (sr_jax.upscale --max-pixels={total})"
    )


def bits_of(source: Source) -> int:
  """Says by its header of how many bits the values of an image file are.

  Args:
    source: a path, or the bytes of a file.

  Returns:
    16 for a PNG of 16 bits and for a TIFF whose first page has whole numbers without a sign of 16
    bits; 8 for every other file, and for one that cannot be read, which decoding will report.
  """
  try:
    if not isinstance(source, bytes) and not os.path.isfile(source):  # a pipe never ends
      return 8
    with as_file(source) as file:
      head = file.read(25)
      if head.startswith(_PNG):
        return 16 if head[24:] == b"\x10" else 8
      return 16 if head.startswith(TIFF_MARKS) and _is_deep_tiff(file) else 8
  except Exception:  # tifffile raises nearly anything on a damaged file
    return 8


def _is_deep_tiff(file: BinaryIO) -> bool:
  import tifffile  # here, since hardly any folder holds a TIFF

  file.seek(0)
  with tifffile.TiffFile(file) as tiff:
    for i in range(64):  # previews may come first
      page = tiff.pages[i]
      if not page.subfiletype & 1:
        return page.dtype == "uint16"
  return False
