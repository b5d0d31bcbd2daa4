"""Checkpoints: what is saved comes back bit for bit, and damage never comes back in silence."""

import pathlib

import jax
import pytest

from sr_jax.runs import checkpoint
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


def spoil_all(step: pathlib.Path) -> None:
  step.rename(step.parent.parent / "gone")
  step.mkdir()


@pytest.mark.parametrize(
  "spoil",
  [spoil_bit, spoil_state_bit, spoil_truncate, spoil_item, spoil_manifest, spoil_all],
)
def test_damage_is_seen_and_the_older_one_is_taken(tmp_path, spoil):
  write(tmp_path, (1, 2))
  spoil(tmp_path / "checkpoints" / "2")
  restored, _ = checkpoint.restore(tmp_path, abstract(make_state(0)))
  assert_equal(restored, make_state(1))
  assert [p.name for p in (tmp_path / "damaged").iterdir()] == ["2_0"]
  with checkpoint.open_manager(tmp_path) as manager:
    checkpoint.save(manager, make_state(2), extra={})  # its place is free again
  restored, _ = checkpoint.restore(tmp_path, abstract(make_state(0)))
  assert_equal(restored, make_state(2))


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


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "FORMAT", 99)
    write(tmp_path, (1,))
  with pytest.raises(ValueError, match="format 99"):
    checkpoint.restore(tmp_path, abstract(make_state(0)))
