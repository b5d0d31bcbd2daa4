"""Images decoded once and packed into flat files, so that training reads crops, not files.

A pack is a folder: `hr.bin` and `lr.bin`, the uint8 pixels of all images one after another, and
`index.json`, the manifest, that says where each is and has the sha256 of its pixels. The files are
memory-mapped: a pack may be much larger than memory. It lies in the cache, named by what it was
made from, or where `python -m sr_jax.prepare` was told to put it.

A pack is made in a folder beside its place, `NAME.partial`, with a journal of the images that are
in it: a build that was killed goes on with the next image. It appears under its final name only
when it is whole. Of several processes one decodes and the others wait.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

try:
  import fcntl
except ImportError:  # Windows: builds are then not resumed, nor do they wait for each other
  fcntl = None

import numpy as np
import tqdm
from absl import logging

from sr_jax import cli
from sr_jax import resize
from sr_jax.data.sources import FORMAT_VERSION, Source, name_list

MAX_BAD_FRACTION = 0.1  # of the images of a source that may be unusable
FILES = ("hr.bin", "lr.bin", "index.json")
JOURNAL = "journal.jsonl"


class SubImages(NamedTuple):
  """How large images are divided into overlapping squares, in HR pixels."""

  size: int
  step: int


class Pack(NamedTuple):
  """Pairs of HR and LR images in two flat uint8 arrays.

  Images may be windows of larger ones (sub-images), which are stored once.
  """

  hr: np.ndarray  # uint8 [bytes], memory-mapped
  lr: np.ndarray
  hr_sizes: np.ndarray  # height and width, int32 [n, 2]
  lr_sizes: np.ndarray
  hr_offsets: np.ndarray  # first byte, int64 [n]
  lr_offsets: np.ndarray
  lr_pitch: np.ndarray  # LR pixels from one stored row to the next, int32 [n]; HR's: * scale
  names: tuple[str, ...]
  scale: int
  digest: str  # of the names, sizes and pixels: the same wherever the data were copied to
  grey: tuple[bool, ...] = ()  # which were grey files; their three channels are the same


class Cost(NamedTuple):
  """What the decoding of a source takes, from the headers of its files."""

  images: int
  pixels: int  # of HR
  disk_bytes: int  # of the pack
  ram_bytes: int  # at most, with the given number of threads


def hr_image(pack: Pack, i: int) -> np.ndarray:
  """HR image i, uint8 [H, W, 3], a view."""
  return hr_window(pack, i, 0, 0, *(int(side) for side in pack.hr_sizes[i]))


def lr_image(pack: Pack, i: int) -> np.ndarray:
  """LR image i, uint8 [H / scale, W / scale, 3], a view."""
  return lr_window(pack, i, 0, 0, *(int(side) for side in pack.lr_sizes[i]))


def hr_window(pack: Pack, i: int, y: int, x: int, height: int, width: int) -> np.ndarray:
  """Part of HR image i, uint8 [height, width, 3], a view."""
  pitch = int(pack.lr_pitch[i]) * pack.scale
  return _window(pack.hr, int(pack.hr_offsets[i]), pitch, y, x, height, width)


def lr_window(pack: Pack, i: int, y: int, x: int, height: int, width: int) -> np.ndarray:
  """Part of LR image i, uint8 [height, width, 3], a view."""
  return _window(pack.lr, int(pack.lr_offsets[i]), int(pack.lr_pitch[i]), y, x, height, width)


def build_pack(
  source: Source,
  scale: int,
  cache_dir: str = "",
  min_hr: int = 1,
  *,
  convention: str = resize.DEFAULT_CONVENTION,
  threads: int = 0,
) -> Pack:
  """Find the pack of a source in the cache, or decode the source into it.

  A source that is a prepared pack is opened where it lies.

  Args:
    source: of `open_source`; with `keep_grey` the pack knows which files are grey.
    scale: HR size / LR size.
    cache_dir: folder of the packs; '' is $SR_JAX_CACHE, else ~/.cache/sr_jax.
    min_hr: side of the HR crops; images smaller than that are left out.
    convention: of `imresize`.
    threads: that decode, 0 for as many as there are CPUs, at most 16.

  Returns:
    The pack, memory-mapped; the same arrays whatever the number of threads.

  Raises:
    ValueError: too many unusable files, LR images that do not fit their HR image, or a prepared
      pack of another scale.
    OSError: no room.
  """
  if source.pack is not None:
    pack = open_pack(source.pack, min_hr)
    if pack.scale != scale:
      raise ValueError(f"{source.pack} was prepared for scale {pack.scale}, not {scale}")
    return pack
  folder = cli.cache_folder(cache_dir) / _key(source, scale, convention, None)[:20]
  return write_pack(folder, source, scale, min_hr, convention=convention, threads=threads)


def write_pack(
  folder: pathlib.Path,
  source: Source,
  scale: int,
  min_hr: int = 1,
  *,
  convention: str = resize.DEFAULT_CONVENTION,
  sub_images: SubImages | None = None,
  threads: int = 0,
) -> Pack:
  """Decode a source into a folder, unless it holds that pack already.

  HR is cropped to a multiple of the scale. LR is the source's own, or `imresize` of the whole HR
  image, so that a crop of LR knows what lies beside it, as at test time.

  Unusable files (unreadable, or smaller than the crop) are named in one warning and left out
  while they are at most 10 % of the source. Whoever is killed goes on where it was, with the same
  bytes in the end as if it had not been.

  Args:
    folder: of the pack, which is whole when it appears.
    source: of `open_source`.
    scale: HR size / LR size.
    min_hr: images smaller than that are left out of what is returned; they are in the pack.
    convention: of `imresize`.
    sub_images: let the pack's images be these parts of the source's images. Pixels are stored
      once all the same.
    threads: that decode, 0 for as many as there are CPUs, at most 16.

  Returns:
    The pack, memory-mapped.

  Raises:
    ValueError: as `build_pack`, or a folder that holds something else.
    OSError: no room.
  """
  if sub_images and (sub_images.step < 1 or any(side % scale for side in sub_images)):
    raise ValueError(
      f"sub-images of {sub_images.size}, every {sub_images.step}, must be multiples of "
      f"scale={scale}, for the LR ones to lie on whole pixels"
    )
  key = _key(source, scale, convention, sub_images)
  if not _is_whole(folder, key):
    with _failing_with_advice(folder, source):
      folder.parent.mkdir(parents=True, exist_ok=True)
      with _locked(folder) as alone:
        if not _is_whole(folder, key):  # else another process has made it meanwhile
          _check_free(folder, key)
          partial = folder.with_name(f"{folder.name}.partial")
          if not alone:
            partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
          try:
            _build(folder, partial, key, source, scale, convention, sub_images, min_hr, threads)
          finally:
            if not alone:  # nobody will go on with it
              shutil.rmtree(partial, ignore_errors=True)
  return open_pack(folder, min_hr)


def open_pack(folder: pathlib.Path, min_hr: int = 1) -> Pack:
  """Open a pack that is whole.

  Args:
    folder: of the pack.
    min_hr: images smaller than that are left out.

  Returns:
    The pack, memory-mapped.

  Raises:
    ValueError: it is damaged, or too many images are unusable.
  """
  if not _is_whole(folder):
    raise ValueError(f"{folder} is damaged: its files have not the sizes that its index says")
  index = read_index(folder)
  bad = _bad_images(index, min_hr)
  if bad:
    logging.warning("left out %d images of %s:\n%s", len(bad), index["source"], _reasons(bad))
  entries = [entry for entry in index["images"] if entry["name"] not in bad]
  pack = Pack(
    # Plain arrays over the maps: slices of a np.memmap are slow to make.
    hr=np.asarray(np.memmap(folder / "hr.bin", np.uint8, "r")),
    lr=np.asarray(np.memmap(folder / "lr.bin", np.uint8, "r")),
    hr_sizes=_sizes([entry["hr"] for entry in entries]),
    lr_sizes=_sizes([entry["lr"] for entry in entries]),
    hr_offsets=np.array([entry["hr_offset"] for entry in entries], np.int64),
    lr_offsets=np.array([entry["lr_offset"] for entry in entries], np.int64),
    lr_pitch=np.array([entry["lr"][1] for entry in entries], np.int32),
    names=tuple(entry["name"] for entry in entries),
    scale=index["scale"],
    digest=_content_digest(index["scale"], entries, index["sub_images"]),
    grey=tuple(entry["grey"] for entry in entries),
  )
  return divide(pack, SubImages(*index["sub_images"])) if index["sub_images"] else pack


def read_index(folder: pathlib.Path) -> dict[str, Any]:
  """Read the manifest of a pack: what it was made from, and each image's place and sha256."""
  return json.loads((folder / "index.json").read_text())


def verify_pack(folder: pathlib.Path) -> list[str]:
  """Compare every image of a pack with its sha256.

  Args:
    folder: of the pack.

  Returns:
    What is wrong, an entry an image; [] for a sound pack.
  """
  try:
    entries = read_index(folder)["images"]
    ends = {key: entries[-1][f"{key}_offset"] + _bytes(entries[-1][key]) for key in ("hr", "lr")}
  except (OSError, ValueError, LookupError, TypeError) as error:
    return [f"index.json cannot be read: {error!r}"]
  faults = []
  for key, end in ends.items():
    file = folder / f"{key}.bin"
    size = file.stat().st_size if file.exists() else 0
    if size != end:
      faults.append(f"{file.name} has {size} bytes, must have {end}")
  try:
    with open(folder / "hr.bin", "rb") as hr_file, open(folder / "lr.bin", "rb") as lr_file:
      for entry in tqdm.tqdm(entries, "verifying", unit=" images", delay=2, disable=None):
        try:
          wrong = [
            key.upper()
            for key, file in (("hr", hr_file), ("lr", lr_file))
            if not _pixels_match(file, entry, key)
          ]
        except (LookupError, TypeError, ValueError) as error:
          faults.append(f"an entry of index.json is damaged: {error!r}")
          continue
        if wrong:
          faults.append(f"{entry['name']}: {' and '.join(wrong)} pixels differ from their sha256")
  except FileNotFoundError:  # already among the faults
    pass
  return faults


def divide(pack: Pack, sub_images: SubImages) -> Pack:
  """Divide the images of a pack into overlapping squares, row by row, as views.

  BasicSR's convention: one every `step` pixels, the last of a row or a column aligned to the
  border, `thresh_size` 0; `0001.png` becomes `0001_s001.png`, ... An image smaller than `size`
  along a side, which BasicSR does not cut, is taken whole along it.

  Args:
    pack: of whole images.
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
  threads = _threads(threads)
  # Decoded pairs wait for their turn; a thread at work holds Pillow's copy, and `imresize` works
  # on a shrunk image in float64, with a copy of each tap.
  waiting, working = 3 + 3 / scale**2, 3 + 3 + 3 * 8 * 3 / scale
  ram = max(pixels) * ((2 * threads + 2) * waiting + threads * working)
  disk = sum(3 * n + 3 * (n // scale**2) for n in pixels)
  return Cost(len(sizes), sum(pixels), disk, int(ram))


def pack_from_arrays(
  images: Sequence[np.ndarray], scale: int, lr_images: Sequence[np.ndarray] | None = None
) -> Pack:
  """Make a pack in memory.

  Args:
    images: HR, uint8 [H, W, 3], cropped to a multiple of the scale here.
    scale: HR size / LR size.
    lr_images: their LR images, by default made by `imresize`.
  """
  hr = [_crop(image, scale) for image in images]
  lr = lr_images or [resize.imresize(image, 1 / scale) for image in hr]
  entries = []
  for i, pair in enumerate(zip(hr, lr, strict=True)):
    if not _fit(*pair, scale):
      shapes = " and ".join(str(list(image.shape)) for image in pair)
      raise ValueError(f"HR and LR of image {i}, {shapes}, must be [H, W, 3] and [H/{scale}, ...]")
    entry = {"name": str(i)}
    for key, image in zip(("hr", "lr"), pair, strict=True):
      entry |= {key: list(image.shape[:2]), f"{key}_sha256": _sha256(image)}
    entries.append(entry)
  flat_hr, flat_lr = (np.concatenate([np.ravel(image) for image in part]) for part in (hr, lr))
  lr_sizes = _sizes([image.shape for image in lr])
  return Pack(
    hr=flat_hr,
    lr=flat_lr,
    hr_sizes=_sizes([image.shape for image in hr]),
    lr_sizes=lr_sizes,
    hr_offsets=_offsets([image.shape for image in hr]),
    lr_offsets=_offsets([image.shape for image in lr]),
    lr_pitch=lr_sizes[:, 1].copy(),
    names=tuple(entry["name"] for entry in entries),
    scale=scale,
    digest=_content_digest(scale, entries, None),
  )


def _window(
  flat: np.ndarray, offset: int, pitch: int, y: int, x: int, height: int, width: int
) -> np.ndarray:
  start = offset + (y * pitch + x) * 3
  return np.ndarray((height, width, 3), np.uint8, flat, start, (pitch * 3, 3, 1))


def _crop(image: np.ndarray, scale: int) -> np.ndarray:
  height, width = (side // scale * scale for side in image.shape[:2])
  return image[:height, :width]


def _fit(hr: np.ndarray, lr: np.ndarray, scale: int) -> bool:
  return lr.shape == (hr.shape[0] // scale, hr.shape[1] // scale, 3)


def _sizes(shapes: Sequence[Sequence[int]]) -> np.ndarray:
  return np.array([shape[:2] for shape in shapes], np.int32).reshape(-1, 2)


def _bytes(size: Sequence[int]) -> int:
  return size[0] * size[1] * 3


def _offsets(shapes: Sequence[Sequence[int]]) -> np.ndarray:
  ends = np.cumsum([_bytes(shape) for shape in shapes], dtype=np.int64)
  return np.concatenate([np.zeros(1, np.int64), ends])[:-1]


def _sha256(image: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(image)).hexdigest()


def _key(source: Source, scale: int, convention: str, sub_images: SubImages | None) -> str:
  """A digest of what a pack is made from: files that change make another pack."""
  made = [FORMAT_VERSION, scale, "given" if source.has_lr else convention, source.fingerprint]
  made += [sub_images] if sub_images else []
  return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _content_digest(
  scale: int, entries: list[dict[str, Any]], sub_images: Sequence[int] | None
) -> str:
  """A digest of what is trained on, whatever it was read from."""
  keys = ("name", "hr", "lr", "hr_sha256", "lr_sha256")
  content = [scale, [[entry[key] for key in keys] for entry in entries], sub_images]
  return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:20]


def _threads(threads: int) -> int:
  return threads or min(16, os.cpu_count() or 1)


def _check_free(folder: pathlib.Path, key: str) -> None:
  """Raises where a folder holds what is not a pack to be made anew."""
  if not folder.exists():
    return
  foreign = sorted({file.name for file in folder.iterdir()} - set(FILES))
  if foreign or (_is_whole(folder) and not _is_whole(folder, key)):
    what = "a pack of other images or settings" if not foreign else f"other files, {foreign[0]}"
    raise ValueError(f"{folder} holds {what}; remove it, or give another folder")


@contextlib.contextmanager
def _failing_with_advice(folder: pathlib.Path, source: Source) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise OSError(
      f"{error}: the decoded images of {source.description}, 3 bytes a pixel, must fit in "
      f"{folder.parent}; give a folder with more room by --config.data.cache_dir (--output of "
      "sr_jax.prepare), or make room: what is decoded is kept"
    ) from error


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[bool]:
  """Holds the lock of a folder; yields whether there is one, else nobody is kept out.

  The system lets go of it when its holder dies.
  """
  if fcntl is None:
    yield False
    return
  path = folder.with_name(f"{folder.name}.lock")
  while True:
    file = open(path, "w")
    try:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        logging.warning("another process is decoding into %s; waiting for it", folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
      file.close()
      path.unlink(missing_ok=True)
      yield False
      return
    if _is_at(file, path):
      break
    file.close()
  try:
    yield True
  finally:
    path.unlink(missing_ok=True)
    file.close()


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
  """Whether an open file is the one at its path: another may have removed or replaced it."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
  except FileNotFoundError:
    return False


def _build(
  folder: pathlib.Path,
  partial: pathlib.Path,
  key: str,
  source: Source,
  scale: int,
  convention: str,
  sub_images: SubImages | None,
  min_hr: int,
  threads: int,
) -> None:
  """Decodes what is missing into a folder beside the final one, then renames it."""
  if not _is_whole(partial, key):  # it was killed before the very last move
    records = _decode(partial, key, source, scale, convention, _threads(threads))
    index = {"format": FORMAT_VERSION, "key": key, "source": source.description, "scale": scale}
    index |= {"convention": "given" if source.has_lr else convention, "sub_images": sub_images}
    index |= {"images": [record for record in records if "hr" in record]}
    index |= {"unreadable": {r["name"]: r["unreadable"] for r in records if "unreadable" in r}}
    try:
      mismatched = [f"{r['name']}: {r['mismatch']}" for r in records if "mismatch" in r]
      if mismatched:
        raise ValueError(
          f"LR images of {source.description} must be HR / {scale} in size, cropped to a whole "
          f"number; set config.scale, or make them anew:\n{name_list(mismatched)}"
        )
      _bad_images(index, min_hr)  # raises before a useless pack is kept
    except ValueError:
      shutil.rmtree(partial)
      raise
    for name in ("hr.bin", "lr.bin"):
      _flush_to_disk(partial / name)
    temporary = partial / "index.tmp"
    temporary.write_text(json.dumps(index))
    _flush_to_disk(temporary)
    temporary.rename(partial / "index.json")
  (partial / JOURNAL).unlink(missing_ok=True)
  _publish(partial, folder, key)


def _decode(
  partial: pathlib.Path,
  key: str,
  source: Source,
  scale: int,
  convention: str,
  threads: int,
) -> list[dict[str, Any]]:
  """Decodes the images that the journal does not name; returns a record of each image."""

  def load(i: int) -> tuple[np.ndarray, np.ndarray, bool] | str:
    try:
      hr, lr = source.load(i)
    except (ValueError, OSError) as error:
      # A decoder's complaint has no errno; the system's does, and may be gone tomorrow: a pack
      # would remember it for ever.
      if getattr(error, "errno", None) is not None:
        raise ValueError(f"{source.names[i]}: {error}; mend it and start again") from error
      return str(error)
    hr = _crop(hr, scale)
    if not hr.size:
      return f"smaller than the scale, {scale}"
    lr = resize.imresize(hr, 1 / scale, convention) if lr is None else lr
    return _to_rgb(hr), _to_rgb(lr), hr.ndim == 2

  records = _resume(partial, key, source.names)
  total, done = len(source.names), len(records)
  ends = _ends(records)
  _check_room(partial, source, scale, threads, sum(ends.values()))
  logging.info("decoding %d of %d images of %s", total - done, total, source.description)
  with (
    open(partial / "hr.bin", "ab") as hr_file,
    open(partial / "lr.bin", "ab") as lr_file,
    open(partial / JOURNAL, "a") as journal,
  ):
    loaded = _map_in_order(load, range(done, total), threads)
    bar = tqdm.tqdm(loaded, "decoding", total, initial=done, unit=" images", delay=2, disable=None)
    for name, pair in zip(source.names[done:], bar, strict=True):
      record: dict[str, Any] = {"name": name}
      if isinstance(pair, str):
        record["unreadable"] = pair
      elif not _fit(*pair[:2], scale):
        record["mismatch"] = f"HR {_by(pair[0].shape)}, LR {_by(pair[1].shape)}"
      else:
        *images, record["grey"] = pair
        for key, image, file in zip(("hr", "lr"), images, (hr_file, lr_file), strict=True):
          pixels = np.ascontiguousarray(image)
          record[key] = list(image.shape[:2])
          record[f"{key}_offset"] = ends[key]
          record[f"{key}_sha256"] = _sha256(pixels)
          ends[key] += file.write(pixels)
          file.flush()  # before the journal says that it is there
      records.append(record)
      journal.write(json.dumps(record) + "\n")
      journal.flush()
  return records


def _resume(partial: pathlib.Path, key: str, names: Sequence[str]) -> list[dict[str, Any]]:
  """The records of a build that was interrupted; its files are cut back to what they tell.

  Only images whose pixels have their sha256 count: after a power failure a file may have its
  length and not its contents.
  """
  header = json.dumps({"key": key}) + "\n"
  lines = []
  if (partial / JOURNAL).exists():
    lines = (partial / JOURNAL).read_text(errors="replace").splitlines(keepends=True)
  if lines[:1] != [header]:  # nothing there, or of other files
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / JOURNAL).write_text(header)
    return []
  records = []
  with open(partial / "hr.bin", "ab+") as hr_file, open(partial / "lr.bin", "ab+") as lr_file:
    for name, line in zip(names, lines[1:], strict=False):
      record = _parsed(line)
      if record.get("name") != name or ("hr" in record and not (
        _pixels_match(hr_file, record, "hr") and _pixels_match(lr_file, record, "lr")
      )):  # fmt: skip
        break
      records.append(record)
    ends = _ends(records)
    hr_file.truncate(ends["hr"])
    lr_file.truncate(ends["lr"])
  os.truncate(partial / JOURNAL, sum(len(line) for line in lines[: len(records) + 1]))  # ASCII
  logging.warning("%s: %d of %d images were decoded before; going on from there",
                  partial, len(records), len(names))  # fmt: skip
  return records


def _parsed(line: str) -> dict[str, Any]:
  """A line of the journal; {} where it was torn."""
  try:
    return json.loads(line) if line.endswith("\n") else {}
  except ValueError:
    return {}


def _ends(records: list[dict[str, Any]]) -> dict[str, int]:
  return {
    key: sum(_bytes(record[key]) for record in records if key in record) for key in ("hr", "lr")
  }


def _pixels_match(file: BinaryIO, entry: dict[str, Any], key: str) -> bool:
  file.seek(entry[f"{key}_offset"])
  data = file.read(_bytes(entry[key]))
  return hashlib.sha256(data).hexdigest() == entry[f"{key}_sha256"]


def _check_room(
  partial: pathlib.Path, source: Source, scale: int, threads: int, done_bytes: int
) -> None:
  cost = decoding_cost(source, scale, threads)
  free = shutil.disk_usage(partial).free
  if cost and cost.disk_bytes - done_bytes > free:
    raise OSError(f"{cost.disk_bytes - done_bytes:,} bytes are needed and {free:,} are free")


def _flush_to_disk(path: pathlib.Path) -> None:
  with open(path, "rb") as file:
    os.fsync(file.fileno())


def _to_rgb(image: np.ndarray) -> np.ndarray:
  return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image


def _by(shape: Sequence[int]) -> str:
  return f"{shape[1]}x{shape[0]}"


def _map_in_order(
  function: Callable[[int], Any], numbers: Sequence[int], threads: int
) -> Iterator[Any]:
  """The function of each number in turn, from several threads, few results waiting at a time."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    for i in numbers:
      waiting.append(pool.submit(function, i))
      if len(waiting) > 2 * threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _publish(partial: pathlib.Path, folder: pathlib.Path, key: str) -> None:
  if folder.exists() and not _is_whole(folder):
    if any(folder.iterdir()):
      logging.warning("%s is damaged; it is made anew", folder)
    shutil.rmtree(folder)
  try:
    partial.rename(folder)
  except OSError:
    if not _is_whole(folder, key):  # else another process was faster, with the same bytes
      raise
    shutil.rmtree(partial)


def _is_whole(folder: pathlib.Path, key: str = "") -> bool:
  """Whether a folder is a pack with files of the right sizes, made from `key` if one is given."""
  try:
    index = read_index(folder)
    last = index["images"][-1]
    return (not key or key == index["key"]) and all(
      (folder / f"{part}.bin").stat().st_size == last[f"{part}_offset"] + _bytes(last[part])
      for part in ("hr", "lr")
    )
  except (OSError, ValueError, LookupError, TypeError):
    return False


def _bad_images(index: dict[str, Any], min_hr: int) -> dict[str, str]:
  """The images that cannot be trained on, and why; raises where they are too many."""
  small = {
    entry["name"]: f"{_by(entry['hr'])} pixels, smaller than {min_hr}x{min_hr}"
    for entry in index["images"]
    if min(entry["hr"]) < min_hr
  }
  bad = index["unreadable"] | small
  total = len(index["images"]) + len(index["unreadable"])
  if len(bad) > MAX_BAD_FRACTION * total:
    raise ValueError(
      f"{len(bad)} of {total} images of {index['source']} are unusable, and at most "
      f"{MAX_BAD_FRACTION:.0%} may be; remove them, or, of images to "
      f"train on, take smaller crops with --config.data.hr_patch:\n{_reasons(bad)}"
    )
  return bad


def _reasons(bad: dict[str, str]) -> str:
  return name_list([f"{name}: {reason}" for name, reason in bad.items()])
