"""Decodes images once, into a pack that training reads crops from.

  python -m sr_jax.prepare --input DIV2K --output packs/div2k
  python -m sr_jax.prepare --input DIV2K,Flickr2K,OST --output packs/df2kost --sub_images
  python -m sr_jax.prepare --verify packs/div2k
  python -m sr_jax.main --config configs/esrgan.py --config.data.source=packs/div2k
  python -m sr_jax.prepare --preview-degradations 8 --config realesrgan --input DIR --output S.png
  python -m sr_jax.prepare --preview-degradations 1 --config RUN --example 123456

Training on images does the same by itself, into its cache. A pack can be copied to other machines,
and holds the sha256 of each image. If you run the same command again, it goes on where it was
interrupted, or does nothing.

The last two commands show the examples of a run whose LR images are degraded: a sheet of HR and LR
patches, and what was drawn for each. Without --output the draws are printed alone, for which no
images are needed.
"""

from sr_jax.machine.signals import end_at_signals

if __name__ == "__main__":
  end_at_signals()  # the imports below take seconds

import argparse
import difflib
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from ml_collections import config_dict
import numpy as np

from sr_jax import UserError, harmless, printable
from sr_jax import cli
from sr_jax import command
from sr_jax import recipe_files
from sr_jax.data.cost import decoding_cost
from sr_jax.data.pack import FILES, Pack, SubImages, is_pack, open_pack, read_index, verify_pack
from sr_jax.data import packing
from sr_jax.data.source import Flags, name_list
from sr_jax.data import sources
from sr_jax.images import resize
from sr_jax.images.files import write_image
from sr_jax.machine.paths import user_path
from sr_jax.runs.settings import read_json
from sr_jax.training import preview
from sr_jax.training.checks import check_names, check_settings
from sr_jax.training.degradation import crop_side
from sr_jax.networks.blocks import UPSAMPLING
from sr_jax.runs import storage

FLAGS = Flags("--input", "--lr_input")
BASICSR_SUB_IMAGES = "480/240"  # 32,592 of DIV2K's 800 images


def parse_sub_images(text: str) -> SubImages | None:
  """Reads SIZE/STEP in HR pixels; returns None for ''.

  Raises:
    UserError: the text has another form.
  """
  if not text:
    return None
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if not match or "0" in match.groups():
    raise UserError(f"--sub_images={text} must be SIZE/STEP in HR pixels; try "
                    f"--sub_images={BASICSR_SUB_IMAGES}")  # fmt: skip
  return SubImages(*map(int, match.groups()))


def verify(folder: pathlib.Path) -> Pack:
  """Compares a pack with its manifest.

  Raises:
    UserError: it is not a pack, or images differ from their sha256; the error names them.
  """
  if not is_pack(folder):
    raise UserError(f"{folder} must be a pack, a folder with {', '.join(FILES)}")
  if faults := verify_pack(folder):
    raise UserError(
      f"{folder} is damaged, {len(faults)} faults; copy it or prepare it again:\n"
      f"{name_list(faults)}"
    )
  return open_pack(folder)


def describe(folder: pathlib.Path, pack: Pack) -> str:
  """Says what is in a pack."""
  index = read_index(folder)
  pixels = sum(height * width for height, width in (entry["hr"] for entry in index["images"]))
  size, deep = pack.hr.nbytes + pack.lr.nbytes, pack.hr.itemsize == 2
  made = "given" if index["convention"] == "given" else f"made by {index['convention']}"
  lines = [
    f"{folder}: {len(index['images']):,} images, {pixels / 1e6:,.1f} megapixels, {size:,} bytes, "
    f"scale {pack.scale}, {'16 bits, ' if deep else ''}LR {made}, content {pack.digest}"
  ]
  if index["sub_images"]:
    side, step = index["sub_images"]
    lines.append(f"  as {len(pack.names):,} sub-images of {side}, one every {step} pixels")
  smallest, largest = (tuple(f(pack.hr_sizes, axis=0)[::-1]) for f in (np.min, np.max))
  lines.append("  sides from {}x{} to {}x{}".format(*smallest, *largest))
  lines.append(f"  --config.data.input=device takes {size / 1e9:.1f} GB of accelerator memory")
  return harmless("\n".join(lines))


def read_config(named: str) -> config_dict.ConfigDict:
  """Reads a recipe, or the settings of a run by its folder.

  Raises:
    UserError: there is no such recipe, or the run was made before degradations were known.
  """
  file = user_path(named) / "config.json"
  if file.is_file():
    config = config_dict.ConfigDict(read_json(file))
  else:
    config = recipe_files.load(*recipe_files.find(named))
  check_names(config)
  check_settings(config)
  return config


def preview_degradations(
  count: int, named: str, first: int, images: str | None, output: str | None
) -> None:
  """Prints what is drawn for examples, and draws a sheet of them where an output is named.

  Raises:
    UserError: a number is out of range, or the recipe or the images are unfit.
  """
  if not (1 <= count <= 100 and 0 <= first < 2**53):
    raise UserError(
      f"--preview-degradations={count}, --example={first} must be from 1 to 100, and from 0 on; "
      "try --preview-degradations=8 --example=0"
    )
  config = read_config(named)
  if not output:
    for lines in preview.draws_in_words(config, first, count):
      print("\n  ".join(lines))
    return
  data, crop = config.data, crop_side(config)
  source = sources.open_source(images or data.source, data.lr_source, config.scale, keep_grey=True,
                               flags=FLAGS)  # fmt: skip
  pack = packing.build_pack(source, config.scale, data.cache_dir, min_hr=crop)
  shown = list(preview.examples(config, pack, first, count))
  for each in shown:
    print("\n  ".join(each.lines))
  path = user_path(output)
  write_image(path, preview.sheet(shown))
  print(f"{path}: HR, LR and what was drawn, of {count} examples")


def _parser() -> argparse.ArgumentParser:
  parser = command.parser("prepare", __doc__, epilog=f"The forms of --input:\n{sources.FORMS}")
  parser.add_argument("--input", help="images, in one of the forms below")
  parser.add_argument(
    "--lr_input", default="", help="folder of their LR images; by default LR images are made"
  )
  parser.add_argument("--output", metavar="PACK", help="new folder; appears when it is complete")
  parser.add_argument("--scale", type=int, default=4, help="HR size / LR size")
  parser.add_argument(
    "--sub_images",
    nargs="?",
    default="",
    const=BASICSR_SUB_IMAGES,
    metavar="SIZE/STEP",
    help=f"divide the images as BasicSR does; without a value {BASICSR_SUB_IMAGES}",
  )
  parser.add_argument(
    "--convention",
    default=resize.DEFAULT_CONVENTION,
    help=f"how LR images are made: {', '.join(resize.CONVENTIONS)}",
  )
  parser.add_argument(
    "--threads", type=int, default=0, help="threads that decode; 0 for one per CPU, at most 16"
  )
  parser.add_argument(
    "--preview-degradations",
    type=int,
    default=0,
    metavar="N",
    help="show N examples that a recipe degrades",
  )
  parser.add_argument(
    "--config", default="realesrgan", help="the recipe, or the folder of a run (realesrgan)"
  )
  parser.add_argument(
    "--example", type=int, default=0, help="number of the first example that is shown, from 0"
  )
  parser.add_argument("--verify", metavar="PACK", help="compare each image with its sha256")
  return parser


def main(argv: Sequence[str]) -> None:
  parser = _parser()
  args = parser.parse_args(argv)
  if args.verify:
    if args.input or args.output:
      raise UserError("--verify=PACK stands alone; to prepare, give --input and --output")
    folder = user_path(args.verify)
    print(f"{describe(folder, verify(folder))}\n  every image has its sha256")
    return
  preview_only, pack_only = ("config", "example"), ("lr_input", "scale", "sub_images", "convention",
                                                     "threads")  # fmt: skip
  for name in pack_only if args.preview_degradations else preview_only:
    if getattr(args, name) != parser.get_default(name):
      goes = "does not go" if args.preview_degradations else "goes"
      raise UserError(
        f"--{name}={getattr(args, name)} {goes} with --preview-degradations=N, which shows what "
        "the recipe --config makes of the images; leave it out"
      )
  if args.preview_degradations:
    preview_degradations(
      args.preview_degradations, args.config, args.example, args.input, args.output
    )
    return
  if not (args.input and args.output):
    parser.error("the following arguments are required: --input and --output, or --verify")
  if args.scale not in UPSAMPLING:
    scales = ", ".join(map(str, UPSAMPLING))
    raise UserError(f"--scale={args.scale} must be one of {scales}; try --scale=4")
  if not 0 <= args.threads <= 1024:
    raise UserError(f"--threads={args.threads} must be from 0 to 1024; try --threads=0")
  if args.convention not in resize.CONVENTIONS:
    choices = ", ".join(resize.CONVENTIONS)
    fix = difflib.get_close_matches(args.convention, resize.CONVENTIONS, n=1, cutoff=0)[0]
    raise UserError(
      f"--convention={args.convention} must be one of {choices}; try --convention={fix}"
    )

  folder = storage.output_folder("--output", args.output)
  sub_images = parse_sub_images(args.sub_images)
  source = sources.open_source(args.input, args.lr_input, args.scale, keep_grey=True, flags=FLAGS)
  if source.pack:
    raise UserError(f"--input={args.input} is a pack already; give the images")
  cost = decoding_cost(source, args.scale, args.threads)
  told = (
    f"{cost.pixels / 1e6:,.1f} megapixels, {cost.disk_bytes:,} bytes on disk, at most "
    f"{cost.ram_bytes / 2**20:,.0f} MiB of RAM"
    if cost
    else "whose sizes are not known before they are decoded"
  )
  print(f"{printable(source.description)}: {len(source.names):,} images, {told}", flush=True)
  pack = packing.write_pack(
    folder,
    source,
    args.scale,
    convention=args.convention,
    sub_images=sub_images,
    threads=args.threads,
  )
  scale = "" if args.scale == 4 else f" --config.scale={args.scale}"
  place = shlex.quote(str(folder))
  print(f"{describe(folder, pack)}\n  train on it with --config.data.source={place}{scale}")


run = cli.guarded(main)

if __name__ == "__main__":
  run(sys.argv[1:])
