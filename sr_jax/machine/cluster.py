"""Makes one run of several processes: they find each other, agree, share results, stop together.

Call `start` before anything else of JAX. The rest also works in a single process, where it costs
nothing. `sharding.py` lets all devices compute together.

Messages between processes go through JAX's coordination service and not through the accelerators,
so that they can time out, and an error can name the process that is missing.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping

from absl import logging
import jax

from sr_jax import UserError
from sr_jax.machine.meeting import TIMEOUT_SECONDS, group, meet
from sr_jax.machine.stop import Stop

MODES = ("auto", "on", "off")


def start(
  mode: str = "auto", *, start_seconds: int = TIMEOUT_SECONDS, heartbeat_seconds: int = 100
) -> None:
  """Connects the processes of a cluster; does nothing where there is none.

  Must be called before JAX computes anything. A process that dies is noticed within twice
  `heartbeat_seconds`: the others then end with a message of JAX that names it.

  Args:
    mode: 'auto' looks for a cluster, 'on' fails if there is none, 'off' means a single process.
    start_seconds: how long to wait for the other processes.
    heartbeat_seconds: the seconds without a heartbeat after which a process counts as dead.

  Raises:
    UserError: the mode is unknown, it is 'on' and there is no cluster, or the cluster does not say
      which process this is.
    TimeoutError: not all processes came; the error names those that did not.
  """
  if mode not in MODES:
    raise UserError(f"--distributed={mode} must be one of {', '.join(MODES)}")
  cluster = find_cluster(os.environ) if mode != "off" else ""
  if mode == "off" or (mode == "auto" and not cluster):
    return
  if not cluster:
    raise UserError(
      "--distributed=on, but there is no cluster: neither Cloud TPU, GKE, SLURM's srun nor Open "
      "MPI's mpirun started this process; set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave --distributed=auto"
    )
  address, count, index = _find_processes(cluster, start_seconds)
  if address is None or count is None or index is None:
    if mode == "auto" and cluster == "Cloud TPU":
      return  # a TPU machine whose JAX has no TPU: one process
    raise UserError(
      f"{cluster} started this process, but JAX cannot tell which of how many it is; set "
      "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or "
      "--distributed=off for a single process"
    )
  if count > 1:
    roll_call(address, count, index, seconds=start_seconds)
  # `Stop` handles SIGTERM, also before the first step; JAX's service would take it away.
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    address,
    count,
    index,
    initialization_timeout=start_seconds,
    heartbeat_timeout_seconds=heartbeat_seconds,
    # Where several processes share a host, each has its own device, and JAX finds out which.
    **({"cluster_detection_method": "deactivate"} if cluster == "explicit" else {}),
  )


def roll_call(address: str, count: int, index: int, *, seconds: int) -> None:
  """Waits for all processes to be there, and says which are not.

  JAX itself waits too, but ends the process from C++ when the time is up, and names nobody.

  Args:
    address: HOST:PORT of process 0's coordination service. The roll call uses another port, see
      `roll_call_port`.
    count: the number of processes.
    index: the index of this process.
    seconds: how long to wait.

  Raises:
    UserError: the address is not HOST:PORT.
    TimeoutError: not all processes came. It is raised in each that did, and names the others.
  """
  host, _, port = address.rpartition(":")
  if not (host and port.isdigit()):
    raise UserError(f"the coordinator's address {address!r} must be HOST:PORT")
  until, port = time.monotonic() + seconds, roll_call_port(int(port))
  if index == 0:
    problem = _host_roll_call(port, count, until, seconds)
  else:
    problem = _answer_roll_call(host.strip("[]"), port, count, index, until, seconds)
  if problem:
    raise TimeoutError(
      f"{problem} Was the same command started on every host, and can each reach {host}? "
      "--start_seconds waits longer"
    )


def roll_call_port(port: int) -> int:
  """Returns the port of the roll call: the next one, or, from 61439 on, the one 4,096 below.

  JAX gives each job of SLURM or Open MPI a port from 61440 on, where the next may be another job's.
  """
  return port + 1 if port < 61440 - 1 else port - 4096


def _host_roll_call(port: int, count: int, until: float, seconds: int) -> str:
  """Takes the others' names, as process 0, and tells them the result, '' if all came."""
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
        # Connecting to a free local port can connect the socket to itself, which then hears its own
        # words.
        if answer == "all" or "missing: process" in answer:
          return answer.removeprefix("all")
    except OSError:
      pass  # process 0 is not there yet
    time.sleep(0.2)
  return f"process {index} of {count}: process 0 did not answer at {host}:{port} in {seconds} s."


def _find_processes(cluster: str, seconds: int) -> tuple[str, int, int]:
  """Returns the coordinator's address, the number of processes and the index of this one."""
  if cluster == "explicit":
    numbers = (_number(os.environ, key) for key in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    return os.environ["JAX_COORDINATOR_ADDRESS"], *numbers
  from jax._src import clusters  # what jax.distributed.initialize() would ask

  found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, seconds
  )
  return found[:3]


def _number(environment: Mapping[str, str], name: str) -> int:
  """Returns the number in an environment variable, 1 if it is not set."""
  text = environment.get(name, "1")
  if not text.isdigit():
    raise UserError(f"{name}={text!r} must be a number; unset it for a single process")
  return int(text)


def find_cluster(environment: Mapping[str, str]) -> str:
  """Names the cluster that this process was started in, '' for none: a laptop, Colab, one GPU.

  Args:
    environment: the environment variables; processes that are started by hand have
      JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
  """
  if {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} <= environment.keys():
    return "explicit"
  # An interactive allocation has SLURM_JOB_ID too; only processes that srun started have a step.
  if "SLURM_STEP_NODELIST" in environment and _number(environment, "SLURM_NTASKS") > 1:
    return "SLURM"
  if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
    return "Open MPI"
  if "COLAB_RELEASE_TAG" in environment or "KAGGLE_KERNEL_RUN_TYPE" in environment:
    return ""  # their TPU belongs to one machine, without the metadata that JAX would ask for
  if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
    return "GKE" if "KUBERNETES_SERVICE_HOST" in environment else "Cloud TPU"
  if "TPU_ACCELERATOR_TYPE" in environment or os.path.exists("/dev/accel0"):
    return "Cloud TPU"
  return ""


@contextlib.contextmanager
def naming_the_lost(seconds: int):
  """Turns an error of a computation that lost a process into one that names the process.

  Args:
    seconds: how long to wait for an answer of each process; those of the heartbeat are a good
      choice.

  Raises:
    TimeoutError: processes are gone; the error names them.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() > 1:
      logging.error("a computation of all processes failed: %s", str(error).splitlines()[0])
      meet("after that failure", None, seconds=seconds)
    raise


def finish(stop: Stop) -> None:
  """Disconnects from the others once all are done; otherwise the first to end would look dead."""
  if group()[2] > 1:
    meet("finish", None)
    stop.uninstall()
    jax.distributed.shutdown()
