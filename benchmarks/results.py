"""Makes docs/results.md out of the results.json files that `sr_jax.evaluate` wrote.

  python -m sr_jax.evaluate --model bicubic,srresnet,srgan --data SET5,SET14,BSD100 --output OUT
  python -m benchmarks.results OUT --output docs/results.md

Nothing that was not measured gets in, but for the papers' own rows, which are marked. A model is
called as its folder; a model that lies in several folders must have the same weights in all.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sr_jax import UserError
from sr_jax import cli
from sr_jax.metrics.table import SCORES

COLUMNS = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips_alex", "niqe")
# PSNR and SSIM of Y. SRGAN, table 2 (its SSIM is another program's); ESRGAN's repository and
# supplement; ESRGAN's own Y scores were measured from its weights by Lornatang/ESRGAN-PyTorch.
PUBLISHED = {
  "SRResNet, SRGAN's paper": {
    "Set5": (32.05, 0.9019), "Set14": (28.49, 0.8184), "BSD100": (27.58, 0.7620),
  },
  "SRGAN, its paper": {
    "Set5": (29.40, 0.8472), "Set14": (26.02, 0.7397), "BSD100": (25.16, 0.6688),
  },
  "RRDB-PSNR, 23 blocks, ESRGAN's authors": {
    "Set5": (32.73, 0.9011), "Set14": (28.99, 0.7917), "BSD100": (27.85, 0.7455),
  },
  "ESRGAN, 23 blocks, from its published weights": {
    "Set5": (30.44, 0.8525), "Set14": (26.28, 0.6994), "BSD100": (25.33, 0.6534),
  },
}  # fmt: skip


def read(folders: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Reads every results.json below the folders: {model's folder: its contents, sets joined}."""
  models: dict[str, dict[str, Any]] = {}
  for folder in folders:
    for path in sorted(pathlib.Path(folder).rglob("results.json")):
      results = json.loads(path.read_text())
      name = path.parent.name
      known = models.setdefault(name, {**results, "sets": {}})
      if known["facts"].get("weights") != results["facts"].get("weights"):
        raise UserError(f"{path}: another model was called {name} too; give one another name")
      if twice := set(known["sets"]) & set(results["sets"]):
        raise UserError(f"{path}: {name} was scored on {', '.join(twice)} twice; remove one")
      known["sets"] |= results["sets"]
  if not models:
    raise UserError(f"there is no results.json below {', '.join(folders)}")
  return models


def to_markdown(models: Mapping[str, Mapping[str, Any]]) -> str:
  """Writes the page: a table for each set, and how each row was made."""
  sets = list(dict.fromkeys(name for model in models.values() for name in model["sets"]))
  scale = {model["scale"] for model in models.values()}
  lines = [
    "# Results",
    "",
    "Every row but those in italics was measured with `python -m sr_jax.evaluate`, and this page",
    "was made out of its files by `python -m benchmarks.results`. Rows in italics are the papers'",
    "or were measured elsewhere from their weights. [protocol.md](protocol.md) says how scores are",
    "computed; the cards in [models/](../models/README.md) and [training-log.md](training-log.md)",
    "say how the models were trained, and on what.",
    "",
    f"Scale: {', '.join(f'x{s}' for s in sorted(scale))}.",
  ]
  for name in sets:
    count = max(len(m["sets"][name]["images"]) for m in models.values() if name in m["sets"])
    lines += ["", f"## {name}", "", f"{count} images.", ""]
    lines += ["| model | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS)]
    for label, model in models.items():
      if name in model["sets"]:
        scores = model["sets"][name]
        cells = [f"{scores[k]:.{SCORES[k].digits}f}" if k in scores else "-" for k in COLUMNS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for label, published in PUBLISHED.items():
      if name in published:
        psnr, ssim = published[name]
        rest = " | -" * (len(COLUMNS) - 2)
        lines.append(f"| *{label}* | *{psnr:.2f}* | *{ssim:.4f}*{rest} |")
  lines += ["", "## How the rows were made", ""]
  head = ("model", "weights", "steps", "date", "sr_jax", "jax", "device")
  lines += ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
  for label, model in models.items():
    facts, made = model["facts"], model["made"]
    cells = [facts.get("weights", "-"), facts.get("step", "-")]
    cells += [made[key] for key in ("date", "sr_jax", "jax", "device")]
    lines.append(f"| {label} | " + " | ".join(cells) + " |")
  return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.results",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("folders", nargs="+", metavar="FOLDER", help="outputs of sr_jax.evaluate")
  parser.add_argument("--output", required=True, help="the page to write")
  args = parser.parse_args(argv)
  pathlib.Path(args.output).write_text(to_markdown(read(args.folders)))


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
