"""Tests of sr_jax/formats/state_dicts.py. That equal names mean equal networks is tested where the
networks are, by PyTorch modules that load these state dicts, and in dialects_test.py, by reading
such modules' own; here are round trips and refusals. spandrel_test.py has the other readers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_jax.formats import state_dicts
from sr_jax.networks.build import DISCRIMINATORS, GENERATORS


def random_variables(net, image):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
  return jax.tree.map(
    lambda leaf: rng.normal(scale=0.2, size=leaf.shape).astype(np.float32), shapes
  )


def generator_state(name, **kwargs):
  net = GENERATORS[name](**{"features": 8, "blocks": 2, **kwargs})
  variables = random_variables(net, jnp.zeros((1, 8, 8, kwargs.get("out_channels", 3))))
  return variables, state_dicts.to_state_dict(name, variables)


def assert_equal_trees(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("out_channels", [1, 3])
def test_generators_come_back_as_they_went(name, scale, out_channels):
  variables, state = generator_state(name, scale=scale, out_channels=out_channels)
  actual_name, kwargs, actual = state_dicts.from_state_dict(state)
  assert actual_name == name
  expected = {"features": 8, "blocks": 2, "scale": scale, "out_channels": out_channels}
  assert {key: kwargs[key] for key in expected} == expected
  assert_equal_trees(actual, variables)
  GENERATORS[name](**kwargs)


@pytest.mark.parametrize(
  "name, kwargs",
  [
    ("rrdbnet", {"growth": 5, "scale": 2, "input_unshuffle": 2}),
    ("rrdbnet", {"growth": 4, "scale": 1, "input_unshuffle": 4}),
    ("rrdbnet", {"growth": 4, "scale": 4, "input_unshuffle": 2}),
    ("srresnet", {"prelu_per_channel": True}),
    ("srresnet", {"blocks": 11}),  # body.10 sorts before body.2
  ],
)
def test_arguments_are_inferred(name, kwargs):
  variables, state = generator_state(name, **kwargs)
  _, actual_kwargs, actual = state_dicts.from_state_dict(dict(sorted(state.items())))
  assert {key: actual_kwargs[key] for key in kwargs} == kwargs
  assert_equal_trees(actual, variables)


def test_names_and_layouts_are_basicsrs():
  variables, state = generator_state("rrdbnet", growth=4)
  kernel = variables["params"]["body"]["rdb2"]["conv3"]["kernel"]  # [2, 3, 3, 16, 4]
  assert state["body.1.rdb2.conv3.weight"].shape == (4, 16, 3, 3)
  assert state["body.1.rdb2.conv3.weight"][3, 5, 0, 2] == kernel[1, 0, 2, 5, 3]
  assert [key for key in state if not key.startswith("body") and key.endswith("weight")] == [
    f"{name}.weight"
    for name in ("conv_body", "conv_first", "conv_hr", "conv_last", "conv_up1", "conv_up2")
  ]
  _, state = generator_state("msrresnet")
  assert {"body.1.conv2.bias", "upconv2.weight", "conv_hr.bias"} <= set(state)
  _, state = generator_state("srresnet")
  assert {"body.0.bn1.running_var", "body.1.prelu.weight", "bn_body.weight"} <= set(state)


@pytest.mark.parametrize(
  "change, message",
  [
    (
      lambda s: s.update({"body.0.rdb1.conv6.weight": s["conv_hr.weight"]}),
      "looks like rrdbnet, which has no 'body.0.rdb1.conv6.weight'",
    ),
    (lambda s: s.pop("conv_hr.bias"), "looks like rrdbnet, but lacks 'conv_hr.bias'"),
    (lambda s: s.pop("conv_first.weight"), "lacks 'conv_first.weight'"),
    (
      lambda s: s.update({"body.1.rdb2.conv2.weight": np.zeros((4, 9, 3, 3))}),
      r"'body.1.rdb2.conv2.weight' has shape \[4, 9, 3, 3\], expected \[4, 12, 3, 3\]",
    ),
    (lambda s: s.update({"conv_last.weight": np.zeros(3)}), r"'conv_last.weight' has shape \[3\]"),
    (
      lambda s: s.update({"body.3.rdb1.conv1.bias": s["body.0.rdb1.conv1.bias"]}),
      "has no 'body.3.rdb1.conv1.bias'",
    ),
    (
      lambda s: [s.pop(key) for key in list(s) if key.startswith("body")],
      "none of srresnet, .*its first key is 'conv_body.bias'",
    ),
    (
      lambda s: s.clear() or s.update({"model.0.weight": np.zeros(3)}),
      "none of srresnet, .*its first key is 'model.0.weight'",
    ),
    (lambda s: s.clear(), "its first key is None"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  _, state = generator_state("rrdbnet", growth=4)
  change(state)
  with pytest.raises(ValueError, match=message):
    state_dicts.from_state_dict(state)


def test_an_unknown_generator_is_refused():
  with pytest.raises(ValueError, match="'edsr' is unknown; choose one of srresnet"):
    state_dicts.to_state_dict("edsr", {})


def test_half_precision_and_batch_counters_are_read():
  variables, state = generator_state("srresnet")
  state = {key: array.astype(np.float16) for key, array in state.items()}
  state["bn_body.num_batches_tracked"] = np.int64(3)
  _, _, actual = state_dicts.from_state_dict(state)
  assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {np.dtype(np.float32)}
  for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(variables), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
  "name, size", [("vgg", 32), ("vgg", 96), ("vgg", 256), ("srgan", 48), ("unet", 16), ("patch", 24)]
)
def test_discriminators_come_back_as_they_went(name, size):
  net = DISCRIMINATORS[name](features=4)
  variables = random_variables(net, jnp.zeros((1, size, size, 3)))
  state = state_dicts.discriminator_to_state_dict(variables)
  actual_name, kwargs, actual = state_dicts.discriminator_from_state_dict(state)
  assert (actual_name, kwargs) == (name, {"features": 4})
  for tree in (actual, variables):  # sigma is made of the rest
    for stats in tree["batch_stats"].values():
      for key in [key for key in stats if key.endswith("sigma")]:
        del stats[key]
  assert_equal_trees(actual, variables)


def test_sigma_is_computed_from_u():
  net = DISCRIMINATORS["unet"](features=4)
  image = jnp.zeros((1, 8, 8, 3))
  variables = random_variables(net, image)
  step = jax.jit(lambda v: {**v, **net.apply(v, image, train=True, mutable=["batch_stats"])[1]})
  for _ in range(100):  # until u is the singular vector, and sigma the norm
    variables = step(variables)
  state = state_dicts.discriminator_to_state_dict(variables)
  _, _, actual = state_dicts.discriminator_from_state_dict(state)
  for name, stats in variables["batch_stats"].items():
    key = f"{name.removesuffix('_norm')}/kernel/sigma"
    np.testing.assert_allclose(actual["batch_stats"][name][key], stats[key], rtol=1e-3)


def test_a_discriminator_that_does_not_fit_is_named():
  net = DISCRIMINATORS["vgg"](features=4)
  state = state_dicts.discriminator_to_state_dict(random_variables(net, jnp.zeros((1, 64, 64, 3))))
  with pytest.raises(ValueError, match="looks like vgg, but lacks 'bn2_0.bias'"):
    state_dicts.discriminator_from_state_dict(
      {key: array for key, array in state.items() if key != "bn2_0.bias"}
    )
  with pytest.raises(ValueError, match="lacks 'conv0_1.weight'; its first key is 'body'"):
    state_dicts.discriminator_from_state_dict({"body": np.zeros(1)})


def test_published_files_keep_their_keys(shared):
  state = dict(np.load(shared / "weights" / "realesrgan_x4plus_anime_f16.npz"))
  name, kwargs, variables = state_dicts.from_state_dict(state)
  assert (name, kwargs["blocks"], kwargs["scale"]) == ("rrdbnet", 6, 4)
  back = state_dicts.to_state_dict(name, variables)
  assert set(back) == set(state)
  for key, array in state.items():
    np.testing.assert_array_equal(back[key], array)
