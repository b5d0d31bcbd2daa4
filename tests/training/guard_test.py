"""Tests of sr_jax/training/guard.py and recovery.py: faults are planted, and nothing stays."""
# ruff: noqa: F811  (fixtures of tiny_runs are imported by name)

import functools
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.data import sampling
from sr_jax.machine import sharding
from sr_jax.runs.settings import flat
from sr_jax.runs.state import WINDOW, NetState, TrainState, create_guard_state
from sr_jax.training import guard as guards
from sr_jax.training import losses
from sr_jax.training import loop
from sr_jax.training import recovery
from sr_jax.training import step as step_module
from sr_jax.training.checks import check_settings
from sr_jax.training.guard import Guard, keep_sound
from sr_jax.training.recipe import step_arguments
from sr_jax.training.overrides import parse
from sr_jax.training.recovery import DivergedError, Trouble, Watch, sound_step
from sr_jax.training.run import train_and_evaluate
from sr_jax.training.stage import find, open_stage, pack_images
from sr_jax.training.terms import Adversarial
import distributed_test as processes
import step_test as steps
from tiny_runs import assert_same_run, Killed, killed_after, leaves, lines
from tiny_runs import named_leaves
from tiny_runs import photographs, shared_programs, tiny, whole_run  # noqa: F401  (fixtures)

DEVICES = 8
SENTINEL = 0.123  # a pixel that makes the test's own losses fail


@jax.custom_vjp
def failing(x, fail):
  """x, whose gradient is NaN where `fail` is above 0."""
  return x


failing.defvjp(
  lambda x, fail: (x, fail),
  lambda fail, g: (jnp.where(fail > 0, jnp.nan, g), jnp.zeros_like(fail)),
)


def pixel_loss(sr, hr):
  """L1, whose gradient is NaN where the first pixel of the batch is the sentinel."""
  return losses.l1_loss(failing(sr, jnp.float32(hr[0, 0, 0, 0] == SENTINEL)), hr)


def discriminator_loss(real, fake):
  """RaGAN's, whose gradient is NaN where the logits are far up, which it does not see otherwise."""
  return losses.ragan_discriminator_loss(failing(real, jnp.float32(jnp.mean(real) > 500)), fake)


@functools.cache
def guarded_step():
  game = Adversarial(losses.AdversarialLoss(losses.ragan_generator_loss, discriminator_loss))
  return steps.make_step(
    weights={"pixel": 1e-2, "adversarial": 5e-3}, perceptual=None, pixel_loss=pixel_loss,
    adversarial=game, devices=DEVICES, guard=Guard(),
  )  # fmt: skip


def guarded_state():
  guard = jax.device_get(create_guard_state())
  return steps.initial_state(True).replace(guard=guard)


def run(state, batches):
  return steps.run(guarded_step(), state, batches, DEVICES, vgg_params=None)


def planted(state, leaf: str, value: float):
  """The state with a value at one place of a leaf."""
  paths, tree = jax.tree_util.tree_flatten_with_path(jax.device_get(state))
  names = list(named_leaves(state))
  assert names.count(leaf) == 1, names
  arrays = [np.array(array) for _, array in paths]
  arrays[names.index(leaf)].flat[-1] = value
  return jax.tree.unflatten(tree, arrays)


def assert_nothing_kept(before, after) -> None:
  """But that the step is counted, and skipped."""
  ours, theirs = named_leaves(after), named_leaves(before)
  for name in ours:
    expected = np.asarray(theirs[name])
    if name in ("step", "guard/skipped", "guard/in_a_row"):
      expected = expected + 1
    for shard in ours[name].addressable_shards:  # every device
      np.testing.assert_array_equal(np.asarray(shard.data), expected, err_msg=name)


BIAS = "discriminator/params/linear2/bias"
FAULTS = {
  "a pixel of one shard": ("", math.nan, "generator/params/"),
  "the generator's gradient": ("", SENTINEL, "generator/params/"),
  "the discriminator's gradient": (BIAS, 1000.0, "discriminator/params/"),
  "a statistic": ("discriminator/batch_stats/bn0_1/mean", math.nan, None),
  "a second moment": ("generator/opt_state/nu/conv_first/kernel", math.inf, None),
  "an average": ("ema_params/conv_first/kernel", math.nan, None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_of_a_step_that_is_not_sound_is_kept(fault):
  leaf, value, found = FAULTS[fault]
  first, bad, third = (steps.make_batch(seed) for seed in (8, 9, 10))
  sound, (metrics,) = run(guarded_state(), [first])
  assert metrics["guard/skipped"] == 0 and metrics["guard/leaf"] == -1
  before = jax.device_get(sound)
  if leaf:
    before = planted(before, leaf, value)
  else:
    place = (0, 0, 0, 0) if value == SENTINEL else (5, 3, 7, 1)
    bad["hr"][place] = value
  after, (metrics,) = run(before, [bad])
  assert_nothing_kept(before, after)
  assert metrics["guard/skipped"] == metrics["guard/in_a_row"] == 1
  name = guards.leaf_names(before)[int(metrics["guard/leaf"])]
  assert name.startswith(found) if found else name == leaf
  if leaf:
    return

  # The run that met it is the run that never saw its update.
  met, (metrics,) = run(jax.device_get(after), [third])
  never, _ = run(before.replace(step=before.step + 1), [third])
  assert metrics["guard/skipped"] == 1 and metrics["guard/in_a_row"] == 0
  for name, value in named_leaves(never).items():
    if name != "guard/skipped":
      np.testing.assert_array_equal(named_leaves(met)[name], value, err_msg=name)
  assert (np.asarray(met.generator.params["conv_first"]["kernel"])
          != np.asarray(before.generator.params["conv_first"]["kernel"])).any()  # fmt: skip


def test_one_damaged_copy_of_the_state_is_a_reason_for_all_devices():
  state = steps.put(guarded_state(), DEVICES)
  kernel = state.generator.opt_state.nu["conv_first"]["kernel"]
  copies = [np.array(shard.data) for shard in kernel.addressable_shards]
  copies[5].flat[0] = np.inf
  devices = [shard.device for shard in kernel.addressable_shards]
  damaged = jax.make_array_from_single_device_arrays(
    kernel.shape, kernel.sharding, list(map(jax.device_put, copies, devices))
  )
  moments = state.generator.opt_state.nu
  moments = {**moments, "conv_first": {**moments["conv_first"], "kernel": damaged}}
  net = state.generator.replace(opt_state=state.generator.opt_state._replace(nu=moments))
  before = jax.device_get(state.ema_params)
  batch = jax.device_put(steps.make_batch(), sharding.batch_sharded(steps.make_mesh(DEVICES)))
  after, _ = guarded_step()(state.replace(generator=net), batch, None)
  for name, leaf in named_leaves(after.ema_params).items():
    for shard in leaf.addressable_shards:
      np.testing.assert_array_equal(shard.data, named_leaves(before)[name], err_msg=name)
  counts = [int(shard.data) for shard in after.guard.skipped.addressable_shards]
  assert counts == [1] * DEVICES


def tiny_state(value: float = 0.0) -> TrainState:
  net = NetState(params={"w": jnp.full(3, value)}, opt_state=(), batch_stats={})
  return TrainState(jnp.int32(0), net, net, net.params, create_guard_state())


@functools.partial(jax.jit, static_argnums=0)
def keep(guard, old, metrics):
  new = old.replace(step=old.step + 1, ema_params=jax.tree.map(lambda x: x + 1, old.ema_params))
  return keep_sound(guard, old, new.replace(guard=None), metrics, steps.make_mesh(1))


def follow(guard, rows):
  """The counters after each of some steps, with norms and losses as given."""
  state, history = tiny_state(), []
  for norm_g, norm_d, loss_g, loss_d in rows:
    metrics = {"grad_norm_g": norm_g, "grad_norm_d": norm_d, "loss_g": loss_g, "loss_d": loss_d}
    state, metrics = keep(guard, state, jax.tree.map(jnp.float32, metrics))
    history.append({name: int(x) for name, x in metrics.items() if name.startswith("guard/")})
  return state, history


def test_an_outlier_is_what_is_far_above_the_median_of_the_steps_kept():
  rng = np.random.default_rng(0)
  rows = np.exp(rng.normal(size=(300, 4)) * 0.7)
  rows[rng.random(300) < 0.05, 0] *= 1e6
  rows[rng.random(300) < 0.05, 1] *= 10
  state, history = follow(Guard(outlier=8.0), rows)
  window, skipped = np.zeros((WINDOW, 4)), 0
  for step, (row, seen) in enumerate(zip(rows, history, strict=True)):
    medians = [sorted(column)[WINDOW // 2 - 1] + sorted(column)[WINDOW // 2] for column in window.T]
    if any(2 * row[i] > 8 * medians[i] > 0 for i in (0, 1)):
      skipped += 1
    else:
      window[step % WINDOW] = row
    assert seen["guard/skipped"] == skipped, step
  assert 15 < skipped < 60
  assert state.ema_params["w"][0] == 300 - skipped


def test_a_loss_outside_of_its_band_is_kept_and_counted_and_moves_no_band():
  rows = np.tile([1.0, 1.0, 2.0, 0.01], (200, 1))
  rows[60:70, 2] = 1e6  # a spike, and back
  rows[80:, 2] = -30.0  # for good
  rows[75, 3] = 4.9  # within the band of a discriminator's loss, which is not narrower than 1
  rows[77, 3] = 5.1
  _, history = follow(Guard(divergence=5.0), rows)
  outside = [seen["guard/outside"] for seen in history]
  assert outside[60:72] == [*range(1, 11), 0, 0]
  assert outside[72:80] == [0, 0, 0, 0, 0, 1, 0, 0]
  assert outside[80:] == list(range(1, 121))
  assert history[-1]["guard/skipped"] == 0


def test_without_factors_a_finite_number_is_never_skipped():
  rows = np.ones((100, 4))
  rows[70:] *= 1e30
  _, history = follow(Guard(), rows)
  for name, count in {"skipped": 0, "in_a_row": 0, "outside": 0, "won": 0, "leaf": -1}.items():
    assert {seen[f"guard/{name}"] for seen in history} == {count}


def test_a_discriminator_that_has_won_is_counted_by_its_own_game():
  def won(relativistic, real, fake):
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    metrics = {"d_real": sigmoid(real), "d_fake": sigmoid(fake), "loss_g": 1.0, "loss_d": 1.0,
               "logit_real": real, "logit_fake": fake}  # fmt: skip
    guard = Guard(relativistic=relativistic)
    _, metrics = keep(guard, tiny_state(), jax.tree.map(jnp.float32, metrics))
    return int(metrics["guard/won"])

  assert won(False, 6.0, -6.0) == 1 and won(True, 6.0, -6.0) == 1
  assert won(False, 20.0, 10.0) == 0 and won(True, 20.0, 10.0) == 1  # both are taken for real
  assert won(False, 3.0, -3.0) == 0 and won(True, 1.0, -3.0) == 0
  assert won(False, -6.0, 6.0) == 0 and won(True, -6.0, 6.0) == 0


def test_a_discriminator_that_has_won_is_warned_of_once(photographs, tmp_path, caplog):
  for loss, others in (("ragan", 2), ("vanilla", 3)):
    config = tiny(photographs, **{"adversarial.loss": loss}).copy_and_resolve_references().unlock()
    config.discriminator.steps_per_generator_step = 2
    stage = open_stage(config, tmp_path)
    watch = Watch(stage, tiny_state(), {})
    for step in range(1, 1200):
      counts = {"skipped": 0, "in_a_row": 0, "outside": 0, "won": step % 1100, "leaf": -1}
      watch.keep(step, {f"guard/{name}": np.float32(x) for name, x in counts.items()})
      watch.look()
    (message,) = (record.getMessage() for record in caplog.records if "has won" in record.message)
    caplog.clear()
    told = re.findall(r"--config\.\S+=[^\s,]+", message)
    assert len(told) == 1 + others
    changes, problems = parse(told, flat(config.to_dict()))
    assert not problems
    config.update_from_flattened_dict(changes)
    check_settings(config)


def test_a_checkpoint_is_trusted_that_was_followed_by_sound_steps():
  assert sound_step([2, 4, 6, 8], since=9, patience=3) == 4
  assert sound_step([2, 4, 5, 8], since=9, patience=3) == 5
  assert sound_step([2, 4, 6], since=6, patience=10) == 4
  assert sound_step([4, 6], since=5, patience=3) == 4  # the oldest
  assert sound_step([], since=5, patience=3) is None


def test_without_a_guard_the_program_is_that_of_a_step_that_knows_none(photographs, tmp_path):
  config = tiny(photographs).psnr
  programs = {}
  for enabled in (True, False):
    with config.unlocked():
      config.guard.enabled = enabled
    stage = open_stage(config, tmp_path)
    arguments = dict(step_arguments(config, stage.networks, stage.mesh, None))
    assert (stage.abstract.guard is not None) == (arguments["guard"] is not None) == enabled
    batch = {"lr": np.zeros((8, 8, 8, 3), np.uint8), "hr": np.zeros((8, 32, 32, 3), np.uint8)}
    step = step_module.make_train_step(**arguments)
    programs[enabled] = step.lower(stage.abstract, batch, None).as_text()
    if not enabled:
      del arguments["guard"]
      step = step_module.make_train_step(**arguments)
      assert step.lower(stage.abstract, batch, None).as_text() == programs[False]
  assert "is_finite" in programs[True] and "is_finite" not in programs[False]


# Runs. What they meet depends on where in the data they are, as it does with a damaged image.


@pytest.fixture
def poison(monkeypatch):
  """poison(start, stop): steps of runs fail where their examples are those of these positions.

  The runs are on one device, for which programs are compiled sooner.
  """
  create_mesh = sharding.create_mesh
  monkeypatch.setattr(sharding, "create_mesh", lambda: create_mesh(jax.devices()[:1]))
  programs, planted = {}, {"unless": None, "starts": []}
  open_batches = loop.open_batches

  def opened(config, pack, start, mesh):
    planted["starts"].append(start)
    batches, cut = open_batches(config, pack, start, mesh)
    unless = planted["unless"]
    bad = [0, 0] if unless and unless(config) else planted["positions"]
    bad = np.array(bad, np.int32)  # an argument of the program, which all the tests here share

    def cut_and_poison(arrays, position):
      start, stop = arrays.pop("bad")
      batch = {name: x.astype(jnp.float32) / 255 for name, x in cut(arrays, position).items()}
      value = jnp.where((position >= start) & (position < stop), jnp.nan, 0.5)
      return {**batch, "hr": batch["hr"].at[0, 0, 0, 0].set(value)}

    return ({**arrays, "bad": bad} for arrays in batches), cut_and_poison

  def make_step(*, prepare, **given):
    key = id(given["optimizer_g"]), given["mesh"]
    if key not in programs:
      programs[key] = step_module.make_train_step(prepare=prepare, **given), given
    return programs[key][0]

  monkeypatch.setattr(loop, "open_batches", opened)
  monkeypatch.setattr(loop, "make_train_step", make_step)

  def plant(start, stop, unless=None):
    planted.update(positions=[start, stop], unless=unless)
    return planted

  return plant


def psnr_run(photographs, total: int, **fields):
  config = tiny(photographs).psnr.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(
    {"total_steps": total, "eval.source": "", "checkpoint.keep": 20, "guard.patience": 3,
     "learning_rate.schedule": "constant", "learning_rate.base": 1e-3,
     "pixel.loss": "mse",  # whose gradient is NaN where the loss is; that of L1 is a sign
     **fields}
  )  # fmt: skip
  return config.lock()


def test_a_run_that_met_one_bad_step_ends_well(photographs, tmp_path, poison, capsys):
  poison(4, 5)
  config = psnr_run(photographs, 8)
  assert train_and_evaluate(config, tmp_path / "run") == ""
  written = lines(tmp_path / "run")
  assert [line["guard/skipped"] for line in written] == [0, 0, 0, 0, 1, 1, 1, 1]
  assert [line["guard/in_a_row"] for line in written] == [0, 0, 0, 0, 1, 0, 0, 0]
  assert written[-1]["guard/skipped_share"] == 1 / 8
  assert not math.isfinite(written[4]["loss_g"]) and math.isfinite(written[5]["loss_g"])
  assert "skipped 12.50%" in capsys.readouterr().out
  _, record = open_stage(config, tmp_path / "run").restored
  assert record["guard"] == {"skipped": 1, "in_a_row": 0, "data_offset": 0, "rate_factor": 1.0}
  assert all(np.isfinite(leaf).all() for leaf in leaves(tmp_path / "run", config).values())


# After how many updates the run is killed: before, during and after the bad ones, and after its
# return, before and after the next checkpoint.
@pytest.mark.parametrize(
  "kills", [(10, 15), pytest.param((3, 7, 9, 11, 12, 13, 14, 16, 19), marks=pytest.mark.slow)]
)
def test_a_run_goes_back_takes_other_examples_and_resumes_to_the_bit(
  photographs, tmp_path, poison, monkeypatch, caplog, kills
):
  state = poison(8, 11)
  config, whole = psnr_run(photographs, 14), tmp_path / "whole"
  assert train_and_evaluate(config, whole) == ""
  # Steps 9 to 11 are not sound. Of the checkpoints 4 and before it is known that they lead to more.
  assert "skipped" in caplog.text and "going back to step 4" in caplog.text
  assert sorted(path.name for path in (whole / "withdrawn").iterdir()) == ["6_0", "8_1"]
  assert state["starts"] == [0, 4 + 7]
  restored, record = open_stage(config, whole).restored
  assert int(restored.step) == 14
  assert record["guard"] == {"skipped": 0, "in_a_row": 0, "data_offset": 7, "rate_factor": 0.5}
  (rollback,) = record["rollbacks"]
  assert (rollback["from"], rollback["to"], rollback["since"]) == (11, 4, 9)
  written = lines(whole)
  assert [line["step"] for line in written] == list(range(1, 15))
  rates = [line["learning_rate"] for line in written]
  np.testing.assert_allclose(rates, [1e-3] * 4 + [5e-4] * 10, rtol=1e-6)
  again = psnr_run(photographs, 14, **{"guard.enabled": False})
  _, kept = recovery.follow(None, open_stage(again, whole).restored[0], record)
  assert "no longer takes its examples from 7 steps ahead" in caplog.text
  assert kept == {name: value for name, value in record.items() if name != "guard"}
  for updates in kills:
    again = tmp_path / str(updates)
    with monkeypatch.context() as patched:
      killed_after(patched, updates)
      with pytest.raises(Killed):
        train_and_evaluate(config, again)
    assert train_and_evaluate(config, again) == ""
    assert_same_run(whole, again, config)


def test_a_run_that_cannot_go_on_reports_what_it_met(photographs, tmp_path, poison):
  def helped(config):
    return config.learning_rate.base < 5e-4 or config.optimizer.clip_norm

  poison(5, 1000, unless=helped)
  config, folder = psnr_run(photographs, 12), tmp_path / "run"
  with pytest.raises(FloatingPointError) as error:
    train_and_evaluate(config, folder)
  screen = str(error.value)
  assert isinstance(error.value, DivergedError) and len(screen.splitlines()) <= 35
  report = json.loads((folder / "failure.json").read_text())
  assert report["since"] == 3 and report["step"] == 5  # of the second attempt, from step 2 on
  assert {"loss_g", "loss/pixel"} <= set(report["losses"])
  assert report["leaf"].startswith("generator/params/")
  (rollback,) = report["rollbacks"]
  assert (rollback["from"], rollback["to"]) == (8, 2)
  assert [line["step"] for line in report["metrics"]] == [3, 4, 5]
  assert report["metrics"][0]["loss_g"] == "nan"

  # The examples are those that the step had.
  stage = open_stage(config, folder)
  assert stage.step == 2 and "goes on from step 2" in screen
  images = pack_images(stage, find(stage)[0])
  lr, _ = sampling.cut_batch(images.train, 2 + 6, batch_size=8, lr_patch=8, seed=config.seed)
  for row, example in enumerate(report["examples"]):
    number = images.train.names.index(example["image"])
    plan = sampling.Plan(number, example["y"], example["x"], example["dihedral"])
    np.testing.assert_array_equal(sampling.take_example(images.train, plan, 8)[0], lr[row])
    assert example["id"] == 8 * 8 + row
  for text in (report["examples"][0]["image"], report["leaf"], "loss_g", "failure.json"):
    assert text in screen

  # What it says to try is taken, and helps where the rate or clipping does.
  tried = re.findall(r"--config\.([\w.]+)=(\S+)", screen)
  assert [field for field, _ in tried] == [
    "learning_rate.base", "optimizer.clip_norm", "guard.rollbacks",
  ]  # fmt: skip
  assert report["try"] == [f"--config.{field}={value}" for field, value in tried]
  for number, (settings, stops) in enumerate(((tried[:2], False), (tried[2:], True))):
    again = tmp_path / str(number)
    shutil.copytree(folder, again)
    settings = [f"--config.{field}={value}" for field, value in settings]
    changes, problems = parse(settings, flat(config.to_dict()))
    assert not problems
    mended = psnr_run(photographs, 12, **changes)
    check_settings(mended)
    if stops:
      with pytest.raises(DivergedError, match="went back: from step 8 to 2; from step 5 to 2"):
        train_and_evaluate(mended, again)
    else:
      assert train_and_evaluate(mended, again) == ""
      assert leaves(again, mended)["step"] == 12 and not (again / "failure.json").exists()


def test_a_loss_that_stays_outside_of_its_band_is_a_reason(photographs, tmp_path):
  config = psnr_run(photographs, 60, **{"guard.divergence": 3.0, "guard.divergence_steps": 5})
  watch = Watch(open_stage(config, tmp_path), tiny_state(), {})
  outside = [0, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5]  # the last two steps were skipped, too
  with pytest.raises(Trouble) as error:
    for step, count in enumerate(outside, 1):
      counts = {"in_a_row": max(0, step - 9), "outside": count, "won": 0, "leaf": -1, "skipped": 0}
      metrics = {f"guard/{name}": np.float32(x) for name, x in counts.items()}
      watch.keep(step, {**metrics, "loss_g": np.float32(step)})
      watch.look()
      assert watch.brewing == bool(count)
  assert (error.value.step, error.value.since, step) == (11, 7, 11)
  assert str(error.value) == "loss_g was above 3 times its running median for 5 steps in a row"
  assert [line["loss_g"] for line in error.value.metrics] == list(range(1, 12))


@pytest.mark.parametrize(
  "outlier, leaf, loss, reason",
  [
    (0.0, 0, math.nan, "loss_g not finite at step 1, and 3 steps in a row skipped"),
    (0.0, 0, 1.0, "generator/params/.* not finite at step 1, and 3 steps in a row skipped"),
    (9.0, -1, 1.0, "grad_norm_g was far above its running median for 3 steps in a row"),
    (0.0, -1, 1.0, "another device's copy of the state was damaged, and 3 steps in a row skipped"),
  ],
)
def test_what_was_seen_first_is_the_reason(photographs, tmp_path, outlier, leaf, loss, reason):
  stage = open_stage(psnr_run(photographs, 60, **{"guard.outlier": outlier}), tmp_path)
  watch = Watch(stage, tiny_state(), {})
  with pytest.raises(Trouble, match=f"^{reason}$") as error:
    for step in range(1, 10):
      counts = {"in_a_row": step, "outside": 0, "won": 0, "leaf": leaf, "skipped": step}
      metrics = {f"guard/{name}": np.float32(x) for name, x in counts.items()}
      watch.keep(step, {**metrics, "loss_g": np.float32(loss), "grad_norm_g": np.float32(1)})
      watch.look(state=tiny_state())
  assert (error.value.step, error.value.since) == (3, 1)


WATCHED = {"guard.divergence": 3.0, "guard.divergence_steps": 5, "checkpoint.every_steps": 10}


@pytest.fixture
def sound_run(photographs, tmp_path):
  """A run of 40 sound steps."""
  config = psnr_run(photographs, 40, **WATCHED)
  assert train_and_evaluate(config, tmp_path / "run") == ""
  return tmp_path / "run", config


@pytest.mark.slow
def test_a_rate_a_thousand_times_too_high_stops_the_run(photographs, sound_run):
  folder, sound = sound_run
  config = psnr_run(photographs, 60, **WATCHED, **{"learning_rate.base": 1.0})
  with pytest.raises(DivergedError, match="loss_g.* above 3 times its running median") as error:
    train_and_evaluate(config, folder)
  stage = open_stage(sound, folder)
  assert f"goes on from step {stage.step};" in str(error.value) and stage.step in (20, 30)
  report = json.loads((folder / "failure.json").read_text())
  assert report["step"] - report["since"] == 4 and report["losses"] == ["loss_g"]
  (rollback,) = report["rollbacks"]
  # The rate is too high from step 41 on, so that checkpoint 40 was not followed by sound steps.
  assert rollback["to"] == 30 and rollback["since"] in (41, 42)
  after = leaves(folder, sound)
  assert all(np.isfinite(leaf).all() for leaf in after.values())
  assert (
    sorted(path.name for path in (folder / "checkpoints").iterdir())
    == ["10", "20", "30"][: stage.step // 10]
  )


@pytest.mark.slow
def test_a_rate_a_thousand_times_too_high_is_survived_with_a_lower_one(photographs, sound_run):
  lower = {"learning_rate.base": 1.0, "guard.rate_factor": 1e-3}
  config = psnr_run(photographs, 60, **WATCHED, **lower)
  assert train_and_evaluate(config, sound_run[0]) == ""
  seen = [line["loss_g"] for line in lines(sound_run[0])]
  assert len(seen) == 60 and max(seen[-10:]) < 2 * max(seen[20:40])


def test_a_run_goes_back_to_its_start_where_it_has_no_checkpoint(photographs, tmp_path, poison):
  poison(0, 3)
  config = psnr_run(photographs, 6, **{"checkpoint.every_steps": 100})
  assert train_and_evaluate(config, tmp_path / "run") == ""
  _, record = open_stage(config, tmp_path / "run").restored
  assert record["rollbacks"][0]["to"] == 0 and record["guard"]["data_offset"] == 3


# Makes steps 9 to 11 of a run fail, by their examples.
POISON = """
import jax.numpy as jnp
from sr_jax.training import loop
make_train_step = loop.make_train_step

def make_failing(*, prepare, **given):
  def poisoned(arrays, position):
    batch = {{name: x.astype(jnp.float32) / 255 for name, x in prepare(arrays, position).items()}}
    bad = (position >= 8) & (position < 11)
    return {{**batch, "hr": batch["hr"].at[0, 0, 0, 0].set(jnp.where(bad, jnp.nan, 0.5))}}
  return make_train_step(prepare=poisoned, **given)

loop.make_train_step = make_failing
create_mesh = sharding.create_mesh
"""


@pytest.mark.slow
def test_several_processes_go_back_together(photographs, whole_run, tmp_path):
  program = processes.PROCESS.replace("create_mesh = sharding.create_mesh\n", POISON, 1)
  fields = {"eval.source": "", "total_steps": 14, "guard.patience": 3, "checkpoint.keep": 20,
            "checkpoint.every_steps": 2}  # fmt: skip
  overrides = {**processes.psnr_overrides(whole_run[0]), **fields}
  run = tmp_path / "run"
  started = processes.start(photographs, run, program=program, **overrides)
  processes.assert_ended(started, run)
  assert [line["step"] for line in lines(run)] == list(range(1, 15))
  assert sorted(path.name for path in (run / "withdrawn").iterdir()) == ["6_0", "8_1"]
  for index in range(2):
    assert "going back to step 4" in processes.output(run, index).read_text()
