"""Says when logging, scoring and saving are due, and how fast the training goes."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np

from sr_jax.runs import logs
from sr_jax.runs.settings import Config


# A run says how long it will take after so many steps or seconds, whichever come first.
FORECAST_STEPS = 10
FORECAST_SECONDS = 60


def duration(seconds: float) -> str:
  """Writes a time for people, in its two largest units: '204 d 3 h', '3 h 5 min', '40 s'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f"{days:,} d {hours} h"
  if hours:
    return f"{hours} h {minutes} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Due(NamedTuple):
  """Says what is to be done after a step."""

  log: bool
  score: bool
  save: bool


class Calendar:
  """Says after each step what is due; after the last step, everything is.

  Args:
    config: the recipe.
    score: whether there are held-out images to score.
  """

  def __init__(self, config: Config, *, score: bool):
    self._config, self._score = config, score
    self.saved()

  def due(self, step: int) -> Due:
    """Says what is due after a step.

    All processes must ask after every step, because the answer by the clock is a message from
    process 0.
    """
    config, last = self._config, step == self._config.total_steps
    log = last or _every(config.log.every_steps, step)
    score = self._score and (last or _every(config.eval.every_steps, step))
    save = last or _every(config.checkpoint.every_steps, step) or self._minutes_due(ask=log)
    return Due(log, score, save)

  def saved(self) -> None:
    """Starts counting the minutes to the next checkpoint."""
    self._since = time.monotonic()

  def _minutes_due(self, *, ask: bool) -> bool:
    """Whether a checkpoint is due by the clock.

    All processes must save the same step, so the clock of process 0 decides. Since its answer is a
    message, several processes ask for it only at the steps where `ask` is true.
    """
    minutes = self._config.checkpoint.every_minutes
    due = bool(minutes) and time.monotonic() - self._since >= 60 * minutes
    if jax.process_count() == 1 or not minutes:
      return due
    return ask and bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))


def _every(steps: int, step: int) -> bool:
  """Whether something that is due every `steps` steps is due at `step`; with 0 it never is."""
  return bool(steps) and step % steps == 0


class Ahead(NamedTuple):
  """What a run has before it.

  Attributes:
    stage: the number of the stage that trains, from 1.
    stages: how many there are.
    later: how many of this stage's steps the later stages amount to, by what they compute.
  """

  stage: int
  stages: int
  later: float


ONE_STAGE = Ahead(1, 1, 0.0)


class Progress:
  """Counts steps, seconds, and seconds of waiting for data; evaluation and saving are left out.

  Args:
    start: the step that the run goes on from.
    total: the step that it ends with.
    batch_size: crops in a step.
    ahead: the run's other stages.
  """

  def __init__(self, start: int, total: int, batch_size: int, ahead: Ahead = ONE_STAGE):
    self._total, self._batch_size, self._ahead = total, batch_size, ahead
    self._begin = time.monotonic()
    self._forecast, self._said = start + FORECAST_STEPS, False
    self.resume(start)

  def compiled(self, step: int, metrics: Any) -> None:
    """Waits for the first step, says how long it took to compile, and counts from there."""
    jax.block_until_ready(metrics)
    logs.say(f"  compiled in {time.monotonic() - self._begin:.0f} s")
    self.resume(step)

  def forecast(self, step: int, metrics: Any) -> None:
    """Says once, after some steps, how long the stage and the run will take at their speed."""
    steps, left = step - self._step, self._total - step
    waited = time.monotonic() - self._since >= FORECAST_SECONDS
    if self._said or not steps or not left or not (waited or step >= self._forecast):
      return
    self._said = True
    jax.block_until_ready(metrics)
    each = (time.monotonic() - self._since) / steps
    stage, stages, later = self._ahead
    if stages == 1:
      logs.say(f"  forecast: {duration(left * each)} for {left:,} steps")
    else:
      both = f", about {duration((left + later) * each)} with the next" if later else ""
      logs.say(
        f"  forecast: stage {stage} of {stages}: {duration(left * each)} at this speed{both}"
      )

  def wait_for(self, batches: Iterator[Any]) -> Any:
    """Takes the next batch, counting the wait."""
    begin = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - begin
    return batch

  def report(self, step: int) -> dict[str, float]:
    """Returns the rates since the last report and starts anew; {} if no step was counted."""
    if step == self._step:
      return {}
    seconds = time.monotonic() - self._since
    rate = (step - self._step) / seconds
    report = {
      "steps_per_second": rate,
      "images_per_second": rate * self._batch_size,
      "data_wait_share": self._waited / seconds,
      "eta_seconds": (self._total - step + self._ahead.later) / rate,
    }
    self.resume(step)
    return report

  def resume(self, step: int) -> None:
    """Starts counting anew at a step, leaving out what was not training before."""
    self._step, self._since, self._waited = step, time.monotonic(), 0.0
