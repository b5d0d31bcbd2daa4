"""Decodes images once, into a pack that training reads crops from.

  python -m sr_jax.prepare --input DIV2K --output packs/div2k
  python -m sr_jax.prepare --input DIV2K,Flickr2K,OST --output packs/df2kost --sub_images
  python -m sr_jax.prepare --verify packs/div2k
  python -m sr_jax.main --config configs/esrgan.py --config.data.source=packs/div2k

Training on images does the same by itself, into its cache. A pack can be copied to other machines,
and holds the sha256 of each image. If you run the same command again, it goes on where it was
interrupted, or does nothing.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np

from sr_jax import UserError
from sr_jax import cli
from sr_jax.data.cost import decoding_cost
from sr_jax.data.pack import FILES, Pack, SubImages, is_pack, open_pack, read_index, verify_pack
from sr_jax.data import packing
from sr_jax.data.source import name_list
from sr_jax.data import sources
from sr_jax.images import resize

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
    raise UserError(f"--sub_images={text} must be SIZE/STEP in HR pixels, as {BASICSR_SUB_IMAGES}")
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
  size = pack.hr.size + pack.lr.size
  made = "given" if index["convention"] == "given" else f"made by {index['convention']}"
  lines = [
    f"{folder}: {len(index['images']):,} images, {pixels / 1e6:,.1f} megapixels, {size:,} bytes, "
    f"scale {pack.scale}, LR {made}, content {pack.digest}"
  ]
  if index["sub_images"]:
    side, step = index["sub_images"]
    lines.append(f"  as {len(pack.names):,} sub-images of {side}, one every {step} pixels")
  smallest, largest = (tuple(f(pack.hr_sizes, axis=0)[::-1]) for f in (np.min, np.max))
  lines.append("  sides from {}x{} to {}x{}".format(*smallest, *largest))
  lines.append(f"  --config.data.input=device takes {size / 1e9:.1f} GB of accelerator memory")
  return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m sr_jax.prepare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=f"The forms of --input:\n{sources.FORMS}",
  )
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
  parser.add_argument("--verify", metavar="PACK", help="compare each image with its sha256")
  args = parser.parse_args(argv)
  if args.verify:
    if args.input or args.output:
      raise UserError("--verify=PACK stands alone; to prepare, give --input and --output")
    folder = pathlib.Path(args.verify)
    print(f"{describe(folder, verify(folder))}\n  every image has its sha256")
    return
  if not (args.input and args.output):
    parser.error("the following arguments are required: --input and --output, or --verify")
  if args.scale < 1 or args.threads < 0:
    raise UserError(f"--scale={args.scale}, --threads={args.threads} must be at least 1 and 0")
  if args.convention not in resize.CONVENTIONS:
    choices = ", ".join(resize.CONVENTIONS)
    raise UserError(f"--convention={args.convention} must be one of {choices}")

  folder = pathlib.Path(args.output)
  sub_images = parse_sub_images(args.sub_images)
  source = sources.open_source(args.input, args.lr_input, args.scale, keep_grey=True)
  if source.pack:
    raise UserError(f"--input={args.input} is a pack already; give the images")
  cost = decoding_cost(source, args.scale, args.threads)
  told = (
    f"{cost.pixels / 1e6:,.1f} megapixels, {cost.disk_bytes:,} bytes on disk, at most "
    f"{cost.ram_bytes / 2**20:,.0f} MiB of RAM"
    if cost
    else "whose sizes are not known before they are decoded"
  )
  print(f"{source.description}: {len(source.names):,} images, {told}", flush=True)
  pack = packing.write_pack(
    folder,
    source,
    args.scale,
    convention=args.convention,
    sub_images=sub_images,
    threads=args.threads,
  )
  print(f"{describe(folder, pack)}\n  train on it with --config.data.source={folder}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
