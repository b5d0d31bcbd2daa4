"""Tests of images/video.py, and of upscale with a video: frames, times, colours and sound."""

import fractions
import io
import struct
import sys

import numpy as np
import pytest
from tiny_models import nearest_model

from sr_jax import upscale
from sr_jax.images import video
from sr_jax.images.files import write_image
from sr_jax.models.write import save_model

av = pytest.importorskip("av", reason="pip install av")

RATE = fractions.Fraction(30_000, 1001)
SIZE = 16, 32
# Luma and two colour differences of four patches, of 8 bits in the narrow range; all are colours
# that RGB can hold.
PATCHES = np.array([[60, 128, 128], [200, 120, 130], [120, 110, 140], [90, 150, 120]])


def patches(grey=False, shift=0) -> list[np.ndarray]:
  """Planes of 4:4:4, whose four patches lie side by side."""
  colors = np.roll(PATCHES, shift, axis=0).repeat(SIZE[1] // 4, axis=0)
  planes = [np.tile(colors[:, i], (SIZE[0], 1)) for i in range(3)]
  return planes[:1] if grey else planes


def make(
  container="mp4", encoder="libx264", form="yuv420p", matrix=1, full=False, sound="aac", times=None
) -> bytes:
  """A clip of four frames, stored without loss where the encoder can."""
  file, times = io.BytesIO(), times or [0, 1, 2, 3]
  deep, grey = form.endswith("10le"), form.startswith("gray")
  with av.open(file, "w", format=container) as clip:
    pictures = clip.add_stream(encoder, rate=RATE, options={"qp": "0", "lossless": "1"})
    context = pictures.codec_context
    context.height, context.width, context.pix_fmt, context.time_base = *SIZE, form, 1 / RATE
    context.color_range = 2 if full else 1
    context.colorspace = context.color_primaries = context.color_trc = matrix
    tone = sound and clip.add_stream(sound, rate=48_000)
    for number, time in enumerate(times):
      stored = ("gray" if grey else "yuv444p") + ("10le" if deep else "")
      frame = av.VideoFrame(*SIZE[::-1], stored)
      for plane, values in zip(frame.planes, patches(grey, number), strict=True):
        row = np.zeros((plane.height, plane.line_size // (2 if deep else 1)), int)
        row[:, : SIZE[1]] = values * (4 if deep else 1)
        plane.update(row.astype("<u2" if deep else np.uint8).tobytes())
      frame = frame.reformat(format=form, src_color_range=2, dst_color_range=2)
      frame.pts, frame.time_base = time, 1 / RATE
      frame.color_range, frame.colorspace = context.color_range, matrix
      clip.mux(pictures.encode(frame))
    clip.mux(pictures.encode(None))
    if sound:
      wave = np.sin(np.arange(4800) / 20).astype(np.float32)[None].repeat(2, axis=0)
      samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
      samples.sample_rate = 48_000
      clip.mux(tone.encode(samples))
      clip.mux(tone.encode(None))
  return file.getvalue()


def decoded(data: bytes):
  """What the file says of its pictures, the frames, and the packets of sound."""
  with av.open(io.BytesIO(data)) as clip:
    stream = clip.streams.video[0]
    told = {"rate": stream.average_rate}
    for field in ("color_range", "colorspace", "color_primaries", "color_trc"):
      told[field] = int(getattr(stream.codec_context, field))
    frames = list(clip.decode(stream))
  with av.open(io.BytesIO(data)) as clip:
    packets = [bytes(p) for p in clip.demux(audio=0) if p.size] if clip.streams.audio else []
  return told, frames, packets


def planes(frame) -> list[np.ndarray]:
  """A frame's planes, each pixel of colour repeated to the size of luma; of 8 bits."""
  deep = frame.format.name.endswith("10le")
  result = []
  for plane in frame.planes:
    values = np.frombuffer(plane, "<u2" if deep else np.uint8).reshape(plane.height, -1)
    values = values[:, : plane.width].astype(float) / (4 if deep else 1)
    times = frame.height // plane.height, frame.width // plane.width
    result.append(values.repeat(times[0], axis=0).repeat(times[1], axis=1))
  return result


def convert(data: bytes, scale=4, change=None, told=None) -> bytes:
  clip, file = video.look(data), io.BytesIO()
  _, container = video.read_header(data)
  size = clip.size[0] * scale, clip.size[1] * scale
  change = change or (lambda frame: frame.color.repeat(scale, axis=0).repeat(scale, axis=1))
  notice = (told if told is not None else []).append
  video.convert(data, file, container, clip, size, change, notice)
  return file.getvalue()


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"container": "matroska", "form": "yuv444p10le", "matrix": 9},
    {"container": "webm", "encoder": "libvpx-vp9", "matrix": 5, "full": True, "sound": "libopus"},
    {"container": "mov", "form": "yuv422p10le", "full": True, "times": [0, 1, 4, 5]},
    {"container": "mp4", "form": "gray", "sound": None},
  ],
  ids=str,
)
def test_a_video_keeps_all_but_its_size(options):
  data = make(**options)
  before, old, sound = decoded(data)
  after, new, copied = decoded(convert(data))
  assert (new[0].height, new[0].width) == (4 * SIZE[0], 4 * SIZE[1])
  assert [f.pts * f.time_base for f in new] == [f.pts * f.time_base for f in old]
  if "times" in options:  # of which the last frame's length is not known
    before.pop("rate"), after.pop("rate")
  assert len(new) == 4 and after == before
  assert copied == sound and bool(sound) == bool(options.get("sound", True))
  assert new[0].format.name == old[0].format.name
  for number, frame in enumerate(new):
    expected = patches(options.get("form") == "gray", number)
    for plane, values in zip(planes(frame), expected, strict=False):
      middle = (slice(None), slice(12, None, 32), *())  # a patch is 32 pixels wide
      error = plane[middle] - values.repeat(4, axis=0).repeat(4, axis=1)[middle]
      assert np.abs(error).max() <= 3, (number, np.abs(error).max())


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("matrix", "red", "blue"), [(1, 0.2126, 0.0722), (5, 0.299, 0.114)])
def test_the_network_sees_the_colours(matrix, red, blue, full):
  seen = []
  data = make("matroska", form="yuv444p", matrix=matrix, full=full, sound=None)
  convert(data, 1, lambda frame: seen.append(frame.color) or frame.color)
  y, u, v = PATCHES.T - np.array([[0 if full else 16], [128], [128]])
  y, u, v = y / (255 if full else 219), u / (255 if full else 224), v / (255 if full else 224)
  r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
  expected = np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=1)
  assert 0 < expected.min() and expected.max() < 1
  np.testing.assert_allclose(seen[0][8, 4::8], expected, atol=1e-5)


def test_a_telephones_video_is_turned_upright():
  data = bytearray(make(form="yuv444p", sound=None))
  place = data.index(b"tkhd") + 4 + 40  # of the matrix, which turns by 90 degrees with the clock
  data[place : place + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, SIZE[0] << 16, 0, 2**30)
  data = bytes(data)
  assert video.read_header(data)[0].size == SIZE[::-1]
  _, frames, _ = decoded(convert(data, 2))
  assert (frames[0].height, frames[0].width) == (2 * SIZE[1], 2 * SIZE[0])
  assert frames[0].rotation == 0
  upright = np.rot90(patches()[0], -1).repeat(2, axis=0).repeat(2, axis=1)
  assert np.abs(planes(frames[0])[0][8::16] - upright[8::16]).max() <= 3


def test_frames_that_are_missing_are_told():
  data, told = make("matroska", sound=None), []
  clip = video.look(data)._replace(frames=40)
  video.convert(data, io.BytesIO(), "mp4", clip, SIZE, lambda frame: frame.color, told.append)
  assert told == ["Only 4 of about 40 frames could be decoded: the file may be damaged."]


def test_a_damaged_name_of_a_stream_does_no_harm():
  data = make(sound=None).replace(b"VideoHandler", b"Video\xff\x9bndler")
  assert b"\x9b" in data and video.read_header(data)[0].size == SIZE
  assert len(decoded(convert(data, 1).replace(b"\xff\x9b", b"Ha"))[1]) == 4


def test_videos_are_known_by_their_content(tmp_path):
  for container, kind in (("mp4", "mp4"), ("mov", "mov"), ("matroska", "matroska")):
    (tmp_path / "a.txt").write_bytes(make(container, sound=None))
    header, found = video.read_header(tmp_path / "a.txt")
    assert (header.size, found) == (SIZE, kind)
  for data in (b"", b"text", b"#EXTM3U\nfile:///etc/passwd\n", b"\0\0\0\x20ftypavif", bytes(600)):
    assert video.read_header(data) is None


def test_what_cannot_be_encoded_is_said_before():
  data = make(sound=None)
  with pytest.raises(ValueError, match="must be even to be stored as yuv420p"):
    video.convert(data, io.BytesIO(), "mp4", video.look(data), (15, 32), pytest.fail)
  with pytest.raises(ValueError, match="more than the 16384 a side of a video"):
    video.convert(data, io.BytesIO(), "mp4", video.look(data), (16, 20_000), pytest.fail)
  with pytest.raises(ValueError, match="repair or remove it"):
    video.look(data[: len(data) // 2])


@pytest.fixture(scope="module")
def nearest_path(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "nearest.npz"
  save_model(path, nearest_model())
  return path


def run(model, *arguments) -> None:
  upscale.main(["--model", str(model), "--engine=jax", *map(str, arguments)])


def test_upscale_takes_videos_among_images(tmp_path, nearest_path, capsys):
  folder, out = tmp_path / "in", tmp_path / "out"
  write_image(folder / "a.png", np.full((8, 8, 3), 99, np.uint8))
  (folder / "b.mp4").write_bytes(make())
  (folder / "c.avi").write_bytes(make("avi", sound=None))
  (folder / "d.mkv").write_bytes(make("matroska")[:300])
  with pytest.raises(SystemExit):
    run(nearest_path, "--input", folder, "--output", out)
  assert sorted(p.name for p in out.iterdir()) == ["a.png", "b.mp4", "c.avi.mkv"]
  captured = capsys.readouterr()
  assert (
    captured.out.startswith("3 of 4 images upscaled")
    and "d.mkv: FFmpeg cannot take it: " in captured.err
  )
  _, frames, sound = decoded((out / "b.mp4").read_bytes())
  assert len(frames) == 4 and sound == decoded(make())[2]
  for plane, values in zip(planes(frames[1]), patches(shift=1), strict=True):
    large = values.repeat(4, axis=0).repeat(4, axis=1)
    assert np.abs(plane - large)[:, 12::32].max() <= 3
  run(nearest_path, "--input", folder / "b.mp4", "--output", tmp_path / "b2.mp4", "--outscale=2")
  assert decoded((tmp_path / "b2.mp4").read_bytes())[1][0].width == 2 * SIZE[1]
  with pytest.raises(ValueError, match="--output=.*b.png must end in .mp4 or .m4v for"):
    run(nearest_path, "--input", folder / "b.mp4", "--output", tmp_path / "b.png")


def test_a_video_is_whole_or_not_there(tmp_path, nearest_path, monkeypatch, capsys):
  (tmp_path / "b.mp4").write_bytes(make())
  encode = av.VideoFrame  # the third frame is the last before somebody presses Ctrl-C
  count = []

  def interrupted(*arguments):
    count.append(1)
    if len(count) > 2 and "upscaled" not in capsys.readouterr().out:
      raise KeyboardInterrupt
    return encode(*arguments)

  monkeypatch.setattr(av, "VideoFrame", interrupted)
  with pytest.raises(SystemExit) as exit_with:
    run(nearest_path, "--input", tmp_path / "b.mp4", "--output", tmp_path / "out")
  assert exit_with.value.code == 130 and not list((tmp_path / "out").iterdir())
  assert "0 of 1 images upscaled" in capsys.readouterr().out


def test_without_the_package_it_is_said_how_to_get_it(tmp_path, nearest_path, monkeypatch, capsys):
  (tmp_path / "b.mp4").write_bytes(make())
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(SystemExit):
    run(nearest_path, "--input", tmp_path / "b.mp4", "--output", tmp_path / "out")
  assert "b.mp4: it is a video, which needs a package: pip install av" in capsys.readouterr().err
