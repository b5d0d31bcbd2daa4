"""Counts what the recipes cost, for the table of docs/reproduce.md.

  python -m benchmarks.recipes

The arithmetic of an update is counted from the networks (`sr_jax/training/cost.py`); hours and days
divide it by rates that are given, so they are estimates.
"""

import argparse
import sys
from collections.abc import Sequence

import jax

from sr_jax import cli
from sr_jax.formats.vgg_weights import VGG
from sr_jax.main import read_config
from sr_jax.networks import vgg
from sr_jax.training import cost

RECIPES = ("srresnet", "srgan", "esrgan_psnr", "esrgan")


def row(recipe: str, accelerator: float, cpu: float) -> str:
  """Writes the row of a recipe: of its GAN stage, if it has two.

  Args:
    recipe: its name, and perhaps a variant.
    accelerator: operations that an accelerator does, TFLOP/s.
    cpu: operations that the cores of a CPU do, TFLOP/s.
  """
  config = read_config(recipe)
  weights = None
  if config.perceptual.weight:  # only the shapes of the weights count
    params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0)))
    weights = VGG(params, "torchvision", "vgg19", "shapes")
  update = 2 * cost.step_products(config, weights) / 1e12  # a product and its sum
  stage = ", second stage" if "psnr" in config else ""
  name, _, variant = recipe.partition(":")
  hours = config.total_steps * update / accelerator / 3600
  days = config.total_steps * update / cpu / 86400
  return (
    f"| `configs/{name}.py{variant and ':' + variant}`{stage} | {config.total_steps:,} | "
    f"{update:.2f} | {hours:.1f} h | {days:.0f} d |"
  )


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.recipes",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--accelerator", type=float, default=198, help="TFLOP/s")
  parser.add_argument("--cpu", type=float, default=0.15, help="TFLOP/s")
  args = parser.parse_args(argv)
  for recipe in (*RECIPES, *(f"{name}:basicsr" for name in RECIPES), "realesrgan"):
    print(row(recipe, args.accelerator, args.cpu))


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
