"""ESRGAN's dense block with its sums in another order: by source, and not by layer.

In the paper's order each layer convolves all outputs before it. By source, each output is convolved
once, with the kernels of all later layers side by side: the same numbers, by wider convolutions and
without copies. Going back, the gradient of each output is convolved once, with the kernel of its
layer. One convolution of all sources and all outputs gives the gradients of all kernels: it makes
1.4 times the numbers that are needed, but is one wide convolution instead of five narrow ones.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from sr_jax.kernels.chunks import join, turned
from sr_jax.kernels.leaky_relu import SLOPE

# (x, kernels, biases, inside, dtype) -> y, float32 or `dtype`; arguments as `dense_block`'s.
DenseBlock = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)  # so that equal choices are equal
class DenseBlockBy:
  """`dense_block` with its first two arguments, for x in any dtype."""

  by: types.ModuleType
  single_device: bool

  def __call__(self, x, kernels, biases, inside, dtype):
    x = x.astype(self.by.kept_dtype(jnp.dtype(dtype)))
    return dense_block(self.by, self.single_device, x, kernels, biases, inside)


@dataclasses.dataclass(frozen=True)
class DenseBlockWith:
  """A dense block by source with the convolution and the activation of all other layers.

  Attributes:
    conv: as `onednn.conv`.
    leaky_relu: as `leaky_relu.plain`.
  """

  conv: Callable[..., jax.Array]
  leaky_relu: Callable[[jax.Array], jax.Array]

  def __call__(self, x, kernels, biases, inside, dtype):
    def convolve(source, kernel):
      source = source if inside is None else source * inside.astype(source.dtype)
      return self.conv(source, kernel, None, 1, ((1, 1), (1, 1)), jnp.dtype(dtype))

    by_source = kernels_by_source(kernels)
    return sum_by_source(x, by_source, biases, convolve=convolve, activate=self.leaky_relu)[5]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def dense_block(
  by: types.ModuleType,
  single_device: bool,
  x: jax.Array,
  kernels: Sequence[jax.Array],
  biases: Sequence[jax.Array],
  inside: jax.Array | None = None,
) -> jax.Array:
  """Five 3x3 convolutions, each of x and all outputs before it; leaky ReLUs but after the last.

  Outputs are kept in x's dtype. `winograd` and `onednn` sum in float32 and return it; `direct` sums
  in x's dtype, in which it also keeps the kernels and the gradients. There are first derivatives
  only, in reverse mode.

  Args:
    by: the module that convolves: `direct`, `winograd` or `onednn`. It has `transform_kernel`;
      `convolve`, which takes what that returns; `kernel_gradient`; `chunks`, for the images that it
      works on at a time; and `summed_dtype`.
    single_device: whether the program is for one device alone.
    x: [N, H, W, C].
    kernels: [3, 3, C, F], [3, 3, C + F, F], ..., [3, 3, C + 4 F, C], float32.
    biases: [F] four times, [C].
    inside: [1, H, W, 1], 0 where each convolution shall see the zeros around the image, or with
      `direct` [N, H, W, 1]. There are no derivatives then.

  Returns:
    [N, H, W, C], in x's dtype.
  """
  transformed = _transformed(by, kernels, x)

  def block(_, x: jax.Array) -> tuple[None, jax.Array]:
    return None, _outputs(by, x, transformed, biases, inside)[5].astype(x.dtype)

  return join(_scan(block, None, by.chunks(x))[1])


def _scan(function: Callable[..., Any], carry: Any, chunks: Any) -> Any:
  """`lax.scan`, but no loop for a single chunk."""
  if len(jax.tree.leaves(chunks)[0]) > 1:
    return lax.scan(function, carry, chunks)
  carry, y = function(carry, jax.tree.map(lambda x: x[0], chunks))
  return carry, jax.tree.map(lambda y: y[None], y)


def _transformed(by: types.ModuleType, kernels: Sequence[jax.Array], x: jax.Array) -> list[Any]:
  """What `convolve` takes, by source."""
  # Rounded first, or XLA would cut the kernels up and join them in float32.
  kernels = kernels_by_source([kernel.astype(by.summed_dtype(x.dtype)) for kernel in kernels])
  return [by.transform_kernel(kernel) for kernel in kernels]


def _outputs(
  by: types.ModuleType,
  x: jax.Array,
  transformed: Sequence[Any],
  biases: Sequence[jax.Array],
  inside: jax.Array | None = None,
) -> list[jax.Array]:
  """Returns x and the output of each layer; the last is float32, the others are in x's dtype."""

  def convolve(source: jax.Array, kernel: Any) -> jax.Array:
    return by.convolve(source if inside is None else source * inside.astype(source.dtype), kernel)

  return sum_by_source(
    x,
    transformed,
    biases,
    convolve=convolve,
    activate=lambda y: jnp.where(y > 0, y, SLOPE * y).astype(x.dtype),
  )


def _forward(by, single_device, x, kernels, biases, inside):
  if inside is not None:
    raise ValueError("dense_block with inside has no derivatives; leave inside out to train")
  transformed = _transformed(by, kernels, x)

  def block(_, x: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
    *sources, y = _outputs(by, x, transformed, biases)
    return None, (y.astype(x.dtype), jnp.concatenate(sources, axis=-1))

  y, sources = join(_scan(block, None, by.chunks(x))[1])
  return y, (sources, kernels, biases)


def _backward(by, single_device, residuals, gradient: jax.Array):
  sources, kernels, biases = residuals
  starts = [
    0,
    *(kernel.shape[2] for kernel in kernels),
  ]  # first channel of each source; their number
  dtype, wide = by.summed_dtype(sources.dtype), jnp.promote_types(sources.dtype, jnp.float32)
  backward = [by.transform_kernel(turned(kernel.astype(dtype))) for kernel in kernels]

  def block(total, inputs: tuple[jax.Array, jax.Array]):
    sources, gradient = inputs
    wanted = [jnp.zeros((), wide)] * 5  # the gradient of each source
    gradients = [gradient.astype(dtype)]  # of each output
    for i in reversed(range(1, 5)):
      parts = jnp.split(by.convolve(gradients[0], backward[i]), starts[1 : i + 1], axis=-1)
      wanted[: i + 1] = [a + b for a, b in zip(wanted, parts, strict=False)]
      positive = sources[..., starts[i] : starts[i + 1]] > 0
      gradients.insert(0, jnp.where(positive, wanted[i], SLOPE * wanted[i]).astype(dtype))
    all_gradients = jnp.concatenate(gradients, axis=-1)
    kernel = by.kernel_gradient(sources, all_gradients)
    last = by.convolve(gradients[0], backward[0])
    if single_device:
      # Both are computed together, or in an unrolled network XLA would keep what the kernel's
      # gradient is made of. On several devices this would wait for the sum over them.
      last, kernel = lax.optimization_barrier((last, kernel))
    part = kernel.astype(wide), all_gradients.astype(wide).sum((0, 1, 2))
    wanted[0] += last
    return jax.tree.map(jnp.add, total, part), wanted[0].astype(sources.dtype)

  ends = [sum(len(bias) for bias in biases[:i]) for i in range(1, 6)]  # of each layer's output
  zeros = jnp.zeros((3, 3, starts[5], ends[4]), wide), jnp.zeros(ends[4], wide)
  (kernel, bias), x = _scan(block, zeros, (by.chunks(sources), by.chunks(gradient)))
  # The product has all sources for each layer; a layer's kernel is of those before it alone.
  of_all_sources = jnp.split(kernel, ends[:4], axis=-1)
  kernels = [
    of_all[:, :, : kernel.shape[2]].astype(kernel.dtype)
    for of_all, kernel in zip(of_all_sources, kernels, strict=True)
  ]
  return join(x), kernels, jnp.split(bias, ends[:4]), None


dense_block.defvjp(_forward, _backward)


def sum_by_source(
  x: jax.Array,
  kernels: Sequence[Any],
  biases: Sequence[jax.Array],
  *,
  convolve: Callable[[jax.Array, Any], jax.Array],
  activate: Callable[[jax.Array], jax.Array],
) -> list[jax.Array]:
  """A dense block's sums by source: each source is convolved once, with all kernels that read it.

  Args:
    x: [N, H, W, C].
    kernels: what `convolve` takes, of `kernels_by_source`.
    biases: [F] four times, [C].
    convolve: (source, kernel) -> [N, H, W, outputs of all layers that read the source].
    activate: of all layers but the last.

  Returns:
    x and the outputs of the five layers.
  """
  outputs, sums = [x], [bias.reshape(1, 1, 1, -1) for bias in biases]
  for i in range(5):
    ends = [sum(len(bias) for bias in biases[i:j]) for j in range(i + 1, 5)]
    parts = jnp.split(convolve(outputs[i], kernels[i]), ends, axis=-1)
    sums[i:] = [a + b for a, b in zip(sums[i:], parts, strict=True)]
    outputs.append(activate(sums[i]) if i < 4 else sums[i])
  return outputs


def kernels_by_source(kernels: Sequence[jax.Array]) -> list[jax.Array]:
  """For x and for each output, the kernels of all layers that read it, side by side."""
  starts = [0, *(kernel.shape[2] for kernel in kernels)]
  return [
    jnp.concatenate([kernel[:, :, starts[i] : starts[i + 1]] for kernel in kernels[i:]], axis=-1)
    for i in range(5)
  ]
