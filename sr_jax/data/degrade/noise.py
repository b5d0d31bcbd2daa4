"""Gaussian and Poisson noise, both made of the same field of standard normal numbers.

Images are planar, [3, H, W], in [0, 1]. Grey noise is the same in all channels.
"""

import jax
import jax.numpy as jnp

LUMA = (0.299, 0.587, 0.114)  # BT.601
_SMALL = 4.0  # below this mean, Poisson's probabilities are added one by one
_TERMS = 18  # as many: 19 or more events have probability 1e-8 there


def add_gaussian(
  image: jax.Array, normal: jax.Array, sigma: jax.Array, grey: jax.Array
) -> jax.Array:
  """Adds Gaussian noise, and clips to [0, 1].

  Args:
    image: [3, H, W].
    normal: standard normal numbers of the same shape; grey noise takes the first plane.
    sigma: standard deviation, in levels of 255.
    grey: whether the noise is grey.
  """
  normal = jnp.where(grey, normal[:1], normal)
  return jnp.clip(image + normal * (sigma / 255), 0, 1)


def add_poisson(
  image: jax.Array,
  normal: jax.Array,
  scale: jax.Array,
  grey: jax.Array,
  size: int | jax.Array,
) -> jax.Array:
  """Adds Poisson noise as Real-ESRGAN does, and clips to [0, 1].

  The image is rounded to 255 levels. With n = 2^ceil(log2(number of distinct levels)), the noise is
  (Poisson(image n) / n - image) scale. Grey noise is that of the luma.

  Args:
    image: [3, H, W].
    normal: standard normal numbers of the same shape, which are turned into Poisson's; grey noise
      takes the first plane.
    scale: factor of the noise.
    grey: whether the noise is grey.
    size: side of the valid part; only its levels are counted.
  """
  luma = jnp.tensordot(jnp.asarray(LUMA, image.dtype), image, 1, precision="highest")
  seen = jnp.where(grey, luma[None], image)
  levels = jnp.clip(jnp.round(seen * 255), 0, 255)
  index = jnp.arange(image.shape[-1])
  inside = ((index[:, None] < size) & (index[None] < size))[None]
  n = power_of_two(distinct(levels.astype(jnp.uint32), inside)).astype(image.dtype)
  normal = jnp.where(grey, normal[:1], normal)
  noise = poisson(levels / 255 * n, normal) / n - levels / 255
  return jnp.clip(image + noise * scale, 0, 1)


def distinct(levels: jax.Array, inside: jax.Array) -> jax.Array:
  """Counts the distinct levels 0 to 255, uint32 [...], where `inside` (it is broadcast)."""
  inside = jnp.broadcast_to(inside, levels.shape)
  word, bit = levels >> 5, jnp.left_shift(jnp.uint32(1), levels & 31)
  axes = range(levels.ndim)
  masks = [
    jax.lax.reduce(
      jnp.where(inside & (word == i), bit, jnp.uint32(0)), jnp.uint32(0), jax.lax.bitwise_or, axes
    )
    for i in range(8)
  ]
  return jnp.sum(jax.lax.population_count(jnp.stack(masks)), dtype=jnp.uint32)


def power_of_two(count: jax.Array) -> jax.Array:
  """2^ceil(log2(count)) of a uint32 from 1 on."""
  return jnp.left_shift(jnp.uint32(1), 32 - jax.lax.clz(count - 1))


def poisson(mean: jax.Array, normal: jax.Array) -> jax.Array:
  """Turns standard normal numbers into Poisson's, by the inverse of the distribution.

  `jax.random.poisson` loops until the last pixel's number is accepted; here the number of
  operations is fixed. Means from 4 on take Giles' expansion (2016, doi 10.1145/2699466, eq. 9),
  which misses the exact number with a probability below 0.3 %, by 1; smaller means add up their
  probabilities.

  Args:
    mean: from 0 to 1e4, any shape.
    normal: of the same shape.

  Returns:
    Whole numbers of the same shape and dtype.
  """
  uniform = jax.scipy.special.ndtr(normal)
  small = jnp.minimum(mean, _SMALL)
  term = total = jnp.exp(-small)
  count = (uniform > total).astype(mean.dtype)
  for k in range(1, _TERMS):
    term = term * small / k
    total = total + term
    count = count + (uniform > total)
  large = jnp.maximum(mean, _SMALL)
  root = jnp.sqrt(large)
  squared = normal**2
  expansion = (
    large
    + root * normal
    + (1 / 3 + squared / 6)
    - normal * (1 / 36 + squared / 72) / root
    + (-8 / 405 + squared * (7 / 810 + squared / 270)) / large
  )
  return jnp.where(mean < _SMALL, count, jnp.maximum(jnp.floor(expansion), 0))
