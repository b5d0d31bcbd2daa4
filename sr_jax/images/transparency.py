"""Gives transparent pixels the colours of their visible neighbours."""

import numpy as np
import scipy.ndimage

ROWS = 512  # to work on at a time
AROUND = 64  # rows above and below in which neighbours are looked for


def bled(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
  """Replaces the colour of each fully transparent pixel by that of the nearest visible one.

  The colour that a file hides there is arbitrary, often black, and a network would draw it into the
  visible pixels at the edge.

  Args:
    color: [H, W] or [H, W, 3].
    alpha: [H, W], 0 where transparent.

  Returns:
    As `color`. Where no pixel within some rows is visible, the colour stays.
  """
  result = color.copy()
  for top in range(0, len(color), ROWS):
    first, last = max(top - AROUND, 0), min(top + ROWS + AROUND, len(color))
    hidden = alpha[first:last] == 0
    if hidden.all() or not hidden.any():
      continue
    rows, columns = scipy.ndimage.distance_transform_edt(
      hidden, return_distances=False, return_indices=True
    )
    inside = slice(top - first, top - first + ROWS)
    result[top : top + ROWS] = color[first:last][rows[inside], columns[inside]]
  return result
