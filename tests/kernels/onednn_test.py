"""Tests of sr_jax/kernels/onednn.py against XLA's convolutions, and of the networks by it."""

import functools
import platform
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sr_jax.formats import stablehlo_export
from sr_jax.kernels import choose
from sr_jax.kernels.dense_block import dense_block
from sr_jax.kernels import onednn
from sr_jax.networks import discriminators
from sr_jax.networks.rrdbnet import RRDBNet
from sr_jax.networks.srresnet import SRResNet
from sr_jax.networks import vgg
from sr_jax.upscaling import upscaler

ONE_CPU = [types.SimpleNamespace(platform="cpu")]


@pytest.fixture(scope="module")
def works():
  """Skips where jaxlib is built without oneDNN."""
  if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("jaxlib has oneDNN on Linux for x86-64 alone")
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv("SR_JAX_ONEDNN", raising=False)
    assert choose.usable("float32")


@pytest.fixture
def bfloat16(works):
  """Skips where oneDNN may have no bfloat16, which would end this process."""
  if not choose.has_bfloat16():
    pytest.skip("this CPU has no instructions for bfloat16, or ONEDNN_MAX_CPU_ISA forbids them")
  assert "bfloat16" in choose.working()


@pytest.fixture(autouse=True)
def no_programs_are_kept(monkeypatch):
  """But by the tests that come after; and oneDNN is used, as it is where nothing is said."""
  monkeypatch.delenv("SR_JAX_ONEDNN", raising=False)
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  onednn.stop_keeping_programs()
  yield
  jax.config.update(name, before)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request, works):
  """Each that oneDNN has here."""
  if request.param == "bfloat16":
    request.getfixturevalue("bfloat16")
  return request.param


def by_onednn(net):
  """The network as on one CPU device."""
  kernels = choose.choose(ONE_CPU, net.dtype, net)
  assert kernels.conv is onednn.conv
  return net.clone(kernels=kernels)


def draw(*shapes, dtype, seed=0):
  """Values that a dtype has, as float32."""
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(dtype).astype(np.float32) for shape in shapes]


CASES = [  # sides, channels, features, kernel, stride, padding
  ((7, 10), 5, 6, 3, 1, 1),
  ((8, 6), 64, 3, 3, 1, 1),
  ((8, 6), 3, 64, 9, 1, 4),
  ((8, 12), 8, 16, 4, 2, 1),
  ((7, 9), 8, 16, 3, 2, 1),
  ((8, 10), 8, 16, 3, 2, 1),
  ((5, 4), 8, 16, 1, 1, 0),
]


@pytest.mark.parametrize("dtype, pass_bytes", [(jnp.bfloat16, 2**25), (jnp.float32, 1000)])
@pytest.mark.parametrize("sides, channels, features, kernel, stride, padding", CASES)
def test_convolution(
  request, works, monkeypatch, dtype, pass_bytes, sides, channels, features, kernel, stride, padding
):
  """Of rounded operands, so that float32's sums are all that differs."""
  if dtype == jnp.bfloat16:
    request.getfixturevalue("bfloat16")
  monkeypatch.setattr(onednn, "PASS_BYTES", pass_bytes)
  around = ((padding, padding),) * 2
  x, w = draw((2, *sides, channels), (kernel, kernel, channels, features), dtype=dtype)

  def by_xla(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, (stride, stride), around, dimension_numbers=numbers)

  expected, back = jax.vjp(by_xla, x, w)
  (cotangent,) = draw(expected.shape, dtype=dtype, seed=1)
  actual, ours = jax.vjp(jax.jit(lambda x, w: onednn.conv(x, w, None, stride, around, dtype)), x, w)
  for a, b in zip((actual, *ours(cotangent)), (expected, *back(cotangent)), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
    assert np.abs(a - b).max() <= 3e-5 * np.abs(b).max()
  (bias,) = draw((features,), dtype=jnp.float32, seed=2)
  biased = onednn.conv(x, w, bias, stride, around, dtype)
  np.testing.assert_allclose(biased, actual + bias.reshape(1, 1, 1, -1), rtol=1e-6, atol=1e-6)


def test_it_multiplies_bfloat16_and_keeps_float32(bfloat16):
  x = jnp.full((1, 1, 1, 1), 1 + 2**-7 + 2**-9)  # a quarter of a unit of bfloat16 too much
  kernel = jnp.full((1, 1, 1, 1), 1 + 2**-7)
  y = onednn.conv(x, kernel, None, 1, ((0, 0), (0, 0)), jnp.bfloat16)
  assert float(y[0, 0, 0, 0]) == (1 + 2**-7) ** 2  # which bfloat16 does not have


NETWORKS = {
  "rrdbnet": lambda **k: RRDBNet(features=8, growth=4, blocks=2, scale=2, **k),
  "by_source": lambda **k: NETWORKS["rrdbnet"](algorithm="by_source", **k),
  "srresnet": lambda **k: SRResNet(features=8, blocks=2, scale=2, **k),
  "vgg": lambda **k: discriminators.VGGDiscriminator(features=8, **k),
  "unet": lambda **k: discriminators.UNetDiscriminator(features=8, **k),
}


def test_dense_block(bfloat16):
  """Beside the same block by XLA's convolutions of what is rounded; winograd_test.py has the block
  beside one as it is printed."""

  def rounded(a):
    return a.astype(jnp.bfloat16).astype(jnp.float32)

  def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), onednn.SAME, dimension_numbers=numbers)

  def kernel_gradient(x, gradient):
    zeros = jnp.zeros((3, 3, x.shape[-1], gradient.shape[-1]))
    back = jax.vjp(lambda kernel: convolve(rounded(x), kernel), zeros)[1]
    return back(rounded(gradient))[0]

  by_xla = types.SimpleNamespace(
    transform_kernel=rounded,
    convolve=lambda x, kernel: convolve(rounded(x), kernel),
    kernel_gradient=kernel_gradient,
    chunks=onednn.chunks,
    summed_dtype=onednn.summed_dtype,
  )
  widths = [(8 + 4 * i, 4 if i < 4 else 8) for i in range(5)]
  kernels = draw(*((3, 3, c, f) for c, f in widths), dtype=jnp.bfloat16)
  biases = draw(*((f,) for _, f in widths), dtype=jnp.float32)
  x, cotangent = draw((2, 7, 9, 8), (2, 7, 9, 8), dtype=jnp.float32, seed=1)
  kernels = [0.1 * kernel for kernel in kernels]

  def results(by):
    y, back = jax.vjp(jax.jit(functools.partial(dense_block, by, True)), x, kernels, biases)
    return jax.tree.leaves((y, back(cotangent)))

  for a, b in zip(results(onednn), results(by_xla), strict=True):
    # A sum that differs in the last bit may be rounded the other way.
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)


def random_variables(net, image):
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
  rng = np.random.default_rng(0)

  def values(path, leaf):
    if path[-1].key in ("scale", "var", "sigma"):
      return np.ones(leaf.shape, np.float32)
    deviation = 0.1 if path[-1].key == "bias" else np.prod(leaf.shape[-4:-1]) ** -0.5
    return (deviation * rng.normal(size=leaf.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(values, shapes)


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow) if name in ("by_source", "srresnet") else name
    for name in NETWORKS
  ],
)
def test_networks_are_the_same_ones(name, dtype):
  """Same parameters; output and each gradient about as near to XLA's in float32 as XLA's."""
  side = 32 if name == "vgg" else 8
  image = np.random.default_rng(0).uniform(size=(2, side, side, 3)).astype(np.float32)
  exact, net = NETWORKS[name](), NETWORKS[name](dtype=dtype)
  variables = random_variables(exact, image)

  def out_and_gradients(net):
    def loss(params):
      # BatchNorm by what it has seen: over a batch of two it would blow up what is rounded.
      out = net.apply({**variables, "params": params}, image, train=False)
      return jnp.sum(jnp.sin(out)), out

    program = jax.jit(jax.grad(loss, has_aux=True)).lower(variables["params"])
    results = jax.tree.leaves(program.compile()(variables["params"]))
    return results, "stablehlo.convolution" in program.as_text()

  def errors(results):
    pairs = zip(results, expected, strict=True)
    return np.array([np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-6) for a, b in pairs])

  expected, _ = out_and_gradients(exact)
  by_xla, has_convolutions = out_and_gradients(net)
  assert has_convolutions
  net = by_onednn(net)
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
  results, has_convolutions = out_and_gradients(net)
  assert not has_convolutions
  ours, theirs = errors(results), errors(by_xla)
  assert (ours < (1e-5 if dtype == "float32" else 1.5 * theirs + 0.01)).all()


def test_vgg_features_in_bfloat16(bfloat16):
  rng = np.random.default_rng(0)
  params = {"input": {"scale": np.ones(3, np.float32), "shift": np.zeros(3, np.float32)}}
  for name, c, f in (("conv1_1", 3, 8), ("conv1_2", 8, 8), ("conv2_1", 8, 16)):
    kernel = rng.normal(size=(3, 3, c, f)).astype(np.float32) / np.sqrt(9 * c)
    params[name] = {"kernel": kernel, "bias": rng.normal(size=f).astype(np.float32)}
  image = rng.uniform(size=(2, 8, 8, 3)).astype(np.float32)
  seen = [
    vgg.vgg_features(params, image, ["conv2_1"], dtype, kernels)["conv2_1"]
    for dtype, kernels in (
      ("float32", choose.PLAIN),
      ("bfloat16", choose.choose(ONE_CPU, "bfloat16")),
    )
  ]
  error = np.abs(seen[1] - seen[0]).max() / np.abs(seen[0]).max()
  assert 1e-4 < error < 1e-2 and seen[1].dtype == jnp.float32


@pytest.mark.parametrize("name", ["rrdbnet", "by_source"])
def test_padding_changes_nothing(monkeypatch, name, dtype):
  net = by_onednn(NETWORKS[name](dtype=dtype))
  monkeypatch.setattr(upscaler, "choose", lambda devices, dtype, module: net.kernels)
  lr = np.random.default_rng(0).integers(0, 256, (1, 13, 37, 3), np.uint8)
  variables = random_variables(net, lr)
  actual = upscaler.make_upscaler(NETWORKS[name](dtype=dtype), variables)(lr[0])
  sr = jax.jit(lambda v, lr: net.apply(v, lr, train=False))(variables, np.float32(lr) / 255)
  expected = np.floor(np.clip(sr, 0, 1) * 255 + 0.5)
  assert actual.shape == expected.shape[1:] == (26, 74, 3)
  assert np.abs(np.asarray(actual, int) - expected[0]).max() <= 1


def test_it_trains_in_a_loop(dtype):
  """One program of the body, not one for each block."""
  net = by_onednn(NETWORKS["rrdbnet"](dtype=dtype))
  lr = jnp.zeros((1, 4, 4, 3))
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))
  gradient = jax.grad(lambda v: jnp.sum(net.apply(v, lr, train=True)))
  convolutions = jax.jit(gradient).lower(variables).as_text().count("__onednn$convolution(")
  # Forward and back, but for the last one's output and the first one's input.
  assert convolutions == 2 * (3 * 5 + 5) - 2


def test_numbers_that_differ_end_the_trial(monkeypatch, capsys):
  def by_xla(x, kernel, bias, stride, padding, dtype):
    assert bias is None
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

  monkeypatch.setattr(onednn, "conv", by_xla)
  onednn.try_dtypes(["float32", "bfloat16"])
  assert capsys.readouterr().out == "float32\nbfloat16\n"
  for wrong, printed in (("float32", ""), ("bfloat16", "float32\n")):

    def differs(x, kernel, dtype, wrong=wrong, **named):
      return (1.01 if dtype == wrong else 1) * by_xla(x, kernel, dtype=dtype, **named)

    monkeypatch.setattr(onednn, "conv", differs)
    with pytest.raises(ValueError, match=f"in {wrong} differ"):
      onednn.try_dtypes(["float32", "bfloat16"])
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("name", NETWORKS)
def test_initial_values_are_not_computed_by_it(name):
  def conv(*arguments):
    pytest.fail("nothing is convolved by oneDNN")

  net = NETWORKS[name](kernels=choose.Kernels(conv=conv))
  random_variables(net, jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("algorithm", choose.ALGORITHMS)
def test_every_way_is_initialised_in_bfloat16(monkeypatch, algorithm):
  monkeypatch.setattr(choose, "usable", lambda dtype: True)
  net = RRDBNet(features=8, growth=4, blocks=2, algorithm=algorithm, dtype="bfloat16")
  net = net.clone(kernels=choose.choose(ONE_CPU, "bfloat16", net))
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False))
  assert shapes["params"]["body"]["rdb1"]["conv2"]["kernel"].shape == (2, 3, 3, 12, 4)


def test_no_program_is_kept_that_cannot_be(works):
  name = "jax_persistent_cache_min_compile_time_secs"
  jax.config.update(name, 0.0)
  wide = RRDBNet(blocks=1)
  assert choose.choose(ONE_CPU, "float32", wide).conv is not onednn.conv  # but Winograd's
  assert choose.choose(8 * ONE_CPU, "float32").conv is None
  assert getattr(jax.config, name) == 0
  assert choose.choose(ONE_CPU, "float32").conv is onednn.conv
  assert getattr(jax.config, name) > 1e6


def test_programs_of_other_machines_are_left_to_xla(works):
  net = NETWORKS["srresnet"]()
  variables = random_variables(net, np.zeros((1, 8, 8, 3), np.float32))

  def program(net):
    lowered = jax.jit(lambda v, x: net.apply(v, x, train=False)).lower(
      variables, jnp.zeros((1, 8, 8, 3))
    )
    return lowered.as_text()

  assert "__onednn$convolution" in program(by_onednn(net))
  assert "__onednn" not in program(net)
  kwargs = {"features": 8, "blocks": 2, "scale": 2}
  assert b"__onednn" not in stablehlo_export.to_stablehlo("srresnet", kwargs, variables)
