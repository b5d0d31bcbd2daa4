"""Checks what JAX computes on, and whether its results there are right."""

import argparse
import glob
import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import traceback
from typing import Any

from sr_jax.doctor.finding import (
  FAULT,
  GIB,
  INSTALL,
  OK,
  WARNING,
  Finding,
  Findings,
  in_child,
  last_line,
)
from sr_jax.machine.memory import Gpu, nvidia_gpus
from sr_jax.doctor.packages import CUDA_PLUGINS, installed, with_extra

LOW_SHARED_MEMORY = GIB  # Docker gives 64 MiB, with which NCCL fails

OLDEST_DRIVER = {"12": 525, "13": 580}  # NVIDIA's, by CUDA version: JAX's installation page


def check_devices(args: argparse.Namespace) -> Findings:
  """Checks what JAX computes on, and whether its results there are right."""
  gpus, complaint = nvidia_gpus()
  yield from _drivers(gpus, complaint)
  facts, problem = in_child("accelerators", "probe_jax", args.timeout)
  if problem or facts.get("error"):
    yield _jax_fault(problem or facts["error"])
    return
  for module, error in facts["imports"].items():
    what = f"import {module} fails: {error}"
    yield Finding(
      FAULT, "package-broken", what, f"pip install --force-reinstall {_package(module)}"
    )
  yield from _devices(facts, gpus)
  if facts["sum"] != facts["expected_sum"]:
    what = f"a compiled sum over all devices is {facts['sum']}, must be {facts['expected_sum']}"
    remedy = "leave devices out one by one (CUDA_VISIBLE_DEVICES=0, ...) to find which is broken"
    yield Finding(FAULT, "wrong-result", what, remedy)
  error = facts["product_error"]
  what = f"float32 products are right to {error:.0e}"
  if not error < (1e-5 if facts["platform"] == "cpu" else 2e-2):
    remedy = "unset JAX_DEFAULT_MATMUL_PRECISION and XLA_FLAGS; if that does not help, another jax"
    yield Finding(FAULT, "imprecise", what, remedy)
  elif error > 1e-5:
    what += ": TF32 or bfloat16, JAX's default here; JAX_DEFAULT_MATMUL_PRECISION=float32 for more"
    yield Finding(OK, "", what)
  else:
    yield Finding(OK, "", f"a compiled sum over all devices is right; {what}")


def probe_jax() -> dict[str, Any]:
  """Finds out what JAX sees and computes; runs in a process of its own.

  Returns:
    {'error'} if JAX does not start, else {'imports', 'platform', 'devices', 'sum', 'expected_sum',
    'product_error'}.
  """
  try:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.local_devices()
  except Exception as error:
    code = traceback.extract_tb(error.__traceback__)[-1].line  # an assert has no other message
    return {"error": f"{type(error).__name__}: {error or code}"}
  failed = {}
  for module in ("flax.linen", "optax", "orbax.checkpoint", "ml_collections", "skimage"):
    try:
      importlib.import_module(module)
    except Exception as error:
      failed[module] = f"{type(error).__name__}: {error}"
  numbers = np.arange(1000 * len(devices), dtype=np.int32) % 1000
  sharding = NamedSharding(Mesh(np.array(devices), "i"), PartitionSpec("i"))
  total = jax.jit(lambda x: (x * 2 + 1).sum())(jax.device_put(numbers, sharding))
  matrix = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
  expected = matrix.astype(np.float64) @ matrix
  product = np.asarray(jax.jit(lambda a: a @ a)(matrix))
  return {
    "imports": failed,
    "platform": devices[0].platform,
    "devices": [
      {"kind": d.device_kind, "bytes": (d.memory_stats() or {}).get("bytes_limit", 0)}
      for d in devices
    ],
    "sum": int(total),
    "expected_sum": 1000**2 * len(devices),  # 1 + 3 + ... + 1999, once a device
    "product_error": float(np.abs(product - expected).max() / np.abs(expected).max()),
  }


def _package(module: str) -> str:
  names = {"orbax.checkpoint": "orbax-checkpoint", "skimage": "scikit-image"}
  return names.get(module, module.split(".")[0])


def _drivers(gpus: list[Gpu], complaint: str) -> Findings:
  if complaint:
    remedy = "load the driver (or reboot after its update); in Docker, run with --gpus all"
    yield Finding(WARNING, "nvidia-smi-fails", f"nvidia-smi: {complaint}", remedy)
  cuda = max((name[8:10] for name in CUDA_PLUGINS if installed(name)), default="")
  oldest = OLDEST_DRIVER.get(cuda, 0)
  if gpus and 0 < gpus[0].driver < oldest:
    what = f"NVIDIA's driver is {gpus[0].driver}; JAX's plugin for CUDA {cuda} needs {oldest}"
    older = ', or pip uninstall it and pip install "jax[cuda12]"' if cuda == "13" else ""
    yield Finding(FAULT, "nvidia-driver-old", what, f"update the driver to {oldest}{older}")
  busy = [f"{i} ({gpu.used:,} of {gpu.total:,} MiB)" for i, gpu in enumerate(gpus) if _busy(gpu)]
  if busy:
    what = f"another program holds memory of GPU {', '.join(busy)}; JAX wants 75 % of each"
    remedy = "nvidia-smi says who: end it, or CUDA_VISIBLE_DEVICES=... to keep to other GPUs"
    yield Finding(WARNING, "gpu-busy", what, remedy)


def _busy(gpu: Gpu) -> bool:
  return gpu.used > gpu.total / 4  # 75 % are then no longer free


def _devices(facts: dict[str, Any], gpus: list[Gpu]) -> Findings:
  platform_name, devices = facts["platform"], facts["devices"]
  count, kind, limit = len(devices), devices[0]["kind"], devices[0]["bytes"]
  what = f"{count} x {kind} ({platform_name})"
  if platform_name == "gpu":
    what += (
      f", {limit / GIB:.1f} GiB of each for JAX: it takes 75 % at its start, which is no leak; "
      "XLA_PYTHON_CLIENT_MEM_FRACTION=.9 for another share"
    )
  elif limit:
    what += f", {limit / GIB:.1f} GiB each"
  yield Finding(OK, "", what)
  if platform_name == "cpu":
    tpu = bool(glob.glob("/dev/accel[0-9]*"))
    if gpus or tpu:
      seen = f"nvidia-smi lists {len(gpus)} x {gpus[0].name}" if gpus else "/dev/accel0 is a TPU"
      yield _only_cpu(seen, tpu=not gpus)
  shared = pathlib.Path("/dev/shm")
  if platform_name == "gpu" and count > 1 and shared.is_dir():
    size = shutil.disk_usage(shared).total
    if size < LOW_SHARED_MEMORY:
      what = f"/dev/shm has {size / 2**20:.0f} MiB, too little for NCCL between {count} GPUs"
      remedy = "docker run --shm-size=8g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
      yield Finding(WARNING, "shared-memory-small", what, remedy)


def _only_cpu(seen: str, *, tpu: bool) -> Finding:
  what = f"{seen}, but JAX sees only the CPU"
  asked, visible = os.environ.get("JAX_PLATFORMS"), os.environ.get("CUDA_VISIBLE_DEVICES")
  if asked and "cuda" not in asked and "gpu" not in asked and "tpu" not in asked:
    what += f": JAX_PLATFORMS={asked}"
    return Finding(WARNING, "jax-platforms-cpu", what, "unset JAX_PLATFORMS")
  if not tpu and visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
    what += f": CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs"
    return Finding(WARNING, "gpu-hidden", what, "unset CUDA_VISIBLE_DEVICES")
  extra = "tpu" if tpu else "cuda12"
  if not tpu and any(installed(name) for name in CUDA_PLUGINS):
    remedy = 'unset LD_LIBRARY_PATH; JAX_PLATFORMS=cuda python -c "import jax; jax.devices()" says'
    return Finding(FAULT, "jax-sees-no-gpu", what, f"{remedy} why")
  return Finding(FAULT, f"jax-sees-no-{'tpu' if tpu else 'gpu'}", what, with_extra(extra))


# Messages of JAX or XLA as they fail to start: (pattern, name of the fault, remedy).
JAX_FAULTS = (
  (
    r"No module named '(jax|jaxlib|numpy)'",
    "jax-missing",
    f"{INSTALL}, in the environment that runs this Python",
  ),
  (
    r"Unknown flags? in XLA_FLAGS.*",
    "xla-flags-unknown",
    "take the flag out of XLA_FLAGS: this jaxlib does not know it, and aborts",
  ),
  (
    r".*already in use.*",
    "accelerator-in-use",
    "end the process that holds it (`sudo lsof -w /dev/accel*` says which), or wait for it",
  ),
  (
    r".*(RESOURCE_EXHAUSTED|OUT_OF_MEMORY|out of memory).*",
    "device-memory-taken",
    "end other programs on it (nvidia-smi), or XLA_PYTHON_CLIENT_MEM_FRACTION=.3 to take less",
  ),
  (
    r".*jaxlib.*(incompatible|requires (jaxlib )?version).*",
    "jaxlib-mismatch",
    "pip install --upgrade jax jaxlib",
  ),
  (
    r"no answer in \d+ s",
    "jax-hangs",
    "on a TPU pod start it on all hosts at once (gcloud ... --worker=all); else look for another "
    "process on the accelerator; --timeout waits longer",
  ),
)


def _jax_fault(text: str) -> Finding:
  for pattern, name, remedy in JAX_FAULTS:
    if match := re.search(pattern, text):
      return Finding(FAULT, name, f"JAX does not start: {match[0].strip()}", remedy)
  if asked := os.environ.get("JAX_PLATFORMS"):
    what = f"JAX does not start with JAX_PLATFORMS={asked}: {last_line(text)}"
    remedy = f"unset JAX_PLATFORMS, or install its plugin: {with_extra('cuda12')}"
    return Finding(FAULT, "jax-platforms", what, remedy)
  remedy = f"unset LD_LIBRARY_PATH and XLA_FLAGS, then {INSTALL}"
  return Finding(FAULT, "jax-does-not-start", f"JAX does not start: {last_line(text)}", remedy)
