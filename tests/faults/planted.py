"""The faults that are planted, and what must hold after each: a table, FAULTS.

A fault is a function of a number and an empty folder. It plants one case, drawn by the number, and
raises AssertionError where the case was not survived; it may return the seconds that it took to
recover. Faults that have tests of their own are not planted again: FAULTS_WITH_TESTS names these.
"""

import contextlib
import io
import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
import safetensors.numpy

from sr_jax import UserError
from sr_jax import convert
from sr_jax.data import packing
from sr_jax.data import sources
from sr_jax.data.pack import open_pack, read_index
from sr_jax.formats.weight_files import read_weights
from sr_jax.images.files import read_image, safe_output_path, write_image
from sr_jax.machine import holders
from sr_jax.models.inspection import inspect
from sr_jax.models.read import read_model
from sr_jax.models.write import save_model
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.runs.settings import read_json
from tiny_models import make_model
from tiny_states import abstract, assert_equal, make_state, write

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Holds a run and saves one small state after another, as a training does, without the training.
SAVER = """
import pathlib, sys, time
sys.path[:0] = [".", "tests"]
import conftest
from sr_jax import cli
from sr_jax.runs import checkpoint, lock
import tiny_states

def main(argv):
  run, steps, pause = pathlib.Path(argv[0]), int(argv[1]), float(argv[2])
  with lock.held(run), checkpoint.open_manager(run, keep=2) as manager:
    first = (manager.latest_step() or 0) + 1
    for step in range(first, first + steps):
      checkpoint.save(manager, tiny_states.make_state(step), extra={"data": "abc"})
      print(step, flush=True)
      time.sleep(pause)

cli.guarded(main)(sys.argv[1:])
"""


class Fault(NamedTuple):
  """A fault of the table.

  Attributes:
    what: what is done, and what must hold.
    plant: plants case number i in an empty folder.
    full: how many cases a full count has.
    short: how many CI plants.
    needs: why it cannot be planted here, '' where it can.
  """

  what: str
  plant: Callable[[int, pathlib.Path], float | None]
  full: int
  short: int
  needs: Callable[[], str] = lambda: ""


def start_saver(run: pathlib.Path, steps: int = 10_000, pause: float = 0.05) -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-c", SAVER, str(run), str(steps), str(pause)], cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def newest(run: pathlib.Path) -> int:
  """The step that a run goes on from, whose state must be what was saved, bit for bit."""
  restored, extra = checkpoint.restore(run, abstract(make_state(0)))
  step = int(restored.step)
  assert_equal(restored, make_state(step))
  assert extra == {"data": "abc"}
  return step


def flip(path: pathlib.Path, rng: random.Random) -> None:
  contents = bytearray(path.read_bytes())
  contents[rng.randrange(len(contents))] ^= 1 << rng.randrange(8)
  path.write_bytes(contents)


def one_line(error: BaseException) -> None:
  """An error for people: of a kind that programs print in one line."""
  assert isinstance(error, (UserError, OSError)), repr(error)
  assert str(error).isprintable(), repr(str(error))


# Kills.


def kill_in_a_save(i: int, folder: pathlib.Path) -> float:
  saver = start_saver(folder / "run", pause=0)
  rng, last = random.Random(i), 0
  for _ in range(2 + rng.randrange(4)):
    last = int(saver.stdout.readline())
  time.sleep(rng.random() * 0.1)
  saver.kill()
  last = max([last, *map(int, saver.stdout.read().split())])
  saver.wait()
  before = time.monotonic()
  step = newest(folder / "run")
  seconds = time.monotonic() - before
  assert last - 2 <= step <= last, (step, last)
  write(folder / "run", (last + 1,))
  assert newest(folder / "run") == last + 1
  return seconds


def kill_between_steps(i: int, folder: pathlib.Path) -> float:
  """A whole run of two stages, killed when its log has a line of a step drawn at random."""
  import tiny_runs  # its fixtures are of no use here

  photographs = folder / "photographs"
  for number in range(5):
    coarse = np.random.default_rng(number).integers(0, 256, (9, 11, 3), np.uint8)
    write_image(photographs / f"{number}.png", np.asarray(Image.fromarray(coarse).resize((88, 72))))
  code = (
    "import pathlib, sys; sys.path[:0] = ['.', 'tests']; import conftest, tiny_runs\n"
    "from sr_jax.training.run import train_and_evaluate\n"
    "config = tiny_runs.tiny(pathlib.Path(sys.argv[1]))\n"
    "train_and_evaluate(config, sys.argv[2])\n"
  )
  rng = random.Random(i)
  stage, step = rng.choice(("psnr", "")), rng.randrange(1, 4)
  whole = ROOT / ".faults" / "whole"  # the same for all cases
  environment = {**os.environ, "SR_JAX_CACHE": str(folder / "cache")}

  def start(run):
    command = [sys.executable, "-c", code, str(photographs), str(run)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)

  if not (whole / "checkpoints" / "4").exists():
    shutil.rmtree(whole, ignore_errors=True)
    assert start(whole).wait() == 0
  killed, log = start(folder / "run"), folder / "run" / stage / "metrics.jsonl"
  while not (log.exists() and f'"step": {step}' in log.read_text()):
    assert killed.poll() is None
    time.sleep(0.01)
  killed.kill()
  killed.wait()
  before = time.monotonic()
  assert start(folder / "run").wait() == 0
  seconds = time.monotonic() - before
  config = tiny_runs.tiny(photographs)
  for part, settings in (("", config), ("psnr", config.psnr)):
    tiny_runs.assert_same_run(folder / "run" / part, whole / part, settings)
  return seconds


def two_starts(i: int, folder: pathlib.Path) -> None:
  savers = [start_saver(folder / "run", steps=10, pause=0.1)]
  if i % 2:  # the second one comes while the first one works
    assert savers[0].stdout.readline()
  savers.append(start_saver(folder / "run", steps=10, pause=0.1))
  told = [saver.communicate() for saver in savers]
  statuses = [saver.returncode for saver in savers]
  if statuses == [0, 0]:  # one was over before the other came that far
    assert newest(folder / "run") == 20
    return
  assert sorted(statuses) == [0, 1], told
  winner = savers[statuses.index(0)].pid
  refused = told[statuses.index(1)][1]
  assert f"is in use by process {winner} on " in refused and refused.count("\n") == 1, refused
  assert newest(folder / "run") == 10
  assert not (folder / "run" / "lock").exists()


def signal_while_importing(i: int, folder: pathlib.Path) -> float:
  del folder
  rng = random.Random(i)
  number = rng.choice((signal.SIGTERM, signal.SIGINT))
  process = subprocess.Popen(
    [sys.executable, "-m", "sr_jax.main", "--config", "esrgan:demo", "--list"],
    cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  modules = pathlib.Path(f"/proc/{process.pid}/maps")
  while "numpy" not in modules.read_text():  # by now its own first lines have run
    assert process.poll() is None
  time.sleep(rng.random() * 0.5)
  process.send_signal(number)
  sent = time.monotonic()
  out, err = process.communicate(timeout=30)
  assert process.returncode == 0 and err == "", (process.returncode, err)
  assert out.endswith(f"stopped by {number.name}; nothing was lost\n") or "--config.seed" in out
  return time.monotonic() - sent


# Damage on the disk.

STEP_FILES = {
  "manifest": ("manifest/metadata",),
  "scores": ("metrics/metrics",),
  "model's arrays": ("model/d/*", "model/ocdbt.process_0/d/*"),
  "state's arrays": ("state/d/*", "state/ocdbt.process_0/d/*"),
  "Orbax's own": ("*/_METADATA", "*/_sharding", "*/array_metadatas/*", "**/manifest.ocdbt"),
  "marks": ("_CHECKPOINT_METADATA", "commit_success.txt", "*/commit_success.txt"),
}


def scored_run(folder: pathlib.Path) -> pathlib.Path:
  """A run with steps 1 and 2, both with scores; made once, then copied."""
  base = folder.parent / "scored_run"
  if not base.exists():
    with checkpoint.open_manager(base, keep=5, best_metric="psnr_y") as manager:
      for step in (1, 2):
        scores = {"psnr_y": 20.0 + step}
        checkpoint.save(manager, make_state(step), extra={"data": "abc"}, metrics=scores)
  shutil.copytree(base, folder / "run")
  return folder / "run"


def goes_on(run: pathlib.Path) -> float:
  """A damaged run must go on from one of its steps and save the next, and be read."""
  before = time.monotonic()
  assert newest(run) in (1, 2)
  seconds = time.monotonic() - before
  target = jax.eval_shape(lambda: make_state(0).ema_variables)
  variables, step, _ = checkpoint.restore_model(run, target)
  assert_equal(variables, make_state(step).ema_variables)
  with checkpoint.open_manager(run, keep=5, best_metric="psnr_y") as manager:
    checkpoint.save(manager, make_state(3), extra={"data": "abc"}, metrics={"psnr_y": 30.0})
  assert newest(run) == 3
  return seconds


def bit_of_a_checkpoint(kind: str) -> Callable[[int, pathlib.Path], float]:
  def plant(i: int, folder: pathlib.Path) -> float:
    run, rng = scored_run(folder), random.Random(i)
    step = run / "checkpoints" / "2"
    files = sorted(path for glob in STEP_FILES[kind] for path in step.glob(glob) if path.is_file())
    flip(rng.choice([path for path in files if path.stat().st_size]), rng)
    return goes_on(run)

  return plant


def damage_to_a_step(i: int, folder: pathlib.Path) -> float:
  run, rng = scored_run(folder), random.Random(i)
  step = run / "checkpoints" / "2"
  file = rng.choice(sorted(path for path in step.rglob("*") if path.is_file()))
  kind = i % 8
  if kind == 0:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
  elif kind == 1:
    file.write_bytes(b"")
  elif kind == 2:
    file.unlink()
  elif kind == 3:
    shutil.rmtree(rng.choice(sorted(path for path in step.iterdir() if path.is_dir())))
  elif kind == 4:
    shutil.rmtree(step)
    step.mkdir()
  elif kind == 5:
    step.rename(folder / "elsewhere")
    step.symlink_to(folder / "elsewhere")
  elif kind == 6:
    (run / "checkpoints" / "7").write_text("a file")
  else:
    for name in ("notes.txt", "abc", "2.orbax-checkpoint-tmp", "-3", "02"):
      (run / "checkpoints" / name).mkdir()
  return goes_on(run)


def bit_of_a_pack(i: int, folder: pathlib.Path) -> float:
  for number in range(3):
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), np.uint8)
    write_image(folder / "data" / f"{number}.png", pixels)
  source, cache, rng = sources.open_source(str(folder / "data")), str(folder / "cache"), i
  sound = packing.build_pack(source, 4, cache)
  before = np.array(sound.hr), np.array(sound.lr)
  place, rng = packing.pack_folder(source, 4, cache), random.Random(i)
  flip(place / ("hr.bin", "lr.bin", "index.json")[i % 3], rng)
  began = time.monotonic()
  pack = packing.build_pack(source, 4, cache, verify=True)
  seconds = time.monotonic() - began
  np.testing.assert_array_equal(pack.hr, before[0])
  np.testing.assert_array_equal(pack.lr, before[1])
  return seconds


def damage_to_metrics(i: int, folder: pathlib.Path) -> None:
  rng, path = random.Random(i), folder / logs.METRICS
  lines = [json.dumps({"step": step, "loss": step / 7}).encode() + b"\n" for step in range(1, 9)]
  tail = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 40)))
  tail = (tail, b"\xff\xfe\n", b'{"step": 9', b"[" * 3000 + b"\n", b'{"step": "9"}\n')[i % 5]
  path.write_bytes(b"".join(lines) + tail)
  logs.cut_back(folder, 6)
  assert path.read_bytes() == b"".join(lines[:6])
  path.write_bytes(b"".join(lines))
  logs.cut_back(folder, 0)  # no checkpoint says that these lines are not needed
  (aside,) = folder.glob("metrics_*.jsonl")
  assert aside.read_bytes() == b"".join(lines)


def full_disk(i: int, folder: pathlib.Path) -> float:
  """A disk of a few hundred kB that fills up, or that is suddenly only to be read."""
  disk = folder / "disk"
  disk.mkdir()
  size = (300, 500, 900)[i % 3]
  subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "x", str(disk)], check=True)
  try:
    saver = start_saver(disk / "run", pause=0.02)
    if i % 2:
      (disk / "filler").write_bytes(b"")
      for _ in range(2):
        saver.stdout.readline()
      subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    else:
      for _ in range(2):
        saver.stdout.readline()
      with contextlib.suppress(OSError), open(disk / "filler", "wb") as file:
        while True:
          file.write(bytes(4096))
          file.flush()
    told = saver.communicate(timeout=60)
    assert saver.returncode == 1, told
    assert told[1].startswith("error: ") and told[1].count("\n") == 1, told[1]
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "filler").unlink()
    before = time.monotonic()
    assert newest(disk / "run") >= 1
    return time.monotonic() - before
  finally:
    subprocess.run(["umount", "-l", str(disk)], check=True)


def cannot_mount() -> str:
  """Why no disk can be mounted here: even root may not in a namespace, as of `unshare -r`."""
  if sys.platform != "linux" or os.geteuid() != 0:
    return "mounting needs root on Linux"
  with tempfile.TemporaryDirectory() as folder:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "x", folder]
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode:
      return f"mounting is not allowed here: {' '.join(tried.stderr.split())}"
    subprocess.run(["umount", folder], check=True)
  return ""


# What strangers made.


def png_with(chunks: list[tuple[bytes, bytes]]) -> bytes:
  parts = [b"\x89PNG\r\n\x1a\n"]
  for name, data in chunks:
    crc = struct.pack(">I", zlib.crc32(name + data))
    parts.append(struct.pack(">I", len(data)) + name + data + crc)
  return b"".join(parts)


def png_claiming(width: int, height: int) -> bytes:
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return png_with([(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 999)), (b"IEND", b"")])


def encoded(mode: str, kind: str, size: tuple[int, int] = (48, 40), **options) -> bytes:
  noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
  file = io.BytesIO()
  image = Image.fromarray(noise)
  if mode.startswith("I"):
    image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257)
  elif mode != "RGB":
    image = image.convert(mode)
  image.save(file, kind, **options)
  return file.getvalue()


PLAIN = encoded("RGB", "PNG")
ODD_IMAGES = {
  "empty": b"",
  "text": b"no image\n",
  "html": b"<html><script>alert(1)</script></html>",
  "zip": b"PK\x03\x04" + b"\0" * 60,
  "cut png": PLAIN[: len(PLAIN) // 2],
  "cut jpeg": encoded("RGB", "JPEG")[:400],
  "png with a bad checksum": PLAIN[:40] + bytes([PLAIN[40] ^ 1]) + PLAIN[41:],
  "only a signature": b"\x89PNG\r\n\x1a\n",
  "0x0": png_claiming(0, 0),
  "gigapixel": png_claiming(60_000, 60_000),
  "2^31 wide": png_claiming(2**31 - 1, 1),
  "1x1": encoded("RGB", "PNG", (1, 1)),
  "3x500": encoded("RGB", "PNG", (3, 500)),
  "grey": encoded("L", "PNG"),
  "one bit": encoded("1", "PNG"),
  "palette": encoded("P", "PNG"),
  "16 bit": encoded("I;16", "PNG"),
  "alpha": encoded("RGBA", "PNG"),
  "cmyk": encoded("CMYK", "JPEG"),
  "lab": encoded("LAB", "TIFF"),
  "float": encoded("F", "TIFF"),
  "gif": encoded("P", "GIF"),
  "webp": encoded("RGB", "WEBP"),
  "a pipe": None,
}


def odd_images(i: int, folder: pathlib.Path) -> None:
  """Each kind as 1, 10 and 100 of a set of 100 images."""
  kind = list(ODD_IMAGES)[i // 3 % len(ODD_IMAGES)]
  count, bad = 100, (1, 10, 100)[i % 3]
  data = folder / "data"
  data.mkdir()
  for number in range(count):
    path = data / f"{number:03d}.png"
    if number >= bad:
      path.write_bytes(PLAIN)
    elif ODD_IMAGES[kind] is None:
      os.mkfifo(path)
    else:
      path.write_bytes(ODD_IMAGES[kind])
  try:
    source = sources.open_source(str(data))
    pack = packing.build_pack(source, 4, str(folder / "cache"), min_hr=16)
  except UserError as error:
    assert bad == 100, error
    assert "000.png" in str(error) and str(error).count("\n") < 30, error
    return
  assert len(pack.names) in (100, 100 - bad), (kind, len(pack.names))
  for name in pack.names:
    read_image(data / name)


BOMB = """
import resource, sys
from sr_jax.images.files import image_size, read_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
  image_size(path)
  try:
    read_image(path)
    raise SystemExit(f"{path} was decoded")
  except ValueError as error:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def bombs(i: int, folder: pathlib.Path) -> None:
  """Files of less than 1 MB that claim, and some of them hold, more than 100 megapixels."""
  del i
  side = 16_000
  row = b"\0" + b"\7" * side
  packer, rows = zlib.compressobj(9), []
  for _ in range(side):
    rows.append(packer.compress(row))
  pixels = b"".join([*rows, packer.flush()])
  grey = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
  text = b"Comment\0\0" + zlib.compress(b"a" * 10**8)
  files = {
    "real.png": png_with([(b"IHDR", grey), (b"IDAT", pixels), (b"IEND", b"")]),
    "exif.png": png_with(
      [(b"IHDR", grey), (b"IDAT", pixels), (b"eXIf", b"MM\0*\0\0\0\x08\0\0"), (b"IEND", b"")]
    ),
    "text.png": png_with([(b"IHDR", grey), (b"zTXt", text), (b"IDAT", pixels), (b"IEND", b"")]),
    "claims.png": png_claiming(60_000, 60_000),
    "claims.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 50_000, 50_000, 1, 24,
                                      0, 0, 1, 1, 0, 0) + bytes(9),
    "claims.gif": b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0) + b",\0\0\0\0\xff\xff"
    b"\xff\xff\0\x08" + b"\x02\x4c\x01\0;",
    "claims.ppm": b"P6 50000 50000 255\n" + bytes(30),
    "claims.tga": struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 65_535, 65_535, 24, 0),
  }  # fmt: skip
  paths = []
  for name, contents in files.items():
    assert len(contents) < 2**20
    (folder / name).write_bytes(contents)
    paths.append(str(folder / name))
  done = subprocess.run(
    [sys.executable, "-c", BOMB, *paths], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) < 200 * 1024, f"{done.stdout.strip()} kB"


NAMES = [
  "../a.png", "a/../../b.png", "/etc/passwd", "..", "", ".", "C:\\a.png", "\\\\host\\share\\a",
  "a\\..\\..\\b", "a/b/../../../c", "link/a.png", "con.png", "nul", "a\0b.png", "a\nb.png",
  "a\x1b[2J.png", " ../x", "....//x", "a/./b.png", "~/a.png",
]  # fmt: skip


def path_games(i: int, folder: pathlib.Path) -> None:
  (folder / "out").mkdir()
  (folder / "out" / "link").symlink_to(folder)
  (folder / "outside").mkdir()
  try:
    path = safe_output_path(folder / "out", NAMES[i % len(NAMES)])
  except UserError as error:
    one_line(error)
    return
  assert path.resolve().is_relative_to((folder / "out").resolve()) and str(path).isprintable()
  write_image(path, np.zeros((2, 2, 3), np.uint8).repeat(2, 0)) if path.suffix == ".png" else None
  assert sorted(os.listdir(folder)) == ["out", "outside"] and not os.listdir(folder / "outside")


LINKED = [
  "run/config.json", "run/config.tmp", "run/metrics.tmp", "run/metrics.jsonl", "run/lock",
  "run/lock.lock", "run/preview", "run/damaged", "run/checkpoints", "run/checkpoints/2",
  "run/checkpoints/3", "out/.m.safetensors.tmp", "out/m.safetensors", "out/a.png", "cache.lock",
]  # fmt: skip


def planted_links(i: int, folder: pathlib.Path) -> None:
  """Links under the names that a run and an export are known to write to, to a file outside."""
  victim = folder / "victim"
  victim.mkdir()
  (victim / "precious").write_text("precious")
  name = LINKED[i % len(LINKED)]
  link = folder / name
  link.parent.mkdir(parents=True, exist_ok=True)
  is_folder = link.suffix == "" and link.name != "lock"
  link.symlink_to(victim if is_folder else victim / "precious")
  run = folder / "run"
  run.mkdir(exist_ok=True)
  (folder / "out").mkdir(exist_ok=True)
  for attempt in (
    lambda: logs.storage.check_inside(run),
    lambda: logs.storage.write_text(run / "config.json", "{}"),
    lambda: logs.cut_back(run, 0),
    lambda: logs.Writer(run, tensorboard=False).scalars(1, {"loss": 1.0}, {}),
    lambda: save_model(folder / "out" / "m.safetensors", make_model()),
    lambda: write_image(folder / "out" / "a.png", np.zeros((4, 4, 3), np.uint8)),
    lambda: contextlib.ExitStack().enter_context(holders.folders.locked(folder / "cache")),
    lambda: holders.FileLock(run / "lock").take(holders.FileLock(run / "lock").read(), "x"),
    lambda: checkpoint.restore(run, abstract(make_state(0))),
  ):
    try:
      attempt()
    except (UserError, OSError):
      if attempt.__code__.co_names[:3] == ("logs", "storage", "check_inside"):
        break  # the run is refused before anything is written
  assert os.listdir(victim) == ["precious"]
  assert (victim / "precious").read_text() == "precious"


def json_like(rng: random.Random, depth: int = 0):
  """A value of any type, some of them deep or huge."""
  kind = rng.randrange(9 if depth < 3 else 6)
  if kind < 6:
    text = "".join(chr(rng.randrange(0x250)) for _ in range(rng.randrange(9)))
    huge = 10 ** rng.randrange(400)
    return (None, rng.random() < 0.5, huge, -rng.random() * 1e300, text, float("nan"))[kind]
  values = [json_like(rng, depth + 1) for _ in range(rng.randrange(4))]
  return values if kind == 6 else {rng.choice("abcdef"): value for value in values}


def changed_json(told, rng: random.Random):
  """The same tree with one value, somewhere, of another type."""
  if isinstance(told, dict) and told and rng.random() < 0.8:
    key = rng.choice(sorted(told))
    return {**told, key: changed_json(told[key], rng)}
  if isinstance(told, list) and told and rng.random() < 0.8:
    place = rng.randrange(len(told))
    return [*told[:place], changed_json(told[place], rng), *told[place + 1 :]]
  return json_like(rng)


def fuzzed(contents: bytes, rng: random.Random) -> bytes:
  """The bytes with a few of them changed, cut out, or put in."""
  data = bytearray(contents)
  for _ in range(1 + rng.randrange(4)):
    place = rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0 and place < len(data):
      data[place] = rng.randrange(256)
    elif kind == 1:
      del data[place : place + rng.randrange(64)]
    elif kind == 2:
      data[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(16)))
    else:
      data[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1)))
  return bytes(data)


def fuzz_json(reader: str) -> Callable[[int, pathlib.Path], None]:
  """Hands a reader of JSON texts with wrong types, deep nesting, huge numbers, or cut off."""

  def plant(i: int, folder: pathlib.Path) -> None:
    rng = random.Random(i)
    valid = VALID[reader]
    text = json.dumps(changed_json(valid, rng)).encode()
    text = (text, fuzzed(text, rng), text, text, b"[" * 50_000)[i % 5]
    path = folder / "file"
    path.write_bytes(text)
    try:
      READERS[reader](path)
    except (UserError, OSError, checkpoint.DamagedCheckpoint) as error:
      lines = str(error).splitlines()  # more than one where images are listed
      assert len(lines) < 30 and all(map(str.isprintable, lines)), repr(str(error))

  return plant


VALID = {
  "config.json": {"scale": 4, "generator": {"name": "srresnet", "kwargs": {"features": 4}}},
  "a lock": holders.myself(),
  "metrics.jsonl": {"step": 3, "loss": 0.5, "timing": {"a": 1.0}},
  "a pack's index": {
    "format": 3, "key": "a", "source": "b", "scale": 4, "convention": "c", "sub_images": [8, 4],
    "unreadable": {"x": "y"},
    "images": [
      {"name": "a", "hr": [8, 8], "lr": [2, 2], "hr_offset": 0, "lr_offset": 0, "hr_sha256": "",
       "lr_sha256": "", "grey": False},
    ],
  },
}  # fmt: skip


def read_config(path: pathlib.Path) -> None:
  path.rename(path.with_name("config.json"))
  with contextlib.suppress(FileNotFoundError):  # it has no checkpoints
    read_model(path.parent)


def read_the_index(path: pathlib.Path) -> None:
  path.rename(path.with_name("index.json"))
  (path.parent / "hr.bin").write_bytes(bytes(192))
  (path.parent / "lr.bin").write_bytes(bytes(12))
  read_index(path.parent)
  open_pack(path.parent)


def read_metrics(path: pathlib.Path) -> None:
  path.rename(path.with_name(logs.METRICS))
  logs.read_curves(str(path.parent))
  logs.has_scores(path.parent, 3)
  logs.cut_back(path.parent, 2)


READERS = {
  "config.json": lambda path: (read_json(path), read_config(path)),
  "a lock": lambda path: holders.living(path.read_bytes().decode(errors="replace")),
  "metrics.jsonl": read_metrics,
  "a pack's index": read_the_index,
}


def fuzz_weights(suffix: str) -> Callable[[int, pathlib.Path], None]:
  def plant(i: int, folder: pathlib.Path) -> None:
    rng = random.Random(i)
    path = folder / f"model{suffix}"
    path.write_bytes(fuzzed(valid_weights(suffix), rng))
    try:
      read_weights(path)
    except UserError as error:
      one_line(error)

  return plant


def valid_weights(suffix: str) -> bytes:
  arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}
  if suffix == ".safetensors":
    return safetensors.numpy.save(arrays, metadata={"k": "v"})
  if suffix == ".npz":
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()
  # A small .pth: a zip of a pickle of a dict of numbers, which needs no PyTorch to be made.
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("m/data.pkl", b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01K\x01u.")
    archive.writestr("m/version", b"3\n")
  return file.getvalue()


HOSTILE_HEADERS = [
  struct.pack("<Q", 2**63), struct.pack("<Q", 0), b"", b"\xff" * 100,
  struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}",
  *(struct.pack("<Q", len(text)) + text + bytes(64) for text in (
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999]}}',
    b'{"a":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[16,0]}}',
    b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"b":{"dtype":"F32","shape":[4],'
    b'"data_offsets":[8,24]}}',
    b'{"a":{"dtype":"X9","shape":[4],"data_offsets":[0,16]}}',
    b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],'
    b'"data_offsets":[0,16]}}',
    b'{"a\\u001b[2J":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    b'{"__metadata__":{"sr_jax":"{\\"info\\": {\\"ancestry\\": [\\"\\u001b[2J\\"]}}"}}',
    b'{"__metadata__":3}', b"[" * 900,
  )),
]  # fmt: skip


def hostile_models(i: int, folder: pathlib.Path) -> None:
  """Files whose headers lie, under each suffix of weights: refused in one line."""
  suffix = (".safetensors", ".npz", ".pth")[i // len(HOSTILE_HEADERS) % 3]
  path = folder / f"model{suffix}"
  path.write_bytes(HOSTILE_HEADERS[i % len(HOSTILE_HEADERS)])
  for reader in (read_model, inspect):
    try:
      reader(str(path))
      raise AssertionError("it was read")
    except UserError as error:
      one_line(error)


def hostile_texts(i: int, folder: pathlib.Path) -> None:
  """What a model says of itself comes to a terminal without what a terminal would obey."""
  evil = ("\x1b[2J\x1b[31m", "a\nerror: all is lost", "\u202egnp.exe", "\r", "\x07" * 99)[i % 5]
  model = make_model("srresnet")
  path = folder / "model.safetensors"
  save_model(path, model._replace(info={**model.info, "ancestry": [evil]}))
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    convert.main(["--inspect", str(path)])
  lines = out.getvalue().splitlines()
  assert all(line.isprintable() for line in lines) and not any(x.startswith("error") for x in lines)
  assert any(line.startswith("trained from") for line in lines)


def soak(i: int, folder: pathlib.Path) -> None:
  """2,000 tiny steps with evaluation and saves: the memory does not grow, nor the open files."""
  del i
  photographs = folder / "photographs"
  for number in range(5):
    pixels = np.random.default_rng(number).integers(0, 256, (72, 88, 3), np.uint8)
    write_image(photographs / f"{number}.png", pixels)
  code = (
    "import pathlib, sys; sys.path[:0] = ['.', 'tests']; import conftest, tiny_runs\n"
    "from configs import esrgan_psnr\n"
    "from sr_jax.training.run import train_and_evaluate\n"
    "config = tiny_runs.tiny(pathlib.Path(sys.argv[1])).psnr\n"
    "config = config.copy_and_resolve_references().unlock()\n"
    "config.total_steps, config.learning_rate.schedule = 2000, 'constant'\n"
    "config.eval.every_steps = config.checkpoint.every_steps = config.log.every_steps = 50\n"
    "train_and_evaluate(config.lock(), sys.argv[2])\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code, str(photographs), str(folder / "run")], cwd=ROOT,
    env={**os.environ, "SR_JAX_CACHE": str(folder / "cache")}, stdout=subprocess.PIPE, text=True,
  )  # fmt: skip
  proc, seen = pathlib.Path(f"/proc/{process.pid}"), []
  for line in process.stdout:
    words = line.split()
    if words[:1] == ["step"] and words[1].isdigit():
      with contextlib.suppress(OSError):
        pages = int((proc / "statm").read_text().split()[1])
        seen.append(
          (int(words[1]), pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(proc / "fd")))
        )
  assert process.wait() == 0
  steps, sizes, files = np.array([entry for entry in seen if entry[0] >= 500]).T
  slope = np.polyfit(steps, sizes, 1)[0] * 100 / 1e6
  assert slope < 1, f"{slope:.2f} MB per 100 steps"
  assert np.ptp(files) <= 4, files


FAULTS = {
  "kill-9-in-a-save": Fault(
    "kill -9 while checkpoints are written: the newest one is whole", kill_in_a_save, 50, 1
  ),
  "kill-9-between-steps": Fault(
    "kill -9 of a run of two stages: it ends like an undisturbed one, bit for bit",
    kill_between_steps, 10, 0,
  ),
  **{
    f"bit-{kind.replace(' ', '-')}": Fault(
      f"a flipped bit in a checkpoint, {kind}: seen, the one before is taken, or harmless",
      bit_of_a_checkpoint(kind), 30, 1,
    )
    for kind in STEP_FILES
  },
  "bit-pack": Fault(
    "a flipped bit in a pack: seen at the start, that image decoded anew",
    bit_of_a_pack, 30, 3,
  ),
  "damaged-step": Fault(
    "files of a step cut, emptied, deleted; links and foreign files in its place",
    damage_to_a_step, 40, 8,
  ),
  "damaged-metrics": Fault(
    "a damaged tail of metrics.jsonl is cut off; without a checkpoint nothing is dropped",
    damage_to_metrics, 40, 5,
  ),
  "disk": Fault(
    "a disk that fills up, or can only be read from now on: one line, the last step "
    "whole", full_disk, 6, 2, cannot_mount,
  ),
  "signal-while-importing": Fault(
    "SIGTERM or Ctrl-C while Python imports: one line, status 0", signal_while_importing,
    12, 2,
  ),
  "two-starts": Fault(
    "the same command twice: the second is refused and names the first", two_starts, 10, 1
  ),
  "odd-images": Fault(
    f"{len(ODD_IMAGES)} kinds of odd images as 1, 10 and 100 % of a set: left out and "
    "named, or used", odd_images, 3 * len(ODD_IMAGES), 9,
  ),
  "bombs": Fault(
    "eight files under 1 MB that hold or claim 100 megapixels and more: refused by their "
    "headers, under 200 MB", bombs, 1, 1,
  ),
  "hostile-models": Fault(
    "weight files whose headers lie: refused in one line", hostile_models, 60, 60
  ),
  **{
    f"fuzz-{suffix[1:]}": Fault(
      f"{suffix} files with bytes changed, cut, put in: read, or refused in one line",
      fuzz_weights(suffix), 10_000, 50,
    )
    for suffix in (".safetensors", ".npz", ".pth")
  },
  **{
    f"fuzz-{reader.replace(' ', '-')}": Fault(
      f"{reader} of wrong types, deep nesting, huge numbers: read, or refused in a line",
      fuzz_json(reader), 10_000, 50,
    )
    for reader in READERS
  },
  "hostile-texts": Fault(
    "a model whose metadata hold terminal escapes and newlines: escaped", hostile_texts, 5, 5
  ),
  "path-games": Fault(
    "names that lead out of the output folder: nothing is written there", path_games, 20, 20
  ),
  "planted-links": Fault(
    "links under known names: what they lead to is left as it is", planted_links,
    len(LINKED), len(LINKED),
  ),
  "soak": Fault(
    "2,000 tiny steps: under 1 MB more per 100 steps, no more open files", soak, 1, 0
  ),
}  # fmt: skip

OFFLINE = "offline"
# Faults that have tests of their own: {name: (what is done and must hold, pytest's arguments)}.
FAULTS_WITH_TESTS = {
  "signals": (
    "SIGTERM or Ctrl-C while it compiles, trains, scores, saves: that step is saved",
    "tests/training/e2e_test.py -k signal",
  ),
  "not-finite": (
    "NaN or Inf in the data, a gradient, a statistic, a moment, and rates that are too high: "
    "nothing of the step is kept, the run goes back or stops with a report",
    "tests/training/guard_test.py",
  ),
  "several-processes": (
    "a process of several gets a signal, dies, or is missing: all save the same step, or end",
    "tests/training/distributed_test.py",
  ),
  "wrong-settings": (
    "settings that do not fit the run or the model: refused before anything is computed",
    "tests/evaluation/scoring_test.py tests/training/overrides_test.py",
  ),
  "other-devices": (
    "a checkpoint of other devices, or another dtype: the same parameters, bit for bit",
    "tests/runs/checkpoint_test.py",
  ),
  "earlier-versions": (
    "checkpoints and models of earlier versions: they are read", "tests/compatibility_test.py",
  ),
  "buckets": (
    "runs and locks in a bucket: killed and resumed as on a disk",
    "tests/runs/storage_test.py tests/runs/lock_test.py",
  ),
  "tiles": (
    "images cut into tiles: equal to the image at once", "tests/upscaling/upscaler_test.py",
  ),
  "noise": (
    "a run on a good day: it writes nothing but its progress",
    "tests/runs/checkpoint_test.py -k good_day",
  ),
  OFFLINE: (
    "the whole suite without a network: it passes", "-n auto --maxprocesses 4 --dist loadfile",
  ),
}  # fmt: skip
