"""What every source of images is: names, and a function that loads one of them."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

Load = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Source:
  """A set of images that are not loaded yet.

  Attributes:
    set_name: what results call the set, fit for a folder's name.
    names: of the images, unique.
    load: i -> (HR, LR or None), uint8 [H, W, 3] ([H, W] for grey files with `keep_grey`). May be
      called from several threads; cheapest in ascending order. Raises UserError or OSError.
    has_lr: whether `load` gives LR images.
    fingerprint: JSON values that change when the files do: names, sizes, modification times.
    description: for logs and errors.
    size: i -> height and width of HR from the file's header, (0, 0) where it has none; None where
      that needs decoding.
    pack: folder of the pack that the source is.
  """

  set_name: str
  names: tuple[str, ...]
  load: Load
  has_lr: bool
  fingerprint: list[Any]
  description: str
  size: Callable[[int], tuple[int, int]] | None = None
  pack: pathlib.Path | None = None


def name_list(names: list[str], limit: int = 20) -> str:
  """Format names for an error: the first ones, one a line, and how many more there are."""
  more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
  return "\n".join(f"  {name}" for name in [*names[:limit], *more])


def stamp_of(path: pathlib.Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns
