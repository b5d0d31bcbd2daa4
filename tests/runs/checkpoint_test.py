"""Checkpoints: what is saved comes back bit for bit, and damage never comes back in silence."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sr_jax import UserError
from sr_jax.runs import checkpoint
from sr_jax.runs.state import create_guard_state
from tiny_states import abstract, assert_equal, make_state, write


@pytest.mark.parametrize("discriminator", [True, False])
@pytest.mark.parametrize("devices", [8, 1])
def test_comes_back_bit_for_bit(tmp_path, discriminator, devices):
  state = make_state(7, discriminator)
  with checkpoint.open_manager(tmp_path) as manager:
    checkpoint.save(manager, state, extra={"data": "abc", "info": {"ancestry": ["x"]}})
  restored, extra = checkpoint.restore(tmp_path, abstract(state, devices))
  assert_equal(restored, state)
  assert extra == {"data": "abc", "info": {"ancestry": ["x"]}}
  assert len(restored.step.sharding.device_set) == devices


def test_saving_from_many_devices_compiles_nothing(tmp_path):
  compiled = []

  def listen(event: str, duration: float, **_) -> None:
    if event.endswith("backend_compile_duration"):
      compiled.append(duration)

  state = make_state(1, width=136)  # a size that nothing else here has compiled slices of
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x + 136)(1.0)
    assert len(compiled) == 1
    with checkpoint.open_manager(tmp_path) as manager:
      checkpoint.save(manager, state, extra={})
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert len(compiled) == 1


def test_no_checkpoint_is_none(tmp_path):
  assert checkpoint.restore(tmp_path, abstract(make_state(0))) is None


def flip_a_bit(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def largest_file(folder: pathlib.Path) -> pathlib.Path:
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def spoil_bit(step: pathlib.Path) -> None:
  flip_a_bit(largest_file(step / "model"))


def spoil_state_bit(step: pathlib.Path) -> None:
  flip_a_bit(largest_file(step / "state"))


def spoil_truncate(step: pathlib.Path) -> None:
  path = largest_file(step / "state")
  path.write_bytes(path.read_bytes()[:100])


def spoil_item(step: pathlib.Path) -> None:
  (step / "model").rename(step.parent.parent / "elsewhere")


def spoil_manifest(step: pathlib.Path) -> None:
  path = largest_file(step / "manifest")
  path.write_text(path.read_text()[:-20])


def spoil_scores(contents: bytes):
  def spoil(step: pathlib.Path) -> None:
    (step / "metrics" / "metrics").write_bytes(contents)

  return spoil


def spoil_all(step: pathlib.Path) -> None:
  step.rename(step.parent.parent / "gone")
  step.mkdir()


def write_scored(run: pathlib.Path, steps: tuple[int, ...]) -> None:
  with checkpoint.open_manager(run, keep=5, best_metric="psnr_y") as manager:
    for step in steps:
      checkpoint.save(manager, make_state(step), extra={}, metrics={"psnr_y": 20.0 + step})


@pytest.mark.parametrize(
  "spoil",
  [
    spoil_bit, spoil_state_bit, spoil_truncate, spoil_item, spoil_manifest, spoil_all,
    *map(spoil_scores, (b"", b'{"psnr": 2', b"\xff\xfe{}", b"[]", b'{"a": "x"}', b"[" * 9999)),
  ],
)  # fmt: skip
def test_damage_is_seen_and_the_older_one_is_taken(tmp_path, spoil, caplog):
  write_scored(tmp_path, (1, 2))
  spoil(tmp_path / "checkpoints" / "2")
  restored, _ = checkpoint.restore(tmp_path, abstract(make_state(0)))
  assert f"{tmp_path}/checkpoints/2" in caplog.text, "the error names what is damaged"
  assert_equal(restored, make_state(1))
  assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["2_0"]
  with checkpoint.open_manager(tmp_path) as manager:
    checkpoint.save(manager, make_state(2), extra={})  # its place is free again
  restored, _ = checkpoint.restore(tmp_path, abstract(make_state(0)))
  assert_equal(restored, make_state(2))


def test_damage_to_one_step_is_no_business_of_another(tmp_path, caplog):
  write_scored(tmp_path, (1, 2, 3))
  spoil_scores(b"")(tmp_path / "checkpoints" / "1")
  target = jax.eval_shape(lambda: make_state(0).ema_variables)
  assert checkpoint.restore_model(tmp_path, target)[1] == 3
  assert checkpoint.restore_model(tmp_path, target, step=2)[1] == 2
  assert not caplog.records
  with pytest.raises(FileNotFoundError, match="no sound checkpoint in step 1 of"):
    checkpoint.restore_model(tmp_path, target, step=1)
  # An older one than the newest too, or the run could not be opened to save.
  assert int(checkpoint.restore(tmp_path, abstract(make_state(0)))[0].step) == 3
  assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["1_0"]
  assert f"{tmp_path}/checkpoints/1/metrics/metrics cannot be read" in caplog.text
  with checkpoint.open_manager(tmp_path, best_metric="psnr_y") as manager:
    assert manager.best_step() == 3


@pytest.mark.parametrize("bit", range(3))
def test_a_flipped_bit_in_a_manifest_is_damage_and_nothing_else(tmp_path, bit):
  """Wherever it is: in a shape, a name, the format, what the caller added, or the digest."""
  write(tmp_path, (1, 2))
  manifest = tmp_path / "checkpoints" / "2" / "manifest" / "metadata"
  target, contents = jax.eval_shape(lambda: make_state(0).ema_variables), manifest.read_bytes()
  places = {contents.index(key) + 1 for key in (b'"format"', b'"digest"', b'"extra"', b'"leaves"')}
  places |= {contents.index(b'"format": 2') + 10, *range(bit, len(contents), len(contents) // 16)}
  for place in sorted(places):
    damaged = bytearray(contents)
    damaged[place] ^= 1 << (bit * 2 + place) % 8
    manifest.write_bytes(damaged)
    assert checkpoint.restore_model(tmp_path, target)[1] == 1, (place, bytes(damaged))


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_what_is_no_folder_in_the_place_of_a_step_is_said_and_set_aside(tmp_path, kind, caplog):
  write(tmp_path / "other", (9,))
  write(tmp_path / "run", (1,))
  place = tmp_path / "run" / "checkpoints" / "3"
  if kind == "file":
    place.write_text("")
  else:
    place.symlink_to(tmp_path / ("other/checkpoints/9" if kind == "link" else "nowhere"))
  restored, _ = checkpoint.restore(tmp_path / "run", abstract(make_state(0)))
  assert int(restored.step) == 1
  what = "a file" if kind == "file" else "a symbolic link"
  assert f"{place} is {what}, where a step has a folder" in caplog.text
  write(tmp_path / "run", (3,))  # its place is free
  assert (tmp_path / "other" / "checkpoints" / "9").is_dir()


def test_a_file_in_the_place_of_all_checkpoints_is_said(tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(ValueError, match="checkpoints is a file, where a run has a folder; move it"):
    checkpoint.restore(tmp_path, abstract(make_state(0)))


@pytest.mark.parametrize(
  "change",
  [
    lambda m: m.update(leaves=[]),
    lambda m: m.update(leaves={"a": 1}),
    lambda m: m.update(extra=[]),
    lambda m: m.update(extra={"info": {"ancestry": "x"}}),
    lambda m: m.update(extra={"info": 3}),
    lambda m: m.update(extra={"scores": {"psnr_y": []}}),
    lambda m: m.update(extra={"data": {}}),
    lambda m: m.update(format="2"),
  ],
)
def test_a_strangers_manifest_of_other_types_is_damage(tmp_path, change):
  write(tmp_path, (1, 2))
  path = tmp_path / "checkpoints" / "2" / "manifest" / "metadata"
  manifest = json.loads(path.read_text())
  del manifest["digest"]
  change(manifest)
  digest = checkpoint.manifest_digest(manifest)  # whoever makes a file can make its digest too
  path.write_text(json.dumps({**manifest, "digest": digest}))
  assert int(checkpoint.restore(tmp_path, abstract(make_state(0)))[0].step) == 1


def test_saving_says_nothing_on_a_good_day(tmp_path, caplog):
  """Not even of a step without scores, where the best by a score is kept."""
  with checkpoint.open_manager(tmp_path, best_metric="psnr_y") as manager:
    checkpoint.save(manager, make_state(1), extra={}, metrics={"psnr_y": 20.0})
    checkpoint.save(manager, make_state(2), extra={})
  assert not caplog.records


def test_where_no_checkpoint_verifies_nothing_is_moved_or_begun_anew(tmp_path):
  write(tmp_path, (1, 2))
  for step in ("1", "2"):
    spoil_state_bit(tmp_path / "checkpoints" / step)
  with pytest.raises(ValueError, match="step 2: .*sha256(?s:.*)step 1: (?s:.*)nothing was changed"):
    checkpoint.restore(tmp_path, abstract(make_state(0)))
  assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints"]


def test_a_model_is_read_without_its_training_state(tmp_path):
  write(tmp_path, (1, 2))
  target = jax.eval_shape(lambda: make_state(0).ema_variables)
  variables, step, extra = checkpoint.restore_model(tmp_path, target)
  assert step == 2 and extra == {"data": "abc"}
  assert_equal(variables, make_state(2).ema_variables)
  spoil_bit(tmp_path / "checkpoints" / "2")
  variables, step, _ = checkpoint.restore_model(tmp_path, target)
  assert step == 1
  assert_equal(variables, make_state(1).ema_variables)
  assert (tmp_path / "checkpoints" / "2").exists(), "reading must not move anything"


def test_another_network_is_refused_by_name(tmp_path):
  write(tmp_path, (1,))
  with pytest.raises(ValueError, match=r"bn/mean is \[\[400\].*\[\[401\]"):
    checkpoint.restore(tmp_path, abstract(make_state(0, width=401)))
  with pytest.raises(ValueError, match="discriminator.* absent here"):
    checkpoint.restore(tmp_path, abstract(make_state(0, discriminator=False)))
  assert (tmp_path / "checkpoints" / "1").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
  with checkpoint.open_manager(tmp_path, keep=2, best_metric="psnr_y") as manager:
    for step, psnr in ((1, 20.0), (2, 30.0), (3, 25.0), (4, None), (5, 26.0), (6, None)):
      metrics = {"psnr_y": psnr} if psnr else None
      checkpoint.save(manager, make_state(step), extra={}, metrics=metrics)
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 5, 6]
  with checkpoint.open_manager(tmp_path, keep=2, best_metric="psnr_y") as manager:  # a resumed run
    for step, psnr in ((7, 21.0), (8, None), (9, 22.0)):
      metrics = {"psnr_y": psnr} if psnr else None
      checkpoint.save(manager, make_state(step), extra={}, metrics=metrics)
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 8, 9]


def test_the_best_may_be_the_smallest_and_a_step_without_the_score_is_not_it(tmp_path):
  arguments = dict(keep=1, best_metric="lpips_alex", largest=False)
  with checkpoint.open_manager(tmp_path, **arguments) as manager:
    for step, scores in ((1, {"lpips_alex": 0.3}), (2, {"lpips_alex": 0.1}), (3, {"psnr_y": 20.0}),
                         (4, {"lpips_alex": 0.2})):  # fmt: skip
      checkpoint.save(manager, make_state(step), extra={}, metrics=scores)
    manager.wait_until_finished()
    assert sorted(manager.all_steps()) == [2, 4] and manager.best_step() == 2


def test_a_checkpoint_with_clippings_state_is_read(tmp_path):
  """Version 0 had a pair as the optimizer's state where gradients were clipped."""
  state = make_state(3)

  def paired(net):
    return net and net.replace(opt_state=(optax.EmptyState(), net.opt_state))

  old = state.replace(generator=paired(state.generator), discriminator=paired(state.discriminator))
  with checkpoint.open_manager(tmp_path) as manager:
    checkpoint.save(manager, old, extra={})
  restored, _ = checkpoint.restore(tmp_path, abstract(state))
  assert_equal(restored, state)


@pytest.mark.parametrize("part", ["ema_params", "generator", "guard"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_never_saved(tmp_path, part, value):
  write(tmp_path, (1,))
  state = make_state(2).replace(guard=create_guard_state())
  leaf = jax.tree.leaves(getattr(state, part))[-1]
  state = jax.tree.map(lambda x: jnp.full_like(x, value) if x is leaf else x, state)
  with checkpoint.open_manager(tmp_path) as manager:
    with pytest.raises(UserError, match="step 2 is not saved: .* must be finite, and") as error:
      checkpoint.save(manager, state, extra={})
    with pytest.raises(UserError, match="step 1 is not saved"):
      checkpoint.save(manager, state.replace(step=jnp.int32(1)), extra={}, anew=True)
  path = {"ema_params": "model/params", "generator": "model/batch_stats"}.get(part)
  assert (path or "state/guard/history") in str(error.value) and "\n" not in str(error.value)
  restored, _ = checkpoint.restore(tmp_path, abstract(make_state(0)))
  assert_equal(restored, make_state(1))


def test_a_run_may_begin_to_be_guarded_and_cease_to_be(tmp_path):
  plain = make_state(3)
  fresh = jax.device_put(create_guard_state(), plain.step.sharding)
  guarded = plain.replace(guard=fresh.replace(skipped=fresh.skipped + 5))
  for name, written in (("plain", plain), ("guarded", guarded)):
    with checkpoint.open_manager(tmp_path / name) as manager:
      checkpoint.save(manager, written, extra={})
    for wanted in (plain, guarded):
      restored, _ = checkpoint.restore(tmp_path / name, abstract(wanted))
      kept = written.guard or fresh
      assert_equal(restored, plain.replace(guard=wanted.guard and kept))
      assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(restored)} == {8}


def test_steps_are_withdrawn_and_never_read_again(tmp_path):
  assert checkpoint.steps(tmp_path) == []
  write(tmp_path, (1, 2, 3))
  assert checkpoint.steps(tmp_path) == [1, 2, 3]
  for step in (2, 3):
    checkpoint.withdraw(tmp_path, step)
  assert checkpoint.steps(tmp_path) == [1]
  write(tmp_path, (2,))
  checkpoint.withdraw(tmp_path, 2)
  assert sorted(path.name for path in (tmp_path / "withdrawn").iterdir()) == ["2_0", "2_2", "3_1"]
  restored, _ = checkpoint.restore(tmp_path, abstract(make_state(0)))
  assert_equal(restored, make_state(1))


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "FORMAT", 99)
    write(tmp_path, (1,))
  with pytest.raises(ValueError, match="format 99"):
    checkpoint.restore(tmp_path, abstract(make_state(0)))
