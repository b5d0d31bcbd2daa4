"""Estimates what decoding a source takes: megapixels, room on the disk, memory."""

from typing import NamedTuple

from sr_jax.data.source import Source
from sr_jax.machine import cpus


class Cost(NamedTuple):
  """What the decoding of a source takes, estimated from the headers of its files."""

  images: int  # number of images
  pixels: int  # pixels of all HR images together
  disk_bytes: int  # bytes of the pack
  ram_bytes: int  # bytes of memory, at most, with the given number of threads


def decoding_threads() -> int:
  """Returns how many threads decode by default: one for each CPU, at most 16."""
  return min(16, cpus.available())


def decoding_cost(source: Source, scale: int, threads: int = 0, bits: int = 0) -> Cost | None:
  """Estimate what decoding a source takes, from its files' headers.

  Args:
    source: what `open_source` returned.
    scale: HR size / LR size.
    threads: the number of threads that decode; 0 for one per CPU, at most 16.
    bits: of the pack, 8 or 16; 0 for those that the files have.

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
  pixel = 3 * (bits or (16 if source.deep_images(1) else 8)) // 8  # bytes
  waiting, working = pixel + pixel / scale**2, 2 * pixel + 3 * 8 * 3 / scale
  ram = max(pixels) * ((2 * threads + 2) * waiting + threads * working)
  disk = sum(pixel * n + pixel * (n // scale**2) for n in pixels)
  return Cost(len(sizes), sum(pixels), disk, int(ram))
