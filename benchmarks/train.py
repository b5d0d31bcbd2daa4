"""A training step of ESRGAN, ours beside PyTorch's, on one accelerator or on the CPU.

  python -m benchmarks.train [--what gan,psnr] [--batch_size 16,64] [--quick]

What is timed is the step that training runs (`sr_jax.training.step`, by benchmarks/jax_esrgan.py)
and BasicSR's in the modes of benchmarks/torch_esrgan.py, on synthetic batches that lie on the
device. Each row is a
process of its own; their rounds are taken in turns. benchmarks/README.md explains the columns.
Without torch, only ours is measured.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import flops
from benchmarks import side_by_side
from sr_jax import cli

GENERATOR = {"features": 64, "blocks": 23, "growth": 32}
# A run of seconds, to see that it works: its times mean nothing.
QUICK_GENERATOR = {"features": 8, "blocks": 1, "growth": 4}
QUICK = {"dtype": "float32", "batch_size": "2", "hr_patch": 32, "rounds": 2, "seconds": 0.1}


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.train",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--quick", action="store_true", help="tiny networks, to see that it works")
  parser.add_argument("--what", default="gan,psnr", help="steps: gan, psnr")
  parser.add_argument("--batch_size", default="16", help="one or more")
  parser.add_argument("--hr_patch", type=int, default=128, help="side of the HR crops")
  parser.add_argument(
    "--unguarded", action="store_true", help="sr_jax's rows once more, of steps without their guard"
  )
  side_by_side.add_arguments(parser, seconds=2)
  parser.add_argument("--output", default="results/benchmark_train.json")
  if "--quick" in argv:
    parser.set_defaults(**QUICK)
  args = parser.parse_args(argv)
  default = QUICK_GENERATOR if args.quick else GENERATOR
  generators = side_by_side.parse_generators(args.generator, default)
  networks = {
    "generator": {key: generators[0][key] for key in default},
    "discriminator": 8 if args.quick else 64,
    "vgg": 1 / 16 if args.quick else 1.0,
  }
  steps = side_by_side.choose("--what", args.what, ("gan", "psnr"))
  dtypes = side_by_side.choose("--dtype", args.dtype, ("float32", "bfloat16"))
  rows = side_by_side.jax_rows(dtypes, generators, default, args.environment)
  if args.unguarded:
    rows += [{**row, "name": f"{row['name']} unguarded", "guarded": False} for row in rows]
  rows += side_by_side.torch_rows(args.torch, args.quick)
  machine = side_by_side.machine()
  print(
    f"RRDBNet {networks['generator']}, HR crops of {args.hr_patch}; {args.rounds} rounds in turns; "
    f"{machine['cpu']}, {machine['cores']} cores, load {machine['load']:.1f}"
  )

  cases = []
  for what in steps:
    for batch_size in side_by_side.positive("--batch_size", args.batch_size):
      case = {"what": what, "batch_size": batch_size, "hr_patch": args.hr_patch}
      parts = flops.train_flops(what, args.hr_patch, **networks)
      results = side_by_side.measure(
        rows, {**case, "networks": networks}, rounds=args.rounds, seconds=args.seconds,
        cold_start=True,
      )  # fmt: skip
      side_by_side.add_summary(results, batch_size, batch_size * sum(parts.values()))
      cases.append({**case, "flops_per_image": parts, "rows": results})
      print_case(cases[-1])
  side_by_side.write_json(
    args.output, {"machine": machine, "networks": networks, "arguments": vars(args), "cases": cases}
  )
  side_by_side.check_measured(cases)


def print_case(case: dict[str, Any]) -> None:
  """Prints one step's table."""
  device = next((row["device"] for row in case["rows"] if "device" in row), "?")
  total = sum(case["flops_per_image"].values()) * case["batch_size"] / 1e12
  print(
    f"\n{case['what']} step, batch {case['batch_size']}, HR {case['hr_patch']}, on {device}: "
    f"{total:.3g} TFLOP"
  )
  side_by_side.print_table(
    case["rows"],
    {
      **side_by_side.columns(case["rows"]),
      "cached s": lambda row: side_by_side.number(row.get("cached_compile_s")),
    },
  )


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
