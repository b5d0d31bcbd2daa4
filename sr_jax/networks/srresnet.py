"""SRGAN's generator, and BasicSR's version of it without BatchNorm."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.kernels.choose import PLAIN, Kernels
from sr_jax.networks.blocks import UPSAMPLING, ResidualBlock, check_channels, check_fields, repeat
from sr_jax.networks.layers import (
  PReLU,
  batch_norm,
  conv,
  pixel_shuffle,
  upsample_bilinear,
)


class SRResNet(nn.Module):
  """Generator of SRGAN (section 2.1, figure 4); 1,549,462 parameters with one slope per PReLU.

  The paper names neither momentum and epsilon of the BatchNorm, which are PyTorch's here, nor a
  final activation: there is none unless `final_activation` asks for it.

  Attributes:
    features: channels of the body.
    blocks: residual blocks.
    scale: upsampling factor: 1, 2, 3, 4 or 8.
    out_channels: channels of the SR image.
    prelu_per_channel: whether each channel has a slope of its own (1,550,659 parameters) instead of
      one slope for each layer.
    final_activation: 'none', or 'tanh', which is mapped to [0, 1] as (y + 1) / 2.
    unroll: blocks in one iteration of the loop; 0 leaves the choice to `kernels`.
    remat: whether to recompute each block in the backward pass instead of storing its activations.
    dtype: the dtype to compute in, or its name; parameters and BatchNorm's statistics are float32.
    kernels: how to compute the network, as `choose.choose` returns it.
  """

  features: int = 64
  blocks: int = 16
  scale: int = 4
  out_channels: int = 3
  prelu_per_channel: bool = False
  final_activation: str = "none"
  unroll: int = 0
  remat: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  def __post_init__(self):
    check_fields(self, self.scale)
    if self.final_activation not in ("none", "tanh"):
      raise UserError(
        f"SRResNet: final_activation={self.final_activation!r} must be one of none, tanh"
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, out_channels]."""
    f, per_channel = self.features, self.prelu_per_channel
    how = {"dtype": self.dtype, "kernels": self.kernels}
    x = conv(lr, f, kernel_size=9, name="conv_first", **how)
    x = PReLU(per_channel, name="prelu_first")(x)
    block = _BatchNormBlock(per_channel, train, self.dtype, self.kernels, name="body")
    y = repeat(self, block, x, train=train)
    y = conv(y, f, name="conv_body", **how)
    x = x + batch_norm(y, train=train, name="bn_body")
    for i, r in enumerate(UPSAMPLING[self.scale], 1):
      x = pixel_shuffle(conv(x, f * r**2, name=f"conv_up{i}", **how), r)
      x = PReLU(per_channel, name=f"prelu_up{i}")(x)
    x = conv(x, self.out_channels, kernel_size=9, name="conv_last", **how).astype(jnp.float32)
    return (jnp.tanh(x) + 1) / 2 if self.final_activation == "tanh" else x


class MSRResNet(nn.Module):
  """BasicSR's SRResNet (`basicsr/archs/srresnet_arch.py`); 1,517,571 parameters.

  It has no BatchNorm, and its output is added to the bilinearly upsampled input. The attributes are
  those of `SRResNet`; the LR image has `out_channels` channels too.
  """

  features: int = 64
  blocks: int = 16
  scale: int = 4
  out_channels: int = 3
  unroll: int = 0
  remat: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  def __post_init__(self):
    check_fields(self, self.scale)
    super().__post_init__()

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, c]."""
    check_channels(self, lr)
    f, leaky_relu = self.features, self.kernels.leaky_relu
    how = {"dtype": self.dtype, "kernels": self.kernels}
    x = leaky_relu(conv(lr, f, name="conv_first", init="msra", **how), 0.1)
    x = repeat(self, ResidualBlock(slope=0.0, name="body", **how), x, train=train)
    for i, r in enumerate(UPSAMPLING[self.scale], 1):
      x = pixel_shuffle(conv(x, f * r**2, name=f"upconv{i}", init="msra", **how), r)
      x = leaky_relu(x, 0.1)
    x = leaky_relu(conv(x, f, name="conv_hr", init="msra", **how), 0.1)
    x = conv(x, self.out_channels, name="conv_last", init="msra", **how)
    return x.astype(jnp.float32) + upsample_bilinear(lr.astype(jnp.float32), self.scale)


class _BatchNormBlock(nn.Module):
  """Residual block of SRGAN: conv, BN, PReLU, conv, BN, and the sum with the input."""

  prelu_per_channel: bool
  train: bool
  dtype: Any
  kernels: Kernels

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    how = {"dtype": self.dtype, "kernels": self.kernels}
    y = conv(x, x.shape[-1], name="conv1", **how)
    y = batch_norm(y, train=self.train, name="bn1")
    y = PReLU(self.prelu_per_channel, name="prelu")(y)
    y = conv(y, x.shape[-1], name="conv2", **how)
    return x + batch_norm(y, train=self.train, name="bn2")
