"""Tests of sr_jax/kernels/choose.py: what is chosen for which devices; nothing else asks."""

import ast
import functools
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from sr_jax.kernels import choose
from sr_jax.kernels import dense_block_tpu
from sr_jax.kernels import direct
from sr_jax.kernels import leaky_relu
from sr_jax.kernels import onednn
from sr_jax.kernels import winograd
from sr_jax.kernels.dense_block import DenseBlockBy, DenseBlockWith
from sr_jax.networks.rrdbnet import RRDBNet, ResidualNet
from sr_jax.networks.srresnet import MSRResNet, SRResNet
from sr_jax.models import write
from tiny_models import make_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
KEEPING = "jax_persistent_cache_min_compile_time_secs"
GRAPHS = "xla_gpu_graph_min_graph_size"


def devices(platform, count=1):
  return [types.SimpleNamespace(platform=platform)] * count


@pytest.fixture(autouse=True)
def programs_are_kept_again():
  """For the tests that come after."""
  before = getattr(jax.config, KEEPING)
  yield
  jax.config.update(KEEPING, before)


@pytest.fixture
def working(monkeypatch):
  """Makes trials of oneDNN succeed in the dtypes that it is given, and adds to a list of them."""

  def working(*dtypes):
    asked = []
    monkeypatch.delenv("SR_JAX_ONEDNN", raising=False)
    monkeypatch.setattr(choose, "has_bfloat16", lambda: "bfloat16" in dtypes)
    monkeypatch.setattr(choose, "working", lambda: asked.append(0) or frozenset(dtypes))
    return asked

  return working


WIDE = RRDBNet(blocks=2)
NARROW = RRDBNet(features=64, growth=16, blocks=2)
NETWORKS = {
  "wide": WIDE,
  "narrow": NARROW,
  "concat": WIDE.clone(algorithm="concat"),
  "by_source": WIDE.clone(algorithm="by_source"),
  "winograd": WIDE.clone(algorithm="winograd"),
  "srresnet": SRResNet(),
  "msrresnet": MSRResNet(),
  "residualnet": ResidualNet(),
  "none": None,  # VGG and the discriminators
}
OTHERS = ("srresnet", "msrresnet", "residualnet", "none")
CHIPS = {
  "1 cpu": devices("cpu"),
  "8 cpus": devices("cpu", 8),
  "1 gpu": devices("gpu"),
  "8 gpus": devices("gpu", 8),
  "1 tpu": devices("tpu"),
  "8 tpus": devices("tpu", 8),
}
BOTH = ("float32", "bfloat16")

# (chips, dtypes, whether oneDNN works) -> network -> (conv, form of dense blocks, slow_loops).
BY_ONEDNN = {name: (onednn.conv, None, False) for name in ("narrow", "concat", *OTHERS)}
BY_XLA = {name: (None, None, True) for name in ("narrow", "concat", *OTHERS)}
BY_WINOGRAD = (winograd.conv, winograd, False)
EXPECTED = [
  (
    "1 cpu", ("float32",), True,
    {**BY_ONEDNN, "wide": BY_WINOGRAD, "winograd": BY_WINOGRAD,
     "by_source": (onednn.conv, direct, False)},
  ),
  (
    "1 cpu", ("bfloat16",), True,
    {**BY_ONEDNN, "winograd": BY_WINOGRAD,
     **dict.fromkeys(("wide", "narrow", "by_source"), (onednn.conv, onednn, False))},
  ),
  (
    "1 cpu", BOTH, False,
    {**BY_XLA, "wide": BY_WINOGRAD, "winograd": BY_WINOGRAD, "by_source": (None, direct, True)},
  ),
  (
    "8 cpus", BOTH, True,
    {**BY_XLA, "wide": (None, None, True), "winograd": BY_WINOGRAD,
     "by_source": (None, direct, True)},
  ),
  *(
    (
      chips, BOTH, True,
      {**dict.fromkeys(("concat", *OTHERS), (None, None, False)), "winograd": BY_WINOGRAD,
       **dict.fromkeys(("wide", "narrow", "by_source"), (None, direct, False))},
    )
    for chips in ("1 gpu", "8 gpus")
  ),
  *(
    (
      chips, BOTH, True,
      {**dict.fromkeys(("concat", *OTHERS), (None, None, False)),
       "winograd": BY_WINOGRAD, "by_source": (None, direct, False),
       **dict.fromkeys(("wide", "narrow"), (None, dense_block_tpu, False))},
    )
    for chips in ("1 tpu", "8 tpus")
  ),
]  # fmt: skip


def expected_dense_block(form, conv, *, single_device: bool):
  if form is dense_block_tpu:
    return dense_block_tpu.on_tpu
  if form is direct and conv:
    return DenseBlockWith(conv, leaky_relu.by_output)
  return form and DenseBlockBy(form, single_device)


@pytest.mark.parametrize(
  "chips, dtype, works, network, expected",
  [
    (chips, dtype, works, network, expected)
    for chips, dtypes, works, networks in EXPECTED
    for dtype in dtypes
    for network, expected in networks.items()
  ],
)
def test_what_is_chosen(monkeypatch, working, chips, dtype, works, network, expected):
  working(*BOTH if works else ())
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  keeping = getattr(jax.config, KEEPING)
  conv, form, slow_loops = expected
  on_a_gpu, net = chips.endswith(("gpu", "gpus")), NETWORKS[network]
  if net is not None:
    net = net.clone(dtype=dtype)
  assert choose.choose(CHIPS[chips], dtype, net) == choose.Kernels(
    conv=conv,
    dense_block=expected_dense_block(form, conv, single_device=chips.startswith("1")),
    leaky_relu=leaky_relu.by_output,
    unroll=on_a_gpu or slow_loops,
    slow_loops=slow_loops,
    pixels=4096 if chips == "1 cpu" and not slow_loops else 0,
    compiler_options=((GRAPHS, 1),) if on_a_gpu else (),
  )
  assert getattr(jax.config, KEEPING) == (1e9 if conv is onednn.conv else keeping)


def test_the_table_has_every_network():
  assert all(set(networks) == set(NETWORKS) for *_, networks in EXPECTED)


@pytest.mark.parametrize(
  "growth, features, expected", [(32, 32, True), (31, 64, False), (32, 31, False)]
)
def test_winograds_form_needs_channels(working, growth, features, expected):
  working()
  net = RRDBNet(growth=growth, features=features)
  kernels = choose.choose(devices("cpu"), "float32", net)
  by_winograd = DenseBlockBy(winograd, single_device=True)
  assert (kernels.dense_block == by_winograd) == (kernels.conv is winograd.conv) == expected


def test_where_onednn_is_not_used_it_is_not_tried(working):
  tried = working(*BOTH)
  for dtype in BOTH:
    for chips in set(CHIPS) - {"1 cpu"}:
      for net in NETWORKS.values():
        choose.choose(CHIPS[chips], dtype, net)
  choose.choose(CHIPS["1 cpu"], "float32", NETWORKS["winograd"])
  choose.choose(CHIPS["1 cpu"], "float32", WIDE)
  choose.choose(CHIPS["1 cpu"], "float64")
  assert not tried
  choose.choose(CHIPS["1 cpu"], "float32")
  assert tried


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("chips", CHIPS)
def test_two_calls_give_the_same_programs(working, chips, name):
  """Equal and hashable, so jit takes a network with the one for a network with the other."""
  working(*BOTH)
  net = NETWORKS[name]
  one, other = (choose.choose(list(CHIPS[chips]), "float32", net) for _ in range(2))
  assert one == other and hash(one) == hash(other)
  if net is not None:
    assert net.clone(kernels=one) == net.clone(kernels=other)
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def program(net, x):
      traced.append(net)
      return x

    for kernels in (one, other):
      program(net.clone(kernels=kernels), 1.0)
    assert len(traced) == 1


def test_devices_may_be_a_meshs():
  mesh = jax.make_mesh((4, 2), ("a", "b"))
  kernels = choose.choose(mesh.devices, "float32")
  assert kernels == choose.choose(jax.devices(), "float32")
  assert kernels.pixels == 0 and kernels.slow_loops


def test_graphs_of_a_gpu_begin_at_one_kernel_unless_xla_flags_say_otherwise(monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  assert choose.choose(jax.devices(), "float32").compiler_options == ()
  assert choose.choose(devices("gpu"), "float32").compiler_options == ((GRAPHS, 1),)
  monkeypatch.setenv("XLA_FLAGS", f"--{GRAPHS}=5")
  assert choose.choose(devices("gpu"), "float32").compiler_options == ()


SAID = "convolutions in {} are XLA's, since a trial of oneDNN's failed: "


@pytest.mark.parametrize(
  "platform, count, dtype, instructions, printed, status, failed, expected",
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
def test_where_onednn_is_used(
  monkeypatch,
  capsys,
  platform,
  count,
  dtype,
  instructions,
  printed,
  status,
  failed,
  expected,
):
  """By what the process that tries it printed, and how it ended; what failed is said."""
  commands = []

  def run(command, **options):
    commands.append(command)
    return subprocess.CompletedProcess(command, status, "\n".join(printed), "what\nand why\n")

  monkeypatch.delenv("SR_JAX_ONEDNN", raising=False)
  monkeypatch.setattr(choose, "has_bfloat16", lambda: instructions)
  monkeypatch.setattr(choose, "working", functools.cache(choose.working.__wrapped__))
  monkeypatch.setattr(subprocess, "run", run)
  assert (choose.choose(devices(platform, count), dtype).conv is onednn.conv) is expected
  said = f"{SAID.format(failed)}status {status}, and why\n" if failed else ""
  assert capsys.readouterr().err == said
  tried = ["float32", "bfloat16"] if instructions else ["float32"]
  assert all(command[1:] == ["-m", "sr_jax.kernels.onednn", *tried] for command in commands)
  assert len(commands) == bool(expected or failed)
  monkeypatch.setenv("SR_JAX_ONEDNN", "0")
  assert choose.choose(devices(platform, count), dtype).conv is None


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
  monkeypatch.setattr(choose, "pathlib", types.SimpleNamespace(Path=lambda path: facts))
  names = {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"}
  for name in names:
    monkeypatch.setenv(name, limit)
    for other in names - {name}:
      monkeypatch.delenv(other, raising=False)
    assert choose.has_bfloat16.__wrapped__() is expected


def test_a_trial_that_cannot_start_is_said(monkeypatch, capsys):
  monkeypatch.setattr(sys, "executable", "/no/such/python")
  monkeypatch.setattr(choose, "has_bfloat16", lambda: True)
  assert not choose.working.__wrapped__()
  assert capsys.readouterr().err.startswith(SAID.format("float32 and bfloat16"))


@pytest.mark.parametrize(
  "shape, count, loops, parts",
  [
    ((16, 32, 32), 1, True, 4),
    ((16, 32, 32), 1, False, 1),
    ((16, 32, 32), 8, True, 1),
    ((4, 32, 32), 1, True, 1),
    ((6, 32, 32), 1, True, 2),
    ((7, 32, 32), 1, True, 1),  # one by one would take longer
    ((4, 64, 64), 1, True, 4),
    ((16, 48, 48), 1, True, 8),
    ((4, 256, 256), 1, True, 1),
    ((16, 12, 12), 1, True, 1),
  ],
)
def test_parts_fit_the_caches(working, shape, count, loops, parts):
  """Of one CPU, whose gradients are as fast in a loop as out of it."""
  working(*BOTH if loops else ())
  kernels = choose.choose(devices("cpu", count), "float32", ResidualNet())
  assert choose.batch_parts((*shape, 3), kernels.pixels) == parts


# What a user of the library does, in a process of its own: nothing was imported there before.
LIBRARY = """
import os, pkgutil, subprocess, sys
before = dict(os.environ)
import jax
import jax.export
import jax.numpy as jnp
config = dict(jax.config.values)

def fail(*arguments, **options):
  raise AssertionError(f"a process is started: {arguments}")

class Process:
  __init__ = fail

subprocess.Popen, subprocess.run, os.system, os.fork = Process, fail, fail, fail
import sr_jax
for module in pkgutil.walk_packages(sr_jax.__path__, "sr_jax."):
  if not module.name.endswith("__main__"):
    __import__(module.name)
from sr_jax.models.read import load_model
for path in sys.argv[1:]:
  module, variables = load_model(path)
  lr = jnp.linspace(0, 1, 12).reshape(1, 2, 2, 3)

  def upscale(lr):
    return module.apply(variables, lr, train=False)

  def loss(lr):
    return jnp.mean(upscale(lr) ** 2)

  sr = upscale(lr)
  assert sr.shape == (1, 4, 4, 3)
  exported = jax.export.export(jax.jit(upscale), platforms=("cpu", "cuda", "tpu"))(lr)
  assert abs(exported.call(lr) - sr).max() < 1e-5
  value, tangent = jax.jvp(upscale, (lr,), (jnp.ones_like(lr),))
  assert value.shape == tangent.shape and float(abs(tangent).max()) > 0
  second = jax.jit(jax.hessian(loss))(lr).reshape(12, 12)
  assert abs(second - second.T).max() < 1e-4 * abs(second).max()
  updated = module.apply(variables, lr, train=True, mutable=["batch_stats"])[0]
  assert updated.shape == sr.shape
changed = {key for key, value in config.items() if jax.config.values[key] != value}
assert not changed, changed
assert len(jax.devices()) == 1 and jax.default_backend() == "cpu"
"""


@pytest.mark.slow  # twenty seconds
def test_a_loaded_model_is_plain_jax(tmp_path):
  """On one CPU, where training tries oneDNN: no process, no setting, every derivative."""
  paths = []
  for name in ("rrdbnet", "srresnet", "msrresnet", "residualnet"):
    paths.append(str(tmp_path / f"{name}.safetensors"))
    write.save_model(paths[-1], make_model(name, scale=2))
  environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "SR_JAX_ONEDNN")}
  command = [sys.executable, "-c", LIBRARY, *paths]
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]


# Questions about this machine; of a mesh or a topology `devices` may be asked.
QUESTIONS = {
  "jax.default_backend",
  "jax.devices",
  "jax.local_devices",
  "jax.device_count",
  "jax.local_device_count",
  "os.environ",
  "os.getenv",
}


def asked(tree: ast.AST) -> set[str]:
  found = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      name = ast.unparse(node)
      found |= {question for question in QUESTIONS if f"{name}.".startswith(f"{question}.")}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names} & QUESTIONS
  return found


def test_networks_kernels_and_the_step_ask_nothing_of_the_machine():
  sr_jax = ROOT / "sr_jax"
  files = {*sr_jax.glob("networks/*.py"), *sr_jax.glob("kernels/*.py")}
  files |= {sr_jax / "training" / f"{name}.py" for name in ("step", "terms", "losses")}
  chooser = sr_jax / "kernels" / "choose.py"
  assert len(files) > 20 and chooser in files
  assert {path.name: asked(ast.parse(path.read_text())) for path in files - {chooser}} == {
    path.name: set() for path in files - {chooser}
  }
  assert asked(ast.parse(chooser.read_text())) == {"os.environ"}  # of devices it is told
