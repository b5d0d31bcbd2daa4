"""Degradations within the step: the same examples wherever and whenever they are made."""
# ruff: noqa: F811  (fixtures of tiny_runs are imported by name)

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from configs import esrgan_psnr
from sr_jax import UserError
from sr_jax.data import device_input
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.data.degrade.sharpen import sharpen
from sr_jax.machine import sharding
from sr_jax.training import preview
from sr_jax.training.inputs import make_preparation, open_batches
from sr_jax.training.run import train_and_evaluate
from sr_jax.training.stage import find, open_stage, pack_images
from sr_jax.training.terms import make_losses
from tiny_runs import assert_same_run, Killed, killed_after
from tiny_runs import photographs, shared_programs, tiny  # noqa: F401  (fixtures)

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Small enough for the photographs of tiny_runs: 11 of 56 pixels are left at a factor of 0.2.
SMALL = {"data.degraded_crop": 56, "data.real_esrgan.first.resize": (0.2, 1.5)}
STEP = 3


def config_of(degradation: str, **overrides):
  config = esrgan_psnr.get_config("demo")
  config.data.degradation = degradation
  config.data.batch_size, config.data.hr_patch, config.seed = 8, 32, 2**32 - 1
  config.data.rotate = False
  config.update_from_flattened_dict({**SMALL, **overrides})
  return config


@functools.cache
def pack():
  image = skimage.data.astronaut()
  return packing.pack_from_arrays([image[i * 60 :][:80, i * 50 :][:, :88] for i in range(5)], 4)


def batch(config, devices: int, by_host: bool, step: int = STEP) -> dict[str, np.ndarray]:
  """The batch of a step, as the training step makes it."""
  mesh = sharding.create_mesh(jax.devices()[:devices])
  crop = {"batch_size": 8, "lr_patch": 14, "seed": config.seed, "symmetries": 2}
  prepare = make_preparation(config, mesh)
  if by_host:
    lr, hr = sampling.cut_batch(pack(), step, **crop)
    images = sharding.global_batch(mesh, {"lr": lr, "hr": hr})
  else:
    images, cut = device_input.make_cutter(pack(), sharding=sharding.batch_sharded(mesh), **crop)
    prepare = dataclasses.replace(prepare, cut=cut)
  return jax.device_get(jax.jit(prepare)(images, np.int32(step)))


def test_the_same_batch_on_any_devices_by_any_input():
  """And where an example is not degraded, its LR patch is the source's, below the HR patch."""
  config = config_of("bsr_light", **{"data.degraded_share": 0.6})
  made, same = batch(config, 1, by_host=False), batch(config, 8, by_host=True)
  for key, side in (("lr", 8), ("hr", 32)):
    assert made[key].shape == (8, side, side, 3) and made[key].dtype == np.uint8
    np.testing.assert_array_equal(made[key], same[key])
  lr, hr = sampling.cut_batch(
    pack(), STEP, batch_size=8, lr_patch=14, seed=config.seed, symmetries=2
  )
  draw = jax.jit(make_preparation(config, sharding.create_mesh(jax.devices()[:1])).draw)
  examples = [draw(np.uint32(STEP), np.uint32(row)) for row in range(8)]
  for row, example in enumerate(examples):
    y, x = int(example.y), int(example.x)
    np.testing.assert_array_equal(made["hr"][row], hr[row, 4 * y : 4 * y + 32, 4 * x : 4 * x + 32])
    own = lr[row, y : y + 8, x : x + 8]
    assert (made["lr"][row] == own).all() != bool(example.degraded)
  assert {bool(example.degraded) for example in examples} == {True, False}
  assert len({(int(example.y), int(example.x)) for example in examples}) > 4


def test_the_share_of_degraded_examples_and_their_places():
  config = config_of("bsr_light", **{"data.degraded_share": 0.3})
  prepare = make_preparation(config, sharding.create_mesh(jax.devices()[:1]))
  steps, rows = np.divmod(np.arange(20_000, dtype=np.uint32), np.uint32(8))
  drawn = jax.jit(jax.vmap(prepare.draw))(steps, rows)
  assert abs(np.mean(drawn.degraded) - 0.3) < 0.013
  for place in (drawn.y, drawn.x):
    counts = np.bincount(place, minlength=7)
    assert len(counts) == 7 and abs(counts / 20_000 - 1 / 7).max() < 0.01
  # Each example has its own: no two have the same numbers.
  assert len(np.unique(drawn.draws.first.sigma)) > 19_900


def test_a_preview_shows_what_the_step_makes():
  config = config_of("bsr_light", **{"data.degraded_share": 0.6})
  made = batch(config, 1, by_host=True)
  first = STEP * 8 + 2
  shown = list(preview.examples(config, pack(), first, 5))
  for row, each in enumerate(shown, 2):
    np.testing.assert_array_equal(each.lr, made["lr"][row])
    np.testing.assert_array_equal(each.hr, made["hr"][row])
  lines = list(preview.draws_in_words(config, first, 5))
  assert lines == [each.lines for each in shown]
  assert lines[0][0] == f"example {first}: step {STEP}, row 2"
  draw = jax.jit(make_preparation(config, sharding.create_mesh(jax.devices()[:1])).draw)
  for row, said in enumerate(lines, 2):
    drawn = draw(np.uint32(STEP), np.uint32(row))
    first = drawn.draws.first
    assert ("LR of the source" in said) != bool(drawn.degraded)
    quality = f"JPEG, quality {first.quality:.0f}"
    assert (quality in said) == bool(drawn.degraded & first.compressed)
    assert said[-1] == f"patch at LR {drawn.y}, {drawn.x}"
  sheet = preview.sheet(shown)
  assert sheet.shape[0] % 5 == 0 and (sheet[4:36, 4:36] == shown[0].hr).all()


def degraded_run(photographs, **overrides):
  return tiny(photographs, **{
    f"psnr.{name}": value
    for name, value in {
      **SMALL, "data.degradation": "real_esrgan", "pixel.sharpened": True, **overrides
    }.items()
  }).psnr  # fmt: skip


@pytest.mark.slow  # the batch is a function of seed and step, which the tests above have
def test_killed_and_resumed_with_degradations(photographs, tmp_path, monkeypatch):
  config = degraded_run(photographs)
  train_and_evaluate(config, tmp_path / "whole")
  killed_after(monkeypatch, 3)
  with pytest.raises(Killed):
    train_and_evaluate(config, tmp_path / "run")
  monkeypatch.undo()
  train_and_evaluate(config, tmp_path / "run")
  assert_same_run(tmp_path / "run", tmp_path / "whole", config)


def test_images_smaller_than_the_crop_are_refused_with_a_crop_that_fits(photographs, tmp_path):
  config = degraded_run(photographs, **{"data.degraded_crop": 400})

  def pack_of(config):
    stage = open_stage(config, tmp_path / "run")
    found, problems = find(stage)
    assert problems == []
    return pack_images(stage, found)

  with pytest.raises(UserError, match=r"try --config.data.degraded_crop=\d+") as error:
    pack_of(config)
  side = int(str(error.value).partition("degraded_crop=400")[2].partition("crop=")[2].split(".")[0])
  assert 56 <= side <= 72
  pack_of(degraded_run(photographs, **{"data.degraded_crop": side}))


def test_terms_compare_with_the_sharpened_image_where_they_are_told_to():
  hr = (skimage.data.astronaut()[:64, 150:214] / 255).astype(np.float32)[None]

  class Same:
    def apply(self, variables, image, **_):
      return image, {}

  def pixel(**options):
    losses = make_losses(
      Same(), None, {"pixel": 1.0}, lambda a, b: jnp.mean(jnp.abs(a - b)), None, None, **options
    )
    (loss, _), _ = losses(None, None, {}, {}, hr, hr, None, None)
    return float(loss)

  assert pixel() == 0 == pixel(sharpened=("adversarial",))
  expected = float(np.abs(np.asarray(sharpen(hr)) - hr).mean())
  assert expected > 1e-3
  assert pixel(sharpened=("pixel",)) == pytest.approx(expected, rel=1e-5)


PROCESS = """
import json, os, sys
sys.path[:0] = ["tests", "tests/training"]
import conftest, jax, numpy as np
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
index, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, index)
import degradation_test as tests
from sr_jax.machine import sharding
print(json.dumps(tests.digests_here()))
"""


def digests_here() -> dict[str, str]:
  """{input, image and row: sha256} of what this process has of a batch, over all devices."""
  config = config_of("real_esrgan", **{"data.degraded_share": 0.8})
  mesh, found = sharding.create_mesh(), {}
  crop = {"batch_size": 8, "lr_patch": 14, "seed": config.seed, "symmetries": 2}
  share = 8 // jax.process_count()
  start = jax.process_index() * share
  lr, hr = sampling.cut_batch(pack(), STEP, start=start, stop=start + share, **crop)
  arrays, cut = device_input.make_cutter(pack(), sharding=sharding.batch_sharded(mesh), **crop)
  for name, images, how in (
    ("host", sharding.global_batch(mesh, {"lr": lr, "hr": hr}), None),
    ("device", arrays, cut),
  ):
    prepare = dataclasses.replace(make_preparation(config, mesh), cut=how)
    for key, array in jax.jit(prepare)(images, np.int32(STEP)).items():
      for shard in array.addressable_shards:
        for i, image in enumerate(np.asarray(shard.data)):
          row = (shard.index[0].start or 0) + i
          found[f"{name} {key} {row}"] = hashlib.sha256(image.tobytes()).hexdigest()
  return found


@pytest.mark.slow
def test_two_processes_make_the_same_batch():
  with socket.socket() as found:
    found.bind(("localhost", 0))
    port = str(found.getsockname()[1])
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROCESS, str(index), port],
      cwd=ROOT, stdout=subprocess.PIPE, env={**os.environ},
    )
    for index in range(2)
  ]  # fmt: skip
  parts = [
    json.loads(process.communicate(timeout=400)[0].splitlines()[-1]) for process in processes
  ]
  assert not set(parts[0]) & set(parts[1])
  here = digests_here()
  assert parts[0] | parts[1] == here and len(here) == 32
  for row in range(8):
    for key in ("lr", "hr"):
      assert here[f"host {key} {row}"] == here[f"device {key} {row}"]


@pytest.mark.slow
def test_tf_data_feeds_the_same_batch():
  pytest.importorskip("tensorflow", reason="tf.data needs TensorFlow")
  config = config_of("real_esrgan", **{"data.input": "tf"})
  mesh = sharding.create_mesh()
  batches, prepare = open_batches(config, pack(), STEP, mesh)
  fed = jax.device_get(jax.jit(prepare)(next(batches), np.int32(STEP)))
  expected = batch(config, 1, by_host=False)
  for key, images in fed.items():
    np.testing.assert_array_equal(images, expected[key])
