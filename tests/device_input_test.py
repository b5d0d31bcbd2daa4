"""Tests of sr_jax/data/device_input.py."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sr_jax.data import device_input, packed, sampling, tf_input


@pytest.fixture(scope="module")
def pack() -> packed.Pack:
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (48 + 4 * i, 60 - 4 * i, 3), dtype=np.uint8) for i in range(5)]
  return packed.pack_from_arrays(images, 4)


@pytest.fixture(scope="module")
def batch_sharding() -> NamedSharding:
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, PartitionSpec("data"))


def batches(pack, count, **options):
  options = {"batch_size": 8, "lr_patch": 8, "seed": 3} | options
  return list(itertools.islice(device_input.make_device_input(pack, **options), count))


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
  stream = device_input.make_device_input(pack, batch_size=8, lr_patch=8, seed=0)
  with jax.log_compiles():
    next(stream)
    assert "Compiling" in caplog.text
    caplog.clear()
    next(stream)
    assert "Compiling" not in caplog.text


def test_mistakes_are_named(pack):
  nothing = np.broadcast_to(np.uint8(0), 2**31)  # a byte that says it is two gigabytes
  with pytest.raises(ValueError, match="2147483648 bytes .*--config.data.input=tf"):
    batches(pack._replace(hr=nothing), 1)
  with pytest.raises(ValueError, match="hr_patch=64 must be at most"):
    batches(pack, 1, lr_patch=16)
