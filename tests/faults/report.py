"""Plants the faults in full counts, and writes docs/reliability.md from what was seen.

  python tests/faults/report.py                     all of them, full counts: `make faults`
  python tests/faults/report.py --only damaged-step,bit-pack --most 30 --seconds 500
  python tests/faults/report.py --page              only the page, from docs/reliability.json

What was seen lies in docs/reliability.json, a record for each fault, which a later run replaces:
so counts can be planted piece by piece. Cases are drawn by their numbers, the same each time.
"""

import argparse
import datetime
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]

import conftest  # noqa: E402,F401  (the settings of every test)
from absl import logging  # noqa: E402
from planted import FAULTS, FAULTS_WITH_TESTS, OFFLINE, Fault  # noqa: E402
from sr_jax.machine import cpus  # noqa: E402

SEEN = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"


def count(name: str, fault: Fault, most: int, deadline: float) -> dict:
  """Plants a fault up to `most` times, until the deadline, and says what was survived."""
  record = {"tried": 0, "survived": 0, "seconds": [], "lost": {}, "note": fault.needs()}
  record["date"] = datetime.date.today().isoformat()
  record["machine"] = f"{cpus.kind()}, {cpus.available()} cores, Python {platform.python_version()}"
  with tempfile.TemporaryDirectory(prefix=f"faults_{name}_") as folder:
    for i in range(0 if record["note"] else most):
      if time.monotonic() > deadline:
        break
      place = pathlib.Path(folder, str(i))
      place.mkdir()
      record["tried"] += 1
      try:
        seconds = fault.plant(i, place)
      except Exception:
        record["lost"][str(i)] = traceback.format_exc().splitlines()[-1][:200]
        continue
      record["survived"] += 1
      record["seconds"] += [] if seconds is None else [seconds]
  seconds = record.pop("seconds")
  record["seconds"] = (
    [round(statistics.median(seconds), 2), round(max(seconds), 2)] if seconds else []
  )
  return record


def run_tests(name: str) -> dict:
  """Runs tests that exist for a fault, and counts those that passed."""
  _, arguments = FAULTS_WITH_TESTS[name]
  command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments.split()]
  if name == OFFLINE:  # in a network namespace of its own, which has only the loopback device
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  words = done.stdout.splitlines()[-1].replace(",", "").split() if done.stdout else []
  found = {
    what: int(words[words.index(what) - 1]) for what in ("passed", "failed") if what in words
  }
  tried = sum(found.values())
  return {
    "tried": tried,
    "survived": found.get("passed", 0),
    "seconds": [],
    "lost": {} if done.returncode == 0 else {"tests": done.stdout[-200:]},
    "note": "",
    "date": datetime.date.today().isoformat(),
    "machine": f"{cpus.kind()}, {cpus.available()} cores, Python {platform.python_version()}",
  }


def to_markdown(seen: dict) -> str:
  """Writes the page: a row for each fault that is planted, and where the others are tested."""
  rows = [
    "# Which faults a run survives",
    "",
    "Written by `make faults`, which plants each fault of `tests/faults/planted.py` and makes",
    "this page. A fault is survived where all that its row says held, bit for bit where it is of",
    "numbers. The seconds are those from the fault to a sound state: the median and the most. A",
    "count that is below the full one is said to be so. CI plants a few cases of each.",
    "",
    "| fault | tried | survived | seconds to recover | seen |",
    "| --- | --- | --- | --- | --- |",
  ]
  for name, fault in FAULTS.items():
    record = seen.get(name)
    if not record or not record["tried"]:
      why = record["note"] if record and record["note"] else "not planted yet"
      rows.append(f"| {fault.what} | 0 of {fault.full}: {why} | | | |")
      continue
    tried = f"{record['tried']:,}"
    if record["tried"] < fault.full:
      tried += f", below the full count of {fault.full:,}"
    seconds = "{:g}, at most {:g}".format(*record["seconds"]) if record["seconds"] else ""
    survived = f"{record['survived']:,}"
    if record["survived"] < record["tried"]:
      survived = f"**{survived}**"
    where = f"{record['date']}, {record['machine']}"
    rows.append(f"| {fault.what} | {tried} | {survived} | {seconds} | {where} |")
  rows += [
    "",
    "Other faults have tests of their own, which `make faults` runs too:",
    "",
    "| fault | tests | tried | passed | seen |",
    "| --- | --- | --- | --- | --- |",
  ]
  for name, (what, arguments) in FAULTS_WITH_TESTS.items():
    told = "not run yet | | |"
    if record := seen.get(name):
      told = f"{record['tried']} | {record['survived']} | {record['date']}, {record['machine']} |"
    rows.append(f"| {what} | `{arguments}` | {told}")
  lost = {name: record["lost"] for name, record in seen.items() if record["lost"]}
  if lost:
    rows += ["", "## What was not survived", ""]
    for name, cases in lost.items():
      rows += [f"* {name}, case {i}: `{why}`" for i, why in list(cases.items())[:5]]
  return "\n".join(rows) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--only", default="", help="names of faults; all by default")
  parser.add_argument("--most", type=int, default=0, help="how many cases of each at most")
  parser.add_argument("--seconds", type=float, default=1e9, help="after which no case is begun")
  parser.add_argument("--page", action="store_true", help="write the page only")
  args = parser.parse_args()
  logging.set_verbosity(logging.FATAL)  # what is damaged is said, a thousand times over
  deadline = time.monotonic() + args.seconds
  seen = json.loads(SEEN.read_text()) if SEEN.exists() else {}
  wanted = args.only.split(",") if args.only else [*FAULTS, *FAULTS_WITH_TESTS]
  for name in [] if args.page else wanted:
    if time.monotonic() > deadline:
      break
    if name in FAULTS:
      most = min(args.most or FAULTS[name].full, FAULTS[name].full)
      seen[name] = count(name, FAULTS[name], most, deadline)
    else:
      seen[name] = run_tests(name)
    print(f"{name}: {seen[name]['survived']} of {seen[name]['tried']}", seen[name]["lost"] or "")
    SEEN.write_text(json.dumps(seen, indent=1) + "\n")
  PAGE.write_text(to_markdown(seen))


if __name__ == "__main__":
  main()
