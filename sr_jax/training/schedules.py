"""Learning rates as functions of the step, which is the number of updates already done.

They depend on the run's step and not on the optimizer's own count, so that a generator that waits
for its discriminator still follows the recipe's schedule.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from sr_jax import UserError

Schedule = Callable[[jax.Array], jax.Array]


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
  boundaries = jnp.asarray(milestones, jnp.int32).reshape(-1)

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
  lengths = jnp.asarray(periods, jnp.int32)
  ends = jnp.cumsum(lengths)

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.minimum(jnp.asarray(step, jnp.int32), ends[-1])
    period = jnp.sum(step > ends)
    done = (step - (ends[period] - lengths[period])) / lengths[period]
    return jnp.float32(eta_min) + 0.5 * (base - eta_min) * (1 + jnp.cos(jnp.pi * done))

  return schedule


def make_schedule(
  schedule: str,
  *,
  base: float,
  milestones: Sequence[int] = (),
  gamma: float = 0.5,
  periods: Sequence[int] = (),
  eta_min: float = 0.0,
) -> Schedule:
  """Makes the schedule that a recipe's `learning_rate.schedule` names.

  Args:
    schedule: 'constant', 'multi_step' or 'cosine_restarts'.
    base: the learning rate that the schedule starts with.
    milestones: an argument of `multi_step`.
    gamma: an argument of `multi_step`.
    periods: an argument of `cosine_restarts`.
    eta_min: an argument of `cosine_restarts`.

  Raises:
    UserError: there is no schedule of that name, or its arguments do not fit.
  """
  if schedule == "constant":
    return constant(base=base)
  if schedule == "multi_step":
    return multi_step(base=base, milestones=milestones, gamma=gamma)
  if schedule == "cosine_restarts":
    return cosine_restarts(base=base, periods=periods, eta_min=eta_min)
  raise UserError(
    f"learning_rate.schedule={schedule!r} must be one of constant, multi_step, cosine_restarts"
  )
