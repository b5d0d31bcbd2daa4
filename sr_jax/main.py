"""Trains a recipe: the same command starts it, resumes it, and says when it is finished.

python -m sr_jax.main --config configs/esrgan.py
python -m sr_jax.main --config configs/esrgan.py:basicsr --workdir RUN --config.data.source=DIR
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app
from absl import flags
from absl import logging
from ml_collections import config_dict
from ml_collections import config_flags

from sr_jax import UserError
from sr_jax import cli
from sr_jax.machine import cluster
from sr_jax.machine.meeting import TIMEOUT_SECONDS
from sr_jax.machine.stop import Stop, stopped_status
from sr_jax.training.run import train_and_evaluate

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe: configs/NAME.py[:variant].")
_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Folder of the run, or gs://BUCKET/RUN; runs/<config>[-variant] if ''."
)

_DISTRIBUTED = flags.DEFINE_enum(
  "distributed",
  "auto",
  cluster.MODES,
  "Several processes as one run: auto where a cluster is found; on requires one; off never.",
)
_START_SECONDS = flags.DEFINE_integer(
  "start_seconds", TIMEOUT_SECONDS, "Seconds to wait for the other processes at the start."
)
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
  "heartbeat_seconds", 100, "Seconds without a heartbeat after which a process counts as dead."
)

# Overrides of these fields apply to a recipe's first stage too.
_SHARED = (
  "data.",
  "generator.",
  "seed",
  "scale",
  "dtype",
  "optimizer.accumulate_steps",
  "log.",
  "eval.source",
  "eval.max_images",
  "checkpoint.",
)


def share_overrides(config: config_dict.ConfigDict, overrides: dict) -> None:
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
      logging.warning("no --config.eval.source given beside data.source: no scores in training")
      config.eval.source = overrides["eval.source"] = ""
  if "psnr" not in config:
    return
  for field in overrides:
    if field.startswith(_SHARED) and f"psnr.{field}" not in overrides:
      *folders, name = field.split(".")
      source, target = config, config.psnr
      for folder in folders:
        source, target = source[folder], target[folder]
      target[name] = source[name]


def default_workdir(config_file: str) -> str:
  """Returns the default folder of a run: configs/esrgan.py:demo -> runs/esrgan-demo."""
  path, _, variant = config_file.partition(":")
  return f"runs/{pathlib.Path(path).stem}{'-' + variant if variant else ''}"


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; flags are --name=value")
  config = _CONFIG.value
  share_overrides(config, dict(config_flags.get_override_values(flags.FLAGS["config"])))
  config.lock()
  filename = config_flags.get_config_filename(flags.FLAGS["config"])
  stop = Stop().install()
  cluster.start(
    _DISTRIBUTED.value,
    start_seconds=_START_SECONDS.value,
    heartbeat_seconds=_HEARTBEAT_SECONDS.value,
  )
  stop.install()
  with cluster.naming_the_lost(_HEARTBEAT_SECONDS.value):
    workdir = _WORKDIR.value or default_workdir(filename)
    stopped = train_and_evaluate(config, workdir, stop)
  cluster.finish(stop)
  if stopped:
    sys.exit(stopped_status())


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(cli.guarded(main))
