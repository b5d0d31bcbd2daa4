"""Tests of sr_jax/formats/stablehlo_export.py: the file computes what the networks compute."""

import jax
import jax.export
import numpy as np
import pytest
from tiny_models import make_model

from sr_jax.formats.stablehlo_export import from_stablehlo, to_stablehlo
from sr_jax.networks.build import GENERATORS

CASES = [
  ("srresnet", {}),
  ("msrresnet", {}),
  ("msrresnet", {"scale": 3, "out_channels": 1}),
  ("rrdbnet", {}),
  ("rrdbnet", {"scale": 1, "input_unshuffle": 4}),
  ("residualnet", {"scale": 3, "out_channels": 1}),
]


@pytest.fixture(scope="module")
def exported():
  """Of a small model; made once, since tracing takes a second."""
  model = make_model("rrdbnet", scale=2, input_unshuffle=2, blocks=1)
  return to_stablehlo(model.name, model.kwargs, model.variables)


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_computes_the_same_at_any_size(name, kwargs):
  model = make_model(name, **kwargs)
  net = GENERATORS[name](**model.kwargs)
  upscale = from_stablehlo(to_stablehlo(name, model.kwargs, model.variables))
  r, rng = kwargs.get("input_unshuffle", 1), np.random.default_rng(1)
  for n, h, w in ((1, 7, 5), (2, 4, 9)):
    lr = rng.uniform(size=(n, r * h, r * w, kwargs.get("out_channels", 3))).astype(np.float32)
    sr = upscale(lr)
    expected = jax.jit(lambda v, x: net.apply(v, x, train=False))(model.variables, lr)
    assert sr.shape == expected.shape
    assert np.abs(sr - expected).max() / np.abs(expected).max() < 1e-5


def test_is_for_these_platforms(exported):
  program = jax.export.deserialize(bytearray(exported))
  assert program.platforms == ("cpu", "cuda", "tpu")
  assert program.nr_devices == 1


def test_same_model_same_bytes_and_no_path_of_this_machine(exported):
  model = make_model("rrdbnet", scale=2, input_unshuffle=2, blocks=1)
  frames = jax.config.jax_traceback_in_locations_limit
  assert to_stablehlo(model.name, model.kwargs, model.variables) == exported
  assert b".py" not in exported and b"sr_jax" not in exported
  assert jax.config.jax_traceback_in_locations_limit == frames != 0


def test_a_call_with_another_image_is_refused(exported):
  upscale = from_stablehlo(exported)
  with pytest.raises(ValueError, match=r"Shape mismatch .* called with \(1, 8, 8, 1\)"):
    upscale(np.zeros((1, 8, 8, 1), np.float32))
  with pytest.raises(ValueError, match="expected float32 and called with uint8"):
    upscale(np.zeros((1, 8, 8, 3), np.uint8))
  with pytest.raises(
    ValueError, match="Division had remainder 1 when computing the value of 'width'"
  ):
    upscale(np.zeros((1, 8, 9, 3), np.float32))


def test_what_is_no_program_is_refused(exported):
  for data in (b"", b"not a program", exported[:100], exported[: len(exported) // 2]):
    with pytest.raises(ValueError, match=f"these {len(data)} bytes are not a program"):
      from_stablehlo(data)


def test_refuses_what_it_cannot_export():
  model = make_model("msrresnet", blocks=1)
  with pytest.raises(ValueError, match="must be one of srresnet"):
    to_stablehlo("swinir", model.kwargs, model.variables)
  with pytest.raises(ValueError, match="scale=5 must be one of"):
    to_stablehlo("msrresnet", {**model.kwargs, "scale": 5}, model.variables)
  with pytest.raises(ValueError, match="cannot be built with .*growth"):
    to_stablehlo("msrresnet", {**model.kwargs, "growth": 5}, model.variables)
  with pytest.raises(
    ValueError, match="params/body/conv1/bias is .1, 4., but the network needs .2, 4."
  ):
    to_stablehlo("msrresnet", {**model.kwargs, "blocks": 2}, model.variables)
  with pytest.raises(ValueError, match="no kernel .* at params/conv_first"):
    to_stablehlo("msrresnet", model.kwargs, {"params": {}})
  for platforms in (("gpu",), ()):
    with pytest.raises(ValueError, match="must be some of cpu, cuda, rocm, tpu"):
      to_stablehlo("msrresnet", model.kwargs, model.variables, platforms=platforms)
