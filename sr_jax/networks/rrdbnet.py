"""ESRGAN's generator, and the paper's smaller one of plain residual blocks."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax.kernels.choose import ALGORITHMS, PLAIN, Kernels
from sr_jax.kernels.dense_block import DenseBlock
from sr_jax.kernels.leaky_relu import SLOPE
from sr_jax.networks.blocks import UPSAMPLING, ResidualBlock, check_fields, repeat
from sr_jax.networks.layers import conv, pixel_unshuffle, upsample_nearest
from sr_jax.networks.masking import Inside


class RRDBNet(nn.Module):
  """Generator of ESRGAN (section 3.1, figure 4); 16,697,987 parameters with 23 blocks.

  The paper's smaller model has 16 plain residual blocks, `ResidualNet`, not 16 of these.

  Attributes:
    features: channels of the body.
    blocks: residual-in-residual dense blocks.
    growth: channels that each convolution of a dense block adds.
    residual_scale: beta, at both levels.
    scale: upsampling factor: 1, 2, 3, 4 or 8. x3 is one nearest x3, the others are made of x2.
    out_channels: of the SR image.
    input_unshuffle: pixel-unshuffle of the input: BasicSR's x2 models have 2, its x1 models 4, and
      upsample x4 inside.
    algorithm: how a dense block is computed: 'concat', as in the paper; 'by_source', the same
      numbers by wider convolutions; 'winograd', by fewer multiplications. '' leaves it to
      `kernels`. All but 'concat' have first derivatives only, in reverse mode.
    unroll: blocks in one iteration of the loop; 0 leaves it to `kernels`.
    remat: recompute each block in the backward pass instead of storing its activations.
    dtype: to compute in, or its name; parameters are float32.
    kernels: how to compute it; of `choose.choose`, which heeds `algorithm`.
  """

  features: int = 64
  blocks: int = 23
  growth: int = 32
  residual_scale: float = 0.2
  scale: int = 4
  out_channels: int = 3
  input_unshuffle: int = 1
  algorithm: str = ""
  unroll: int = 0
  remat: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  def __post_init__(self):
    check_fields(self, self.scale, self.input_unshuffle)
    super().__post_init__()

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, out_channels]."""
    if self.input_unshuffle > 1:
      lr = pixel_unshuffle(lr, self.input_unshuffle)
    how = {"dtype": self.dtype, "kernels": self.kernels}
    x = conv(lr, self.features, name="conv_first", **how)
    # Only the form in the paper makes the parameters; the faster ones read them.
    compute = None
    if not self.is_initializing():
      compute = self.kernels.dense_block or ALGORITHMS.get(self.algorithm)
    block = _RRDB(self.growth, self.residual_scale, compute, name="body", **how)
    y = repeat(self, block, x, train=train)
    x = x + conv(y, self.features, name="conv_body", **how)
    return _upsample_and_reconstruct(self, x, self.scale * self.input_unshuffle)


class ResidualNet(nn.Module):
  """ESRGAN with plain residual blocks instead of RRDBs (section 4.1: "16 residual blocks").

  Attributes: as `RRDBNet`'s, but that residual_scale is 1: the plain block has none.
  """

  features: int = 64
  blocks: int = 16
  residual_scale: float = 1.0
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
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, out_channels]."""
    how = {"dtype": self.dtype, "kernels": self.kernels}
    x = conv(lr, self.features, name="conv_first", **how)
    block = ResidualBlock(SLOPE, self.residual_scale, name="body", **how)
    y = repeat(self, block, x, train=train)
    x = x + conv(y, self.features, name="conv_body", **how)
    return _upsample_and_reconstruct(self, x, self.scale)


class _DenseBlock(nn.Module):
  """Five convolutions, each of all outputs before it; the last has no activation."""

  growth: int
  residual_scale: float
  compute: DenseBlock | None
  dtype: Any
  kernels: Kernels

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = self._by_source(x) if self.compute else self._as_in_paper(x)
    return y * self.residual_scale + x

  def _as_in_paper(self, x: jax.Array) -> jax.Array:
    """Each convolution reads x and all outputs before it, side by side."""
    how = {"init": "msra", "dtype": self.dtype, "kernels": self.kernels}
    y = x
    for i in range(1, 5):
      new = self.kernels.leaky_relu(conv(y, self.growth, name=f"conv{i}", **how))
      y = jnp.concatenate([y, new], axis=-1)
    return conv(y, x.shape[-1], name="conv5", **how)

  def _by_source(self, x: jax.Array) -> jax.Array:
    """The same sums in another order, of the parameters that `_as_in_paper` made.

    A convolution that makes 192, 160, ... channels fills an accelerator better than one that makes
    32 from as many, and no outputs have to be copied side by side.
    """
    layers = [self.variables["params"][f"conv{i}"] for i in range(1, 6)]
    weights, biases = ([layer[part] for layer in layers] for part in ("kernel", "bias"))
    return self.compute(x, weights, biases, Inside()(x), self.dtype)


class _RRDB(nn.Module):
  """Residual in residual dense block: three dense blocks within one more residual."""

  growth: int
  residual_scale: float
  compute: DenseBlock | None
  dtype: Any
  kernels: Kernels

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    fields = self.growth, self.residual_scale, self.compute, self.dtype, self.kernels
    for i in range(1, 4):
      y = _DenseBlock(*fields, name=f"rdb{i}")(y)
    return y * self.residual_scale + x


def _upsample_and_reconstruct(net: nn.Module, x: jax.Array, factor: int) -> jax.Array:
  """ESRGAN's second half: nearest upsampling, a convolution after each, conv_hr, conv_last."""
  leaky_relu, how = net.kernels.leaky_relu, {"dtype": net.dtype, "kernels": net.kernels}
  for i, r in enumerate(UPSAMPLING[factor], 1):
    # x3 has a name of its own, or a file of its weights could not be told from an x2 model's.
    name = "conv_up_x3" if r == 3 else f"conv_up{i}"
    x = leaky_relu(conv(upsample_nearest(x, r), net.features, name=name, **how))
  x = leaky_relu(conv(x, net.features, name="conv_hr", **how))
  return conv(x, net.out_channels, name="conv_last", **how).astype(jnp.float32)
