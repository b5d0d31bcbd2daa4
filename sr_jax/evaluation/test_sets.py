"""Yields the images of a test set, HR and LR, one by one."""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from sr_jax import UserError
from sr_jax.data.pack import Pack, hr_image, lr_image
from sr_jax.data import sources
from sr_jax.data.source import hold_out, name_list
from sr_jax.images import resize
from sr_jax.images.files import to_8_bits
from sr_jax.machine.paths import user_path


class TestImage(NamedTuple):
  """One image of a test set: uint8, [H, W, 3], or [H, W] for a grey file.

  Files of 16 bits are rounded to 8, which is what published scores are computed of.

  Attributes:
    name: of the HR image.
    hr: cropped to a multiple of the scale.
    lr: its LR image.
    whole: height and width of the HR image before it was cropped; () if that is not known.
  """

  name: str
  hr: np.ndarray
  lr: np.ndarray
  whole: tuple[int, ...] = ()


class TestSet(NamedTuple):
  """The images of a `--data` entry.

  Attributes:
    name: of the set.
    names: of its images.
    images: an iterator over the images, which decodes them one by one.
    lr: where LR images of the set's own come from; '' where they are made by MATLAB's bicubic.
    bad: {name: error} of the images that the iterator could not read and left out.
  """

  name: str
  names: tuple[str, ...]
  images: Iterator[TestImage]
  lr: str
  bad: dict[str, str]


def packed_image(pack: Pack, i: int, crop: int = 0) -> TestImage:
  """Returns image i of a pack in the form of the evaluation, where a grey file has two axes.

  Args:
    pack: the pack.
    i: index of the image.
    crop: sides longer than this are cut to it around the middle, HR pixels; 0 for whole images.
  """
  hr, lr = to_8_bits(hr_image(pack, i)), to_8_bits(lr_image(pack, i))
  if crop:
    sides = [min(side, max(crop // pack.scale, 1)) for side in lr.shape[:2]]
    first = [(whole - side) // 2 for whole, side in zip(lr.shape, sides, strict=False)]
    lr = lr[tuple(slice(a, a + n) for a, n in zip(first, sides, strict=True))]
    hr = hr[
      tuple(slice(a * pack.scale, (a + n) * pack.scale) for a, n in zip(first, sides, strict=True))
    ]
  if pack.grey[i]:
    hr, lr = hr[:, :, 0], lr[:, :, 0]
  return TestImage(pack.names[i], hr, lr)


def open_test_set(spec: str, scale: int, lr_spec: str = "", every: int = 0) -> TestSet:
  """Opens the images of a `--data` entry.

  Args:
    spec: one of the forms of `sources.FORMS`.
    scale: the upsampling factor; HR is cropped to a multiple of it.
    lr_spec: folder of the LR images; '' for those that come with the set, or MATLAB's bicubic. They
      have the size of HR's divided by the scale, rounded down; others go to `bad`.
    every: only every N-th image is taken, those that `data.hold_out` holds out; 0 for all.

  Returns:
    The set, of which no image is decoded yet.

  Raises:
    UserError: the form is unknown, there are no images, or LR images lack a partner.
  """
  source = sources.open_source(spec, lr_spec, scale, keep_grey=True, check_sizes=False)
  if every:
    _, source = hold_out(source, every, "--hold_out")

  bad: dict[str, str] = {}

  def test_images() -> Iterator[TestImage]:
    for i, name in enumerate(source.names):
      try:
        hr, lr = (image if image is None else to_8_bits(image) for image in source.load(i))
      except (UserError, OSError) as error:
        bad[name] = str(error)
        continue
      whole = hr.shape[:2]
      if min(whole) < scale:
        bad[name] = f"{whole[1]}x{whole[0]} pixels, too few for --scale={scale}"
        continue
      hr = hr[: whole[0] // scale * scale, : whole[1] // scale * scale]
      if lr is None:
        lr = resize.imresize(hr, 1 / scale)
      elif problem := _misfit(hr, lr, scale):
        bad[name] = problem
        continue
      elif lr.ndim < hr.ndim:  # a grey file of a colour image
        lr = np.repeat(lr[:, :, None], 3, axis=2)
      elif lr.ndim > hr.ndim:
        lr = lr[:, :, 0]
      yield TestImage(name, hr, lr, whole)

  lr = (lr_spec or source.description) if source.has_lr else ""
  return TestSet(source.set_name, source.names, test_images(), lr, bad)


def _misfit(hr: np.ndarray, lr: np.ndarray, scale: int) -> str:
  """Says why an LR image is not that of an HR image, which is cropped; '' if it is."""
  (height, width), (lr_height, lr_width) = hr.shape[:2], lr.shape[:2]
  if (lr_height, lr_width) != (height // scale, width // scale):
    return (
      f"LR is {lr_width}x{lr_height} and must be {width // scale}x{height // scale}, for HR that "
      f"is cropped to {width}x{height} and scale {scale}; is it of another scale or image?"
    )
  if hr.ndim == 2 and lr.ndim == 3 and np.ptp(lr, axis=2).max():
    return "LR has colours, and HR is grey"
  return ""


def split_list(entries: Sequence[str]) -> list[str]:
  """Splits a flag's value at commas; where the flag is given several times, nothing is split.

  So a path with a comma in it can be given: by itself, or with the flag repeated.
  """
  if len(entries) > 1 or user_path(entries[0]).exists():
    return list(entries)
  return entries[0].split(",")


def report_bad(test_sets: Iterable[TestSet]) -> None:
  """Raises UserError, so that the status is 1, if images of a set could not be scored."""
  test_sets = list(test_sets)
  bad = [f"{s.name}/{name}: {problem}" for s in test_sets for name, problem in s.bad.items()]
  if bad:
    count = sum(len(test_set.names) for test_set in test_sets)
    raise UserError(f"{len(bad)} of {count} images were not scored:\n{name_list(bad)}")


def check_outside(target: pathlib.Path, data: str) -> None:
  """Refuses to write SR images to where the HR images are, since they have the same names."""
  source, target = user_path(data), target.resolve()
  if source.is_dir():
    source = source.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
      raise UserError(
        f"--output would write SR images into {target}, which overlaps {data}; choose a folder "
        "outside it"
      )
