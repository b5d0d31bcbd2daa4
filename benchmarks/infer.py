"""Times RRDBNet x4, ours beside PyTorch and, on a CPU, ONNX Runtime and OpenVINO.

  python -m benchmarks.infer [--size 64,128,512] [--batch_size 1,16] [--scaling] [--quick]

Only the network is timed, on images that lie on the device. Each row is a process of its own; their
rounds are taken in turns. With --scaling it also measures time against batch size and image size,
writes it as JSON and, if matplotlib is installed, draws it. benchmarks/README.md explains the
columns.
"""

import argparse
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import flops
from benchmarks import side_by_side
from benchmarks import train
from sr_jax import cli

QUICK = {"dtype": "float32", "size": "16", "rounds": 2, "seconds": 0.1, "scaling": True}
# (axis, its values, what the other is)
SWEEPS = (
  ("batch_size", (1, 2, 4, 8, 16, 32, 64, 128, 256), 64),
  ("size", (64, 128, 256, 512, 1024, 2048), 1),
)
QUICK_SWEEPS = (("batch_size", (1, 2), 8), ("size", (8, 16), 1))


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.infer",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--quick", action="store_true", help="a tiny network, to see that it works")
  parser.add_argument("--size", default="64,128", help="sides of square LR images")
  parser.add_argument("--batch_size", default="1", help="one or more")
  side_by_side.add_arguments(parser, seconds=1)
  parser.add_argument(
    "--engines", default="onnxruntime,openvino", help="to time beside on a CPU, or none"
  )
  parser.add_argument("--scaling", action="store_true", help="batches 1..256, LR sizes 64..2048")
  parser.add_argument(
    "--limit", type=float, default=5, help="seconds an upscaling may take for --scaling to go on"
  )
  parser.add_argument("--output", default="results/benchmark_infer.json")
  if "--quick" in argv:
    parser.set_defaults(**QUICK)
  args = parser.parse_args(argv)
  default = train.QUICK_GENERATOR if args.quick else train.GENERATOR
  generators = side_by_side.parse_generators(args.generator, default)
  networks = {"generator": {key: generators[0][key] for key in default}}
  dtypes = side_by_side.choose("--dtype", args.dtype, ("float32", "bfloat16"))
  rows = side_by_side.jax_rows(dtypes, generators, default, args.environment)
  rows += side_by_side.torch_rows(args.torch, args.quick)
  known = {"onnxruntime": ["float32"], "openvino": ["float32", "bfloat16"]}
  engines = [] if args.engines == "none" else side_by_side.choose("--engines", args.engines, known)
  for engine in engines:
    for dtype in known[engine]:
      if dtype in dtypes:
        rows.append({"name": f"{engine} {dtype}", "framework": engine, "dtype": dtype})
  machine = side_by_side.machine()
  print(
    f"RRDBNet {networks['generator']}; {args.rounds} rounds in turns; {machine['cpu']}, "
    f"{machine['cores']} cores, load {machine['load']:.1f}"
  )

  cases = []
  for size in side_by_side.positive("--size", args.size):
    for batch_size in side_by_side.positive("--batch_size", args.batch_size):
      case = {"what": "infer", "batch_size": batch_size, "size": size}
      operations = batch_size * flops.infer_flops(size, size, networks["generator"])
      results = side_by_side.measure(
        rows, {**case, "networks": networks}, rounds=args.rounds, seconds=args.seconds
      )
      side_by_side.add_summary(results, batch_size, operations)
      for row in results:
        if "reason" not in row:
          row["ns_per_pixel"] = ns_per_pixel(row["seconds"], batch_size, size)
      cases.append({**case, "flops": operations, "rows": results})
      device = next((row["device"] for row in results if "device" in row), "?")
      print(f"\nbatch {batch_size}, LR {size} x {size}, on {device}: {operations / 1e12:.3g} TFLOP")
      side_by_side.print_table(
        results,
        {
          **side_by_side.columns(results),
          "ns/pixel": lambda row: side_by_side.number(row["ns_per_pixel"]),
        },
      )
  content = {"machine": machine, "networks": networks, "arguments": vars(args), "cases": cases}
  measured = [row for row in cases[0]["rows"] if "reason" not in row]
  if args.scaling and measured:
    content["scaling"] = scale(
      measured, networks, QUICK_SWEEPS if args.quick else SWEEPS,
      rounds=args.rounds, seconds=args.seconds, limit=args.limit,
    )  # fmt: skip
    if side_by_side.has("matplotlib"):
      picture = pathlib.Path(args.output).with_suffix(".png")
      picture.parent.mkdir(parents=True, exist_ok=True)
      draw(content["scaling"], cases[0], picture)
      print(f"written: {picture}")
    else:
      print("not drawn: no matplotlib is installed")
  side_by_side.write_json(args.output, content)
  side_by_side.check_measured(cases)


def ns_per_pixel(seconds: float, batch_size: int, size: int) -> float:
  """Returns the nanoseconds for each pixel of the SR images."""
  return 1e9 * seconds / (batch_size * (flops.SCALE * size) ** 2)


def scale(
  rows: Sequence[Mapping[str, Any]],
  networks: Mapping[str, Any],
  sweeps: Sequence[tuple[str, Sequence[int], int]],
  *,
  rounds: int,
  seconds: float,
  limit: float,
) -> list[dict[str, Any]]:
  """Times each row along each sweep, one row after the other, because two large images fill a card.

  A sweep ends at the first point that fails, or that would take longer than `limit` seconds if time
  grew with the pixels since the point before.

  Returns:
    Points {'row', 'axis', 'batch_size', 'size', 'seconds', 'ns_per_pixel'}, or with 'reason'
    instead of the last two.
  """
  points = []
  for row in rows:
    worker = side_by_side.Worker(row)
    try:
      for axis, values, other in sweeps:
        before = None
        for value in values:
          batch_size, size = (value, other) if axis == "batch_size" else (other, value)
          point = {"row": row["name"], "axis": axis, "batch_size": batch_size, "size": size}
          points.append(point)
          pixels = batch_size * size**2
          if before and before[0] / before[1] * pixels > limit:
            point["reason"] = f"would take more than --limit={limit:g} s"
            break
          case = {**point, "what": "infer", "networks": networks}
          answer = worker.ask(case=case, seconds=seconds)
          times = []
          while "error" not in answer and len(times) < rounds:
            answer = worker.ask(round=True, matmul=False)
            times.append(answer.get("seconds"))
          if "error" in answer:
            point["reason"] = answer["error"]
            break
          point["seconds"] = statistics.median(times)
          point["ns_per_pixel"] = ns_per_pixel(point["seconds"], batch_size, size)
          before = point["seconds"], pixels
          print(
            f"  {row['name']}, batch {batch_size}, LR {size}: {point['seconds'] * 1000:.4g} ms, "
            f"{point['ns_per_pixel']:.3g} ns a pixel",
            flush=True,
          )
        if "reason" in point:
          print(f"  {row['name']}, batch {batch_size}, LR {size}: {point['reason']}", flush=True)
    finally:
      worker.close()
  return points


def draw(points: Sequence[Mapping[str, Any]], case: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws time and cost per pixel against batch size and image size."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot as plt

  device = next(row["device"] for row in case["rows"] if "device" in row)
  figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex="col", layout="constrained")
  names = list(dict.fromkeys(point["row"] for point in points))
  for column, axis in enumerate(("batch_size", "size")):
    ours = [point for point in points if point["axis"] == axis and "seconds" in point]
    for i, name in enumerate(names):
      line = [point for point in ours if point["row"] == name]
      style = dict(marker="osD^vPX*<>"[i % 10], label=name, markersize=5)
      x = [point[axis] for point in line]
      axes[0, column].plot(x, [1000 * point["seconds"] for point in line], **style)
      axes[1, column].plot(x, [point["ns_per_pixel"] for point in line], **style)
    ticks = sorted({point[axis] for point in ours})
    fixed = {"batch_size": "size", "size": "batch_size"}[axis]
    other = next(point[fixed] for point in points if point["axis"] == axis)
    words = {"batch_size": "batch, LR {0} x {0}", "size": "side of the LR image, batch {0}"}
    axes[1, column].set_xlabel(words[axis].format(other))
    for row, unit in enumerate(("ms", "ns per SR pixel")):
      plot = axes[row, column]
      plot.set_xscale("log", base=2)
      plot.set_yscale("log")
      plot.set_xticks(ticks, [str(tick) for tick in ticks])
      plot.set_ylabel(unit)
      plot.grid(alpha=0.3)
  axes[0, 0].legend(fontsize=8)
  figure.suptitle(f"RRDBNet x4, upscaling on {device}")
  figure.savefig(path, dpi=120)
  plt.close(figure)


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
