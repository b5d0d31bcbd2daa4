"""Counts the CPUs that this process may use, and names their kind."""

import math
import os
import pathlib
import platform


def allowed() -> int:
  """Counts the CPUs that the process may run on, by its affinity."""
  return len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))


def quota() -> float:
  """Returns the CPUs that the container's quota amounts to; infinity where there is none."""
  try:
    quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
    return int(quota) / int(period)
  except (OSError, ValueError):  # no container, or 'max'
    return math.inf


def available() -> int:
  """Counts the CPUs that this process may use, by its affinity and by its container's quota."""
  return max(1, min(allowed(), math.ceil(min(quota(), allowed()))))


def kind() -> str:
  """Returns what the processor calls itself, for example 'AMD EPYC 9B14'."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
  except (OSError, StopIteration):  # not Linux
    return platform.processor() or platform.machine()
