"""Training states without a network, to be saved and restored."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sr_jax.machine import sharding
from sr_jax.runs import checkpoint
from sr_jax.runs.state import NetState, TrainState


def make_state(step: int, discriminator: bool = True, width: int = 400) -> TrainState:
  """A state with a bit of everything, random but for the step."""
  rng = np.random.default_rng(step)
  optimizer = optax.scale_by_adam()

  def net():
    params = {"conv": {"kernel": jnp.asarray(rng.normal(size=(3, 3, width)), jnp.float32)}}
    stats = {"bn": {"mean": jnp.asarray(rng.normal(size=width), jnp.float32)}}
    return NetState(params, optimizer.init(params), stats)

  g = net()
  state = TrainState(
    step=jnp.int32(step),
    generator=g,
    discriminator=net() if discriminator else None,
    ema_params=jax.tree.map(lambda x: x * 0.5, g.params),
  )
  return jax.device_put(state, sharding.replicated(sharding.create_mesh()))


def abstract(state: TrainState, devices: int = 8) -> TrainState:
  replicated = sharding.replicated(sharding.create_mesh(jax.devices()[:devices]))
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), state)


def write(run: pathlib.Path, steps: tuple[int, ...], keep: int = 5, **arguments) -> None:
  with checkpoint.open_manager(run, keep=keep, **arguments) as manager:
    for step in steps:
      checkpoint.save(manager, make_state(step), extra={"data": "abc"})


def assert_equal(a, b) -> None:
  paths = jax.tree_util.tree_leaves_with_path(a)
  others = jax.tree_util.tree_leaves_with_path(b)
  assert [p for p, _ in paths] == [p for p, _ in others]
  for (path, x), (_, y) in zip(paths, others, strict=True):
    assert x.dtype == y.dtype, path
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))
