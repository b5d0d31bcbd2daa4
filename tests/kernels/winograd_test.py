"""Tests of sr_jax/kernels/winograd.py and of dense blocks by it.

They are compared with XLA's convolutions, and with NumPy in float64.
"""

import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sr_jax.kernels.dense_block import dense_block
from sr_jax.kernels import winograd


def draw(*shapes, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def direct(x, kernel):
  return lax.conv_general_dilated(
    x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def direct_with_bias(x, kernel, bias):
  return direct(x, kernel) + bias.reshape(1, 1, 1, -1)


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


@pytest.fixture
def cut(request, monkeypatch):
  tiles, size = request.param
  monkeypatch.setattr(winograd, "CHUNK_TILES", tiles)
  monkeypatch.setattr(winograd, "PASS_BYTES", size)
  jax.clear_caches()
  return request.param


@pytest.mark.parametrize(
  "cut, n, h, w",
  [(CUTS[0], 3, 7, 9), (CUTS[1], 4, 8, 6), (CUTS[2], 3, 7, 9), (CUTS[2], 1, 1, 1)],
  indirect=["cut"],
)
def test_convolution(cut, n, h, w):
  x, kernel, bias, cotangent = draw((n, h, w, 5), (3, 3, 5, 6), (6,), (n, h, w, 6))
  assert_same(winograd.conv3x3, direct_with_bias, (x, kernel, bias), cotangent)


def test_convolution_of_large_images(monkeypatch):
  """They are convolved directly, but for the gradient of the kernel."""
  monkeypatch.setattr(winograd, "DIRECT_PIXELS", 63)
  x, kernel, bias, cotangent = draw((2, 7, 9, 5), (3, 3, 5, 6), (6,), (2, 7, 9, 6))
  assert_same(winograd.conv3x3, direct_with_bias, (x, kernel, bias), cotangent)
  assert convolutions(x, kernel, bias) == 2  # forward, and the input's gradient
  assert convolutions(x[:, :6], kernel, bias) == 0


@pytest.mark.parametrize("inputs, outputs, count", [(6, 3, 1), (3, 6, 1), (3, 3, 0)])
def test_convolution_of_few_channels(inputs, outputs, count):
  """Of few it is a matrix product, to few a direct one; no kernel's gradient is left to XLA."""
  shapes = (2, 7, 9, inputs), (3, 3, inputs, outputs), (outputs,), (2, 7, 9, outputs)
  x, kernel, bias, cotangent = draw(*shapes)
  assert_same(winograd.conv3x3, direct_with_bias, (x, kernel, bias), cotangent)
  assert convolutions(x, kernel, bias) == count


def convolutions(*arguments):
  """How many of XLA's convolutions are in the forward and backward pass together."""
  loss = jax.grad(lambda *arguments: (winograd.conv3x3(*arguments) ** 2).sum(), (0, 1, 2))
  return str(jax.make_jaxpr(loss)(*arguments)).count("conv_general_dilated[")


@pytest.mark.parametrize(
  "cut", [CUTS[0], pytest.param(CUTS[2], marks=pytest.mark.slow)], indirect=True
)
def test_dense_block(cut):
  x, kernels, biases = dense_block_arguments(3, 7, 9, channels=6, growth=4)
  (cotangent,) = draw(x.shape, seed=3)
  block = functools.partial(dense_block, winograd, True)
  assert_same(block, direct_dense_block, (x, kernels, biases), cotangent)


@pytest.mark.slow
def test_a_dense_block_in_bfloat16_rounds_its_outputs_alone():
  """So gradients that see no output, of all biases and the first kernel, are float32's."""
  x, kernels, biases = dense_block_arguments(2, 7, 9, channels=6, growth=4)
  narrow = jnp.asarray(x, jnp.bfloat16)
  cotangent = jnp.asarray(draw(x.shape, seed=3)[0], jnp.bfloat16)
  block = jax.jit(functools.partial(dense_block, winograd, True))
  y, back = jax.vjp(block, narrow, kernels, biases)
  assert y.dtype == jnp.bfloat16
  _, *actual = back(cotangent)
  plain = jax.jit(direct_dense_block)
  expected_y, back = jax.vjp(plain, narrow.astype(jnp.float32), kernels, biases)
  _, *expected = back(cotangent.astype(jnp.float32))
  assert np.linalg.norm(y - expected_y) < 3e-3 * np.linalg.norm(expected_y)
  pairs = [zip(*of_kind, strict=True) for of_kind in zip(actual, expected, strict=True)]
  for bounds, of_kind in zip(([1e-5] + [2e-3] * 4, [1e-5] * 5), pairs, strict=True):
    for bound, (a, b) in zip(bounds, of_kind, strict=True):
      assert a.dtype == jnp.float32
      assert np.linalg.norm(a - b) < bound * np.linalg.norm(b)


def test_work_is_cut_as_far_as_memory_and_cores_ask():
  assert winograd.chunks(jnp.zeros((16, 32, 32, 1))).shape == (4, 4, 32, 32, 1)
  assert winograd.chunks(jnp.zeros((3, 32, 32, 1))).shape == (1, 3, 32, 32, 1)
  assert winograd.chunks(jnp.zeros((6, 32, 32, 1))).shape == (2, 3, 32, 32, 1)
  assert winograd.chunks(jnp.zeros((1, 64, 64, 1))).shape == (1, 1, 64, 64, 1)
  # 0.75 MiB a row of tiles: 4 passes over 16 of them, each of 2 rows of pixels.
  x, kernel = jnp.zeros((1, 128, 128, 64)), winograd.transform_kernel(jnp.zeros((3, 3, 64, 192)))
  (loop,) = (
    eqn for eqn in jax.make_jaxpr(winograd.convolve)(x, kernel).eqns if eqn.primitive.name == "scan"
  )
  assert loop.params["length"] == 4
  assert loop.outvars[-1].aval.shape == (4, 1, 2 * 16, 128, 192)


@pytest.mark.parametrize("matrices, outputs", [(winograd.DOWN, 2), (winograd.ALONG, 4)])
def test_matrices_are_those_of_minimal_filtering(matrices, outputs):
  """A^T [(G g) * (B^T d)] is the correlation of d and g, in exact arithmetic."""
  b_t, g, a_t = (np.array(matrix, object) for matrix in matrices)
  g = np.vectorize(lambda x: fractions.Fraction(x).limit_denominator(100))(g)
  for tap in np.eye(3, dtype=int):
    for value in np.eye(outputs + 2, dtype=int):
      y = a_t @ ((g @ tap) * (b_t @ value))
      assert list(y) == list(np.correlate(value, tap))


def test_it_is_about_as_accurate_as_a_direct_convolution():
  """Root mean squared errors of a wide convolution and its kernel's gradient."""
  x, kernel, cotangent = draw((2, 16, 16, 64), (3, 3, 64, 48), (2, 16, 16, 48))
  bias = np.zeros(48, np.float32)
  padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
  taps = [(i, j, padded[:, i : i + 16, j : j + 16]) for i in range(3) for j in range(3)]
  exact = sum(part @ kernel[i, j] for i, j, part in taps)
  exact_gradient = np.array([np.einsum("nhwc,nhwf->cf", part, cotangent) for _, _, part in taps])

  def errors(f):
    y, back = jax.vjp(f, x, kernel, bias)
    gradient = back(cotangent)[1].reshape(9, 64, 48)
    pairs = (y, exact), (gradient, exact_gradient)
    return [np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)) for a, b in pairs]

  # A direct convolution's are 1e-7 to 3e-7, by the order in which a processor adds the products.
  for ours, direct in zip(errors(winograd.conv3x3), errors(direct_with_bias), strict=True):
    assert 1e-8 < direct < 1e-6 and 1e-8 < ours < 2e-6, (ours, direct)


def test_bfloat16_is_rounded_once_a_layer():
  """Computed in float32 from what was rounded: each value is within half a unit of bfloat16's."""
  x, kernel, bias = draw((2, 8, 8, 16), (3, 3, 16, 16), (16,))
  x = jnp.asarray(x, jnp.bfloat16)
  y = winograd.conv3x3(x, kernel, bias)
  assert y.dtype == jnp.bfloat16
  exact = np.asarray(direct_with_bias(x.astype(jnp.float32), kernel, bias))
  np.testing.assert_allclose(np.asarray(y, np.float32), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_as_a_networks_convolution(dtype):
  x, kernel, bias = draw((2, 8, 8, 6), (3, 3, 6, 6), (6,))
  y = winograd.conv(x, kernel, bias, 1, ((1, 1), (1, 1)), jnp.dtype(dtype))
  assert y.dtype == dtype
  np.testing.assert_array_equal(y, winograd.conv3x3(jnp.asarray(x, dtype), kernel, bias))


@pytest.mark.parametrize(
  "side, stride, around, has_bias",
  [(4, 1, 1, True), (3, 2, 1, True), (3, 1, 0, True), (3, 1, 1, False)],
)
def test_another_convolution_is_refused(side, stride, around, has_bias):
  x, kernel, bias = draw((1, 8, 8, 6), (side, side, 6, 6), (6,))
  padding = ((around, around),) * 2
  with pytest.raises(
    ValueError, match="winograd.conv: kernel .* must be 3x3, 1 and 1 on each side"
  ):
    winograd.conv(x, kernel, bias if has_bias else None, stride, padding, jnp.dtype("float32"))
