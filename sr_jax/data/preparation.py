"""Makes the batch of a step on the devices, out of HR crops that are larger than its patches.

What happens to an example is a pure function of the seed, the step and the example's row in the
batch: the same on one device and on many, before and after a kill.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from sr_jax.data.degrade import chain
from sr_jax.data.degrade.draws import Draws, Settings, draw
from sr_jax.machine.sharding import DATA_AXIS

Batch = Mapping[str, jax.Array]


class Example(NamedTuple):
  """What is drawn for an example.

  Attributes:
    degraded: whether its LR image is made by degrading; else it is the source's own.
    y: top row of the patch in the degraded crop, LR pixels.
    x: left column.
    draws: of the degradation.
  """

  degraded: jax.Array
  y: jax.Array
  x: jax.Array
  draws: Draws


@dataclasses.dataclass(frozen=True)
class Preparation:
  """The function (images, step) -> {'lr', 'hr'}, to be called within a jitted function.

  Attributes:
    settings: the laws of the degradations.
    seed: of the run.
    batch_size: of the global batch.
    crop: side of the HR crops that are degraded, pixels.
    patch: side of the HR patches that are cut out of them, so that the crops' edges are not seen.
    share: of the examples that are degraded.
    mesh: that the step runs on.
    cut: makes the crops out of the images, as `device_input.make_cutter` returns it; None where the
      host has cut them.
  """

  settings: Settings
  seed: int
  batch_size: int
  crop: int
  patch: int
  share: float
  mesh: Mesh
  cut: Callable[[Any, jax.Array], Batch] | None = None

  def __call__(self, images: Any, step: jax.Array) -> Batch:
    """Makes the batch of a step.

    Args:
      images: the arrays that `cut` takes, or crops {'lr': [N, h, w, 3], 'hr': [N, H, W, 3]}, both
        uint8 or both uint16.
      step: integer [], from 0.

    Returns:
      {'lr': [N, h, w, 3], 'hr': [N, H, W, 3]} of patches, of the crops' dtype, sharded over the
      mesh.
    """
    crops = images if self.cut is None else self.cut(images, step)
    rows = jnp.arange(self.batch_size, dtype=jnp.uint32)
    split, whole = PartitionSpec(DATA_AXIS), PartitionSpec()
    # One example at a time: each is then computed alike, whatever the number of devices, and what
    # need not be computed for it is not.
    local = jax.shard_map(
      lambda lr, hr, rows, step: jax.lax.map(lambda e: self.make_example(*e, step), (lr, hr, rows)),
      mesh=self.mesh,
      in_specs=(split, split, split, whole),
      out_specs=(split, split),
      check_vma=False,
    )
    with jax.named_scope("degrade"):
      lr, hr = local(crops["lr"], crops["hr"], rows, jnp.asarray(step, jnp.uint32))
    return {"lr": lr, "hr": hr}

  def draw(self, step: jax.Array, row: jax.Array) -> Example:
    """Draws what happens to the example of a row of a step's batch, both uint32 []."""
    key = jax.random.key(np.uint32(self.seed), impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, step), row)
    place, rest = jax.random.split(key)
    part, y, x = jax.random.uniform(place, (3,))
    choices = (self.crop - self.patch) // self.settings.scale + 1
    y, x = (jnp.floor(u * choices).astype(jnp.int32) for u in (y, x))
    return Example(part < self.share, y, x, draw(rest, self.settings))

  def make_example(
    self, lr: jax.Array, hr: jax.Array, row: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Makes the patches of the example of a row of a step's batch.

    Args:
      lr: the source's own LR crop, uint8 or uint16 [h, w, 3].
      hr: the HR crop, [H, W, 3], of the same dtype.
      row: uint32 [].
      step: uint32 [].

    Returns:
      The LR patch and the HR patch, of the crops' dtype.
    """
    example, scale = self.draw(step, row), self.settings.scale

    def degraded(hr: jax.Array) -> jax.Array:
      return chain.to_levels(chain.apply(example.draws, hr, self.settings), hr.dtype)

    if self.share < 1:
      lr = jax.lax.cond(example.degraded, degraded, lambda hr: lr, hr)
    else:
      lr = degraded(hr)
    side = self.patch // scale
    lr = jax.lax.dynamic_slice(lr, (example.y, example.x, 0), (side, side, 3))
    corner = (example.y * scale, example.x * scale, 0)
    return lr, jax.lax.dynamic_slice(hr, corner, (self.patch, self.patch, 3))
