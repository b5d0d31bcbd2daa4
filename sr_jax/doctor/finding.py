"""Defines what a check reports, and runs probes in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

OK, WARNING, FAULT = "ok", "warning", "fault"
GIB = 2**30

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
INSTALL = "pip install --upgrade -r requirements.txt"


class Finding(NamedTuple):
  """One line that says what was found, and one that says what to do.

  Attributes:
    level: 'ok', 'warning' (the run works, perhaps not as intended) or 'fault'.
    name: the name of the fault, the same in every release; '' if all is well.
    what: a description of what was found, with the values.
    remedy: what to do; '' if all is well.
  """

  level: str
  name: str
  what: str
  remedy: str = ""


Findings = Iterator[Finding]


def in_child(module: str, probe: str, seconds: float) -> tuple[dict[str, Any], str]:
  """Calls a function of the doctor in a process of its own.

  XLA aborts on some faults and waits for ever on others; the doctor must survive both.

  Args:
    module: the module of sr_jax.doctor that has the function.
    probe: the name of the function, which returns JSON values.
    seconds: how long to wait.

  Returns:
    (what the function returned, ''), or ({}, the end of what the process printed as it failed).
  """
  code = f"import json; from sr_jax.doctor import {module}; print(json.dumps({module}.{probe}()))"
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  try:
    ran = subprocess.run(
      [sys.executable, "-c", code],
      capture_output=True,
      text=True,
      errors="replace",
      timeout=seconds,
      env={**os.environ, "PYTHONPATH": path},
    )
  except subprocess.TimeoutExpired:
    return {}, f"no answer in {seconds:g} s"
  if ran.returncode:
    told = ran.stderr.strip()[-4000:]
    return {}, told or f"it ended with status {ran.returncode}, and said nothing"
  return json.loads(last_line(ran.stdout)), ""


def last_line(text: str) -> str:
  """Returns the last line of a text, '' for an empty one."""
  return (text.strip().splitlines() or [""])[-1].strip()
