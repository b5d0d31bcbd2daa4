"""Images in folders: one folder, pairs of HR and LR, data sets as they are published, and the
photographs that come with scikit-image.
"""

import collections
import dataclasses
import functools
import importlib.util
import os
import pathlib

from absl import logging
import numpy as np

from sr_jax import UserError
from sr_jax.data.source import Flags, Source, name_list, stamp_of
from sr_jax.images.files import READABLE, image_size, list_images, read_image, split_files
from sr_jax.images.opening import bits_of
from sr_jax.machine.paths import user_path
from sr_jax.networks.blocks import UPSAMPLING

# Folders whose name says nothing about the set, which is then named after the parent folder.
HR_FOLDERS = ("HR", "GT", "original")

# How data sets are unpacked: the name of the HR folder -> the set, and the folder of its LR images
# beside it, '' where none are published. A folder that holds several of them is all of these sets.
LAYOUTS = {
  "DIV2K_train_HR": ("DIV2K", "DIV2K_train_LR_bicubic/X{scale}"),
  "Flickr2K_HR": ("Flickr2K", "Flickr2K_LR_bicubic/X{scale}"),
  "DF2K_HR": ("DF2K", "DF2K_LR_bicubic/X{scale}"),
  "OutdoorSceneTrain_v2": ("OST", ""),
}
TEST_LAYOUTS = {"DIV2K_valid_HR": ("DIV2K_valid", "DIV2K_valid_LR_bicubic/X{scale}")}

# Suffixes of files that may have 16 bits: the headers of others are not looked at.
DEEP = (".png", ".tif", ".tiff")

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


def merge(sources: list[Source]) -> Source:
  """Joins several sources into one, in which an image is called SET/NAME.

  Raises:
    UserError: two of the sources have the same name.
  """
  set_names = [source.set_name for source in sources]
  if len(set(set_names)) < len(set_names):
    raise UserError(
      "sets that are used together must have different names, but these are called "
      f"{', '.join(set_names)}; a set has the name of its folder, so rename one of the folders"
    )
  place = [(source, i) for source in sources for i in range(len(source.names))]
  sizes_known = all(source.size for source in sources)
  stamps_known = all(source.stamps for source in sources)
  return Source(
    set_name="+".join(set_names),
    names=tuple(f"{source.set_name}/{source.names[i]}" for source, i in place),
    load=lambda i: place[i][0].load(place[i][1]),
    has_lr=all(source.has_lr for source in sources),  # the others' are made when they are packed
    fingerprint=[[source.set_name, source.has_lr, source.fingerprint] for source in sources],
    description=" and ".join(source.description for source in sources),
    size=(lambda i: place[i][0].size(place[i][1])) if sizes_known else None,
    stamps=tuple(source.stamps[i] for source, i in place) if stamps_known else None,
    pairs=lambda i: place[i][0].pairs and place[i][0].pairs(place[i][1]),
    bits=lambda i: place[i][0].bits(place[i][1]) if place[i][0].bits else 8,
  )


def open_folder(folder: pathlib.Path, lr_spec: str, scale: int, keep_grey: bool) -> Source:
  """Opens a folder of images, or a data set that lies there as it was unpacked.

  Args:
    folder: a folder of images, one that holds them in one of HR_FOLDERS, perhaps with their LR
      images in LR beside it, or one that holds folders of LAYOUTS or TEST_LAYOUTS.
    lr_spec: the folder of the LR images; '' for those published with the data set, if any.
    scale: HR size / LR size.
    keep_grey: whether grey files are loaded as [H, W].

  Returns:
    The source.

  Raises:
    UserError: there are no images, an image does not have exactly one LR partner, or `lr_spec` is
      given for several data sets.
  """
  for layouts in (LAYOUTS, TEST_LAYOUTS):
    found = [name for name in layouts if (folder / name).is_dir()]
    if lr_spec and len(found) > 1:
      raise UserError(f"lr_source={lr_spec!r} goes with one of {', '.join(found)} of {folder}")
    if found:
      return _open_layouts(
        folder, {name: layouts[name] for name in found}, lr_spec, scale, keep_grey
      )
  hr_folder = next((folder / name for name in HR_FOLDERS if (folder / name).is_dir()), folder)
  if hr_folder != folder and not lr_spec and (folder / "LR").is_dir():
    lr_spec = str(folder / "LR")
    logging.warning("%s: taking the LR images of LR/; give %s for LR images that are made by "
                    "MATLAB's bicubic", folder, hr_folder)  # fmt: skip
  return _open_images(hr_folder, lr_spec, scale, keep_grey)


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
  source = parts[0] if len(parts) == 1 else merge(parts)
  logging.warning("%s: taking %s", folder, source.description)
  return source


def _open_images(folder: pathlib.Path, lr_spec: str, scale: int, keep_grey: bool) -> Source:
  paths, others = split_files(folder)
  if not paths:
    raise UserError(
      f"no images ({', '.join(READABLE)}) found in {folder}; give the folder that holds them"
    )
  if others:
    logging.warning(
      "%s: %d of %d files are not taken for images, by their suffixes:\n%s",
      folder, len(others), len(others) + len(paths),
      name_list([path.relative_to(folder).as_posix() for path in others], limit=5),
    )  # fmt: skip
  lr_paths = _find_partners(folder, paths, lr_spec, scale) if lr_spec else []
  resolved = folder.resolve()
  return of_files(
    set_name=resolved.parent.name if resolved.name in HR_FOLDERS else resolved.name,
    names=tuple(path.relative_to(folder).as_posix() for path in paths),
    paths=paths,
    lr_paths=lr_paths,
    keep_grey=keep_grey,
    description=f"{folder}, LR from {lr_spec}" if lr_spec else str(folder),
  )


def open_skimage(part: str, keep_grey: bool) -> Source:
  """Opens photographs that come with the package scikit-image.

  Args:
    part: a key of SKIMAGE.
    keep_grey: whether grey files are loaded as [H, W].

  Returns:
    The source, which has no LR images.

  Raises:
    UserError: another part; or the package, or one of its photographs, is not installed.
  """
  if part not in SKIMAGE:
    choices = " or ".join(f"skimage:{name}" for name in SKIMAGE)
    raise UserError(f"source 'skimage:{part}' must be {choices}")
  package = importlib.util.find_spec("skimage")  # found, not imported: only its files are wanted
  if package is None or package.origin is None:
    raise UserError(
      f"source 'skimage:{part}' needs scikit-image; pip install scikit-image, or give a folder"
    )
  paths = [pathlib.Path(package.origin).parent / "data" / name for name in SKIMAGE[part]]
  if missing := [str(path) for path in paths if not path.is_file()]:
    raise UserError(
      f"source 'skimage:{part}' must come with scikit-image, but its build here lacks "
      f"{', '.join(missing)}; pip install --upgrade scikit-image, or give a folder"
    )
  return of_files(
    set_name=f"skimage_{part}",
    names=SKIMAGE[part],
    paths=paths,
    lr_paths=[],
    keep_grey=keep_grey,
    description=f"{part} photographs of scikit-image",
  )


def of_files(
  *,
  set_name: str,
  names: tuple[str, ...],
  paths: list[pathlib.Path],
  lr_paths: list[pathlib.Path],
  keep_grey: bool,
  description: str,
) -> Source:
  """Makes a source of image files.

  Args:
    set_name: what results call the set.
    names: the names of the images, all different.
    paths: the files of the HR images, in the order of the names.
    lr_paths: the files of the LR images in the same order, or [].
    keep_grey: whether grey files are loaded as [H, W].
    description: what logs and errors call the source.
  """

  def read(path: pathlib.Path) -> np.ndarray:
    if path.is_symlink() and not path.exists():  # no fault of the disk, after which all would stop
      raise UserError(f"{path} is a link to {path.readlink()}, which does not exist")
    return read_image(path, keep_grey=keep_grey, keep_bits=True)

  @functools.cache
  def bits(i: int) -> int:
    files = [paths[i], *(lr_paths[i : i + 1])]
    return max(bits_of(path) if path.suffix.lower() in DEEP else 8 for path in files)

  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    return read(paths[i]), read(lr_paths[i]) if lr_paths else None

  fingerprint = [[name, *stamp_of(path)] for name, path in zip(names, paths, strict=True)]
  fingerprint += [[path.name, *stamp_of(path)] for path in lr_paths]
  stamps = [str((os.path.realpath(path), *stamp_of(path))) for path in paths]
  for i, path in enumerate(lr_paths):
    stamps[i] += str((os.path.realpath(path), *stamp_of(path)))
  return Source(
    set_name,
    names,
    load,
    bool(lr_paths),
    fingerprint,
    description,
    size=lambda i: image_size(paths[i]),
    stamps=tuple(stamps),
    pairs=(lambda i: (paths[i], lr_paths[i])) if lr_paths else None,
    bits=bits,
  )


def check_sizes(source: Source, scale: int, flags: Flags) -> None:
  """Compares the sizes of HR and LR images, by the files' headers alone.

  An LR image of a size that was rounded down is of another scale than it seems: 24 pixels of 99 are
  shifted by up to 3 HR pixels, from which a network would learn to blur.

  Args:
    source: the images, perhaps of several folders.
    scale: HR size / LR size.
    flags: what the settings are called.

  Raises:
    UserError: an HR image is not exactly `scale` times as large as its LR image; lists all.
  """
  pairs = [source.pairs(i) for i in range(len(source.names))] if source.pairs else []
  faults, ratios = [], set()
  for hr_path, lr_path in filter(None, pairs):
    (hr_height, hr_width), (height, width) = image_size(hr_path), image_size(lr_path)
    if hr_height and height:
      fits = (hr_height, hr_width) == (
        height * (hr_height // height),
        width * (hr_height // height),
      )
      ratios.add(hr_height // height if fits else 0)
    # A header that cannot be read is (0, 0), and is reported when the file is decoded.
    if hr_height and height and (hr_height, hr_width) != (height * scale, width * scale):
      faults.append(
        f"{hr_path}: HR {hr_width}x{hr_height}, LR {width}x{height} ({lr_path.name}); HR must be "
        f"{width * scale}x{height * scale}"
      )
  if faults:
    other = ratios.pop() if len(ratios) == 1 else 0
    if other in UPSAMPLING:
      fix = f"all of them fit scale {other}; try {flags.scale}={other}"
    else:
      fix = (
        f"give the folder of the HR images as {flags.source}, without {flags.lr}, and LR images "
        "are made from HR images that are cropped to fit; or, if yours were made from cropped HR "
        "images, give those"
      )
    raise UserError(
      f"{flags.source}: each HR image must be exactly {scale} times as large as its LR image; "
      f"{fix}:\n{name_list(faults)}"
    )


def _find_partners(
  folder: pathlib.Path, paths: list[pathlib.Path], lr_spec: str, scale: int
) -> list[pathlib.Path]:
  """Returns the LR path of each HR path.

  Raises:
    UserError: the two do not match one to one; lists the files at fault.
  """
  lr_folder = user_path(lr_spec)
  lr_paths = list_images(lr_folder)
  by_stem: dict[str, list[pathlib.Path]] = {}
  for path in lr_paths:
    by_stem.setdefault(path.relative_to(lr_folder).with_suffix("").as_posix(), []).append(path)

  partners, faults = [], []
  for path in paths:
    stem = path.relative_to(folder).with_suffix("").as_posix()
    found = by_stem.get(stem, []) + by_stem.get(f"{stem}x{scale}", [])
    partners += found
    if len(found) != 1:
      faults.append(
        f"{path}: expected exactly one LR image named {stem} or {stem}x{scale}, found {len(found)}"
      )
  uses = collections.Counter(partners)
  faults += [
    f"{path}: expected exactly one HR image for this LR image, found {uses[path]}"
    for path in lr_paths
    if uses[path] != 1
  ]
  if faults:
    raise UserError(
      f"each image of {folder} must have one partner in {lr_folder} for scale {scale}; "
      f"rename or remove:\n{name_list(faults)}"
    )
  return partners
