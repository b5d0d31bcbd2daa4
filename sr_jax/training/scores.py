"""Scores the averaged weights during training, and draws what they make of a few images."""

import io
import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from PIL import Image

from sr_jax import UserError
from sr_jax.evaluation import scoring
from sr_jax.evaluation.comparison import Panels
from sr_jax.evaluation.test_sets import TestImage
from sr_jax.machine.memory import asked_for, ran_out
from sr_jax.machine.meeting import SLOWER_SECONDS, meet
from sr_jax.machine.stop import Stop
from sr_jax.runs import logs
from sr_jax.runs import storage
from sr_jax.runs.state import TrainState
from sr_jax.training.stage import Found, Stage
from sr_jax.upscaling import upscaler


def evaluate_state(
  stage: Stage,
  found: Found,
  test_images: Sequence[TestImage],
  state: TrainState,
  writer: logs.Writer,
  step: int,
  stop: Stop,
) -> dict[str, float] | None:
  """Scores the averaged weights; each process scores a share of the images.

  The scores are written to the run's logs, and LR, SR and HR of parts of the first few images to
  RUN/preview/STEP.png: always the same parts, so that the pictures of two steps can be compared.
  When a run scores for the first time, bicubic is scored too, as what training must be better than.

  Returns:
    The means, equal on all processes; None, with nothing written, if a signal came meanwhile.

  Raises:
    TimeoutError: a process did not come; the error names it.
  """
  device = stage.mesh.local_devices[0]
  variables = jax.device_get(state.ema_variables)
  generator, scale = stage.networks.generator, stage.config.scale
  upscalers = {"ema": upscaler.make_upscaler(generator, variables, device=device)}
  first = min(stage.config.eval.every_steps, stage.config.total_steps)
  if step == (0 if stage.config.init_from else first):
    upscalers[upscaler.BASELINE] = upscaler.bicubic_upscaler(scale)
  grids, preview = {}, Panels(max_images=4, steady=True)

  def keep(image, srs, scores):
    preview.add(image.name, image.lr, image.hr, f"step {step}", srs["ema"], scores["ema"])
    if len(grids) < 4:
      lr = image.lr.repeat(scale, axis=0).repeat(scale, axis=1)
      grid = np.concatenate([lr, srs["ema"], image.hr], axis=1)
      grids[f"eval/{image.name}"] = (grid if grid.ndim == 3 else grid[:, :, None])[None]

  names = [image.name for image in test_images]
  share = test_images[jax.process_index() :: jax.process_count()]
  rest = itertools.takewhile(lambda _: not stop.pending, share[1:])
  per_image = {}
  if share:
    images = itertools.chain(share[:1], rest)
    try:
      scored = scoring.evaluate_set(upscalers, images, scale, extra=found.extra, keep=keep)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if not ran_out(error):
        raise
      largest = max(share, key=lambda image: image.hr.size).hr.shape
      crop = min(512, max(largest[:2]) // 2)
      raise UserError(
        f"an image of {largest[1]}x{largest[0]} pixels cannot be scored in the memory that there is"
        f"{asked_for(error)}; try --config.eval.crop={crop}, which scores its middle alone"
      ) from error
    per_image = {label: scores["images"] for label, scores in scored.items()}
  everyone = meet(f"scores of step {step}", [bool(stop.pending), per_image], seconds=SLOWER_SECONDS)
  if any(gave_way for gave_way, _ in everyone):
    return None

  def gather(label: str) -> dict[str, float]:
    of_name = {n: scores for _, theirs in everyone for n, scores in theirs.get(label, {}).items()}
    scored = scoring.with_means({name: of_name[name] for name in names})
    return {key: value for key, value in scored.items() if key != "images"}

  if upscaler.BASELINE in upscalers:
    logs.say(f"  bicubic: {described(gather(upscaler.BASELINE))}")
  means = gather("ema")
  writer.scalars(step, {f"eval/{key}": value for key, value in means.items()}, {})
  writer.images(step, grids)
  if jax.process_index() == 0:
    write_preview(stage.run / "preview" / f"{step}.png", preview.draw())
  logs.say(f"  step {step}: {described(means)}")
  return means


def described(means: Mapping[str, float]) -> str:
  """Formats the scores for the screen."""
  return "  ".join(f"{key} {value:.4f}" for key, value in means.items())


def write_preview(path: storage.Folder, picture: np.ndarray) -> None:
  """Writes a picture, uint8 [H, W, 3], as PNG."""
  file = io.BytesIO()
  Image.fromarray(picture).save(file, "PNG")
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_bytes(path, file.getvalue())
