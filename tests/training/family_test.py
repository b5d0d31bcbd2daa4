"""Runs of networks and losses beside the papers': grey images, parts of other models, freezing."""
# ruff: noqa: F811  (a fixture of tiny_runs is imported by name)

import json

import numpy as np
import pytest

from tiny_models import make_model, photo
from tiny_runs import photographs  # noqa: F401  (a fixture)

from sr_jax import main
from sr_jax.formats import state_dicts
from sr_jax.models.read import read_model
from sr_jax.networks.build import build_generator, in_channels
from sr_jax.training.run import train_and_evaluate
from sr_jax.upscaling.upscaler import make_upscaler


def settings(photographs, **more):
  """Settings of a demo that make it small, both stages."""
  fields = {
    "data.source": photographs,
    "data.hr_patch": 32,
    "data.batch_size": 8,
    "data.input": "device",
    "eval.source": "",
    "log.every_steps": 1,
    "log.tensorboard": False,
    "total_steps": 2,
    **more,
  }
  return [f"--config.{name}={value}" for name, value in fields.items()]


GAN = {
  "perceptual.layers": "conv1_1:1.0",
  "discriminator.kwargs.features": 4,
  "learning_rate.schedule": "constant",
}


@pytest.mark.slow  # partial_test and the others here have its parts
def test_a_grey_model_of_another_scale_is_fine_tuned_in_part(photographs, tmp_path, capsys):
  """L1 and LDL on the luma of photographs, from what fits of an x4 of one more block."""
  x4 = make_model("msrresnet", scale=4, features=8, blocks=3, out_channels=1)
  theirs = state_dicts.to_state_dict(x4.name, x4.variables)
  np.savez(tmp_path / "x4.npz", **theirs)
  config = main.read_config("esrgan_psnr:demo", settings(photographs, **{
    "generator.name": "msrresnet", "generator.kwargs.features": 8, "generator.kwargs.blocks": 2,
    "scale": 2, "data.channels": 1, "ldl.weight": 0.1, "learning_rate.schedule": "constant",
    "init_from": tmp_path / "x4.npz", "init_partial": True, "freeze": "conv_first,body/1",
    "learning_rate.base": 1e-3, "learning_rate.warmup_steps": 2, "total_steps": 3,
  }))  # fmt: skip
  assert config.generator.kwargs.out_channels == 1
  assert train_and_evaluate(config, tmp_path / "run") == ""
  told = capsys.readouterr().out
  assert "taken: conv_first, conv_hr, conv_last, upconv1, body/0-1\n" in told
  assert "fresh: nothing\n" in told and "unused: upconv2, body/2\n" in told
  assert "frozen: conv_first, 80 parameters" in told and "frozen: body/1, 1,168 para" in told

  model = read_model(tmp_path / "run")
  assert model.kwargs["out_channels"] == in_channels(model.variables, model.kwargs) == 1
  ours = state_dicts.to_state_dict(model.name, model.variables)
  for key, array in ours.items():
    same = np.array_equal(array, theirs[key])
    assert same == key.startswith(("conv_first.", "body.1.")), key
  lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
  metrics = [line for line in lines if "loss/ldl" in line]
  assert len(metrics) == 3
  rates = [line["learning_rate"] for line in metrics]
  np.testing.assert_allclose(rates, [5e-4, 1e-3, 1e-3], rtol=1e-5)
  upscale = make_upscaler(build_generator(model.name, model.kwargs), model.variables)
  assert upscale(photo(9, 12, channels=0)).shape == (18, 24)
  assert upscale(photo(9, 12)).shape == (18, 24, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
  "recipe, fields",
  [
    ("srresnet", {"generator.kwargs.features": 8, "generator.kwargs.blocks": 1}),
    ("esrgan_psnr", {"generator.name": "compact", "generator.kwargs.features": 8}),
    ("esrgan_psnr", {"generator.name": "residualnet", "generator.kwargs.features": 8}),
    ("srgan", {**GAN, "generator.kwargs.features": 8, "generator.kwargs.blocks": 1}),
    ("srgan", {**GAN, "generator.name": "msrresnet", "discriminator.name": "unet"}),
    ("esrgan", {**GAN, "generator.kwargs.features": 8, "generator.kwargs.blocks": 1}),
    ("esrgan", {**GAN, "generator.kwargs.input_unshuffle": 2, "scale": 2}),
    ("ldl", {**GAN, "generator.name": "compact", "discriminator.name": "patch"}),
  ],
  ids=str,
)
def test_every_recipe_and_network_trains_on_grey_images(photographs, tmp_path, recipe, fields):
  flags = settings(
    photographs, **{"psnr.total_steps": 2} if recipe in ("srgan", "esrgan", "ldl") else {}
  )
  flags += [f"--config.{name}={value}" for name, value in fields.items()]
  config = main.read_config(f"{recipe}:demo", [
    *flags, "--config.data.channels=1", f"--config.eval.source={photographs}",
    "--config.eval.max_images=1", "--config.eval.lpips=False",
    "--config.checkpoint.best_metric=psnr_y",
  ])  # fmt: skip
  assert train_and_evaluate(config, tmp_path / "run") == ""
  model = read_model(tmp_path / "run")
  assert in_channels(model.variables, model.kwargs) == model.kwargs["out_channels"] == 1
  upscale = make_upscaler(build_generator(model.name, model.kwargs), model.variables)
  scale = model.kwargs["scale"]
  assert upscale(photo(8, 12, channels=0)).shape == (8 * scale, 12 * scale)


def test_a_grey_model_in_a_colour_recipe_is_refused_with_the_setting_that_fits(
  photographs, tmp_path
):
  grey = make_model("residualnet", features=8, blocks=1, out_channels=1)
  np.savez(tmp_path / "grey.npz", **state_dicts.to_state_dict(grey.name, grey.variables))
  flags = settings(photographs, **{
    "generator.name": "residualnet", "generator.kwargs.features": 8, "generator.kwargs.blocks": 1,
    "init_from": tmp_path / "grey.npz",
  })  # fmt: skip
  with pytest.raises(ValueError, match="network with --config.data.channels=1$"):
    train_and_evaluate(main.read_config("esrgan_psnr:demo", flags), tmp_path / "run")
  main.read_config("esrgan_psnr:demo", [*flags, "--config.data.channels=1"])


def test_what_freezes_nothing_is_refused_before_anything_compiles(photographs, tmp_path):
  flags = settings(photographs, **{"generator.name": "residualnet", "freeze": "conv_frist"})
  with pytest.raises(ValueError, match="'conv_frist' must be") as error:
    train_and_evaluate(main.read_config("esrgan_psnr:demo", flags), tmp_path / "run")
  remedy = str(error.value).rpartition("; try ")[2].replace('"', "")
  assert remedy == "--config.freeze=('conv_first',)"
  assert main.read_config("esrgan_psnr:demo", [*flags, remedy]).freeze == ("conv_first",)
