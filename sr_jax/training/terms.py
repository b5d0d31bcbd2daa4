"""Computes the losses of one forward pass, by which generator and discriminator are trained.

The equations are in `losses.py`; here they are weighted and summed.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.data.degrade.sharpen import sharpen
from sr_jax.kernels.choose import PLAIN, Kernels
from sr_jax.training import losses

TERMS = ("pixel", "perceptual", "adversarial", "tv", "ldl", "dists", *losses.IMAGE)

# (params_g, params_d, stats_g, stats_d, lr, hr, vgg_params, ema_params)
#   -> ((loss_g, loss_d), (stats_g, stats_d, logs))
Losses = Callable[..., tuple[tuple[jax.Array, jax.Array], tuple[Any, Any, dict[str, jax.Array]]]]


class Perceptual(NamedTuple):
  """The perceptual term: `losses.perceptual_loss` without its arrays.

  Attributes:
    layers: {layer: weight}.
    scales: {layer: factor of the features}.
    criterion: a function of `losses.PIXEL`.
    dtype: the dtype of VGG's convolutions.
    kernels: how to compute these convolutions, as `choose.choose` returns it.
  """

  layers: Mapping[str, float]
  scales: Mapping[str, float]
  criterion: Callable[[jax.Array, jax.Array], jax.Array]
  dtype: jnp.dtype = jnp.float32
  kernels: Kernels = PLAIN


class Adversarial(NamedTuple):
  """The adversarial term: how generator and discriminator play against each other.

  Attributes:
    loss: a value of `losses.ADVERSARIAL`, the losses of both networks.
    discriminator_weight: the factor of the discriminator's loss. Adam is invariant to this factor,
      gradient clipping is not.
    warmup_steps: the number of steps at the start in which only the discriminator is updated
      (BasicSR: net_d_init_iters).
    steps_per_generator_step: the generator is updated in every n-th step (BasicSR: net_d_iters).
    rest_above: the discriminator is left alone in updates where its margin, the mean logit of HR
      less that of SR, is larger, so that the generator can catch up; 0 for never.
    replicas: into how many parts the batch is divided for RaGAN's means. Data-parallel PyTorch has
      one part for each device; 1 is the paper's mean over the global batch.
  """

  loss: losses.AdversarialLoss
  discriminator_weight: float = 1.0
  warmup_steps: int = 0
  steps_per_generator_step: int = 1
  rest_above: float = 0.0
  replicas: int = 1


def nonzero_weights(weights: Mapping[str, float]) -> dict[str, float]:
  """Returns the terms whose weight is not 0; the others are not computed.

  Raises:
    UserError: a term is none of TERMS, or every weight is 0.
  """
  weights = {name: weight for name, weight in weights.items() if weight}
  if unknown := set(weights) - set(TERMS):
    raise UserError(f"unknown loss terms {sorted(unknown)}; they are {', '.join(TERMS)}")
  if not weights:
    raise UserError("every loss term has weight 0: nothing to train; give one a weight")
  return weights


def make_losses(
  generator: nn.Module,
  discriminator: nn.Module | None,
  weights: Mapping[str, float],
  pixel_loss: Callable[[jax.Array, jax.Array], jax.Array],
  perceptual: Perceptual | None,
  adversarial: Adversarial | None,
  sharpened: Collection[str] = (),
) -> Losses:
  """Makes the function of both networks' parameters whose gradients the step takes.

  It is long, because each term has a line or two of its own.

  Args:
    generator: the module from LR image to SR image.
    discriminator: the module from image to logits; None without an adversarial term.
    weights: {term: weight}, for terms of TERMS.
    pixel_loss: a function of `losses.PIXEL`.
    perceptual: the perceptual term, needed if its weight or that of DISTS is not 0; of this one
      alone the dtype and the kernels are used.
    adversarial: the adversarial term, needed if its weight is not 0.
    sharpened: the terms that compare with the sharpened HR images, as Real-ESRGAN's do.

  Returns:
    The function; the comment at `Losses` says what it takes and returns.

  Raises:
    UserError: a term is unknown, every weight is 0, or a term has a weight but what is needed to
      compute it was not given.
  """
  weights = nonzero_weights(weights)
  needs = {"perceptual": "perceptual", "dists": "perceptual", "adversarial": "adversarial"}
  given = {"perceptual": perceptual, "adversarial": adversarial}
  for term, needed in needs.items():
    if term in weights and given[needed] is None:
      raise UserError(
        f"loss weight {term}={weights[term]}, but `{needed}` was not given; pass it to "
        "make_train_step or set the weight to 0"
      )
  if ("adversarial" in weights) != (discriminator is not None):
    raise UserError("give both a discriminator and an adversarial weight that is not 0, or neither")

  def compute_losses(params_g, params_d, stats_g, stats_d, lr, hr, vgg_params, ema_params):
    terms, logs, loss_d = {}, {}, jnp.zeros(())
    targets = dict.fromkeys(TERMS, hr)
    if wanted := set(weights).intersection(sharpened):
      targets |= dict.fromkeys(wanted, sharpen(hr))
    if "ldl" in weights:
      ema_sr, _ = _apply(generator, ema_params, stats_g, lr)
    sr, stats_g = _apply(generator, params_g, stats_g, lr)
    if "pixel" in weights:
      terms["pixel"] = pixel_loss(sr, targets["pixel"])
    if "perceptual" in weights:
      terms["perceptual"] = losses.perceptual_loss(
        vgg_params, sr, targets["perceptual"], **perceptual._asdict()
      )
    if "dists" in weights:
      terms["dists"] = losses.dists_loss(
        vgg_params, sr, hr, dtype=perceptual.dtype, kernels=perceptual.kernels
      )
    if "tv" in weights:
      terms["tv"] = losses.tv_loss(sr)
    if "ldl" in weights:
      terms["ldl"] = losses.ldl_loss(sr, hr, ema_sr)
    terms |= {name: loss(sr, hr) for name, loss in losses.IMAGE.items() if name in weights}
    if "adversarial" in weights:
      real, stats_d = _apply(discriminator, params_d, stats_d, targets["adversarial"])
      fake, stats_d = _apply(discriminator, params_d, stats_d, sr)
      loss = adversarial.loss
      terms["adversarial"] = by_replica(loss.generator, adversarial.replicas)(real, fake)
      loss_d = by_replica(loss.discriminator, adversarial.replicas)(real, fake)
      loss_d = adversarial.discriminator_weight * loss_d
      logs = {
        "loss_d": loss_d,
        "d_real": jnp.mean(jax.nn.sigmoid(real)),
        "d_fake": jnp.mean(jax.nn.sigmoid(fake)),
        "logit_real": jnp.mean(real),
        "logit_fake": jnp.mean(fake),
      }
    weighted = {name: weights[name] * value for name, value in terms.items()}
    loss_g = sum(weighted.values())
    logs["loss_g"] = loss_g
    logs |= {f"loss/{name}": value for name, value in terms.items()}
    logs |= {f"weighted/{name}": value for name, value in weighted.items()}
    return (loss_g, loss_d), (stats_g, stats_d, logs)

  return compute_losses


def by_replica(loss: Callable[..., jax.Array], replicas: int) -> Callable[..., jax.Array]:
  """Makes the mean of a loss (real, fake) -> [] over equal parts of the batch, each on its own."""
  if replicas == 1:
    return loss

  def mean(real: jax.Array, fake: jax.Array) -> jax.Array:
    parts = (x.reshape(replicas, -1, *x.shape[1:]) for x in (real, fake))
    return jnp.mean(jax.vmap(loss)(*parts))

  return mean


def _apply(
  module: nn.Module, params: Any, batch_stats: Any, image: jax.Array
) -> tuple[jax.Array, Any]:
  variables = {"params": params, "batch_stats": batch_stats}
  output, updated = module.apply(variables, image, train=True, mutable=["batch_stats"])
  return output, updated.get("batch_stats", batch_stats)
