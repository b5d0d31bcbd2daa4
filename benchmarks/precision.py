"""Trains a recipe in float32 and in bfloat16, from the same seed, and compares curves and scores.

  python -m benchmarks.precision --config configs/esrgan_psnr.py:basicsr --source DIR --held_out DIR
      [--steps 500] [--config.FIELD=VALUE ...]

Both runs see the same crops in the same order. Arguments that are not listed here go to
`sr_jax.main` unchanged. A second call goes on where the first one was stopped.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import side_by_side
from sr_jax import UserError
from sr_jax import cli

DTYPES = ("float32", "bfloat16")
LOSSES = ("loss_g", "loss_d")


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.precision",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config", required=True, help="a recipe; of two stages the last is compared"
  )
  parser.add_argument("--source", required=True, help="photographs to train on")
  parser.add_argument("--held_out", required=True, help="photographs to score")
  parser.add_argument("--steps", type=int, default=500)
  parser.add_argument("--every", type=int, default=10, help="steps between points of the curves")
  parser.add_argument("--output", default="results/precision", help="folder: runs, JSON, curves")
  args, overrides = parser.parse_known_args(argv)
  folder = pathlib.Path(args.output)
  runs = {}
  for dtype in DTYPES:
    command = [
      sys.executable, "-m", "sr_jax.main", "--config", args.config, "--workdir", folder / dtype,
      f"--config.dtype={dtype}", f"--config.data.source={args.source}",
      f"--config.eval.source={args.held_out}", f"--config.total_steps={args.steps}",
      "--config.eval.every_steps=0", f"--config.log.every_steps={args.every}", *overrides,
    ]  # fmt: skip
    ended = subprocess.run([str(part) for part in command], cwd=side_by_side.ROOT)
    if ended.returncode:
      raise UserError(f"the run in {dtype} ended with status {ended.returncode}; see above")
    lines = (folder / dtype / "metrics.jsonl").read_text().splitlines()
    runs[dtype] = [json.loads(line) for line in lines]
  result = {
    "config": args.config, "steps": args.steps, "arguments": list(argv), **compare(runs),
    "machine": side_by_side.machine(),
  }  # fmt: skip
  print_result(result)
  side_by_side.write_json(str(folder / "precision.json"), {**result, "runs": runs})
  if side_by_side.has("matplotlib"):
    draw(runs, folder / "precision.png")
    print(f"written: {folder / 'precision.png'}")


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """Returns the last scores and the mean losses of the last fifth of the steps.

  Args:
    runs: {dtype: the lines of the run's metrics.jsonl}.

  Returns:
    {'psnr_y': {dtype: dB}, 'loss_g': {dtype: mean}, ...}, and 'psnr_y_difference', bfloat16's score
    minus float32's.
  """
  result: dict[str, Any] = {}
  for dtype, lines in runs.items():
    begin = 0.8 * max(line["step"] for line in lines)
    for name in ("eval/psnr_y", *LOSSES):
      values = [line[name] for line in lines if name in line and line["step"] > begin]
      if values:
        value = values[-1] if name == "eval/psnr_y" else statistics.fmean(values)
        result.setdefault(name.removeprefix("eval/"), {})[dtype] = value
  if len(result.get("psnr_y", {})) < len(runs):
    raise UserError("a run has no PSNR; does --held_out name photographs?")
  result["psnr_y_difference"] = result["psnr_y"]["bfloat16"] - result["psnr_y"]["float32"]
  return result


def print_result(result: dict[str, Any]) -> None:
  print(f"\n{result['config']}, {result['steps']} steps")
  for name in ("psnr_y", *LOSSES):
    if name in result:
      values = ", ".join(f"{dtype} {value:.5g}" for dtype, value in result[name].items())
      print(f"  {name}: {values}")
  print(f"  bfloat16 less float32: {result['psnr_y_difference']:+.3f} dB")


def draw(runs: dict[str, list[dict[str, Any]]], path: pathlib.Path) -> None:
  """Draws the curves of the losses, one picture for each."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  names = [name for name in LOSSES if any(name in line for line in runs["float32"])]
  figure, axes = plt.subplots(
    1, len(names), figsize=(6 * len(names), 4), squeeze=False, layout="constrained"
  )
  for name, axis in zip(names, axes[0], strict=True):
    for dtype, lines in runs.items():
      points = [(line["step"], line[name]) for line in lines if name in line]
      axis.plot(*zip(*points, strict=True), label=dtype, linewidth=1)
    axis.set(xlabel="step", ylabel=name, yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
