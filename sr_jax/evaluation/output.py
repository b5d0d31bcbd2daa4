"""Writes what an evaluation found: SR images, results.json, the table, the page, the picture."""

import datetime
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sr_jax import __version__, harmless
from sr_jax.evaluation import comparison, report, tables
from sr_jax.evaluation.test_sets import TestImage
from sr_jax.images.files import safe_output_path, unused_path, write_image
from sr_jax.machine import cpus
from sr_jax.machine.writing import write_file
from sr_jax.metrics.table import Table, columns, protocol
from sr_jax.runs import logs
from sr_jax.upscaling.upscaler import BASELINE, bicubic_upscaler


class Compared(NamedTuple):
  """A model of an evaluation.

  Attributes:
    label: what the results call the model.
    spec: the model as the command line gives it: a run, a file or 'bicubic'.
    folder: the folder for the model's results.
    facts: {name: text} to show about the model; it has 'engine' if --engine was not 'jax'.
  """

  label: str
  spec: str
  folder: pathlib.Path
  facts: Mapping[str, str]


class Output:
  """Takes the images of an evaluation one by one, and writes what was found.

  Args:
    folder: the folder for the results that all models share.
    models: the models to compare.
    scale: the upsampling factor of all models.
    lr: {set: where its LR images come from}; '' for MATLAB's bicubic.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    models: Sequence[Compared],
    scale: int,
    lr: Mapping[str, str] | None = None,
  ):
    self._folder, self._models, self._scale, self._lr = folder, models, scale, lr
    self._panels, self._page = comparison.Panels(), report.Report()
    self._taken: dict[str, set[pathlib.Path]] = {model.label: set() for model in models}

  def add(
    self,
    set_name: str,
    image: TestImage,
    srs: Mapping[str, np.ndarray],
    scores: Mapping[str, Mapping[str, float]],
  ) -> None:
    """Writes an image's SR images, and keeps what the page and the picture will show.

    Args:
      set_name: the name of the test set.
      image: the image.
      srs: {label: SR image}.
      scores: {label: {score: value}}.
    """
    name = pathlib.PurePosixPath(image.name).with_suffix(".png").as_posix()
    for label, _, folder, _ in self._models:
      path = safe_output_path(folder / set_name, name)
      write_image(unused_path(path, self._taken[label]), srs[label])
      title = f"{set_name}/{image.name}"
      self._panels.add(title, image.lr, image.hr, label, srs[label], scores[label])
    if BASELINE not in srs:  # it is shown for comparison, even if it was not asked for
      srs = {BASELINE: bicubic_upscaler(self._scale)(image.lr), **srs}
    self._page.add_image(set_name, image.name, image.lr, image.hr, srs, scores)

  def write(self, results: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Writes all results and prints the table.

    Args:
      results: {label: {set: what `scoring.evaluate_set` returned for this label}}.
    """
    table, how = write_scores(self._folder, self._models, self._scale, results, self._lr)
    write_image(self._folder / "comparison.png", self._panels.draw())
    set_names = dict.fromkeys(set_name for sets in results.values() for set_name in sets)
    curves = {model.label: logs.read_curves(model.spec) for model in self._models}
    self._page.write(
      self._folder / "report.html",
      title=f"{', '.join(results)} on {', '.join(set_names)}",
      table=table,
      columns=columns(table),
      protocol=how,
      curves={label: series for label, series in curves.items() if series},
      facts={model.label: model.facts for model in self._models},
    )


def write_scores(
  folder: pathlib.Path,
  models: Sequence[Compared],
  scale: int,
  results: Mapping[str, Mapping[str, Mapping[str, Any]]],
  lr: Mapping[str, str] | None = None,
) -> tuple[Table, dict[str, str]]:
  """Writes each model's results.json and the table of all, and prints the table.

  Args:
    folder: the folder for the table.
    models: the models.
    scale: the upsampling factor of all models.
    results: {label: {set: what `scoring.evaluate_set` returned for this label}}.
    lr: {set: where its LR images come from}; '' for MATLAB's bicubic.

  Returns:
    The table, and how its scores were computed.
  """
  table = {
    label: {
      set_name: {key: value for key, value in scores.items() if key != "images"}
      for set_name, scores in sets.items()
    }
    for label, sets in results.items()
  }
  how = protocol(columns(table), lr)
  engines = [model.facts["engine"] for model in models if "engine" in model.facts]
  if engines:
    how["engine"] = " and ".join(dict.fromkeys(engines))
  for label, spec, own_folder, facts in models:
    own = {key: value for key, value in facts.items() if key == "engine"}
    one = {"model": spec, "scale": scale, "facts": facts, "made": made(), "protocol": how | own}
    _write_text(own_folder / "results.json", _json(one | {"sets": results[label]}))
  _write_table(folder, table, how)
  return table, how


def made() -> dict[str, str]:
  """Says when, by which versions and on what scores are computed."""
  device = jax.devices()[0]
  return {
    "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    "sr_jax": __version__,
    "jax": jax.__version__,
    "device": cpus.kind() if device.platform == "cpu" else device.device_kind,
  }


def _write_table(output: pathlib.Path, table: Table, how: Mapping[str, str]) -> None:
  """Writes the table of all models and sets, on the screen and to three files."""
  _write_text(output / "table.md", tables.format_markdown(table))
  _write_text(output / "table.csv", tables.format_csv(table))
  _write_text(output / "table.json", _json({"protocol": how, "models": table}))
  print(harmless(tables.format_text(table)))


def _write_text(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  write_file(path, text)


def _json(tree: Any) -> str:
  """Formats JSON that every reader accepts: an infinite PSNR becomes null."""

  def finite(node: Any) -> Any:
    if isinstance(node, dict):
      return {key: finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node

  return json.dumps(finite(tree), indent=2) + "\n"
