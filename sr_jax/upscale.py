"""Upscales photographs with a trained model, and keeps what is in their files.

  python -m sr_jax.upscale --input photo.jpg --output upscaled
  python -m sr_jax.upscale --model RUN --input photos --output upscaled --skip-existing
  python -m sr_jax.upscale --input photo.png --output large.png --outscale 2.5 --self-ensemble
  python -m sr_jax.upscale --input scan.tif 'photos/*.jpg' --output upscaled --format same
  python -m sr_jax.upscale --input - --output - < photo.jpg > large.png
  python -m sr_jax.upscale --input clip.mp4 --output large.mp4

Images may have any size, 8 or 16 bits or floats, transparency, a colour profile and several frames.
The output is PNG, or TIFF for floats and pages; docs/upscaling.md says what is kept and how files
are named. Videos keep their sound, times and colours; they need PyAV: pip install av.
"""

from sr_jax.machine.signals import end_at_signals

if __name__ == "__main__":
  end_at_signals()  # the imports below take seconds

import argparse
import fractions
import glob
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Sequence

import tqdm

from sr_jax import UserError, printable
from sr_jax import cli
from sr_jax import command
from sr_jax.images import names
from sr_jax.images import reading
from sr_jax.images import video
from sr_jax.images import writing
from sr_jax.images.files import list_files
from sr_jax.images.opening import Source
from sr_jax.images.picture import Header
from sr_jax.machine.paths import user_path
from sr_jax.models import catalog
from sr_jax.models.read import read_model
from sr_jax.networks.build import build_generator
from sr_jax.runs import storage
from sr_jax.upscaling import engines
from sr_jax.upscaling import files
from sr_jax.upscaling import network as networks
from sr_jax.upscaling import spread
from sr_jax.upscaling import stream


def _parser() -> argparse.ArgumentParser:
  parser = command.parser("upscale", __doc__)
  parser.add_argument(
    "--model",
    default=catalog.DEFAULT,
    help="a run, a model file, or the name of a model that comes with sr_jax; by default "
    f"{catalog.DEFAULT}",
  )
  parser.add_argument(
    "--input",
    required=True,
    nargs="+",
    help="images, videos, folders of them, patterns such as 'photos/*.jpg'; - for standard input",
  )
  parser.add_argument(
    "--output",
    required=True,
    help="folder for the upscaled images; for a single image also a file (out.png), or - for "
    "standard output",
  )
  parser.add_argument("--outscale", help="factor of the results; by default the model's")
  parser.add_argument(
    "--format",
    choices=(files.AUTO, files.SAME, *(name for name in writing.FORMATS if name != "gif")),
    default=files.AUTO,
    help="of the results; auto: png, or tiff for floats and documents of several pages; same: the "
    "input's, or png where it cannot be written",
  )
  parser.add_argument(
    "--quality",
    help=f"of jpg and avif, 1 to 100, by default {writing.QUALITY['jpg']} and "
    f"{writing.QUALITY['avif']}; of webp, which is lossless without it",
  )
  parser.add_argument("--suffix", default="", help="to put at the end of the names, as _x4")
  parser.add_argument(
    "--skip-existing", action="store_true", help="leave images alone whose output is there"
  )
  parser.add_argument(
    "--first-frame", action="store_true", help="take the first of several frames or pages only"
  )
  parser.add_argument(
    "--to-srgb", action="store_true", help="convert the pixels to sRGB, and drop their profile"
  )
  parser.add_argument(
    "--self-ensemble",
    action="store_true",
    help="mean over the image turned and mirrored eight ways: better, and eight times the work",
  )
  parser.add_argument(
    "--max-pixels",
    default=reading.MAX_PIXELS,
    help=f"of an input, by default {reading.MAX_PIXELS:,}; a small file can hold a huge image",
  )
  parser.add_argument(
    "--tile",
    default="auto",
    help="side of tiles in LR pixels, 0 for none; auto, the default, is at most "
    f"{stream.TILE}, less where there is little memory, and none up to {stream.WHOLE} pixels",
  )
  parser.add_argument(
    "--tile-mode",
    choices=("fast", "exact"),
    default="fast",
    help=f"fast: a tile sees {stream.OVERLAP} pixels of its surroundings; exact: all that the "
    "network looks at, so that the result is that of no tiles",
  )
  parser.add_argument(
    "--seams", action="store_true", help="measure what the cuts between tiles change"
  )
  parser.add_argument(
    "--engine",
    choices=engines.CHOICES,
    default="auto",
    help="what upscales on a CPU; auto: OpenVINO or ONNX Runtime, whichever is installed, else jax",
  )
  parser.add_argument(
    "--mesh",
    help="divide each image over several devices: 2x4 for two rows of four blocks, by JAX",
  )
  return parser


def main(argv: Sequence[str]) -> None:
  args = _parser().parse_args(argv)
  warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of what is left out
  args.tile, args.outscale = _tile(str(args.tile)), _scale(args.outscale)
  args.quality = _whole("--quality", args.quality, 100, 90)
  args.max_pixels = _whole("--max-pixels", args.max_pixels, 2**62, reading.MAX_PIXELS)
  grid = _mesh(args.mesh) if args.mesh else None
  if grid and args.engine not in ("auto", "jax"):
    raise UserError(f"--engine={args.engine} does not go with --mesh, which JAX alone does; leave "
                    "one of them out")  # fmt: skip
  if set(args.suffix) & set("/\\\0"):
    raise UserError(
      f"--suffix={printable(args.suffix)} must be the end of a name, without / and \\; "
      "try --suffix=_x4"
    )
  inputs = _find(args.input)
  output, is_file, choice = _check_output(args, inputs)
  options = files.Options(
    choice,
    args.quality,
    args.outscale,
    args.self_ensemble,
    args.first_frame,
    args.to_srgb,
    args.max_pixels,
    args.skip_existing,
    args.seams,
  )
  tasks, others, unreadable = [], [], {}
  for name, source in inputs:
    try:
      header, kind = _look(source, options)
    except OSError as error:
      unreadable[str(source)] = error.strerror
      continue
    if header is None and not name.lower().endswith(_SUFFIXES) and name != "-":
      others.append(name)
      continue
    suffixes = video.CONTAINERS.get(kind) or writing.FORMATS[kind].suffixes
    place = output
    if args.output == "-":
      place = sys.stdout.buffer
    elif is_file and output.suffix.lower() not in suffixes:
      raise UserError(f"--output={args.output} must end in {' or '.join(suffixes)} for {source}")
    elif not is_file:
      name = "stdin" + suffixes[0] if name == "-" else name
      place = output / names.output_name(name, suffixes, args.suffix)
      if not place.parent.resolve().is_relative_to(output):
        unreadable[str(source)] = f"{place} must stay inside {output}; remove the symbolic link"
        continue
    called = str(source) if isinstance(source, pathlib.Path) else "standard input"
    tasks.append(files.Task(called, source, header, kind, place))
  if not tasks and not unreadable:
    raise FileNotFoundError(f"there is no image or video in --input={' '.join(args.input)}")
  lossy = {task.format for task in tasks} & {"jpg", "webp", "avif"}
  if args.quality and tasks and not lossy and args.format != "same":
    raise UserError(
      f"--quality={args.quality} is of jpg, webp and avif, and nothing is written as one; leave it "
      "out, or try --format=jpg"
    )
  if args.suffix and (is_file or args.output == "-"):
    raise UserError(f"--suffix={args.suffix} is for names in a folder, and --output={args.output} "
                    "names the file; leave it out")  # fmt: skip
  model = read_model(args.model)
  module = build_generator(model.name, model.kwargs)
  mesh = spread.make_mesh(grid) if grid else None
  engine = engines.open_engine(model, "jax" if mesh else args.engine)
  batch = 1 if mesh or engine.forward else networks.batch_for(len(tasks))
  network = networks.make_network(module, model.variables, engine.forward, mesh=mesh, batch=batch)
  tiling = _tiling(args, module, model.variables, network)
  if args.output != "-":
    writing.check_folder(output.parent if is_file else output)
  print(f"{args.model}: upscaling with {engine.name}{engine.note}", file=sys.stderr)
  outcome = _run(tasks, network, tiling, options)
  _report(args, outcome, unreadable, tasks, others, network)


_SUFFIXES = (*reading.SUFFIXES, *video.SUFFIXES)


def _look(source: Source, options: files.Options) -> tuple[Header | None, str]:
  """Says what a file is, None for no image and no video, and the format of its result."""
  header = reading.read_header(source)
  if header is None and (found := video.read_header(source)):
    return found
  return header, files.format_for(header, options.format, options.first_frame)


def _run(
  tasks: Sequence[files.Task],
  network: networks.Network,
  tiling: stream.Tiling,
  options: files.Options,
) -> files.Outcome:
  """Upscales, with a bar."""
  told = set()
  with tqdm.tqdm(total=len(tasks), unit="image") as bar:

    def begin(task: files.Task) -> None:
      bar.update(tasks.index(task) - bar.n)
      bar.set_postfix_str(os.path.basename(task.name))

    def progress(task: files.Task, done: int, total: int) -> None:
      if total > 1:
        part = "frame" if task.format in video.CONTAINERS else "tile"
        bar.set_postfix_str(f"{os.path.basename(task.name)}, {part} {done} of {total}")

    def notice(task: files.Task, sentence: str) -> None:
      if (task.name, sentence) not in told:
        told.add((task.name, sentence))
        bar.write(f"{task.name}: {sentence}", file=sys.stderr)

    outcome = files.upscale_files(
      tasks, network, tiling, options, begin=begin, progress=progress, notice=notice
    )
    bar.update(0 if outcome.stopped else len(tasks) - bar.n)
    return outcome


def _report(
  args: argparse.Namespace,
  outcome: files.Outcome,
  unreadable: dict[str, str],
  tasks: Sequence[files.Task],
  others: Sequence[str],
  network: networks.Network,
) -> None:
  """Prints what became of the files; exits with status 1 if not all were upscaled."""
  if others:
    shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
    total = len(tasks) + len(unreadable) + len(others)
    print(f"{len(others)} of {total} files are not images: {shown}", file=sys.stderr)
  failed = unreadable | outcome.failed
  if failed:
    print("could not be upscaled:", file=sys.stderr)
    for name, why in failed.items():
      print(f"  {name}: {why}", file=sys.stderr)
  total = len(tasks) + len(unreadable)
  left = total - outcome.done - outcome.skipped - len(failed)
  scale = f"{float(args.outscale or network.scale):g}"
  counts = [f"{outcome.done} of {total} images upscaled x{scale} into {args.output}"]
  counts += [f"{outcome.skipped} skipped"] if outcome.skipped else []
  counts += [f"{len(failed)} failed"] if failed else []
  counts += [f"{outcome.stopped}: {left} left"] if outcome.stopped else []
  print("; ".join(counts), file=sys.stderr if args.output == "-" else sys.stdout, flush=True)
  if outcome.stopped == files.INTERRUPTED:
    sys.exit(130)
  if failed or outcome.stopped:
    sys.exit(1)


def _find(inputs: Sequence[str]) -> list[tuple[str, Source]]:
  """Finds the files of --input: how each is called from the folder that was given, and its path."""
  found: list[tuple[str, Source]] = []
  for given in inputs:
    if given == "-":
      found.append(("-", sys.stdin.buffer.read()))
      continue
    path = user_path(given)
    if path.is_dir():
      found += [(file.relative_to(path).as_posix(), file) for file in list_files(path)]
    elif path.exists() or path.is_symlink():
      found.append((path.name, path))
    elif glob.has_magic(given):
      matches = sorted(glob.glob(str(path), recursive=True))
      matches = [pathlib.Path(match) for match in matches if not os.path.isdir(match)]
      if not matches:
        raise FileNotFoundError(f"--input={given} matches no file")
      found += [(match.name, match) for match in matches]
    else:
      raise FileNotFoundError(f"--input={given} does not exist")
  return found


def _check_output(
  args: argparse.Namespace, inputs: Sequence[tuple[str, Source]]
) -> tuple[pathlib.Path, bool, str]:
  """Checks --output before anything is computed.

  Returns:
    The folder or the file, whether it is a file, and the choice of the format.
  """
  single = len(inputs) == 1 and not any(
    given != "-" and user_path(given).is_dir() for given in args.input
  )
  if args.output == "-":
    if not single:
      raise UserError("--output=- takes a single image; give a folder for several")
    return pathlib.Path(), False, args.format
  output = storage.local_path("--output", args.output).resolve()
  suffix = output.suffix.lower()
  writable = {s: name for name, kind in writing.FORMATS.items() for s in kind.suffixes}
  writable |= {s: name for name, suffixes in video.CONTAINERS.items() for s in suffixes}
  if suffix in _SUFFIXES and not output.is_dir():
    if not single:
      raise UserError(f"--output={args.output} is one file for several images; give a folder")
    if suffix not in writable:
      raise UserError(f"--output={args.output} must end in one of {', '.join(writable)}")
    kind = writable[suffix]
    if args.format not in (files.AUTO, kind) and kind in writing.FORMATS:
      raise UserError(f"--output={args.output} is no {args.format}; leave out --format")
    if any(isinstance(source, pathlib.Path) and source.resolve() == output for _, source in inputs):
      raise UserError(f"--output={args.output} is the input; choose another name")
    return output, True, args.format if kind in video.CONTAINERS else kind
  names_a_file = re.fullmatch(r"\.[a-z]{3,5}", suffix) and not args.output.endswith(("/", os.sep))
  if single and names_a_file and not output.exists():
    raise UserError(
      f"--output={args.output} must end in one of {', '.join(writable)}; for a folder of this name "
      f"write {args.output}/"
    )
  if output.exists() and not output.is_dir():
    raise UserError(f"--output={args.output} is a file; give a folder, or a name such as out.png")
  for given in args.input:
    if given == "-":
      continue
    path = user_path(given)
    inside = path.is_dir() and output.is_relative_to(path.resolve())
    beside = not path.is_dir() and output == path.parent.resolve() and not args.suffix
    if inside or beside:
      raise UserError(
        f"--output={args.output} is in the input's folder; choose another, so that no photograph "
        "is overwritten and no result upscaled again"
      )
  return output, False, args.format


def _tiling(args, module, variables, network: networks.Network) -> stream.Tiling:
  """Chooses tiles by --tile, --tile-mode and the memory."""
  overlap = stream.OVERLAP
  if args.tile_mode == "exact":
    overlap = networks.reach(module, variables)
  tiling = stream.fitting(network, networks.free_memory() // 2, overlap)
  if args.tile == "auto":
    return tiling
  if args.tile == 0:
    return tiling._replace(whole=sys.maxsize)
  return tiling._replace(tile=args.tile, whole=0)


def _tile(text: str) -> int | str:
  if text == "auto":
    return text
  tile = int(text) if text.lstrip("-").isdigit() else -1
  if tile and tile < stream.SMALLEST:
    raise UserError(
      f"--tile={text} must be {stream.SMALLEST} or more (LR pixels), 0 for no tiles, or auto"
    )
  return tile


def _mesh(text: str) -> tuple[int, int]:
  rows, _, columns = text.partition("x")
  if not (rows.isdecimal() and columns.isdecimal() and int(rows) * int(columns)):
    raise UserError(f"--mesh={text} must be ROWSxCOLUMNS, such as 1x2")
  return int(rows), int(columns)


def _scale(text: str | None) -> fractions.Fraction | None:
  if text is None:
    return None
  try:
    scale = fractions.Fraction(text).limit_denominator(10_000)
  except (ValueError, ZeroDivisionError):
    scale = fractions.Fraction(0)
  if not 0 < scale <= 64:
    raise UserError(f"--outscale={text} must be a number up to 64, such as 2.5")
  return scale


def _whole(flag: str, text: str | int | None, most: int, such_as: int) -> int | None:
  if text is None:
    return None
  text = str(text)
  if not (text.isdecimal() and 1 <= int(text) <= most):
    raise UserError(f"{flag}={text} must be a whole number from 1 to {most}, such as {such_as}")
  return int(text)


run = cli.guarded(main)

if __name__ == "__main__":
  run(sys.argv[1:])
