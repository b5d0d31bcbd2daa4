"""Scores the averaged weights during training."""

import itertools
from collections.abc import Sequence

import jax
import numpy as np

from sr_jax.evaluation import scoring
from sr_jax.evaluation.test_sets import TestImage
from sr_jax.machine.meeting import SLOWER_SECONDS, meet
from sr_jax.machine.stop import Stop
from sr_jax.runs import logs
from sr_jax.runs.state import TrainState
from sr_jax.training.stage import Stage
from sr_jax.upscaling import upscaler


def evaluate_state(
  stage: Stage,
  test_images: Sequence[TestImage],
  state: TrainState,
  writer: logs.Writer,
  step: int,
  stop: Stop,
) -> dict[str, float] | None:
  """Scores the averaged weights and writes the scores; each process scores a share of the images.

  Returns:
    The means, equal on all processes; None, with nothing written, if a signal came meanwhile.

  Raises:
    TimeoutError: a process did not come; the error names it.
  """
  device = stage.mesh.local_devices[0]
  variables = jax.device_get(state.ema_variables)
  upscale = upscaler.make_upscaler(stage.networks.generator, variables, device=device)
  grids = {}

  def keep(image, srs, scores):
    del scores
    if len(grids) < 4:
      scale = stage.config.scale
      lr = image.lr.repeat(scale, axis=0).repeat(scale, axis=1)
      grid = np.concatenate([lr, srs["ema"], image.hr], axis=1)
      grids[f"eval/{image.name}"] = (grid if grid.ndim == 3 else grid[:, :, None])[None]

  names = [image.name for image in test_images]
  share = test_images[jax.process_index() :: jax.process_count()]
  rest = itertools.takewhile(lambda _: not stop.pending, share[1:])
  per_image = {}
  if share:
    images = itertools.chain(share[:1], rest)
    scored = scoring.evaluate_set({"ema": upscale}, images, stage.config.scale, keep=keep)
    per_image = scored["ema"]["images"]
  everyone = meet(f"scores of step {step}", [bool(stop.pending), per_image], seconds=SLOWER_SECONDS)
  if any(gave_way for gave_way, _ in everyone):
    return None
  gathered = {name: scores for _, theirs in everyone for name, scores in theirs.items()}
  scored = scoring.with_means({name: gathered[name] for name in names})
  means = {key: value for key, value in scored.items() if key != "images"}
  writer.scalars(step, {f"eval/{key}": value for key, value in means.items()}, {})
  writer.images(step, grids)
  logs.say(f"  step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in means.items()))
  return means
