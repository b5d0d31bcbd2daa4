"""What SIGTERM and Ctrl-C do before, beside and during a training."""

import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A program that is in the middle of writing a file, as upscale is most of the time.
WRITING = """
import pathlib, sys, time
from sr_jax.machine.signals import end_at_signals
end_at_signals()
from sr_jax import cli
from sr_jax.machine.writing import new_file

def main(argv):
  with new_file(pathlib.Path(argv[0])) as file:
    file.write(b"half")
    print("here", flush=True)
    time.sleep(60)

cli.guarded(main)(sys.argv[1:])
"""
# A training that saves its step, which takes long.
SAVING = """
import time
from sr_jax.machine.stop import Stop
stop = Stop().install()
stop.at_exit.append(lambda: print("lock given back", flush=True))
stop()
print("here", flush=True)
time.sleep(60)
"""


def start(code: str, *arguments: str) -> subprocess.Popen:
  process = subprocess.Popen(
    [sys.executable, "-c", code, *arguments], cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  assert process.stdout.readline() == "here\n"
  return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_program_ends_in_one_line_and_leaves_no_half_file(tmp_path, number):
  process = start(WRITING, str(tmp_path / "a.png"))
  process.send_signal(number)
  _, told = process.communicate(timeout=10)
  assert told == f"stopped by {number.name}\n"
  assert process.returncode == 128 + number
  assert not list(tmp_path.iterdir())


def test_a_second_ctrl_c_does_not_wait_for_the_saving():
  process = start(SAVING)
  process.send_signal(signal.SIGINT)
  assert process.stdout.readline() == "SIGINT: saving after this step ...\n"
  process.send_signal(signal.SIGINT)  # of a terminal that sends it twice: ignored
  time.sleep(0.5)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  sent = time.monotonic()
  told, _ = process.communicate(timeout=10)
  assert time.monotonic() - sent < 2
  assert told == "SIGINT again: ended without saving\nlock given back\n"
  assert process.returncode == 128 + signal.SIGINT


def test_a_second_sigterm_waits_for_the_saving():
  """A launcher may send it several times."""
  process = start(SAVING)
  process.send_signal(signal.SIGTERM)
  assert process.stdout.readline() == "SIGTERM: saving after this step ...\n"
  time.sleep(0.5)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.5)
  assert process.poll() is None
  process.kill()
  process.communicate()
