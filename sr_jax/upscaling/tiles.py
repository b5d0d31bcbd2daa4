"""An image cut into tiles, upscaled, and joined."""

from collections.abc import Callable

import numpy as np

from sr_jax.upscaling import upscaler

OVERLAP = 32  # LR pixels around a tile that are upscaled too and thrown away
TILE = 448  # with its overlap one of the sizes that images are padded to
WHOLE = 1_000_000  # LR pixels up to which an image is upscaled at once by default


def upscale_tiled(
  upscale: upscaler.Upscaler,
  lr: np.ndarray,
  scale: int,
  tile: int,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
  """Upscales an image tile by tile, each with 32 LR pixels of its surroundings.

  Not exactly the untiled image: RRDBNet with 23 blocks looks at some 348 LR pixels around each, so
  far context is cut. With as large an overlap as a network's reach it would be exact.

  Args:
    upscale: of `upscaler.make_upscaler`.
    lr: uint8 [h, w, 3] or [h, w].
    scale: of the model.
    tile: side in LR pixels.
    progress: called with the number of tiles done and of all.

  Returns:
    uint8 [h*scale, w*scale, ...].
  """
  height, width = lr.shape[:2]
  sr = np.zeros((height * scale, width * scale, *lr.shape[2:]), np.uint8)
  corners = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
  for done, (top, left) in enumerate(corners, 1):
    y, x = max(top - OVERLAP, 0), max(left - OVERLAP, 0)
    bottom, right = min(top + tile, height), min(left + tile, width)
    piece = upscale(lr[y : bottom + OVERLAP, x : right + OVERLAP])
    sr[top * scale : bottom * scale, left * scale : right * scale] = piece[
      (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale
    ]
    progress(done, len(corners))
  return sr
