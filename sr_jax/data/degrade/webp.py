"""WebP's loss, by Pillow on the host.

VP8, which lossy WebP is, predicts each block of pixels from its decoded neighbours and then smooths
the blocks' edges: a long chain of small steps that depend on one another, of which an accelerator's
program would be slower than the host. So the compiled program calls the host for it, in the middle
of a step. That is why it is off by default.
"""

import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image


def compress(image: jax.Array, quality: jax.Array, size: int | jax.Array) -> jax.Array:
  """Returns what is left of an image after WebP.

  Args:
    image: planar RGB [3, H, H], clipped to [0, 1] and rounded to 255 levels.
    quality: 1 to 100; it is rounded.
    size: side of the valid part.

  Returns:
    [3, H, H] in [0, 1], 0 outside of the valid part.
  """
  levels = jnp.round(jnp.clip(image, 0, 1) * 255).astype(jnp.uint8)
  shape = jax.ShapeDtypeStruct(levels.shape, jnp.uint8)
  arguments = levels, jnp.round(quality), jnp.asarray(size, jnp.int32)
  decoded = jax.pure_callback(_on_host, shape, *arguments, vmap_method="sequential")
  return decoded.astype(image.dtype) / 255


def _on_host(levels: np.ndarray, quality: np.ndarray, size: np.ndarray) -> np.ndarray:
  levels, size, file = np.asarray(levels), int(size), io.BytesIO()
  valid = np.ascontiguousarray(np.moveaxis(levels[:, :size, :size], 0, -1))
  Image.fromarray(valid).save(file, "WEBP", quality=int(quality))
  result = np.zeros_like(levels)
  result[:, :size, :size] = np.moveaxis(np.asarray(Image.open(file).convert("RGB")), -1, 0)
  return result
