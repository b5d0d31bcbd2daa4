"""Tests of sr_jax/models/interpolation.py: the ends, the middle, and what must not be mixed."""

import jax
import numpy as np
import pytest
from tiny_models import assert_equal_trees, make_model

from sr_jax import interpolate as program
from sr_jax.models.interpolation import interpolate, interpolate_models
from sr_jax.models.model import Model
from sr_jax.models.read import read_model
from sr_jax.models.write import save_model
from sr_jax.networks import trees


def family() -> tuple[Model, Model]:
  """A PSNR model and one that was fine-tuned from it."""
  psnr, gan = make_model("srresnet", seed=1), make_model("srresnet", seed=2)
  return psnr, gan._replace(info={**gan.info, "ancestry": [psnr.info["digest"], "older"]})


@pytest.mark.parametrize("alpha", [0, 1, 0.0, 1.0])
def test_the_ends_are_exact(alpha):
  psnr, gan = family()
  # A value and its negative: 0 * gan + 1 * psnr would turn -0.0 into 0.0.
  psnr.variables["params"]["conv_last"]["bias"][:] = [-0.0, 1e-30, np.inf]
  gan.variables["params"]["conv_last"]["bias"][:] = [1, -0.0, 2]
  actual = interpolate(psnr.variables, gan.variables, alpha)
  end = (psnr, gan)[int(alpha)].variables
  assert_equal_trees(actual, end)
  bias = actual["params"]["conv_last"]["bias"]
  np.testing.assert_array_equal(np.signbit(bias), np.signbit(end["params"]["conv_last"]["bias"]))


def test_between_the_ends():
  psnr, gan = family()
  actual = interpolate(psnr.variables, gan.variables, 0.3)
  for path, x in jax.tree_util.tree_leaves_with_path(actual):
    p, g = psnr.variables, gan.variables
    for key in path:
      p, g = p[key.key], g[key.key]
    assert x.dtype == np.float32
    expected = 0.7 * p.astype(np.float64) + 0.3 * g.astype(np.float64)
    np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6 * np.abs(g).max(), err_msg=str(path))


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_alpha_is_a_share(alpha):
  psnr, gan = family()
  with pytest.raises(ValueError, match=rf"alpha={alpha} must be in \[0, 1\]: 0 is the PSNR model"):
    interpolate(psnr.variables, gan.variables, alpha)


@pytest.mark.parametrize("alpha", [0, 0.5])
def test_shapes_are_compared_first(alpha):
  psnr, gan = (
    {"params": {"conv": {"bias": np.zeros(4), "kernel": np.zeros((3, n))}}} for n in (4, 1)
  )
  # [3, 4] and [3, 1] would broadcast.
  message = r"params/conv/kernel is \(3, 4\) in the PSNR model and \(3, 1\) in the GAN model"
  with pytest.raises(ValueError, match=message):
    interpolate(psnr, gan, alpha)
  del gan["params"]["conv"]["kernel"]
  with pytest.raises(ValueError, match="conv/kernel is .* and absent in the GAN model"):
    interpolate(psnr, gan, alpha)


@pytest.mark.parametrize(
  "name, kwargs, message",
  [
    ("residualnet", {}, "generator is 'rrdbnet' in the PSNR model and 'residualnet' in the GAN"),
    ("rrdbnet", {"scale": 2}, "scale is 4 in the PSNR model and 2 in the GAN model"),
    ("rrdbnet", {"blocks": 3}, "blocks is 2 in the PSNR model and 3 in the GAN model"),
    # Equal shapes, another function.
    ("rrdbnet", {"residual_scale": 0.1}, "residual_scale is 0.2 in the PSNR model and 0.1 in the"),
  ],
)
def test_networks_are_compared(name, kwargs, message):
  with pytest.raises(ValueError, match=f"must be the same network: {message}"):
    interpolate_models(make_model(), make_model(name, **kwargs), 0.5)


def test_how_a_network_is_computed_does_not_matter():
  psnr, gan = make_model(seed=1), make_model(seed=2)
  how = {"remat": True, "unroll": 2, "algorithm": "by_source"}
  gan = gan._replace(kwargs={**gan.kwargs, **how, "residual_scale": 0.2})
  interpolate_models(psnr, gan, 0.5)


def test_what_is_recorded(caplog):
  psnr, gan = family()
  model = interpolate_models(psnr, gan, 0.25)
  assert not caplog.records
  assert (model.name, model.kwargs) == (gan.name, gan.kwargs)
  digests = psnr.info["digest"], gan.info["digest"]
  assert model.info == {
    "digest": trees.digest(interpolate(psnr.variables, gan.variables, 0.25)),
    "ancestry": [digests[1], digests[0], "older"],
    "interpolation": {"alpha": 0.25, "psnr": digests[0], "gan": digests[1]},
  }


def test_models_that_were_trained_apart_are_warned_of(caplog):
  psnr, gan = family()
  gan.info["ancestry"] = ["somebody else"]
  interpolate_models(psnr, gan, 0.5)
  (record,) = caplog.records
  assert record.levelname == "WARNING"
  assert "does not record that it was fine-tuned from this PSNR model" in record.getMessage()
  assert psnr.info["digest"] in record.getMessage() and "somebody else" in record.getMessage()


@pytest.mark.parametrize("psnr_form, gan_form", [("run", "gan.npz"), ("psnr.safetensors", "run")])
def test_through_files(tmp_path, caplog, capsys, psnr_form, gan_form):
  psnr, gan = make_model(seed=1, residual_scale=0.1), make_model(seed=2, residual_scale=0.1)
  gan.info["ancestry"] = [psnr.info["digest"]]
  save_model(tmp_path / psnr_form, psnr)
  save_model(tmp_path / gan_form, gan)
  output = tmp_path / "half.safetensors"
  program.main(
    ["--psnr", str(tmp_path / psnr_form), "--gan", str(tmp_path / gan_form)]
    + ["--alpha", "0.5", "--output", str(output)]
  )  # fmt: skip
  assert capsys.readouterr().out == f"{output}: rrdbnet x4, alpha 0.5\n"
  assert not [record for record in caplog.records if "fine-tuned" in record.getMessage()]
  half = read_model(output)
  expected = jax.tree.map(
    lambda p, g: (p + g) / np.float32(2), psnr.variables, gan.variables
  )  # halves are exact
  assert_equal_trees(half.variables, expected)
  assert half.info["ancestry"] == [gan.info["digest"], psnr.info["digest"]]
  assert half.info["interpolation"]["alpha"] == 0.5
  assert half.kwargs["residual_scale"] == 0.1
