"""Checks environment variables that change what a run does, and the cluster that they describe."""

import argparse
import os
import re
from collections.abc import Mapping

from sr_jax.doctor.finding import FAULT, OK, WARNING, Finding, Findings
from sr_jax.doctor.packages import CUDA_PLUGINS, installed


def check_environment(args: argparse.Namespace) -> Findings:
  """Checks the environment variables of JAX, XLA, TensorFlow, and of the cluster."""
  del args
  environment = dict(os.environ)
  findings = [*_variables(environment), *_cluster(environment)]
  yield from findings
  try:
    from sr_jax.machine.cluster import find_cluster

    cluster = find_cluster(environment)
  except ImportError:
    return  # JAX is missing, as other checks say
  what = (
    f"part of a cluster: {cluster}" if cluster else "no cluster: one process drives all devices"
  )
  yield Finding(OK, "", what)


# {a variable that may have been left on after debugging: what it does}
LEFT_ON = {
  "JAX_DEBUG_NANS": "every step waits for its result and compiles twice on a NaN",
  "JAX_DEBUG_INFS": "every step waits for its result",
  "JAX_DISABLE_JIT": "nothing is compiled: hundreds of times slower",
  "JAX_ENABLE_X64": "float64 creeps in: slower, and other results than everybody's",
  "JAX_ENABLE_CHECKS": "JAX checks itself at every call",
  "JAX_NO_EXECUTION": "nothing is computed",
  "TF_FORCE_GPU_ALLOW_GROWTH": (
    "without effect: the GPU is hidden from TensorFlow; JAX's share of it is "
    "XLA_PYTHON_CLIENT_MEM_FRACTION"
  ),
}


def _variables(environment: Mapping[str, str]) -> Findings:
  for name, effect in LEFT_ON.items():
    if environment.get(name, "").lower() in ("1", "true", "on", "yes"):
      what = f"{name}={environment[name]}: {effect}"
      yield Finding(WARNING, "variable-left-on", what, f"unset {name}")
  if match := re.search(
    r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", "")
  ):
    what = f"XLA_FLAGS makes {match[1]} devices of one CPU: for tests; it slows training"
    yield Finding(WARNING, "pretend-devices", what, f"take {match[0]} out of XLA_FLAGS")
  fraction = environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ".75")
  try:
    valid = 0 < float(fraction) <= 1
  except ValueError:
    valid = False
  if not valid:
    what = f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} must be a number above 0 and at most 1"
    yield Finding(FAULT, "memory-fraction", what, "XLA_PYTHON_CLIENT_MEM_FRACTION=.75, or unset it")
  if environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
    what = "XLA_PYTHON_CLIENT_ALLOCATOR=platform asks the driver at each allocation: very slow"
    yield Finding(WARNING, "slow-allocator", what, "unset XLA_PYTHON_CLIENT_ALLOCATOR")
  libraries = environment.get("LD_LIBRARY_PATH", "")
  plugin = any(installed(name) for name in CUDA_PLUGINS)
  if plugin and re.search("cuda|cudnn|nccl", libraries, re.IGNORECASE):
    what = f"LD_LIBRARY_PATH={libraries} puts another CUDA before the one that came with JAX"
    yield Finding(WARNING, "other-cuda", what, "unset LD_LIBRARY_PATH")


EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # gRPC reads these, in lower case only


def _cluster(environment: Mapping[str, str]) -> Findings:
  given = [name for name in EXPLICIT if name in environment]
  if given and len(given) < 3:
    missing = " and ".join(name for name in EXPLICIT if name not in environment)
    what = f"{' and '.join(given)} set, {missing} not: every process would train alone"
    yield Finding(FAULT, "processes-incomplete", what, f"set {missing}, or unset {given[0]}")
  elif given:
    yield from _explicit(*(environment[name] for name in EXPLICIT))

  tasks = _first_number(environment, "SLURM_NTASKS")
  if tasks > 1 and "SLURM_STEP_NODELIST" not in environment:
    what = (
      f"SLURM gave {tasks} tasks (SLURM_NTASKS), but srun did not start this process: it runs alone"
    )
    remedy = "start with srun: srun python -m sr_jax.main ..., and srun python -m sr_jax.doctor"
    yield Finding(FAULT, "slurm-without-srun", what, remedy)
  on_node = _first_number(
    environment, "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
  )
  visible = [i for i in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if i.strip()]
  if visible and visible[0] not in ("-1", "NoDevFiles") and len(visible) < on_node:
    what = (
      f"CUDA_VISIBLE_DEVICES={','.join(visible)} with {on_node} tasks on the node: JAX gives "
      "task i the i-th GPU that it sees, and ends with 'invalid device ordinal'"
    )
    remedy = (
      f"--gpus-per-node={on_node} --gpu-bind=none instead of --gpus-per-task, so that every task "
      "sees all GPUs; or one task a node"
    )
    yield Finding(FAULT, "slurm-gpus-per-task", what, remedy)

  proxies = [name for name in PROXIES if environment.get(name)]
  coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "").rsplit(":", 1)[0]
  spared = (environment.get("no_grpc_proxy") or environment.get("no_proxy", "")).split(",")
  direct = any(host == "*" or host and coordinator.endswith(host) for host in spared)
  if proxies and (tasks > 1 or given) and not direct:
    what = f"{', '.join(proxies)} set: the processes may look for each other at the proxy, and hang"
    remedy = f"unset {' '.join(proxies)}, or put the hosts' names in no_proxy"
    yield Finding(WARNING, "proxy", what, remedy)


def _explicit(address: str, count: str, index: str) -> Findings:
  if not re.fullmatch(r".+:\d+", address):
    what = f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT"
    remedy = f"JAX_COORDINATOR_ADDRESS={address.rstrip(':') or 'HOST'}:8476 on every host"
    yield Finding(FAULT, "coordinator-address", what, remedy)
  if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
    what = f"JAX_PROCESS_ID={index} must be a number from 0 to JAX_NUM_PROCESSES={count} less one"
    yield Finding(FAULT, "process-id", what, "number the processes from 0, each once")


def _first_number(environment: Mapping[str, str], *names: str) -> int:
  """Returns the first number of the first variable that has one; '4(x2)', 4 tasks a node, is 4."""
  for name in names:
    if match := re.match(r"\d+", environment.get(name, "")):
      return int(match[0])
  return 0
