"""Images in folders: one folder, pairs of HR and LR, data sets as they are published, and the
photographs that come with scikit-image.
"""

import collections
import dataclasses
import importlib.util
import pathlib

from absl import logging
import numpy as np

from sr_jax import UserError
from sr_jax.data.source import Source, name_list, stamp_of
from sr_jax.images.files import SUFFIXES, image_size, list_images, read_image

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
  return Source(
    set_name="+".join(set_names),
    names=tuple(f"{source.set_name}/{source.names[i]}" for source, i in place),
    load=lambda i: place[i][0].load(place[i][1]),
    has_lr=all(source.has_lr for source in sources),  # the others' are made when they are packed
    fingerprint=[[source.set_name, source.has_lr, source.fingerprint] for source in sources],
    description=" and ".join(source.description for source in sources),
    size=(lambda i: place[i][0].size(place[i][1])) if sizes_known else None,
  )


def open_folder(folder: pathlib.Path, lr_spec: str, scale: int, keep_grey: bool) -> Source:
  """Opens a folder of images, or a data set that lies there as it was unpacked.

  Args:
    folder: a folder of images, one that holds them in one of HR_FOLDERS, or one that holds folders
      of LAYOUTS or TEST_LAYOUTS.
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
  source = parts[0] if len(parts) == 1 else merge(parts)
  logging.warning("%s: taking %s", folder, source.description)
  return source


def _open_images(folder: pathlib.Path, lr_spec: str, scale: int, keep_grey: bool) -> Source:
  paths = list_images(folder)
  if not paths:
    raise UserError(
      f"no images ({', '.join(SUFFIXES)}) found in {folder}; give the folder that holds them"
    )
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

  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    hr = read_image(paths[i], keep_grey=keep_grey)
    return hr, read_image(lr_paths[i], keep_grey=keep_grey) if lr_paths else None

  fingerprint = [[name, *stamp_of(path)] for name, path in zip(names, paths, strict=True)]
  fingerprint += [[path.name, *stamp_of(path)] for path in lr_paths]
  return Source(
    set_name,
    names,
    load,
    bool(lr_paths),
    fingerprint,
    description,
    size=lambda i: image_size(paths[i]),
  )


def _find_partners(
  folder: pathlib.Path, paths: list[pathlib.Path], lr_spec: str, scale: int
) -> list[pathlib.Path]:
  """Returns the LR path of each HR path.

  Raises:
    UserError: the two do not match one to one; lists the files at fault.
  """
  lr_folder = pathlib.Path(lr_spec).expanduser()
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
