"""Tests of sr_jax/kernels/dense_block_tpu.py: the plain form in XLA, and NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.kernels.dense_block_tpu import on_tpu
from winograd_test import (
  assert_same,
  dense_block_arguments,
  direct_dense_block,
  draw,
)


def block(x, kernels, biases, dtype="float32", inside=None):
  return on_tpu(x, kernels, biases, inside, jnp.dtype(dtype))


@pytest.mark.parametrize("channels, growth", [(6, 4), (4, 6)])
def test_values_and_gradients_are_the_plain_forms(channels, growth):
  arguments = dense_block_arguments(3, 7, 9, channels, growth)
  (cotangent,) = draw(arguments[0].shape, seed=3)
  assert_same(jax.jit(block), jax.jit(direct_dense_block), arguments, cotangent)


def test_outside_of_the_image_there_are_zeros():
  """As if the image stood alone: what is beside it changes nothing."""
  x, kernels, biases = dense_block_arguments(2, 7, 9, channels=6, growth=4)
  inside = np.zeros((1, 7, 9, 1), np.float32)
  inside[:, :5, :6] = 1
  y = jax.jit(functools.partial(block, inside=inside))(x, kernels, biases)
  expected = direct_dense_block(x[:, :5, :6], kernels, biases)
  np.testing.assert_allclose(y[:, :5, :6], expected, atol=1e-5 * np.abs(expected).max())


def test_it_stores_its_input_and_four_outputs_once():
  arguments = dense_block_arguments(3, 7, 9, channels=6, growth=4)
  x, kernels, biases = arguments

  def stored(function):
    """Channels of all images that the way back is given."""
    _, back = jax.eval_shape(functools.partial(jax.vjp, function), *arguments)
    return sum(leaf.shape[-1] for leaf in jax.tree.leaves(back) if leaf.shape[:3] == (3, 7, 9))

  assert stored(block) == 6 + 4 * 4
  assert stored(direct_dense_block) > 3 * stored(block)


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_is_as_near_to_float32_as_the_plain_form_in_bfloat16(seed):
  x, kernels, biases = dense_block_arguments(2, 8, 8, channels=16, growth=8)
  x = x + np.float32(0.01 * seed)
  (cotangent,) = draw(x.shape, seed=3 + seed)
  narrow = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.bfloat16))

  def values(function, x, cotangent):
    y, back = jax.vjp(jax.jit(function), x, kernels, biases)
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((y, back(cotangent)))]

  def plain(x, kernels, biases):
    return direct_dense_block(x, narrow(kernels), narrow(biases))

  exact = values(direct_dense_block, x, cotangent)
  ours, theirs = (
    values(function, narrow(x), narrow(cotangent))
    for function in (functools.partial(block, dtype="bfloat16"), plain)
  )
  for a, b, c in zip(ours, theirs, exact, strict=True):
    error, spread = (np.linalg.norm(v - c) / np.linalg.norm(c) for v in (a, b))
    assert error < 1.25 * spread + 1e-3 and spread < 0.1, (error, spread)


def test_parameters_keep_their_dtype():
  x, kernels, biases = dense_block_arguments(1, 4, 4, channels=6, growth=4)
  function = functools.partial(block, dtype="bfloat16")
  y, back = jax.eval_shape(functools.partial(jax.vjp, function), x, kernels, biases)
  assert y.dtype == jnp.bfloat16
  gradients = jax.eval_shape(
    lambda *a: jax.vjp(function, *a)[1](jnp.zeros_like(y)), x, kernels, biases
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
