"""Tests of sr_jax/winograd.py against XLA's convolutions, and in float64 against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sr_jax import winograd


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def direct(x, kernel):
  return lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def direct_dense_block(x, kernels, biases):
  y = x
  for kernel, bias in zip(kernels[:4], biases[:4], strict=True):
    new = direct(y, kernel) + bias.reshape(1, 1, 1, -1)
    y = jnp.concatenate([y, jnp.where(new > 0, new, 0.2 * new)], axis=-1)
  return direct(y, kernels[4]) + biases[4].reshape(1, 1, 1, -1)


def dense_block_arguments(n, h, w, channels, growth):
  inputs = [channels + i * growth for i in range(5)]
  outputs = [growth] * 4 + [channels]
  kernels = draw(*((3, 3, i, o) for i, o in zip(inputs, outputs, strict=True)), seed=1)
  kernels = [0.3 * kernel / np.sqrt(9 * kernel.shape[2]) for kernel in kernels]
  (x,) = draw((n, h, w, channels))
  return x, kernels, draw(*((o,) for o in outputs), seed=2)


def assert_same(function, reference, arguments, cotangent, tolerance=1e-5):
  """Values and all gradients, relative to the largest of each array."""
  results = []
  for f in (function, reference):
    y, back = jax.vjp(f, *arguments)
    results.append(jax.tree.leaves((y, back(cotangent))))
  for actual, expected in zip(*results, strict=True):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


# How the work is cut: (CHUNK_TILES, PASS_BYTES); all at once, image by image, few rows at a time.
CUTS = [(10**6, 10**9), (20, 10**9), (20, 4000)]


@pytest.fixture(params=CUTS, ids=str)
def cut(request, monkeypatch):
  tiles, size = request.param
  monkeypatch.setattr(winograd, "CHUNK_TILES", tiles)
  monkeypatch.setattr(winograd, "PASS_BYTES", size)
  jax.clear_caches()
  return request.param


@pytest.mark.parametrize("n, h, w", [(3, 7, 9), (4, 8, 6), (1, 1, 1)])
def test_convolution(cut, n, h, w):
  x, kernel, cotangent = draw((n, h, w, 5), (3, 3, 5, 6), (n, h, w, 6))
  assert_same(winograd.conv3x3, direct, (x, kernel), cotangent)


def test_convolution_of_large_images(monkeypatch):
  """They are convolved directly, but for the gradient of the kernel."""
  monkeypatch.setattr(winograd, "DIRECT_PIXELS", 63)
  x, kernel, cotangent = draw((2, 7, 9, 5), (3, 3, 5, 6), (2, 7, 9, 6))
  assert_same(winograd.conv3x3, direct, (x, kernel), cotangent)
  assert str(jax.make_jaxpr(winograd.conv3x3)(x, kernel)).count("conv_general_dilated") == 1
  x = x[:, :6]
  assert "conv_general_dilated" not in str(jax.make_jaxpr(winograd.conv3x3)(x, kernel))


def test_dense_block(cut):
  x, kernels, biases = dense_block_arguments(3, 7, 9, channels=6, growth=4)
  (cotangent,) = draw(x.shape, seed=3)
  assert_same(winograd.dense_block, direct_dense_block, (x, kernels, biases), cotangent)


def test_work_is_cut_as_far_as_memory_and_cores_ask():
  assert winograd._chunks(jnp.zeros((16, 32, 32, 1))).shape == (8, 2, 32, 32, 1)
  assert winograd._chunks(jnp.zeros((3, 32, 32, 1))).shape == (3, 1, 32, 32, 1)
  assert winograd._chunks(jnp.zeros((1, 64, 64, 1))).shape == (1, 1, 64, 64, 1)
  rows, passes = winograd._passes((1, 128, 128, 64), 192)  # 1 MiB a row of tiles
  assert (rows, passes) == (16, 4)


def test_it_is_as_accurate_as_a_direct_convolution():
  x, kernel = draw((1, 16, 16, 64), (3, 3, 64, 48))
  padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  exact = sum(padded[:, i : i + 16, j : j + 16] @ kernel[i, j] for i in range(3) for j in range(3))
  ours, theirs = (
    np.sqrt(np.mean((np.asarray(f(x, kernel), np.float64) - exact) ** 2) / np.mean(exact**2))
    for f in (winograd.conv3x3, direct)
  )
  assert 1e-8 < ours < 2 * max(theirs, 1e-7)


def test_bfloat16_is_rounded_once_a_layer():
  """Computed in float32 from what was rounded: each value is within half a unit of bfloat16's."""
  x, kernel = draw((2, 8, 8, 16), (3, 3, 16, 16))
  x = jnp.asarray(x, jnp.bfloat16)
  y = winograd.conv3x3(x, kernel)
  assert y.dtype == jnp.bfloat16
  exact = np.asarray(direct(x.astype(jnp.float32), kernel))
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8, atol=1e-4)
