"""What is drawn for each example: kernels, factors, kinds and strengths of noise, qualities.

Every number is drawn from a law that the settings give. The draws of an example are a pure function
of its key; the fields of noise, one number a pixel, are drawn where they are needed, from a key of
their own.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sr_jax.data.degrade import kernels
from sr_jax.data.degrade.resize import MODES

Range = tuple[float, float]


class Order(NamedTuple):
  """The laws of one pass of blur, resize, noise and JPEG. Ranges are of uniform laws.

  Attributes:
    blur: probability that there is a blur.
    sinc: probability that its kernel is a sinc.
    kernels: weights of the other kernels, in the order of `kernels.KINDS`.
    kernel_sides: odd, pixels.
    sinc_cutoff_small: radians a pixel, of sinc kernels whose side is under 13.
    sinc_cutoff: of larger ones.
    sigma: pixels, for each axis of a kernel that has two.
    beta_generalised: exponent of generalised Gaussians, below or above 1 with probability 1/2 each.
    beta_plateau: of plateau-shaped kernels, the same.
    up_down_keep: weights of enlarging, shrinking, and keeping the size.
    resize: the smallest and the largest factor, up to 1 and from 1 on.
    resize_modes: names of `resize.MODES`, all as likely.
    noise: probability that there is noise.
    gaussian: probability that it is Gaussian; else it is Poisson's.
    gaussian_sigma: levels of 255.
    poisson_scale: factor.
    grey: probability that the noise is the same in all channels.
    jpeg: probability that there is a JPEG.
    jpeg_quality: 1 to 100.
    webp: probability that it is a WebP of that quality instead, which the host computes.
  """

  blur: float = 1.0
  sinc: float = 0.1
  kernels: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
  kernel_sides: tuple[int, int] = (7, 21)
  sinc_cutoff_small: Range = (math.pi / 3, math.pi)
  sinc_cutoff: Range = (math.pi / 5, math.pi)
  sigma: Range = (0.2, 3.0)
  beta_generalised: Range = (0.5, 4.0)
  beta_plateau: Range = (1.0, 2.0)
  up_down_keep: tuple[float, float, float] = (0.2, 0.7, 0.1)
  resize: Range = (0.15, 1.5)
  resize_modes: tuple[str, ...] = MODES
  noise: float = 1.0
  gaussian: float = 0.5
  gaussian_sigma: Range = (1.0, 30.0)
  poisson_scale: Range = (0.05, 3.0)
  grey: float = 0.4
  jpeg: float = 1.0
  jpeg_quality: Range = (30.0, 95.0)
  webp: float = 0.0


class End(NamedTuple):
  """The laws of the end of a second-order degradation: its sinc filter and its last JPEG.

  Attributes:
    sinc: probability of the filter.
    kernel_sides: odd, pixels.
    sinc_cutoff: radians a pixel.
    jpeg_last: probability that resizing and filtering come before the JPEG, not after it.
    resize_modes: of resizing to the LR size.
  """

  sinc: float = 0.8
  kernel_sides: tuple[int, int] = (7, 21)
  sinc_cutoff: Range = (math.pi / 3, math.pi)
  jpeg_last: float = 0.5
  resize_modes: tuple[str, ...] = MODES


class Settings(NamedTuple):
  """A degradation.

  Attributes:
    scale: HR size / LR size.
    first: the laws of the first pass.
    second: of the second; None for a degradation of one pass, which resizes to the LR size itself.
    end: of what follows the second.
    sharpen: whether the HR image is sharpened before.
  """

  scale: int
  first: Order
  second: Order | None
  end: End
  sharpen: bool


# As released with Real-ESRGAN.
FIRST = Order()
SECOND = Order(
  blur=0.8,
  sigma=(0.2, 1.5),
  up_down_keep=(0.3, 0.4, 0.3),
  resize=(0.3, 1.2),
  gaussian_sigma=(1.0, 25.0),
  poisson_scale=(0.05, 2.5),
)
# One light pass, for photographs that are nearly clean: Gaussian blurs and Gaussian noise.
LIGHT = Order(
  blur=0.5,
  sinc=0.0,
  kernels=(0.5, 0.5, 0.0, 0.0, 0.0, 0.0),
  kernel_sides=(7, 13),
  sigma=(0.2, 1.2),
  noise=0.5,
  gaussian=1.0,
  gaussian_sigma=(1.0, 8.0),
  jpeg=0.5,
  jpeg_quality=(60.0, 95.0),
)


class OrderDraws(NamedTuple):
  """What was drawn of an `Order`; all scalars."""

  blurred: jax.Array
  kind: jax.Array  # number of kernels.KINDS, or kernels.SINC
  side: jax.Array
  cutoff: jax.Array
  sigma_x: jax.Array
  sigma_y: jax.Array
  angle: jax.Array
  beta: jax.Array
  factor: jax.Array
  mode: jax.Array  # number of resize.MODES
  noisy: jax.Array
  gaussian: jax.Array
  sigma: jax.Array
  poisson_scale: jax.Array
  grey: jax.Array
  compressed: jax.Array
  quality: jax.Array
  webp: jax.Array
  noise_key: jax.Array  # uint32 [2], of the field of standard normal numbers


class EndDraws(NamedTuple):
  """What was drawn of an `End`; all scalars."""

  filtered: jax.Array
  side: jax.Array
  cutoff: jax.Array
  jpeg_last: jax.Array
  mode: jax.Array


class Draws(NamedTuple):
  """All that is drawn for an example."""

  first: OrderDraws
  second: OrderDraws | None
  end: EndDraws


def draw(key: jax.Array, settings: Settings) -> Draws:
  """Draws what happens to one example.

  Args:
    key: of jax.random.
    settings: the laws.
  """
  first, second, end = jax.random.split(key, 3)
  return Draws(
    draw_order(first, settings.first),
    None if settings.second is None else draw_order(second, settings.second),
    _draw_end(end, settings.end),
  )


def draw_order(key: jax.Array, laws: Order) -> OrderDraws:
  """Draws one pass."""
  numbers, noise = jax.random.split(key)
  u = iter(jax.random.uniform(numbers, (24,)))
  kind = jnp.where(next(u) < laws.sinc, kernels.SINC, _weighted(next(u), laws.kernels))
  side = _odd(next(u), laws.kernel_sides)
  low, high = jnp.asarray([laws.sinc_cutoff_small, laws.sinc_cutoff])[(side >= 13).astype(int)]
  cutoff = low + (high - low) * next(u)
  plateau = kind >= 4
  low, high = jnp.asarray([laws.beta_generalised, laws.beta_plateau])[plateau.astype(int)]
  beta = jnp.where(next(u) < 0.5, _between(next(u), (low, 1)), _between(next(u), (1, high)))
  direction = _weighted(next(u), laws.up_down_keep)
  small, large = laws.resize
  part = next(u)
  factor = jnp.stack([_between(part, (1, large)), _between(part, (small, 1)), jnp.ones_like(part)])
  return OrderDraws(
    blurred=next(u) < laws.blur,
    kind=kind,
    side=side,
    cutoff=cutoff,
    sigma_x=_between(next(u), laws.sigma),
    sigma_y=_between(next(u), laws.sigma),
    angle=_between(next(u), (-math.pi, math.pi)),
    beta=beta,
    factor=factor[direction],
    mode=_mode(next(u), laws.resize_modes),
    noisy=next(u) < laws.noise,
    gaussian=next(u) < laws.gaussian,
    sigma=_between(next(u), laws.gaussian_sigma),
    poisson_scale=_between(next(u), laws.poisson_scale),
    grey=next(u) < laws.grey,
    compressed=next(u) < laws.jpeg,
    quality=_between(next(u), laws.jpeg_quality),
    webp=next(u) < laws.webp,
    noise_key=jax.random.key_data(noise),
  )


def _draw_end(key: jax.Array, laws: End) -> EndDraws:
  u = iter(jax.random.uniform(key, (5,)))
  return EndDraws(
    filtered=next(u) < laws.sinc,
    side=_odd(next(u), laws.kernel_sides),
    cutoff=_between(next(u), laws.sinc_cutoff),
    jpeg_last=next(u) < laws.jpeg_last,
    mode=_mode(next(u), laws.resize_modes),
  )


def _between(u: jax.Array, ends: Range) -> jax.Array:
  low, high = ends
  return low + (high - low) * u


def _odd(u: jax.Array, sides: tuple[int, int]) -> jax.Array:
  low, high = sides
  return low + 2 * jnp.floor(u * ((high - low) // 2 + 1)).astype(jnp.int32)


def _weighted(u: jax.Array, weights: tuple[float, ...]) -> jax.Array:
  """The number of one of several choices, by their weights, whose sum need not be 1."""
  ends = [sum(weights[: i + 1]) / sum(weights) for i in range(len(weights) - 1)]
  return jnp.sum(u >= jnp.asarray(ends), dtype=jnp.int32)


def _mode(u: jax.Array, names: tuple[str, ...]) -> jax.Array:
  numbers = jnp.asarray([MODES.index(name) for name in names], jnp.int32)
  return numbers[jnp.floor(u * len(names)).astype(jnp.int32)]
