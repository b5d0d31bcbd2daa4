"""Tests of what the devices say to each other in a step, as benchmarks/pod.py reads it."""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

import step_test as steps
from benchmarks import pod
from sr_jax.data import device_input
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.machine import sharding

DEVICES = 8
ROOT = pathlib.Path(__file__).resolve().parents[2]


def messages_of_the_gan_step(state) -> list[pod.Message]:
  """Of the test's GAN step on 8 CPU devices."""
  mesh = steps.make_mesh(DEVICES)
  batch = jax.device_put(steps.make_batch(), sharding.batch_sharded(mesh))
  state, vgg = (steps.put(tree, DEVICES) for tree in (state, steps.VGG))
  program = steps.default_step(True, DEVICES).lower(state, batch, vgg).compile().as_text()
  return pod.read_messages(program)


def size(arrays: collections.Counter) -> int:
  return sum(pod.BYTES[kind] * int(np.prod(shape)) * n for (kind, shape), n in arrays.items())


def test_the_step_sends_gradients_and_means_and_nothing_else(monkeypatch):
  # Of smaller images the discriminator's last features are single pixels: vectors, as means are.
  monkeypatch.setattr(steps, "LR_SHAPE", (8, 16, 16, 3))
  monkeypatch.setattr(steps, "HR_SHAPE", (8, 64, 64, 3))
  state = steps.initial_state.__wrapped__(True)
  sent = messages_of_the_gan_step(state)
  assert {message.kind for message in sent} == {"all-reduce"}  # nothing is gathered or moved about
  arrays = collections.Counter(array for message in sent for array in message.arrays)

  g, d = state.generator.params, state.discriminator.params
  # A stacked kernel of the body is reduced block by block, and linen flattens nothing.
  kernels = {leaf.shape[-4:] for leaf in jax.tree.leaves(g) if leaf.ndim >= 4}
  kernels |= {leaf.shape for leaf in jax.tree.leaves(d) if leaf.ndim > 1}
  kernels |= {shape[::-1] for shape in kernels if len(shape) == 2}
  for _, shape in arrays:
    assert len(shape) <= 1 or shape in kernels, f"{shape} is no gradient: an activation is sent"

  total = size(arrays)
  matrices = {k: sum(x.size * 4 for x in jax.tree.leaves(t) if x.ndim > 1) for k, t in
              (("g", g), ("d", d))}  # fmt: skip
  sent_matrices = size({array: n for array, n in arrays.items() if len(array[1]) > 1})
  # On a CPU the discriminator's gradient crosses twice, once for its real and once for its fake
  # batch: XLA's CPU compiler does not add before it reduces. TPU's does, see below.
  assert sent_matrices <= matrices["g"] + 2 * matrices["d"]
  assert sent_matrices >= matrices["g"] + matrices["d"]
  # The rest: biases, BatchNorm's sums forward and back, RaGAN's means, losses. Vectors of channels.
  assert total - sent_matrices < 0.05 * total


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_images_on_the_devices_cost_at_most_one_exchange_of_crops(placement):
  """The step that cuts for itself: the losses of one fed by the host, and what it sends more."""
  pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 80, 3), np.uint8)
  pack = packing.pack_from_arrays(list(pixels), 4)
  mesh = steps.make_mesh(DEVICES)
  arguments = {"batch_size": 8, "lr_patch": 16, "seed": 3}
  arrays, cut = device_input.make_cutter(
    pack, sharding=sharding.batch_sharded(mesh), placement=placement, **arguments
  )
  step = steps.make_step(gan=False, devices=DEVICES, prepare=cut)
  state = steps.put(steps.initial_state(False), DEVICES)
  sent = pod.read_messages(step.lower(state, arrays, None).compile().as_text())
  crops = [message for message in sent if message.kind != "all-reduce"]
  if placement == "replicated":
    assert not crops
  else:  # an example a device, bytes of its LR and HR crop
    (message,) = crops
    assert (message.kind, message.arrays) == ("reduce-scatter", [("u8", (1, 16 * 16 * 3 * 17))])

  history = []
  for _ in range(2):
    state, metrics = step(state, arrays, None)
    history.append(float(metrics["loss_g"]))
  fed = steps.put(steps.initial_state(False), DEVICES)
  for number, loss in enumerate(history):
    lr, hr = sampling.cut_batch(pack, number, **arguments)
    batch = jax.device_put({"lr": lr, "hr": hr}, sharding.batch_sharded(mesh))
    fed, metrics = steps.default_step(False, DEVICES)(fed, batch, None)
    np.testing.assert_allclose(loss, float(metrics["loss_g"]), rtol=1e-6)


@functools.cache
def on_a_tpu(dtype: str) -> dict:
  """benchmarks.pod of small networks on eight chips: TPU's compiler needs no TPU."""
  # Where `make test-developer` puts it.
  library = pathlib.Path(sys.prefix, "tpu", "libtpu", "libtpu.so")
  if not (library.is_file() or "TPU_LIBRARY_PATH" in os.environ):
    pytest.skip(f"TPU's compiler, the package libtpu, is not at {library}")
  environment = {"TPU_LIBRARY_PATH": str(library), **os.environ, "XLA_FLAGS": ""}
  result = subprocess.run(
    [sys.executable, "-m", "benchmarks.pod", "--quick", "--all", "--topology", "v5e:2x4",
     "--dtype", dtype],
    cwd=ROOT, env=environment, capture_output=True, text=True,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr[-3000:]
  lines = [line.partition(": ") for line in result.stdout.splitlines()]
  return {key: json.loads(value) for key, colon, value in lines if colon}


@pytest.mark.developer
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_tpu_each_gradient_crosses_once(dtype):
  """The discriminator's too, of whose two batches each has one, and in the dtype of the network."""
  said = on_a_tpu(dtype)
  assert said["chips"] == 8 and said["kinds"] == ["all-reduce"]

  def unstacked(shape, times=1):  # the kernels of the loop over the blocks are sent one by one
    return (tuple(shape[1:]), times * shape[0]) if len(shape) == 5 else (tuple(shape), times)

  # A dense block's kernels have one gradient, of all sources for all layers: 24 channels each, of
  # which the kernels (8 x 4, 12 x 4, 16 x 4, 20 x 4, 24 x 8) are less than three quarters.
  blocks, wide = 2 * 3, (3, 3, 24, 24)
  expected, sent = collections.Counter({wide: blocks}), collections.Counter()
  for shape, times in map(unstacked, said["gradient_shapes"]):
    expected[shape] += times
  for channels in ((8, 4), (12, 4), (16, 4), (20, 4), (24, 8)):
    expected[(3, 3, *channels)] -= blocks
  # The guard's decision is one whole number, which all chips have to agree on.
  decision = ["s32", [], 1]
  assert said["sent_arrays"].count(decision) == 1
  short = {"float32": "f32", "bfloat16": "bf16"}[dtype]
  for kind, shape, times in said["sent_arrays"]:
    if [kind, shape, times] == decision:
      continue
    assert kind == short or len(shape) < 2, (kind, shape)
    shape, times = unstacked(shape, times)
    sent[shape] += times
  convolutions = [shape for shape in expected | sent if len(shape) >= 4]
  assert len(convolutions) > 10 and (256, 100) in expected  # linear1's
  for shape in [*convolutions, (256, 100)]:
    assert sent[shape] == expected[shape], shape
  # The rest is vectors of channels: biases, BatchNorm's sums, RaGAN's means. They are 1.6 % here,
  # in networks an eighth as wide as the real ones, whose kernels are 64 times as large.
  unused = blocks * 4 * 9 * (24 * 24 - 416)
  rest = said["sent_bytes"] - said["gradient_bytes"] - unused
  if dtype == "float32":
    assert 0 < rest < 0.02 * said["gradient_bytes"]
  else:
    assert said["sent_bytes"] < 0.55 * (said["gradient_bytes"] + unused)


@pytest.mark.parametrize("count", [1, 2])
def test_for_a_gpu_it_is_compiled_without_one(count):
  packages = os.environ.get("SR_JAX_CUDA_COMPILER", "")
  if not packages:
    pytest.skip(
      "SR_JAX_CUDA_COMPILER does not name a folder of pip install --no-deps --target FOLDER "
      f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__} "
      "nvidia-cuda-nvcc-cu12"
    )
  result = subprocess.run(
    [sys.executable, "-m", "benchmarks.pod", "--quick", "--topology", f"h100:{count}"],
    cwd=ROOT, env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": packages}, capture_output=True,
    text=True,
  )  # fmt: skip
  assert result.returncode == 0, result.stderr[-3000:]
  lines = [line.partition(": ") for line in result.stdout.splitlines()]
  said = {key: json.loads(value) for key, colon, value in lines if colon}
  assert said["chip"] == "NVIDIA H100 80GB HBM3" and said["chips"] == count
  assert said["kinds"] == ["all-reduce"] * (count > 1)
  assert said["temporary_bytes"] > 1e6
  assert 300 < said["kernels"] < 3000


PROGRAM = """HloModule two_blocks, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %a.b = f32[] add(%a, %b)
}

%fused (p: f32[8]) -> (f32[8], f32[]) {
  %p = f32[8]{0} parameter(0)
  %zero = f32[] constant(0)
  %total = f32[] reduce(%p, %zero), dimensions={0}, to_apply=%sum
  %twice = f32[8]{0} add(%p, %p)
  ROOT %both = (f32[8]{0}, f32[]) tuple(%twice, %total)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[8]{0} get-tuple-element(%carry), index=1
  %f = (f32[8]{0}, f32[]) fusion(%x), kind=kInput, calls=%fused
  %y = f32[8]{0} get-tuple-element(%f), index=0
  %conv = (f32[8]{0}, u8[0]{0}) custom-call(%y), custom_call_target="__cudnn$convForward"
  %z = f32[8]{0} get-tuple-element(%conv), index=0
  ROOT %next = (s32[], f32[8]{0}) tuple(%i, %z)
}

%condition (carry.1: (s32[], f32[8])) -> pred[] {
  %carry.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0)
  %start = s32[] constant(0)
  %copy = f32[8]{0} copy(%x.1)
  %init = (s32[], f32[8]{0}) tuple(%start, %copy)
  %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_kernels_are_counted():
  """A copy, and a fusion and a convolution in each turn of the loop."""
  assert pod.count_kernels(PROGRAM, 5) == 1 + 5 * 2


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "jax_plugins.xla_cuda12", None)
  with pytest.raises(ImportError, match="pip install --no-deps jax-cuda12-plugin=="):
    pod.find_devices("h100")
