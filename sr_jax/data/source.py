"""Defines a source of images: their names, and a function that loads one of them."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sr_jax import UserError, printable

Load = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


class Flags(NamedTuple):
  """What the settings of a source are called where they were given, for errors."""

  source: str = "--data"
  lr: str = "--lr"
  scale: str = "--scale"


@dataclasses.dataclass(frozen=True)
class Source:
  """A set of images that are not loaded yet.

  Attributes:
    set_name: what results call the set; it can be the name of a folder.
    names: the names of the images, all different.
    load: the function i -> (HR, LR or None), [H, W, 3] ([H, W] for grey files with `keep_grey`),
      each uint8, or uint16 where its file has 16 bits. It may be called from several threads, and
      is cheapest in ascending order. It raises UserError or OSError.
    has_lr: whether `load` returns LR images.
    fingerprint: JSON values that change when the files do: names, sizes, modification times.
    description: what logs and errors call the source.
    size: the function i -> height and width of the HR image from the file's header, (0, 0) where
      that cannot be read; None where sizes are only known by decoding.
    pack: the folder of the pack, where the source is a prepared pack; else None.
    stamps: for each image a text that changes when its files do, by which an image that was decoded
      for another source is known again; None where there are none.
    out_of: how many images there were before some were held out; 0 where none were.
    pairs: the function i -> the files of image i and of its LR image; None where there are none.
    bits: the function i -> 16 where a file of image i has 16 bits, else 8; None where all have 8.
  """

  set_name: str
  names: tuple[str, ...]
  load: Load
  has_lr: bool
  fingerprint: list[Any]
  description: str
  size: Callable[[int], tuple[int, int]] | None = None
  pack: pathlib.Path | None = None
  stamps: tuple[str, ...] | None = None
  out_of: int = 0
  pairs: Callable[[int], tuple[pathlib.Path, pathlib.Path] | None] | None = None
  bits: Callable[[int], int] | None = None

  def deep_images(self, enough: int = 0) -> int:
    """Counts the images of 16 bits by their headers, and stops at `enough` of them; 0: at none."""
    deep = (i for i in range(len(self.names)) if self.bits and self.bits(i) == 16)
    return sum(1 for _ in itertools.islice(deep, enough or None))

  def __post_init__(self):
    """Raises UserError where there is no image, or two have the same name."""
    if not self.names:
      raise UserError(f"{self.description}: there is no image in it")
    if len(set(self.names)) < len(self.names):
      twice = next(name for i, name in enumerate(self.names) if name in self.names[:i])
      raise UserError(f"{self.description}: two images are called {twice}; rename one of them")


def hold_out(
  source: Source, every: int, flag: str = "--config.data.hold_out"
) -> tuple[Source, Source]:
  """Divides a source into images to train on and images that are held out.

  Args:
    source: at least two images.
    every: every N-th image in the order of names is held out, at least one.
    flag: what `every` was given as, for the errors.

  Returns:
    The images to train on, and those that are held out.

  Raises:
    UserError: there is one image only, or the source is a prepared pack.
  """
  if source.pack is not None:
    raise UserError(
      f"{source.description}: of a prepared pack no images can be held out; give the folder of "
      f"the images, or {flag}=0"
    )
  count = len(source.names)
  if count < 2:
    raise UserError(
      f"{source.description}: of one image none can be held out; give more, or {flag}=0"
    )
  held = list(range(every - 1, count, every)) or [count - 1]
  if len(held) == count:
    held = held[1:]
  rest = sorted(set(range(count)) - set(held))
  return _subset(source, rest, "but those held out"), _subset(source, held, "held out")


def _subset(source: Source, indices: list[int], which: str) -> Source:
  size, load, bits = source.size, source.load, source.bits
  return Source(
    set_name=source.set_name,
    names=tuple(source.names[i] for i in indices),
    load=lambda i: load(indices[i]),
    has_lr=source.has_lr,
    fingerprint=[source.fingerprint, indices],
    description=f"{source.description} ({len(indices)} images {which})",
    size=size and (lambda i: size(indices[i])),
    stamps=source.stamps and tuple(source.stamps[i] for i in indices),
    out_of=len(source.names),
    bits=bits and (lambda i: bits(indices[i])),
  )


def name_list(names: list[str], limit: int = 20) -> str:
  """Format names for an error: the first ones, one on each line, and how many more there are."""
  more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
  return "\n".join(f"  {printable(name, 500)}" for name in [*names[:limit], *more])


def stamp_of(path: pathlib.Path) -> tuple[int, int]:
  """Returns a file's size in bytes and the time of its last change in nanoseconds.

  Of a file that cannot be asked, such as a link to nothing, both are -1: reading it will tell.
  """
  try:
    stat = path.stat()
  except OSError:
    return -1, -1
  return stat.st_size, stat.st_mtime_ns
