"""The discriminators of SRGAN, ESRGAN, Real-ESRGAN and pix2pix; they return logits, no sigmoid.

The losses that take the logits are in `training/losses.py`. Parameter names follow BasicSR's
checkpoints, those of PatchGAN, which BasicSR does not have, its U-Net's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.kernels.choose import PLAIN, Kernels
from sr_jax.networks.layers import (
  batch_norm,
  conv,
  linear,
  spectral_conv,
  upsample_bilinear,
)


class SRGANDiscriminator(nn.Module):
  """Discriminator of SRGAN (section 2.1, figure 4); 23,565,505 parameters on 96 x 96 images.

  Attributes:
    features: channels of the first convolution.
    dtype: the dtype to compute in, or its name; parameters, BatchNorm's statistics and logits are
      float32.
    kernels: how to compute the network, as `choose.choose` returns it.
  """

  features: int = 64
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  @staticmethod
  def multiple(side: int) -> int:
    """Returns what the sides of an image of about this size must be multiples of."""
    return 16

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
    """Maps image [N, H, H, C] in [0, 1], H a multiple of 16, to logits [N]."""
    _check_square(self, image)
    how = {"dtype": self.dtype, "kernels": self.kernels}
    x = self.kernels.leaky_relu(conv(image, self.features, name="conv0_0", **how))
    for stage, width in enumerate((1, 2, 4, 8)):
      f = self.features * width
      if stage > 0:
        x = _conv_bn(x, f, f"{stage}_0", train=train, **how)
      x = _conv_bn(x, f, f"{stage}_1", stride=2, train=train, **how)
    return _classify(x, 16 * self.features, **how)


class VGGDiscriminator(nn.Module):
  """Discriminator of ESRGAN (BasicSR's VGGStyleDiscriminator); 14,499,401 parameters on 128 x 128.

  From 256 x 256 on there is a sixth stage, conv5_0 and conv5_1 (21,055,049 parameters); below,
  the five stages leave H / 32 rows and columns for linear1.

  Attributes:
    features: channels of the first convolution.
    dtype: the dtype to compute in, or its name; parameters, BatchNorm's statistics and logits are
      float32.
    kernels: how to compute the network, as `choose.choose` returns it.
  """

  features: int = 64
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  @staticmethod
  def multiple(side: int) -> int:
    """Returns what the sides of an image of about this size must be multiples of."""
    return 64 if side >= 256 else 32

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
    """Maps image [N, H, H, C] in [0, 1], H a multiple of 32 (of 64 from 256 on), to logits [N]."""
    widths = (1, 2, 4, 8, 8, 8) if self.multiple(image.shape[1]) == 64 else (1, 2, 4, 8, 8)
    _check_square(self, image)
    how = {"dtype": self.dtype, "kernels": self.kernels}
    x = self.kernels.leaky_relu(conv(image, self.features, name="conv0_0", **how))
    options = {"use_bias": False, "train": train, **how}
    for stage, width in enumerate(widths):
      f = self.features * width
      if stage > 0:
        x = _conv_bn(x, f, f"{stage}_0", **options)
      x = _conv_bn(x, f, f"{stage}_1", kernel_size=4, stride=2, **options)
    return _classify(x, 100, **how)


class UNetDiscriminator(nn.Module):
  """Discriminator of Real-ESRGAN, a U-Net with spectral normalisation: a logit for every pixel.

  4,376,897 parameters. The skips are added after the activation. u and sigma of each normalised
  convolution are in `batch_stats`; a forward pass with train=True does one power iteration.

  Attributes:
    features: channels of the first convolution.
    dtype: the dtype to compute in, or its name; parameters, spectral norms and logits are float32.
    kernels: how to compute the network, as `choose.choose` returns it.
  """

  features: int = 64
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  @staticmethod
  def multiple(side: int) -> int:
    """Returns what the sides of an image of about this size must be multiples of."""
    return 8

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
    """Maps image [N, H, W, C] in [0, 1], H and W multiples of 8, to logits [N, H, W]."""
    _, h, w, _ = image.shape
    if h % 8 or w % 8:
      raise UserError(
        f"UNetDiscriminator: image height {h} and width {w} must be multiples of 8, "
        f"or the skips do not fit; try {h - h % 8 or 8} x {w - w % 8 or 8}"
      )
    f, leaky_relu = self.features, self.kernels.leaky_relu
    how = {"dtype": self.dtype, "kernels": self.kernels}
    options = {"train": train, **how}
    x = leaky_relu(conv(image, f, name="conv0", **how))
    skips = [x]
    for i, width in enumerate((2, 4, 8), 1):
      x = spectral_conv(x, f * width, name=f"conv{i}", kernel_size=4, stride=2, **options)
      x = leaky_relu(x)
      skips.append(x)
    for i, width in enumerate((4, 2, 1), 4):
      x = spectral_conv(upsample_bilinear(x, 2), f * width, name=f"conv{i}", **options)
      x = leaky_relu(x) + skips[6 - i]
    x = leaky_relu(spectral_conv(x, f, name="conv7", **options))
    x = leaky_relu(spectral_conv(x, f, name="conv8", **options))
    return conv(x, 1, name="conv9", **how)[..., 0].astype(jnp.float32)


class PatchDiscriminator(nn.Module):
  """PatchGAN (pix2pix, arXiv 1611.07004, appendix 6.1.2): a logit for each patch of 70 x 70 pixels.

  2,765,633 parameters. As in its released code, convolutions before a BatchNorm have no bias.

  Attributes:
    features: channels of the first convolution.
    dtype: the dtype to compute in, or its name; parameters, BatchNorm's statistics and logits are
      float32.
    kernels: how to compute the network, as `choose.choose` returns it.
  """

  features: int = 64
  dtype: Any = jnp.float32
  kernels: Kernels = PLAIN

  @staticmethod
  def multiple(side: int) -> int:
    """Returns what the sides of an image of about this size must be multiples of.

    From 24 pixels on there is a logit.
    """
    return 8 if side >= 24 else 24

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool) -> jax.Array:
    """Maps image [N, H, W, C] in [0, 1], H and W at least 24, to logits [N, H/8 - 2, W/8 - 2]."""
    _, h, w, _ = image.shape
    if min(h, w) < 24:
      raise UserError(
        f"PatchDiscriminator: image of {h} x {w} must have sides of 24 or more; try "
        f"{max(h, 24)} x {max(w, 24)}"
      )
    how = {"kernel_size": 4, "dtype": self.dtype, "kernels": self.kernels}
    x = self.kernels.leaky_relu(conv(image, self.features, stride=2, name="conv0", **how))
    for i, (width, stride) in enumerate(((2, 2), (4, 2), (8, 1)), 1):
      options = {"stride": stride, "use_bias": False, "train": train, **how}
      x = _conv_bn(x, self.features * width, str(i), **options)
    return conv(x, 1, name="conv4", **how)[..., 0].astype(jnp.float32)


def _conv_bn(
  x: jax.Array, features: int, name: str, *, train: bool, kernels: Kernels, **options
) -> jax.Array:
  """Applies the convolution `conv{name}`, the BatchNorm `bn{name}` and a leaky ReLU."""
  x = conv(x, features, name=f"conv{name}", kernels=kernels, **options)
  return kernels.leaky_relu(batch_norm(x, train=train, name=f"bn{name}"))


def _classify(x: jax.Array, hidden: int, dtype: Any, kernels: Kernels) -> jax.Array:
  """Applies two linear layers to features [N, h, w, C], flattened in this order: logits [N]."""
  x = linear(x.reshape(x.shape[0], -1), hidden, name="linear1", dtype=dtype)
  x = linear(kernels.leaky_relu(x), 1, name="linear2", dtype=dtype)
  return x[:, 0].astype(jnp.float32)


def _check_square(net: nn.Module, image: jax.Array):
  """Raises UserError unless the image is square and each convolution of stride 2 halves it exactly.

  It must be square, because linear1's parameters belong to one size and files do not say which
  sides it has.
  """
  _, h, w, _ = image.shape
  multiple = net.multiple(h)
  if h != w or h % multiple:
    side = max(min(h, w) // multiple, 1) * multiple
    raise UserError(
      f"{type(net).__name__}: image of {h} x {w} must be square with sides divisible by "
      f"{multiple}; try {side} x {side}"
    )
