"""Tests of sr_jax/unpickle.py: what it reads, and that what it refuses has not run."""

import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sr_jax import unpickle
from sr_jax.unpickle import UnsafeFileError


class Shell:
  """Pickles into a call of os.system that leaves a file behind."""

  def __init__(self, trace):
    self.trace = trace

  def __reduce__(self):
    return os.system, (f"touch {self.trace}",)


def numpy1_pickle(tree):
  """As numpy 1 wrote it: numpy 2 renamed the module of the function that rebuilds arrays."""
  return pickle.dumps(tree, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def torch_zip(path, data, storage, *, compression=zipfile.ZIP_STORED, byteorder=b"little"):
  """A torch file made by hand, from its data.pkl and its one storage, named 0."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("model/data.pkl", data)
    archive.writestr("model/byteorder", byteorder)
    archive.writestr("model/data/0", storage.tobytes())
  return path


def tensor_pickle(offset, size, stride, storage="FloatStorage", rebuild="_rebuild_tensor_v2"):
  """The data.pkl of one tensor, opcode by opcode as torch.save writes it."""

  def push(value):
    return pickle.dumps(value, protocol=2)[2:-1]  # without the header and the final stop

  storage = b"".join(
    [b"(", push("storage"), f"ctorch\n{storage}\n".encode(), push("0"), push("cpu"), push(6), b"tQ"]
  )
  return b"".join(
    [
      b"\x80\x02",
      f"ctorch._utils\n{rebuild}\n(".encode(),
      storage,
      push(offset),
      push(size),
      push(stride),
      b"\x89",
      b"ccollections\nOrderedDict\n)R",
      b"tR.",
    ]
  )


SIX = np.arange(6, dtype=np.float32)


def test_reads_numpy_pickles(tmp_path):
  tree = {"VGG16_0": {"Conv_0": {"kernel": np.asfortranarray(SIX.reshape(2, 3)), "bias": SIX}}}
  path = tmp_path / "weights.ckpt"
  path.write_bytes(numpy1_pickle(tree))
  actual = unpickle.read_numpy_pickle(path)
  assert list(actual["VGG16_0"]["Conv_0"]) == ["kernel", "bias"]
  np.testing.assert_array_equal(actual["VGG16_0"]["Conv_0"]["kernel"], SIX.reshape(2, 3))
  np.testing.assert_array_equal(actual["VGG16_0"]["Conv_0"]["bias"], SIX)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_pickle_that_calls_the_shell_is_refused_and_has_not_run(tmp_path, kind):
  trace, path = tmp_path / "trace", tmp_path / "weights"
  data = pickle.dumps({"kernel": Shell(trace)})
  if kind == "numpy":
    path.write_bytes(data)
    read = unpickle.read_numpy_pickle
  else:
    torch_zip(path, data, SIX)
    read = unpickle.read_torch_file
  with pytest.raises(
    UnsafeFileError,
    match=r"weights: refused, it asks for posix\.system.*"
    r"save it again as \.safetensors",
  ):
    read(path)
  assert not trace.exists()
  pickle.loads(data)  # the trap does work
  assert trace.exists()


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "cannot be read"),
    (numpy1_pickle({"a": SIX})[:-20], "cannot be read"),
    (numpy1_pickle([SIX]), "holds a list, not a dict"),
    (numpy1_pickle({"a": np.array([None])}), "holds an array of object"),
    (pickle.dumps({"a": 1j}), "asks for builtins.complex"),
    (b"\x80\x02}(X\x01\x00\x00\x00acnumpy\nndarray\nu.", "holds an object <class 'type'>"),
    (b"\x80\x02cbuiltins\neval\n.", "asks for builtins.eval"),
    (b"\x80\x02X\x01\x00\x00\x00aQ.", "cannot be read"),  # a persistent id
  ],
)
def test_other_numpy_pickles_are_refused(tmp_path, data, message):
  path = tmp_path / "weights.ckpt"
  path.write_bytes(data)
  with pytest.raises(UnsafeFileError, match=message):
    unpickle.read_numpy_pickle(path)


def test_reads_what_torch_saves(tmp_path):
  torch = pytest.importorskip("torch")
  net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  tensors = {
    "bf16": torch.randn(3, 4).bfloat16(),
    "f16": torch.randn(3).half(),
    "f64": torch.randn(2, 2).double(),
    "i64": torch.arange(5),
    "u8": torch.arange(5).byte(),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(3.0),
    "transposed": torch.randn(3, 4).T,
    "slice": torch.arange(10.0)[2::3],
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(2)),
  }
  path = tmp_path / "net.pth"
  torch.save({"params": net.state_dict(), "tensors": [tensors], "iter": 7, "note": None}, path)
  actual = unpickle.read_torch_file(path)
  assert type(actual["params"]) is dict
  assert actual["iter"] == 7 and actual["note"] is None
  assert list(actual["params"]) == list(net.state_dict())
  for key, tensor in net.state_dict().items():
    np.testing.assert_array_equal(actual["params"][key], tensor.numpy())
  for key, tensor in tensors.items():
    array = actual["tensors"][0][key]
    if key == "bf16":
      assert array.dtype == ml_dtypes.bfloat16
      array, tensor = array.astype(np.float32), tensor.float()
    expected = tensor.detach().numpy()
    assert array.dtype == expected.dtype and array.shape == expected.shape
    np.testing.assert_array_equal(array, expected)


def test_reads_strided_tensors_without_torch(tmp_path):
  path = torch_zip(tmp_path / "a.pth", tensor_pickle(1, (2, 2), (1, 3)), SIX)
  np.testing.assert_array_equal(unpickle.read_torch_file(path), [[1, 4], [2, 5]])
  bits = np.array([0x3F80, 0xC040, 0, 0, 0, 0], np.uint16)  # 1 and -3 in bfloat16
  path = torch_zip(tmp_path / "b.pth", tensor_pickle(0, (2,), (1,), "BFloat16Storage"), bits)
  np.testing.assert_array_equal(unpickle.read_torch_file(path).astype(np.float32), [1, -3])


@pytest.mark.parametrize(
  "data, message",
  [
    (tensor_pickle(0, (7,), (1,)), r"\[7\], .* reaches out of its storage of 6 elements"),
    (tensor_pickle(5, (2,), (1,)), "offset 5 reaches out"),
    (tensor_pickle(0, (2, 2), (5, 1)), "reaches out"),
    (tensor_pickle(0, (10**12,), (0,)), "reaches out"),
    (tensor_pickle(-1, (2,), (1,)), "malformed"),
    (tensor_pickle(0, (2,), (-1,)), "malformed"),
    (tensor_pickle(0, (2, 3), (1,)), "malformed"),
    (tensor_pickle(0, (2.0,), (1,)), "malformed"),
    (tensor_pickle(0, 2, (1,)), "cannot be read"),
    (tensor_pickle(0, (2,), (1,), "ComplexFloatStorage"), r"asks for torch\.ComplexFloatStorage"),
    (tensor_pickle(0, (2,), (1,), rebuild="_rebuild_sparse_tensor"), "asks for torch._utils._reb"),
    (tensor_pickle(0, (2,), (1,)).replace(b"storage", b"martian"), "unknown object"),
    (
      tensor_pickle(0, (2,), (1,)).replace(b"\x01\x00\x00\x000", b"\x01\x00\x00\x001"),
      "cannot be read",
    ),  # the storage is not in the archive
  ],
)
def test_other_torch_files_are_refused(tmp_path, data, message):
  path = torch_zip(tmp_path / "net.pth", data, SIX)
  with pytest.raises(UnsafeFileError, match=message):
    unpickle.read_torch_file(path)


def test_archives_that_torch_does_not_write_are_refused(tmp_path):
  path = tmp_path / "net.pth"
  good = tensor_pickle(0, (2,), (1,))
  path.write_bytes(pickle.dumps({}))
  with pytest.raises(UnsafeFileError, match="not a zip archive"):
    unpickle.read_torch_file(path)
  torch_zip(path, good, SIX, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(UnsafeFileError, match="compressed"):
    unpickle.read_torch_file(path)
  torch_zip(path, good, SIX, byteorder=b"big")
  with pytest.raises(UnsafeFileError, match="big-endian"):
    unpickle.read_torch_file(path)
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("notes.txt", "")
  with pytest.raises(UnsafeFileError, match="0 data.pkl"):
    unpickle.read_torch_file(path)


def test_a_storage_cut_short_is_refused(tmp_path):
  path = torch_zip(tmp_path / "net.pth", tensor_pickle(0, (6,), (1,)), SIX[:4])
  with pytest.raises(UnsafeFileError, match="storage of 4 elements"):
    unpickle.read_torch_file(path)
  torch_zip(path, tensor_pickle(0, (6,), (1,)), SIX)
  data = path.read_bytes()
  flipped = data.replace(SIX.tobytes(), (SIX + 1).tobytes())  # the zip's checksum tells
  path.write_bytes(flipped)
  with pytest.raises(UnsafeFileError, match="cannot be read"):
    unpickle.read_torch_file(path)
