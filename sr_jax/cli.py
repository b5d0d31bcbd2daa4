"""What all programs share: they keep compiled programs, and report errors in one line."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

from absl import logging

from sr_jax import UserError
from sr_jax.machine import cache


def guarded(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
  """Wraps a program's `main`: an error that the user can mend prints one line and exits with 1.

  Such errors are UserError and OSError (no such file, no permission, a full disk); with
  SR_JAX_TRACEBACK=1 in the environment they print their traceback too. Anything else is a bug and
  keeps its traceback.
  """

  @functools.wraps(main)
  def wrapper(argv: Sequence[str]) -> None:
    cache.keep_programs()
    logging.set_verbosity(logging.WARNING)  # at INFO Orbax logs forty lines a checkpoint
    try:
      main(argv)
    except (UserError, OSError) as error:
      if os.environ.get("SR_JAX_TRACEBACK"):
        raise
      sys.exit(f"error: {error}")

  return wrapper
