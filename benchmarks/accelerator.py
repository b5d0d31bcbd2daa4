"""All that there is to measure on an accelerator, in one run of a few minutes that can go on later.

  python -m benchmarks.accelerator --minutes 10 --output DIR

The parts come in order of value. Each is a process of its own, has its file in DIR as soon as it
ends, and is left out where that file is there already: what was stopped goes on with the same
command. A part that fails or takes too long is said and does not end the others. At the end
DIR/report.md has the rows of the table of goals in benchmarks/README.md.

It needs jax, flax, optax, absl-py, tqdm and Pillow, and PyTorch to compare with; neither
TensorFlow, clu nor ml_collections. Its images are in benchmarks/crops.npz. `--quick` is a rehearsal
with tiny networks, whose numbers mean nothing.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import side_by_side
from sr_jax import UserError
from sr_jax import cli
from sr_jax.machine import signals

CROPS = pathlib.Path(__file__).parent / "crops.npz"
# Photographs of scikit-image whose authors gave them to the public, and how many crops of each.
PHOTOGRAPHS = {"chelsea": 6, "coffee": 12, "rocket": 15, "hubble_deep_field": 12}
CROP = 128
# jax's names of TPUs, and those of `estimate.py`.
TPUS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
        "TPU v6 lite": "v6e", "TPU v6e": "v6e"}  # fmt: skip


class Part(NamedTuple):
  """A part of the run.

  Attributes:
    name: of its file.
    seconds: that it may take at most; a part that ends sooner leaves the rest to the others.
    command: (results of the parts before, output, quick) -> arguments of Python, or why not.
  """

  name: str
  seconds: float
  command: Callable[[Mapping[str, Any], str, bool], list[str] | str]


def _train(batch_size: int) -> Callable[..., list[str]]:
  def command(results, output, quick):
    full = ["--dtype", "bfloat16", "--batch_size", str(batch_size), "--rounds", "3"]
    given = ["--quick"] if quick else [*full, "--seconds", "1"]
    return ["-m", "benchmarks.train", "--what", "gan", *given, "--output", output]

  return command


def _infer(sizes: str, *more: str) -> Callable[..., list[str]]:
  def command(results, output, quick):
    full = ["--dtype", "bfloat16", "--size", sizes, "--rounds", "3"]
    given = ["--quick", "--engines", "none"] if quick else full
    return ["-m", "benchmarks.infer", *given, *more, "--output", output]

  return command


def _own(name: str) -> Callable[..., list[str]]:
  def command(results, output, quick):
    arguments = ["-m", "benchmarks.accelerator", "--part", name, "--output", output]
    return arguments + ["--quick"] * quick

  return command


def _estimate(results: Mapping[str, Any], output: str, quick: bool) -> list[str] | str:
  kind = results.get("rates", {}).get("device", "?")
  if kind not in TPUS:
    return f"TPU's compiler has no estimate of {kind}"
  # In a process of its own the compiler needs no chip, and takes none.
  given = ["--quick", "--batch_size", "2", "--size", "8"] if quick else ["--batch_size", "16"]
  return ["-m", "benchmarks.estimate", "--chip", TPUS[kind], *given, "--output", output]


PARTS = (
  Part("rates", 60, _own("rates")),
  Part("gan_16", 240, _train(16)),
  Part("gan_64", 240, _train(64)),
  Part("infer", 150, _infer("128,512")),
  Part("estimate", 300, _estimate),
  Part("training", 150, _own("training")),
  Part("degradations", 90, _own("degradations")),
  Part("infer_sizes", 120, _infer("256,1024", "--torch", "none")),
)


def run(parts: Sequence[Part], folder: pathlib.Path, seconds: float, quick: bool) -> dict[str, Any]:
  """Runs the parts that have no file in the folder yet, as far as the time allows.

  Args:
    parts: in order of value.
    folder: for NAME.json of each part, and NAME.log of what it printed.
    seconds: for all of them.
    quick: whether this is a rehearsal.

  Returns:
    {part: what its file holds, or {'reason': why it has none}}.
  """
  end, results = time.monotonic() + seconds, {}
  for part in parts:
    file, written = folder / f"{part.name}.json", folder / f"{part.name}.part.json"
    if not file.exists():
      results[part.name] = {"reason": _run(part, results, written, end, quick)}
      if written.exists() and not results[part.name]["reason"]:
        written.replace(file)
    if file.exists():
      results[part.name] = json.loads(file.read_text())
    reason = results[part.name].get("reason")
    print(f"{part.name}: {reason or 'done'}", flush=True)
  return results


def _run(
  part: Part, results: Mapping[str, Any], written: pathlib.Path, end: float, quick: bool
) -> str:
  """Runs a part, with all processes that it starts; returns why it has no result, or ''."""
  command = part.command(results, str(written), quick)
  if isinstance(command, str):
    return command
  left = end - time.monotonic()
  if left < 5:
    return "no time was left; run the same command again"
  limit = min(part.seconds, left)
  log = written.with_name(f"{part.name}.log")
  with open(log, "w") as file:
    process = subprocess.Popen(
      [sys.executable, *command], cwd=side_by_side.ROOT, stdout=file, stderr=subprocess.STDOUT,
      start_new_session=True,
    )  # fmt: skip
    try:
      status = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
      return f"stopped after {limit:.0f} s; {log} has what it said"
    finally:  # its workers too, also where this process is told to stop
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  if status:
    last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
    return f"failed with status {status}: {last[:200]}"
  return ""


# The parts that are measured here, each in a process of its own.


def measure_rates(quick: bool) -> dict[str, Any]:
  """Measures matrix products, in operations a second, and a copy, in bytes read and written."""
  import jax
  import jax.numpy as jnp

  from benchmarks import jax_esrgan

  numbers, count = (2**18 if quick or jax.default_backend() == "cpu" else 2**28), 10
  x = jnp.ones(numbers, jnp.float32)
  copy = jax.jit(lambda x: x + 1)  # one pass of reading and writing
  jax.block_until_ready(copy(x))
  begin = time.perf_counter()
  for _ in range(count):
    y = copy(x)
  jax.block_until_ready(y)
  device = jax.devices()[0]
  return {
    "device": device.device_kind,
    "platform": device.platform,
    "jax": jax.__version__,
    "matmul_flops": {name: jax_esrgan.matmul_rate(name) for name in ("bfloat16", "float32")},
    "copy_bytes": 8 * numbers * count / (time.perf_counter() - begin),
  }


def measure_training(quick: bool) -> dict[str, Any]:
  """Trains the PSNR stage from the same start on the same crops in bfloat16 and in float32.

  Returns:
    {dtype: {'loss_g': mean L1 loss of each tenth of the steps, 'seconds', 'compile_s'}}, and
    'steps', 'batch_size' and the largest relative difference of these means.
  """
  import jax
  import jax.numpy as jnp

  from benchmarks import jax_esrgan
  from benchmarks import train
  from sr_jax.machine import sharding

  steps, batch_size = (10, 2) if quick else (300, 16)
  generator = train.QUICK_GENERATOR if quick else train.GENERATOR
  networks = {"generator": generator, "discriminator": 8, "vgg": 1.0}
  crops, rng = np.load(CROPS), np.random.default_rng(0)
  rows = [rng.choice(len(crops["hr"]), batch_size, replace=False) for _ in range(steps)]
  mesh = sharding.create_mesh([jax.devices()[0]])
  found: dict[str, Any] = {"steps": steps, "batch_size": batch_size}
  for dtype in ("bfloat16", "float32"):
    create_state, step = jax_esrgan.make_train(
      "psnr", networks, how={}, dtype=dtype, hr_patch=CROP, mesh=mesh
    )
    state = jax.jit(create_state, out_shardings=sharding.replicated(mesh))()
    batches = (
      jax.device_put({key: crops[key][row] for key in ("lr", "hr")}, sharding.batch_sharded(mesh))
      for row in rows
    )
    first = next(batches)
    begin = time.perf_counter()
    program = step.lower(state, first, None).compile()
    compiled, losses = time.perf_counter(), []
    for batch in (first, *batches):
      state, metrics = program(state, batch, None)
      losses.append(metrics["loss_g"])
    losses = np.asarray(jnp.stack(losses))
    means = losses.reshape(10, -1).mean(1)
    found[dtype] = {
      "loss_g": means.tolist(),
      "seconds": time.perf_counter() - compiled,
      "compile_s": compiled - begin,
    }
  ours, exact = (np.array(found[dtype]["loss_g"]) for dtype in ("bfloat16", "float32"))
  found["largest_difference"] = float(np.abs(ours / exact - 1).max())
  return found


def measure_degradations(quick: bool) -> dict[str, Any]:
  """Times Real-ESRGAN's degradations of 16 crops of 400, one after the other, as a step does."""
  import jax

  from sr_jax.data.degrade import chain, draws

  n, side = (2, 64) if quick else (16, 400)
  settings = draws.Settings(4, draws.FIRST, draws.SECOND, draws.End(), sharpen=True)
  hr = np.tile(np.load(CROPS)["hr"][:n], (1, 4, 4, 1))[:, :side, :side]
  keys = jax.random.split(jax.random.key(0), n)
  degrade = jax.jit(
    lambda keys, hr: jax.lax.map(lambda each: chain.degrade(*each, settings), (keys, hr))
  )
  begin = time.perf_counter()
  jax.block_until_ready(degrade(keys, hr))
  compiled, rounds = time.perf_counter() - begin, 1 if quick else 10
  keys, hr = jax.device_put((keys, hr))
  begin = time.perf_counter()
  for _ in range(rounds):
    lr = degrade(keys, hr)
  jax.block_until_ready(lr)
  return {
    "examples": n,
    "side": side,
    "seconds_an_example": (time.perf_counter() - begin) / rounds / n,
    "compile_s": compiled,
  }


MEASURED_HERE = {
  "rates": measure_rates,
  "training": measure_training,
  "degradations": measure_degradations,
}


def make_crops() -> None:
  """Writes CROPS: HR crops of PHOTOGRAPHS, and their LR images by `imresize`."""
  import skimage.data

  from sr_jax.images.resize import imresize

  hr = []
  for name, count in PHOTOGRAPHS.items():
    image = getattr(skimage.data, name)()
    rows, columns = (side // CROP for side in image.shape[:2])
    corners = [(CROP * i, CROP * j) for i in range(rows) for j in range(columns)]
    hr += [image[y : y + CROP, x : x + CROP] for y, x in corners[:count]]
  lr = [imresize(crop, 0.25) for crop in hr]
  np.savez_compressed(CROPS, hr=np.stack(hr), lr=np.stack(lr))


# The report.


def goals(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
  """Returns the rows of the table of goals: what, the goal, what was measured."""
  missing = "not measured"

  def cases(part: str) -> list[dict[str, Any]]:
    return results.get(part, {}).get("cases", [])

  def ours(case: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((r for r in case["rows"] if r["framework"] == "jax" and "ratios" in r), None)

  def ratio(case: Mapping[str, Any], mode: str = "") -> str:
    row = ours(case)
    others = {k: v for k, v in row["ratios"].items() if mode in ("", k)} if row else {}
    if not others:
      return missing
    best = min(others, key=others.get)
    return f"{others[best]:.2f} x {best}"

  def cell(part: str, text: Callable[[Mapping[str, Any]], str]) -> str:
    return ", ".join(text(case) for case in cases(part)) or missing

  def share(case: Mapping[str, Any]) -> str:
    row = ours(case)
    return f"{row['matmul_share']:.0%}" if row and row["matmul_share"] else missing

  def memory(case: Mapping[str, Any]) -> str:
    rows = [r for r in case["rows"] if r["framework"] == "torch" and "seconds" in r]
    row = ours(case)
    if not rows or not row:
      return missing
    other = min(rows, key=lambda row: row["seconds"])
    return f"{row['peak_bytes'] / other['peak_bytes']:.2f} of {other['name']}'s"

  def compiling(case: Mapping[str, Any]) -> str:
    row = ours(case)
    cached = row and row.get("cached_compile_s")
    if not row:
      return missing
    return f"{row['compile_s']:.1f} s, {f'{cached:.1f} s' if cached else 'not kept'}"

  def pixel(case: Mapping[str, Any]) -> str:
    row = ours(case)
    return f"LR {case['size']}: {row['ns_per_pixel']:.3g} ns" if row else missing

  pixels = [
    text
    for case in sorted(cases("infer") + cases("infer_sizes"), key=lambda case: case["size"])
    if (text := pixel(case)) != missing
  ]
  both = [text for part in ("gan_16", "gan_64") if (text := cell(part, ratio)) != missing]
  return [
    ("GAN step, batch 16 and 64, against PyTorch's best mode", "2 x", ", ".join(both) or missing),
    ("GAN step, batch 16, against `basicsr`", "10 x",
     cell("gan_16", lambda case: ratio(case, "basicsr"))),
    ("GAN step, batch 64, against `basicsr`", "6 x",
     cell("gan_64", lambda case: ratio(case, "basicsr"))),
    ("upscaling, LR 128 and 512, against PyTorch's best mode", "2 x", cell("infer", ratio)),
    ("share of matmul, GAN step, batch 64", "40 %", cell("gan_64", share)),
    ("share of matmul, upscaling", "55 %", cell("infer", share)),
    ("peak memory, GAN step, batch 64", "half of PyTorch's", cell("gan_64", memory)),
    ("compiling the GAN step, cold and cached", "30 s, 3 s", cell("gan_16", compiling)),
    ("cost of an SR pixel from LR 256 on", "flat", ", ".join(pixels) or missing),
  ]  # fmt: skip


def report(results: Mapping[str, Any], quick: bool) -> str:
  """Writes what was measured as Markdown."""
  rates = results.get("rates", {})
  lines = [
    "# A rehearsal: its numbers mean nothing" if quick else "# What was measured",
    "",
    f"{datetime.date.today()}, {rates.get('device', 'a device that is not known')}, jax "
    f"{rates.get('jax', '?')}; `python -m benchmarks.accelerator`",
    "",
    "| what, bfloat16 | goal | measured |",
    "| --- | --- | --- |",
    *(f"| {' | '.join(row)} |" for row in goals(results)),
    "",
  ]
  if "matmul_flops" in rates:
    products = ", ".join(f"{k} {v / 1e12:.4g} TFLOP/s" for k, v in rates["matmul_flops"].items())
    copied = rates["copy_bytes"] / 1e9
    lines.append(f"* Matrix products: {products}; a copy: {copied:.4g} GB/s read and written.")
  steps = [
    row["seconds"]
    for case in results.get("gan_16", {}).get("cases", [])
    for row in case["rows"]
    if row["framework"] == "jax" and "seconds" in row
  ]
  estimated = results.get("estimate", {}).get("estimated_ms")
  if estimated and steps:
    lines.append(
      f"* GAN step, batch 16: {steps[0] * 1e3:.4g} ms measured; TPU's compiler estimated "
      f"{estimated['convolutions']:.4g} (convolutions) to {estimated['sum']:.4g} ms (sum)."
    )
  training = results.get("training", {})
  if "largest_difference" in training:
    first, last = (training["float32"]["loss_g"][i] for i in (0, -1))
    lines.append(
      f"* {training['steps']} steps of the PSNR stage, batch {training['batch_size']}: L1 from "
      f"{first:.4f} to {last:.4f} in float32; in bfloat16 a tenth's mean is at most "
      f"{training['largest_difference']:.2%} from it. "
      + ", ".join(f"{k} {training[k]['seconds']:.1f} s" for k in ("bfloat16", "float32"))
      + "."
    )
  degraded = results.get("degradations", {})
  if "seconds_an_example" in degraded:
    text = f"* Degradations: {degraded['seconds_an_example'] * 1e3:.4g} ms an example"
    if steps:
      part = degraded["seconds_an_example"] * 16 / steps[0]
      text += f", for 16 of them {part:.0%} of a GAN step of batch 16 at HR {CROP}"
    lines.append(f"{text}.")
  for name, result in results.items():
    if result.get("reason"):
      lines.append(f"* Not measured: {name}: {result['reason']}.")
  return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.accelerator",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--minutes", type=float, default=10, help="after which it ends by itself")
  parser.add_argument("--output", default="results/accelerator", help="folder for what it measures")
  parser.add_argument("--quick", action="store_true", help="a rehearsal with tiny networks")
  parser.add_argument("--make_crops", action="store_true", help="write crops.npz anew, and end")
  parser.add_argument("--part", choices=MEASURED_HERE, help=argparse.SUPPRESS)
  args = parser.parse_args(argv)
  if args.make_crops:
    make_crops()
    return
  if args.part:
    side_by_side.write_json(args.output, MEASURED_HERE[args.part](args.quick))
    return
  if not args.minutes > 0:
    raise UserError(f"--minutes={args.minutes:g} must be more than 0; try --minutes=10")
  folder = pathlib.Path(args.output).absolute()
  folder.mkdir(parents=True, exist_ok=True)
  results = run(PARTS, folder, 60 * args.minutes, args.quick)
  text = report(results, args.quick)
  (folder / "report.md").write_text(text)
  print(f"\n{text}")


if __name__ == "__main__":
  signals.end_at_signals()  # then it is told of them, and takes its parts along
  cli.guarded(main)(sys.argv[1:])
