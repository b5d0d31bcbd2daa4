"""Trains a run from its configuration to its end; read it from top to bottom.

A run of two stages (SRGAN, ESRGAN) holds its first stage as a complete run in RUN/psnr. The same
call resumes the stage that the run was in, and does nothing if both are finished.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import logging
import jax

from sr_jax import UserError
from sr_jax.machine.meeting import SLOWER_SECONDS, check_same, meet
from sr_jax.machine.stop import Stop
from sr_jax.networks import trees
from sr_jax.runs import lock
from sr_jax.runs import logs
from sr_jax.runs.settings import Config, flat
from sr_jax.runs import storage
from sr_jax.training.checks import advice, check_names, check_settings
from sr_jax.training.clock import Ahead
from sr_jax.training.cost import step_products
from sr_jax.training.loop import train_stage
from sr_jax.training.memory import explained
from sr_jax.training.stage import Found, Images, Stage, find, open_stage, pack_images
from sr_jax.training.stage import read_start_model, remove_old_packs


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
    UserError: settings do not fit together, data or weights are missing, the processes differ, or
      another run holds the folder; the error says how to mend each.
    DivergedError: numbers are not finite, or diverge, and going back did not help.
    TimeoutError: a process did not come; the error names it.
  """
  check_names(config)
  check_settings(config)
  run, stop = storage.run_folder(workdir), stop or Stop()
  check_same("the same command and code", preflight_facts(config))
  storage.check_access(run)
  with contextlib.ExitStack() as locks:
    locks.enter_context(lock.held(run, stop))
    return _train(config, run, stop, locks)


def _train(config: Config, run: storage.Folder, stop: Stop, locks: contextlib.ExitStack) -> str:
  """Trains the stages of a run that this process holds, as `train_and_evaluate` says."""
  storage.check_inside(run)
  main = open_stage(config, run)
  if main.finished:
    logs.say(f"{run} is finished: {config.total_steps} steps. Nothing to do.")
    return ""
  stages = [main]
  from_first = "psnr" in config and not config.init_from and main.restored is None
  if from_first:
    locks.enter_context(lock.held(run / "psnr", stop))
    storage.check_inside(run / "psnr")
    first = open_stage(config.psnr, run / "psnr", prefix="psnr.")
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
  if problems := _once(*problems):
    raise UserError("\n".join(problems))
  for stage in stages:
    on_cpu = stage.mesh.devices.flat[0].platform == "cpu"
    for line in advice(stage.config, stage.mesh.size, cpu=on_cpu):
      logging.warning("%s: %s", stage.run, line)
  images = images_of(stages, found)
  remove_old_packs(stages, found)
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
  count = 1 if "psnr" not in config or config.init_from else 2
  for i, (stage, inputs, pictures) in enumerate(zip(stages, found, images, strict=True)):
    if stage is main and from_first:
      inputs = inputs._replace(model=read_start_model(main, str(run / "psnr")))
      check_same("the same first stage", inputs.facts())
    ahead = look_ahead(stages[i:], found[i:], count)
    try:
      stopped = train_stage(stage, inputs, pictures, stop, ahead)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      if (told := explained(error, stage)) is error:
        raise
      raise told from error
    if not stopped and stage is not main:  # a signal came after the stage's last step
      everyone = meet(f"end of {stage.run.name}", stop.pending)
      stopped = next(filter(None, everyone), "")
    if stopped:
      logs.say(f"{stage.run}: stopped by {stopped}; the same command goes on from here")
      return stopped
  return ""


def images_of(stages: Sequence[Stage], found: Sequence[Found]) -> list[Images]:
  """Decodes the images of all stages, and tells what is wrong with them in all stages at once."""
  images, problems = [], []
  for stage, inputs in zip(stages, found, strict=True):
    try:
      images.append(pack_images(stage, inputs))
    except UserError as error:
      problems.append([str(error)])
  if problems:
    raise UserError("\n".join(_once(*problems)))
  return images


def _once(*problems: Sequence[str]) -> list[str]:
  """Joins the stages' problems; what both lack is told once, as a setting of both."""

  def plain(problem: str) -> str:
    return problem.replace("config.psnr.", "config.")

  last = set(problems[-1])
  every = itertools.chain(*problems)
  return list(dict.fromkeys(plain(p) if plain(p) in last else p for p in every))


def look_ahead(stages: Sequence[Stage], found: Sequence[Found], count: int) -> Ahead:
  """Says how much the later stages compute, counted in steps of the first of these.

  Args:
    stages: the stage that is about to train, and those after it.
    found: what `find` returned for each.
    count: of all stages of the run, those that are finished too.
  """
  later = 0.0
  if len(stages) > 1:
    this, *others = (
      step_products(stage.config, inputs.vgg) for stage, inputs in zip(stages, found, strict=True)
    )
    later = (
      sum(
        products * (stage.config.total_steps - stage.step)
        for products, stage in zip(others, stages[1:], strict=True)
      )
      / this
    )
  return Ahead(count - len(stages) + 1, count, later)


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
