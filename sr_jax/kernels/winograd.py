"""3x3 convolutions by Winograd's minimal filtering, for CPUs.

Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1: F(2, 3)
nested with F(4, 3). A tile of 2x4 outputs is Y = A^T [(G g G'^T) * (B^T d B')] A', of the kernel g
and the 4x6 inputs d, with the matrices of F(2, 3) and, primed, of F(4, 3). That is 3
multiplications an output, not 9. Summed over channels the product is 24 matrix products, and so are
the gradients: the input's is the same convolution with the kernel turned around, the kernel's is
G^T [(B^T d B') * (A dY A'^T)] G', summed over the tiles.

XLA's convolutions on a CPU reach half the rate of its matrix products, and its weight gradients are
15 to 30 times slower in a loop than out of it; matrix products are not. docs/cpu.md has the times.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sr_jax.kernels.chunks import join, split, turned

# (B^T, G, A^T) of F(2, 3), down the columns of a tile, and of F(4, 3), along its rows.
DOWN = (
  ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
  ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
  ((1, 1, 1, 0), (0, 1, -1, -1)),
)
ALONG = (
  (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
  ),
  (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
  ),
  ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)
# Outputs of a tile, and its inputs.
H_OUT, W_OUT = len(DOWN[2]), len(ALONG[2])
H_IN, W_IN = H_OUT + 2, W_OUT + 2
# G g G'^T of all values of the kernel at once: [24, 9].
KERNEL = np.kron(DOWN[1], ALONG[1]).astype(np.float32)

# What is worked on at a time should stay in the caches: the tiles of the images of a chunk, and the
# bytes of a pass over them, of transformed input and output together.
CHUNK_TILES = 512
PASS_BYTES = 16 * 2**20

# Images of this size or larger are convolved directly: XLA uses all cores for them, else only one.
DIRECT_PIXELS = 128 * 128
# So few channels are not worth a transform: the nine neighbours of a pixel are put side by side.
FEW = 4

Grid = list[list[jax.Array]]


@jax.custom_vjp
def conv3x3(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """Convolves with stride 1 and zeros around, and adds a bias.

  Computes in float32 whatever x's dtype; equal to a direct convolution but for rounding, a few
  millionths of the largest output. It has reverse-mode derivatives only.

  Args:
    x: [N, H, W, C].
    kernel: [3, 3, C, F], float32.
    bias: [F], float32.

  Returns:
    [N, H, W, F] in x's dtype.
  """
  return (_conv3x3(x, kernel) + bias.reshape(1, 1, 1, -1)).astype(x.dtype)


def _conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Does the same as `conv3x3`, without a bias and in float32."""
  inputs, features = kernel.shape[2:]
  large = x.shape[1] * x.shape[2] >= DIRECT_PIXELS
  if min(inputs, features) > FEW and not large:
    grid = transform_kernel(kernel)
    return join(lax.map(lambda x: convolve(x, grid), chunks(x)))
  x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
  if inputs <= FEW:
    return _dot(_neighbours(x), kernel.reshape(9 * inputs, features))
  return lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _conv3x3_forward(x, kernel, bias):
  return conv3x3(x, kernel, bias), (x, kernel)


def _conv3x3_backward(inputs, gradient: jax.Array):
  x, kernel = inputs

  def add(total, chunk: tuple[jax.Array, jax.Array]):
    x, gradient = (part.astype(jnp.float32) for part in chunk)
    # Summed here: over a whole batch XLA's CPU backend would sum on one core.
    part = kernel_gradient(x, gradient), gradient.sum((0, 1, 2))
    return jax.tree.map(jnp.add, total, part), None

  zeros = jnp.zeros(kernel.shape), jnp.zeros(kernel.shape[3])
  of_parameters, _ = lax.scan(add, zeros, (chunks(x), chunks(gradient)))
  return _conv3x3(gradient, turned(kernel)).astype(x.dtype), *of_parameters


conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)


def conv(
  x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int, padding: Any, dtype: jnp.dtype
) -> jax.Array:
  """Calls `conv3x3` with the arguments of `onednn.conv`; x is rounded to `dtype` first.

  Raises:
    ValueError: the convolution is not a 3x3 of stride 1 with a row of zeros all around and a bias.
  """
  if kernel.shape[:2] != (3, 3) or stride != 1 or padding != ((1, 1), (1, 1)) or bias is None:
    raise ValueError(
      f"winograd.conv: kernel {kernel.shape[:2]}, stride {stride}, padding {padding} must be 3x3, "
      "1 and 1 on each side, with a bias"
    )
  return conv3x3(x.astype(dtype), kernel, bias)


def chunks(x: jax.Array) -> jax.Array:
  """[N, H, W, C] -> [chunks, N / chunks, H, W, C]."""
  _, h, w, _ = x.shape
  return split(x, CHUNK_TILES // (-(-h // H_OUT) * -(-w // W_OUT)))


def kept_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the dtype of what a dense block keeps between its convolutions: the network's."""
  return dtype


def summed_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the dtype of a dense block's kernels and gradients: float32, or `dtype` if wider."""
  return jnp.promote_types(dtype, jnp.float32)


def convolve(x: jax.Array, kernel: Grid) -> jax.Array:
  """Convolves x [N, H, W, C] with a transformed kernel, 4 x 6 of [C, F]: [N, H, W, F], float32."""
  n, h, w, _ = x.shape
  features = kernel[0][0].shape[1]
  rows, passes = _passes(x.shape, features)

  def strip(padded: jax.Array) -> jax.Array:
    product = _pairs(_dot, _transform_input(padded), kernel)
    y = _on_both_sides(DOWN[2], product, ALONG[2])
    y = jnp.stack([jnp.stack(row, axis=3) for row in y], axis=2)  # [N, h, H_OUT, w, W_OUT, F]
    return y.reshape(n, y.shape[1] * H_OUT, y.shape[3] * W_OUT, features)

  padded = _pad(x, rows * passes)
  if passes == 1:
    return strip(padded)[:, :h, :w]

  def advance(now: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _rows(padded, i + 1, rows, halo=2), strip(now)

  _, y = lax.scan(advance, _rows(padded, 0, rows, halo=2), jnp.arange(passes))
  y = y.swapaxes(0, 1).reshape(n, H_OUT * rows * passes, -1, features)
  return y[:, :h, :w]


def kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns the kernel's gradient [3, 3, C, F], summed over all tiles.

  Args:
    x: [N, H, W, C].
    gradient: the output's gradient, [N, H, W, F].
  """
  n, h, w, c = x.shape
  features = gradient.shape[-1]
  if features <= FEW:
    total = _tile_sum(x, _neighbours(gradient)).reshape(c, 3, 3, features)
    return jnp.flip(total, (1, 2)).transpose(1, 2, 0, 3)
  rows, passes = _passes(x.shape, features)
  x = _pad(x, rows * passes)
  below, beside = H_OUT * rows * passes - h, -w % W_OUT
  gradient = jnp.pad(gradient, ((0, 0), (0, below), (0, beside), (0, 0)))

  def strip(x: jax.Array, gradient: jax.Array) -> Grid:
    h, w = gradient.shape[1] // H_OUT, gradient.shape[2] // W_OUT
    g = [[_every(gradient, i, j, h, w) for j in range(W_OUT)] for i in range(H_OUT)]
    g = _on_both_sides(_transposed(DOWN[2]), g, _transposed(ALONG[2]))
    return _pairs(_tile_sum, _transform_input(x), g)

  if passes == 1:
    total = strip(x, gradient)
  else:

    def rows_of(i: jax.Array | int) -> tuple[jax.Array, jax.Array]:
      return _rows(x, i, rows, halo=2), _rows(gradient, i, rows)

    def add(carry, i: jax.Array):
      total, now = carry
      return (jax.tree.map(jnp.add, total, strip(*now)), rows_of(i + 1)), None

    zeros = [[jnp.zeros((c, features))] * W_IN] * H_IN
    (total, _), _ = lax.scan(add, (zeros, rows_of(0)), jnp.arange(passes))
  total = jnp.stack([part.reshape(-1) for row in total for part in row])
  return (KERNEL.T @ total).reshape(3, 3, c, features)


def _passes(shape: tuple[int, ...], features: int) -> tuple[int, int]:
  """Returns the rows of tiles in a pass over the images, and the passes."""
  n, h, w, c = shape
  total = -(-h // H_OUT)
  row_bytes = H_IN * W_IN * 4 * n * -(-w // W_OUT) * (c + features)
  passes = math.ceil(total / max(1, PASS_BYTES // row_bytes))
  return math.ceil(total / passes), passes


def _pad(x: jax.Array, rows: int) -> jax.Array:
  """Pads x [N, H, W, C] with zeros to so many rows of tiles, and to whole tiles across."""
  _, h, w, _ = x.shape
  return jnp.pad(x, ((0, 0), (1, H_OUT * rows - h + 1), (1, -w % W_OUT + 1), (0, 0)))


def _neighbours(x: jax.Array) -> jax.Array:
  """[N, H, W, C] -> [N, H, W, 9 C], the 3x3 around each pixel, zeros outside."""
  _, h, w, _ = x.shape
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
  return jnp.concatenate(shifted, axis=-1)


def _rows(x: jax.Array, i: jax.Array | int, rows: int, halo: int = 0) -> jax.Array:
  """Returns the image's rows that pass i needs; for i beyond the last pass, any rows."""
  return lax.dynamic_slice_in_dim(x, H_OUT * rows * i, H_OUT * rows + halo, axis=1)


def _every(x: jax.Array, i: int, j: int, h: int, w: int) -> jax.Array:
  """Value (i, j) of the h x w tiles of x [N, H, W, C], in float32: [N, h, w, C]."""
  n, _, _, c = x.shape
  end = n, i + H_OUT * (h - 1) + 1, j + W_OUT * (w - 1) + 1, c
  return lax.slice(x, (0, i, j, 0), end, (1, H_OUT, W_OUT, 1)).astype(jnp.float32)


def transform_kernel(kernel: jax.Array) -> Grid:
  """G g G'^T of kernel [3, 3, C, F]: 4 x 6 of [C, F]."""
  shape = kernel.shape[2:]
  rows = KERNEL @ kernel.astype(jnp.float32).reshape(9, -1)
  return [[rows[i * W_IN + j].reshape(shape) for j in range(W_IN)] for i in range(H_IN)]


def _transform_input(padded: jax.Array) -> Grid:
  """B^T d B' of all tiles: padded [N, 2 h + 2, 4 w + 2, C] -> 4 x 6 of [N, h, w, C]."""
  h, w = (padded.shape[1] - 2) // H_OUT, (padded.shape[2] - 2) // W_OUT
  tiles = [[_every(padded, i, j, h, w) for j in range(W_IN)] for i in range(H_IN)]
  return _on_both_sides(DOWN[0], tiles, ALONG[0])


def _dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """[N, h, w, C] and [C, F]: [N, h, w, F]."""
  return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _tile_sum(a: jax.Array, b: jax.Array) -> jax.Array:
  """a^T b over all tiles; as matrices, or XLA's CPU backend would write a transposed copy of a."""
  a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
  return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


def _transposed(matrix):
  return tuple(zip(*matrix, strict=True))


def _pairs(function: Callable[..., jax.Array], a: Grid, b: Grid) -> Grid:
  return [[function(x, y) for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def _on_both_sides(left, grid: Grid, right) -> Grid:
  """L X R^T of a grid of arrays, by sums: no multiplication with 0 or 1."""
  rows = [[_combine(row, column) for column in zip(*grid, strict=True)] for row in left]
  return [[_combine(row, line) for row in right] for line in rows]


def _combine(weights, arrays) -> jax.Array:
  total = None
  for weight, array in zip(weights, arrays, strict=True):
    if weight == 0:
      continue
    term = array if abs(weight) == 1 else abs(weight) * array
    if total is None:
      total = term if weight > 0 else -term
    else:
      total = total + term if weight > 0 else total - term
  return total
