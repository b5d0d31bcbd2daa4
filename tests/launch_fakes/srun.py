"""Plays srun on one machine: really starts --ntasks processes with SLURM's variables.

Forwards TERM to them; with --kill-on-bad-exit=1 one that fails ends all.
"""

import os
import signal
import subprocess
import sys
import time

argv = sys.argv[1:]
flags = {}
while argv and argv[0].startswith("--"):
  word = argv.pop(0)
  if word == "--":
    break
  name, _, value = word.partition("=")
  flags[name] = value
count = int(flags["--ntasks"])
tasks = []
for rank in range(count):
  own = {
    "SLURM_PROCID": str(rank),
    "SLURM_LOCALID": str(rank),
    "SLURM_NTASKS": str(count),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_STEP_NUM_NODES": "1",
  }
  tasks.append(subprocess.Popen(argv, env={**os.environ, **own}))


def forward(*_) -> None:
  for task in tasks:
    task.send_signal(signal.SIGTERM)


signal.signal(signal.SIGTERM, forward)
while any(task.poll() is None for task in tasks):
  if flags.get("--kill-on-bad-exit") == "1" and any(task.poll() for task in tasks):
    for task in tasks:
      task.kill()
  time.sleep(0.05)
statuses = [task.returncode for task in tasks]
print("srun: exit statuses", *statuses, flush=True)
sys.exit(max(map(abs, statuses)))
