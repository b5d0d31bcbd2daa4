"""One holder for each run, on a disk and in a bucket; a dead one is taken over, a living named."""
# ruff: noqa: F811  (fixtures are imported by name)

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from sr_jax import UserError
from sr_jax.machine import holders
from sr_jax.machine.holders import FileLock, myself, started
from sr_jax.machine.stop import Stop
from sr_jax.runs import lock
from sr_jax.runs import storage
from storage_test import bucket, needs_gcsfs  # noqa: F401  (fixtures)

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Takes the lock, says so, and stays until its input ends.
HOLDER = """
import pathlib, sys
from sr_jax.runs import lock
from sr_jax.runs.storage import run_folder
try:
  with lock.held(run_folder(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
except ValueError as error:
  print(error)
"""


@pytest.fixture(params=["disk", pytest.param("bucket", marks=needs_gcsfs)])
def run(request, tmp_path):
  """A run's folder, of a file system or in a bucket."""
  if request.param == "disk":
    return tmp_path / "run"
  request.getfixturevalue("bucket")
  return storage.run_folder(f"gs://bucket/{tmp_path.name}")


def write_lock(run, **changes) -> str:
  """Plants the lock of another holder, by default of a process of this machine that is dead."""
  text = json.dumps({**myself(), "pid": 2**22, "started": "1", **changes})
  if not storage.is_bucket(run):
    run.mkdir(parents=True)
  storage.write_text(run / "lock", text)
  return text


def start_holder(run) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", HOLDER, str(run)], cwd=ROOT, text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
  )  # fmt: skip


def test_a_second_holder_is_refused_by_name_and_the_first_one_leaves_nothing(run):
  with lock.held(run):
    with pytest.raises(UserError) as error:
      with lock.held(run):
        raise AssertionError("it was let in")
    assert f"{run} is in use by process {os.getpid()} on {os.uname().nodename}" in str(error.value)
    assert "\n" not in str(error.value)
  assert not (run / "lock").exists() and not run.exists()
  with lock.held(run):  # it is free again
    assert json.loads((run / "lock").read_text())["pid"] == os.getpid()


def test_a_process_that_was_killed_is_taken_over_at_once(run, caplog):
  holder = start_holder(run)
  assert holder.stdout.readline() == "held\n"
  with pytest.raises(UserError, match=f"in use by process {holder.pid} "):
    with lock.held(run):
      pass
  holder.kill()  # it is not waited for: a dead process that its parent has not buried
  while started(holder.pid):
    time.sleep(0.01)
  before = time.monotonic()
  with lock.held(run):
    assert time.monotonic() - before < 5
  assert f"taken over from process {holder.pid} on " in caplog.text
  holder.communicate()


def test_a_number_of_a_process_that_another_has_now_is_no_holder(run):
  write_lock(run, pid=os.getpid())  # which started at another time
  with lock.held(run):
    pass


@pytest.mark.parametrize("renewed", [True, False])
def test_a_holder_on_another_machine_lives_while_it_renews(run, monkeypatch, caplog, renewed):
  monkeypatch.setattr(lock, "DEAD_SECONDS", 1)
  monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
  text = write_lock(run, here="elsewhere", host="node7", pid=12)

  def renew(path=run / "lock"):
    storage.write_text(path, text)

  def watched(place, seen, changes=lock.changes):
    if renewed:
      renew()
    return changes(place, seen)

  monkeypatch.setattr(lock, "changes", watched)
  if renewed:
    with pytest.raises(UserError, match="in use by process 12 on node7, since .*another --workdir"):
      with lock.held(run):
        pass
    assert (run / "lock").read_text() == text
  else:
    with lock.held(run):
      assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
    assert "taken over from process 12 on node7" in caplog.text
  assert "watching for 1 s whether it still is" in caplog.text


def test_a_holder_renews_and_ends_where_it_was_taken_over(run, monkeypatch, capsys):
  monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
  ended = []
  monkeypatch.setattr(os, "_exit", ended.append)
  place = lock.BucketLock if storage.is_bucket(run) else FileLock
  with lock.held(run):
    seen = place(run / "lock").read()
    assert lock.changes(place(run / "lock"), seen), "it is not renewed"
    storage.write_text(run / "lock", "another's")
    for _ in range(100):
      if ended:
        break
      time.sleep(0.05)
  assert ended[0] == 1 and "another process has taken this run over" in capsys.readouterr().out
  assert (run / "lock").read_text() == "another's"


def test_a_lock_that_somebody_removed_is_written_again(run, monkeypatch):
  monkeypatch.setattr(lock, "RENEW_SECONDS", 0.05)
  with lock.held(run):
    (run / "lock").unlink()
    for _ in range(100):
      if (run / "lock").exists():
        break
      time.sleep(0.05)
    assert json.loads((run / "lock").read_text())["pid"] == os.getpid()
  assert not (run / "lock").exists()


@pytest.mark.parametrize(
  "text",
  ["", "{", "[]", '{"pid": -1}', "[" * 4000, "\x1b[2J", json.dumps({**myself(), "pid": "1"})],
)
def test_an_unreadable_lock_is_nobodys(tmp_path, text, caplog):
  (tmp_path / "lock").write_text(text)
  with lock.held(tmp_path):
    pass
  assert "taken over from an unreadable lock" in caplog.text and "\x1b" not in caplog.text


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_what_is_planted_in_the_place_of_a_lock_is_not_written_through(tmp_path, kind):
  victim = tmp_path / "victim"
  if kind == "link":
    victim.write_text("precious")
  if kind == "pipe":
    os.mkfifo(tmp_path / "lock")
  else:
    (tmp_path / "lock").symlink_to(victim)
  with lock.held(tmp_path):
    pass
  assert not os.path.lexists(tmp_path / "lock")
  assert victim.exists() == (kind == "link") and (kind != "link" or victim.read_text())


def test_of_many_that_start_together_one_holds(tmp_path):
  for attempt in range(10):
    write_lock(tmp_path / str(attempt))  # and they find a dead holder
    together, answers, done = threading.Barrier(8), [], threading.Event()

    def start(run=tmp_path / str(attempt), together=together, answers=answers, done=done):
      together.wait()
      try:
        with lock.held(run):
          answers.append("held")
          done.wait()
      except UserError as error:
        answers.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
      thread.start()
    while len(answers) < 8:
      time.sleep(0.001)
    done.set()
    for thread in threads:
      thread.join()
    assert sum(answer == "held" for answer in answers) == 1
    assert sum(f"in use by process {os.getpid()} " in answer for answer in answers) == 7


def test_a_folder_that_cannot_be_written_to_is_not_locked(tmp_path, monkeypatch):
  def refused(path, text):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(holders, "write_file", refused)
  with lock.held(tmp_path):
    assert not list(tmp_path.iterdir())


def test_a_signal_gives_the_lock_back(tmp_path, monkeypatch):
  monkeypatch.setattr(os, "_exit", lambda status: None)
  stop = Stop()
  with lock.held(tmp_path, stop):
    stop.agree("SIGTERM")
    assert not (tmp_path / "lock").exists()
  assert not stop.at_exit
