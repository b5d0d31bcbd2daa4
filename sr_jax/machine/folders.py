"""Locks folders, and flushes files to the disk."""

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import BinaryIO

from absl import logging

from sr_jax.machine.writing import open_to_append

try:
  import fcntl
except ImportError:  # on Windows builds are not resumed, and do not wait for each other
  fcntl = None


@contextlib.contextmanager
def locked(folder: pathlib.Path, doing: str = "decoding into") -> Iterator[bool]:
  """Holds the lock of a folder; yields False if locks are impossible there and nobody is kept out.

  The system releases a lock when its holder dies.

  Args:
    folder: the folder, or another path beside which the lock lies.
    doing: what the holder does, for those who wait.
  """
  if fcntl is None:
    yield False
    return
  path = folder.with_name(f"{folder.name}.lock")
  while True:
    file = open_to_append(path)  # a link that was planted there is an error, and not emptied
    try:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        logging.warning("another process is %s %s; waiting for it", doing, folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
      file.close()
      path.unlink(missing_ok=True)
      yield False
      return
    if _is_at(file, path):
      break
    file.close()
  try:
    yield True
  finally:
    path.unlink(missing_ok=True)
    file.close()


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
  """Whether an open file is the one at its path: another may have removed or replaced it."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), path.stat())
  except FileNotFoundError:
    return False


def flush_to_disk(path: pathlib.Path) -> None:
  """Waits until a file's contents are on the disk."""
  with open(path, "rb") as file:
    os.fsync(file.fileno())
