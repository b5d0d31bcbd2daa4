"""Says who holds something, in a file that another process, perhaps elsewhere, reads: a lock.

A holder is named by its machine, its process's number, and when that process started, since numbers
are used again. On its own machine the system knows whether it lives.
"""

import contextlib
import datetime
import json
import os
import pathlib
import platform
import uuid
from typing import Any, NamedTuple

from sr_jax import printable
from sr_jax.machine import folders
from sr_jax.machine.writing import write_file

LARGEST = 4096  # bytes of a lock that are read


class Seen(NamedTuple):
  """A lock that was found: its text, and a mark that changes with each renewal."""

  text: str
  mark: int


def myself() -> dict[str, Any]:
  """Returns what a lock says about its holder."""
  return {
    "host": platform.node(),
    "pid": os.getpid(),
    "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    "here": here(),
    "started": started(os.getpid()),
    "token": uuid.uuid4().hex,  # one process may try twice in a millisecond
  }


def holder_of(text: str) -> dict[str, Any] | None:
  """Parses a lock, which may be anybody's; None if it is none."""
  try:
    told = json.loads(text)
    types = {"host": str, "pid": int, "since": str, "here": str, "started": str}
    if all(type(told[name]) is kind for name, kind in types.items()) and told["pid"] > 0:
      return {**told, **{name: printable(told[name][:80]) for name in ("host", "since")}}
  except (ValueError, LookupError, TypeError, RecursionError):
    pass
  return None


def living(text: str) -> dict[str, Any] | None:
  """Returns a lock's holder if it may live, which nobody knows of one on another machine."""
  holder = holder_of(text)
  if holder and holder["here"] == here() and started(holder["pid"]) != holder["started"]:
    return None
  return holder


def here() -> str:
  """Names the machine, its last start, and the space of process numbers: one name, one system."""
  parts = [platform.node()]
  with contextlib.suppress(OSError):
    parts.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    parts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(parts)


def started(pid: int) -> str:
  """Says when a process of this machine started, in its system's words; '' if there is none."""
  try:
    # The name of the program, in brackets, may hold anything.
    fields = (
      pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    )
    return "" if fields[0] in "ZX" else fields[19]  # dead, but its parent has not asked for it
  except (OSError, IndexError):
    pass
  if os.path.isdir("/proc/self") or os.name == "nt":
    return ""
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return ""
  except PermissionError:
    pass
  return "unknown"


class FileLock:
  """A lock in a folder. It changes hands under the system's own lock, where there is one."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def read(self) -> Seen | None:
    try:
      if self.path.is_symlink() or not self.path.is_file():
        return Seen("", 0) if os.path.lexists(self.path) else None
      with open(self.path, "rb") as file:
        return Seen(file.read(LARGEST).decode(errors="replace"), self.path.stat().st_mtime_ns)
    except FileNotFoundError:
      return None

  def take(self, seen: Seen | None, text: str) -> bool:
    with folders.locked(self.path, "starting in"):
      if self.read() != seen:
        return False
      write_file(self.path, text)
      return True

  def renew(self, text: str) -> bool:
    seen = self.read()
    if seen is None:  # somebody has removed it, and nobody holds the run but us
      return self.take(None, text)
    if seen.text != text:
      return False
    os.utime(self.path)
    return True

  def remove(self, text: str) -> None:
    seen = self.read()
    if seen and seen.text == text:
      self.path.unlink()


def end(line: str) -> None:
  """Ends the process at once, with a line that says why."""
  print(line, flush=True)
  os._exit(1)
