"""Planar images as blocks of 8x8 pixels, so that blurs and JPEG's transform are matrix products."""

import jax

SIDE = 8  # of a block, in pixels


def to_blocks(image: jax.Array) -> jax.Array:
  """Cuts [C, H, W] into blocks, [C, H / 8, W / 8, 64]; the sides must be multiples of 8."""
  c, h, w = image.shape
  blocks = image.reshape(c, h // SIDE, SIDE, w // SIDE, SIDE)
  return blocks.swapaxes(2, 3).reshape(c, h // SIDE, w // SIDE, SIDE * SIDE)


def from_blocks(blocks: jax.Array) -> jax.Array:
  """Joins the blocks of `to_blocks` to [C, H, W]."""
  c, rows, columns, _ = blocks.shape
  image = blocks.reshape(c, rows, columns, SIDE, SIDE).swapaxes(2, 3)
  return image.reshape(c, rows * SIDE, columns * SIDE)


def round_up(size: int, multiple: int) -> int:
  """The smallest multiple that is not less than a size."""
  return -(-size // multiple) * multiple
