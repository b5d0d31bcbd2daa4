"""Counts what a step computes, so that the time of a stage can be foretold before it runs."""

from typing import Any

import jax
import jax.numpy as jnp

from sr_jax.formats import vgg_weights
from sr_jax.networks import vgg
from sr_jax.networks.build import build_discriminator, build_generator
from sr_jax.runs.settings import Config
from sr_jax.training import losses


def step_products(config: Config, weights: vgg_weights.VGG | None) -> float:
  """Counts the products in the convolutions and linear layers of one step, for the whole batch.

  A backward pass counts as two forward passes. The generator runs forward and backward, and with
  LDL its average forward too; VGG forward on HR and SR images, and backward to the latter; the
  discriminator on both, backward to its weights, and once more back to the SR images.

  Args:
    config: the recipe.
    weights: VGG's, or None without a perceptual term.
  """
  patch, scale = config.data.hr_patch, config.scale
  generator = dict(config.generator.kwargs) | {"scale": scale}
  generator |= {"algorithm": ""} if "algorithm" in generator else {}
  network = build_generator(config.generator.name, generator)
  lr_shape = (1, patch // scale, patch // scale, config.data.channels)
  total = (3 + bool(config.ldl.weight)) * products_of_network(network, lr_shape)
  image = jax.ShapeDtypeStruct((1, patch, patch, 3), jnp.float32)
  if weights and config.perceptual.weight:
    layers = tuple(entry.partition(":")[0] for entry in config.perceptual.layers)
    features = jax.make_jaxpr(lambda params, x: vgg.vgg_features(params, x, layers))
    total += 3 * _products(features(weights.params, image).jaxpr)
  if config.dists.weight:
    features = jax.make_jaxpr(lambda p, x: vgg.vgg_features(p, x, losses.DISTS_LAYERS))
    total += 3 * _products(features(weights.params, image).jaxpr)
  if config.adversarial.weight:
    network = build_discriminator(config.discriminator.name, config.discriminator.kwargs)
    total += 7 * products_of_network(network, (1, patch, patch, config.data.channels))
  return total * config.data.batch_size


def products_of_network(network: Any, shape: tuple[int, ...]) -> float:
  """Counts the products of a network's forward pass.

  Args:
    network: a generator or discriminator with plain kernels.
    shape: of its input, [N, H, W, C].
  """
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  variables = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, train=False), image)
  forward = jax.make_jaxpr(lambda variables, x: network.apply(variables, x, train=False))
  return _products(forward(variables, image).jaxpr)


def _products(jaxpr: Any) -> float:
  """Counts the products of convolutions and matrix products, loops as often as they run."""
  total = 0.0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "conv_general_dilated":
      # For each output as many as the kernel has weights for its channel.
      kernel, out = (x.aval.shape for x in (equation.invars[1], equation.outvars[0]))
      channels = equation.params["dimension_numbers"].rhs_spec[0]
      total += _size(out) * _size(kernel) / kernel[channels]
    elif equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += _size(equation.outvars[0].aval.shape) * _size([left[i] for i in contracted])
    times = equation.params["length"] if equation.primitive.name == "scan" else 1
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)  # a closed jaxpr has the jaxpr in it
      total += times * _products(inner) if hasattr(inner, "eqns") else 0
  return total


def _size(shape: Any) -> float:
  size = 1.0
  for side in shape:
    size *= side
  return size
