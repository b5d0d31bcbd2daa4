"""Batches cut on the device: the whole pack lives in its memory, and TensorFlow is not needed.

The host does nothing during a step: a jitted function, which may be part of the training step,
works out from the number of the step what to cut, cuts it and flips it. The examples are the same
as those of `tf_input.py`, bit for bit. A pack that does not fit in a device's memory is divided
among the devices, which then exchange crops, in the pack's own bits, once a step.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from sr_jax import UserError
from sr_jax.data.detail import Detail, measure
from sr_jax.data.pack import Pack
from sr_jax.data import sampling

PLACEMENTS = ("auto", "replicated", "sharded")
CHUNK_BYTES = 2**26  # of the pack that are on their way to the device at a time
# The pixels are stored as a few long segments [segments, values]: an accelerator's integers have 32
# bits, which number the values of a segment, where all the values may be 29 billion.
SEGMENT_VALUES = 2**30

Arrays = dict[str, jax.Array]
Cut = Callable[[Arrays, Any], Arrays]


def make_cutter(
  pack: Pack,
  *,
  batch_size: int,
  lr_patch: int,
  seed: int,
  sharding: NamedSharding | None = None,
  placement: str = "auto",
  draws: int = 1,
  symmetries: int = 8,
) -> tuple[Arrays, Cut]:
  """Put a pack on the device, and make the function that cuts batches out of it.

  Args:
    pack: the images.
    batch_size: of the global batch.
    lr_patch: side of the LR crops in pixels.
    seed: of the run.
    sharding: of the batches, axis 0 over the devices; None for the default device.
    placement: 'replicated', all of the pack on every device; 'sharded', a part of it on each, and
      an exchange of crops in every step; 'auto', replicated where that fits.
    draws: corners that each crop is the best of, by its detail.
    symmetries: as for `sampling.example_plan`.

  Returns:
    The arrays, on the device, and cut(arrays, step) -> {'lr': [N, h, w, 3], 'hr': [N, H, W, 3]} of
    the pack's dtype. `step` is an integer or an integer [], traced or not, below 2^32. Call it
    inside a jitted function, and pass the arrays as arguments: what a jitted function closes over
    is copied into the program.

  Raises:
    UserError: a pack that does not fit in the devices' memory, images smaller than the crop, a
      batch size that the devices cannot share evenly.
  """
  if placement not in PLACEMENTS:
    raise UserError(f"placement={placement!r} must be one of {', '.join(PLACEMENTS)}")
  sampling.check_pack(pack, seed, lr_patch, draws)
  n_images, scale = len(pack.names), pack.scale
  sampling.traced_positions(np, 0, batch_size, n_images)  # raises where 32 bits are too few
  devices = list(sharding.mesh.devices.flat) if sharding else [jax.local_devices()[0]]
  placement = choose_placement(pack.hr.nbytes + pack.lr.nbytes, devices, placement)
  axes = sharding.spec[0] if placement == "sharded" else None
  parts = len(devices) if placement == "sharded" else 1
  if batch_size % parts:
    fit = -(-batch_size // parts) * parts
    raise UserError(
      f"batch_size={batch_size} must be divisible by {parts} devices; "
      f"try --config.data.batch_size={fit}"
    )

  lengths = {
    key: segment_length(flat.size, parts) for key, flat in (("lr", pack.lr), ("hr", pack.hr))
  }
  cutter = _Cutter(
    batch_size, lr_patch, seed, n_images, scale, tuple(lengths.values()), sharding, axes, draws,
    symmetries,
  )  # fmt: skip
  detail = measure(pack) if draws > 1 else None
  return _put_pack(pack, lr_patch, lengths, parts, axes, sharding, detail), cutter


@dataclasses.dataclass(frozen=True)
class _Cutter:
  """Cuts a batch out of the arrays of `_put_pack`, within a jitted function.

  Attributes:
    batch_size: of the global batch.
    lr_patch: side of the LR crops in pixels.
    seed: of the run.
    n_images: in the pack.
    scale: of the pack.
    lengths: values of a segment of the LR and of the HR pixels.
    sharding: of the batches, or None for one device.
    axes: the names of the mesh's axes that the pack is divided over; None where each device has
      all of it.
    draws: corners that each crop is the best of, by its detail.
    symmetries: of the 8, how many are drawn from.
  """

  batch_size: int
  lr_patch: int
  seed: int
  n_images: int
  scale: int
  lengths: tuple[int, int]
  sharding: NamedSharding | None
  axes: Any
  draws: int
  symmetries: int

  def __call__(self, arrays: Arrays, step: Any) -> Arrays:
    """The batch of a step."""
    epoch, position = sampling.traced_positions(jnp, step, self.batch_size, self.n_images)
    detail = None
    if self.draws > 1:
      detail = Detail(*(arrays[f"detail_{name}"] for name in Detail._fields))
    plan = sampling.example_plan(
      jnp,
      self.seed,
      epoch,
      position,
      arrays["lr_sizes"],
      self.lr_patch,
      detail,
      self.draws,
      self.symmetries,
    )
    # Without the barrier XLA's CPU compiler works a pixel's plan out anew for each pixel.
    plan = jax.lax.optimization_barrier(plan)
    if self.axes is not None:
      spec = {key: PartitionSpec(self.axes if key in ("lr", "hr") else None) for key in arrays}
      exchange = jax.shard_map(
        self._cut_shared,
        mesh=self.sharding.mesh,
        in_specs=(spec, PartitionSpec()),
        out_specs=PartitionSpec(self.axes),
      )
      return exchange(arrays, plan)
    if self.sharding is not None:  # or each device would cut the whole batch
      rows = NamedSharding(self.sharding.mesh, PartitionSpec(*self.sharding.spec[:1]))
      plan = jax.lax.with_sharding_constraint(plan, rows)
    return self._cut(arrays, plan)

  def _cut_shared(self, arrays: Arrays, plan: sampling.Plan) -> Arrays:
    # Each device cuts what it has of the whole batch, zeros elsewhere; the sum is the batch.
    batch = self._cut(arrays, plan)
    flat = [crops.reshape(self.batch_size, -1) for crops in batch.values()]
    with jax.named_scope("exchange_crops"):
      flat = jax.lax.psum_scatter(jnp.concatenate(flat, axis=1), self.axes, tiled=True)
    parts = jnp.split(flat, [batch["lr"][0].size], axis=1)
    return {
      key: part.reshape(-1, *crops.shape[1:])
      for (key, crops), part in zip(batch.items(), parts, strict=True)
    }

  def _cut(self, arrays: Arrays, plan: sampling.Plan) -> Arrays:
    pitch, batch = arrays["lr_pitch"][plan.image], {}
    for key, factor, length in zip(("lr", "hr"), (1, self.scale), self.lengths, strict=True):
      segment, first = row_addresses(
        jnp,
        arrays[f"{key}_segment"][plan.image],
        arrays[f"{key}_first"][plan.image],
        pitch * factor,
        plan.y * factor,
        plan.x * factor,
        self.lr_patch * factor,
        length,
      )
      crops = _crops(arrays[key], segment, first, self.lr_patch * factor, self.axes)
      batch[key] = _dihedral(crops, plan.dihedral)
    return batch


def _put_pack(
  pack: Pack,
  lr_patch: int,
  lengths: dict[str, int],
  parts: int,
  axes: Any,
  sharding: NamedSharding | None,
  detail: Detail | None,
) -> Arrays:
  """Copies to the devices what `cut` takes: pixels in segments of these lengths, and an index."""
  arrays = {"lr_sizes": pack.lr_sizes, "lr_pitch": pack.lr_pitch}
  if detail:
    arrays |= {f"detail_{name}": array for name, array in detail._asdict().items()}
  for key, offsets in (("lr", pack.lr_offsets), ("hr", pack.hr_offsets)):
    arrays[f"{key}_segment"], arrays[f"{key}_first"] = split_offsets(offsets, lengths[key])
  replicated = NamedSharding(sharding.mesh, PartitionSpec()) if sharding else None
  arrays = {key: _put(array, replicated) for key, array in arrays.items()}
  rows = NamedSharding(sharding.mesh, PartitionSpec(axes)) if sharding else None
  for key, flat, side in (("lr", pack.lr, lr_patch), ("hr", pack.hr, lr_patch * pack.scale)):
    arrays[key] = _put_segments(flat, lengths[key], side * 3, parts, rows)
  return arrays


def segment_length(size: int, parts: int) -> int:
  """Say how long segments of `size` values are, so that the parts share their number evenly."""
  count = -(-size // (SEGMENT_VALUES * parts)) * parts
  return -(-size // count)


def split_offsets(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Split the numbers of values into segments and values in them.

  Args:
    offsets: int64 [n].
    length: of a segment in values.

  Returns:
    segment and value in it, int32 [n].
  """
  segment, first = np.divmod(offsets, np.int64(length))
  return segment.astype(np.int32), first.astype(np.int32)


def row_addresses(
  xp: Any, segment: Any, first: Any, pitch: Any, y: Any, x: Any, size: int, length: int
) -> tuple[Any, Any]:
  """Say where the rows of crops begin, in 32 bits.

  Args:
    xp: numpy or jax.numpy.
    segment: of each image's first value, int32 [N].
    first: in that segment, int32 [N].
    pitch: pixels from one row of the image to the next, int32 [N].
    y: top row of the crop, int32 [N].
    x: left column of the crop, int32 [N].
    size: side of the crop in pixels.
    length: of a segment in values, at most 2^30.

  Returns:
    segment and value in it, int32 [N, size]. The values of an image are below 2^30
    (`images/files.py` refuses larger ones), so that no sum reaches 2^31.
  """
  row = y[:, None] + xp.arange(size, dtype=xp.int32)[None]
  start = first[:, None] + (row * pitch[:, None] + x[:, None]) * 3
  return segment[:, None] + start // length, start % length


def choose_placement(needed: int, devices: list[jax.Device], placement: str) -> str:
  """Where to put so many bytes; raises where they fit nowhere."""
  # Half is for the step: its parameters and activations are not there yet.
  free = 0.5 * min(free_bytes(device) for device in devices)
  if jax.process_count() > 1:  # all hosts must decide alike
    free = float(np.min(multihost_utils.process_allgather(np.float32(free))))
  one, each = f"{needed / 1e9:.1f} GB", f"{needed / len(devices) / 1e9:.1f} GB"
  if placement != "sharded" and needed <= free:
    return "replicated"
  if placement != "replicated" and len(devices) > 1 and needed / len(devices) <= free:
    return "sharded"
  if placement == "sharded" and len(devices) == 1:
    raise UserError("placement='sharded' needs several devices; take 'replicated'")
  divided = placement != "replicated" and len(devices) > 1
  share = f" ({each} each if divided over {len(devices)})" if divided else ""
  raise UserError(
    f"the decoded images need {one}, but only {free / 1e9:.1f} GB of each "
    f"{devices[0].device_kind} is available for them{share}; "
    "read them from the disk with --config.data.input=tf"
  )


def free_bytes(device: jax.Device) -> float:
  """What is free of a device's memory; infinity where it cannot say (a CPU, another host's)."""
  stats = device.memory_stats() if device.process_index == jax.process_index() else None
  if not stats or "bytes_limit" not in stats:
    return float("inf")
  return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _put(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
  """Copies an array to the device, or to every device of this host."""
  if sharding is None:
    return jnp.asarray(array)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _put_segments(
  flat: np.ndarray, length: int, overlap: int, parts: int, sharding: NamedSharding | None
) -> jax.Array:
  """Copies flat values to the devices as [segments, length + overlap].

  A segment begins every `length` values and ends with the first values of the next, so that a row
  of a crop lies in one.
  """
  shape = -(-flat.size // (length * parts)) * parts, length + overlap
  if sharding is None:
    return _copy(flat, length, shape, None)
  pieces = []
  for device, (rows, _) in sharding.addressable_devices_indices_map(shape).items():
    start, stop, _ = rows.indices(shape[0])
    pieces.append(_copy(flat[start * length :], length, (stop - start, shape[1]), device))
  return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _copy(
  flat: np.ndarray, length: int, shape: tuple[int, int], device: jax.Device | None
) -> jax.Array:
  """Copies the segments that one device has, piece by piece, zeros after the end.

  Copied as a whole, the pack would also take as much of the host's memory on its way.
  """
  with jax.default_device(device):
    segments = jnp.zeros(shape, flat.dtype)
    step = CHUNK_BYTES // flat.itemsize
    for segment in range(shape[0]):
      pixels = flat[segment * length : segment * length + shape[1]]
      for first in range(0, len(pixels), step):
        piece = pixels[first : first + step]
        segments = _write(segments, piece, np.int32(segment), np.int32(first))
        segments.block_until_ready()  # or all the pieces would wait in memory for their turn
  return segments


@functools.partial(jax.jit, donate_argnums=0)
def _write(segments: jax.Array, piece: jax.Array, segment: Any, first: Any) -> jax.Array:
  return jax.lax.dynamic_update_slice(segments, piece[None], (segment, first))


def _crops(
  segments: jax.Array, segment: jax.Array, first: jax.Array, size: int, axes: Any
) -> jax.Array:
  """Cuts squares: segment and first value of their rows [N, size] -> [N, size, size, 3].

  With the names of mesh axes `segments` are this device's, and the rows that others have are 0.
  """
  if axes is not None:
    segment = segment - jax.lax.axis_index(axes) * len(segments)

  # A whole row at a time: a gather of single values takes 7 times as long (on a CPU).
  def take_row(segment, first):
    return jax.lax.dynamic_slice(segments, (segment, first), (1, size * 3))[0]

  pixels = jax.vmap(jax.vmap(take_row))(segment, first)
  if axes is not None:
    here = (segment >= 0) & (segment < len(segments))
    pixels = jnp.where(here[..., None], pixels, jnp.zeros((), pixels.dtype))
  return pixels.reshape(-1, size, size, 3)


def _dihedral(image: jax.Array, dihedral: jax.Array) -> jax.Array:
  """`sampling.apply_dihedral`, each image of [N, H, W, C] by its own of [N]."""
  bit = dihedral[:, None, None, None]
  image = jnp.where(bit & 1, image[:, :, ::-1], image)
  image = jnp.where(bit & 2, image[:, ::-1], image)
  return jnp.where(bit & 4, image.swapaxes(1, 2), image)
