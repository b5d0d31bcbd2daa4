"""Recipes against the papers' numbers, and what the command line makes of them."""

import dataclasses
import importlib
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np
import pytest

from configs import common
from sr_jax import UserError
from sr_jax import main
from sr_jax.kernels import choose
from sr_jax.machine import memory
from sr_jax.machine import sharding
from sr_jax.networks.build import DISCRIMINATORS, GENERATORS
from sr_jax.runs.settings import flat
from sr_jax.training import fields
from sr_jax.training import losses
from sr_jax.training import recipe as recipes
from sr_jax.training import schedules
from sr_jax.training.degradation import read_settings
from sr_jax.training.terms import TERMS, Adversarial

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
  for recipe, variant in itertools.product(RECIPES, ("", "basicsr")):
    others = set(TERMS) - {"pixel", "perceptual", "adversarial"}
    assert not any(load(recipe, variant)[term].weight for term in others)
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


def test_ldl_is_esrgan_as_released_with_one_more_term():
  """Section 4.1 of LDL's paper, and its released options."""
  config, esrgan = load("ldl"), load("esrgan", "basicsr")
  assert (config.total_steps, config.data.batch_size, config.data.hr_patch) == (300_000, 64, 128)
  assert (config.optimizer.b1, config.optimizer.b2) == (0.9, 0.99)
  assert [rate(config, step) for step in (0, 299_999)] == pytest.approx([1e-4, 1e-4])
  assert config.ldl.weight == 1.0 and config.ema.decay == 0.999
  assert tuple(config.perceptual.layers) == (
    "conv1_2:0.1", "conv2_2:0.1", "conv3_4:1.0", "conv4_4:1.0", "conv5_4:1.0",
  )  # fmt: skip
  for same in ("pixel", "adversarial", "generator", "discriminator", "psnr"):
    assert config[same] == esrgan[same]
  demo = load("ldl", "demo")
  assert demo.ldl.weight == 1.0 and demo.adversarial == config.adversarial
  assert (demo.psnr, demo.data) == (load("esrgan", "demo").psnr, load("esrgan", "demo").data)
  with pytest.raises(ValueError, match="demo"):
    load("ldl", "basicsr")


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


def test_what_is_set_reaches_the_step():
  config = main.read_config("esrgan:demo", [
    "--config.perceptual.weight=0", "--config.adversarial.scope=replica",
    "--config.adversarial.discriminator_weight=0.25", "--config.discriminator.warmup_steps=3",
    "--config.discriminator.steps_per_generator_step=2", "--config.discriminator.rest_above=2.5",
    "--config.learning_rate.base=1e-3", "--config.learning_rate.warmup_steps=10",
    "--config.data.channels=1", "--config.freeze=conv_hr",
  ])  # fmt: skip
  mesh = sharding.create_mesh(jax.devices()[:4])
  arguments = recipes.step_arguments(config, recipes.build_networks(config, mesh), mesh, None)
  assert arguments["adversarial"] == Adversarial(
    losses.ADVERSARIAL["ragan"],
    discriminator_weight=0.25,
    warmup_steps=3,
    steps_per_generator_step=2,
    rest_above=2.5,
    replicas=4,
  )
  np.testing.assert_allclose(arguments["learning_rate"](jnp.int32(1)), 2e-4, rtol=1e-6)
  assert arguments["grey"] and arguments["mix"] is None
  frozen = {
    path for path, mask in flat(arguments["frozen"]["params"]).items() if np.asarray(mask).any()
  }
  assert frozen == {"conv_hr.kernel", "conv_hr.bias"}


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


@pytest.mark.parametrize(
  "gpus, ram, batch, patch",
  [
    ([81_559], 8, 16, 128), ([24_576], 8, 16, 128), ([15_360], 8, 8, 128),
    ([40_960, 8_192], 8, 8, 96), ([4_096], 8, 4, 96), ([2_048], 64, 4, 64),
    ([], 24, 8, 96), ([], 8, 4, 96), ([], 4, 4, 64), ([], 0, 8, 96),
  ],
)  # fmt: skip
def test_batch_and_crops_of_photos_follow_the_memory(monkeypatch, gpus, ram, batch, patch):
  """MiB of GPUs, the smallest of which decides; else GiB of the machine, 0 where nobody knows."""
  found = [memory.Gpu("a GPU", mib, 0, 550) for mib in gpus]
  monkeypatch.setattr(memory, "jax_may_use_gpus", lambda: True)
  monkeypatch.setattr(memory, "nvidia_gpus", lambda: (found, ""))
  monkeypatch.setattr(memory, "memory", lambda: (1, ram * 2**30))
  config = main.read_config("esrgan:photos")
  assert (config.data.batch_size, config.data.hr_patch) == (batch, patch)
  assert "psnr" not in config and config.generator.kwargs.growth == 32
  usable = 0.75 * min(gpus) * 2**20 if gpus else 0.5 * ram * 2**30 or 5e9
  pixels = usable / 5e9 * 8 * 96**2  # what fits by the rule
  assert batch * patch**2 <= pixels or (batch, patch) == (4, 64)


@pytest.mark.parametrize(
  "flags, gpus, left_out, dtype",
  [
    ("avx512f avx512_bf16 amx_bf16", [], "", "bfloat16"),
    ("avx512f avx512_bf16", [], "0", "float32"),
    ("avx512f avx512_bf16", [8000], "", "float32"),
    ("avx2 avx512f", [], "", "float32"),
  ],
)
def test_photos_compute_in_what_the_cpu_has(monkeypatch, flags, gpus, left_out, dtype):
  found = [memory.Gpu("a GPU", mib, 0, 550) for mib in gpus]
  monkeypatch.setattr(memory, "jax_may_use_gpus", lambda: True)
  monkeypatch.setattr(memory, "nvidia_gpus", lambda: (found, ""))
  monkeypatch.setenv("SR_JAX_ONEDNN", left_out)
  read_text = pathlib.Path.read_text
  monkeypatch.setattr(
    pathlib.Path, "read_text",
    lambda path, *how: f"flags: {flags}" if str(path) == "/proc/cpuinfo" else read_text(path, *how),
  )  # fmt: skip
  choose.has_bfloat16.cache_clear()
  try:
    assert main.read_config("esrgan:photos").dtype == dtype
    assert main.read_config("realesrgan:photos").dtype == dtype
    assert main.read_config("esrgan").dtype == "float32"
  finally:
    choose.has_bfloat16.cache_clear()


def test_gpus_that_jax_would_not_use_do_not_count(monkeypatch):
  monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
  for name, value, may in (
    ("JAX_PLATFORMS", "", True), ("JAX_PLATFORMS", "cpu", False),
    ("JAX_PLATFORMS", "cuda,cpu", True),
    ("CUDA_VISIBLE_DEVICES", "", False), ("CUDA_VISIBLE_DEVICES", "1", True),
  ):  # fmt: skip
    with monkeypatch.context() as patched:
      patched.delenv("JAX_PLATFORMS", raising=False)
      patched.delenv("CUDA_VISIBLE_DEVICES", raising=False)
      patched.setenv(name, value)
      assert memory.jax_may_use_gpus() == may, (name, value)
  monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
  assert not memory.jax_may_use_gpus()


def test_a_schedule_that_nobody_set_follows_the_number_of_steps():
  """Shares of the paper's run, by hand; ends of periods and not their lengths are rounded."""
  longer = main.read_config("esrgan", ["--config.total_steps=600000"])
  assert longer.learning_rate.milestones == (75_000, 150_000, 300_000, 450_000)
  assert longer.psnr.learning_rate.milestones == (200_000, 400_000, 600_000, 800_000)
  first = main.read_config("esrgan:basicsr", ["--config.psnr.total_steps=3000"])
  assert first.psnr.learning_rate.periods == (750,) * 4
  assert first.learning_rate.milestones == (50_000, 100_000, 200_000, 300_000)
  odd = main.read_config("esrgan_psnr:basicsr", ["--config.total_steps=10"])
  assert odd.learning_rate.periods == (3, 2, 3, 2)  # ends 2.5, 5, 7.5, 10
  few = main.read_config("esrgan_psnr:basicsr", ["--config.total_steps=2"])
  assert few.learning_rate.periods == (1, 1)
  demo = main.read_config("esrgan:demo", ["--config.psnr.total_steps=3000"])
  assert demo.psnr.learning_rate.periods == (3000,)
  assert main.read_config("esrgan").learning_rate.milestones == (50_000, 100_000, 200_000, 300_000)


@pytest.mark.parametrize("recipe", ["esrgan:demo", "srgan:demo", "esrgan_psnr:basicsr"])
@pytest.mark.parametrize("steps", [1, 859_000, 2**31 - 1])
def test_any_number_of_steps_is_taken(recipe, steps):
  """Milestones that a schedule does not read are not stretched beyond what can be counted."""
  config = main.read_config(recipe, [f"--config.total_steps={steps}"])
  assert config.total_steps == steps
  rate = config.learning_rate
  if rate.schedule == "cosine_restarts" and rate.periods:
    assert sum(rate.periods) == steps
  other = main.read_config(recipe, [f"--config.total_steps={steps}",
                                    "--config.learning_rate.schedule=multi_step"])  # fmt: skip
  assert all(1 <= step < 2**31 for step in other.learning_rate.milestones)


def test_a_schedule_that_somebody_set_stays_as_it_is():
  config = main.read_config(
    "esrgan", ["--config.total_steps=600000", "--config.learning_rate.milestones=(1,2)"]
  )
  assert config.learning_rate.milestones == (1, 2)
  periods = ["--config.psnr.total_steps=10", "--config.psnr.learning_rate.periods", "(4,6)"]
  assert main.read_config("esrgan:demo", periods).psnr.learning_rate.periods == (4, 6)


def test_a_recipe_of_ones_own_imports_its_neighbours_first(tmp_path, monkeypatch):
  """`configs` is the recipe's folder, then that of the recipes that come with sr_jax."""
  (tmp_path / "esrgan_psnr.py").write_text(
    "from configs import common\n\ndef get_config(variant=''):\n"
    "  config = common.get_config()\n  config.total_steps = 77\n  config.pixel.weight = 1.0\n"
    "  return config\n"
  )
  (tmp_path / "mine.py").write_text("from configs.esrgan import get_config\n")
  monkeypatch.chdir(tmp_path)
  assert main.read_config("mine.py").psnr.total_steps == 77
  assert main.read_config("esrgan").psnr.total_steps == 1_000_000
  assert main.read_config("esrgan").to_dict() == load("esrgan").to_dict()
  (tmp_path / "none.py").write_text("")
  with pytest.raises(ValueError, match="none.py is no recipe: it must have a function get_config"):
    main.read_config("none.py")


@pytest.mark.parametrize(
  "recipe, overrides, message",
  [
    ("esrgam", [], "did you mean --config esrgan?"),
    ("esrgam:demo", [], "did you mean --config esrgan:demo?"),
    ("ESRGAN:photos", [], "did you mean --config esrgan:photos?"),
    ("configs/esrgann.py:demo", [], "did you mean --config esrgan:demo?"),
    ("esrgan-demo", [], "did you mean --config esrgan:demo?"),
    ("esrgan/demo", [], "did you mean --config esrgan:demo?"),
    ("swinir", [], "give one of demo, esrgan, esrgan_psnr, ldl, realesrgan, srgan, srresnet, or"),
    ("configs", [], "give one of demo, esrgan"),
    ("esrgan.py", [], "did you mean --config esrgan?"),
    ("esrgan.yaml:demo", [], "did you mean --config esrgan:demo?"),
    ("./srgan.py", [], "did you mean --config srgan?"),
    ("esrgam:dmo", [], "did you mean the recipe esrgan? --config=esrgan:dmo: variant 'dmo'"),
    (":demo", [], "give one of demo"),
    (".", [], "give one of demo"),
    ("/", [], "give one of"),
    ("esrgan", ["--noconfig.ema.warmup", "true"], "takes no value; try --config.ema.warmup=false"),
    ("esrgan", ["--noconfig.data.source"], "fields that are true or false; try --config.data"),
    ("esrgan", ["--noconfig.foo"], "--noconfig.foo: there is no such field"),
    ("README.md", [], "this is no .py"),
    ("x" * 300, [], "there is no such file"),
    ("a\nb", [], "a\\nb"),
    ("esrgan:photo", [], "--config=esrgan:photo: variant 'photo': did you mean 'photos'?"),
    ("srgan:Demo", [], "did you mean 'demo'?"),
    ("esrgan:demmo", [], "demmo"),
    ("esrgan", ["--config.data.bach_size=3"], "did you mean --config.data.batch_size"),
    ("esrgan", ["--config.dta.batch_size", "3"], "did you mean --config.data.batch_size"),
    ("esrgan", ["--noconfig.log.tensorbord"], "did you mean --config.log.tensorboard"),
    ("esrgan", ["--config.total_steps=many"], "total_steps=many"),
    ("esrgan", ["--config.total_steps"], "total_steps"),
    ("esrgan", ["more"], "unexpected argument 'more'"),
    ("esrgan", ["--nosuch=1"], "nosuch"),
  ],
)
def test_what_the_command_line_gets_wrong_is_an_error_of_one_line(recipe, overrides, message):
  with pytest.raises(UserError) as error:
    main.read_config(recipe, overrides)
  assert message in str(error.value) and "\n" not in str(error.value)


def test_the_list_has_every_field_of_every_recipe_with_its_meaning(capsys):
  for recipe in RECIPES:
    main.main([f"--config={recipe}", "--list"])
    lines = capsys.readouterr().out.splitlines()
    fields = flat(load(recipe).to_dict())
    assert sorted(line.split()[0] for line in lines) == sorted(f"--config.{x}" for x in fields)
    for line in lines:
      name = line.split()[0].removeprefix("--config.")
      assert str(fields[name]) in line and re.search(r"\(.{6,}\)$", line), line
  main.main(["--list"])
  assert "--config.data.batch_size " in capsys.readouterr().out


def test_the_page_of_all_fields_is_made_of_the_table():
  page = pathlib.Path(__file__).parents[2] / "docs" / "configuration.md"
  assert page.read_text() == fields.to_markdown(), "make it anew; CONTRIBUTING.md says how"


def test_default_workdir():
  assert main.default_workdir("configs/esrgan.py") == "runs/esrgan"
  assert main.default_workdir("configs/esrgan.py:demo") == "runs/esrgan-demo"
  assert main.default_workdir("esrgan:demo") == "runs/esrgan-demo"


def test_real_esrgan_as_released():
  """arXiv 2107.10833, section 4.1, and its released options, for 4 GPUs of 12."""
  config = load("realesrgan")
  for stage in (config, config.psnr):
    data = stage.data
    assert (data.degradation, data.degraded_crop, data.hr_patch) == ("real_esrgan", 400, 256)
    assert (data.batch_size, data.rotate, data.degraded_share) == (48, False, 1.0)
    assert (stage.optimizer.b1, stage.optimizer.b2, stage.ema.decay) == (0.9, 0.99, 0.999)
    assert stage.pixel.weight == 1 and stage.pixel.loss == "l1" and stage.pixel.sharpened
    assert stage.learning_rate.schedule == "constant" and stage.generator.kwargs.blocks == 23
    first, second = data.real_esrgan.first, data.real_esrgan.second
    assert (first.blur, second.blur, data.real_esrgan.end.sinc) == (1.0, 0.8, 0.8)
    assert (first.resize, second.resize) == ((0.15, 1.5), (0.3, 1.2))
    assert (first.sigma, second.sigma) == ((0.2, 3.0), (0.2, 1.5))
    assert (first.gaussian_sigma, second.gaussian_sigma) == ((1.0, 30.0), (1.0, 25.0))
    assert (first.poisson_scale, second.poisson_scale) == ((0.05, 3.0), (0.05, 2.5))
    assert first.jpeg_quality == second.jpeg_quality == (30.0, 95.0)
  assert (config.psnr.total_steps, config.psnr.learning_rate.base) == (1_000_000, 2e-4)
  assert not config.psnr.adversarial.weight and not config.psnr.perceptual.weight
  assert (config.total_steps, config.learning_rate.base) == (400_000, 1e-4)
  assert config.perceptual.weight == 1 and config.perceptual.sharpened
  layers = dict(entry.split(":") for entry in config.perceptual.layers)
  assert layers == {
    "conv1_2": "0.1", "conv2_2": "0.1", "conv3_4": "1.0", "conv4_4": "1.0", "conv5_4": "1.0"
  }  # fmt: skip
  assert (config.adversarial.weight, config.adversarial.loss) == (0.1, "vanilla")
  assert config.discriminator.name == "unet" and not config.adversarial.sharpened
  for variant in ("", ":compact", ":photos", ":demo"):
    main.read_config(f"realesrgan{variant}")
  compact = load("realesrgan", "compact")
  for ours, theirs in ((compact, config), (compact.psnr, config.psnr)):
    assert ours.generator.name == "compact" and ours.generator.kwargs.blocks == 32
    ours.generator = theirs.generator
  assert compact.to_json() == config.to_json()  # nothing else differs
  light = main.read_config("realesrgan:photos", ["--config.data.degradation=bsr_light"])
  assert read_settings(light).second is None


def test_ranges_are_read_from_the_command_line():
  name = "--config.data.real_esrgan.second"
  config = main.read_config("realesrgan", [f"{name}.sigma=0.5,2", f"{name}.resize_modes=area"])
  for stage in (config, config.psnr):
    laws = read_settings(stage).second
    assert laws.sigma == (0.5, 2) and laws.resize_modes == ("area",)
    assert read_settings(stage).first.sigma == (0.2, 3.0)
