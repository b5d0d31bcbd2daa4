"""One trained generator: from a RUN or from a file, and into one.

`load_model` takes the folder of a run (its newest sound checkpoint: averaged weights), a
`.safetensors`, `.npz` or `.pth` file. Files hold PyTorch's names and layouts (`state_dicts.py`), so
that others read them, and in their metadata what those names cannot say: the fields of the network,
what the weights were trained from, how long.
"""

import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sr_jax import checkpoint
from sr_jax import generators
from sr_jax import state_dicts
from sr_jax import unpickle

Variables = dict[str, Any]
_METADATA = "sr_jax"  # key of our JSON in a file's metadata
_FILES = (".safetensors", ".npz", ".pth")


class Model(NamedTuple):
  """A generator at rest.

  Attributes:
    name: of `generators.GENERATORS`.
    kwargs: fields of the module, `scale` among them.
    variables: {'params', 'batch_stats'}, float32.
    info: JSON values. `digest` identifies the variables, `ancestry` lists the digests of the models
      that these weights were trained from, nearest first; `step` and what else is known.
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
    path: a run's folder (its newest sound checkpoint), RUN/checkpoints/STEP, or a .safetensors,
      .npz or .pth file.
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
  path = pathlib.Path(path)
  if path.is_dir():
    if path.parent.name == "checkpoints" and path.name.isdigit():
      return _read_run(path.parent.parent, step=int(path.name))
    return _read_run(path)
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; give a run's folder or a model file")
  if path.suffix not in _FILES:
    raise ValueError(f"{path}: suffix must be one of {', '.join(_FILES)}, or a run's folder")
  state, known = _read_file(path)
  try:
    name, kwargs, variables = state_dicts.from_state_dict(state)
  except ValueError as error:
    raise ValueError(f"{path} holds no generator that sr_jax knows: {error}") from error
  if known.get("architecture", name) == name:
    kwargs = {**known.get("kwargs", {}), **kwargs}  # what shapes say stands over what is told
  variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
  variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
  info = {"ancestry": [], **known.get("info", {}), "digest": digest(variables)}
  return Model(name, kwargs, variables, info)


def save_model(path: str | pathlib.Path, model: Model) -> None:
  """Writes a generator; the suffix says how, no suffix makes a run that holds only the model.

  Raises:
    ValueError: the suffix is unknown.
  """
  path = pathlib.Path(path)
  if not path.suffix:
    _write_run(path, model)
    return
  if path.suffix not in (".safetensors", ".npz"):
    raise ValueError(f"{path}: suffix must be .safetensors or .npz, or none for a run's folder")
  state = {
    key: np.ascontiguousarray(value, np.float32)
    for key, value in state_dicts.to_state_dict(model.name, model.variables).items()
  }
  metadata = json.dumps({"architecture": model.name, "kwargs": model.kwargs, "info": model.info})
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "wb") as file:
    if path.suffix == ".npz":
      np.savez(file, **state, **{_METADATA: np.array(metadata)})
    else:
      file.write(safetensors.numpy.save(state, metadata={_METADATA: metadata}))
  os.replace(temporary, path)


def digest(variables: Variables) -> str:
  """Returns 16 hex digits that identify a tree of arrays: names, shapes and float32 values."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    leaf = np.ascontiguousarray(leaf, np.float32)
    sha.update(f"{jax.tree_util.keystr(path, simple=True, separator='/')}{leaf.shape}".encode())
    sha.update(leaf)
  return sha.hexdigest()[:16]


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


def _read_run(run: pathlib.Path, step: int | None = None) -> Model:
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
  info = {**extra.get("info", {}), "step": step, "digest": digest(variables)}
  return Model(name, kwargs, variables, {"ancestry": [], **info})


def _write_run(run: pathlib.Path, model: Model) -> None:
  if (run / "checkpoints").exists():
    raise ValueError(f"{run} is a run already; choose another --output")
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
    run, model.variables, step=model.info.get("step", 0), extra={"info": model.info}
  )


def in_channels(variables: Variables, kwargs: Mapping[str, Any]) -> int:
  """Returns the number of channels of a model's LR images."""
  return variables["params"]["conv_first"]["kernel"].shape[2] // (
    kwargs.get("input_unshuffle", 1) ** 2
  )


def _read_file(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """Returns the arrays by name, and what `save_model` wrote beside them: {} in others' files."""
  try:
    metadata = "{}"
    if path.suffix == ".npz":
      with np.load(path, allow_pickle=False) as arrays:
        state = dict(arrays)
      metadata = str(state.pop(_METADATA, metadata))
    elif path.suffix == ".pth":
      state = unpickle.read_torch_file(path)
      for wrapper in ("params_ema", "params", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
          state = state[wrapper]
          break
    else:
      with safetensors.safe_open(path, framework="numpy") as file:
        metadata = (file.metadata() or {}).get(_METADATA, metadata)
      state = safetensors.numpy.load_file(path)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
      raise ValueError("it holds something else than arrays by name")
    known = json.loads(metadata)
    if not all(isinstance(known.get(part, {}), dict) for part in ("kwargs", "info")):
      raise ValueError(f"its metadata {_METADATA!r} are not what save_model writes")
    return state, known
  except unpickle.UnsafeFileError:
    raise  # names the file, and says what to do
  except Exception as error:  # numpy, zipfile and json raise nearly anything for a damaged file
    raise ValueError(f"{path} cannot be read as {path.suffix}: {error}") from error
