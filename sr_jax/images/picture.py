"""A picture as it goes from file to file: its pixels as they are, and what else the file says.

Reading is in `reading.py`, writing in `writing.py`; neither knows of networks.
"""

from typing import NamedTuple

import numpy as np

# The values of full white (or of full opacity) of each dtype of pixels.
WHITE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535, np.dtype(np.float32): 1}


class Frame(NamedTuple):
  """One image of a file, turned upright.

  Attributes:
    color: grey [H, W] or RGB [H, W, 3] of uint8, uint16 or float32, not multiplied by alpha.
    alpha: [H, W] of the same dtype, or None if every pixel is opaque.
    duration: of an animation's frame, in milliseconds.
  """

  color: np.ndarray
  alpha: np.ndarray | None = None
  duration: float = 0


class Metadata(NamedTuple):
  """What a file says beside its pixels.

  Attributes:
    icc: the colour profile.
    exif: as it stands in a JPEG behind 'Exif\\0\\0'; it says that the image is upright.
    xmp: a packet of XML.
    dpi: horizontal and vertical pixels per inch.
    png: chunks of a PNG as they are, (name, data): its text, and what its numbers mean (gAMA, ...).
    loop: how often an animation is shown, 0 for without end.
  """

  icc: bytes = b""
  exif: bytes = b""
  xmp: bytes = b""
  dpi: tuple[float, float] | None = None
  png: tuple[tuple[bytes, bytes], ...] = ()
  loop: int = 0


class Picture(NamedTuple):
  """What is in an image file.

  Attributes:
    format: Pillow's name of the file's format: 'PNG', 'JPEG', 'TIFF', ...
    frames: one, or those of an animation or of a document's pages.
    metadata: what the file says beside its pixels.
    animated: whether several frames are shown one after the other; else they are pages.
    poster: whether the first frame is no part of the animation (a PNG's 'default image').
    notes: what was changed on reading, in whole sentences.
  """

  format: str
  frames: tuple[Frame, ...]
  metadata: Metadata = Metadata()
  animated: bool = False
  poster: bool = False
  notes: tuple[str, ...] = ()


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
