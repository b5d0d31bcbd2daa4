"""Trains one stage, step by step, and goes back where its steps are no longer sound."""

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sr_jax.machine import sharding
from sr_jax.machine.stop import Stop
from sr_jax.metrics.table import direction
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.runs.settings import write_config
from sr_jax.training.clock import ONE_STAGE, Ahead, Calendar, Progress, duration
from sr_jax.training import recovery
from sr_jax.training.freezing import describe
from sr_jax.training.inputs import open_batches
from sr_jax.training.recovery import Detour, DivergedError
from sr_jax.training.scores import evaluate_state
from sr_jax.training.stage import Found, Images, Stage, start_state
from sr_jax.training.step import make_train_step


def train_stage(
  stage: Stage, found: Found, images: Images, stop: Stop, ahead: Ahead = ONE_STAGE
) -> str:
  """Trains one stage, from its checkpoint if there is one.

  Args:
    stage: what `open_stage` returned.
    found: what `find` returned.
    images: what `pack_images` returned.
    stop: notices signals.
    ahead: the run's other stages, for the forecast.

  Returns:
    '' once the last step is done, or what stopped the stage before that.

  Raises:
    UserError: the input cannot be opened, see `inputs.open_batches`.
    DivergedError: a loss or a gradient is not finite; with a guard, after the run went back as
      often as it may.
  """
  stage.run.mkdir(parents=True, exist_ok=True)
  write_config(stage.config, stage.run, resumed=stage.restored is not None)
  failure = stage.run / recovery.FAILURE  # of an earlier call
  if jax.process_index() == 0 and failure.exists():
    failure.unlink()
  detour = None
  while True:
    try:
      return train_from(stage, found, images, stop, ahead, detour)
    except recovery.Trouble as error:
      trouble = error.with_traceback(None)  # whose frames hold the state that is given up
    stage, detour = recovery.go_back(stage, images, trouble)


def train_from(
  stage: Stage, found: Found, images: Images, stop: Stop, ahead: Ahead, detour: Detour | None
) -> str:
  """Trains as `train_stage`, but raises Trouble where the stage is to go back.

  Args:
    stage: its checkpoint is what is gone on from.
    found: as for `train_stage`, like `images`, `stop` and `ahead`.
    detour: what to do differently from this checkpoint on, after the stage went back to it.
  """
  config, run, mesh = stage.config, stage.run, stage.mesh
  state, record = recovery.follow(detour, *start_state(stage, found, images))
  start, total = stage.step, config.total_steps
  watch = recovery.Watch(stage, state, record)
  logs.cut_back(run, start, scored=stage.has_scores)
  with contextlib.ExitStack() as at_the_end:
    at_the_end.callback(stop.saved)
    writer = logs.Writer(run, tensorboard=config.log.tensorboard)
    at_the_end.callback(writer.close)
    best = found.best_metric
    manager = checkpoint.open_manager(
      run, config.checkpoint.keep, best, largest=direction(best) >= 0
    )
    at_the_end.callback(manager.close)  # waits for what is being written

    offset = watch.detour.data_offset
    batches, prepare = open_batches(config, images.train, start + offset, mesh)
    train_step = make_train_step(**found.step_arguments, prepare=prepare)
    vgg_params = found.vgg and jax.device_put(found.vgg.params, sharding.replicated(mesh))
    say_what_begins(stage, images)
    calendar = Calendar(config, score=bool(images.test))
    if needs_scores(stage, images, calendar):
      scores = evaluate_state(stage, found, images.test, state, writer, start, stop)
      if scores is None:
        return stop.reason
      if start:
        extra = {**record, **recovery.guard_record(state), "scores": scores}
        checkpoint.save(manager, state, extra=extra, metrics=scores, anew=True)
    progress = Progress(start, total, config.data.batch_size, ahead)
    journal, late = Journal(writer, progress, stage), False
    for step in range(start + 1, total + 1):
      state, metrics = train_step(state, progress.wait_for(batches), vgg_params)
      if step == start + 1:
        progress.compiled(step, metrics)
        if not calendar.due(step).log:
          # So that nobody waits long for the first losses.
          show(step, recovery.health(step, jax.device_get(metrics), config))
      progress.forecast(step, metrics)
      journal.write()  # the metrics of the step before, now that this one is on its way
      watch.look()
      watch.keep(step, metrics)
      due = calendar.due(step)
      if due.log:
        journal.keep(step, metrics)
      stopped = stop()
      if not (due.score or due.save or late or stopped):
        continue

      journal.write()  # metrics are on disk before the checkpoint of their step
      watch.look(state=state, last=step == total)
      check_finite(step, jax.device_get(metrics), stage)
      scores = None
      if due.score and not stopped:
        scores = evaluate_state(stage, found, images.test, state, writer, step, stop)
        stopped = "" if scores else stop.reason
      save = due.save or late
      late = save and watch.brewing and step < total
      if (save and not late) or stopped:
        writer.sync()
        extra = {**record, **recovery.guard_record(state), "scores": scores}
        checkpoint.save(manager, state, extra=extra, metrics=scores)
        calendar.saved()
      progress.resume(step)
      if stopped:
        return stopped
    if best:
      say_which_is_best(manager, run, best)
  return ""


def needs_scores(stage: Stage, images: Images, calendar: Calendar) -> bool:
  """Whether the step that the stage goes on from is to be scored before the next one.

  It is where a signal stopped its scoring, and where a run starts from a model, which shall not be
  better than what comes of it.
  """
  if stage.step:
    return calendar.due(stage.step).score and not stage.has_scores
  return bool(stage.config.init_from and images.test)


def say_which_is_best(manager: Any, run: Any, metric: str) -> None:
  """Says at the end which checkpoint is the best, if it is not the last."""
  manager.wait_until_finished()
  step = manager.best_step()
  if step not in (None, manager.latest_step()):
    value = manager.metrics(step)[metric]
    logs.say(f"  best {metric}: {value:.4f}, step {step}; as a model: {run}/checkpoints/{step}")


def say_what_begins(stage: Stage, images: Images) -> None:
  """Says how many steps are ahead, on which devices and images."""
  if stage.config.freeze:
    for line in describe(stage.config.freeze, stage.abstract.generator.variables):
      logs.say(f"{stage.run}: {line}")
  gigabytes = (images.train.hr.nbytes + images.train.lr.nbytes) / 1e9
  logs.say(
    f"{stage.run}: {stage.config.total_steps - stage.step} steps on {stage.mesh.size} "
    f"{stage.mesh.devices.flat[0].device_kind}, {len(images.train.names)} images, "
    f"{gigabytes:.2f} GB decoded; compiling ..."
  )


class Journal:
  """Writes and prints the metrics of a step, one step later.

  Reading them at once would leave the device without work until the next step is sent.
  """

  def __init__(self, writer: logs.Writer, progress: Progress, stage: Stage):
    self._writer, self._progress, self._stage, self._kept = writer, progress, stage, None

  def keep(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    self._kept = step, metrics

  def write(self) -> None:
    """Writes the metrics that were kept; raises DivergedError if one of them is not finite."""
    if self._kept is None:
      return
    (step, metrics), self._kept = self._kept, None
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    scalars = recovery.health(step, metrics, self._stage.config)
    timing = self._progress.report(step)
    self._writer.scalars(step, scalars, timing)
    show(step, scalars, timing)
    check_finite(step, scalars, self._stage)


def show(step: int, metrics: Mapping[str, Any], timing: Mapping[str, float] | None = None) -> None:
  """Prints the losses of a step, and the speed where it is known."""
  speed = ""
  if timing:
    speed = (
      f"  {timing['steps_per_second']:.2f} steps/s  ETA {duration(timing['eta_seconds'])}  "
      f"data wait {timing['data_wait_share']:.0%}"
    )
  shown = {k: v for k, v in sorted(metrics.items()) if k.startswith(("loss", "d_"))}
  values = "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items())
  rate = f"lr {float(metrics['learning_rate']):.3g}"
  if "guard/skipped_share" in metrics:
    rate += f"  skipped {metrics['guard/skipped_share']:.2%}"
  logs.say(f"  step {step}{speed}  {values}  {rate}")


def check_finite(step: int, metrics: Mapping[str, Any], stage: Stage) -> None:
  """Stops a run whose numbers are not finite, before it saves them over good ones.

  Args:
    step: of the metrics.
    metrics: of the step; one that the guard skipped left nothing in the state, and is let pass.
    stage: whose settings the advice is about.

  Raises:
    DivergedError: a number is not finite; the error names all that are not.
  """
  lost = [name for name, value in sorted(metrics.items()) if not np.isfinite(value)]
  if lost and not metrics.get("guard/in_a_row"):
    raise DivergedError(
      f"{', '.join(lost)} not finite at step {step}; nothing was saved since. The same command "
      f"goes on from the last checkpoint; try it with {' or '.join(recovery.remedies(stage))}"
    )
