"""Opens the input of the training: tf.data, or images that live on the devices."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from sr_jax import UserError
from sr_jax.data import device_input
from sr_jax.data.pack import Pack
from sr_jax.data.preparation import Preparation
from sr_jax.machine import sharding
from sr_jax.runs import logs
from sr_jax.runs.settings import Config
from sr_jax.training.degradation import crop_side, read_settings


def open_batches(
  config: Config, pack: Pack, start_step: int, mesh: jax.sharding.Mesh
) -> tuple[Iterator[Any], Callable[[Any, jax.Array], Any] | None]:
  """Opens the input.

  Returns:
    An iterator over what the steps take, and the function with which a step makes its batch out of
    that. With tf.data the iterator has global batches {'lr', 'hr'} from `start_step` on, sharded
    over the mesh, and the function degrades them, or is None. Where the images live on the devices,
    the iterator has their arrays, the same for each step.

  Raises:
    UserError: `data.input` is unknown, the images do not fit in the devices' memory, an image is
      smaller than the crop, or hosts or devices cannot share the batch evenly.
    MissingPackageError: `data.input` is 'tf', and TensorFlow is not installed.
  """
  arguments = dict(
    batch_size=config.data.batch_size,
    lr_patch=crop_side(config) // config.scale,
    seed=config.seed,
    draws=config.data.detail_draws,
    symmetries=8 if config.data.rotate else 2,
  )
  prepare = make_preparation(config, mesh)
  kind = config.data.input
  if kind in ("tf", "auto"):
    from sr_jax.data import tf_input
    from sr_jax.machine.tensorflow import import_tensorflow

    try:
      import_tensorflow()
    except ImportError:
      if kind == "tf":
        raise
      kind = "device"
    else:
      count = jax.process_count()
      ram = tf_input.ram_bytes(
        pack,
        batch_size=config.data.batch_size,
        lr_patch=arguments["lr_patch"],
        process_count=count,
      )
      logs.say(f"  input: tf.data, at most {ram / 1e6:,.1f} MB of each host's memory")
      host_batches = tf_input.make_tf_input(
        pack,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=count,
        **arguments,
      )
      return (sharding.global_batch(mesh, batch) for batch in host_batches), prepare
  if kind == "device":
    arrays, cut = device_input.make_cutter(pack, sharding=sharding.batch_sharded(mesh), **arguments)
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays.values())
    logs.say(f"  input: the images, {held / 1e6:,.1f} MB of each device's memory")
    prepare = dataclasses.replace(prepare, cut=cut) if prepare else cut
    return itertools.repeat(arrays), prepare
  raise UserError(f"data.input={kind!r} must be one of auto, tf, device")


def make_preparation(config: Config, mesh: jax.sharding.Mesh) -> Preparation | None:
  """Makes the function that degrades crops which the host has cut; None where none are degraded."""
  settings, data = read_settings(config), config.data
  if settings is None:
    return None
  return Preparation(
    settings,
    seed=config.seed,
    batch_size=data.batch_size,
    crop=data.degraded_crop,
    patch=data.hr_patch,
    share=data.degraded_share,
    mesh=mesh,
  )
