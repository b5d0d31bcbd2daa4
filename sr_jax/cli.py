"""What all programs do alike: where they keep things, and how they fail, in one line."""

import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

from absl import logging

PROGRAM_BYTES = 2 * 2**30  # of compiled programs that are kept


def guarded(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
  """Wraps a program's `main`: what a user can mend ends in one line and exit status 1.

  Such errors are ValueError, OSError (no such file, no permission, a full disk), ImportError, and
  FloatingPointError (a loss that is not finite); with SR_JAX_TRACEBACK=1 in the environment they
  show where they came from. Anything else is a bug and keeps its traceback.
  """

  @functools.wraps(main)
  def wrapper(argv: Sequence[str]) -> None:
    keep_programs()
    logging.set_verbosity(logging.WARNING)  # Orbax tells forty lines a checkpoint at INFO
    try:
      main(argv)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
      if os.environ.get("SR_JAX_TRACEBACK"):
        raise
      sys.exit(f"error: {error}")

  return wrapper


def cache_folder(cache_dir: str = "") -> pathlib.Path:
  """Returns the folder of what can be made again: `cache_dir`, $SR_JAX_CACHE, ~/.cache/sr_jax."""
  return pathlib.Path(cache_dir or os.environ.get("SR_JAX_CACHE") or "~/.cache/sr_jax").expanduser()


def keep_programs() -> None:
  """Lets JAX keep compiled programs in the cache folder, so that the next start need not compile.

  JAX_COMPILATION_CACHE_DIR names another folder, or with '' none. A program is known by all that
  went into it, versions and kind of device too; the ones used longest ago make room. What does not
  import JAX compiles nothing.
  """
  jax = sys.modules.get("jax")
  if not jax or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  try:
    folder = cache_folder() / "programs"
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # not ours to write, or nobody's home: it works without
    return
  if os.access(folder, os.W_OK):
    _mend_programs(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", PROGRAM_BYTES)


def _mend_programs(folder: pathlib.Path) -> None:
  """Removes programs that JAX has not noted the time of: one such, and it keeps no program more.

  A process that was killed while it wrote leaves them, and so does one that kept programs without a
  limit; those of the last minute may be another process's, which will note the time.
  """
  try:
    for program in folder.glob("*-cache"):
      note = program.with_name(program.name.removesuffix("-cache") + "-atime")
      if not note.exists() and time.time() - program.stat().st_mtime > 60:
        program.unlink()
  except OSError:  # another process mends it too
    pass
