"""Hands a network to OpenVINO or ONNX Runtime where JAX would run on the CPU.

For images of 256x256 and an RRDBNet they take a tenth less time than JAX, for smaller ones about as
much (docs/cpu.md). A network is exported once, to an .onnx file in the cache, and an engine's first
answer is compared with JAX's. Both packages are optional and are imported when they are used.
"""

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np
from sr_jax import MissingPackageError, UserError, __version__

from sr_jax.machine import cache
from sr_jax.machine import cpus
from sr_jax.machine.writing import write_file
from sr_jax.models.model import Model
from sr_jax.networks.build import build_generator, in_channels

TOLERANCE = 1e-4  # between an engine's output and JAX's, of images in [0, 1]
_KEPT = 8  # networks in the cache: the ones used last

# float32 [1, c, h, w] in [0, 1] -> float32 [1, c, h*s, w*s], not clipped.
Forward = Callable[[np.ndarray], np.ndarray]


class Engine(NamedTuple):
  """What computes an image.

  Attributes:
    name: with its version, as results state it: 'OpenVINO 2026.4.1 (cpu)'.
    run: uint8 [h, w, c] -> uint8 [h*s, w*s, c], for every h and w that the network takes, clipped
      and rounded as JAX's images are; None for JAX itself.
    note: to follow the name where it is shown: how to choose another, or why it is JAX.
    forward: the same before clipping and rounding; None for JAX itself.
  """

  name: str
  run: Callable[[np.ndarray], np.ndarray] | None = None
  note: str = ""
  forward: Forward | None = None


def open_engine(model: Model, choice: str = "auto") -> Engine:
  """Opens what upscales with a generator.

  Args:
    model: of `read.read_model`.
    choice: of CHOICES. 'auto' is the first engine that is installed and does what JAX does, and JAX
      where there is none, or where JAX has an accelerator.

  Raises:
    UserError: unknown choice; or the engine that was asked for differs from JAX.
    MissingPackageError: it or the package onnx is not installed.
  """
  if choice not in CHOICES:
    raise UserError(f"--engine={choice!r} must be one of {', '.join(CHOICES)}")
  backend = jax.default_backend()
  on_jax = Engine(f"JAX {jax.__version__} ({backend})")
  if choice == "jax" or (choice == "auto" and backend != "cpu"):
    return on_jax
  installed = [name for name in ENGINES if importlib.util.find_spec(name)]
  if choice != "auto":
    if choice not in installed:
      raise MissingPackageError(f"--engine={choice} needs a package: pip install {choice} onnx")
    return _open(choice, model)
  reasons = []
  for name in installed:
    try:
      return _open(name, model)
    except Exception as error:  # whatever goes wrong in an engine, JAX can do it
      reasons.append(" ".join(f"{name}: {error}".split()))
  if not installed:
    reasons = [f"{next(iter(ENGINES))} is not installed (pip install {next(iter(ENGINES))} onnx)"]
  return on_jax._replace(note=f"; {'; '.join(reasons)}")


def _open(name: str, model: Model) -> Engine:
  """Opens an engine that is installed, with the cache's network or a new one."""
  path = cache_path(model)
  contents, checked = _read(path) or (export(model), [])
  title, forward = ENGINES[name](contents)
  if title not in checked:
    error = difference(forward, model)
    if not error <= TOLERANCE:  # NaN is none
      raise UserError(f"{title} differs from JAX by {error:.2g}, more than {TOLERANCE}")
    _write(path, contents, [*checked, title])
  note = "; --engine=jax for JAX"
  return Engine(f"{title} (cpu)", functools.partial(_run, forward), note, forward)


def _run(forward: Forward, image: np.ndarray) -> np.ndarray:
  lr = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / 255
  sr = np.clip(forward(lr)[0], 0, 1)
  sr *= 255
  sr += 0.5
  return np.ascontiguousarray(sr.astype(np.uint8).transpose(1, 2, 0))


def difference(forward: Forward, model: Model) -> float:
  """The largest difference from JAX on an image of noise, with sides that any unshuffle divides."""
  channels = in_channels(model.variables, model.kwargs)
  lr = np.random.default_rng(0).random((1, 24, 40, channels), np.float32)
  module = build_generator(model.name, model.kwargs)
  expected = jax.jit(lambda v, x: module.apply(v, x, train=False))(model.variables, lr)
  sr = forward(np.ascontiguousarray(lr.transpose(0, 3, 1, 2))).transpose(0, 2, 3, 1)
  if sr.shape != expected.shape:
    return math.inf
  return float(np.abs(sr - np.asarray(expected)).max())


def _openvino(contents: bytes) -> tuple[str, Forward]:
  # Importing it would send a message to Google Analytics and write into ~/intel; without this
  # package it does neither.
  sys.modules.setdefault("openvino_telemetry", None)
  import openvino

  core = openvino.Core()
  settings = {
    "INFERENCE_PRECISION_HINT": "f32",  # by itself it takes bfloat16 where the CPU has it
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_NUM_THREADS": cpus.available(),
    # By default 5000: memory grows by 1.25 MB for each size of image. With 128 it stops growing.
    "CPU_RUNTIME_CACHE_CAPACITY": 128,
  }
  compiled = core.compile_model(core.read_model(contents), "CPU", settings)
  request = compiled.create_infer_request()
  title = f"OpenVINO {openvino.__version__.split('-')[0]}"
  return title, lambda lr: request.infer({"input": lr})["output"]


def _onnxruntime(contents: bytes) -> tuple[str, Forward]:
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = cpus.available()
  # Both keep memory for each size of image, and give none back.
  options.enable_mem_pattern = False
  options.enable_cpu_mem_arena = False
  session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
  title = f"ONNX Runtime {onnxruntime.__version__}"
  return title, lambda lr: session.run(["output"], {"input": lr})[0]


# By the packages' names, the faster first.
ENGINES: Mapping[str, Callable[[bytes], tuple[str, Forward]]] = {
  "openvino": _openvino,
  "onnxruntime": _onnxruntime,
}
CHOICES = ("auto", "jax", *ENGINES)


def export(model: Model) -> bytes:
  from sr_jax.formats import onnx_export  # needs the package onnx, which is an extra

  proto = onnx_export.to_onnx(model.name, model.kwargs, model.variables)
  return proto.SerializeToString(deterministic=True)


def cache_path(model: Model) -> pathlib.Path:
  """The file in the cache, whose name is a digest of all that the graph depends on."""
  told: list[Any] = [__version__, model.name, model.kwargs, model.info["digest"]]
  key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]
  return cache.cache_folder() / "engines" / f"{key}.onnx"


def _read(path: pathlib.Path) -> tuple[bytes, list[str]] | None:
  """Reads an exported network and the engines that passed; None if it is absent or damaged."""
  try:
    contents, record = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    sound = hashlib.sha256(contents).hexdigest() == record["sha256"]
    if not (sound and isinstance(record["checked"], list)):
      return None
  except (OSError, ValueError, LookupError, TypeError):
    return None
  for file in (path, path.with_suffix(".json")):
    with contextlib.suppress(OSError):  # someone else's file
      os.utime(file)
  return contents, record["checked"]


def _write(path: pathlib.Path, contents: bytes, checked: list[str]) -> None:
  """Keeps an exported network, and throws the ones away that were used longest ago."""
  record = {"sha256": hashlib.sha256(contents).hexdigest(), "checked": checked}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    for file, data in (
      (path, contents),
      (path.with_suffix(".json"), json.dumps(record).encode()),
    ):
      write_file(file, data)
    files = sorted(path.parent.iterdir(), key=lambda file: file.stat().st_mtime)
    for file in files[: -2 * _KEPT]:
      file.unlink(missing_ok=True)
  except OSError as error:  # no room, or not ours to write: it works without
    logging.warning("the network is exported anew each time: %s", error)
