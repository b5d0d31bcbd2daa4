"""What the generators are built of: the residual block, and the scan over blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.kernels.choose import ALGORITHMS, PLAIN, Kernels
from sr_jax.networks.layers import conv

# The factors of the upsampling layers, one after another, that make up a scale.
UPSAMPLING = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}


class ResidualBlock(nn.Module):
  """Residual block without BatchNorm: conv, (leaky) ReLU, conv, and the sum with the input."""

  slope: float
  residual_scale: float = 1.0
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    how = {"init": "msra", "dtype": self.dtype, "kernels": self.kernels}
    y = self.kernels.leaky_relu(conv(x, x.shape[-1], name="conv1", **how), self.slope)
    y = conv(y, x.shape[-1], name="conv2", **how)
    return y * self.residual_scale + x


def repeat(net: nn.Module, block: nn.Module, x: jax.Array, *, train: bool) -> jax.Array:
  """Applies net.blocks copies of `block` in turn, their variables stacked on a leading axis.

  Looped, unrolled and rematerialised bodies read the same variables. With net.unroll 0, training
  unrolls fully where net.kernels says so. All else loops, which compiles in a fraction of the time.
  """
  unroll = net.unroll or (net.blocks if train and net.kernels.unroll else 1)

  def step(block, x, _):
    return block(x), None

  if net.remat:
    # Inside a loop nothing can merge the recomputation with the forward pass: no barrier is needed.
    step = nn.remat(step, prevent_cse=unroll > 1)
  body = nn.scan(
    step,
    variable_axes={"params": 0, "batch_stats": 0},
    split_rngs={"params": True},
    length=net.blocks,
    unroll=min(unroll, net.blocks),
  )
  return body(block, x, None)[0]


def check_channels(net: nn.Module, lr: jax.Array):
  """Raises UserError where lr has other channels than a network that adds it to its output."""
  if lr.shape[-1] != net.out_channels:
    raise UserError(
      f"{type(net).__name__} adds its input to its output: out_channels={net.out_channels} "
      f"must equal the {lr.shape[-1]} channels of lr"
    )


def check_fields(net: nn.Module, scale: int, input_unshuffle: int = 1):
  """Raises UserError where a field has a value that no network can be built with."""
  who = type(net).__name__
  if scale not in UPSAMPLING:
    raise UserError(f"{who}: scale={scale!r} must be one of {sorted(UPSAMPLING)}; try scale=4")
  if input_unshuffle not in (1, 2, 4) or scale * input_unshuffle not in UPSAMPLING:
    raise UserError(
      f"{who}: input_unshuffle={input_unshuffle!r} must be 1, 2 or 4, and its product with "
      f"scale={scale} one of {sorted(UPSAMPLING)}; try input_unshuffle=1"
    )
  for field in ("features", "blocks", "growth", "out_channels"):
    value = getattr(net, field, 1)
    if value < 1:
      raise UserError(f"{who}: {field}={value!r} must be at least 1")
  if getattr(net, "algorithm", "") not in ("", *ALGORITHMS):
    raise UserError(
      f"{who}: algorithm={net.algorithm!r} must be one of {', '.join(ALGORITHMS)}, or ''"
    )
  if net.unroll < 0:
    raise UserError(f"{who}: unroll={net.unroll!r} must be 0 (chosen for the devices) or more")
  try:
    is_float = jnp.issubdtype(jnp.dtype(net.dtype), jnp.floating)
  except TypeError:
    is_float = False
  if not is_float:
    raise UserError(f"{who}: dtype={net.dtype!r} must be a float dtype; try float32 or bfloat16")
