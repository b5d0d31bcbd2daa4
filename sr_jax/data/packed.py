"""Images decoded once and packed into flat files, so that training reads crops, not files.

A pack is a folder in the cache: `hr.bin` and `lr.bin`, the uint8 pixels of all images one after
another, and `index.json` that says where each is. The files are memory-mapped: a pack may be much
larger than memory. It appears under its final name only when it is whole, and its name is a digest
of what it was made from: files that change make another pack.
"""

import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm
from absl import logging

from sr_jax import resize
from sr_jax.data.sources import Source, name_list

FORMAT_VERSION = 2
MAX_BAD_FRACTION = 0.1  # of the images of a source that may be unusable


class Pack(NamedTuple):
  """Pairs of HR and LR images in two flat uint8 arrays."""

  hr: np.ndarray  # uint8 [bytes], memory-mapped
  lr: np.ndarray
  hr_sizes: np.ndarray  # height and width, int32 [n, 2]
  lr_sizes: np.ndarray
  hr_offsets: np.ndarray  # first byte, int64 [n]
  lr_offsets: np.ndarray
  names: tuple[str, ...]
  scale: int
  digest: str  # of what the pack was made from
  grey: tuple[bool, ...] = ()  # which were grey files; their three channels are the same


def hr_image(pack: Pack, i: int) -> np.ndarray:
  """HR image i, uint8 [H, W, 3], a view."""
  return _image(pack.hr, pack.hr_offsets[i], pack.hr_sizes[i])


def lr_image(pack: Pack, i: int) -> np.ndarray:
  """LR image i, uint8 [H / scale, W / scale, 3], a view."""
  return _image(pack.lr, pack.lr_offsets[i], pack.lr_sizes[i])


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

  HR is cropped to a multiple of the scale. LR is the source's own, or `imresize` of the whole HR
  image, so that a crop of LR knows what lies beside it, as at test time.

  Unusable files (unreadable, or smaller than the crop) are named in one warning and left out
  while they are at most 10 % of the source.

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
    ValueError: too many unusable files, or LR images that do not fit their HR image.
  """
  cache = pathlib.Path(cache_dir or os.environ.get("SR_JAX_CACHE") or "~/.cache/sr_jax")
  key = [FORMAT_VERSION, scale, "given" if source.has_lr else convention, source.fingerprint]
  digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]
  folder = cache.expanduser() / digest
  if not _is_whole(folder):
    _build(folder, source, scale, convention, min_hr, threads or min(16, os.cpu_count() or 1))
  return _open(folder, min_hr)


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
  for i, pair in enumerate(zip(hr, lr, strict=True)):
    if not _fit(*pair, scale):
      shapes = " and ".join(str(list(image.shape)) for image in pair)
      raise ValueError(f"HR and LR of image {i}, {shapes}, must be [H, W, 3] and [H/{scale}, ...]")
  flat_hr, flat_lr = (np.concatenate([np.ravel(image) for image in part]) for part in (hr, lr))
  return Pack(
    hr=flat_hr,
    lr=flat_lr,
    hr_sizes=_sizes([image.shape for image in hr]),
    lr_sizes=_sizes([image.shape for image in lr]),
    hr_offsets=_offsets([image.shape for image in hr]),
    lr_offsets=_offsets([image.shape for image in lr]),
    names=tuple(str(i) for i in range(len(hr))),
    scale=scale,
    digest=hashlib.sha256(flat_hr.tobytes() + flat_lr.tobytes()).hexdigest()[:20],
  )


def _image(flat: np.ndarray, offset: np.integer, size: np.ndarray) -> np.ndarray:
  height, width = (int(side) for side in size)
  return flat[int(offset) : int(offset) + height * width * 3].reshape(height, width, 3)


def _crop(image: np.ndarray, scale: int) -> np.ndarray:
  height, width = (side // scale * scale for side in image.shape[:2])
  return image[:height, :width]


def _fit(hr: np.ndarray, lr: np.ndarray, scale: int) -> bool:
  return lr.shape == (hr.shape[0] // scale, hr.shape[1] // scale, 3)


def _sizes(shapes: Sequence[Sequence[int]]) -> np.ndarray:
  return np.array([shape[:2] for shape in shapes], np.int32).reshape(-1, 2)


def _offsets(shapes: Sequence[Sequence[int]]) -> np.ndarray:
  ends = np.cumsum([shape[0] * shape[1] * 3 for shape in shapes], dtype=np.int64)
  return np.concatenate([np.zeros(1, np.int64), ends])[:-1]


def _build(
  folder: pathlib.Path, source: Source, scale: int, convention: str, min_hr: int, threads: int
) -> None:
  """Decodes everything into a folder beside the final one, then renames it."""

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

  logging.info("decoding %d images of %s into %s", len(source.names), source.description, folder)
  temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
  index: dict[str, Any] = {"format": FORMAT_VERSION, "source": source.description, "scale": scale}
  index |= {"convention": convention, "images": [], "unreadable": {}}
  mismatched = []
  try:
    temporary.mkdir(parents=True)
    with open(temporary / "hr.bin", "wb") as hr_file, open(temporary / "lr.bin", "wb") as lr_file:
      loaded = _map_in_order(load, len(source.names), threads)
      bar = tqdm.tqdm(loaded, "decoding", len(source.names), unit=" images", delay=2, disable=None)
      for name, pair in zip(source.names, bar, strict=True):
        if isinstance(pair, str):
          index["unreadable"][name] = pair
          continue
        hr, lr, grey = pair
        if not _fit(hr, lr, scale):
          mismatched.append(f"{name}: HR {_by(hr.shape)}, LR {_by(lr.shape)}")
          continue
        entry = {"name": name, "hr": list(hr.shape[:2]), "lr": list(lr.shape[:2])}
        entry["grey"] = grey
        for key, image, file in (("hr", hr, hr_file), ("lr", lr, lr_file)):
          pixels = np.ascontiguousarray(image)
          entry[f"{key}_offset"] = file.tell()
          entry[f"{key}_sha256"] = hashlib.sha256(pixels).hexdigest()
          file.write(pixels)
        index["images"].append(entry)
    if mismatched:
      raise ValueError(
        f"LR images of {source.description} must be HR / {scale} in size, cropped to a whole "
        f"number; set config.scale, or make them anew:\n{name_list(mismatched)}"
      )
    _bad_images(index, min_hr)  # raises before a useless pack is kept
    (temporary / "index.json").write_text(json.dumps(index))
    _publish(temporary, folder)
  except OSError as error:
    raise OSError(
      f"{error}: the decoded images of {source.description}, 3 bytes a pixel, must fit in "
      f"{folder.parent}; give a folder with more room by --config.data.cache_dir"
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _to_rgb(image: np.ndarray) -> np.ndarray:
  return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image


def _by(shape: Sequence[int]) -> str:
  return f"{shape[1]}x{shape[0]}"


def _map_in_order(function: Callable[[int], Any], n: int, threads: int) -> Iterator[Any]:
  """function(0), function(1), ... from several threads, few results waiting at a time."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    for i in range(n):
      waiting.append(pool.submit(function, i))
      if len(waiting) > 2 * threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _publish(temporary: pathlib.Path, folder: pathlib.Path) -> None:
  if folder.exists() and not _is_whole(folder):
    logging.warning("%s is damaged; it is made anew", folder)
    shutil.rmtree(folder)
  try:
    temporary.rename(folder)
  except OSError:
    if not _is_whole(folder):  # else another process was faster, with the same bytes
      raise


def _is_whole(folder: pathlib.Path) -> bool:
  try:
    last = json.loads((folder / "index.json").read_text())["images"][-1]
    return all(
      (folder / f"{key}.bin").stat().st_size
      == last[f"{key}_offset"] + last[key][0] * last[key][1] * 3
      for key in ("hr", "lr")
    )
  except (OSError, ValueError, LookupError):
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


def _open(folder: pathlib.Path, min_hr: int) -> Pack:
  index = json.loads((folder / "index.json").read_text())
  bad = _bad_images(index, min_hr)
  if bad:
    logging.warning("left out %d images of %s:\n%s", len(bad), index["source"], _reasons(bad))
  entries = [entry for entry in index["images"] if entry["name"] not in bad]
  return Pack(
    # Plain arrays over the maps: slices of a np.memmap are slow to make.
    hr=np.asarray(np.memmap(folder / "hr.bin", np.uint8, "r")),
    lr=np.asarray(np.memmap(folder / "lr.bin", np.uint8, "r")),
    hr_sizes=_sizes([entry["hr"] for entry in entries]),
    lr_sizes=_sizes([entry["lr"] for entry in entries]),
    hr_offsets=np.array([entry["hr_offset"] for entry in entries], np.int64),
    lr_offsets=np.array([entry["lr_offset"] for entry in entries], np.int64),
    names=tuple(entry["name"] for entry in entries),
    scale=index["scale"],
    digest=folder.name,
    grey=tuple(entry["grey"] for entry in entries),
  )
