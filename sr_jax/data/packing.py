"""Images decoded once and packed into flat files, so that training reads crops, not files.

A pack is a folder: `hr.bin` and `lr.bin`, the pixels of all images one after another, and
`index.json`, the manifest, that says where each is and has the sha256 of its pixels. Pixels have 8
bits, or 16 where one image or more has 16; then images of 8 bits are widened. The files are
memory-mapped: a pack may be much larger than memory. It lies in the cache, named by what it was
made from, or where `python -m sr_jax.prepare` was told to put it.

A pack is made in a folder beside its place, `NAME.partial`, with a journal of the images that are
in it: a build that was killed goes on with the next image. It appears under its final name only
when it is whole. Of several processes one decodes and the others wait.
"""

import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from absl import logging
import numpy as np
import tqdm

from sr_jax import UserError
from sr_jax.data.cost import decoding_cost, decoding_threads
from sr_jax.data.pack import (
  FILES,
  FORMATS,
  Pack,
  SubImages,
  bad_images,
  byte_count,
  content_digest,
  dtype_of,
  is_whole,
  named_by,
  open_pack,
  pixels_match,
  read_index,
  sha256,
  sizes_of,
  verify_pack,
)
from sr_jax.data.source import Source, name_list
from sr_jax.images import resize
from sr_jax.images.files import to_8_bits, to_16_bits
from sr_jax.machine import cache
from sr_jax.machine.folders import flush_to_disk, locked
from sr_jax.machine.writing import open_to_append, write_file

JOURNAL = "journal.jsonl"
Decoded = dict[str, tuple[pathlib.Path, dict[str, Any]]]  # {stamp: the pack, its entry}


def build_pack(
  source: Source,
  scale: int,
  cache_dir: str = "",
  min_hr: int = 1,
  *,
  convention: str = resize.DEFAULT_CONVENTION,
  threads: int = 0,
  verify: bool = False,
  bits: int = 16,
) -> Pack:
  """Find the pack of a source in the cache, or decode the source into it.

  A source that is a prepared pack is opened where it lies. Images that another pack of the cache
  has already are copied from there.

  Args:
    source: what `open_source` returned; with `keep_grey` the pack knows which files are grey.
    scale: HR size / LR size.
    cache_dir: folder of the packs; '' is $SR_JAX_CACHE, else ~/.cache/sr_jax.
    min_hr: side of the HR crops; images smaller than that are left out.
    convention: the key of `resize.CONVENTIONS` by which `imresize` makes LR images.
    threads: the number of threads that decode; 0 for one per CPU, at most 16.
    verify: whether a pack that there is is compared with its sha256s. Images of a pack of the cache
      that differ from theirs are decoded anew.
    bits: 8 to round images of 16 bits to 8. A prepared pack stays as it is.

  Returns:
    The pack, memory-mapped; the same arrays whatever the number of threads.

  Raises:
    UserError: too many files are unusable, LR images do not fit their HR images, or a prepared pack
      has another scale or is damaged.
    OSError: there is not enough room on the disk.
  """
  if source.pack is not None:
    pack = open_pack(source.pack, min_hr)
    if pack.scale != scale:
      raise UserError(f"{source.pack} was prepared for scale {pack.scale}, not {scale}")
    if faults := verify_pack(source.pack, decoding_threads()) if verify else []:
      raise UserError(
        f"{source.pack} is damaged: {name_list(faults)}\nremove it, and prepare it again by python "
        "-m sr_jax.prepare"
      )
    return pack
  packs = cache.cache_folder(cache_dir)
  key = _key(source, scale, convention, None, bits)
  folder = packs / key[:20]
  damaged = folder.with_name(f"{folder.name}.damaged")
  if verify and is_whole(folder, key) and (faults := verify_pack(folder, decoding_threads())):
    logging.warning("%s is damaged; these images are decoded anew:\n%s", folder, name_list(faults))
    with contextlib.suppress(OSError):  # another process has done the same, or an old one is there
      folder.rename(damaged)  # the sound images are copied from there
  pack = write_pack(
    folder, source, scale, min_hr, convention=convention, threads=threads, packs=packs, bits=bits
  )
  with contextlib.suppress(OSError):  # a cache that can only be read
    shutil.rmtree(damaged, ignore_errors=True)
    (folder / "index.json").touch()  # it is opened now
  return pack


def pack_folder(source: Source, scale: int, cache_dir: str = "", *, bits: int = 16) -> pathlib.Path:
  """Returns the folder of the pack that `build_pack` makes of a source, or opens."""
  if source.pack is not None:
    return source.pack
  key = _key(source, scale, resize.DEFAULT_CONVENTION, None, bits)
  return cache.cache_folder(cache_dir) / key[:20]


def remove_old_packs(packs: pathlib.Path, limit_gb: float, keep: Collection[pathlib.Path]) -> None:
  """Removes the packs of a cache that were opened longest ago, until the rest is within a limit.

  Where files of a local disk are removed, a process that has mapped them keeps them until it ends.
  Other processes may do the same at the same time.

  Args:
    packs: the cache folder. Whatever is no pack that `build_pack` made stays.
    limit_gb: GB that are kept; 0 for no limit.
    keep: packs that are never removed.
  """
  if not limit_gb or not packs.is_dir():
    return
  found = []
  for folder in packs.iterdir():
    if re.fullmatch("[0-9a-f]{20}", folder.name):
      with contextlib.suppress(OSError):  # no pack, or another process has just removed it
        size = sum((folder / name).stat().st_size for name in FILES)
        found.append(((folder / "index.json").stat().st_mtime, size, folder))
  if sum(size for _, size, _ in found) <= limit_gb * 1e9:
    return  # as nearly always: no index has been read, and one may have thousands of images
  found = [entry for entry in found if is_whole(entry[2])]
  total = sum(size for _, size, _ in found)
  for _, size, folder in sorted(found):
    if total <= limit_gb * 1e9:
      break
    if folder not in keep:
      logging.warning(
        "removing %s, the %.1f GB of decoded images that were opened longest ago; the limit is "
        "--config.data.cache_gb=%g", folder, size / 1e9, limit_gb,
      )  # fmt: skip
      shutil.rmtree(folder, ignore_errors=True)
      total -= 0 if folder.exists() else size


def write_pack(
  folder: pathlib.Path,
  source: Source,
  scale: int,
  min_hr: int = 1,
  *,
  convention: str = resize.DEFAULT_CONVENTION,
  sub_images: SubImages | None = None,
  threads: int = 0,
  packs: pathlib.Path | None = None,
  bits: int = 16,
) -> Pack:
  """Decode a source into a folder, unless it holds that pack already.

  HR is cropped to a multiple of the scale. LR is the source's own, or `imresize` of the whole HR
  image, so that a crop of LR knows what lies beside it, as at test time.

  Unusable files (unreadable, or smaller than the crop) are named in one warning and left out
  while they are at most 10 % of the source. Started again, a build that was killed goes on where it
  was, and ends with the same bytes as if it had not been killed.

  Args:
    folder: the pack's folder. It appears under this name only once the pack is whole.
    source: what `open_source` returned.
    scale: HR size / LR size.
    min_hr: images smaller than that are left out of what is returned; they are in the pack.
    convention: the key of `resize.CONVENTIONS` by which `imresize` makes LR images.
    sub_images: how to divide the source's images into the pack's; None for whole images. Each pixel
      is stored once in any case.
    threads: the number of threads that decode; 0 for one per CPU, at most 16.
    packs: a folder of packs in which images may be found that need not be decoded again.
    bits: as for `build_pack`.

  Returns:
    The pack, memory-mapped.

  Raises:
    UserError: as for `build_pack`; or the folder holds something else.
    OSError: there is not enough room on the disk.
  """
  if sub_images and (sub_images.step < 1 or any(side % scale for side in sub_images)):
    raise UserError(
      f"sub-images of {sub_images.size}, every {sub_images.step}, must be multiples of "
      f"scale={scale}, for the LR ones to lie on whole pixels"
    )
  key = _key(source, scale, convention, sub_images, bits)
  if not is_whole(folder, key):
    with _failing_with_advice(folder, source):
      folder.parent.mkdir(parents=True, exist_ok=True)
      with locked(folder) as alone:
        if not is_whole(folder, key):  # another process may have made it meanwhile
          _check_free(folder, key)
          partial = folder.with_name(f"{folder.name}.partial")
          if not alone:
            partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
          try:
            deep = _bits(source, bits) == 16
            known = _decoded(packs, source, scale, convention, deep) if packs else {}
            _build(
              folder, partial, key, source, scale, convention, sub_images, min_hr, threads, known,
              deep,
            )  # fmt: skip
          finally:
            if not alone:  # nobody will go on with it
              shutil.rmtree(partial, ignore_errors=True)
  return open_pack(folder, min_hr)


def pack_from_arrays(
  images: Sequence[np.ndarray], scale: int, lr_images: Sequence[np.ndarray] | None = None
) -> Pack:
  """Make a pack in memory.

  Args:
    images: the HR images, [H, W, 3], uint8 or uint16; they are cropped to a multiple of the scale
      here.
    scale: HR size / LR size.
    lr_images: their LR images, by default made by `imresize`.

  Returns:
    The pack, whose images are called '0', '1', ...

  Raises:
    UserError: the shapes of an HR and its LR image do not fit.
  """
  deep = any(image.dtype == np.uint16 for image in [*images, *(lr_images or ())])
  hr = [_crop(to_16_bits(image) if deep else image, scale) for image in images]
  lr = lr_images or [resize.imresize(image, 1 / scale) for image in hr]
  lr = [to_16_bits(image) if deep else image for image in lr]
  entries = []
  for i, pair in enumerate(zip(hr, lr, strict=True)):
    if not _fit(*pair, scale):
      shapes = " and ".join(str(list(image.shape)) for image in pair)
      raise UserError(f"HR and LR of image {i}, {shapes}, must be [H, W, 3] and [H/{scale}, ...]")
    entry = {"name": str(i)}
    for key, image in zip(("hr", "lr"), pair, strict=True):
      entry |= {key: list(image.shape[:2]), f"{key}_sha256": sha256(image)}
    entries.append(entry)
  flat_hr, flat_lr = (np.concatenate([np.ravel(image) for image in part]) for part in (hr, lr))
  lr_sizes = sizes_of([image.shape for image in lr])
  return Pack(
    hr=flat_hr,
    lr=flat_lr,
    hr_sizes=sizes_of([image.shape for image in hr]),
    lr_sizes=lr_sizes,
    hr_offsets=_offsets([image.shape for image in hr]),
    lr_offsets=_offsets([image.shape for image in lr]),
    lr_pitch=lr_sizes[:, 1].copy(),
    names=tuple(entry["name"] for entry in entries),
    scale=scale,
    digest=content_digest(scale, entries, None),
  )


def _crop(image: np.ndarray, scale: int) -> np.ndarray:
  height, width = (side // scale * scale for side in image.shape[:2])
  return image[:height, :width]


def _fit(hr: np.ndarray, lr: np.ndarray, scale: int) -> bool:
  return lr.shape == (hr.shape[0] // scale, hr.shape[1] // scale, 3)


def _offsets(shapes: Sequence[Sequence[int]]) -> np.ndarray:
  ends = np.cumsum([height * width * 3 for height, width, _ in shapes], dtype=np.int64)
  return np.concatenate([np.zeros(1, np.int64), ends])[:-1]


def _bits(source: Source, most: int) -> int:
  """Returns how many bits the pack of a source has: 16 where one image has, and 16 are wanted."""
  return 16 if most == 16 and source.deep_images(1) else 8


def _key(
  source: Source, scale: int, convention: str, sub_images: SubImages | None, bits: int
) -> str:
  """Returns a digest of what a pack is made from: if a file changes, another pack is made."""
  made = [
    FORMATS[_bits(source, bits)], scale, "given" if source.has_lr else convention,
    source.fingerprint,
  ]  # fmt: skip
  made += [sub_images] if sub_images else []
  if bits == 8 and source.deep_images(1):  # version 3 did not round colours of 16 bits
    made.append("rounded to 8 bits")
  return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def _check_free(folder: pathlib.Path, key: str) -> None:
  """Raises UserError if a folder holds other files, or a whole pack of other images or settings."""
  if not folder.exists():
    return
  foreign = sorted({file.name for file in folder.iterdir()} - set(FILES))
  if foreign or (is_whole(folder) and not is_whole(folder, key)):
    what = "a pack of other images or settings" if not foreign else f"other files, {foreign[0]}"
    raise UserError(f"{folder} holds {what}; remove it, or give another folder")


@contextlib.contextmanager
def _failing_with_advice(folder: pathlib.Path, source: Source) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full:
      size = 3 * _bits(source, 16) // 8
      fix = f"must fit, {size} bytes a pixel; give a folder with more room"
    else:
      fix = "are written there; give a folder that can be written to"
    raise OSError(
      f"{error}: {folder.parent}: the decoded images of {source.description} {fix} by "
      "--config.data.cache_dir (--output of sr_jax.prepare)"
      + (", or make room: what is decoded is kept" if full else "")
    ) from error


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
  known: Decoded,
  deep: bool,
) -> None:
  """Decodes what is missing into a folder beside the final one, then renames it."""
  if not is_whole(partial, key):  # if it is whole, a build was killed before its very last move
    threads = threads or decoding_threads()
    records = _decode(partial, key, source, scale, convention, threads, known, deep)
    index = {"format": FORMATS[16 if deep else 8], "key": key, "source": source.description}
    index |= {"scale": scale}
    index |= {"convention": "given" if source.has_lr else convention, "sub_images": sub_images}
    index |= {"out_of": source.out_of}
    index |= {"images": [record for record in records if "hr" in record]}
    index |= {"unreadable": {r["name"]: r["unreadable"] for r in records if "unreadable" in r}}
    try:
      mismatched = [f"{r['name']}: {r['mismatch']}" for r in records if "mismatch" in r]
      if mismatched:
        raise UserError(
          f"each LR image of {source.description} must have the size of its HR image divided by "
          f"{scale}, rounded down; set --config.scale (--scale of sr_jax.prepare) to match, or "
          f"create these LR images again:\n{name_list(mismatched)}"
        )
      bad_images(index, min_hr)  # raises before a useless pack is kept
    except ValueError:
      shutil.rmtree(partial)
      raise
    for name in ("hr.bin", "lr.bin"):
      flush_to_disk(partial / name)
    write_file(partial / "index.json", json.dumps(index))
  (partial / JOURNAL).unlink(missing_ok=True)
  _publish(partial, folder, key)


def _decode(
  partial: pathlib.Path,
  key: str,
  source: Source,
  scale: int,
  convention: str,
  threads: int,
  known: Decoded,
  deep: bool,
) -> list[dict[str, Any]]:
  """Decodes the images that the journal does not name; returns a record of each image."""

  def load(i: int) -> tuple[np.ndarray, np.ndarray, bool] | str:
    if source.stamps and source.stamps[i] in known and (pair := _copy(*known[source.stamps[i]])):
      return pair
    try:
      hr, lr = source.load(i)
    except (UserError, OSError) as error:
      # A decoder's error has no errno: the image is noted as unreadable. An error of the system has
      # one, and may be gone tomorrow, but the pack would remember it for ever.
      if getattr(error, "errno", None) is not None:
        raise UserError(f"{source.names[i]}: {error}; mend it and start again") from error
      return str(error)
    hr, lr = (None if image is None else wanted(image) for image in (hr, lr))
    hr = _crop(hr, scale)
    if not hr.size:
      return f"smaller than the scale, {scale}"
    lr = resize.imresize(hr, 1 / scale, convention) if lr is None else lr
    return _to_rgb(hr), _to_rgb(lr), hr.ndim == 2

  wanted = to_16_bits if deep else to_8_bits
  records = _resume(partial, key, source.names)
  total, done = len(source.names), len(records)
  ends = _ends(records)
  _check_room(partial, source, scale, threads, sum(ends.values()), 16 if deep else 8)
  if deep:
    count = source.deep_images()
    rest = "" if count == total else f"; the other {total - count} are widened to as many"
    logging.warning("%d of %d images of %s have 16 bits, which are kept, 6 bytes a pixel%s",
                    count, total, source.description, rest)  # fmt: skip
  logging.info("decoding %d of %d images of %s", total - done, total, source.description)
  with (
    open_to_append(partial / "hr.bin") as hr_file,
    open_to_append(partial / "lr.bin") as lr_file,
    open_to_append(partial / JOURNAL) as journal,
  ):
    loaded = _map_in_order(load, range(done, total), threads)
    bar = tqdm.tqdm(loaded, "decoding", total, initial=done, unit=" images", delay=2, disable=None)
    for name, pair in zip(source.names[done:], bar, strict=True):
      record: dict[str, Any] = {"name": name} | ({"bits": 16} if deep else {})
      if source.stamps:
        record["stamp"] = source.stamps[len(records)]
      if isinstance(pair, str):
        record["unreadable"] = pair
      elif not _fit(*pair[:2], scale):
        record["mismatch"] = f"HR {named_by(pair[0].shape)}, LR {named_by(pair[1].shape)}"
      else:
        *images, record["grey"] = pair
        for key, image, file in zip(("hr", "lr"), images, (hr_file, lr_file), strict=True):
          pixels = np.ascontiguousarray(image)
          record[key] = list(image.shape[:2])
          record[f"{key}_offset"] = ends[key]
          record[f"{key}_sha256"] = sha256(pixels)
          ends[key] += file.write(pixels)
          file.flush()  # before the journal says that it is there
      records.append(record)
      journal.write(json.dumps(record).encode() + b"\n")
      journal.flush()
  return records


def _decoded(
  packs: pathlib.Path, source: Source, scale: int, convention: str, deep: bool
) -> Decoded:
  """Finds the images of a source that other packs have, made in the same way."""
  wanted, made, known = set(source.stamps or ()), "given" if source.has_lr else convention, {}
  if not deep and source.bits:  # which version 3 did not round
    wanted -= {stamp for i, stamp in enumerate(source.stamps or ()) if source.bits(i) == 16}
  for folder in packs.iterdir() if wanted else ():
    # It may be damaged, or another process may just have removed it.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
      index = read_index(folder) if is_whole(folder) else {}
      if (index.get("format"), index.get("scale"), index.get("convention")) == (
        FORMATS[16 if deep else 8], scale, made,
      ):  # fmt: skip
        entries = (entry for entry in index["images"] if entry.get("stamp") in wanted)
        known |= {entry["stamp"]: (folder, entry) for entry in entries}
  if known:
    logging.warning("%d of %d images of %s were decoded before, and are copied",
                    len(known), len(source.names), source.description)  # fmt: skip
  return known


def _copy(
  folder: pathlib.Path, entry: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, bool] | None:
  """Reads an image's HR and LR pixels from another pack; None if they are not what was written."""
  try:
    pair = []
    for key in ("hr", "lr"):
      with open(folder / f"{key}.bin", "rb") as file:
        file.seek(entry[f"{key}_offset"])
        data = file.read(byte_count(entry, key))
      if hashlib.sha256(data).hexdigest() != entry[f"{key}_sha256"]:
        return None
      pair.append(np.frombuffer(data, dtype_of(entry)).reshape(*entry[key], 3))
    return *pair, bool(entry["grey"])
  except (OSError, LookupError, TypeError, ValueError):
    return None


def _resume(partial: pathlib.Path, key: str, names: Sequence[str]) -> list[dict[str, Any]]:
  """Returns the records of a build that was interrupted, and cuts its files back to them.

  Only images whose pixels have the recorded sha256 are kept: after a power failure a file may have
  its full length but not its contents.
  """
  header = json.dumps({"key": key}) + "\n"
  lines = []
  if (partial / JOURNAL).exists():
    lines = (partial / JOURNAL).read_text(errors="replace").splitlines(keepends=True)
  if lines[:1] != [header]:  # nothing there, or of other files
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_file(partial / JOURNAL, header)
    return []
  records = []
  with (
    open_to_append(partial / "hr.bin") as hr_file,
    open_to_append(partial / "lr.bin") as lr_file,
  ):
    for name, line in zip(names, lines[1:], strict=False):
      record = _parsed(line)
      if record.get("name") != name or ("hr" in record and not (
        pixels_match(hr_file, record, "hr") and pixels_match(lr_file, record, "lr")
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
  """Parses a line of the journal; returns {} if the line was cut off."""
  try:
    return json.loads(line) if line.endswith("\n") else {}
  except ValueError:
    return {}


def _ends(records: list[dict[str, Any]]) -> dict[str, int]:
  return {
    key: sum(byte_count(record, key) for record in records if key in record) for key in ("hr", "lr")
  }


def _check_room(
  partial: pathlib.Path, source: Source, scale: int, threads: int, done_bytes: int, bits: int
) -> None:
  cost = decoding_cost(source, scale, threads, bits)
  free = shutil.disk_usage(partial).free
  if cost and cost.disk_bytes - done_bytes > free:
    raise OSError(f"{cost.disk_bytes - done_bytes:,} bytes are needed and {free:,} are free")


def _to_rgb(image: np.ndarray) -> np.ndarray:
  return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image


def _map_in_order(
  function: Callable[[int], Any], numbers: Sequence[int], threads: int
) -> Iterator[Any]:
  """Yields the function of each number in turn, computed by several threads a few results ahead."""
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    for i in numbers:
      waiting.append(pool.submit(function, i))
      if len(waiting) > 2 * threads:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def _publish(partial: pathlib.Path, folder: pathlib.Path, key: str) -> None:
  if folder.exists() and not is_whole(folder):
    if any(folder.iterdir()):
      logging.warning("%s is damaged; it is made anew", folder)
    shutil.rmtree(folder)
  try:
    partial.rename(folder)
  except OSError:
    if not is_whole(folder, key):  # otherwise another process was faster, with the same bytes
      raise
    shutil.rmtree(partial)
