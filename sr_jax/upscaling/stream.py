"""Upscales an image of any size tile by tile, as strips of rows that come out from the top down.

The image is in memory, its result never is: a file of 100 megapixels becomes one of 1,600. How it
is cut depends on the image alone. Programs have few shapes, and a tile is padded to one of them;
padding changes no result (`networks/masking.py`).
"""

import collections
import fractions
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sr_jax import UserError
from sr_jax.images import resize
from sr_jax.images import transparency
from sr_jax.images.picture import WHITE, Frame
from sr_jax.images.writing import evenly
from sr_jax.upscaling.network import Network, Pending, make_tile_function
from sr_jax.upscaling.upscaler import bucket

TILE = 448  # LR pixels a side; with the surroundings of 32 on each side it is 512
OVERLAP = 32  # LR pixels around a tile that are upscaled too and thrown away
WHOLE = 1_000_000  # LR pixels up to which an image is upscaled at once, where there is memory
SMALLEST = 16
PROGRAMS = 3  # of JAX, in a run
_ROUNDED = 32  # programs' sides are multiples of it, so that they are found again in the cache
_COMPARED = 30  # shapes, each with each other
_STRIP_BYTES = 256_000_000  # of the result of a row of tiles, of RGB with 16 bits


class Tiling(NamedTuple):
  """How images are cut.

  Attributes:
    tile: side of tiles in LR pixels.
    overlap: of their surroundings.
    whole: LR pixels up to which an image is not cut.
    row: LR pixels up to which the tiles of a row are as high as wide; of wider images they are
      lower, since a row's result is kept until it is complete.
  """

  tile: int = TILE
  overlap: int = OVERLAP
  whole: int = WHOLE
  row: int = _STRIP_BYTES // (6 * 4 * 4)


class Axis(NamedTuple):
  """How one axis is cut: pieces of `size` pixels from `starts`, joined at `joints`.

  The first joint is 0, the last one the length of the axis; of piece i what lies between joints i
  and i+1 is kept.
  """

  size: int
  starts: tuple[int, ...]
  joints: tuple[int, ...]


def fitting(network: Network, budget: int, overlap: int = OVERLAP) -> Tiling:
  """Chooses how to cut images so that tiles need no more than `budget` bytes."""
  pixels = budget // network.pixel_bytes
  side = int(pixels**0.5) // _ROUNDED * _ROUNDED - 2 * overlap
  row = _STRIP_BYTES // (6 * network.scale**2)
  return Tiling(max(min(side, TILE), SMALLEST), overlap, min(WHOLE, pixels), row)


def smaller(tiling: Tiling) -> Tiling:
  """Halves the tiles, after the memory did not suffice."""
  tile = max(tiling.tile // 2, SMALLEST)
  return tiling._replace(tile=tile, whole=min(tiling.whole // 4, (tile + 2 * tiling.overlap) ** 2))


def cut(height: int, width: int, tiling: Tiling, multiple: int = 1) -> tuple[Axis, Axis]:
  """Cuts an image; whether and where depends on its size alone.

  Args:
    height, width: in LR pixels, multiples of `multiple`.
    tiling: how.
    multiple: what all sizes and places are multiples of.
  """
  # A long image is cut too, or one program for it and for a high one would be large.
  if height * width <= tiling.whole and max(height, width) ** 2 <= 1.7 * tiling.whole:
    return Axis(height, (0,), (0, height)), Axis(width, (0,), (0, width))
  lower = min(tiling.tile, max(tiling.row // width, SMALLEST))
  low, tile, overlap = (-(-n // multiple) * multiple for n in (lower, tiling.tile, tiling.overlap))
  return _cut_axis(height, low, overlap, multiple), _cut_axis(width, tile, overlap, multiple)


def _cut_axis(length: int, tile: int, overlap: int, multiple: int) -> Axis:
  if length <= tile + 2 * overlap:
    return Axis(length, (0,), (0, length))
  count = -(-(length - 2 * overlap) // tile)
  core = -(-(length - 2 * overlap) // (count * multiple)) * multiple  # all tiles are as large
  count = -(-(length - 2 * overlap) // core)
  size = core + 2 * overlap
  starts = (*(i * core for i in range(count - 1)), length - size)
  joints = (0, *(i * core + overlap for i in range(1, count)), length)
  return Axis(size, starts, joints)


def programs(
  sizes: Iterable[tuple[int, int]], network: Network, tiling: Tiling, count: int = PROGRAMS
) -> list[tuple[int, int]]:
  """Chooses the shapes of the programs for images of known sizes: few, and little larger.

  Args:
    sizes: height and width of each image of a run, in LR pixels.
    network: that is to be compiled.
    tiling: how images are cut.
    count: of programs, at most.
  """
  if network.any_shape:
    return []
  needed: list[tuple[tuple[int, int], int]] = []
  for height, width in sizes:
    rows, columns = cut(*_even((height, width), network.multiple), tiling, network.multiple)
    needed.append(((rows.size, columns.size), len(rows.starts) * len(columns.starts)))
  step, tiles = _step(network.multiple), {}
  while not tiles or len(tiles) > _COMPARED:  # of many sizes, those that are alike are taken as one
    tiles = {}
    for (height, width), number in needed:
      shape = -(-height // step) * step, -(-width // step) * step
      tiles[shape] = tiles.get(shape, 0) + number
    if not needed:
      return []
    step *= 2

  def waste(a: tuple[int, int], b: tuple[int, int]) -> int:
    area = max(a[0], b[0]) * max(a[1], b[1])
    return sum(tiles[s] * (area - s[0] * s[1]) for s in (a, b))

  while len(tiles) > count:  # the two whose tiles lose the least in one shape become one
    a, b = min(itertools.combinations(tiles, 2), key=lambda pair: waste(*pair))
    both = tiles.pop(a) + tiles.pop(b)
    merged = max(a[0], b[0]), max(a[1], b[1])
    tiles[merged] = tiles.get(merged, 0) + both
  return sorted(tiles)


def standing_programs(network: Network, tiling: Tiling) -> list[tuple[int, int]]:
  """Shapes of the programs for images of sizes that are not known yet, as a server gets them.

  Sides grow by a half and a third in turn (`upscaler.bucket`): few programs are ever compiled, and
  a tile is padded to 2.25 times its pixels at most.
  """
  if network.any_shape:
    return []
  longest = max(math.isqrt(int(1.7 * tiling.whole)), tiling.tile + 2 * tiling.overlap)
  sides = [bucket(1)]
  while sides[-1] < longest:
    sides.append(bucket(sides[-1] + 1))
  step = _step(network.multiple)
  return sorted(itertools.product(sorted({-(-side // step) * step for side in sides}), repeat=2))


def _step(multiple: int) -> int:
  return math.lcm(_ROUNDED, multiple)


def _rounded(shape: tuple[int, int], multiple: int) -> tuple[int, int]:
  step = _step(multiple)
  return tuple(-(-n // step) * step for n in shape)


def _even(size: tuple[int, int], multiple: int) -> tuple[int, int]:
  return tuple(-(-n // multiple) * multiple for n in size)


class Job(NamedTuple):
  """How frames are upscaled.

  Attributes:
    network: that upscales them.
    tiling: how they are cut.
    shapes: of the programs that may be used, as `programs` returns them.
    outscale: factor of the result, or None for the network's.
    ensemble: whether to take the mean over eight turned and mirrored tiles.
    progress: called with the number of tiles done and of all of a frame.
    notice: called with a sentence where something unusual happens.
  """

  network: Network
  tiling: Tiling = Tiling()
  shapes: Sequence[tuple[int, int]] = ()
  outscale: fractions.Fraction | None = None
  ensemble: bool = False
  progress: Callable[[int, int], None] = lambda done, total: None
  notice: Callable[[str], None] = lambda sentence: None


def output_size(height: int, width: int, job: Job) -> tuple[int, int]:
  """Height and width of what `upscale` makes of an image."""
  scale = job.outscale or job.network.scale
  return tuple(math.ceil(n * scale) for n in (height, width))


def upscale(frame: Frame, job: Job, channels: int, dtype: np.dtype) -> Iterator[np.ndarray]:
  """Upscales a frame.

  Args:
    frame: what to upscale. Its colours are taken as they are, full white as 1. Floats outside [0,
      1] are shifted and divided to lie in it, and put back.
    job: how.
    channels: of the result: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; no fewer than the frame has.
    dtype: of the result.

  Returns:
    Yields strips of rows [n, W, channels] from the top down. The first tiles are handed to the
    network at once, before a strip is asked for.

  Raises:
    UserError: the image or the network's output is not finite.
  """
  alpha = frame.alpha
  color, (low, high) = _seen(frame)
  white = WHITE[np.dtype(dtype)]

  def finish(sr: np.ndarray) -> np.ndarray:
    if white > 1:
      return np.floor(np.clip(sr, 0, 1) * white + 0.5).astype(dtype)
    if color.dtype.kind == "f":
      sr = sr * (high - low) + low
    return sr.astype(dtype)

  scale = fractions.Fraction(job.outscale or job.network.scale)

  def with_alpha(strips: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    top = 0
    for strip in strips:
      out = np.empty((*strip.shape[:2], channels), dtype)
      out[..., : 3 if channels > 2 else 1] = strip if strip.ndim == 3 else strip[..., None]
      if channels in (2, 4):
        out[..., -1] = _alpha_rows(alpha, scale, top, top + len(strip), white)
      top += len(strip)
      yield out

  return with_alpha(_colors(color, job, (low, high), finish, dtype))


def _seen(frame: Frame) -> tuple[np.ndarray, tuple[float, float]]:
  """What of a frame a network is to see, and which values it is to see as 0 and 1."""
  color = frame.color
  if color.dtype.kind == "f" and not np.isfinite(color).all():
    raise UserError(f"{(~np.isfinite(color)).sum()} values of the image are not finite numbers")
  if frame.alpha is not None:
    color = transparency.bled(color, frame.alpha)
  if color.ndim == 3 and _is_grey(color):
    color = np.ascontiguousarray(color[..., 0])  # in three channels, but without a colour
  if color.dtype.kind == "f":
    return color, (min(float(color.min()), 0.0), max(float(color.max()), 1.0))
  return color, (0.0, float(WHITE[color.dtype]))


def _is_grey(color: np.ndarray) -> bool:
  """Whether no pixel has a colour; looked at in parts, for a large image would need another."""
  parts = (color[top : top + 256] for top in range(0, len(color), 256))
  return all((part == part[..., :1]).all() for part in parts)


def _alpha_rows(
  alpha: np.ndarray | None, scale: fractions.Fraction, first: int, last: int, white: int
) -> np.ndarray | int:
  """Rows of the enlarged alpha; bicubic is enough: transparency has no texture to restore."""
  if alpha is None:
    return white
  rows = resize.resize_rows(alpha, scale, first, last) / WHITE[alpha.dtype]
  rows = np.clip(rows, 0, 1) * white
  return np.floor(rows + 0.5) if white > 1 else rows


def _colors(
  color: np.ndarray,
  job: Job,
  levels: tuple[float, float],
  finish: Callable[[np.ndarray], np.ndarray],
  dtype: np.dtype,
) -> Iterator[np.ndarray]:
  """Yields few rows at a time of the upscaled colours, [n, W] or [n, W, 3]."""
  scale = job.network.scale
  if job.outscale in (None, scale):
    return evenly(_tile_rows(color, job, levels, finish, dtype), 64)
  strips = evenly(_tile_rows(color, job, levels, np.asarray, np.float32), 32)
  factor = fractions.Fraction(job.outscale) / scale
  return map(finish, resize.resize_strips(strips, len(color) * scale, factor))


def _tile_rows(
  color: np.ndarray,
  job: Job,
  levels: tuple[float, float],
  finish: Callable[[np.ndarray], np.ndarray],
  dtype: np.dtype,
) -> Iterator[np.ndarray]:
  """Yields what each row of tiles makes; `levels` are the values that the network sees as 0, 1.

  The first tiles are handed to the network before a row is asked for.
  """
  scale, multiple = job.network.scale, job.network.multiple
  height, width = color.shape[:2]
  rows, columns = cut(*_even((height, width), multiple), job.tiling, multiple)
  parts = itertools.product(_pieces(rows), _pieces(columns))
  places = [(y, x) for (y, *_), (x, *_) in itertools.product(_pieces(rows), _pieces(columns))]
  size = rows.size, columns.size
  results = _results(
    (_tile(color, corner, size, levels) for corner in places), job, color.ndim == 2
  )

  def joined() -> Iterator[np.ndarray]:
    for done, (((y, first, last), (x, left, right)), sr) in enumerate(
      zip(parts, results, strict=True), 1
    ):
      last, right = min(last, height), min(right, width)
      if left == 0:
        strip = np.empty(((last - first) * scale, width * scale, *color.shape[2:]), dtype)
      sr = sr[(first - y) * scale : (last - y) * scale, (left - x) * scale : (right - x) * scale]
      strip[:, left * scale : right * scale] = finish(sr)
      job.progress(done, len(places))
      if right == width:
        yield strip

  return joined()


def _pieces(axis: Axis) -> list[tuple[int, int, int]]:
  """Where each piece of an axis starts, and from where to where it is kept."""
  return list(zip(axis.starts, axis.joints, axis.joints[1:], strict=False))


def _results(tiles: Iterable[np.ndarray], job: Job, grey: bool) -> Iterator[np.ndarray]:
  """Computes tiles; while a batch is fetched and used, the device computes the next one.

  Two batches are handed over at once, before a result is asked for.
  """
  compute = make_tile_function(job.network, grey, job.ensemble)
  tiles, started = iter(tiles), collections.deque()

  def start() -> None:
    for tile in itertools.islice(tiles, 2 * job.network.batch - len(started)):
      started.append((tile, compute(tile, _shape(tile.shape[:2], job), False)))

  def results() -> Iterator[np.ndarray]:
    while started:
      tile, pending = started.popleft()
      yield _finite(compute, tile, pending, job)
      start()

  start()
  return results()


def _tile(
  color: np.ndarray, corner: tuple[int, int], size: tuple[int, int], levels: tuple[float, float]
) -> np.ndarray:
  """A part of an image as the network sees it; what is beyond the border repeats it."""
  low, high = (np.float32(level) for level in levels)
  tile = color[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]]
  pads = [(0, size[0] - tile.shape[0]), (0, size[1] - tile.shape[1]), (0, 0)]
  tile = np.pad(tile, pads[: tile.ndim], mode="edge").astype(np.float32)
  return (tile - low) / (high - low)


def seams(frame: Frame, job: Job) -> str:
  """Measures what cutting an image changes along the cuts, and says so in a sentence.

  The two tiles at a cut are compared with one that has the cut in its middle, and so sees more of
  what is around. The cuts nearest to the image's middle are taken, one of each direction.
  """
  color, levels = _seen(frame)
  scale, multiple = job.network.scale, job.network.multiple
  rows, columns = cut(*_even(color.shape[:2], multiple), job.tiling, multiple)
  size = rows.size, columns.size
  squares, count, worst = 0.0, 0, 0.0
  for axis, cuts in enumerate((rows, columns)):
    if len(cuts.starts) == 1:
      continue
    i = len(cuts.starts) // 2
    joint, other = cuts.joints[i], (columns, rows)[axis]
    across = other.starts[len(other.starts) // 2]
    middle = max(min(joint - cuts.size // 2, color.shape[axis] - cuts.size), 0)
    middle = middle // multiple * multiple
    reach = min(job.tiling.overlap, cuts.size // 2) // 2

    def band(start: int, first: int, last: int, axis: int = axis, across: int = across):
      corner = (start, across) if axis == 0 else (across, start)
      (sr,) = _results([_tile(color, corner, size, levels)], job, color.ndim == 2)
      return np.take(
        np.clip(sr, 0, 1), range((first - start) * scale, (last - start) * scale), axis=axis
      )

    stitched = np.concatenate(
      [
        band(cuts.starts[i - 1], joint - reach, joint),
        band(cuts.starts[i], joint, joint + reach),
      ],
      axis=axis,
    )
    error = stitched - band(middle, joint - reach, joint + reach)
    squares, count = squares + float((error**2).sum()), count + error.size
    worst = max(worst, float(np.abs(error).max()))
  if not count:
    return "The image is upscaled at once: it has no seams."
  decibels = 10 * math.log10(count / squares) if squares else math.inf
  return (
    f"Along the seams the tiles differ from undivided ones by {worst * 255:.2g} of 255 at most, "
    f"{decibels:.1f} dB."
  )


def _shape(size: tuple[int, int], job: Job) -> tuple[int, int]:
  """The smallest program for a tile."""
  if job.network.any_shape:
    return size
  fit = [s for s in job.shapes if s[0] >= size[0] and s[1] >= size[1]]
  return min(fit, key=lambda s: s[0] * s[1]) if fit else _rounded(size, job.network.multiple)


def _finite(
  compute: Callable[..., Pending], tile: np.ndarray, pending: Pending, job: Job
) -> np.ndarray:
  """Waits for a tile, and computes it again by plain float32 if a value is not finite."""
  sr = pending()
  if np.isfinite(sr).all():
    return sr
  job.notice("The network's output was not finite; it was computed again in plain float32.")
  shape = _rounded(_shape(tile.shape[:2], job), job.network.multiple)
  sr = compute(tile, shape, True)()
  if not np.isfinite(sr).all():
    raise UserError(
      f"{(~np.isfinite(sr)).sum()} of {sr.size} values of the network's output are not finite; "
      "its weights may be damaged: see sr_jax.convert --inspect"
    )
  return sr
