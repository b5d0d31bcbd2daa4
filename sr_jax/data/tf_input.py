"""Batches by tf.data: the one module that imports TensorFlow, and only when asked to.

For data that do not fit in the accelerator's memory; `device_input.py` needs no TensorFlow. Both
give the same examples, bit for bit.
"""

import functools
import os
import weakref
from collections.abc import Iterator
from types import ModuleType

import numpy as np

from sr_jax.data import sampling
from sr_jax.data.packed import Pack


@functools.cache
def import_tensorflow() -> ModuleType:
  """Import TensorFlow with every accelerator hidden from it.

  It would take all of a GPU's memory otherwise, or the TPU itself, and leave JAX none.

  Raises:
    ImportError: it is not installed.
    RuntimeError: somebody used TensorFlow before, and it holds an accelerator.
  """
  # Read when the library loads: without them it greets every run with its build options.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    import tensorflow as tf
  except ImportError as error:
    raise ImportError(
      f"TensorFlow cannot be imported ({error}); pip install tensorflow-cpu, or train from device "
      "memory without it: --config.data.input=device and images from a folder"
    ) from error
  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf


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
) -> Iterator[dict[str, np.ndarray]]:
  """Make the endless stream of this host's batches.

  tf.data runs ahead of the training step: it counts steps, and its threads cut whole batches (a
  plan costs as much for a batch as for one example). A late start costs nothing.

  Args:
    pack: the images.
    batch_size: of the global batch.
    lr_patch: side of the LR crops in pixels.
    seed: of the run.
    start_step: first step wanted.
    process_index: host p gets rows p * b to (p + 1) * b of each global batch.
    process_count: number of hosts.
    threads: that cut batches, 0 to let tf.data choose.

  Returns:
    Batches {'lr': uint8 [b, h, w, 3], 'hr': uint8 [b, H, W, 3]}, b = batch_size / process_count.

  Raises:
    ValueError: a batch size that the hosts cannot share evenly, or images smaller than the crop.
  """
  sampling.check_pack(pack, seed, lr_patch)
  if batch_size % process_count or batch_size < 1:
    fit = max(1, -(-batch_size // process_count)) * process_count
    raise ValueError(
      f"batch_size={batch_size} must be divisible by {process_count} hosts; "
      f"try --config.data.batch_size={fit}"
    )
  tf = import_tensorflow()
  host_batch = batch_size // process_count
  hr_patch = lr_patch * pack.scale

  def cut(step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    start = process_index * host_batch
    epoch, position = sampling.batch_positions(
      int(step), batch_size, len(pack.names), start, start + host_batch
    )
    plan = sampling.example_plan(np, seed, epoch, position, pack.lr_sizes, lr_patch)
    lr = np.empty((host_batch, lr_patch, lr_patch, 3), np.uint8)
    hr = np.empty((host_batch, hr_patch, hr_patch, 3), np.uint8)
    for row, example in enumerate(zip(*plan, strict=True)):
      lr[row], hr[row] = sampling.take_example(pack, sampling.Plan(*example), lr_patch)
    return lr, hr

  def batch(step):
    lr, hr = tf.numpy_function(cut, [step], [tf.uint8, tf.uint8], stateful=False)
    return {
      "lr": tf.ensure_shape(lr, [host_batch, lr_patch, lr_patch, 3]),
      "hr": tf.ensure_shape(hr, [host_batch, hr_patch, hr_patch, 3]),
    }

  steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  batches = steps.map(batch, num_parallel_calls=threads or tf.data.AUTOTUNE, deterministic=True)
  return _closed_at_exit(batches.prefetch(4).as_numpy_iterator())


def _closed_at_exit(iterator: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
  """The same iterator, let go of before Python shuts down.

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
