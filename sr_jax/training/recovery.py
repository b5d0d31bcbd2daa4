"""Takes a run back to a sound checkpoint where its steps are no longer sound, or reports a failure.

The guard within the step (`guard.py`) keeps bad numbers out of the state. Where it skips too many
steps in a row, or a loss stays outside of its band, the run cannot go on as it is: it goes back,
and takes other examples and a lower rate from there. All that is decided here depends only on the
state and the checkpoints, so that a run that is killed and resumed decides the same.
"""

import collections
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from sr_jax import UserError
from sr_jax.data import sampling
from sr_jax.data.detail import measure
from sr_jax.data.pack import Pack
from sr_jax.machine.meeting import SLOWER_SECONDS, meet
from sr_jax.networks import trees
from sr_jax.runs import checkpoint
from sr_jax.runs import storage
from sr_jax.runs.settings import Config
from sr_jax.runs.state import TrainState
from sr_jax.training import guard as guards
from sr_jax.training.degradation import crop_side
from sr_jax.training.fields import setting
from sr_jax.training.recipe import is_relativistic
from sr_jax.training.stage import Images, Stage, restore_state

FAILURE = "failure.json"
# A discriminator that has won for so many steps in a row is warned of.
WON_STEPS = 500
_COUNTERS = ("guard/in_a_row", "guard/outside", "guard/won", "guard/leaf")


class DivergedError(UserError, FloatingPointError):
  """The error of a run whose numbers are not finite, or whose losses stay outside of their band."""


class Detour(NamedTuple):
  """What a run does differently since it went back.

  Attributes:
    data_offset: how many steps its examples are ahead of its step.
    rate_factor: of the learning rate.
    rollbacks: the times that it went back, oldest first: {'from', 'to', 'since', 'reason'}.
  """

  data_offset: int = 0
  rate_factor: float = 1.0
  rollbacks: tuple[Mapping[str, Any], ...] = ()


class Trouble(Exception):
  """Says that a run cannot go on from its state.

  Attributes:
    step: the step at which this is known.
    since: the first step that was not sound.
    reason: what is wrong, the end of a sentence.
    losses: the metrics that are concerned.
    leaf: the first leaf of the state that was not finite, or ''.
    metrics: of the last steps, oldest first; each has its `step`.
    detour: what the run did differently so far.
  """

  def __init__(self, step, since, reason, losses, leaf, metrics, detour: Detour):
    super().__init__(reason)
    self.step, self.since, self.reason = step, since, reason
    self.losses, self.leaf, self.metrics, self.detour = losses, leaf, metrics, detour


def follow(
  detour: Detour | None, state: TrainState, record: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
  """Gives a state and its record what a run does differently from now on; None changes nothing."""
  if state.guard is None and (before := record.get("guard", {})).get("data_offset"):
    logging.warning(
      "guard.enabled=False: the run went back before, and no longer takes its examples from %d "
      "steps ahead, nor %g times the learning rate", before["data_offset"], before["rate_factor"],
    )  # fmt: skip
  record = {name: value for name, value in record.items() if name != "guard"}
  if detour is None:
    return state, record
  changes = {
    "data_offset": detour.data_offset, "rate_factor": detour.rate_factor, "in_a_row": 0,
    "outside": 0,
  }  # fmt: skip
  guard = state.guard
  put = {
    name: jax.device_put(np.asarray(value, getattr(guard, name).dtype), guard.skipped.sharding)
    for name, value in changes.items()
  }
  record = {**record, "rollbacks": [dict(rollback) for rollback in detour.rollbacks]}
  return state.replace(guard=guard.replace(**put)), record


def guard_record(state: TrainState) -> dict[str, Any]:
  """Returns what a checkpoint's manifest says of the guard, for people; the state has it too."""
  if state.guard is None:
    return {}
  names = ("skipped", "in_a_row", "data_offset", "rate_factor")
  values = jax.device_get({name: getattr(state.guard, name) for name in names})
  return {"guard": {name: value.item() for name, value in values.items()}}


class Watch:
  """Looks at what the guard counted, of each step one step later.

  To look at once would leave the device without work until the next step is sent.

  Args:
    stage: the stage that trains.
    state: the state that it goes on from.
    record: of that state.

  Attributes:
    detour: what the run does differently so far.
    brewing: whether the last step was skipped, or had a loss outside of its band. No checkpoint of
      it takes the place of a sound one.
  """

  def __init__(self, stage: Stage, state: TrainState, record: Mapping[str, Any]):
    self._stage, self._new, self._first, self.brewing = stage, False, {}, False
    self._recent = collections.deque(maxlen=20)
    self._leaves = guards.leaf_names(stage.abstract)
    self.detour = Detour(rollbacks=tuple(record.get("rollbacks", ())))
    if state.guard is not None:
      told = guard_record(state)["guard"]
      self.detour = self.detour._replace(
        data_offset=told["data_offset"], rate_factor=told["rate_factor"]
      )

  def keep(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Keeps the metrics of a step until they are looked at."""
    if "guard/skipped" in metrics:
      self._recent.append((step, metrics))
      self._new = True

  def look(self, *, state: TrainState | None = None, last: bool = False) -> None:
    """Looks at the step that was kept last, once.

    Args:
      state: the state after it, if it is to be saved: after a step that was skipped it may be one
        that was damaged before.
      last: whether the run ends with this step; then no more than one step may be skipped.

    Raises:
      Trouble: the run cannot go on.
    """
    if not self._new:
      return
    self._new, (step, metrics) = False, self._recent[-1]
    seen = jax.device_get({name: metrics[name] for name in _COUNTERS})
    in_a_row, outside, won, _ = (int(seen[name]) for name in _COUNTERS)
    settings = self._stage.config.guard
    self.brewing = bool(in_a_row or outside)
    for skipped, count in ((True, in_a_row), (False, outside)):
      if count == 1:
        self._first[skipped] = metrics
    enough = min(2, settings.patience) if last else settings.patience
    damaged = False
    if in_a_row and state is not None:  # of several processes, one alone may have damaged copies
      damaged = any(meet(f"state of step {step}", bool(trees.not_finite(state))))
    diverged = settings.divergence and outside >= settings.divergence_steps
    if in_a_row >= enough or damaged or diverged:
      raise self._trouble(step, in_a_row, outside)
    if won == WON_STEPS:
      logging.warning("%s: %s", self._stage.run, advice_where_d_has_won(self._stage))

  def _trouble(self, step: int, in_a_row: int, outside: int) -> Trouble:
    """Says what was seen first: numbers that were not finite, outliers, or a loss far off."""
    recent = [
      {"step": number, **{name: float(x) for name, x in sorted(jax.device_get(metrics).items())}}
      for number, metrics in self._recent
    ]
    diverged, count = outside > in_a_row, max(in_a_row, outside)
    since, steps = step - count + 1, f"{count} step{'s in a row' if count > 1 else ''}"
    first = self._first.get(not diverged, self._recent[0][1])
    first = {name: float(x) for name, x in sorted(jax.device_get(first).items())}
    losses = [name for name, value in first.items() if not math.isfinite(value)]
    leaf = self._leaves[int(first["guard/leaf"])] if first["guard/leaf"] >= 0 else ""
    if diverged:
      factor = self._stage.config.guard.divergence
      losses = losses or [name for name in ("loss_g", "loss_d") if name in first]
      reason = f"{' or '.join(losses)} was above {factor:g} times its running median for {steps}"
    elif losses or leaf:
      reason = f"{', '.join(losses) or leaf} not finite at step {since}, and {steps} skipped"
    elif self._stage.config.guard.outlier:
      losses = [name for name in ("grad_norm_g", "grad_norm_d") if name in first]
      reason = f"{' or '.join(losses)} was far above its running median for {steps}"
    else:
      reason = f"another device's copy of the state was damaged, and {steps} skipped"
    return Trouble(step, since, reason, losses, leaf, recent, self.detour)


def sound_step(steps: Sequence[int], since: int, patience: int) -> int | None:
  """Chooses the checkpoint to go back to: the newest that was followed by enough sound steps.

  A state can be finite and yet beyond help, so a checkpoint is only trusted if as many steps as it
  takes to notice were sound after it.

  Args:
    steps: those that have a checkpoint.
    since: the first step that was not sound.
    patience: how many sound steps are enough.

  Returns:
    The step; where none was followed by enough, the newest that was followed by one, else the
    oldest; None without a checkpoint.
  """
  for enough in (patience, 1):
    if proven := [step for step in steps if step + enough < since]:
      return max(proven)
  return min(steps, default=None)


def go_back(stage: Stage, images: Images, trouble: Trouble) -> tuple[Stage, Detour]:
  """Takes a stage back to a sound checkpoint, or to its start if there is none.

  Later checkpoints move to RUN/withdrawn. All processes call it.

  Args:
    stage: the stage that cannot go on.
    images: that it trains on.
    trouble: why.

  Returns:
    The stage to go on with, and what it does differently from there on.

  Raises:
    DivergedError: it went back as often as it may; RUN/failure.json has the report.
  """
  run, settings, before = stage.run, stage.config.guard, trouble.detour
  meet("everything is saved", None, seconds=SLOWER_SECONDS)
  steps, restored = checkpoint.steps(run), None
  while steps:
    target = sound_step(steps, trouble.since, settings.patience)
    _withdraw(run, [step for step in steps if step > target])
    restored = restore_state(run, stage.abstract, stage.mesh)
    if restored is None or not trees.not_finite(restored[0]):
      break
    _withdraw(run, [int(restored[0].step)])
    steps, restored = checkpoint.steps(run), None
  stage = stage._replace(restored=restored)
  if len(before.rollbacks) >= settings.rollbacks:
    raise DivergedError(_report(stage, images.train, trouble))
  detour = Detour(
    before.data_offset + trouble.step - stage.step,
    before.rate_factor if before.rollbacks else before.rate_factor * settings.rate_factor,
    (
      *before.rollbacks,
      {"from": trouble.step, "to": stage.step, "since": trouble.since, "reason": trouble.reason},
    ),
  )
  logging.warning(
    "%s: %s; going back to step %d and on from there with other examples, at %g times the "
    "learning rate; later checkpoints are in %s/withdrawn",
    run, trouble.reason, stage.step, detour.rate_factor, run,
  )  # fmt: skip
  return stage, detour


def _withdraw(run: storage.Folder, steps: Sequence[int]) -> None:
  """Moves checkpoints away, when no process reads them; returns once they are gone for all."""
  meet("going back", None, seconds=SLOWER_SECONDS)
  if jax.process_index() == 0:
    for step in steps:
      checkpoint.withdraw(run, step)
  meet("gone back", None, seconds=SLOWER_SECONDS)


def remedies(stage: Stage) -> list[str]:
  """Lists settings that help a run whose numbers are not finite."""
  config, prefix = stage.config, stage.prefix
  found = {"learning_rate.base": f"{config.learning_rate.base / 10:g}"}
  if not config.optimizer.clip_norm:
    found["optimizer.clip_norm"] = "1"
  if config.dtype != "float32":
    found["dtype"] = "float32"
  return [setting(prefix + name, value) for name, value in found.items()]


def advice_where_d_has_won(stage: Stage) -> str:
  """Says that the discriminator has won, and what helps."""
  config, prefix = stage.config, stage.prefix
  helps = [setting(f"{prefix}learning_rate.base", f"{config.learning_rate.base / 2:g}")]
  if config.discriminator.steps_per_generator_step > 1:
    helps.append(setting(f"{prefix}discriminator.steps_per_generator_step", 1))
  if (features := config.discriminator.kwargs.features) > 1:
    smaller = setting(f"{prefix}discriminator.kwargs.features", features // 2)
    helps.append(f"in a new run {smaller}")
  if not is_relativistic(config):
    helps.append(f"in a new run {setting(f'{prefix}adversarial.loss', 'ragan')}")
  return (
    f"the discriminator has won: for {WON_STEPS} steps it told real images from generated ones "
    f"with a margin above {guards.WON:g}, and teaches the generator little; try "
    f"{', or '.join(helps)}"
  )


def health(step: int, metrics: Mapping[str, float], config: Config) -> dict[str, float]:
  """Returns the metrics of a step as they are logged: with D's margin and the share of skips."""
  told = {name: value for name, value in metrics.items() if not name.startswith("guard/")}
  if "d_real" in told:
    told["d_margin"] = float(guards.margin(np, told, relativistic=is_relativistic(config)))
  if "guard/skipped" in metrics:
    told |= {name: metrics[name] for name in ("guard/in_a_row", "guard/skipped")}
    told["guard/skipped_share"] = metrics["guard/skipped"] / step
  return dict(sorted(told.items()))


def examples_of(pack: Pack, config: Config, position: int) -> list[dict[str, Any]]:
  """Says which examples a step had.

  Args:
    pack: the images.
    config: the recipe.
    position: of the step in the data, from 0.

  Returns:
    For each example its number in the run's order, its image, its crop's left and top in LR pixels,
    and its symmetry of the square.
  """
  data = config.data
  epoch, place = sampling.batch_positions(position, data.batch_size, len(pack.names))
  detail = measure(pack) if data.detail_draws > 1 else None
  plan = sampling.example_plan(
    np, config.seed, epoch, place, pack.lr_sizes, crop_side(config) // config.scale, detail,
    data.detail_draws, 8 if data.rotate else 2,
  )  # fmt: skip
  return [
    {"id": position * data.batch_size + row, "image": pack.names[image], "x": int(x), "y": int(y),
     "dihedral": int(dihedral)}
    for row, (image, y, x, dihedral) in enumerate(zip(*plan, strict=True))
  ]  # fmt: skip


def _report(stage: Stage, pack: Pack, trouble: Trouble) -> str:
  """Writes RUN/failure.json, and returns the same on one screen."""
  detour, prefix = trouble.detour, stage.prefix
  examples = examples_of(pack, stage.config, trouble.since - 1 + detour.data_offset)
  attempts = setting(f"{prefix}guard.rollbacks", stage.config.guard.rollbacks + 1)
  helps = [*remedies(stage), attempts]
  report = {
    "step": trouble.step,
    "since": trouble.since,
    "reason": trouble.reason,
    "losses": trouble.losses,
    "leaf": trouble.leaf,
    "examples": examples,
    "rollbacks": list(detour.rollbacks),
    "metrics": [{k: _number(x) for k, x in line.items()} for line in trouble.metrics],
    "try": helps,
  }
  path = stage.run / FAILURE
  if jax.process_index() == 0:
    storage.write_text(path, json.dumps(report, indent=2) + "\n")
  seen = [f"{example['image']} (example {example['id']})" for example in examples]
  columns = ("step", "loss_g", "loss_d", "grad_norm_g", "grad_norm_d", "guard/in_a_row")
  columns = [name for name in columns if name in trouble.metrics[0]]
  table = [columns] + [[f"{line[name]:.4g}" for name in columns] for line in trouble.metrics]
  back = "; ".join(f"from step {r['from']} to {r['to']}" for r in detour.rollbacks) or "not"
  lines = [
    f"{stage.run} stopped at step {trouble.step}: {trouble.reason}",
    f"  losses:    {', '.join(trouble.losses)}",
    f"  leaf:      {trouble.leaf or 'none was seen'}",
    f"  since:     step {trouble.since}, with {', '.join(seen[:4])}{' ...' if seen[4:] else ''}",
    f"  went back: {back}",
    *("  " + "".join(f"{cell:>15}" for cell in row) for row in table),
    f"  report:    {path}",
    f"  The same command goes on from step {stage.step}; try it with {' or '.join(helps)}",
  ]
  return "\n".join(lines)


def _number(value: float) -> float | str:
  """A number as JSON has it; it has no NaN and no Inf."""
  return value if math.isfinite(value) else str(value)
