"""Files are whole or not there, and nothing is written through a link."""

import errno
import os
import resource
import subprocess
import sys

import pytest

from sr_jax.machine import folders
from sr_jax.machine.writing import new_file, open_to_append, write_file


def test_a_link_is_replaced_and_what_it_leads_to_is_left(tmp_path):
  (tmp_path / "victim").write_text("precious")
  (tmp_path / "a.json").symlink_to(tmp_path / "victim")
  write_file(tmp_path / "a.json", "new")
  assert (tmp_path / "a.json").read_text() == "new" and not (tmp_path / "a.json").is_symlink()
  assert (tmp_path / "victim").read_text() == "precious"
  assert sorted(os.listdir(tmp_path)) == ["a.json", "victim"]


@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_appended_through_a_link(tmp_path, there):
  victim = tmp_path / "victim"
  if there:
    victim.write_text("precious")
  (tmp_path / "log").symlink_to(victim)
  with pytest.raises(OSError, match="symbolic link, which is never written through; remove it"):
    open_to_append(tmp_path / "log")
  assert victim.exists() == there and (not there or victim.read_text() == "precious")


def test_a_lock_is_not_taken_through_a_link(tmp_path):
  (tmp_path / "victim").write_text("precious")
  (tmp_path / "pack.lock").symlink_to(tmp_path / "victim")
  with pytest.raises(OSError, match="pack.lock"):
    with folders.locked(tmp_path / "pack"):
      pass
  assert (tmp_path / "victim").read_text() == "precious"


def test_the_temporary_name_cannot_be_foreseen(tmp_path):
  names = set()
  for _ in range(20):
    with new_file(tmp_path / "a") as file:
      file.write(b"x")
      names |= {name for name in os.listdir(tmp_path) if name != "a"}
  assert len(names) == 20 and all(len(name) > 32 for name in names)


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
  write_file(tmp_path / "a", "old")
  with pytest.raises(ZeroDivisionError):
    with new_file(tmp_path / "a") as file:
      file.write(b"half")
      raise ZeroDivisionError
  assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_full_disk_is_said_with_the_files_own_name(tmp_path):
  """A limit on the size of files stands for the disk, in a process of its own."""
  code = (
    "import pathlib, resource, signal, sys\n"
    "from sr_jax.machine.writing import write_file\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    f"resource.setrlimit(resource.RLIMIT_FSIZE, (1000, {resource.RLIM_INFINITY}))\n"
    "try:\n  write_file(pathlib.Path(sys.argv[1]), b'x' * 5000)\n"
    "except OSError as error:\n  print(error.errno, error.filename)\n"
  )
  write_file(tmp_path / "a", "old")
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True
  )
  assert done.stdout == f"{errno.EFBIG} {tmp_path}/a\n"
  assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_files_get_the_rights_that_the_user_asked_for(tmp_path):
  before = os.umask(0o027)
  try:
    write_file(tmp_path / "a", "x")
    open_to_append(tmp_path / "b").close()
  finally:
    os.umask(before)
  assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]
