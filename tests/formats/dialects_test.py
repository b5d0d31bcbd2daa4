"""Tests of sr_jax/formats/dialects.py, and of reading whole files' trees by way of it."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_jax.formats import dialects
from sr_jax.formats import state_dicts
from sr_jax.networks.build import DISCRIMINATORS, GENERATORS


@pytest.fixture
def references():
  import torch_references

  return torch_references


def numpy_state(module):
  """A torch module's state dict as a reader without torch gives it."""
  return {key: tensor.numpy() for key, tensor in module.state_dict().items()}


def randomised(module):
  """The module with weights that let each layer be seen in the output, statistics included."""
  import torch

  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for key, tensor in module.state_dict().items():
      if tensor.ndim > 1:
        fan_in = tensor[0].numel()
        tensor.normal_(std=fan_in**-0.5, generator=generator)
      elif tensor.ndim == 1 and not key.endswith(("weight_u", "weight_v", "_u", "_v")):
        tensor.uniform_(0.2, 0.6, generator=generator)
  return module


def run_torch(module, image, *, train=False):
  import torch

  with torch.no_grad():
    y = module.train(train)(torch.tensor(image).permute(0, 3, 1, 2))
  return (y.permute(0, 2, 3, 1) if y.ndim == 4 else y).numpy()


def run_ours(net, variables, image, *, train=False):
  def run(variables, image):
    if not train:
      return net.apply(variables, image, train=False)
    return net.apply(variables, image, train=True, mutable=["batch_stats"])[0]

  return np.asarray(jax.jit(run)(variables, image))


def assert_close(actual, expected):
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def image(h, w, channels=3, n=1):
  return np.random.default_rng(1).uniform(size=(n, h, w, channels)).astype(np.float32)


def old_names(state, ups):
  """BasicSR's keys as the first ESRGAN has them, by hand."""
  blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("body."))
  names = {
    "conv_first": "model.0",
    "conv_body": f"model.1.sub.{blocks}",
    "conv_hr": f"model.{3 * ups + 2}",
    "conv_last": f"model.{3 * ups + 4}",
  }
  names |= {f"conv_up{i}": f"model.{3 * i}" for i in range(1, ups + 1)}
  renamed = {}
  for key, array in state.items():
    layer, leaf = key.rsplit(".", 1)
    if layer.startswith("body."):
      _, block, rdb, conv = layer.split(".")
      renamed[f"model.1.sub.{block}.{rdb.upper()}.{conv}.0.{leaf}"] = array
    else:
      renamed[f"{names[layer]}.{leaf}"] = array
  return renamed


def rrdbnet_state(**kwargs):
  """A small RRDBNet's state dict, each array of other values."""
  net = GENERATORS["rrdbnet"](**{"features": 4, "growth": 2, "blocks": 2, **kwargs})
  shapes = jax.eval_shape(
    lambda: net.init(
      jax.random.key(0), np.zeros((1, 8, 8, net.out_channels), np.float32), train=False
    )
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
  return state_dicts.to_state_dict("rrdbnet", variables)


def assert_same_state(actual, expected):
  assert set(actual) == set(expected)
  for key, array in expected.items():
    assert actual[key].dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(actual[key], array, err_msg=key)


X = np.arange(3, dtype=np.float32)


@pytest.mark.parametrize(
  "tree, wrapper",
  [
    ({"conv.weight": X}, ""),
    ({"params": {"conv.weight": X}}, "params"),
    ({"params": {"conv.weight": -X}, "params_ema": {"conv.weight": X}}, "params_ema"),
    ({"params-ema": {"conv.weight": X}, "params": {"conv.weight": -X}}, "params-ema"),
    ({"params_ema": None, "params": {"conv.weight": X}}, "params"),
    ({"params_ema": {}, "params": {"conv.weight": X}}, "params"),
    ({"state_dict": {"module.conv.weight": X}, "epoch": 3}, "state_dict.module"),
    ({"model_state_dict": {"conv.weight": X}, "optimizer": {"state": {0: X}}}, "model_state_dict"),
    ({"model": {"params_ema": {"module.conv.weight": X}}}, "model.params_ema.module"),
    ({"netG": {"conv.weight": X}, "netD": {"conv.weight": -X}}, "netG"),
    ({"weights": {"conv.weight": X}}, "weights"),
    ({"module.conv.weight": X, "n_averaged": np.int64(3)}, "module"),
    ({"params_ema.conv.weight": X, "params.conv.weight": -X}, "params_ema"),
    ({"generator.conv.weight": -X, "generator_ema.conv.weight": X}, "generator_ema"),
    ({"net_g.conv.weight": -X, "net_g_ema.conv.weight": X, "net_d.a.weight": -X}, "net_g_ema"),
    ({"netG": {"conv.weight": -X}, "ema_netG": {"conv.weight": X}}, "ema_netG"),
    ({"model": {"conv.weight": -X}, "model_ema": {"module.conv.weight": X}}, "model_ema.module"),
    ({"state_dict": {"conv.weight": -X}, "ema": {"conv.weight": X}}, "ema"),
    ({"net_g.conv.weight": -X, "net_g_swa.conv.weight": X}, "net_g_swa"),
    ({"generator.conv.weight": -X, "generator_EMA.conv.weight": X}, "generator_EMA"),
    ({"g.conv.weight": -X, "d.a.weight": -X, "g_ema.conv.weight": X}, "g_ema"),
    ({"G": {"conv.weight": -X}, "D": {"a.weight": X}, "G_ema": {"conv.weight": X}}, "G_ema"),
    ({"module.conv.weight": -X, "module_ema.conv.weight": X}, "module_ema"),
    ({"online_model.conv.weight": -X, "ema_model.conv.weight": X}, "ema_model"),
    ({"conv.weight": -X, "ema.conv.weight": X}, "ema"),
    ({"net_g.conv.weight": -X, "net_g_average.conv.weight": X}, "net_g_average"),
    ({"netG": {"conv.weight": -X}, "netD": {"a.weight": X}, "ema": {"conv.weight": X}}, "ema"),
    ({"netG": {"conv.weight": X}, "netD": {"a.weight": X}, "ema": {"a.weight": -X}}, "netG"),
    ({"netG": {"conv.weight": X}, "netD_ema": {"a.weight": -X}, "netD": {"a": X}}, "netG"),
    ({"generator.conv.weight": X, "discriminator.conv.weight": -X}, "generator"),
    ({"generator.conv.weight": X, "vgg.conv.weight": -X}, "generator"),
    ({"_orig_mod.module.conv.weight": X}, "_orig_mod.module"),
    ({"model.conv.weight": X}, "model"),
  ],
)
def test_wrappers_are_opened(tree, wrapper):
  state, actual = dialects.unwrap(tree)
  assert actual == wrapper
  assert_same_state(state, {"conv.weight": X})


@pytest.mark.parametrize(
  "tree",
  [
    {"model.0.weight": X, "model.1.sub.0.weight": X},  # the old dialect's own
    {"module.weight": X, "conv.weight": X},  # not around all
  ],
)
def test_what_is_no_wrapper_stays(tree):
  assert dialects.unwrap(tree) == (tree, "")


def test_the_old_dialect_is_found_in_a_wrapper_of_its_name():
  state, wrapper = dialects.unwrap({"model": {"model.model.0.weight": X}})
  assert (set(state), wrapper) == ({"model.0.weight"}, "model.model")


def test_the_discriminator_of_a_file_of_both():
  tree = {"netG": {"a.weight": X}, "netD": {"b.weight": X}}
  assert dialects.unwrap(tree, "discriminator") == ({"b.weight": X}, "netD")
  tree = {"generator.a.weight": X, "discriminator.b.weight": X}
  assert dialects.unwrap(tree, "discriminator") == ({"b.weight": X}, "discriminator")


def test_what_is_no_weight_is_left_out():
  tree = {"a.weight": X, "step": 3, "iter": np.int64(3), "name": "x", "losses": [1.0], "args": {}}
  assert dialects.unwrap(tree) == ({"a.weight": X}, "")


@pytest.mark.parametrize(
  "tree, message",
  [
    ([X], "found a list"),
    (None, "found a NoneType"),
    ({}, "there are no arrays; its first key is None"),
    ({"params": {"step": 3}}, "there are no arrays in 'params'; its first key is 'step'"),
    ({"params": {3: X, "a.weight": X}}, "the key 3 in 'params' is no text"),
  ],
)
def test_trees_without_weights_are_refused(tree, message):
  with pytest.raises(ValueError, match=message):
    dialects.unwrap(tree)


def test_a_tree_that_holds_itself_is_refused():
  tree = {}
  tree["params"] = tree
  with pytest.raises(ValueError, match="there are no arrays"):
    dialects.unwrap(tree)


@pytest.mark.parametrize("scale, ups", [(1, 0), (2, 1), (4, 2), (8, 3)])
def test_old_names(scale, ups):
  expected = rrdbnet_state(scale=scale, blocks=11)  # block 10 sorts before block 2
  old = old_names(expected, ups)
  assert f"model.{3 * ups + 4}.bias" in old and "model.1.sub.11.weight" in old
  state, dialect = dialects.rename(dict(sorted(old.items())))
  assert dialect == "old"
  assert_same_state(state, expected)
  name, kwargs, variables, facts = state_dicts.read_generator(old)
  assert (name, kwargs["scale"], kwargs["blocks"]) == ("rrdbnet", scale, 11)
  assert_same_state(state_dicts.to_state_dict(name, variables), expected)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_rrdb_trunk_names(scale):
  expected = rrdbnet_state(scale=scale)
  renames = (
    ("conv_body", "trunk_conv"), ("body.", "RRDB_trunk."), ("rdb", "RDB"), ("conv_up", "upconv"),
    ("conv_hr", "HRconv"),
  )  # fmt: skip
  theirs = {
    functools.reduce(lambda k, r: k.replace(*r), renames, key): array
    for key, array in expected.items()
  }
  assert {"trunk_conv.bias", "RRDB_trunk.1.RDB3.conv5.weight", "HRconv.bias"} <= set(theirs)
  state, dialect = dialects.rename(theirs)
  assert dialect == "rrdb_trunk"
  assert_same_state(state, expected)


def test_a_bare_state_dict_of_basicsr_stays_as_it_is():
  expected = rrdbnet_state()
  state, dialect = dialects.rename(expected)
  assert dialect == "basicsr"
  assert all(state[key] is expected[key] for key in expected) and set(state) == set(expected)


# The order of PixelShuffle's channels: with another, these two differ by more than their tolerance.
@pytest.mark.developer("torch")
def test_mmsr_msrresnet_equals_torch(references):
  module = randomised(references.MSRResNet(8, 2))
  state = {
    key.replace("body.", "recon_trunk.").replace("conv_hr", "HRconv"): array
    for key, array in numpy_state(module).items()
  }
  name, kwargs, variables, facts = state_dicts.read_generator({"params": state})
  assert (name, kwargs["scale"], facts["dialect"]) == ("msrresnet", 4, "mmsr")
  lr = image(6, 7)
  assert_close(run_ours(GENERATORS[name](**kwargs), variables, lr), run_torch(module, lr))
  assert_same_state(state_dicts.to_state_dict(name, variables), numpy_state(module))


@pytest.mark.developer("torch")
@pytest.mark.parametrize("ups", [1, 2, 3])
def test_leftthomas_srgan_equals_torch(references, ups):
  module = randomised(references.LeftthomasGenerator(8, ups))
  name, kwargs, variables, facts = state_dicts.read_generator(numpy_state(module))
  assert name == "srresnet"
  assert kwargs == {
    "features": 8, "blocks": 5, "out_channels": 3, "prelu_per_channel": False, "scale": 2**ups,
    "final_activation": "tanh",
  }  # fmt: skip
  assert facts == {"dialect": "leftthomas", "wrapper": "", "dtype": "float32"}
  lr = image(6, 7)
  ours, expected = run_ours(GENERATORS[name](**kwargs), variables, lr), run_torch(module, lr)
  assert expected.std() > 0.05  # tanh is not saturated
  assert_close(ours, expected)


@pytest.mark.developer("torch")
def test_srresnet_equals_torch_in_evaluation(references):
  module = randomised(references.SRResNet(8, 2))
  name, kwargs, variables, _ = state_dicts.read_generator(numpy_state(module))
  lr = image(6, 7)
  assert_close(run_ours(GENERATORS[name](**kwargs), variables, lr), run_torch(module, lr))
  exported = state_dicts.to_state_dict(name, variables)
  weights = {k: v for k, v in numpy_state(module).items() if "num_batches" not in k}
  assert_same_state(exported, weights)


# The order in which linear1 sees the features, and SRGAN's 3x3 convolutions of stride 2, which
# XLA's 'SAME' pads on one side only.
@pytest.mark.developer("torch")
@pytest.mark.parametrize("name, size", [("vgg", 64), ("srgan", 48)])
def test_discriminators_equal_torch_in_evaluation(references, name, size):
  make = {"vgg": references.VGGDiscriminator, "srgan": references.SRGANDiscriminator}[name]
  module = randomised(make(4, size))
  tree = {"params": numpy_state(module), "iter": 3}
  actual, kwargs, variables, facts = state_dicts.read_discriminator(tree)
  assert (actual, kwargs) == (name, {"features": 4})
  assert facts == {"dialect": "basicsr", "wrapper": "params", "dtype": "float32"}
  x = image(size, size, n=3)
  assert_close(run_ours(DISCRIMINATORS[name](**kwargs), variables, x), run_torch(module, x))
  exported = state_dicts.discriminator_to_state_dict(variables)
  weights = {k: v for k, v in numpy_state(module).items() if "num_batches" not in k}
  assert_same_state(exported, weights)


@pytest.mark.developer("torch")
def test_patchgan_of_pix2pix_equals_torch_with_its_gradients(references):
  module = randomised(references.PatchDiscriminator(4))
  name, kwargs, variables, facts = state_dicts.read_discriminator({"netD": numpy_state(module)})
  assert (name, kwargs, facts["dialect"]) == ("patch", {"features": 4}, "pix2pix")
  net, x = DISCRIMINATORS[name](**kwargs), image(32, 40, n=2)
  assert_close(run_ours(net, variables, x), run_torch(module, x))
  cotangent = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
  expected, by_image, _ = references.values_and_gradients(module, x, cotangent)

  def loss(x):
    logits, _ = net.apply(variables, x, train=True, mutable=["batch_stats"])
    return (logits * cotangent).sum(), logits

  (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
  assert_close(logits, expected)
  assert_close(gradient, by_image)
  with pytest.raises(ValueError, match="model.14.weight.*pix2pix"):
    state_dicts.read_discriminator(
      {**numpy_state(module), "model.14.weight": np.ones((1, 1, 4, 4))}
    )


@pytest.mark.developer("torch")
@pytest.mark.parametrize("dialect", ["basicsr", "parametrizations"])
def test_unet_equals_torch_in_training(references, dialect):
  module = randomised(references.UNetDiscriminator(4))
  weights = numpy_state(module)
  weights = {key: np.array(array) for key, array in weights.items()}
  state = weights
  if dialect == "parametrizations":
    from torch import nn

    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 4, bias=False))
    names = {
      "weight_orig": "parametrizations.weight.original",
      "weight_u": "parametrizations.weight.0._u",
      "weight_v": "parametrizations.weight.0._v",
    }
    assert set(names.values()) == set(layer.state_dict())
    state = {}
    for key, array in weights.items():
      layer, _, leaf = key.partition(".")
      state[f"{layer}.{names.get(leaf, leaf)}"] = array
  name, kwargs, variables, facts = state_dicts.read_discriminator({"netD": state})
  assert (name, kwargs, facts["dialect"]) == ("unet", {"features": 4}, dialect)
  x = image(16, 24)
  ours = run_ours(DISCRIMINATORS[name](**kwargs), variables, x, train=True)
  assert_close(ours, run_torch(module, x, train=True))
  # v is half a power iteration away from u and written anew; all else is as it was.
  exported = state_dicts.discriminator_to_state_dict(variables)
  assert set(exported) == set(weights)
  assert_same_state(
    {key: array for key, array in exported.items() if not key.endswith("_v")},
    {key: array for key, array in weights.items() if not key.endswith("_v")},
  )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(dtype):
  import ml_dtypes

  dtypes = {"bfloat16": ml_dtypes.bfloat16}
  state = {k: v.astype(dtypes.get(dtype, dtype)) for k, v in rrdbnet_state().items()}
  name, _, variables, facts = state_dicts.read_generator(state)
  assert facts["dtype"] == dtype
  expected = {key: array.astype(np.float32) for key, array in state.items()}
  assert_same_state(state_dicts.to_state_dict(name, variables), expected)


@pytest.mark.parametrize(
  "channels, out_channels, ups, unshuffle",
  [
    (3, 3, 2, 1),
    (1, 1, 2, 1),
    (12, 3, 2, 2),
    (48, 3, 2, 4),
    (4, 1, 2, 2),
    (16, 1, 2, 4),
    (12, 3, 3, 2),
    (3, 1, 2, 1),
    (4, 3, 2, 1),
    (12, 1, 2, 1),
    (4, 1, 0, 1),  # an image of four channels: nothing could undo a pixel-unshuffle
    (16, 1, 1, 1),
  ],
)
def test_pixel_unshuffle_is_inferred(channels, out_channels, ups, unshuffle):
  state = rrdbnet_state(scale=2**ups, out_channels=out_channels)
  state["conv_first.weight"] = np.zeros((4, channels, 3, 3), np.float32)
  _, kwargs, variables = state_dicts.from_state_dict(state)
  assert (kwargs["input_unshuffle"], kwargs["out_channels"]) == (unshuffle, out_channels)
  assert kwargs["scale"] == 2**ups // unshuffle
  assert_same_state(state_dicts.to_state_dict("rrdbnet", variables), state)


def changed(state, old, new):
  return {new if key == old else key: array for key, array in state.items()}


OLD = old_names(rrdbnet_state(), 2)


@pytest.mark.parametrize(
  "state, message",
  [
    ({"layers.0.weight": X}, "none of the dialects old, rrdb_trunk.* first key is 'layers.0.wei"),
    (
      {"conv_first.weight": X, "layers.0.norm.weight": X},
      "'layers.0.norm.weight' is not of the dialect 'basicsr'.*known are old, rrdb_trunk, mmsr",
    ),
    (
      {**OLD, "model.1.sub.0.RDB1.conv1x1.weight": X},
      r"'model.1.sub.0.RDB1.conv1x1.weight' is of ESRGAN\+.* not supported",
    ),
    ({**OLD, "model.1.sub.0.res.0.weight": X}, "'model.1.sub.0.res.0.weight' is not of the dia"),
    (changed(OLD, "model.3.weight", "model.2.weight"), "'model.2.weight' is not of the dialect"),
    (changed(OLD, "model.10.bias", "model.11.bias"), "'model.11.bias' is not of the dialect"),
    (
      changed(OLD, "model.6.weight", "model.99999.weight"),
      "expected keys as 'model.0.weight', with numbers below 10000; found",
    ),
    ({"model.0.weight": X}, "expected keys as 'model.1.sub.0.weight'.*found none"),
    (
      {key: array for key, array in OLD.items() if "sub.0." not in key},
      r"lacks 'body.0.rdb1.conv1.* \(as BasicSR names what is in the dialect 'old'\)",
    ),
    (
      {key: array for key, array in OLD.items() if key != "model.8.bias"},
      r"lacks 'conv_hr.bias' \(as BasicSR names",
    ),
    ({**rrdbnet_state(), "conv_hr.weight": np.zeros((4, 4, 3, 3), np.int64)}, "dtype int64"),
    ({**rrdbnet_state(), "conv_hr.weight": np.array(["x"])}, "'conv_hr.weight' has shape"),
    ({**rrdbnet_state(), "conv_hr.weight": np.float32(3)}, "lacks 'conv_hr.weight'"),
    ({"block1.0.weight": X}, "expected keys as 'block8.0.weight'"),
  ],
)
def test_what_does_not_fit_is_named(state, message):
  with pytest.raises(ValueError, match=message):
    state_dicts.read_generator(state)


@pytest.mark.parametrize(
  "state, message",
  [
    ({"a.parametrizations.weight.original0": X}, "parametrisation other than spectral_norm"),
    (
      {"a.parametrizations.weight.original": X, "a.weight_orig": X},
      "an array is there twice, under both names",
    ),
    ({"features.0.weight": X}, "lacks 'conv0_1.weight'; its first key is 'features.0.weight'"),
  ],
)
def test_discriminators_that_do_not_fit_are_named(state, message):
  with pytest.raises(ValueError, match=message):
    state_dicts.read_discriminator(state)


def absurd(*shape):
  """An array of a shape that no memory holds."""
  return np.broadcast_to(np.float32(0), shape)


@pytest.mark.parametrize("size", [10**5, 2**20, 10**12])
def test_absurd_sizes_are_refused_without_memory(size):
  for key, shape in (
    ("conv_first.weight", (size, 3, 3, 3)),
    ("conv_last.weight", (size, 4, 3, 3)),
    ("body.0.rdb1.conv1.weight", (size, 4, 3, 3)),
  ):
    with pytest.raises(ValueError, match="shape"):
      state_dicts.read_generator({**rrdbnet_state(), key: absurd(*shape)})
  for state in discriminator_states():
    for key in {"conv0.weight", "conv0_0.weight", "conv0_1.weight", "conv3_1.weight"} & set(state):
      with pytest.raises(ValueError):
        state_dicts.read_discriminator({**state, key: absurd(size, *state[key].shape[1:])})
    if "linear1.weight" in state:
      for shape in ((100, size), (size, 16), (size, size)):
        with pytest.raises(ValueError):
          state_dicts.read_discriminator({**state, "linear1.weight": absurd(*shape)})


def test_a_large_linear_layer_makes_no_image_of_its_size():
  state = dict(discriminator_states()[1])
  assert state.pop("bn1_0.bias").shape == (4,)
  state |= {"conv0_0.weight": absurd(2, 10**6, 3, 3), "linear1.weight": absurd(100, 16 * 200**2)}
  with pytest.raises(ValueError, match="linear1.weight"):  # vgg, on 6400 x 6400 pixels
    state_dicts.read_discriminator(state)


@functools.cache
def discriminator_states():
  states = []
  for net in DISCRIMINATORS.values():
    shapes = jax.eval_shape(
      lambda net=net: net(features=2).init(
        jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False
      )
    )
    variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    states.append(state_dicts.discriminator_to_state_dict(variables))
  return states


@functools.cache
def generator_states():
  states = [rrdbnet_state(blocks=1), old_names(rrdbnet_state(blocks=1), 2)]
  for name in ("srresnet", "msrresnet", "residualnet", "compact"):
    net = GENERATORS[name](features=2, blocks=1, scale=2)
    shapes = jax.eval_shape(
      lambda net=net: net.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32), train=False)
    )
    variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    states.append(state_dicts.to_state_dict(name, variables))
  return states


KEYS = st.one_of(
  st.sampled_from(
    """
    conv_first.weight conv_up2.weight conv_up9.weight conv_up_x3.weight body.7.rdb1.conv1.weight
    params params_ema.x model.0.weight model.1.sub.0.RDB1.conv1.0.weight model.99.weight
    RRDB_trunk.0.x.weight recon_trunk.0.conv1.weight block1.0.weight block8.9999.weight
    linear1.weight conv1.weight_orig conv0_1.weight conv9_1.weight . module. model.x
    model.11.weight bn3.weight
    a.parametrizations.weight.original body.0.weight body.1.weight body.99.weight body.999999.bias
    """.split()
  ),
  st.text(max_size=8),
  st.integers(),
  st.none(),
)
VALUES = st.one_of(
  st.lists(st.integers(0, 6), max_size=5).map(lambda shape: np.zeros(shape, np.float32)),
  st.lists(st.sampled_from([1, 3, 16, 1000, 10**4]), max_size=4).map(lambda s: absurd(*s)),
  st.sampled_from(
    [None, 3, "x", [X], {}, {"a.weight": X}, np.int64(3), np.array(["x"]), np.array([None])]
    + [np.zeros((2, 2, 3, 3), dtype) for dtype in ("int8", "bool", "complex64", "datetime64[s]")]
  ),
)
CHANGES = st.lists(
  st.tuples(st.sampled_from(["set", "move", "drop"]), st.integers(0, 200), KEYS, VALUES),
  min_size=1,
  max_size=3,
)


def apply_changes(state, changes):
  state = dict(state)
  for what, i, key, value in changes:
    keys = list(state)
    if what == "set" or not keys:
      state[keys[i % len(keys)] if keys and i % 2 else key] = value
    elif what == "move":
      state[key] = state.pop(keys[i % len(keys)])
    else:
      del state[keys[i % len(keys)]]
  return state


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(which=st.integers(0, 7), changes=CHANGES)
def test_changed_state_dicts_are_read_or_refused(which, changes):
  """Files come from strangers: whatever is in them, the only error is a ValueError."""
  states = [*generator_states(), *discriminator_states()]
  read = state_dicts.read_generator
  if which >= len(generator_states()):
    read = state_dicts.read_discriminator
  try:
    name, kwargs, variables, _ = read(apply_changes(states[which], changes))
  except ValueError:
    return
  assert name in (*GENERATORS, *DISCRIMINATORS)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
