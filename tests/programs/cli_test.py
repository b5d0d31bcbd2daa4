"""Tests of sr_jax/cli.py and of how the programs end: one line, or a traceback for a bug."""

import os
import pathlib
import re
import subprocess
import sys
import time

import jax
import pytest
from tiny_models import make_model

from sr_jax import cli
from sr_jax import convert
from sr_jax import evaluate
from sr_jax import interpolate
from sr_jax.models.write import save_model
from sr_jax import upscale

ROOT = pathlib.Path(__file__).resolve().parents[2]


def python(*arguments, **environment) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, *map(str, arguments)],
    capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment},
  )  # fmt: skip


def fail(error: str, **environment) -> subprocess.CompletedProcess:
  """A program whose main raises `error`."""
  program = f"""
import sys
from sr_jax import MissingPackageError, UserError, cli

def main(argv):
  print("begun", argv)
  raise {error}

cli.guarded(main)(sys.argv[1:])
"""
  return python("-c", program, "--flag", **environment)


@pytest.mark.parametrize(
  "error",
  [
    MemoryError("Unable to allocate 3.00 GiB for an array"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes."),
  ],
)
def test_a_lack_of_memory_ends_any_program_in_one_line(error):
  def main(argv):
    raise error

  with pytest.raises(
    SystemExit, match=r"^error: the memory does not suffice: 3.22 GB could .*--tile"
  ):
    cli.guarded(main)([])

  def other(argv):
    raise RuntimeError("out of order")

  with pytest.raises(RuntimeError, match="out of order"):
    cli.guarded(other)([])


@pytest.mark.parametrize(
  "error, message",
  [
    ("UserError('scale=5 must be 4')", "scale=5 must be 4"),
    ("FileNotFoundError('runs/x does not exist')", "runs/x does not exist"),
    ("PermissionError(13, 'Permission denied', '/out')", "[Errno 13] Permission denied: '/out'"),
    ("MissingPackageError('no TensorFlow')", "no TensorFlow"),
    ("BrokenPipeError(32, 'Broken pipe')", "[Errno 32] Broken pipe"),  # not that of the output
  ],
)
def test_what_a_user_can_mend_is_one_line(error, message):
  ended = fail(error)
  assert (ended.returncode, ended.stderr) == (1, f"error: {message}\n")
  assert ended.stdout == "begun ['--flag']\n"


@pytest.mark.parametrize(
  "error",
  [
    "KeyError('x')",
    "TypeError('a bug')",
    "RuntimeError('XLA')",
    "ValueError('zip() argument 2 is shorter than argument 1')",
    "ImportError('cannot import name')",
    "FloatingPointError('invalid value')",
  ],
)
def test_a_bug_keeps_its_traceback(error):
  ended = fail(error)
  assert ended.returncode == 1
  assert ended.stderr.startswith("Traceback (most recent call last):")
  assert ended.stderr.splitlines()[-1].startswith(error.split("(")[0])


def test_the_traceback_on_request():
  ended = fail("UserError('scale=5 must be 4')", SR_JAX_TRACEBACK="1")
  assert ended.returncode == 1
  assert "Traceback" in ended.stderr and "in main" in ended.stderr
  assert ended.stderr.splitlines()[-1] == "sr_jax.UserError: scale=5 must be 4"


def test_a_reader_that_has_seen_enough_is_no_error():
  code = "from sr_jax import cli; cli.guarded(lambda argv: print('x' * 10**6, flush=True))([])"
  with subprocess.Popen(
    [sys.executable, "-c", code],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  ) as program:
    program.stdout.read(1)
    program.stdout.close()  # as `head` does
    assert program.stderr.read() == ""
  assert program.returncode == 141  # as of a program that SIGPIPE ended


def test_success_is_silent():
  def main(argv):
    """Documented."""
    assert argv == ["--x"]

  guarded = cli.guarded(main)
  assert guarded(["--x"]) is None
  assert guarded.__doc__ == "Documented."


@pytest.mark.parametrize(
  "main, arguments",
  [
    (convert.main, "--input none.npz --output x.npz"),
    (evaluate.main, "--model none.npz --data skimage:test --output out"),
    (interpolate.main, "--psnr none.npz --gan none.npz --output x.npz"),
    (upscale.main, "--model none.npz --input {photo} --output out"),
  ],
)
def test_every_program_names_a_missing_model(tmp_path, monkeypatch, main, arguments):
  monkeypatch.chdir(tmp_path)
  photo = tmp_path / "in" / "a.png"
  photo.parent.mkdir()
  photo.touch()
  with pytest.raises(SystemExit) as exit_with:
    cli.guarded(main)(arguments.format(photo=photo).split())
  assert exit_with.value.code.startswith("error: none.npz does not exist; give")
  assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("main", [convert.main, evaluate.main, interpolate.main, upscale.main])
def test_every_program_explains_itself(main, capsys):
  with pytest.raises(SystemExit) as exit_with:
    main(["--help"])
  assert exit_with.value.code == 0
  assert "usage: python -m sr_jax." in capsys.readouterr().out
  with pytest.raises(SystemExit) as exit_with:
    main(["--no_such_flag"])
  assert exit_with.value.code == 2
  assert re.search("required|unrecognized arguments: --no_such_flag", capsys.readouterr().err)


def test_a_program_from_the_shell(tmp_path):
  for name, seed in (("psnr", 1), ("gan", 2)):
    save_model(tmp_path / f"{name}.npz", make_model(seed=seed))
  arguments = ["-m", "sr_jax.interpolate", "--psnr", tmp_path / "psnr.npz"]
  arguments += ["--gan", tmp_path / "gan.npz", "--alpha", "0.5"]
  ended = python(*arguments, "--output", tmp_path / "half.npz")
  assert ended.returncode == 0 and ended.stdout.endswith("half.npz: rrdbnet x4, alpha 0.5\n")
  assert "does not record that it was fine-tuned" in ended.stderr  # warnings reach the screen
  ended = python(*arguments, "--output", tmp_path / "half.pdf")
  assert ended.returncode == 1
  assert ended.stderr.splitlines()[-1].startswith("error: ")
  assert "half.pdf: suffix must be .safetensors, .npz" in ended.stderr
  assert "Traceback" not in ended.stderr


COMPILES = """
import sys
import jax
from sr_jax import cli

def main(argv):
  jax.jit(lambda x: jax.numpy.sin(x @ x.T @ x))(jax.numpy.ones((9, 9)))
  print(jax.config.jax_compilation_cache_dir)

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
cli.guarded(main)(sys.argv[1:])
"""


def test_programs_are_kept_for_the_next_start(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  result = python("-c", COMPILES, SR_JAX_CACHE=str(tmp_path))
  assert result.stdout.strip() == str(tmp_path / "programs")
  kept = sorted(path.name for path in (tmp_path / "programs").iterdir())
  assert any("jit" in name for name in kept)
  python("-c", COMPILES, SR_JAX_CACHE=str(tmp_path))
  assert {p.name for p in (tmp_path / "programs").iterdir() if p.name.endswith("-cache")} == {
    name for name in kept if name.endswith("-cache")
  }


@pytest.mark.parametrize("place", ["", "elsewhere"])
def test_who_names_a_place_for_programs_is_heard(tmp_path, place):
  place = place and str(tmp_path / place)
  result = python("-c", COMPILES, SR_JAX_CACHE=str(tmp_path), JAX_COMPILATION_CACHE_DIR=place)
  assert result.stdout.strip() == place
  assert not (tmp_path / "programs").exists()


def test_without_a_place_for_programs_it_works_all_the_same(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  (tmp_path / "file").write_text("")
  result = python("-c", COMPILES, SR_JAX_CACHE=str(tmp_path / "file"))
  assert result.returncode == 0 and result.stdout.strip() == "None"


@pytest.mark.parametrize("age, kept", [(3600, False), (0, True)])
def test_a_program_half_kept_does_not_keep_others_out(tmp_path, monkeypatch, age, kept):
  """JAX keeps no program more where it finds one without the note of its time."""
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  programs = tmp_path / "programs"
  programs.mkdir()
  for name in ("half-cache", "whole-cache", "whole-atime"):
    (programs / name).write_bytes(bytes(8))
    os.utime(programs / name, (time.time() - age,) * 2)
  python("-c", COMPILES, SR_JAX_CACHE=str(tmp_path))
  names = {path.name for path in programs.iterdir()}
  assert {"whole-cache", "whole-atime"} <= names
  assert ("half-cache" in names) == kept  # of this minute: another process may be writing it
  assert any("jit" in name for name in names) != kept


def test_tensorstores_own_error_of_the_disk_is_one_line():
  def full(argv):
    raise ValueError(
      'Error writing "/r/d/0": Error writing local file "/r/d/0.__lock": Failed to write\n'
      "[os_error_code='28'] [tensorstore_spec='...']"
    )

  with pytest.raises(SystemExit) as ended:
    cli.guarded(full)([])
  assert str(ended.value) == "error: [Errno 28] No space left on device: /r/d/0.__lock"


def test_another_value_error_is_a_fault_and_keeps_its_traceback():
  def faulty(argv):
    raise ValueError("os_error_code")

  with pytest.raises(ValueError, match="os_error_code"):
    cli.guarded(faulty)([])
