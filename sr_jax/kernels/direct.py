"""3x3 convolutions as XLA has them, for `dense_block` on an accelerator."""

import jax
from jax import lax
import jax.numpy as jnp


def transform_kernel(kernel: jax.Array) -> jax.Array:
  """What `convolve` takes of a kernel: the kernel."""
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
  """The kernel's gradient [3, 3, C, F] in x's dtype, from x [N, H, W, C] and the output's."""
  shape = jax.ShapeDtypeStruct((3, 3, x.shape[-1], gradient.shape[-1]), x.dtype)
  transpose = jax.linear_transpose(lambda kernel: convolve(x, kernel), shape)
  return transpose(gradient)[0]


def chunks(x: jax.Array) -> jax.Array:
  """All images at once: [1, N, H, W, C]."""
  return x[None]


def kept_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of what a dense block keeps between its convolutions: the network's."""
  return dtype


def summed_dtype(dtype: jnp.dtype) -> jnp.dtype:
  """The dtype of a dense block's kernels and gradients, for outputs kept in `dtype`: the same."""
  return dtype
