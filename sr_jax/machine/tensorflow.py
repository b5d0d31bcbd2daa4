"""Imports TensorFlow, with every accelerator hidden from it."""

import functools
import os
from types import ModuleType

from sr_jax import MissingPackageError


@functools.cache
def import_tensorflow() -> ModuleType:
  """Import TensorFlow with every accelerator hidden from it.

  Otherwise it would take all of a GPU's memory, or the TPU itself, and leave none for JAX.

  Raises:
    MissingPackageError: TensorFlow is not installed, or cannot be imported.
    RuntimeError: TensorFlow was used before in this process, and holds an accelerator.
  """
  # TensorFlow reads these when it loads; without them it greets every run with its build options.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
  try:
    import tensorflow as tf
  except ImportError as error:
    raise MissingPackageError(
      f"TensorFlow cannot be imported ({error}); pip install tensorflow-cpu, or train from device "
      "memory without it: --config.data.input=device and images from a folder"
    ) from error
  for kind in ("GPU", "TPU"):
    tf.config.set_visible_devices([], kind)
  return tf
