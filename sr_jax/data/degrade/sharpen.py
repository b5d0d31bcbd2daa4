"""Sharpening by an unsharp mask, which Real-ESRGAN's generator learns to imitate."""

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 51  # of the Gaussian, pixels
SIGMA = 0.3 * ((SIDE - 1) / 2 - 1) + 0.8  # OpenCV's default for that side: 8 pixels
_LINES = 64
_taps = np.exp(-((np.arange(SIDE) - SIDE // 2) ** 2) / (2 * SIGMA**2))
_BAND = np.stack([np.pad(_taps / _taps.sum(), (i, _LINES - 1 - i)) for i in range(_LINES)])


def sharpen(image: jax.Array, weight: float = 0.5, threshold: float = 10.0) -> jax.Array:
  """Sharpens where an image differs from its blurred self (Real-ESRGAN, section 3.5).

  image + weight (image - blurred), clipped to [0, 1], where the difference is above the threshold.
  The mask of these places is blurred itself, so that it has no edges.

  Args:
    image: [N, H, W, C] in [0, 1], H and W at least 2.
    weight: of the difference.
    threshold: in levels of 255.

  Returns:
    The same shape.
  """
  blurred = _blur(image)
  difference = image - blurred
  mask = _blur((jnp.abs(difference) * 255 > threshold).astype(image.dtype))
  sharp = jnp.clip(image + weight * difference, 0, 1)
  return mask * sharp + (1 - mask) * image


def _blur(image: jax.Array) -> jax.Array:
  """Filters along both axes by a Gaussian, reflecting the image without repeating its edges."""
  rows = _blur_lines(image.swapaxes(0, 1))  # [H, N, W, C]
  return _blur_lines(rows.transpose(2, 1, 0, 3)).transpose(1, 2, 0, 3)


def _blur_lines(image: jax.Array) -> jax.Array:
  """Filters along the first axis: `_LINES` lines at a time are one product with a band matrix."""
  size, reach = image.shape[0], SIDE // 2
  count = -(-size // _LINES)
  pad = [(0, 0)] * (image.ndim - 1)
  padded = jnp.pad(image, [(reach, reach), *pad], mode="reflect")
  padded = jnp.pad(padded, [(0, count * _LINES - size), *pad])
  parts = jnp.stack([padded[i * _LINES : (i + 1) * _LINES + 2 * reach] for i in range(count)])
  band = jnp.asarray(_BAND, image.dtype)
  filtered = jnp.einsum("oi,bi...->bo...", band, parts, precision=jax.lax.Precision.HIGHEST)
  return filtered.reshape(count * _LINES, *image.shape[1:])[:size]
