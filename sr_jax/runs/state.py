"""The state of a run: the pytree that is donated, sharded and saved."""

from typing import Any

import flax.linen as nn
from flax import struct
import jax
import jax.numpy as jnp
import optax

Params = Any  # a tree of float32 arrays


class NetState(struct.PyTreeNode):
  """One network and its optimizer.

  Attributes:
    params: float32 parameters.
    opt_state: the state of the network's optax optimizer: Adam's moments, and whatever else its
      chain keeps.
    batch_stats: running statistics of BatchNorm and vectors of spectral norm; {} without any.
  """

  params: Params
  opt_state: optax.OptState
  batch_stats: Params

  @property
  def variables(self) -> dict[str, Params]:
    return {"params": self.params, "batch_stats": self.batch_stats}


WINDOW = 64  # steps that running medians are of


class GuardState(struct.PyTreeNode):
  """What the guard of the steps remembers, see `training/guard.py`; all but `history` are scalars.

  Attributes:
    skipped: the steps of the run that were skipped, int32.
    in_a_row: those of them since the last step that was kept, int32.
    outside: the steps in a row, up to this one, whose loss was outside of its band, int32.
    won: the steps in a row, up to this one, in which the discriminator had won, int32.
    data_offset: step s takes the examples of step s + data_offset, int32; more than 0 once the run
      went back.
    rate_factor: of the learning rate, float32; less than 1 once the run went back.
    history: gradient norms and losses of WINDOW earlier steps, float32 [WINDOW, 4]: the norms of
      generator and discriminator, their absolute losses; 0 where nothing was seen yet.
  """

  skipped: jax.Array
  in_a_row: jax.Array
  outside: jax.Array
  won: jax.Array
  data_offset: jax.Array
  rate_factor: jax.Array
  history: jax.Array


def create_guard_state() -> GuardState:
  """Returns the guard's state at step 0."""
  zeros = (jnp.zeros((), jnp.int32) for _ in range(5))  # one each: an alias cannot be donated
  return GuardState(*zeros, jnp.ones(()), jnp.zeros((WINDOW, 4)))


class TrainState(struct.PyTreeNode):
  """A run at one step.

  Attributes:
    step: the number of steps done, an int32 scalar: each is an optimizer update, or was skipped.
    generator: the generator and its optimizer.
    discriminator: the discriminator and its optimizer; None in PSNR runs. None is an empty pytree:
      it passes through jit, donation, sharding and Orbax unchanged, so those runs need no class of
      their own.
    ema_params: the exponential moving average of generator.params, which evaluation and model
      files use.
    guard: what the guard remembers; None, an empty pytree, without a guard.
  """

  step: jax.Array
  generator: NetState
  discriminator: NetState | None
  ema_params: Params
  guard: GuardState | None = None

  @property
  def ema_variables(self) -> dict[str, Params]:
    """The variables to evaluate and ship: averaged parameters, current BatchNorm statistics."""
    return {"params": self.ema_params, "batch_stats": self.generator.batch_stats}


def create_train_state(
  seed: int,
  generator: nn.Module,
  discriminator: nn.Module | None,
  optimizer_g: optax.GradientTransformation,
  optimizer_d: optax.GradientTransformation | None,
  lr_shape: tuple[int, int, int, int],
  hr_shape: tuple[int, int, int, int],
  generator_variables: dict[str, Params] | None = None,
  discriminator_variables: dict[str, Params] | None = None,
) -> TrainState:
  """Initialises both networks; `jax.jit` and `jax.eval_shape` can be applied to it.

  Args:
    seed: the seed of the initialisation.
    generator: the module from LR image to SR image.
    discriminator: the module from image to logits, or None.
    optimizer_g: the generator's optimizer.
    optimizer_d: the discriminator's optimizer, or None.
    lr_shape: the shape of an LR batch, [N, h, w, c]; N may be 1.
    hr_shape: the shape of an HR batch, [N, H, W, c].
    generator_variables: {'params', 'batch_stats'} to start from instead of a fresh generator.
    discriminator_variables: the same for the discriminator.

  Returns:
    The state at step 0, with `ema_params` equal to the generator's parameters. It is a copy: an
    alias would make donation fail.
  """
  key_g, key_d = jax.random.split(jax.random.key(seed))
  if generator_variables is None:
    generator_variables = generator.init(key_g, jnp.zeros(lr_shape), train=False)
  params_g = generator_variables["params"]
  net_d = None
  if discriminator is not None:
    variables_d = discriminator_variables
    if variables_d is None:
      variables_d = discriminator.init(key_d, jnp.zeros(hr_shape), train=False)
    net_d = NetState(
      params=variables_d["params"],
      opt_state=optimizer_d.init(variables_d["params"]),
      batch_stats=variables_d.get("batch_stats", {}),
    )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    generator=NetState(
      params=params_g,
      opt_state=optimizer_g.init(params_g),
      batch_stats=generator_variables.get("batch_stats", {}),
    ),
    discriminator=net_d,
    ema_params=jax.tree.map(jnp.copy, params_g),
  )
