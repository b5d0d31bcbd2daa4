"""Blur kernels of Real-ESRGAN (arXiv 2107.10833, section 3.2), and filtering by them.

Kernels are square, of an odd side that may be traced, around the centre of a larger array whose
side is fixed. Images are planar, [C, H, W], and their valid part is the square of `size` pixels at
the top left; what lies outside of it is never seen.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax.data.degrade import blocks

# The order in which kinds are numbered; `iso` has one sigma, `aniso` two and an angle.
KINDS = ("iso", "aniso", "generalised_iso", "generalised_aniso", "plateau_iso", "plateau_aniso")
SINC = len(KINDS)  # the number of the sinc kernel


def bell(
  kind: jax.Array,
  side: jax.Array,
  sigma_x: jax.Array,
  sigma_y: jax.Array,
  angle: jax.Array,
  beta: jax.Array,
  reach: int,
) -> jax.Array:
  """A Gaussian, generalised Gaussian or plateau-shaped kernel that sums to 1.

  With q = x' S^-1 x, S the covariance of the rotated axes: exp(-q/2), exp(-q^beta/2) and
  1/(1 + q^beta).

  Args:
    kind: number of KINDS; the `iso` ones take `sigma_x` for both axes and no angle.
    side: odd, in pixels, at most 2 * reach + 1.
    sigma_x: standard deviation along the first axis, which is horizontal at angle 0, pixels.
    sigma_y: along the second.
    angle: of the first axis, from the horizontal towards the bottom, radians.
    beta: the exponent of the last four kinds.
    reach: (side of the array - 1) / 2.

  Returns:
    [2 * reach + 1, 2 * reach + 1], rows from top to bottom.
  """
  y, x = _grid(reach)
  iso = kind % 2 == 0
  sigma_y, angle = jnp.where(iso, sigma_x, sigma_y), jnp.where(iso, 0, angle)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  q = ((x * cos + y * sin) / sigma_x) ** 2 + ((y * cos - x * sin) / sigma_y) ** 2
  power = q ** jnp.where(kind < 2, 1, beta)
  kernel = jnp.where(kind < 4, jnp.exp(-power / 2), 1 / (1 + power))
  return _of_side(kernel, side, reach)


def sinc(side: jax.Array, cutoff: jax.Array, reach: int) -> jax.Array:
  """The circular low-pass kernel w J1(w r) / (2 pi r), which rings around edges; it sums to 1.

  Args:
    side: odd, in pixels, at most 2 * reach + 1.
    cutoff: w, radians a pixel, at most pi.
    reach: (side of the array - 1) / 2.

  Returns:
    [2 * reach + 1, 2 * reach + 1].
  """
  y, x = _grid(reach)
  r = np.hypot(y, x)
  # Bessel's integral by the rule of midpoints: with so many, it is exact to rounding up to the
  # largest argument, pi sqrt(2) reach. jax has no J1.
  count = math.ceil(2.3 * reach) + 24
  tau = (np.arange(count) + 0.5) * np.pi / count
  argument = cutoff * r
  j1 = jnp.mean(jnp.cos(tau[:, None, None] - argument[None] * np.sin(tau)[:, None, None]), axis=0)
  kernel = jnp.where(r == 0, cutoff**2 / (4 * np.pi), cutoff * j1 / (2 * np.pi * np.maximum(r, 1)))
  return _of_side(kernel, side, reach)


def _grid(reach: int) -> tuple[np.ndarray, np.ndarray]:
  y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(float)
  return y, x


def _of_side(kernel: jax.Array, side: jax.Array, reach: int) -> jax.Array:
  y, x = _grid(reach)
  kernel = jnp.where(np.maximum(np.abs(y), np.abs(x)) <= side // 2, kernel, 0)
  return kernel / jnp.sum(kernel)


def blur(image: jax.Array, kernel: jax.Array, size: int | jax.Array) -> jax.Array:
  """Filters an image by a kernel, reflecting the image at its edges without repeating them.

  Rows and columns of 8x8 pixels become the channels of a small convolution: a kernel of 21x21 is
  one of 4x4 from 64 channels to 64, which matrix units compute 20 times as fast as taps one by one.

  Args:
    image: [C, H, H].
    kernel: [k, k], k odd; each channel is filtered by it.
    size: side of the valid part, at least (k + 1) / 2, traced or not.

  Returns:
    [C, H, H], right within the valid part.
  """
  side, reach = image.shape[-1], kernel.shape[-1] // 2
  padded = reflect(image, reach, size)
  count = -(-side // blocks.SIDE)
  # The last block of outputs ends `spill` pixels before the last of inputs.
  spill = blocks.round_up(2 * reach, blocks.SIDE)
  more = count * blocks.SIDE + spill - padded.shape[-1]
  padded = jnp.pad(padded, ((0, 0), (0, more), (0, more)))
  filtered = jax.lax.conv_general_dilated(
    blocks.to_blocks(padded),
    _block_kernel(kernel.astype(image.dtype), spill // blocks.SIDE + 1),
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=jax.lax.Precision.HIGHEST,
  )
  return blocks.from_blocks(filtered)[:, :side, :side]


def reflect(image: jax.Array, reach: int, size: int | jax.Array) -> jax.Array:
  """Pads the valid part of [C, H, H] by reflection: [C, H + 2 reach, H + 2 reach].

  The padded part is the square of `size + 2 reach` at the top left.
  """
  for axis in (1, 2):
    before = jnp.flip(jax.lax.slice_in_dim(image, 1, reach + 1, axis=axis), axis)
    after = jnp.zeros_like(before)
    image = jnp.concatenate([before, image, after], axis)
    last = jax.lax.dynamic_slice_in_dim(image, size - 1, reach, axis)
    image = jax.lax.dynamic_update_slice_in_dim(image, jnp.flip(last, axis), reach + size, axis)
  return image


def _block_kernel(kernel: jax.Array, count: int) -> jax.Array:
  """[k, k] as a kernel between blocks, [count, count, 64 inputs, 64 outputs]."""
  n, side = blocks.SIDE, kernel.shape[-1]
  room = count * n

  def shifted(x: jax.Array) -> jax.Array:  # [k, ...] -> [8 outputs, room, ...]
    rest = [(0, 0)] * (x.ndim - 1)
    return jnp.stack([jnp.pad(x, [(i, room - side - i), *rest]) for i in range(n)])

  rows = shifted(kernel)  # [oy, y, k]
  both = shifted(rows.transpose(2, 0, 1))  # [ox, x, oy, y]
  both = both.reshape(n, count, n, n, count, n)  # ox, dx, ix, oy, dy, iy
  return both.transpose(4, 1, 5, 2, 3, 0).reshape(count, count, n * n, n * n)
