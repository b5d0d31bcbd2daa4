"""Finds and loads recipes, and lets them import one another wherever they lie.

A recipe is a Python file, `configs/esrgan.py`. It is the user's own code, and is executed. In a
checkout the recipes lie in `configs/`; an installed copy has them in `sr_jax/recipes/`.
"""

import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

from ml_collections import config_dict

from sr_jax import UserError, printable
from sr_jax.machine.paths import user_path
from sr_jax.training.fields import FIELDS, kind
from sr_jax.training.overrides import convert

_PACKAGE = pathlib.Path(__file__).resolve().parent
# In an installed package, and in a checkout.
FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "configs")


def folder() -> pathlib.Path:
  """Returns the folder of the recipes that come with sr_jax."""
  return next((path for path in FOLDERS if (path / "common.py").is_file()), FOLDERS[-1])


def names() -> list[str]:
  """Returns the names of the recipes that come with sr_jax: esrgan, esrgan_psnr, ..."""
  files = (path.stem for path in folder().glob("*.py"))
  return sorted(name for name in files if not name.startswith("_") and name != "common")


def find(recipe: str) -> tuple[pathlib.Path, str]:
  """Returns the file of a recipe, and its variant.

  Args:
    recipe: a path or the name of a recipe that comes with sr_jax, and perhaps a variant:
      'configs/esrgan.py', 'esrgan', 'esrgan:demo'.

  Raises:
    UserError: there is no such file, and no recipe of that name.
  """
  named, _, variant = recipe.partition(":")
  path = user_path(named)
  if path.suffix == ".py" and _is_file(path):
    return path, variant
  # `configs/esrgan.py` is what the documentation writes; it means the same from any folder.
  name = path.stem if named == f"configs/{path.stem}.py" else named
  if name in names():
    return folder() / f"{name}.py", variant
  raise UserError(f"--config={printable(recipe)}: {_meant(named, variant, path)}")


def _is_file(path: pathlib.Path) -> bool:
  try:
    return path.is_file()
  except OSError:  # a name that is too long
    return False


def _meant(named: str, variant: str, path: pathlib.Path) -> str:
  """Says which recipe a wrong name may mean."""
  known = names()
  bare = re.sub(r"\.(pyc?|ya?ml|json|toml)$", "", named.lower())
  stem, rest = bare.rpartition("/")[2], ""
  for mark in "-./= ":  # esrgan-demo, esrgan.demo
    first, found, last = bare.rpartition(mark)
    if found and first in known:
      stem, rest = first, last
  close = difflib.get_close_matches(stem, known, n=1)
  if close:
    variant = variant or rest
    try:
      load(folder() / f"{close[0]}.py", variant)
    except UserError as error:  # it has no such variant, and says which it has
      return f"did you mean the recipe {close[0]}? {error}"
    return f"did you mean --config {close[0]}{variant and ':' + printable(variant)}?"
  listed = f"give one of {', '.join(known)}, or the path of your own recipe (.py)"
  if path.name and not path.suffix and _is_file(path.with_suffix(".py")):
    return f"did you mean --config {printable(named)}.py?"
  if _is_file(path):
    return f"a recipe is a Python file, and this is no .py; {listed}"
  return f"there is no such file or recipe; {listed}"


def load(path: pathlib.Path, variant: str) -> config_dict.ConfigDict:
  """Executes a recipe's file and returns what its `get_config` makes.

  In the recipe, `configs` is the folder that it lies in, and after that the folder of the recipes
  that come with sr_jax. So `from configs import common` works in a recipe anywhere.

  Args:
    path: the file.
    variant: an argument of `get_config`; '' for none.

  Raises:
    UserError: the recipe has no such variant, the file has no `get_config`, or executing it raised
      an error, of which the file, the line and the message are told.
  """
  package = types.ModuleType("configs")
  package.__path__ = list(dict.fromkeys(str(p.resolve()) for p in (path.parent, folder())))
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  others = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_recipe(name)}
  sys.modules["configs"] = package
  try:
    spec.loader.exec_module(module)
    make = getattr(module, "get_config", None)
    if not callable(make):
      raise UserError(f"{path} is no recipe: it must have a function get_config(variant='')")
    config = make(variant) if variant or _needs_one(make) else make()
    if type(config) is not config_dict.ConfigDict:
      raise UserError(f"get_config of {path} returned a {type(config).__name__}, not a ConfigDict")
    return config
  except UserError as error:
    variant = variant and f":{variant}"
    raise UserError(f"--config={printable(f'{path.stem}{variant}')}: {error}") from error
  except Exception as error:  # the user's own code may raise anything
    if os.environ.get("SR_JAX_TRACEBACK"):
      raise
    told = _wrong_value(error, path) or f"{type(error).__name__}: {_line(error)}"
    raise UserError(f"{_place(error, path)}: {told}") from error
  finally:  # this folder's recipes are not those of the next
    for name in filter(_is_recipe, list(sys.modules)):
      del sys.modules[name]
    sys.modules.update(others)


def _needs_one(make: Callable[..., Any]) -> bool:
  """Whether get_config has a parameter without a default."""
  parameters = inspect.signature(make).parameters.values()
  return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def _place(error: Exception, path: pathlib.Path) -> str:
  """Returns `recipe.py:12`, the last line of the recipe that was being executed."""
  if isinstance(error, SyntaxError) and error.lineno:
    return f"{error.filename}:{error.lineno}"
  frame = _frame(error, path)
  return f"{path}:{frame.lineno}" if frame else str(path)


def _frame(error: Exception, path: pathlib.Path) -> traceback.FrameSummary | None:
  frames = traceback.extract_tb(error.__traceback__)
  return next((frame for frame in reversed(frames) if frame.filename == str(path)), None)


def _wrong_value(error: Exception, path: pathlib.Path) -> str:
  """Says of which type a field is, where the recipe gave it a value of another; '' elsewhere."""
  frame = _frame(error, path) if isinstance(error, TypeError) else None
  # Of several assignments on one line it is not known which one failed.
  match = frame and re.fullmatch(r"\w+\.([\w.]+)\s*=\s*([^;=]+)", (frame.line or "").strip())
  name = match[1].removeprefix("psnr.") if match else ""
  if inside := [field for field in FIELDS if field.startswith(f"{name}.")]:
    return f"{match[1]} is a section; set its fields, {', '.join(inside[:3])}"
  if name not in FIELDS:
    return ""
  default, text = FIELDS[name].default, match[2].strip()
  try:
    value = default if isinstance(default, str) else convert(text.strip("'\""), default)
  except (ValueError, OverflowError, SyntaxError, TypeError):
    value = default
  rule = f"{match[1]} = {printable(text)} must be {kind(name, default)}"
  return f"{rule}; try {match[1]} = {value!r}" if FIELDS[name].rule.holds(value) else rule


def _line(error: Exception) -> str:
  # A KeyError writes its message as code has it; ml_collections ends some with the whole recipe.
  text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
  text = text.partition("Other fields present")[0].strip()
  return (text or "no message").splitlines()[0].replace('\\"', '"')[:300]


def _is_recipe(module: str) -> bool:
  return module.partition(".")[0] == "configs"
