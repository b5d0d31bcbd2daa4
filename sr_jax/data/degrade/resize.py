"""PyTorch's `interpolate`, from and to sizes that are traced, as two products with matrices.

LR images that are degraded are made by area, bilinear or bicubic without antialiasing; LR images
of the papers' protocol are MATLAB's bicubic, and made by `images/resize.py`.
"""

import jax
import jax.numpy as jnp

MODES = ("area", "bilinear", "bicubic")  # the order in which they are numbered


def resize(
  image: jax.Array,
  mode: jax.Array,
  size: int | jax.Array,
  new_size: int | jax.Array,
  new_side: int,
  factor: jax.Array | None = None,
) -> jax.Array:
  """Resizes the valid part of an image, the square of `size` pixels at the top left.

  Args:
    image: [C, H, H].
    mode: number of MODES.
    size: side of the valid part.
    new_size: side of the result, at most `new_side`.
    new_side: of the array that the result lies in.
    factor: by which coordinates are mapped, as `interpolate(scale_factor=...)` does; by default
      the ratio of the sizes, as `interpolate(size=...)` does. Area always takes that.

  Returns:
    [C, new_side, new_side], 0 outside of the result.
  """
  matrix = weights(mode, size, new_size, image.shape[-1], new_side, image.dtype, factor)
  highest = jax.lax.Precision.HIGHEST
  rows = jnp.einsum("oh,chw->cow", matrix, image, precision=highest)
  return jnp.einsum("pw,cow->cop", matrix, rows, precision=highest)


def weights(
  mode: jax.Array,
  size: int | jax.Array,
  new_size: int | jax.Array,
  side: int,
  new_side: int,
  dtype: jnp.dtype,
  factor: jax.Array | None = None,
) -> jax.Array:
  """The matrix of one axis, [new_side, side]; arguments as of `resize`."""
  size, new_size = jnp.asarray(size, jnp.int32), jnp.asarray(new_size, jnp.int32)
  out = jnp.arange(new_side, dtype=jnp.int32)[:, None]
  source = jnp.arange(side, dtype=jnp.int32)[None]
  step = size.astype(dtype) / new_size.astype(dtype) if factor is None else 1 / factor
  position = (out.astype(dtype) + 0.5) * step - 0.5

  def at(index: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.where(jnp.clip(index, 0, size - 1) == source, weight, 0)

  def area() -> jax.Array:
    first, end = out * size // new_size, ((out + 1) * size + new_size - 1) // new_size
    return jnp.where((first <= source) & (source < end), 1 / (end - first).astype(dtype), 0)

  def bilinear() -> jax.Array:
    first = jnp.floor(position).astype(jnp.int32)
    part = position - first.astype(dtype)
    return at(first, 1 - part) + at(first + 1, part)

  def bicubic() -> jax.Array:
    first = jnp.floor(position).astype(jnp.int32)
    part = position - first.astype(dtype)
    return sum(at(first + i, _cubic(jnp.abs(part - i))) for i in range(-1, 3))

  matrix = jax.lax.switch(mode, (area, bilinear, bicubic))
  return jnp.where((out < new_size) & (source < size), matrix, 0)


def _cubic(x: jax.Array) -> jax.Array:
  """Keys' kernel with PyTorch's a = -0.75, of |x| up to 2."""
  a = -0.75
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
  return jnp.where(x <= 1, near, far)
