"""Where images come from: a folder, a folder of pairs, a published data set, TFDS, a pack, or
photographs that come installed.

A source names its images and loads one at a time; nothing is read before `load`. What is done
with them is in `packed.py` (training) and `evaluate.py`. Nothing is ever downloaded.
"""

import collections
import dataclasses
import importlib.util
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging

from sr_jax import images

FORMAT_VERSION = 3  # of packs
HR_FOLDERS = ("HR", "GT", "original")  # their name says nothing: the set is named by the parent

# How data sets are unpacked: the name of the HR folder -> the set, and the folder of its LR images
# beside it, '' where none are published. A folder that holds several of them is all of these sets.
LAYOUTS = {
  "DIV2K_train_HR": ("DIV2K", "DIV2K_train_LR_bicubic/X{scale}"),
  "Flickr2K_HR": ("Flickr2K", "Flickr2K_LR_bicubic/X{scale}"),
  "DF2K_HR": ("DF2K", "DF2K_LR_bicubic/X{scale}"),
  "OutdoorSceneTrain_v2": ("OST", ""),
}
TEST_LAYOUTS = {"DIV2K_valid_HR": ("DIV2K_valid", "DIV2K_valid_LR_bicubic/X{scale}")}

# Photographs only, no drawings and no scans of text; the two tables never overlap.
SKIMAGE = {
  "train": (
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
  ),
  "test": ("astronaut.png", "camera.png"),
}

FORMS = f"""\
  DIR                  a folder of images, or one that holds them in HR/, GT/ or original/, or as
                       DIV2K, Flickr2K and OST are unpacked; or a pack of sr_jax.prepare
  DIR,DIR              several of them as one
  tfds:NAME[:SPLIT]    a prepared TensorFlow data set, as tfds:div2k/bicubic_x4:train
  skimage:train        {len(SKIMAGE["train"])} photographs that come with scikit-image
  skimage:test         {len(SKIMAGE["test"])} others"""

Load = Callable[[int], tuple[np.ndarray, np.ndarray | None]]


@dataclasses.dataclass(frozen=True)
class Source:
  """A set of images that are not loaded yet.

  Attributes:
    set_name: what results call the set, fit for a folder's name.
    names: of the images, unique.
    load: i -> (HR, LR or None), uint8 [H, W, 3] ([H, W] for grey files with `keep_grey`). May be
      called from several threads; cheapest in ascending order. Raises ValueError or OSError.
    has_lr: whether `load` gives LR images.
    fingerprint: JSON values that change when the files do: names, sizes, modification times.
    description: for logs and errors.
    size: i -> height and width of HR from the file's header, (0, 0) where it has none; None where
      that needs decoding.
    pack: folder of the pack that the source is.
  """

  set_name: str
  names: tuple[str, ...]
  load: Load
  has_lr: bool
  fingerprint: list[Any]
  description: str
  size: Callable[[int], tuple[int, int]] | None = None
  pack: pathlib.Path | None = None


def open_source(spec: str, lr_spec: str = "", scale: int = 4, *, keep_grey: bool = False) -> Source:
  """Open a set of images by its text form.

  Args:
    spec: one of `FORMS`. A folder of `LAYOUTS` comes with the LR images published with it, where
      they lie beside it; the HR folder itself has none.
    lr_spec: folder of the LR images of a folder `spec`, matched by relative path without suffix;
      `babyx4.png` is the partner of `baby.png` as well. '' for none.
    scale: HR size / LR size; for the names of LR files, and a pack must have it.
    keep_grey: load grey files as [H, W], as evaluation wants it.

  Returns:
    The source, its names sorted (TFDS: in the data set's order).

  Raises:
    ValueError: an unknown form, an empty folder, partners that are missing, TFDS data that are
      not prepared on this machine, a pack of another scale.
  """
  scheme, _, rest = spec.partition(":")
  folder = pathlib.Path(spec).expanduser()
  several = "," in spec and not folder.is_dir()
  if lr_spec and (several or scheme in ("tfds", "skimage") or is_pack(folder)):
    raise ValueError(f"lr_source={lr_spec!r} goes with a folder, not with {spec!r}; leave it out")
  if several:
    parts = [part.strip() for part in spec.split(",")]
    return _merged([open_source(part, "", scale, keep_grey=keep_grey) for part in parts])
  if scheme == "tfds" and rest:
    return _open_tfds(rest, keep_grey)
  if scheme == "skimage" and rest in SKIMAGE:
    return _open_skimage(rest, keep_grey)
  if spec and is_pack(folder):
    return _open_pack(folder, scale, keep_grey)
  if spec and folder.is_dir():
    return _open_folder(folder, lr_spec, scale, keep_grey)
  raise ValueError(f"source {spec!r} must be an existing folder or one of these forms:\n{FORMS}")


def name_list(names: list[str], limit: int = 20) -> str:
  """Format names for an error: the first ones, one a line, and how many more there are."""
  more = [f"... and {len(names) - limit} more"] if len(names) > limit else []
  return "\n".join(f"  {name}" for name in [*names[:limit], *more])


def is_pack(folder: pathlib.Path) -> bool:
  """Whether a folder is a pack, whole or damaged, of `packed.py`."""
  return (folder / "index.json").is_file() and (folder / "hr.bin").is_file()


def _open_pack(folder: pathlib.Path, scale: int, keep_grey: bool) -> Source:
  try:
    index = json.loads((folder / "index.json").read_text())
    version, made_for, entries = index["format"], index["scale"], index["images"]
  except (ValueError, LookupError, TypeError) as error:
    raise ValueError(f"{folder}/index.json cannot be read ({error!r}); prepare it again") from error
  if version != FORMAT_VERSION:
    raise ValueError(
      f"{folder} is a pack of format {version} and must be of {FORMAT_VERSION}; prepare it again"
    )
  if made_for != scale:
    raise ValueError(
      f"{folder} was prepared for scale {made_for} and the scale must be {scale}; prepare another "
      f"with --scale={scale}, or set --config.scale={made_for}"
    )

  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    pair = []
    for key in ("hr", "lr"):
      (height, width), offset = entries[i][key], entries[i][f"{key}_offset"]
      pixels = np.fromfile(folder / f"{key}.bin", np.uint8, height * width * 3, offset=offset)
      if pixels.size < height * width * 3:
        raise ValueError(f"{folder}/{key}.bin is cut off; prepare it again")
      image = pixels.reshape(height, width, 3)
      pair.append(image[:, :, 0] if keep_grey and entries[i]["grey"] else image)
    return tuple(pair)

  return Source(
    set_name=folder.resolve().name,
    names=tuple(entry["name"] for entry in entries),
    load=load,
    has_lr=True,
    fingerprint=[[entry[key] for key in ("name", "hr_sha256", "lr_sha256")] for entry in entries],
    description=f"{folder}, prepared from {index['source']}",
    size=lambda i: tuple(entries[i]["hr"]),
    pack=folder,
  )


def _merged(sources: list[Source]) -> Source:
  """Several sources as one, each image's name after the name of its set."""
  set_names = [source.set_name for source in sources]
  if len(set(set_names)) < len(set_names):
    raise ValueError(f"sets to merge must have names of their own, not {', '.join(set_names)}")
  place = [(source, i) for source in sources for i in range(len(source.names))]
  sizes_known = all(source.size for source in sources)
  return Source(
    set_name="+".join(set_names),
    names=tuple(f"{source.set_name}/{source.names[i]}" for source, i in place),
    load=lambda i: place[i][0].load(place[i][1]),
    has_lr=all(source.has_lr for source in sources),  # the others' are made when they are packed
    fingerprint=[[source.set_name, source.has_lr, source.fingerprint] for source in sources],
    description=" and ".join(source.description for source in sources),
    size=(lambda i: place[i][0].size(place[i][1])) if sizes_known else None,
  )


def _open_folder(folder: pathlib.Path, lr_spec: str, scale: int, keep_grey: bool) -> Source:
  for layouts in (LAYOUTS, TEST_LAYOUTS):
    found = [name for name in layouts if (folder / name).is_dir()]
    if lr_spec and len(found) > 1:
      raise ValueError(f"lr_source={lr_spec!r} goes with one of {', '.join(found)} of {folder}")
    if found:
      return _open_layouts(
        folder, {name: layouts[name] for name in found}, lr_spec, scale, keep_grey
      )
  folder = next((folder / name for name in HR_FOLDERS if (folder / name).is_dir()), folder)
  return _open_images(folder, lr_spec, scale, keep_grey)


def _open_layouts(
  folder: pathlib.Path,
  layouts: dict[str, tuple[str, str]],
  lr_spec: str,
  scale: int,
  keep_grey: bool,
) -> Source:
  parts = []
  for name, (set_name, lr_name) in layouts.items():
    lr_folder = folder / lr_name.format(scale=scale)
    published = str(lr_folder) if lr_name and lr_folder.is_dir() else ""
    source = _open_images(folder / name, lr_spec or published, scale, keep_grey)
    parts.append(dataclasses.replace(source, set_name=set_name))
  source = parts[0] if len(parts) == 1 else _merged(parts)
  logging.warning("%s: taking %s", folder, source.description)
  return source


def _open_images(folder: pathlib.Path, lr_spec: str, scale: int, keep_grey: bool) -> Source:
  paths = images.list_images(folder)
  if not paths:
    raise ValueError(f"{str(folder)!r} must hold images ({', '.join(images.SUFFIXES)}), has none")
  lr_paths = _find_partners(folder, paths, lr_spec, scale) if lr_spec else []
  resolved = folder.resolve()
  return _of_files(
    set_name=resolved.parent.name if resolved.name in HR_FOLDERS else resolved.name,
    names=tuple(path.relative_to(folder).as_posix() for path in paths),
    paths=paths,
    lr_paths=lr_paths,
    keep_grey=keep_grey,
    description=f"{folder}, LR from {lr_spec}" if lr_spec else str(folder),
  )


def _open_skimage(part: str, keep_grey: bool) -> Source:
  package = importlib.util.find_spec("skimage")  # found, not imported: only its files are wanted
  if package is None or package.origin is None:
    raise ValueError(
      f"source 'skimage:{part}' needs scikit-image; pip install scikit-image, or give a folder"
    )
  paths = [pathlib.Path(package.origin).parent / "data" / name for name in SKIMAGE[part]]
  if missing := [str(path) for path in paths if not path.is_file()]:
    raise ValueError(
      f"source 'skimage:{part}' must come with scikit-image, but its build here lacks "
      f"{', '.join(missing)}; pip install --upgrade scikit-image, or give a folder"
    )
  return _of_files(
    set_name=f"skimage_{part}",
    names=SKIMAGE[part],
    paths=paths,
    lr_paths=[],
    keep_grey=keep_grey,
    description=f"{part} photographs of scikit-image",
  )


def _of_files(
  *,
  set_name: str,
  names: tuple[str, ...],
  paths: list[pathlib.Path],
  lr_paths: list[pathlib.Path],
  keep_grey: bool,
  description: str,
) -> Source:
  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    hr = images.read_image(paths[i], keep_grey=keep_grey)
    return hr, images.read_image(lr_paths[i], keep_grey=keep_grey) if lr_paths else None

  fingerprint = [[name, *_stamp(path)] for name, path in zip(names, paths, strict=True)]
  fingerprint += [[path.name, *_stamp(path)] for path in lr_paths]
  return Source(
    set_name,
    names,
    load,
    bool(lr_paths),
    fingerprint,
    description,
    size=lambda i: images.image_size(paths[i]),
  )


def _stamp(path: pathlib.Path) -> tuple[int, int]:
  stat = path.stat()
  return stat.st_size, stat.st_mtime_ns


def _find_partners(
  folder: pathlib.Path, paths: list[pathlib.Path], lr_spec: str, scale: int
) -> list[pathlib.Path]:
  """The LR path of each HR path; raises unless it is one to one."""
  lr_folder = pathlib.Path(lr_spec).expanduser()
  lr_paths = images.list_images(lr_folder)
  by_stem: dict[str, list[pathlib.Path]] = {}
  for path in lr_paths:
    by_stem.setdefault(path.relative_to(lr_folder).with_suffix("").as_posix(), []).append(path)

  partners, faults = [], []
  for path in paths:
    stem = path.relative_to(folder).with_suffix("").as_posix()
    found = by_stem.get(stem, []) + by_stem.get(f"{stem}x{scale}", [])
    partners += found
    if len(found) != 1:
      faults.append(f"{path}: {len(found)} LR images {stem} or {stem}x{scale}, must be one")
  uses = collections.Counter(partners)
  faults += [f"{path}: {uses[path]} HR images, must be one" for path in lr_paths if uses[path] != 1]
  if faults:
    raise ValueError(
      f"each image of {folder} must have one partner in {lr_folder} for scale {scale}; "
      f"rename or remove:\n{name_list(faults)}"
    )
  return partners


def _open_tfds(rest: str, keep_grey: bool) -> Source:
  name, _, split = rest.partition(":")
  split = split or "train"
  folder = _prepared_folder(name, f"tfds:{rest}")
  # Not at the top: sources without TensorFlow must open where it is not installed.
  from sr_jax.data import tf_input

  tf_input.import_tensorflow()
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(folder)
  hr_key, lr_key = _image_features(builder.info.features, tfds.features.Image, name)
  try:
    count = builder.info.splits[split].num_examples
  except (KeyError, ValueError) as error:
    raise ValueError(
      f"split {split!r} of {name} must be one of {', '.join(builder.info.splits)} "
      f"or a slice as {next(iter(builder.info.splits), 'train')}[:90%]"
    ) from error
  keys = [key for key in (hr_key, lr_key) if key]

  def records() -> Iterator[dict[str, bytes]]:
    decoders = tfds.decode.PartialDecoding(
      dict.fromkeys(keys, True), decoders=dict.fromkeys(keys, tfds.decode.SkipDecoding())
    )
    config = tfds.ReadConfig(try_autocache=False)  # each record is read once
    data_set = builder.as_dataset(split=split, decoders=decoders, read_config=config)
    return iter(tfds.as_numpy(data_set))

  record = _in_order(records)

  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    files = record(i)
    hr = images.read_image(files[hr_key], keep_grey=keep_grey)
    return hr, images.read_image(files[lr_key], keep_grey=keep_grey) if lr_key else None

  # Whole records sit in these files: a data set prepared anew has new stamps.
  files = sorted(path for path in folder.iterdir() if path.is_file())
  return Source(
    set_name=name.replace("/", "_"),
    names=tuple(f"{split}/{i:06d}" for i in range(count)),
    load=load,
    has_lr=bool(lr_key),
    fingerprint=[[name, split, hr_key, lr_key], *[[path.name, *_stamp(path)] for path in files]],
    description=f"{folder}, split {split}",
  )


def _prepared_folder(name: str, spec: str) -> pathlib.Path:
  """The folder of a data set that is prepared on disk; decided without importing TensorFlow."""
  data_dir = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
  folder = data_dir / name
  found = [*folder.glob("dataset_info.json"), *folder.glob("*/dataset_info.json")]
  if found:  # NAME may end in a version; without one the newest counts
    return max((path.parent for path in found), key=_version)
  raise ValueError(
    f"source {spec!r} must be prepared in {data_dir} ($TFDS_DATA_DIR), and is not. sr_jax never "
    "downloads: prepare it once (NAME needs its config, as div2k/bicubic_x4) with\n"
    f"  tfds build {name}\n"
    "or give a folder of images instead:\n"
    "  --config.data.source=DIR --config.eval.source=DIR"
  )


def _version(folder: pathlib.Path) -> list[int]:
  return [int(part) if part.isdigit() else -1 for part in folder.name.split(".")]


def _image_features(features: Any, image_type: type, name: str) -> tuple[str, str]:
  """The keys of the HR and, or '', the LR images of a data set."""
  keys = [key for key, feature in features.items() if isinstance(feature, image_type)]
  if "hr" in keys:
    return "hr", "lr" if "lr" in keys else ""
  if "image" in keys or len(keys) == 1:
    return "image" if "image" in keys else keys[0], ""
  raise ValueError(
    f"{name} must have image features 'hr' and 'lr', or 'image'; it has {sorted(features)}; "
    "export its images to a folder and give --config.data.source=DIR"
  )


def _in_order(records: Callable[[], Iterator[Any]]) -> Callable[[int], Any]:
  """Random access to a sequential reader, cheap for threads that ask nearly in order.

  The last records passed on the way are kept until they are asked for; going further back
  starts anew.
  """
  lock = threading.Lock()
  iterator, position, waiting = None, 0, {}

  def get(i: int) -> Any:
    nonlocal iterator, position
    with lock:
      if iterator is None or (i < position and i not in waiting):
        iterator, position = records(), 0
        waiting.clear()
      while i not in waiting:
        if (record := next(iterator, None)) is None:
          raise ValueError(f"the data set ends before record {i}; prepare it again")
        waiting[position] = record
        position += 1
        if len(waiting) > 64:
          del waiting[min(waiting)]
      return waiting.pop(i)

  return get
