"""The losses of the SRGAN and ESRGAN papers and some others, each a pure function of arrays.

Images are [N, H, W, C] float in [0, 1]. `real` and `fake` are discriminator *logits* of any shape
[N, ...]; every adversarial loss is `(real, fake) -> scalar`, with means over all elements, so that
under `jit` with the batch sharded over devices each mean is over the global batch. All losses are
computed and returned in float32.

Recipes (configs/) set the weights of the losses; `terms.make_losses` weights and sums them. Losses
that are from other papers name them in their docstrings.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.kernels.choose import PLAIN, Kernels
from sr_jax.networks import vgg


def l1_loss(sr: jax.Array, hr: jax.Array) -> jax.Array:
  """Mean absolute error (ESRGAN, L_1 of eq. 3).

  Args:
    sr: [N, H, W, C], any range.
    hr: the same shape.

  Returns:
    Scalar float32, in units of the images.
  """
  return jnp.mean(jnp.abs(_difference(sr, hr)))


def mse_loss(sr: jax.Array, hr: jax.Array) -> jax.Array:
  """Mean squared error (SRGAN, eq. 4).

  SRGAN computes it on images in [-1, 1]. Here they are in [0, 1], and the value is a quarter of
  SRGAN's, for which `configs/srresnet.py` compensates with a weight of 4.

  Args:
    sr: [N, H, W, C], any range.
    hr: the same shape.

  Returns:
    Scalar float32, in squared units of the images.
  """
  return jnp.mean(jnp.square(_difference(sr, hr)))


def charbonnier_loss(sr: jax.Array, hr: jax.Array, eps: float = 1e-6) -> jax.Array:
  """Mean of sqrt(d^2 + eps^2) (Lai et al., LapSRN, arXiv 1704.03915, eq. 2).

  Args:
    sr: [N, H, W, C], any range.
    hr: the same shape.
    eps: the |d| at which the parabola turns into |d|, in units of the images; the default is
      BasicSR's.

  Returns:
    Scalar float32, in units of the images.
  """
  return jnp.mean(jnp.sqrt(jnp.square(_difference(sr, hr)) + eps**2))


def tv_loss(sr: jax.Array) -> jax.Array:
  """Total variation: the mean length of the image's gradient (SRGAN, section 2.2.1, arXiv v1).

  The gradient is made of forward differences, zero at the last row and column. The square root is
  taken of d^2 + 1e-12, because its slope at a flat pixel would otherwise be infinite.

  Args:
    sr: [N, H, W, C].

  Returns:
    Scalar float32: units of the image per pixel, averaged over pixels and channels.
  """
  sr = sr.astype(jnp.float32)
  down = jnp.diff(sr, axis=1, append=sr[:, -1:])
  right = jnp.diff(sr, axis=2, append=sr[:, :, -1:])
  return jnp.mean(jnp.sqrt(jnp.square(down) + jnp.square(right) + 1e-12))


PIXEL = {"l1": l1_loss, "mse": mse_loss, "charbonnier": charbonnier_loss}


def consistency_loss(sr: jax.Array, hr: jax.Array, block: int = 8) -> jax.Array:
  """L1 distance of both images' means over blocks of 8 x 8 pixels: brightness and colour.

  A GAN may invent detail, but what is left of an image when it is reduced is given by the LR image:
  Bahat and Michaeli (arXiv 1912.01839) call this consistency, and PULSE (Menon et al., arXiv
  2003.03808) trains by it alone. VGG's deep features hardly see a shift of a whole image, nor does
  a young discriminator: in short runs nothing but a small pixel loss holds brightness and colours,
  and a larger one blurs, since it punishes each pixel of a texture that is not HR's. This loss
  leaves all textures free whose means are right. The blocks are larger than those of an x4, because
  a mean of few pixels still holds detail.

  Args:
    sr: [N, H, W, C], any range.
    hr: the same shape.
    block: side of the blocks, pixels; rows and columns that are left over do not count. Smaller
      images have one block.

  Returns:
    Scalar float32, in units of the images.
  """
  difference = _difference(sr, hr)
  n, height, width, channels = difference.shape
  high, wide = min(block, height), min(block, width)
  rows, columns = height // high, width // wide
  blocks = difference[:, : rows * high, : columns * wide]
  blocks = blocks.reshape(n, rows, high, columns, wide, channels)
  return jnp.mean(jnp.abs(jnp.mean(blocks, axis=(2, 4))))


def chroma_loss(sr: jax.Array, hr: jax.Array) -> jax.Array:
  """L1 distance of BT.601's Cb and Cr in studio range: colour alone, at every pixel.

  Brightness is free. Real detail is mostly in Y, so that this blurs less than an L1 of RGB.

  Args:
    sr: [N, H, W, 3] in [0, 1].
    hr: the same shape.

  Returns:
    Scalar float32, in units of the images: 1/255 is one level of Cb or Cr.

  Raises:
    UserError: the images are not RGB.
  """
  difference = _difference(sr, hr)
  if difference.shape[-1] != 3:
    raise UserError(f"sr {sr.shape} must have three channels: grey images have no chroma")
  # Multiplied by hand: a matrix product may have fewer digits than float32 on an accelerator.
  r, g, b = difference[..., 0], difference[..., 1], difference[..., 2]
  cb = (-37.797 * r - 74.203 * g + 112.0 * b) / 255
  cr = (112.0 * r - 93.786 * g - 18.214 * b) / 255
  return (jnp.mean(jnp.abs(cb)) + jnp.mean(jnp.abs(cr))) / 2


SSIM_WINDOW = 11  # pixels a side
# The exponents of the five scales, the finest first (Wang et al., 2003, section 3.2).
MS_SSIM_EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_loss(sr: jax.Array, hr: jax.Array) -> jax.Array:
  """1 - MS-SSIM (Wang, Simoncelli and Bovik, 2003, eq. 7), of each channel, averaged.

  Windows are Gaussians of 11 x 11 with a standard deviation of 1.5, all within the image; a scale
  is made of the one before by means of 2 x 2 pixels. Five scales need images of 176 pixels: smaller
  ones have as many scales as hold a window, and their exponents are scaled to the sum of 1 that all
  five have. Means of contrast and structure that are negative, as of images that have nothing in
  common, count as 1e-6, where the power has a slope.

  Args:
    sr: [N, H, W, C] in [0, 1], H and W at least 11.
    hr: the same shape.

  Returns:
    Scalar float32, 0 for equal images.

  Raises:
    UserError: the images are smaller than a window.
  """
  _difference(sr, hr)  # checks the shapes
  side = min(sr.shape[1:3])
  if side < SSIM_WINDOW:
    raise UserError(f"sr {sr.shape} must have sides of {SSIM_WINDOW} or more for MS-SSIM")
  scales = min((side // SSIM_WINDOW).bit_length(), len(MS_SSIM_EXPONENTS))
  total = sum(MS_SSIM_EXPONENTS[:scales])
  sr, hr = sr.astype(jnp.float32), hr.astype(jnp.float32)
  product = 1.0
  for scale, exponent in enumerate(MS_SSIM_EXPONENTS[:scales], 1):
    luminance, structure = _ssim_maps(sr, hr)
    scores = luminance * structure if scale == scales else structure
    product *= jnp.maximum(jnp.mean(scores, axis=(1, 2)), 1e-6) ** (exponent / total)
    sr, hr = _halved(sr), _halved(hr)
  return 1 - jnp.mean(product)


def _ssim_maps(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Luminance, and contrast times structure, of all windows: [N, H - 10, W - 10, C] each."""
  c1, c2 = 0.01**2, 0.03**2
  kernel = np.exp(-0.5 * (np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) ** 2 / 1.5**2)
  kernel = [float(weight) for weight in kernel / kernel.sum()]

  def mean(x: jax.Array) -> jax.Array:
    # Sums of shifted images: convolutions may have fewer digits than float32 on an accelerator.
    height, width = x.shape[1] - SSIM_WINDOW + 1, x.shape[2] - SSIM_WINDOW + 1
    rows = sum(weight * x[:, i : i + height] for i, weight in enumerate(kernel))
    return sum(weight * rows[:, :, i : i + width] for i, weight in enumerate(kernel))

  mean_a, mean_b = mean(a), mean(b)
  variances = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
  covariance = mean(a * b) - mean_a * mean_b
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  return luminance, (2 * covariance + c2) / (variances + c2)


def _halved(x: jax.Array) -> jax.Array:
  """Means of 2 x 2 pixels; the last row or column of an odd number does not count."""
  n, height, width, channels = x.shape
  rows, columns = height // 2, width // 2
  x = x[:, : 2 * rows, : 2 * columns].reshape(n, rows, 2, columns, 2, channels)
  return jnp.mean(x, axis=(2, 4))


def focal_frequency_loss(sr: jax.Array, hr: jax.Array, alpha: float = 1.0) -> jax.Array:
  """Focal frequency loss (Jiang et al., arXiv 2012.12821, section 3).

  The mean over the frequencies of w |F(SR) - F(HR)|^2, where w = |F(SR) - F(HR)|^alpha, divided by
  its largest value in the channel, so that the frequencies that are hardest to make count most. No
  gradient flows through w. F is the orthonormal DFT of a channel, as in the released code.

  Args:
    sr: [N, H, W, C], any range.
    hr: the same shape.
    alpha: how much the hardest frequencies count more.

  Returns:
    Scalar float32, in squared units of the images.
  """
  spectrum = jnp.fft.fft2(_difference(sr, hr), axes=(1, 2), norm="ortho")
  square = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
  weight = jax.lax.stop_gradient(square) ** (alpha / 2)
  largest = jnp.max(weight, axis=(1, 2), keepdims=True)
  return jnp.mean(square * weight / jnp.where(largest > 0, largest, 1.0))


# The terms that see nothing but the SR and the HR images, each with a weight of its own.
IMAGE = {
  "consistency": consistency_loss,
  "chroma": chroma_loss,
  "ms_ssim": ms_ssim_loss,
  "focal_frequency": focal_frequency_loss,
}

LDL_WINDOW = 7  # pixels a side


def ldl_loss(sr: jax.Array, hr: jax.Array, ema_sr: jax.Array) -> jax.Array:
  """Locally discriminative learning (LDL; Liang et al., arXiv 2203.09195, section 3).

  The mean of |w SR - w HR|, where w is large where SR has artifacts. With the residual r, the sum
  over the channels of |HR - SR|, w is the fifth root of r's variance in the image, times r's
  variance in the 7 x 7 pixels around (reflected at the border), and 0 where the averaged generator
  has the larger residual. Both variances are unbiased.

  As in the released code, gradients flow through w into `sr`. The slope of the fifth root is
  infinite at 0: below a variance of 1e-20, where r is the same everywhere to the last digits of
  float32, the root and its slope are taken as 0, which is what w tends to there.

  Args:
    sr: [N, H, W, C] in [0, 1], H and W at least 4.
    hr: the same shape.
    ema_sr: SR of the averaged generator, the same shape; no gradient flows into it.

  Returns:
    Scalar float32.
  """
  difference = _difference(sr, hr)
  residual = jnp.sum(jnp.abs(difference), axis=-1)
  averaged = jnp.sum(jnp.abs(_difference(jax.lax.stop_gradient(ema_sr), hr)), axis=-1)

  variance = jnp.var(residual, axis=(1, 2), keepdims=True, ddof=1)
  some = variance > 1e-20
  root = jnp.where(some, jnp.where(some, variance, 1.0) ** 0.2, 0.0)

  around = LDL_WINDOW // 2
  height, width = residual.shape[1:]
  padded = jnp.pad(residual, ((0, 0), (around, around), (around, around)), mode="reflect")
  shifted = [
    padded[:, i : i + height, j : j + width] for i in range(LDL_WINDOW) for j in range(LDL_WINDOW)
  ]
  mean = sum(shifted) / len(shifted)
  local = sum(jnp.square(x - mean) for x in shifted) / (len(shifted) - 1)
  weight = jnp.where(residual < averaged, 0.0, root * local)
  return jnp.mean(jnp.abs(weight[..., None] * difference))


def perceptual_loss(
  vgg_params: vgg.Params,
  sr: jax.Array,
  hr: jax.Array,
  *,
  layers: Mapping[str, float],
  scales: Mapping[str, float],
  criterion: Callable[[jax.Array, jax.Array], jax.Array] = l1_loss,
  dtype: jnp.dtype = jnp.float32,
  kernels: Kernels = PLAIN,
) -> jax.Array:
  """Distance of VGG features, summed over layers (SRGAN eq. 5; ESRGAN section 3.3).

  A layer's name says where the features are taken: `relu5_4` after the activation (SRGAN),
  `conv5_4` before it (ESRGAN). No gradient flows into `hr`.

  Args:
    vgg_params: the parameters that `vgg_weights.load_vgg` returned.
    sr: [N, H, W, 3] in [0, 1], or [N, H, W, 1], of which VGG sees three equal channels.
    hr: the same shape.
    layers: {layer: weight}.
    scales: {layer: factor}; the features are multiplied by it before the criterion, so an L2
      criterion sees its square. SRGAN's 1/12.75 and `vgg.magnitude_factor` come in here.
    criterion: `l1_loss` (ESRGAN) or `mse_loss` (SRGAN).
    dtype: the dtype of VGG's convolutions; the criterion is computed in float32.
    kernels: how to compute these convolutions, as `choose.choose` returns it.

  Returns:
    Scalar float32.

  Raises:
    UserError: this VGG does not have one of the layers.
  """
  names = tuple(layers)
  if sr.shape[-1] == 1:
    sr, hr = (jnp.broadcast_to(image, (*image.shape[:-1], 3)) for image in (sr, hr))
  of_sr, of_hr = (
    vgg.vgg_features(vgg_params, image, names, dtype=dtype, kernels=kernels)
    for image in (sr, jax.lax.stop_gradient(hr))
  )
  return sum(
    weight
    * criterion(
      of_sr[name].astype(jnp.float32) * scales[name],
      of_hr[name].astype(jnp.float32) * scales[name],
    )
    for name, weight in layers.items()
  )


DISTS_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


def dists_loss(
  vgg_params: vgg.Params,
  sr: jax.Array,
  hr: jax.Array,
  *,
  dtype: jnp.dtype = jnp.float32,
  kernels: Kernels = PLAIN,
) -> jax.Array:
  """DISTS (Ding et al., arXiv 2004.07728, section 3), averaged over the images.

  One minus the weighted sum, over the channels of the image and of five layers of VGG16, of how
  alike the channel's means are (texture), and of how the channel correlates (structure). VGG pools
  by the L2 norm in Hanning windows. No gradient flows into `hr`.

  Args:
    vgg_params: of torchvision's VGG16, with 'dists': {'alpha', 'beta'}, [1475] each, the weights of
      texture and structure, as `vgg_weights.with_dists` returns them.
    sr: [N, H, W, 3] in [0, 1], or [N, H, W, 1], of which VGG sees three equal channels.
    hr: the same shape.
    dtype: the dtype of VGG's convolutions; all else is computed in float32.
    kernels: how to compute these convolutions, as `choose.choose` returns it.

  Returns:
    Scalar float32, 0 for equal images.
  """
  _difference(sr, hr)  # checks the shapes
  if sr.shape[-1] == 1:
    sr, hr = (jnp.broadcast_to(image, (*image.shape[:-1], 3)) for image in (sr, hr))
  of_sr, of_hr = (
    [image.astype(jnp.float32)] + list(vgg.vgg_features(
      vgg_params, image, DISTS_LAYERS, dtype=dtype, kernels=kernels, pool=_l2_pool
    ).values())
    for image in (sr, jax.lax.stop_gradient(hr))
  )  # fmt: skip
  weights = vgg_params["dists"]
  total = jnp.sum(weights["alpha"]) + jnp.sum(weights["beta"])
  similarity, first, eps = 0.0, 0, 1e-6
  for x, y in zip(of_sr, of_hr, strict=True):
    channels = slice(first, first + x.shape[-1])
    first = channels.stop
    mean_x, mean_y = (jnp.mean(image, axis=(1, 2), keepdims=True) for image in (x, y))
    covariance = jnp.mean((x - mean_x) * (y - mean_y), axis=(1, 2))
    variances = jnp.mean((x - mean_x) ** 2 + (y - mean_y) ** 2, axis=(1, 2))
    mean_x, mean_y = mean_x[:, 0, 0], mean_y[:, 0, 0]
    texture = (2 * mean_x * mean_y + eps) / (mean_x**2 + mean_y**2 + eps)
    structure = (2 * covariance + eps) / (variances + eps)
    similarity += jnp.sum(weights["alpha"][None, channels] * texture, axis=-1)
    similarity += jnp.sum(weights["beta"][None, channels] * structure, axis=-1)
  return 1 - jnp.mean(similarity) / total


def _l2_pool(x: jax.Array) -> jax.Array:
  """Root of the mean square in windows of 3x3, of which each second is taken, zeros outside."""
  height, width = (-(-side // 2) for side in x.shape[1:3])
  padded = jnp.pad(jnp.square(x.astype(jnp.float32)), ((0, 0), (1, 1), (1, 1), (0, 0)))
  rows = sum(
    weight * padded[:, i : i + 2 * height - 1 : 2] for i, weight in enumerate((0.25, 0.5, 0.25))
  )
  mean = sum(
    weight * rows[:, :, i : i + 2 * width - 1 : 2] for i, weight in enumerate((0.25, 0.5, 0.25))
  )
  return jnp.sqrt(mean + 1e-12)


def vanilla_generator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """-E[log D(G(x))] (SRGAN, eq. 6).

  The paper prints a sum over the batch; this is the mean, as in every implementation that
  reproduces it with the paper's weight of 1e-3.

  Args:
    real: logits of HR images, not used.
    fake: logits of SR images, [N, ...].

  Returns:
    Scalar float32, nats.
  """
  del real
  return _mean_softplus(-_float(fake))


def vanilla_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """-E[log D(HR)] - E[log(1 - D(SR))] (SRGAN, eq. 2).

  Args:
    real: logits of HR images, [N, ...].
    fake: logits of SR images, [N, ...].

  Returns:
    Scalar float32, nats: both terms are added, without a factor of 1/2.
  """
  return _mean_softplus(-_float(real)) + _mean_softplus(_float(fake))


def lsgan_generator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """1/2 E[(D(SR) - 1)^2] (Mao et al., LSGAN, arXiv 1611.04076, eq. 9 with a=0, b=c=1).

  Args:
    real: logits of HR images, not used.
    fake: logits of SR images, [N, ...].

  Returns:
    Scalar float32.
  """
  del real
  return 0.5 * jnp.mean(jnp.square(_float(fake) - 1.0))


def lsgan_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """1/2 E[(D(HR) - 1)^2] + 1/2 E[D(SR)^2] (LSGAN, eq. 9 with a=0, b=c=1).

  Args:
    real: logits of HR images, [N, ...].
    fake: logits of SR images, [N, ...].

  Returns:
    Scalar float32: with the paper's halves.
  """
  real, fake = _float(real), _float(fake)
  return 0.5 * jnp.mean(jnp.square(real - 1.0)) + 0.5 * jnp.mean(jnp.square(fake))


def hinge_generator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """-E[D(SR)] (hinge: Lim and Ye, arXiv 1705.02894; Miyato et al., arXiv 1802.05957, eq. 17).

  Args:
    real: logits of HR images, not used.
    fake: logits of SR images, [N, ...].

  Returns:
    Scalar float32.
  """
  del real
  return -jnp.mean(_float(fake))


def hinge_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """E[max(0, 1 - D(HR))] + E[max(0, 1 + D(SR))] (Miyato et al., arXiv 1802.05957, eq. 16).

  Args:
    real: logits of HR images, [N, ...].
    fake: logits of SR images, [N, ...].

  Returns:
    Scalar float32.
  """
  return jnp.mean(jax.nn.relu(1.0 - _float(real))) + jnp.mean(jax.nn.relu(1.0 + _float(fake)))


def ragan_generator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Relativistic average GAN loss of the generator (ESRGAN, eq. 2).

  The two expectations are added, as printed; the authors' released code halves the sum, for which
  `configs/esrgan.py:basicsr` has a weight of 2.5e-3 instead of 5e-3. Gradients flow through
  both means. -log(1 - sigmoid(x)) is softplus(x), finite for any logit.

  Args:
    real: logits of HR images, [N, ...], N the global batch.
    fake: logits of SR images, the same.

  Returns:
    Scalar float32, nats; 2 ln 2 where all logits are equal.
  """
  real, fake = _float(real), _float(fake)
  return _mean_softplus(real - jnp.mean(fake)) + _mean_softplus(jnp.mean(real) - fake)


def ragan_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Relativistic average GAN loss of the discriminator (ESRGAN, eq. 1).

  It is the generator's loss with the roles exchanged: both terms are added, without a factor of
  1/2, and gradients flow through both means.

  Args:
    real: logits of HR images, [N, ...], N the global batch.
    fake: logits of SR images, the same.

  Returns:
    Scalar float32, nats.
  """
  return ragan_generator_loss(fake, real)


def ragan_detached_discriminator_loss(real: jax.Array, fake: jax.Array) -> jax.Array:
  """Returns `ragan_discriminator_loss`, but no gradient flows through the two means.

  The authors' released code detaches them, so that it can do two backward passes under data
  parallelism. The value is the same, but its gradient is not that of eq. 1.

  Args:
    real: logits of HR images, [N, ...], N the global batch.
    fake: logits of SR images, the same.

  Returns:
    Scalar float32, nats.
  """
  real, fake = _float(real), _float(fake)
  mean_real, mean_fake = jax.lax.stop_gradient((jnp.mean(real), jnp.mean(fake)))
  return _mean_softplus(mean_fake - real) + _mean_softplus(fake - mean_real)


class AdversarialLoss(NamedTuple):
  """The two players' losses, each `(real, fake) -> scalar`."""

  generator: Callable[[jax.Array, jax.Array], jax.Array]
  discriminator: Callable[[jax.Array, jax.Array], jax.Array]


ADVERSARIAL = {
  "vanilla": AdversarialLoss(vanilla_generator_loss, vanilla_discriminator_loss),
  "lsgan": AdversarialLoss(lsgan_generator_loss, lsgan_discriminator_loss),
  "hinge": AdversarialLoss(hinge_generator_loss, hinge_discriminator_loss),
  "ragan": AdversarialLoss(ragan_generator_loss, ragan_discriminator_loss),
  "ragan_detached": AdversarialLoss(ragan_generator_loss, ragan_detached_discriminator_loss),
}


def _float(logits: jax.Array) -> jax.Array:
  return logits.astype(jnp.float32)


def _difference(sr: jax.Array, hr: jax.Array) -> jax.Array:
  if sr.shape != hr.shape:  # subtraction would broadcast silently
    raise UserError(f"sr {sr.shape} and hr {hr.shape} must have the same shape")
  return sr.astype(jnp.float32) - hr.astype(jnp.float32)


def _mean_softplus(x: jax.Array) -> jax.Array:
  return jnp.mean(jax.nn.softplus(x))
