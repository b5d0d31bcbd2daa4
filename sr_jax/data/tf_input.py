"""Makes batches with tf.data; TensorFlow is imported only when they are asked for.

This is for data that do not fit in the accelerator's memory; `device_input.py` needs no TensorFlow.
Both give the same examples, bit for bit.
"""

import weakref
from collections.abc import Iterator

import numpy as np

from sr_jax import UserError
from sr_jax.data.detail import measure
from sr_jax.data.pack import Pack
from sr_jax.data import sampling
from sr_jax.machine import cpus
from sr_jax.machine.tensorflow import import_tensorflow

PREFETCH = 4  # batches that wait for the training step


def make_tf_input(
  pack: Pack,
  *,
  batch_size: int,
  lr_patch: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = 0,
  draws: int = 1,
  symmetries: int = 8,
) -> Iterator[dict[str, np.ndarray]]:
  """Make the endless stream of this host's batches.

  tf.data runs ahead of the training step: it counts steps, and its threads cut whole batches (a
  plan costs as much for a batch as for one example). A late start costs nothing.

  Args:
    pack: the images.
    batch_size: the number of examples in the global batch.
    lr_patch: side of the LR crops in pixels.
    seed: the seed of the run.
    start_step: the step whose batch comes first.
    process_index: host p gets rows p * b to (p + 1) * b of each global batch.
    process_count: number of hosts.
    threads: the number of threads that cut batches; 0 lets tf.data choose.
    draws: corners that each crop is the best of, by its detail.
    symmetries: as for `sampling.example_plan`.

  Returns:
    Batches {'lr': [b, h, w, 3], 'hr': [b, H, W, 3]} of the pack's dtype, b = batch_size /
    process_count.

  Raises:
    UserError: the hosts cannot share the batch evenly, or an image is smaller than the crop.
  """
  sampling.check_pack(pack, seed, lr_patch, draws)
  if batch_size % process_count or batch_size < 1:
    fit = max(1, -(-batch_size // process_count)) * process_count
    raise UserError(
      f"batch_size={batch_size} must be divisible by {process_count} hosts; "
      f"try --config.data.batch_size={fit}"
    )
  tf = import_tensorflow()
  host_batch = batch_size // process_count
  detail = measure(pack) if draws > 1 else None
  hr_patch = lr_patch * pack.scale

  def cut(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start = process_index * host_batch
    return sampling.cut_batch(
      pack,
      int(step),
      batch_size=batch_size,
      lr_patch=lr_patch,
      seed=seed,
      start=start,
      stop=start + host_batch,
      detail=detail,
      draws=draws,
      symmetries=symmetries,
    )

  def batch(step):
    dtype = tf.as_dtype(pack.hr.dtype)
    lr, hr = tf.numpy_function(cut, [step], [dtype, dtype], stateful=False)
    return {
      "lr": tf.ensure_shape(lr, [host_batch, lr_patch, lr_patch, 3]),
      "hr": tf.ensure_shape(hr, [host_batch, hr_patch, hr_patch, 3]),
    }

  steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  batches = steps.map(batch, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
  return _closed_at_exit(batches.prefetch(PREFETCH).as_numpy_iterator())


def ram_bytes(
  pack: Pack, *, batch_size: int, lr_patch: int, process_count: int = 1, threads: int = 0
) -> int:
  """Say how much memory of a host `make_tf_input` takes, at most; TensorFlow itself is extra.

  It does not depend on the number of images: they stay in their files, whose pages the system
  keeps while nobody else needs the memory.

  Args:
    pack: the images.
    batch_size: the number of examples in the global batch.
    lr_patch: side of the LR crops in pixels.
    process_count: number of hosts.
    threads: the same number as for `make_tf_input`.

  Returns:
    Bytes of the batches that are being cut (twice: numpy's and TensorFlow's) and that wait.
  """
  pixels = batch_size // process_count * lr_patch**2 * (1 + pack.scale**2)
  return 3 * pack.hr.itemsize * pixels * (2 * (threads or cpus.available()) + PREFETCH + 1)


def _closed_at_exit(iterator: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  """Wraps an iterator so that it is released before Python shuts down.

  tf.data's threads call Python ahead of need; one that does so while the interpreter is being
  taken down waits for it forever, and the finished run never exits.
  """
  holder = [iterator]
  del iterator

  def stream():
    while holder:
      yield next(holder[0])

  batches = stream()
  weakref.finalize(batches, holder.clear)  # when the caller drops it, and at exit
  return batches
