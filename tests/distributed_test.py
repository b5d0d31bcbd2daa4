"""Several real processes as one run: the same numbers, one end, and what goes wrong by name."""
# ruff: noqa: F811  (fixtures of e2e_test are imported by name)

import hashlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from e2e_test import leaves, lines, photographs, tiny, whole_run  # noqa: F401  (fixtures)
from sr_jax import distributed
from sr_jax import sharding
from sr_jax import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
HEARTBEAT = 10

# One process of a run: the tiny recipe, as main.py runs it.
PROCESS = """
import json, pathlib, sys
sys.path.insert(0, "tests")
from sr_jax import distributed
distributed.start("auto", start_seconds=60, heartbeat_seconds={heartbeat})
import e2e_test
from sr_jax import cli, train
photographs, run, overrides = json.loads(sys.argv[1])
config = e2e_test.tiny(pathlib.Path(photographs), **overrides)
stop = distributed.Stop().install()

def main(argv):
  with distributed.naming_the_lost({heartbeat}):
    train.train_and_evaluate(config, run, stop)
  distributed.finish()

cli.guarded(main)(sys.argv)
"""


def free_port() -> int:
  """The first of two free ports: the roll call is one above the coordinator."""
  while True:
    with socket.socket() as one, socket.socket() as two:
      one.bind(("", 0))
      port = one.getsockname()[1]
      try:
        two.bind(("", distributed._roll_call_port(port)))
      except OSError:
        continue
      return port


def start(photographs, run, *, processes=2, devices=2, differing=None, **overrides):
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
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or "",
    }
    log = open(output(run, index), "w")
    started.append(
      subprocess.Popen(
        [sys.executable, "-c", PROCESS.format(heartbeat=HEARTBEAT),
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
  """The GAN stage alone, slow enough for rounding to stay rounding (docs/faithfulness.md)."""
  return {
    "init_from": str(whole / "psnr"), "learning_rate.base": 1e-5, "total_steps": 20,
    "eval.every_steps": 10, "checkpoint.every_steps": 10, **more,
  }  # fmt: skip


def test_one_device_and_two_processes_and_eight_devices_are_the_same_run(
  photographs, whole_run, tmp_path, monkeypatch
):
  whole, _ = whole_run
  overrides = gan_overrides(whole)
  started = start(photographs, tmp_path / "two", **overrides)
  config = tiny(photographs, **overrides)
  train.train_and_evaluate(config, tmp_path / "eight")
  create_mesh = sharding.create_mesh
  monkeypatch.setattr(sharding, "create_mesh", lambda: create_mesh(jax.devices()[:1]))
  train.train_and_evaluate(config, tmp_path / "one")
  for index, process in enumerate(started):
    assert process.wait(timeout=300) == 0, output(tmp_path / "two", index).read_text()[-3000:]
  runs = [lines(tmp_path / name) for name in ("one", "two", "eight")]
  assert [len(run) for run in runs] == [22] * 3
  for one, two, eight in zip(*runs, strict=True):
    assert one.keys() == two.keys() == eight.keys()
    for name in one:
      if name.startswith(("loss", "eval/psnr")):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=f"{name} {one['step']}")
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, err_msg=name)


def test_a_signal_to_one_of_two_stops_both_and_any_topology_goes_on(
  photographs, whole_run, tmp_path
):
  whole, _ = whole_run
  run = tmp_path / "run"
  overrides = gan_overrides(whole, total_steps=400, **{"eval.every_steps": 0})
  overrides["checkpoint.every_steps"] = 0
  started = start(photographs, run, **overrides)
  wait_for_step(run, 3, started)
  started[1].send_signal(signal.SIGTERM)
  sent = time.monotonic()
  assert [process.wait(timeout=60) for process in started] == [0, 0]
  assert time.monotonic() - sent < 30
  assert "stopped by a signal; the same command goes on" in output(run, 0).read_text()
  (folder,) = (run / "checkpoints").iterdir()
  step = int(folder.name)
  assert max(line["step"] for line in lines(run)) == step

  # The state that two processes of two devices wrote, on one process of eight.
  config = tiny(photographs, **{**overrides, "total_steps": step + 2})
  manifest = json.loads(next(folder.glob("manifest/*")).read_text())["leaves"]
  for path, leaf in leaves(run, config).items():
    if not path.startswith("ema_params"):
      digest = hashlib.sha256(np.ascontiguousarray(leaf)).hexdigest()
      assert manifest[f"state/{path}"][2] == digest, path
  train.train_and_evaluate(config, run)
  assert max(line["step"] for line in lines(run)) == step + 2


def test_a_process_that_dies_ends_the_other_which_names_it(photographs, whole_run, tmp_path):
  whole, _ = whole_run
  run = tmp_path / "run"
  started = start(photographs, run, **gan_overrides(whole, total_steps=4000))
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


def call(answers: dict, index: int, port: int, count: int, seconds: int) -> None:
  try:
    distributed.roll_call(f"localhost:{port}", count, index, seconds=seconds)
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
        with socket.create_connection(("localhost", distributed._roll_call_port(port))) as peer:
          peer.sendall(words)
        break
      except OSError:
        time.sleep(0.05)
  threads[1].start()
  for thread in threads:
    thread.join()
  assert answers == {0: "all", 1: "all"}


def test_the_roll_call_keeps_out_of_the_ports_of_jobs():
  ports = [distributed._roll_call_port(port) for port in range(1024, 65536)]
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
    distributed.start("auto", start_seconds=2)


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
  assert distributed.find_cluster(environment) == cluster


def test_one_process_needs_nobody(monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  distributed.start("auto")
  distributed.start("off")
  assert distributed.meet("alone", {"a": 1}) == [{"a": 1}]
  distributed.check_same("alone", {"a": 1})
  with pytest.raises(ValueError, match="--distributed=on, but there is no cluster"):
    distributed.start("on")
  with pytest.raises(ValueError, match="--distributed=maybe must be one of auto, on, off"):
    distributed.start("maybe")


def test_facts_that_differ_are_listed_with_who_has_them(monkeypatch):
  everyone = [{"a": 1, "b": [2]}, {"a": 1, "b": [3]}, {"a": 1, "b": [2], "c": None}]
  monkeypatch.setattr(distributed, "meet", lambda name, value, seconds: everyone)
  with pytest.raises(ValueError) as error:
    distributed.check_same("x", {})
  assert str(error.value).splitlines()[1:] == [
    "  b: [2] on process 0, 2; [3] on process 1",
    '  c: "absent" on process 0, 1; null on process 2',
  ]


def test_preflight_leaves_each_host_its_folders(photographs):
  config = tiny(photographs)
  facts = train.preflight_facts(config)
  assert facts["config.seed"] == 0 and "version of jax" in facts
  assert not any(
    str(photographs) in str(value) for key, value in facts.items() if "eval" not in key
  )
