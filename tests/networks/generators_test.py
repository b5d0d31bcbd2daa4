"""Tests of sr_jax/networks/srresnet.py, rrdbnet.py and blocks.py.

The reference is the networks of torch_references.py, with equal weights.
"""

import functools
import os
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import FASTER
from sr_jax.formats import state_dicts
from sr_jax.kernels import choose
from sr_jax.networks.build import GENERATORS
from sr_jax.networks.compact import Compact
from sr_jax.networks.rrdbnet import RRDBNet, ResidualNet
from sr_jax.networks.srresnet import MSRResNet, SRResNet


@pytest.fixture
def references():
  import torch_references

  return torch_references


def chosen(net, platform="cpu", devices=8):
  """The network as such devices compute it."""
  chips = [types.SimpleNamespace(platform=platform)] * devices
  return net.clone(kernels=choose.choose(chips, net.dtype, net))


def random_variables(net, lr, seed=0):
  """Variables of a network drawn with numpy: compiling its own initialisers takes seconds."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      return rng.normal(scale=np.prod(leaf.shape[-4:-1]) ** -0.5, size=leaf.shape)
    return rng.uniform(0.2, 0.6, leaf.shape)

  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))
  draws = jax.tree_util.tree_map_with_path(draw, shapes)
  return jax.tree.map(lambda x: x.astype(np.float32), draws)


def values_and_gradients(net, variables, image, cotangent, options=None):
  """Output, gradients by image and by parameters of sum(output * cotangent), updated statistics."""

  def loss(image, params):
    out, updated = net.apply(
      {**variables, "params": params}, image, train=True, mutable=["batch_stats"]
    )
    return jnp.sum(out * cotangent), (out, updated)

  gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  (_, (out, updated)), gradients = jax.jit(gradient, compiler_options=options)(
    image, variables["params"]
  )
  return out, *gradients, updated


def images(h, w, scale, seed=0):
  """An LR batch, and a cotangent of its SR."""
  rng = np.random.default_rng(seed)
  return (
    rng.uniform(size=(2, h, w, 3)).astype(np.float32),
    rng.normal(size=(2, h * scale, w * scale, 3)).astype(np.float32),
  )


def assert_close(actual, expected, *, tolerance=1e-4):
  """Largest difference of each array within tolerance of its largest value.

  A gradient that is zero but for rounding, as of a bias before a BatchNorm, is measured against
  all.
  """
  floor = 1e-2 * max(np.abs(x).max() for x in jax.tree.leaves(expected))
  for path, x in jax.tree_util.tree_leaves_with_path(expected):
    y = actual
    for step in path:
      y = y[step.key]
    assert np.shape(y) == np.shape(x)
    error = np.abs(np.asarray(y) - x).max() / max(np.abs(x).max(), floor)
    assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def parameters(net, channels=3):
  lr = jnp.zeros((1, 8, 8, channels))
  tree = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "net, expected",
  [
    (RRDBNet(), 16_697_987),
    (RRDBNet(blocks=16), 11_662_019),
    (RRDBNet(blocks=6), 4_467_779),
    (RRDBNet(scale=2, input_unshuffle=2), 16_703_171),
    (RRDBNet(remat=True), 16_697_987),
    (MSRResNet(), 1_517_571),
    (SRResNet(), 1_549_462),
    (SRResNet(prelu_per_channel=True), 1_550_659),
    # conv_first 1,792, 16 x 2 and 4 more convolutions of 36,928, conv_last 1,731.
    (ResidualNet(), 1_792 + 36 * 36_928 + 1_731),
    # Each convolution with 64 slopes; 27,696 in the last one at x4, (576 + 1) 3 scale^2 otherwise.
    (Compact(), 1_792 + 64 + 16 * (36_928 + 64) + 27_696),
    (Compact(blocks=32), 1_213_296),
    (Compact(blocks=32, scale=2), 1_792 + 64 + 32 * (36_928 + 64) + 577 * 12),
    (Compact(scale=1), 1_792 + 64 + 16 * (36_928 + 64) + 577 * 3),
  ],
)
def test_parameter_counts(net, expected):
  assert parameters(net) == expected


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_scale_and_channel_count(name, scale, channels):
  net = GENERATORS[name](features=4, blocks=1, scale=scale, out_channels=channels)
  lr = jnp.zeros((2, 5, 6, channels))
  sr, _ = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), lr, train=True))
  assert sr.shape == (2, 5 * scale, 6 * scale, channels)
  assert sr.dtype == jnp.float32


@pytest.mark.parametrize(
  "scale, input_unshuffle, convs",
  [
    (1, 1, set()),
    (2, 1, {"conv_up1"}),
    (1, 4, {"conv_up1", "conv_up2"}),
    (2, 2, {"conv_up1", "conv_up2"}),
    (8, 1, {"conv_up1", "conv_up2", "conv_up3"}),
    (3, 1, {"conv_up_x3"}),
  ],
)
def test_rrdbnet_upsampling_layers(scale, input_unshuffle, convs):
  net = RRDBNet(features=4, blocks=1, scale=scale, input_unshuffle=input_unshuffle)
  lr = jnp.zeros((1, 4, 8, 3))
  sr, variables = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), lr, train=False))
  assert sr.shape == (1, 4 * scale, 8 * scale, 3)
  assert {name for name in variables["params"] if name.startswith("conv_up")} == convs


@pytest.mark.developer("torch")
@pytest.mark.parametrize("unshuffle", [1, 2])
def test_rrdbnet_equals_torch(references, unshuffle):
  net = RRDBNet(features=8, blocks=2, growth=4, scale=4 // unshuffle, input_unshuffle=unshuffle)
  reference = references.RRDBNet(8, 2, 4, unshuffle)
  check_against(reference, references, "rrdbnet", net)


@pytest.mark.developer("torch")
def test_residualnet_equals_torch(references):
  check_against(
    references.ResidualNet(8, 2), references, "residualnet", ResidualNet(features=8, blocks=2)
  )


@pytest.mark.developer("torch")
def test_msrresnet_equals_torch(references):
  check_against(
    references.MSRResNet(8, 2), references, "msrresnet", MSRResNet(features=8, blocks=2)
  )


@pytest.mark.developer("torch")
@pytest.mark.parametrize("per_channel", [False, True])
def test_srresnet_equals_torch(references, per_channel):
  reference = references.SRResNet(8, 2, 8 if per_channel else 1)
  net = SRResNet(features=8, blocks=2, prelu_per_channel=per_channel)
  updated = check_against(reference, references, "srresnet", net)
  for i in range(2):
    np.testing.assert_allclose(
      updated["body"]["bn2"]["mean"][i], reference.body[i].bn2.running_mean.numpy(), atol=1e-5
    )


def check_against(reference, references, name, net):
  """Values, gradients and, through load_state_dict, the names of the parameters."""
  lr, cotangent = images(8, 10, net.scale)
  variables = random_variables(net, lr)
  references.load(reference, state_dicts.to_state_dict(name, variables))
  expected, by_image, by_params = references.values_and_gradients(reference, lr, cotangent)
  out, our_by_image, our_by_params, updated = values_and_gradients(net, variables, lr, cotangent)
  assert_close({"sr": out}, {"sr": expected})
  assert_close({"lr": our_by_image}, {"lr": by_image})
  assert_close(state_dicts.to_state_dict(name, {"params": our_by_params}), by_params)
  return updated.get("batch_stats")


@pytest.mark.parametrize(
  "name, blocks, variants",
  [
    # 0 is all blocks here, on CPUs.
    ("rrdbnet", 2, [{}, {"remat": True}, {"algorithm": "by_source", "remat": True}]),
    pytest.param(
      "srresnet", 3, [{"unroll": 2}, {"remat": True, "unroll": 1}], marks=pytest.mark.slow
    ),
  ],
)
def test_looped_unrolled_and_rematerialised_bodies_are_the_same(name, blocks, variants):
  """As users' programs are compiled; conftest's flags round a gradient of zero a little more."""
  options = {"xla_cpu_use_fusion_emitters": True} if FASTER in os.environ["XLA_FLAGS"] else None
  lr, cotangent = images(6, 6, 2)
  make = functools.partial(GENERATORS[name], features=4, blocks=blocks, scale=2)
  variables = random_variables(make(), lr)
  expected = values_and_gradients(make(unroll=1), variables, lr, cotangent, options)
  for kwargs in variants:
    net = chosen(make(**kwargs))
    shapes = jax.eval_shape(lambda net=net: net.init(jax.random.key(0), lr, train=True))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    actual = values_and_gradients(net, variables, lr, cotangent, options)
    for a, b in zip(actual, expected, strict=True):
      if jax.tree.leaves(b):
        assert_close({"": a}, {"": b}, tolerance=1e-5)


@pytest.mark.parametrize(
  "algorithm", ["by_source", pytest.param("winograd", marks=pytest.mark.slow)]
)
def test_dense_blocks_in_a_fast_form_are_the_same_network(algorithm):
  """Same parameters, same output and gradients, in float32 and within bfloat16's.

  Winograd's form computes in float32 always: its bfloat16 is in winograd_test.py.
  """
  exact = dense_results("concat", "float32")
  for a, b in zip(dense_results(algorithm, "float32"), exact, strict=True):
    if jax.tree.leaves(b):
      assert_close({"": a}, {"": b}, tolerance=1e-5)
  if algorithm == "winograd":
    return

  def error(algorithm):
    """Of the output and of the gradients, relative to the largest value of each leaf."""
    seen = dense_results(algorithm, "bfloat16")[:3]
    return [
      float(np.abs(a - b).max() / np.abs(b).max())
      for a, b in zip(jax.tree.leaves(seen), jax.tree.leaves(exact[:3]), strict=True)
    ]

  assert 1e-4 < np.mean(error(algorithm)) < 2 * np.mean(error("concat"))


def dense_net(algorithm, dtype):
  net = RRDBNet(features=6, blocks=1, growth=4, scale=2, algorithm=algorithm, dtype=dtype)
  return chosen(net)


@functools.cache
def dense_results(algorithm, dtype):
  lr, cotangent = images(6, 6, 2)
  variables = random_variables(dense_net("concat", "float32"), lr)
  return values_and_gradients(dense_net(algorithm, dtype), variables, lr, cotangent)


def test_a_network_as_tpus_train_it_is_the_same():
  """Output, gradients by image and by parameters, also where blocks are computed again."""
  lr, cotangent = images(6, 6, 2)
  exact = dense_results("concat", "float32")
  for remat in (False, True):
    net = RRDBNet(features=6, blocks=1, growth=4, scale=2, remat=remat)
    variables = random_variables(net, lr)
    for a, b in zip(values_and_gradients(chosen(net, "tpu"), variables, lr, cotangent), exact,
                    strict=True):  # fmt: skip
      if jax.tree.leaves(b):
        assert_close({"": a}, {"": b}, tolerance=1e-5)


@pytest.mark.parametrize("algorithm", ["by_source", "winograd"])
def test_dense_blocks_are_what_the_field_says_without_kernels_too(algorithm):
  """Then the other convolutions are XLA's."""
  lr, cotangent = images(6, 6, 2)
  net = dense_net(algorithm, "float32").clone(kernels=choose.PLAIN)
  variables = random_variables(net, lr)
  expected = dense_results("concat", "float32")[0]
  lowered = jax.jit(lambda v: net.apply(v, lr, train=False)).lower(variables)
  convolutions = lowered.as_text().count("stablehlo.convolution")
  assert convolutions == {"by_source": 3 * 5 + 5, "winograd": 5}[algorithm]
  assert_close({"": lowered.compile()(variables)}, {"": expected}, tolerance=1e-5)


def test_dense_blocks_are_by_source_on_accelerators():
  lr = jnp.zeros((1, 8, 8, 3))
  net = RRDBNet(features=6, blocks=1, growth=4)
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))

  def widths(net):
    program = jax.jit(lambda v: net.apply(v, lr, train=False)).lower(variables).as_text()
    return {
      int(n) for n in re.findall(r"stablehlo.convolution.*-> tensor<1x8x8x(\d+)xf32>", program)
    }

  assert widths(net) == widths(chosen(net)) == {6, 4}
  for platform, devices in (("gpu", 1), ("gpu", 8), ("tpu", 1), ("tpu", 8)):
    by_source = widths(chosen(net, platform, devices))
    assert by_source == {6, 22, 18, 14, 10}  # 4 x 4 + 6, then 4 fewer each time, 6 in the end


@pytest.mark.parametrize(
  "devices, features, growth, convolutions", [(1, 32, 32, 1), (1, 32, 16, 21), (8, 32, 32, 21)]
)
def test_dense_blocks_are_winograds_on_one_cpu(
  devices, features, growth, convolutions, monkeypatch
):
  """Then only the last convolution is left; narrow ones would not gain."""
  monkeypatch.setattr(choose, "working", frozenset)
  lr = jnp.zeros((1, 8, 8, 3))
  net = chosen(RRDBNet(features=features, blocks=1, growth=growth), devices=devices)
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))
  program = jax.jit(lambda v: net.apply(v, lr, train=False)).lower(variables).as_text()
  assert program.count("stablehlo.convolution") == convolutions


def body_loops(net, *, train):
  """Whether the program has a loop over the blocks, in the forward and in the gradient."""
  lr = jnp.zeros((1, 4, 4, 3))
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))

  def loss(variables):
    return jnp.sum(net.apply(variables, lr, train=train))

  return "while" in jax.jit(jax.grad(loss)).lower(variables).as_text()


def test_training_unrolls_on_cpus_and_a_gpu_and_all_else_loops():
  net = RRDBNet(features=4, growth=4, blocks=2)
  assert not body_loops(chosen(net), train=True)
  assert body_loops(chosen(net), train=False)
  assert body_loops(chosen(net.clone(unroll=1)), train=True)
  assert body_loops(net, train=True)  # nothing is known of the devices
  # Winograd's form has other loops too, so count: it needs none, having no convolutions to unroll.
  net = chosen(RRDBNet(features=8, growth=8, blocks=3, algorithm="winograd"))
  lr = jnp.zeros((1, 4, 4, 3))
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))
  loss = jax.grad(lambda v: jnp.sum(net.apply(v, lr, train=True)))
  assert jax.jit(loss).lower(variables).as_text().count("stablehlo.convolution") == 0
  net = RRDBNet(features=4, growth=4, blocks=3)
  for platform, loops in (("tpu", True), ("gpu", False)):
    assert body_loops(chosen(net, platform), train=True) == loops
    assert body_loops(chosen(net, platform), train=False)


def initial_params(net):
  # XLA's own generator: the default one, inlined for each array, takes far longer to compile.
  key = jax.random.key(0, impl="rbg")
  lr = jnp.zeros((1, 4, 4, 3))
  params = jax.jit(lambda: net.init(key, lr, train=False)["params"])()
  return jax.tree.map(np.asarray, params)


def test_rrdbnet_initial_values():
  params = initial_params(RRDBNet(blocks=2))
  for dense_block in ("rdb1", "rdb2", "rdb3"):
    for i in range(1, 6):
      conv = params["body"][dense_block][f"conv{i}"]
      fan_in = 9 * (64 + 32 * (i - 1))
      for block in conv["kernel"]:
        np.testing.assert_allclose(block.std(), 0.1 * (2 / fan_in) ** 0.5, rtol=0.02)
      np.testing.assert_array_equal(conv["bias"], 0)
  first, second = params["body"]["rdb1"]["conv1"]["kernel"]
  assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03
  for name, fan_in in (
    ("conv_first", 27),
    ("conv_body", 576),
    ("conv_up1", 576),
    ("conv_hr", 576),
    ("conv_last", 576),
  ):
    for array in params[name].values():
      assert np.abs(array).max() <= fan_in**-0.5
    np.testing.assert_allclose(params[name]["kernel"].std(), (3 * fan_in) ** -0.5, rtol=0.05)
    assert params[name]["bias"].std() > 0


def test_msrresnet_initial_values():
  params = initial_params(MSRResNet(blocks=2))
  for path, array in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key == "bias":
      np.testing.assert_array_equal(array, 0)
    else:
      fan_in = np.prod(array.shape[-4:-1])
      np.testing.assert_allclose(np.std(array), 0.1 * (2 / fan_in) ** 0.5, rtol=0.05)


def test_tanh_is_mapped_to_the_images_range():
  lr, _ = images(6, 6, 1)
  net = SRResNet(features=4, blocks=1, scale=1)
  variables = random_variables(net, lr)
  raw = net.apply(variables, lr, train=False)
  mapped = net.clone(final_activation="tanh").apply(variables, lr, train=False)
  np.testing.assert_allclose(mapped, 1 / (1 + np.exp(-2 * np.asarray(raw))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GENERATORS)
def test_bfloat16_is_near_float32_and_comes_out_as_float32(name):
  lr, _ = images(8, 8, 2)
  make = functools.partial(GENERATORS[name], features=8, blocks=2, scale=2)
  variables = random_variables(make(), lr)
  run = jax.jit(lambda net, variables: net.apply(variables, lr, train=False), static_argnums=0)
  expected, actual = run(make(), variables), run(make(dtype="bfloat16"), variables)
  assert actual.dtype == jnp.float32
  error = np.abs(actual - expected).max() / np.abs(expected).max()
  assert 1e-5 < error < 0.05


@pytest.mark.parametrize("name", GENERATORS)
def test_every_convolution_can_be_intercepted_and_computes_in_the_dtype(name):
  net = GENERATORS[name](features=4, blocks=1, dtype="bfloat16")
  lr = jnp.zeros((1, 4, 4, 3))
  seen = {}

  def note(next_function, args, kwargs, context):
    out = next_function(*args, **kwargs)
    if isinstance(context.module, nn.Conv):
      seen[context.module.name] = out.dtype
    return out

  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))
  with nn.intercept_methods(note):
    jax.eval_shape(lambda v: net.apply(v, lr, train=False), variables)
  kernels = {
    path[-2].key
    for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])
    if path[-1].key == "kernel"
  }
  assert seen == {kernel: jnp.bfloat16 for kernel in kernels}


@pytest.mark.parametrize("name", GENERATORS)
def test_height_and_width_can_stay_unknown(name):
  net = GENERATORS[name](features=4, blocks=1)
  variables = jax.eval_shape(
    lambda: net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False)
  )
  n, h, w = jax.export.symbolic_shape("n, h, w")
  lr = jax.ShapeDtypeStruct((n, h, w, 3), jnp.float32)
  exported = jax.export.export(jax.jit(lambda v, lr: net.apply(v, lr, train=False)))(variables, lr)
  assert exported.out_avals[0].shape == (n, 4 * h, 4 * w, 3)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: RRDBNet(scale=5), r"RRDBNet: scale=5 must be one of \[1, 2, 3, 4, 8\]; try scale=4"),
    (lambda: RRDBNet(scale=1, input_unshuffle=3), "input_unshuffle=3 must be 1, 2 or 4"),
    (lambda: RRDBNet(scale=4, input_unshuffle=4), "its product with scale=4 one of"),
    (lambda: SRResNet(blocks=0), "SRResNet: blocks=0 must be at least 1"),
    (lambda: RRDBNet(growth=0), "growth=0 must be at least 1"),
    (lambda: SRResNet(final_activation="relu"), "'relu' must be one of none, tanh"),
    (lambda: MSRResNet(dtype="bf16"), "dtype='bf16' must be a float dtype; try float32 or bf"),
    (lambda: MSRResNet(dtype="int32"), "dtype='int32' must be a float dtype"),
    (lambda: ResidualNet(unroll=-1), "unroll=-1 must be 0"),
    (
      lambda: RRDBNet(algorithm="fast"),
      "RRDBNet: algorithm='fast' must be one of concat, by_source, winograd, or ''",
    ),
  ],
)
def test_invalid_values_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_msrresnet_needs_as_many_channels_in_as_out():
  net = MSRResNet(features=4, blocks=1, out_channels=3)
  with pytest.raises(ValueError, match="out_channels=3 must equal the 1 channels of lr"):
    net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)), train=False)


@pytest.mark.parametrize("model", ["realesrgan_x4plus", "realesrgan_x4plus_anime"])
def test_published_weights_give_their_published_output(shared, model):
  """Golden outputs: computed with torch 2.13.0 in float32."""
  state = dict(np.load(shared / "weights" / f"{model}_f16.npz"))
  golden = np.load(shared / "golden" / "rrdb_golden.npz")
  name, kwargs, variables = state_dicts.from_state_dict(state)
  assert name == "rrdbnet"
  lr = golden["input_u8"][None] / np.float32(255)
  net = RRDBNet(**kwargs)
  sr = jax.jit(lambda v, lr: net.apply(v, lr, train=False))(variables, lr)
  np.testing.assert_allclose(sr[0], golden[f"out_f32_{model}"], atol=1e-3)
