"""RUN/config.json: the settings of a run."""

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
import jax
from ml_collections import config_dict

from sr_jax import UserError
from sr_jax.networks import build
from sr_jax.runs import storage


def read_json(path: storage.Folder) -> dict[str, Any]:
  """Reads a JSON object.

  Raises:
    UserError: the file does not hold JSON; the error names it.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as error:  # no JSON, or no text
    raise UserError(f"{path} is not JSON: {error}") from error


Config = config_dict.ConfigDict


def write_config(config: Config, run: storage.Folder) -> None:
  """Writes RUN/config.json; if there was one, warns of each field that changed.

  A field that it does not have is one that an earlier version did not have.
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
      if before[key] != after.get(key):
        logging.warning("config.%s of %s was %s, is now %s", key, run, before[key], after.get(key))
  storage.write_text(path, json.dumps(new, indent=2) + "\n")


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
