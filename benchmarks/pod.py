"""Compiles a recipe's step for a pod or a GPU, without having one, and says what is in it.

  python -m benchmarks.pod --topology v5e:16x16 [--config configs/esrgan.py] [--crops 4] [--quick]
  python -m benchmarks.pod --topology h100 --config configs/esrgan.py:basicsr --crops 64

It prints what a chip holds and computes in a step, how long the compiler took, and every message
between the chips. All of this comes from the compiled program; no step is timed. For a TPU there is
the compiler's estimate of a chip's work, which `estimate.py` explains; messages have none.

For a TPU it needs the package libtpu of jax's version (Linux x86_64): installed, where `make
test-developer` puts it, or elsewhere with its library named by TPU_LIBRARY_PATH. For H100s, 'h100'
or 'h100:COUNT' of one host, it needs the packages jax-cuda12-plugin and jax-cuda12-pjrt of jax's
version and nvidia-cuda-nvcc-cu12. It needs none of CUDA's libraries, because kernels are not chosen
by trying them, as they are on a GPU.
"""

import argparse
import importlib
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks import estimate
from benchmarks import side_by_side
from sr_jax import cli
from sr_jax.formats import vgg_weights
from sr_jax.machine import sharding
from sr_jax.networks import vgg
from sr_jax.training.recipe import step_arguments
from sr_jax.training.stage import Stage, open_stage
from sr_jax.training.step import make_train_step

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}

# Instructions of a compiled program that are no kernel.
FREE = {"bitcast", "constant", "get-tuple-element", "parameter", "tuple", "while"}

# What XLA's GPU compiler has to know of an NVIDIA H100 SXM: a stream_executor.GpuTargetConfigProto.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
"""


class Message(NamedTuple):
  """One collective of a compiled program.

  Attributes:
    kind: the name of the operation, 'all-reduce' for example.
    arrays: (type, shape) of each of its results.
    times: how often a step sends it, which is the length of the loop that it is in.
  """

  kind: str
  arrays: list[tuple[str, tuple[int, ...]]]
  times: int

  @property
  def bytes(self) -> int:
    sizes = [BYTES[kind] * int(np.prod(shape)) for kind, shape in self.arrays]
    return self.times * sum(sizes)


def read_messages(program: str, loop_length: int = 1) -> list[Message]:
  """Finds the collectives of a compiled program.

  Args:
    program: the program's HLO, as `compiled.as_text()` returns it.
    loop_length: the iterations of its loops; the only loops of a step are those over the body's
      blocks.

  Returns:
    The messages, in the program's order.
  """
  messages = []
  for _, line, times in _instructions(program, loop_length):
    if found := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
      arrays = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", found[1])
      shapes = [(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in arrays]
      messages.append(Message(found[2], shapes, times))
  return messages


def count_kernels(program: str, loop_length: int = 1) -> int:
  """Counts the kernels that a GPU launches for a compiled program; arguments as `read_messages`."""
  inside = set(re.findall(r"(?:calls|to_apply|condition)=%([\w.\-]+)", program))  # of a kernel
  count = 0
  for computation, line, times in _instructions(program, loop_length):
    operation = re.match(r" +(?:ROOT )?%[\w.\-]+ = .*? ([a-z][\w\-]*)\(", line)
    if operation and computation not in inside:
      count += times * (operation[1] not in FREE and not operation[1].endswith("-done"))
  return count


def _instructions(program: str, loop_length: int) -> Iterator[tuple[str, str, int]]:
  """Yields each line of a program, with its computation and how often that runs."""
  bodies = set(re.findall(r"body=%([\w.\-]+)", program))
  computation, times = "", 1
  for line in program.splitlines():
    if line.startswith(("%", "ENTRY")):  # a computation begins
      computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
      times = loop_length if computation in bodies else 1
    else:
      yield computation, line, times


def compile_step(config: Any, topology: str, crops: int) -> tuple[Any, Stage, float]:
  """Compiles a recipe's last stage for a pod.

  Args:
    config: a recipe of configs/.
    topology: the name of a topology, see `find_devices`.
    crops: the crops of each chip.

  Returns:
    The compiled step, the stage, and the seconds that compiling took.
  """
  devices = find_devices(topology)
  with config.unlocked():
    config.data.batch_size = crops * len(devices)
  stage = open_stage(config, pathlib.Path("no such run"), sharding.create_mesh(devices))
  weights = None
  if config.perceptual.weight:
    params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0), depth=19))
    weights = vgg_weights.VGG(params, config.perceptual.magnitude, "vgg19", "shapes alone")
  side = config.data.hr_patch
  batch = {
    name: jax.ShapeDtypeStruct((config.data.batch_size, side // n, side // n, 3), jnp.uint8)
    for name, n in (("lr", config.scale), ("hr", 1))
  }
  step = make_train_step(**step_arguments(config, stage.networks, stage.mesh, weights))
  lowered = step.lower(stage.abstract, batch, weights.params if weights else None)
  begin = time.monotonic()
  return lowered.compile(), stage, time.monotonic() - begin


def find_devices(topology: str) -> list[Any]:
  """Returns devices that exist for the compiler only: 'h100:8', or libtpu's 'v5e:4x4'.

  Raises:
    ImportError: a package is missing; the error says what to install.
  """
  estimate.use_compiler()
  chip, _, count = topology.partition(":")
  if chip != "h100":
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  try:
    nvcc = importlib.import_module("nvidia.cuda_nvcc")
    importlib.import_module("jax_plugins.xla_cuda12")
  except ImportError as error:
    packages = f"jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    raise ImportError(
      f"the compiler for --topology={topology} is not installed ({error}); try pip install "
      f"--no-deps {packages} nvidia-cuda-nvcc-cu12"
    ) from error
  tools = pathlib.Path(next(iter(nvcc.__path__)))
  flags = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={tools}"
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
  description = topologies.get_topology_desc(
    topology, "cuda", target_config=H100, topology=f"1x1x{count or 1}"
  )
  return description.devices


def describe(config: Any, topology: str, crops: int) -> dict[str, Any]:
  """Compiles a recipe's step and returns the numbers that `main` prints: what a chip does in it."""
  compiled, stage, seconds = compile_step(config, topology, crops)
  memory = compiled.memory_analysis()
  program, blocks = compiled.as_text(), config.generator.kwargs.blocks
  messages = read_messages(program, blocks)
  state = stage.abstract
  nets = [net.params for net in (state.generator, state.discriminator) if net is not None]
  gradients = jax.tree.leaves(nets)
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  on_a_gpu = stage.mesh.devices.flat[0].platform == "gpu"
  chip = topology.partition(":")[0]
  estimated = estimate.sum_up(program, chip) if chip in estimate.CHIPS else {}
  return {
    "topology": topology,
    "chips": stage.mesh.size,
    "chip": stage.mesh.devices.flat[0].device_kind,
    "crops_per_chip": crops,
    "dtype": config.dtype,
    "compile_seconds": seconds,
    "held_bytes": held,
    "temporary_bytes": memory.temp_size_in_bytes,
    "program_bytes": memory.generated_code_size_in_bytes,
    "kernels": count_kernels(program, blocks) if on_a_gpu else None,
    "estimated_ms": estimated.get("estimated_ms"),
    "bytes_without_estimate": estimated.get("bytes_without_estimate"),
    "dearest": estimated.get("dearest"),
    "gradient_bytes": sum(4 * int(np.prod(leaf.shape)) for leaf in gradients),
    "sent_bytes": sum(message.bytes for message in messages),
    "messages": sum(message.times for message in messages),
    "kinds": sorted({message.kind for message in messages}),
    "sent_arrays": [(kind, shape, m.times) for m in messages for kind, shape in m.arrays],
    "gradient_shapes": [leaf.shape for leaf in gradients],
  }


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.pod", description=__doc__)
  parser.add_argument(
    "--topology", default="v5e:16x16", help="chips, as libtpu names them, or h100[:COUNT]"
  )
  parser.add_argument("--config", default="configs/esrgan.py", help="FILE[:variant]")
  parser.add_argument("--crops", type=int, default=1, help="of a chip")
  parser.add_argument("--dtype", default="", help="instead of the recipe's")
  parser.add_argument(
    "--generator",
    default="",
    metavar="FIELD=VALUE,...",
    help="fields of the network, as remat=true",
  )
  parser.add_argument("--unguarded", action="store_true", help="the step without its guard")
  parser.add_argument("--quick", action="store_true", help="a small network, in a minute")
  parser.add_argument("--all", action="store_true", help="each array that is sent, too")
  args = parser.parse_args(argv)
  file, _, variant = args.config.partition(":")
  module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
  config = module.get_config(variant)
  if args.dtype:
    config.dtype = args.dtype
  config.guard.enabled = not args.unguarded
  config.generator.kwargs.update(side_by_side.parse_generators([args.generator], {})[0])
  if args.quick:
    shrink(config)
  for key, value in describe(config, args.topology, args.crops).items():
    if args.all or not isinstance(value, list) or key == "kinds":
      print(f"{key}: {json.dumps(value)}")


def shrink(config: Any) -> None:
  """Makes the networks so small that they compile in a minute."""
  config.generator.kwargs.update(features=8, blocks=2, growth=4)
  config.discriminator.kwargs.features = 8
  config.data.hr_patch = 64
  config.perceptual.layers = ("conv1_2:1.0",)


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
