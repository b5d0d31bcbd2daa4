"""Upscales files into files: reads ahead, computes, and writes behind, each at the same time.

A file that cannot be read, named, computed or written is noted, and the next one is taken. Only a
full disk and Ctrl-C end a run, and what was written until then is whole.
"""

import collections
import concurrent.futures
import contextlib
import errno
import fractions
import functools
import math
import os
import pathlib
import queue
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from sr_jax import UserError
from sr_jax.images import reading
from sr_jax.images import video
from sr_jax.images import writing
from sr_jax.images.opening import Source
from sr_jax.images.picture import Frame, Header, Picture
from sr_jax.machine.memory import asked_for, ran_out
from sr_jax.upscaling import stream
from sr_jax.upscaling.network import Network

AUTO, SAME = "auto", "same"  # formats: PNG, or TIFF where only this holds all; the input's
INTERRUPTED, FULL = "interrupted", "the disk is full"
_AHEAD = 4  # strips that may wait for the encoder


class Options(NamedTuple):
  """What is asked for, beside the network.

  Attributes:
    format: AUTO, SAME or a key of `writing.FORMATS`.
    quality: 1 to 100, of formats that have one; None for the default.
    outscale: factor of the results, None for the network's.
    ensemble: whether to take the mean over eight turned and mirrored images.
    first_frame: whether to take the first frame of several only.
    to_srgb: whether to convert colours to sRGB.
    max_pixels: of an input.
    skip_existing: whether to leave files alone whose output is there.
    seams: whether to measure what the cuts between tiles change.
  """

  format: str = AUTO
  quality: int | None = None
  outscale: fractions.Fraction | None = None
  ensemble: bool = False
  first_frame: bool = False
  to_srgb: bool = False
  max_pixels: int = reading.MAX_PIXELS
  skip_existing: bool = False
  seams: bool = False


class Task(NamedTuple):
  """A file to upscale.

  Attributes:
    name: to call it by in messages.
    source: its path, or its bytes.
    header: what it is, None if it is damaged.
    format: to write, a key of `writing.FORMATS`; of a video, of `video.CONTAINERS`.
    output: the path to write to, or an opened file.
  """

  name: str
  source: Source
  header: Header | None
  format: str
  output: pathlib.Path | BinaryIO


class Outcome(NamedTuple):
  """What became of the files.

  Attributes:
    done, skipped: how many.
    failed: {name: why}.
    stopped: why the run ended before the last file, '' if it did not.
  """

  done: int
  skipped: int
  failed: dict[str, str]
  stopped: str = ""


def format_for(header: Header | None, choice: str, first_frame: bool) -> str:
  """Says which format a file's result gets, a key of `writing.FORMATS`."""
  if choice == AUTO:
    whole = header and (header.floats or (header.pages > 1 and not first_frame))
    return "tiff" if whole else "png"
  if choice == SAME:
    return writing.SAME.get(header.format, "png") if header else "png"
  return choice


def upscale_files(
  tasks: Sequence[Task],
  network: Network,
  tiling: stream.Tiling,
  options: Options,
  *,
  begin: Callable[[Task], None] = lambda task: None,
  progress: Callable[[Task, int, int], None] = lambda task, done, total: None,
  notice: Callable[[Task, str], None] = lambda task, sentence: None,
  shapes: Sequence[tuple[int, int]] | None = None,
) -> Outcome:
  """Upscales files.

  It is long, since all that can become of a file is decided in it.

  Args:
    tasks: what to upscale; of several with one output the first is taken, the others fail.
    network: what upscales.
    tiling: how images are cut.
    options: what else is asked for.
    begin: called when a file's turn comes.
    progress: called with a frame's tiles that are done, and all of them; of a video, with frames.
    notice: called with what changed a file's picture, in a sentence.
    shapes: of the programs that may be used; by default chosen by the sizes of these files.
  """
  todo, skipped, failed = _sort_out(tasks, options)
  sizes = {task.header.size for task in todo if task.header and task.header.size != (0, 0)}
  stopped = ""
  in_writing: list[tuple[Task, concurrent.futures.Future]] = []  # one at most
  written: list[str] = []  # counted by the thread that writes, which no signal interrupts

  def fail(task: Task, error: Exception) -> None:
    known = isinstance(error, UserError | OSError | MemoryError) or ran_out(error)
    if not known and os.environ.get("SR_JAX_TRACEBACK"):
      raise error
    failed[task.name] = reason(error, task)
    if _is_full(error):
      raise _DiskFullError

  def settle() -> None:
    """Waits until the file before is written."""
    while in_writing:
      task, future = in_writing.pop()
      try:
        future.result()
      except Exception as error:
        fail(task, error)

  def job_of(task: Task) -> stream.Job:
    fitting = stream.programs(sizes, network, tiling) if shapes is None else shapes
    how = (options.outscale, options.ensemble)
    calls = (functools.partial(progress, task), functools.partial(notice, task))
    return stream.Job(network, tiling, fitting, *how, *calls)

  def begun(task: Task, picture: concurrent.futures.Future) -> _Begun | None:
    """Hands a small picture's tiles to the network, where they wait for those of the next ones."""
    try:
      picture, job = picture.result(), job_of(task)
      if len(picture.frames) != 1 or math.prod(picture.frames[0].color.shape[:2]) > tiling.whole:
        return None
      layout, _ = writing.fit(layout_of(picture, job), task.format)
      strips = stream.upscale(picture.frames[0], job, layout.channels, layout.dtype)
    except Exception:  # when its turn comes, it is tried again, and told
      return None
    return _Begun(tiling, strips)

  def attempt(task: Task, picture: Picture, begun: _Begun | None) -> None:
    """Upscales a picture; makes the tiles smaller if the memory is too little."""
    nonlocal tiling
    while True:
      job = job_of(task)
      try:
        if picture.format == video.FORMAT:
          settle()
          _upscale_video(task, job, options)
          written.append(task.name)
        else:
          strips = begun and begun.tiling == tiling and begun.strips
          going = _upscale(task, picture, job, strips, options, writers, settle, written)
          in_writing.append((task, going))
        return
      except (MemoryError, RuntimeError) as error:
        if not ran_out(error) or tiling.tile <= stream.SMALLEST:
          raise
        tiling = stream.smaller(tiling)
        notice(
          task,
          f"The memory did not suffice{asked_for(error)}; from here on tiles are {tiling.tile} "
          "pixels a side.",
        )
        begun = None

  with (
    concurrent.futures.ThreadPoolExecutor(1, "read") as readers,
    concurrent.futures.ThreadPoolExecutor(1, "write") as writers,
  ):
    try:
      pictures = _pictures(todo, options, readers)
      for task, picture, started in _ahead(pictures, begun, network.batch):
        begin(task)
        try:
          picture = picture.result()
          for sentence in picture.notes:
            notice(task, sentence)
          attempt(task, picture, started)
        except _DiskFullError:
          raise
        except Exception as error:  # whatever it is, the other files are not to blame
          fail(task, error)
      settle()
    except _DiskFullError:
      stopped = FULL
    except KeyboardInterrupt:
      stopped = INTERRUPTED
      with contextlib.suppress(_DiskFullError):
        settle()
  return Outcome(len(written), skipped, failed, stopped)


def _sort_out(tasks: Sequence[Task], options: Options) -> tuple[list[Task], int, dict[str, str]]:
  """Says what is to be done, how many files are done already, and what cannot be done."""
  todo, skipped, failed = [], 0, {}
  taken: dict[pathlib.Path, str] = {}
  for task in tasks:
    other = taken.setdefault(task.output, task.name) if _is_path(task.output) else task.name
    if other != task.name:
      failed[task.name] = f"{task.output} is the output of {other}; give another --output"
    elif options.skip_existing and _is_path(task.output) and task.output.exists():
      skipped += 1
    else:
      todo.append(task)
  return todo, skipped, failed


def _pictures(
  tasks: Sequence[Task], options: Options, readers: concurrent.futures.Executor
) -> Iterator[tuple[Task, concurrent.futures.Future]]:
  """Yields what becomes each task's picture; the next one is read meanwhile."""
  ahead = None
  for i, task in enumerate(tasks):
    picture = ahead or readers.submit(_read, task, options)
    ahead = readers.submit(_read, tasks[i + 1], options) if i + 1 < len(tasks) else None
    yield task, picture


class _Begun(NamedTuple):
  """A picture whose first tiles the network has: how it is cut, and the strips that will come."""

  tiling: stream.Tiling
  strips: Iterator[np.ndarray]


def _ahead(
  pictures: Iterable[tuple[Task, concurrent.futures.Future]],
  begin: Callable[[Task, concurrent.futures.Future], _Begun | None],
  count: int,
) -> Iterator[tuple[Task, concurrent.futures.Future, _Begun | None]]:
  """Yields pictures one after the other, and begins up to `count` of them before the first ends.

  With a count of 1 none is begun before its turn, and neither are pictures of more than one tile,
  which fill batches by themselves, and of which several might not fit into memory.
  """
  begun: collections.deque = collections.deque()
  for task, picture in pictures:
    begun.append((task, picture, begin(task, picture) if count > 1 else None))
    while begun and (len(begun) >= count or begun[-1][2] is None):
      yield begun.popleft()
  yield from begun


class _DiskFullError(Exception):
  pass


class _DroppedError(Exception):
  """Tells the encoder that no more rows come."""


def reason(error: BaseException, task: Task) -> str:
  """Says in one line why a file failed, without its name and without addresses of objects."""
  if isinstance(error, OSError) and error.strerror:
    told = error.strerror
  else:
    told = str(error) or type(error).__name__
    if not isinstance(error, UserError | OSError):
      told = f"{told} ({type(error).__name__}; with SR_JAX_TRACEBACK=1 it says where)"
  if ran_out(error):
    told = f"the memory does not suffice{asked_for(error)}"
  told = " ".join(told.split()).removeprefix(f"{task.source}: ") if _is_path(task.source) else told
  return re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "the file", " ".join(told.split()))


def _is_path(source: object) -> bool:
  return isinstance(source, str | os.PathLike)


def _is_full(error: BaseException) -> bool:
  return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _read(task: Task, options: Options) -> Picture:
  if task.header and task.header.format == video.FORMAT:
    for flag in ("first_frame", "to_srgb"):
      if getattr(options, flag):
        raise UserError(f"it is a video, which --{flag.replace('_', '-')} is not for; leave it out")
    return Picture(video.FORMAT, ())  # it is decoded frame by frame, when its turn comes
  return reading.read_picture(
    task.source,
    max_pixels=options.max_pixels,
    first_frame=options.first_frame,
    to_srgb=options.to_srgb,
  )


def layout_of(picture: Picture, job: stream.Job) -> writing.Layout:
  """Says what a picture's result is, before a format says what it holds."""
  several = {frame.color.dtype.itemsize: frame.color.dtype for frame in picture.frames}
  channels = 3 if any(frame.color.ndim == 3 for frame in picture.frames) else 1
  return writing.Layout(
    tuple(stream.output_size(*frame.color.shape[:2], job) for frame in picture.frames),
    channels + any(frame.alpha is not None for frame in picture.frames),
    several[max(several)],
    tuple(frame.duration for frame in picture.frames) if picture.animated else (),
    picture.poster,
  )


def _upscale(
  task: Task,
  picture: Picture,
  job: stream.Job,
  begun: Iterator[np.ndarray] | None,
  options: Options,
  writers: concurrent.futures.Executor,
  settle: Callable[[], None],
  written: list[str],
) -> concurrent.futures.Future:
  """Computes a picture while it is written; returns what ends when it is.

  Of a picture that was begun, `begun` are the strips. `settle` is called before the first row is
  fetched, so that no more than two files are open. The task's name is appended to `written` once
  the file is whole.
  """
  layout, notes = writing.fit(layout_of(picture, job), task.format)
  for sentence in notes + writing.lost(picture.metadata, task.format):
    job.notice(sentence)
  if options.seams:
    job.notice(stream.seams(picture.frames[0], job))
  settle()
  strips: queue.Queue = queue.Queue(_AHEAD)
  try:
    future = writers.submit(_write, task, layout, strips, picture, options.quality, written)
    for frame in picture.frames:
      for strip in begun or stream.upscale(frame, job, layout.channels, layout.dtype):
        _put(strips, strip, future)
      _put(strips, None, future)
  except BaseException as error:
    _drop(strips)
    if isinstance(error, _EncoderError):
      future.result()  # raises what ended it
    raise
  return future


def _drop(strips: queue.Queue) -> None:
  """Tells an encoder to give up, whatever still waits for it."""
  while True:
    try:
      return strips.put_nowait(_DroppedError())
    except queue.Full:
      with contextlib.suppress(queue.Empty):
        strips.get_nowait()


def _upscale_video(task: Task, job: stream.Job, options: Options) -> None:
  """Upscales a video frame by frame; the file is whole or not there."""
  clip = video.look(task.source)
  height, width = clip.size
  if height * width > options.max_pixels:
    raise UserError(f"{width}x{height} pixels are more than max_pixels={options.max_pixels}")
  done = 0

  def change(frame: Frame) -> np.ndarray:
    nonlocal done
    if options.seams and not done:
      job.notice(stream.seams(frame, job))
    channels = 1 if frame.color.ndim == 2 else 3
    quiet = job._replace(progress=lambda tiles, total: None)
    sr = np.concatenate(list(stream.upscale(frame, quiet, channels, np.dtype(np.float32))))
    done += 1
    job.progress(done, max(done, clip.frames))
    return sr[..., 0] if channels == 1 else sr

  size = stream.output_size(height, width, job)
  with _opened_output(task) as file:
    video.convert(task.source, file, task.format, clip, size, change, job.notice)


class _EncoderError(Exception):
  """The encoder has ended before the last row."""


def _put(strips: queue.Queue, item: np.ndarray | None, future: concurrent.futures.Future) -> None:
  while True:
    try:
      return strips.put(item, timeout=0.1)
    except queue.Full:
      if future.done():
        raise _EncoderError from None


def _taken(strips: queue.Queue) -> Iterator[np.ndarray]:
  """Yields an image's strips out of a queue."""
  while (item := strips.get()) is not None:
    if isinstance(item, _DroppedError):
      strips.put(item)
      raise item
    yield item


def _write(
  task: Task,
  layout: writing.Layout,
  strips: queue.Queue,
  picture: Picture,
  quality: int | None,
  written: list[str],
) -> None:
  images = [_taken(strips) for _ in layout.sizes]
  with _opened_output(task) as file:
    writing.write(file, task.format, layout, images, picture.metadata, quality)
  written.append(task.name)


@contextlib.contextmanager
def _opened_output(task: Task) -> Iterator[BinaryIO]:
  """Opens what a file's result is written to; it gets all of it or nothing."""
  if _is_path(task.output):
    with writing.new_file(task.output) as file:
      yield file
    return
  with tempfile.NamedTemporaryFile() as file:  # a pipe cannot be sought in
    yield file
    file.seek(0)
    while data := file.read(2**20):
      task.output.write(data)
    task.output.flush()
