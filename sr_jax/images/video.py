"""Reads a video and writes it anew with other frames; sound and subtitles are copied as they are.

FFmpeg does both, by PyAV, which is an extra of its own (`video`). A video is known by its content,
and is opened as what its content says: FFmpeg would follow a playlist of a stranger to other files.
"""

import contextlib
import errno
import fractions
import io
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sr_jax import MissingPackageError, UserError
from sr_jax.images.picture import Frame
from sr_jax.images.opening import Source
from sr_jax.images.picture import Header

FORMAT = "VIDEO"  # of a header
# What is written: FFmpeg's names of containers, the suffixes of files, and the encoders.
CONTAINERS = {"mp4": (".mp4", ".m4v"), "mov": (".mov",), "matroska": (".mkv",), "webm": (".webm",)}
SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".flv", ".ogv")
_ENCODERS = {"webm": ("libvpx-vp9", {"crf": "18", "b": "0", "row-mt": "1"})}
_ENCODER = "libx264", {"crf": "16", "preset": "medium"}
_LONGEST = 16_384  # pixels a side of an encoder
# What red and blue weigh in luma (ITU-T H.273, table 4), by the number of the matrix.
_WEIGHTS = {1: (0.2126, 0.0722), 4: (0.3, 0.11), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
_WEIGHTS[10], _BT601 = _WEIGHTS[9], (0.299, 0.114)
_FULL, _BT601_NUMBER = 2, 6  # the range in which 0 is black; the matrix of BT.601


class Clip(NamedTuple):
  """What is known of a video once its first frame is decoded.

  Attributes:
    size: height and width of a frame, turned upright.
    turns: quarter turns against the clock that make a stored frame upright.
    grey: whether it has no colour at all.
    depth: bits of a value, 8 or more.
    chroma: '420', '422' or '444': how many values of colour are stored.
    full: whether values fill all bits, and not the narrower range of broadcasts.
    rgb: whether its values are red, green and blue; they are stored anew by BT.601.
    frames: how many there are, about; 0 where the file does not say.
  """

  size: tuple[int, int]
  turns: int
  grey: bool
  depth: int
  chroma: str
  full: bool
  rgb: bool
  frames: int


def read_header(source: Source) -> tuple[Header, str] | None:
  """Says by its content whether a file is a video, and in which container its result belongs.

  Returns:
    The header, whose size is (0, 0) until PyAV looks into it, and a key of CONTAINERS; or None.

  Raises:
    OSError: the file cannot be opened.
  """
  with _bytes_of(source) as file:
    demuxer, container = _containers(file.read(1024))
  if not demuxer:
    return None
  size = 0, 0
  with contextlib.suppress(Exception):  # of a damaged file nearly any; whoever reads it hears of it
    size = look(source).size
  return Header(FORMAT, size), container


def _containers(head: bytes) -> tuple[str, str]:
  """FFmpeg's name of what a file begins with, and the container of its result; '' for no video."""
  kind = head[4:8]
  if kind == b"ftyp" and head[8:12] not in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1"):
    return "mov", "mov" if head[8:12] == b"qt  " else "mp4"
  if kind in (b"moov", b"mdat", b"wide") and head[:1] == b"\0":
    return "mov", "mov"
  if head[:4] == b"\x1a\x45\xdf\xa3":
    return "matroska", "webm" if b"webm" in head[:64] else "matroska"
  if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
    return "avi", "matroska"
  marks = {b"\0\0\x01\xba": "mpeg", b"FLV\x01": "flv", b"OggS": "ogg"}
  if head[:4] in marks:
    return marks[head[:4]], "matroska"
  if head[:1] == b"G" and head[188:189] == b"G" and head[376:377] == b"G":
    return "mpegts", "matroska"
  return "", ""


@contextlib.contextmanager
def _bytes_of(source: Source) -> Iterator[BinaryIO]:
  with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
    yield file


def _av() -> Any:
  try:
    import av
  except ImportError as error:
    raise MissingPackageError(
      "it is a video, which needs a package: pip install av, or sr_jax's extra [video]"
    ) from error
  return av


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[tuple[Any, Any]]:
  """Opens a video; yields it and its stream of pictures.

  Raises:
    UserError: it is damaged, or holds no moving picture.
  """
  av = _av()
  with _bytes_of(source) as file:
    demuxer, _ = _containers(file.read(1024))
    file.seek(0)
    try:
      with av.open(file, format=demuxer, metadata_errors="replace") as clip:
        stream = clip.streams.best("video")
        if stream is None:
          raise UserError("it holds no video; an upscaler has nothing to do with its sound")
        stream.thread_type = "AUTO"
        yield clip, stream
    except av.FFmpegError as error:
      if error.errno == errno.ENOSPC:
        raise
      told = (error.strerror or "it does not say why")[:200]
      raise UserError(f"FFmpeg cannot take it: {told}; repair or remove it") from error


def look(source: Source) -> Clip:
  """Decodes the first frame of a video and says what it is.

  Raises:
    UserError: it is damaged.
    MissingPackageError: PyAV is not installed.
  """
  with _opened(source) as (clip, stream):
    frame = next(clip.decode(stream), None)
    if frame is None:
      raise UserError("it has no frame; repair or remove it")
    name, turns = frame.format.name, round(frame.rotation / 90) % 4
    height, width = frame.height, frame.width
    seconds = clip.duration / 1_000_000 if clip.duration else 0
    return Clip(
      (width, height) if turns % 2 else (height, width),
      turns,
      name.startswith("gray"),
      max(component.bits for component in frame.format.components),
      next((c for c in ("420", "422") if c in name), "420" if name.startswith("nv") else "444"),
      name.startswith("yuvj") or int(frame.color_range) == _FULL or frame.format.is_rgb,
      frame.format.is_rgb,
      stream.frames or int(seconds * (stream.average_rate or 0)),
    )


def convert(
  source: Source,
  file: BinaryIO,
  container: str,
  clip: Clip,
  size: tuple[int, int],
  change: Callable[[Frame], np.ndarray],
  notice: Callable[[str], None] = lambda sentence: None,
) -> None:
  """Writes a video anew, with its frames changed, their times, and its sound as it is.

  Range, matrix, primaries and transfer function stay; so do 8 and 10 bits and how densely colours
  are stored, where the encoder (H.264; VP9 in WebM) has them.

  Args:
    source: the video.
    file: opened, to write to and to seek in.
    container: a key of CONTAINERS.
    clip: what `look` says of it.
    size: height and width of the new frames.
    change: from a frame, float32 grey [h, w] or RGB [h, w, 3] in [0, 1], to the new one of `size`,
      [H, W] or [H, W, 3]; values outside [0, 1] are clipped.
    notice: called with what is lost, in a sentence.

  Raises:
    UserError: it is damaged, or the encoder cannot hold frames of this size.
    MissingPackageError: PyAV is not installed.
  """
  av = _av()
  encoder, options = _ENCODERS.get(container, _ENCODER)
  form = _form(clip, av.codec.Codec(encoder, "w").video_formats, notice)
  _check(size, form)
  with _opened(source) as (old, stream), av.open(file, "w", format=container) as new:
    pictures = new.add_stream(encoder, rate=stream.average_rate or 25, options=options)
    context, before = pictures.codec_context, stream.codec_context
    context.height, context.width, context.pix_fmt = *size, form
    context.time_base = stream.time_base or fractions.Fraction(1, 90_000)
    ratio = stream.sample_aspect_ratio
    if ratio:
      context.sample_aspect_ratio = 1 / ratio if clip.turns % 2 else ratio
    context.color_range = _FULL if clip.full else 1
    for field in ("colorspace", "color_primaries", "color_trc"):
      setattr(context, field, _BT601_NUMBER if clip.rgb else getattr(before, field))
    others = _copied(old, new, stream, notice)
    new.metadata.update(old.metadata)
    count = 0
    for packet in old.demux(stream, *(s for s in old.streams if s.index in others)):
      if packet.stream.index == stream.index:
        for frame in packet.decode():
          count += 1
          new.mux(pictures.encode(_encoded(frame, change(_frame(frame, clip)), clip, form)))
      elif packet.dts is not None:
        packet.stream = others[packet.stream.index]
        new.mux(packet)
    new.mux(pictures.encode(None))
  if count < 0.95 * clip.frames:
    notice(f"Only {count} of about {clip.frames} frames could be decoded: the file may be damaged.")


def _copied(old: Any, new: Any, pictures: Any, notice: Callable[[str], None]) -> dict[int, Any]:
  """Adds the streams that are copied as they are; by the old ones' numbers."""
  added = {}
  for stream in old.streams:
    if stream.index == pictures.index:
      continue
    try:
      if stream.type not in ("audio", "subtitle"):
        raise ValueError
      added[stream.index] = new.add_stream_from_template(stream)
      added[stream.index].metadata.update(stream.metadata)
    except ValueError:  # what the container cannot hold, too
      notice(f"A stream of the video was left out: {stream.type or 'unknown'}.")
  return added


def _form(clip: Clip, known: list, notice: Callable[[str], None]) -> str:
  """Names the encoder's pixel format that holds a video's values."""
  names = {form.name for form in known}
  deep = "10le" if clip.depth > 8 and "yuv420p10le" in names else ""
  if clip.depth > (10 if deep else 8):
    notice(f"The encoder holds {10 if deep else 8} bits: {clip.depth} bits were rounded once.")
  if clip.grey and f"gray{deep}" in names:
    return f"gray{deep}"
  return f"yuv{'420' if clip.grey else clip.chroma}p{deep}"


def _check(size: tuple[int, int], form: str) -> None:
  height, width = size
  if max(size) > _LONGEST:
    raise UserError(
      f"{width}x{height} pixels are more than the {_LONGEST} a side of a video; choose a smaller "
      "--outscale"
    )
  if ("420" in form and height % 2) or (("420" in form or "422" in form) and width % 2):
    raise UserError(
      f"{width}x{height} pixels must be even to be stored as {form}; choose another --outscale"
    )


def _weights(frame: Any) -> tuple[float, float]:
  return _WEIGHTS.get(int(frame.colorspace), _BT601)


def _levels(depth: int, full: bool) -> tuple[float, float, float]:
  """The value of black, and how many values luma and colour differences spread over."""
  if full:
    return 0, 2**depth - 1, 2**depth - 1
  step = 2 ** (depth - 8)
  return 16 * step, 219 * step, 224 * step


def _frame(frame: Any, clip: Clip) -> Frame:
  """A decoded frame as the network sees it: upright, black as 0, white as 1.

  FFmpeg only spreads the colours over all pixels; the matrix is applied here, in floats.
  """
  if (frame.width, frame.height) != (clip.size[::-1] if clip.turns % 2 == 0 else clip.size):
    raise UserError(f"its frames change their size to {frame.width}x{frame.height}; cut it there")
  form = ("gray" if clip.grey else "yuv444p") + (f"{clip.depth}le" if clip.depth > 8 else "")
  black, luma, chroma = _levels(clip.depth, clip.full)
  planes = [_values(plane, clip.depth) for plane in _reformatted(frame, form).planes]
  y = (planes[0] - np.float32(black)) / np.float32(luma)
  if not clip.grey:
    u, v = (
      (plane - np.float32(2 ** (clip.depth - 1))) / np.float32(chroma) for plane in planes[1:]
    )
    red, blue = _weights(frame)
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    y = np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=2)
  return Frame(np.ascontiguousarray(np.rot90(np.clip(y, 0, 1), clip.turns), np.float32))


def _encoded(frame: Any, pixels: np.ndarray, clip: Clip, form: str) -> Any:
  """A new frame for the encoder, with the time and the colours' meaning of the old one."""
  depth = 10 if form.endswith("10le") else 8
  black, luma, chroma = _levels(depth, clip.full)
  pixels = np.clip(pixels, 0, 1)
  planes = [pixels if pixels.ndim == 2 else None]
  if pixels.ndim == 3:
    red, blue = _weights(frame)
    y = pixels @ np.array([red, 1 - red - blue, blue], np.float32)
    u, v = (pixels[..., 2] - y) / (2 * (1 - blue)), (pixels[..., 0] - y) / (2 * (1 - red))
    planes = [y, u, v]
  elif not form.startswith("gray"):
    planes += [np.zeros_like(pixels)] * 2
  levels = [(luma, black), *[(chroma, 2 ** (depth - 1))] * 2]
  stored = form if len(planes) == 1 else "yuv444p" + ("10le" if depth == 10 else "")
  made = _av().VideoFrame(pixels.shape[1], pixels.shape[0], stored)
  for plane, values, (step, zero) in zip(made.planes, planes, levels, strict=False):
    _store(plane, np.clip(np.floor(values * step + zero + 0.5), 0, 2**depth - 1), depth)
  made = _reformatted(made, form)
  made.pts, made.time_base = frame.pts, frame.time_base
  made.color_range = _FULL if clip.full else 1
  for field in ("colorspace", "color_primaries", "color_trc"):
    setattr(made, field, _BT601_NUMBER if clip.rgb else getattr(frame, field))
  return made


def _reformatted(frame: Any, form: str) -> Any:
  """Stores colours for more or fewer pixels; the same range twice, so that no value is changed."""
  return frame.reformat(format=form, src_color_range=_FULL, dst_color_range=_FULL)


def _values(plane: Any, depth: int) -> np.ndarray:
  """The values of a plane, float32 [height, width]; its rows may be longer."""
  values = np.frombuffer(plane, np.uint8 if depth == 8 else "<u2")
  return values.reshape(plane.height, -1)[:, : plane.width].astype(np.float32)


def _store(plane: Any, values: np.ndarray, depth: int) -> None:
  stored = np.zeros((plane.height, plane.line_size // (1 if depth == 8 else 2)), np.float32)
  stored[:, : plane.width] = values
  plane.update(stored.astype(np.uint8 if depth == 8 else "<u2").tobytes())
