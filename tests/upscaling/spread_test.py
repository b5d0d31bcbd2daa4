"""Tests of upscaling/spread.py: many devices compute what one does, each with its share."""

import jax
import numpy as np
import pytest
from tiny_models import contrasting_model, make_model, photo

from sr_jax.networks.build import build_generator
from sr_jax.upscaling import spread
from sr_jax.upscaling.upscaler import make_float_forward


@pytest.mark.parametrize(
  ("name", "kwargs", "shape"),
  [
    ("rrdbnet", {}, (1, 8)),
    ("rrdbnet", {}, (2, 4)),
    ("srresnet", {}, (2, 4)),  # which has a convolution of 9x9
    ("rrdbnet", {"scale": 2, "input_unshuffle": 2}, (2, 4)),
  ],
  ids=str,
)
def test_many_devices_compute_what_one_does(name, kwargs, shape):
  model = contrasting_model(name, blocks=1, **kwargs)
  module = build_generator(model.name, model.kwargs)
  lr = np.zeros((1, 32, 128, 3), np.float32)
  lr[0, :26, :122] = photo(26, 122) / np.float32(255)  # the rest is padding
  one = make_float_forward(module, jax.local_devices()[0], plain_form=True)
  expected = np.asarray(one(model.variables, lr, 26, 122))
  many = spread.make_spread_forward(module, spread.make_mesh(shape))
  result = many(model.variables, lr, 26, 122)
  assert len(result.sharding.device_set) == 8
  inside = slice(None), slice(26 * module.scale), slice(122 * module.scale)
  np.testing.assert_allclose(np.asarray(result)[inside], expected[inside], rtol=0, atol=1e-5)
  assert expected[inside].std() > 0.05


def test_each_device_needs_its_share_of_the_memory():
  model = make_model(blocks=1)
  module = build_generator(model.name, model.kwargs)
  lr = jax.ShapeDtypeStruct((1, 256, 512, 3), np.float32)

  def size(forward) -> int:
    compiled = forward.lower(model.variables, lr, 256, 512).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  one = size(make_float_forward(module, jax.local_devices()[0], plain_form=True))
  for shape in ((1, 8), (2, 4)):
    share = size(spread.make_spread_forward(module, spread.make_mesh(shape))) / one
    assert 1 / 16 < share < 1 / 8 * 1.35, share


def test_what_cannot_be_spread_is_refused():
  model = make_model("msrresnet")
  module = build_generator(model.name, model.kwargs)
  with pytest.raises(ValueError, match="it runs on one device, no --mesh"):
    spread.make_spread_forward(module, spread.make_mesh((1, 2)))
  with pytest.raises(ValueError, match="--mesh=3x3 needs 9 devices, and there are 8"):
    spread.make_mesh((3, 3))
