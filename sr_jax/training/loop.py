"""Trains one stage, step by step."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sr_jax import UserError
from sr_jax.machine import sharding
from sr_jax.machine.stop import Stop
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.runs.settings import write_config
from sr_jax.training.clock import Calendar, Progress
from sr_jax.training.inputs import open_batches
from sr_jax.training.scores import evaluate_state
from sr_jax.training.stage import Found, Images, Stage, start_state
from sr_jax.training.step import make_train_step


class NotFiniteError(UserError, FloatingPointError):
  """The error of a run whose loss or gradient is not finite."""


def train_stage(stage: Stage, found: Found, images: Images, stop: Stop) -> str:
  """Trains one stage, from its checkpoint if there is one.

  Returns:
    '' once the last step is done, or what stopped the stage before that.

  Raises:
    UserError: the input cannot be opened, see `inputs.open_batches`.
    NotFiniteError: a loss or a gradient is not finite.
  """
  config, run, mesh = stage.config, stage.run, stage.mesh
  run.mkdir(parents=True, exist_ok=True)
  write_config(config, run)
  state, record = start_state(stage, found, images)
  start, total = stage.step, config.total_steps
  logs.cut_back(run, start, scored=stage.has_scores)
  with contextlib.ExitStack() as at_the_end:
    at_the_end.callback(stop.saved)
    writer = logs.Writer(run, tensorboard=config.log.tensorboard)
    at_the_end.callback(writer.close)
    manager = checkpoint.open_manager(run, config.checkpoint.keep, config.checkpoint.best_metric)
    at_the_end.callback(manager.close)  # waits for what is being written

    batches, cut = open_batches(config, images.train, start, mesh)
    train_step = make_train_step(**found.step_arguments, cut=cut)
    vgg_params = found.vgg and jax.device_put(found.vgg.params, sharding.replicated(mesh))
    say_what_begins(stage, images)
    calendar = Calendar(config, score=bool(images.test))
    progress = Progress(start, total, config.data.batch_size)
    journal = Journal(writer, progress)

    if start and calendar.due(start).score and not stage.has_scores:  # a signal stopped its scoring
      scores = evaluate_state(stage, images.test, state, writer, start, stop)
      if scores is None:
        return stop.reason
      checkpoint.save(manager, state, extra={**record, "scores": scores}, metrics=scores, anew=True)
    for step in range(start + 1, total + 1):
      state, metrics = train_step(state, progress.wait_for(batches), vgg_params)
      if step == start + 1:
        progress.compiled(step, metrics)
      journal.write()  # the metrics of the step before, now that this one is on its way
      due = calendar.due(step)
      if due.log:
        journal.keep(step, metrics)
      stopped = stop()
      if not (due.score or due.save or stopped):
        continue

      journal.write()  # metrics are on disk before the checkpoint of their step
      check_finite(step, jax.device_get(metrics))
      scores = None
      if due.score and not stopped:
        scores = evaluate_state(stage, images.test, state, writer, step, stop)
        stopped = "" if scores else stop.reason
      if due.save or stopped:
        writer.sync()
        checkpoint.save(manager, state, extra={**record, "scores": scores}, metrics=scores)
        calendar.saved()
      progress.resume(step)
      if stopped:
        return stopped
  return ""


def say_what_begins(stage: Stage, images: Images) -> None:
  """Says how many steps are ahead, on which devices and images."""
  gigabytes = (images.train.hr.size + images.train.lr.size) / 1e9
  logs.say(
    f"{stage.run}: {stage.config.total_steps - stage.step} steps on {stage.mesh.size} "
    f"{stage.mesh.devices.flat[0].device_kind}, {len(images.train.names)} images, "
    f"{gigabytes:.2f} GB decoded; compiling ..."
  )


class Journal:
  """Writes and prints the metrics of a step, one step later.

  Reading them at once would leave the device without work until the next step is sent.
  """

  def __init__(self, writer: logs.Writer, progress: Progress):
    self._writer, self._progress, self._kept = writer, progress, None

  def keep(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    self._kept = step, metrics

  def write(self) -> None:
    """Writes the metrics that were kept; raises NotFiniteError if one of them is not finite."""
    if self._kept is None:
      return
    (step, metrics), self._kept = self._kept, None
    scalars = {name: float(value) for name, value in sorted(jax.device_get(metrics).items())}
    timing = self._progress.report(step)
    self._writer.scalars(step, scalars, timing)
    speed = ""
    if timing:
      minutes, seconds = divmod(int(timing["eta_seconds"]), 60)
      speed = (
        f"  {timing['steps_per_second']:.2f} steps/s  ETA {minutes}:{seconds:02d}  "
        f"data wait {timing['data_wait_share']:.0%}"
      )
    shown = {k: v for k, v in scalars.items() if k.startswith(("loss", "d_"))}
    values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
    logs.say(f"  step {step}{speed}  {values}  lr {scalars['learning_rate']:.3g}")
    check_finite(step, scalars)


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
  """Stops a run whose numbers are not finite, before it saves them over good ones.

  Raises:
    NotFiniteError: a number is not finite; the error names all that are not.
  """
  lost = [name for name, value in sorted(metrics.items()) if not np.isfinite(value)]
  if lost:
    raise NotFiniteError(
      f"{', '.join(lost)} not finite at step {step}; nothing was saved since. The same command "
      "goes on from the last checkpoint; a lower --config.learning_rate.base, "
      "--config.optimizer.clip_norm=1 or --config.dtype=float32 may help"
    )
