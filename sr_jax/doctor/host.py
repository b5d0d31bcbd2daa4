"""Checks the machine: CPUs, memory, disks, and the GPUs that the driver sees."""

import argparse
import os
import pathlib
import shutil
import tempfile

from sr_jax.machine import cpus
from sr_jax.machine.memory import memory
from sr_jax.doctor.finding import FAULT, GIB, OK, WARNING, Finding, Findings
from sr_jax.machine.paths import user_path

# Rules of thumb: three checkpoints of both stages of ESRGAN take about 4 GB, DIV2K decoded 8 GB.
LOW_DISK, TOO_LOW_DISK = 5 * GIB, 1 * GIB
LOW_MEMORY = 4 * GIB

LOW_OPEN_FILES = 1024


def check_machine(args: argparse.Namespace) -> Findings:
  """Checks CPUs, memory, and the limit of open files."""
  del args
  count, what = cpus.allowed(), f"{cpus.allowed()} of {os.cpu_count()} CPUs"
  if cpus.quota() < count:
    count = cpus.quota()
    what = f"{count:.1f} CPUs by the container's quota"
  if count < 2:
    remedy = "ask for more: SLURM --cpus-per-task=8, docker --cpus=8, Kubernetes resources.cpu"
    yield Finding(WARNING, "cpus-few", f"{what}: decoding and compiling will be slow", remedy)
  else:
    yield Finding(OK, "", what)

  free, total = memory()
  if free and free < LOW_MEMORY:
    what = f"{free / GIB:.1f} GiB of memory free, of {total / GIB:.1f}"
    remedy = "end other programs, or ask for more: SLURM --mem=16G, docker --memory=16g"
    yield Finding(WARNING, "memory-low", what, remedy)
  elif free:
    yield Finding(OK, "", f"{free / GIB:.1f} GiB of memory free, of {total / GIB:.1f}")

  try:
    import resource
  except ImportError:  # Windows
    return
  files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  if 0 <= files < LOW_OPEN_FILES:
    what = f"{files} files may be open at once; checkpoints and data need more"
    yield Finding(WARNING, "open-files-low", what, f"ulimit -n {max(4096, files)}")


def check_disk(args: argparse.Namespace) -> Findings:
  """Checks the folders of runs and of decoded images: their room, and a file written and read."""
  for flag, folder in (("--workdir", args.workdir), ("--cache", args.cache)):
    yield from _check_folder(flag, folder)


def _check_folder(flag: str, name: str) -> Findings:
  if "://" in name:
    remedy = "try a short run there, such as --config configs/esrgan.py:demo"
    yield Finding(WARNING, "not-local", f"{flag}={name} is no local folder: untested", remedy)
    return
  folder = user_path(name).absolute()
  existing = folder
  while not os.path.lexists(existing):  # the run makes what is missing; the doctor does not
    existing = existing.parent
  if not existing.is_dir():
    what = f"{flag}={folder}: {existing} is no folder (a file, or a link to nowhere)"
    yield Finding(FAULT, "not-a-folder", what, f"give another {flag}, or move that file away")
    return
  free = shutil.disk_usage(existing).free
  room = f"{flag}={folder}: {free / GIB:.1f} GiB free"
  remedy = f"make room, or give a {flag} on another disk"
  if free < TOO_LOW_DISK:
    yield Finding(FAULT, "disk-full", room, remedy)
  elif free < LOW_DISK:
    yield Finding(WARNING, "disk-low", f"{room}; checkpoints of ESRGAN need some 4 GiB", remedy)
  problem = write_test(existing)
  if problem:
    remedy = f"make it writable (chown, chmod; a quota? a read-only mount?), or give another {flag}"
    yield Finding(FAULT, "not-writable", f"{flag}={folder}: {problem}", remedy)
  elif free >= LOW_DISK:
    yield Finding(OK, "", f"{room}, written and read back")


def write_test(folder: pathlib.Path, size: int = 2**20) -> str:
  """Writes a file, reads it back and deletes it; returns what went wrong, '' for nothing."""
  wrote = os.urandom(size)
  try:
    with tempfile.TemporaryDirectory(prefix=".sr_jax_doctor_", dir=folder) as inside:
      first, second = pathlib.Path(inside, "new"), pathlib.Path(inside, "test")
      with open(first, "wb") as file:
        file.write(wrote)
        file.flush()
        os.fsync(file.fileno())
      os.replace(first, second)  # as checkpoints and images are published
      read = second.read_bytes()
  except OSError as error:
    return f"cannot write there: {error}"
  return "" if read == wrote else f"{size} bytes were written and others read back: a broken disk"
