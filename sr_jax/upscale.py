"""Upscales photographs with a trained model.

python -m sr_jax.upscale --input photo.jpg --output upscaled
python -m sr_jax.upscale --model RUN --input photos --output upscaled
python -m sr_jax.upscale --model model.safetensors --input photos --output upscaled --tile 192
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import tqdm

from sr_jax import UserError
from sr_jax import cli
from sr_jax.images.files import (
  list_images,
  read_image_and_alpha,
  safe_output_path,
  unused_path,
  write_image,
)
from sr_jax.models import catalog
from sr_jax.models.read import read_model
from sr_jax.networks.build import build_generator
from sr_jax.runs import storage
from sr_jax.upscaling import engines
from sr_jax.upscaling import tiles
from sr_jax.upscaling import upscaler


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m sr_jax.upscale",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--model",
    default=catalog.DEFAULT,
    help="a run, a model file, or the name of a model that comes with sr_jax; by default "
    f"{catalog.DEFAULT}",
  )
  parser.add_argument("--input", required=True, help="an image or a folder of images")
  parser.add_argument("--output", required=True, help="folder for the upscaled images (PNG)")
  parser.add_argument(
    "--tile",
    type=int,
    help=f"side of tiles in LR pixels, 0 for none; by default {tiles.TILE} for images of more than "
    f"{tiles.WHOLE} pixels",
  )
  parser.add_argument(
    "--engine",
    choices=engines.CHOICES,
    default="auto",
    help="what upscales on a CPU; auto: OpenVINO or ONNX Runtime, whichever is installed, else jax",
  )
  args = parser.parse_args(argv)
  source = pathlib.Path(args.input)
  if not source.exists():
    raise FileNotFoundError(f"--input={source} does not exist")
  folder = source if source.is_dir() else source.parent
  output = storage.local_path("--output", args.output).resolve()
  if output == folder.resolve() or (source.is_dir() and output.is_relative_to(source.resolve())):
    raise UserError(
      f"--output={args.output} is in the input's folder; choose another, so that no photograph is "
      "overwritten and no result upscaled again"
    )
  if args.tile and args.tile < 16:
    raise UserError(f"--tile={args.tile} must be 16 or more (LR pixels), or 0 for no tiles")
  paths = list_images(source) if source.is_dir() else [source]
  if not paths:
    raise FileNotFoundError(f"there is no image in --input={source}")
  model = read_model(args.model)
  module = build_generator(model.name, model.kwargs)
  engine = engines.open_engine(model, args.engine)
  upscale = upscaler.make_upscaler(module, model.variables, engine.run)
  print(f"{args.model}: upscaling with {engine.name}{engine.note}", file=sys.stderr)

  taken: set[pathlib.Path] = set()
  failed = []
  with tqdm.tqdm(paths, unit="image") as bar:
    for path in bar:
      bar.set_postfix_str(path.name)
      try:
        rgb, alpha = read_image_and_alpha(path)
      except (UserError, OSError) as error:
        failed.append(f"{path}: {error}")
        continue
      tile = args.tile
      if tile is None:
        tile = tiles.TILE if rgb.shape[0] * rgb.shape[1] > tiles.WHOLE else 0
      tile = tile or max(rgb.shape[:2])
      sr = tiles.upscale_tiled(
        upscale, rgb, module.scale, tile, functools.partial(_show, bar, path.name)
      )
      if alpha is not None:  # bicubic is enough: transparency has no texture to restore
        alpha = upscaler.bicubic_upscaler(module.scale)(alpha)
        sr = np.concatenate([sr, alpha[:, :, None]], axis=2)
      name = path.relative_to(folder).with_suffix(".png").as_posix()
      out = safe_output_path(args.output, name)
      write_image(unused_path(out, taken), sr)
  print(f"{len(paths) - len(failed)} of {len(paths)} images upscaled x{module.scale} into "
        f"{args.output}")  # fmt: skip
  if failed:
    raise UserError("could not read:\n  " + "\n  ".join(failed))


def _show(bar: tqdm.tqdm, name: str, done: int, total: int) -> None:
  bar.set_postfix_str(f"{name}, tile {done} of {total}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
