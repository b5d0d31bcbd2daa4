"""Writes a run's numbers: to RUN/metrics.jsonl always, to TensorBoard where clu can be imported.

clu's writers import TensorFlow; without it a run has metrics.jsonl and no TensorBoard files, and
says so once. The same goes for a run in a bucket, because it could not be tried whether TensorFlow
can write there.
"""

import io
import json
import time
from collections.abc import Mapping
from typing import Any

from absl import logging
import jax
import numpy as np

from sr_jax import harmless
from sr_jax.machine.writing import open_to_append
from sr_jax.runs import storage


def read_curves(model: str) -> dict[str, list[tuple[int, float]]]:
  """Reads a run's losses and scores: {name: [(step, value), ...]}; {} for a model file."""
  curves: dict[str, list[tuple[int, float]]] = {}
  for entry in read(storage.run_folder(model)):
    step = entry.pop("step")
    for name, value in entry.items():
      if isinstance(value, (int, float)) and abs(value) < _LARGEST:  # a stranger's may be any
        curves.setdefault(name, []).append((step, float(value)))
  return curves


METRICS = "metrics.jsonl"
_LARGEST = 10**300
# The least time between two uploads of metrics.jsonl, unless a checkpoint asks for one.
UPLOAD_SECONDS = 60


class Writer:
  """Writes scalars and images of a run; only process 0 touches the disk."""

  def __init__(self, run: storage.Folder, *, tensorboard: bool = True):
    self._file, self._tensorboard = None, None
    if jax.process_index() == 0:
      run.mkdir(parents=True, exist_ok=True)
      self._file = _Upload(run / METRICS) if storage.is_bucket(run) else _append(run)
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


def _append(run: storage.Folder) -> io.TextIOWrapper:
  return io.TextIOWrapper(open_to_append(run / METRICS), encoding="utf-8")


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
  """Reads the lines of metrics.jsonl but those that are damaged; [] if there is no such file."""
  return [entry for entry, _ in _lines(run / METRICS) if entry]


def _lines(path: storage.Folder) -> list[tuple[dict[str, Any] | None, bytes]]:
  """Reads the lines of a file: what each holds, None for a damaged one, and its bytes."""
  contents = path.read_bytes() if path.exists() else b""
  return [(_entry(line), line) for line in contents.splitlines(keepends=True)]


def _entry(line: bytes) -> dict[str, Any] | None:
  try:
    entry = json.loads(line)
  except (ValueError, RecursionError):  # no JSON, or no text
    return None
  sound = isinstance(entry, dict) and type(entry.get("step")) is int and line.endswith(b"\n")
  return entry if sound else None


def has_scores(run: storage.Folder, step: int) -> bool:
  """Whether metrics.jsonl has the scores of a step."""
  return any(entry["step"] == step and _is_of_scores(entry) for entry in read(run))


def _is_of_scores(entry: Mapping[str, Any]) -> bool:
  return any(key.startswith("eval/") for key in entry)


def cut_back(run: storage.Folder, step: int, *, scored: bool = True) -> None:
  """Drops the lines of metrics.jsonl after a step, so that a resumed run writes them once.

  A last line that was cut off by a crash goes too, and others that are damaged, which is said. A
  run without a checkpoint begins anew: what an earlier one wrote is moved aside and not dropped.

  Args:
    run: the run's folder.
    step: the last step whose lines are kept; 0 without a checkpoint.
    scored: whether the scores of that step are kept too; if not, they will be written again.
  """
  path = run / METRICS
  if not path.exists() or jax.process_index() != 0:
    return
  lines = _lines(path)
  damaged = sum(entry is None for entry, _ in lines)
  if damaged:
    logging.warning("%s: %d damaged lines are cut off", path, damaged)
  if step == 0 and any(entry and entry["step"] > 0 for entry, _ in lines):
    aside = _unused(path)
    storage.move(path, aside)
    logging.warning("%s has lines, but no checkpoint; moved to %s", path, aside.name)
    return
  kept = [(entry, line) for entry, line in lines if entry and entry["step"] <= step]
  if not scored:
    kept = [(e, line) for e, line in kept if e["step"] < step or not _is_of_scores(e)]
  storage.write_bytes(path, b"".join(line for _, line in kept))


def _unused(path: storage.Folder) -> storage.Folder:
  """Numbers a file so that it is none that there is."""
  number = 0
  while (aside := path.parent / f"metrics_{number}.jsonl").exists():
    number += 1
  return aside


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
    print(harmless(line), flush=True)
