"""Computes 3x3 convolutions with XLA's own, for `dense_block` on an accelerator."""

import jax
from jax import lax
import jax.numpy as jnp


def transform_kernel(kernel: jax.Array) -> jax.Array:
  """Prepares a kernel for `convolve`, which takes it as it is."""
  return kernel


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolves x [N, H, W, C] with [3, 3, C, F] of its dtype, zeros around: [N, H, W, F]."""
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1),
    padding=((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns the kernel's gradient [3, 3, C, F] in x's dtype.

  Args:
    x: [N, H, W, C].
    gradient: the output's gradient, [N, H, W, F].
  """
  shape = jax.ShapeDtypeStruct((3, 3, x.shape[-1], gradient.shape[-1]), x.dtype)
  transpose = jax.linear_transpose(lambda kernel: convolve(x, kernel), shape)
  return transpose(gradient)[0]


def chunks(x: jax.Array) -> jax.Array:
  """Makes one chunk of all images: [1, N, H, W, C]."""
  return x[None]


def kept_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the dtype of what a dense block keeps between its convolutions: the network's."""
  return dtype


def summed_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """Returns the dtype of a dense block's kernels and gradients: `dtype`, that of its outputs."""
  return dtype
