"""Batches cut on the device: the whole pack lives in its memory, and TensorFlow is not needed.

Of a training step's time almost nothing is spent on the host: it sends a few integers, and a
jitted function cuts and flips. The same examples as those of `tf_input.py`, bit for bit.
"""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sr_jax.data import sampling
from sr_jax.data.packed import Pack

MAX_BYTES = 2**31 - 1  # offsets are int32 on the device


def make_device_input(
  pack: Pack,
  *,
  batch_size: int,
  lr_patch: int,
  seed: int,
  start_step: int = 0,
  sharding: NamedSharding | None = None,
) -> Iterator[dict[str, jax.Array]]:
  """Make the endless stream of global batches.

  Args:
    pack: the images; every device gets a copy of all of them.
    batch_size: of the global batch.
    lr_patch: side of the LR crops in pixels.
    seed: of the run.
    start_step: first step wanted.
    sharding: of the batches, axis 0 over the devices; None for the default device.

  Returns:
    Batches {'lr': uint8 [N, h, w, 3], 'hr': uint8 [N, H, W, 3]} on the device.

  Raises:
    ValueError: a pack of more than 2^31 - 1 bytes, or images smaller than the crop.
  """
  sampling.check_pack(pack, seed, lr_patch)
  if pack.hr.size > MAX_BYTES:
    raise ValueError(
      f"{pack.hr.size} bytes of decoded images must be at most {MAX_BYTES} to live on the device; "
      "read them from the disk with --config.data.input=tf"
    )
  scale = pack.scale

  def cut(arrays, epoch, position):
    if sharding is not None:  # or each device would cut the whole batch
      rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
      epoch, position = jax.lax.with_sharding_constraint((epoch, position), rows)
    plan = sampling.example_plan(jnp, seed, epoch, position, arrays["lr_sizes"], lr_patch)
    offset, width = arrays["lr_offsets"][plan.image], arrays["lr_sizes"][plan.image, 1]
    lr = _crops(arrays["lr"], offset, width, plan.y, plan.x, lr_patch)
    offset, width = arrays["hr_offsets"][plan.image], width * scale
    hr = _crops(arrays["hr"], offset, width, plan.y * scale, plan.x * scale, lr_patch * scale)
    return {"lr": _dihedral(lr, plan.dihedral), "hr": _dihedral(hr, plan.dihedral)}

  cut = jax.jit(cut, out_shardings=sharding)
  replicated = NamedSharding(sharding.mesh, PartitionSpec()) if sharding else None
  arrays = {
    "hr": _put(pack.hr, replicated),
    "lr": _put(pack.lr, replicated),
    "lr_sizes": _put(pack.lr_sizes, replicated),
    "hr_offsets": _put(pack.hr_offsets.astype(np.int32), replicated),
    "lr_offsets": _put(pack.lr_offsets.astype(np.int32), replicated),
  }
  return (
    cut(arrays, *sampling.batch_positions(step, batch_size, len(pack.names)))
    for step in itertools.count(start_step)
  )


def _put(array: np.ndarray, replicated: NamedSharding | None) -> jax.Array:
  """Copies an array to every device, of this host alone where there are several."""
  if replicated is None:
    return jnp.asarray(array)
  return jax.make_array_from_callback(array.shape, replicated, lambda index: array[index])


def _crops(
  flat: jax.Array, offset: jax.Array, width: jax.Array, y: jax.Array, x: jax.Array, size: int
) -> jax.Array:
  """Cuts squares out of images in a flat array: all arguments [N] -> uint8 [N, size, size, 3]."""
  row = y[:, None] + jnp.arange(size, dtype=jnp.int32)[None]
  start = offset[:, None] + (row * width[:, None] + x[:, None]) * 3
  # A whole row at a time: a gather of single bytes takes 7 times as long (on a CPU).
  take = jax.vmap(jax.vmap(lambda i: jax.lax.dynamic_slice(flat, (i,), (size * 3,))))
  return take(start).reshape(-1, size, size, 3)


def _dihedral(image: jax.Array, dihedral: jax.Array) -> jax.Array:
  """`sampling.apply_dihedral`, each image of [N, H, W, C] by its own of [N]."""
  bit = dihedral[:, None, None, None]
  image = jnp.where(bit & 1, image[:, :, ::-1], image)
  image = jnp.where(bit & 2, image[:, ::-1], image)
  return jnp.where(bit & 4, image.swapaxes(1, 2), image)
