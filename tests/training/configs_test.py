"""Recipes against the papers' numbers, and what the command line makes of them."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import pytest

from configs import common
from sr_jax import main
from sr_jax.networks.build import DISCRIMINATORS, GENERATORS
from sr_jax.training import losses
from sr_jax.training import schedules

RECIPES = ("srresnet", "srgan", "esrgan_psnr", "esrgan")
VARIANTS = ("", "basicsr", "demo")  # and residual, of ESRGAN's


def load(recipe: str, variant: str = "") -> config_dict.ConfigDict:
  return importlib.import_module(f"configs.{recipe}").get_config(variant)


def rate(config, step: int) -> float:
  return float(schedules.make_schedule(**config.learning_rate)(jnp.int32(step)))


# (steps, batch, HR patch, generator, beta1, beta2) of SRGAN section 3.2; ESRGAN section 4.1 and its
# supplement, section 4; BasicSR's options 001, 004, 051, 052.
@pytest.mark.parametrize(
  "recipe, variant, steps, patch, generator, betas",
  [
    ("srresnet", "", 1_000_000, 96, "srresnet", (0.9, 0.999)),
    ("srgan", "", 200_000, 96, "srresnet", (0.9, 0.999)),
    ("esrgan_psnr", "", 1_000_000, 192, "rrdbnet", (0.9, 0.999)),
    ("esrgan", "", 400_000, 128, "rrdbnet", (0.9, 0.999)),
    ("srresnet", "basicsr", 1_000_000, 128, "msrresnet", (0.9, 0.99)),
    ("srgan", "basicsr", 400_000, 128, "msrresnet", (0.9, 0.99)),
    ("esrgan_psnr", "basicsr", 1_000_000, 128, "rrdbnet", (0.9, 0.99)),
    ("esrgan", "basicsr", 400_000, 128, "rrdbnet", (0.9, 0.99)),
  ],
)
def test_numbers_of_the_recipes(recipe, variant, steps, patch, generator, betas):
  config = load(recipe, variant)
  assert config.total_steps == steps
  assert config.data.batch_size == 16
  assert config.data.hr_patch == patch
  assert config.generator.name == generator
  assert (config.optimizer.b1, config.optimizer.b2) == betas
  assert config.ema.decay == 0.999 and not config.ema.warmup
  assert config.optimizer.clip_norm == 0
  assert config.scale == 4


@pytest.mark.parametrize(
    "recipe, variant, expected",
    [
        ("srresnet", "", [(0, 1e-4), (999_999, 1e-4)]),
        ("srgan", "", [(0, 1e-4), (99_999, 1e-4), (100_000, 1e-5), (199_999, 1e-5)]),
        (
            "esrgan_psnr",
            "",
            [
                (0, 2e-4), (199_999, 2e-4), (200_000, 1e-4), (200_001, 1e-4),
                (399_999, 1e-4), (400_000, 5e-5), (599_999, 5e-5), (600_000, 2.5e-5),
                (799_999, 2.5e-5), (800_000, 1.25e-5), (999_999, 1.25e-5),
            ],
        ),
        (
            "esrgan",
            "",
            [
                (0, 1e-4), (49_999, 1e-4), (50_000, 5e-5), (50_001, 5e-5),
                (99_999, 5e-5), (100_000, 2.5e-5), (199_999, 2.5e-5), (200_000, 1.25e-5),
                (299_999, 1.25e-5), (300_000, 6.25e-6), (399_999, 6.25e-6),
            ],
        ),
        (
            "esrgan_psnr",
            "basicsr",
            # The boundary itself is the end of a period; the next starts one step later.
            [
                (0, 2e-4), (125_000, 1.0005e-4), (249_999, 1e-7), (250_000, 1e-7),
                (250_001, 2e-4), (375_000, 1.0005e-4), (500_000, 1e-7), (500_001, 2e-4),
                (750_000, 1e-7), (750_001, 2e-4), (1_000_000, 1e-7),
            ],
        ),
        ("srresnet", "basicsr", [(0, 2e-4), (250_000, 1e-7), (250_001, 2e-4)]),
        ("esrgan", "basicsr", [(49_999, 1e-4), (50_000, 5e-5), (300_000, 6.25e-6)]),
        ("srgan", "basicsr", [(49_999, 1e-4), (50_000, 5e-5), (300_000, 6.25e-6)]),
    ],
)  # fmt: skip
def test_learning_rate_around_each_milestone(recipe, variant, expected):
  config = load(recipe, variant)
  for step, value in expected:
    np.testing.assert_allclose(rate(config, step), value, rtol=1e-4, err_msg=str(step))


def test_losses_of_the_recipes():
  terms = lambda c: tuple(  # noqa: E731
    c[name].weight for name in ("pixel", "perceptual", "adversarial", "tv")
  )
  assert terms(load("srresnet")) == (4.0, 0, 0, 0)  # 4: MSE on [-1, 1]
  assert load("srresnet").pixel.loss == "mse"
  assert terms(load("esrgan_psnr")) == (1.0, 0, 0, 0)
  assert load("esrgan_psnr").pixel.loss == "l1"

  srgan = load("srgan")
  assert terms(srgan) == (0, 1.0, 1e-3, 0)
  assert tuple(srgan.perceptual.layers) == ("relu5_4:1.0",)
  assert srgan.perceptual.criterion == "mse"
  assert srgan.perceptual.feature_scale == 1 / 12.75
  assert srgan.perceptual.magnitude == "caffe"
  assert srgan.adversarial.loss == "vanilla"

  for variant, adversarial, loss, weight_d in (
    ("", 5e-3, "ragan", 1.0),
    ("basicsr", 2.5e-3, "ragan_detached", 0.5),
  ):
    esrgan = load("esrgan", variant)
    assert terms(esrgan) == (1e-2, 1.0, adversarial, 0)
    assert esrgan.pixel.loss == "l1" and esrgan.perceptual.criterion == "l1"
    assert tuple(esrgan.perceptual.layers) == ("conv5_4:1.0",)
    assert esrgan.perceptual.feature_scale == 1.0
    assert esrgan.perceptual.magnitude == "torchvision"
    assert (esrgan.adversarial.loss, esrgan.adversarial.discriminator_weight) == (loss, weight_d)
    assert esrgan.perceptual.weights == "hf:timm/vgg19.tv_in1k"
  assert terms(load("srgan", "basicsr")) == (1e-2, 1.0, 5e-3, 0)


def test_networks_of_the_recipes_are_the_papers():
  for recipe, expected in (
      ("srresnet", 1_549_462), ("srgan", 1_549_462),
      ("esrgan_psnr", 16_697_987), ("esrgan", 16_697_987),
  ):  # fmt: skip
    config = load(recipe)
    net = GENERATORS[config.generator.name](**config.generator.kwargs)
    shapes = jax.eval_shape(
      lambda net=net: net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == expected


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_word_of_a_recipe_is_known(recipe, variant):
  config = load(recipe, variant)
  stages = [config, config.psnr] if "psnr" in config else [config]
  for stage in stages:
    assert stage.generator.name in GENERATORS
    assert stage.discriminator.name in DISCRIMINATORS
    assert stage.pixel.loss in losses.PIXEL
    assert stage.adversarial.loss in losses.ADVERSARIAL
    assert stage.total_steps > 0
    assert not any(value is None for value in stage.to_dict().values())
    schedules.make_schedule(**stage.learning_rate)
  if "psnr" in config:
    assert config.psnr.generator == config.generator


def test_the_ablation_has_plain_blocks():
  for recipe in ("esrgan_psnr", "esrgan"):
    config = load(recipe, "residual")
    assert config.generator.name == "residualnet"
    assert config.generator.kwargs.blocks == 16
  assert load("esrgan", "residual").psnr.generator == load("esrgan", "residual").generator


def test_every_field_of_the_networks_can_be_set():
  for name, module in GENERATORS.items():
    fields = {
      field.name: field.default
      for field in dataclasses.fields(module)
      if field.name not in ("scale", "dtype", "kernels", "parent", "name")
    }
    assert common.generator(name).to_dict() == {"name": name, "kwargs": fields}


@pytest.mark.parametrize("recipe", RECIPES)
def test_unknown_variants_and_fields_are_refused(recipe):
  with pytest.raises(ValueError, match="basicsr, demo"):
    load(recipe, "nosuch")
  with pytest.raises(AttributeError, match="Did you mean"):
    load(recipe).lock().data.batchsize = 3


def test_overrides_reach_the_first_stage():
  config = load("esrgan")
  overrides = {
      "data.source": "photos", "data.hr_patch": 64, "generator.kwargs.blocks": 6, "seed": 3,
      "scale": 2, "psnr.data.batch_size": 4, "data.batch_size": 32, "total_steps": 7,
      "learning_rate.base": 1.0, "eval.source": "others", "eval.every_steps": 9,
      "optimizer.accumulate_steps": 4, "optimizer.b1": 0.5, "log.every_steps": 11,
      "log.tensorboard": False, "checkpoint.every_steps": 12, "checkpoint.every_minutes": 1.5,
      "checkpoint.keep": 5, "psnr.checkpoint.keep": 6,
  }  # fmt: skip
  config.update_from_flattened_dict(overrides)
  main.share_overrides(config, overrides)
  assert config.psnr.data.source == "photos"
  assert config.psnr.eval.source == "others"
  assert config.psnr.data.hr_patch == 64
  assert config.psnr.generator.kwargs.blocks == 6
  assert (config.psnr.seed, config.psnr.scale) == (3, 2)
  assert (config.psnr.data.batch_size, config.data.batch_size) == (4, 32)  # its own stands
  assert config.psnr.optimizer.accumulate_steps == 4
  assert (config.psnr.log.every_steps, config.psnr.log.tensorboard) == (11, False)
  assert (config.psnr.checkpoint.every_steps, config.psnr.checkpoint.every_minutes) == (12, 1.5)
  assert (config.psnr.checkpoint.keep, config.checkpoint.keep) == (6, 5)  # its own stands
  # What each stage has for itself.
  assert (config.psnr.total_steps, config.psnr.learning_rate.base) == (1_000_000, 2e-4)
  assert (config.psnr.eval.every_steps, config.psnr.optimizer.b1) == (5000, 0.9)


def test_own_photographs_alone_are_not_scored_on_the_recipes_data_set(caplog):
  config = load("esrgan")
  config.data.source = "photos"
  main.share_overrides(config, {"data.source": "photos"})
  assert config.eval.source == config.psnr.eval.source == ""
  demo = load("esrgan", "demo")
  main.share_overrides(demo, {"data.source": "photos"})
  assert demo.eval.source == "skimage:test"


def test_without_overrides_the_first_stage_is_its_recipe():
  config = load("esrgan")
  main.share_overrides(config, {})
  assert config.psnr == load("esrgan_psnr")
  assert (config.psnr.data.hr_patch, config.data.hr_patch) == (192, 128)


def test_default_workdir():
  assert main.default_workdir("configs/esrgan.py") == "runs/esrgan"
  assert main.default_workdir("configs/esrgan.py:demo") == "runs/esrgan-demo"
