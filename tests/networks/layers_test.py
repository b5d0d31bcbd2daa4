"""Tests of sr_jax/networks/layers.py: every operation against PyTorch's of the same name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.networks import layers


@pytest.fixture
def torch():
  import torch

  return torch


def image(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def nchw(torch, x):
  return torch.tensor(x).permute(0, 3, 1, 2)


def nhwc(y):
  return y.permute(0, 2, 3, 1).numpy()


class Call(nn.Module):
  """Runs a function of layers.py, which makes its module, inside a module."""

  function: object

  @nn.compact
  def __call__(self, x):
    return self.function(x)


@pytest.mark.developer("torch")
@pytest.mark.parametrize(
  "kernel_size, stride, padding", [(3, 1, 1), (3, 2, 1), (4, 2, 1), (9, 1, 4)]
)
@pytest.mark.parametrize("size", [12, 13])
def test_conv_pads_as_torch(torch, kernel_size, stride, padding, size):
  x = image(2, size, size, 3)
  net = Call(lambda x: layers.conv(x, 5, name="c", kernel_size=kernel_size, stride=stride))
  params = net.init(jax.random.key(0), x)["params"]["c"]
  expected = torch.nn.functional.conv2d(
    nchw(torch, x),
    torch.tensor(np.transpose(params["kernel"], (3, 2, 0, 1))),
    torch.tensor(np.asarray(params["bias"])),
    stride,
    padding,
  )
  np.testing.assert_allclose(net.apply({"params": {"c": params}}, x), nhwc(expected), atol=1e-5)


def test_torch_init_is_uniform_within_the_root_of_fan_in():
  net = Call(lambda x: layers.conv(x, 2000, name="c"))
  params = net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))["params"]["c"]
  for array in (params["kernel"], params["bias"]):
    bound = 1 / 12  # fan_in 3 * 3 * 16
    assert 0.99 * bound < np.abs(array).max() <= bound
    np.testing.assert_allclose(np.std(array), bound / 3**0.5, rtol=0.03)
    np.testing.assert_allclose(np.mean(array), 0, atol=0.002)


def test_msra_init_scales_the_standard_deviation_and_not_the_variance():
  net = Call(lambda x: layers.conv(x, 500, name="c", init="msra"))
  params = net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 16)))["params"]["c"]
  np.testing.assert_allclose(np.std(params["kernel"]), 0.1 * (2 / 144) ** 0.5, rtol=0.02)
  # A normal distribution reaches beyond 4 standard deviations in 72000 draws, a uniform one never.
  assert np.abs(params["kernel"]).max() > 3 * np.std(params["kernel"])
  np.testing.assert_array_equal(params["bias"], 0)


def test_linear_init():
  net = Call(lambda x: layers.linear(x, 1000, name="d"))
  params = net.init(jax.random.key(0), jnp.zeros((1, 400)))["params"]["d"]
  for array in (params["kernel"], params["bias"]):
    assert 0.045 < np.abs(array).max() <= 0.05
    np.testing.assert_allclose(np.std(array), 0.05 / 3**0.5, rtol=0.05)


def test_computes_in_the_dtype_named_and_stores_float32():
  net = Call(lambda x: layers.conv(x, 5, name="c", dtype="bfloat16"))
  y, variables = net.init_with_output(jax.random.key(0), image(1, 4, 4, 3))
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.developer("torch")
def test_batch_norm_moves_its_statistics_by_a_tenth(torch):
  x = image(4, 6, 6, 3) * 3 + 1
  net = Call(lambda x: layers.batch_norm(x, train=True, name="b"))
  y, variables = net.init_with_output(jax.random.key(0), x)
  _, updated = net.apply(variables, x, mutable=["batch_stats"])
  reference = torch.nn.BatchNorm2d(3)
  np.testing.assert_allclose(y, nhwc(reference(nchw(torch, x)).detach()), atol=1e-5)
  stats = updated["batch_stats"]["b"]
  np.testing.assert_allclose(stats["mean"], reference.running_mean.numpy(), atol=1e-6)
  # PyTorch stores the unbiased variance.
  np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.developer("torch")
@pytest.mark.parametrize("per_channel", [False, True])
def test_prelu(torch, per_channel):
  x = image(2, 5, 6, 3)
  net = layers.PReLU(per_channel)
  variables = net.init(jax.random.key(0), x)
  slope = variables["params"]["slope"]
  np.testing.assert_array_equal(slope, np.full(3 if per_channel else 1, 0.25))
  slope = np.float32([0.1, 0.5, -0.3] if per_channel else [0.1])
  expected = torch.nn.functional.prelu(nchw(torch, x), torch.tensor(slope))
  np.testing.assert_allclose(net.apply({"params": {"slope": slope}}, x), nhwc(expected), rtol=1e-6)


@pytest.mark.developer("torch")
@pytest.mark.parametrize("r", [2, 3, 4])
def test_shuffles_order_channels_as_torch_and_undo_each_other(torch, r):
  x = image(2, 4, 5, 3 * r**2)
  y = layers.pixel_shuffle(x, r)
  np.testing.assert_array_equal(y, nhwc(torch.pixel_shuffle(nchw(torch, x), r)))
  z = layers.pixel_unshuffle(y, r)
  np.testing.assert_array_equal(z, nhwc(torch.pixel_unshuffle(nchw(torch, np.asarray(y)), r)))
  np.testing.assert_array_equal(z, x)


def test_shuffles_refuse_what_does_not_divide():
  with pytest.raises(ValueError, match="multiple of 4 channels; x has 6"):
    layers.pixel_shuffle(image(1, 4, 4, 6), 2)
  with pytest.raises(ValueError, match="height 4 and width 5 must be multiples of 2; pad"):
    layers.pixel_unshuffle(image(1, 4, 5, 3), 2)


@pytest.mark.developer("torch")
@pytest.mark.parametrize("r", [2, 3, 4])
def test_upsampling(torch, r):
  x = image(2, 5, 7, 3)
  interpolate = torch.nn.functional.interpolate
  expected = interpolate(nchw(torch, x), scale_factor=r, mode="nearest")
  np.testing.assert_array_equal(layers.upsample_nearest(x, r), nhwc(expected))
  expected = interpolate(nchw(torch, x), scale_factor=r, mode="bilinear", align_corners=False)
  np.testing.assert_allclose(layers.upsample_bilinear(x, r), nhwc(expected), atol=1e-5)
