"""ESRGAN's dense block as TPU's compiler estimates it to be cheapest (docs/scaling.md).

Without derivatives it is by source, as `dense_block.py` explains. To train, it is in the paper's
order, in which nothing is summed outside of a convolution, and x and the four outputs are stored
side by side, once: JAX's own gradient stores the input of every convolution, more than three times
as many channels. Going back, the gradient of each source is one convolution of the gradients of all
layers that read it, side by side. One convolution of all sources and all gradients gives the
gradients of all kernels, and one sum those of all biases.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sr_jax.kernels import direct
from sr_jax.kernels.chunks import turned
from sr_jax.kernels.dense_block import kernels_by_source, sum_by_source
from sr_jax.kernels.leaky_relu import SLOPE


def on_tpu(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  biases: Sequence[jax.Array],
  inside: jax.Array | None,
  dtype: Any,
) -> jax.Array:
  """Computes `dense_block.dense_block` of x in this dtype; a `DenseBlock`.

  There are first derivatives only, in reverse mode, and none where `inside` is given.
  """
  x = x.astype(dtype)
  if inside is not None:
    return _by_source(x, kernels, biases, inside)
  return _dense_block(x, kernels, biases)


def _by_source(
  x: jax.Array,
  kernels: Sequence[jax.Array],
  biases: Sequence[jax.Array],
  inside: jax.Array | None = None,
) -> jax.Array:
  def convolve(source: jax.Array, kernel: jax.Array) -> jax.Array:
    source = source if inside is None else source * inside.astype(source.dtype)
    return direct.convolve(source, kernel)

  outputs = sum_by_source(
    x,
    kernels_by_source([kernel.astype(x.dtype) for kernel in kernels]),
    biases,
    convolve=convolve,
    activate=lambda y: _activate(y).astype(x.dtype),
  )
  return outputs[5].astype(x.dtype)


def _activate(y: jax.Array) -> jax.Array:
  return jnp.where(y > 0, y, SLOPE * y)


@jax.custom_vjp
def _dense_block(x, kernels, biases):
  return _by_source(x, kernels, biases)


def _forward(x, kernels, biases):
  def layer(sources: jax.Array, i: int) -> jax.Array:
    y = direct.convolve(sources, kernels[i].astype(x.dtype)) + biases[i].reshape(1, 1, 1, -1)
    return (_activate(y) if i < 4 else y).astype(x.dtype)

  sources = x
  for i in range(4):
    sources = jnp.concatenate([sources, layer(sources, i)], axis=-1)
  return layer(sources, 4), (sources, kernels)


def _backward(residuals, gradient: jax.Array):
  sources, kernels = residuals
  dtype, starts = sources.dtype, [0, *(kernel.shape[2] for kernel in kernels)]
  # Of each source: for the gradients of all layers that read it.
  backward = [
    jnp.concatenate([turned(kernel[:, :, starts[i] : starts[i + 1]]) for kernel in kernels[i:]], 2)
    for i in range(5)
  ]
  backward = [kernel.astype(dtype) for kernel in backward]
  gradients = gradient.astype(dtype)  # of the outputs of all layers from the i-th on
  for i in reversed(range(1, 5)):
    wanted = direct.convolve(gradients, backward[i])
    positive = sources[..., starts[i] : starts[i + 1]] > 0
    wanted = jnp.where(positive, wanted, SLOPE * wanted)
    gradients = jnp.concatenate([wanted, gradients], axis=-1)
  kernel = direct.kernel_gradient(sources, gradients)
  bias = gradients.astype(jnp.promote_types(dtype, jnp.float32)).sum((0, 1, 2))
  ends = [sum(kernel.shape[3] for kernel in kernels[:i]) for i in range(1, 5)]  # of each layer
  # The product has all sources for each layer; a layer's kernel is of those before it alone.
  of_kernels = [
    of_all_sources[:, :, : kernel.shape[2]].astype(kernel.dtype)
    for of_all_sources, kernel in zip(jnp.split(kernel, ends, axis=-1), kernels, strict=True)
  ]
  return direct.convolve(gradients, backward[0]), of_kernels, jnp.split(bias, ends)


_dense_block.defvjp(_forward, _backward)
