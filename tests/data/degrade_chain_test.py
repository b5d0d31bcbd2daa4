"""The whole degradation of an example, and the laws of what is drawn for it."""

import functools
import math

import jax
import numpy as np
import pytest
import scipy.stats
import skimage.data

from sr_jax.data.degrade import chain, draws, kernels, noise, resize

FIRST, SECOND = draws.FIRST, draws.SECOND
RELEASED = draws.Settings(scale=4, first=FIRST, second=SECOND, end=draws.End(), sharpen=True)
LIGHT = draws.Settings(scale=4, first=draws.LIGHT, second=None, end=draws.End(), sharpen=False)
SIDE = 96


def crops(n: int, side: int = SIDE) -> np.ndarray:
  """Crops of a photograph, uint8 [n, side, side, 3]."""
  image = skimage.data.astronaut()
  corners = np.random.default_rng(0).integers(0, 512 - side, (n, 2))
  return np.stack([image[y : y + side, x : x + side] for y, x in corners])


@pytest.mark.developer("torch")
def test_the_whole_is_the_public_description():
  """In float64, with the same draws and the same noise, before the last rounding."""
  import torch

  from benchmarks import torch_degradation

  n = 32
  with jax.enable_x64(True):
    hr = crops(n) / 255.0
    keys = jax.random.split(jax.random.key(7), n)
    drawn = jax.jit(jax.vmap(functools.partial(draws.draw, settings=RELEASED)))(keys)
    lr = np.asarray(
      jax.jit(lambda d, x: jax.lax.map(lambda each: chain.apply(*each, RELEASED), (d, x)))(
        drawn, hr
      )
    )
    poisson = jax.jit(noise.poisson)

    def reference(i: int) -> np.ndarray:
      first, second, end = (
        {name: np.asarray(value)[i] for name, value in part._asdict().items()} for part in drawn
      )

      def normal(number: int, height: int, width: int) -> torch.Tensor:
        # Of the arrays: 96, or 1.5 * 96 of enlarged images; and 1.2 * 24 as a multiple of 16.
        room = (96 if height <= 96 else 144, 32)[number]
        key = jax.random.wrap_key_data((first, second)[number]["noise_key"])
        field = jax.random.normal(key, (3, room, room), float)
        return torch.tensor(np.asarray(field)[None, :, :height, :width])

      def counts(mean: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        return torch.tensor(np.asarray(poisson(mean.numpy(), normal.numpy())))

      image = torch.tensor(np.moveaxis(hr[i], -1, 0)[None])
      out = torch_degradation.degrade(image, first, second, end, 4, normal, counts)
      return np.moveaxis(out[0].numpy(), 0, -1)

    for i in range(n):
      np.testing.assert_allclose(lr[i], reference(i), atol=1e-6, err_msg=str(i))
  # These examples come by every branch.
  first, second, end = drawn
  assert set(np.asarray(first.mode)) == set(np.asarray(end.mode)) == {0, 1, 2}
  for choice in (second.blurred, first.gaussian, second.grey, end.filtered, end.jpeg_last):
    assert {True, False} == set(np.asarray(choice).tolist())
  assert kernels.SINC in {*first.kind.tolist(), *second.kind.tolist()}


@functools.cache
def many(n: int = 10**5):
  """The draws of many examples."""
  keys = jax.random.split(jax.random.key(3), n)
  return jax.device_get(jax.jit(jax.vmap(functools.partial(draws.draw, settings=RELEASED)))(keys))


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
  assert low <= values.min() and values.max() <= high
  # 1.95 / sqrt(n) is passed by chance once in a thousand draws; these draws are always the same.
  distance = scipy.stats.kstest(values, "uniform", (low, high - low)).statistic
  assert distance < 1.95 / len(values) ** 0.5


def assert_shares(values: np.ndarray, shares: dict) -> None:
  assert set(np.unique(values).tolist()) <= set(shares)
  for value, share in shares.items():
    bound = 4 * (share * (1 - share) / len(values)) ** 0.5 + 1e-9
    assert abs((values == value).mean() - share) < bound, value


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_drawn_follows_its_laws(number):
  drawn, laws = many()[number], (FIRST, SECOND)[number]
  whole = {i: 0.9 * share for i, share in enumerate((0.45, 0.25, 0.12, 0.03, 0.12, 0.03))}
  assert_shares(drawn.kind, {**whole, kernels.SINC: 0.1})
  assert_shares(drawn.side, dict.fromkeys(range(7, 22, 2), 1 / 8))
  assert_shares(drawn.blurred, {True: (1, 0.8)[number], False: (0, 0.2)[number]})
  assert_uniform(drawn.sigma_x, 0.2, (3, 1.5)[number])
  assert_uniform(drawn.sigma_y, 0.2, (3, 1.5)[number])
  assert_uniform(drawn.angle, -math.pi, math.pi)
  small = drawn.side < 13
  assert_uniform(drawn.cutoff[small], math.pi / 3, math.pi)
  assert_uniform(drawn.cutoff[~small], math.pi / 5, math.pi)
  generalised, plateau = np.isin(drawn.kind, (2, 3)), np.isin(drawn.kind, (4, 5))
  beta = drawn.beta[generalised]
  assert_shares(beta < 1, {True: 0.5, False: 0.5})
  assert_uniform(beta[beta < 1], 0.5, 1)
  assert_uniform(beta[beta > 1], 1, 4)
  beta = drawn.beta[plateau]
  assert_shares(beta == 1, {True: 0.5, False: 0.5})
  assert_uniform(beta[beta > 1], 1, 2)
  up, down, keep = ((0.2, 0.7, 0.1), (0.3, 0.4, 0.3))[number]
  assert_shares(np.sign(drawn.factor - 1), {1.0: up, -1.0: down, 0.0: keep})
  low, high = ((0.15, 1.5), (0.3, 1.2))[number]
  assert_uniform(drawn.factor[drawn.factor < 1], low, 1)
  assert_uniform(drawn.factor[drawn.factor > 1], 1, high)
  assert_shares(drawn.mode, dict.fromkeys(range(3), 1 / 3))
  assert_shares(drawn.gaussian, {True: 0.5, False: 0.5})
  assert_uniform(drawn.sigma, 1, (30, 25)[number])
  assert_uniform(drawn.poisson_scale, 0.05, (3, 2.5)[number])
  assert_shares(drawn.grey, {True: 0.4, False: 0.6})
  assert_uniform(drawn.quality, 30, 95)
  assert drawn.noisy.all() and drawn.compressed.all() and laws.noise == 1
  # Numbers of an example do not depend on one another, nor on those of its other pass.
  other = many()[1 - number]
  numbers = [drawn.sigma_x, drawn.quality, drawn.sigma, drawn.angle, other.quality, other.sigma_x]
  correlation = np.corrcoef(numbers) - np.eye(len(numbers))
  assert np.abs(correlation).max() < 0.02


def test_the_end_follows_its_laws():
  end = many()[2]
  assert_shares(end.filtered, {True: 0.8, False: 0.2})
  assert_shares(end.side, dict.fromkeys(range(7, 22, 2), 1 / 8))
  assert_uniform(end.cutoff, math.pi / 3, math.pi)
  assert_shares(end.jpeg_last, {True: 0.5, False: 0.5})
  assert_shares(end.mode, dict.fromkeys(range(3), 1 / 3))


@functools.cache
def light():
  return jax.jit(lambda keys, hr: jax.lax.map(lambda each: chain.degrade(*each, LIGHT), (keys, hr)))


def test_a_degradation_of_one_pass():
  """With nothing drawn it is PyTorch's area: the mean of 4x4 pixels."""
  hr, keys = crops(60), jax.random.split(jax.random.key(1), 60)
  lr = light()(keys, hr)
  drawn = jax.vmap(functools.partial(draws.draw, settings=LIGHT))(keys).first
  clean = ~(drawn.blurred | drawn.noisy | drawn.compressed) & (drawn.mode == 0)
  assert clean.any()
  mean = hr.reshape(60, 24, 4, 24, 4, 3).mean((2, 4))
  assert np.abs(lr[clean] - mean[clean]).max() < 0.51
  assert (np.abs(lr[~clean] - mean[~clean]).mean((1, 2, 3)) > 0.5).all()


def test_one_by_one_and_all_at_once_are_the_same():
  hr, keys = crops(8), jax.random.split(jax.random.key(2), 8)
  at_once = jax.jit(jax.vmap(functools.partial(chain.degrade, settings=LIGHT)))(keys, hr)
  difference = np.abs(np.asarray(at_once, int) - light()(keys, hr))
  assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


def test_the_smallest_image_is_degraded_as_if_it_stood_alone():
  assert chain.smallest_side(RELEASED) == 76  # 11 pixels are left at a factor of 0.15
  assert chain.smallest_side(LIGHT) == 8
  assert [*resize.MODES] == [*FIRST.resize_modes]
