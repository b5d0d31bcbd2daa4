"""What all programs share: they keep compiled programs, and report errors in one line."""

import functools
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from sr_jax import UserError, harmless
from sr_jax.machine import cache
from sr_jax.machine import signals
from sr_jax.machine.memory import asked_for, ran_out


def guarded(main: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
  """Wraps a program's `main`: an error that the user can mend prints one line and exits with 1.

  Such errors are UserError, OSError (no such file, no permission, a full disk) and a lack of
  memory; with SR_JAX_TRACEBACK=1 in the environment they print their traceback too. Anything else
  is a bug and keeps its traceback.
  """

  @functools.wraps(main)
  def wrapper(argv: Sequence[str]) -> None:
    cache.keep_programs()
    logging.set_verbosity(logging.WARNING)  # at INFO Orbax logs forty lines a checkpoint
    logging.get_absl_logger().addFilter(_make_harmless)
    sys.unraisablehook = _show_unless_late
    signals.raise_at_signals()
    try:
      main(argv)
    except signals.Stopped as stopped:
      print(f"stopped by {stopped}", file=sys.stderr)
      sys.exit(128 + signal.Signals[str(stopped)])
    except (UserError, OSError) as error:
      if isinstance(error, BrokenPipeError) and _nobody_reads():
        sys.exit(128 + signal.SIGPIPE)
      if os.environ.get("SR_JAX_TRACEBACK"):
        raise
      sys.exit(harmless(f"error: {error}"))
    except ValueError as error:
      if not (told := _of_the_disk(error)) or os.environ.get("SR_JAX_TRACEBACK"):
        raise
      sys.exit(harmless(f"error: {told}"))
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
      if str(error).startswith("Symlink loop from"):  # of pathlib; from Python 3.13 on an OSError
        sys.exit(harmless(f"error: {error}; remove the symbolic link"))
      if not ran_out(error) or os.environ.get("SR_JAX_TRACEBACK"):
        raise
      sys.exit(
        f"error: the memory does not suffice{asked_for(error)}; give smaller images or crops "
        "(sr_jax.upscale --tile=192), or a machine with more memory"
      )

  return wrapper


def _nobody_reads() -> bool:
  """Whether it is standard output whose reader has seen enough, as of `head`, and no other pipe."""
  output = select.poll()
  output.register(1, 0)
  if not any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0)):
    return False
  os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
  return True


def _of_the_disk(error: ValueError) -> str:
  """Says an error of the system that tensorstore raises as its own; '' for any other error.

  It writes the arrays of checkpoints, and ends its error by [os_error_code='28'].
  """
  code = re.search(r"os_error_code='(\d+)'", str(error))
  if not code:
    return ""
  file = re.search(r'local file "([^"]+)"', str(error))
  return f"[Errno {code[1]}] {os.strerror(int(code[1]))}: {file[1] if file else 'a checkpoint'}"


def _show_unless_late(told: Any) -> None:
  """Shows an error that nobody could catch, but that of tensorstore's threads that come too late.

  Where a checkpoint cannot be written or read, Orbax has closed its loop by then, and the error has
  been told.
  """
  if not (told.exc_type is RuntimeError and str(told.exc_value) == "Event loop is closed"):
    sys.__unraisablehook__(told)


def _make_harmless(record: Any) -> bool:
  """Takes out of a message what a terminal would obey; names of files may hold anything."""
  record.msg, record.args = harmless(record.getMessage()), ()
  return True
