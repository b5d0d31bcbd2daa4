"""Asks how much memory the machine has, and recognises errors of having too little.

Nothing but the standard library is imported.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from typing import NamedTuple


def memory() -> tuple[int, int]:
  """Returns the bytes of memory that this process can use, and of all; (0, 0) if not known."""
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    free, total = table["MemAvailable"], table["MemTotal"]
  except (OSError, KeyError, ValueError):
    return 0, 0
  limit, used = _cgroup("memory.max"), _cgroup("memory.current")
  if limit.isdigit() and used.isdigit():  # a container; 'max' is no limit
    free, total = min(free, int(limit) - int(used)), min(total, int(limit))
  return max(free, 1), total


def _cgroup(name: str) -> str:
  try:
    return pathlib.Path("/sys/fs/cgroup", name).read_text().strip()
  except OSError:
    return ""


_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def ran_out(error: BaseException) -> bool:
  """Whether an error says that the memory of the host or of an accelerator was too little."""
  of_jax = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
  told = re.search(r"RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE)
  return isinstance(error, MemoryError) or bool(of_jax and told)


def asked_for(error: BaseException) -> str:
  """Returns how much such an error says could not be had, ': 1.25 GB could not be had', or ''."""
  amount = re.search(r"allocat\w+ ([\d.]+) ?([KMGT]?)i?B?", str(error), re.IGNORECASE)
  if not amount:
    return ""
  return f": {float(amount[1]) * _UNITS[amount[2].lower()] / 1e9:,.2f} GB could not be had"


def jax_may_use_gpus() -> bool:
  """Whether JAX would compute on NVIDIA's GPUs, if there are some; JAX is not asked."""
  platforms = os.environ.get("JAX_PLATFORMS", "")
  plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
  return (
    any(importlib.util.find_spec(name) for name in plugins)
    and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
    and (not platforms or "cuda" in platforms or "gpu" in platforms)
  )


class Gpu(NamedTuple):
  """A GPU as nvidia-smi lists it."""

  name: str
  total: int  # MiB, 0 where nvidia-smi does not say
  used: int
  driver: int  # first number of its version


def nvidia_gpus() -> tuple[list[Gpu], str]:
  """Returns the GPUs that nvidia-smi lists, and its error; ([], '') if there is no nvidia-smi."""
  if not shutil.which("nvidia-smi"):
    return [], ""
  fields = "name,memory.total,memory.used,driver_version"
  command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
  try:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired) as error:
    return [], str(error)
  if ran.returncode:
    return [], _last_line(ran.stdout + ran.stderr) or f"exit status {ran.returncode}"
  rows = [[cell.strip() for cell in line.split(",")] for line in ran.stdout.splitlines()]
  numbers = [[int("0" + re.match(r"\d*", cell)[0]) for cell in row[1:4]] for row in rows]
  rows = zip(rows, numbers, strict=True)
  return [Gpu(row[0], *cells) for row, cells in rows if len(cells) == 3], ""


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or [""])[-1].strip()
