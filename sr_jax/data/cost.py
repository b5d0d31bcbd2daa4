"""What decoding a source takes: megapixels, room on the disk, memory."""

from typing import NamedTuple

from sr_jax.data.source import Source
from sr_jax.machine import cpus


class Cost(NamedTuple):
  """What the decoding of a source takes, from the headers of its files."""

  images: int
  pixels: int  # of HR
  disk_bytes: int  # of the pack
  ram_bytes: int  # at most, with the given number of threads


def decoding_threads() -> int:
  """How many threads decode by default."""
  return min(16, cpus.available())


def decoding_cost(source: Source, scale: int, threads: int = 0) -> Cost | None:
  """Estimate what decoding a source takes, from its files' headers.

  Args:
    source: of `open_source`.
    scale: HR size / LR size.
    threads: as for `write_pack`.

  Returns:
    The cost; None where the source cannot say sizes without decoding (TFDS).
  """
  if source.size is None:
    return None
  sizes = [source.size(i) for i in range(len(source.names))]
  pixels = [height * width for height, width in sizes]
  threads = threads or decoding_threads()
  # Decoded pairs wait for their turn; a thread at work holds Pillow's copy, and `imresize` works
  # on a shrunk image in float64, with a copy of each tap.
  waiting, working = 3 + 3 / scale**2, 3 + 3 + 3 * 8 * 3 / scale
  ram = max(pixels) * ((2 * threads + 2) * waiting + threads * working)
  disk = sum(3 * n + 3 * (n // scale**2) for n in pixels)
  return Cost(len(sizes), sum(pixels), disk, int(ram))
