"""Real-ESRGAN's compact network: all convolutions on the LR grid, for videos and fast previews."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax.kernels.choose import PLAIN, Kernels
from sr_jax.networks.blocks import check_channels, check_fields, repeat
from sr_jax.networks.layers import PReLU, conv, pixel_shuffle, upsample_nearest


class Compact(nn.Module):
  """Real-ESRGAN's SRVGGNetCompact; 621,424 parameters at x4, 1,213,296 with 32 blocks.

  Its output is added to the LR image, enlarged by repeating pixels, so both have as many channels.

  Attributes:
    features: channels of the body.
    blocks: convolutions of the body, each with a PReLU of one slope a channel: 16 in the models for
      videos, 32 in the general ones.
    scale: upsampling factor: 1, 2, 3, 4 or 8.
    out_channels: channels of the LR and the SR image.
    unroll: blocks in one iteration of the loop; 0 leaves the choice to `kernels`.
    remat: whether to recompute each block in the backward pass instead of storing its activations.
    dtype: the dtype to compute in, or its name; parameters are float32.
    kernels: how to compute the network, as `choose.choose` returns it.
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
    how = {"dtype": self.dtype, "kernels": self.kernels}
    x = conv(lr, self.features, name="conv_first", **how)
    x = PReLU(per_channel=True, name="prelu_first")(x)
    x = repeat(self, _Block(name="body", **how), x, train=train)
    x = conv(x, self.out_channels * self.scale**2, name="conv_last", **how)
    x = pixel_shuffle(x.astype(jnp.float32), self.scale)
    return x + upsample_nearest(lr.astype(jnp.float32), self.scale)


class _Block(nn.Module):
  """A convolution and its PReLU."""

  dtype: Any
  kernels: Kernels

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = conv(x, x.shape[-1], name="conv", dtype=self.dtype, kernels=self.kernels)
    return PReLU(per_channel=True, name="prelu")(x)
