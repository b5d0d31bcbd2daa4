"""Tests of sr_jax/training/losses.py: against numbers by hand, by numpy, and by PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

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


def test_vgg_sees_a_grey_image_as_three_equal_channels():
  params = vgg.init_vgg(jax.random.key(0), depth=19, width=1 / 16)
  grey = jnp.asarray(np.random.default_rng(4).random((2, 1, 16, 16, 1)), jnp.float32)
  arguments = {"layers": {"conv1_2": 1.0}, "scales": {"conv1_2": 1.0}}
  expected = losses.perceptual_loss(params, *np.repeat(grey, 3, axis=-1), **arguments)
  np.testing.assert_allclose(
    losses.perceptual_loss(params, *grey, **arguments), expected, rtol=1e-6
  )


def by_reference(name: str, sr, hr, extra):
  """The mean over images, and over channels where the definition is of one, in slow numpy."""
  channels = [(n, c) for n in range(len(sr)) for c in range(sr.shape[-1])]
  if name == "consistency":
    means = [references.block_means(x, 8) for x in (*sr, *hr)]
    return np.mean(np.abs(np.array(means[: len(sr)]) - np.array(means[len(sr) :])))
  if name == "chroma":
    return np.mean(np.abs(references.chroma(sr) - references.chroma(hr))) / 255
  if name == "ms_ssim":
    scores = [references.ms_ssim(sr[n, ..., c], hr[n, ..., c], scales=2) for n, c in channels]
    return 1 - np.mean(scores)
  if name == "focal_frequency":
    values = (
      references.focal_frequency(sr[n, ..., c], hr[n, ..., c], extra[n, ..., c], alpha=1.0)
      for n, c in channels
    )
    return np.mean(list(values))
  return np.mean([references.ldl(*images) for images in zip(sr, hr, extra, strict=True)])


# 17 and 23 are no multiples of 8, and 22 holds two scales.
@pytest.mark.parametrize(
  "name, shape",
  [
    ("consistency", (2, 17, 23, 3)),
    ("chroma", (2, 5, 6, 3)),
    ("ms_ssim", (1, 22, 23, 2)),
    ("focal_frequency", (2, 6, 7, 3)),
    ("ldl", (2, 9, 8, 3)),
  ],
)
def test_losses_of_images_and_their_gradients_by_numpy(name, shape, monkeypatch):
  rng = np.random.default_rng(5)
  hr = rng.uniform(0.2, 0.8, shape)
  sr, ema_sr = hr + rng.normal(0, 0.1, (2, *hr.shape))
  loss = losses.ldl_loss if name == "ldl" else losses.IMAGE[name]
  arguments = (hr, ema_sr) if name == "ldl" else (hr,)
  extra = sr if name == "focal_frequency" else ema_sr  # its weights are constants of the gradient

  value = jax.jit(loss)(*(jnp.asarray(x, jnp.float32) for x in (sr, *arguments)))
  assert value.dtype == jnp.float32 and value.shape == ()
  np.testing.assert_allclose(value, by_reference(name, sr, hr, extra), rtol=1e-4)

  with jax.enable_x64(True), monkeypatch.context() as patched:
    patched.setattr(jnp, "float32", jnp.float64)  # the losses look it up there
    compute = jax.jit(jax.value_and_grad(loss))
    value, gradient = compute(*(jnp.asarray(x) for x in (sr, *arguments)))
    value, gradient = np.asarray(value), np.asarray(gradient)
  # MATLAB's coefficients of Cb and Cr, which ours are, have five digits.
  np.testing.assert_allclose(value, by_reference(name, sr, hr, extra), rtol=1e-6)
  for _ in range(3):
    step = 1e-6 * rng.normal(size=sr.shape)
    ahead, behind = (by_reference(name, sr + s, hr, extra) for s in (step, -step))
    np.testing.assert_allclose((gradient * step).sum(), (ahead - behind) / 2, rtol=1e-5)


@pytest.mark.parametrize("name", ["ldl", *losses.IMAGE])
def test_losses_of_equal_and_of_flat_images_have_finite_gradients(name):
  hr = jnp.asarray(np.random.default_rng(6).random((2, 12, 12, 3)), jnp.float32)
  loss = losses.ldl_loss if name == "ldl" else losses.IMAGE[name]
  compute = jax.jit(jax.value_and_grad(loss))
  for sr in (hr, hr + 0.25, jnp.zeros_like(hr), 1 - hr):
    arguments = (hr, sr) if name == "ldl" else (hr,)
    value, gradient = compute(sr, *arguments)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert sr is not hr or abs(value) < 1e-6


def test_consistency_sees_a_shift_of_all_pixels_and_no_texture():
  rng = np.random.default_rng(7)
  hr = jnp.asarray(rng.random((1, 16, 16, 3)), jnp.float32)
  np.testing.assert_allclose(losses.consistency_loss(hr + 5 / 255, hr), 5 / 255, rtol=1e-4)
  texture = jnp.asarray(np.indices((16, 16)).sum(axis=0) % 2 - 0.5, jnp.float32)
  np.testing.assert_allclose(
    losses.consistency_loss(hr + texture[None, :, :, None], hr), 0, atol=1e-6
  )
  tint = jnp.asarray([3, -2, 1], jnp.float32).reshape(1, 1, 1, 3) / 255
  assert losses.chroma_loss(hr + tint, hr) > 1 / 255
  np.testing.assert_allclose(losses.chroma_loss(hr + 0.1, hr), 0, atol=1e-6)


@pytest.mark.parametrize("side, scales", [(21, 1), (44, 3)])
def test_ms_ssim_has_as_many_scales_as_hold_a_window(side, scales):
  rng = np.random.default_rng(8)
  hr = rng.random((side, side))
  sr = hr + rng.normal(0, 0.2, hr.shape)
  images = (jnp.asarray(x[None, :, :, None], jnp.float32) for x in (sr, hr))
  value = jax.jit(losses.ms_ssim_loss)(*images)
  np.testing.assert_allclose(value, 1 - references.ms_ssim(sr, hr, scales), rtol=1e-4)


def test_images_smaller_than_a_window_have_no_ms_ssim():
  with pytest.raises(ValueError, match="11 or more"):
    losses.ms_ssim_loss(jnp.zeros((1, 10, 20, 1)), jnp.zeros((1, 10, 20, 1)))


def test_chroma_needs_colours():
  with pytest.raises(ValueError, match="three channels"):
    losses.chroma_loss(jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 4, 4, 1)))


@pytest.mark.developer("torch")
@pytest.mark.parametrize("channels", [1, 3])
def test_dists_is_that_of_torch(channels):
  """As its authors compute it, with a VGG16 of random weights and few channels; odd sides."""
  import torch
  import torch.nn.functional as F

  params = jax.device_get(vgg.init_vgg(jax.random.key(0), depth=16, width=1 / 16))
  rng = np.random.default_rng(1)
  alpha, beta = rng.random((2, 3 + 4 + 8 + 16 + 32 + 32), np.float32)
  sr, hr = rng.random((2, 2, 37, 42, channels), np.float32)

  def features(image):
    image = torch.tensor(np.broadcast_to(image, (*image.shape[:-1], 3)).copy()).permute(0, 3, 1, 2)
    found = [image]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    x = (image - mean) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    for block, count in enumerate((2, 2, 3, 3, 3), 1):
      if block > 1:
        window = torch.tensor(np.outer(*2 * [np.hanning(5)[1:-1]]), dtype=torch.float32)
        window = (window / window.sum()).expand(x.shape[1], 1, 3, 3)
        x = torch.sqrt(F.conv2d(x**2, window, stride=2, padding=1, groups=x.shape[1]) + 1e-12)
      for i in range(1, count + 1):
        kernel = torch.tensor(params[f"conv{block}_{i}"]["kernel"]).permute(3, 2, 0, 1)
        x = torch.relu(F.conv2d(x, kernel, padding=1))
      found.append(x)
    return found

  def distance(sr):
    of_sr, of_hr = features(sr), features(hr)
    alphas, betas = (
      torch.split(torch.tensor(w), [x.shape[1] for x in of_sr]) for w in (alpha, beta)
    )
    total = 0.0
    for x, y, a, b in zip(of_sr, of_hr, alphas, betas, strict=True):
      mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
      covariance = (x * y).mean((2, 3)) - mean_x * mean_y
      var_x, var_y = x.var((2, 3), correction=0), y.var((2, 3), correction=0)
      total += (a * (2 * mean_x * mean_y + 1e-6) / (mean_x**2 + mean_y**2 + 1e-6)).sum(1)
      total += (b * (2 * covariance + 1e-6) / (var_x + var_y + 1e-6)).sum(1)
    return (1 - total / (alpha.sum() + beta.sum())).mean()

  params["dists"] = {"alpha": alpha, "beta": beta}
  value, slope = jax.value_and_grad(lambda sr: losses.dists_loss(params, sr, hr))(sr)
  np.testing.assert_allclose(value, distance(sr), rtol=1e-4)
  np.testing.assert_allclose(losses.dists_loss(params, hr, hr), 0, atol=1e-6)
  step = np.float32(rng.normal(size=sr.shape)) * 2e-3
  expected = (distance(sr + step) - distance(sr - step)) / 2
  np.testing.assert_allclose(np.sum(slope * step), expected, rtol=0.03)
