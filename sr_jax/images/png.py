"""Writes PNG row by row: 8 and 16 bit, still and animated, with every chunk that is asked for.

The packages that write PNG take whole images, or leave out profiles, 16 bit or animation
(docs/upscaling.md). A PNG is little more than zlib's stream of rows, so it is written here. It is
also how rows get into libvips, which reads a stream and writes JPEG, WebP and AVIF.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
# What is kept of a PNG as it stands: its text, and what its numbers mean.
KEPT = (b"tEXt", b"zTXt", b"iTXt", b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"pHYs")
_LONGEST = 2**24  # bytes of a kept chunk


def encode(
  frames: Sequence[Iterable[np.ndarray]],
  shape: tuple[int, int, int],
  dtype: np.dtype,
  *,
  chunks: Iterable[tuple[bytes, bytes]] = (),
  durations: Sequence[float] = (),
  loop: int = 0,
  poster: bool = False,
  level: int = 6,
) -> Iterator[bytes]:
  """Encodes an image, or an animation, as the bytes of a PNG.

  Args:
    frames: for each frame strips of rows, [n, W, C], from the top down.
    shape: H, W, C of every frame; C is 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA).
    dtype: uint8 or uint16.
    chunks: (name, data), to stand before the pixels.
    durations: of the frames, in milliseconds.
    loop: how often an animation is shown, 0 for without end.
    poster: whether the first frame is not part of the animation.
    level: of zlib; 0 stores the rows as they are.
  """
  height, width, channels = shape
  depth = 8 * np.dtype(dtype).itemsize
  yield SIGNATURE
  yield chunk(
    b"IHDR", struct.pack(">IIBBBBB", width, height, depth, _COLOR_TYPES[channels], 0, 0, 0)
  )
  animated = len(frames) > 1
  if animated:
    yield chunk(b"acTL", struct.pack(">II", len(frames) - poster, loop))
  for name, data in chunks:
    yield chunk(name, data)
  sequence = 0
  for number, strips in enumerate(frames):
    if animated and not (poster and number == 0):
      ms = round(durations[number]) if durations else 0
      delay = (ms, 1000) if ms < 65536 else (min(ms // 1000, 65535), 1)
      yield chunk(b"fcTL", struct.pack(">IIIIIHHBB", sequence, width, height, 0, 0, *delay, 0, 0))
      sequence += 1
    for data in _compressed(strips, channels * depth // 8, level):
      if number == 0:
        yield chunk(b"IDAT", data)
      else:
        yield chunk(b"fdAT", struct.pack(">I", sequence) + data)
        sequence += 1
  yield chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
  """Returns the bytes of a chunk: length, name, data, checksum."""
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def profile_chunk(icc: bytes) -> tuple[bytes, bytes]:
  """Returns the chunk of a colour profile."""
  return b"iCCP", b"ICC profile\x00\x00" + zlib.compress(icc)


def text_chunk(keyword: str, text: str) -> tuple[bytes, bytes]:
  """Returns the chunk of a text in UTF-8."""
  return b"iTXt", keyword.encode("latin-1") + b"\x00\x00\x00\x00\x00" + text.encode()


def read_chunks(file: io.BufferedIOBase) -> dict[bytes, list[bytes]]:
  """Reads the chunks of KEPT, eXIf and the header of an opened PNG, without its pixels."""
  found: dict[bytes, list[bytes]] = {}
  file.seek(8)
  for _ in range(1_000_000):
    head = file.read(8)
    if len(head) < 8:
      break
    length, name = int.from_bytes(head[:4], "big"), head[4:]
    if name in (*KEPT, b"eXIf", b"IHDR") and length <= _LONGEST:
      found.setdefault(name, []).append(file.read(length))
      file.seek(4, os.SEEK_CUR)
    else:
      file.seek(length + 4, os.SEEK_CUR)
    if name == b"IEND":
      break
  return found


def _compressed(strips: Iterable[np.ndarray], pixel: int, level: int) -> Iterator[bytes]:
  """Filters rows and compresses them, in pieces; `pixel` is the number of bytes of a pixel."""
  packer, above = zlib.compressobj(level), None
  for strip in strips:
    rows = np.ascontiguousarray(strip, strip.dtype.newbyteorder(">"))
    rows = rows.view(np.uint8).reshape(len(strip), -1)
    for first in range(0, len(rows), 64):  # a few rows at a time: filters need copies of them
      part = rows[first : first + 64]
      data = packer.compress(_filtered(part, above, pixel, level))
      above = part[-1].copy()
      if data:
        yield data
  yield packer.flush()


def _filtered(rows: np.ndarray, above: np.ndarray | None, pixel: int, level: int) -> bytes:
  """Returns rows, each behind its filter's number: the one that makes every eighth the smallest."""
  number = 0
  if level:
    up = np.concatenate([np.zeros_like(rows[:1]) if above is None else above[None], rows[:-1]])
    left, corner = (np.pad(x, ((0, 0), (pixel, 0)))[:, :-pixel] for x in (rows, up))
    sizes = {}
    for candidate, predict in _PREDICTED.items():
      rest = rows[::8] - predict(left[::8], up[::8], corner[::8])
      sizes[candidate] = abs(rest.view(np.int8).astype(np.int16)).sum()
    number = min(sizes, key=sizes.get)
    rows = rows - _PREDICTED[number](left, up, corner)
  return np.pad(rows, ((0, 0), (1, 0)), constant_values=number).tobytes()


def _paeth(left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
  a, b, c = (x.astype(np.int16) for x in (left, up, corner))
  to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
  return np.where((to_a <= to_b) & (to_a <= to_c), left, np.where(to_b <= to_c, up, corner))


# PNG's filters (its specification, section 9): what a byte is predicted to be, of the bytes before
# it, above it and before that.
_PREDICTED = {
  0: lambda left, up, corner: np.uint8(0),
  1: lambda left, up, corner: left,
  2: lambda left, up, corner: up,
  4: _paeth,
}
