"""Opens image files by Pillow, and says of how many bits PNG and TIFF files are."""

import io
import os
import threading
from collections.abc import Sequence
from typing import BinaryIO

from PIL import Image

PathLike = str | os.PathLike
_PNG, _TIFF = b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_open_lock = threading.Lock()


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


def bits_of(source: PathLike | bytes) -> int:
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
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
      head = file.read(25)
      if head.startswith(_PNG):
        return 16 if head[24:] == b"\x10" else 8
      return 16 if head.startswith(_TIFF) and _is_deep_tiff(file) else 8
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
