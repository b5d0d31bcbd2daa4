"""A test that needs more than requirements-test.txt installs must be marked `developer`.

`make test` runs with these packages alone on a user's machine; what only the packages of
requirements-dev.txt enable is skipped there, and run by `make test-developer`.
"""

import ast
from collections.abc import Iterator
import functools
import importlib.metadata
import pathlib
import re
import sys
from typing import NamedTuple

from packaging.requirements import Requirement
import pytest

TESTS = pathlib.Path(__file__).resolve().parent
ROOT = TESTS.parent
OURS = {"sr_jax", "configs", "benchmarks"}
# Programs of the system; others come with packages, or with npm.
PROGRAMS = {"bash", "gcloud", "git", "setsid"}
ASKS_FOR_A_MODULE = {"importorskip", "import_module", "find_spec", "has"}
ASKS_FOR_A_PROGRAM = {"which", "tool"}


def canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def requirements(path: pathlib.Path) -> Iterator[Requirement]:
  """The packages that a file names, and those of the files that it includes."""
  for line in path.read_text().splitlines():
    line = line.partition("#")[0].strip()
    if line.startswith("-r "):
      yield from requirements(path.parent / line[3:].strip())
    elif line:
      yield Requirement(line)


def importable() -> frozenset[str]:
  """Names that can be imported where requirements-test.txt, and no more, is installed."""
  # What is not installed here, as TensorFlow on some accelerators' machines, has its own name.
  asked = list(requirements(ROOT / "requirements-test.txt"))
  names = {canonical(requirement.name).replace("-", "_") for requirement in asked}
  seen, waiting = set(), [(canonical(r.name), frozenset(r.extras)) for r in asked]
  while waiting:
    name, extras = waiting.pop()
    if (name, extras) in seen:
      continue
    seen.add((name, extras))
    try:
      declared = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
      continue
    for requirement in map(Requirement, declared):
      environments = [{"extra": extra} for extra in extras or {""}]
      if not requirement.marker or any(map(requirement.marker.evaluate, environments)):
        waiting.append((canonical(requirement.name), frozenset(requirement.extras)))
  installed = {name for name, _ in seen}
  for module, owners in importlib.metadata.packages_distributions().items():
    if installed & set(map(canonical, owners)):
      names.add(module)
  return frozenset(names | OURS | sys.stdlib_module_names)


def asked_for(node: ast.AST) -> tuple[set[str], set[str]]:
  """Modules that code imports or asks for, by their whole names, and programs that it looks for."""
  modules, programs = set(), set()
  for part in ast.walk(node):
    if isinstance(part, ast.Import):
      modules |= {alias.name for alias in part.names}
    elif isinstance(part, ast.ImportFrom) and not part.level:
      modules |= {part.module, *(f"{part.module}.{alias.name}" for alias in part.names)}
    elif isinstance(part, ast.Call):
      function = ast.unparse(part.func).rpartition(".")[2]
      values = [*part.args[:1], *(k.value for k in part.keywords if k.arg in ("modname", "name"))]
      names = {value.value for value in values if isinstance(value, ast.Constant)}
      if function in ASKS_FOR_A_MODULE:
        modules |= names
      elif function in ASKS_FOR_A_PROGRAM:
        programs |= names
  return modules, programs


def mentioned(node: ast.AST) -> set[str]:
  """Names that code uses: variables, arguments, which name fixtures, and fixtures by strings."""
  names = set()
  for part in ast.walk(node):
    if isinstance(part, ast.Name):
      names.add(part.id)
    elif isinstance(part, ast.arg):
      names.add(part.arg)
    elif isinstance(part, ast.Call):
      if ast.unparse(part.func).rpartition(".")[2] in ("usefixtures", "getfixturevalue"):
        names |= {value.value for value in part.args if isinstance(value, ast.Constant)}
  return names


def mark(node: ast.AST) -> set[str] | None:
  """The modules that `pytest.mark.developer(...)` names; None where this is another expression."""
  call = node if isinstance(node, ast.Call) else None
  function = call.func if call else node
  if not (isinstance(function, ast.Attribute) and function.attr == "developer"):
    return None
  return {value.value for value in call.args} if call else set()


class File(NamedTuple):
  """A Python file: its functions, classes and tables by name, and the rest."""

  pieces: dict[str, ast.AST]
  imported: dict[str, tuple[str, str]]  # name -> the file and the name there
  top: set[str]  # modules imported outside of functions
  autouse: set[str]
  marks: set[str] | None  # of `pytestmark`


def read(path: pathlib.Path) -> File:
  file = File({}, {}, set(), set(), None)
  for node in ast.parse(path.read_text()).body:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
      file.pieces[node.name] = node
      if any("autouse=True" in ast.unparse(decorator) for decorator in node.decorator_list):
        file.autouse.add(node.name)
      continue
    file.top.update(asked_for(node)[0])
    if isinstance(node, ast.ImportFrom):
      file.imported.update({alias.asname or alias.name: (node.module, alias.name)
                            for alias in node.names})  # fmt: skip
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      for target in targets:
        if isinstance(target, ast.Name):
          file.pieces[target.id] = node
          if target.id == "pytestmark":
            file = file._replace(marks=mark(node.value))
  return file


def unmarked(tests: pathlib.Path, benchmarks: pathlib.Path, known: frozenset[str]) -> list[str]:
  """Tests that come, by what they call, to a package or program that their mark does not allow.

  Files are known by their names alone, as pytest imports them, in whatever folder they are. What a
  subprocess imports is not seen.
  """
  paths = [path for path in sorted(tests.rglob("*.py")) if "node_modules" not in path.parts]
  files = {path.stem: read(path) for path in paths}
  assert len(files) == len(paths), "two files of one name"
  files |= {f"benchmarks.{path.stem}": read(path) for path in benchmarks.glob("*.py")}

  @functools.cache
  def imported_with(name: str) -> frozenset[str]:
    """The modules that are imported where one of the files is."""
    found, waiting = set(), {name}
    while waiting:
      found |= waiting
      waiting = {n for one in waiting if one in files for n in files[one].top} - found
    return frozenset(found)

  def where(stem: str, name: str) -> tuple[str, str] | None:
    file = files[stem]
    if name in file.pieces:
      return stem, name
    if name in file.imported and file.imported[name][0] in files:
      return where(*file.imported[name])
    return ("conftest", name) if "conftest" in files and name in files["conftest"].pieces else None

  found = []
  for stem, file in sorted(files.items()):
    for test, piece in file.pieces.items():
      if not (stem.endswith("_test") and re.match("test_|Test", test)):
        continue
      fixtures = {(one, f) for one in {stem, "conftest"} & set(files) for f in files[one].autouse}
      reached, waiting = set(), {(stem, test), *fixtures}
      while waiting:
        reached |= waiting
        waiting = (
          {
            where(one, name)
            for one, piece_name in waiting
            for name in mentioned(files[one].pieces[piece_name])
          }
          - reached
          - {None}
        )
      modules, programs = set(imported_with(stem)), set()
      for one, name in reached:
        more, of_system = asked_for(files[one].pieces[name])
        modules = modules.union(*map(imported_with, more | {one}))
        programs |= of_system
      marks = [file.marks, *map(mark, piece.decorator_list)]
      marks = [names for names in marks if names is not None]
      if not marks:
        found += [f"{stem}.py::{test} looks for {name}" for name in sorted(programs - PROGRAMS)]
      named = known.union(*marks, (name.partition(".")[0] for name in files))
      missing = {name.partition(".")[0] for name in modules} - named
      found += [f"{stem}.py::{test} needs {name}" for name in sorted(missing)]
  return found


def test_a_test_that_needs_a_developers_package_is_marked():
  known = importable()
  assert {"jax", "numpy", "pytest", "yaml", "tensorflow"} <= known and "torch" not in known
  assert unmarked(TESTS, ROOT / "benchmarks", known) == [], "@pytest.mark.developer is missing"


TORCH = "needs torch"


@pytest.mark.parametrize(
  "code, complaint",
  [
    ("import torch\ndef test_a(): pass", TORCH),
    ("def test_a():\n  torch = pytest.importorskip('torch')", TORCH),
    ("def test_a():\n  pytest.importorskip(modname='torch.nn')", TORCH),
    ("def test_a():\n  from torch.nn import functional", TORCH),
    ("@pytest.fixture\ndef net():\n  import torch\n@other\ndef test_a(net): pass", TORCH),
    ("@pytest.fixture(autouse=True)\ndef net():\n  import torch\ndef test_a(): pass", TORCH),
    ("def net():\n  import torch\n@pytest.mark.usefixtures('net')\ndef test_a(): pass", TORCH),
    ("def deep():\n  import torch\ndef make():\n  deep()\ndef test_a():\n  make()", TORCH),
    ("def make():\n  import torch\nCASES = [make]\ndef test_a():\n  CASES[0]()", TORCH),
    ("def test_a():\n  import deep_helper", TORCH),
    ("from other_test import net\ndef test_a(net): pass", TORCH),
    ("def test_a(shared_net): pass", TORCH),
    ("def test_a():\n  from benchmarks import timed", TORCH),
    ("def test_a():\n  if side_by_side.has('torch'): pass", TORCH),
    ("@pytest.mark.skipif(find_spec('torch') is None)\ndef test_a(): pass", TORCH),
    ("class TestA:\n  def test_b(self):\n    import torch", TORCH),
    ("@pytest.mark.developer('ruff')\ndef test_a():\n  import torch", TORCH),
    ("@parametrize('x', [pytest.param(1, marks=pytest.mark.developer('torch'))])\n"
     "def test_a(x):\n  import torch", TORCH),
    ("def test_a():\n  tool('hadolint')", "looks for hadolint"),
    ("def test_a():\n  shutil.which('node') or pytest.skip()", "looks for node"),
    ("def test_a():\n  import json, numpy, sr_jax.main\n  tool('git')", None),
    ("def test_a():\n  sys.modules['torch'] = None", None),
    ("@pytest.mark.developer('torch')\ndef test_a():\n  import torch", None),
    ("@pytest.mark.developer\ndef test_a():\n  tool('hadolint')", None),
    ("pytestmark = pytest.mark.developer('torch')\nimport torch\ndef test_a(): pass", None),
    ("def make():\n  import torch\ndef test_a(): pass\n", None),
  ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["", "rooms/deeper"])
def test_what_a_test_needs_is_found(tmp_path, folder, code, complaint):
  tests, benchmarks = tmp_path / "tests", tmp_path / "benchmarks"
  tests.mkdir(), benchmarks.mkdir()
  (tests / "helper.py").write_text("import numpy, torch\n")
  (tests / "deep_helper.py").write_text("import helper\n")
  (tests / "other_test.py").write_text("def net():\n  import torch\n")
  (tests / "conftest.py").write_text("def shared_net():\n  import torch\n")
  (benchmarks / "timed.py").write_text("import torch\n")
  (tests / folder).mkdir(parents=True, exist_ok=True)
  (tests / folder / "some_test.py").write_text(code)
  known = frozenset({"json", "numpy", "sr_jax", "pytest", "benchmarks"})
  test = re.search(r"(test_a|TestA)", code)[0]
  wanted = [f"some_test.py::{test} {complaint}"] if complaint else []
  assert unmarked(tests, benchmarks, known) == wanted
