"""Reads TensorFlow Datasets that are prepared on this machine, one record after the other."""

import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sr_jax import UserError
from sr_jax.data.source import Source, stamp_of
from sr_jax.images.files import read_image
from sr_jax.machine.paths import user_path


def open_tfds(rest: str, keep_grey: bool) -> Source:
  """Opens a data set that `tfds build` has prepared on this machine; nothing is downloaded.

  Args:
    rest: NAME[:SPLIT], for example 'div2k/bicubic_x4:train'; the split is 'train' by default.
    keep_grey: whether grey images are loaded as [H, W].

  Returns:
    The source, its images in the order of the data set. It has LR images where the data set has a
    feature 'lr'.

  Raises:
    UserError: the data set is not prepared here, or it has no such split or no image features that
      could be HR.
    MissingPackageError: TensorFlow is not installed.
  """
  name, _, split = rest.partition(":")
  split = split or "train"
  folder = _prepared_folder(name, f"tfds:{rest}")
  # Not at the top: sources without TensorFlow must open where it is not installed.
  from sr_jax.machine.tensorflow import import_tensorflow

  import_tensorflow()
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(folder)
  hr_key, lr_key = _image_features(builder.info.features, tfds.features.Image, name)
  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as error:
    raise UserError(
      f"split {split!r} of {name} must be one of {', '.join(builder.info.splits)} "
      f"or a slice as {next(iter(builder.info.splits), 'train')}[:90%]"
    ) from error
  keys = [key for key in (hr_key, lr_key) if key]

  def records() -> Iterator[dict[str, bytes]]:
    decoders = tfds.decode.PartialDecoding(
      dict.fromkeys(keys, True), decoders=dict.fromkeys(keys, tfds.decode.SkipDecoding())
    )
    config = tfds.ReadConfig(try_autocache=False)  # each record is read once
    data_set = builder.as_dataset(split=split, decoders=decoders, read_config=config)
    return iter(tfds.as_numpy(data_set))

  record = in_order(records)

  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    files = record(i)
    hr = read_image(files[hr_key], keep_grey=keep_grey)
    return hr, read_image(files[lr_key], keep_grey=keep_grey) if lr_key else None

  # Whole records sit in these files: a data set prepared anew has new stamps.
  files = sorted(path for path in folder.iterdir() if path.is_file())
  return Source(
    set_name=name.replace("/", "_"),
    names=tuple(f"{split}/{i:06d}" for i in range(count)),
    load=load,
    has_lr=bool(lr_key),
    fingerprint=[[name, split, hr_key, lr_key], *[[path.name, *stamp_of(path)] for path in files]],
    description=f"{folder}, split {split}",
  )


def _prepared_folder(name: str, spec: str) -> pathlib.Path:
  """Finds the folder of a data set that is prepared on disk, without importing TensorFlow."""
  data_dir = user_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
  folder = data_dir / name
  found = [*folder.glob("dataset_info.json"), *folder.glob("*/dataset_info.json")]
  if found:  # NAME may end in a version; without one the newest counts
    return max((path.parent for path in found), key=_version)
  raise UserError(
    f"it must be prepared in {data_dir} ($TFDS_DATA_DIR), and is not; sr_jax never downloads: "
    f"prepare it once by `tfds build {name}` (NAME needs its config, as div2k/bicubic_x4), or give "
    "a folder of images"
  )


def _version(folder: pathlib.Path) -> list[int]:
  return [int(part) if part.isdigit() else -1 for part in folder.name.split(".")]


def _image_features(features: Any, image_type: type, name: str) -> tuple[str, str]:
  """Returns the keys of a data set's HR images and of its LR images, '' where it has none."""
  keys = [key for key, feature in features.items() if isinstance(feature, image_type)]
  if "hr" in keys:
    return "hr", "lr" if "lr" in keys else ""
  if "image" in keys or len(keys) == 1:
    return "image" if "image" in keys else keys[0], ""
  raise UserError(
    f"{name} must have image features 'hr' and 'lr', or 'image'; it has {sorted(features)}; "
    "export its images to a folder, and give it"
  )


def in_order(records: Callable[[], Iterator[Any]]) -> Callable[[int], Any]:
  """Gives random access to a sequential reader, cheap for threads that ask nearly in order.

  The last 64 records that were passed on the way are kept until they are asked for. To go further
  back, the reader is started anew.
  """
  lock = threading.Lock()
  iterator, position, waiting = None, 0, {}

  def get(i: int) -> Any:
    nonlocal iterator, position
    with lock:
      if iterator is None or (i < position and i not in waiting):
        iterator, position = records(), 0
        waiting.clear()
      while i not in waiting:
        if (record := next(iterator, None)) is None:
          raise UserError(f"the data set ends before record {i}; prepare it again")
        waiting[position] = record
        position += 1
        if len(waiting) > 64:
          del waiting[min(waiting)]
      return waiting.pop(i)

  return get
