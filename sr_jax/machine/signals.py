"""What a signal does before and beside a training: a program ends at once, in one line.

Importing JAX takes seconds, in which Python would answer SIGTERM with silence and Ctrl-C with a
traceback. So a program calls `end_at_signals` before its other imports; this module has none that
take time. A training hands its signals to `stop.py` afterwards, which saves first.
"""

import os
import signal

from sr_jax import UserError

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_ends: list[bool] = []  # whether `end_at_signals` was called, with `training`


def stopped_status() -> int:
  """Returns the exit status of a run that a signal stopped: 0, or $SR_JAX_STOPPED_STATUS.

  A launcher that takes 0 for the end of the training, as Kubernetes does, needs another status.

  Raises:
    UserError: SR_JAX_STOPPED_STATUS is not a number from 0 to 255.
  """
  status = os.environ.get("SR_JAX_STOPPED_STATUS") or "0"
  if not (status.isdigit() and int(status) < 256):
    raise UserError(f"SR_JAX_STOPPED_STATUS={status!r} must be a number from 0 to 255; try 143")
  return int(status)


def end_at_signals(*, training: bool = False) -> None:
  """Makes SIGTERM and Ctrl-C end the process at once, from now on.

  Args:
    training: whether the status is `stopped_status`, or 128 and the signal's number, as of other
      programs.
  """

  def end(number: int, frame: object) -> None:
    try:
      status = stopped_status() if training else 128 + number
    except UserError:
      status = 1
    os.write(1, f"stopped by {signal.Signals(number).name}; nothing was lost\n".encode())
    os._exit(status)

  _ends.append(training)
  for number in _NUMBERS:
    signal.signal(number, end)


class Stopped(KeyboardInterrupt):
  """What a signal raises in a program that is no training, so that it leaves no half file.

  Where a program heeds Ctrl-C by `except KeyboardInterrupt`, it heeds SIGTERM too.
  """


def raise_at_signals() -> None:
  """Makes the first signal raise Stopped, and a second Ctrl-C end the process at once.

  Only after `end_at_signals`: a program that is called as a function leaves signals to its caller.
  """
  if not _ends or _ends[-1]:
    return

  def stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise Stopped(signal.Signals(number).name)

  for number in _NUMBERS:
    signal.signal(number, stop)
