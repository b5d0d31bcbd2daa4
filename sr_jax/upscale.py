"""Upscales photographs with a trained model.

python -m sr_jax.upscale --model RUN --input photo.jpg --output upscaled
python -m sr_jax.upscale --model model.safetensors --input photos --output upscaled --tile 192
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from sr_jax import cli
from sr_jax import engines
from sr_jax import evaluate
from sr_jax import images
from sr_jax import model_file
from sr_jax import storage

_OVERLAP = 32  # LR pixels around a tile that are upscaled too and thrown away
_TILE = 448  # with its overlap one of the sizes that images are padded to
_WHOLE = 1_000_000  # LR pixels up to which an image is upscaled at once by default


def upscale_tiled(
  upscale: evaluate.Upscaler,
  lr: np.ndarray,
  scale: int,
  tile: int,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
  """Upscales an image tile by tile, each with 32 LR pixels of its surroundings.

  Not exactly the untiled image: RRDBNet with 23 blocks looks at some 348 LR pixels around each, so
  far context is cut. With as large an overlap as a network's reach it would be exact.

  Args:
    upscale: of `evaluate.make_upscaler`.
    lr: uint8 [h, w, 3] or [h, w].
    scale: of the model.
    tile: side in LR pixels.
    progress: called with the number of tiles done and of all.

  Returns:
    uint8 [h*scale, w*scale, ...].
  """
  height, width = lr.shape[:2]
  sr = np.zeros((height * scale, width * scale, *lr.shape[2:]), np.uint8)
  corners = [(top, left) for top in range(0, height, tile) for left in range(0, width, tile)]
  for done, (top, left) in enumerate(corners, 1):
    y, x = max(top - _OVERLAP, 0), max(left - _OVERLAP, 0)
    bottom, right = min(top + tile, height), min(left + tile, width)
    piece = upscale(lr[y : bottom + _OVERLAP, x : right + _OVERLAP])
    sr[top * scale : bottom * scale, left * scale : right * scale] = piece[
      (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale
    ]
    progress(done, len(corners))
  return sr


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m sr_jax.upscale", description=__doc__)
  parser.add_argument("--model", required=True, help="a run or a model file")
  parser.add_argument("--input", required=True, help="an image or a folder of images")
  parser.add_argument("--output", required=True, help="folder for the upscaled images (PNG)")
  parser.add_argument(
    "--tile",
    type=int,
    help=f"side of tiles in LR pixels, 0 for none; by default {_TILE} above {_WHOLE} pixels",
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
    raise ValueError(
      f"--output={args.output} is in the input's folder; choose another, so that no photograph is "
      "overwritten and no result upscaled again"
    )
  if args.tile and args.tile < 16:
    raise ValueError(f"--tile={args.tile} must be 16 or more (LR pixels), or 0 for no tiles")
  paths = images.list_images(source) if source.is_dir() else [source]
  if not paths:
    raise FileNotFoundError(f"there is no image in --input={source}")
  model = model_file.read_model(args.model)
  module = model_file.build_generator(model.name, model.kwargs)
  engine = engines.open_engine(model, args.engine)
  upscale = evaluate.make_upscaler(module, model.variables, engine.run)
  print(f"upscaling with {engine.name}{engine.note}", file=sys.stderr)

  taken: set[pathlib.Path] = set()
  failed = []
  with tqdm.tqdm(paths, unit="image") as bar:
    for path in bar:
      bar.set_postfix_str(path.name)
      try:
        rgb, alpha = images.read_image_and_alpha(path)
      except (ValueError, OSError) as error:
        failed.append(f"{path}: {error}")
        continue
      tile = args.tile
      if tile is None:
        tile = _TILE if rgb.shape[0] * rgb.shape[1] > _WHOLE else 0
      tile = tile or max(rgb.shape[:2])
      sr = upscale_tiled(upscale, rgb, module.scale, tile, functools.partial(_show, bar, path.name))
      if alpha is not None:  # transparency has no photograph's texture; bicubic is what it needs
        alpha = evaluate.bicubic_upscaler(module.scale)(alpha)
        sr = np.concatenate([sr, alpha[:, :, None]], axis=2)
      name = path.relative_to(folder).with_suffix(".png").as_posix()
      out = images.safe_output_path(args.output, name)
      images.write_image(images.unused_path(out, taken), sr)
  print(f"{len(paths) - len(failed)} of {len(paths)} images upscaled x{module.scale} into "
        f"{args.output}")  # fmt: skip
  if failed:
    raise ValueError("could not read:\n  " + "\n  ".join(failed))


def _show(bar: tqdm.tqdm, name: str, done: int, total: int) -> None:
  bar.set_postfix_str(f"{name}, tile {done} of {total}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
