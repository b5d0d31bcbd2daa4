"""The images of a test set, HR and LR, one by one."""

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
  """Image i of a pack as the evaluation wants it: a grey file has two axes."""
  hr, lr = hr_image(pack, i), lr_image(pack, i)
  if pack.grey[i]:
    hr, lr = hr[:, :, 0], lr[:, :, 0]
  return TestImage(pack.names[i], hr, lr)


def open_test_set(spec: str, scale: int) -> tuple[str, int, Iterator[TestImage]]:
  """Opens the images of a `--data` entry: its name, their number, and the images one by one."""
  source = sources.open_source(spec, scale=scale, keep_grey=True)

  def test_images() -> Iterator[TestImage]:
    for i, name in enumerate(source.names):
      hr, lr = source.load(i)
      hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale]
      yield TestImage(name, hr, resize.imresize(hr, 1 / scale) if lr is None else lr)

  return source.set_name, len(source.names), test_images()
