"""What the devices say to each other in a step, read from the compiled program."""

import collections
import re

import jax
import numpy as np

import train_step_test as steps
from sr_jax import sharding

DEVICES = 8
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1}


def collectives() -> list[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
  """Each collective of the GAN step on 8 devices: its kind, and type and shape of its results."""
  mesh = steps.make_mesh(DEVICES)
  batch = jax.device_put(steps.make_batch(), sharding.batch_sharded(mesh))
  state, vgg = (steps.put(tree, DEVICES) for tree in (steps.initial_state(True), steps.VGG))
  program = steps.default_step(True, DEVICES).lower(state, batch, vgg).compile().as_text()
  found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", program)
  return [
    (
      kind,
      [
        (t, tuple(map(int, filter(None, d.split(",")))))
        for t, d in re.findall(r"(\w+)\[([\d,]*)\]", s)
      ],
    )
    for s, kind in found
  ]


def test_the_step_sends_gradients_and_means_and_nothing_else():
  sent = collectives()
  assert {kind for kind, _ in sent} == {"all-reduce"}  # nothing is gathered or moved about
  arrays = collections.Counter(array for _, arrays in sent for array in arrays)

  state = steps.initial_state(True)
  g, d = state.generator.params, state.discriminator.params
  # A stacked kernel of the body is reduced block by block, and linen flattens nothing.
  kernels = {leaf.shape[-4:] for leaf in jax.tree.leaves(g) if leaf.ndim >= 4}
  kernels |= {leaf.shape for leaf in jax.tree.leaves(d) if leaf.ndim > 1}
  kernels |= {shape[::-1] for shape in kernels if len(shape) == 2}
  for _, shape in arrays:
    assert len(shape) <= 1 or shape in kernels, f"{shape} is no gradient: an activation is sent"

  total = sum(BYTES[kind] * int(np.prod(shape)) * n for (kind, shape), n in arrays.items())
  matrices = {k: sum(x.size * 4 for x in jax.tree.leaves(t) if x.ndim > 1) for k, t in
              (("g", g), ("d", d))}  # fmt: skip
  sent_matrices = sum(
    BYTES[kind] * int(np.prod(shape)) * n for (kind, shape), n in arrays.items() if len(shape) > 1
  )
  # On a CPU the discriminator's gradient crosses twice, once for its real and once for its fake
  # batch: XLA adds before it reduces on GPU and TPU only (all-reduce-reassociate).
  assert sent_matrices <= matrices["g"] + 2 * matrices["d"]
  assert sent_matrices >= matrices["g"] + matrices["d"]
  # The rest: biases, BatchNorm's sums forward and back, RaGAN's means, losses. Vectors of channels.
  assert total - sent_matrices < 0.05 * total
