"""Asks TPU's compiler how many cycles a network or a training step takes, without having a TPU.

  python -m benchmarks.estimate --chip v5e --what gan --batch_size 16
  python -m benchmarks.estimate --chip v6e --what forward --size 128 --batch_size 1 --against HEAD~3
  python -m benchmarks.estimate --what dense      the dense blocks' gradients, which compile soonest
  python -m benchmarks.estimate --what critics    the GAN step without its generator and updates

The compiler writes `estimated_cycles` into its programs. They are summed over loops as often as
these run, and of a conditional's branches the dearest counts. **Nothing is measured.** What is
known of the estimate: large matrix products come out near the vendors' peak (one is compiled beside
every program, so that it can be seen); fusions without a convolution come out several times as long
as the memory would take; copies, slices and concatenations on their own have no estimate at all. So
there are three figures: the convolutions alone, the sum of all estimates, and the bytes of what has
none. A change is worth keeping if both of the first fall, or one falls and the other stays.

It needs the package libtpu (benchmarks/README.md says where it may lie).
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import flops
from benchmarks import jax_esrgan
from benchmarks import side_by_side
from benchmarks import train
from sr_jax import UserError
from sr_jax import cli
from sr_jax.kernels import direct
from sr_jax.kernels import leaky_relu
from sr_jax.kernels.dense_block import DenseBlock
from sr_jax.machine import sharding
from sr_jax.training import losses
from sr_jax.training.terms import make_losses

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Chip(NamedTuple):
  """A TPU as the compiler knows it.

  Attributes:
    topology: one chip, by libtpu's name for it.
    ghz: the clock that cycles are taken to be of: the one by which large matrix products come near
      the vendor's peak. The vendors do not state it.
    tflops: the vendor's peak in bfloat16.
  """

  topology: str
  ghz: float
  tflops: float


CHIPS = {
  "v5e": Chip("v5e:1x1", 1.5, 197),
  "v5p": Chip("v5p:1x1x1", 1.75, 459),
  "v6e": Chip("v6e:1x1", 1.75, 918),
}
BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}  # of the types that do not say it
# Instructions that do nothing when a program runs.
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
CALIBRATION = 4096  # side of the matrices


class Item(NamedTuple):
  """An instruction that a program executes.

  Attributes:
    operation: of HLO, 'fusion' for example.
    name: where in the model it comes from.
    result: the type of its result.
    times: how often it runs.
    cycles: the compiler's estimate of one run; None where there is none.
    convolves: whether a convolution or a matrix product is in it.
    bytes: of its operands and its result.
  """

  operation: str
  name: str
  result: str
  times: int
  cycles: int | None
  convolves: bool
  bytes: int


def find_chip(chip: str) -> Any:
  """Returns the device of a single chip, which exists for the compiler only."""
  use_compiler()
  return topologies.get_topology_desc(
    platform="tpu", topology_name=CHIPS[chip].topology, chips_per_host_bounds=(1, 1, 1)
  ).devices[0]


def use_compiler() -> None:
  """Sets what TPU's compiler needs to know before it is asked for the first time."""
  # It is asked for by name. As a backend it would look for a chip, and for a cloud.
  jax.config.update("jax_platforms", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken that others may need
  library = pathlib.Path(sys.prefix, "tpu", "libtpu", "libtpu.so")
  if library.is_file():  # where `make test-developer` puts it
    os.environ.setdefault("TPU_LIBRARY_PATH", str(library))


def read_items(program: str) -> tuple[list[Item], int]:
  """Lists what a compiled program executes.

  Args:
    program: its HLO, as `compiled.as_text()` returns it.

  Returns:
    The instructions, and the number of loops whose turns are unknown, which count once.
  """
  computations, entry, lines = {}, "", []
  for line in program.splitlines():
    if match := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
      lines = computations.setdefault(match[2], [])
      entry = match[2] if match[1] else entry
    elif match := re.match(r" +(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", line):
      lines.append(match.groups())

  @functools.cache
  def convolves(name: str) -> bool:
    return any(
      operation in ("convolution", "dot") or any(map(convolves, _called(rest)))
      for _, _, operation, rest in computations.get(name, ())
    )

  unknown = set()

  def walk(name: str, times: int) -> list[Item]:
    items, types = [], {name: result for name, result, _, _ in computations[name]}
    for _, result, operation, rest in computations[name]:
      if operation == "while":
        body, turns = re.search(r"body=%([\w.\-]+)", rest)[1], _turns(rest, computations)
        if turns is None:
          unknown.add(body)
        items += walk(body, times * (turns or 1))
      elif operation == "conditional":
        items += max((walk(branch, times) for branch in _called(rest)), key=_cycles)
      elif operation == "call":
        items += walk(_called(rest)[0], times)
      elif operation not in FREE:
        cycles = re.search(r'"estimated_cycles":"?(\d+)', rest)
        label = re.search(r'op_name="([^"]*)"', rest)
        operands = re.findall(r"%([\w.\-]+)", re.split(r", (?:calls|metadata|kind)=", rest)[0])
        convolving = operation in ("convolution", "dot") or any(map(convolves, _called(rest)))
        items.append(
          Item(
            operation=operation,
            name=_model_name(label[1]) if label else "",
            result=re.sub(r"\{[^}]*\}", "", result),
            times=times,
            cycles=int(cycles[1]) or None if cycles else None,
            convolves=convolving,
            bytes=size(result) + sum(size(types.get(operand, "")) for operand in operands),
          )
        )
    return items

  return walk(entry, 1), len(unknown)


def _called(rest: str) -> list[str]:
  """The computations that an instruction calls, by what is behind its operation's name."""
  found = re.search(r"branch_computations=\{([^}]*)\}", rest)
  if found:
    return re.findall(r"%([\w.\-]+)", found[1])
  return re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%([\w.\-]+)", rest)


def _turns(rest: str, computations: Mapping[str, Sequence[tuple[str, ...]]]) -> int | None:
  """How often a loop runs: as the program says, else the only number that its condition has."""
  if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', rest):
    return int(known[1])
  condition = re.search(r"condition=%([\w.\-]+)", rest)[1]
  constants = [
    int(number[1])
    for _, _, operation, rest in computations[condition]
    if operation == "constant" and (number := re.match(r"(\d+)\)", rest))
  ]
  return constants[0] if len(constants) == 1 else None


def _cycles(items: Sequence[Item]) -> int:
  return sum(item.times * item.cycles for item in items if item.cycles)


def _model_name(path: str) -> str:
  """Shortens an instruction's path to the model's own words."""
  dull = r"jit\(\w*\)|while|body|closed_call|cond|checkpoint|branch_\d+_fun|convert_element_type"
  parts = [part for part in path.split("/") if not re.fullmatch(dull, part)]
  return re.sub(r"\.\d+$", "", "/".join(parts))


def size(types: str) -> int:
  """Returns the bytes of the arrays of a type, as programs are printed."""
  total = 0
  for kind, dims in re.findall(r"\b(pred|c?[a-z]+\d+)(?:e\w+)?\[([\d,]*)\]", types):
    bits = BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    total += bits * int(np.prod([int(side) for side in dims.split(",") if side])) // 8
  return total


def sum_up(program: str, chip: str, operations: int = 0, dearest: int = 20) -> dict[str, Any]:
  """Sums a program's estimates.

  Args:
    program: its HLO, as `compiled.as_text()` returns it.
    chip: a name of CHIPS.
    operations: the arithmetic that is useful, by `flops.py`; 0 for no MFU.
    dearest: how many of the dearest places of the model to list.

  Returns:
    JSON values: cycles and milliseconds of the convolutions and of all, by the chip's inferred
    clock; bytes of what has no estimate, by operation; model FLOPs utilisation from `mfu[0]`, by
    the sum of all, to `mfu[1]`, by the convolutions alone; and the dearest places.
  """
  items, unknown = read_items(program)
  ghz, tflops = CHIPS[chip].ghz, CHIPS[chip].tflops
  cycles = {"convolutions": _cycles([i for i in items if i.convolves]), "sum": _cycles(items)}
  ms = {name: value / ghz / 1e6 for name, value in cycles.items()}
  without, places = collections.Counter(), collections.defaultdict(lambda: [0, 0])
  for item in items:
    if item.cycles is None:
      without[item.operation] += item.times * item.bytes
      continue
    place = places[item.name, item.operation, item.result, item.convolves]
    place[0] += item.times * item.cycles
    place[1] += item.times
  keys = ("name", "operation", "result", "convolves", "cycles", "times")
  ordered = sorted(places.items(), key=lambda place: -place[1][0])
  return {
    "estimated_cycles": cycles,
    "estimated_ms": ms,
    "bytes_without_estimate": sum(without.values()),
    "bytes_by_operation": dict(without.most_common()),
    "loops_of_unknown_length": unknown,
    "estimated_mfu": [
      operations / ms[name] / tflops / 1e9 if operations and ms[name] else None
      for name in ("sum", "convolutions")
    ],
    "dearest": [
      dict(zip(keys, (*key, *value), strict=True), share=value[0] / max(cycles["sum"], 1))
      for key, value in ordered[:dearest]
    ],
  }


def compile_for(
  function: Any, arguments: Any, device: Any, options: Mapping[str, Any] | None = None
):
  """Compiles a function of arrays, or of their shapes, for one device."""
  place = SingleDeviceSharding(device)
  arguments = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=place), arguments
  )
  return jax.jit(function).lower(*arguments).compile(compiler_options=dict(options or {}))


def calibrate(chip: str, dtype: str) -> dict[str, Any]:
  """Estimates a large matrix product, whose share of the peak shows what the estimate is worth."""
  matrix = jax.ShapeDtypeStruct((CALIBRATION, CALIBRATION), jnp.dtype(dtype))
  program = compile_for(jnp.matmul, (matrix, matrix), find_chip(chip)).as_text()
  summed = sum_up(program, chip, 2 * CALIBRATION**3)
  return {
    "side": CALIBRATION,
    "dtype": dtype,
    "estimated_cycles": summed["estimated_cycles"]["sum"],
    "share_of_peak": summed["estimated_mfu"][0],
  }


def gradients_of_dense_blocks(
  dense_block: DenseBlock | None, dtype: Any
) -> Callable[..., tuple[jax.Array, Any, Any]]:
  """Makes the gradients of dense blocks in one loop: what a change of them does, soon compiled.

  Args:
    dense_block: how one is computed, of `Kernels`; None for the form in the paper.
    dtype: of the convolutions.

  Returns:
    (x, kernels, biases, cotangent of the last output) -> gradients of x, kernels and biases.
  """

  def as_in_paper(x, kernels, biases, inside, dtype):
    kernels, biases = jax.tree.map(lambda p: p.astype(dtype), (kernels, biases))
    for i in range(4):
      new = direct.convolve(x, kernels[i]) + biases[i].reshape(1, 1, 1, -1)
      x = jnp.concatenate([x, leaky_relu.by_output(new)], axis=-1)
    return direct.convolve(x, kernels[4]) + biases[4].reshape(1, 1, 1, -1)

  def loss(x, kernels, biases, cotangent):
    def step(x, parameters):
      y = (dense_block or as_in_paper)(x, *parameters, None, jnp.dtype(dtype))
      return (y * 0.2 + x).astype(x.dtype), None

    x, _ = jax.lax.scan(step, x, (kernels, biases))
    return jnp.sum((x * cotangent).astype(jnp.float32))

  return jax.grad(loss, (0, 1, 2))


class _Given(nn.Module):
  """In the generator's place: the SR images are its parameter, whose gradient is G's gradient."""

  shape: tuple[int, ...]

  @nn.compact
  def __call__(self, lr: jax.Array, *, train: bool) -> jax.Array:
    return self.param("sr", nn.initializers.zeros, self.shape)


def gradients_of_critics(
  shape: tuple[int, ...], networks: Mapping[str, Any], dtype: str, mesh: jax.sharding.Mesh
) -> tuple[Any, Callable[..., Any]]:
  """Makes what VGG and the discriminator do in a GAN step, all but the discriminator's update.

  Args:
    shape: of the SR images.
    networks: as in `train.py`.
    dtype: of the convolutions.
    mesh: of one device.

  Returns:
    The discriminator's parameters as shapes, and (SR, its parameters, HR, VGG's parameters) ->
    gradients of G's loss to the SR images and of D's to its parameters.
  """
  discriminator, critics = jax_esrgan.make_critics(networks, dtype, mesh)
  compute_losses = make_losses(
    _Given(shape), discriminator, jax_esrgan.RECIPES["gan"]["weights"], losses.l1_loss, **critics
  )
  initialise = functools.partial(discriminator.init, train=True)
  variables = jax.eval_shape(initialise, jax.random.key(0), jax.ShapeDtypeStruct(shape, "float32"))

  def gradients(sr, params_d, stats_d, hr, vgg_params):
    def both(params_g, params_d):
      return compute_losses(params_g, params_d, {}, stats_d, hr, hr, vgg_params, None)

    _, back, _ = jax.vjp(both, {"sr": sr}, params_d, has_aux=True)
    one, zero = jnp.ones(()), jnp.zeros(())
    return back((one, zero))[0], back((zero, one))[1]

  return variables, gradients


def compile_case(case: Mapping[str, Any]) -> tuple[Any, int]:
  """Compiles a network or a step for one chip.

  Args:
    case: 'chip', 'what', 'batch_size', 'size' of LR images, 'dtype', 'networks' as in `train.py`,
      'generator' with more fields of RRDBNet, 'options' of the compiler. 'what' is 'forward', a
      step's 'psnr' or 'gan', or a part: 'dense', the dense blocks alone, or 'critics'.

  Returns:
    The compiled program, and its useful arithmetic.
  """
  device = find_chip(case["chip"])
  mesh = sharding.create_mesh([device])
  n, side, networks = case["batch_size"], case["size"], case["networks"]
  if case["what"] == "dense":
    generator = jax_esrgan.make_generator(networks, case["generator"], case["dtype"], mesh)
    f, growth, loops = generator.features, generator.growth, 3 * generator.blocks
    widths = [(f + i * growth, growth if i < 4 else f) for i in range(5)]
    kernels = [jax.ShapeDtypeStruct((loops, 3, 3, *width), jnp.float32) for width in widths]
    biases = [jax.ShapeDtypeStruct((loops, outputs), jnp.float32) for _, outputs in widths]
    x = jax.ShapeDtypeStruct((n, side, side, f), jnp.dtype(case["dtype"]))
    function = gradients_of_dense_blocks(generator.kernels.dense_block, case["dtype"])
    products = 9 * side**2 * sum(inputs * outputs for inputs, outputs in widths)
    operations = n * loops * 3 * 2 * products  # forward, and the gradients of x and of the kernels
    return compile_for(function, (x, kernels, biases, x), device, case["options"]), operations
  if case["what"] == "forward":
    generator = jax_esrgan.make_generator(networks, case["generator"], case["dtype"], mesh)
    lr = jax.ShapeDtypeStruct((n, side, side, 3), jnp.float32)
    initialise = functools.partial(generator.init, train=False)
    params = jax.eval_shape(initialise, jax.random.key(0), lr)
    forward = functools.partial(generator.apply, train=False)
    operations = n * flops.infer_flops(side, side, networks["generator"])
    return compile_for(forward, (params, lr), device, case["options"]), operations
  hr = flops.SCALE * side
  parts = flops.train_flops("psnr" if case["what"] == "psnr" else "gan", hr, **networks)
  vgg_params = None
  if case["what"] != "psnr":
    vgg_params = jax.eval_shape(
      lambda: jax_esrgan.vgg.init_vgg(jax.random.key(0), 19, networks["vgg"])
    )
    vgg_params["input"] = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.float32),
      dict(jax_esrgan.vgg.INPUT["torchvision"]),
    )
  if case["what"] == "critics":
    images = jax.ShapeDtypeStruct((n, hr, hr, 3), jnp.float32)
    variables, function = gradients_of_critics(images.shape, networks, case["dtype"], mesh)
    arguments = images, variables["params"], variables["batch_stats"], images, vgg_params
    operations = n * (sum(parts.values()) - parts["generator"])
    return compile_for(function, arguments, device, case["options"]), operations
  create_state, step = jax_esrgan.make_train(
    case["what"], networks, how=case["generator"], dtype=case["dtype"], hr_patch=hr, mesh=mesh
  )
  batch = jax.eval_shape(lambda: jax_esrgan.make_batch(n, hr))
  lowered = step.lower(jax.eval_shape(create_state), batch, vgg_params)
  operations = n * sum(parts.values())
  return lowered.compile(compiler_options=dict(case["options"])), operations


def estimate(case: Mapping[str, Any], program_file: str | None = None) -> dict[str, Any]:
  """Returns JSON values: what `sum_up` does, the program's memory, and the calibration."""
  begin = time.monotonic()
  program, operations = compile_case(case)
  seconds, memory = time.monotonic() - begin, program.memory_analysis()
  if program_file:
    pathlib.Path(program_file).write_text(program.as_text())
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {
    **case,
    "is": "an estimate by TPU's compiler; nothing was measured",
    "jax": jax.__version__,
    "clock_ghz_inferred": CHIPS[case["chip"]].ghz,
    "peak_tflops": CHIPS[case["chip"]].tflops,
    "useful_flops": operations,
    **sum_up(program.as_text(), case["chip"], operations),
    "held_bytes": held,
    "temporary_bytes": memory.temp_size_in_bytes,
    "calibration": calibrate(case["chip"], "bfloat16"),
    "compile_seconds": seconds,
  }


def estimate_at(revision: str, argv: Sequence[str]) -> dict[str, Any]:
  """Runs this program, as it is now, with all other files as they were at a revision.

  Raises:
    UserError: there is no such revision, or it cannot be estimated.
  """
  with tempfile.TemporaryDirectory(prefix="sr_jax_revision_") as folder:
    archive = pathlib.Path(folder, "revision.tar")
    made = subprocess.run(
      ["git", "archive", f"--output={archive}", revision], cwd=ROOT, capture_output=True, text=True
    )
    if made.returncode:
      raise UserError(
        f"--against={revision}: git cannot read it ({made.stderr.strip()}); try --against=HEAD"
      )
    tree = pathlib.Path(folder, "tree")
    with tarfile.open(archive) as tar:
      tar.extractall(tree, filter="data")
    (tree / "benchmarks").mkdir(exist_ok=True)
    shutil.copy(__file__, tree / "benchmarks" / "estimate.py")
    output = pathlib.Path(folder, "estimate.json")
    command = [sys.executable, "-m", "benchmarks.estimate", *argv, "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
      last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
      raise UserError(f"--against={revision}: it cannot be estimated there: {last}")
    return json.loads(output.read_text())


def verdict(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
  """Says by which factors the figures changed, and whether the change pays by the count.

  It pays if one of convolutions and sum falls by more than a thousandth and the other does not rise
  by more, or if temporary memory falls by a third and neither rises by more than 2 %.
  """
  ratios = {
    name: after["estimated_cycles"][name] / max(before["estimated_cycles"][name], 1)
    for name in ("convolutions", "sum")
  }
  memory = after["temporary_bytes"] / before["temporary_bytes"] if before["temporary_bytes"] else 1
  low, high = min(ratios.values()), max(ratios.values())
  pays = (low < 0.999 and high <= 1.001) or (memory <= 2 / 3 and high <= 1.02)
  return {**ratios, "temporary_bytes": memory, "pays": pays}


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.estimate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--chip", choices=CHIPS, default="v5e")
  parser.add_argument(
    "--what", choices=("forward", "dense", "critics", "psnr", "gan"), default="gan"
  )
  parser.add_argument("--batch_size", type=int, default=16, help="images of the chip")
  parser.add_argument("--size", type=int, default=32, help="side of the LR images")
  parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
  parser.add_argument(
    "--generator", default="", metavar="FIELD=VALUE,...", help="fields of RRDBNet over 64, 23, 32"
  )
  parser.add_argument(
    "--option", action="append", default=[], metavar="NAME=VALUE", help="of the compiler"
  )
  parser.add_argument("--against", metavar="REVISION", help="of git, to compare with")
  parser.add_argument("--program", metavar="FILE", help="to write the program itself to")
  parser.add_argument("--quick", action="store_true", help="tiny networks, to see that it works")
  parser.add_argument("--output", default="results/estimate.json")
  args = parser.parse_args(argv)
  side_by_side.positive("--batch_size", str(args.batch_size))
  side_by_side.positive("--size", str(args.size))
  default = train.QUICK_GENERATOR if args.quick else train.GENERATOR
  (generator,) = side_by_side.parse_generators([args.generator], default)
  case = {
    "chip": args.chip,
    "what": args.what,
    "batch_size": args.batch_size,
    "size": args.size,
    "dtype": args.dtype,
    "generator": {key: value for key, value in generator.items() if key not in default},
    "networks": {
      "generator": {key: generator[key] for key in default},
      "discriminator": 8 if args.quick else 64,
      "vgg": 1 / 16 if args.quick else 1.0,
    },
    "options": dict(text.split("=", 1) for text in args.option),
  }
  found = estimate(case, args.program)
  print_estimate(found)
  if args.against:
    rest = _without(argv, "--against", "--output", "--program")
    found["against"] = {"revision": args.against, **estimate_at(args.against, rest)}
    found["change"] = verdict(found["against"], found)
    print(f"\nbefore, at {args.against}:")
    print_estimate(found["against"], dearest=0)
    change = found["change"]
    print(
      f"after / before: convolutions {change['convolutions']:.3f}, sum {change['sum']:.3f}, "
      f"temporary memory {change['temporary_bytes']:.3f}: by the count it "
      f"{'pays' if change['pays'] else 'does not pay'}"
    )
  side_by_side.write_json(args.output, found)


def _without(argv: Sequence[str], *flags: str) -> list[str]:
  """The arguments without these flags and their values."""
  rest, skip = [], False
  for word in argv:
    if skip:
      skip = False
    elif word in flags:
      skip = True
    elif not word.startswith(tuple(f"{flag}=" for flag in flags)):
      rest.append(word)
  return rest


def print_estimate(found: Mapping[str, Any], dearest: int = 20) -> None:
  ms, mfu, calibration = found["estimated_ms"], found["estimated_mfu"], found["calibration"]
  without = ", ".join(
    f"{operation} {size / 1e6:.1f}"
    for operation, size in list(found["bytes_by_operation"].items())[:5]
  )
  print(
    f"ESTIMATE of TPU's compiler, not measured: {found['what']}, batch {found['batch_size']}, LR "
    f"{found['size']}, {found['dtype']}, one {found['chip']} at an inferred "
    f"{found['clock_ghz_inferred']} GHz\n"
    f"  convolutions alone {ms['convolutions']:.3f} ms, sum of all estimates {ms['sum']:.3f} ms\n"
    f"  without an estimate: {found['bytes_without_estimate'] / 1e6:.1f} MB ({without})"
  )
  if None not in mfu:
    print(f"  MFU {mfu[0]:.1%} by the sum, {mfu[1]:.1%} by the convolutions")
  print(
    f"  holds {found['held_bytes'] / 1e9:.3f} GB and, while it runs, "
    f"{found['temporary_bytes'] / 1e9:.3f} GB more; compiled in {found['compile_seconds']:.0f} s\n"
    f"  calibration: a matrix product of {calibration['side']} in {calibration['dtype']} is "
    f"estimated at {calibration['share_of_peak']:.1%} of the peak"
  )
  for place in found["dearest"][:dearest]:
    print(
      f"  {place['share']:6.1%} {place['cycles'] / 1e6:8.3f} Mcycles x{place['times']:<4d} "
      f"{'conv' if place['convolves'] else '    '} {place['name'][-90:]} -> {place['result'][:60]}"
    )


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
