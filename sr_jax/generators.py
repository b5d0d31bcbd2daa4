"""LR image in, SR image out: the generators of SRGAN and ESRGAN, and BasicSR's MSRResNet.

Parameter names follow BasicSR's checkpoints; `body` holds all blocks, stacked on a leading axis, so
few leaves. Checkpoints of others are read in `state_dicts.py`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import direct
from sr_jax import onednn
from sr_jax import winograd
from sr_jax.dense_block import dense_block, kernels_by_source, sum_by_source
from sr_jax.layers import (
  Inside,
  PReLU,
  apply_conv,
  batch_norm,
  conv,
  leaky_relu,
  pixel_shuffle,
  pixel_unshuffle,
  upsample_bilinear,
  upsample_nearest,
)

# The factors of the upsampling layers, one after another, that make up a scale.
UPSAMPLING = {1: (), 2: (2,), 3: (3,), 4: (2, 2), 8: (2, 2, 2)}

DENSE = ("concat", "by_source", "winograd")  # ways to compute a dense block


class SRResNet(nn.Module):
  """Generator of SRGAN (section 2.1, figure 4); with one slope a PReLU, 1,549,462 parameters.

  Momentum and epsilon of the BatchNorm are not in the paper: PyTorch's. Nor is a final activation:
  'none' unless asked for.

  Attributes:
    features: channels of the body.
    blocks: residual blocks.
    scale: upsampling factor: 1, 2, 3, 4 or 8.
    out_channels: of the SR image.
    prelu_per_channel: one slope for each channel (1,550,659 parameters) instead of one a layer.
    final_activation: 'none', or 'tanh', which is mapped to [0, 1] as (y + 1) / 2.
    unroll: blocks in one iteration of the loop; 0 chooses, see `_repeat`.
    remat: recompute each block in the backward pass instead of storing its activations.
    dtype: to compute in, or its name; parameters and BatchNorm's statistics are float32.
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

  def __post_init__(self):
    _check(self, self.scale)
    if self.final_activation not in ("none", "tanh"):
      raise ValueError(
        f"SRResNet: final_activation={self.final_activation!r} must be one of none, tanh"
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, out_channels]."""
    f, dtype, per_channel = self.features, self.dtype, self.prelu_per_channel
    x = conv(lr, f, kernel_size=9, name="conv_first", dtype=dtype)
    x = PReLU(per_channel, name="prelu_first")(x)
    y = _repeat(self, _BatchNormBlock(per_channel, train, dtype, name="body"), x, train=train)
    y = conv(y, f, name="conv_body", dtype=dtype)
    x = x + batch_norm(y, train=train, name="bn_body")
    for i, r in enumerate(UPSAMPLING[self.scale], 1):
      x = pixel_shuffle(conv(x, f * r**2, name=f"conv_up{i}", dtype=dtype), r)
      x = PReLU(per_channel, name=f"prelu_up{i}")(x)
    x = conv(x, self.out_channels, kernel_size=9, name="conv_last", dtype=dtype).astype(jnp.float32)
    return (jnp.tanh(x) + 1) / 2 if self.final_activation == "tanh" else x


class MSRResNet(nn.Module):
  """BasicSR's SRResNet, without BatchNorm and added to the bilinearly upsampled input; 1,517,571
  parameters (`basicsr/archs/srresnet_arch.py`).

  Attributes: as `SRResNet`'s; the image has as many channels in as out.
  """

  features: int = 64
  blocks: int = 16
  scale: int = 4
  out_channels: int = 3
  unroll: int = 0
  remat: bool = False
  dtype: Any = jnp.float32

  def __post_init__(self):
    _check(self, self.scale)
    super().__post_init__()

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, c]."""
    if lr.shape[-1] != self.out_channels:
      raise ValueError(
        f"MSRResNet adds its input to its output: out_channels={self.out_channels} "
        f"must equal the {lr.shape[-1]} channels of lr"
      )
    f, dtype = self.features, self.dtype
    x = leaky_relu(conv(lr, f, name="conv_first", init="msra", dtype=dtype), 0.1)
    x = _repeat(self, _ResidualBlock(slope=0.0, dtype=dtype, name="body"), x, train=train)
    for i, r in enumerate(UPSAMPLING[self.scale], 1):
      x = pixel_shuffle(conv(x, f * r**2, name=f"upconv{i}", init="msra", dtype=dtype), r)
      x = leaky_relu(x, 0.1)
    x = leaky_relu(conv(x, f, name="conv_hr", init="msra", dtype=dtype), 0.1)
    x = conv(x, self.out_channels, name="conv_last", init="msra", dtype=dtype)
    return x.astype(jnp.float32) + upsample_bilinear(lr.astype(jnp.float32), self.scale)


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
    dense: how a dense block is computed: 'concat', as printed; 'by_source', the same numbers by
      wider convolutions; 'winograd', by `winograd.py`, as are then all convolutions. '' chooses for
      the backend and dtype. But for 'concat', and that not on one CPU, there are first derivatives
      only, in reverse mode.
    unroll: blocks in one iteration of the loop; 0 chooses, see `_repeat`.
    remat: recompute each block in the backward pass instead of storing its activations.
    dtype: to compute in, or its name; parameters are float32.
  """

  features: int = 64
  blocks: int = 23
  growth: int = 32
  residual_scale: float = 0.2
  scale: int = 4
  out_channels: int = 3
  input_unshuffle: int = 1
  dense: str = ""
  unroll: int = 0
  remat: bool = False
  dtype: Any = jnp.float32

  def __post_init__(self):
    _check(self, self.scale, self.input_unshuffle)
    super().__post_init__()

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, out_channels]."""
    if self.input_unshuffle > 1:
      lr = pixel_unshuffle(lr, self.input_unshuffle)
    # The plain way makes the parameters; the others read them.
    dense = "concat" if self.is_initializing() else _dense(self)
    winograd = dense == "winograd"
    x = conv(lr, self.features, name="conv_first", winograd=winograd, dtype=self.dtype)
    block = _RRDB(self.growth, self.residual_scale, dense, self.dtype, name="body")
    y = _repeat(self, block, x, train=train)
    x = x + conv(y, self.features, name="conv_body", winograd=winograd, dtype=self.dtype)
    factor = self.scale * self.input_unshuffle
    return _upsample_and_reconstruct(self, x, factor, winograd=winograd)


class ResidualNet(nn.Module):
  """ESRGAN with plain residual blocks for RRDBs (section 4.1: "16 residual blocks").

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

  def __post_init__(self):
    _check(self, self.scale)
    super().__post_init__()

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    """Upscales lr [N, h, w, c] in [0, 1] to float32 [N, h * scale, w * scale, out_channels]."""
    x = conv(lr, self.features, name="conv_first", dtype=self.dtype)
    block = _ResidualBlock(0.2, self.residual_scale, self.dtype, name="body")
    y = _repeat(self, block, x, train=train)
    x = x + conv(y, self.features, name="conv_body", dtype=self.dtype)
    return _upsample_and_reconstruct(self, x, self.scale)


class _BatchNormBlock(nn.Module):
  """Residual block of SRGAN: conv, BN, PReLU, conv, BN, and the sum with the input."""

  prelu_per_channel: bool
  train: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = conv(x, x.shape[-1], name="conv1", dtype=self.dtype)
    y = batch_norm(y, train=self.train, name="bn1")
    y = PReLU(self.prelu_per_channel, name="prelu")(y)
    y = conv(y, x.shape[-1], name="conv2", dtype=self.dtype)
    return x + batch_norm(y, train=self.train, name="bn2")


class _ResidualBlock(nn.Module):
  """Residual block without BatchNorm: conv, (leaky) ReLU, conv, and the sum with the input."""

  slope: float
  residual_scale: float = 1.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = leaky_relu(conv(x, x.shape[-1], name="conv1", init="msra", dtype=self.dtype), self.slope)
    y = conv(y, x.shape[-1], name="conv2", init="msra", dtype=self.dtype)
    return y * self.residual_scale + x


class _DenseBlock(nn.Module):
  """Five convolutions, each of which sees the outputs of all before it; none after the last."""

  growth: int
  residual_scale: float
  dense: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    form = {"concat": self._concat, "by_source": self._by_source, "winograd": self._winograd}
    return form[self.dense](x) * self.residual_scale + x

  def _concat(self, x: jax.Array) -> jax.Array:
    """As it is printed: each convolution of all that is there."""
    y = x
    for i in range(1, 5):
      new = conv(y, self.growth, name=f"conv{i}", init="msra", dtype=self.dtype)
      y = jnp.concatenate([y, leaky_relu(new)], axis=-1)
    return conv(y, x.shape[-1], name="conv5", init="msra", dtype=self.dtype)

  def _by_source(self, x: jax.Array) -> jax.Array:
    """The same sums in another order, by wider convolutions.

    A convolution that makes 192, 160, ... channels fills an accelerator better than one that makes
    32 of as many, and nothing is copied side by side.
    """
    kernels, biases = self._parameters()
    if _rounds_by_onednn(self):
      return dense_block(onednn, x, kernels, biases, Inside()(x))
    if not onednn.usable(self.dtype):
      return dense_block(direct, x.astype(self.dtype), kernels, biases, Inside()(x))
    return sum_by_source(
      x,
      kernels_by_source(kernels),
      biases,
      convolve=lambda source, kernel: apply_conv(source, kernel, dtype=self.dtype),
      activate=leaky_relu,
    )[5]

  def _winograd(self, x: jax.Array) -> jax.Array:
    """With fewer multiplications, in float32."""
    return dense_block(winograd, x.astype(self.dtype), *self._parameters(), Inside()(x))

  def _parameters(self) -> tuple[list[jax.Array], list[jax.Array]]:
    """The kernels and biases that `_concat` made."""
    layers = [self.variables["params"][f"conv{i}"] for i in range(1, 6)]
    return [layer["kernel"] for layer in layers], [layer["bias"] for layer in layers]


class _RRDB(nn.Module):
  """Residual in residual dense block: three dense blocks within one more residual."""

  growth: int
  residual_scale: float
  dense: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x
    for i in range(1, 4):
      fields = self.growth, self.residual_scale, self.dense, self.dtype
      y = _DenseBlock(*fields, name=f"rdb{i}")(y)
    return y * self.residual_scale + x


def _dense(net: RRDBNet) -> str:
  """The way to compute dense blocks: the one asked for, or the fastest on the default backend.

  Winograd's form needs channels to be worth its transforms, works on a few images of the batch at a
  time, which should not be spread over devices, and computes in float32.
  """
  if net.dense:
    return net.dense
  if _rounds_by_onednn(net):
    return "by_source"
  backend = jax.default_backend()
  if backend == "cpu" and jax.device_count() == 1 and min(net.features, net.growth) >= 32:
    return "winograd"
  return "by_source" if backend == "gpu" else "concat"


def _rounds_by_onednn(module: nn.Module) -> bool:
  """Whether it computes in bfloat16 by oneDNN."""
  return jnp.dtype(module.dtype) == jnp.bfloat16 and onednn.usable(module.dtype)


def loops_on_a_cpu(net: nn.Module) -> bool:
  """Whether CPUs compute the gradients of a generator in a loop as fast as out of it.

  XLA's convolutions are 15 to 30 times slower there; Winograd's form and oneDNN's are not.
  """
  by_winograd = isinstance(net, RRDBNet) and _dense(net) == "winograd"
  return by_winograd or onednn.usable(net.dtype)


def _repeat(net: nn.Module, block: nn.Module, x: jax.Array, *, train: bool) -> jax.Array:
  """Applies net.blocks copies of `block` in turn, their variables stacked on a leading axis.

  Looped, unrolled and rematerialised bodies read the same variables. With net.unroll 0, training
  unrolls fully on a GPU, where copies into and out of a loop's arrays are a third of the kernels to
  launch, and on a CPU unless `loops_on_a_cpu`. All else loops, which compiles in a fraction of the
  time.
  """
  unroll = net.unroll
  if not unroll:
    backend = jax.default_backend() if train else ""
    slow = backend == "cpu" and not loops_on_a_cpu(net)
    unroll = net.blocks if slow or backend == "gpu" else 1

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


def _upsample_and_reconstruct(
  net: nn.Module, x: jax.Array, factor: int, *, winograd: bool = False
) -> jax.Array:
  """ESRGAN's second half: nearest upsampling, a convolution after each, conv_hr, conv_last."""
  for i, r in enumerate(UPSAMPLING[factor], 1):
    # Its own name for x3, or a file of its weights could not be told from an x2 model's.
    name = "conv_up_x3" if r == 3 else f"conv_up{i}"
    x = upsample_nearest(x, r)
    x = leaky_relu(conv(x, net.features, name=name, winograd=winograd, dtype=net.dtype))
  x = leaky_relu(conv(x, net.features, name="conv_hr", winograd=winograd, dtype=net.dtype))
  y = conv(x, net.out_channels, name="conv_last", winograd=winograd, dtype=net.dtype)
  return y.astype(jnp.float32)


def _check(net: nn.Module, scale: int, input_unshuffle: int = 1):
  """Raises ValueError where a field has a value that no network can be built with."""
  who = type(net).__name__
  if scale not in UPSAMPLING:
    raise ValueError(f"{who}: scale={scale!r} must be one of {sorted(UPSAMPLING)}; try scale=4")
  if input_unshuffle not in (1, 2, 4) or scale * input_unshuffle not in UPSAMPLING:
    raise ValueError(
      f"{who}: input_unshuffle={input_unshuffle!r} must be 1, 2 or 4, and its product with "
      f"scale={scale} one of {sorted(UPSAMPLING)}; try input_unshuffle=1"
    )
  for field in ("features", "blocks", "growth", "out_channels"):
    value = getattr(net, field, 1)
    if value < 1:
      raise ValueError(f"{who}: {field}={value!r} must be at least 1")
  if getattr(net, "dense", "") not in ("", *DENSE):
    raise ValueError(f"{who}: dense={net.dense!r} must be one of {', '.join(DENSE)}, or ''")
  if net.unroll < 0:
    raise ValueError(f"{who}: unroll={net.unroll!r} must be 0 (chosen for the backend) or more")
  try:
    is_float = jnp.issubdtype(jnp.dtype(net.dtype), jnp.floating)
  except TypeError:
    is_float = False
  if not is_float:
    raise ValueError(f"{who}: dtype={net.dtype!r} must be a float dtype; try float32 or bfloat16")


GENERATORS = {
  "srresnet": SRResNet,
  "msrresnet": MSRResNet,
  "rrdbnet": RRDBNet,
  "residualnet": ResidualNet,
}
