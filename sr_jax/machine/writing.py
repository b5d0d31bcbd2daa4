"""Writes files that are whole or not there, and never through a link that somebody has planted.

A folder may come from a stranger, with links under the names that a program is known to write to:
followed, they would cost a file elsewhere. So a new file is made under a random name that nobody
can foresee, and then renamed; one that is appended to is opened without following a link. Imports
nothing but the standard library.
"""

import contextlib
import errno
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO

# Where a system lacks these flags, it has no such links.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def new_file(path: pathlib.Path) -> Iterator[BinaryIO]:
  """Opens a file that appears under its name, in place of an old one, once the block has ended.

  A reader sees the old contents or the new ones, never a part; a link is replaced, not followed.
  After an error, or where the disk is full, the old file is still there and nothing else.

  Args:
    path: the file; its folder must exist.

  Raises:
    OSError: the file cannot be written; the error names it.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
  try:
    with _naming(path):
      # Opened by its name, so that the file has one: tifffile asks for it.
      with open(temporary, "x+b", opener=_open_no_link) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # or a power failure leaves an empty file under the name
      os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _open_no_link(path: str, flags: int) -> int:
  return os.open(path, flags | _NO_LINK, 0o666)


def write_file(path: pathlib.Path, contents: bytes | str) -> None:
  """Writes a file at once, as `new_file` does; text as UTF-8."""
  with new_file(path) as file:
    file.write(contents.encode() if isinstance(contents, str) else contents)


def open_to_append(path: pathlib.Path) -> BinaryIO:
  """Opens a file for appending and reading, which is made if it is not there.

  Raises:
    OSError: it cannot be opened, or it is a link or no plain file; the error names it.
  """
  path = pathlib.Path(path)
  with _naming(path):
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | _NO_LINK, 0o666)
  return os.fdopen(number, "ab+")


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
  """Gives the system's error the name that people know, and says what a link is."""
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ELOOP, errno.EMLINK):
      raise OSError(
        error.errno, "it is a symbolic link, which is never written through; remove it", str(path)
      ) from error
    unnamed = error.filename is None or os.fspath(error.filename).endswith(".tmp")
    if error.errno is None or not unnamed:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error
