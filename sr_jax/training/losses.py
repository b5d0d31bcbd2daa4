"""The losses of the SRGAN and ESRGAN papers and some others, each a pure function of arrays.

Images are [N, H, W, C] float in [0, 1]. `real` and `fake` are discriminator *logits* of any shape
[N, ...]; every adversarial loss is `(real, fake) -> scalar`, with means over all elements, so that
under `jit` with the batch sharded over devices each mean is over the global batch. All losses are
computed and returned in float32.

Recipes (configs/) set the weights of the losses; `terms.make_losses` weights and sums them. The
Charbonnier, LSGAN and hinge losses are from other papers, which their docstrings name.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    sr: [N, H, W, 3] in [0, 1].
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
