"""RUN/lock: one holder for each run, so that two trainings never write into one folder.

The file names who holds the run: host, process, and when that process started. A start that finds
it looks whether the holder lives. On the same machine the system knows. On another machine nobody
does, so a holder renews its lock every few seconds, and one that nobody renewed for a while is of a
holder that died. No two clocks are compared: who waits watches whether the file changes. In a
bucket the lock is an object that is written only over the generation that was read.
"""

import contextlib
import errno
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from sr_jax import UserError, printable
from sr_jax.machine.holders import LARGEST, FileLock, Seen, end, here, holder_of, living, myself
from sr_jax.machine.meeting import group, let_others_leave, meet
from sr_jax.machine.stop import Stop
from sr_jax.runs import storage

NAME = "lock"
RENEW_SECONDS = 10
# Four renewals: a machine that is short of memory may miss one.
DEAD_SECONDS = 45


@contextlib.contextmanager
def held(run: storage.Folder, stop: Stop | None = None) -> Iterator[None]:
  """Holds a run until the block ends; all processes of a run must call it, and the first one holds.

  A folder that nobody can write to is not locked.

  Args:
    run: the run's folder, which is made if it is not there, and removed again if it stays empty.
    stop: ends the process at a signal; it gives the lock back before.

  Raises:
    UserError: another run holds it; the error names the holder. Or the lock cannot be written.
  """
  mine, problem = None, ""
  if group()[1] == 0:
    try:
      mine = _acquire(run)
    except (UserError, OSError) as error:
      problem = str(error)
  if problem := meet(f"lock of {run.name}", problem)[0]:
    let_others_leave(f"sr_jax/after the lock of {run.name}")
    raise UserError(problem)
  if mine is None:
    yield
    return
  if stop:
    stop.at_exit.append(mine.release)
  try:
    yield
  finally:
    if stop:
      stop.at_exit.remove(mine.release)
    mine.release()


class _Lock:
  """A lock that this process holds, and the thread that renews it."""

  def __init__(self, place: Any, text: str, made: list[Any]):
    self._place, self._text, self._made = place, text, made
    self._released = threading.Event()
    self._thread = threading.Thread(target=self._renew, daemon=True)
    self._thread.start()

  def release(self) -> None:
    """Gives the run back; what goes wrong here is no reason to fail after the work is done."""
    self._released.set()
    self._thread.join(RENEW_SECONDS)  # or it might write the lock again
    with contextlib.suppress(Exception):
      self._place.remove(self._text)
    with contextlib.suppress(OSError):
      for folder in self._made:  # those that are empty
        folder.rmdir()

  def _renew(self) -> None:
    while not self._released.wait(RENEW_SECONDS):
      try:
        taken = not self._place.renew(self._text)
      except Exception as error:  # a network that is away; four of these in a row, and it is lost
        logging.warning("%s cannot be renewed: %s", self._place.path, printable(str(error)))
        continue
      if taken and not self._released.is_set():
        # It may not save: another process goes on from the last checkpoint by now.
        end(f"{self._place.path}: another process has taken this run over; ended")


def _acquire(run: storage.Folder) -> _Lock | None:
  """Takes a run's lock, or returns None where nobody can write."""
  if storage.is_bucket(run):
    place, made = BucketLock(run / NAME), []
  else:
    if run.exists() and not run.is_dir():
      raise UserError(
        f"{run} is a file; give the folder of a run, which is made if it is not there"
      )
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    place = FileLock(run / NAME)
  text = json.dumps(myself())
  renewed, dead = False, None
  while True:
    seen = place.read()
    if seen is not None and seen.text == text:  # a write whose answer was lost
      return _Lock(place, text, made)
    if seen is not None and seen != dead and (holder := living(seen.text)):
      if holder["here"] == here() or renewed:
        raise UserError(
          f"{run} is in use by process {holder['pid']} on {holder['host']}, since "
          f"{holder['since']}; wait until it ends, stop it, or give another --workdir"
        )
      logging.warning(
        "%s was in use by process %d on %s, since %s; watching for %d s whether it still is",
        run, holder["pid"], holder["host"], holder["since"], DEAD_SECONDS,
      )  # fmt: skip
      renewed = changes(place, seen)
      dead = None if renewed else seen
      continue
    try:
      taken = place.take(seen, text)
    except OSError as error:
      if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return None  # nobody else can write there either
      raise
    if taken:
      if seen is not None:
        holder = holder_of(seen.text)
        who = f"process {holder['pid']} on {holder['host']}" if holder else "an unreadable lock"
        logging.warning("%s: taken over from %s, which ended without giving it back", run, who)
      return _Lock(place, text, made)


def changes(place: Any, seen: Seen) -> bool:
  """Waits until a lock changes, or for so long that it would have been renewed; says whether."""
  deadline = time.monotonic() + DEAD_SECONDS
  while time.monotonic() < deadline:
    time.sleep(min(1, DEAD_SECONDS / 10))
    if place.read() != seen:
      return True
  return False


class BucketLock:
  """A lock in a bucket, which the service writes only over the generation that was read."""

  def __init__(self, path: storage.Folder):
    self.path, self._generation = path, 0

  def _blob(self):
    from google.cloud import storage as client_library

    name, _, rest = str(self.path).removeprefix("gs://").partition("/")
    return client_library.Client().bucket(name).blob(rest)

  def read(self) -> Seen | None:
    from google.api_core.exceptions import NotFound

    blob = self._blob()
    try:
      text = blob.download_as_bytes(end=LARGEST).decode(errors="replace")
    except NotFound:
      return None
    return Seen(text, blob.generation or 0)

  def take(self, seen: Seen | None, text: str) -> bool:
    return self._write(text, seen.mark if seen else 0)

  def renew(self, text: str) -> bool:
    if self._write(text, self._generation):
      return True
    seen = self.read()  # a write whose answer was lost is ours all the same
    if seen is None:  # somebody has removed it, and nobody holds the run but us
      return self.take(None, text)
    if seen.text != text:
      return False
    self._generation = seen.mark
    return True

  def remove(self, text: str) -> None:
    self._blob().delete(if_generation_match=self._generation)

  def _write(self, text: str, generation: int) -> bool:
    from google.api_core.exceptions import PreconditionFailed

    blob = self._blob()
    try:
      blob.upload_from_string(text, if_generation_match=generation)
    except PreconditionFailed:
      return False
    self._generation = blob.generation
    return True
