"""Tests of sr_jax/networks/vgg.py: the features against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.kernels.choose import Kernels
from sr_jax.networks import vgg


@pytest.fixture(scope="module")
def small():
  return vgg.init_vgg(jax.random.key(0, impl="rbg"), width=1 / 16)


def images(*shape):
  return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


@pytest.mark.developer("torch")
def test_features_and_gradient_equal_torch(small):
  import torch
  import torch_references

  reference = torch_references.vgg((4, 8, 16, 32, 32), (2, 2, 4, 4, 4))
  convs = [layer for layer in reference if isinstance(layer, torch.nn.Conv2d)]
  rng = np.random.default_rng(0)
  params = {"input": small["input"]}
  for name, conv in zip(sorted(set(small) - {"input"}), convs, strict=True):
    bias = rng.normal(size=small[name]["bias"].shape).astype(np.float32)
    params[name] = {"kernel": small[name]["kernel"], "bias": bias}
    conv.weight.data = torch.tensor(np.transpose(params[name]["kernel"], (3, 2, 0, 1)))
    conv.bias.data = torch.tensor(bias)

  image = images(2, 40, 52, 3)  # odd sizes further down
  x = torch.tensor(image).permute(0, 3, 1, 2).requires_grad_()
  mean, std = (
    torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
  )
  y, expected = (x - mean) / std, {}
  # Indices of torchvision's VGG19, as published: 8 is relu2_2, 34 is conv5_4.
  for i, layer in enumerate(reference):
    y = layer(y)
    name = {0: "conv1_1", 8: "relu2_2", 17: "relu3_4", 34: "conv5_4", 35: "relu5_4"}.get(i)
    if name:
      expected[name] = y
  sum(feature.square().sum() for feature in expected.values()).backward()

  @jax.jit
  def run(image):
    def loss(image):
      features = vgg.vgg_features(params, image, tuple(expected))
      return sum(jnp.sum(feature**2) for feature in features.values()), features

    return jax.grad(loss, has_aux=True)(image)

  gradient, features = run(image)
  assert set(features) == set(expected)
  for name, feature in expected.items():
    feature = feature.detach().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(features[name], feature, atol=1e-4 * np.abs(feature).max())
  by_image = x.grad.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(gradient, by_image, atol=1e-4 * np.abs(by_image).max())


def test_computes_only_as_deep_as_needed(small):
  def convolutions(layers):
    program = jax.make_jaxpr(lambda x: vgg.vgg_features(small, x, layers))(images(1, 32, 32, 3))
    return str(program).count("conv_general_dilated[")

  assert convolutions(["conv1_1"]) == 1
  assert convolutions(["relu2_2", "conv1_2"]) == 4
  assert convolutions(["conv5_4", "relu5_4"]) == 16


def test_convolves_as_its_kernels_say(small):
  image, calls = images(1, 16, 16, 3), []

  def conv(x, kernel, bias, stride, padding, dtype):
    calls.append((bias, stride, padding, dtype))
    numbers = ("NHWC", "HWIO", "NHWC")
    return 2 * jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers)

  params = {**small, "conv1_1": {**small["conv1_1"], "kernel": 2 * small["conv1_1"]["kernel"]}}
  expected = vgg.vgg_features(params, image, ["conv1_1"])["conv1_1"]
  actual = vgg.vgg_features(small, image, ["conv1_1"], kernels=Kernels(conv=conv))["conv1_1"]
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  assert calls == [(None, 1, ((1, 1), (1, 1)), jnp.dtype("float32"))]


def test_bfloat16_is_near_and_comes_out_as_float32(small):
  image = images(1, 32, 32, 3)
  expected = vgg.vgg_features(small, image, ["conv3_4"])["conv3_4"]
  actual = vgg.vgg_features(small, image, ["conv3_4"], dtype="bfloat16")["conv3_4"]
  assert actual.dtype == jnp.float32
  assert 1e-5 < np.abs(actual - expected).max() / np.abs(expected).max() < 0.05


def test_unknown_layers_are_refused(small):
  with pytest.raises(ValueError, match="'conv5_5' is unknown; this VGG has conv1_1, .*relu5_4$"):
    vgg.vgg_features(small, images(1, 16, 16, 3), ["conv5_5"])
  with pytest.raises(ValueError, match="'input' is unknown"):
    vgg.vgg_features(small, images(1, 16, 16, 3), ["input"])


def test_init_vgg_is_he_normal():
  params = vgg.init_vgg(jax.random.key(0, impl="rbg"), depth=16, width=1 / 4)
  kernel = params["conv5_3"]["kernel"]
  assert kernel.shape == (3, 3, 128, 128) and len(params) == 14
  np.testing.assert_allclose(np.std(kernel), (2 / 1152) ** 0.5, rtol=0.02)
  with pytest.raises(ValueError, match="no VGG13 here; choose 16 or 19"):
    vgg.init_vgg(jax.random.key(0), depth=13)


def test_magnitude_factor():
  assert vgg.magnitude_factor("conv5_4", "caffe", "caffe") == 1
  assert vgg.magnitude_factor("conv5_4", "caffe", "torchvision") == 0.136
  assert vgg.magnitude_factor("relu1_2", "caffe", "torchvision") == 0.0164
  assert vgg.magnitude_factor("relu2_2", "torchvision", "caffe") == 1 / 0.0162
  with pytest.raises(ValueError, match="'keras' is unknown; choose torchvision or caffe"):
    vgg.magnitude_factor("conv5_4", "keras", "torchvision")
  with pytest.raises(ValueError, match="'pool5' is not a VGG layer"):
    vgg.magnitude_factor("pool5", "caffe", "torchvision")
