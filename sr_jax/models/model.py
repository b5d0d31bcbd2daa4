"""A trained network, as it is read and written."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sr_jax.formats import state_dicts
from sr_jax.networks.build import in_channels
from sr_jax.networks import trees


# The version of what we write into a model file beside its arrays; 1 did not say its number.
FORMAT = 2


class Model(NamedTuple):
  """A trained network: a generator, or a discriminator to fine-tune with.

  Attributes:
    name: a key of `build.GENERATORS` or `build.DISCRIMINATORS`.
    kwargs: the fields of the module; a generator's `scale` is among them.
    variables: {'params', 'batch_stats'}, float32.
    info: JSON values. `digest` identifies the variables, and `ancestry` lists the digests of the
      models that they were trained from, nearest first. If they are known, there are `step` and
      `config`, the run's settings without the names of folders. `file` says how the file was
      written that the model was read from.
  """

  name: str
  kwargs: dict[str, Any]
  variables: trees.Variables
  info: dict[str, Any]


def parameter_count(model: Model) -> int:
  """Returns the number of trained parameters; BatchNorm's statistics are not among them."""
  return sum(np.size(leaf) for leaf in jax.tree.leaves(model.variables["params"]))


def spandrel_objection(model: Model) -> str | None:
  """Says why chaiNNer, ComfyUI and whatever reads with spandrel would refuse a generator's file."""
  channels = in_channels(model.variables, model.kwargs)
  return state_dicts.spandrel_objection(model.name, model.kwargs, in_channels=channels)
