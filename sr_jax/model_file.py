"""One trained network: from a RUN or from a file, and into one.

`load_model` takes the folder of a run (its newest sound checkpoint: averaged weights), a
`.safetensors`, `.npz` or `.pth` file, in any of the dialects that `formats/dialects.py` knows.
Files are written with BasicSR's names (`formats/state_dicts.py`), so that others read them, and in
their metadata with what those names cannot say: the fields of the network, what the weights were
trained from, how long and on what.
"""

import hashlib
import io
import json
import os
import pathlib
import re
from typing import Any, NamedTuple
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy

from sr_jax import checkpoint
from sr_jax import discriminators
from sr_jax import generators
from sr_jax import storage
from sr_jax import weight_files
from sr_jax.formats import state_dicts

Variables = dict[str, Any]
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_METADATA = "sr_jax"  # key of our JSON in a file's metadata


class Model(NamedTuple):
  """A network at rest: a generator, or a discriminator to fine-tune with.

  Attributes:
    name: of `generators.GENERATORS` or `discriminators.DISCRIMINATORS`.
    kwargs: fields of the module; a generator's `scale` among them.
    variables: {'params', 'batch_stats'}, float32.
    info: JSON values. `digest` identifies the variables, `ancestry` lists the digests of the models
      that these weights were trained from, nearest first; where they are known `step`, and `config`
      of the run, without anyone's folders. `file` says how the file that was read is written.
  """

  name: str
  kwargs: dict[str, Any]
  variables: Variables
  info: dict[str, Any]


def build_generator(name: str, kwargs: Mapping[str, Any], *, dtype: str = "float32") -> nn.Module:
  """Builds a generator by its name.

  Raises:
    ValueError: unknown name or field; lists the choices.
  """
  if name not in generators.GENERATORS:
    raise ValueError(f"generator {name!r} must be one of {', '.join(generators.GENERATORS)}")
  module = generators.GENERATORS[name]
  fields = [f for f in module.__dataclass_fields__ if f not in ("parent", "name", "dtype")]
  for field in kwargs:
    if field not in fields:
      raise ValueError(f"generator {name!r} has no field {field!r}; it has {', '.join(fields)}")
  return module(**kwargs, dtype=check_dtype(dtype))


def check_dtype(dtype: str) -> jnp.dtype:
  """Turns a recipe's `dtype` into one that convolutions compute in."""
  if dtype not in ("float32", "bfloat16"):
    raise ValueError(f"dtype={dtype!r} must be float32 or bfloat16")
  return jnp.dtype(dtype)


def load_model(path: str | pathlib.Path, *, dtype: str = "float32") -> tuple[nn.Module, Variables]:
  """Loads a generator.

  Args:
    path: a run's folder, gs://BUCKET/RUN too (its newest sound checkpoint), RUN/checkpoints/STEP,
      or a .safetensors, .npz or .pth file.
    dtype: of the convolutions.

  Returns:
    The module and {'params', 'batch_stats'}, as `module.apply(variables, lr, train=False)` takes
    them.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is not a generator that sr_jax knows.
  """
  model = read_model(path)
  return build_generator(model.name, model.kwargs, dtype=dtype), model.variables


def read_model(path: str | pathlib.Path) -> Model:
  """Reads a generator and what is known of it; arguments and errors as `load_model`."""
  path = storage.run_folder(path)
  if path.is_dir():
    if path.parent.name == "checkpoints" and path.name.isdigit():
      return _read_run(path.parent.parent, step=int(path.name))
    return _read_run(path)
  if storage.is_bucket(path):
    raise FileNotFoundError(
      f"{path} is no run, or not yours to read; model files are read from local paths: gcloud "
      "storage cp it"
    )
  return _read_file(path, "generator", state_dicts.read_generator)


def read_discriminator(path: str | pathlib.Path) -> Model:
  """Reads a discriminator from a .safetensors, .npz or .pth file; errors as `load_model`."""
  return _read_file(pathlib.Path(path), "discriminator", state_dicts.read_discriminator)


def save_model(path: str | pathlib.Path, model: Model, *, dtype: str = "float32") -> None:
  """Writes a network; the suffix says how, no suffix makes a run that holds only the generator.

  Args:
    path: .safetensors, .npz, .pth (needs torch), .onnx (needs onnx), .stablehlo, or a new folder.
    model: what to write; the last three forms are for generators alone.
    dtype: a key of DTYPES, of the weights; .onnx computes in it too.

  Raises:
    ValueError: a suffix or dtype that is unknown or does not go with the rest.
    ImportError: the package that a suffix needs is absent.
  """
  path = storage.local_path("--output", path)
  if dtype not in DTYPES:
    raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
  if not path.suffix:
    _check_generator(path, model)
    if dtype != "float32":
      raise ValueError(f"{path}: a run holds float32; give a file, or leave dtype={dtype} out")
    _write_run(path, model)
    return
  if path.suffix not in _WRITERS:
    raise ValueError(f"{path}: suffix must be {', '.join(_WRITERS)}, or none for a run's folder")
  contents = _WRITERS[path.suffix](path, model, dtype)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(contents)
  os.replace(temporary, path)


def parameter_count(model: Model) -> int:
  """Returns the number of trained parameters; BatchNorm's statistics are not among them."""
  return sum(np.size(leaf) for leaf in jax.tree.leaves(model.variables["params"]))


def digest(variables: Variables) -> str:
  """Returns 16 hex digits that identify a tree of arrays: names, shapes and float32 values."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    leaf = np.ascontiguousarray(leaf, np.float32)
    sha.update(f"{jax.tree_util.keystr(path, simple=True, separator='/')}{leaf.shape}".encode())
    sha.update(leaf)
  return sha.hexdigest()[:16]


def spandrel_objection(model: Model) -> str | None:
  """Says why chaiNNer, ComfyUI and whatever reads with spandrel would refuse a generator's file."""
  channels = in_channels(model.variables, model.kwargs)
  return state_dicts.spandrel_objection(model.name, model.kwargs, in_channels=channels)


def check_same_shapes(trees: Mapping[str, Any]) -> None:
  """Compares two trees of arrays, which `jax.tree.map` would broadcast in silence.

  Args:
    trees: {what it is called in the error: tree}, two of them.

  Raises:
    ValueError: names the first path that differs, with both shapes.
  """
  shapes = [
    {
      jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in trees.values()
  ]
  one, other = trees
  for path in sorted(shapes[0].keys() | shapes[1].keys()):
    ours, theirs = (tree.get(path, "absent") for tree in shapes)
    if ours != theirs:
      raise ValueError(
        f"{one} and {other} are different networks: {path} is {ours} in {one} and {theirs} in "
        f"{other}"
      )


def _read_run(run: storage.Folder, step: int | None = None) -> Model:
  config_path = run / "config.json"
  if not config_path.exists():
    raise FileNotFoundError(f"{run} has no config.json; is it the folder of a run?")
  config = checkpoint.read_json(config_path)
  try:
    name = config["generator"]["name"]
    kwargs = {"scale": config["scale"], **config["generator"]["kwargs"]}
    channels = config["generator"].get("in_channels", 3)
  except (KeyError, TypeError) as error:
    raise ValueError(f"{config_path} is not the configuration of a run ({error!r})") from error
  module = build_generator(name, kwargs)
  abstract = jax.eval_shape(
    lambda key: module.init(key, jnp.zeros((1, 16, 16, channels)), train=False),
    jax.random.key(0),
  )
  abstract = {"params": abstract["params"], "batch_stats": abstract.get("batch_stats", {})}
  variables, step, extra = checkpoint.restore_model(run, abstract, step=step)
  variables = jax.tree.map(np.asarray, variables)
  # A run that a file was converted into has its config from there, in `extra`.
  info = {"ancestry": [], "config": _without_folders(config), **extra.get("info", {})}
  return Model(name, kwargs, variables, {**info, "step": step, "digest": digest(variables)})


def _without_folders(config: Any) -> Any:
  """A configuration to publish: of paths only the last part, since folders name people."""
  if isinstance(config, dict):
    return {key: _without_folders(value) for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return [_without_folders(value) for value in config]
  if isinstance(config, str):
    return ",".join(_without_folder(part) for part in config.split(","))
  return config


def _without_folder(path: str) -> str:
  """The last part of a path; tfds:NAME and hf:OWNER/NAME are none."""
  if path.startswith(("tfds:", "hf:")):
    return path
  return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _write_run(run: pathlib.Path, model: Model) -> None:
  if (run / "checkpoints").exists():
    raise ValueError(f"{run} is a run already; choose another --output")
  if run.exists() and (not run.is_dir() or any(run.iterdir())):
    raise ValueError(f"{run} exists and is not empty; choose another --output")
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
  (run / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  checkpoint.save_model(
    run, model.variables, step=model.info.get("step", 0), extra={"info": _published(model)}
  )


def in_channels(variables: Variables, kwargs: Mapping[str, Any]) -> int:
  """Returns the number of channels of a model's LR images."""
  return variables["params"]["conv_first"]["kernel"].shape[2] // (
    kwargs.get("input_unshuffle", 1) ** 2
  )


def _read_file(path: pathlib.Path, what: str, recognise: Any) -> Model:
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; give a run's folder or a model file")
  tree, metadata = weight_files.read_weights(path)
  told = metadata.get(_METADATA, "{}")
  if isinstance(tree, dict) and _METADATA in tree:  # .npz and .pth have no other place for it
    told = str(tree.pop(_METADATA))
  known = _parse_metadata(path, told)
  try:
    name, kwargs, variables, facts = recognise(tree)
  except ValueError as error:
    raise ValueError(f"{path} holds no {what} that sr_jax knows: {error}") from error
  if known.get("architecture", name) == name:
    kwargs = {**known.get("kwargs", {}), **kwargs}  # what shapes say stands over what is told
    _check_kwargs(path, name, kwargs)
  variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
  variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
  info = {"ancestry": [], **known.get("info", {}), "digest": digest(variables), "file": facts}
  return Model(name, kwargs, variables, info)


def _check_kwargs(path: pathlib.Path, name: str, kwargs: Mapping[str, Any]) -> None:
  """Compares the types of told fields with those of the module's own."""
  module = {**generators.GENERATORS, **discriminators.DISCRIMINATORS}[name]
  for field, value in kwargs.items():
    default = getattr(module, field, None)
    number = isinstance(default, float) and type(value) is int
    if type(value) is not type(default) and not number:
      raise ValueError(
        f"{path}: its metadata say {field}={value!r} of a {name}, which has none such"
      )


def _parse_metadata(path: pathlib.Path, text: str) -> dict[str, Any]:
  """What `save_model` wrote beside the arrays; {} in others' files."""
  try:
    known = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path}: its metadata {_METADATA!r} are not JSON: {error}") from error
  parts = [known.get(part, {}) for part in ("kwargs", "info")] if isinstance(known, dict) else [0]
  if all(isinstance(part, dict) for part in parts):
    ancestry, config = parts[1].get("ancestry", []), parts[1].get("config", {})
    sections = [config, parts[1].get("interpolation", {})]
    if isinstance(config, dict):
      sections += [config.get(name, {}) for name in ("data", "discriminator")]
    step = parts[1].get("step", 0)
    if (
      isinstance(ancestry, list)
      and all(isinstance(digest, str) for digest in ancestry)
      and all(isinstance(section, dict) for section in sections)
      and type(step) is int
      and step >= 0
      and all(isinstance(value, (bool, int, float, str)) for value in parts[0].values())
    ):
      return known
  raise ValueError(f"{path}: its metadata {_METADATA!r} are not what save_model writes")


def _metadata(model: Model) -> dict[str, str]:
  """What a file's names and shapes cannot say, as a file's metadata: strings by name."""
  told = {"architecture": model.name, "kwargs": model.kwargs, "info": _published(model)}
  scale = {"scale": str(model.kwargs["scale"])} if "scale" in model.kwargs else {}
  return {"architecture": model.name, **scale, _METADATA: json.dumps(told)}


def _published(model: Model) -> dict[str, Any]:
  """A model's info but for what was only true of the file that it was read from."""
  return {key: value for key, value in model.info.items() if key != "file"}


def _arrays(model: Model, dtype: str) -> dict[str, np.ndarray]:
  is_generator = model.name in generators.GENERATORS
  if is_generator:
    state = state_dicts.to_state_dict(model.name, model.variables)
  else:
    state = state_dicts.discriminator_to_state_dict(model.variables)
  arrays = {}
  for key, value in state.items():
    with np.errstate(over="ignore"):
      arrays[key] = np.ascontiguousarray(value, DTYPES[dtype])
    if np.isfinite(value).all() and not np.isfinite(arrays[key].astype(np.float32)).all():
      raise ValueError(f"{key} has values too large for {dtype}; try bfloat16 or float32")
  return arrays


def _to_safetensors(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  data = safetensors.numpy.save(_arrays(model, dtype), metadata=_metadata(model))
  # The library writes the metadata in random order: the same model would have another sha256.
  end = 8 + int.from_bytes(data[:8], "little")
  header = json.loads(data[8:end])
  header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text + data[end:]


def _to_npz(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  if dtype == "bfloat16":
    raise ValueError(f"{path}: numpy's files have no bfloat16; try .safetensors, or float16")
  file = io.BytesIO()
  np.savez(file, **_arrays(model, dtype), **{_METADATA: np.array(_metadata(model)[_METADATA])})
  return file.getvalue()


def _to_pth(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"{path}: writing .pth needs PyTorch; pip install torch, or write .safetensors, which "
      "chaiNNer, ComfyUI and spandrel read as well"
    ) from error
  torch_dtype = getattr(torch, dtype)
  state = {
    key: torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(torch_dtype)
    for key, array in _arrays(model, dtype).items()
  }
  # BasicSR's key for averaged weights of a generator; of a discriminator it averages none.
  wrapper = "params_ema" if model.name in generators.GENERATORS else "params"
  file = io.BytesIO()
  torch.save({wrapper: state, _METADATA: _metadata(model)[_METADATA]}, file)
  return file.getvalue()


def _to_onnx(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  _check_generator(path, model)
  if dtype == "bfloat16":
    raise ValueError(f"{path}: converters do not read bfloat16 ONNX files; try float16")
  from sr_jax.formats import onnx_export  # needs the package onnx, which is an extra

  proto = onnx_export.to_onnx(
    model.name, model.kwargs, model.variables, dtype=dtype, metadata=_metadata(model)
  )
  return proto.SerializeToString(deterministic=True)


def _to_stablehlo(path: pathlib.Path, model: Model, dtype: str) -> bytes:
  _check_generator(path, model)
  if dtype != "float32":
    raise ValueError(f"{path}: .stablehlo computes in float32; leave dtype={dtype} out")
  from sr_jax.formats import stablehlo_export

  return stablehlo_export.to_stablehlo(model.name, model.kwargs, model.variables)


def _check_generator(path: pathlib.Path, model: Model) -> None:
  if model.name not in generators.GENERATORS:
    raise ValueError(
      f"{path}: {model.name!r} is a discriminator, which is written as .safetensors, .npz or .pth"
    )


_WRITERS = {
  ".safetensors": _to_safetensors,
  ".npz": _to_npz,
  ".pth": _to_pth,
  ".onnx": _to_onnx,
  ".stablehlo": _to_stablehlo,
}
