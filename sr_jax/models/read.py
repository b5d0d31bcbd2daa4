"""Reads a trained network from a run or from a file.

`load_model` takes the name of a model that comes with sr_jax, the folder of a run (its newest sound
checkpoint: averaged weights), or a file in any of the dialects that `formats/dialects.py` knows.
`write.py` writes files with BasicSR's names (`formats/state_dicts.py`), so that others read them,
and puts into their metadata what those names cannot say: the fields of the network, what the
weights were trained from, how long and on what.
"""

import difflib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError, printable
from sr_jax.formats import METADATA
from sr_jax.formats import state_dicts
from sr_jax.formats import weight_files
from sr_jax.machine.paths import user_path
from sr_jax.models import catalog
from sr_jax.models.model import FORMAT, Model
from sr_jax.networks.build import DISCRIMINATORS, GENERATORS, build_generator, renamed
from sr_jax.networks import trees
from sr_jax.runs import checkpoint
from sr_jax.runs.settings import read_json
from sr_jax.runs import storage


def load_model(
  path: str | pathlib.Path, *, dtype: str = "float32"
) -> tuple[nn.Module, trees.Variables]:
  """Loads a generator.

  Args:
    path: the name of a model that comes with sr_jax (`catalog.py`), a run's folder or
      gs://BUCKET/RUN (its newest sound checkpoint is taken), RUN/checkpoints/STEP, or a
      .safetensors, .npz or .pth file.
    dtype: the dtype of the convolutions, 'float32' or 'bfloat16'.

  Returns:
    The module, and {'params', 'batch_stats'}: `module.apply(variables, lr, train=False)`
    takes them.

  Raises:
    FileNotFoundError: there is nothing at this path.
    UserError: it is not a generator that sr_jax knows, or a weight is NaN or Inf.
    MissingPackageError: the path is in a bucket, and gcsfs is not installed.
  """
  model = read_model(path)
  return build_generator(model.name, model.kwargs, dtype=dtype), model.variables


def read_model(path: str | pathlib.Path) -> Model:
  """Reads a generator and what is known about it.

  Args:
    path: a name, a run or a file, as for `load_model`.

  Raises:
    FileNotFoundError: there is nothing at this path.
    UserError: it is not a generator that sr_jax knows, or a weight is NaN or Inf.
    MissingPackageError: the path is in a bucket, and gcsfs is not installed.
  """
  if not str(path).strip():
    raise UserError(
      "the name of a model is empty; give a run's folder, a model file, or one of the models that "
      f"come with sr_jax: {', '.join(catalog.manifest())}"
    )
  shipped = None if user_path(path).exists() else catalog.find(str(path))
  path = shipped or storage.run_folder(path)
  if path.is_dir():
    if path.parent.name == "checkpoints" and path.name.isdigit():
      return _read_run(path.parent.parent, step=int(path.name))
    return _read_run(path)
  if storage.is_bucket(path):
    raise FileNotFoundError(
      f"{path} is no run, or you may not read it; a model file must be a local one: copy it with "
      "gcloud storage cp"
    )
  return _read_file(path, "generator", state_dicts.read_generator)


def read_discriminator(path: str | pathlib.Path) -> Model:
  """Reads a discriminator from a .safetensors, .npz or .pth file.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: it is not a discriminator that sr_jax knows, or a weight is NaN or Inf.
  """
  return _read_file(user_path(path), "discriminator", state_dicts.read_discriminator)


def _read_run(run: storage.Folder, step: int | None = None) -> Model:
  config_path = run / "config.json"
  if not config_path.exists():
    raise FileNotFoundError(f"{run} has no config.json; is it the folder of a run?")
  config = read_json(config_path)
  try:
    name = str(config["generator"]["name"])
    kwargs = {"scale": config["scale"], **renamed(config["generator"]["kwargs"])}
    channels = config["generator"].get("in_channels") or config.get("data", {}).get("channels", 3)
    if name in GENERATORS:
      _check_kwargs(config_path, name, kwargs, "generator.kwargs")
    module = build_generator(name, kwargs)
    abstract = jax.eval_shape(
      lambda key: module.init(key, jnp.zeros((1, 16, 16, channels)), train=False),
      jax.random.key(0),
    )
  except UserError:
    raise
  except Exception as error:  # whatever flax and JAX raise for a network that cannot be
    raise UserError(
      f"{config_path} is not the configuration of a run ({printable(repr(error))})"
    ) from error
  abstract = {"params": abstract["params"], "batch_stats": abstract.get("batch_stats", {})}
  variables, step, extra = checkpoint.restore_model(run, abstract, step=step)
  variables = jax.tree.map(np.asarray, variables)
  trees.check_finite(
    f"{run}, step {step}", variables, f"take an earlier one: {run}/checkpoints/STEP"
  )
  # A run that a file was converted into has its config from there, in `extra`.
  info = {"ancestry": [], "config": without_folders(config), **extra.get("info", {})}
  return Model(name, kwargs, variables, {**info, "step": step, "digest": trees.digest(variables)})


def without_folders(config: Any) -> Any:
  """Shortens the paths in a configuration to their last part, since folders can name people."""
  if isinstance(config, dict):
    return {key: without_folders(value) for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return [without_folders(value) for value in config]
  if isinstance(config, str):
    return ",".join(_without_folder(part) for part in config.split(","))
  return config


def _without_folder(path: str) -> str:
  """The last part of a path, or of the path in SCHEME:PATH; tfds: and hf: are not of paths."""
  scheme, path = re.fullmatch(r"((?:[a-z][a-z0-9]+:(?!//))?)(.*)", path, re.DOTALL).groups()
  if scheme not in ("tfds:", "hf:"):
    path = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
  return scheme + path


def _read_file(path: pathlib.Path, what: str, recognise: Any) -> Model:
  if not path.exists() and what == "discriminator":
    raise FileNotFoundError(
      f"{path} does not exist; give the file of a discriminator (.pth, .safetensors or .npz)"
    )
  if not path.exists():
    names = ", ".join(catalog.manifest())
    close = difflib.get_close_matches(str(path).lower(), ["bicubic", *catalog.manifest()], n=1)
    raise FileNotFoundError(
      f"{path} does not exist; {f'did you mean {close[0]}? Else ' if close else ''}give a run's "
      "folder or a model file"
      + (f", or one of the models that come with sr_jax: {names}" if names else "")
    )
  tree, metadata = weight_files.read_weights(path)
  told = metadata.get(METADATA, "{}")
  if isinstance(tree, dict) and METADATA in tree:  # .npz and .pth have no other place for it
    told = str(tree.pop(METADATA))
  known = _parse_metadata(path, told)
  told_kwargs = renamed(known.get("kwargs", {}))
  try:
    name, kwargs, variables, facts = recognise(tree, (known.get("architecture"), told_kwargs))
  except UserError as error:
    raise UserError(f"{path} holds no {what} that sr_jax knows: {error}") from error
  if known.get("architecture", name) == name:
    kwargs = {**told_kwargs, **kwargs}  # the shapes take precedence over the metadata
    _check_kwargs(path, name, kwargs)
  variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
  variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
  trees.check_finite(str(path), variables, "take another file")
  info = {"ancestry": [], **known.get("info", {}), "digest": trees.digest(variables), "file": facts}
  return Model(name, kwargs, variables, info)


def _check_kwargs(
  path: storage.Folder, name: str, kwargs: Mapping[str, Any], where: str = f"metadata {METADATA!r}"
) -> None:
  """Raises UserError if the module has no such field as the file gives, or one of another type."""
  module = {**GENERATORS, **DISCRIMINATORS}[name]
  for field, value in kwargs.items():
    default = getattr(module, field, None)
    number = isinstance(default, float) and type(value) is int
    if type(value) is not type(default) and not number:
      told = f"{path}: its {where.split()[0]} sets {printable(f'{field}={value!r}')}, but"
      fix = f"correct the file's {where}, or remove it"
      if not hasattr(module, field):
        raise UserError(f"{told} {name} has no field {printable(repr(field))}; {fix}")
      raise UserError(f"{told} {field} of {name} must be a {type(default).__name__}; {fix}")


def _parse_metadata(path: pathlib.Path, text: str) -> dict[str, Any]:
  """Parses what `save_model` wrote beside the arrays; returns {} for other programs' files."""
  try:
    known = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{path}: its metadata {METADATA!r} is not JSON: {error}") from error
  parts = [known.get(part, {}) for part in ("kwargs", "info")] if isinstance(known, dict) else [0]
  if all(isinstance(part, dict) for part in parts):
    ancestry, config = parts[1].get("ancestry", []), parts[1].get("config", {})
    sections = [config, parts[1].get("interpolation", {})]
    if isinstance(config, dict):
      sections += [config.get(name, {}) for name in ("data", "discriminator")]
    step, version = parts[1].get("step", 0), known.get("format", 1)
    if (
      isinstance(ancestry, list)
      and all(isinstance(digest, str) for digest in ancestry)
      and all(isinstance(section, dict) for section in sections)
      and type(step) is int
      and step >= 0
      and all(isinstance(value, (bool, int, float, str)) for value in parts[0].values())
      and type(version) is int
    ):
      if version > FORMAT:
        raise UserError(
          f"{path} has format {version}, this sr_jax reads up to {FORMAT}; update sr_jax"
        )
      return known
  raise UserError(f"{path}: its metadata {METADATA!r} is not what save_model writes")
