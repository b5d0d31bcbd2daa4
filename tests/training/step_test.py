"""Tests of sr_jax/training/step.py: against the released code, over devices, its options."""

import functools
import os
import pathlib
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
import pytest

from sr_jax.formats import state_dicts
from sr_jax.kernels.choose import Kernels, choose
from sr_jax.machine import sharding
from sr_jax.networks import discriminators
from sr_jax.networks.rrdbnet import RRDBNet, ResidualNet
from sr_jax.networks.srresnet import SRResNet
from sr_jax.networks import vgg
from sr_jax.runs.state import create_guard_state, create_train_state
from sr_jax.training import losses
from sr_jax.training import schedules
from sr_jax.training.freezing import frozen_masks
from sr_jax.training.guard import Guard
from sr_jax.training.step import (
  make_optimizer,
  make_train_step,
  with_kernels_rounded_once,
)
from sr_jax.training.terms import Adversarial, Perceptual, by_replica, make_losses

LR_SHAPE, HR_SHAPE = (8, 8, 8, 3), (8, 32, 32, 3)
ON_CPUS = choose([types.SimpleNamespace(platform="cpu")] * 8, "float32")
# Few operations: the step is tested.
GENERATOR = ResidualNet(features=8, blocks=1, kernels=ON_CPUS)
RRDBNET = RRDBNet(features=8, blocks=1, growth=4, kernels=ON_CPUS)
DISCRIMINATOR = discriminators.VGGDiscriminator(features=4, kernels=ON_CPUS)
OPTIMIZER = make_optimizer(b1=0.9, b2=0.99)
RATE = 1e-5  # small, for tests of a few steps in float32
PAPERS_RATE = 1e-4
VGG = vgg.init_vgg(jax.random.key(9), depth=19, width=1 / 16)
PERCEPTUAL = Perceptual({"conv3_2": 1.0}, {"conv3_2": 0.5}, losses.l1_loss)
GAN_WEIGHTS = {"pixel": 1e-2, "perceptual": 1.0, "adversarial": 5e-3}


def make_batch(seed: int = 8, n: int = 8) -> dict[str, np.ndarray]:
  """HR images with the spectrum of photographs, 1/f, and LR images that are means of 4x4 pixels.

  With seed 8 no activation of the steps here is so near to zero that rounding takes it to the other
  side of a leaky ReLU, where gradients jump: noise of 1e-6 of the images, in 120 draws, moved them
  by 3e-4 of a leaf's largest value at most. With most other seeds some moved by 1e-2 or more.
  """
  rng = np.random.default_rng(seed)
  _, height, width, channels = HR_SHAPE
  frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
  noise = np.fft.rfft2(rng.normal(size=(n, height, width, channels)), axes=(1, 2))
  hr = np.fft.irfft2(noise / (frequency + 1 / height)[None, :, :, None], axes=(1, 2))
  hr = np.clip(0.5 + 0.2 * hr / hr.std(), 0, 1).astype(np.float32)
  return {"lr": hr.reshape(n, height // 4, 4, width // 4, 4, channels).mean(axis=(2, 4)), "hr": hr}


@functools.cache
def make_mesh(devices: int):
  return sharding.create_mesh(jax.devices()[:devices])


@functools.cache
def default_step(gan: bool, devices: int = 1):
  """The step that most tests share, compiled once."""
  return make_step(gan=gan, devices=devices)


def make_step(*, gan: bool = True, devices: int = 1, generator=GENERATOR, **arguments):
  defaults = {
    "weights": GAN_WEIGHTS if gan else {"pixel": 1.0},
    "optimizer_g": OPTIMIZER,
    "optimizer_d": OPTIMIZER,
    "learning_rate": schedules.constant(base=RATE),
    "mesh": make_mesh(devices),
  }
  if gan:
    defaults["perceptual"] = PERCEPTUAL
    defaults["adversarial"] = Adversarial(losses.ADVERSARIAL["ragan"])
  return make_train_step(generator, DISCRIMINATOR if gan else None, **{**defaults, **arguments})


@functools.cache
def initial_state(gan: bool, generator=GENERATOR):
  create = functools.partial(
      create_train_state, 0, generator, DISCRIMINATOR if gan else None,
      OPTIMIZER, OPTIMIZER, (1, *LR_SHAPE[1:]), (1, *HR_SHAPE[1:]),
  )  # fmt: skip
  return jax.device_get(jax.jit(create)())


def put(state, devices: int = 1):
  """A fresh copy: the step donates its state."""
  return jax.device_put(state, sharding.replicated(make_mesh(devices)))


def run(step, state, batches, devices: int = 1, vgg_params=VGG):
  state, history = put(state, devices), []
  vgg_params = put(vgg_params, devices)
  for batch in batches:
    batch = jax.device_put(batch, sharding.batch_sharded(make_mesh(devices)))
    state, metrics = step(state, batch, vgg_params)
    history.append(jax.device_get(metrics))
  return state, history


def first_gradients(state):
  """Adam's first moment after one step is (1 - b1) times the gradient."""
  nets = {"g": state.generator, "d": state.discriminator}
  return {
    name: jax.tree.map(lambda m: np.asarray(m) / 0.1, net.opt_state.mu)
    for name, net in nets.items()
    if net is not None
  }


def assert_close(a, b, rtol: float, zero: tuple[str, ...] = ()) -> None:
  """Leaf by leaf, relative to the largest value of the leaf."""
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    x, y = np.asarray(x), np.asarray(y)
    largest = 1.0 if name.endswith(zero or ("\0",)) else np.abs(y).max()
    assert np.abs(x - y).max() <= rtol * max(largest, 1e-12), (name, np.abs(x - y).max(), largest)


LOSSES = ("loss_g", "loss_d", "loss/pixel", "loss/perceptual", "loss/adversarial")


@pytest.mark.slow  # distributed_test compares whole runs in float64
def test_one_device_and_eight_take_the_same_first_step():
  """To float32's rounding; later steps magnify that, and are compared in float64."""
  states, metrics = {}, {}
  for devices in (1, 8):
    step = default_step(True, devices)
    states[devices], (metrics[devices],) = run(step, initial_state(True), [make_batch()], devices)
  for name in LOSSES:
    np.testing.assert_allclose(metrics[8][name], metrics[1][name], rtol=1e-5, err_msg=name)
  # linear2/bias moves every logit alike, which RaGAN does not see: its gradient is rounding.
  gradients = (first_gradients(states[devices]) for devices in (8, 1))
  assert_close(*gradients, 1e-4, zero=("linear2/bias",))


IN_FLOAT64 = """
import sys
sys.path[:0] = ["tests", "tests/training"]
import in_float64
import step_test
step_test.one_device_and_eight_are_the_same_run(in_float64.widen)
"""


@pytest.mark.slow  # distributed_test compares whole runs so, losses alone
def test_in_float64_one_device_and_eight_are_the_same_run():
  root = pathlib.Path(__file__).resolve().parents[2]
  environment = {**os.environ, "PYTHONPATH": str(root)}
  subprocess.run([sys.executable, "-c", IN_FLOAT64], cwd=root, env=environment, check=True)


def one_device_and_eight_are_the_same_run(widen) -> None:
  """Compares 20 steps and the first gradients, in a process where float32 is float64."""
  state, vgg_params = widen(initial_state(True)), widen(VGG)
  batches = [widen(make_batch(seed)) for seed in range(20)]
  gradients, histories = {}, {}
  for devices in (1, 8):
    step = make_step(devices=devices, learning_rate=schedules.constant(base=PAPERS_RATE))
    assert "xf32>" not in step.lower(state, batches[0], vgg_params).as_text()
    after, first = run(step, state, batches[:1], devices, vgg_params)
    gradients[devices] = first_gradients(after)
    _, rest = run(step, jax.device_get(after), batches[1:], devices, vgg_params)
    histories[devices] = first + rest
  assert_close(gradients[8], gradients[1], 1e-10, zero=("linear2/bias",))
  for number, (one, eight) in enumerate(zip(histories[1], histories[8], strict=True)):
    for name in LOSSES:
      where = f"{name}, step {number}"
      np.testing.assert_allclose(eight[name], one[name], rtol=1e-10, err_msg=where)


def test_the_mean_of_ragan_is_over_the_global_batch():
  real = np.array([2, -1, 0.5, 3], np.float32)
  fake = np.array([0.25, 1.5, -2, -0.75], np.float32)
  split = sharding.batch_sharded(make_mesh(2))
  value = jax.jit(losses.ragan_discriminator_loss, in_shardings=(split, split))(real, fake)
  np.testing.assert_allclose(value, 0.773557982, rtol=1e-6)  # 1.111336532 with means of shards


@pytest.mark.parametrize("replicas, expected", [(1, 0.773557982), (2, 1.111336532)])
def test_the_mean_of_ragan_by_replica_is_ddps(replicas, expected):
  """Golden values of the released code's sum, doubled: the printed equation has no half."""
  real = np.array([2, -1, 0.5, 3], np.float32)
  fake = np.array([0.25, 1.5, -2, -0.75], np.float32)
  split = sharding.batch_sharded(make_mesh(2))
  loss = by_replica(losses.ragan_discriminator_loss, replicas)
  value = jax.jit(loss, in_shardings=(split, split))(real, fake)
  np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_scope_of_the_game_reaches_the_step():
  batch = make_batch()
  game = Adversarial(losses.ADVERSARIAL["ragan"], replicas=2)
  _, history = run(make_step(adversarial=game), initial_state(True), [batch])
  _, whole = run(default_step(True), initial_state(True), [batch])
  assert abs(history[0]["loss/adversarial"] - whole[0]["loss/adversarial"]) > 1e-4
  assert abs(history[0]["loss/pixel"] - whole[0]["loss/pixel"]) < 1e-6


def test_one_batch_can_be_overfitted():
  step = make_step(gan=False, learning_rate=schedules.constant(base=3e-3))
  _, history = run(step, initial_state(False), [make_batch(n=1)] * 100, vgg_params=None)
  assert history[-1]["loss/pixel"] < 0.4 * history[0]["loss/pixel"]


def test_weight_zero_is_the_term_removed():
  weights = {"pixel": 1.0, "perceptual": 0.0, "adversarial": 0.0, "tv": 0.0}
  batches = [make_batch(seed) for seed in range(3)]
  a, history_a = run(make_step(gan=False, weights=weights), initial_state(False), batches)
  b, history_b = run(default_step(False), initial_state(False), batches, vgg_params=None)
  assert_close(a, b, 0.0)
  assert set(history_a[0]) == set(history_b[0])
  assert not any("perceptual" in name or "adversarial" in name for name in history_a[0])


def test_terms_of_images_and_of_the_averaged_generator():
  state = initial_state(gan=False)
  rng = np.random.default_rng(0)
  ema = jax.tree.map(lambda x: x + rng.normal(0, 0.05, x.shape).astype(x.dtype), state.ema_params)
  state = state.replace(ema_params=ema)
  weights = {"ldl": 2.0, **dict.fromkeys(losses.IMAGE, 3.0)}
  batch = make_batch()
  _, (metrics,) = run(make_step(gan=False, weights=weights), state, [batch])

  @jax.jit
  def compute(params, ema, hr):
    sr, ema_sr = (GENERATOR.apply({"params": p}, batch["lr"], train=True) for p in (params, ema))
    values = {name: loss(sr, hr) for name, loss in losses.IMAGE.items()}
    return {**values, "ldl": losses.ldl_loss(sr, hr, ema_sr)}

  expected = compute(state.generator.params, ema, batch["hr"])
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[f"loss/{name}"], value, rtol=1e-4, err_msg=name)
  total = sum(weights[name] * value for name, value in expected.items())
  np.testing.assert_allclose(metrics["loss_g"], total, rtol=1e-4)


class Repeat(nn.Module):
  """A generator without parameters."""

  @nn.compact
  def __call__(self, lr, *, train):
    return lr.repeat(4, axis=1).repeat(4, axis=2)


def test_dists_moves_sr_and_not_hr(monkeypatch):
  """Its value is the same the other way round, but no gradient would flow."""
  monkeypatch.setattr(losses, "dists_loss", lambda params, sr, hr, **how: params * (3 * sr - hr))
  compute = make_losses(Repeat(), None, {"dists": 2.0}, losses.l1_loss, PERCEPTUAL, None)
  batch = make_batch()
  (value, _), _ = compute({}, None, {}, None, *batch.values(), 0.5, {})
  sr = batch["lr"].repeat(4, axis=1).repeat(4, axis=2)
  np.testing.assert_allclose(value, 3 * sr - batch["hr"], atol=1e-6)


def test_weighted_terms_add_up():
  step = make_step(weights={**GAN_WEIGHTS, "tv": 0.1})
  _, (metrics,) = run(step, initial_state(True), [make_batch()])
  total = 0.0
  for name, weight in {**GAN_WEIGHTS, "tv": 0.1}.items():
    np.testing.assert_allclose(
      metrics[f"weighted/{name}"], weight * metrics[f"loss/{name}"], rtol=1e-6
    )
    total += weight * metrics[f"loss/{name}"]
  np.testing.assert_allclose(metrics["loss_g"], total, rtol=1e-6)


def test_the_state_is_donated():
  step, state = make_step(gan=False), put(initial_state(False))
  step(state, make_batch(), None)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_uint8_batches_are_scaled_to_one():
  batch = {k: np.round(255 * v).astype(np.uint8) for k, v in make_batch().items()}
  floats = {k: v.astype(np.float32) / 255 for k, v in batch.items()}
  a, _ = run(default_step(False), initial_state(False), [batch], vgg_params=None)
  b, _ = run(default_step(False), initial_state(False), [floats], vgg_params=None)
  assert_close(a, b, 1e-5)


def test_ema():
  batches = [make_batch(seed) for seed in range(3)]
  for warmup in (False, True):
    step = make_step(gan=False, ema_decay=0.2, ema_warmup=warmup)
    ema = state = initial_state(False)
    ema = ema.ema_params
    for i, batch in enumerate(batches):
      state, _ = run(step, jax.device_get(state), [batch], vgg_params=None)
      decay = min(0.2, (1 + i) / (10 + i)) if warmup else 0.2
      ema = jax.tree.map(
          lambda e, p, decay=decay: decay * e + (1 - decay) * np.asarray(p),
          ema, state.generator.params,
      )  # fmt: skip
    assert_close(state.ema_params, ema, 1e-6)


def test_adam_with_a_schedule_is_optax_adam():
  step = make_step(
    gan=False, learning_rate=schedules.multi_step(base=RATE, milestones=(2,), gamma=0.1)
  )
  batches = [make_batch(seed) for seed in range(4)]
  state, _ = run(step, initial_state(False), batches, vgg_params=None)

  def loss(params, batch):
    sr = GENERATOR.apply({"params": params}, batch["lr"], train=True)
    return jnp.mean(jnp.abs(sr - batch["hr"]))

  adam = optax.adam(lambda count: jnp.where(count >= 2, 0.1 * RATE, RATE), b1=0.9, b2=0.99)
  params = jax.device_put(initial_state(False).generator.params)
  opt_state = adam.init(params)
  gradient = jax.jit(jax.grad(loss))
  for batch in batches:
    updates, opt_state = adam.update(gradient(params, batch), opt_state, params)
    params = optax.apply_updates(params, updates)
  assert_close(state.generator.params, params, 1e-4)


def test_discriminator_warmup_and_ratio():
  adversarial = Adversarial(losses.ADVERSARIAL["ragan"], warmup_steps=3, steps_per_generator_step=2)
  step = make_step(adversarial=adversarial)
  state, moved = jax.device_get(initial_state(True)), []
  for seed in range(6):
    new, _ = run(step, state, [make_batch(seed)])
    new = jax.device_get(new)
    change = lambda a, b: any(  # noqa: E731
      (x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert change(new.discriminator.params, state.discriminator.params)
    assert change(new.generator, state.generator) == change(new.ema_params, state.ema_params)
    moved.append(change(new.generator, state.generator))
    state = new
  # Three steps for D alone, then every second step.
  assert moved == [False, False, False, True, False, True]


def test_the_discriminator_is_left_alone_where_its_margin_is_larger():
  patch = discriminators.PatchDiscriminator(features=2, kernels=ON_CPUS)
  create = functools.partial(
    create_train_state, 0, GENERATOR, patch, OPTIMIZER, OPTIMIZER, (1, 8, 8, 3), (1, 32, 32, 3)
  )
  start, batches = jax.device_get(jax.jit(create)()), [make_batch(), make_batch(9)]

  @jax.jit
  def margin(batch):
    sr = GENERATOR.apply({"params": start.generator.params}, batch["lr"], train=True)
    real, fake = (
      patch.apply(start.discriminator.variables, x, train=True, mutable=["batch_stats"])[0]
      for x in (batch["hr"], sr)
    )
    return jnp.mean(real) - jnp.mean(fake)

  # The sign of the last layer is that of the margin; the bound lies between the two margins.
  margins = np.array([float(margin(batch)) for batch in batches])
  if margins.max() < -margins.min():
    params = dict(start.discriminator.params)
    params["conv4"] = {**params["conv4"], "kernel": -params["conv4"]["kernel"]}
    start = start.replace(discriminator=start.discriminator.replace(params=params))
    margins = -margins
  bound = max(margins.mean(), margins.max() / 2)
  step = make_train_step(
      GENERATOR, patch, weights={"adversarial": 1.0}, mesh=make_mesh(1),
      adversarial=Adversarial(losses.ADVERSARIAL["vanilla"], rest_above=float(bound)),
      optimizer_g=OPTIMIZER, optimizer_d=OPTIMIZER, learning_rate=schedules.constant(base=RATE),
  )  # fmt: skip
  rested = []
  for batch, value in zip(batches, margins, strict=True):
    state, (metrics,) = run(step, start, [batch], vgg_params=None)
    np.testing.assert_allclose(metrics["logit_real"] - metrics["logit_fake"], value, rtol=1e-3)
    rested.append(float(metrics["d_rests"]))
    for old, new in zip(*map(jax.tree.leaves, (start, state)), strict=True):
      assert np.asarray(old).shape == np.asarray(new).shape
    same = jax.tree.map(lambda old, new: np.array_equal(old, new), start, jax.device_get(state))
    assert all(jax.tree.leaves(same.discriminator)) == (value > bound)
    assert not any(jax.tree.leaves(same.discriminator.params)) or value > bound
    assert not all(jax.tree.leaves(same.generator.params))
  assert sorted(rested) == [0.0, 1.0]


@functools.cache
def grey_state():
  """A small grey generator and its state."""
  net = ResidualNet(features=4, blocks=1, out_channels=1)
  create = functools.partial(
    create_train_state, 0, net, None, OPTIMIZER, None, (1, 8, 8, 1), (1, 32, 32, 1)
  )
  return net, jax.device_get(jax.jit(create)())


def test_a_grey_generator_learns_the_luma_of_colour_images():
  (net, state), batch = grey_state(), make_batch()
  colour = {key: np.round(image * 255).astype(np.uint8) for key, image in batch.items()}
  # What a file of the grey image would hold, by Pillow, whose fixed point has 16 bits.
  luma = {
    key: np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None]
    for key, images in colour.items()
  }
  step = make_step(gan=False, generator=net, grey=True)
  states = []
  for images in (colour, luma, {k: np.repeat(x, 3, axis=-1) for k, x in luma.items()}):
    after, (metrics,) = run(step, state, [images])
    states.append((after.generator.params, metrics["loss/pixel"]))
  for params, value in states[1:]:
    np.testing.assert_allclose(value, states[0][1], rtol=1e-3)
    assert_close(params, states[0][0], 1e-3)
  assert_close(states[1][0], states[2][0], 1e-5)


@pytest.mark.slow  # a program more is compiled; deep_images_test and mixing_test have the parts
def test_the_step_mixes_the_luma_of_16_bits_at_the_place_of_the_data():
  """LR and HR; of examples that are ahead of the steps the place is theirs."""
  (net, state), rng = grey_state(), np.random.default_rng(1)
  guard = create_guard_state().replace(data_offset=jnp.int32(4))
  # So dark that luma of 8 bits would have three levels.
  batch = {
    key: rng.integers(0, 600, image.shape).astype(np.uint16) for key, image in make_batch().items()
  }

  def mix(lr, hr, step):
    return 0.1 * step * lr[::-1], 0.2 * step * hr[::-1] + 0.003

  step = make_step(gan=False, generator=net, grey=True, mix=mix, guard=Guard())
  _, (metrics,) = run(step, state.replace(step=jnp.int32(2), guard=guard), [batch], vgg_params=None)
  weights = np.array([0.299, 0.587, 0.114])
  luma = (np.floor(batch[key] @ weights + 0.5)[..., None] / 65535 for key in ("lr", "hr"))
  lr, hr = mix(*luma, 6)
  sr = net.apply({"params": state.generator.params}, np.float32(lr), train=True)
  np.testing.assert_allclose(metrics["loss/pixel"], np.abs(sr - hr).mean(), rtol=1e-5)


def test_accumulation_without_batch_statistics_is_the_whole_batch():
  batches = [make_batch(seed) for seed in range(2)]
  a, _ = run(make_step(gan=False, accumulate_steps=4), initial_state(False), batches[:1],
             vgg_params=None)  # fmt: skip
  b, _ = run(default_step(False), initial_state(False), batches[:1], vgg_params=None)
  assert_close(first_gradients(a), first_gradients(b), 3e-5)
  c, _ = run(make_step(gan=False, accumulate_steps=2, devices=4), initial_state(False),
             batches[:1], devices=4, vgg_params=None)  # fmt: skip
  assert_close(first_gradients(c), first_gradients(b), 3e-5)


def test_a_batch_is_divided_where_nothing_looks_at_it_as_a_whole():
  """Into parts of so many LR pixels as the generator's kernels should work on at a time."""
  n, *image = LR_SHAPE
  kernels = Kernels(pixels=2 * image[0] * image[1])
  generator = GENERATOR.clone(kernels=kernels)

  def is_divided(step, *arguments):
    program = step.lower(*arguments).as_text()
    whole, part = ("x".join(map(str, (size, *image))) for size in (n, n // 4))
    assert f"tensor<{whole}xf32>" in program
    return f"tensor<{part}xf32>" in program

  b, (whole,) = run(default_step(False), initial_state(False), [make_batch()], vgg_params=None)
  step = make_step(gan=False, generator=generator)
  a, (metrics,) = run(step, initial_state(False), [make_batch()], vgg_params=None)
  assert_close(first_gradients(a), first_gradients(b), 1e-5)
  np.testing.assert_allclose(metrics["loss_g"], whole["loss_g"], rtol=1e-5)
  arguments = initial_state(False), make_batch(), None
  assert is_divided(step, *arguments)
  assert not is_divided(default_step(False), *arguments)
  # BatchNorm in D and RaGAN's means.
  assert not is_divided(make_step(generator=generator), initial_state(True), make_batch(), VGG)
  net = SRResNet(features=4, blocks=1, scale=2, kernels=kernels)  # BatchNorm
  state = jax.eval_shape(
    lambda: create_train_state(
      0, net, None, OPTIMIZER, None, (1, *LR_SHAPE[1:]), (1, *HR_SHAPE[1:])
    )
  )
  batch = {**make_batch(), "hr": np.repeat(np.repeat(make_batch()["lr"], 2, 1), 2, 2)}
  assert not is_divided(make_step(gan=False, generator=net), state, batch, None)


def test_what_is_frozen_keeps_its_bits_its_moments_and_its_average():
  """From a state in which they move, as when a run goes on; the rest takes the step as before."""
  net = SRResNet(features=4, blocks=2, scale=4)
  create = functools.partial(
    create_train_state, 0, net, None, OPTIMIZER, None, (1, *LR_SHAPE[1:]), (1, *HR_SHAPE[1:])
  )
  state = jax.device_get(jax.jit(create)())
  masks = frozen_masks(("conv_first", "body/1", "bn_body"), state.generator.variables)
  # Clipping would couple them by the norm: the norm itself is compared.
  free, start = make_step(gan=False, generator=net), state
  start, _ = run(free, start, [make_batch()])
  start = jax.device_get(start)
  start = start.replace(ema_params=jax.tree.map(lambda x: 0.3 * x + 0.1, start.ema_params))
  before, (metrics,) = run(free, start, [make_batch(9)])
  after, (frozen_metrics,) = run(
    make_step(gan=False, generator=net, frozen=masks), start, [make_batch(9)]
  )

  def parts(state):
    g = state.generator
    averaged = {"ema": state.ema_params, "mu": g.opt_state.mu, "nu": g.opt_state.nu}
    return {"params": g.params, **averaged}, g.batch_stats

  masks = {name: masks["params"] for name in ("params", "ema", "mu", "nu")}, masks["batch_stats"]
  moved = 0
  for mask, old, new, expected in zip(
    *map(jax.tree.leaves, (masks, parts(start), parts(after), parts(before))), strict=True
  ):
    mask, old, new, expected = (np.asarray(x) for x in (mask, old, new, expected))
    mask = np.broadcast_to(mask, old.shape)
    np.testing.assert_array_equal(new[mask], old[mask])
    np.testing.assert_allclose(new[~mask], expected[~mask], rtol=2e-4, atol=1e-6)
    moved += np.any(expected[mask] != old[mask])
  assert moved >= 4 * 4  # without freezing they all move
  assert frozen_metrics["grad_norm_g"] < metrics["grad_norm_g"]


@pytest.mark.parametrize("gan", [False, True])
def test_micro_batches_loop_where_gradients_are_as_fast_in_a_loop(gan):
  """By the networks' kernels: of XLA's convolutions on CPUs they are not."""
  state = initial_state(gan)

  def loops(kernels):
    g, d = (net.clone(kernels=kernels) for net in (GENERATOR, DISCRIMINATOR))
    arguments = {"weights": {"adversarial": 1.0}} if gan else {"weights": {"pixel": 1.0}}
    if gan:
      arguments["adversarial"] = Adversarial(losses.ADVERSARIAL["ragan"])
    step = make_train_step(
        g, d if gan else None, optimizer_g=OPTIMIZER, optimizer_d=OPTIMIZER,
        learning_rate=schedules.constant(base=RATE), accumulate_steps=2, mesh=make_mesh(1),
        **arguments,
    )  # fmt: skip
    return step.lower(state, make_batch(), None).as_text().count("stablehlo.while")

  assert loops(Kernels(slow_loops=False)) == loops(Kernels(slow_loops=True)) + 1


@pytest.mark.slow
def test_accumulation_of_a_gan_is_the_mean_over_micro_batches():
  batch = make_batch()
  whole, (metrics,) = run(make_step(accumulate_steps=2), initial_state(True), [batch])
  halves = []
  for j in range(2):  # micro-batch j has every second example, from j on
    half = {name: array[j::2] for name, array in batch.items()}
    halves.append(run(default_step(True), initial_state(True), [half]))
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *(first_gradients(s) for s, _ in halves))
  assert_close(first_gradients(whole), mean, 3e-4, zero=("linear2/bias",))
  expected = np.mean([h[0]["loss_d"] for _, h in halves])
  np.testing.assert_allclose(metrics["loss_d"], expected, rtol=1e-5)


def test_gradient_clipping_limits_the_global_norm():
  clipped = make_optimizer(b1=0.9, b2=0.99, clip_norm=1e-3)
  state = initial_state(False)
  net = state.generator.replace(opt_state=clipped.init(state.generator.params))
  step = make_step(gan=False, optimizer_g=clipped)
  state, (metrics,) = run(step, state.replace(generator=net), [make_batch()], vgg_params=None)
  moments = jax.tree.leaves(state.generator.opt_state.mu)
  norm = np.sqrt(sum(np.sum(np.square(np.asarray(m) / 0.1)) for m in moments))
  assert metrics["grad_norm_g"] > 1e-2  # as it was
  np.testing.assert_allclose(norm, 1e-3, rtol=1e-4)


def test_bfloat16_computes_and_float32_remembers():
  generator = GENERATOR.clone(dtype=jnp.bfloat16)
  step = make_train_step(
      generator, None, weights={"pixel": 1.0}, optimizer_g=OPTIMIZER,
      learning_rate=schedules.constant(base=RATE), mesh=make_mesh(1),
  )  # fmt: skip
  state, (metrics,) = run(step, initial_state(False), [make_batch()], vgg_params=None)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
  assert {np.asarray(m).dtype.name for m in metrics.values()} == {"float32"}
  _, (exact,) = run(default_step(False), initial_state(False), [make_batch()], vgg_params=None)
  np.testing.assert_allclose(metrics["loss_g"], exact["loss_g"], rtol=2e-2)
  assert metrics["loss_g"] != exact["loss_g"]


@pytest.mark.parametrize("spectral", [False, True])
def test_kernels_are_rounded_once_for_both_batches(spectral):
  """All but those that spectral norm divides; communication_test sees what it is good for."""
  network = (discriminators.UNetDiscriminator if spectral else discriminators.VGGDiscriminator)(4)
  image = jax.ShapeDtypeStruct((1, *HR_SHAPE[1:]), jnp.float32)
  initialise = functools.partial(network.init, train=True)
  shapes = jax.eval_shape(initialise, jax.random.key(0), image)
  variables = jax.tree.map(lambda x: np.full(x.shape, 1 / 3, np.float32), shapes)
  seen = with_kernels_rounded_once(lambda params_g, params_d, *_: params_d, jnp.bfloat16)
  params = seen({}, variables["params"], {}, variables["batch_stats"], None, None)
  assert jax.tree.structure(params) == jax.tree.structure(variables["params"])
  kernels = {
    layer: leaves["kernel"].dtype.name for layer, leaves in params.items() if "kernel" in leaves
  }
  plain = {"conv0", "conv9"} if spectral else set(kernels)
  assert kernels == {name: "bfloat16" if name in plain else "float32" for name in kernels}
  others = [leaf for leaves in params.values() for name, leaf in leaves.items() if name != "kernel"]
  assert {leaf.dtype.name for leaf in others} == {"float32"}
  assert float(params[min(plain)]["kernel"].ravel()[0]) == float(jnp.bfloat16(1 / 3))


def test_errors():
  with pytest.raises(ValueError, match="every loss term has weight 0"):
    make_step(gan=False, weights={"pixel": 0.0})
  with pytest.raises(ValueError, match="weight perceptual=1.0, but `perceptual` was not given"):
    make_step(gan=False, weights={"perceptual": 1.0})
  with pytest.raises(ValueError, match="give both a discriminator and"):
    make_step(weights={"pixel": 1.0})
  with pytest.raises(ValueError, match="batch_size=10 must be divisible by 8 devices.*=16"):
    sharding.check_batch_size(10, 1, make_mesh(8))


@pytest.mark.developer("torch")
def test_the_released_codes_sequence_of_five_forwards():
  """BasicSR: G's step with two forwards of D, then D's with three more and two backward passes."""
  import torch
  import torch_references as references

  batch = make_batch()
  adversarial = Adversarial(losses.ADVERSARIAL["ragan_detached"], discriminator_weight=0.5)
  weights = {"pixel": 1e-2, "adversarial": 2.5e-3}
  step = make_step(generator=RRDBNET, weights=weights, perceptual=None, adversarial=adversarial)
  start = initial_state(True, RRDBNET)
  ours, (metrics,) = run(step, start, [batch])

  g = references.RRDBNet(8, 1, 4)
  d = references.VGGDiscriminator(4, HR_SHAPE[1])
  references.load(g, state_dicts.to_state_dict("rrdbnet", start.generator.variables))
  references.load(d, state_dicts.discriminator_to_state_dict(start.discriminator.variables))
  g.train(), d.train()
  bce = torch.nn.functional.binary_cross_entropy_with_logits
  nchw = lambda x: torch.tensor(x.transpose(0, 3, 1, 2).copy())  # noqa: E731
  lr, hr = nchw(batch["lr"]), nchw(batch["hr"])
  ones, zeros = torch.ones(8, 1), torch.zeros(8, 1)

  for p in d.parameters():
    p.requires_grad = False
  sr = g(lr)
  real, fake = d(hr).detach().reshape(8, 1), d(sr).reshape(8, 1)
  loss_pixel = (sr - hr).abs().mean()
  loss_gan = (bce(real - fake.mean(), zeros) + bce(fake - real.mean(), ones)) / 2
  (1e-2 * loss_pixel + 5e-3 * loss_gan).backward()
  for p in d.parameters():
    p.requires_grad = True
  fake = d(sr).detach().reshape(8, 1)
  real = d(hr).reshape(8, 1)
  loss_real = 0.5 * bce(real - fake.mean(), ones)
  loss_real.backward()
  fake = d(sr.detach()).reshape(8, 1)
  loss_fake = 0.5 * bce(fake - real.mean().detach(), zeros)
  loss_fake.backward()

  np.testing.assert_allclose(metrics["loss/pixel"], loss_pixel.item(), rtol=1e-5)
  np.testing.assert_allclose(metrics["loss/adversarial"], 2 * loss_gan.item(), rtol=1e-5)
  np.testing.assert_allclose(metrics["loss_d"], loss_real.item() + loss_fake.item(), rtol=1e-5)
  gradients = first_gradients(ours)
  differences = {}
  for net, module, state in (
    ("generator", g, state_dicts.to_state_dict("rrdbnet", {"params": gradients["g"]})),
    (
      "discriminator",
      d,
      state_dicts.discriminator_to_state_dict(
        {"params": gradients["d"], "batch_stats": ours.discriminator.batch_stats}
      ),
    ),
  ):
    for name, p in module.named_parameters():
      theirs = p.grad.numpy()
      largest = 1.0 if name == "linear2.bias" else np.abs(theirs).max()
      differences[f"{net}.{name}"] = np.abs(state[name] - theirs).max() / largest
    for name, buffer in module.named_buffers():
      if name.endswith("running_mean"):  # averaged over two forwards here, over five there
        differences[f"statistics.{name}"] = (
          np.abs(state[name] - buffer.numpy()).max() / np.abs(buffer.numpy()).max()
        )
  for kind in ("generator", "discriminator", "statistics"):
    worst = max((v, k) for k, v in differences.items() if k.startswith(kind))
    print(f"five forwards or two, largest relative difference: {worst[1]} {worst[0]:.1e}")
    if kind != "statistics":
      assert worst[0] <= 5e-4, worst
