"""What happens to a training example: its draws in words, and a sheet of examples to look at."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw

from sr_jax import UserError
from sr_jax.data import sampling
from sr_jax.data.degrade import kernels
from sr_jax.data.degrade.draws import EndDraws, OrderDraws
from sr_jax.data.degrade.resize import MODES
from sr_jax.data.detail import measure
from sr_jax.data.pack import Pack
from sr_jax.data.preparation import Example, Preparation
from sr_jax.images.files import to_8_bits
from sr_jax.machine import sharding
from sr_jax.runs.settings import Config
from sr_jax.training.degradation import crop_side
from sr_jax.training.inputs import make_preparation

TEXT_WIDTH, LINE = 420, 14  # of the sheet, pixels


class Shown(NamedTuple):
  """One example: its number in the run, uint8 HR and LR patches, what was drawn, in lines."""

  number: int
  hr: np.ndarray
  lr: np.ndarray
  lines: list[str]


def preparation_of(config: Config) -> Preparation:
  """Returns what degrades a recipe's examples, on one device.

  Raises:
    UserError: its LR images are bicubic, or its own.
  """
  prepare = make_preparation(config, sharding.create_mesh(jax.devices()[:1]))
  if prepare is None:
    raise UserError(
      "data.degradation=bicubic: nothing is drawn for an example; give a recipe that degrades, "
      "such as --config realesrgan"
    )
  return prepare


def place_of(number: int, config: Config) -> tuple[int, int]:
  """The step and the row of its batch that example `number` of a run has, both from 0."""
  return divmod(number, config.data.batch_size)


def draws_in_words(config: Config, first: int, count: int) -> Iterator[list[str]]:
  """Says for some examples what is drawn for them, by their numbers alone.

  Args:
    config: one stage of a recipe.
    first: number of the first example in the run, from 0.
    count: of examples.
  """
  prepare = preparation_of(config)
  draw = jax.jit(prepare.draw)
  for number in range(first, first + count):
    step, row = place_of(number, config)
    yield words(number, jax.device_get(draw(np.uint32(step), np.uint32(row))), config)


def examples(config: Config, pack: Pack, first: int, count: int) -> Iterator[Shown]:
  """Makes examples of a run as its steps make them.

  Args:
    config: one stage of a recipe.
    pack: the images that it trains on.
    first: number of the first example, from 0.
    count: of examples.
  """
  prepare, data = preparation_of(config), config.data
  make, draw = jax.jit(prepare.make_example), jax.jit(prepare.draw)
  detail = measure(pack) if data.detail_draws > 1 else None
  for number in range(first, first + count):
    step, row = place_of(number, config)
    lr, hr = sampling.cut_batch(
      pack,
      step,
      batch_size=data.batch_size,
      lr_patch=crop_side(config) // config.scale,
      seed=config.seed,
      start=row,
      stop=row + 1,
      detail=detail,
      draws=data.detail_draws,
      symmetries=8 if data.rotate else 2,
    )
    where = np.uint32(row), np.uint32(step)
    lr, hr = (to_8_bits(np.asarray(image)) for image in make(lr[0], hr[0], *where))
    lines = words(number, jax.device_get(draw(where[1], where[0])), config)
    yield Shown(number, hr, lr, lines)


def words(number: int, example: Example, config: Config) -> list[str]:
  """Says what was drawn for an example, a line for each step of its degradation."""
  step, row = place_of(number, config)
  crop, scale = crop_side(config), config.scale
  lines = [f"example {number}: step {step}, row {row}"]
  if not example.degraded:
    return [*lines, "LR of the source", f"patch at LR {example.y}, {example.x}"]
  first, second, end = example.draws
  small = crop // scale
  if second is None:
    lines += [*_blur(first), f"resize {crop} -> {small}, {MODES[first.mode]}", *_noise(first)]
    lines += _jpeg(first)
  else:
    size = int(np.floor(np.float32(crop) * first.factor))
    lines += [*_blur(first), f"resize {crop} -> {size} (x{first.factor:.3f}), {MODES[first.mode]}"]
    lines += [*_noise(first), *_jpeg(first), *_blur(second)]
    second_size = int(np.floor(np.float32(small) * second.factor))
    lines += [
      f"resize {size} -> {second_size} ({small} x{second.factor:.3f}), {MODES[second.mode]}"
    ]
    last = [f"resize {second_size} -> {small}, {MODES[end.mode]}", *_filter(end)]
    jpeg = _jpeg(second)
    lines += [*_noise(second), *(last + jpeg if end.jpeg_last else jpeg + last)]
  return [*lines, f"patch at LR {example.y}, {example.x}"]


def _blur(drawn: OrderDraws) -> list[str]:
  if not drawn.blurred:
    return ["no blur"]
  side = f"{drawn.side}x{drawn.side}"
  if drawn.kind == kernels.SINC:
    return [f"blur sinc {side}, cutoff {drawn.cutoff:.2f} rad/pixel"]
  name = kernels.KINDS[drawn.kind]
  text = f"blur {name} {side}, sigma {drawn.sigma_x:.2f}"
  if "aniso" in name:
    text += f" and {drawn.sigma_y:.2f} at {np.degrees(drawn.angle):.0f} degrees"
  return [text + (f", beta {drawn.beta:.2f}" if drawn.kind >= 2 else "")]


def _noise(drawn: OrderDraws) -> list[str]:
  if not drawn.noisy:
    return ["no noise"]
  colour = "grey" if drawn.grey else "coloured"
  if drawn.gaussian:
    return [f"noise Gaussian, {colour}, sigma {drawn.sigma:.1f}/255"]
  return [f"noise Poisson, {colour}, x{drawn.poisson_scale:.2f}"]


def _jpeg(drawn: OrderDraws) -> list[str]:
  if not drawn.compressed:
    return ["no JPEG"]
  return [f"{'WebP' if drawn.webp else 'JPEG'}, quality {drawn.quality:.0f}"]


def _filter(end: EndDraws) -> list[str]:
  if not end.filtered:
    return ["no last filter"]
  return [f"last filter sinc {end.side}x{end.side}, cutoff {end.cutoff:.2f} rad/pixel"]


def sheet(shown: list[Shown]) -> np.ndarray:
  """Draws examples one below the other: HR, LR enlarged pixel by pixel, and what was drawn.

  Returns:
    uint8 [height, width, 3].
  """
  side = shown[0].hr.shape[0]
  height = max(side, LINE * max(len(each.lines) for each in shown)) + 8
  image = Image.new("RGB", (2 * side + 24 + TEXT_WIDTH, height * len(shown)), "white")
  pen = ImageDraw.Draw(image)
  for i, each in enumerate(shown):
    lr = Image.fromarray(each.lr).resize((side, side), Image.Resampling.NEAREST)
    image.paste(Image.fromarray(each.hr), (4, i * height + 4))
    image.paste(lr, (side + 8, i * height + 4))
    pen.multiline_text((2 * side + 16, i * height + 4), "\n".join(each.lines), "black", spacing=3)
  return np.asarray(image)
