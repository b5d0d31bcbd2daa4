"""RUN/config.json: the settings of a run."""

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
import jax
from ml_collections import config_dict

from sr_jax import UserError, printable
from sr_jax.networks import build
from sr_jax.runs import storage


def read_json(path: storage.Folder) -> dict[str, Any]:
  """Reads a JSON object, which may be a stranger's.

  Raises:
    UserError: the file does not hold a JSON object, or more than any of ours; the error names it.
  """
  with path.open("rb") as file:
    text = file.read(_MAX_BYTES + 1)
  try:
    if len(text) > _MAX_BYTES:
      raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    told = json.loads(text)
  except (ValueError, RecursionError) as error:  # no JSON, no text, or brackets without end
    raise UserError(f"{path} is not JSON: {printable(str(error))}") from error
  if not isinstance(told, dict):
    raise UserError(f"{path} is no JSON object, {{...}}")
  return told


_MAX_BYTES = 2**24
Config = config_dict.ConfigDict


def read_config(run: storage.Folder) -> dict[str, Any]:
  """Reads RUN/config.json, with today's names of the fields.

  Raises:
    FileNotFoundError: there is none.
    UserError: it is not JSON; the error names it.
  """
  return _renamed(read_json(run / "config.json"))


# Fields that are read when a run starts and never again.
_AT_THE_START = ("init_from", "discriminator.init_from", "init_partial")


def write_config(config: Config, run: storage.Folder, *, resumed: bool = False) -> None:
  """Writes RUN/config.json; if there was one, warns of each field that changed.

  A field that it does not have is one that an earlier version did not have. What a run started from
  is not changed by what the command says when the run goes on.

  Args:
    config: the recipe.
    run: the run's folder.
    resumed: whether the run goes on from a checkpoint.
  """
  if jax.process_index() != 0:
    return
  path = run / "config.json"
  new = json.loads(json.dumps(config.to_dict()))
  if path.exists():
    try:
      old = read_json(path)
    except ValueError as error:
      logging.warning("%s; it is written anew", error)
      old = new
    before, after = flat(_renamed(old)), flat(new)
    for key in sorted(before):
      if before[key] == after.get(key):
        continue
      if resumed and key.removeprefix("psnr.") in _AT_THE_START and key in after:
        if after[key]:
          began = f" and started from {printable(str(before[key])) or 'fresh weights'}"
          logging.warning(
            "config.%s=%s is ignored: %s goes on from its checkpoint%s",
            key, after[key], run, "" if key.endswith("init_partial") else f",{began}",
          )  # fmt: skip
        _set(new, key, before[key])
      else:
        was = printable(str(before[key]))
        name = printable(key)
        logging.warning("config.%s of %s was %s, is now %s", name, run, was, after.get(key))
  storage.write_text(path, json.dumps(new, indent=2) + "\n")


def _set(config: dict[str, Any], key: str, value: Any) -> None:
  """Sets a field that is named by its path, 'discriminator.init_from'."""
  *sections, name = key.split(".")
  for section in sections:
    config = config[section]
  config[name] = value


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a run's configuration with today's names of the fields."""
  config = dict(config)
  if isinstance(config.get("psnr"), dict):
    config["psnr"] = _renamed(config["psnr"])
  generator = config.get("generator")
  if isinstance(generator, dict) and isinstance(generator.get("kwargs"), dict):
    config["generator"] = {**generator, "kwargs": build.renamed(generator["kwargs"])}
  return config


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Joins the keys of nested dicts by dots: {'data': {'seed': 0}} -> {'data.seed': 0}."""
  fields = {}
  for key, value in config.items():
    fields |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return fields
