"""Trains a recipe: the same command starts it, resumes it, and says when it is finished.

  python -m sr_jax.main --config configs/esrgan.py
  python -m sr_jax.main --config configs/esrgan.py:basicsr --workdir RUN --config.data.source=DIR
  python -m sr_jax.main --config my_recipe.py --config.total_steps=50000
  python -m sr_jax.main --list                         every field, its default and its meaning
  python -m sr_jax.main --config esrgan:demo --list    and what a recipe sets

`configs/NAME.py` may be written as NAME: `--config esrgan`. It means the recipe that comes with
sr_jax, from any folder.
"""

from sr_jax.machine.signals import end_at_signals

if __name__ == "__main__":
  end_at_signals(training=True)  # the imports below take seconds

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from ml_collections import config_dict

from sr_jax import UserError
from sr_jax import cli
from sr_jax import command
from sr_jax import recipe_files
from sr_jax.machine import cluster
from sr_jax.machine.meeting import TIMEOUT_SECONDS
from sr_jax.machine.stop import Stop, stopped_status
from sr_jax.networks import build
from sr_jax.runs import storage
from sr_jax.runs.settings import flat
from sr_jax.training import fields
from sr_jax.training import schedules
from sr_jax.training.checks import check_names, check_settings, unread
from sr_jax.training.overrides import parse
from sr_jax.training.run import train_and_evaluate


def read_config(recipe: str, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
  """Reads a recipe and sets fields of it, as the command line does.

  What is set in `data`, `generator`, `log`, `checkpoint` and some other fields holds for a recipe's
  first stage too, and schedules follow the number of steps: see `share_overrides`, `fit_schedules`.

  Args:
    recipe: 'esrgan:demo', 'configs/esrgan.py', 'my_recipe.py:variant'.
    overrides: '--config.FIELD=VALUE', or '--config.FIELD', 'VALUE'.

  Returns:
    The recipe, locked.

  Raises:
    UserError: there is no such recipe, variant or field, or a value is not of the field's type or
      breaks a rule; the error has a line for each.
  """
  config = recipe_files.load(*recipe_files.find(recipe))
  check_names(config)
  change_generator(config, overrides)
  plain = config.copy_and_resolve_references()
  given, problems = parse(overrides, flat(plain.to_dict()))
  set_by_hand = list(given)
  with config.unlocked():
    config.update_from_flattened_dict(given)
    match_channels(config, given)
    share_overrides(config, given)
    fit_schedules(config, plain, given)
  try:
    check_settings(config, plain)
  except UserError as error:
    problems += str(error).splitlines()
  if problems:
    raise UserError("\n".join(problems))
  for line in unread(config, set_by_hand):
    logging.warning("%s", line)
  return config.lock()


def change_generator(config: config_dict.ConfigDict, overrides: Sequence[str]) -> None:
  """Gives a recipe the fields of the generator that the command line names, if it names another.

  Args:
    config: the recipe, which is changed before anything else is set.
    overrides: as for `read_config`.
  """
  chosen, _ = parse(overrides, {"generator.name": "", "psnr.generator.name": ""})
  both = chosen.get("generator.name")
  stages = [(config, both)]
  if "psnr" in config:
    stages.append((config.psnr, chosen.get("psnr.generator.name", both)))
  for stage, name in stages:
    if name in build.GENERATORS and name != stage.generator.name:
      stage.generator = fields.generator(name)


def match_channels(config: config_dict.ConfigDict, overrides: dict[str, Any]) -> None:
  """Makes the generator's channels those of the images where only one of the two is set.

  Args:
    config: the recipe, which is changed.
    overrides: {dotted field: value} from the command line, to which what follows is added.
  """
  for prefix in ("", "psnr.") if "psnr" in config else ("",):
    stage = config.psnr if prefix else config
    pair = f"{prefix}data.channels", f"{prefix}generator.kwargs.out_channels"
    for one, other in (pair, pair[::-1]):
      follows = overrides.get(one) in (1, 3) and other not in overrides
      if follows and "out_channels" in stage.generator.kwargs:
        overrides[other] = overrides[one]
        config.update_from_flattened_dict({other: overrides[one]})


def share_overrides(config: config_dict.ConfigDict, overrides: dict[str, Any]) -> None:
  """Applies overrides of the command line to the first stage too.

  If other images replace the TFDS data set of a recipe, its held-out images are not used either:
  no images are scored, unless `eval.source` is given.

  Args:
    config: the recipe, which is changed.
    overrides: {dotted field: value} from the command line. An override of `psnr.FIELD` takes
      precedence over one of FIELD.
  """
  given, held_out = overrides.get("data.source", ""), str(config.eval.source)
  if given and not given.startswith("tfds:") and held_out.startswith("tfds:"):
    if "eval.source" not in overrides:
      if not config.data.hold_out:
        logging.warning(
          "no --config.eval.source given beside data.source: no scores in training; "
          "--config.data.hold_out=10 holds out every tenth image"
        )
      config.eval.source = overrides["eval.source"] = ""
  if "psnr" not in config:
    return
  for field in overrides:
    if field.startswith(fields.SHARED) and f"psnr.{field}" not in overrides:
      *folders, name = field.split(".")
      source, target = config, config.psnr
      for folder in folders:
        source, target = source[folder], target[folder]
      target[name] = source[name]


def fit_schedules(
  config: config_dict.ConfigDict, recipe: config_dict.ConfigDict, overrides: Mapping[str, Any]
) -> None:
  """Stretches the schedules that nobody set to the number of steps that somebody set.

  Of a stage whose `total_steps` was set, the milestones or the periods that its schedule reads keep
  their shares of the run. Those that were set too stay as they are, and so do those that break
  their rule, which is for `check_settings` to say.

  Args:
    config: the recipe with its overrides, which is changed.
    recipe: the same recipe without them.
    overrides: {dotted field: value} from the command line.
  """
  for prefix in ("", "psnr."):
    if f"{prefix}total_steps" not in overrides:
      continue
    stage, plain = (x.psnr if prefix else x for x in (config, recipe))
    for field, stretch in (
      ("milestones", schedules.stretched_milestones),
      ("periods", schedules.stretched_periods),
    ):
      steps, name = plain.learning_rate[field], f"learning_rate.{field}"
      read = field in schedules.SCHEDULES.get(stage.learning_rate.schedule, ())
      unset = read and steps and f"{prefix}{name}" not in overrides
      sound = fields.FIELDS[name].rule.holds(steps)
      if unset and sound and stage.total_steps > 0 and plain.total_steps > 0:
        stage.learning_rate[field] = stretch(steps, plain.total_steps, stage.total_steps)


def default_workdir(recipe: str) -> str:
  """Returns the default folder of a run: configs/esrgan.py:demo -> runs/esrgan-demo."""
  path, _, variant = recipe.partition(":")
  return f"runs/{pathlib.Path(path).stem}{'-' + variant if variant else ''}"


def list_fields(config: config_dict.ConfigDict) -> str:
  """Returns a line for each field of a recipe: its name, its value, and what it means."""
  stages = [("", config), *([("psnr.", config.psnr)] if "psnr" in config else [])]
  lines = []
  for prefix, stage in stages:
    values = flat(stage.to_dict())
    for name, meaning in fields.meanings(stage).items():
      choices = fields.rule_of(name).text
      choices = f"; {choices}" if choices.startswith("one of") else ""
      value = str(values[name]) or repr("")
      lines.append((f"--config.{prefix}{name}", f"{value}  ({meaning}{choices})"))
  width = max(len(name) for name, _ in lines)
  return "\n".join(f"{name:<{width}}  {rest}" for name, rest in lines)


def _parser() -> argparse.ArgumentParser:
  recipes = ", ".join(recipe_files.names())
  parser = command.parser(
    "train",
    __doc__,
    epilog="Any field of the recipe can be set: --config.data.batch_size=32; --list shows all.",
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config", metavar="RECIPE[:VARIANT]", help=f"a recipe's file, or one of {recipes}"
  )
  parser.add_argument(
    "--workdir",
    default="",
    help="folder of the run, or gs://BUCKET/RUN; by default runs/RECIPE-VARIANT",
  )
  parser.add_argument(
    "--list", action="store_true", help="list every field, its value and its meaning, and end"
  )
  parser.add_argument(
    "--distributed",
    default="auto",
    choices=cluster.MODES,
    help="several processes as one run: auto where a cluster is found; on requires one; off never",
  )
  parser.add_argument(
    "--start_seconds",
    type=int,
    default=TIMEOUT_SECONDS,
    help=f"how long to wait for the other processes at the start ({TIMEOUT_SECONDS})",
  )
  parser.add_argument(
    "--heartbeat_seconds",
    type=int,
    default=100,
    help="seconds without a heartbeat after which a process counts as dead (100)",
  )
  return parser


def main(argv: Sequence[str]) -> None:
  parser = _parser()
  args, overrides = parser.parse_known_args(argv)
  if args.list and not args.config and overrides:
    parser.error(f"--list: {overrides[0]} goes with --config=RECIPE; --list alone lists defaults")
  if args.list:
    print(list_fields(read_config(args.config, overrides) if args.config else fields.defaults()))
    return
  if not args.config:
    names = ", ".join(recipe_files.names())
    parser.error(f"--config is required: a recipe's file, or one of {names}")
  for name in ("start_seconds", "heartbeat_seconds"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}={getattr(args, name)} must be 1 or more; try "
                   f"--{name}={parser.get_default(name)}")  # fmt: skip
  config = read_config(args.config, overrides)
  workdir = args.workdir or default_workdir(args.config)
  if not storage.is_bucket(storage.run_folder(workdir)):
    storage.output_folder("--workdir", workdir)
  stop = Stop().install()
  cluster.start(
    args.distributed, start_seconds=args.start_seconds, heartbeat_seconds=args.heartbeat_seconds
  )
  stop.install()
  with cluster.naming_the_lost(args.heartbeat_seconds):
    stopped = train_and_evaluate(config, workdir, stop)
  cluster.finish(stop)
  if stopped:
    sys.exit(stopped_status())


run = cli.guarded(main)

if __name__ == "__main__":
  run(sys.argv[1:])
