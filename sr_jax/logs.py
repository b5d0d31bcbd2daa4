"""Where numbers go: RUN/metrics.jsonl always, TensorBoard where clu can be imported.

clu's writers import TensorFlow; without it a run has metrics.jsonl and no TensorBoard files, and
says so once.
"""

import json
import os
import pathlib
from typing import Any
from collections.abc import Mapping

from absl import logging
import jax
import numpy as np

METRICS = "metrics.jsonl"


class Writer:
  """Writes scalars and images of a run; only process 0 touches the disk."""

  def __init__(self, run: pathlib.Path, *, tensorboard: bool = True):
    self._file, self._tensorboard = None, None
    if jax.process_index() == 0:
      run.mkdir(parents=True, exist_ok=True)
      self._file = open(run / METRICS, "a")
      self._tensorboard = _tensorboard_writer(run) if tensorboard else None

  def scalars(self, step: int, scalars: Mapping[str, float], timing: Mapping[str, float]) -> None:
    """Writes one line.

    Args:
      step: updates done.
      scalars: what the run computes: the same in a run that was resumed.
      timing: what the machine measured: never the same twice, so it stands apart.
    """
    if self._file:
      line: dict[str, Any] = {"step": step, **scalars}
      if timing:
        line["timing"] = dict(timing)
      self._file.write(json.dumps(line) + "\n")
      self._file.flush()
    if self._tensorboard:
      self._tensorboard.write_scalars(step, {**scalars, **timing})

  def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes images [N, H, W, 3], uint8, to TensorBoard."""
    if self._tensorboard:
      self._tensorboard.write_images(step, images)

  def close(self) -> None:
    if self._file:
      self._file.close()
    if self._tensorboard:
      self._tensorboard.close()


def read(run: pathlib.Path) -> list[dict[str, Any]]:
  """Reads the lines of metrics.jsonl; one that a crash cut off is left out, [] without the file."""
  path, entries = run / METRICS, []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      entry = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(entry, dict) and isinstance(entry.get("step"), int):
      entries.append(entry)
  return entries


def has_scores(run: pathlib.Path, step: int) -> bool:
  """Whether metrics.jsonl has the scores of a step."""
  return any(
    entry["step"] == step and any(key.startswith("eval/") for key in entry) for entry in read(run)
  )


def cut_back(run: pathlib.Path, step: int) -> None:
  """Drops the lines of metrics.jsonl after a step, so that a resumed run writes them once.

  A last line that was cut off by a crash goes too.
  """
  path = run / METRICS
  if not path.exists() or jax.process_index() != 0:
    return
  kept = [json.dumps(entry) + "\n" for entry in read(run) if entry["step"] <= step]
  temporary = path.with_suffix(".tmp")
  temporary.write_text("".join(kept))
  os.replace(temporary, path)


def _tensorboard_writer(run: pathlib.Path):
  try:
    from sr_jax.data.tf_input import import_tensorflow

    import_tensorflow()  # hides the accelerators from TensorFlow before clu imports it
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(run))
  except ImportError as error:
    logging.warning("no TensorBoard files (%s); the numbers are in %s", error, run / METRICS)
    return None
