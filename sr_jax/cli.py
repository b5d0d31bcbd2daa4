"""How every program starts and how it fails: with one line where the user can mend it."""

import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app
from absl import flags
from absl import logging


def run(main: Callable[[list[str]], None], required: Sequence[str] = ()) -> None:
  """Parses flags, runs `main`, and turns what a user can mend into one line and exit status 1.

  Such errors are ValueError, FileNotFoundError and ImportError; `--verbosity=1` shows where they
  came from. Anything else is a bug and keeps its traceback.
  """
  if required:
    flags.mark_flags_as_required(list(required))

  def guarded(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f"error: unexpected argument {argv[1]!r}; flags are --name=value")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # Orbax tells forty lines a checkpoint at INFO
    try:
      main(argv)
    except (ValueError, FileNotFoundError, ImportError) as error:
      logging.vlog(1, "%s", traceback.format_exc())
      sys.exit(f"error: {error}")

  app.run(guarded)
