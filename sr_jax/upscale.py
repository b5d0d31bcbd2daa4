"""Upscales photographs with a trained model.

  python -m sr_jax.upscale --model RUN --input photo.jpg --output upscaled
  python -m sr_jax.upscale --model model.safetensors --input photos --output upscaled --tile 512
"""

import pathlib
from collections.abc import Callable

from absl import flags
import numpy as np
import tqdm

from sr_jax import cli
from sr_jax import evaluate
from sr_jax import images
from sr_jax import model_file

_OVERLAP = 32  # LR pixels around a tile that are upscaled too and thrown away

_MODEL = flags.DEFINE_string("model", None, "A run's folder or a model file.")
_INPUT = flags.DEFINE_string("input", None, "An image or a folder of images.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the upscaled images (PNG).")
_TILE = flags.DEFINE_integer(
    "tile", 0, "Upscale in tiles of so many LR pixels, for images that do not fit in memory. 0: no."
)


def upscale_tiled(
    upscale: evaluate.Upscaler,
    lr: np.ndarray,
    scale: int,
    tile: int,
    progress: Callable[[], None] = lambda: None,
) -> np.ndarray:
  """Upscales an image tile by tile, each with 32 LR pixels of its surroundings.

  Not exactly the untiled image: RRDBNet with 23 blocks looks at some 348 LR pixels around each, so
  far context is cut. With as large an overlap as a network's reach it would be exact.

  Args:
    upscale: of `evaluate.make_upscaler`.
    lr: uint8 [h, w, 3] or [h, w].
    scale: of the model.
    tile: side in LR pixels.
    progress: called after each tile.

  Returns:
    uint8 [h*scale, w*scale, ...].
  """
  height, width = lr.shape[:2]
  sr = np.zeros((height * scale, width * scale, *lr.shape[2:]), np.uint8)
  for top in range(0, height, tile):
    for left in range(0, width, tile):
      y, x = max(top - _OVERLAP, 0), max(left - _OVERLAP, 0)
      bottom, right = min(top + tile, height), min(left + tile, width)
      piece = upscale(lr[y : bottom + _OVERLAP, x : right + _OVERLAP])
      sr[top * scale : bottom * scale, left * scale : right * scale] = piece[
          (top - y) * scale : (bottom - y) * scale, (left - x) * scale : (right - x) * scale
      ]
      progress()
  return sr


def main(argv: list[str]) -> None:
  del argv
  source = pathlib.Path(_INPUT.value)
  if not source.exists():
    raise FileNotFoundError(f"--input={source} does not exist")
  folder = source if source.is_dir() else source.parent
  if folder.resolve() == pathlib.Path(_OUTPUT.value).resolve():
    raise ValueError(f"--output={_OUTPUT.value} is the input's folder; choose another, so that no "
                     "photograph is overwritten")  # fmt: skip
  if _TILE.value and _TILE.value < 16:
    raise ValueError(f"--tile={_TILE.value} must be 16 or more (LR pixels), or 0 for no tiles")
  paths = images.list_images(source) if source.is_dir() else [source]
  if not paths:
    raise FileNotFoundError(f"there is no image in --input={source}")
  module, variables = model_file.load_model(_MODEL.value)
  upscale = evaluate.make_upscaler(module, variables)

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
      tile = _TILE.value or max(rgb.shape[:2])
      sr = upscale_tiled(upscale, rgb, module.scale, tile)
      if alpha is not None:  # transparency has no photograph's texture; bicubic is what it needs
        alpha = evaluate.bicubic_upscaler(module.scale)(alpha)
        sr = np.concatenate([sr, alpha[:, :, None]], axis=2)
      images.write_image(_output_path(path, taken), sr)
  print(f"{len(paths) - len(failed)} of {len(paths)} images upscaled x{module.scale} into "
        f"{_OUTPUT.value}")  # fmt: skip
  if failed:
    raise ValueError("could not read:\n  " + "\n  ".join(failed))


def _output_path(path: pathlib.Path, taken: set[pathlib.Path]) -> pathlib.Path:
  """a.jpg and a.png of one folder become a.png and a_1.png instead of one overwriting the other."""
  number = 0
  while True:
    name = f"{path.stem}_{number}.png" if number else f"{path.stem}.png"
    candidate = images.safe_output_path(_OUTPUT.value, name)
    if candidate not in taken:
      taken.add(candidate)
      return candidate
    number += 1


if __name__ == "__main__":
  cli.run(main, required=["model", "input", "output"])
