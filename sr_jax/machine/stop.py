"""Handles SIGTERM and Ctrl-C: when a run stops, and with which exit status."""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import jax

from sr_jax.machine.meeting import exchange, group, let_others_leave
from sr_jax.machine.signals import stopped_status


class Stop:
  """Notices that the run is to stop: SIGTERM (preemption) or SIGINT (Ctrl-C) to any process of it.

  While there is something to save, from the first step of a stage to its last checkpoint, a signal
  makes all processes stop after the same step. Before and after, it ends them at once, with
  `stopped_status`, whatever they are doing. A second Ctrl-C does not wait for the saving. Threads
  listen, since Python's own handlers wait for a
  compilation to end. Without `install` nothing is noticed.
  """

  def __init__(self):
    self._lock = threading.Lock()  # held while the processes agree, so that none begins a step
    self._calls, self._in_steps = 0, False
    self._signal, self._last_call = "", 0
    self._status = stopped_status()
    self._wakeup, self._before, self._listener = None, {}, None
    self._uninstalled = threading.Event()
    self.at_exit: list[Callable[[], None]] = []  # called before a signal ends the process

  def install(self) -> "Stop":
    """Takes over both signals. Call it again after `cluster.start` to hear other processes' too."""
    if self._wakeup is None:
      read, write = os.pipe()
      os.set_blocking(write, False)
      self._wakeup = write, signal.set_wakeup_fd(write, warn_on_full_buffer=False)
      threading.Thread(target=self._hear_signals, args=(read,), daemon=True).start()
      for number in (signal.SIGTERM, signal.SIGINT):  # the thread does the work
        self._before[number] = signal.signal(number, lambda number, frame: None)
    if group()[2] > 1 and self._listener is None:
      self._listener = threading.Thread(target=self._hear_others, daemon=True)
      self._listener.start()
      atexit.register(self.uninstall)
    return self

  def uninstall(self) -> None:
    """Gives both signals back to the handlers that they had before."""
    self._uninstalled.set()
    if self._listener:
      self._listener.join()
    if self._wakeup:
      (write, before), self._wakeup = self._wakeup, None
      signal.set_wakeup_fd(before)
      os.close(write)  # ends the thread that reads
    for number, before in self._before.items():
      signal.signal(number, before or signal.SIG_DFL)

  def __call__(self) -> str:
    """Returns what stops the run, '' for nothing; every process must call it after every step."""
    with self._lock:
      self._calls, self._in_steps = self._calls + 1, True
      return self._signal if self._signal and self._calls >= self._last_call else ""

  @property
  def pending(self) -> str:
    """What will stop the run, '' for nothing; long work between steps can give way to it."""
    return self._signal

  @property
  def reason(self) -> str:
    """Names what stopped work that gave way: a signal to this process, or to another."""
    return self._signal or "a signal to another process"

  def request(self, what: str) -> None:
    """Stops a run of one process after its next step, for a program that calls sr_jax itself."""
    self._signal, self._last_call = what, 0

  def saved(self) -> None:
    """Says that there is nothing to save until the next step."""
    with self._lock:
      self._in_steps = False

  def _hear_signals(self, pipe: int) -> None:
    interrupted = None  # when the first Ctrl-C came
    while byte := os.read(pipe, 1):
      if byte[0] not in (signal.SIGTERM, signal.SIGINT):  # another handler's signal
        continue
      name = signal.Signals(byte[0]).name
      if byte[0] == signal.SIGINT and interrupted is None:
        interrupted = time.monotonic()
      elif byte[0] == signal.SIGINT:
        # A terminal and what it runs in may both send the first one.
        if time.monotonic() - interrupted > 0.2:
          print(f"{name} again: ended without saving", flush=True)
          self._leave(128 + signal.SIGINT)
        continue
      with self._or_end_at_once(name):
        if self._listener:  # which hears it as it does the others'
          group()[0].key_value_set(_STOP_KEY, name, allow_overwrite=True)
        else:
          self.agree(name)
    os.close(pipe)

  def _hear_others(self) -> None:
    # Asks again and again: a call that waits could not be ended before Python shuts down, and then
    # it would take the process with it.
    client, _, count = group()
    while not self._uninstalled.wait(1 + count / 500):
      try:
        name = client.key_value_try_get(_STOP_KEY)
      except jax.errors.JaxRuntimeError:  # nobody has set it
        continue
      with self._or_end_at_once(name):
        self.agree(name)
      return

  def agree(self, name: str) -> None:
    """Agrees with the other processes, which all call it, whether to save and after which step."""
    with self._lock:
      everyone = [[self._calls, self._in_steps]]
      if self._listener:
        everyone = exchange("sr_jax/state at a signal", everyone[0], 30)
      if any(in_steps for _, in_steps in everyone):
        print(f"{name}: saving after this step ...", flush=True)
        self._signal, self._last_call = name, max(calls for calls, _ in everyone) + 1
        return
      print(f"stopped by {name}; nothing was lost", flush=True)
      if self._listener:
        let_others_leave("sr_jax/leaving")
      self._leave(self._status)

  def _leave(self, status: int) -> None:
    for leave in self.at_exit[::-1]:
      leave()
    os._exit(status)

  @contextlib.contextmanager
  def _or_end_at_once(self, name: str):
    """Ends the process if it can no longer agree with the others, or it would ignore signals."""
    try:
      yield
    except Exception as error:  # a time-out, or whatever JAX raises where a process is gone
      print(f"{name}: ended without saving: {error}", flush=True)
      self._leave(1)


_STOP_KEY = "sr_jax/stop"
