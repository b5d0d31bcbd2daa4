"""How recipes should scale over TPU pods, by TPU's compiler: the tables of docs/scaling.md.

  python -m benchmarks.scaling [--recipe esrgan] [--chip v5e,v6e] [--crops 4,16] --output DIR

It compiles a recipe's step for a pod of each chip (`pod.py`), sums the compiler's estimate of a
chip's work in it (`estimate.py`), and reads how many bytes a chip sends. Each program has its file
in DIR as soon as it is compiled, and is not compiled again. **Nothing is measured.** Computing is
the compiler's estimate, from the convolutions alone to the sum of all estimates. Communication is
arithmetic: bytes by the vendor's rate of the links. A step takes from the convolutions alone, with
all communication hidden behind them, to the sum of all estimates and the communication after it.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks import estimate
from benchmarks import pod
from benchmarks import recipes
from benchmarks import side_by_side
from sr_jax import cli
from sr_jax.formats.vgg_weights import VGG
from sr_jax.main import read_config
from sr_jax.networks import vgg
from sr_jax.training import cost

# Pods by the vendor's name: libtpu's topology. The work of a chip and what it sends do not depend
# on the number of chips, so the smallest pod of a chip is compiled for all.
PODS = {"v5e-16": "v5e:4x4", "v5e-256": "v5e:16x16", "v6e-64": "v6e:8x8"}
# GB/s that a chip sends over its four links, half of the vendor's bidirectional rate. Along an axis
# of fewer than 16 chips there is no way around, and a chip at the corner has two of its four links.
LINKS = {"v5e": 200, "v6e": 400}
TORUS = 16


def compile_case(recipe: str, chip: str, crops: int) -> dict[str, Any]:
  """Compiles a recipe's last stage for the smallest pod of a chip.

  Returns:
    JSON values: what `pod.describe` says but for the lists of arrays, 'recipe', the recipe's
    'images' in all its updates, its 'batch_size', and 'flops', the useful arithmetic of a crop.
  """
  config = read_config(recipe)
  config.dtype = "bfloat16"
  weights = None
  if config.perceptual.weight:  # only the shapes of the weights count
    params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0)))
    weights = VGG(params, "torchvision", "vgg19", "shapes")
  facts = {
    "recipe": recipe,
    "batch_size": config.data.batch_size,
    "hr_patch": config.data.hr_patch,
    "updates": config.total_steps,
    "flops": 2 * cost.step_products(config, weights) // config.data.batch_size,
  }
  topology = next(name for name in PODS.values() if name.startswith(chip))
  found = pod.describe(config, topology, crops)
  return facts | {
    key: value for key, value in found.items() if key not in ("sent_arrays", "gradient_shapes")
  }


def communication_ms(sent_bytes: int, topology: str) -> float:
  """The least time of an all-reduce of so many bytes: each passes the links twice."""
  chip, _, sides = topology.partition(":")
  sides = [int(side) for side in sides.split("x")]
  count = sides[0] * sides[1]
  rate = LINKS[chip] / (1 if min(sides) >= TORUS else 2)
  return 2 * sent_bytes * (count - 1) / count / rate / 1e6


def chip_row(case: Mapping[str, Any]) -> list[str]:
  """A row of what a chip computes."""
  crops, ms, chip = case["crops_per_chip"], case["estimated_ms"], case["topology"][:3]
  mfu = [
    case["flops"] * crops / ms[key] / estimate.CHIPS[chip].tflops / 1e9
    for key in ("sum", "convolutions")
  ]
  return [
    case["recipe"],
    chip,
    str(crops),
    _range(ms["convolutions"], ms["sum"]),
    _range(ms["convolutions"] / crops, ms["sum"] / crops),
    f"{mfu[0]:.0%} - {mfu[1]:.0%}",
    f"{(case['held_bytes'] + case['temporary_bytes']) / 1e9:.2f}",
    f"{case['sent_bytes'] / 1e6:.1f} in {case['messages']}",
  ]


def pod_row(case: Mapping[str, Any], name: str) -> list[str]:
  """A row of what a pod does with so many crops on each chip."""
  crops, ms, topology = case["crops_per_chip"], case["estimated_ms"], PODS[name]
  chips, sent = int(name.rpartition("-")[2]), communication_ms(case["sent_bytes"], topology)
  low, high = max(ms["convolutions"], sent), ms["sum"] + sent
  larger = crops * chips / case["batch_size"]  # than the recipe's batch
  hours = [case["updates"] * step / 3.6e6 for step in (low, high)]
  return [
    case["recipe"],
    name,
    str(crops),
    f"{crops * chips:,}",
    f"{sent:.1f}",
    _range(low, high),
    _range(crops / high * 1e3, crops / low * 1e3),
    _range(*(h / larger for h in hours)),
    _range(*(h / larger**0.5 for h in hours)),
  ]


def _range(low: float, high: float) -> str:
  return f"{low:.3g} - {high:.3g}"


def fixed_and_per_crop(few: Mapping[str, Any], many: Mapping[str, Any]) -> tuple[float, float]:
  """Milliseconds of a step's sum that do not depend on the crops, and of each crop."""
  slope = (many["estimated_ms"]["sum"] - few["estimated_ms"]["sum"]) / (
    many["crops_per_chip"] - few["crops_per_chip"]
  )
  return few["estimated_ms"]["sum"] - slope * few["crops_per_chip"], slope


def to_markdown(cases: Sequence[Mapping[str, Any]]) -> str:
  """Writes the tables of these cases, in their order: chips, pods, and the cost of more crops."""
  of_chips = ["recipe", "chip", "crops", "ms a step", "ms a crop", "MFU", "GB", "MB sent"]
  of_pods = ["recipe", "pod", "crops a chip", "batch", "ms sending", "ms a step"]
  of_pods += ["images/s/chip", "hours, as many images", "hours, by the square root"]
  groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for case in cases:
    groups.setdefault((case["recipe"], case["topology"][:3]), []).append(case)
  lines = [*_table(of_chips, [chip_row(case) for case in cases]), ""]
  lines += _table(
    of_pods,
    [
      pod_row(case, name)
      for (_, chip), group in groups.items()
      for name in PODS
      if name.startswith(chip)
      for case in group
    ],
  )
  lines.append("")
  for (recipe, chip), group in groups.items():
    if len(group) > 1:
      fixed, each = fixed_and_per_crop(group[0], group[-1])
      lines.append(
        f"* {recipe} on {chip}: {fixed:.1f} ms a step and {each:.2f} ms a crop (sum, from "
        f"{group[0]['crops_per_chip']} to {group[-1]['crops_per_chip']} crops)."
      )
  return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.scaling",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--recipe", default=",".join(recipes.RECIPES))
  parser.add_argument("--chip", default="v5e,v6e")
  parser.add_argument("--crops", default="4,16,64", help="of a chip")
  parser.add_argument("--output", default="results/scaling", help="folder of the figures")
  args = parser.parse_args(argv)
  chips = side_by_side.choose("--chip", args.chip, tuple(LINKS))
  crops, folder = side_by_side.positive("--crops", args.crops), pathlib.Path(args.output)
  folder.mkdir(parents=True, exist_ok=True)
  cases = []
  for recipe in args.recipe.split(","):
    for chip in chips:
      for count in crops:
        file = folder / f"{recipe.replace(':', '_')}_{chip}_{count}.json"
        if not file.exists():
          side_by_side.write_json(str(file), compile_case(recipe, chip, count))
        cases.append(json.loads(file.read_text()))
  print("ESTIMATES by TPU's compiler, and arithmetic; nothing was measured\n")
  print(to_markdown(cases))


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
