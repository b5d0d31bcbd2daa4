"""EXIF data: says that an image is upright, and collects what a TIFF keeps in its own tags."""

import re
import struct

from PIL import ExifTags, Image

_ORIENTATION = ExifTags.Base.Orientation.value
IFDS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
# Of a TIFF's own tags these describe the picture; the others describe how the file holds it.
DESCRIBING = (
  ExifTags.Base.ImageDescription,
  ExifTags.Base.Make,
  ExifTags.Base.Model,
  ExifTags.Base.Software,
  ExifTags.Base.DateTime,
  ExifTags.Base.Artist,
  ExifTags.Base.HostComputer,
  ExifTags.Base.Copyright,
)
PREFIX = b"Exif\x00\x00"
# How the texts begin that programs write into a TIFF's description for themselves: they give the
# shape of its arrays (tifffile, ImageJ, OME), which the enlarged picture no longer has.
_OF_THE_ARRAYS = re.compile(
  r"\s*(\{\"shape\"|ImageJ=|(<\?xml[^>]*\?>\s*(<!--.*?-->\s*)?)?<OME\b)", re.S
)


def upright(exif: bytes) -> bytes:
  """Sets the orientation to 'upright' and leaves every other byte as it is.

  Args:
    exif: EXIF data, with or without 'Exif\\0\\0' before it.

  Returns:
    The data without 'Exif\\0\\0', or b'' if they cannot be read.
  """
  exif = exif.removeprefix(PREFIX)
  order = {b"II": "<", b"MM": ">"}.get(exif[:2])
  if order is None or len(exif) < 8:
    return b""
  data = bytearray(exif)
  try:
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
      tag, kind = struct.unpack_from(f"{order}HH", data, entry)
      if tag == _ORIENTATION:  # a SHORT, or against the rule a LONG
        struct.pack_into(f"{order}I" if kind == 4 else f"{order}H", data, entry + 8, 1)
  except struct.error:
    return b""
  return bytes(data)


def upright_xmp(xmp: bytes) -> bytes:
  """Sets the orientation that a packet of XMP may repeat to 'upright'."""
  return re.sub(rb"(tiff:Orientation(?:=[\"']|>)\s*)[1-8]", lambda found: found[1] + b"1", xmp)


def orientation(exif: bytes) -> int:
  """Returns the orientation that EXIF data give, 1 to 8; 1 if there is none."""
  tags = Image.Exif()
  try:
    tags.load(exif)
    value = tags.get(_ORIENTATION, 1)
  except Exception:  # whatever Pillow raises on damaged data
    return 1
  return value if value in range(1, 9) else 1


def of_tiff(image: Image.Image) -> bytes:
  """Collects what an opened TIFF says about its picture as EXIF data, b'' if it says nothing.

  A description that gives the shape of the file's arrays is left out.
  """
  tags, found = image.getexif(), Image.Exif()
  for tag in DESCRIBING:
    if tag in tags:
      found[tag] = tags[tag]
  if _OF_THE_ARRAYS.match(str(found.get(ExifTags.Base.ImageDescription, ""))):
    del found[ExifTags.Base.ImageDescription]
  for ifd in IFDS:
    if entries := dict(tags.get_ifd(ifd)):
      found.get_ifd(ifd).update(entries)
      found[ifd] = entries
  return found.tobytes().removeprefix(PREFIX) if len(found) else b""
