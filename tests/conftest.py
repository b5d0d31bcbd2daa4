"""Settings of every test: eight CPU devices, no silent broadcasting, where shared data is."""

import atexit
import importlib.util
import mmap
import os
import pathlib
import shutil
import tempfile

# All this is set before jax starts. Tests of sharding need several devices, and results must not
# depend on a GPU. To optimize a program takes longer than it saves here, where most run a few
# times; without XLA's newer way to write fusions, a program compiles in half the time.
FASTER = "--xla_cpu_use_fusion_emitters=false"


def is_known(flag: str) -> bool:
  """Whether jaxlib has a flag; XLA ends a process that asks for another."""
  name = flag.strip("-").partition("=")[0].encode()
  for library in pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent.glob("*.so"):
    with open(library, "rb") as file:
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
        if contents.find(name) >= 0:
          return True
  return False


if FASTER not in os.environ.get("XLA_FLAGS", "") and is_known(FASTER):
  os.environ["XLA_FLAGS"] = f"{FASTER} {os.environ.get('XLA_FLAGS', '')}"
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 "
  + os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# oneDNN's programs cannot be kept, and each process would try it first. Its own tests ask for it.
os.environ["SR_JAX_ONEDNN"] = "0"

# Tests compile the same programs again and again, some in processes of their own: once is enough.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sr_jax_programs_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take longest come first: a worker that takes one last works alone for minutes. What
# e2e_test compiles, distributed_test and storage_test find compiled where they start later.
LONGEST = (
  "e2e_test",
  "step_test",
  "distributed_test",
  "storage_test",
  "benchmarks_train_test",
  "launch_test",
  "colab_test",
  "communication_test",
  "upscaler_test",
  "scoring_test",
  "choose_test",
  "generators_test",
)


def pytest_collection_modifyitems(items):
  place = {name: number for number, name in enumerate(LONGEST)}
  items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_runtest_setup(item):
  """Skips a test whose marker names a module that is not installed."""
  for marker in item.iter_markers("developer"):
    for name in marker.args:
      if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; `make test-developer` installs requirements-dev.txt")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
  """Decoded images of tests go to a folder of the session, not to the user's cache."""
  monkeypatch.setenv("SR_JAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def shared() -> pathlib.Path:
  """Folder of real data, weights and golden files, named by SR_JAX_SHARED."""
  folder = os.environ.get("SR_JAX_SHARED", "")
  if not folder:
    pytest.skip("SR_JAX_SHARED does not name the folder of real data, weights and golden files")
  return pathlib.Path(folder)
