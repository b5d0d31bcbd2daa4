"""Tests of sr_jax/data/mixing.py."""
# ruff: noqa: F811  (a fixture of tiny_runs is imported by name)

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiny_runs import photographs  # noqa: F401  (a fixture)

from sr_jax import main
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.data import sources
from sr_jax.data.mixing import Mixing
from sr_jax.images import resize
from sr_jax.machine import sharding
from sr_jax.training import recipe
from sr_jax.training.run import train_and_evaluate

MIXING = Mixing(seed=5, mixup=0.4, mixup_alpha=1.2, cutmix=0.4)
ROWS, HEIGHT, WIDTH, SCALE = 16, 12, 10, 4


def images(scale: int) -> np.ndarray:
  rng = np.random.default_rng(scale)
  return rng.random((ROWS, HEIGHT * scale, WIDTH * scale, 3), np.float32)


def by_hand(image: np.ndarray, mix, scale: int) -> np.ndarray:
  """What the papers say, an example at a time."""
  mixed = np.array(image)
  for row, (partner, share, top, left, height, width) in enumerate(zip(*mix, strict=True)):
    if share < 1:
      mixed[row] = share * image[row] + (1 - share) * image[partner]
    box = np.s_[top * scale : (top + height) * scale, left * scale : (left + width) * scale]
    mixed[row][box] = image[partner][box]
  return mixed


def test_lr_and_hr_are_mixed_as_by_hand():
  lr, hr = images(1), images(SCALE)
  seen = set()
  for step in range(3):
    mix = jax.device_get(MIXING.draw(step, ROWS, HEIGHT, WIDTH))
    mixed = jax.jit(MIXING)(lr, hr, step)
    for image, result, scale in zip((lr, hr), mixed, (1, SCALE), strict=True):
      np.testing.assert_allclose(result, by_hand(image, mix, scale), atol=2e-7)
      alone = (mix.share == 1) & (mix.height * mix.width == 0)
      np.testing.assert_array_equal(np.asarray(result)[alone], image[alone])
    seen |= {(bool(s < 1), bool(h)) for s, h in zip(mix.share, mix.height, strict=True)}
  assert seen == {(False, False), (True, False), (False, True)}  # and none has both


def test_what_is_drawn_is_as_the_papers_say():
  mix = jax.device_get(MIXING.draw(7, 40_000, 64, 48))
  blended, pasted = mix.share < 1, mix.height * mix.width > 0
  assert abs(blended.mean() - 0.4) < 0.01 and not (blended & pasted).any()
  assert abs(((mix.share < 1) | (mix.height > 0)).mean() - 0.8) < 0.02
  shares = mix.share[blended]
  assert abs(shares.mean() - 0.5) < 0.01
  assert abs(shares.var() - 1 / (4 * (2 * 1.2 + 1))) < 0.002  # Beta(1.2, 1.2)'s
  others = (mix.partner - np.arange(40_000)) % 40_000
  assert others.min() >= 1 and abs(others.mean() / 40_000 - 0.5) < 0.01  # never itself
  boxes = [part[pasted] for part in (mix.top, mix.left, mix.height, mix.width)]
  top, left, height, width = boxes
  assert (top >= 0).all() and (top + height <= 64).all()
  assert (left >= 0).all() and (left + width <= 48).all()
  whole = (top > 0) & (top + height < 64) & (left > 0) & (left + width < 48)
  np.testing.assert_allclose(height[whole] / 64, width[whole] / 48, atol=0.02)
  # A side sqrt(a) around a uniform place, cut at the borders: on average 2/3 - 1/8 of the side, as
  # the integral of s - s^2 / 4 over a = s^2 says. Empty boxes are not among those counted.
  assert abs((mix.height[mix.share == 1] / 64).mean() * 0.6 / 0.4 - (2 / 3 - 1 / 8)) < 0.02


@pytest.mark.parametrize("devices", [2, 8])
def test_the_same_on_any_devices_and_for_the_seed_and_the_step_alone(devices):
  lr, hr = images(1), images(SCALE)

  def on(count: int, mixing=MIXING, step: int = 3):
    mesh = sharding.create_mesh(jax.devices()[:count])
    split = sharding.batch_sharded(mesh)
    mixed = dataclasses.replace(mixing, sharding=split)
    batch = (jax.device_put(image, split) for image in (lr, hr))
    return jax.jit(mixed)(*batch, np.int32(step))

  one, many = on(1), on(devices)
  for ours, theirs in zip(one, many, strict=True):
    assert len(theirs.addressable_shards) == devices
    assert theirs.addressable_shards[0].data.shape[0] == ROWS // devices
    np.testing.assert_array_equal(ours, theirs)
  for other in (on(1, step=4), on(1, dataclasses.replace(MIXING, seed=6))):
    assert (np.asarray(other[0]) != np.asarray(one[0])).any()


def test_mixed_lr_is_the_lr_of_mixed_hr():
  """Up to rounding; along the edges of a box alone LR does not know the other side."""
  hr = jnp.asarray(images(SCALE))
  lr = resize.downsample(hr, 1 / SCALE)
  mix = jax.device_get(MIXING.draw(0, ROWS, HEIGHT, WIDTH))
  mixed_lr, mixed_hr = jax.jit(MIXING)(lr, hr, 0)
  difference = np.abs(np.asarray(resize.downsample(mixed_hr, 1 / SCALE) - mixed_lr)).max(axis=-1)
  inner = 0
  for row in range(ROWS):
    top, left, height, width = (int(part[row]) for part in mix[2:])
    if not height * width:
      assert difference[row].max() < 1e-5
      continue
    far = np.ones((HEIGHT, WIDTH), bool)
    far[max(top - 2, 0) : top + height + 2, max(left - 2, 0) : left + width + 2] = False
    low = [first and first + 2 for first in (top, left)]  # no edge where the image ends
    high = [last if last == side else last - 2
            for last, side in ((top + height, HEIGHT), (left + width, WIDTH))]  # fmt: skip
    far[low[0] : high[0], low[1] : high[1]] = True
    assert difference[row][far].max(initial=0) < 1e-5
    inner += far[low[0] : high[0], low[1] : high[1]].size
  assert inner > 20


def settings(photographs, tmp_path, **more):
  fields = {
    "data.source": photographs, "data.cache_dir": tmp_path / "cache", "data.input": "device",
    "data.hr_patch": 32, "data.batch_size": 8, "eval.source": "", "checkpoint.best_metric": "",
    "generator.name": "residualnet", "generator.kwargs.features": 4, "generator.kwargs.blocks": 1,
    "learning_rate.schedule": "constant", "log.every_steps": 1, "log.tensorboard": False,
    "total_steps": 1, **more,
  }  # fmt: skip
  return [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.mark.slow
def test_a_run_trains_on_mixed_examples(photographs, tmp_path):
  mixed = {"data.mixup": 0.5, "data.cutmix": 0.5, "seed": 3}
  config = main.read_config("esrgan_psnr:demo", settings(photographs, tmp_path, **mixed))
  assert train_and_evaluate(config, tmp_path / "run") == ""
  lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  (told,) = (line["loss/pixel"] for line in lines if "loss/pixel" in line)
  pack = packing.build_pack(
    sources.open_source(str(photographs), keep_grey=True), 4, str(tmp_path / "cache")
  )
  crops = sampling.cut_batch(pack, 0, batch_size=8, lr_patch=8, seed=3)
  mesh = sharding.create_mesh(jax.devices()[:1])
  mixing = recipe.make_mixing(config, mesh)
  mix = jax.device_get(mixing.draw(0, 8, 8, 8))
  lr, hr = (by_hand(np.float32(c) / 255, mix, s) for c, s in zip(crops, (1, 4), strict=True))
  networks = recipe.build_networks(config, mesh)
  params = recipe.create_state(config, networks).generator.params
  sr = np.asarray(networks.generator.apply({"params": params}, lr, train=False))
  np.testing.assert_allclose(told, np.abs(sr - hr).mean(), rtol=1e-4)
  plain = networks.generator.apply({"params": params}, np.float32(crops[0]) / 255, train=False)
  assert abs(np.abs(np.asarray(plain) - np.float32(crops[1]) / 255).mean() / told - 1) > 0.01


def test_settings_that_mix_nothing_or_too_much_are_refused(photographs, tmp_path):
  for fields, remedy in (
    ({"data.mixup": 0.7, "data.cutmix": 0.4}, "--config.data.cutmix=0.3"),
    ({"data.mixup": 0.7, "data.batch_size": 1}, "--config.data.mixup=0.0"),
  ):
    flags = settings(photographs, tmp_path, **fields)
    with pytest.raises(ValueError, match=remedy):
      main.read_config("esrgan_psnr:demo", flags)
    main.read_config("esrgan_psnr:demo", [*flags, remedy])
  assert recipe.make_mixing(main.read_config("esrgan:demo", []), None) is None


def test_the_settings_of_a_recipe_reach_the_mixing(photographs, tmp_path):
  given = {"seed": 7, "data.mixup": 0.3, "data.mixup_alpha": 0.9, "data.cutmix": 0.2}
  config = main.read_config("esrgan_psnr:demo", settings(photographs, tmp_path, **given))
  mesh = sharding.create_mesh(jax.devices()[:2])
  expected = Mixing(7, 0.3, 0.9, 0.2, sharding.batch_sharded(mesh))
  assert recipe.make_mixing(config, mesh) == expected
