"""The command `sr-jax`, from a copy that is installed outside of the checkout."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from sr_jax import command

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """Runs `sr-jax` of an installed copy in a folder without a checkout."""
  try:
    major = int(importlib.metadata.version("setuptools").split(".")[0])
  except importlib.metadata.PackageNotFoundError:
    major = 0
  if major < 77:  # [build-system] of pyproject.toml
    pytest.skip("no setuptools of version 77, with which a copy is installed without a network")
  place = tmp_path_factory.mktemp("installed")
  for name in ("sr_jax", "configs", "models"):  # a copy, because setuptools builds in it
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, place / "tree" / name, ignore=ignored)
  for name in ("pyproject.toml", "requirements.txt", "README.md"):
    shutil.copy(ROOT / name, place / "tree")
  subprocess.run(
    [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
     "--no-build-isolation", "--no-compile", f"--target={place / 'site'}", place / "tree"],
    check=True,
  )  # fmt: skip
  (place / "empty").mkdir()

  def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
      [sys.executable, place / "site" / "bin" / "sr-jax", *arguments], cwd=place / "empty",
      env={**os.environ, "PYTHONPATH": str(place / "site")}, capture_output=True, text=True,
    )  # fmt: skip

  return run


def test_every_program_is_a_command_of_an_installed_copy(installed):
  overview = installed("--help")
  assert overview.returncode == 0
  for name in command.COMMANDS:
    assert f"\n  {name} " in overview.stdout


@pytest.mark.parametrize(
  "name",
  [
    name if name in ("train", "upscale") else pytest.param(name, marks=pytest.mark.slow)
    for name in command.COMMANDS
  ],
)
def test_help_ends_well_and_its_examples_call_the_command(installed, name):
  result = installed(name, "--help")
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith(f"usage: sr-jax {name} ")
  assert f"\n  sr-jax {name} " in result.stdout  # an example, on a line of its own
  assert "python -m" not in result.stdout


def test_recipes_are_found_by_name_and_by_path_without_a_checkout(installed):
  by_name = installed("train", "--config", "esrgan:demo", "--list")
  assert by_name.returncode == 0, by_name.stderr
  assert "--config.total_steps " in by_name.stdout
  assert by_name.stdout == installed("train", "--config=configs/esrgan.py:demo", "--list").stdout


def test_models_come_with_an_installed_copy(installed):
  result = installed("convert", "--inspect", "srgan")
  assert result.returncode == 0, result.stderr
  assert "srresnet" in result.stdout


def test_a_wrong_flag_is_an_error_of_one_line(capsys):
  parser = command.parser("evaluate", "Scores models.")
  parser.add_argument("--scale", type=int, required=True)
  for arguments in ([], ["--scale"], ["--scale=x"], ["--scale=4", "--nosuch"]):
    with pytest.raises(SystemExit) as stop:
      parser.parse_args(arguments)
    told = capsys.readouterr().err
    assert stop.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1, told
    assert "--help says more" in told
