"""Tests of sr_jax/onednn.py against XLA's convolutions, and of the networks that compute by it."""

import platform
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sr_jax import discriminators
from sr_jax import evaluate
from sr_jax import generators
from sr_jax import onednn
from sr_jax import vgg
from sr_jax.dense_block import dense_block
from sr_jax.formats import stablehlo_export


@pytest.fixture(scope="module")
def works():
  """Skips where jaxlib is built without oneDNN."""
  if (sys.platform, platform.machine()) != ("linux", "x86_64"):
    pytest.skip("jaxlib has oneDNN on Linux for x86-64 alone")
  assert "float32" in onednn._working()


@pytest.fixture
def bfloat16(works):
  """Skips where oneDNN may have no bfloat16, which would end this process."""
  if not onednn._has_bfloat16():
    pytest.skip("this CPU has no instructions for bfloat16, or ONEDNN_MAX_CPU_ISA forbids them")
  assert "bfloat16" in onednn._working()


@pytest.fixture(autouse=True)
def programs_are_kept_again():
  """For the tests that come after."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  yield
  jax.config.update(name, before)


@pytest.fixture
def use(works, monkeypatch):
  """Makes networks in the dtypes that it is given compute by oneDNN, as on one CPU device."""

  def use(*dtypes):
    monkeypatch.setattr(onednn, "usable", lambda dtype: str(jnp.dtype(dtype)) in dtypes)
    jax.clear_caches()

  yield use
  jax.clear_caches()


@pytest.fixture
def used(use, bfloat16):
  use("bfloat16")


def draw(*shapes, dtype, seed=0):
  """Values that a dtype has, as float32."""
  rng = np.random.default_rng(seed)
  return [rng.normal(size=shape).astype(dtype).astype(np.float32) for shape in shapes]


SAID = "convolutions in {} are XLA's, since a trial of oneDNN's failed: "

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
  actual, ours = jax.vjp(jax.jit(lambda x, w: onednn.conv(x, w, stride, around, dtype)), x, w)
  for a, b in zip((actual, *ours(cotangent)), (expected, *back(cotangent)), strict=True):
    assert a.shape == b.shape and a.dtype == b.dtype == jnp.float32
    assert np.abs(a - b).max() <= 3e-5 * np.abs(b).max()


def test_it_multiplies_bfloat16_and_keeps_float32(bfloat16):
  x = jnp.full((1, 1, 1, 1), 1 + 2**-7 + 2**-9)  # a quarter of a unit of bfloat16 too much
  y = onednn.conv(x, jnp.full((1, 1, 1, 1), 1 + 2**-7), 1, ((0, 0), (0, 0)), jnp.bfloat16)
  assert float(y[0, 0, 0, 0]) == (1 + 2**-7) ** 2  # which bfloat16 does not have


NETWORKS = {
  "rrdbnet": lambda **k: generators.RRDBNet(features=8, growth=4, blocks=2, scale=2, **k),
  "srresnet": lambda **k: generators.SRResNet(features=8, blocks=2, scale=2, **k),
  "vgg": lambda **k: discriminators.VGGDiscriminator(features=8, **k),
  "unet": lambda **k: discriminators.UNetDiscriminator(features=8, **k),
}


def test_dense_block(bfloat16):
  """Beside the same block by XLA's convolutions of what is rounded; tests/winograd_test.py has the
  block beside one as it is printed."""

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
    chunks=lambda x: x[None],
  )
  widths = [(8 + 4 * i, 4 if i < 4 else 8) for i in range(5)]
  kernels = draw(*((3, 3, c, f) for c, f in widths), dtype=jnp.bfloat16)
  biases = draw(*((f,) for _, f in widths), dtype=jnp.float32)
  x, cotangent = draw((2, 7, 9, 8), (2, 7, 9, 8), dtype=jnp.float32, seed=1)
  kernels = [0.1 * kernel for kernel in kernels]

  def results(by):
    y, back = jax.vjp(jax.jit(lambda *arguments: dense_block(by, *arguments)), x, kernels, biases)
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
  "name, dtype", [*((name, "bfloat16") for name in NETWORKS), ("vgg", "float32")]
)
def test_networks_are_the_same_ones(request, name, dtype, use):
  """Same parameters; output and each gradient about as near to XLA's in float32 as XLA's."""
  if dtype == "bfloat16":
    request.getfixturevalue("bfloat16")
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
  use("float32", "bfloat16")
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), image, train=False))
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
  by_onednn, has_convolutions = out_and_gradients(net)
  assert not has_convolutions
  ours, theirs = errors(by_onednn), errors(by_xla)
  assert (ours < (1e-5 if dtype == "float32" else 1.5 * theirs + 0.01)).all()


def test_vgg_features_in_bfloat16(used):
  rng = np.random.default_rng(0)
  params = {"input": {"scale": np.ones(3, np.float32), "shift": np.zeros(3, np.float32)}}
  for name, c, f in (("conv1_1", 3, 8), ("conv1_2", 8, 8), ("conv2_1", 8, 16)):
    kernel = rng.normal(size=(3, 3, c, f)).astype(np.float32) / np.sqrt(9 * c)
    params[name] = {"kernel": kernel, "bias": rng.normal(size=f).astype(np.float32)}
  image = rng.uniform(size=(2, 8, 8, 3)).astype(np.float32)
  seen = [
    vgg.vgg_features(params, image, ["conv2_1"], dtype)["conv2_1"]
    for dtype in ("float32", "bfloat16")
  ]
  error = np.abs(seen[1] - seen[0]).max() / np.abs(seen[0]).max()
  assert 1e-4 < error < 1e-2 and seen[1].dtype == jnp.float32


def test_padding_changes_nothing(used):
  net = NETWORKS["rrdbnet"](dtype="bfloat16")
  lr = np.random.default_rng(0).integers(0, 256, (1, 13, 37, 3), np.uint8)
  variables = random_variables(net, lr)
  padded = np.pad(lr, ((0, 0), (0, 3), (0, 11), (0, 0)), mode="edge")
  actual = evaluate._make_forward(net)(variables, padded, 13, 37)[:, :26, :74]
  sr = jax.jit(lambda v, lr: net.apply(v, lr, train=False))(variables, np.float32(lr) / 255)
  expected = np.floor(np.clip(sr, 0, 1) * 255 + 0.5)
  assert np.abs(np.asarray(actual, int) - expected).max() <= 1


def test_it_trains_in_a_loop(used):
  """One program of the body, not one for each block."""
  net = NETWORKS["rrdbnet"](dtype="bfloat16")
  lr = jnp.zeros((1, 4, 4, 3))
  variables = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))
  gradient = jax.grad(lambda v: jnp.sum(net.apply(v, lr, train=True)))
  convolutions = jax.jit(gradient).lower(variables).as_text().count("__onednn$convolution(")
  # Forward and back, but for the last one's output and the first one's input.
  assert convolutions == 2 * (3 * 5 + 5) - 2


@pytest.mark.parametrize(
  "backend, devices, dtype, instructions, printed, status, failed, expected",
  [
    ("cpu", 1, "float32", False, ["float32"], 0, "", True),
    ("cpu", 1, "bfloat16", True, ["float32", "bfloat16"], 0, "", True),
    ("cpu", 1, "bfloat16", False, ["float32"], 0, "", False),
    ("cpu", 1, "float64", True, ["float32", "bfloat16"], 0, "", False),
    ("gpu", 1, "float32", True, [], -6, "", False),
    ("cpu", 2, "float32", True, [], -6, "", False),
    ("cpu", 1, "float32", False, [], -6, "float32", False),
    ("cpu", 1, "float32", True, [], -6, "float32 and bfloat16", False),
    ("cpu", 1, "float32", True, ["float32"], -6, "bfloat16", True),
    ("cpu", 1, "bfloat16", True, ["float32"], -6, "bfloat16", False),
    ("cpu", 1, "float32", True, ["oneDNN has float32"], -6, "float32 and bfloat16", False),
    ("cpu", 1, "float32", False, ["float32"], -11, "float32", False),  # it fails at its end
  ],
)
def test_where_it_is_used(
  monkeypatch, capsys, backend, devices, dtype, instructions, printed, status, failed, expected
):
  """By what the process that tries it printed, and how it ended; what failed is said."""
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "device_count", lambda: devices)
  monkeypatch.setattr(onednn, "_has_bfloat16", lambda: instructions)
  monkeypatch.setattr(onednn, "_working", onednn._working.__wrapped__)
  ended = subprocess.CompletedProcess([], status, "\n".join(printed), "what\nand why\n")
  monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: ended)
  assert onednn.usable(dtype) is expected
  said = f"{SAID.format(failed)}status {status}, and why\n" if failed else ""
  assert capsys.readouterr().err == said
  monkeypatch.setenv("SR_JAX_ONEDNN", "0")
  assert not onednn.usable(dtype)


@pytest.mark.parametrize(
  "limit, expected",
  [
    ("", True),
    ("AVX2", False),
    ("avx512_core", False),
    ("AVX512_CORE_BF16", True),
    ("AVX512_CORE_AMX", True),
    ("DEFAULT", True),
  ],
)
def test_onednns_own_limit_is_heeded(monkeypatch, limit, expected):
  facts = types.SimpleNamespace(exists=lambda: True, read_text=lambda: "flags: fma avx512_bf16")
  monkeypatch.setattr(onednn, "pathlib", types.SimpleNamespace(Path=lambda path: facts))
  names = {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}
  for name in names:
    monkeypatch.setenv(name, limit)
    for other in names - {name}:
      monkeypatch.delenv(other, raising=False)
    assert onednn._has_bfloat16.__wrapped__() is expected


def test_a_trial_that_cannot_start_is_said(monkeypatch, capsys):
  monkeypatch.setattr(sys, "executable", "/no/such/python")
  monkeypatch.setattr(onednn, "_has_bfloat16", lambda: True)
  assert not onednn._working.__wrapped__()
  assert capsys.readouterr().err.startswith(SAID.format("float32 and bfloat16"))


def test_numbers_that_differ_end_the_trial(monkeypatch, capsys):
  def by_xla(x, kernel, stride, padding, dtype):
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

  monkeypatch.setattr(onednn, "_has_bfloat16", lambda: True)
  monkeypatch.setattr(onednn, "conv", by_xla)
  onednn._try()
  assert capsys.readouterr().out == "float32\nbfloat16\n"
  for wrong, printed in (("float32", ""), ("bfloat16", "float32\n")):

    def differs(x, kernel, dtype, wrong=wrong, **named):
      return (1.01 if dtype == wrong else 1) * by_xla(x, kernel, dtype=dtype, **named)

    monkeypatch.setattr(onednn, "conv", differs)
    with pytest.raises(ValueError, match=f"in {wrong} differ"):
      onednn._try()
    assert capsys.readouterr().out == printed


def test_shapes_ask_for_no_trial(monkeypatch):
  monkeypatch.setattr(onednn, "usable", lambda dtype: pytest.fail("nothing is computed"))
  for name in NETWORKS:
    random_variables(NETWORKS[name](), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("dense", generators.DENSE)
def test_every_way_is_initialised_in_bfloat16(used, dense):
  net = generators.RRDBNet(features=8, growth=4, blocks=2, dense=dense, dtype="bfloat16")
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3)), train=False))
  assert shapes["params"]["body"]["rdb1"]["conv2"]["kernel"].shape == (2, 3, 3, 12, 4)


def test_no_program_is_kept_that_cannot_be(works):
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.jit(lambda x: onednn.conv(x, jnp.ones((3, 3, 8, 8)), 1, onednn.SAME, jnp.float32)).lower(
    jnp.ones((1, 4, 4, 8))
  )
  assert jax.config.jax_persistent_cache_min_compile_time_secs > 1e6


def test_programs_of_other_machines_are_left_to_xla(works, monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  jax.clear_caches()
  net = NETWORKS["srresnet"]()
  variables = random_variables(net, np.zeros((1, 8, 8, 3), np.float32))

  def program():
    return jax.jit(lambda v, x: net.apply(v, x, train=False)).lower(
      variables, jnp.zeros((1, 8, 8, 3))
    )

  assert "__onednn$convolution" in program().as_text()
  with onednn.left_to_xla():
    assert "__onednn" not in program().as_text()
  kwargs = {"features": 8, "blocks": 2, "scale": 2}
  assert b"__onednn" not in stablehlo_export.to_stablehlo("srresnet", kwargs, variables)
  jax.clear_caches()
