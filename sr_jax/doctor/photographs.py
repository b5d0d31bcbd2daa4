"""Checks whether images decode, and what is wrong with those to train on."""

import argparse
import collections
import hashlib
import io
import multiprocessing.pool
import pathlib
import re
import shutil
import warnings
from typing import NamedTuple

from sr_jax import UserError
from sr_jax.machine import cpus
from sr_jax.doctor.finding import FAULT, GIB, OK, WARNING, Finding, Findings
from sr_jax.machine.paths import user_path


def check_decoding(args: argparse.Namespace) -> Findings:
  """Checks that image files can be written and read back; PNG must come back to the bit."""
  del args
  import numpy as np
  import PIL
  from PIL import Image, features

  from sr_jax.images.files import SAVE_OPTIONS, read_image

  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (24, 40, 3), np.uint8)
  y, x = np.mgrid[:24, :40]
  smooth = np.stack([6 * x, 10 * y, 3 * x + 4 * y], -1).astype(np.uint8)
  fine = []
  # Mean errors of 8-bit values: JPEG of quality 95 is off by 1 to 2 on the smooth image.
  for format_name, image, allowed in (
    ("PNG", noise, 0),
    ("JPEG", smooth, 4),
    ("WEBP", noise, 0),
    ("BMP", noise, 0),
    ("TIFF", noise, 0),
  ):
    level = FAULT if format_name in ("PNG", "JPEG") else WARNING
    remedy = "pip install --force-reinstall pillow"
    try:
      with io.BytesIO() as file:
        options = SAVE_OPTIONS.get(format_name, {})
        Image.fromarray(image).save(file, format_name, **options)
        back = read_image(file.getvalue())
    except (KeyError, ValueError, OSError) as error:
      what = f"Pillow {PIL.__version__} cannot write and read {format_name}: {error!r}"
      yield Finding(level, "codec-missing", what, remedy)
      continue
    error = np.abs(back.astype(int) - image).mean() if back.shape == image.shape else 255
    if error > allowed:
      what = f"{format_name} comes back with a mean error of {error:.2f}/255, must be <= {allowed}"
      yield Finding(FAULT, "codec-wrong", what, remedy)
    else:
      fine.append(format_name)
  turbo = features.version("libjpeg_turbo") or "none"
  if fine:
    what = f"{', '.join(fine)} return as written; Pillow {PIL.__version__}, libjpeg-turbo {turbo}"
    yield Finding(OK, "", what)


class Image(NamedTuple):
  """What the audit notes about a file."""

  path: pathlib.Path
  digest: str = ""
  size: tuple[int, int] = (0, 0)  # width, height after rotation
  kinds: tuple[str, ...] = ()
  problem: str = ""


def check_data(args: argparse.Namespace) -> Findings:
  """Checks every image of --data, decoded as training will decode it."""
  from sr_jax.data.folders import HR_FOLDERS
  from sr_jax.images.files import READABLE, list_images

  if not args.data:
    yield Finding(OK, "", "not asked for; --data DIR decodes every image of a folder")
    return
  folder = user_path(args.data)
  if not folder.is_dir():
    yield _source_finding(args.data)
    return
  folder = next((folder / sub for sub in HR_FOLDERS if (folder / sub).is_dir()), folder)
  paths = list_images(folder)
  if not paths:
    what = f"{folder} holds no images ({', '.join(READABLE)})"
    yield Finding(FAULT, "no-images", what, "give the folder that holds the HR images")
    return
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's, of sizes that sr_jax allows
    with multiprocessing.pool.ThreadPool(min(16, cpus.available())) as pool:
      audited = pool.map(_audit, paths)
  good = [image for image in audited if not image.problem]
  if good:
    sizes = sorted((image.size for image in good), key=lambda size: size[0] * size[1])
    kinds = collections.Counter(kind for image in good for kind in image.kinds)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    smallest, largest = (f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))
    what = f"{len(good)} of {len(paths)} images of {folder}, {smallest} to {largest}: {told}"
    yield Finding(OK, "", what)
  yield from _unusable(audited, folder, args.hr_patch)
  yield from _treated(good)
  yield from _twice(good, folder)
  yield from _decoded_size(good, args.cache)


def _source_finding(spec: str) -> Finding:
  from sr_jax.data import sources

  if ":" not in spec:
    what, remedy = f"--data={spec} is no folder", "give the folder that holds the HR images"
    return Finding(FAULT, "no-data", what, remedy)
  try:
    count = len(sources.open_source(spec).names)
  except (UserError, OSError) as error:
    remedy = "give a folder of images, or prepare the TFDS data set: tfds build NAME"
    return Finding(FAULT, "no-data", f"--data={spec}: {str(error).splitlines()[0]}", remedy)
  return Finding(OK, "", f"{spec}: {count} images; only folders are decoded and audited")


def _audit(path: pathlib.Path) -> Image:
  import PIL.Image

  from sr_jax.images.files import read_image
  from sr_jax.images.opening import bits_of

  try:
    data = path.read_bytes()
    height, width = read_image(data).shape[:2]
  except Exception as error:
    reason = re.sub(r"^\d+ bytes: ", "", str(error)).split("; ")[0]
    return Image(path, problem=reason or type(error).__name__)
  with PIL.Image.open(io.BytesIO(data)) as header:
    mode, turned = header.mode, header.getexif().get(0x0112, 1) not in (0, 1)
    alpha = header.has_transparency_data
  kinds = ["grey" if mode in ("1", "L", "LA", "La") or mode.startswith("I") else ""]
  kinds += ["CMYK" if mode == "CMYK" else "", "with alpha" if alpha else ""]
  deep = "16-bit" if bits_of(data) == 16 else ""
  deep = deep or ("16-bit grey" if mode.startswith("I") else "")
  kinds += [deep, "turned by EXIF" if turned else ""]
  kinds = tuple(kind for kind in kinds if kind)
  color = () if "grey" in kinds or "CMYK" in kinds else ("RGB",)
  return Image(path, hashlib.sha256(data).hexdigest(), (width, height), color + kinds)


def _unusable(audited: list[Image], folder: pathlib.Path, patch: int) -> Findings:
  """Reports unusable images, which training leaves out if they are few."""
  from sr_jax.data.pack import MAX_BAD_FRACTION

  bombs = [image for image in audited if "more than max_pixels" in image.problem]
  unread = [image for image in audited if image.problem and image not in bombs]
  small = [image for image in audited if not image.problem and min(image.size) < patch]
  unusable = len(bombs) + len(unread) + len(small)
  few = unusable <= MAX_BAD_FRACTION * len(audited)
  then = "left out of the training" if few else "too many: training refuses the folder"
  for found, name, remedy in (
    (unread, "images-unreadable", "repair them from their source, or remove them"),
    (bombs, "images-too-large", "cut them into parts, or remove them"),
    (small, "images-too-small", f"remove them, or train with --config.data.hr_patch below {patch}"),
  ):
    if found:
      told = _names([(i, i.problem or f"{i.size[0]}x{i.size[1]} < {patch}") for i in found], folder)
      what = f"{len(found)} of {len(audited)} images, {then}: {told}"
      yield Finding(WARNING if few else FAULT, name, what, remedy)


def _treated(good: list[Image]) -> Findings:
  rules = {
    "CMYK": "converted without their colour profile",
    "with alpha": "put on white",
    "16-bit": "trained on with their bits, 6 bytes a pixel for all images, and scored at 8 bits",
    "16-bit grey": "rounded to 8 bits, since they are neither PNG nor TIFF of 16 bits",
  }
  counts = {kind: sum(kind in image.kinds for image in good) for kind in rules}
  if any(counts.values()):
    what = ", ".join(f"{n} {kind} will be {rules[kind]}" for kind, n in counts.items() if n)
    remedy = "fine as it is? else convert them to 8-bit RGB yourself"
    yield Finding(WARNING, "images-converted", what, remedy)


def _twice(good: list[Image], folder: pathlib.Path) -> Findings:
  for name, key, what, remedy in (
    (
      "images-duplicate",
      lambda image: image.digest,
      "are the same file",
      "remove the copies: they count twice, and a copy of a test image must not be trained on",
    ),
    (
      "names-collide",
      lambda image: image.path.with_suffix("").as_posix().lower(),
      "differ only in suffix or case",
      "rename one: neither LR partners nor results can be told apart by name",
    ),
  ):
    groups = collections.defaultdict(list)
    for image in good:
      groups[key(image)].append(image)
    groups = [group for group in groups.values() if len(group) > 1]
    if groups:
      pairs = [(group[0], f"and {_relative(group[1], folder)}") for group in groups]
      told = f"{sum(map(len, groups))} images {what}: {_names(pairs, folder)}"
      yield Finding(WARNING, name, told, remedy)


def _decoded_size(good: list[Image], cache: str) -> Findings:
  needed = sum(width * height for width, height in (image.size for image in good)) * 3 * 17 // 16
  folder = user_path(cache).absolute()
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  what = f"decoded, with LR images of scale 4, they take {needed / GIB:.2f} GiB of the cache"
  if needed > free:
    what += f", which has {free / GIB:.2f} free (needless where they are in it already)"
    yield Finding(WARNING, "cache-too-small", what, "--config.data.cache_dir on a larger disk")
  else:
    yield Finding(OK, "", what)


def _relative(image: Image, folder: pathlib.Path) -> str:
  return image.path.relative_to(folder).as_posix()


def _names(found: list[tuple[Image, str]], folder: pathlib.Path, limit: int = 5) -> str:
  told = [f"{_relative(image, folder)} ({reason})" for image, reason in found[:limit]]
  return ", ".join(told) + (f" and {len(found) - limit} more" if len(found) > limit else "")
