"""Reads TIFFs: tifffile lists the pages, Pillow, libvips or tifffile decodes them."""

import contextlib
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image
import pyvips
import tifffile

from sr_jax import UserError
from sr_jax.images import colours
from sr_jax.images import decoding
from sr_jax.images import exif as exif_data
from sr_jax.images import opening
from sr_jax.images.opening import Source
from sr_jax.images.picture import WHITE, Frame, Header, Metadata, Picture

# Compressions of a TIFF that libvips decodes: none, CCITT's, LZW, JPEG, Deflate, PackBits, WebP. Of
# a tiled TIFF with another one it makes noise, and says nothing.
_OF_VIPS = (1, 2, 3, 4, 5, 7, 8, 32946, 32773, 50001)
# Photometric interpretations that become sRGB: separated (CMYK), and three kinds of Lab.
_CONVERTED = (5, 8, 9, 10)


def is_tiff(source: Source) -> bool:
  """Says by its first bytes whether a file is a TIFF."""
  with opening.as_file(source) as file:
    return file.read(4) in opening.TIFF_MARKS


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tifffile.TiffFile]:
  with tifffile.TiffFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
    file.pages.useframes = False
    yield file


def read_header(source: Source) -> Header:
  """Says what a TIFF is, as `reading.read_header` does."""
  with _opened(source) as file:
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
  for number in range(opening.MANY):
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


def read(source: Source, max_pixels: int, first_frame: bool, to_srgb: bool) -> Picture:
  """Reads the pages of a TIFF but for those that are previews of others."""
  with _opened(source) as file:
    pages, notes = _pages(file), ()
    if first_frame and len(pages) > 1:
      notes, pages = (f"The first of {len(pages)} pages was taken.",), pages[:1]
    sizes = [(page.imagewidth, page.imagelength) for _, page in pages]
    opening.check_size(sum(w * h for w, h in sizes), sizes[0], len(pages), max_pixels)
    metadata = _metadata(source, pages[0][1])
    frames = []
    for number, page in pages:
      color, alpha = _decode(source, page, number)
      if to_srgb:
        color = colours.to_srgb(color, metadata)
      frames.append(Frame(*decoding.upright((color, alpha), page.tags.valueof(274, 1))))
    if to_srgb or pages[0][1].photometric in _CONVERTED:
      metadata = colours.without_profile(metadata)
  return Picture("TIFF", tuple(frames), metadata, notes=notes)


def _metadata(source: Source, page: tifffile.TiffPage) -> Metadata:
  dpi = None
  per_inch = {2: 1, 3: 2.54}.get(int(page.tags.valueof(296, 2)))
  x, y = page.tags.valueof(282), page.tags.valueof(283)
  if per_inch and x and y and x[1] and y[1]:
    dpi = (per_inch * x[0] / x[1], per_inch * y[0] / y[1])
    dpi = dpi[::-1] if page.tags.valueof(274, 1) in (5, 6, 7, 8) else dpi
    dpi = dpi if min(dpi) > 1 else None
  exif = b""
  with contextlib.suppress(Exception):  # Pillow does not open every TIFF
    with opening.opened(source) as image:
      exif = exif_data.of_tiff(image)
  xmp = page.tags.valueof(700) or b""
  return Metadata(
    icc=page.iccprofile or b"",
    exif=exif,
    xmp=exif_data.upright_xmp(xmp.encode() if isinstance(xmp, str) else bytes(xmp)),
    dpi=dpi,
  )


def _decode(source: Source, page: tifffile.TiffPage, number: int) -> decoding.Decoded:
  """Decodes a page, as it is stored: by Pillow up to 8 bits, else libvips, at last by tifffile."""
  bits = page.bitspersample
  if max(bits if isinstance(bits, tuple) else (bits,)) <= 8 and page.compression != 50001:
    try:
      with opening.opened(source) as image:
        image.seek(number)
        turned = image.tag_v2.get(274, 1)
        image.load()  # which turns it upright: turned back, to be treated as all others
        back = {6: 8, 8: 6}.get(turned, turned if turned in range(1, 9) else 1)
        return decoding.upright(decoding.of_pillow(image), back)
    except Image.UnidentifiedImageError:
      pass  # a form that Pillow does not know
  told = f"its compression {int(page.compression)} is not known"
  if page.compression in _OF_VIPS:
    try:
      return decoding.by_vips(source, page=number)
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
  color, alpha = decoding.split(pixels)
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
