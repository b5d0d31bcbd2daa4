"""Writes a run's numbers: to RUN/metrics.jsonl always, to TensorBoard where clu can be imported.

clu's writers import TensorFlow; without it a run has metrics.jsonl and no TensorBoard files, and
says so once. The same goes for a run in a bucket, because it could not be tried whether TensorFlow
can write there.
"""

import json
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
import jax
import numpy as np

from sr_jax.runs import storage


def read_curves(model: str) -> dict[str, list[tuple[int, float]]]:
  """Reads a run's losses and scores: {name: [(step, value), ...]}; {} for a model file."""
  curves: dict[str, list[tuple[int, float]]] = {}
  for entry in read(storage.run_folder(model)):
    step = entry.pop("step")
    for name, value in entry.items():
      if isinstance(value, (int, float)):
        curves.setdefault(name, []).append((step, float(value)))
  return curves


METRICS = "metrics.jsonl"
# The least time between two uploads of metrics.jsonl, unless a checkpoint asks for one.
UPLOAD_SECONDS = 60


class Writer:
  """Writes scalars and images of a run; only process 0 touches the disk."""

  def __init__(self, run: storage.Folder, *, tensorboard: bool = True):
    self._file, self._tensorboard = None, None
    if jax.process_index() == 0:
      run.mkdir(parents=True, exist_ok=True)
      self._file = _Upload(run / METRICS) if storage.is_bucket(run) else open(run / METRICS, "a")
      self._tensorboard = _tensorboard_writer(run) if tensorboard else None

  def scalars(self, step: int, scalars: Mapping[str, float], timing: Mapping[str, float]) -> None:
    """Writes one line.

    Args:
      step: the number of updates done.
      scalars: the values that the run computed, which are the same in a run that was resumed.
      timing: the times that the machine measured. They are never the same twice, and so have a
        field of their own.
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

  def sync(self) -> None:
    """Returns once every line is stored, so that a checkpoint may follow; for a file, at once."""
    if isinstance(self._file, _Upload):
      self._file.sync()

  def close(self) -> None:
    if self._file:
      self._file.close()
    if self._tensorboard:
      self._tensorboard.close()


class _Upload:
  """A text file in a bucket. Nothing can be appended to it, so it is written whole each time.

  Lines that were not uploaded when a machine died belong to steps after its last checkpoint, and
  the run that resumes from there writes them again.
  """

  def __init__(self, path: storage.Folder):
    self._path, self._last, self._changed = path, time.monotonic(), False
    self._text = path.read_text() if path.exists() else ""

  def write(self, line: str) -> None:
    self._text += line
    self._changed = True

  def flush(self) -> None:
    if time.monotonic() - self._last >= UPLOAD_SECONDS:
      self.sync()

  def sync(self) -> None:
    if self._changed:
      storage.write_text(self._path, self._text)
      self._last, self._changed = time.monotonic(), False

  close = sync


def read(run: storage.Folder) -> list[dict[str, Any]]:
  """Reads the lines of metrics.jsonl but one that a crash cut off; [] if there is no such file."""
  path, entries = run / METRICS, []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      entry = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(entry, dict) and isinstance(entry.get("step"), int):
      entries.append(entry)
  return entries


def has_scores(run: storage.Folder, step: int) -> bool:
  """Whether metrics.jsonl has the scores of a step."""
  return any(entry["step"] == step and _is_of_scores(entry) for entry in read(run))


def _is_of_scores(entry: Mapping[str, Any]) -> bool:
  return any(key.startswith("eval/") for key in entry)


def cut_back(run: storage.Folder, step: int, *, scored: bool = True) -> None:
  """Drops the lines of metrics.jsonl after a step, so that a resumed run writes them once.

  A last line that was cut off by a crash goes too.

  Args:
    run: the run's folder.
    step: the last step whose lines are kept.
    scored: whether the scores of that step are kept too; if not, they will be written again.
  """
  path = run / METRICS
  if not path.exists() or jax.process_index() != 0:
    return
  kept = [entry for entry in read(run) if entry["step"] <= step]
  if not scored:
    kept = [entry for entry in kept if entry["step"] < step or not _is_of_scores(entry)]
  storage.write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _tensorboard_writer(run: storage.Folder):
  if storage.is_bucket(run):
    logging.warning("no TensorBoard files in a bucket; the numbers are in %s", run / METRICS)
    return None
  try:
    from sr_jax.machine.tensorflow import import_tensorflow

    import_tensorflow()  # hides the accelerators from TensorFlow before clu imports it
    from clu import metric_writers

    return metric_writers.SummaryWriter(str(run))
  except ImportError as error:
    logging.warning("no TensorBoard files (%s); the numbers are in %s", error, run / METRICS)
    return None


def say(line: str) -> None:
  if jax.process_index() == 0:
    print(line, flush=True)
