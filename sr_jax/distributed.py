"""Several processes as one run: they find each other, agree, share results, and stop together.

`start` comes before anything else of JAX. The rest also works in a single process, where it costs
nothing. What all devices compute together is no matter of this module: see `sharding.py`.

Messages between processes go through JAX's coordination service, not through the accelerators: they
have time-outs, and what is missing can be named.
"""

import atexit
import contextlib
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
import jax

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
  # Stop does that, also before the first step; JAX's service would take SIGTERM from it.
  jax.config.update("jax_enable_preemption_service", False)
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
  return _exchange(f"sr_jax/{next(_meetings)}/{name}", value, seconds)


def _exchange(place: str, value: Any, seconds: int) -> list[Any]:
  """`meet`, at a place that all processes know by themselves; each is used once."""
  client, index, count = _group()
  if count == 1:
    return [json.loads(json.dumps(value))]
  client.key_value_set(f"{place}/{index}", json.dumps(value))
  try:
    client.wait_at_barrier(place, seconds * 1000)
  except jax.errors.JaxRuntimeError as error:  # DEADLINE_EXCEEDED, or somebody died
    came = {int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(f"{place}/")}
    missing = ", ".join(str(i) for i in range(count) if i not in came) or "none"
    raise TimeoutError(
      f"{place.rpartition('/')[2]}: {len(came)} of {count} processes after {seconds} s; missing: "
      f"process {missing}. Is that host up, and was the same command started on it? "
      f"({str(error).splitlines()[0]})"
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
    _let_others_leave(f"sr_jax/{next(_meetings)}/after {name}")
    raise ValueError(
      f"the processes of this run differ ({name}); make them equal:\n" + "\n".join(problems)
    )


def stopped_status() -> int:
  """Exit status of a run that a signal stopped: 0, or what SR_JAX_STOPPED_STATUS says.

  A launcher that takes 0 for the end of the training, as Kubernetes does, needs another.
  """
  status = os.environ.get("SR_JAX_STOPPED_STATUS") or "0"
  if not (status.isdigit() and int(status) < 256):
    raise ValueError(f"SR_JAX_STOPPED_STATUS={status!r} must be a number from 0 to 255; try 143")
  return int(status)


def _let_others_leave(place: str) -> None:
  """Before an end of all processes: with process 0 goes what the others would be ended by."""
  _exchange(place, None, 30)
  if _group()[2] > 1 and _group()[1] == 0:
    time.sleep(2)


class Stop:
  """Notices that the run is to stop: SIGTERM (preemption) or SIGINT (Ctrl-C) to any process of it.

  While there is something to save, from the first step of a stage to its last checkpoint, a signal
  makes all processes stop after the same step. Before and after, it ends them at once, with
  `stopped_status`, whatever they are doing. Threads listen, since Python's own handlers wait for a
  compilation to end. Without `install` nothing is noticed.
  """

  def __init__(self):
    self._lock = threading.Lock()  # while the processes agree, none of them begins a step
    self._calls, self._in_steps = 0, False
    self._signal, self._last_call = "", 0
    self._status = stopped_status()
    self._wakeup, self._before, self._listener = None, {}, None
    self._uninstalled = threading.Event()

  def install(self) -> "Stop":
    """Takes over both signals; again after `start`, to hear those of the other processes too."""
    if self._wakeup is None:
      read, write = os.pipe()
      os.set_blocking(write, False)
      self._wakeup = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
      threading.Thread(target=self._hear_signals, args=(read,), daemon=True).start()
      for number in (signal.SIGTERM, signal.SIGINT):  # the thread does the work
        self._before[number] = signal.signal(number, lambda number, frame: None)
    if _group()[2] > 1 and self._listener is None:
      self._listener = threading.Thread(target=self._hear_others, daemon=True)
      self._listener.start()
      atexit.register(self.uninstall)
    return self

  def uninstall(self) -> None:
    """Gives the signals back."""
    self._uninstalled.set()
    if self._listener:
      self._listener.join()
    if self._wakeup:
      (write, before), self._wakeup = self._wakeup, None
      signal.set_wakeup_fd(before)
      os.close(write)  # ends the thread that reads
    for number, before in self._before.items():
      signal.signal(number, before or signal.SIG_DFL)

  def __call__(self) -> str:
    """Returns what stops the run, '' for nothing; called by every process after every step."""
    with self._lock:
      self._calls, self._in_steps = self._calls + 1, True
      return self._signal if self._signal and self._calls >= self._last_call else ""

  @property
  def pending(self) -> str:
    """What will stop the run: long work other than steps may give way."""
    return self._signal

  def request(self, what: str) -> None:
    """Stops a run of one process after its next step, without a signal: for who embeds it."""
    self._signal, self._last_call = what, 0

  def saved(self) -> None:
    """Says that there is nothing to save until the next step."""
    with self._lock:
      self._in_steps = False

  def _hear_signals(self, pipe: int) -> None:
    while byte := os.read(pipe, 1):
      if byte[0] not in (signal.SIGTERM, signal.SIGINT):  # somebody else's
        continue
      name = signal.Signals(byte[0]).name
      with self._or_end_at_once(name):
        if self._listener:  # which hears it like everybody else's
          _group()[0].key_value_set(_STOP_KEY, name, allow_overwrite=True)
        else:
          self._agree(name)
    os.close(pipe)

  def _hear_others(self) -> None:
    # Asks again and again: a call that waits could not be ended before Python shuts down, and then
    # it would take the process with it.
    client, _, count = _group()
    while not self._uninstalled.wait(1 + count / 500):
      try:
        name = client.key_value_try_get(_STOP_KEY)
      except jax.errors.JaxRuntimeError:  # nobody has set it
        continue
      with self._or_end_at_once(name):
        self._agree(name)
      return

  def _agree(self, name: str) -> None:
    """Settles with the other processes, all of them here, whether to save and after which step."""
    with self._lock:
      everyone = [[self._calls, self._in_steps]]
      if self._listener:
        everyone = _exchange("sr_jax/state at a signal", everyone[0], 30)
      if any(in_steps for _, in_steps in everyone):
        print(f"{name}: saving after this step ...", flush=True)
        self._signal, self._last_call = name, max(calls for calls, _ in everyone) + 1
        return
      print(f"stopped by {name}; nothing was lost", flush=True)
      if self._listener:
        _let_others_leave("sr_jax/leaving")
      os._exit(self._status)

  @contextlib.contextmanager
  def _or_end_at_once(self, name: str):
    """A process that can no longer agree with the others must not stay and be deaf to signals."""
    try:
      yield
    except Exception as error:  # a time-out, or whatever JAX raises where a process is gone
      print(f"{name}: ended without saving: {error}", flush=True)
      os._exit(1)


_STOP_KEY = "sr_jax/stop"


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


def finish(stop: Stop) -> None:
  """Lets go of the others, once all are done; without it the first to end would look dead."""
  if _group()[2] > 1:
    meet("finish", None)
    stop.uninstall()
    jax.distributed.shutdown()


def _group() -> tuple[Any, int, int]:
  """JAX's coordination client, the index of this process and their number: (None, 0, 1) of one.

  Unlike jax.process_count this starts no backend, and JAX offers no public way to the client.
  """
  from jax._src import distributed

  state = distributed.global_state
  return state.client, state.process_id or 0, state.num_processes or 1
