"""Measures examples per second and core: a pack, and a PyTorch DataLoader that reads like BasicSR.

  python -m benchmarks.input [--data DIR] [--quick]

They are measured side by side in one process, in turns. BasicSR's way is PNG sub-images (480, every
240, compression 3) in files or in LMDB: it decodes HR and LR whole, converts them to float32, crops
and flips them, swaps BGR to RGB and makes tensors. The pack holds the same sub-images. Batches are
alike, and PyTorch has one thread. A core's second is a second of CPU time of the whole process, so
that other work on the machine counts little.

Without torch only the pack is measured; without lmdb that row is left out. cv2 decodes if it is
installed, as in BasicSR, else Pillow.
"""

import argparse
import importlib.util
import itertools
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from sr_jax import cli
from sr_jax.data import device_input
from sr_jax.data.pack import Pack, SubImages, divide, hr_image, lr_image
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.data import sources
from sr_jax.data import tf_input

SCALE = 4
SUB_IMAGES = SubImages(480, 240)
PNG_COMPRESSION = 3  # as in BasicSR's extract_subimages.py


class Row(NamedTuple):
  """A way to read batches; `open` gives an endless stream of them."""

  name: str
  open: Callable[[], Iterator[Any]]


def has(module: str) -> bool:
  return importlib.util.find_spec(module) is not None


def write_png_folders(pack: Pack, folder: pathlib.Path) -> list[str]:
  """Writes the pack's images as BasicSR's folders GT/ and LQ/; returns their file names."""
  names = []
  for i in range(len(pack.names)):
    names.append(f"{i:05d}.png")
    for part, image in (("GT", hr_image(pack, i)), ("LQ", lr_image(pack, i))):
      (folder / part).mkdir(parents=True, exist_ok=True)
      pixels = Image.fromarray(np.ascontiguousarray(image))
      pixels.save(folder / part / names[-1], compress_level=PNG_COMPRESSION)
  return names


def write_lmdb(folder: pathlib.Path, names: list[str]) -> None:
  """Copies the PNG files to GT.lmdb and LQ.lmdb, as BasicSR does: LMDB holds encoded images."""
  import lmdb

  for part in ("GT", "LQ"):
    files = [folder / part / name for name in names]
    size = 2 * sum(file.stat().st_size for file in files) + 2**24
    with (
      lmdb.open(str(folder / f"{part}.lmdb"), map_size=size) as base,
      base.begin(write=True) as t,
    ):
      for file in files:
        t.put(file.name.encode(), file.read_bytes())


def file_reader(folder: pathlib.Path) -> Callable[[str, str], bytes]:
  return lambda part, name: (folder / part / name).read_bytes()


def lmdb_reader(folder: pathlib.Path) -> Callable[[str, str], bytes]:
  import lmdb

  options = dict(readonly=True, lock=False, readahead=False, meminit=False)
  bases = {part: lmdb.open(str(folder / f"{part}.lmdb"), **options) for part in ("GT", "LQ")}

  def read(part: str, name: str) -> bytes:
    with bases[part].begin() as transaction:
      return transaction.get(name.encode())

  return read


def decode_bgr(data: bytes) -> np.ndarray:
  """Decodes a PNG to float32 [H, W, 3] in [0, 1], BGR."""
  if has("cv2"):
    import cv2

    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
  else:
    import io

    image = np.asarray(Image.open(io.BytesIO(data)))[:, :, ::-1]
  return image.astype(np.float32) / 255


def torch_batches(
  read: Callable[[str, str], bytes], names: list[str], batch_size: int, lr_patch: int
) -> Iterator[Any]:
  """Makes an endless DataLoader over pairs of PNG images."""
  import torch

  torch.set_num_threads(1)

  class Pairs(torch.utils.data.Dataset):
    def __len__(self) -> int:
      return len(names)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
      hr, lr = decode_bgr(read("GT", names[i])), decode_bgr(read("LQ", names[i]))
      y = random.randint(0, lr.shape[0] - lr_patch)
      x = random.randint(0, lr.shape[1] - lr_patch)
      flips = [random.random() < 0.5 for _ in range(3)]
      crops = {}
      for key, image, factor in (("lq", lr, 1), ("gt", hr, SCALE)):
        side = lr_patch * factor
        crop = image[y * factor : y * factor + side, x * factor : x * factor + side]
        crop = crop[:, ::-1] if flips[0] else crop
        crop = crop[::-1] if flips[1] else crop
        crop = crop.transpose(1, 0, 2) if flips[2] else crop
        chw = np.ascontiguousarray(crop[:, :, ::-1].transpose(2, 0, 1))
        crops[key] = torch.from_numpy(chw)
      return crops

  # Drawn with replacement: a set smaller than a batch serves as well.
  sampler = torch.utils.data.RandomSampler(Pairs(), replacement=True, num_samples=2**31)
  return iter(torch.utils.data.DataLoader(Pairs(), batch_size, sampler=sampler, num_workers=0))


def numpy_batches(pack: Pack, as_float: bool, **options: int) -> Iterator[Any]:
  for step in itertools.count():
    batch = sampling.cut_batch(pack, step, **options)
    yield tuple(part.astype(np.float32) / 255 for part in batch) if as_float else batch


def device_batches(pack: Pack, **options: int) -> Iterator[dict[str, jax.Array]]:
  """Yields batches from the function that the training step calls."""
  arrays, cut = device_input.make_cutter(pack, **options)
  cut = jax.jit(cut)
  return (cut(arrays, np.uint32(step)) for step in itertools.count())


def make_rows(
  pack: Pack, folder: pathlib.Path, batch_size: int, lr_patch: int
) -> tuple[list[Row], list[str]]:
  """Returns the rows to measure, those of the pack first, and why others are left out."""
  options = {"batch_size": batch_size, "lr_patch": lr_patch, "seed": 0}
  rows = [
    Row("pack, numpy, uint8", lambda: numpy_batches(pack, False, **options)),
    Row("pack, numpy, float32", lambda: numpy_batches(pack, True, **options)),
  ]
  missing = []
  if has("tensorflow"):
    rows.append(Row("pack, tf.data, uint8", lambda: tf_input.make_tf_input(pack, **options)))
  else:
    missing.append("pack, tf.data: no tensorflow")
  kind = jax.devices()[0].device_kind
  rows.append(Row(f"pack, in device memory ({kind})", lambda: device_batches(pack, **options)))
  if not has("torch"):
    return rows, [*missing, "BasicSR's way: no torch"]
  names = write_png_folders(pack, folder)
  read_file = file_reader(folder)
  rows.append(
    Row("DataLoader, PNG files", lambda: torch_batches(read_file, names, batch_size, lr_patch))
  )
  if has("lmdb"):
    write_lmdb(folder, names)
    read_lmdb = lmdb_reader(folder)
    rows.append(
      Row("DataLoader, LMDB", lambda: torch_batches(read_lmdb, names, batch_size, lr_patch))
    )
  else:
    missing.append("DataLoader, LMDB: no lmdb")
  return rows, missing


def measure(row: Row, batch_size: int, seconds: float) -> tuple[float, float]:
  """Measures examples per second of CPU time, and per second of the clock."""
  batches = row.open()
  for _ in range(3):  # compiles, fills queues
    jax.block_until_ready(next(batches))
  count, begin, cpu = 0, time.perf_counter(), time.process_time()
  while time.perf_counter() - begin < seconds:
    batch = next(batches)
    count += batch_size
  jax.block_until_ready(batch)
  return count / (time.process_time() - cpu), count / (time.perf_counter() - begin)


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.input",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--data", default="skimage:train", help="images, as --config.data.source")
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--hr_patch", type=int, default=128)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=4, help="a row and round")
  parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
  args = parser.parse_args(argv)
  rounds, seconds = (1, 0.5) if args.quick else (args.rounds, args.seconds)

  with tempfile.TemporaryDirectory(prefix="sr_jax_input_") as work:
    folder = pathlib.Path(work)
    source = sources.open_source(args.data, scale=SCALE)
    pack = packing.build_pack(source, SCALE, str(folder / "cache"), min_hr=args.hr_patch)
    pack = divide(pack, SUB_IMAGES)
    rows, missing = make_rows(pack, folder, args.batch_size, args.hr_patch // SCALE)
    decoder = "cv2" if has("cv2") else "Pillow"
    print(
      f"{len(source.names)} images of {source.description}, {len(pack.names)} sub-images; "
      f"HR crops of {args.hr_patch}, batches of {args.batch_size}; PNG by {decoder}; "
      f"{rounds} rounds of {seconds:g} s; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    results = {row.name: [] for row in rows}
    for _ in range(rounds):
      for row in rows:
        results[row.name].append(measure(row, args.batch_size, seconds))
  print_table(results, missing)


def print_table(results: dict[str, list[tuple[float, float]]], missing: list[str]) -> None:
  """Prints the medians, and how many times as fast as BasicSR's rows each row is."""
  per_core = {name: statistics.median(core for core, _ in pairs) for name, pairs in results.items()}
  others = {name: rate for name, rate in per_core.items() if name.startswith("DataLoader")}
  width = max(map(len, results))
  heads = ["per core", "lowest", "highest", "by the clock", *(f"x {name}" for name in others)]
  print(f"\n{'examples/s':{width}}  " + "  ".join(f"{head:>12}" for head in heads))
  for name, pairs in results.items():
    cores, clock = [core for core, _ in pairs], statistics.median(wall for _, wall in pairs)
    numbers = [f"{rate:,.0f}" for rate in (per_core[name], min(cores), max(cores), clock)]
    ratios = [f"{per_core[name] / rate:.1f}" for rate in others.values()]
    cells = zip(numbers + ratios, heads, strict=True)
    print(f"{name:{width}}  " + "  ".join(f"{cell:>{max(12, len(h))}}" for cell, h in cells))
  for reason in missing:
    print(f"not measured: {reason}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
