"""Says what is wrong with this machine, before the run: each fault with its remedy.

  python -m sr_jax.doctor
  python -m sr_jax.doctor --data PHOTOS --workdir runs/esrgan
  srun python -m sr_jax.doctor                on a cluster: as the run will be started

Exit status 0 without faults, 1 with. Nothing is downloaded, installed or left behind.

It must run where little else does: only the standard library is imported at the top, whatever may
hang or abort (JAX finding its devices, TensorFlow) runs in a process of its own, and a check that
fails is a finding like any other.
"""

import argparse
import collections
import glob
import hashlib
import importlib
import importlib.metadata
import io
import json
import multiprocessing.pool
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sr_jax

OK, WARNING, FAULT = "ok", "warning", "fault"
GIB = 2**30

# Rules of thumb. Three checkpoints of both stages of ESRGAN are about 4 GB, DIV2K decoded 8 GB.
LOW_DISK, TOO_LOW_DISK = 5 * GIB, 1 * GIB
LOW_MEMORY = 4 * GIB
LOW_SHARED_MEMORY = GIB  # Docker gives 64 MiB, with which NCCL fails
LOW_OPEN_FILES = 1024

ROOT = pathlib.Path(__file__).resolve().parent.parent
INSTALL = "pip install --upgrade -r requirements.txt"

TENSORFLOW = ("tensorflow-cpu", "tensorflow", "tf-nightly-cpu", "tf-nightly")
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")
OLDEST_DRIVER = {"12": 525, "13": 580}  # of NVIDIA, by CUDA's version; JAX's installation page
# What needs a package without saying so in its own metadata: (who, what fails).
UNDECLARED = {
  "importlib_resources": ("tensorflow-datasets", "tensorflow-datasets imports it"),
  "tensorboard": ("clu", "clu imports it to write TensorBoard files"),
  "flatbuffers": ("jax", "jax.export, so `convert --output X.stablehlo`, needs it"),
}
WITHOUT = {
  "tensorflow": "train with --config.data.input=device and images from a folder",
  "tensorflow-datasets": "give folders instead of tfds:NAME",
}


class Finding(NamedTuple):
  """One line of what is, and one of what to do.

  Attributes:
    level: 'ok' | 'warning' (the run works, perhaps not as wished) | 'fault'.
    name: of the fault, the same in every release; '' where all is well.
    what: with the values.
    remedy: '' where all is well.
  """

  level: str
  name: str
  what: str
  remedy: str = ""


Findings = Iterator[Finding]


def check_python(args: argparse.Namespace) -> Findings:
  """Python and the packages: versions, and combinations that are known not to work."""
  del args
  python = platform.python_version()
  if _numbers(python) < (3, 11):
    yield Finding(FAULT, "python-old", f"Python {python}, must be 3.11 or newer", "make a new venv")
  else:
    yield Finding(OK, "", f"Python {python}, {sys.executable}")
  bounds = requirements()
  if not bounds:
    what = "no requirements.txt beside sr_jax, and sr_jax is not installed: versions unchecked"
    yield Finding(WARNING, "requirements-unknown", what, "run it in the repository")
  sound = []
  for name, bound in bounds.items():
    version = tensorflow()[1] if name == "tensorflow" else installed(name)
    if not version:
      yield from _missing(name)
    elif _numbers(version) < _numbers(bound):
      what = f"{name} {version} is older than {bound}, which sr_jax needs"
      yield Finding(FAULT, "package-old", what, f'pip install --upgrade "{name}>={bound}"')
    else:
      sound.append(f"{name} {version}")
  if sound:
    yield Finding(OK, "", ", ".join(sound))
  yield from _jax_combinations()
  several = [name for name in TENSORFLOW if installed(name)]
  if len(several) > 1:
    what = f"{' and '.join(several)} are installed over each other: the same files, mixed"
    remedy = f"pip uninstall -y {' '.join(several)}; pip install tensorflow-cpu"
    yield Finding(FAULT, "tensorflow-twice", what, remedy)
  elif several == ["tensorflow"] and sys.platform == "linux" and nvidia_gpus()[0]:
    what = "tensorflow is the build for GPUs: sr_jax hides them from it, other programs may not"
    remedy = "pip uninstall -y tensorflow; pip install tensorflow-cpu"
    yield Finding(WARNING, "tensorflow-gpu-build", what, remedy)


def requirements() -> dict[str, str]:
  """The packages that sr_jax needs: {name: lower bound}, TensorFlow's builds as 'tensorflow'."""
  file = ROOT / "requirements.txt"
  if file.is_file():
    lines = file.read_text().splitlines()
  else:
    try:
      lines = importlib.metadata.requires("sr_jax") or []
    except importlib.metadata.PackageNotFoundError:
      return {}
  bounds = {}
  for line in lines:
    match = re.match(r"([A-Za-z][\w.-]*)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?", line)
    if match and "extra ==" not in line:
      name = "tensorflow" if match[1] in TENSORFLOW else match[1]
      bounds[name] = match[2] or "0"
  return bounds


def installed(name: str) -> str:
  """Version of a package, '' for none. Its metadata are read; it is not imported."""
  try:
    return importlib.metadata.version(name) or ""
  except importlib.metadata.PackageNotFoundError:
    return ""


def tensorflow() -> tuple[str, str]:
  """Name of TensorFlow's build that is installed and its version, '' for none."""
  return next(((name, version) for name in TENSORFLOW if (version := installed(name))), ("", ""))


def _numbers(version: str) -> tuple[int, ...]:
  """'0.12.0rc1' -> (0, 12), to compare; zeros at the end say nothing."""
  numbers = [int(number) for number in re.match(r"[\d.]*", version)[0].split(".") if number]
  while numbers and not numbers[-1]:
    numbers.pop()
  return tuple(numbers)


def _missing(name: str) -> Findings:
  if name in UNDECLARED:
    user, reason = UNDECLARED[name]
    if installed(user):
      what = f"{name} is not installed: {reason} without declaring it"
      yield Finding(FAULT, "undeclared-dependency", what, f"pip install {name}")
  elif name in WITHOUT:
    package = "tensorflow-cpu" if name == "tensorflow" else name
    remedy = f"pip install {package}, or {WITHOUT[name]}"
    yield Finding(WARNING, "package-optional", f"{name} is not installed", remedy)
  else:
    yield Finding(FAULT, "package-missing", f"{name} is not installed", INSTALL)


def _jax_combinations() -> Findings:
  jax, jaxlib = installed("jax"), installed("jaxlib")
  if not (jax and jaxlib):
    return
  wanted = [line for line in importlib.metadata.requires("jax") or [] if "extra" not in line]
  wanted = next((line for line in wanted if re.match(r"jaxlib\b", line)), "")
  lowest = re.search(r">=\s*([\d.]+)", wanted)
  too_old = lowest and _numbers(jaxlib) < _numbers(lowest[1])
  if too_old or _numbers(jaxlib) > _numbers(jax):
    what = f"jaxlib {jaxlib} does not go with jax {jax} ({wanted or 'it must not be newer'})"
    yield Finding(FAULT, "jaxlib-mismatch", what, f"pip install jax=={jax} jaxlib=={jax}")
  plugins = {name: version for name in CUDA_PLUGINS if (version := installed(name))}
  wrong = [f"{n} {v}" for n, v in plugins.items() if _numbers(v) != _numbers(jaxlib)]
  cuda = sorted({name[8:10] for name in plugins})
  if wrong:
    what = f"{', '.join(wrong)} must have the version of jaxlib, {jaxlib}: JAX leaves it out"
    yield Finding(FAULT, "cuda-plugin-mismatch", what, f'pip install "jax[cuda{cuda[0]}]=={jax}"')
  if len(cuda) > 1:
    what = "JAX's plugins for CUDA 12 and CUDA 13 are both installed"
    remedy = f"pip uninstall -y {' '.join(name for name in plugins if 'cuda12' in name)}"
    yield Finding(FAULT, "cuda-plugin-twice", what, remedy)


def check_machine(args: argparse.Namespace) -> Findings:
  """CPUs, memory, open files."""
  del args
  allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
  cpus, what = len(allowed), f"{len(allowed)} of {os.cpu_count()} CPUs"
  quota = _cgroup("cpu.max").split()
  if len(quota) == 2 and quota[0].isdigit() and int(quota[0]) < cpus * int(quota[1]):
    cpus = int(quota[0]) / int(quota[1])
    what = f"{cpus:.1f} CPUs by the container's quota"
  if cpus < 2:
    remedy = "ask for more: SLURM --cpus-per-task=8, docker --cpus=8, Kubernetes resources.cpu"
    yield Finding(WARNING, "cpus-few", f"{what}: decoding and compiling will be slow", remedy)
  else:
    yield Finding(OK, "", what)

  free, total = memory()
  if free and free < LOW_MEMORY:
    what = f"{free / GIB:.1f} GiB of memory free, of {total / GIB:.1f}"
    remedy = "end other programs, or ask for more: SLURM --mem=16G, docker --memory=16g"
    yield Finding(WARNING, "memory-low", what, remedy)
  elif free:
    yield Finding(OK, "", f"{free / GIB:.1f} GiB of memory free, of {total / GIB:.1f}")

  try:
    import resource
  except ImportError:  # Windows
    return
  files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  if 0 <= files < LOW_OPEN_FILES:
    what = f"{files} files may be open at once; checkpoints and data need more"
    yield Finding(WARNING, "open-files-low", what, f"ulimit -n {max(4096, files)}")


def memory() -> tuple[int, int]:
  """Bytes of memory that are free to this process and in all, (0, 0) where nobody says."""
  try:
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    free, total = table["MemAvailable"], table["MemTotal"]
  except (OSError, KeyError, ValueError):
    return 0, 0
  limit, used = _cgroup("memory.max"), _cgroup("memory.current")
  if limit.isdigit() and used.isdigit():  # a container; 'max' is no limit
    free, total = min(free, int(limit) - int(used)), min(total, int(limit))
  return max(free, 1), total


def _cgroup(name: str) -> str:
  try:
    return pathlib.Path("/sys/fs/cgroup", name).read_text().strip()
  except OSError:
    return ""


class Gpu(NamedTuple):
  name: str
  total: int  # MiB, 0 where nvidia-smi does not say
  used: int
  driver: int  # first number of its version


def nvidia_gpus() -> tuple[list[Gpu], str]:
  """The GPUs that nvidia-smi lists, and its complaint; ([], '') where there is no nvidia-smi."""
  if not shutil.which("nvidia-smi"):
    return [], ""
  fields = "name,memory.total,memory.used,driver_version"
  command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
  try:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=30)
  except (OSError, subprocess.TimeoutExpired) as error:
    return [], str(error)
  if ran.returncode:
    return [], _last_line(ran.stdout + ran.stderr) or f"exit status {ran.returncode}"
  rows = [[cell.strip() for cell in line.split(",")] for line in ran.stdout.splitlines()]
  numbers = [[int("0" + re.match(r"\d*", cell)[0]) for cell in row[1:4]] for row in rows]
  rows = zip(rows, numbers, strict=True)
  return [Gpu(row[0], *cells) for row, cells in rows if len(cells) == 3], ""


def check_devices(args: argparse.Namespace) -> Findings:
  """What JAX computes on, and whether it computes rightly there."""
  gpus, complaint = nvidia_gpus()
  yield from _drivers(gpus, complaint)
  facts, problem = in_child("probe_jax", args.timeout)
  if problem or facts.get("error"):
    yield _jax_fault(problem or facts["error"])
    return
  for module, error in facts["imports"].items():
    what = f"import {module} fails: {error}"
    yield Finding(
      FAULT, "package-broken", what, f"pip install --force-reinstall {_package(module)}"
    )
  yield from _devices(facts, gpus)
  if facts["sum"] != facts["expected_sum"]:
    what = f"a compiled sum over all devices is {facts['sum']}, must be {facts['expected_sum']}"
    remedy = "leave devices out one by one (CUDA_VISIBLE_DEVICES=0, ...) to find which is broken"
    yield Finding(FAULT, "wrong-result", what, remedy)
  error = facts["product_error"]
  what = f"float32 products are right to {error:.0e}"
  if not error < (1e-5 if facts["platform"] == "cpu" else 2e-2):
    remedy = "unset JAX_DEFAULT_MATMUL_PRECISION and XLA_FLAGS; if that does not help, another jax"
    yield Finding(FAULT, "imprecise", what, remedy)
  elif error > 1e-5:
    what += ": TF32 or bfloat16, JAX's default here; JAX_DEFAULT_MATMUL_PRECISION=float32 for more"
    yield Finding(OK, "", what)
  else:
    yield Finding(OK, "", f"a compiled sum over all devices is right; {what}")


def probe_jax() -> dict[str, Any]:
  """Runs in a child: what JAX sees and computes.

  Returns:
    {error} where JAX does not start, else {imports, platform, devices, sum, expected_sum,
    product_error}.
  """
  try:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = jax.local_devices()
  except Exception as error:
    code = traceback.extract_tb(error.__traceback__)[-1].line  # an assert has no other message
    return {"error": f"{type(error).__name__}: {error or code}"}
  failed = {}
  for module in ("flax.linen", "optax", "orbax.checkpoint", "ml_collections", "skimage"):
    try:
      importlib.import_module(module)
    except Exception as error:
      failed[module] = f"{type(error).__name__}: {error}"
  numbers = np.arange(1000 * len(devices), dtype=np.int32) % 1000
  sharding = NamedSharding(Mesh(np.array(devices), "i"), PartitionSpec("i"))
  total = jax.jit(lambda x: (x * 2 + 1).sum())(jax.device_put(numbers, sharding))
  matrix = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
  expected = matrix.astype(np.float64) @ matrix
  product = np.asarray(jax.jit(lambda a: a @ a)(matrix))
  return {
    "imports": failed,
    "platform": devices[0].platform,
    "devices": [
      {"kind": d.device_kind, "bytes": (d.memory_stats() or {}).get("bytes_limit", 0)}
      for d in devices
    ],
    "sum": int(total),
    "expected_sum": 1000**2 * len(devices),  # 1 + 3 + ... + 1999, once a device
    "product_error": float(np.abs(product - expected).max() / np.abs(expected).max()),
  }


def _package(module: str) -> str:
  names = {"orbax.checkpoint": "orbax-checkpoint", "skimage": "scikit-image"}
  return names.get(module, module.split(".")[0])


def _drivers(gpus: list[Gpu], complaint: str) -> Findings:
  if complaint:
    remedy = "load the driver (or reboot after its update); in Docker, run with --gpus all"
    yield Finding(WARNING, "nvidia-smi-fails", f"nvidia-smi: {complaint}", remedy)
  cuda = max((name[8:10] for name in CUDA_PLUGINS if installed(name)), default="")
  oldest = OLDEST_DRIVER.get(cuda, 0)
  if gpus and 0 < gpus[0].driver < oldest:
    what = f"NVIDIA's driver is {gpus[0].driver}; JAX's plugin for CUDA {cuda} needs {oldest}"
    older = ', or pip uninstall it and pip install "jax[cuda12]"' if cuda == "13" else ""
    yield Finding(FAULT, "nvidia-driver-old", what, f"update the driver to {oldest}{older}")
  busy = [f"{i} ({gpu.used:,} of {gpu.total:,} MiB)" for i, gpu in enumerate(gpus) if _busy(gpu)]
  if busy:
    what = f"another program holds memory of GPU {', '.join(busy)}; JAX wants 75 % of each"
    remedy = "nvidia-smi says who: end it, or CUDA_VISIBLE_DEVICES=... to keep to other GPUs"
    yield Finding(WARNING, "gpu-busy", what, remedy)


def _busy(gpu: Gpu) -> bool:
  return gpu.used > gpu.total / 4  # 75 % are then no longer free


def _devices(facts: dict[str, Any], gpus: list[Gpu]) -> Findings:
  platform_name, devices = facts["platform"], facts["devices"]
  count, kind, limit = len(devices), devices[0]["kind"], devices[0]["bytes"]
  what = f"{count} x {kind} ({platform_name})"
  if platform_name == "gpu":
    what += (
      f", {limit / GIB:.1f} GiB of each for JAX: it takes 75 % at its start, which is no leak; "
      "XLA_PYTHON_CLIENT_MEM_FRACTION=.9 for another share"
    )
  elif limit:
    what += f", {limit / GIB:.1f} GiB each"
  yield Finding(OK, "", what)
  if platform_name == "cpu":
    tpu = bool(glob.glob("/dev/accel[0-9]*"))
    if gpus or tpu:
      seen = f"nvidia-smi lists {len(gpus)} x {gpus[0].name}" if gpus else "/dev/accel0 is a TPU"
      yield _only_cpu(seen, tpu=not gpus)
  shared = pathlib.Path("/dev/shm")
  if platform_name == "gpu" and count > 1 and shared.is_dir():
    size = shutil.disk_usage(shared).total
    if size < LOW_SHARED_MEMORY:
      what = f"/dev/shm has {size / 2**20:.0f} MiB, too little for NCCL between {count} GPUs"
      remedy = "docker run --shm-size=8g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
      yield Finding(WARNING, "shared-memory-small", what, remedy)


def _only_cpu(seen: str, *, tpu: bool) -> Finding:
  what = f"{seen}, but JAX sees only the CPU"
  asked, visible = os.environ.get("JAX_PLATFORMS"), os.environ.get("CUDA_VISIBLE_DEVICES")
  if asked and "cuda" not in asked and "gpu" not in asked and "tpu" not in asked:
    what += f": JAX_PLATFORMS={asked}"
    return Finding(WARNING, "jax-platforms-cpu", what, "unset JAX_PLATFORMS")
  if not tpu and visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
    what += f": CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs"
    return Finding(WARNING, "gpu-hidden", what, "unset CUDA_VISIBLE_DEVICES")
  extra = "tpu" if tpu else "cuda12"
  if not tpu and any(installed(name) for name in CUDA_PLUGINS):
    remedy = 'unset LD_LIBRARY_PATH; JAX_PLATFORMS=cuda python -c "import jax; jax.devices()" says'
    return Finding(FAULT, "jax-sees-no-gpu", what, f"{remedy} why")
  return Finding(FAULT, f"jax-sees-no-{'tpu' if tpu else 'gpu'}", what, _with_extra(extra))


def _with_extra(extra: str) -> str:
  version = installed("jax")
  return f'pip install "jax[{extra}]{f"=={version}" if version else ""}"'


# What JAX or XLA says as it fails to start: (pattern, name, remedy).
JAX_FAULTS = (
  (
    r"No module named '(jax|jaxlib|numpy)'",
    "jax-missing",
    f"{INSTALL}, in the environment that runs this Python",
  ),
  (
    r"Unknown flags? in XLA_FLAGS.*",
    "xla-flags-unknown",
    "take the flag out of XLA_FLAGS: this jaxlib does not know it, and aborts",
  ),
  (
    r".*already in use.*",
    "accelerator-in-use",
    "end the process that holds it (`sudo lsof -w /dev/accel*` says which), or wait for it",
  ),
  (
    r".*(RESOURCE_EXHAUSTED|OUT_OF_MEMORY|out of memory).*",
    "device-memory-taken",
    "end other programs on it (nvidia-smi), or XLA_PYTHON_CLIENT_MEM_FRACTION=.3 to take less",
  ),
  (
    r".*jaxlib.*(incompatible|requires (jaxlib )?version).*",
    "jaxlib-mismatch",
    "pip install --upgrade jax jaxlib",
  ),
  (
    r"no answer in \d+ s",
    "jax-hangs",
    "on a TPU pod start it on all hosts at once (gcloud ... --worker=all); else look for another "
    "process on the accelerator; --timeout waits longer",
  ),
)


def _jax_fault(text: str) -> Finding:
  for pattern, name, remedy in JAX_FAULTS:
    if match := re.search(pattern, text):
      return Finding(FAULT, name, f"JAX does not start: {match[0].strip()}", remedy)
  if asked := os.environ.get("JAX_PLATFORMS"):
    what = f"JAX does not start with JAX_PLATFORMS={asked}: {_last_line(text)}"
    remedy = f"unset JAX_PLATFORMS, or install its plugin: {_with_extra('cuda12')}"
    return Finding(FAULT, "jax-platforms", what, remedy)
  remedy = f"unset LD_LIBRARY_PATH and XLA_FLAGS, then {INSTALL}"
  return Finding(FAULT, "jax-does-not-start", f"JAX does not start: {_last_line(text)}", remedy)


def in_child(probe: str, seconds: float) -> tuple[dict[str, Any], str]:
  """Calls a function of this module in a process of its own.

  XLA aborts on some faults and waits for ever on others; neither must take the doctor along.

  Args:
    probe: name of the function; returns JSON.
    seconds: to wait.

  Returns:
    (what it returned, ''), or ({}, the end of what it said).
  """
  code = f"import json; from sr_jax import doctor; print(json.dumps(doctor.{probe}()))"
  path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
  try:
    ran = subprocess.run(
      [sys.executable, "-c", code],
      capture_output=True,
      text=True,
      errors="replace",
      timeout=seconds,
      env={**os.environ, "PYTHONPATH": path},
    )
  except subprocess.TimeoutExpired:
    return {}, f"no answer in {seconds:g} s"
  if ran.returncode:
    told = ran.stderr.strip()[-4000:]
    return {}, told or f"it ended with status {ran.returncode}, and said nothing"
  return json.loads(_last_line(ran.stdout)), ""


def _last_line(text: str) -> str:
  return (text.strip().splitlines() or [""])[-1].strip()


def check_decoding(args: argparse.Namespace) -> Findings:
  """Image files written and read back; PNG must return to the bit."""
  del args
  import numpy as np
  import PIL
  from PIL import Image, features

  from sr_jax import images

  rng = np.random.default_rng(0)
  noise = rng.integers(0, 256, (24, 40, 3), np.uint8)
  y, x = np.mgrid[:24, :40]
  smooth = np.stack([6 * x, 10 * y, 3 * x + 4 * y], -1).astype(np.uint8)
  fine = []
  # Mean errors of 8-bit values: JPEG of quality 95 is off by 1 to 2 on the smooth image.
  for format_name, image, allowed in (
    ("PNG", noise, 0),
    ("JPEG", smooth, 4),
    ("WEBP", noise, 0),
    ("BMP", noise, 0),
    ("TIFF", noise, 0),
  ):
    level = FAULT if format_name in ("PNG", "JPEG") else WARNING
    remedy = "pip install --force-reinstall pillow"
    try:
      with io.BytesIO() as file:
        options = images.SAVE_OPTIONS.get(format_name, {})
        Image.fromarray(image).save(file, format_name, **options)
        back = images.read_image(file.getvalue())
    except (KeyError, ValueError, OSError) as error:
      what = f"Pillow {PIL.__version__} cannot write and read {format_name}: {error!r}"
      yield Finding(level, "codec-missing", what, remedy)
      continue
    error = np.abs(back.astype(int) - image).mean() if back.shape == image.shape else 255
    if error > allowed:
      what = f"{format_name} comes back with a mean error of {error:.2f}/255, must be <= {allowed}"
      yield Finding(FAULT, "codec-wrong", what, remedy)
    else:
      fine.append(format_name)
  turbo = features.version("libjpeg_turbo") or "none"
  if fine:
    what = f"{', '.join(fine)} return as written; Pillow {PIL.__version__}, libjpeg-turbo {turbo}"
    yield Finding(OK, "", what)


def check_tensorflow(args: argparse.Namespace) -> Findings:
  """TensorFlow works, and sees no accelerator: it would take all of its memory."""
  name, version = tensorflow()
  if not name:
    yield Finding(OK, "", "TensorFlow is not installed")
    return
  facts, problem = in_child("probe_tensorflow", args.timeout)
  if problem:
    what = f"{name} {version} does not work: {_last_line(problem)}"
    remedy = f"pip install --force-reinstall {name}, or {WITHOUT['tensorflow']}"
    yield Finding(FAULT, "tensorflow-broken", what, remedy)
    return
  if facts["accelerators"]:
    what = f"TensorFlow sees {', '.join(facts['accelerators'])} and would take JAX's memory"
    remedy = f"pip uninstall -y {name}; pip install tensorflow-cpu"
    yield Finding(FAULT, "tensorflow-sees-accelerator", what, remedy)
  else:
    yield Finding(OK, "", f"{name} {version} sees no accelerator")
  if not facts["decoded"]:
    remedy = f"pip install --force-reinstall {name}"
    yield Finding(FAULT, "tensorflow-wrong", "TensorFlow reads a PNG wrongly", remedy)
  for module, error in facts["imports"].items():
    what = f"import {module} fails: {error}"
    yield Finding(FAULT, "package-broken", what, INSTALL)


def probe_tensorflow() -> dict[str, Any]:
  """Runs in a child: TensorFlow after `import_tensorflow`, and what is built upon it."""
  import numpy as np
  from PIL import Image

  from sr_jax.data import tf_input

  tf = tf_input.import_tensorflow()
  failed = {}
  for module, package in (
    ("tensorflow_datasets", "tensorflow-datasets"),
    ("clu.metric_writers", "clu"),
  ):
    try:
      if installed(package):
        importlib.import_module(module)
    except Exception as error:
      failed[module] = f"{type(error).__name__}: {error}"
  image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
  with io.BytesIO() as file:
    Image.fromarray(image).save(file, "PNG")
    decoded = tf.io.decode_png(file.getvalue()).numpy()
  devices = tf.config.list_logical_devices()
  return {
    "accelerators": [device.name for device in devices if device.device_type != "CPU"],
    "decoded": bool(np.array_equal(decoded, image)),
    "imports": failed,
  }


def check_disk(args: argparse.Namespace) -> Findings:
  """The folders of runs and of decoded images: room, and a file written and read back."""
  for flag, folder in (("--workdir", args.workdir), ("--cache", args.cache)):
    yield from _check_folder(flag, folder)


def _check_folder(flag: str, name: str) -> Findings:
  if "://" in name:
    remedy = "try a short run there, such as --config configs/esrgan.py:demo"
    yield Finding(WARNING, "not-local", f"{flag}={name} is no local folder: untested", remedy)
    return
  folder = pathlib.Path(name).expanduser().absolute()
  existing = folder
  while not os.path.lexists(existing):  # the run makes what is missing; the doctor does not
    existing = existing.parent
  if not existing.is_dir():
    what = f"{flag}={folder}: {existing} is no folder (a file, or a link to nowhere)"
    yield Finding(FAULT, "not-a-folder", what, f"give another {flag}, or move that file away")
    return
  free = shutil.disk_usage(existing).free
  room = f"{flag}={folder}: {free / GIB:.1f} GiB free"
  remedy = f"make room, or give a {flag} on another disk"
  if free < TOO_LOW_DISK:
    yield Finding(FAULT, "disk-full", room, remedy)
  elif free < LOW_DISK:
    yield Finding(WARNING, "disk-low", f"{room}; checkpoints of ESRGAN need some 4 GiB", remedy)
  problem = write_test(existing)
  if problem:
    remedy = f"give it to yourself (chown, chmod; a quota? a read-only mount?), or another {flag}"
    yield Finding(FAULT, "not-writable", f"{flag}={folder}: {problem}", remedy)
  elif free >= LOW_DISK:
    yield Finding(OK, "", f"{room}, written and read back")


def write_test(folder: pathlib.Path, size: int = 2**20) -> str:
  """Writes a file, reads it back, deletes it. Returns what went wrong, '' for nothing."""
  wrote = os.urandom(size)
  try:
    with tempfile.TemporaryDirectory(prefix=".sr_jax_doctor_", dir=folder) as inside:
      first, second = pathlib.Path(inside, "new"), pathlib.Path(inside, "test")
      with open(first, "wb") as file:
        file.write(wrote)
        file.flush()
        os.fsync(file.fileno())
      os.replace(first, second)  # as checkpoints and images are published
      read = second.read_bytes()
  except OSError as error:
    return f"cannot write there: {error}"
  return "" if read == wrote else f"{size} bytes were written and others read back: a broken disk"


class Image(NamedTuple):
  """What the audit notes of a file."""

  path: pathlib.Path
  digest: str = ""
  size: tuple[int, int] = (0, 0)  # width, height after rotation
  kinds: tuple[str, ...] = ()
  problem: str = ""


def check_data(args: argparse.Namespace) -> Findings:
  """Every image of --data, decoded as training will."""
  from sr_jax import images
  from sr_jax.data import sources

  if not args.data:
    yield Finding(OK, "", "not asked for; --data DIR decodes every image of a folder")
    return
  folder = pathlib.Path(args.data).expanduser()
  if not folder.is_dir():
    yield _source_finding(args.data)
    return
  folder = next((folder / sub for sub in sources.HR_FOLDERS if (folder / sub).is_dir()), folder)
  paths = images.list_images(folder)
  if not paths:
    what = f"{folder} holds no images ({', '.join(images.SUFFIXES)})"
    yield Finding(FAULT, "no-images", what, "give the folder that holds the HR images")
    return
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Pillow's, of sizes that sr_jax allows
    with multiprocessing.pool.ThreadPool(min(16, os.cpu_count() or 1)) as pool:
      audited = pool.map(_audit, paths)
  good = [image for image in audited if not image.problem]
  if good:
    sizes = sorted((image.size for image in good), key=lambda size: size[0] * size[1])
    kinds = collections.Counter(kind for image in good for kind in image.kinds)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    smallest, largest = (f"{width}x{height}" for width, height in (sizes[0], sizes[-1]))
    what = f"{len(good)} of {len(paths)} images of {folder}, {smallest} to {largest}: {told}"
    yield Finding(OK, "", what)
  yield from _unusable(audited, folder, args.hr_patch)
  yield from _treated(good)
  yield from _twice(good, folder)
  yield from _decoded_size(good, args.cache)


def _source_finding(spec: str) -> Finding:
  from sr_jax.data import sources

  if ":" not in spec:
    what, remedy = f"--data={spec} is no folder", "give the folder that holds the HR images"
    return Finding(FAULT, "no-data", what, remedy)
  try:
    count = len(sources.open_source(spec).names)
  except (ValueError, OSError, ImportError) as error:
    remedy = "give a folder of images, or prepare the TFDS data set: tfds build NAME"
    return Finding(FAULT, "no-data", f"--data={spec}: {str(error).splitlines()[0]}", remedy)
  return Finding(OK, "", f"{spec}: {count} images; only folders are decoded and audited")


def _audit(path: pathlib.Path) -> Image:
  import PIL.Image

  from sr_jax import images

  try:
    data = path.read_bytes()
    height, width = images.read_image(data).shape[:2]
  except Exception as error:
    reason = re.sub(r"^\d+ bytes: ", "", str(error)).split("; ")[0]
    return Image(path, problem=reason or type(error).__name__)
  with PIL.Image.open(io.BytesIO(data)) as header:
    mode, turned = header.mode, header.getexif().get(0x0112, 1) not in (0, 1)
    alpha = header.has_transparency_data
  kinds = ["grey" if mode in ("1", "L", "LA", "La") or mode.startswith("I") else ""]
  kinds += ["CMYK" if mode == "CMYK" else "", "with alpha" if alpha else ""]
  # Pillow opens 16-bit RGB as 8-bit; a PNG's 25th byte says the depth.
  deep = data[:8] == b"\x89PNG\r\n\x1a\n" and data[24] == 16
  kinds += ["16-bit" if deep or mode.startswith("I") else "", "turned by EXIF" if turned else ""]
  kinds = tuple(kind for kind in kinds if kind)
  color = () if "grey" in kinds or "CMYK" in kinds else ("RGB",)
  return Image(path, hashlib.sha256(data).hexdigest(), (width, height), color + kinds)


def _unusable(audited: list[Image], folder: pathlib.Path, patch: int) -> Findings:
  """As in training: unusable images are left out while they are few."""
  from sr_jax.data import packed

  bombs = [image for image in audited if "more than max_pixels" in image.problem]
  unread = [image for image in audited if image.problem and image not in bombs]
  small = [image for image in audited if not image.problem and min(image.size) < patch]
  unusable = len(bombs) + len(unread) + len(small)
  few = unusable <= packed.MAX_BAD_FRACTION * len(audited)
  then = "left out of the training" if few else "too many: training refuses the folder"
  for found, name, remedy in (
    (unread, "images-unreadable", "repair them from their source, or remove them"),
    (bombs, "images-too-large", "cut them into parts, or remove them"),
    (small, "images-too-small", f"remove them, or train with --config.data.hr_patch below {patch}"),
  ):
    if found:
      told = _names([(i, i.problem or f"{i.size[0]}x{i.size[1]} < {patch}") for i in found], folder)
      what = f"{len(found)} of {len(audited)} images, {then}: {told}"
      yield Finding(WARNING if few else FAULT, name, what, remedy)


def _treated(good: list[Image]) -> Findings:
  rules = {
    "CMYK": "converted without their colour profile",
    "with alpha": "put on white",
    "16-bit": "rounded to 8 bits",
  }
  counts = {kind: sum(kind in image.kinds for image in good) for kind in rules}
  if any(counts.values()):
    what = ", ".join(f"{n} {kind} will be {rules[kind]}" for kind, n in counts.items() if n)
    remedy = "fine as it is? else convert them to 8-bit RGB yourself"
    yield Finding(WARNING, "images-converted", what, remedy)


def _twice(good: list[Image], folder: pathlib.Path) -> Findings:
  for name, key, what, remedy in (
    (
      "images-duplicate",
      lambda image: image.digest,
      "are the same file",
      "remove the copies: they count twice, and tell of the test what training has seen",
    ),
    (
      "names-collide",
      lambda image: image.path.with_suffix("").as_posix().lower(),
      "differ only in suffix or case",
      "rename one: neither LR partners nor results can be told apart by name",
    ),
  ):
    groups = collections.defaultdict(list)
    for image in good:
      groups[key(image)].append(image)
    groups = [group for group in groups.values() if len(group) > 1]
    if groups:
      pairs = [(group[0], f"and {_relative(group[1], folder)}") for group in groups]
      told = f"{sum(map(len, groups))} images {what}: {_names(pairs, folder)}"
      yield Finding(WARNING, name, told, remedy)


def _decoded_size(good: list[Image], cache: str) -> Findings:
  needed = sum(width * height for width, height in (image.size for image in good)) * 3 * 17 // 16
  folder = pathlib.Path(cache).expanduser().absolute()
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  what = f"decoded, with LR images of scale 4, they take {needed / GIB:.2f} GiB of the cache"
  if needed > free:
    what += f", which has {free / GIB:.2f} free (needless where they are in it already)"
    yield Finding(WARNING, "cache-too-small", what, "--config.data.cache_dir on a larger disk")
  else:
    yield Finding(OK, "", what)


def _relative(image: Image, folder: pathlib.Path) -> str:
  return image.path.relative_to(folder).as_posix()


def _names(found: list[tuple[Image, str]], folder: pathlib.Path, limit: int = 5) -> str:
  told = [f"{_relative(image, folder)} ({reason})" for image, reason in found[:limit]]
  return ", ".join(told) + (f" and {len(found) - limit} more" if len(found) > limit else "")


def check_environment(args: argparse.Namespace) -> Findings:
  """Environment variables: of JAX, XLA, TensorFlow, and of the cluster."""
  del args
  environment = dict(os.environ)
  findings = [*_variables(environment), *_cluster(environment)]
  yield from findings
  try:
    from sr_jax import distributed

    cluster = distributed.find_cluster(environment)
  except ImportError:
    return  # JAX is missing, as other checks say
  what = (
    f"part of a cluster: {cluster}" if cluster else "no cluster: one process drives all devices"
  )
  yield Finding(OK, "", what)


# Variables that are left on after debugging: (what they do, remedy).
LEFT_ON = {
  "JAX_DEBUG_NANS": "every step waits for its result and compiles twice on a NaN",
  "JAX_DEBUG_INFS": "every step waits for its result",
  "JAX_DISABLE_JIT": "nothing is compiled: hundreds of times slower",
  "JAX_ENABLE_X64": "float64 creeps in: slower, and other results than everybody's",
  "JAX_ENABLE_CHECKS": "JAX checks itself at every call",
  "JAX_NO_EXECUTION": "nothing is computed",
  "TF_FORCE_GPU_ALLOW_GROWTH": (
    "without effect: the GPU is hidden from TensorFlow; JAX's share of it is "
    "XLA_PYTHON_CLIENT_MEM_FRACTION"
  ),
}


def _variables(environment: Mapping[str, str]) -> Findings:
  for name, effect in LEFT_ON.items():
    if environment.get(name, "").lower() in ("1", "true", "on", "yes"):
      what = f"{name}={environment[name]}: {effect}"
      yield Finding(WARNING, "variable-left-on", what, f"unset {name}")
  if match := re.search(
    r"--xla_force_host_platform_device_count=(\d+)", environment.get("XLA_FLAGS", "")
  ):
    what = f"XLA_FLAGS makes {match[1]} devices of one CPU: for tests; training is slower by it"
    yield Finding(WARNING, "pretend-devices", what, f"take {match[0]} out of XLA_FLAGS")
  fraction = environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ".75")
  try:
    valid = 0 < float(fraction) <= 1
  except ValueError:
    valid = False
  if not valid:
    what = f"XLA_PYTHON_CLIENT_MEM_FRACTION={fraction} must be a number above 0 and at most 1"
    yield Finding(FAULT, "memory-fraction", what, "XLA_PYTHON_CLIENT_MEM_FRACTION=.75, or unset it")
  if environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
    what = "XLA_PYTHON_CLIENT_ALLOCATOR=platform asks the driver at each allocation: very slow"
    yield Finding(WARNING, "slow-allocator", what, "unset XLA_PYTHON_CLIENT_ALLOCATOR")
  libraries = environment.get("LD_LIBRARY_PATH", "")
  plugin = any(installed(name) for name in CUDA_PLUGINS)
  if plugin and re.search("cuda|cudnn|nccl", libraries, re.IGNORECASE):
    what = f"LD_LIBRARY_PATH={libraries} puts another CUDA before the one that came with JAX"
    yield Finding(WARNING, "other-cuda", what, "unset LD_LIBRARY_PATH")


EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # that gRPC reads, in lower case alone


def _cluster(environment: Mapping[str, str]) -> Findings:
  given = [name for name in EXPLICIT if name in environment]
  if given and len(given) < 3:
    missing = " and ".join(name for name in EXPLICIT if name not in environment)
    what = f"{' and '.join(given)} set, {missing} not: every process would train alone"
    yield Finding(FAULT, "processes-incomplete", what, f"set {missing}, or unset {given[0]}")
  elif given:
    yield from _explicit(*(environment[name] for name in EXPLICIT))

  tasks = _first_number(environment, "SLURM_NTASKS")
  if tasks > 1 and "SLURM_STEP_NODELIST" not in environment:
    what = (
      f"SLURM gave {tasks} tasks (SLURM_NTASKS), but srun did not start this process: it is one"
    )
    remedy = "start with srun: srun python -m sr_jax.main ..., and srun python -m sr_jax.doctor"
    yield Finding(FAULT, "slurm-without-srun", what, remedy)
  on_node = _first_number(
    environment, "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"
  )
  visible = [i for i in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if i.strip()]
  if visible and visible[0] not in ("-1", "NoDevFiles") and len(visible) < on_node:
    what = (
      f"CUDA_VISIBLE_DEVICES={','.join(visible)} with {on_node} tasks on the node: JAX gives "
      "task i the i-th GPU that it sees, and ends with 'invalid device ordinal'"
    )
    remedy = (
      f"--gpus-per-node={on_node} --gpu-bind=none instead of --gpus-per-task, so that every task "
      "sees all GPUs; or one task a node"
    )
    yield Finding(FAULT, "slurm-gpus-per-task", what, remedy)

  proxies = [name for name in PROXIES if environment.get(name)]
  coordinator = environment.get("JAX_COORDINATOR_ADDRESS", "").rsplit(":", 1)[0]
  spared = (environment.get("no_grpc_proxy") or environment.get("no_proxy", "")).split(",")
  direct = any(host == "*" or host and coordinator.endswith(host) for host in spared)
  if proxies and (tasks > 1 or given) and not direct:
    what = f"{', '.join(proxies)} set: the processes may look for each other at the proxy, and hang"
    remedy = f"unset {' '.join(proxies)}, or put the hosts' names in no_proxy"
    yield Finding(WARNING, "proxy", what, remedy)


def _explicit(address: str, count: str, index: str) -> Findings:
  if not re.fullmatch(r".+:\d+", address):
    what = f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT"
    remedy = f"JAX_COORDINATOR_ADDRESS={address.rstrip(':') or 'HOST'}:8476 on every host"
    yield Finding(FAULT, "coordinator-address", what, remedy)
  if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
    what = f"JAX_PROCESS_ID={index} must be a number from 0 to JAX_NUM_PROCESSES={count} less one"
    yield Finding(FAULT, "process-id", what, "number the processes from 0, each once")


def _first_number(environment: Mapping[str, str], *names: str) -> int:
  """Of the first variable that has one: '4(x2)' is 4, four tasks on each of two nodes."""
  for name in names:
    if match := re.match(r"\d+", environment.get(name, "")):
      return int(match[0])
  return 0


CHECKS: dict[str, Callable[[argparse.Namespace], Findings]] = {
  "python": check_python,
  "machine": check_machine,
  "environment": check_environment,
  "devices": check_devices,
  "tensorflow": check_tensorflow,
  "decoding": check_decoding,
  "disk": check_disk,
  "data": check_data,
}


def run_check(name: str, args: argparse.Namespace) -> Findings:
  """The findings of one check, as they come; that it fails is the last of them."""
  try:
    yield from CHECKS[name](args)
  except ImportError as error:
    what = f"not checked: {error}"
    yield Finding(FAULT, "check-impossible", what, f"{INSTALL}, in the environment of this Python")
  except Exception as error:
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = f"the check itself failed: {type(error).__name__}: {error} ({place.name})"
    remedy = f"report it, please; `--only` with the others leaves it out: {_others(name)}"
    yield Finding(FAULT, "check-failed", what, remedy)


def _others(name: str) -> str:
  return ",".join(other for other in CHECKS if other != name)


def show(finding: Finding) -> None:
  name = f"{finding.name}: " if finding.name else ""
  level = finding.level if finding.level == OK else finding.level.upper()
  print(f"  {level:8}{name}{finding.what}", flush=True)
  if finding.remedy:
    print(f"  {'':8}-> {finding.remedy}", flush=True)


def main(argv: Sequence[str]) -> int:
  """Runs the checks and prints what they find. Returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m sr_jax.doctor",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--data", default="", metavar="DIR", help="decode and audit its images")
  parser.add_argument("--workdir", default="runs", metavar="DIR", help="of the runs (runs)")
  cache = os.environ.get("SR_JAX_CACHE") or "~/.cache/sr_jax"
  parser.add_argument("--cache", default=cache, metavar="DIR", help=f"of decoded images ({cache})")
  parser.add_argument("--hr_patch", type=int, default=128, help="side of the HR crops (128)")
  parser.add_argument("--only", default="", help=f"some of the checks: {','.join(CHECKS)}")
  parser.add_argument("--no-tensorflow", action="store_true", help="do not start TensorFlow")
  parser.add_argument("--timeout", type=float, default=180, help="seconds for JAX to start (180)")
  parser.add_argument("--json", default="", metavar="FILE", help="write the findings there as well")
  args = parser.parse_args(argv)
  names = args.only.split(",") if args.only else list(CHECKS)
  if unknown := [name for name in names if name not in CHECKS]:
    parser.error(f"--only={args.only}: {unknown[0]!r} must be one of {', '.join(CHECKS)}")
  if args.no_tensorflow:
    names = [name for name in names if name != "tensorflow"]

  report = []
  for name in names:
    print(name, flush=True)
    for finding in run_check(name, args):
      show(finding)
      report.append({"check": name, **finding._asdict()})
  levels = collections.Counter(entry["level"] for entry in report)
  faults, cautions = levels[FAULT], levels[WARNING]
  print(f"\n{_plural(faults, 'fault')}, {_plural(cautions, 'warning')}")
  if args.json:
    facts = {"sr_jax": sr_jax.__version__, "faults": faults, "warnings": cautions}
    try:
      pathlib.Path(args.json).write_text(json.dumps({**facts, "findings": report}, indent=2) + "\n")
    except OSError as error:
      print(f"error: --json: {error}", file=sys.stderr)
      return 1
  return 1 if faults else 0


def _plural(count: int, noun: str) -> str:
  return f"{count or 'no'} {noun}{'' if count == 1 else 's'}"


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
