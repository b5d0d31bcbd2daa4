"""Several processes as one run: they find each other, agree, share results, and stop together.

`start` comes before anything else of JAX. The rest also works in a single process, where it costs
nothing. What all devices compute together is no matter of this module: see `sharding.py`.

Messages between processes go through JAX's coordination service, not through the accelerators: they
have time-outs, and what is missing can be named.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils

MODES = ("auto", "on", "off")
TIMEOUT_SECONDS = 300


def start(
  mode: str = "auto", *, start_seconds: int = TIMEOUT_SECONDS, heartbeat_seconds: int = 100
) -> None:
  """Connects the processes of a cluster; does nothing where there is none.

  Must be called before JAX computes anything. A process that dies is noticed within twice
  `heartbeat_seconds`: the others then end with a message of JAX that names it.

  Args:
    mode: 'auto' looks for a cluster; 'on' fails where there is none; 'off' is one process.
    start_seconds: to wait for the other processes.
    heartbeat_seconds: without a sign of life after which a process counts as dead.

  Raises:
    ValueError: an unknown mode, 'on' without a cluster, or processes that did not come.
  """
  if mode not in MODES:
    raise ValueError(f"--distributed={mode} must be one of {', '.join(MODES)}")
  cluster = find_cluster(os.environ) if mode != "off" else ""
  if mode == "off" or (mode == "auto" and not cluster):
    return
  if not cluster:
    raise ValueError(
      "--distributed=on, but there is no cluster: neither Cloud TPU, GKE, SLURM's srun nor Open "
      "MPI's mpirun started this process; set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave --distributed=auto"
    )
  address, count, index = _find_processes(cluster, start_seconds)
  if address is None or count is None or index is None:
    if mode == "auto" and cluster == "Cloud TPU":
      return  # a TPU machine whose JAX has no TPU: one process
    raise ValueError(
      f"{cluster} started this process, but JAX cannot tell which of how many it is; set "
      "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or "
      "--distributed=off for a single process"
    )
  if count > 1:
    roll_call(address, count, index, seconds=start_seconds)
  jax.distributed.initialize(
    address,
    count,
    index,
    initialization_timeout=start_seconds,
    heartbeat_timeout_seconds=heartbeat_seconds,
    # Of several processes on one host each has a device of its own; JAX finds out which.
    **({"cluster_detection_method": "deactivate"} if cluster == "explicit" else {}),
  )


def roll_call(address: str, count: int, index: int, *, seconds: int) -> None:
  """Waits for all processes to be there, and says which are not.

  JAX itself waits too, but ends the process from C++ when the time is up, and names nobody.

  Args:
    address: HOST:PORT of process 0's coordination service; `_roll_call_port` says which is used.
    count: of processes.
    index: of this one.
    seconds: to wait.

  Raises:
    TimeoutError: names the processes that did not come, on each that did.
  """
  host, _, port = address.rpartition(":")
  if not (host and port.isdigit()):
    raise ValueError(f"the coordinator's address {address!r} must be HOST:PORT")
  until, port = time.monotonic() + seconds, _roll_call_port(int(port))
  if index == 0:
    problem = _host_roll_call(port, count, until, seconds)
  else:
    problem = _answer_roll_call(host.strip("[]"), port, count, index, until, seconds)
  if problem:
    raise TimeoutError(
      f"{problem} Was the same command started on every host, and can each reach {host}? "
      "--start_seconds waits longer"
    )


def _roll_call_port(port: int) -> int:
  """The next port; below the 4,096 at the end, among which JAX chooses SLURM's and MPI's by job."""
  return port + 1 if port < 61440 - 1 else port - 4096


def _host_roll_call(port: int, count: int, until: float, seconds: int) -> str:
  """Process 0: takes the others' names and tells them the result, '' where all came."""
  present = {0: f"0 ({os.uname().nodename})"}
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(socket.create_server(("", port), backlog=count))
    peers = []
    while len(present) < count and (left := until - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        peer = stack.enter_context(server.accept()[0])
        peer.settimeout(5)
        their_count, their_index, name = peer.recv(300).decode().split(" ", 2)
        their_count, their_index = int(their_count), int(their_index)
      except (OSError, ValueError):
        continue  # no process of this run
      peers.append(peer)
      if their_count == count and 0 <= their_index < count:
        present[their_index] = f"{their_index} ({name})"
    missing = [str(i) for i in range(count) if i not in present]
    problem = ""
    if missing:
      problem = (
        f"{len(present)} of {count} processes after {seconds} s; missing: process "
        f"{', '.join(missing)}; there are {', '.join(present.values())}."
      )
    for peer in peers:
      with contextlib.suppress(OSError):
        peer.sendall((problem or "all").encode())
  return problem


def _answer_roll_call(
  host: str, port: int, count: int, index: int, until: float, seconds: int
) -> str:
  while (left := until - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as peer:
        peer.sendall(f"{count} {index} {os.uname().nodename}".encode())
        peer.settimeout(left + 10)
        answer = peer.recv(4000).decode()
        # On one machine a connection can meet itself, and would hear its own words.
        if answer == "all" or "missing: process" in answer:
          return answer.removeprefix("all")
    except OSError:
      pass  # process 0 is not there yet
    time.sleep(0.2)
  return f"process {index} of {count}: process 0 did not answer at {host}:{port} in {seconds} s."


def _find_processes(cluster: str, seconds: int) -> tuple[str, int, int]:
  """Address of the coordinator, number of processes, index of this one."""
  if cluster == "explicit":
    numbers = (int(os.environ[key]) for key in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    return os.environ["JAX_COORDINATOR_ADDRESS"], *numbers
  from jax._src import clusters  # what jax.distributed.initialize() would ask

  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, seconds
  )
  return found[:3]


def find_cluster(environment: Mapping[str, str]) -> str:
  """Names the cluster that this process was started in, '' for none: a laptop, Colab, one GPU.

  Args:
    environment: variables; what is started by hand says so by JAX_COORDINATOR_ADDRESS,
      JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """
  if {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= environment.keys():
    return "explicit"
  # An interactive allocation has SLURM_JOB_ID too; only srun's processes have a step.
  if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
    return "SLURM"
  if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
    return "Open MPI"
  if "COLAB_RELEASE_TAG" in environment or "KAGGLE_KERNEL_RUN_TYPE" in environment:
    return ""  # their TPU is one machine's, without the metadata that JAX would ask for
  if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
    return "GKE" if "KUBERNETES_SERVICE_HOST" in environment else "Cloud TPU"
  if "TPU_ACCELERATOR_TYPE" in environment or os.path.exists("/dev/accel0"):
    return "Cloud TPU"
  return ""


def meet(name: str, value: Any, *, seconds: int = TIMEOUT_SECONDS) -> list[Any]:
  """Exchanges a value with all processes.

  Args:
    name: of the meeting, for the message where a process does not come; each is used once.
    value: JSON.
    seconds: to wait for the others.

  Returns:
    The values of all processes, by process index.

  Raises:
    TimeoutError: names the processes that did not come.
  """
  count = jax.process_count()
  if count == 1:
    return [json.loads(json.dumps(value))]
  client = _client()
  place = f"sr_jax/{next(_meetings)}/{name}"
  client.key_value_set(f"{place}/{jax.process_index()}", json.dumps(value))
  try:
    client.wait_at_barrier(place, seconds * 1000)
  except jax.errors.JaxRuntimeError as error:  # DEADLINE_EXCEEDED, or somebody died
    came = {int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(f"{place}/")}
    missing = ", ".join(str(i) for i in range(count) if i not in came) or "none"
    raise TimeoutError(
      f"{name}: {len(came)} of {count} processes after {seconds} s; missing: process {missing}. Is "
      f"that host up, and was the same command started on it? ({str(error).splitlines()[0]})"
    ) from error
  texts = {int(key.rsplit("/", 1)[1]): text for key, text in client.key_value_dir_get(f"{place}/")}
  return [json.loads(texts[index]) for index in range(count)]


_meetings = itertools.count()  # all processes meet in the same order


def check_same(name: str, facts: Mapping[str, Any], *, seconds: int = TIMEOUT_SECONDS) -> None:
  """Compares facts over all processes.

  Args:
    name: of the meeting.
    facts: {what: JSON value}.
    seconds: to wait for the others.

  Raises:
    ValueError: lists each fact that differs, with the values and the processes that have them.
  """
  everyone = meet(name, dict(facts), seconds=seconds)
  problems = []
  for what in dict.fromkeys(key for theirs in everyone for key in theirs):
    holders: dict[str, list[int]] = {}
    for index, theirs in enumerate(everyone):
      holders.setdefault(json.dumps(theirs.get(what, "absent"), sort_keys=True), []).append(index)
    if len(holders) > 1:
      values = "; ".join(
        f"{text} on process {', '.join(map(str, who[:8]))}{' ...' if who[8:] else ''}"
        for text, who in holders.items()
      )
      problems.append(f"  {what}: {values}")
  if problems:
    raise ValueError(
      f"the processes of this run differ ({name}); make them equal:\n" + "\n".join(problems)
    )


class Stop:
  """Notices that the run is to stop: SIGTERM (preemption), SIGINT (Ctrl-C), on any process.

  Within `with`, a signal only sets a flag, which all processes see after the same step. Before and
  after, when there is nothing to save, it ends a run of one process at once with status 0; a run of
  many stops after its next step. Without `install` nothing is noticed.
  """

  def __init__(self):
    self._signal = ""
    self._calls = itertools.count()
    self._in_steps = False
    self._several = jax.process_count() > 1

  def install(self) -> "Stop":
    """Takes over SIGINT, and SIGTERM in a run of one process: JAX has it in one of many."""
    signal.signal(signal.SIGINT, self._on_signal)
    if not self._several:
      signal.signal(signal.SIGTERM, self._on_signal)
    return self

  def __enter__(self) -> "Stop":
    self._in_steps = True
    return self

  def __exit__(self, *exception: Any) -> None:
    self._in_steps = False

  def __call__(self) -> str:
    """Returns what stopped the run, '' for nothing; called by every process after every step."""
    if self._several and multihost_utils.reached_preemption_sync_point(next(self._calls)):
      return self._signal or "a signal"
    return "" if self._several else self._signal

  @property
  def pending(self) -> str:
    """What is about to stop a run of one process: long work other than steps may give way."""
    return "" if self._several else self._signal

  def _on_signal(self, number: int, frame: Any) -> None:
    del frame
    self._signal = signal.Signals(number).name
    if self._several:
      os.kill(os.getpid(), signal.SIGTERM)  # JAX's handler tells the others
    elif not self._in_steps:
      print(f"stopped by {self._signal}; nothing was lost", flush=True)
      sys.exit(0)
    else:
      print(f"{self._signal}: saving after this step ...", flush=True)


@contextlib.contextmanager
def naming_the_lost(seconds: int):
  """Turns an error of a computation that lost a process into one that names the process.

  Args:
    seconds: to wait for a sign of life of each; the heartbeat is a good choice.

  Raises:
    TimeoutError: names the processes that are gone.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() > 1:
      logging.error("a computation of all processes failed: %s", str(error).splitlines()[0])
      meet("after that failure", None, seconds=seconds)
    raise


def finish() -> None:
  """Lets go of the others, once all are done; without it the first to end would look dead."""
  if jax.process_count() > 1:
    meet("finish", None)
    jax.distributed.shutdown()


def _client() -> Any:
  # JAX offers no public way to its coordination service's keys.
  from jax._src import distributed

  return distributed.global_state.client
