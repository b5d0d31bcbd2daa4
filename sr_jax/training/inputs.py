"""Opens the input of the training: tf.data, or images that live on the devices."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from sr_jax import UserError
from sr_jax.data import device_input
from sr_jax.data.pack import Pack
from sr_jax.machine import sharding
from sr_jax.runs import logs
from sr_jax.runs.settings import Config


def open_batches(
  config: Config, pack: Pack, start_step: int, mesh: jax.sharding.Mesh
) -> tuple[Iterator[Any], device_input.Cut | None]:
  """Opens the input.

  Returns:
    An iterator over what the steps take, and the function with which a step cuts its batch out of
    that. With tf.data the iterator has global batches {'lr', 'hr'} from `start_step` on, sharded
    over the mesh, and the function is None. Where the images live on the devices, the iterator has
    their arrays, the same for each step.

  Raises:
    UserError: `data.input` is unknown, the images do not fit in the devices' memory, an image is
      smaller than the crop, or hosts or devices cannot share the batch evenly.
    MissingPackageError: `data.input` is 'tf', and TensorFlow is not installed.
  """
  arguments = dict(
    batch_size=config.data.batch_size,
    lr_patch=config.data.hr_patch // config.scale,
    seed=config.seed,
    draws=config.data.detail_draws,
  )
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
      return (sharding.global_batch(mesh, batch) for batch in host_batches), None
  if kind == "device":
    arrays, cut = device_input.make_cutter(pack, sharding=sharding.batch_sharded(mesh), **arguments)
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays.values())
    logs.say(f"  input: the images, {held / 1e6:,.1f} MB of each device's memory")
    return itertools.repeat(arrays), cut
  raise UserError(f"data.input={kind!r} must be one of auto, tf, device")
