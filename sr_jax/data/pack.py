"""A pack on the disk: decoded images in two flat files, opened as memory-mapped arrays.

`index.json` names the images and holds the sha256 of each; `hr.bin` and `lr.bin` are their pixels,
one after the other: RGB of 8 bits, or of 16 bits, little-endian. `packing.py` makes one.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

from absl import logging
import numpy as np
import tqdm

from sr_jax import UserError, printable
from sr_jax.data.source import name_list

MAX_BAD_FRACTION = 0.1  # the share of a source's images that may be unusable
FILES = ("hr.bin", "lr.bin", "index.json")


class SubImages(NamedTuple):
  """How large images are divided into overlapping squares: side and step in HR pixels."""

  size: int
  step: int


class Pack(NamedTuple):
  """Pairs of HR and LR images in two flat arrays, both uint8 or both uint16.

  Images may be windows of larger ones (sub-images), which are stored once.
  """

  hr: np.ndarray  # uint8 or uint16 [values], memory-mapped
  lr: np.ndarray
  hr_sizes: np.ndarray  # height and width, int32 [n, 2]
  lr_sizes: np.ndarray
  hr_offsets: np.ndarray  # first value in the flat array, int64 [n]
  lr_offsets: np.ndarray
  lr_pitch: np.ndarray  # LR pixels from one stored row to the next, int32 [n]; HR's: * scale
  names: tuple[str, ...]
  scale: int
  digest: str  # identifies names, sizes and pixels, wherever the data were copied to
  grey: tuple[bool, ...] = ()  # whether the file was grey; its three channels are then the same


def hr_image(pack: Pack, i: int) -> np.ndarray:
  """HR image i, [H, W, 3] of the pack's dtype, a view."""
  return hr_window(pack, i, 0, 0, *(int(side) for side in pack.hr_sizes[i]))


def lr_image(pack: Pack, i: int) -> np.ndarray:
  """LR image i, [H / scale, W / scale, 3] of the pack's dtype, a view."""
  return lr_window(pack, i, 0, 0, *(int(side) for side in pack.lr_sizes[i]))


def hr_window(pack: Pack, i: int, y: int, x: int, height: int, width: int) -> np.ndarray:
  """Part of HR image i, [height, width, 3] of the pack's dtype, a view."""
  pitch = int(pack.lr_pitch[i]) * pack.scale
  return _window(pack.hr, int(pack.hr_offsets[i]), pitch, y, x, height, width)


def lr_window(pack: Pack, i: int, y: int, x: int, height: int, width: int) -> np.ndarray:
  """Part of LR image i, [height, width, 3] of the pack's dtype, a view."""
  return _window(pack.lr, int(pack.lr_offsets[i]), int(pack.lr_pitch[i]), y, x, height, width)


def open_pack(folder: pathlib.Path, min_hr: int = 1) -> Pack:
  """Open a pack that is whole.

  Args:
    folder: the pack's folder.
    min_hr: images with a smaller side than this, in HR pixels, are left out.

  Returns:
    The pack, memory-mapped.

  Raises:
    UserError: the pack is damaged, or too many of its images are unusable.
  """
  if not is_whole(folder):
    raise UserError(f"{folder} is damaged: its files do not have the sizes in its index")
  index = read_index(folder)
  bad = bad_images(index, min_hr)
  if bad:
    logging.warning("left out %d images of %s:\n%s", len(bad), index["source"], _reasons(bad))
  entries = [entry for entry in index["images"] if entry["name"] not in bad]
  dtype = dtype_of(entries[0])
  width = dtype.itemsize
  pack = Pack(
    # Plain arrays over the maps: slices of a np.memmap are slow to make.
    hr=np.asarray(np.memmap(folder / "hr.bin", dtype, "r")),
    lr=np.asarray(np.memmap(folder / "lr.bin", dtype, "r")),
    hr_sizes=sizes_of([entry["hr"] for entry in entries]),
    lr_sizes=sizes_of([entry["lr"] for entry in entries]),
    hr_offsets=np.array([entry["hr_offset"] // width for entry in entries], np.int64),
    lr_offsets=np.array([entry["lr_offset"] // width for entry in entries], np.int64),
    lr_pitch=np.array([entry["lr"][1] for entry in entries], np.int32),
    names=tuple(entry["name"] for entry in entries),
    scale=index["scale"],
    digest=content_digest(index["scale"], entries, index["sub_images"]),
    grey=tuple(entry["grey"] for entry in entries),
  )
  return divide(pack, SubImages(*index["sub_images"])) if index["sub_images"] else pack


def read_index(folder: pathlib.Path) -> dict[str, Any]:
  """Read the manifest of a pack: what it was made from, and each image's place and sha256.

  Raises:
    OSError: there is no such file.
    UserError: it is not what `packing.py` writes. It may be a stranger's.
  """
  path = folder / "index.json"
  try:
    index = json.loads(path.read_text())
    _check_index(index)
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{path} is no index of a pack: {printable(repr(error))}") from error
  return {**index, "source": printable(index["source"], 2000)}  # it is only ever shown


def _check_index(index: Any) -> None:
  """Raises some error of Python's own if an index is not of the types of one.

  The images lie one after another, so that none can be said to lie outside of the files.
  """
  sub_images, ends = index["sub_images"], {"hr": 0, "lr": 0}
  sound = type(index["scale"]) is int and index["scale"] > 0
  sound &= all(type(index[key]) is str for key in ("key", "source", "convention"))
  sound &= all(type(x) is str for pair in index["unreadable"].items() for x in pair)
  if sub_images is not None:
    sound &= len(sub_images) == 2 and all(type(x) is int and x > 0 for x in sub_images)
  for entry in index["images"]:
    bits = entry.get("bits", 8)
    sound &= type(bits) is int and bits in (8, 16) and bits == index["images"][0].get("bits", 8)
    for key, end in ends.items():
      height, width = entry[key]
      sound &= type(height) is type(width) is type(entry[f"{key}_offset"]) is int
      sound &= height > 0 and width > 0 and entry[f"{key}_offset"] == end
      sound &= type(entry[f"{key}_sha256"]) is str
      ends[key] = end + byte_count(entry, key)
    sound &= type(entry["name"]) is str and type(entry["grey"]) is bool
  if not sound:
    raise ValueError("an entry has another type or place than one has")


def verify_pack(folder: pathlib.Path, threads: int = 1) -> list[str]:
  """Compare every image of a pack with its sha256, a piece of a file at a time.

  Args:
    folder: the pack's folder.
    threads: how many images are read at a time.

  Returns:
    What is wrong, one entry for each image or file at fault; [] for a sound pack.
  """
  try:
    entries = read_index(folder)["images"]
    ends = {
      key: entries[-1][f"{key}_offset"] + byte_count(entries[-1], key) for key in ("hr", "lr")
    }
  except (OSError, ValueError, LookupError, TypeError) as error:
    return [f"index.json cannot be read: {error!r}"]
  faults = []
  for key, end in ends.items():
    file = folder / f"{key}.bin"
    size = file.stat().st_size if file.exists() else 0
    if size != end:
      faults.append(f"{file.name} has {size} bytes, must have {end}")
  if not all((folder / f"{key}.bin").is_file() for key in ends):
    return faults
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    found = pool.map(functools.partial(_fault_of, folder), entries)
    bar = tqdm.tqdm(found, "verifying", len(entries), unit=" images", delay=2, disable=None)
    return faults + [fault for fault in bar if fault]


def _fault_of(folder: pathlib.Path, entry: dict[str, Any]) -> str:
  """Says what is wrong with an image of a pack, '' for a sound one."""
  try:
    wrong = []
    for key in ("hr", "lr"):
      with open(folder / f"{key}.bin", "rb") as file:
        if not pixels_match(file, entry, key):
          wrong.append(key.upper())
  except (LookupError, TypeError, ValueError) as error:
    return f"an entry of index.json is damaged: {error!r}"
  name = printable(str(entry["name"]))
  return f"{name}: {' and '.join(wrong)} pixels differ from their sha256" if wrong else ""


def divide(pack: Pack, sub_images: SubImages) -> Pack:
  """Divide the images of a pack into overlapping squares, row by row, as views.

  BasicSR's convention: one every `step` pixels, the last of a row or a column aligned to the
  border, `thresh_size` 0; `0001.png` becomes `0001_s001.png`, ... An image smaller than `size`
  along a side, which BasicSR does not cut, is taken whole along it.

  Args:
    pack: a pack of whole images.
    sub_images: size and step in HR pixels, multiples of the pack's scale.

  Returns:
    The pack of the squares, over the same bytes.
  """
  size, step = (side // pack.scale for side in sub_images)
  windows, names = [], []  # image, top, left, height and width in LR pixels
  for i, (name, (height, width)) in enumerate(zip(pack.names, pack.lr_sizes.tolist(), strict=True)):
    tops, lefts = window_starts(height, size, step), window_starts(width, size, step)
    corners = [(top, left) for top in tops for left in lefts]
    windows += [(i, top, left, min(size, height), min(size, width)) for top, left in corners]
    stem, suffix = os.path.splitext(name)
    names += [f"{stem}_s{number + 1:03d}{suffix}" for number in range(len(corners))]
  image, top, left, height, width = np.array(windows, np.int64).reshape(-1, 5).T
  pitch = pack.lr_pitch[image].astype(np.int64)
  lr_sizes = np.stack([height, width], axis=1).astype(np.int32)
  return pack._replace(
    hr_sizes=lr_sizes * pack.scale,
    lr_sizes=lr_sizes,
    hr_offsets=pack.hr_offsets[image] + (top * pitch * pack.scale + left) * pack.scale * 3,
    lr_offsets=pack.lr_offsets[image] + (top * pitch + left) * 3,
    lr_pitch=pack.lr_pitch[image],
    names=tuple(names),
    grey=tuple(pack.grey[i] for i in image) if pack.grey else (),
  )


def window_starts(side: int, size: int, step: int) -> list[int]:
  """Where the sub-images along a side begin: every `step`, and one at the border."""
  last = max(side - size, 0)
  return sorted({*range(0, last, step), last})


def _window(
  flat: np.ndarray, offset: int, pitch: int, y: int, x: int, height: int, width: int
) -> np.ndarray:
  size = flat.itemsize
  start = (offset + (y * pitch + x) * 3) * size
  strides = (pitch * 3 * size, 3 * size, size)
  return np.ndarray((height, width, 3), flat.dtype, flat, start, strides)


def sizes_of(shapes: Sequence[Sequence[int]]) -> np.ndarray:
  """Returns height and width of each shape (H, W, ...): int32 [n, 2]."""
  return np.array([shape[:2] for shape in shapes], np.int32).reshape(-1, 2)


def dtype_of(entry: dict[str, Any]) -> np.dtype:
  """Returns the dtype of an image's pixels by its entry in the index, which has "bits" for 16."""
  return np.dtype("<u2" if entry.get("bits") == 16 else np.uint8)


def byte_count(entry: dict[str, Any], key: str) -> int:
  """Returns the bytes that the image 'hr' or 'lr' of an entry in the index takes in its file."""
  height, width = entry[key]
  return height * width * 3 * dtype_of(entry).itemsize


def sha256(image: np.ndarray) -> str:
  """Returns the sha256 of an image's pixels [H, W, 3], row by row, in hex."""
  return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


def content_digest(
  scale: int, entries: list[dict[str, Any]], sub_images: Sequence[int] | None
) -> str:
  """Returns a digest of the images themselves, wherever they were read from."""
  keys = ("name", "hr", "lr", "hr_sha256", "lr_sha256")
  content = [scale, [[entry[key] for key in keys] for entry in entries], sub_images]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def pixels_match(file: BinaryIO, entry: dict[str, Any], key: str) -> bool:
  """Whether an image's pixels in hr.bin or lr.bin have the sha256 that the index gives.

  Args:
    file: hr.bin or lr.bin, open for reading.
    entry: the image's entry in index.json.
    key: 'hr' or 'lr', as the file.
  """
  file.seek(entry[f"{key}_offset"])
  left, digest = byte_count(entry, key), hashlib.sha256()
  while left > 0 and (piece := file.read(min(left, 2**20))):
    digest.update(piece)
    left -= len(piece)
  return left == 0 and digest.hexdigest() == entry[f"{key}_sha256"]


def named_by(shape: Sequence[int]) -> str:
  """Formats a shape (H, W, ...) as WxH, for people."""
  return f"{shape[1]}x{shape[0]}"


def is_whole(folder: pathlib.Path, key: str = "") -> bool:
  """Whether a folder is a pack with files of the right sizes, made from `key` if one is given."""
  try:
    index = read_index(folder)
    last = index["images"][-1]
    return (not key or key == index["key"]) and all(
      (folder / f"{part}.bin").stat().st_size == last[f"{part}_offset"] + byte_count(last, part)
      for part in ("hr", "lr")
    )
  except (OSError, ValueError, LookupError, TypeError):
    return False


class SmallImages(UserError):
  """The error of images of which too many are smaller than the crop.

  Attributes:
    side: the largest side of crops with which few enough are.
  """

  def __init__(self, message: str, side: int):
    super().__init__(message)
    self.side = side


def bad_images(index: dict[str, Any], min_hr: int) -> dict[str, str]:
  """Returns {name: reason} of the images that cannot be trained on.

  Raises:
    UserError: more than MAX_BAD_FRACTION of the images are among them; SmallImages if they would
      not be with smaller crops.
  """
  small = {
    entry["name"]: f"{named_by(entry['hr'])} pixels, smaller than {min_hr}x{min_hr}"
    for entry in index["images"]
    if min(entry["hr"]) < min_hr
  }
  bad = index["unreadable"] | small
  count = len(index["images"]) + len(index["unreadable"])
  total = index.get("out_of") or count  # of a folder from which some are held out
  if len(bad) > MAX_BAD_FRACTION * total or len(bad) == count:
    message = (
      f"{len(bad)} of {total} images of {index['source']} are unusable, and at most "
      f"{MAX_BAD_FRACTION:.0%} may be; remove them, or take smaller crops where they are too small "
      f"to train on:\n{_reasons(bad)}"
    )
    spare = min(int(MAX_BAD_FRACTION * total), count - 1) - len(index["unreadable"])
    sides = sorted(min(entry["hr"]) for entry in index["images"])
    if 0 <= spare < len(sides):
      raise SmallImages(message, sides[spare])
    raise UserError(message)
  return bad


def _reasons(bad: dict[str, str]) -> str:
  return name_list([f"{name}: {reason}" for name, reason in bad.items()])


# The version of the packs' format, by the bits of their images. Version 4 adds "bits" to version 3.
FORMATS = {8: 3, 16: 4}


def is_pack(folder: pathlib.Path) -> bool:
  """Whether a folder is a pack, whole or damaged, as `packing.py` makes it."""
  return (folder / "index.json").is_file() and (folder / "hr.bin").is_file()
