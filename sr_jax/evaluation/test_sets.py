"""Yields the images of a test set, HR and LR, one by one."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from sr_jax.data.pack import Pack, hr_image, lr_image
from sr_jax.data import sources
from sr_jax.images import resize


class TestImage(NamedTuple):
  """One image of a test set: uint8, [H, W, 3], or [H, W] for a grey file."""

  name: str
  hr: np.ndarray
  lr: np.ndarray


def packed_image(pack: Pack, i: int) -> TestImage:
  """Returns image i of a pack in the form of the evaluation, where a grey file has two axes."""
  hr, lr = hr_image(pack, i), lr_image(pack, i)
  if pack.grey[i]:
    hr, lr = hr[:, :, 0], lr[:, :, 0]
  return TestImage(pack.names[i], hr, lr)


def open_test_set(spec: str, scale: int) -> tuple[str, int, Iterator[TestImage]]:
  """Opens the images of a `--data` entry.

  Args:
    spec: one of the forms of `sources.FORMS`.
    scale: the upsampling factor; HR is cropped to a multiple of it.

  Returns:
    The name of the set, the number of its images, and an iterator over the images.

  Raises:
    UserError: the form is unknown, or there are no images.
  """
  source = sources.open_source(spec, scale=scale, keep_grey=True)

  def test_images() -> Iterator[TestImage]:
    for i, name in enumerate(source.names):
      hr, lr = source.load(i)
      hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale]
      yield TestImage(name, hr, resize.imresize(hr, 1 / scale) if lr is None else lr)

  return source.set_name, len(source.names), test_images()
