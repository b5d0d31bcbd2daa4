"""What pixels mean: converts them to sRGB, and finds that they are grey."""

import io

import numpy as np
from PIL import Image, ImageCms
import pyvips

from sr_jax.images.picture import WHITE, Metadata


def without_profile(metadata: Metadata) -> Metadata:
  colour = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
  rest = tuple(entry for entry in metadata.png if entry[0] not in colour)
  return metadata._replace(icc=b"", png=rest)


def grey_if_grey(color: np.ndarray) -> np.ndarray:
  """RGB [H, W, 3] as grey [H, W] if no pixel has a colour."""
  if color.ndim == 3 and (color == color[..., :1]).all():
    return np.ascontiguousarray(color[..., 0])
  return color


def by_profile(image: Image.Image) -> np.ndarray:
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


def to_srgb(color: np.ndarray, metadata: Metadata) -> np.ndarray:
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
  return grey_if_grey(converted) if color.ndim == 2 else np.ascontiguousarray(converted[..., :3])


def _by_gamma(color: np.ndarray, chunks: dict[bytes, bytes]) -> np.ndarray:
  if b"sRGB" in chunks or len(chunks.get(b"gAMA", b"")) != 4:
    return color
  gamma = max(int.from_bytes(chunks[b"gAMA"], "big"), 1) / 1e5
  white = WHITE[color.dtype]
  linear = (color.astype(np.float64) / white) ** (1 / gamma)
  value = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
  return (np.floor(value * white + 0.5) if white > 1 else value).astype(color.dtype)
