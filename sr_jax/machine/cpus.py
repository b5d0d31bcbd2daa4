"""Counts the CPUs that this process may use."""

import math
import os
import pathlib


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
