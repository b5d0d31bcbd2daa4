"""Tests of sr_jax/formats/unpickle.py: what it reads, and that what it refuses has not run."""

import os
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sr_jax.formats import unpickle
from sr_jax.formats.untrusted import UnsafeFileError


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


def legacy_file(tree, keys, storages):
  """A file as torch.save wrote it before PyTorch 1.6; tree is a pickle, storages are bytes."""
  parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
  start = b"".join(pickle.dumps(part, protocol=2) for part in parts)
  return start + tree + pickle.dumps(keys, protocol=2) + storages


SIX = np.arange(6, dtype=np.float32)
CALLS = (
  "reduce", "in a dict", "stack_global", "inst", "obj", "newobj", "eval", "getattr", "text",
  "dotted", "state", "extension",
)  # fmt: skip


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


def call(how, trace):
  """A pickle that would leave a file behind, by one of the ways that pickle has to call."""
  command = f"touch {trace}".encode()
  text = b"X" + struct.pack("<I", len(command)) + command
  return {
    "reduce": b"\x80\x02cposix\nsystem\n(" + text + b"tR.",
    "in a dict": b"\x80\x02}X\x01\x00\x00\x00acposix\nsystem\n(" + text + b"tRs.",
    "stack_global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93(" + text + b"tR.",
    "inst": b"(" + text + b"iposix\nsystem\n.",
    "obj": b"(cposix\nsystem\n" + text + b"o.",
    "newobj": b"\x80\x02csubprocess\nPopen\n(((X\x05\x00\x00\x00touch" + text[:1]
    + struct.pack("<I", len(str(trace))) + str(trace).encode() + b"ltt\x81.",
    "eval": b"\x80\x02c__builtin__\neval\n(X" + struct.pack("<I", len(command) + 30)
    + b"__import__('os').system('" + command + b"')   " + b"tR.",
    "getattr": b"\x80\x02c__builtin__\ngetattr\n(cnumpy\nndarray\nX\x05\x00\x00\x00tobuftR.",
    "text": pickle.dumps(Shell(trace), protocol=0),
    # What is allowed has no attributes to call on from: a dotted name is another name.
    "dotted": b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93)R.",
    "state": b"\x80\x02ccollections\nOrderedDict\n)R}X\x06\x00\x00\x00updatecposix\nsystem\nsb(.",
    "extension": b"\x80\x02\x82\x01)R.",
  }[how]  # fmt: skip


@pytest.mark.parametrize("kind", ["numpy", "zip", "legacy"])
@pytest.mark.parametrize("how", CALLS)
def test_no_opcode_calls(tmp_path, how, kind):
  trace, path = tmp_path / "trace", tmp_path / "weights.pth"
  data = call(how, trace)
  read = unpickle.read_numpy_pickle if kind == "numpy" else unpickle.read_torch_file
  if kind == "zip":
    torch_zip(path, data, SIX)
  else:
    path.write_bytes(data if kind == "numpy" else legacy_file(data, [], b""))
  with pytest.raises(UnsafeFileError, match="asks for|uses the pickle opcode") as caught:
    read(path)
  assert "\n" not in str(caught.value)
  assert not trace.exists()
  if how in ("reduce", "in a dict", "stack_global", "inst", "obj", "eval", "text"):
    pickle.loads(data)  # the trap does work
    assert trace.exists()


def test_the_state_of_a_dict_is_ignored(tmp_path):
  data = b"\x80\x02ccollections\nOrderedDict\n)R}X\x06\x00\x00\x00updateK\x01sb."
  assert unpickle.read_torch_file(torch_zip(tmp_path / "a.pth", data, SIX)) == {}


@pytest.mark.parametrize(
  "data, message",
  [
    (b"", "cannot be read"),
    (numpy1_pickle({"a": SIX})[:-20], "cannot be read"),
    (numpy1_pickle([SIX]), "holds a list, not a dict"),
    (numpy1_pickle({"a": np.array([None])}), "holds an array of dtype O8"),
    (numpy1_pickle({"a": np.array(["b"])}), "holds an array of dtype U1"),
    (numpy1_pickle({"a": SIX}).replace(b"K\x06\x85", b"K\x07\x85"), r"shape \[7\] is not what"),
    (pickle.dumps({"a": 1j}), "asks for builtins.complex"),
    (b"\x80\x02}(X\x01\x00\x00\x00acnumpy\nndarray\nu.", "holds an object numpy ndarray"),
    (b"\x80\x02cbuiltins\neval\n.", "asks for builtins.eval"),
    (b"\x80\x02X\x01\x00\x00\x00aQ.", "unknown object"),  # a persistent id
    (b"\x80\x02}(X\x01\x00\x00\x00aC\x01xu.", "holds an object bytes"),
  ],
)
def test_other_numpy_pickles_are_refused(tmp_path, data, message):
  path = tmp_path / "weights.ckpt"
  path.write_bytes(data)
  with pytest.raises(UnsafeFileError, match=message):
    unpickle.read_numpy_pickle(path)


@pytest.mark.developer("torch")
def test_reads_what_torch_saves(tmp_path):
  import torch

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


@pytest.mark.developer("torch")
def test_reads_a_training_checkpoint(tmp_path):
  import torch

  net = torch.nn.Conv2d(1, 2, 3)
  optimizer = torch.optim.Adam(net.parameters(), lr=3e-4)
  scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
  net(torch.ones(1, 1, 3, 3)).sum().backward()
  optimizer.step()
  checkpoint = {
    "iter": 5,
    "optimizers": [optimizer.state_dict()],
    "schedulers": [scheduler.state_dict()],
    "best": np.float64(31.5),
    "curve": np.arange(3),
    "size": torch.Size([2, 1]),
  }
  for zipped in (True, False):
    path = tmp_path / "net.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    actual = unpickle.read_torch_file(path)
    assert actual["optimizers"][0]["param_groups"][0]["lr"] == 3e-4
    moments = actual["optimizers"][0]["state"][0]["exp_avg"]
    np.testing.assert_array_equal(moments, optimizer.state[net.weight]["exp_avg"])
    assert actual["schedulers"][0]["milestones"] == {2: 2, 5: 1}
    assert actual["best"] == 31.5 and actual["size"] == [2, 1]
    np.testing.assert_array_equal(actual["curve"], [0, 1, 2])


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
    (tensor_pickle(0, 2, (1,)), "malformed"),
    (tensor_pickle(0, (1,) * 65, (1,) * 65), "malformed"),
    (tensor_pickle(0, (0, 2**62), (1, 1)), "cannot be read"),
    (tensor_pickle(0, (1,), (2**70,)), "cannot be read"),
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
  path.write_bytes(b"<!DOCTYPE html>\n<html>")
  with pytest.raises(UnsafeFileError, match="begins with b'<!DOCTYPE html>"):
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
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("net/data.pkl", good)
    archive.writestr("net/constants.pkl", b"")
  with pytest.raises(UnsafeFileError, match="TorchScript program"):
    unpickle.read_torch_file(path)
  with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
    archive.writestr("net/data.pkl", good)
  with pytest.raises(UnsafeFileError, match="two entries of its archive have the same name"):
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


def test_nesting_ends_somewhere(tmp_path):
  for depth, deep in [(101, False), (102, True)]:
    path = torch_zip(
      tmp_path / "a.pth", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", SIX
    )
    if deep:
      with pytest.raises(UnsafeFileError, match="or deeper than 100"):
        unpickle.read_torch_file(path)
    else:
      assert str(unpickle.read_torch_file(path)) == "[" * depth + "]" * depth


def test_storages_have_one_type_and_are_no_views(tmp_path):
  tensor = tensor_pickle(0, (2,), (1,))[2:-1]
  other = tensor_pickle(0, (2,), (1,), "LongStorage")[2:-1]
  path = torch_zip(tmp_path / "a.pth", b"\x80\x02](" + tensor + other + b"e.", SIX)
  with pytest.raises(UnsafeFileError, match="storage 0 has two types"):
    unpickle.read_torch_file(path)
  torch_zip(path, tensor_pickle(0, (2,), (1,)).replace(b"tQ", b")tQ"), SIX)
  with pytest.raises(UnsafeFileError, match="storage 0 is a view"):
    unpickle.read_torch_file(path)


def test_only_lists_are_appended_to(tmp_path):
  for data, message in [
    (b"}Na.", "appends to something else than a list"),
    (b"]}b.", "sets the state of something else"),
    (b"]NNs.", "sets items of something else"),
    (b"N)R.", "calls something that is no function"),
  ]:
    path = torch_zip(tmp_path / "a.pth", b"\x80\x02" + data, SIX)
    with pytest.raises(UnsafeFileError, match=message):
      unpickle.read_torch_file(path)


@pytest.mark.parametrize(
  "keys, storages, message",
  [
    (["0"], struct.pack("<q", 7) + SIX.tobytes(), "claims 7 elements, with 24 bytes left"),
    (["0"], struct.pack("<q", -1) + SIX.tobytes(), "claims -1 elements"),
    (["0"], struct.pack("<q", 2**62) + SIX.tobytes(), "claims 4611686018427387904 elements"),
    (["0"], struct.pack("<q", 1) + SIX.tobytes(), "out of its storage of 1 elements"),
    (["0"], b"123", "cannot be read"),
    (["1"], struct.pack("<q", 6) + SIX.tobytes(), "a storage that no tensor names"),
    ([[]], b"", "a storage that no tensor names"),
    ([], b"", "cannot be read"),
    (None, b"", "cannot be read"),
  ],
)
def test_legacy_files_are_checked(tmp_path, keys, storages, message):
  tree, path = tensor_pickle(0, (2, 3), (3, 1)), tmp_path / "net.pth"
  path.write_bytes(legacy_file(tree, ["0"], struct.pack("<q", 6) + SIX.tobytes()))
  np.testing.assert_array_equal(unpickle.read_torch_file(path), SIX.reshape(2, 3))
  path.write_bytes(legacy_file(tree, keys, storages))
  with pytest.raises(UnsafeFileError, match=message):
    unpickle.read_torch_file(path)


def test_legacy_headers_are_checked(tmp_path):
  path = tmp_path / "net.pth"
  good = legacy_file(b"\x80\x02}.", [], b"")
  for before, after, message in [
    (pickle.dumps(1001, protocol=2), pickle.dumps(1002, protocol=2), "header is not torch.save's"),
    (b"\x88", b"\x89", "big-endian"),
  ]:
    path.write_bytes(good.replace(before, after, 1))
    with pytest.raises(UnsafeFileError, match=message):
      unpickle.read_torch_file(path)


def test_the_error_is_one_short_line_whatever_the_file_says(tmp_path):
  path = tmp_path / "weights"
  path.write_bytes(b"c" + b"\x1b[2Jevil" * 10_000 + b"\nname\n.")
  with pytest.raises(UnsafeFileError, match=r"asks for \?\[2Jevil") as caught:
    unpickle.read_numpy_pickle(path)
  assert len(str(caught.value)) < 800 and "\x1b" not in str(caught.value)


def test_what_is_absent_is_not_unsafe(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no file"):
    unpickle.read_torch_file(tmp_path / "net.pth")
  with pytest.raises(UnsafeFileError, match="is not a file"):
    unpickle.read_torch_file(tmp_path)


def test_interrupts_are_not_swallowed(tmp_path, monkeypatch):
  (tmp_path / "a").write_bytes(b"")

  def interrupted(file):
    raise KeyboardInterrupt

  monkeypatch.setattr(pickletools, "genops", interrupted)
  with pytest.raises(KeyboardInterrupt):
    unpickle.read_numpy_pickle(tmp_path / "a")
