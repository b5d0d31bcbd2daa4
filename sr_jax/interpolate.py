"""Network interpolation (ESRGAN section 3.4): between the PSNR model and the GAN model.

  python -m sr_jax.interpolate --psnr RUN/psnr --gan RUN --alpha 0.5 --output half.safetensors
  python -m sr_jax.interpolate --psnr RUN/psnr --gan RUN --sweep 0:1:0.1 --data DIR --output OUT
  python -m sr_jax.interpolate --psnr RUN/psnr --gan RUN --sweep 0:1:0.1 --data DIR --output OUT \\
    --select "psnr_drop<=0.3"
  python -m sr_jax.interpolate --psnr srresnet --gan srgan --sweep 0:1:0.1 --input photo.jpg \\
    --output OUT

The weights are (1 - alpha) times those of the PSNR model plus alpha times those of the GAN model.

A sweep scores the models of all alphas on test images, as sr_jax.evaluate does. OUT gets the table
(.md, .csv, .json), results.json of each alpha, sweep.svg (PSNR against LPIPS and NIQE) and
strip.png (the same parts of the first images at each alpha). With --select,
OUT/selected.safetensors is the model of the largest alpha that keeps the condition: psnr_drop is
what is lost in dB of Y against alpha 0, rmse the root of the mean squared error of Y (PIRM 2018).

With --input instead of --data, photographs of one's own that have no HR, OUT/alpha.html shows them
at each alpha, with a wipe and zoom, and opens offline. It holds 24 million pixels, of a larger
photograph the middle; transparent photographs are shown over white.
"""

from sr_jax.machine.signals import end_at_signals

if __name__ == "__main__":
  end_at_signals()  # the imports below take seconds

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tqdm

from sr_jax import UserError
from sr_jax import cli
from sr_jax import command
from sr_jax.evaluation import alpha as alpha_page
from sr_jax.evaluation import comparison
from sr_jax.evaluation import output
from sr_jax.evaluation import page
from sr_jax.evaluation import scoring
from sr_jax.evaluation import sweep
from sr_jax.evaluation.test_sets import check_outside, open_test_set, report_bad, split_list
from sr_jax.data.source import name_list
from sr_jax.images.files import list_images, read_image, write_image
from sr_jax.machine.paths import user_path
from sr_jax.machine.writing import write_file
from sr_jax.metrics.table import ALWAYS, METRICS
from sr_jax.models.interpolation import check_alpha, interpolate_models
from sr_jax.models.model import Model
from sr_jax.models.read import read_model
from sr_jax.models.write import check_apart, check_form, save_model
from sr_jax.networks.build import build_generator
from sr_jax.runs import storage
from sr_jax.upscaling import upscaler


def score_alphas(args: argparse.Namespace, psnr: Model, gan: Model) -> None:
  """Scores the models of all alphas, and writes and prints what was found."""
  alphas = sweep.parse_alphas(args.sweep)
  folder = storage.output_folder("--output", args.output)
  for spec in split_list(args.data):
    check_outside(folder, spec)
  interpolate_models(psnr, gan, 0.5)  # the same network, or an error
  module = build_generator(gan.name, gan.kwargs)
  upscalers = dict(
    zip(alphas, upscaler.make_sweep(module, psnr.variables, gan.variables, alphas), strict=True)
  )
  extra = scoring.load_extra([name for name in args.metrics.split(",") if name], args.niqe_params)
  if args.select:
    niqe = ["niqe"] if extra.niqe is not None else []
    lpips = [f"lpips_{net}" for net in extra.lpips]
    sweep.check_condition(args.select, alphas, [*ALWAYS, *lpips, *niqe, *extra.functions])
  panels = comparison.Panels(max_images=4, crop=96, steady=True)
  results: dict[float, dict[str, Any]] = {alpha: {} for alpha in alphas}
  test_sets = [open_test_set(spec, module.scale) for spec in split_list(args.data)]
  for test_set in test_sets:
    set_name = test_set.name
    if set_name in results[alphas[0]]:
      raise UserError(f"--data: two sets are called {set_name}; rename one folder")

    def keep(image: Any, srs: Mapping[float, Any], scores: Mapping[float, Any], name=set_name):
      for alpha, sr in srs.items():
        title = f"{name}/{image.name}"
        panels.add(title, image.lr, image.hr, sweep.label(alpha), sr, scores[alpha])

    progress = tqdm.tqdm(test_set.images, set_name, len(test_set.names), leave=False)
    scored = scoring.evaluate_set(
      upscalers, progress, module.scale, extra=extra, keep=keep, bad=test_set.bad
    )
    for alpha in alphas:
      results[alpha][set_name] = scored[alpha]

  models = [
    output.Compared(
      sweep.label(alpha),
      f"{args.psnr} and {args.gan}",
      folder / f"alpha_{alpha:g}",
      {"alpha": f"{alpha:g}", "psnr": psnr.info["digest"], "gan": gan.info["digest"]},
    )
    for alpha in alphas
  ]
  output.write_scores(
    folder, models, module.scale, {sweep.label(alpha): sets for alpha, sets in results.items()}
  )
  by_set = {name: {alpha: results[alpha][name] for alpha in alphas} for name in results[alphas[0]]}
  write_file(folder / "sweep.svg", sweep.plot(by_set))
  write_image(folder / "strip.png", panels.draw())
  print(f"\n{folder}/sweep.svg has PSNR against LPIPS and NIQE where they were computed, strip.png "
        "the pictures")  # fmt: skip
  if args.select:
    means = {alpha: sweep.over_all_sets(results[alpha]) for alpha in alphas}
    chosen = sweep.select(args.select, means)
    path = folder / "selected.safetensors"
    save_model(path, interpolate_models(psnr, gan, chosen))
    print(f"{path}: alpha {chosen:g}, the largest with {args.select}")
  report_bad(test_sets)


def show_alphas(args: argparse.Namespace, psnr: Model, gan: Model) -> None:
  """Upscales photographs at all alphas, and writes the page that shows them."""
  alphas = sweep.parse_alphas(args.sweep)
  paths = [path for name in args.input for path in _photographs(name)]
  interpolate_models(psnr, gan, 0.5)  # the same network, or an error
  module = build_generator(gan.name, gan.kwargs)
  upscalers = upscaler.make_sweep(module, psnr.variables, gan.variables, alphas)
  max_pixels, max_side = alpha_page.room(len(paths), len(alphas), module.scale)
  if max_pixels < 1024:
    raise UserError(
      f"--input names {len(paths)} photographs, and of each the page has room for "
      f"{int(max_pixels)} pixels at {len(alphas)} alphas; give fewer, or a larger step in --sweep"
    )
  shown, bad = [], []
  for path in tqdm.tqdm(paths, unit="photograph", leave=False):
    try:
      photograph = read_image(path)
    except (UserError, OSError) as error:
      bad.append(f"{path}: {error}")
      continue
    lr = photograph[alpha_page.part(*photograph.shape[:2], max_pixels, max_side)]
    srs = [upscale(lr) for upscale in upscalers]
    size = photograph.shape[:2]
    shown.append(alpha_page.encode_photograph(path.name, size, lr, srs, len(paths)))
  if shown:
    folder = storage.local_path("--output", args.output)
    folder.mkdir(parents=True, exist_ok=True)
    title = ", ".join(one["name"] for one in shown)
    subtitle = f"alpha 0 is {args.psnr}, alpha 1 {args.gan}; {module.scale} times as large"
    page.write(folder / "alpha.html", alpha_page.render(title, subtitle, alphas, shown))
    for one in shown:
      print(one["about"])
    print(f"{folder}/alpha.html shows {len(shown)} of {len(paths)} photographs at {len(alphas)} "
          "alphas; it opens offline")  # fmt: skip
  if bad:
    raise UserError(f"{len(bad)} of {len(paths)} photographs are not shown:\n{name_list(bad)}")


def _photographs(name: str) -> list[pathlib.Path]:
  path = user_path(name)
  if not path.is_dir():
    return [path]
  paths = list_images(path)
  if not paths:
    raise UserError(f"there is no image in --input={name}")
  return paths


def main(argv: Sequence[str]) -> None:
  parser = command.parser("interpolate", __doc__)
  parser.add_argument(
    "--psnr", required=True, help="the PSNR-oriented model: a run, a file or a name"
  )
  parser.add_argument(
    "--gan", required=True, help="the model fine-tuned from it: a run, a file or a name"
  )
  parser.add_argument("--alpha", type=float, help="0: PSNR model, 1: GAN model; by default 0.5")
  parser.add_argument(
    "--output", required=True, help="file to write: .safetensors or .npz; a folder for --sweep"
  )
  parser.add_argument("--sweep", default="", help="score alphas START:STOP:STEP, as 0:1:0.1")
  parser.add_argument(
    "--data", action="append", help="test images for --sweep, as for sr_jax.evaluate"
  )
  parser.add_argument(
    "--input", nargs="+", default=[], help="photographs for --sweep that have no HR: files, folders"
  )
  parser.add_argument(
    "--metrics", default="", help=f"of {', '.join(METRICS)}; by default all that can be computed"
  )
  parser.add_argument("--niqe_params", default="", help="BasicSR's niqe_pris_params.npz")
  parser.add_argument(
    "--select", default="", help='keep the largest alpha with this, as "psnr_drop<=0.3"'
  )
  args = parser.parse_args(argv)
  if bool(args.sweep) != bool(args.data or args.input) or (args.select and not args.data):
    parser.error(
      "--sweep=0:1:0.1 and --data=DIR go together, or --sweep and --input=FILE; --select goes with "
      "--data"
    )
  if args.data and args.input:
    parser.error("--data scores images that have HR, --input shows some that have none; give one")
  if args.sweep and args.alpha is not None:
    parser.error(f"--alpha={args.alpha:g} writes one model, --sweep tries many; give one of them")
  if args.sweep:
    sweep.parse_alphas(args.sweep)
    for name in args.input:
      if not user_path(name).exists():
        raise FileNotFoundError(f"--input={name} does not exist; give photographs, or a folder")
  else:
    args.alpha = 0.5 if args.alpha is None else args.alpha
    check_alpha(args.alpha)
    check_form(args.output)
  check_apart(storage.local_path("--output", args.output), args.psnr, args.gan)
  psnr, gan = read_model(args.psnr), read_model(args.gan)
  if args.sweep:
    (score_alphas if args.data else show_alphas)(args, psnr, gan)
    return
  model = interpolate_models(psnr, gan, args.alpha)
  save_model(args.output, model)
  print(f"{args.output}: {model.name} x{model.kwargs['scale']}, alpha {args.alpha}")


run = cli.guarded(main)

if __name__ == "__main__":
  run(sys.argv[1:])
