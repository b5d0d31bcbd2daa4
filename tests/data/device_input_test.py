"""Tests of sr_jax/data/device_input.py."""

import collections
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sr_jax.data import device_input
from sr_jax.data.pack import Pack, SubImages, divide
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.data import tf_input


@pytest.fixture(scope="module")
def pack() -> Pack:
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (48 + 4 * i, 60 - 4 * i, 3), dtype=np.uint8) for i in range(5)]
  return packing.pack_from_arrays(images, 4)


@pytest.fixture(scope="module")
def batch_sharding() -> NamedSharding:
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec("data"))


def stream_of(pack, start_step=0, sharding=None, **options):
  """The batches from a step on, by what a training step calls."""
  arrays, cut = device_input.make_cutter(pack, sharding=sharding, **options)
  cut = jax.jit(cut, out_shardings=sharding)
  return (cut(arrays, np.uint32(step)) for step in itertools.count(start_step))


def batches(pack, count, **options):
  options = {"batch_size": 8, "lr_patch": 8, "seed": 3} | options
  return list(itertools.islice(stream_of(pack, **options), count))


def assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    for key in ("lr", "hr"):
      assert y[key].dtype == np.uint8
      np.testing.assert_array_equal(x[key], y[key])


def test_batches_are_the_planned_crops(pack):
  for step, batch in enumerate(batches(pack, 6)):
    epoch, position = sampling.batch_positions(step, 8, 5)
    plan = sampling.example_plan(np, 3, epoch, position, pack.lr_sizes, 8)
    rows = [sampling.take_example(pack, sampling.Plan(*row), 8) for row in zip(*plan, strict=True)]
    expected = {"lr": np.stack([lr for lr, _ in rows]), "hr": np.stack([hr for _, hr in rows])}
    assert_equal([batch], [expected])


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_equal_to_tf_input(pack, seed):
  pytest.importorskip("tensorflow")
  options = {"batch_size": 8, "lr_patch": 10, "seed": seed, "start_step": 1_000_000}
  stream = tf_input.make_tf_input(pack, **options)
  assert_equal(batches(pack, 8, **options), list(itertools.islice(stream, 8)))


def test_eight_devices_equal_one(pack, batch_sharding):
  many = batches(pack, 4, sharding=batch_sharding)
  assert many[0]["hr"].sharding.is_equivalent_to(batch_sharding, 4)
  assert many[0]["hr"].addressable_shards[0].data.shape == (1, 32, 32, 3)
  assert_equal(batches(pack, 4), many)


def test_a_resumed_stream_goes_on_where_it_was(pack):
  assert_equal(batches(pack, 3, start_step=5), batches(pack, 8)[5:])


def test_steps_share_one_program(pack, caplog):
  stream = stream_of(pack, batch_size=8, lr_patch=8, seed=0)
  with jax.log_compiles():
    next(stream)
    assert "Compiling" in caplog.text
    caplog.clear()
    next(stream)
    assert "Compiling" not in caplog.text


def test_a_jitted_step_cuts_for_itself(pack):
  """As in a training step, whose number is in its state."""
  arrays, cut = device_input.make_cutter(pack, batch_size=8, lr_patch=8, seed=3)

  @jax.jit
  def train_step(state, arrays):
    batch = cut(arrays, state)
    return state + 1, batch

  state, expected = jnp.int32(4), batches(pack, 3, start_step=4)
  for batch in expected:
    state, cut_inside = train_step(state, arrays)
    assert_equal([cut_inside], [batch])
  program = train_step.lower(state, arrays).as_text()
  assert f"tensor<1x{arrays['hr'].size}xui8>" in program  # an argument of it ...
  assert not re.search('dense<"0x[0-9A-F]{999}', program)  # ... and no constant


@pytest.mark.parametrize(
  "placement, segment_bytes",
  [
    ("replicated", 2**30),
    ("sharded", 1999),
    pytest.param("replicated", 1999, marks=pytest.mark.slow),
    pytest.param("sharded", 2**30, marks=pytest.mark.slow),
  ],
)
def test_placements_and_segments_change_nothing(
  pack, batch_sharding, monkeypatch, placement, segment_bytes
):
  expected = batches(pack, 4, batch_size=16)
  monkeypatch.setattr(device_input, "SEGMENT_VALUES", segment_bytes)
  monkeypatch.setattr(device_input, "CHUNK_BYTES", 700)
  options = {"batch_size": 16, "sharding": batch_sharding, "placement": placement}
  many = batches(pack, 4, **options)
  assert many[0]["hr"].addressable_shards[0].data.shape == (2, 32, 32, 3)
  assert many[0]["hr"].sharding.is_equivalent_to(batch_sharding, 4)
  assert_equal(expected, many)
  arrays, _ = device_input.make_cutter(pack, lr_patch=8, seed=3, **options)
  on_one = arrays["hr"].addressable_shards[0].data
  whole = pack.hr.size
  if placement == "sharded":
    assert whole / 8 <= on_one.size < whole / 8 + 100 * (1 + on_one.shape[0])
  else:
    assert on_one.size >= whole
  assert (arrays["hr"].shape[0] > 8) == (segment_bytes == 1999)
  if placement == "replicated":
    one = batches(pack, 4, batch_size=16)  # without a mesh
    assert_equal(expected, one)


def test_a_sharded_step_has_one_exchange_of_bytes(pack, batch_sharding):
  arrays, cut = device_input.make_cutter(
    pack, batch_size=16, lr_patch=8, seed=3, sharding=batch_sharding, placement="sharded"
  )
  program = jax.jit(cut).lower(arrays, 0).compile().as_text()
  exchanges = re.findall(r"= (\S+) (all-\w+|reduce-scatter|collective-\w+)\(.*", program)
  (kind, name), *others = exchanges
  assert not others
  # 2 examples a device, the bytes of LR and HR crops together.
  assert name == "reduce-scatter" and kind.startswith(f"u8[2,{8 * 8 * 3 * 17}]")
  (line,) = [line for line in program.splitlines() if " reduce-scatter(" in line]
  assert "exchange_crops" in line


def test_addresses_beyond_two_and_four_gigabytes_need_32_bits_only():
  """29 GB, of images as large as `images/files.py` reads."""
  rng = np.random.default_rng(0)
  length = device_input.segment_length(29_000_000_001, 1)
  assert length <= 2**30
  offsets = rng.integers(0, 29_000_000_000, 500)
  offsets[:4] = 0, 2**31 - 1, 2**32 + 5, 29_000_000_000
  pitch = rng.integers(200, 30_000, 500).astype(np.int32)
  y, x = rng.integers(0, 10_000 - 128, 500), rng.integers(0, 72, 500)
  y = np.minimum(y, 100_000_000 // pitch - 128).clip(0)
  segment, byte = device_input.split_offsets(offsets, length)
  arguments = [segment, byte, pitch, y.astype(np.int32), x.astype(np.int32)]
  rows = offsets[:, None] + ((y[:, None] + np.arange(128)) * pitch[:, None] + x[:, None]) * 3
  for xp in (np, jnp):
    segments, bytes_ = device_input.row_addresses(xp, *map(xp.asarray, arguments), 128, length)
    assert segments.dtype == bytes_.dtype == np.int32
    bytes_ = np.asarray(bytes_, np.int64)
    assert bytes_.min() >= 0 and bytes_.max() < length
    np.testing.assert_array_equal(np.asarray(segments, np.int64) * length + bytes_, rows)


def test_segments_are_shared_evenly():
  for size, parts in ((1, 1), (1, 8), (10**6, 8), (2**30, 1), (2**30 + 1, 1), (29 * 10**9, 8)):
    length = device_input.segment_length(size, parts)
    count = -(-size // length)
    assert length <= 2**30 and count <= -(-size // (2**30 * parts)) * parts


@pytest.mark.slow
def test_pixels_beyond_two_gigabytes_are_cut():
  """Takes 5 GB of memory."""
  side = 10_000
  pixels = np.zeros(8 * side * side * 3, np.uint8)
  blocks = pixels.reshape(8 * side, side * 3)
  for row in range(8 * side):
    blocks[row, :] = row % 251
  pack = Pack(
    hr=pixels,
    lr=pixels,
    hr_sizes=np.full((8, 2), side, np.int32),
    lr_sizes=np.full((8, 2), side, np.int32),
    hr_offsets=np.arange(8, dtype=np.int64) * side * side * 3,
    lr_offsets=np.arange(8, dtype=np.int64) * side * side * 3,
    lr_pitch=np.full(8, side, np.int32),
    names=tuple("abcdefgh"),
    scale=1,
    digest="",
  )
  (batch,) = batches(pack, 1, batch_size=8)
  _, hr = sampling.cut_batch(pack, 0, batch_size=8, lr_patch=8, seed=3)
  np.testing.assert_array_equal(batch["hr"], hr)
  assert hr.max() > 200


Fake = collections.namedtuple("Fake", "stats device_kind process_index")
Fake.memory_stats = lambda self: self.stats


def device(limit, used=0):
  return Fake({"bytes_limit": limit, "bytes_in_use": used} if limit else None, "NVIDIA H100", 0)


def test_the_pack_is_placed_where_it_fits():
  place = device_input.choose_placement
  # Half of what is free is left to the step.
  assert place(29 * 10**9, [device(60 * 10**9)], "auto") == "replicated"
  assert place(29 * 10**9, [device(60 * 10**9), device(40 * 10**9)], "auto") == "sharded"
  assert place(29 * 10**9, [device(60 * 10**9, 12 * 10**9)] * 2, "auto") == "sharded"
  assert place(29 * 10**9, [device(60 * 10**9)] * 2, "sharded") == "sharded"
  assert place(29 * 10**9, [device(0)], "auto") == "replicated"  # a CPU does not say
  with pytest.raises(ValueError) as error:
    place(29 * 10**9, [device(24 * 10**9, 4 * 10**9)], "auto")
  assert str(error.value) == (
    "the decoded images need 29.0 GB, but only 10.0 GB of each NVIDIA H100 is available for them; "
    "read them from the disk with --config.data.input=tf"
  )
  with pytest.raises(ValueError, match=r"14.5 GB each if divided over 2\); .*data.input=tf"):
    place(29 * 10**9, [device(14 * 10**9)] * 2, "auto")
  with pytest.raises(
    ValueError, match="29.0 GB, but only 7.0 GB of each .* is available for them; read"
  ):
    place(29 * 10**9, [device(14 * 10**9)] * 2, "replicated")
  with pytest.raises(ValueError, match="needs several devices"):
    place(1, [device(14 * 10**9)], "sharded")


def test_a_pack_that_does_not_fit_is_refused_before_it_is_copied(pack, monkeypatch):
  monkeypatch.setattr(device_input, "free_bytes", lambda _: pack.hr.size + pack.lr.size - 1)
  pixels = {key: types.SimpleNamespace(nbytes=getattr(pack, key).size) for key in ("lr", "hr")}
  with pytest.raises(ValueError, match="decoded images need .*--config.data.input=tf"):
    batches(pack._replace(**pixels), 1)  # which have a size and nothing to copy


def test_mistakes_are_named(pack, batch_sharding):
  with pytest.raises(ValueError, match="hr_patch=64 must be at most"):
    batches(pack, 1, lr_patch=16)
  with pytest.raises(ValueError, match="placement='here' must be one of auto, replicated, sharded"):
    batches(pack, 1, placement="here")
  with pytest.raises(ValueError, match="batch_size=12 .* 8 devices; try .*batch_size=16"):
    batches(pack, 1, batch_size=12, sharding=batch_sharding, placement="sharded")


def test_sub_images_are_cut_alike(pack):
  squares = divide(pack, SubImages(40, 8))
  assert len(squares.names) > len(pack.names)
  for step, batch in enumerate(batches(squares, 3)):
    lr, hr = sampling.cut_batch(squares, step, batch_size=8, lr_patch=8, seed=3)
    assert_equal([batch], [{"lr": lr, "hr": hr}])
