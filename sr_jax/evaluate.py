"""Scores models on test images by the protocol of the papers.

  python -m sr_jax.evaluate --model RUN --data DIR,DIR --output OUT
  python -m sr_jax.evaluate --model bicubic,RUN/psnr,RUN --data skimage:test --output OUT
  python -m sr_jax.evaluate --model srgan,theirs=sr:DIR --data DIR --output OUT
  python -m sr_jax.evaluate --no-reference --data DIR --niqe_params FILE --output OUT

The protocol: HR is cropped to a multiple of the scale; LR is MATLAB's bicubic of it, rounded to
uint8; the SR image is clipped, rounded to uint8 and saved, and what is saved is scored; `scale`
pixels are cut from each side. The scores are PSNR and SSIM of RGB and of Y (BT.601, studio range),
LPIPS and NIQE, each the mean over the images of a set. The Y of a grey file is its values, and it
has no RGB scores.

LABEL=sr:DIR scores SR images that another program made. They are paired with the HR images by their
names, with or without `_x4`, `x4`, `_SR`, `_sr` or `_out` at the end, or by --pairs. An image that
cannot be scored is left out for all models and named at the end, and the status is then 1.

OUT gets the SR images, results.json of each model, the table (.md, .csv, .json), report.html, which
opens offline, and comparison.png.
"""

from sr_jax.machine.signals import end_at_signals

if __name__ == "__main__":
  end_at_signals()  # the imports below take seconds

import argparse
import functools
import json
import math
import pathlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tqdm

from sr_jax import UserError
from sr_jax import cli
from sr_jax import command
from sr_jax import metrics
from sr_jax.data import sources
from sr_jax.data.source import name_list
from sr_jax.evaluation.output import Compared, Output, write_scores
from sr_jax.evaluation import scoring
from sr_jax.evaluation import statistics
from sr_jax.evaluation.given import GivenImages, read_pairs
from sr_jax.evaluation.test_sets import (
  TestSet,
  check_outside,
  open_test_set,
  report_bad,
  split_list,
)
from sr_jax.images.files import safe_output_path, to_8_bits
from sr_jax.machine.paths import user_path
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
  path = user_path(spec.removeprefix("sr:"))
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
  parser = command.parser("evaluate", __doc__)
  parser.add_argument(
    "--model",
    action="append",
    help="bicubic, a run, a model file or the name of a model that comes with sr_jax; LABEL=sr:DIR "
    "for SR images that another program made; or several: A,LABEL=B,... or --model repeated",
  )
  parser.add_argument(
    "--data",
    required=True,
    action="append",
    help="folder of HR images, skimage:test or tfds:NAME:SPLIT; or several: A,B,... or --data "
    "repeated",
  )
  parser.add_argument(
    "--hold_out",
    type=int,
    default=0,
    help="score every N-th image alone, those that training with data.hold_out=N holds out",
  )
  parser.add_argument(
    "--lr", default="", help="folder of LR images of the set's own; by default MATLAB's bicubic"
  )
  parser.add_argument(
    "--pairs", default="", help="CSV file of lines HR,SR that pairs the images of LABEL=sr:DIR"
  )
  parser.add_argument("--output", required=True, help="folder for results and SR images")
  parser.add_argument("--scale", type=int, default=4, help="of bicubic; a model has its own")
  parser.add_argument(
    "--metrics",
    default="",
    help=f"which of {', '.join(METRICS)}; PSNR, SSIM always; by default all that can be computed",
  )
  parser.add_argument(
    "--no-reference", action="store_true", help="score the images of --data themselves, by NIQE"
  )
  parser.add_argument(
    "--group",
    action="append",
    default=[],
    help="NAME=RUN,RUN,...: mean and standard deviation over runs that differ by their seed; runs, "
    "or labels of --model",
  )
  parser.add_argument(
    "--paired",
    action="append",
    default=[],
    help="A,B: the mean difference of two models' scores and its 95 %% interval over the images",
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
  if args.hold_out < 0 or args.hold_out == 1:
    raise UserError(f"--hold_out={args.hold_out} must be 2 or more, or 0 for all images")
  if args.no_reference:
    score_without_reference(args)
    return
  models = [split_label(spec) for spec in split_list(args.model)] if args.model else []
  for member in [m for entry in args.group for m in statistics.members_of(entry)]:
    if not any(member in model for model in models):  # neither a label nor a model that is given
      models.append(split_label(member))
  if not models:
    raise UserError("--model is required, but for --no-reference; try --model=bicubic,srgan")
  output = storage.output_folder("--output", args.output)
  labels, folders = [label for label, _ in models], [output]
  if len(models) > 1:
    folders = [safe_output_path(output, label) for label in labels]
    _check_distinct("--model", folders, "give each a name of its own: LABEL=MODEL")
  given = {label: spec.removeprefix("sr:") for label, spec in models if spec.startswith("sr:")}
  for label, folder in given.items():
    if not folder or not user_path(folder).is_dir():
      raise UserError(f"--model={label}=sr:{folder} must name an existing folder of SR images")
  upscalers, scales, facts = {}, {}, {}
  for label, spec in models:
    if label not in given:
      upscalers[label], scales[label], facts[label] = _load_upscaler(spec, args.scale, args.engine)
  facts |= {label: {"model": f"SR images in {folder}"} for label, folder in given.items()}
  scale = next(iter(scales.values()), args.scale)
  if any(other != scale for other in scales.values()):
    raise UserError(
      f"--model={','.join(spec for _, spec in models)} has scales {list(scales.values())}; compare "
      "models of one scale, and give --scale for bicubic's"
    )
  test_sets = _open_sets(args, scale, folders, given)
  pairs = read_pairs(args.pairs) if args.pairs else {}
  extra = scoring.load_extra([name for name in args.metrics.split(",") if name], args.niqe_params)
  ma = _read_ma(args.ma, labels, [s.name for s in test_sets]) if args.ma else {}
  if ma and extra.niqe is None:
    raise UserError("--ma is for PI, which needs NIQE; give --niqe_params")
  groups = statistics.parse_groups(args.group, labels, {spec: label for label, spec in models})
  compared = statistics.parse_pairs(args.paired, labels)

  rows = zip(models, folders, strict=True)
  rows = [Compared(label, spec, folder, facts[label]) for (label, spec), folder in rows]
  written = Output(output, rows, scale, {test_set.name: test_set.lr for test_set in test_sets})
  results: dict[str, dict[str, Any]] = {label: {} for label in labels}
  given_images = _given_images(given, test_sets, scale, pairs)
  for test_set in test_sets:
    upscalers |= given_images[test_set.name]
    progress = tqdm.tqdm(test_set.images, test_set.name, len(test_set.names), leave=False)
    scored = scoring.evaluate_set(
      {label: upscalers[label] for label in labels},
      progress,
      scale,
      extra=extra,
      keep=functools.partial(written.add, test_set.name),
      bad=test_set.bad,
    )
    for label in labels:
      results[label][test_set.name] = scored[label]
  for label, scores in ma.items():
    scoring.perceptual_indices(results[label], scores)
  written.write(results)
  if groups or compared:
    statistics.write(output / "statistics.json", results, groups, compared)
  print(
    f"\n{output}/report.html has the images side by side; comparison.png, the table (.md, .csv and "
    ".json), results.json and the SR images of each model are there too."
  )
  report_bad(test_sets)


def _given_images(
  given: Mapping[str, str], test_sets: Sequence[TestSet], scale: int, pairs: Mapping[str, str]
) -> dict[str, dict[str, GivenImages]]:
  """Finds the SR images of all sets before one is scored; returns {set: {label: its images}}."""
  found: dict[str, dict[str, GivenImages]] = {test_set.name: {} for test_set in test_sets}
  for label, spec in given.items():
    for test_set in test_sets:
      # Where several sets are scored, each has its images in a folder of its own, or all in one.
      folder = user_path(spec)
      own = folder / test_set.name if (folder / test_set.name).is_dir() else folder
      found[test_set.name][label] = GivenImages(label, own, test_set.names, scale, pairs)
  return found


def _open_sets(
  args: argparse.Namespace, scale: int, folders: Sequence[pathlib.Path], given: Mapping[str, str]
) -> list[TestSet]:
  data = split_list(args.data)
  if args.lr and len(data) > 1:
    raise UserError(f"--lr={args.lr} goes with one --data, not with {len(data)}")
  if args.pairs and (len(given) != 1 or len(data) > 1):
    raise UserError(f"--pairs={args.pairs} goes with one --model=NAME=sr:DIR and one --data")
  test_sets = [open_test_set(spec, scale, args.lr, args.hold_out) for spec in data]
  names = [test_set.name for test_set in test_sets]
  _check_distinct("--data", names, "results have the name of the folder, so rename one")
  for spec, name in zip(data, names, strict=True):
    for folder in folders:
      for where in (spec, *given.values()):
        check_outside(folder / name, where)
  return test_sets


def score_without_reference(args: argparse.Namespace) -> None:
  """Scores images that have no HR image, by NIQE alone."""
  others = (args.model, args.lr, args.pairs, args.ma, args.hold_out, args.group, args.paired)
  if any(others):
    raise UserError("--no-reference goes with --data, --niqe_params and --output alone")
  if not args.niqe_params:
    raise UserError("--no-reference scores by NIQE; give --niqe_params=niqe_pris_params.npz")
  output = storage.output_folder("--output", args.output)
  params = metrics.load_niqe(args.niqe_params)
  sets: dict[str, dict[str, Any]] = {}
  bad = []
  for spec in split_list(args.data):
    source = sources.open_source(spec, keep_grey=True)
    _check_distinct("--data", [*sets, source.set_name], "rename one folder")
    scores = {}
    for i, name in enumerate(tqdm.tqdm(source.names, source.set_name, leave=False)):
      try:
        scores[name] = {"niqe": metrics.niqe(to_8_bits(source.load(i)[0]), 0, params)}
      except (UserError, OSError) as error:
        bad.append(f"{source.set_name}/{name}: {error}")
    flat = [f"{source.set_name}/{name}: too flat for NIQE" for name, s in scores.items()
            if math.isnan(s["niqe"])]  # fmt: skip
    bad += flat
    scores = {name: s for name, s in scores.items() if not math.isnan(s["niqe"])}
    if scores:
      sets[source.set_name] = scoring.with_means(scores)
  if sets:
    images = Compared("images", "the images themselves", output, {})
    write_scores(output, [images], 1, {"images": sets})
  if bad:
    raise UserError(f"{len(bad)} images were not scored:\n{name_list(bad)}")


def _read_ma(
  path: str, labels: Iterable[str], set_names: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
  try:
    given = json.loads(user_path(path).read_text())
  except OSError as error:
    raise UserError(f"--ma={path} cannot be read: {error.strerror}; give a JSON file") from error
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


run = cli.guarded(main)

if __name__ == "__main__":
  run(sys.argv[1:])
