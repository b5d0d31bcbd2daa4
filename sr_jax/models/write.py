"""Writes a trained network to a file, or to a run that holds only the generator."""

import difflib
import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from sr_jax import UserError
from sr_jax.formats import METADATA
from sr_jax.formats import state_dicts
from sr_jax.formats import weight_files
from sr_jax.machine.paths import user_path
from sr_jax.machine.writing import write_file
from sr_jax.models.model import FORMAT, Model
from sr_jax.networks.build import GENERATORS, in_channels
from sr_jax.runs import checkpoint
from sr_jax.runs import storage

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def save_model(path: str | pathlib.Path, model: Model, *, dtype: str = "float32") -> None:
  """Writes a network in the form of the path's suffix; without one, as a run with only a generator.

  Args:
    path: .safetensors, .npz, .pth (needs torch), .onnx (needs onnx), .stablehlo, or a new folder.
    model: the model to write; the last three forms are for generators only.
    dtype: a key of DTYPES, the dtype of the weights; an .onnx file computes in it too.

  Raises:
    UserError: the suffix or the dtype is unknown, or they do not go together or with the model.
    MissingPackageError: the package that a suffix needs is not installed.
  """
  path = check_form(path, dtype)
  if not path.suffix:
    _check_generator(path, model)
    _write_run(path, model)
    return
  contents = _WRITERS[path.suffix](path, model, dtype)
  path.parent.mkdir(parents=True, exist_ok=True)
  write_file(path, contents)


def check_form(path: str | pathlib.Path, dtype: str = "float32") -> pathlib.Path:
  """Checks what `save_model` is asked for, before a model is read.

  Returns:
    The path, with ~ expanded.

  Raises:
    UserError: the suffix or the dtype is unknown, or they do not go together.
  """
  path = storage.local_path("--output", path)
  if dtype not in DTYPES:
    short = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
    similar = difflib.get_close_matches(dtype.lower(), DTYPES, n=1, cutoff=0.5)
    fix = short.get(dtype.lower()) or (similar or ["float32"])[0]
    raise UserError(f"--dtype={dtype} must be one of {', '.join(DTYPES)}; try --dtype={fix}")
  if not path.suffix and dtype != "float32":
    raise UserError(
      f"--dtype={dtype}: a run holds float32, and {path} will be one; give a file, or "
      "leave --dtype out"
    )
  if path.suffix and path.suffix not in _WRITERS:
    raise UserError(
      f"--output={path}: suffix must be {', '.join(_WRITERS)}, or none for a run's folder; try "
      f"--output={path.with_suffix('.safetensors')}"
    )
  return path


def check_apart(output: pathlib.Path, *inputs: str) -> None:
  """Refuses to write a model over one of those that it is made from.

  Raises:
    UserError: the output is one of the inputs, perhaps by another path.
  """
  for path in inputs:
    if user_path(output).resolve() == user_path(path).resolve():
      raise UserError(f"--output={output} is the input {path} itself; choose another name")


def _write_run(run: pathlib.Path, model: Model) -> None:
  if (run / "checkpoints").exists():
    raise UserError(f"{run} is a run already; choose another --output")
  if run.exists() and (not run.is_dir() or any(run.iterdir())):
    raise UserError(f"{run} exists and is not empty; choose another --output")
  run.mkdir(parents=True, exist_ok=True)
  kwargs = dict(model.kwargs)
  config = {
    "scale": kwargs.pop("scale"),
    "generator": {
      "name": model.name,
      "kwargs": kwargs,
      "in_channels": in_channels(model.variables, kwargs),
    },
  }
  write_file(run / "config.json", json.dumps(config, indent=2) + "\n")
  checkpoint.save_model(
    run, model.variables, step=model.info.get("step", 0), extra={"info": _published(model)}
  )


def _metadata(model: Model) -> dict[str, str]:
  """Returns the metadata of a file, {name: text}: what its arrays' names and shapes cannot say."""
  told = {
    "format": FORMAT,
    "architecture": model.name,
    "kwargs": model.kwargs,
    "info": _published(model),
  }
  scale = {"scale": str(model.kwargs["scale"])} if "scale" in model.kwargs else {}
  return {"architecture": model.name, **scale, METADATA: json.dumps(told)}


def _published(model: Model) -> dict[str, Any]:
  """Returns a model's info without what was only true of the file that it was read from."""
  return {key: value for key, value in model.info.items() if key != "file"}


def _arrays(model: Model, dtype: str) -> dict[str, np.ndarray]:
  is_generator = model.name in GENERATORS
  if is_generator:
    state = state_dicts.to_state_dict(model.name, model.variables)
  else:
    state = state_dicts.discriminator_to_state_dict(model.variables)
  arrays = {}
  for key, value in state.items():
    with np.errstate(over="ignore"):
      arrays[key] = np.ascontiguousarray(value, DTYPES[dtype])
    if np.isfinite(value).all() and not np.isfinite(arrays[key].astype(np.float32)).all():
      raise UserError(f"{key} has values too large for {dtype}; try bfloat16 or float32")
  return arrays


def _to_weights(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  # BasicSR's key for a generator's averaged weights; it does not average a discriminator's.
  wrapper = "params_ema" if model.name in GENERATORS else "params"
  write = weight_files.WRITERS[path.suffix]
  return write(path, _arrays(model, dtype), _metadata(model), wrapper)


def _to_onnx(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  _check_generator(path, model)
  if dtype == "bfloat16":
    raise UserError(f"{path}: converters do not read bfloat16 ONNX files; try float16")
  from sr_jax.formats import onnx_export  # needs the package onnx, which is an extra

  proto = onnx_export.to_onnx(
    model.name, model.kwargs, model.variables, dtype=dtype, metadata=_metadata(model)
  )
  return proto.SerializeToString(deterministic=True)


def _to_stablehlo(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  _check_generator(path, model)
  if dtype != "float32":
    raise UserError(f"{path}: .stablehlo computes in float32; leave dtype={dtype} out")
  from sr_jax.formats import stablehlo_export

  return stablehlo_export.to_stablehlo(model.name, model.kwargs, model.variables)


def _check_generator(path: pathlib.Path, model: Model) -> None:
  if model.name not in GENERATORS:
    raise UserError(
      f"{path}: {model.name!r} is a discriminator, which is written as "
      f"{', '.join(weight_files.WRITERS)}"
    )


_WRITERS = {
  **dict.fromkeys(weight_files.WRITERS, _to_weights),
  ".onnx": _to_onnx,
  ".stablehlo": _to_stablehlo,
}
