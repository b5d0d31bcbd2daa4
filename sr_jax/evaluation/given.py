"""SR images that another program made, paired with the HR images of a test set."""

import csv
import io
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from sr_jax import UserError
from sr_jax.data.source import name_list
from sr_jax.evaluation.test_sets import TestImage
from sr_jax.images.files import list_images, read_image
from sr_jax.machine.paths import user_path


class GivenImages:
  """Looks up an image's SR image instead of computing it.

  Args:
    label: what results call the program that made the images.
    folder: where they lie.
    names: the names of the set's HR images.
    scale: HR size / LR size.
    pairs: {name of an HR image: file of its SR image, in `folder`}; {} to pair by names.

  Raises:
    UserError: an HR image has several SR images, or none of them has one; lists all.
  """

  def __init__(
    self,
    label: str,
    folder: pathlib.Path,
    names: Sequence[str],
    scale: int,
    pairs: Mapping[str, str],
  ):
    self._label = label
    self._files = find_partners(folder, names, scale, pairs)

  def __call__(self, image: TestImage) -> np.ndarray:
    """Returns the SR image of a test image, of the shape of its HR image.

    Raises:
      UserError: there is none, or it has another size, or another number of channels.
    """
    if image.name not in self._files:
      raise UserError(f"{self._label} has no image that is called like it, and --pairs names none")
    path = self._files[image.name]
    sr = read_image(path, keep_grey=True)
    height, width = image.hr.shape[:2]
    if sr.shape[:2] == image.whole[:2]:  # made of an LR image that HR was not cropped for
      sr = sr[:height, :width]
    if sr.shape[:2] != (height, width):
      raise UserError(f"{path} of {self._label}: {self._why(sr.shape, image)}")
    if image.hr.ndim == 2 and sr.ndim == 3:
      if np.ptp(sr, axis=2).max():
        raise UserError(f"{path} of {self._label} has colours, and {image.name} is grey")
      sr = sr[:, :, 0]
    return np.repeat(sr[:, :, None], 3, axis=2) if image.hr.ndim > sr.ndim else sr

  def _why(self, shape: Sequence[int], image: TestImage) -> str:
    """Says which size is wrong, and the likely reason."""
    (height, width), (lr_height, lr_width) = image.hr.shape[:2], image.lr.shape[:2]
    sizes = f"SR is {shape[1]}x{shape[0]}, HR {width}x{height}"
    if tuple(shape[:2]) == (lr_height, lr_width):
      return f"{sizes}: this is the LR image"
    for scale in (1, 2, 3, 4, 8):
      if tuple(shape[:2]) == (lr_height * scale, lr_width * scale):
        return f"{sizes}: it was upscaled {scale} times; give --scale={scale}"
    if (shape[0] > shape[1]) != (height > width) and tuple(shape[1::-1]) == (height, width):
      return f"{sizes}: it is turned; apply the photograph's orientation before upscaling"
    return (
      f"{sizes}: upscale the LR image of HR cropped to a multiple of the scale, whole and not in "
      "parts"
    )


def find_partners(
  folder: pathlib.Path, names: Sequence[str], scale: int, pairs: Mapping[str, str]
) -> dict[str, pathlib.Path]:
  """Finds the SR image of each HR image.

  By its relative path without suffix, or the same with `_x4` or `x4` (4 is the scale) or `_SR` or
  `_out` after it, or one of each as in `_x4_SR`, in any case; where subfolders differ, by the last
  part of the path alone.

  Args:
    folder: with the SR images.
    names: of the HR images.
    scale: of the suffixes.
    pairs: {name: file}, which stand over names.

  Returns:
    {HR image: file}, without the HR images that have none.

  Raises:
    UserError: no image has a partner, or one has several, or one that is another's too; or `pairs`
      names what is not there.
  """
  if unknown := sorted(set(pairs) - set(names)):
    raise UserError(
      f"--pairs names {unknown[0]!r}, which is not an image of the set; its images are called "
      f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    )
  by_path: dict[str, list[pathlib.Path]] = {}
  by_stem: dict[str, list[pathlib.Path]] = {}
  for path in list_images(folder):
    whole = path.relative_to(folder).with_suffix("")
    for stem in _without_ending(path.stem, scale):
      by_path.setdefault(whole.with_name(stem).as_posix(), []).append(path)
      by_stem.setdefault(stem, []).append(path)
  partners, faults, missing = {}, [], []
  for name in names:
    if name in pairs:
      path = folder / pairs[name]
      if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        faults.append(f"{name}: --pairs gives {pairs[name]}, which is no file in {folder}")
      partners[name] = path
      continue
    whole = pathlib.PurePosixPath(name).with_suffix("")
    found = by_path.get(whole.as_posix()) or by_stem.get(whole.name, [])
    if found:
      partners[name] = found[0]
    if len(found) != 1:
      fault = f"{name}: {len(found)} images called {whole.name}, {whole.name}_x{scale} or the like"
      (faults if found else missing).append(fault)
  if not partners:
    faults += missing
  owners: dict[pathlib.Path, str] = {}
  for name, path in partners.items():
    if owners.setdefault(path, name) != name:
      faults.append(f"{name}: its image {path.name} is that of {owners[path]} too")
  if faults:
    raise UserError(
      f"each HR image must have one SR image in {folder}; rename or remove, or pair them by "
      f"--pairs=FILE.csv with lines HR,SR:\n{name_list(faults)}"
    )
  return partners


def _without_ending(stem: str, scale: int) -> set[str]:
  """The names of HR images that an SR image may belong to, by its own name."""
  of_scale, of_kind = rf"_?x{scale}", "(_sr|_out)"
  endings = (of_scale, of_kind, of_scale + of_kind)
  shorter = {re.sub(f"{ending}$", "", stem, flags=re.IGNORECASE) for ending in endings}
  return {stem, *shorter} - {""}


def read_pairs(path: str) -> dict[str, str]:
  """Reads lines `name of the HR image,file of the SR image`, as spreadsheets write them too.

  Raises:
    UserError: there is no such file, it is no text, a line has another number of cells, or two
      lines are of one HR image.
  """
  pairs: dict[str, str] = {}
  if not user_path(path).is_file():
    raise UserError(f"--pairs={path} is no file; give a CSV file with lines HR,SR")
  try:
    text = user_path(path).read_text(encoding="utf-8-sig")
    rows = list(csv.reader(io.StringIO(text, newline="")))
  except (UnicodeDecodeError, csv.Error) as error:
    raise UserError(f"--pairs={path} must be a CSV file in UTF-8 ({error}); save it so") from error
  for number, row in enumerate(rows, 1):
    row = [cell.strip() for cell in row]
    if not any(row):
      continue
    if len(row) != 2 or row[0] in pairs:
      raise UserError(
        f"--pairs={path}, line {number}: {','.join(row)!r} must be HR,SR, and each HR image once"
      )
    pairs[row[0]] = row[1]
  return pairs
