"""How much detail there is where in the images, so that crops can be drawn by it.

Photographs have skies and walls, and soft ones little else. A crop that is the best of several
places, by the detail in it, shows the network more of what it has to learn. Detail is the sum of
the differences of neighbouring LR pixels, counted in blocks of 8x8, and looked up in a table of
sums (Crow, 1984) by integers alone: numpy and jax.numpy choose the same crops, bit for bit.
"""

from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from sr_jax.data.pack import Pack, lr_image
from sr_jax.images.files import to_8_bits

BLOCK = 8  # side in LR pixels
Array = Any  # an array of numpy or of jax.numpy


class Detail(NamedTuple):
  """Tables of sums of all images, one after the other.

  Attributes:
    sums: uint32 [entries]. Entry (i, j) of an image's table is the detail above and left of its
      block (i, j); there is one row and one column more than blocks. The sums wrap at 2^32, and so
      do the differences that are taken of them.
    first: where each image's table begins in `sums`, int32 [n].
    pitch: entries in a row of each image's table, int32 [n].
    rows: rows of each image's table, int32 [n].
  """

  sums: Array
  first: Array
  pitch: Array
  rows: Array


def measure(pack: Pack) -> Detail:
  """Measures the detail of every LR image of a pack, in a 16th of a byte for each pixel.

  Of 16 bits the upper 8 count, so that no sum of a crop wraps.
  """
  tables = [_table(to_8_bits(lr_image(pack, i))) for i in range(len(pack.names))]
  sizes = np.array([table.size for table in tables], np.int64)
  return Detail(
    sums=np.concatenate([table.reshape(-1) for table in tables]),
    first=(np.cumsum(sizes) - sizes).astype(np.int32),
    pitch=np.array([table.shape[1] for table in tables], np.int32),
    rows=np.array([table.shape[0] for table in tables], np.int32),
  )


def of_crops(
  xp: ModuleType, detail: Detail, image: Array, y: Array, x: Array, lr_patch: int
) -> Array:
  """Looks up how much detail there is in crops.

  Args:
    xp: numpy, or jax.numpy inside a jitted function; the result is the same.
    detail: of the pack.
    image: index into the pack, int32 [N].
    y: top row of the crop in LR pixels, int32 [N].
    x: left column, int32 [N].
    lr_patch: side of the crop in LR pixels.

  Returns:
    uint32 [N], to compare crops of one image with: the detail of the whole blocks nearest to the
    crop, as many for every crop of a size.
  """
  side = max(1, lr_patch // BLOCK)
  corners = []
  for start, entries in ((y, detail.rows[image]), (x, detail.pitch[image])):
    last = entries - 1  # blocks
    wide = xp.minimum(side, last)
    low = xp.minimum((start + BLOCK // 2) // BLOCK, last - wide)
    corners.append((low, low + wide))
  (top, bottom), (left, right) = corners
  first, pitch = detail.first[image], detail.pitch[image]

  def at(row, column):
    return detail.sums[first + row * pitch + column]

  return at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)


def _table(lr: np.ndarray) -> np.ndarray:
  """The table of sums of one LR image [h, w, 3]: uint32 [h / 8 + 1, w / 8 + 1], rounded up."""
  grey = lr.astype(np.int32).sum(axis=2)
  change = np.zeros(grey.shape, np.int64)
  change[:, 1:] += np.abs(np.diff(grey, axis=1))
  change[1:] += np.abs(np.diff(grey, axis=0))
  height, width = (-(-side // BLOCK) for side in grey.shape)
  change = np.pad(change, [(0, height * BLOCK - len(change)), (0, width * BLOCK - change.shape[1])])
  blocks = change.reshape(height, BLOCK, width, BLOCK).sum(axis=(1, 3))
  table = np.zeros((height + 1, width + 1), np.int64)
  table[1:, 1:] = blocks.cumsum(axis=0).cumsum(axis=1)
  return table.astype(np.uint32)  # modulo 2^32
