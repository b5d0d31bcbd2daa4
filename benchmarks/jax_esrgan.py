"""Makes sr_jax's own step and network ready to be timed: one side of train.py and infer.py.

The step is `step.make_train_step` with the modules and values that `sr_jax.training.recipe` builds
from configs/esrgan.py:basicsr and esrgan_psnr.py:basicsr. The values are repeated here, because a
machine to measure on may lack ml_collections, which `configs` and `recipe` need.
tests/timing/benchmarks_train_test.py compares the program with the one that the recipe gives.
"""

import functools
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops
from benchmarks import side_by_side
from sr_jax.kernels.choose import choose
from sr_jax.machine import sharding
from sr_jax.networks.build import build_generator, check_dtype
from sr_jax.networks import discriminators
from sr_jax.networks import vgg
from sr_jax.runs.state import TrainState, create_guard_state, create_train_state
from sr_jax.training import losses
from sr_jax.training import schedules
from sr_jax.training.guard import Guard
from sr_jax.training.step import TrainStep, make_optimizer, make_train_step
from sr_jax.training.terms import Adversarial, Perceptual

# The recipes as released, where they differ.
RECIPES = {
  "psnr": {
    "weights": {"pixel": 1.0},
    "learning_rate": dict(
      schedule="cosine_restarts", base=2e-4, periods=(250_000,) * 4, eta_min=1e-7
    ),
  },
  "gan": {
    "weights": {"pixel": 1e-2, "perceptual": 1.0, "adversarial": 2.5e-3},
    "learning_rate": dict(
      schedule="multi_step", base=1e-4, milestones=(50_000, 100_000, 200_000, 300_000), gamma=0.5
    ),
  },
}


def make_generator(
  networks: dict[str, Any], how: dict[str, Any], dtype: str, mesh: jax.sharding.Mesh
):
  generator = build_generator("rrdbnet", {**networks["generator"], **how}, dtype=dtype)
  return generator.clone(kernels=choose(mesh.devices, dtype, generator))


def make_critics(
  networks: dict[str, Any], dtype: str, mesh: jax.sharding.Mesh
) -> tuple[discriminators.VGGDiscriminator, dict[str, Perceptual | Adversarial]]:
  """Builds the GAN recipe's discriminator, and its terms for `make_train_step` or `make_losses`."""
  kernels = choose(mesh.devices, dtype)
  discriminator = discriminators.VGGDiscriminator(
    features=networks["discriminator"], dtype=check_dtype(dtype), kernels=kernels
  )
  layer = {"conv5_4": 1.0}
  return discriminator, {
    "perceptual": Perceptual(layer, layer, losses.l1_loss, jnp.dtype(dtype), kernels),
    "adversarial": Adversarial(losses.ADVERSARIAL["ragan_detached"], discriminator_weight=0.5),
  }


def make_train(
  what: str,
  networks: dict[str, Any],
  *,
  how: dict[str, Any],
  dtype: str,
  hr_patch: int,
  mesh: jax.sharding.Mesh,
  guarded: bool = True,
) -> tuple[Callable[..., TrainState], TrainStep]:
  """Builds a recipe's step, and the function that makes its state, fresh or from given variables.

  Args:
    what: 'gan' or 'psnr'.
    networks: the sizes of the networks, as in `train.py`.
    how: more fields of the generator.
    dtype: the dtype of the convolutions.
    hr_patch: side of the HR crops.
    mesh: what `sharding.create_mesh` returned.
    guarded: whether a step that is not finite leaves nothing behind, as in training.
  """
  recipe, gan = RECIPES[what], what == "gan"
  generator = make_generator(networks, how, dtype, mesh)
  discriminator, terms = make_critics(networks, dtype, mesh) if gan else (None, {})
  optimizer = make_optimizer(b1=0.9, b2=0.99)

  def create_state(*variables: Any) -> TrainState:
    side = hr_patch // flops.SCALE
    shapes = (1, side, side, 3), (1, hr_patch, hr_patch, 3)
    state = create_train_state(
      0, generator, discriminator, optimizer, optimizer if gan else None, *shapes, *variables
    )
    return state.replace(guard=create_guard_state()) if guarded else state

  step = make_train_step(
    generator,
    discriminator,
    weights=recipe["weights"],
    pixel_loss=losses.l1_loss,
    **terms,
    optimizer_g=optimizer,
    optimizer_d=optimizer if gan else None,
    learning_rate=schedules.make_schedule(**recipe["learning_rate"]),
    ema_decay=0.999,
    mesh=mesh,
    guard=Guard(relativistic=True) if guarded else None,
  )
  return create_state, step


def draw(shapes: Any) -> Any:
  """Draws variables with numpy: compiling the networks' own initialisers takes longer than timing.

  Args:
    shapes: a tree with shapes for leaves, as `jax.eval_shape` returns it.
  """
  rng = np.random.default_rng(0)

  def leaf(path, x):
    name = path[-1].key
    if name == "kernel":
      return rng.normal(0, 0.5 / np.sqrt(np.prod(x.shape[-4:-1])), x.shape).astype(np.float32)
    return np.full(x.shape, name in ("scale", "var"), np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def make_batch(batch_size: int, hr_patch: int) -> dict[str, np.ndarray]:
  """Draws images of noise, uint8 as the inputs of the training give them."""
  rng, side = np.random.default_rng(0), hr_patch // flops.SCALE
  return {
    name: rng.integers(0, 256, (batch_size, n, n, 3), dtype=np.uint8)
    for name, n in (("lr", side), ("hr", hr_patch))
  }


def prepare(row: dict[str, Any], case: dict[str, Any]) -> side_by_side.Prepared:
  """Makes a case of `train.py` or `infer.py` ready on one device; see `side_by_side`."""
  how, dtype, networks = row["generator"], row["dtype"], case["networks"]
  device = jax.devices()[0]
  mesh = sharding.create_mesh([device])
  replicated = sharding.replicated(mesh)
  if case["what"] == "infer":
    generator = make_generator(networks, how, dtype, mesh)
    lr = jnp.zeros((1, 8, 8, 3))
    params = draw(jax.eval_shape(lambda: generator.init(jax.random.key(0), lr, train=False)))
    params = jax.device_put(params, device)
    parameters = {"generator": _count(params)}
    shape = (case["batch_size"], case["size"], case["size"], 3)
    lr = jax.device_put(np.random.default_rng(0).random(shape, np.float32), device)
    begin = time.perf_counter()
    forward = functools.partial(generator.apply, train=False)
    program = jax.jit(forward, compiler_options=dict(generator.kernels.compiler_options))
    program = program.lower(params, lr).compile()
    compile_s = time.perf_counter() - begin

    def run(count: int) -> float:
      for _ in range(count):
        sr = program(params, lr)
      jax.block_until_ready(sr)
      return float(sr[0, 0, 0, 0])

  else:
    create_state, step = make_train(
      case["what"], networks, how=how, dtype=dtype, hr_patch=case["hr_patch"], mesh=mesh,
      guarded=row.get("guarded", True),
    )  # fmt: skip
    fresh = jax.eval_shape(create_state)
    nets = {"generator": fresh.generator, "discriminator": fresh.discriminator}
    variables = {name: draw(net.variables) for name, net in nets.items() if net is not None}
    state = jax.jit(create_state, out_shardings=replicated)(*variables.values())
    parameters = {name: _count(nets[name].params) for name in variables}
    vgg_params = None
    if "discriminator" in variables:
      vgg_params = draw(
        jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0), 19, networks["vgg"]))
      )
      vgg_params["input"] = dict(vgg.INPUT["torchvision"])
      vgg_params = jax.device_put(vgg_params, replicated)
    batch = make_batch(case["batch_size"], case["hr_patch"])
    batch = jax.device_put(batch, sharding.batch_sharded(mesh))
    begin = time.perf_counter()
    program = step.lower(state, batch, vgg_params).compile()
    compile_s = time.perf_counter() - begin

    def run(count: int) -> float:
      nonlocal state
      for _ in range(count):
        state, metrics = program(state, batch, vgg_params)
      jax.block_until_ready((state, metrics))
      return float(metrics["loss_g"])

  def peak_bytes() -> int:
    stats = device.memory_stats()
    if stats:
      return stats["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

  facts = {
    "platform": device.platform,
    "device": device.device_kind,
    "version": jax.__version__,
    "compile_s": compile_s,
    "kept": "__onednn$" not in program.as_text(),
    "program_bytes": _program_bytes(program),
    "parameters": parameters,
  }
  return side_by_side.Prepared(run, peak_bytes, facts, lambda: matmul_rate(dtype))


def matmul_rate(dtype: str) -> float:
  """Measures the operations per second of products of large square matrices, by JAX's default."""
  on_cpu = jax.default_backend() == "cpu"
  n, count = (1024, 4) if on_cpu else (8192, 20)
  a = jnp.ones((n, n), dtype)
  product = jax.jit(jnp.matmul)
  jax.block_until_ready(product(a, a))
  begin = time.perf_counter()
  for _ in range(count):
    b = product(a, a)
  jax.block_until_ready(b)
  return 2 * n**3 * count / (time.perf_counter() - begin)


def _program_bytes(program: jax.stages.Compiled) -> int | None:
  """Returns the bytes that a program needs by the compiler's account: arguments, results, rest."""
  memory = program.memory_analysis()
  if memory is None:
    return None
  return (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def _count(tree: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
