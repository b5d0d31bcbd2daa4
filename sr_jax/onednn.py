"""Convolutions in bfloat16 by oneDNN, for CPUs that multiply bfloat16.

XLA's CPU backend contains Intel's oneDNN, but computes bfloat16's convolutions in float32. It obeys
a custom call though, which its own passes would write were they switched on. Forward and for the
input's gradient that is a convolution; the kernel's gradient is one matrix product. Operands are
rounded to bfloat16, products summed in float32, and results stay float32, as all between the
convolutions should: XLA computes on bfloat16, and copies it even, by way of float32.

The call is no part of what JAX promises: `usable` tries it first. docs/cpu.md has the times.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sr_jax.winograd import turned

# The images whose neighbours are put side by side at a time, in bytes.
PASS_BYTES = 32 * 2**20

Padding = tuple[tuple[int, int], tuple[int, int]]
SAME = (1, 1), (1, 1)  # around a 3x3 of stride 1


@functools.cache
def usable() -> bool:
  """Whether convolutions on this machine should be oneDNN's.

  On one CPU device, since XLA cannot spread a custom call over several; with instructions for
  bfloat16, without which oneDNN's would be slow; and where a process of its own gets the right
  numbers, since a call that this jaxlib reads otherwise would end the process that tries it.
  """
  if jax.default_backend() != "cpu" or jax.device_count() > 1 or not _has_bfloat16():
    return False
  command = [sys.executable, "-m", "sr_jax.onednn"]
  folder = pathlib.Path(__file__).parent.parent
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  trial = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
  return trial.returncode == 0


def _has_bfloat16() -> bool:
  facts = pathlib.Path("/proc/cpuinfo")
  return facts.exists() and "avx512_bf16" in facts.read_text()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  """Convolves, multiplying bfloat16. It has reverse-mode derivatives only.

  Args:
    x: [N, H, W, C], float32 or bfloat16.
    kernel: [h, w, C, F].
    stride: of both axes.
    padding: rows of zeros above and below, columns left and right.

  Returns:
    [N, H', W', F], float32.
  """
  sides = zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
  out = [(side + sum(around) - k) // stride + 1 for side, k, around in sides]
  image = {"data": {"batch_dim": 0, "feature_dim": 3, "spatial_dims": [1, 2]}}
  filters = {"input_feature_dim": 2, "output_feature_dim": 3, "spatial_dims": [0, 1]}
  window = {
    "pad_left": [low for low, _ in padding],
    "pad_right": [high for _, high in padding],
    "strides": [stride] * 2,
    "window_dilations": [1, 1],
  }
  config = {"dims": 4, "feature_groups": 1, "input": image, "output": image}
  config |= {"kernel": {"filter": filters}, "window": window}
  shape = x.shape[0], *out, kernel.shape[3]
  return _call("convolution", {"onednn_conv_config": config}, shape, _round(x), _round(kernel))


def _forward(x, kernel, stride, padding):
  return conv(x, kernel, stride, padding), (x, kernel)


def _backward(stride, padding, inputs, gradient: jax.Array):
  x, kernel = inputs
  # The transposed convolution: stride becomes zeros between the pixels.
  apart = ((0, 0, 0), (0, 0, stride - 1), (0, 0, stride - 1), (0, 0, 0))
  spread = lax.pad(gradient, jnp.zeros((), gradient.dtype), apart) if stride > 1 else gradient
  around = []
  for i in range(2):
    low = kernel.shape[i] - 1 - padding[i][0]
    around.append((low, x.shape[1 + i] - spread.shape[1 + i] + kernel.shape[i] - 1 - low))
  x_gradient = conv(spread, turned(kernel), 1, tuple(around)).astype(x.dtype)
  return x_gradient, _kernel_gradient(x, gradient, kernel.shape, stride, padding)


conv.defvjp(_forward, _backward)


def transform_kernel(kernel: jax.Array) -> jax.Array:
  """What `convolve` takes of a kernel: the kernel, rounded."""
  return _round(kernel)


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves x [N, H, W, C] with [3, 3, C, F], stride 1 and zeros around: float32 [N, H, W, F]."""
  return conv(x, kernel, 1, SAME)


def kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
  """Of `convolve`: [3, 3, C, F] of x [N, H, W, C] and the output's gradient [N, H, W, F]."""
  return _kernel_gradient(x, gradient, (3, 3, x.shape[-1], gradient.shape[-1]), 1, SAME)


def chunks(x: jax.Array) -> jax.Array:
  """All images at once: [1, N, H, W, C]."""
  return x[None]


def _kernel_gradient(
  x: jax.Array, gradient: jax.Array, shape: tuple[int, ...], stride: int, padding: Padding
) -> jax.Array:
  """Sums over all pixels: [h, w, C, F] of x [N, H, W, C] and the output's gradient.

  One product of x moved along its rows, [.., w C], and the gradient moved down its columns, [.., h
  F]: fewer copies than h w of x alone.
  """
  kh, kw, c, f = shape
  n, h, w, _ = gradient.shape
  below, end = stride * (h - 1), stride * (w - 1) + 1

  def of_images(x: jax.Array, gradient: jax.Array) -> jax.Array:
    # As integers, which XLA copies as they are.
    x, gradient = (lax.bitcast_convert_type(_round(a), jnp.uint16) for a in (x, gradient))
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))[:, : below + kh]
    x = jnp.concatenate([x[:, :, j : j + end : stride] for j in range(kw)], axis=-1)
    zero, none = jnp.zeros((), jnp.uint16), (0, 0, 0)
    moved = [
      lax.pad(gradient, zero, (none, (i, kh - 1 - i, stride - 1), none, none)) for i in range(kh)
    ]
    gradient = jnp.concatenate(moved, axis=-1)
    x, gradient = (lax.bitcast_convert_type(a, jnp.bfloat16) for a in (x, gradient))
    return _matmul(x.reshape(-1, kw * c), gradient.reshape(-1, kh * f))

  images = max(1, PASS_BYTES // (2 * (below + kh) * w * (kw * c + kh * f)))
  images = max(k for k in range(1, min(n, images) + 1) if n % k == 0)
  if images == n:
    total = of_images(x, gradient)
  else:
    parts = [array.reshape(-1, images, *array.shape[1:]) for array in (x, gradient)]
    zeros = jnp.zeros((kw * c, kh * f))
    total, _ = lax.scan(lambda total, part: (total + of_images(*part), None), zeros, tuple(parts))
  return total.reshape(kw, c, kh, f).transpose(2, 0, 1, 3)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """a^T b of bfloat16, in float32: [P, M] and [P, N] -> [M, N]."""
  config = {"onednn_matmul_config": {"transpose_a": True}}
  return _call("matmul", config, (a.shape[1], b.shape[1]), a, b)


def _call(name: str, config: dict[str, Any], shape: tuple[int, ...], *operands) -> jax.Array:
  """One of oneDNN's operations, as XLA's `OneDnnContractionRewriter` would write it.

  XLA cannot write a program with it to a file, and fails at random when it tries: from here on JAX
  keeps no program of this process for the next.
  """
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
  return jax.ffi.ffi_call(
    f"__onednn${name}",
    jax.ShapeDtypeStruct(shape, jnp.float32),
    custom_call_api_version=1,
    legacy_backend_config=json.dumps(config),
  )(*operands)


def _round(x: jax.Array) -> jax.Array:
  return x.astype(jnp.bfloat16)


def _try() -> None:
  """Compares a convolution and its gradients with XLA's, of values that bfloat16 has."""
  shapes, rng = ((2, 7, 8, 16), (3, 3, 16, 32)), np.random.default_rng(0)
  x, kernel = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)

  def by_xla(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (2, 2), SAME, dimension_numbers=numbers)

  results = []
  for f in (lambda x, kernel: conv(x, kernel, 2, SAME), by_xla):
    y, back = jax.vjp(jax.jit(f), x, kernel)
    results.append((y, *back(jnp.sign(y))))
  for ours, theirs in zip(*results, strict=True):
    if not np.array_equal(ours, theirs):
      raise ValueError("oneDNN's numbers differ from XLA's")


if __name__ == "__main__":
  _try()
