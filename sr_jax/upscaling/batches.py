"""Tiles that wait for others of their shape, so that an accelerator computes several at once."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Shape = tuple[int, int]


def in_batches(
  start: Callable[[Sequence[np.ndarray], Shape], Callable[[int], Any]], size: int
) -> Callable[[np.ndarray, Shape], Callable[[], Any]]:
  """Makes a function of one tile from a function of several.

  Args:
    start: (tiles, shape) -> results: starts to compute one to `size` tiles by the program for
      images of `shape`, and returns what waits for the result of the i-th tile.
    size: how many tiles a batch has. The last one may have fewer.

  Returns:
    (tile, shape) -> pending. A batch is started once it is full, or when one of its results is
    asked for by calling `pending`. If that fails, it is started again for the next result.
  """
  waiting: dict[Shape, tuple[list[np.ndarray], list[Callable[[int], Any]]]] = {}

  def run(tile: np.ndarray, shape: Shape) -> Callable[[], Any]:
    batch = waiting.setdefault(shape, ([], []))
    tiles, results = batch
    place = len(tiles)
    tiles.append(tile)

    def begin() -> None:
      if waiting.get(shape) is batch:
        del waiting[shape]
      if not results:
        results.append(start(tiles, shape))

    def pending() -> Any:
      begin()
      return results[0](place)

    if len(tiles) == size:
      begin()
    return pending

  return run
