"""Tests of sr_jax/data/detail.py: what a table of sums says, and crops that are drawn by it."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from sr_jax.data import detail
from sr_jax.data import device_input
from sr_jax.data.pack import Pack, SubImages, divide, lr_image
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.data import tf_input

BATCH = {"batch_size": 8, "lr_patch": 16, "seed": 5}


@pytest.fixture(scope="module")
def pack() -> Pack:
  """Images that are flat but for noise in one corner of each, and one that is all noise."""
  rng = np.random.default_rng(0)
  images = []
  for i in range(6):
    image = np.full((160 + 12 * i, 220 - 8 * i, 3), 90, np.uint8)
    image[100:, 120:] = rng.integers(0, 256, image[100:, 120:].shape)
    images.append(image)
  images.append(rng.integers(0, 256, (150, 170, 3), dtype=np.uint8))
  return packing.pack_from_arrays(images, 4)


def changes(lr: np.ndarray) -> np.ndarray:
  """What each pixel adds to the detail, in Python's unbounded integers."""
  grey = lr.astype(int).sum(axis=2)
  amount = np.zeros_like(grey)
  for y, x in np.ndindex(*grey.shape):
    amount[y, x] = (abs(grey[y, x] - grey[y, x - 1]) if x else 0) + (
      abs(grey[y, x] - grey[y - 1, x]) if y else 0
    )
  return amount


def test_the_table_has_the_sums_of_whole_blocks(pack):
  table = detail.measure(pack)
  for i in (0, 3, 6):
    amount = changes(lr_image(pack, i))
    height, width = amount.shape
    for y, x in ((0, 0), (3, 5), (4, 4), (height - 16, width - 16), (11, 20)):
      block = [min((c + 4) // 8, -(-side // 8) - 2) for c, side in ((y, height), (x, width))]
      top, left = (8 * b for b in block)
      expected = amount[top : top + 16, left : left + 16].sum()
      at = (np.array([value], np.int32) for value in (i, y, x))
      assert detail.of_crops(np, table, *at, 16) == [expected], (i, y, x)


def test_sums_may_wrap(pack):
  """As of an image of gigabytes: differences of sums that wrapped are still right."""
  table = detail.measure(pack)
  wrapped = table._replace(sums=table.sums + np.uint32(2**32 - 5))
  at = np.int32([0, 6]), np.int32([20, 4]), np.int32([25, 9])
  np.testing.assert_array_equal(
    detail.of_crops(np, wrapped, *at, 16), detail.of_crops(np, table, *at, 16)
  )


def plans(pack, draws, steps=40):
  table = detail.measure(pack)
  for step in range(steps):
    epoch, position = sampling.batch_positions(step, 8, len(pack.names))
    yield sampling.example_plan(np, 5, epoch, position, pack.lr_sizes, 16, table, draws)


def test_more_draws_show_more_detail_of_the_same_images(pack):
  amounts = {}
  for draws in (1, 4):
    planned = list(plans(pack, draws))
    amounts[draws] = np.mean(
      [
        changes(lr_image(pack, i)[y : y + 16, x : x + 16]).sum()
        for plan in planned[:10]
        for i, y, x, _ in zip(*plan, strict=True)
      ]
    )
    for plan, plain in zip(planned, plans(pack, 1), strict=True):
      np.testing.assert_array_equal(plan.image, plain.image)
      np.testing.assert_array_equal(plan.dihedral, plain.dihedral)
      assert (plan.y >= 0).all() and (plan.y + 16 <= pack.lr_sizes[plan.image, 0]).all()
      assert (plan.x >= 0).all() and (plan.x + 16 <= pack.lr_sizes[plan.image, 1]).all()
  assert amounts[4] > 1.5 * amounts[1]


def test_the_best_of_the_draws_is_taken(pack):
  """Each of four draws alone is what the hash gives; the one with the most detail is the plan's."""
  table, (plan,) = detail.measure(pack), list(plans(pack, 4, steps=1))
  epoch, position = sampling.batch_positions(0, 8, len(pack.names))
  most = detail.of_crops(np, table, plan.image, plan.y, plan.x, 16)
  for fewer in (1, 2, 3):
    other = sampling.example_plan(np, 5, epoch, position, pack.lr_sizes, 16, table, fewer)
    assert (detail.of_crops(np, table, other.image, other.y, other.x, 16) <= most).all()


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_the_devices_cut_what_the_host_cuts(pack, placement):
  table = detail.measure(pack)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  options = {**BATCH, "draws": 4}
  arrays, cut = device_input.make_cutter(pack, sharding=sharding, placement=placement, **options)
  cut = jax.jit(cut)
  for step in (0, 1, 1000):
    lr, hr = sampling.cut_batch(pack, step, detail=table, **options)
    batch = cut(arrays, jnp.uint32(step))
    np.testing.assert_array_equal(batch["lr"], lr)
    np.testing.assert_array_equal(batch["hr"], hr)


def test_tf_data_cuts_what_the_host_cuts(pack):
  pytest.importorskip("tensorflow")
  options = {**BATCH, "draws": 3}
  stream = tf_input.make_tf_input(pack, start_step=7, **options)
  for step, batch in enumerate(itertools.islice(stream, 3), 7):
    lr, hr = sampling.cut_batch(pack, step, detail=detail.measure(pack), **options)
    np.testing.assert_array_equal(batch["lr"], lr)
    np.testing.assert_array_equal(batch["hr"], hr)


def test_sub_images_have_their_own_tables(pack):
  squares = divide(pack, SubImages(80, 40))
  table = detail.measure(squares)
  assert len(table.first) == len(squares.names) > len(pack.names)
  assert len(table.sums) == sum(table.rows * table.pitch)


def test_how_many_draws_there_may_be(pack):
  for draws in (0, 65):
    with pytest.raises(ValueError, match=f"detail_draws={draws} must be from 1 to 64; try .*=4"):
      sampling.check_pack(pack, 0, 16, draws)
