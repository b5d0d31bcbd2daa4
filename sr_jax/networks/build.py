"""Builds networks by their names, and knows their fields.

Parameter names follow BasicSR's checkpoints; `body` holds all blocks, stacked on a leading axis, so
that there are few leaves. The first convolution of a generator is `conv_first`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.networks import discriminators
from sr_jax.networks.compact import Compact
from sr_jax.networks.rrdbnet import RRDBNet, ResidualNet
from sr_jax.networks.srresnet import MSRResNet, SRResNet
from sr_jax.networks import trees

GENERATORS = {
  "srresnet": SRResNet,
  "msrresnet": MSRResNet,
  "rrdbnet": RRDBNet,
  "residualnet": ResidualNet,
  "compact": Compact,
}
DISCRIMINATORS = {
  "srgan": discriminators.SRGANDiscriminator,
  "vgg": discriminators.VGGDiscriminator,
  "unet": discriminators.UNetDiscriminator,
  "patch": discriminators.PatchDiscriminator,
}

# Fields of the modules that neither a recipe nor a file sets.
_NOT_SETTABLE = ("parent", "name", "dtype", "kernels")
# {what a field was called in the configurations and files of version 0: its name today}
RENAMED = {"dense": "algorithm"}


def generator_fields(name: str) -> dict[str, Any]:
  """Returns the fields of a generator that a recipe may set, with their defaults.

  Raises:
    UserError: there is no such generator; the error lists the choices.
  """
  fields = dataclasses.fields(look_up("generator.name", GENERATORS, name))
  return {field.name: field.default for field in fields if field.name not in _NOT_SETTABLE}


def renamed(kwargs: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a generator's kwargs with today's names of the fields."""
  return {RENAMED.get(field, field): value for field, value in kwargs.items()}


def build_generator(name: str, kwargs: Mapping[str, Any], *, dtype: str = "float32") -> nn.Module:
  """Builds a generator by its name.

  Args:
    name: a key of GENERATORS.
    kwargs: fields of the module, as `generator_fields` lists them.
    dtype: the dtype of the convolutions, 'float32' or 'bfloat16'.

  Raises:
    UserError: the name, a field or the dtype is unknown; the error lists the choices.
  """
  fields = generator_fields(name)
  for field in kwargs:
    if field not in fields:
      raise UserError(f"generator {name!r} has no field {field!r}; it has {', '.join(fields)}")
  return GENERATORS[name](**kwargs, dtype=check_dtype(dtype))


def check_dtype(dtype: str) -> jnp.dtype:
  """Turns a recipe's `dtype` into the dtype that convolutions compute in.

  Raises:
    UserError: it is neither 'float32' nor 'bfloat16'.
  """
  if dtype not in ("float32", "bfloat16"):
    raise UserError(f"dtype={dtype!r} must be float32 or bfloat16")
  return jnp.dtype(dtype)


def in_channels(variables: trees.Variables, kwargs: Mapping[str, Any]) -> int:
  """Returns the number of channels of a model's LR images."""
  return image_channels(variables["params"]["conv_first"]["kernel"].shape[2], kwargs)


def image_channels(inputs: int, kwargs: Mapping[str, Any]) -> int:
  """Returns the same as `in_channels`, from the number of channels that `conv_first` takes."""
  return inputs // kwargs.get("input_unshuffle", 1) ** 2


def build_discriminator(
  name: str, kwargs: Mapping[str, Any], *, dtype: str = "float32"
) -> nn.Module:
  """Builds a discriminator by its name.

  Args:
    name: a key of DISCRIMINATORS.
    kwargs: fields of the module.
    dtype: the dtype of the convolutions, 'float32' or 'bfloat16'.

  Raises:
    UserError: the name or the dtype is unknown; the error lists the choices.
  """
  module = look_up("discriminator.name", DISCRIMINATORS, name)
  return module(**kwargs, dtype=check_dtype(dtype))


def look_up(field: str, table: Mapping[str, Any], name: str) -> Any:
  """Returns what a table has under the name that a recipe's field gives.

  Raises:
    UserError: the table has no such name; the error lists those that it has.
  """
  if name not in table:
    raise UserError(f"{field}={name!r} must be one of {', '.join(table)}")
  return table[name]


def build_checked(
  name: str, kwargs: Mapping[str, Any], variables: Mapping[str, Any]
) -> tuple[nn.Module, int]:
  """Builds a generator and compares its variables with given ones.

  Args:
    name: a key of GENERATORS.
    kwargs: fields of the module.
    variables: {'params': ..., 'batch_stats': ...}, the latter empty or absent without BatchNorm.

  Returns:
    The module, and the number of channels of the LR image that it takes.

  Raises:
    UserError: the name or a field is unknown, or a variable is absent or has another shape than the
      module's; the error names the first such variable.
  """
  if name not in GENERATORS:
    raise UserError(f"generator {name!r} must be one of {', '.join(GENERATORS)}")
  try:
    module = GENERATORS[name](**kwargs)
  except TypeError as error:
    raise UserError(f"generator {name!r} cannot be built with {dict(kwargs)}: {error}") from error
  try:
    channels = in_channels(variables, kwargs)
  except (KeyError, TypeError, AttributeError, IndexError) as error:
    raise UserError(
      f"variables have no kernel [H, W, I, O] at params/conv_first ({error})"
    ) from error
  lr = jax.ShapeDtypeStruct((1, 8, 8, channels), jnp.float32)
  expected = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), lr)
  if difference := trees.first_difference(trees.shapes(expected), trees.shapes(dict(variables))):
    path, ours, theirs = difference
    raise UserError(
      f"these weights do not fit {name}: the shape of {path} is {theirs}, but the network needs "
      f"{ours}; give the name and the fields of the network that the weights belong to"
    )
  return module, channels
