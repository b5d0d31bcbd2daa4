"""Schedules against PyTorch's schedulers, stepped as BasicSR steps them, and by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.training import schedules


def rate(schedule, step):
  return float(schedule(jnp.int32(step)))


def test_schedules_are_made_without_a_program():
  """They are made before all is found that a run needs, and an error waits for no compiler."""
  import jax

  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event)
  )
  schedules.multi_step(base=2e-4, milestones=(7, 77, 777, 7777, 77777), gamma=0.5)
  schedules.cosine_restarts(base=2e-4, periods=(7, 77, 777, 7777, 77777), eta_min=1e-7)
  assert not [event for event in compiled if "compile" in event]


def test_multi_step_changes_with_the_update_after_the_milestone():
  schedule = schedules.multi_step(base=2e-4, milestones=(200_000, 400_000), gamma=0.5)
  for step, expected in (
      (0, 2e-4), (199_999, 2e-4), (200_000, 1e-4), (200_001, 1e-4),
      (399_999, 1e-4), (400_000, 5e-5), (10**6, 5e-5),
  ):  # fmt: skip
    np.testing.assert_allclose(rate(schedule, step), expected, rtol=1e-6)


@pytest.mark.developer("torch")
def test_multi_step_is_pytorchs_stepped_before_every_iteration_but_the_first():
  import torch

  optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
  scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[3, 5, 9], gamma=0.5)
  ours = schedules.multi_step(base=1e-4, milestones=(3, 5, 9), gamma=0.5)
  for iteration in range(1, 13):
    if iteration > 1:
      optimizer.step()
      scheduler.step()
    np.testing.assert_allclose(
      rate(ours, iteration - 1), optimizer.param_groups[0]["lr"], rtol=1e-6
    )


def test_cosine_restarts():
  base, eta_min, period = 2e-4, 1e-7, 250_000
  schedule = schedules.cosine_restarts(base=base, periods=(period,) * 4, eta_min=eta_min)

  def cosine(done):
    return eta_min + 0.5 * (base - eta_min) * (1 + math.cos(math.pi * done / period))

  for step, done in (
      (0, 0), (1, 1), (125_000, 125_000), (249_999, 249_999), (250_000, 250_000),
      (250_001, 1), (500_000, 250_000), (500_001, 1), (750_001, 1), (10**6, 250_000),
      (2 * 10**6, 250_000),
  ):  # fmt: skip
    np.testing.assert_allclose(rate(schedule, step), cosine(done), rtol=1e-5, atol=1e-11)


def test_periods_of_different_lengths():
  schedule = schedules.cosine_restarts(base=1.0, periods=(2, 4), eta_min=0.0)
  expected = [1, 0.5, 0, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 + math.cos(3 * math.pi / 4)) / 2]
  np.testing.assert_allclose([rate(schedule, s) for s in range(6)], expected, atol=1e-6)


def test_constant():
  schedule = schedules.make_schedule("constant", base=3e-4, milestones=(1,))
  np.testing.assert_allclose([rate(schedule, s) for s in (0, 5)], 3e-4, rtol=1e-6)


def test_a_cosine_needs_periods():
  with pytest.raises(ValueError, match="positive step counts"):
    schedules.make_schedule("cosine_restarts", base=1.0)


@pytest.mark.parametrize(
  "name, options",
  [("constant", {}), ("multi_step", {"milestones": (2,), "gamma": 0.5}),
   ("cosine_restarts", {"periods": (6,)})],
)  # fmt: skip
def test_a_warm_up_grows_linearly_to_the_schedule(name, options):
  plain = schedules.make_schedule(name, base=4e-4, **options)
  warm = schedules.make_schedule(name, base=4e-4, warmup_steps=4, **options)
  for step, share in enumerate((0.25, 0.5, 0.75, 1, 1, 1)):
    np.testing.assert_allclose(rate(warm, step), share * rate(plain, step), rtol=1e-6)
