"""Checks Python and its packages: versions, and combinations that are known not to work."""

import argparse
import importlib
import importlib.metadata
import io
import platform
import re
import sys
from typing import Any

from sr_jax.doctor.finding import (
  FAULT,
  INSTALL,
  OK,
  ROOT,
  WARNING,
  Finding,
  Findings,
  in_child,
  last_line,
)
from sr_jax.machine.memory import nvidia_gpus

TENSORFLOW = ("tensorflow-cpu", "tensorflow", "tf-nightly-cpu", "tf-nightly")
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")

# Packages that another one needs without declaring it in its metadata: (which one, what fails).
UNDECLARED = {
  "importlib_resources": ("tensorflow-datasets", "tensorflow-datasets imports it"),
  "tensorboard": ("clu", "clu imports it to write TensorBoard files"),
  "flatbuffers": ("jax", "jax.export, so `convert --output X.stablehlo`, needs it"),
}
WITHOUT = {
  "tensorflow": "train with --config.data.input=device and images from a folder",
  "tensorflow-datasets": "give folders instead of tfds:NAME",
}


def check_python(args: argparse.Namespace) -> Findings:
  """Checks Python and the packages: versions, and combinations that are known not to work."""
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
  """Returns {package that sr_jax needs: lower bound}; TensorFlow's builds are all 'tensorflow'."""
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
  """Returns a package's version from its metadata, without importing it; '' if there is none."""
  try:
    return importlib.metadata.version(name) or ""
  except importlib.metadata.PackageNotFoundError:
    return ""


def tensorflow() -> tuple[str, str]:
  """Returns the name of TensorFlow's build that is installed, and its version; '' for none."""
  return next(((name, version) for name in TENSORFLOW if (version := installed(name))), ("", ""))


def _numbers(version: str) -> tuple[int, ...]:
  """Makes a version comparable, without zeros at the end: '0.12.0rc1' -> (0, 12)."""
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


def with_extra(extra: str) -> str:
  """Returns the command that installs the present version of jax with an extra."""
  version = installed("jax")
  return f'pip install "jax[{extra}]{f"=={version}" if version else ""}"'


def check_tensorflow(args: argparse.Namespace) -> Findings:
  """Checks that TensorFlow works and sees no accelerator, all of whose memory it would take."""
  name, version = tensorflow()
  if not name:
    yield Finding(OK, "", "TensorFlow is not installed")
    return
  facts, problem = in_child("packages", "probe_tensorflow", args.timeout)
  if problem:
    what = f"{name} {version} does not work: {last_line(problem)}"
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
  """Tries TensorFlow, and packages that are built on it; runs in a process of its own."""
  import numpy as np
  from PIL import Image

  from sr_jax.machine.tensorflow import import_tensorflow

  tf = import_tensorflow()
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


def check_models(args: argparse.Namespace) -> Findings:
  """Checks that the models that come with sr_jax are there and undamaged."""
  del args
  found, error = in_child("packages", "probe_models", 120)
  if error:
    yield Finding(WARNING, "models-unchecked", f"not checked: {last_line(error)}", INSTALL)
    return
  models, remedy = found["models"], found["remedy"]
  for name, problem in models.items():
    if problem:
      yield Finding(FAULT, "model-damaged", f"the model {name} {problem}", remedy)
  sound = [name for name, problem in models.items() if not problem]
  if sound:
    yield Finding(OK, "", f"models that come with sr_jax: {', '.join(sound)}")
  elif not models:
    yield Finding(WARNING, "models-missing", "no model comes with this copy of sr_jax", remedy)


def probe_models() -> dict[str, Any]:
  """Says of each model that comes with sr_jax what is wrong with its file; '' for nothing."""
  from sr_jax.models import catalog

  models = {
    name: catalog.damage(catalog.folder() / entry["file"], entry["sha256"])
    for name, entry in catalog.manifest().items()
  }
  return {"models": models, "remedy": catalog.REMEDY}
