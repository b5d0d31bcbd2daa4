"""Decodes images by Pillow or libvips into colour and alpha, of 8 and 16 bits and floats."""

import os
import pathlib

import numpy as np
from PIL import Image
import pyvips

from sr_jax import UserError
from sr_jax.images import colours
from sr_jax.images import opening
from sr_jax.images.opening import Source
from sr_jax.images.picture import WHITE


Decoded = tuple[np.ndarray, np.ndarray | None]  # colour and alpha, as `picture.Frame` has them


def upright(decoded: Decoded, orientation: int) -> Decoded:
  """Turns colour and alpha that are stored by an EXIF orientation, 1 to 8."""

  def turned(pixels: np.ndarray) -> np.ndarray:
    if orientation >= 5:
      pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
      pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
      pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)

  color, alpha = decoded
  return turned(color), None if alpha is None else turned(alpha)


def of_pillow(image: Image.Image) -> Decoded:
  """Takes the pixels of a frame that Pillow has loaded."""
  mode = image.mode
  if mode in ("CMYK", "LAB"):
    return colours.by_profile(image), None
  if mode.startswith("I"):
    return whole_numbers(np.asarray(image)), None
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
  return colours.grey_if_grey(color) if mode == "P" else color, alpha


def by_vips(source: Source, **options) -> Decoded:
  """Decodes by libvips, which keeps 16 bits and floats, and knows every form of transparency."""
  loaded = load(source, **options)
  if loaded.interpretation in ("cmyk", "lab", "labs", "labq", "xyz", "yxy"):
    loaded = loaded.colourspace("rgb16" if loaded.format == "ushort" else "srgb")
  return split(loaded.numpy())


def load(source: Source, **options) -> pyvips.Image:
  """Opens a file by libvips, whose errors are of this file alone."""
  options = {"access": "sequential", "fail_on": "error", **options}
  pyvips.vips_lib.vips_error_clear()  # or an error tells what was wrong with other files, too
  try:
    os.fspath(source if not isinstance(source, bytes) else "").encode()
  except UnicodeEncodeError:  # a name that is no text, which libvips does not take
    source = pathlib.Path(source).read_bytes()
  if isinstance(source, bytes):
    return pyvips.Image.new_from_buffer(source, "", **options)
  return pyvips.Image.new_from_file(os.fspath(source), **options)


def split(pixels: np.ndarray) -> Decoded:
  """Splits decoded [H, W] or [H, W, C] of any dtype into colour and alpha; further channels go."""
  pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
  if pixels.dtype.kind == "f":
    pixels = pixels.astype(np.float32)
  elif pixels.dtype not in WHITE:
    pixels = whole_numbers(pixels)
  channels = min(pixels.shape[2], 4)
  color, alpha = pixels[..., :3] if channels > 2 else pixels[..., 0], None
  if channels in (2, 4):
    alpha = np.ascontiguousarray(pixels[..., channels - 1])
    if alpha.min() == WHITE[alpha.dtype]:
      alpha = None
  return np.ascontiguousarray(color), alpha


def whole_numbers(values: np.ndarray) -> np.ndarray:
  """Whole numbers of other types as uint16."""
  low, high = int(values.min()), int(values.max())
  if low < 0 or high > 65535:
    raise UserError(f"whole numbers from {low} to {high} must lie in 0 to 65535, or be floats")
  return values.astype(np.uint16)


def deep_ppm(source: Source) -> np.ndarray | None:
  """Reads a binary PGM or PPM of 16 bits, which Pillow would round to 8; None for another."""
  with opening.as_file(source) as file:
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
