"""Computes convolutions with oneDNN, for one CPU.

XLA's CPU backend contains Intel's oneDNN, but convolves without it, and bfloat16 even by way of
float32. It does execute custom calls to oneDNN. Passes of its own, which are switched off, would
write such calls; this module writes them instead. The forward pass and the input's gradient are
convolutions, the kernel's gradient is one matrix product. In bfloat16 only the operands are
rounded: sums and results are float32. Everything between the convolutions should be float32 too,
since XLA computes on bfloat16, and even copies it, by way of float32.

JAX promises nothing about these calls: `choose.py` tries them first, in a process of its own, by
running this module with the dtypes to try. docs/cpu.md has the times.
"""

import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from sr_jax.kernels.chunks import split

# Bytes of the images whose neighbours are put side by side at a time.
PASS_BYTES = 32 * 2**20

Padding = tuple[tuple[int, int], tuple[int, int]]
SAME = (1, 1), (1, 1)  # around a 3x3 of stride 1


def stop_keeping_programs() -> None:
  """Stops JAX from writing more of this process's programs to its compilation cache.

  XLA cannot write a program with these calls to a file, and fails at random when it tries.
  """
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)


def conv(
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  stride: int,
  padding: Padding,
  dtype: jnp.dtype,
) -> jax.Array:
  """Convolves. It has first derivatives only, in reverse mode.

  `stop_keeping_programs` has to come first; `choose.choose` does that.

  Args:
    x: [N, H, W, C], of any float dtype.
    kernel: [h, w, C, F].
    bias: [F], or None.
    stride: the stride of both axes.
    padding: rows of zeros above and below, columns of zeros left and right.
    dtype: the dtype to round the operands to, float32 or bfloat16.

  Returns:
    [N, H', W', F], float32.
  """
  y = (_conv if stride == 1 else functools.partial(_strided, stride))(x, kernel, padding, dtype)
  return y if bias is None else y + bias.reshape(1, 1, 1, -1)


def _strided(
  stride: int, x: jax.Array, kernel: jax.Array, padding: Padding, dtype: jnp.dtype
) -> jax.Array:
  # Each stride x stride pixels as one, with their channels side by side: a convolution of stride 1,
  # whose gradients are convolutions without zeros in between.
  n, _, _, c = x.shape
  taps = [-(-side // stride) for side in kernel.shape[:2]]
  sides = zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
  out = [(side + sum(around) - k) // stride + 1 for side, k, around in sides]
  pixels = [size + tap - 1 for size, tap in zip(out, taps, strict=True)]
  ends = [
    (low, stride * pixel - side - low, 0)  # negative cuts off what no tap reaches
    for (low, _), pixel, side in zip(padding, pixels, x.shape[1:3], strict=True)
  ]
  x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
  x = x.reshape(n, pixels[0], stride, pixels[1], stride, c).transpose(0, 1, 3, 2, 4, 5)
  missing = [(0, stride * tap - side) for tap, side in zip(taps, kernel.shape[:2], strict=True)]
  kernel = jnp.pad(kernel, (*missing, (0, 0), (0, 0)))
  kernel = kernel.reshape(taps[0], stride, taps[1], stride, c, -1).transpose(0, 2, 1, 3, 4, 5)
  x, kernel = x.reshape(n, *pixels, -1), kernel.reshape(*taps, stride**2 * c, -1)
  return _conv(x, kernel, ((0, 0), (0, 0)), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, padding: Padding, dtype: jnp.dtype) -> jax.Array:
  """Convolves with stride 1."""
  return _convolution(x, kernel, padding, dtype)


def _forward(x, kernel, padding, dtype):
  return _conv(x, kernel, padding, dtype), (x, kernel)


def _backward(padding, dtype, inputs, gradient: jax.Array):
  x, kernel = inputs
  sides = zip(kernel.shape[:2], padding, strict=True)
  around = tuple((k - 1 - low, k - 1 - high) for k, (low, high) in sides)
  # oneDNN swaps the channels as it reads them, in less time than XLA would take.
  turned = jnp.flip(kernel, (0, 1))
  x_gradient = _convolution(gradient, turned, around, dtype, inputs=3).astype(x.dtype)
  return x_gradient, _kernel_gradient(x, gradient, kernel.shape, padding, dtype)


_conv.defvjp(_forward, _backward)


def _convolution(
  x: jax.Array, kernel: jax.Array, padding: Padding, dtype: jnp.dtype, inputs: int = 2
) -> jax.Array:
  """Convolves with stride 1; `inputs` is the kernel's dimension of x's channels, 2 or 3."""
  sides = zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
  out = [side + sum(around) - k + 1 for side, k, around in sides]
  image = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
  filters = {"input_feature_dim": inputs, "output_feature_dim": 5 - inputs, "spatial_dims": [0, 1]}
  window = {
    "pad_left": [low for low, _ in padding],
    "pad_right": [high for _, high in padding],
    "strides": [1, 1],
    "window_dilations": [1, 1],
  }
  config = {"dims": 4, "feature_groups": 1, "input": image, "output": image}
  config |= {"kernel": {"filter": filters}, "window": window}
  operands = x.astype(dtype), kernel.astype(dtype)
  shape = x.shape[0], *out, kernel.shape[5 - inputs]
  return _call("convolution", {"onednn_conv_config": config}, shape, *operands)


def transform_kernel(kernel: jax.Array) -> jax.Array:
  """Prepares a kernel for `convolve`: rounds it to bfloat16."""
  return kernel.astype(jnp.bfloat16)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves x [N, H, W, C] with [3, 3, C, F] in bfloat16, zeros around: float32 [N, H, W, F]."""
  return _conv(x, kernel, SAME, jnp.bfloat16)


def kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns the kernel's gradient [3, 3, C, F].

  Args:
    x: [N, H, W, C].
    gradient: the output's gradient, [N, H, W, F].
  """
  shape = 3, 3, x.shape[-1], gradient.shape[-1]
  return _kernel_gradient(x, gradient, shape, SAME, jnp.bfloat16)


def chunks(x: jax.Array) -> jax.Array:
  """Makes one chunk of all images: [1, N, H, W, C]."""
  return x[None]


def kept_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the dtype of what a dense block keeps between its convolutions: float32."""
  return jnp.dtype(jnp.float32)


def summed_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the dtype of a dense block's kernels and gradients: float32, or `dtype` if wider."""
  return jnp.promote_types(dtype, jnp.float32)


def _kernel_gradient(
  x: jax.Array,
  gradient: jax.Array,
  shape: tuple[int, ...],
  padding: Padding,
  dtype: jnp.dtype,
) -> jax.Array:
  """Returns the kernel's gradient [h, w, C, F], from x [N, H, W, C] and the output's gradient.

  It is one matrix product of w copies of x moved along its rows, [.., w C], and h copies of the
  gradient moved down its columns, [.., h F]. These are fewer copies than the h w of x alone.
  """
  kh, kw, c, f = shape
  _, h, w, _ = gradient.shape
  none = 0, 0

  def of_images(x: jax.Array, gradient: jax.Array) -> jax.Array:
    x, gradient = x.astype(dtype), gradient.astype(dtype)
    if dtype == jnp.bfloat16:  # as integers, which XLA copies as they are
      x, gradient = (lax.bitcast_convert_type(a, jnp.uint16) for a in (x, gradient))
    x = jnp.pad(x, (none, *padding, none))
    x = jnp.concatenate([x[:, :, j : j + w] for j in range(kw)], axis=-1)
    moved = [jnp.pad(gradient, (none, (i, kh - 1 - i), none, none)) for i in range(kh)]
    gradient = jnp.concatenate(moved, axis=-1)
    if dtype == jnp.bfloat16:
      x, gradient = (lax.bitcast_convert_type(a, dtype) for a in (x, gradient))
    return _matmul(x.reshape(-1, kw * c), gradient.reshape(-1, kh * f))

  image_bytes = jnp.dtype(dtype).itemsize * (h + kh - 1) * w * (kw * c + kh * f)
  parts = tuple(split(array, PASS_BYTES // image_bytes) for array in (x, gradient))
  zeros = jnp.zeros((kw * c, kh * f), jnp.float32)
  total, _ = lax.scan(lambda total, part: (total + of_images(*part), None), zeros, parts)
  return total.reshape(kw, c, kh, f).transpose(2, 0, 1, 3)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """a^T b, in float32: [P, M] and [P, N] -> [M, N]."""
  config = {"onednn_matmul_config": {"transpose_a": True}}
  return _call("matmul", config, (a.shape[1], b.shape[1]), a, b)


def _call(name: str, config: dict[str, Any], shape: tuple[int, ...], *operands) -> jax.Array:
  """Calls one of oneDNN's operations, as XLA's `OneDnnContractionRewriter` would write the call."""
  return jax.ffi.ffi_call(
    f"__onednn${name}",
    jax.ShapeDtypeStruct(shape, jnp.float32),
    custom_call_api_version=1,
    legacy_backend_config=json.dumps(config),
  )(*operands)


def try_dtypes(dtypes: Sequence[str]) -> None:
  """Compares a convolution of small integers and its gradients with XLA's, which are exact.

  Args:
    dtypes: the dtypes to try. Each one in which the numbers are the same is printed before the next
      is tried.

  Raises:
    ValueError: the numbers in one of the dtypes differ from XLA's.
  """
  shapes, rng = ((2, 7, 8, 16), (3, 3, 16, 32)), np.random.default_rng(0)
  x, kernel = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)

  def by_xla(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (2, 2), SAME, dimension_numbers=numbers)

  def results(f):
    y, back = jax.vjp(jax.jit(f), x, kernel)
    return y, *back(jnp.sign(y))

  expected = results(by_xla)
  for name in dtypes:
    actual = results(
      functools.partial(conv, bias=None, stride=2, padding=SAME, dtype=jnp.dtype(name))
    )
    if not all(map(np.array_equal, actual, expected)):
      raise ValueError(f"oneDNN's numbers in {name} differ from XLA's")
    print(name, flush=True)


if __name__ == "__main__":
  stop_keeping_programs()
  try_dtypes(sys.argv[1:])
