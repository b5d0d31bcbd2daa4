"""The loss terms of one forward pass: what the generator and the discriminator are trained by.

The equations are in `losses.py`; here they are weighted and summed.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.kernels.choose import PLAIN, Kernels
from sr_jax.training import losses

TERMS = ("pixel", "perceptual", "adversarial", "tv")

# (params_g, params_d, stats_g, stats_d, lr, hr, vgg_params)
#   -> ((loss_g, loss_d), (stats_g, stats_d, logs))
Losses = Callable[..., tuple[tuple[jax.Array, jax.Array], tuple[Any, Any, dict[str, jax.Array]]]]


class Perceptual(NamedTuple):
  """The perceptual term: `losses.perceptual_loss` without its arrays.

  Attributes:
    layers: {layer: weight}.
    scales: {layer: factor of the features}.
    criterion: of `losses.PIXEL`.
    dtype: of VGG's convolutions.
    kernels: how to compute them; of `choose.choose`.
  """

  layers: Mapping[str, float]
  scales: Mapping[str, float]
  criterion: Callable[[jax.Array, jax.Array], jax.Array]
  dtype: jnp.dtype = jnp.float32
  kernels: Kernels = PLAIN


class Adversarial(NamedTuple):
  """The adversarial term: how generator and discriminator play against each other.

  Attributes:
    loss: a pair of `losses.ADVERSARIAL`.
    discriminator_weight: factor of D's loss; Adam does not see it, gradient clipping does.
    warmup_steps: D alone is updated in the first so many steps (BasicSR: net_d_init_iters).
    steps_per_generator_step: G is updated in every n-th step (BasicSR: net_d_iters).
    replicas: parts of the batch that each have their own RaGAN means, as data-parallel PyTorch
      computes them, to compare with its results; 1 is the paper's mean over the global batch.
  """

  loss: losses.AdversarialLoss
  discriminator_weight: float = 1.0
  warmup_steps: int = 0
  steps_per_generator_step: int = 1
  replicas: int = 1


def existing(weights: Mapping[str, float]) -> dict[str, float]:
  """Returns the terms whose weight is not 0; the others are not computed.

  Raises:
    UserError: a term that is none of TERMS, or no weight at all.
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
) -> Losses:
  """Makes the function of both networks' parameters whose gradients the step takes.

  Args: as of `step.make_train_step`.

  Raises:
    UserError: a term has weight and nothing to compute it with.
  """
  weights = existing(weights)
  for term, needed in {"perceptual": perceptual, "adversarial": adversarial}.items():
    if term in weights and needed is None:
      raise UserError(f"the {term} term has weight {weights[term]} but nothing defines it")
  if ("adversarial" in weights) != (discriminator is not None):
    raise UserError("a discriminator and an adversarial weight come together or not at all")

  def compute_losses(params_g, params_d, stats_g, stats_d, lr, hr, vgg_params):
    sr, stats_g = _apply(generator, params_g, stats_g, lr)
    terms, logs, loss_d = {}, {}, jnp.zeros(())
    if "pixel" in weights:
      terms["pixel"] = pixel_loss(sr, hr)
    if "perceptual" in weights:
      terms["perceptual"] = losses.perceptual_loss(vgg_params, sr, hr, **perceptual._asdict())
    if "tv" in weights:
      terms["tv"] = losses.tv_loss(sr)
    if "adversarial" in weights:
      real, stats_d = _apply(discriminator, params_d, stats_d, hr)
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
  """The mean of a loss (real, fake) -> [] over equal parts of the batch, each on its own."""
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
