"""The cache folder, which may be deleted at any time, and the programs that JAX keeps there."""

import os
import pathlib
import sys
import time

from sr_jax.machine.paths import user_path

PROGRAM_BYTES = 2 * 2**30  # bytes of compiled programs that are kept


def cache_folder(cache_dir: str = "") -> pathlib.Path:
  """Returns the cache folder: `cache_dir`, else $SR_JAX_CACHE, else ~/.cache/sr_jax."""
  return user_path(cache_dir or os.environ.get("SR_JAX_CACHE") or "~/.cache/sr_jax")


def keep_programs() -> None:
  """Lets JAX keep compiled programs in the cache folder, so that the next start need not compile.

  JAX_COMPILATION_CACHE_DIR names another folder; if it is '', nothing is kept. JAX recognises a
  program by everything that went into it, including versions and the kind of device, and removes
  the programs that were used longest ago. If JAX is not imported, nothing is set, because nothing
  is compiled.
  """
  jax = sys.modules.get("jax")
  if not jax or "JAX_COMPILATION_CACHE_DIR" in os.environ:
    return
  try:
    folder = cache_folder() / "programs"
    folder.mkdir(parents=True, exist_ok=True)
  except (OSError, RuntimeError):  # no permission, or no home folder: it works without
    return
  if os.access(folder, os.W_OK):
    _mend_programs(folder)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", PROGRAM_BYTES)


def _mend_programs(folder: pathlib.Path) -> None:
  """Removes programs that lack the file which notes when they were used.

  Because of a single such program, JAX would keep no more programs. A process that is killed while
  it writes leaves one, and so does a process that keeps programs without a limit on their size.
  Those of the last minute stay, since another process may be about to note their time.
  """
  try:
    for program in folder.glob("*-cache"):
      note = program.with_name(program.name.removesuffix("-cache") + "-atime")
      if not note.exists() and time.time() - program.stat().st_mtime > 60:
        program.unlink()
  except OSError:  # another process mends it too
    pass
