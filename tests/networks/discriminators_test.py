"""Tests of sr_jax/networks/discriminators.py, against torch_references.py's with equal weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.formats import state_dicts
from sr_jax.networks.build import DISCRIMINATORS
from sr_jax.networks.discriminators import (
  PatchDiscriminator,
  SRGANDiscriminator,
  UNetDiscriminator,
  VGGDiscriminator,
)


@pytest.fixture
def references():
  import torch_references

  return torch_references


def shapes(net, size):
  image = jnp.zeros((2, size, size, 3))
  return jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), image, train=True))


def random_variables(net, size):
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      return rng.normal(scale=np.prod(leaf.shape[:-1]) ** -0.5, size=leaf.shape)
    return rng.uniform(0.2, 0.6, leaf.shape)

  draws = jax.tree_util.tree_map_with_path(draw, shapes(net, size)[1])
  return jax.tree.map(lambda x: x.astype(np.float32), draws)


@pytest.mark.parametrize(
  "net, size, expected",
  [
    (VGGDiscriminator(), 128, 14_499_401),
    (VGGDiscriminator(), 256, 21_055_049),
    # The convolutions of 128, and 3 x 3 and 6 x 6 where that has 4 x 4 features.
    (VGGDiscriminator(), 96, 14_499_401 - 7 * 512 * 100),
    (VGGDiscriminator(), 192, 14_499_401 + 20 * 512 * 100),
    (SRGANDiscriminator(), 96, 23_565_505),
    (UNetDiscriminator(), 64, 4_376_897),
    # 4 x 4 convolutions with bias at both ends, and three with the two parameters of a BatchNorm.
    (PatchDiscriminator(), 128, 3_136 + 131_328 + 524_800 + 2_098_176 + 8_193),
  ],
)
def test_parameter_counts(net, size, expected):
  logits, variables = shapes(net, size)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
  maps = {UNetDiscriminator: (size, size), PatchDiscriminator: (size // 8 - 2, size // 8 - 2)}
  assert logits.shape == (2, *maps.get(type(net), ()))


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_bfloat16_gives_float32_logits_and_stores_float32(name):
  logits, variables = shapes(DISCRIMINATORS[name](features=4, dtype="bfloat16"), 32)
  assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables))} == {jnp.dtype("float32")}


# With these seeds no activation is so near to zero that rounding takes it to the other side of a
# leaky ReLU, where the gradient jumps: noise of 1e-6 of images and weights, in a hundred draws,
# moved each gradient by 2e-5 of its largest value at most. With seed 1, 'vgg' moved by 3e-2.
@pytest.mark.developer("torch")
@pytest.mark.parametrize("name, size, seed", [("vgg", 64, 13), ("srgan", 32, 1), ("unet", 16, 1)])
def test_logits_and_gradients_equal_torch(references, name, size, seed):
  features = 8
  net = DISCRIMINATORS[name](features=features)
  reference = {
    "vgg": lambda: references.VGGDiscriminator(features, size),
    "srgan": lambda: references.SRGANDiscriminator(features, size),
    "unet": lambda: references.UNetDiscriminator(features),
  }[name]()
  variables = random_variables(net, size)
  references.load(reference, state_dicts.discriminator_to_state_dict(variables))

  rng = np.random.default_rng(seed)
  image = rng.uniform(size=(4, size, size, 3)).astype(np.float32)
  cotangent = rng.normal(size=(4, size, size) if name == "unet" else 4).astype(np.float32)
  expected, by_image, by_params = references.values_and_gradients(reference, image, cotangent)

  @jax.jit
  def run(image, params):
    def loss(image, params):
      logits, updated = net.apply(
        {**variables, "params": params}, image, train=True, mutable=["batch_stats"]
      )
      return jnp.sum(logits * cotangent), (logits, updated["batch_stats"])

    (_, aux), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(image, params)
    return *aux, *gradients

  logits, stats, our_by_image, our_by_params = run(image, variables["params"])
  np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(our_by_image, by_image, atol=1e-4 * np.abs(by_image).max())
  state = state_dicts.discriminator_to_state_dict({"params": our_by_params, "batch_stats": stats})
  largest = max(np.abs(gradient).max() for gradient in by_params.values())
  for key, gradient in by_params.items():
    # A bias before a BatchNorm has a gradient of zero but for the rounding of long sums.
    zero = name == "srgan" and re.fullmatch(r"conv(?!0_0)\d_\d\.bias", key)
    tolerance = 1e-5 * largest if zero else 1e-4 * max(np.abs(gradient).max(), 1e-2 * largest)
    np.testing.assert_allclose(state[key], gradient, atol=tolerance, rtol=0, err_msg=key)
  # The statistics moved as PyTorch's.
  for key, buffer in reference.named_buffers():
    if key.endswith(("running_mean", "weight_u")):
      np.testing.assert_allclose(state[key], buffer.numpy(), atol=1e-4, err_msg=key)


def test_unet_keeps_its_power_iteration_only_in_training():
  net = UNetDiscriminator(features=4)
  variables = random_variables(net, 16)
  image = jnp.ones((1, 16, 16, 3))
  step = jax.jit(
    lambda v, train: net.apply(v, image, train=train, mutable=["batch_stats"])[1], static_argnums=1
  )
  start = variables["batch_stats"]
  assert jax.tree.all(
    jax.tree.map(lambda a, b: (a == b).all(), step(variables, False)["batch_stats"], start)
  )
  for _ in range(100):
    variables = {**variables, **step(variables, True)}
  for i in range(1, 9):
    kernel = variables["params"][f"conv{i}"]["kernel"]
    norm = np.linalg.norm(kernel.reshape(-1, kernel.shape[-1]), 2)
    sigma = variables["batch_stats"][f"conv{i}_norm"][f"conv{i}/kernel/sigma"]
    np.testing.assert_allclose(sigma, norm, rtol=0.01)


@pytest.mark.parametrize(
  "net, shape, message",
  [
    (
      VGGDiscriminator(4),
      (100, 100),
      "VGGDiscriminator: image of 100 x 100 must be square with sides divisible by 32; try 96 x 96",
    ),
    (VGGDiscriminator(4), (288, 288), "divisible by 64; try 256 x 256"),
    (VGGDiscriminator(4), (64, 96), "must be square.*try 64 x 64"),
    (SRGANDiscriminator(4), (8, 8), "divisible by 16; try 16 x 16"),
    (UNetDiscriminator(4), (32, 36), "height 32 and width 36 must be multiples of 8.*try 32 x 32"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(net, shape, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, *shape, 3)), train=True))
