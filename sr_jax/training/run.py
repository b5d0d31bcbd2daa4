"""Trains a run from its configuration to its end; read it from top to bottom.

A run of two stages (SRGAN, ESRGAN) holds its first stage as a complete run in RUN/psnr. The same
call resumes the stage that the run was in, and does nothing if both are finished.
"""

import hashlib
import importlib.metadata
import itertools
import json
import pathlib
from typing import Any

from sr_jax import UserError
from sr_jax.machine.meeting import SLOWER_SECONDS, check_same, meet
from sr_jax.machine.stop import Stop
from sr_jax.networks import trees
from sr_jax.runs import logs
from sr_jax.runs.settings import Config, flat
from sr_jax.runs import storage
from sr_jax.training.loop import train_stage
from sr_jax.training.stage import find, read_start_model, open_stage, pack_images


def train_and_evaluate(
  config: Config, workdir: str | pathlib.Path, stop: Stop | None = None
) -> str:
  """Trains a recipe, or resumes it.

  Args:
    config: a recipe of configs/; it is not changed.
    workdir: the run's folder, or gs://BUCKET/RUN; the same for all processes.
    stop: notices signals, after which the run saves its step and returns; by default none are
      noticed.

  Returns:
    '' if the run is finished, or what stopped it before.

  Raises:
    UserError: settings do not fit together, data or weights are missing, or the processes differ;
      the error says how to mend each.
    NotFiniteError: a loss or a gradient is not finite.
    TimeoutError: a process did not come; the error names it.
  """
  run, stop = storage.run_folder(workdir), stop or Stop()
  check_same("the same command and code", preflight_facts(config))
  storage.check_access(run)
  main = open_stage(config, run)
  if main.finished:
    logs.say(f"{run} is finished: {config.total_steps} steps. Nothing to do.")
    return ""
  stages = [main]
  from_first = "psnr" in config and not config.init_from and main.restored is None
  if from_first:
    first = open_stage(config.psnr, run / "psnr")
    trees.check_same_shapes(
      {
        "config.generator": main.abstract.ema_variables,
        "config.psnr.generator": first.abstract.ema_variables,
      }
    )
    stages = [first, main]
  stages = [stage for stage in stages if not stage.finished]
  # Whatever either stage lacks is reported now, before minutes of decoding and training.
  found, problems = zip(*map(find, stages), strict=True)
  if problems := dict.fromkeys(itertools.chain(*problems)):
    raise UserError("\n".join(problems))
  images = list(map(pack_images, stages, found))
  check_same("the same images, weights and checkpoints", {
    f"{stage.run.name}/{what}": value
    for stage, inputs, pictures in zip(stages, found, images, strict=True)
    for what, value in {
      "step": stage.step,
      "images": [len(pictures.train.names), pictures.train.digest],
      "test images": [image.name for image in pictures.test],
      **inputs.facts(),
    }.items()
  }, seconds=SLOWER_SECONDS)  # fmt: skip
  for stage, inputs, pictures in zip(stages, found, images, strict=True):
    if stage is main and from_first:
      inputs = inputs._replace(model=read_start_model(main, str(run / "psnr")))
      check_same("the same first stage", inputs.facts())
    stopped = train_stage(stage, inputs, pictures, stop)
    if not stopped and stage is not main:  # a signal came after the stage's last step
      everyone = meet(f"end of {stage.run.name}", stop.pending)
      stopped = next(filter(None, everyone), "")
    if stopped:
      logs.say(f"{stage.run}: stopped by {stopped}; the same command goes on from here")
      return stopped
  return ""


def preflight_facts(config: Config) -> dict[str, Any]:
  """Returns what must be equal on all hosts before they compile: settings, code, packages.

  Paths are left out, since each host may have the data elsewhere; the content is compared later.
  """
  paths = ("source", "lr_source", "cache_dir", "weights", "init_from")
  fields = flat(json.loads(json.dumps(config.to_dict())))
  facts = {f"config.{k}": v for k, v in fields.items() if k.rsplit(".", 1)[-1] not in paths}
  folder = pathlib.Path(__file__).parent.parent
  sha = hashlib.sha256()
  for file in sorted(folder.rglob("*.py")):
    sha.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  return {
    **facts,
    "sha256 of sr_jax": sha.hexdigest()[:16],
    **{f"version of {name}": importlib.metadata.version(name) for name in packages},
  }
