"""Tests of sr_jax/training/losses.py: against numbers by hand, by numpy, and by PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.networks import vgg
from sr_jax.training import losses

# Logits of a discriminator, and what the released code makes of them (float64, computed apart from
# this project). It halves each term: the printed equations give twice its values.
REAL = np.array([2, -1, 0.5, 3], np.float32)
FAKE = np.array([0.25, 1.5, -2, -0.75], np.float32)
HALF_D = 0.386778991
HALF_G = 1.761778991
HALF_G_BY_FAKE = [-0.177826992, -0.140520539, -0.209342898, -0.197983334]
HALF_D_BY_REAL = [-0.045104106, -0.118082761, -0.073288086, -0.037851284]
HALF_D_BY_FAKE = [0.072173008, 0.109479461, 0.040657102, 0.052016666]
HALF_D_BY_REAL_DETACHED = [-0.011918683, -0.084897337, -0.040102663, -0.004665861]
HALF_D_BY_FAKE_DETACHED = [0.036776872, 0.074083325, 0.005260966, 0.016620530]


def test_ragan_values_are_the_printed_equations():
  np.testing.assert_allclose(losses.ragan_discriminator_loss(REAL, FAKE), 2 * HALF_D, rtol=1e-6)
  np.testing.assert_allclose(losses.ragan_generator_loss(REAL, FAKE), 2 * HALF_G, rtol=1e-6)
  np.testing.assert_allclose(
    losses.ragan_detached_discriminator_loss(REAL, FAKE), 2 * HALF_D, rtol=1e-6
  )


def test_ragan_gradients():
  by_fake = jax.grad(losses.ragan_generator_loss, argnums=1)(REAL, FAKE)
  np.testing.assert_allclose(by_fake / 2, HALF_G_BY_FAKE, rtol=1e-5)
  by_real, by_fake = jax.grad(losses.ragan_discriminator_loss, argnums=(0, 1))(REAL, FAKE)
  np.testing.assert_allclose(by_real / 2, HALF_D_BY_REAL, rtol=1e-5)
  np.testing.assert_allclose(by_fake / 2, HALF_D_BY_FAKE, rtol=1e-5)


def test_ragan_detached_stops_the_means_of_the_discriminator_only():
  pair = losses.ADVERSARIAL["ragan_detached"]
  by_real, by_fake = jax.grad(pair.discriminator, argnums=(0, 1))(REAL, FAKE)
  np.testing.assert_allclose(by_real / 2, HALF_D_BY_REAL_DETACHED, rtol=1e-5)
  np.testing.assert_allclose(by_fake / 2, HALF_D_BY_FAKE_DETACHED, rtol=1e-5)
  by_fake = jax.grad(pair.generator, argnums=1)(REAL, FAKE)
  np.testing.assert_allclose(by_fake / 2, HALF_G_BY_FAKE, rtol=1e-5)


def test_ragan_symmetries():
  d, g = losses.ragan_discriminator_loss, losses.ragan_generator_loss
  np.testing.assert_allclose(d(REAL, FAKE), g(FAKE, REAL), rtol=1e-6)
  np.testing.assert_allclose(d(REAL + 7, FAKE + 7), d(REAL, FAKE), rtol=1e-5)
  equal = np.full(4, -3.0, np.float32)
  np.testing.assert_allclose(g(equal, equal), 2 * np.log(2), rtol=1e-6)


@pytest.mark.parametrize("name", list(losses.ADVERSARIAL))
def test_adversarial_losses_are_finite_for_huge_logits(name):
  for a in (1e4, -1e4):
    for b in (1e4, -1e4):
      real, fake = jnp.array([a, a / 2]), jnp.array([b, b / 2])
      for loss in losses.ADVERSARIAL[name]:
        value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(real, fake)
        assert np.isfinite(value), (name, a, b)
        assert all(np.isfinite(g).all() for g in gradients), (name, a, b)


def test_huge_logits_do_not_saturate():
  # log(1 - sigmoid(x)) written out is -inf from 17 on in float32; softplus is x.
  value = losses.vanilla_discriminator_loss(jnp.array([-1e4]), jnp.array([1e4]))
  np.testing.assert_allclose(value, 2e4, rtol=1e-6)


def test_adversarial_losses_take_maps_of_logits():
  rng = np.random.default_rng(0)
  real, fake = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
  for pair in losses.ADVERSARIAL.values():
    for loss in pair:
      np.testing.assert_allclose(loss(real, fake), loss(real.ravel(), fake.ravel()), rtol=1e-5)


def test_other_adversarial_losses_by_numpy():
  real, fake = REAL.astype(np.float64), FAKE.astype(np.float64)
  sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
  expected = {
    "vanilla": (
      -np.log(sigmoid(fake)).mean(),
      -np.log(sigmoid(real)).mean() - np.log(1 - sigmoid(fake)).mean(),
    ),
    "lsgan": (
      ((fake - 1) ** 2).mean() / 2,
      ((real - 1) ** 2).mean() / 2 + (fake**2).mean() / 2,
    ),
    "hinge": (
      -fake.mean(),
      np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean(),
    ),
  }
  for name, (generator, discriminator) in expected.items():
    pair = losses.ADVERSARIAL[name]
    np.testing.assert_allclose(pair.generator(REAL, FAKE), generator, rtol=1e-6)
    np.testing.assert_allclose(pair.discriminator(REAL, FAKE), discriminator, rtol=1e-6)


@pytest.mark.developer("torch")
def test_against_pytorch():
  import torch

  bce = torch.nn.functional.binary_cross_entropy_with_logits
  rng = np.random.default_rng(1)
  real, fake = (5 * rng.normal(size=(2, 64))).astype(np.float32)
  t_real, t_fake = (torch.tensor(x, requires_grad=True) for x in (real, fake))
  one, zero = torch.ones(64), torch.zeros(64)
  loss_d = bce(t_real - t_fake.mean(), one) + bce(t_fake - t_real.mean(), zero)
  loss_g = bce(t_real - t_fake.mean(), zero) + bce(t_fake - t_real.mean(), one)
  for ours, theirs in (
    (losses.ragan_discriminator_loss, loss_d),
    (losses.ragan_generator_loss, loss_g),
  ):
    value, gradients = jax.value_and_grad(ours, argnums=(0, 1))(real, fake)
    np.testing.assert_allclose(value, theirs.item(), rtol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(theirs, (t_real, t_fake)), strict=True):
      np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-7)

  sr, hr = rng.random((2, 2, 8, 9, 3)).astype(np.float32)
  t_sr, t_hr = torch.tensor(sr), torch.tensor(hr)
  np.testing.assert_allclose(
    losses.l1_loss(sr, hr), torch.nn.functional.l1_loss(t_sr, t_hr).item(), rtol=1e-5
  )
  np.testing.assert_allclose(
    losses.mse_loss(sr, hr), torch.nn.functional.mse_loss(t_sr, t_hr).item(), rtol=1e-6
  )


def test_pixel_losses_by_numpy():
  rng = np.random.default_rng(2)
  sr, hr = rng.random((2, 2, 5, 6, 3))
  np.testing.assert_allclose(
    losses.charbonnier_loss(jnp.array(sr), jnp.array(hr), eps=0.1),
    np.sqrt((sr - hr) ** 2 + 0.01).mean(),
    rtol=1e-6,
  )
  total = 0.0
  for n in range(2):
    for y in range(5):
      for x in range(6):
        for c in range(3):
          down = sr[n, y + 1, x, c] - sr[n, y, x, c] if y < 4 else 0
          right = sr[n, y, x + 1, c] - sr[n, y, x, c] if x < 5 else 0
          total += np.hypot(down, right)
  np.testing.assert_allclose(losses.tv_loss(jnp.array(sr)), total / sr.size, rtol=1e-5)
  flat = jax.grad(losses.tv_loss)(jnp.ones((1, 4, 4, 3)))
  assert np.isfinite(flat).all()


def test_images_of_different_shapes_do_not_broadcast():
  with pytest.raises(ValueError, match="same shape"):
    losses.l1_loss(jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4, 4, 1)))


def test_perceptual_loss_weighs_and_scales_each_layer():
  params = vgg.init_vgg(jax.random.key(0), depth=19, width=1 / 16)
  rng = np.random.default_rng(3)
  sr, hr = jnp.asarray(rng.random((2, 1, 32, 32, 3)), jnp.float32)
  names = ("conv2_2", "relu3_1")
  of_sr = jax.tree.map(np.float64, vgg.vgg_features(params, sr, names))
  of_hr = jax.tree.map(np.float64, vgg.vgg_features(params, hr, names))
  for criterion, numpy_criterion in (
    (losses.l1_loss, np.abs),
    (losses.mse_loss, np.square),
  ):
    expected = 0.5 * numpy_criterion(3 * (of_sr["conv2_2"] - of_hr["conv2_2"])).mean()
    expected += 2.0 * numpy_criterion(0.1 * (of_sr["relu3_1"] - of_hr["relu3_1"])).mean()
    value = losses.perceptual_loss(
        params, sr, hr,
        layers={"conv2_2": 0.5, "relu3_1": 2.0},
        scales={"conv2_2": 3.0, "relu3_1": 0.1},
        criterion=criterion,
    )  # fmt: skip
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_perceptual_loss_has_no_gradient_into_hr():
  params = vgg.init_vgg(jax.random.key(0), depth=19, width=1 / 16)
  images = jnp.asarray(np.random.default_rng(4).random((2, 1, 16, 16, 3)), jnp.float32)
  arguments = {"layers": {"conv1_2": 1.0}, "scales": {"conv1_2": 1.0}}
  by_sr, by_hr = jax.grad(
    lambda sr, hr: losses.perceptual_loss(params, sr, hr, **arguments), argnums=(0, 1)
  )(*images)
  assert np.abs(by_sr).max() > 0
  np.testing.assert_array_equal(by_hr, 0)
