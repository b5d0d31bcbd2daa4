"""The cache folder, all of which can be made again, and the programs that JAX keeps there."""

import os
import pathlib
import sys
import time

PROGRAM_BYTES = 2 * 2**30  # of compiled programs that are kept


def cache_folder(cache_dir: str = "") -> pathlib.Path:
  """Returns the cache folder: `cache_dir`, else $SR_JAX_CACHE, else ~/.cache/sr_jax."""
  return pathlib.Path(cache_dir or os.environ.get("SR_JAX_CACHE") or "~/.cache/sr_jax").expanduser()


def keep_programs() -> None:
  """Lets JAX keep compiled programs in the cache folder, so that the next start need not compile.

  JAX_COMPILATION_CACHE_DIR names another folder; where it is '', nothing is kept. JAX recognises a
  program by everything that went into it, versions and kind of device too, and removes the ones
  used longest ago. Where JAX is not imported there is nothing to set: nothing is compiled.
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
  """Removes programs without the file that notes when they were used.

  With a single one of them, JAX keeps no more programs. A process that was killed while it wrote
  leaves them, and so does one that kept programs without a limit on their size. Those of the last
  minute stay: another process may be about to note their time.
  """
  try:
    for program in folder.glob("*-cache"):
      note = program.with_name(program.name.removesuffix("-cache") + "-atime")
      if not note.exists() and time.time() - program.stat().st_mtime > 60:
        program.unlink()
  except OSError:  # another process mends it too
    pass
