"""Turns a recipe's settings into networks and the functions of a step."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sr_jax import UserError
from sr_jax.data.mixing import Mixing
from sr_jax.formats import vgg_weights
from sr_jax.kernels.choose import PLAIN, Kernels, choose
from sr_jax.machine import sharding
from sr_jax.networks import vgg
from sr_jax.networks.build import build_discriminator, build_generator, look_up
from sr_jax.runs.settings import Config
from sr_jax.runs.state import TrainState, create_guard_state, create_train_state
from sr_jax.training import losses
from sr_jax.training.freezing import frozen_masks
from sr_jax.training import schedules
from sr_jax.training.guard import Guard
from sr_jax.training.step import make_optimizer
from sr_jax.training.terms import TERMS, Adversarial, Perceptual, nonzero_weights


class Networks(NamedTuple):
  """What a recipe trains.

  Attributes:
    generator: LR image in, SR image out.
    discriminator: logits, or None.
    kernels: for networks without dense blocks, such as VGG.
  """

  generator: nn.Module
  discriminator: nn.Module | None
  kernels: Kernels


def build_networks(config: Config, mesh: jax.sharding.Mesh) -> Networks:
  """Builds a recipe's networks, with the kernels that are chosen for the mesh's devices."""
  generator = build_generator(
    config.generator.name, {"scale": config.scale, **config.generator.kwargs}, dtype=config.dtype
  )
  generator = generator.clone(kernels=choose(mesh.devices, config.dtype, generator))
  # Where only the generator computes, nothing else need be tried on this machine.
  others = config.adversarial.weight or config.perceptual.weight or config.dists.weight
  kernels = choose(mesh.devices, config.dtype) if others else PLAIN
  discriminator = None
  if config.adversarial.weight:
    discriminator = build_discriminator(
      config.discriminator.name, config.discriminator.kwargs, dtype=config.dtype
    ).clone(kernels=kernels)
  return Networks(generator, discriminator, kernels)


def optimizer(config: Config) -> optax.GradientTransformation:
  """Makes Adam as the recipe has it: the same for both networks, in both papers."""
  settings = config.optimizer
  return make_optimizer(b1=settings.b1, b2=settings.b2, clip_norm=settings.clip_norm)


def create_state(
  config: Config,
  networks: Networks,
  generator_variables: Any = None,
  discriminator_variables: Any = None,
) -> TrainState:
  """Initialises a recipe's state; pure, for jit and eval_shape."""
  patch, scale = config.data.hr_patch, config.scale
  state = create_train_state(
    config.seed,
    networks.generator,
    networks.discriminator,
    optimizer(config),
    optimizer(config) if networks.discriminator else None,
    (1, patch // scale, patch // scale, config.data.channels),
    (1, patch, patch, config.data.channels),
    generator_variables,
    discriminator_variables,
  )
  return state.replace(guard=create_guard_state()) if config.guard.enabled else state


def make_guard(config: Config) -> Guard | None:
  """Turns the recipe's settings into the guard of its steps, if it has one."""
  if not config.guard.enabled:
    return None
  return Guard(config.guard.outlier, config.guard.divergence, is_relativistic(config))


def is_relativistic(config: Config) -> bool:
  """Whether the discriminator says how much more real one image is than others (RaGAN)."""
  return config.adversarial.loss.startswith("ragan")


def step_arguments(
  config: Config, networks: Networks, mesh: jax.sharding.Mesh, weights: vgg_weights.VGG | None
) -> dict[str, Any]:
  """Turns the recipe's settings into the arguments of `make_train_step`, all but `prepare`.

  Args:
    config: the recipe.
    networks: of `build_networks`.
    mesh: that the step runs on.
    weights: of the perceptual term and of DISTS, or None.
  """
  adversarial = None
  if config.adversarial.weight:
    scopes = {"global": 1, "replica": mesh.size}
    adversarial = Adversarial(
      loss=look_up("adversarial.loss", losses.ADVERSARIAL, config.adversarial.loss),
      discriminator_weight=config.adversarial.discriminator_weight,
      warmup_steps=config.discriminator.warmup_steps,
      rest_above=config.discriminator.rest_above,
      steps_per_generator_step=config.discriminator.steps_per_generator_step,
      replicas=look_up("adversarial.scope", scopes, config.adversarial.scope),
    )
  frozen = None
  if config.freeze:
    state = jax.eval_shape(lambda: create_state(config, networks))
    frozen = frozen_masks(config.freeze, state.generator.variables)
  return dict(
    generator=networks.generator,
    discriminator=networks.discriminator,
    weights=nonzero_weights({term: config[term].weight for term in TERMS}),
    pixel_loss=look_up("pixel.loss", losses.PIXEL, config.pixel.loss),
    perceptual=make_perceptual(config, weights, networks.kernels) if weights else None,
    adversarial=adversarial,
    optimizer_g=optimizer(config),
    optimizer_d=optimizer(config) if networks.discriminator else None,
    learning_rate=schedules.make_schedule(
      **{**config.learning_rate, "periods": config.learning_rate.periods or (config.total_steps,)}
    ),
    ema_decay=config.ema.decay,
    ema_warmup=config.ema.warmup,
    accumulate_steps=config.optimizer.accumulate_steps,
    frozen=frozen,
    grey=config.data.channels == 1,
    mesh=mesh,
    mix=make_mixing(config, mesh),
    sharpened=tuple(t for t in ("pixel", "perceptual", "adversarial") if config[t].sharpened),
    guard=make_guard(config),
  )


def make_mixing(config: Config, mesh: jax.sharding.Mesh) -> Mixing | None:
  """Turns the recipe's settings into what mixes the examples of a batch; None where none are."""
  data = config.data
  if not (data.mixup or data.cutmix):
    return None
  return Mixing(
    config.seed, data.mixup, data.mixup_alpha, data.cutmix, sharding.batch_sharded(mesh)
  )


def make_perceptual(config: Config, weights: vgg_weights.VGG, kernels: Kernels) -> Perceptual:
  """Turns 'layer:weight' pairs into the perceptual term, checked against the loaded weights."""
  settings = config.perceptual
  layers = {}
  for entry in settings.layers if settings.weight else ():  # else DISTS alone needs VGG
    layer, _, weight = entry.partition(":")
    try:
      layers[layer] = float(weight or 1)
    except ValueError as error:
      raise UserError(
        f"perceptual.layers: {entry!r} must be LAYER or LAYER:WEIGHT; try {layer}:1.0"
      ) from error
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  jax.eval_shape(  # raises where these weights do not have a layer
    lambda params, image: vgg.vgg_features(params, image, tuple(layers)), weights.params, image
  )
  scales = {
    layer: settings.feature_scale
    * vgg.magnitude_factor(layer, weights.convention, settings.magnitude)
    for layer in layers
  }
  criterion = look_up("perceptual.criterion", losses.PIXEL, settings.criterion)
  return Perceptual(layers, scales, criterion, jnp.dtype(config.dtype), kernels)
