"""Where numbers go: RUN/metrics.jsonl always, TensorBoard where clu can be imported.

clu's writers import TensorFlow; without it a run has metrics.jsonl and no TensorBoard files, and
says so once. So has a run in a bucket: whether TensorFlow writes there could not be tried.
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
UPLOAD_SECONDS = 60  # at least, between two uploads of metrics.jsonl that no checkpoint asks for


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

  def sync(self) -> None:
    """Returns once every line is stored, so that a checkpoint may follow: at once for a file."""
    if isinstance(self._file, _Upload):
      self._file.sync()

  def close(self) -> None:
    if self._file:
      self._file.close()
    if self._tensorboard:
      self._tensorboard.close()


class _Upload:
  """A text file of a bucket, to which nothing can be appended: each time it is written whole.

  Lines that were not uploaded when a machine died are after its last checkpoint, and the run that
  resumes there writes them again.
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


def has_scores(run: storage.Folder, step: int) -> bool:
  """Whether metrics.jsonl has the scores of a step."""
  return any(entry["step"] == step and _is_of_scores(entry) for entry in read(run))


def _is_of_scores(entry: Mapping[str, Any]) -> bool:
  return any(key.startswith("eval/") for key in entry)


def cut_back(run: storage.Folder, step: int, *, scored: bool = True) -> None:
  """Drops the lines of metrics.jsonl after a step, so that a resumed run writes them once.

  A last line that was cut off by a crash goes too.

  Args:
    run: folder of the run.
    step: the last whose lines are kept.
    scored: whether its scores are kept too; else they will be written anew.
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
