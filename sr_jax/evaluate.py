"""Scores models on test images by the protocol of the papers.

  python -m sr_jax.evaluate --model RUN --data DIR,DIR --output OUT
  python -m sr_jax.evaluate --model bicubic,RUN/psnr,RUN --data skimage:test --output OUT

The protocol: HR is cropped to a multiple of the scale; LR is MATLAB's bicubic of it, rounded to
uint8; the SR image is clipped, rounded to uint8 and saved, and what is saved is scored; `scale`
pixels are cut from each side. The scores are PSNR and SSIM of RGB and of Y (BT.601, studio range),
LPIPS and NIQE, each the mean over the images of a set. The Y of a grey file is its values, and it
has no RGB scores.

OUT gets the SR images, results.json of each model, the table (.md, .csv, .json), report.html, which
opens offline, and comparison.png.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import tqdm

from sr_jax import UserError
from sr_jax import cli
from sr_jax.evaluation.output import Compared, Output
from sr_jax.evaluation import scoring
from sr_jax.evaluation.test_sets import open_test_set
from sr_jax.images.files import safe_output_path
from sr_jax.metrics.table import METRICS
from sr_jax.models.model import parameter_count
from sr_jax.models.read import read_model
from sr_jax.networks.build import build_generator
from sr_jax.runs import storage
from sr_jax.upscaling import engines
from sr_jax.upscaling import upscaler


def _load_upscaler(
  spec: str, scale: int, choice: str
) -> tuple[upscaler.Upscaler, int, dict[str, str]]:
  """Returns the upscaler, its scale, and what the report says about the model."""
  if spec == upscaler.BASELINE:
    return upscaler.bicubic_upscaler(scale), scale, {"model": "MATLAB's bicubic"}
  model = read_model(spec)
  module = build_generator(model.name, model.kwargs)
  facts = {
    "model": spec,
    "network": model.name,
    "parameters": f"{parameter_count(model):,}",
    "weights": model.info["digest"],
    "trained from": ", ".join(model.info["ancestry"]),
    "step": str(model.info.get("step", "")),
  }
  facts = {key: value for key, value in facts.items() if value}
  engine = engines.open_engine(model, choice)
  if choice != "jax":
    print(f"upscaling {spec} with {engine.name}{engine.note}", file=sys.stderr)
    facts["engine"] = engine.name
  return upscaler.make_upscaler(module, model.variables, engine.run), module.scale, facts


def split_label(spec: str) -> tuple[str, str]:
  """Splits 'LABEL=MODEL'; the default label is the file's stem or the run's last two folders."""
  path = pathlib.Path(spec)
  if "=" in spec and not path.exists():
    label, _, model = spec.partition("=")
    return label, model
  if path.is_file():
    return path.stem, spec
  parts = [part for part in path.parts if part not in (path.anchor, "..")]
  return "_".join(parts[-2:]) or path.resolve().name, spec


def _check_distinct(flag: str, names: list[Any], remedy: str) -> None:
  for name in names:
    if names.count(name) > 1:
      raise UserError(f"{flag}: two entries would both write to {name}; {remedy}")


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m sr_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--model",
    required=True,
    help="bicubic, a run, a model file or the name of a model that comes with sr_jax; or several: "
    "A,LABEL=B,...",
  )
  parser.add_argument(
    "--data",
    required=True,
    help="folder of HR images, skimage:test or tfds:NAME:SPLIT; or several: A,B,...",
  )
  parser.add_argument("--output", required=True, help="folder for results and SR images")
  parser.add_argument("--scale", type=int, default=4, help="of bicubic; a model has its own")
  parser.add_argument(
    "--metrics",
    default="",
    help=f"which of {', '.join(METRICS)}; PSNR, SSIM always; by default all that can be computed",
  )
  parser.add_argument("--niqe_params", default="", help="BasicSR's niqe_pris_params.npz")
  parser.add_argument(
    "--ma", default="", help="JSON of Ma scores, {model: {set: {image: score}}}, for PI"
  )
  parser.add_argument(
    "--engine",
    choices=engines.CHOICES,
    default="jax",
    help="what upscales on a CPU: jax, which made the published scores, or auto for the fastest",
  )
  return parser


def main(argv: Sequence[str]) -> None:
  args = _parser().parse_args(argv)
  if args.scale < 1:
    raise UserError(f"--scale={args.scale} must be 1 or more")
  output = storage.local_path("--output", args.output)
  models = [split_label(spec) for spec in args.model.split(",")]
  folders = [output]
  if len(models) > 1:
    folders = [safe_output_path(output, label) for label, _ in models]
    _check_distinct("--model", folders, "give each a name of its own: LABEL=MODEL")
  upscalers, scales, facts = {}, {}, {}
  for label, spec in models:
    upscalers[label], scales[label], facts[label] = _load_upscaler(spec, args.scale, args.engine)
  scale = scales[models[0][0]]
  if any(other != scale for other in scales.values()):
    raise UserError(
      f"--model={args.model} has scales {list(scales.values())}; compare models of one "
      "scale, and give --scale for bicubic's"
    )
  data = args.data.split(",")
  test_sets = [open_test_set(spec, scale) for spec in data]
  set_names = [set_name for set_name, _, _ in test_sets]
  _check_distinct("--data", set_names, "results have the name of the folder, so rename one")
  for spec, set_name in zip(data, set_names, strict=True):
    for folder in folders:
      _check_apart(folder / set_name, spec)
  extra = scoring.load_extra([name for name in args.metrics.split(",") if name], args.niqe_params)
  ma = _read_ma(args.ma, upscalers, set_names) if args.ma else {}
  if ma and extra.niqe is None:
    raise UserError("--ma is for PI, which needs NIQE; give --niqe_params")

  compared = [
    Compared(label, spec, folder, facts[label])
    for (label, spec), folder in zip(models, folders, strict=True)
  ]
  written = Output(output, compared, scale)
  results: dict[str, dict[str, Any]] = {label: {} for label in upscalers}
  for set_name, count, test_images in test_sets:
    progress = tqdm.tqdm(test_images, total=count, desc=set_name, leave=False)
    keep = functools.partial(written.add, set_name)
    scored = scoring.evaluate_set(upscalers, progress, scale, extra=extra, keep=keep)
    for label in upscalers:
      results[label][set_name] = scored[label]
  for label, given in ma.items():
    scoring.perceptual_indices(results[label], given)
  written.write(results)
  print(
    f"\n{output}/report.html has the images side by side; comparison.png, the table (.md, .csv and "
    ".json), results.json and the SR images of each model are there too."
  )


def _check_apart(target: pathlib.Path, data: str) -> None:
  """Refuses to write SR images to where the HR images are, since they have the same names."""
  source, target = pathlib.Path(data).expanduser(), target.resolve()
  if source.is_dir():
    source = source.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
      raise UserError(
        f"--output would write SR images into {target}, which overlaps --data={data}; choose a "
        "folder outside it"
      )


def _read_ma(
  path: str, labels: Iterable[str], set_names: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
  try:
    given = json.loads(pathlib.Path(path).read_text())
  except ValueError:  # no JSON, or no text
    given = None
  shape = isinstance(given, dict) and all(
    isinstance(sets, dict)
    and all(
      isinstance(scores, dict) and all(type(x) in (int, float) for x in scores.values())
      for scores in sets.values()
    )
    for sets in given.values()
  )
  if not shape:
    raise UserError(f"--ma={path} must be JSON of the form {{model: {{set: {{image: score}}}}}}")
  labels = list(labels)
  for label in given:
    if label not in labels:
      raise UserError(f"--ma={path} names the model {label!r}; there are {', '.join(labels)}")
    for set_name in given[label]:
      if set_name not in set_names:
        raise UserError(f"--ma={path} names the set {set_name!r}; there are {', '.join(set_names)}")
  return given


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
