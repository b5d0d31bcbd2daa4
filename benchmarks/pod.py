"""What a recipe's step is on a pod: compiled for its chips by TPU's own compiler, without a TPU.

  python -m benchmarks.pod --topology v5e:16x16 [--config configs/esrgan.py] [--crops 4] [--quick]

Prints what a chip holds and computes in a step, how long the compiler took, and every message
between the chips, from the compiled program: nothing here is a time of a step. Needs the package
libtpu of jax's version (Linux x86_64), installed, or beside the others with its library named by
TPU_LIBRARY_PATH.
"""

import argparse
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from sr_jax import cli
from sr_jax import sharding
from sr_jax import train
from sr_jax import vgg

KINDS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}


class Message(NamedTuple):
  """One collective of a compiled program.

  Attributes:
    kind: 'all-reduce', ...
    arrays: (type, shape) of its results.
    times: how often a step sends it: the length of the loop that it is in.
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
    program: its HLO, of `compiled.as_text()`.
    loop_length: iterations of its loops; the only ones of a step are those over the body's blocks.

  Returns:
    The messages, in the program's order.
  """
  bodies = set(re.findall(r"body=%([\w.\-]+)", program))
  messages, times = [], 1
  for line in program.splitlines():
    if line.startswith(("%", "ENTRY")):  # a computation begins
      times = loop_length if line.split()[0].lstrip("%") in bodies else 1
    if found := re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line):
      arrays = re.findall(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]", found[1])
      shapes = [(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in arrays]
      messages.append(Message(found[2], shapes, times))
  return messages


def compile_step(config: Any, topology: str, crops: int) -> tuple[Any, train.Stage, float]:
  """Compiles a recipe's last stage for a pod.

  Args:
    config: of configs/.
    topology: of libtpu: 'v5e:16x16', 'v5p:4x4x4', ...
    crops: of a chip.

  Returns:
    The compiled step, the stage, and the seconds that compiling took.
  """
  # The compiler is asked for by name. As a backend it would look for a TPU, and for a cloud.
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken that others may need
  devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
  with config.unlocked():
    config.data.batch_size = crops * len(devices)
    # Left out they are chosen for the backend, and that is the CPU here.
    config.generator.kwargs.update(unroll=1, dense="concat")
  stage = train.Stage(config, "no such run")
  stage.mesh = sharding.create_mesh(devices)
  weights = None
  if config.perceptual.weight:
    params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0), depth=19))
    weights = vgg.VGG(params, config.perceptual.magnitude, "vgg19", "shapes alone")
  side = config.data.hr_patch
  batch = {
    name: jax.ShapeDtypeStruct((config.data.batch_size, side // n, side // n, 3), jnp.uint8)
    for name, n in (("lr", config.scale), ("hr", 1))
  }
  step = train.make_step(stage, weights)
  lowered = step.lower(stage.abstract, batch, weights.params if weights else None)
  begin = time.monotonic()
  return lowered.compile(), stage, time.monotonic() - begin


def describe(config: Any, topology: str, crops: int) -> dict[str, Any]:
  """Compiles a recipe's step and says what a chip does in it: the numbers that `main` prints."""
  compiled, stage, seconds = compile_step(config, topology, crops)
  memory = compiled.memory_analysis()
  messages = read_messages(compiled.as_text(), config.generator.kwargs.blocks)
  state = stage.abstract
  nets = [net.params for net in (state.generator, state.discriminator) if net is not None]
  gradients = jax.tree.leaves(nets)
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
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
    "gradient_bytes": sum(4 * int(np.prod(leaf.shape)) for leaf in gradients),
    "sent_bytes": sum(message.bytes for message in messages),
    "messages": sum(message.times for message in messages),
    "kinds": sorted({message.kind for message in messages}),
    "sent_arrays": [(kind, shape, m.times) for m in messages for kind, shape in m.arrays],
    "gradient_shapes": [leaf.shape for leaf in gradients],
  }


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.pod", description=__doc__)
  parser.add_argument("--topology", default="v5e:16x16", help="chips, as libtpu names them")
  parser.add_argument("--config", default="configs/esrgan.py", help="FILE[:variant]")
  parser.add_argument("--crops", type=int, default=1, help="of a chip")
  parser.add_argument("--dtype", default="", help="instead of the recipe's")
  parser.add_argument("--quick", action="store_true", help="a small network, in a minute")
  parser.add_argument("--all", action="store_true", help="each array that is sent, too")
  args = parser.parse_args(argv)
  file, _, variant = args.config.partition(":")
  module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
  config = module.get_config(variant)
  if args.dtype:
    config.dtype = args.dtype
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
