"""Tests of sr_jax/kernels/leaky_relu.py: both forms against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.kernels import leaky_relu

FORMS = [leaky_relu.plain, leaky_relu.by_output]


@pytest.mark.developer("torch")
@pytest.mark.parametrize("form", FORMS)
def test_values_and_derivative_equal_torch(form):
  import torch

  x = np.float32([-2.0, -0.5, 0.0, 0.5, 2.0])
  t = torch.tensor(x, requires_grad=True)
  expected = torch.nn.functional.leaky_relu(t, 0.1)
  expected.sum().backward()
  np.testing.assert_array_equal(form(x, 0.1), expected.detach().numpy())
  gradient = jax.grad(lambda x: form(x, 0.1).sum())(x)
  np.testing.assert_array_equal(gradient, t.grad.numpy())
  np.testing.assert_array_equal(form(np.float32([-1.0])), np.float32([-0.2]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slope", [0.2, 0.0])
def test_it_is_pytorchs_and_by_output_keeps_no_mask(form, slope):
  x = jnp.array([-3.0, -0.0, 0.0, 1e-30, 2.0])
  y, back = jax.vjp(lambda x: form(x, slope), x)
  np.testing.assert_array_equal(y, jnp.where(x > 0, x, slope * x))
  np.testing.assert_array_equal(back(jnp.full(5, 10.0))[0], [10 * slope] * 3 + [10, 10])
  kept = [leaf for leaf in jax.tree.leaves(back) if getattr(leaf, "size", 0) == 5]
  if form is leaky_relu.by_output:
    assert [leaf.dtype for leaf in kept] == [jnp.float32]  # the output itself


def test_plain_has_every_derivative():
  x, t = jnp.array([-3.0, 2.0]), jnp.array([1.0, 10.0])
  np.testing.assert_allclose(jax.jvp(leaky_relu.plain, (x,), (t,))[1], [0.2, 10])
  second = jax.hessian(lambda x: jnp.sum(leaky_relu.plain(x) ** 3))(x)
  np.testing.assert_allclose(second, np.diag([6 * -0.6 * 0.04, 12]), rtol=1e-6)
