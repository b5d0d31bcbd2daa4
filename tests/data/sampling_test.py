"""Tests of sr_jax/data/sampling.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from sr_jax.data.pack import Pack
from sr_jax.data import packing
from sr_jax.data import sampling

SIZES = np.array([[32, 32], [40, 61], [33, 500], [47, 32], [100, 90], [64, 33]], np.int32)


def plan_of(xp, seed, epoch, n_or_sizes, lr_patch=32):
  """The plan of a whole epoch, with its fields as numpy arrays."""
  sizes = np.full((n_or_sizes, 2), 40) if isinstance(n_or_sizes, int) else n_or_sizes
  position = np.arange(len(sizes), dtype=np.uint32)
  epochs = np.full_like(position, epoch)
  plan = sampling.example_plan(xp, seed, epochs, position, sizes, lr_patch)
  return sampling.Plan(*(np.asarray(part) for part in plan))


def plans_of(seed, epochs, sizes, lr_patch=32):
  """The plans of many epochs at once, fields of shape [epochs, images]."""
  epoch, position = np.divmod(np.arange(epochs * len(sizes), dtype=np.uint32), len(sizes))
  plan = sampling.example_plan(np, seed, epoch, position, sizes, lr_patch)
  return sampling.Plan(*(part.reshape(epochs, len(sizes)) for part in plan))


def coordinate_pack(scale: int) -> Pack:
  """LR pixels hold (y, x, image) of themselves; HR pixels those of the LR pixel they lie in."""
  lr = [
    np.stack([*np.mgrid[: 12 + i, : 20 - i], np.full((12 + i, 20 - i), i)], -1).astype(np.uint8)
    for i in range(5)
  ]
  hr = [image.repeat(scale, axis=0).repeat(scale, axis=1) for image in lr]
  return packing.pack_from_arrays(hr, scale, lr)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 100, 1000, 4097])
def test_each_epoch_is_a_permutation(n):
  for seed, epoch in ((0, 0), (1, 5), (2**32 - 1, 1_000_000)):
    np.testing.assert_array_equal(np.sort(plan_of(np, seed, epoch, n).image), np.arange(n))


def test_seeds_and_epochs_have_other_orders_crops_and_flips():
  plans = [
    plan_of(np, seed, epoch, np.full((500, 2), 200)) for seed, epoch in ((0, 0), (0, 1), (1, 0))
  ]
  for i in range(3):
    for a, b in zip(plans[i], plans[i - 1], strict=True):
      assert np.mean(a == b) < 0.2


def test_equal_to_unbounded_integers():
  for seed, epoch in ((0, 0), (123, 4), (2**32 - 1, 2**32 - 1)):
    plan = plan_of(np, seed, epoch, SIZES)
    expected = [
      references.plan(seed, epoch, position, SIZES.tolist(), 32, rounds=24)
      for position in range(len(SIZES))
    ]
    np.testing.assert_array_equal(np.stack(plan, axis=-1), expected)


def test_the_hash_is_murmur3():
  """Values of the reference implementation, MurmurHash3_x86_32 by Austin Appleby."""
  assert references.murmur3([], seed=0) == 0
  assert references.murmur3([], seed=1) == 0x514E28B7
  assert references.murmur3([0], seed=0) == 0x2362F9DE
  assert references.murmur3([0xFFFFFFFF], seed=0) == 0x76293B50
  assert references.murmur3([0x87654321], seed=0x5082EDEE) == 0x2362F9DE


@pytest.mark.parametrize("seed", [0, 77, 2**32 - 1])
def test_numpy_and_jitted_jax_agree(seed):
  @jax.jit
  def planned(seed, epoch, position):
    return sampling.example_plan(jnp, seed, epoch, position, SIZES, 32)

  rng = np.random.default_rng(0)
  epoch = rng.integers(0, 2**32, 400, dtype=np.uint32)
  position = rng.integers(0, len(SIZES), 400, dtype=np.uint32)
  on_host = sampling.example_plan(np, seed, epoch, position, SIZES, 32)
  on_device = planned(np.uint32(seed), epoch, position)
  for a, b in zip(on_host, on_device, strict=True):
    assert a.dtype == b.dtype == np.int32
    np.testing.assert_array_equal(a, b)


def test_crops_stay_inside_and_reach_every_border():
  epochs = 2000
  image, y, x, _ = plans_of(3, epochs, SIZES)
  for i, (height, width) in enumerate(SIZES):
    for corner, side in ((y[image == i], height), (x[image == i], width)):
      assert len(corner) == epochs
      assert corner.min() == 0
      assert corner.max() == side - 32


def chi_square(values: np.ndarray, choices: int) -> float:
  """How far counts are from uniform, in standard deviations of the statistic."""
  counts = np.bincount(values, minlength=choices)
  assert len(counts) == choices
  expected = len(values) / choices
  statistic = np.sum((counts - expected) ** 2) / expected
  return (statistic - (choices - 1)) / np.sqrt(2 * (choices - 1))


def test_crops_and_flips_are_uniform_and_unrelated():
  _, y, x, dihedral = (part.ravel() for part in plans_of(11, 40, np.full((1000, 2), 41)))
  assert abs(chi_square(y, 10)) < 5
  assert abs(chi_square(x, 10)) < 5
  assert abs(chi_square(dihedral, 8)) < 5
  assert abs(chi_square(y * 10 + x, 100)) < 5
  assert abs(chi_square(y * 8 + dihedral, 80)) < 5


def test_the_order_is_uniform():
  """All 24 orders of 4 images, and where each of 50 images and its successor come."""
  orders = plans_of(5, 6000, np.full((4, 2), 32)).image
  _, code = np.unique(orders @ [64, 16, 4, 1], return_inverse=True)
  assert abs(chi_square(code, 24)) < 5
  orders = plans_of(6, 2000, np.full((50, 2), 32)).image
  places = (orders * 50 + np.arange(50)).ravel()
  # Each row and column of the table of counts has a fixed sum: 49^2 free values of 2500.
  statistic = np.sum((np.bincount(places, minlength=2500) - 40.0) ** 2) / 40
  assert abs(statistic - 49**2) < 5 * np.sqrt(2 * 49**2)
  steps = (np.diff(orders, axis=1) % 50).ravel()
  assert abs(chi_square(steps - 1, 49)) < 5


def test_positions_count_on_over_epochs_and_beyond_32_bits():
  epoch, position = sampling.batch_positions(step=2, batch_size=4, n_images=5)
  np.testing.assert_array_equal(epoch, [1, 1, 2, 2])
  np.testing.assert_array_equal(position, [3, 4, 0, 1])
  step, batch, n = 10**9, 1024, 800
  epoch, position = sampling.batch_positions(step, batch, n)
  assert [(int(e), int(p)) for e, p in zip(epoch, position, strict=True)] == [
    divmod(step * batch + j, n) for j in range(batch)
  ]
  for whole, part in zip(
    (epoch, position), sampling.batch_positions(step, batch, n, 100, 150), strict=True
  ):
    np.testing.assert_array_equal(whole[100:150], part)


@pytest.mark.parametrize("n, batch_size", [(5, 4), (7, 1), (1, 16), (800, 16), (32592, 131_000)])
def test_positions_need_no_more_than_32_bits(n, batch_size):
  traced = jax.jit(lambda step: sampling.traced_positions(jnp, step, batch_size, n))
  for step in (0, 1, 12345, 400_000, 2**31 - 1, 2**32 - 1):
    expected = sampling.batch_positions(step, batch_size, n)
    for positions in (sampling.traced_positions(np, step, batch_size, n), traced(np.uint32(step))):
      for a, b in zip(positions, expected, strict=True):
        assert a.dtype == np.uint32
        np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(
    traced(jnp.int32(77))[1], sampling.batch_positions(77, batch_size, n)[1]
  )


def test_too_many_images_for_32_bits_are_named():
  with pytest.raises(ValueError, match=r"65535 images x batch_size=65536 .*--config.data.input=tf"):
    sampling.traced_positions(np, 0, 65536, 65535)
  sampling.traced_positions(np, 0, 65536, 65534)


def test_a_host_cuts_its_rows_of_the_batch():
  pack = coordinate_pack(4)
  options = {"batch_size": 12, "lr_patch": 8, "seed": 5}
  lr, hr = sampling.cut_batch(pack, 7, **options)
  assert lr.shape == (12, 8, 8, 3) and hr.shape == (12, 32, 32, 3)
  epoch, position = sampling.batch_positions(7, 12, 5)
  plan = sampling.example_plan(np, 5, epoch, position, pack.lr_sizes, 8)
  for row, example in enumerate(zip(*plan, strict=True)):
    for a, b in zip((lr, hr), sampling.take_example(pack, sampling.Plan(*example), 8), strict=True):
      np.testing.assert_array_equal(a[row], b)
  part = sampling.cut_batch(pack, 7, **options, start=3, stop=7)
  np.testing.assert_array_equal(part[0], lr[3:7])
  np.testing.assert_array_equal(part[1], hr[3:7])


def test_an_epoch_shows_each_image_once_whatever_the_batch_size():
  seen = []
  for step in range(5):
    epoch, position = sampling.batch_positions(step, 6, len(SIZES))
    seen.extend(sampling.example_plan(np, 0, epoch, position, SIZES, 8).image)
  for i in range(0, 30, 6):
    assert sorted(seen[i : i + 6]) == list(range(6))


@pytest.mark.parametrize("op", range(8))
def test_dihedrals(op):
  image = np.random.default_rng(0).integers(0, 256, (5, 5, 3))
  np.testing.assert_array_equal(sampling.apply_dihedral(image, op), references.dihedral(image, op))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_lr_and_hr_crops_are_aligned(scale):
  pack = coordinate_pack(scale)
  epoch, position = sampling.batch_positions(0, 60, 5)
  plan = sampling.example_plan(np, 9, epoch, position, pack.lr_sizes, 8)
  assert set(plan.dihedral) == set(range(8))
  for row in zip(*plan, strict=True):
    row = sampling.Plan(*row)
    lr, hr = sampling.take_example(pack, row, 8)
    assert lr.shape == (8, 8, 3)
    assert hr.shape == (8 * scale, 8 * scale, 3)
    for y in range(8 * scale):
      for x in range(8 * scale):
        assert tuple(hr[y, x]) == tuple(lr[y // scale, x // scale])
    expected = np.array([[(row.y + j, row.x + i, row.image) for i in range(8)] for j in range(8)])
    np.testing.assert_array_equal(lr, references.dihedral(expected, row.dihedral))


def test_the_lr_crop_is_of_the_whole_images_lr():
  """Not the LR of the crop, whose borders would be mirrored where the image goes on."""
  from sr_jax.images import resize

  hr = np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
  pack = packing.pack_from_arrays([hr], 4)
  lr, crop = sampling.take_example(pack, sampling.Plan(0, 5, 6, 0), 8)
  np.testing.assert_array_equal(lr, resize.imresize(hr, 1 / 4)[5:13, 6:14])
  np.testing.assert_array_equal(crop, hr[20:52, 24:56])
  assert np.any(lr != resize.imresize(crop, 1 / 4))


def test_mistakes_are_named():
  pack = coordinate_pack(4)
  sampling.check_pack(pack, 0, 12)
  with pytest.raises(ValueError, match=r"hr_patch=52 .* side, 48; try --config.data.hr_patch=48"):
    sampling.check_pack(pack, 0, 13)
  with pytest.raises(ValueError, match=r"seed=-1 must be in \[0, 2\^32\)"):
    sampling.check_pack(pack, -1, 8)
  with pytest.raises(ValueError, match=r"seed=4294967297 .* try --config.seed=1"):
    sampling.check_pack(pack, 2**32 + 1, 8)
