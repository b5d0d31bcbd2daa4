"""Learning rates as functions of the step, which is the number of updates already done.

They depend on the run's step and not on the optimizer's own count, so that a generator that waits
for its discriminator still follows the recipe's schedule.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError

Schedule = Callable[[jax.Array], jax.Array]
# {schedule: the other fields of `learning_rate` that it reads}
SCHEDULES = {
  "constant": (),
  "multi_step": ("milestones", "gamma"),
  "cosine_restarts": ("periods", "eta_min"),
}
_LAST_STEP = 2**31 - 1  # steps are counted in 32 bits


def constant(*, base: float) -> Schedule:
  """Makes a schedule with the same learning rate at every step."""
  return lambda step: jnp.full(jnp.shape(step), base, jnp.float32)


def multi_step(*, base: float, milestones: Sequence[int], gamma: float) -> Schedule:
  """Multiplies the rate by gamma at each milestone (ESRGAN section 4.1; SRGAN section 3.2).

  A milestone of 200000 applies from update 200001 on, the first that has 200000 updates behind it.
  So does BasicSR's scheduler, which steps before every iteration but the first.

  Args:
    base: the learning rate before the first milestone.
    milestones: the steps at which the rate changes.
    gamma: the factor at each milestone.
  """
  boundaries = np.asarray(milestones, np.int32).reshape(-1)  # of jnp it would be a program

  def schedule(step: jax.Array) -> jax.Array:
    passed = jnp.sum(jnp.asarray(step, jnp.int32) >= boundaries)
    return jnp.float32(base) * jnp.float32(gamma) ** passed.astype(jnp.float32)

  return schedule


def cosine_restarts(*, base: float, periods: Sequence[int], eta_min: float) -> Schedule:
  """Cosine annealing with restarts (SGDR, arXiv 1608.03983, eq. 5), with BasicSR's boundaries.

  A period ends on its last step with exactly eta_min, and the next one starts one step after its
  boundary: at 250000 of BasicSR's 4 x 250000 the rate is eta_min, at 250001 nearly `base`. After
  the last period it stays at eta_min.

  Args:
    base: the learning rate at the start of each period.
    periods: the lengths of the periods in steps.
    eta_min: the learning rate at the end of each period.

  Raises:
    UserError: there is no period, or one is shorter than a step.
  """
  if not periods or min(periods) < 1:
    raise UserError(f"periods={tuple(periods)} must be positive step counts, one or more")
  lengths = np.asarray(periods, np.int32)
  ends = np.cumsum(lengths, dtype=np.int32)

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.minimum(jnp.asarray(step, jnp.int32), ends[-1])
    period = jnp.sum(step > ends)
    length = jnp.asarray(lengths)[period]
    done = (step - (jnp.asarray(ends)[period] - length)) / length
    return jnp.float32(eta_min) + 0.5 * (base - eta_min) * (1 + jnp.cos(jnp.pi * done))

  return schedule


def warmed_up(schedule: Schedule, warmup_steps: int) -> Schedule:
  """Multiplies a schedule by 1/n, 2/n, ..., 1 in the first n = warmup_steps updates.

  BasicSR's `warmup_iter` does so too, with a constant rate.
  """
  return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / warmup_steps)


def stretched_milestones(steps: Sequence[int], old: int, new: int) -> tuple[int, ...]:
  """Moves milestones so that they keep their shares of a run whose length changes.

  Args:
    steps: milestones of a run of `old` steps.
    old: steps.
    new: steps.

  Returns:
    The milestones, rounded, at least 1; fewer, where several would fall on one step, or lie beyond
    what can be counted.
  """
  stretched = (max(1, (2 * step * new + old) // (2 * old)) for step in steps)
  return tuple(dict.fromkeys(step for step in stretched if step <= _LAST_STEP))


def stretched_periods(steps: Sequence[int], old: int, new: int) -> tuple[int, ...]:
  """Stretches periods so that their ends keep their shares of a run whose length changes.

  Args:
    steps: lengths of the periods of a run of `old` steps.
    old: steps.
    new: steps.

  Returns:
    Lengths of periods of which each is at least 1: fewer, where `new` is less than their number.
  """
  ends = [
    min((2 * end * new + old) // (2 * old), _LAST_STEP) for end in itertools.accumulate(steps)
  ]
  lengths = (end - start for start, end in zip([0, *ends], ends, strict=False))
  return tuple(length for length in lengths if length) or (1,)


def make_schedule(
  schedule: str,
  *,
  base: float,
  milestones: Sequence[int] = (),
  gamma: float = 0.5,
  periods: Sequence[int] = (),
  eta_min: float = 0.0,
  warmup_steps: int = 0,
) -> Schedule:
  """Makes the schedule that a recipe's `learning_rate.schedule` names.

  Args:
    schedule: 'constant', 'multi_step' or 'cosine_restarts'.
    base: the learning rate that the schedule starts with.
    milestones: an argument of `multi_step`.
    gamma: an argument of `multi_step`.
    periods: an argument of `cosine_restarts`.
    eta_min: an argument of `cosine_restarts`.
    warmup_steps: of `warmed_up`; 0 for none.

  Raises:
    UserError: its arguments do not fit.
  """
  if warmup_steps:
    plain = {"base": base, "milestones": milestones, "gamma": gamma, "periods": periods}
    return warmed_up(make_schedule(schedule, **plain, eta_min=eta_min), warmup_steps)
  given = {"milestones": milestones, "gamma": gamma, "periods": periods, "eta_min": eta_min}
  make = {"constant": constant, "multi_step": multi_step, "cosine_restarts": cosine_restarts}
  return make[schedule](base=base, **{name: given[name] for name in SCHEDULES[schedule]})
