"""Says which image, crop and flip example i of a run is: a pure function without state.

Example i = step * batch_size + j of a run sees image i mod n of epoch i // n, in an order that is
a new permutation each epoch. Nothing depends on the number of hosts, devices or threads, so a
resumed run needs only the seed and the step, not the state of an iterator.

All arithmetic is in uint32, which wraps alike in numpy and in jax.numpy without x64: `xp` is
either of them, and the plans are equal bit for bit.
"""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from sr_jax import UserError
from sr_jax.data.detail import Detail, of_crops
from sr_jax.data.pack import Pack, hr_window, lr_window

Array = Any  # an array of numpy or of jax.numpy

_ORDER, _CROP = 0, 1  # where the hash starts, so that the two uses of it are unrelated
_ROUNDS = 24  # rounds of the shuffle; the tests find no bias even with half as many


class Plan(NamedTuple):
  """What to cut out of a pack: int32 arrays [N], with one entry for each example."""

  image: Array  # index into the pack
  y: Array  # top row of the crop, in LR pixels
  x: Array  # left column of the crop, in LR pixels
  dihedral: Array  # 0..7, see `apply_dihedral`


def batch_positions(
  step: int, batch_size: int, n_images: int, start: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Say where in the data the examples of a step are.

  It is computed in int64 on the host, because the number of an example outgrows 32 bits within a
  long run.

  Args:
    step: the step of the run, from 0.
    batch_size: the number of examples in the whole batch, over all hosts.
    n_images: the number of images in an epoch.
    start: the first row of the batch that is wanted, for a host's share.
    stop: the end of the rows that are wanted, by default the end of the batch.

  Returns:
    The epoch of each example, and its position in that epoch, both uint32 [stop - start].
  """
  rows = np.arange(start, batch_size if stop is None else stop, dtype=np.int64)
  epoch, position = np.divmod(np.int64(step) * batch_size + rows, n_images)
  return epoch.astype(np.uint32), position.astype(np.uint32)


def traced_positions(
  xp: ModuleType, step: Array, batch_size: int, n_images: int
) -> tuple[Array, Array]:
  """`batch_positions` of a whole batch in 32 bits, for a step that a jitted function computes.

  Args:
    xp: numpy, or jax.numpy inside a jitted function; the result is the same.
    step: the step of the run, from 0; an integer or an integer [], below 2^32.
    batch_size: the number of examples in the whole batch, over all hosts.
    n_images: the number of images in an epoch.

  Returns:
    The epoch of each example, and its position in that epoch, both uint32 [batch_size].

  Raises:
    UserError: (n_images + 1) * batch_size is 2^32 or more.
  """
  if (n_images + 1) * batch_size >= 2**32:
    raise UserError(
      f"{n_images} images x batch_size={batch_size} must be below 2^32; "
      "read them from the disk with --config.data.input=tf"
    )
  # n_images steps consume exactly batch_size epochs, so the count can restart there and stay within
  # 32 bits.
  step = xp.broadcast_to(xp.asarray(step).astype(xp.uint32), (batch_size,))
  rounds, step = xp.divmod(step, np.uint32(n_images))
  number = step * np.uint32(batch_size) + xp.arange(batch_size, dtype=xp.uint32)
  epoch, position = xp.divmod(number, np.uint32(n_images))
  return rounds * np.uint32(batch_size) + epoch, position


def example_plan(
  xp: ModuleType,
  seed: int | Array,
  epoch: Array,
  position: Array,
  lr_sizes: Array,
  lr_patch: int,
  detail: Detail | None = None,
  draws: int = 1,
  symmetries: int = 8,
) -> Plan:
  """Choose image, crop and dihedral of examples.

  Args:
    xp: numpy, or jax.numpy inside a jitted function; the result is the same.
    seed: the seed of the run, in [0, 2^32); an integer or a uint32 [].
    epoch: the epoch of each example, uint32 [N].
    position: the position of each example in its epoch, uint32 [N], each less than the number of
      images.
    lr_sizes: height and width of the LR images, int32 [n, 2], none less than `lr_patch`.
    lr_patch: side of the crop in LR pixels.
    detail: where the images have detail; needed for more than one draw.
    draws: how many corners are drawn for each example. The crop with the most detail is taken.
    symmetries: of the 8, how many are drawn from: 2 are as it is and mirrored left to right.

  Returns:
    The plan of the N examples. Corners and dihedrals are drawn uniformly, images without
    replacement. The dihedrals are the same for any number of draws.
  """
  position = xp.asarray(position, xp.uint32)
  epoch = xp.asarray(epoch, xp.uint32)
  seed = xp.broadcast_to(xp.asarray(seed, xp.uint32), position.shape)
  lr_sizes = xp.asarray(lr_sizes, xp.int32)

  image = _shuffled(xp, seed, epoch, position, len(lr_sizes))
  choices = (lr_sizes[image] - lr_patch + 1).astype(xp.uint32)
  state = _absorb(_absorb(_absorb(xp.full_like(seed, _CROP), seed), epoch), position)

  def draw(i: int) -> Array:
    return _finish(_absorb(state, xp.full_like(seed, i)), words=4)

  def corner(i: int) -> tuple[Array, Array]:
    numbers = (0, 1) if i == 0 else (2 * i + 1, 2 * i + 2)  # 2 is the dihedral's
    return tuple((draw(n) % choices[:, axis]).astype(xp.int32) for axis, n in enumerate(numbers))

  image, (y, x) = image.astype(xp.int32), corner(0)
  if draws > 1:
    most = of_crops(xp, detail, image, y, x, lr_patch)
    for i in range(1, draws):
      other = corner(i)
      amount = of_crops(xp, detail, image, *other, lr_patch)
      more = amount > most
      most = xp.where(more, amount, most)
      y, x = (xp.where(more, new, old) for new, old in zip(other, (y, x), strict=True))
  return Plan(image, y, x, (draw(2) % np.uint32(symmetries)).astype(xp.int32))


def take_example(pack: Pack, plan: Plan, lr_patch: int) -> tuple[np.ndarray, np.ndarray]:
  """Cut one example out of a pack, on the host.

  Args:
    pack: the images.
    plan: the plan of one example, four integers.
    lr_patch: side of the LR crop in pixels.

  Returns:
    LR [lr_patch, lr_patch, 3], HR [lr_patch * scale, lr_patch * scale, 3], of the pack's dtype.
  """
  i, y, x, dihedral = (int(part) for part in plan)
  s = pack.scale
  lr = lr_window(pack, i, y, x, lr_patch, lr_patch)
  hr = hr_window(pack, i, y * s, x * s, lr_patch * s, lr_patch * s)
  return apply_dihedral(lr, dihedral), apply_dihedral(hr, dihedral)


def cut_batch(
  pack: Pack,
  step: int,
  *,
  batch_size: int,
  lr_patch: int,
  seed: int,
  start: int = 0,
  stop: int | None = None,
  detail: Detail | None = None,
  draws: int = 1,
  symmetries: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
  """Cut the batch of a step, or some of its rows, on the host.

  Args:
    pack: the images.
    step: the step of the run, from 0.
    batch_size: the number of examples in the global batch.
    lr_patch: side of the LR crops in pixels.
    seed: the seed of the run.
    start: the first row of the batch that is wanted.
    stop: the end of the rows that are wanted, by default the end of the batch.
    detail: where the images have detail, as for `example_plan`.
    draws: corners that each crop is the best of, by its detail.
    symmetries: as for `example_plan`.

  Returns:
    LR [n, lr_patch, lr_patch, 3], HR [n, lr_patch * scale, lr_patch * scale, 3], of the pack's
    dtype.
  """
  epoch, position = batch_positions(step, batch_size, len(pack.names), start, stop)
  plan = example_plan(np, seed, epoch, position, pack.lr_sizes, lr_patch, detail, draws, symmetries)
  hr_patch = lr_patch * pack.scale
  lr = np.empty((len(position), lr_patch, lr_patch, 3), pack.lr.dtype)
  hr = np.empty((len(position), hr_patch, hr_patch, 3), pack.hr.dtype)
  for row, example in enumerate(zip(*plan, strict=True)):
    lr[row], hr[row] = take_example(pack, Plan(*example), lr_patch)
  return lr, hr


def apply_dihedral(image: np.ndarray, dihedral: int) -> np.ndarray:
  """Apply one of the 8 symmetries of the square to an image [H, W, C].

  Bit 0 mirrors left and right, then bit 1 top and bottom, then bit 2 transposes.
  """
  if dihedral & 1:
    image = image[:, ::-1]
  if dihedral & 2:
    image = image[::-1]
  return image.swapaxes(0, 1) if dihedral & 4 else image


def check_pack(pack: Pack, seed: int, lr_patch: int, draws: int = 1) -> None:
  """Check that plans can be made for a pack.

  Raises:
    UserError: an image is smaller than the crop, the seed has more than 32 bits, or there are fewer
      than 1 or more than 64 draws.
  """
  if not 1 <= draws <= 64:
    raise UserError(
      f"data.detail_draws={draws} must be from 1 to 64; try --config.data.detail_draws=4"
    )
  if not 0 <= seed < 2**32:
    raise UserError(f"seed={seed} must be in [0, 2^32); try --config.seed={seed % 2**32}")
  smallest = int(np.min(pack.lr_sizes))
  if lr_patch > smallest or lr_patch < 1:
    raise UserError(
      f"hr_patch={lr_patch * pack.scale} must be at most the smallest image's side, "
      f"{smallest * pack.scale}; try --config.data.hr_patch={smallest * pack.scale}, or have "
      "build_pack leave small images out"
    )


def _shuffled(xp: ModuleType, seed: Array, epoch: Array, position: Array, n: int) -> Array:
  """Returns the image at a position of an epoch's order.

  Swap-or-not shuffle (Hoang, Morris, Rogaway 2012): each round pairs every index x with
  key - x mod n and swaps a pair or not by a hash of its larger member. So every round, and all
  of them, is a permutation of [0, n) that can be looked up at one index alone.
  """
  n = np.uint32(n)
  state = _absorb(_absorb(xp.full_like(seed, _ORDER), seed), epoch)
  image = position
  for i in range(_ROUNDS):
    round_state = _absorb(state, xp.full_like(seed, i))
    partner = _finish(round_state, words=3) % n + (n - image)  # below 2 n, and n < 2^31
    partner = xp.where(partner >= n, partner - n, partner)
    larger = xp.maximum(image, partner)
    swap = _finish(_absorb(round_state, larger), words=4) >> np.uint32(31)
    image = xp.where(swap == 1, partner, image)
  return image


def _absorb(state: Array, word: Array) -> Array:
  """Does one step of MurmurHash3 (x86, 32 bits) on uint32 arrays [N]."""
  word = _rotated(word * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
  return _rotated(state ^ word, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _finish(state: Array, words: int) -> Array:
  """Finishes MurmurHash3, so that every bit of the state reaches every bit of the hash."""
  state = state ^ np.uint32(4 * words)
  state = (state ^ (state >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  state = (state ^ (state >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return state ^ (state >> np.uint32(16))


def _rotated(word: Array, bits: int) -> Array:
  return (word << np.uint32(bits)) | (word >> np.uint32(32 - bits))
