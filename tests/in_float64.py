"""Makes every `jnp.float32` of sr_jax and Flax a float64: imported before them, in a process apart.

Runs that must be the same, on one device or on many, are compared in float64. In float32 they part
by rounding, and the losses of a GAN double that from step to step: how far they are apart after
twenty steps depends on the processor (docs/faithfulness.md).
"""

import os
import sys

assert not {"flax", "sr_jax"} & set(sys.modules), "in_float64 must be imported before them"
os.environ["JAX_ENABLE_X64"] = "1"

from collections.abc import Callable  # noqa: E402
import functools  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

jnp.float32 = jnp.float64  # both packages look it up there


def widen(tree: Any) -> Any:
  """Returns the tree with its floating-point leaves in float64."""
  return jax.tree.map(
    lambda x: np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, np.floating) else x, tree
  )


def widen_what_is_read() -> None:
  """Makes a recipe's dtype="float64" known, and models and VGG's weights float64 when read."""
  from sr_jax.formats import vgg_weights
  from sr_jax.networks import build
  from sr_jax.training import fields
  from sr_jax.training import stage

  def widened(read: Callable, field: str) -> Callable:
    @functools.wraps(read)
    def call(*arguments, **named):
      what = read(*arguments, **named)
      return what._replace(**{field: widen(getattr(what, field))})

    return call

  build.check_dtype = jnp.dtype
  fields.FIELDS["dtype"] = fields.FIELDS["dtype"]._replace(rule=fields.ANY)
  stage.read_model = widened(stage.read_model, "variables")
  vgg_weights.load_vgg = widened(vgg_weights.load_vgg, "params")
