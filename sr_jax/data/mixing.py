"""Mixes whole examples of a batch with others of it, LR and HR alike: MixUp and CutMix.

Both were made for classifiers: MixUp by Zhang et al. (arXiv 1710.09412), CutMix by Yun et al.
(arXiv 1905.04899). Yoo et al. (CutBlur, arXiv 2004.00448) tried them on super-resolution, where the
mixed LR image belongs to the HR image that is mixed in the same way, because LR is a linear
function of HR up to rounding. Only along the edges of a box does it not know the other side.

What happens to an example is a pure function of the seed, the step, the example's row and the batch
size: the same on one device and on many, before and after a kill.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_STREAM = 0x4D495845  # so that these draws are unrelated to those of `preparation.py`


class Mix(NamedTuple):
  """How each example of a batch is mixed: arrays [N].

  Attributes:
    partner: the row of the other example, int32.
    share: of the example itself in a weighted mean with the other, float32; 1 for none of it.
    top: first row of the box that is replaced by the other's, LR pixels, int32.
    left: its first column.
    height: its rows; 0 for no box.
    width: its columns.
  """

  partner: jax.Array
  share: jax.Array
  top: jax.Array
  left: jax.Array
  height: jax.Array
  width: jax.Array


@dataclasses.dataclass(frozen=True)
class Mixing:
  """The function (lr, hr, step) -> (lr, hr), to be called within a jitted function.

  Attributes:
    seed: of the run.
    mixup: share of the examples that become a weighted mean with another.
    mixup_alpha: the weight is drawn from Beta(alpha, alpha).
    cutmix: share of the examples into which a box of another is pasted; none gets both.
    sharding: of the batch, or None for one device.
  """

  seed: int
  mixup: float
  mixup_alpha: float
  cutmix: float
  sharding: Any = None

  def __call__(self, lr: jax.Array, hr: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mixes the batch of a step.

    Args:
      lr: float [N, h, w, c].
      hr: float [N, h * scale, w * scale, c].
      step: integer [], from 0.

    Returns:
      Both mixed, sharded as a batch.
    """
    scale = hr.shape[1] // lr.shape[1]
    with jax.named_scope("mix"):
      mix = self.draw(step, *lr.shape[:3])
      return self._held(apply(lr, mix, 1)), self._held(apply(hr, mix, scale))

  def draw(self, step: jax.Array, rows: int, height: int, width: int) -> Mix:
    """Draws how the examples of a step are mixed.

    A box covers a part of the image that is uniform in [0, 1], with the image's proportions, around
    a place that is uniform in it, and is cut at its borders (CutMix with alpha = 1).

    Args:
      step: integer [], from 0.
      rows: of the batch, at least 2.
      height: of the LR images.
      width: the same.
    """
    key = jax.random.key(np.uint32(self.seed), impl="threefry2x32")
    key = jax.random.fold_in(jax.random.fold_in(key, _STREAM), jnp.asarray(step, jnp.uint32))

    def draw_row(row: jax.Array) -> Mix:
      which, beta, who, box = jax.random.split(jax.random.fold_in(key, row), 4)
      kind = jax.random.uniform(which)
      blended = kind < self.mixup
      pasted = (kind >= self.mixup) & (kind < self.mixup + self.cutmix)
      share = jax.random.beta(beta, self.mixup_alpha, self.mixup_alpha)
      partner = (row + 1 + jax.random.randint(who, (), 0, rows - 1)) % rows
      area, y, x = jax.random.uniform(box, (3,))
      sides = [_side(part, jnp.sqrt(area), length) for part, length in ((y, height), (x, width))]
      (top, tall), (left, wide) = sides
      return Mix(
        partner.astype(jnp.int32),
        jnp.where(blended, share, 1.0),
        top,
        left,
        jnp.where(pasted, tall, 0),
        wide,
      )

    return jax.vmap(draw_row)(jnp.arange(rows, dtype=jnp.int32))

  def _held(self, image: jax.Array) -> jax.Array:
    if self.sharding is None:
      return image
    return jax.lax.with_sharding_constraint(image, self.sharding)


def apply(image: jax.Array, mix: Mix, scale: int) -> jax.Array:
  """Mixes the images of a batch.

  Args:
    image: float [N, H, W, C].
    mix: how.
    scale: the size of these images divided by that of the LR images, in whose pixels boxes are.

  Returns:
    The same shape. What is not mixed stays as it is, to the bit.
  """
  other = image[mix.partner]
  share = mix.share[:, None, None, None]
  blended = share * image + (1 - share) * other
  rows = jnp.arange(image.shape[1])[None] // scale
  columns = jnp.arange(image.shape[2])[None] // scale
  within = _inside(rows, mix.top, mix.height)[:, :, None]
  within &= _inside(columns, mix.left, mix.width)[:, None]
  return jnp.where(within[..., None], other, jnp.where(share == 1, image, blended))


def _side(part: jax.Array, share: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """First pixel and length of a box along a side, around a place and cut at the borders."""
  whole = jnp.floor(share * length + 0.5).astype(jnp.int32)
  first = jnp.floor(part * length).astype(jnp.int32) - whole // 2
  low, high = jnp.maximum(first, 0), jnp.minimum(first + whole, length)
  return low, high - low


def _inside(places: jax.Array, first: jax.Array, length: jax.Array) -> jax.Array:
  return (places >= first[:, None]) & (places < (first + length)[:, None])
