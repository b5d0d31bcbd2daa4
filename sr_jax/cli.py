"""How every program fails: with one line where the user can mend it."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

from absl import logging


def guarded(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
  """Wraps a program's `main`: what a user can mend ends in one line and exit status 1.

  Such errors are ValueError, OSError (no such file, no permission, a full disk), ImportError, and
  FloatingPointError (a loss that is not finite); with SR_JAX_TRACEBACK=1 in the environment they
  show where they came from. Anything else is a bug and keeps its traceback.
  """

  @functools.wraps(main)
  def wrapper(argv: Sequence[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells forty lines a checkpoint at INFO
    try:
      main(argv)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
      if os.environ.get("SR_JAX_TRACEBACK"):
        raise
      sys.exit(f"error: {error}")

  return wrapper
