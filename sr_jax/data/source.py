"""Defines a source of images: their names, and a function that loads one of them."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sr_jax import UserError

Load = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Source:
  """A set of images that are not loaded yet.

  Attributes:
    set_name: what results call the set; it can be the name of a folder.
    names: the names of the images, all different.
    load: the function i -> (HR, LR or None), uint8 [H, W, 3] ([H, W] for grey files with
      `keep_grey`). It may be called from several threads, and is cheapest in ascending order. It
      raises UserError or OSError.
    has_lr: whether `load` returns LR images.
    fingerprint: JSON values that change when the files do: names, sizes, modification times.
    description: what logs and errors call the source.
    size: the function i -> height and width of the HR image from the file's header, (0, 0) where
      that cannot be read; None where sizes are only known by decoding.
    pack: the folder of the pack, where the source is a prepared pack; else None.
  """

  set_name: str
  names: tuple[str, ...]
  load: Load
  has_lr: bool
  fingerprint: list[Any]
  description: str
  size: Callable[[int], tuple[int, int]] | None = None
  pack: pathlib.Path | None = None

  def __post_init__(self):
    """Raises UserError where there is no image, or two have the same name."""
    if not self.names:
      raise UserError(f"{self.description}: there is no image in it")
    if len(set(self.names)) < len(self.names):
      twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
      raise UserError(f"{self.description}: two images are called {twice}; rename one of them")


def name_list(names: list[str], limit: int = 20) -> str:
  """Format names for an error: the first ones, one on each line, and how many more there are."""
  more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
  return "\n".join(f"  {name}" for name in [*names[:limit], *more])


def stamp_of(path: pathlib.Path) -> tuple[int, int]:
  """Returns a file's size in bytes and the time of its last change in nanoseconds."""
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns
