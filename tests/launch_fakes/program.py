"""Plays the training on a fake worker, or a SLURM task: notes its arguments, does what it is told.

`FAKE_GCLOUD`/program-WORKER.json lists, for each start: 'ok', 'fail', 'hang' (until TERM,
then 0, as sr_jax), 'deaf' (until KILL).
"""

import json
import os
import pathlib
import signal
import sys
import time

root = pathlib.Path(os.environ["FAKE_GCLOUD"])
worker = os.environ.get("SLURM_PROCID") or pathlib.Path(os.environ["HOME"]).name
starts = root / f"starts-{worker}.jsonl"
note = {
  "argv": sys.argv[1:],
  "cwd": os.getcwd(),
  "commit": os.environ.get("SR_JAX_COMMIT", ""),
  "files": sorted(os.listdir()),
}
with open(starts, "a") as file:
  file.write(json.dumps(note) + "\n")
number = len(starts.read_text().splitlines())
story = json.loads((root / f"program-{worker}.json").read_text())
what = story[min(number, len(story)) - 1]
print(f"start {number}: {what}", flush=True)


def leave(*_) -> None:
  time.sleep(0.3)  # a checkpoint takes its time
  print("saved a checkpoint", flush=True)
  sys.exit(0)


if what in ("hang", "deaf"):
  signal.signal(signal.SIGTERM, leave if what == "hang" else signal.SIG_IGN)
  (root / f"ready-{worker}").touch()
  end = time.monotonic() + 60  # no test may leave it behind
  while time.monotonic() < end:
    time.sleep(0.05)
sys.exit(1 if what == "fail" else 0)
