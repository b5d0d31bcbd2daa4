"""JPEG's loss, without its files: colours, 4:2:0, the cosine transform and its rounding.

It rounds the coefficients and nothing else, where libjpeg also rounds the tables, the colours and
the result: docs/degradations.md has how far the two are apart. Real-ESRGAN's released code stores
the luma table transposed, its transform's axes not: horizontal frequencies are divided by what the
standard gives the vertical ones. Here they are as in the standard.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax.data.degrade import blocks

MULTIPLE = 16  # of an image's sides: chroma has half the resolution

# Annex K of the standard (ITU-T T.81); rows are vertical frequencies.
LUMA = np.array([
  [16, 11, 10, 16, 24, 40, 51, 61],
  [12, 12, 14, 19, 26, 58, 60, 55],
  [14, 13, 16, 24, 40, 57, 69, 56],
  [14, 17, 22, 29, 51, 87, 80, 62],
  [18, 22, 37, 56, 68, 109, 103, 77],
  [24, 35, 55, 64, 81, 104, 113, 92],
  [49, 64, 78, 87, 103, 121, 120, 101],
  [72, 92, 95, 98, 112, 100, 103, 99],
])  # fmt: skip
CHROMA = np.full((8, 8), 99)
CHROMA[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# JFIF's colours (ITU-T T.871) without the offset of 128.
TO_YCBCR = np.array(
  [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)
TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])

_u, _x = np.mgrid[:8, :8]
_DCT = np.cos((2 * _x + 1) * _u * np.pi / 16) * np.where(_u == 0, np.sqrt(1 / 8), 1 / 2)
_TRANSFORM = np.kron(_DCT, _DCT)  # of blocks [64], [64 coefficients, 64 pixels]


def compress(image: jax.Array, quality: jax.Array, size: int | jax.Array) -> jax.Array:
  """Returns what is left of an image after JPEG.

  Args:
    image: planar RGB [3, H, H], clipped to [0, 1]; H is a multiple of 16.
    quality: 1 to 100, a float; the tables are scaled by 50 / quality below 50 and by
      2 - quality / 50 from there on, and not rounded.
    size: side of the valid part. What lies around it counts as black, as if it were padded by zeros
      to a multiple of 16.

  Returns:
    [3, H, H] in [0, 1], right within the valid part.
  """
  dtype, highest = image.dtype, jax.lax.Precision.HIGHEST
  scale = jnp.where(quality < 50, 50 / quality, 2 - quality / 50)
  index = jnp.arange(image.shape[-1])
  inside = ((index[:, None] < size) & (index[None] < size))[None]
  pixels = jnp.where(inside, jnp.clip(image, 0, 1), 0) * 255
  planes = jnp.einsum("dc,chw->dhw", jnp.asarray(TO_YCBCR, dtype), pixels, precision=highest)
  luma, chroma = planes[:1] - 128, planes[1:]
  half = image.shape[-1] // 2
  chroma = jnp.mean(chroma.reshape(2, half, 2, half, 2), axis=(2, 4))
  luma, chroma = _rounded(luma, LUMA, scale), _rounded(chroma, CHROMA, scale)
  chroma = jnp.broadcast_to(chroma[:, :, None, :, None], (2, half, 2, half, 2))
  planes = jnp.concatenate([luma + 128, chroma.reshape(2, 2 * half, 2 * half)])
  pixels = jnp.einsum("cd,dhw->chw", jnp.asarray(TO_RGB, dtype), planes, precision=highest)
  return jnp.clip(pixels, 0, 255) / 255


def _rounded(planes: jax.Array, table: np.ndarray, scale: jax.Array) -> jax.Array:
  """Rounds the coefficients of planes [C, H, W] to multiples of the table times a scale."""
  transform = jnp.asarray(_TRANSFORM, planes.dtype)
  steps = (jnp.asarray(table, planes.dtype).reshape(-1) * scale)[None, None, None]
  highest = jax.lax.Precision.HIGHEST
  coefficients = jnp.matmul(blocks.to_blocks(planes), transform.T, precision=highest)
  # At quality 100 the steps are 0, and nothing is rounded.
  safe = jnp.where(steps == 0, 1, steps)
  kept = jnp.where(steps == 0, coefficients, jnp.round(coefficients / safe) * safe)
  return blocks.from_blocks(jnp.matmul(kept, transform, precision=highest))
