"""Keeps nothing of a step that is not sound; pure functions, which the step ends with.

A step is sound if its losses, its gradients and the new state (parameters, moments, BatchNorm's
statistics, averages) are finite and, where outliers are looked for, if no gradient's norm is far
above its running median. Of a step that is not, no value is kept, of either network: whole trees
are selected, since 0 * NaN is NaN. The step is counted all the same, so that the next one has other
examples. What happens after too many of them in a row is decided in `recovery.py`, outside of the
compiled step.
"""

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sr_jax.runs.state import WINDOW, TrainState

Metrics = dict[str, jax.Array]

WON = 0.98  # the margin from which on the discriminator has won


class Guard(NamedTuple):
  """What a step is skipped for beside numbers that are not finite.

  Attributes:
    outlier: skip a step with a gradient norm above so many times its running median; 0: never.
    divergence: count the steps in a row with a loss above so many times its running median; 0:
      none. Such a step is kept.
    relativistic: whether the discriminator is one of RaGAN.
  """

  outlier: float = 0.0
  divergence: float = 0.0
  relativistic: bool = False


def keep_sound(
  guard: Guard, old: TrainState, new: TrainState, metrics: Metrics, mesh: jax.sharding.Mesh
) -> tuple[TrainState, Metrics]:
  """Selects the new state where the step was sound, else the old one with the step counted.

  Args:
    guard: what a step is skipped for.
    old: the state before the step, with `guard`.
    new: the state after it, without.
    metrics: of the step; all of them must be finite.
    mesh: of the step. Its devices decide alike, even if one's copy of the state is damaged.

  Returns:
    The state, and the metrics with the counters: `guard/skipped`, `guard/in_a_row`,
    `guard/outside` and `guard/won` as in `GuardState`, and `guard/leaf`, the number of the first
    leaf of `leaf_names` that is not finite, or -1.
  """
  memory, history = old.guard, old.guard.history
  finite = _are_finite([leaf for _, leaf in _checked(new)])
  numbers = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
  observed = jnp.stack([jnp.abs(metrics.get(name, jnp.zeros(()))) for name in _OBSERVED])
  sound, outside = finite.all() & numbers, jnp.zeros((), bool)
  if guard.outlier or guard.divergence:
    # 0 until half of the window is filled: nothing is judged by a few steps.
    median = jnp.median(history, axis=0)
  if guard.outlier:
    sound &= ~_above(observed[:2], guard.outlier, median[:2])
  if guard.divergence:
    # Of the discriminator's loss the band is no narrower than 1: it falls to 0 where D wins.
    median = jnp.maximum(median[2:], jnp.array([0.0, 1.0]) * (median[2:] > 0))
    outside = _above(observed[2:], guard.divergence, median) | ~numbers
  sound = _agreed(sound, mesh)
  if guard.outlier or guard.divergence:
    # What was skipped is no measure of later steps, nor is a loss outside of its band.
    fits = sound & (jnp.array([True, True, False, False]) | ~outside)
    row = old.step % WINDOW
    history = history.at[row].set(jnp.where(fits, observed, history[row]))
  has_won = jnp.zeros((), bool)
  if "d_real" in metrics:
    has_won = margin(jnp, metrics, relativistic=guard.relativistic) > WON

  def kept(new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, old)

  def counted(happened: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(happened, count + 1, 0)

  memory = memory.replace(
    skipped=memory.skipped + ~sound,
    in_a_row=counted(~sound, memory.in_a_row),
    outside=counted(outside, memory.outside),
    won=counted(has_won, memory.won),
    history=history,
  )
  state = new.replace(
    generator=kept(new.generator, old.generator),
    discriminator=kept(new.discriminator, old.discriminator),
    ema_params=kept(new.ema_params, old.ema_params),
    guard=memory,
  )
  counters = {name: getattr(memory, name) for name in ("skipped", "in_a_row", "outside", "won")}
  counters["leaf"] = jnp.where(finite.all(), -1, jnp.argmin(finite))
  return state, metrics | {f"guard/{name}": x.astype(jnp.float32) for name, x in counters.items()}


_OBSERVED = ("grad_norm_g", "grad_norm_d", "loss_g", "loss_d")


def margin(xp: ModuleType, metrics: Any, *, relativistic: bool) -> Any:
  """Says how surely the discriminator tells real images from fake ones: 1 at most, 0 if not at all.

  It is D(real) - D(fake), both as probabilities. RaGAN's discriminator is asked for the difference
  of two images, sigmoid(C(real) - mean C(fake)), so the mean logits are compared here.

  Args:
    xp: numpy or jax.numpy.
    metrics: 'd_real' and 'd_fake', or 'logit_real' and 'logit_fake' of a relativistic one.
    relativistic: whether it is one of RaGAN.
  """
  if relativistic:  # sigmoid(x) - sigmoid(-x)
    return xp.tanh((metrics["logit_real"] - metrics["logit_fake"]) / 2)
  return metrics["d_real"] - metrics["d_fake"]


def leaf_names(state: TrainState) -> list[str]:
  """Names the leaves that `guard/leaf` numbers, 'generator/params/conv_first/kernel'."""
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in _checked(state.replace(guard=None))
  ]


def _checked(state: TrainState) -> list[tuple[Any, Any]]:
  """The leaves that can be other than finite, with their paths."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return [(path, leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


_BITS = 31  # of an int32 that is not negative


def _are_finite(leaves: Sequence[jax.Array]) -> jax.Array:
  """Says of each leaf whether all of its values are finite, [leaves].

  Leaves of one shape, as a parameter, its moments and its average, are looked at in one reduction,
  with a bit for each: one reduction for each leaf would be hundreds of kernels for an accelerator
  to launch.
  """
  shapes: dict[tuple[int, ...], list[int]] = {}
  for i, leaf in enumerate(leaves):
    shapes.setdefault(leaf.shape, []).append(i)
  masks, mask_of, bit_of = [], np.zeros(len(leaves), int), np.zeros(len(leaves), np.int32)
  for same in shapes.values():
    for begin in range(0, len(same), _BITS):
      some = same[begin : begin + _BITS]
      mask_of[some], bit_of[some] = len(masks), 1 << np.arange(len(some))
      bits = (jnp.where(jnp.isfinite(leaves[i]), 0, bit_of[i]) for i in some)
      marks = functools.reduce(jnp.bitwise_or, bits)
      axes = tuple(range(marks.ndim))
      masks.append(jax.lax.reduce(marks, np.int32(0), jax.lax.bitwise_or, axes))
  return jnp.stack(masks)[mask_of] & bit_of == 0


def _above(observed: jax.Array, factor: float, median: jax.Array) -> jax.Array:
  """Whether a number is above so many times its median; not where that is 0, which is unknown."""
  return ((median > 0) & (observed > factor * median)).any()


def _agreed(sound: jax.Array, mesh: jax.sharding.Mesh) -> jax.Array:
  """Whether the step was sound on every device, whose copies of the state may be damaged."""
  if mesh.size == 1:
    return sound

  def least(sound: jax.Array) -> jax.Array:
    # The compiler takes copies to be equal, and would drop the exchange of one. It cannot know
    # that no device's number is below 0.
    mine = sound & (jax.lax.axis_index(mesh.axis_names) >= 0)
    return jax.lax.pmin(mine.astype(jnp.int32), mesh.axis_names)

  same = jax.shard_map(
    least, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
  )
  return same(sound) > 0
