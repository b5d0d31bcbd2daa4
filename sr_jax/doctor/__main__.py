"""Says what is wrong with this machine, before the run: each fault with its remedy.

  python -m sr_jax.doctor
  python -m sr_jax.doctor --data PHOTOS --workdir runs/esrgan
  srun python -m sr_jax.doctor                on a cluster: as the run will be started

The exit status is 0 without faults and 1 with any. Nothing is downloaded, installed or left behind.

The doctor must run where little else does. So only the standard library is imported at the top,
whatever may hang or abort (JAX finding its devices, TensorFlow) runs in a process of its own, and a
check that fails is a finding like any other.
"""

import argparse
import collections
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import sr_jax

from sr_jax import command
from sr_jax.doctor.accelerators import check_devices
from sr_jax.doctor.environment import check_environment
from sr_jax.doctor.finding import FAULT, INSTALL, OK, WARNING, Finding, Findings
from sr_jax.doctor.host import check_disk, check_machine
from sr_jax.doctor.packages import check_models, check_python, check_tensorflow
from sr_jax.doctor.photographs import check_data, check_decoding
from sr_jax.machine.paths import user_path

CHECKS: dict[str, Callable[[argparse.Namespace], Findings]] = {
  "python": check_python,
  "machine": check_machine,
  "environment": check_environment,
  "devices": check_devices,
  "tensorflow": check_tensorflow,
  "decoding": check_decoding,
  "models": check_models,
  "disk": check_disk,
  "data": check_data,
}


def run_check(name: str, args: argparse.Namespace) -> Findings:
  """Yields the findings of one check; if the check itself fails, that is the last finding."""
  try:
    yield from CHECKS[name](args)
  except ImportError as error:
    what = f"not checked: {error}"
    yield Finding(FAULT, "check-impossible", what, f"{INSTALL}, in the environment of this Python")
  except Exception as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"the check itself failed: {type(error).__name__}: {error} ({place.name})"
    remedy = f"please report it; to run the others without it: --only={_others(name)}"
    yield Finding(FAULT, "check-failed", what, remedy)


def _others(name: str) -> str:
  return ",".join(other for other in CHECKS if other != name)


def show(finding: Finding) -> None:
  """Prints a finding: what was found, and below it the remedy."""
  name = f"{finding.name}: " if finding.name else ""
  level = finding.level if finding.level == OK else finding.level.upper()
  print(f"  {level:8}{name}{finding.what}", flush=True)
  if finding.remedy:
    print(f"  {'':8}-> {finding.remedy}", flush=True)


def main(argv: Sequence[str]) -> int:
  """Runs the checks and prints what they find. Returns the exit status."""
  parser = command.parser("doctor", __doc__)
  parser.add_argument("--data", default="", metavar="DIR", help="decode and audit its images")
  parser.add_argument("--workdir", default="runs", metavar="DIR", help="folder of the runs (runs)")
  cache = os.environ.get("SR_JAX_CACHE") or "~/.cache/sr_jax"
  parser.add_argument("--cache", default=cache, metavar="DIR", help=f"the cache folder ({cache})")
  parser.add_argument("--hr_patch", type=int, default=128, help="side of the HR crops (128)")
  parser.add_argument("--only", default="", help=f"checks to run, of {','.join(CHECKS)}")
  parser.add_argument("--no-tensorflow", action="store_true", help="do not start TensorFlow")
  parser.add_argument("--timeout", type=float, default=180, help="seconds for JAX to start (180)")
  parser.add_argument("--json", default="", metavar="FILE", help="write the findings there as well")
  args = parser.parse_args(argv)
  names = args.only.split(",") if args.only else list(CHECKS)
  if unknown := [name for name in names if name not in CHECKS]:
    parser.error(f"--only={args.only}: {unknown[0]!r} must be one of {', '.join(CHECKS)}")
  if args.no_tensorflow:
    names = [name for name in names if name != "tensorflow"]

  report = []
  for name in names:
    print(name, flush=True)
    for finding in run_check(name, args):
      show(finding)
      report.append({"check": name, **finding._asdict()})
  levels = collections.Counter(entry["level"] for entry in report)
  faults, cautions = levels[FAULT], levels[WARNING]
  print(f"\n{_plural(faults, 'fault')}, {_plural(cautions, 'warning')}")
  if args.json:
    facts = {"sr_jax": sr_jax.__version__, "faults": faults, "warnings": cautions}
    try:
      user_path(args.json).write_text(json.dumps({**facts, "findings": report}, indent=2) + "\n")
    except OSError as error:
      print(f"error: --json: {error}", file=sys.stderr)
      return 1
  return 1 if faults else 0


def _plural(count: int, noun: str) -> str:
  return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


run = main

if __name__ == "__main__":
  sys.exit(run(sys.argv[1:]))
