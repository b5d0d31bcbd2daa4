"""Real-ESRGAN's second-order degradation (arXiv 2107.10833, figure 2), example by example.

  sharpen; blur, resize, noise, JPEG; blur, resize, noise; resize to LR, sinc filter and JPEG in
  one order or the other

All shapes are fixed: an image between two steps lies at the top left of an array as large as the
largest that can be drawn, and each step treats its edges as if it stood alone.
"""

import functools
import math

import jax
import jax.numpy as jnp

from sr_jax.data.degrade import blocks, jpeg, kernels, noise, resize, webp
from sr_jax.data.degrade.draws import Draws, Order, OrderDraws, Settings, draw
from sr_jax.data.degrade.sharpen import sharpen


def degrade(key: jax.Array, hr: jax.Array, settings: Settings) -> jax.Array:
  """Makes the LR image of an example.

  Args:
    key: of jax.random, the example's own.
    hr: [H, H, 3], uint8, uint16, or float in [0, 1]. H is a multiple of the scale.
    settings: the laws of what is drawn.

  Returns:
    uint8 [H / scale, H / scale, 3].
  """
  return to_levels(apply(draw(key, settings), hr, settings))


def to_levels(image: jax.Array, dtype: jnp.dtype = jnp.uint8) -> jax.Array:
  """Rounds an image in [0, 1] to levels of 255, or of 65535 for uint16."""
  return jnp.round(image * jnp.iinfo(dtype).max).astype(dtype)


def apply(draws: Draws, hr: jax.Array, settings: Settings) -> jax.Array:
  """Makes an LR image by what was drawn, without its last rounding.

  Args:
    draws: of `draw`.
    hr: as for `degrade`.
    settings: the laws; here they say how large the arrays are, and which steps there are.

  Returns:
    [H / scale, H / scale, 3] in [0, 1].
  """
  if jnp.issubdtype(hr.dtype, jnp.integer):
    hr = hr.astype(jnp.float32) / jnp.iinfo(hr.dtype).max
  if settings.sharpen:
    hr = sharpen(hr[None])[0]
  side = hr.shape[0]
  lr_side = side // settings.scale
  image, first = hr.transpose(2, 0, 1), draws.first
  image = _blurred(image, first, settings.first, side)
  if settings.second is None:
    image = resize.resize(image, first.mode, side, lr_side, _room(lr_side))
    image = _noisy(image, first, settings.first, lr_side)
    image = _compressed(image, first, settings.first, lr_side)
  else:
    image = _second_order(image, draws, settings, side)
  return jnp.clip(image[:, :lr_side, :lr_side], 0, 1).transpose(1, 2, 0)


def _second_order(image: jax.Array, draws: Draws, settings: Settings, side: int) -> jax.Array:
  """All that follows the first blur."""
  (first, second, end), lr_side = draws, side // settings.scale
  size, small = _floor(side * first.factor), _floor(lr_side * second.factor)
  small_room = _room(math.floor(lr_side * settings.second.resize[1]))

  def resized_twice(image: jax.Array, room: int) -> jax.Array:
    image = resize.resize(image, first.mode, side, size, room, first.factor)
    image = _noisy(image, first, settings.first, size)
    image = _compressed(image, first, settings.first, size)
    image = _blurred(image, second, settings.second, size)
    return resize.resize(image, second.mode, size, small, small_room)

  # Most images are not enlarged, and would use less than half of the room that others need.
  least, most = (_room(math.floor(side * part)) for part in (1, settings.first.resize[1]))
  if most > least and settings.first.up_down_keep[0]:
    image = jax.lax.cond(
      size > least, lambda x: resized_twice(x, most), lambda x: resized_twice(x, least), image
    )
  else:
    image = resized_twice(image, least)
  image = _noisy(image, second, settings.second, small)

  def compressed(image: jax.Array, size: int | jax.Array) -> jax.Array:
    return _compressed(image, second, settings.second, size)

  image = jax.lax.cond(end.jpeg_last, lambda x: x, lambda x: compressed(x, small), image)
  image = resize.resize(image, end.mode, small, lr_side, _room(lr_side))
  if settings.end.sinc:
    kernel = kernels.sinc(end.side, end.cutoff, settings.end.kernel_sides[1] // 2)
    image = jax.lax.cond(
      end.filtered, lambda x: kernels.blur(x, kernel, lr_side), lambda x: x, image
    )
  return jax.lax.cond(end.jpeg_last, lambda x: compressed(x, lr_side), lambda x: x, image)


def smallest_side(settings: Settings) -> int:
  """The smallest side of HR images of which no step leaves less than it needs.

  A blur's reflection reaches no further than the image, and resizing leaves a pixel.
  """
  scale = settings.scale
  blurs = [(1.0, settings.first)]
  if settings.second is not None:
    blurs.append((settings.first.resize[0], settings.second))
  needed = [(laws.kernel_sides[1] // 2 + 1) / part for part, laws in blurs if laws.blur]
  if settings.second is not None:
    if settings.end.sinc:
      needed.append((settings.end.kernel_sides[1] // 2 + 1) * scale)
    needed += [1 / settings.first.resize[0], scale / settings.second.resize[0]]
  return blocks.round_up(math.ceil(max(needed, default=scale)), scale)


def _room(side: int) -> int:
  return blocks.round_up(side, jpeg.MULTIPLE)


def _floor(x: jax.Array) -> jax.Array:
  return jnp.floor(x).astype(jnp.int32)


def _blurred(image: jax.Array, drawn: OrderDraws, laws: Order, size: int | jax.Array) -> jax.Array:
  if not laws.blur:
    return image
  reach = laws.kernel_sides[1] // 2
  d = drawn
  kernel = kernels.bell(d.kind, d.side, d.sigma_x, d.sigma_y, d.angle, d.beta, reach)
  kernel = jnp.where(d.kind == kernels.SINC, kernels.sinc(d.side, d.cutoff, reach), kernel)
  return jax.lax.cond(d.blurred, lambda x: kernels.blur(x, kernel, size), lambda x: x, image)


def _noisy(image: jax.Array, drawn: OrderDraws, laws: Order, size: int | jax.Array) -> jax.Array:
  if not laws.noise:
    return image
  key = jax.random.wrap_key_data(drawn.noise_key, impl="threefry2x32")
  normal = jax.random.normal(key, image.shape, image.dtype)

  def gaussian(image: jax.Array) -> jax.Array:
    return noise.add_gaussian(image, normal, drawn.sigma, drawn.grey)

  def poisson(image: jax.Array) -> jax.Array:
    return noise.add_poisson(image, normal, drawn.poisson_scale, drawn.grey, size)

  number = jnp.where(drawn.noisy, jnp.where(drawn.gaussian, 1, 2), 0)
  return jax.lax.switch(number, (lambda x: x, gaussian, poisson), image)


def _compressed(
  image: jax.Array, drawn: OrderDraws, laws: Order, size: int | jax.Array
) -> jax.Array:
  if not laws.jpeg:
    return image

  def compressed(image: jax.Array) -> jax.Array:
    by_jpeg, by_webp = (
      functools.partial(module.compress, quality=drawn.quality, size=size)
      for module in (jpeg, webp)
    )
    return jax.lax.cond(drawn.webp, by_webp, by_jpeg, image) if laws.webp else by_jpeg(image)

  return jax.lax.cond(drawn.compressed, compressed, lambda x: x, image)
