"""What the networks share: convolutions as PyTorch pads and initialises them, shuffles, resizing.

Every convolution of a network is a linen `nn.Conv`, so that its calls can be intercepted from
outside, or is in a module that calls `masking.Inside`. The networks are in the modules beside this.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.kernels.choose import PLAIN, Kernels

Initializer = Callable[..., jax.Array]

KERNEL_INIT: dict[str, Initializer] = {
  # PyTorch's default for convolutions and linear layers: U(-b, b) with b = 1/sqrt(fan_in).
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
  # ESRGAN, supplement section 2: "multiplying 0.1 for all initialization parameters calculated by
  # MSRA". The standard deviation is scaled, 0.1 * sqrt(2 / fan_in), so the variance by 0.01.
  "msra": nn.initializers.variance_scaling(2 * 0.1**2, "fan_in", "normal"),
}


def _bias_init(init: str, fan_in: int) -> Initializer:
  """PyTorch draws the bias from the kernel's interval; a linen bias cannot see fan_in by itself."""
  if init == "msra":
    return nn.initializers.zeros
  bound = fan_in**-0.5
  return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _padding(kernel_size: int) -> int:
  """Padding of PyTorch's convolutions here: 3 -> 1, 4 -> 1, 9 -> 4, the same on both sides.

  XLA's 'SAME' pads (0, 1) for a 3x3 of stride 2, which shifts the features by half a pixel.
  """
  return (kernel_size - 1) // 2


def conv(
  x: jax.Array,
  features: int,
  *,
  name: str,
  kernel_size: int = 3,
  stride: int = 1,
  use_bias: bool = True,
  init: str = "torch",
  dtype: Any = jnp.float32,
  kernels: Kernels = PLAIN,
) -> jax.Array:
  """Convolves x in the calling module, with parameters under `name`.

  Args:
    x: [N, H, W, C].
    features: output channels.
    name: of the parameters; explicit, since `nn.remat` changes linen's automatic names.
    kernel_size: of both axes.
    stride: of both axes.
    use_bias: False in front of a BatchNorm that makes it useless.
    init: 'torch' (kernel and bias uniform) or 'msra' (scaled by 0.1, bias 0).
    dtype: to compute in, a dtype or its name; parameters are float32.
    kernels: how to compute it.

  Returns:
    [N, H', W', features] in `dtype`, but float32 where oneDNN computes; H' = (H + 2 p -
    kernel_size) // stride + 1.
  """
  fan_in = kernel_size**2 * x.shape[-1]
  return _Conv(
    features,
    (kernel_size, kernel_size),
    stride,
    padding=_padding(kernel_size),
    use_bias=use_bias,
    kernel_init=KERNEL_INIT[init],
    bias_init=_bias_init(init, fan_in),
    dtype=jnp.dtype(dtype),
    by=kernels.conv,
    name=name,
  )(x)


class _Conv(nn.Conv):
  """A convolution of one stride and padding, by linen's or by a kernel's function.

  Attributes:
    by: `Kernels.conv`, or None.
  """

  by: Callable[..., jax.Array] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.by is None or self.is_initializing():
      return super().__call__(x)
    shape = (*self.kernel_size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
    bias = None
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
    padding = ((self.padding, self.padding),) * 2
    return self.by(x, kernel, bias, self.strides, padding, self.dtype)


def apply_conv(
  x: jax.Array, kernel: jax.Array, *, dtype: Any = jnp.float32, kernels: Kernels = PLAIN
) -> jax.Array:
  """Convolves x [N, H, W, C] as `conv`, with the given kernel [3, 3, C, features] and no bias."""
  fields = {"padding": 1, "use_bias": False, "dtype": jnp.dtype(dtype), "by": kernels.conv}
  layer = _Conv(kernel.shape[-1], (3, 3), **fields)
  return layer.apply({"params": {"kernel": kernel}}, x)


def spectral_conv(
  x: jax.Array,
  features: int,
  *,
  name: str,
  train: bool,
  kernel_size: int = 3,
  stride: int = 1,
  dtype: Any = jnp.float32,
  kernels: Kernels = PLAIN,
) -> jax.Array:
  """Convolves x with a kernel divided by its largest singular value (Miyato et al., 2018); no bias.

  One power iteration a call, kept when `train`, eps 1e-12: `torch.nn.utils.spectral_norm`. The
  vector u and sigma are in `batch_stats`, under `{name}_norm`.

  Args:
    x: [N, H, W, C].
    features: output channels.
    name: of the parameters.
    train: whether the power iteration's result is stored.
    kernel_size: of both axes.
    stride: of both axes.
    dtype: to compute in; the norm is computed in float32.
    kernels: how to compute the convolution.

  Returns:
    [N, H', W', features] in `dtype`; as `conv`'s.
  """
  layer = _Conv(
    features,
    (kernel_size, kernel_size),
    stride,
    padding=_padding(kernel_size),
    use_bias=False,
    kernel_init=KERNEL_INIT["torch"],
    dtype=jnp.dtype(dtype),
    by=kernels.conv,
    name=name,
  )
  norm = nn.SpectralNorm(layer, n_steps=1, epsilon=1e-12, name=f"{name}_norm")
  return norm(x, update_stats=train)


def linear(x: jax.Array, features: int, *, name: str, dtype: Any = jnp.float32) -> jax.Array:
  """Applies a linear layer [N, C] -> [N, features], initialised as PyTorch's."""
  return nn.Dense(
    features,
    kernel_init=KERNEL_INIT["torch"],
    bias_init=_bias_init("torch", x.shape[-1]),
    dtype=jnp.dtype(dtype),
    name=name,
  )(x)


def batch_norm(x: jax.Array, *, train: bool, name: str) -> jax.Array:
  """Normalises x [..., C] over all but its last axis; in x's dtype, but for float32 statistics.

  PyTorch's momentum 0.1 is linen's 0.9; linen's own default, 0.99, would need ten times the steps.
  The variance is the mean of (x - mean)^2: linen's fast form, E[x^2] - E[x]^2, cancels digits, and
  gradients on 1 and on 8 devices were then 3e-5 apart instead of 5e-6 (VGG discriminator, float32).
  """
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    use_fast_variance=False,
    dtype=x.dtype,
    name=name,
  )(x)


class PReLU(nn.Module):
  """Leaky ReLU with a learned slope (He et al., 2015), one for all channels or one for each."""

  per_channel: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Applies it to x [N, H, W, C]; same shape and dtype."""
    shape = (x.shape[-1] if self.per_channel else 1,)
    slope = self.param("slope", nn.initializers.constant(0.25), shape, jnp.float32)
    return jnp.where(x > 0, x, slope.astype(x.dtype).reshape(1, 1, 1, -1) * x)


def pixel_shuffle(x: jax.Array, r: int) -> jax.Array:
  """Moves channels into space: [N, H, W, C r^2] -> [N, H r, W r, C].

  Channel c r^2 + i r + j becomes row i and column j of channel c: PyTorch's order, so published
  weights need no permutation. TensorFlow's depth_to_space has c innermost.
  """
  n, h, w, c = x.shape
  if c % r**2:
    raise UserError(f"pixel_shuffle by {r} needs a multiple of {r**2} channels; x has {c}")
  c //= r**2
  x = x.reshape(n, h, w, c, r, r).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(n, h * r, w * r, c)


def pixel_unshuffle(x: jax.Array, r: int) -> jax.Array:
  """Moves space into channels: [N, H r, W r, C] -> [N, H, W, C r^2]; undoes `pixel_shuffle`."""
  n, h, w, c = x.shape
  for side in (h, w):
    if isinstance(side, int) and side % r:  # a symbolic side is checked by the reshape
      raise UserError(
        f"pixel_unshuffle by {r}: height {h} and width {w} must be multiples of {r}; pad the image"
      )
  x = x.reshape(n, h // r, r, w // r, r, c).transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(n, h // r, w // r, c * r**2)


def upsample_nearest(x: jax.Array, r: int) -> jax.Array:
  """Repeats each pixel r times in both directions: [N, H, W, C] -> [N, H r, W r, C]."""
  n, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, r, w, r, c))
  return x.reshape(n, h * r, w * r, c)


def upsample_bilinear(x: jax.Array, r: int) -> jax.Array:
  """Interpolates linearly: [N, H, W, C] -> [N, H r, W r, C]; PyTorch's align_corners=False."""
  n, h, w, c = x.shape
  return jax.image.resize(x, (n, h * r, w * r, c), "linear")
