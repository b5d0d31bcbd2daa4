"""The command `sr-jax` of an installed copy: `sr-jax evaluate` is `python -m sr_jax.evaluate`.

Only the standard library is imported here, for the doctor must run where little else does.
"""

import argparse
import difflib
import importlib
import pathlib
import re
import sys
from typing import Any, NoReturn

import sr_jax
from sr_jax.machine.signals import end_at_signals

# {name: (module, what it does)}; a module has a function `run(arguments)`.
COMMANDS = {
  "train": ("main", "train a recipe, or go on with it"),
  "evaluate": ("evaluate", "score models on test images"),
  "upscale": ("upscale", "upscale photographs"),
  "interpolate": ("interpolate", "mix a PSNR model and a GAN model"),
  "serve": ("serve", "choose between them by eye, in a browser"),
  "convert": ("convert", "convert a model to another program's form, or say what a file is"),
  "prepare": ("prepare", "decode training images once"),
  "doctor": ("doctor.__main__", "say what is wrong with this machine"),
}


class _Parser(argparse.ArgumentParser):
  """A parser whose errors are one line."""

  def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
    self._given = list(sys.argv[1:] if args is None else args)
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    meant = self._meant(message)
    self.exit(2, f"error: {message}{meant and f'; {meant}'}; {self.prog} --help says more\n")

  def _meant(self, message: str) -> str:
    """Says what was probably meant by a value or by a flag that is none; '' where nothing is."""
    choice = re.match(r"argument (\S+): invalid choice: '(.*?)' \(choose from (.*)\)", message)
    if choice:
      choices = [name.strip("' ") for name in choice[3].split(",")]
      similar = difflib.get_close_matches(choice[2].lower(), choices, n=1, cutoff=0.5)
      equals = "=" if choice[1].startswith("-") else " "
      return f"try {choice[1]}{equals}{similar[0]}" if similar else ""
    value = re.match(r"argument (--[\w-]+): invalid \w+ value", message)
    action = self._option_string_actions.get(value[1]) if value else None
    if action and action.default is not None:
      return f"try {value[1]}={action.default}"
    known = list(self._option_string_actions)
    flags = (argument.partition("=")[0] for argument in self._given if argument.startswith("--"))
    for flag in flags:
      if "." not in flag and not any(name.startswith(flag) for name in known):
        if similar := difflib.get_close_matches(flag.lower(), known, n=1, cutoff=0.6):
          return f"did you mean {similar[0]} by {flag}?"
    return ""


def parser(command: str, doc: str, **options: Any) -> argparse.ArgumentParser:
  """Makes a program's parser, whose help is the program's docstring with its lines as they are.

  Args:
    command: a key of COMMANDS.
    doc: the docstring. Its examples call the programs as the user called this one.
    **options: of `argparse.ArgumentParser`.
  """
  installed = pathlib.Path(sys.argv[0]).stem == "sr-jax"
  for name, (module, _) in COMMANDS.items():
    called = f"python -m sr_jax.{module.removesuffix('.__main__')}"
    if installed:
      doc = doc.replace(called, f"sr-jax {name}")
    if name == command:
      prog = f"sr-jax {name}" if installed else called
  return _Parser(
    prog=prog,
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    **options,
  )


def main() -> None:
  """Runs the program that the first argument names."""
  commands = "\n".join(f"  {name:<12} {what}" for name, (_, what) in COMMANDS.items())
  overview = _Parser(
    prog="sr-jax",
    usage="sr-jax COMMAND ...",
    description="Single-image super-resolution from SRGAN to ESRGAN, in JAX.\n\n" + commands,
    epilog="sr-jax COMMAND --help says more about each.",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  overview.add_argument("--version", action="version", version=f"sr_jax {sr_jax.__version__}")
  overview.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
  command = overview.parse_args(sys.argv[1:2]).command
  end_at_signals(training=command == "train")  # the import below takes seconds
  program = importlib.import_module(f"sr_jax.{COMMANDS[command][0]}")
  sys.exit(program.run(sys.argv[2:]))
