"""Images of 16 bits: their bits reach the network, and images of 8 bits are treated as ever."""

import hashlib
import json
import logging
import math
import pathlib
import struct
import zlib

import jax
import numpy as np
import pytest
import tifffile

from configs import esrgan_psnr
from sr_jax import main
from sr_jax.data import device_input
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.data import sources
from sr_jax.data import tf_input
from sr_jax.data.cost import decoding_cost
from sr_jax.data.detail import measure
from sr_jax.data.pack import SubImages, hr_image, lr_image, open_pack, read_index, verify_pack
from sr_jax.data.source import hold_out
from sr_jax.evaluation.test_sets import open_test_set, packed_image
from sr_jax.images.files import image_size, read_image, write_image
from sr_jax.images.opening import bits_of
from sr_jax.machine import sharding
from sr_jax.training import recipe
from sr_jax.training.inputs import make_preparation
from sr_jax.training.run import train_and_evaluate


def deep(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
  """Soft and dark: 8 bits would leave a few levels of it."""
  noise = np.random.default_rng(seed).normal(0, 90, (height, width, channels))
  return np.clip(np.cumsum(noise, axis=1) + 3000, 0, 65535).astype(np.uint16)


def write_png(path: pathlib.Path, pixels: np.ndarray) -> None:
  """A PNG of 16 bits by hand: Pillow writes none in colour."""
  kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2]]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
  header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
  chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    for name, data in chunks
  ))  # fmt: skip


def bicubic(image: np.ndarray, scale: int) -> np.ndarray:
  """MATLAB's imresize(uint16 image, 1 / scale), pixel by pixel; rows are rounded, then columns."""

  def cubic(x: float) -> float:
    x = abs(x)
    if x <= 1:
      return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0

  def along(image: np.ndarray) -> np.ndarray:
    size, lines = len(image), []
    for i in range(-(-size // scale)):
      center = (i + 0.5) * scale - 0.5
      total, line = 0.0, 0.0
      for j in range(math.floor(center - 2 * scale), math.ceil(center + 2 * scale) + 1):
        weight = cubic((center - j) / scale)
        mirrored = -1 - j if j < 0 else 2 * size - 1 - j if j >= size else j
        total, line = total + weight, line + weight * image[mirrored].astype(np.float64)
      lines.append(np.clip(np.floor(line / total + 0.5), 0, 65535))
    return np.stack(lines)

  return along(along(image).swapaxes(0, 1)).swapaxes(0, 1).astype(np.uint16)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """Five images, whose last is grey and whose middle one has 8 bits."""
  data = tmp_path / "data"
  write_png(data / "0.png", deep(0, 41, 50))
  tifffile.imwrite(data / "1.tif", deep(1, 44, 48), photometric="rgb", compression="zlib")
  write_image(data / "2.png", (deep(2, 40, 52) >> 5).clip(0, 255).astype(np.uint8))
  tifffile.imwrite(data / "3.tiff", deep(3, 48, 40).byteswap().view(">u2"), byteorder=">")
  write_png(data / "4.png", deep(4, 40, 48, 1))
  return data


EXPECTED = {0: deep(0, 41, 50)[:40, :48], 1: deep(1, 44, 48), 3: deep(3, 48, 40)}


def pack_of(folder: pathlib.Path, cache: pathlib.Path, **options):
  source = sources.open_source(str(folder), keep_grey=True)
  return packing.build_pack(source, 4, str(cache), **options)


def named_by_version_3(folder: pathlib.Path) -> str:
  """What a pack of the folder was called when all packs had 8 bits."""
  source = sources.open_source(str(folder), keep_grey=True)
  made = [3, 4, "uint8_mirror_round_between", source.fingerprint]
  return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:20]


def test_files_of_16_bits_are_read_with_them_or_rounded(folder):
  for name, image in (
    ("0.png", deep(0, 41, 50)),
    ("1.tif", deep(1, 44, 48)),
    ("3.tiff", deep(3, 48, 40)),
  ):
    for data in (folder / name, (folder / name).read_bytes()):
      assert bits_of(data) == 16
      kept = read_image(data, keep_bits=True)
      assert kept.dtype == np.uint16
      np.testing.assert_array_equal(kept, image)
      np.testing.assert_array_equal(read_image(data), np.floor(image / 257 + 0.5))
    assert image_size(folder / name) == image.shape[:2]
  grey = read_image(folder / "4.png", keep_grey=True, keep_bits=True)
  np.testing.assert_array_equal(grey, deep(4, 40, 48, 1)[..., 0])
  assert bits_of(folder / "2.png") == 8 and bits_of(folder) == bits_of(b"\x89PNG") == 8
  assert read_image(folder / "2.png", keep_bits=True).dtype == np.uint8


def test_transparent_16_bits_lie_on_white(tmp_path):
  pixels = deep(0, 9, 12, 4)
  pixels[..., 3] = np.random.default_rng(0).integers(0, 65536, (9, 12))
  write_png(tmp_path / "a.png", pixels)
  part = pixels[..., 3:] / 65535
  expected = np.floor(pixels[..., :3] * part + 65535 * (1 - part) + 0.5)
  read = read_image(tmp_path / "a.png", keep_bits=True)
  assert read.dtype == np.uint16 and np.abs(read - expected).max() <= 1


def test_a_damaged_file_of_16_bits_is_told_in_one_line(folder):
  for name in ("0.png", "1.tif"):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{name}: ") as error:
      read_image(folder / name, keep_bits=True)
    assert "\n" not in str(error.value)
  with pytest.raises(ValueError, match="40x48|max_pixels=100"):
    read_image(folder / "3.tiff", max_pixels=100)


def test_one_image_of_16_bits_makes_a_pack_of_16(folder, tmp_path, caplog):
  with caplog.at_level(logging.WARNING, logger="absl"):
    pack = pack_of(folder, tmp_path / "cache", verify=True)
  assert "4 of 5 images" in caplog.text and "the other 1 are widened" in caplog.text
  assert pack.hr.dtype == pack.lr.dtype == np.uint16 and pack.grey == (False,) * 4 + (True,)
  for i, image in EXPECTED.items():
    np.testing.assert_array_equal(hr_image(pack, i), image)
    np.testing.assert_array_equal(lr_image(pack, i), bicubic(image, 4))
  np.testing.assert_array_equal(hr_image(pack, 4), np.repeat(deep(4, 40, 48, 1), 3, axis=2))
  small = read_image(folder / "2.png").astype(np.uint16)
  np.testing.assert_array_equal(hr_image(pack, 2), small * 257)  # the same part of white
  np.testing.assert_array_equal(lr_image(pack, 2), bicubic(small * 257, 4))
  (place,) = (tmp_path / "cache").iterdir()
  assert place.name != named_by_version_3(folder)  # or the old pack would be opened
  index = read_index(place)
  assert index["format"] == 4 and all(entry["bits"] == 16 for entry in index["images"])
  cost = decoding_cost(sources.open_source(str(folder)), 4)
  pixels = sum(image.size // 3 for image in (deep(0, 41, 50), *map(EXPECTED.get, (1, 3)))) + 4000
  assert (place / "hr.bin").stat().st_size == 2 * pack.hr.size <= cost.disk_bytes
  assert cost.disk_bytes < 6.4 * pixels
  assert verify_pack(place) == []
  with open(place / "lr.bin", "r+b") as file:
    file.write(b"x")
  assert verify_pack(place) == ["0.png: LR pixels differ from their sha256"]
  again = pack_of(folder, tmp_path / "cache", verify=True)  # decoded anew
  assert again.digest == pack.digest
  np.testing.assert_array_equal(lr_image(again, 0), bicubic(EXPECTED[0], 4))


def test_a_folder_of_8_bits_is_packed_as_ever(folder, tmp_path):
  for name in ("0.png", "1.tif", "3.tiff", "4.png"):
    (folder / name).unlink()
  pack = pack_of(folder, tmp_path / "cache")
  assert pack.hr.dtype == np.uint8
  (place,) = (tmp_path / "cache").iterdir()
  text = (place / "index.json").read_text()
  assert '"bits"' not in text and json.loads(text)["format"] == 3
  assert pack_of(folder, tmp_path / "cache", bits=8).digest == pack.digest
  assert len(list((tmp_path / "cache").iterdir())) == 1  # the very same
  assert place.name == named_by_version_3(folder)


@pytest.mark.parametrize("deep_key", ["HR", "LR"])
def test_pairs_of_which_one_has_16_bits(tmp_path, deep_key):
  pair = {"HR": deep(0, 40, 48), "LR": deep(1, 10, 12)}
  for key, image in pair.items():
    if key == deep_key:
      write_png(tmp_path / key / "a.png", image)
    else:
      small = (image >> 5).clip(0, 255).astype(np.uint8)
      write_image(tmp_path / key / "a.png", small)
      pair[key] = small.astype(np.uint16) * 257
  source = sources.open_source(str(tmp_path / "HR"), str(tmp_path / "LR"))
  pack = packing.build_pack(source, 4, str(tmp_path / "cache"))
  np.testing.assert_array_equal(hr_image(pack, 0), pair["HR"])
  np.testing.assert_array_equal(lr_image(pack, 0), pair["LR"])


def test_a_prepared_pack_its_sub_images_and_copies(folder, tmp_path):
  source = sources.open_source(str(folder), keep_grey=True)
  pack = packing.write_pack(tmp_path / "pack", source, 4, sub_images=SubImages(24, 16))
  opened = open_pack(tmp_path / "pack")
  assert opened.names[0] == "0_s001.png" and opened.digest == pack.digest
  np.testing.assert_array_equal(hr_image(opened, 1), EXPECTED[0][:24, 16:40])
  prepared = sources.open_source(str(tmp_path / "pack"), keep_grey=True)
  np.testing.assert_array_equal(prepared.load(1)[0], EXPECTED[1])
  assert prepared.load(4)[1].shape == (10, 12) and prepared.deep_images() == 5
  packing.build_pack(source, 4, str(tmp_path / "cache"))
  (folder / "2.png").unlink()  # an image less, and the rest is copied

  loaded = []
  rest = sources.open_source(str(folder), keep_grey=True)
  load = rest.load
  object.__setattr__(rest, "load", lambda i: loaded.append(i) or load(i))
  copied = packing.build_pack(rest, 4, str(tmp_path / "cache"))
  assert not loaded
  np.testing.assert_array_equal(hr_image(copied, 1), EXPECTED[1])


@pytest.mark.parametrize("bits", [12, "16", 16.0, None])
def test_a_strangers_index_of_other_bits_is_refused(folder, tmp_path, bits):
  packing.write_pack(tmp_path / "pack", sources.open_source(str(folder)), 4)
  path = tmp_path / "pack" / "index.json"
  index = json.loads(path.read_text())
  index["images"][1]["bits"] = bits
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match="pack is damaged|index.json is no index"):
    open_pack(tmp_path / "pack")


def test_scores_are_of_8_bits_whatever_the_source(folder, tmp_path):
  """In training, by `evaluate`, and where it reads a prepared pack."""
  test_set = list(open_test_set(str(folder), 4).images)
  pack = pack_of(folder, tmp_path / "cache", bits=8)
  assert pack.hr.dtype == np.uint8
  (place,) = (tmp_path / "cache").iterdir()
  assert place.name != named_by_version_3(folder)  # whose colours were not rounded
  for i, image in enumerate(test_set):
    packed = packed_image(pack, i)
    for ours, theirs in ((packed.hr, image.hr), (packed.lr, image.lr)):
      assert ours.dtype == theirs.dtype == np.uint8
      np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_array_equal(test_set[0].hr, np.floor(EXPECTED[0] / 257 + 0.5))
  packing.write_pack(tmp_path / "pack", sources.open_source(str(folder), keep_grey=True), 4)
  deep_pack, (first, *_) = (
    open_pack(tmp_path / "pack"),
    open_test_set(str(tmp_path / "pack"), 4).images,
  )
  for image in (packed_image(deep_pack, 0), first):
    assert image.lr.dtype == np.uint8
    np.testing.assert_array_equal(image.hr, test_set[0].hr)
    np.testing.assert_array_equal(image.lr, np.floor(bicubic(EXPECTED[0], 4) / 257 + 0.5))


CROPS = {"batch_size": 8, "lr_patch": 6, "seed": 3}


def test_crops_have_the_bits_by_every_input(folder, tmp_path, monkeypatch):
  pytest.importorskip("tensorflow")
  pack = pack_of(folder, tmp_path / "cache")
  monkeypatch.setattr(device_input, "SEGMENT_VALUES", 5999)
  monkeypatch.setattr(device_input, "CHUNK_BYTES", 700)
  mesh = sharding.create_mesh()
  lr, hr = sampling.cut_batch(pack, 7, **CROPS)
  assert lr.dtype == hr.dtype == np.uint16
  image, y, x, turned = (part[0] for part in sampling.example_plan(
    np, 3, *sampling.batch_positions(7, 8, 5), pack.lr_sizes, 6
  ))  # fmt: skip
  crop = hr_image(pack, image)[4 * y : 4 * y + 24, 4 * x : 4 * x + 24]
  np.testing.assert_array_equal(hr[0], sampling.apply_dihedral(crop, turned))
  streams = [
    device_input.make_cutter(pack, sharding=sharding.batch_sharded(mesh), placement=place, **CROPS)
    for place in ("replicated", "sharded")
  ]
  batches = [jax.jit(cut)(arrays, 7) for arrays, cut in streams]
  batches.append(next(tf_input.make_tf_input(pack, start_step=7, **CROPS)))
  for batch in batches:
    for key, expected in (("lr", lr), ("hr", hr)):
      assert batch[key].dtype == np.uint16
      np.testing.assert_array_equal(batch[key], expected)
  bytes_each = 3 * 8 * 36 * 17
  assert tf_input.ram_bytes(pack, batch_size=8, lr_patch=6, threads=1) == 2 * bytes_each * (
    2 + 4 + 1
  )


def test_crops_with_detail_are_those_of_8_bits(folder, tmp_path):
  images = [hr_image(pack_of(folder, tmp_path / "cache"), i) for i in range(5)]
  small = packing.pack_from_arrays(
    [((image.astype(int) + 128) // 257).astype(np.uint8) for image in images], 1
  )
  large = packing.pack_from_arrays(images, 1)
  assert large.hr.dtype == np.uint16
  np.testing.assert_array_equal(measure(large).sums, measure(small).sums)


def test_degraded_lr_has_the_bits_of_its_hr(folder, tmp_path):
  """On 1 and 8 devices; and HR of 8 bits, widened, is degraded as it was, to finer levels."""
  config = esrgan_psnr.get_config("demo")
  config.data.degradation, config.data.rotate = "bsr_light", False
  config.data.batch_size, config.data.hr_patch, config.data.degraded_crop = 8, 16, 40
  config.data.degraded_share = 0.7
  pack = pack_of(folder, tmp_path / "cache")
  lr, hr = sampling.cut_batch(pack, 0, batch_size=8, lr_patch=10, seed=0)

  def prepared(lr, hr, devices):
    mesh = sharding.create_mesh(jax.devices()[:devices])
    prepare = make_preparation(config, mesh)
    return jax.device_get(jax.jit(prepare)(sharding.global_batch(mesh, {"lr": lr, "hr": hr}), 0))

  one, eight = prepared(lr, hr, 1), prepared(lr, hr, 8)
  for key in ("lr", "hr"):
    assert one[key].dtype == np.uint16
    np.testing.assert_array_equal(one[key], eight[key])
  assert (one["lr"] % 257 != 0).mean() > 0.9
  coarse = [((image.astype(int) + 128) // 257).astype(np.uint8) for image in (lr, hr)]
  wide = prepared(*(image.astype(np.uint16) * 257 for image in coarse), 1)
  small = prepared(*coarse, 1)
  assert small["lr"].dtype == np.uint8
  assert np.abs(wide["lr"] / 257 - small["lr"]).max() <= 0.51


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_network_sees_parts_of_65535(folder, tmp_path, channels):
  """The loss of a first step is that of the crops divided by 65535, or of their luma."""
  fields = {
    "data.source": folder, "data.cache_dir": tmp_path / "cache", "data.input": "device",
    "data.channels": channels, "data.hr_patch": 16, "data.batch_size": 8, "data.hold_out": 5,
    "generator.name": "residualnet", "generator.kwargs.features": 4, "generator.kwargs.blocks": 1,
    "eval.source": "", "eval.lpips": False, "log.every_steps": 1, "log.tensorboard": False,
    "learning_rate.schedule": "constant", "checkpoint.best_metric": "", "total_steps": 1,
  }  # fmt: skip
  config = main.read_config("esrgan_psnr:demo", [f"--config.{k}={v}" for k, v in fields.items()])
  assert train_and_evaluate(config, tmp_path / "run") == ""
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  (told,) = (line["loss/pixel"] for line in lines if "loss/pixel" in line)
  assert any("psnr_y" in str(line) for line in lines)  # of the image that is held out, in 8 bits

  train, _ = hold_out(sources.open_source(str(folder), keep_grey=True), 5)
  pack = packing.build_pack(train, 4, str(tmp_path / "cache"))
  assert len(pack.names) == 4 and len(list((tmp_path / "cache").iterdir())) == 2
  crops = sampling.cut_batch(pack, 0, batch_size=8, lr_patch=4, seed=config.seed)
  lr, hr = (image.astype(np.float64) / 65535 for image in crops)
  if channels == 1:
    weights = np.array([0.299, 0.587, 0.114])
    lr, hr = (np.floor(image @ weights * 65535 + 0.5)[..., None] / 65535 for image in (lr, hr))
  networks = recipe.build_networks(config, sharding.create_mesh(jax.devices()[:1]))
  state = recipe.create_state(config, networks)
  sr = networks.generator.apply({"params": state.generator.params}, np.float32(lr), train=False)
  # Of 65536 instead of 65535 it would differ by 1.5e-5.
  np.testing.assert_allclose(told, np.abs(np.asarray(sr, np.float64) - hr).mean(), rtol=4e-6)
