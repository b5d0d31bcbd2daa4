"""How a network is computed on given devices: decided here, once, outside of tracing.

Networks, losses and the step know nothing of the machine. Whoever builds a program calls `choose`
and puts the result into the `kernels` field of its networks. Without it they are plain XLA, with
which JAX can do everything: export it, differentiate it twice, and in forward mode.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sr_jax.kernels import dense_block_tpu, direct, leaky_relu, onednn, winograd
from sr_jax.kernels.dense_block import DenseBlock, DenseBlockBy, DenseBlockWith

# What computes dense blocks, by its name in a recipe; None for the form in the paper.
FORMS: dict[str, types.ModuleType | None] = {
  "concat": None,
  "by_source": direct,
  "winograd": winograd,
}
ALGORITHMS: dict[str, DenseBlock | None] = {
  name: form and DenseBlockBy(form, single_device=False) for name, form in FORMS.items()
}
# What computes dense blocks on an accelerator where the network leaves it open, and by which
# figures. GPU, kernels that an H100 launches in a GAN step (benchmarks/README.md): concat 3,038,
# direct 2,877, with less than half of the memory. TPU, estimated ms of the gradients of all dense
# blocks, convolutions and sum (v5e, batch 16; docs/scaling.md): concat 34.8 and 62.5, direct 21.9
# and 59.7, dense_block_tpu 32.1 and 47.7.
ON_ACCELERATORS: dict[str, types.ModuleType] = {"gpu": direct, "tpu": dense_block_tpu}
# LR pixels whose activations stay in the caches of one CPU (docs/cpu.md).
CACHED_PIXELS = 4096


@dataclasses.dataclass(frozen=True)
class Kernels:
  """How to compute a network: the same numbers, but for rounding.

  Attributes:
    conv: (x, kernel, bias or None, stride, padding, dtype) -> y, as `onednn.conv`; None for XLA's.
    dense_block: how a dense block is computed, of `dense_block.py`; None for the form in the paper.
    leaky_relu: of `leaky_relu.py`.
    unroll: whether training should unroll the loop over blocks.
    slow_loops: whether gradients of convolutions take longer in a loop.
    pixels: LR pixels to work on at a time, where nothing looks at the batch as a whole; 0 for all.
    compiler_options: pairs, for `jax.jit`.
  """

  conv: Callable[..., jax.Array] | None = None
  dense_block: DenseBlock | None = None
  leaky_relu: Callable[[jax.Array, float], jax.Array] = leaky_relu.plain
  unroll: bool = False
  slow_loops: bool = False
  pixels: int = 0
  compiler_options: tuple[tuple[str, Any], ...] = ()


PLAIN = Kernels()


def choose(devices: Any, dtype: Any, network: nn.Module | None = None) -> Kernels:
  """Chooses what is fastest, by docs/cpu.md, benchmarks/README.md and, for TPUs, docs/scaling.md.

  Before oneDNN is chosen it is tried, in a process of its own. Once it is chosen, this process
  stops writing compiled programs to JAX's cache (`onednn.py` says why). SR_JAX_ONEDNN,
  ONEDNN_MAX_CPU_ISA and XLA_FLAGS of the environment are heeded.

  Args:
    devices: that the program will run on, from a mesh or from a topology that it is compiled for.
    dtype: of the convolutions.
    network: a generator, for its dense blocks; None for a network that has none.

  Returns:
    What to put into the `kernels` field of the network, and of others on these devices.
  """
  devices = list(np.ravel(np.asarray(devices, object)))
  platform, single_device, dtype = devices[0].platform, len(devices) == 1, jnp.dtype(dtype)
  on_one_cpu = single_device and platform == "cpu"
  form = _form_of_dense_blocks(network, platform, on_one_cpu, dtype)
  conv = None
  if form is winograd:
    conv = winograd.conv  # and oneDNN need not be tried
  elif on_one_cpu and usable(dtype):
    conv = onednn.conv
    onednn.stop_keeping_programs()
  if form is dense_block_tpu:
    dense_block = dense_block_tpu.on_tpu
  elif form is direct and conv:
    dense_block = DenseBlockWith(conv, leaky_relu.by_output)
  else:
    dense_block = form and DenseBlockBy(form, single_device)
  # XLA's convolutions on a CPU: their gradients are 15 to 30 times slower in a loop.
  slow_loops = platform == "cpu" and conv is None
  return Kernels(
    conv=conv,
    dense_block=dense_block,
    leaky_relu=leaky_relu.by_output,
    # On a GPU copies into and out of a loop's arrays are a third of the kernels to launch.
    unroll=slow_loops or platform == "gpu",
    slow_loops=slow_loops,
    pixels=CACHED_PIXELS if on_one_cpu and not slow_loops else 0,
    compiler_options=_compiler_options(platform),
  )


def _form_of_dense_blocks(
  network: nn.Module | None, platform: str, on_one_cpu: bool, dtype: jnp.dtype
) -> types.ModuleType | None:
  """The module that computes dense blocks: the network's own choice, else the fastest.

  Winograd's form needs channels to be worth its transforms, works on a few images of the batch at a
  time, which should not be spread over devices, and computes in float32.
  """
  algorithm = getattr(network, "algorithm", "concat")  # of a network without dense blocks
  by_onednn = on_one_cpu and dtype == jnp.bfloat16
  if algorithm:
    form = FORMS[algorithm]
    # In bfloat16 oneDNN's form is by source too, and faster.
    return onednn if form is direct and by_onednn and usable(dtype) else form
  if by_onednn and usable(dtype):
    return onednn
  if on_one_cpu and min(network.features, network.growth) >= 32:
    return winograd
  return ON_ACCELERATORS.get(platform)


def _compiler_options(platform: str) -> tuple[tuple[str, Any], ...]:
  """On a GPU even a single kernel between convolutions is launched as a CUDA graph.

  By XLA's default it takes five kernels in a row. Not timed with these networks; a value in
  XLA_FLAGS is left as it is.
  """
  name = "xla_gpu_graph_min_graph_size"
  if platform != "gpu" or name in os.environ.get("XLA_FLAGS", ""):
    return ()
  return ((name, 1),)


def usable(dtype: Any) -> bool:
  """Whether oneDNN's convolutions in this dtype should be used on one CPU device of this machine.

  They are used in float32, and in bfloat16 where there are instructions for it, without which it is
  slow. They cannot be used on several devices, over which XLA cannot spread a custom call.
  SR_JAX_ONEDNN=0 leaves them out.
  """
  name = jnp.dtype(dtype).name
  if left_to_xla() or name not in _to_try():
    return False
  return name in working()


def left_to_xla() -> bool:
  """Whether the user leaves all convolutions to XLA, by SR_JAX_ONEDNN=0."""
  return os.environ.get("SR_JAX_ONEDNN") == "0"


def bfloat16_is_fast() -> bool:
  """Whether bfloat16 may be expected to be fast on one CPU device; nothing is tried for it."""
  return has_bfloat16() and not left_to_xla()


def _to_try() -> list[str]:
  return ["float32", "bfloat16"] if has_bfloat16() else ["float32"]


@functools.cache
def has_bfloat16() -> bool:
  """Whether this processor multiplies bfloat16, and oneDNN's own setting lets it be used."""
  for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
    limit = os.environ.get(name, "").upper()
    if limit and not re.search("ALL|DEFAULT|BF16|FP16|AMX|AVX10", limit):
      return False
  facts = pathlib.Path("/proc/cpuinfo")
  return facts.exists() and "avx512_bf16" in facts.read_text()


@functools.cache
def working() -> frozenset[str]:
  """The dtypes in which a process of its own gets the right numbers; says which fail, and why.

  A jaxlib that reads these calls in another way may crash, and would take this process with it.
  """
  dtypes = _to_try()
  command = [sys.executable, "-m", "sr_jax.kernels.onednn", *dtypes]
  options = {
    "cwd": pathlib.Path(__file__).parent.parent.parent,
    "env": {**os.environ, "JAX_PLATFORMS": "cpu"},
    "start_new_session": True,  # Ctrl-C is for this process alone
    "capture_output": True,
    "text": True,
    "timeout": 120,
  }
  try:
    trial = subprocess.run(command, check=False, **options)
  except (OSError, subprocess.TimeoutExpired) as error:
    printed, reason = "", str(error)
  else:
    printed = trial.stdout
    reason = f"status {trial.returncode}, {trial.stderr.strip().rpartition(chr(10))[2]}"
    if trial.returncode == 0:
      return frozenset(dtypes)
  # The last one has failed even if it was printed: the process crashed at its end.
  right = frozenset(dtypes[:-1]) & frozenset(printed.splitlines())
  failed = " and ".join(dtype for dtype in dtypes if dtype not in right)
  print(
    f"convolutions in {failed} are XLA's, since a trial of oneDNN's failed: {reason}",
    file=sys.stderr,
  )
  return right


def batch_parts(shape: Sequence[int], pixels: int) -> int:
  """Says into how many equal parts to divide a batch of LR images [N, h, w, c]; 1 for not at all.

  The update is that of the whole batch but for rounding, in a tenth less time and with a third less
  memory (docs/cpu.md); parts of a size that is far from `Kernels.pixels` take longer.
  """
  n, h, w, _ = shape
  near = [k for k in range(1, n) if pixels and n % k == 0 and 2 / 3 < k * h * w / pixels < 3 / 2]
  return n // min(near, key=lambda k: abs(k * h * w - pixels)) if near else 1
