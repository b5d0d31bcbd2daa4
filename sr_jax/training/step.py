"""The update rule of both papers: one jitted program a step.

Generator and discriminator are updated together from one forward pass. With

  losses(params_g, params_d) -> (loss_g, loss_d)

one `jax.vjp` has two pullbacks: (1, 0) is the gradient of the generator's loss with respect to its
parameters, (0, 1) that of the discriminator's; the compiler drops the halves that nobody asks for.
The discriminator runs twice a step, once on HR and once on SR images (two BatchNorm batches).

BasicSR updates G first, then D on the SR image from before that update, with five discriminator
forwards. D's parameters do not change between them and its BatchNorm uses batch statistics, so the
five make only two different sets of logits: the update is the same, and only BatchNorm's running
statistics, which nothing reads in training, are averaged over two forwards instead of five
(`tests/training/step_test.py` measures both). Spectral norm does one power iteration a forward:
with it, BasicSR's five forwards see five different weights, and the two here see two.
"""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sr_jax.kernels import choose
from sr_jax.machine import sharding
from sr_jax.networks import vgg
from sr_jax.runs.state import NetState, TrainState
from sr_jax.training import guard as guards
from sr_jax.training import losses
from sr_jax.training import schedules
from sr_jax.training.terms import Adversarial, Losses, Perceptual, make_losses

Metrics = dict[str, jax.Array]
TrainStep = Callable[
  [TrainState, Mapping[str, jax.Array], vgg.Params | None], tuple[TrainState, Metrics]
]


def make_optimizer(
  *, b1: float, b2: float, eps: float = 1e-8, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Adam without its learning rate, which the step applies by the run's own count.

  Clipping has no state: a run may begin to clip, or cease to, at any checkpoint.

  Args:
    b1: 0.9 in both papers.
    b2: 0.999 in ESRGAN's paper, 0.99 in its released code.
    eps: outside the square root, as in PyTorch.
    clip_norm: largest global norm of the gradient; 0 for none.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if not clip_norm:
    return adam
  clip = optax.clip_by_global_norm(clip_norm)

  def update(grads: Any, state: optax.OptState, params: Any = None) -> Any:
    grads, _ = clip.update(grads, optax.EmptyState())
    return adam.update(grads, state, params)

  return optax.GradientTransformation(adam.init, update)


def make_train_step(
  generator: nn.Module,
  discriminator: nn.Module | None,
  *,
  weights: Mapping[str, float],
  pixel_loss: Callable[[jax.Array, jax.Array], jax.Array] = losses.l1_loss,
  perceptual: Perceptual | None = None,
  adversarial: Adversarial | None = None,
  optimizer_g: optax.GradientTransformation,
  optimizer_d: optax.GradientTransformation | None = None,
  learning_rate: schedules.Schedule,
  ema_decay: float = 0.999,
  ema_warmup: bool = False,
  accumulate_steps: int = 1,
  frozen: Mapping[str, Any] | None = None,
  grey: bool = False,
  mesh: jax.sharding.Mesh,
  prepare: Callable[[Any, jax.Array], Mapping[str, jax.Array]] | None = None,
  mix: Callable[..., tuple[jax.Array, jax.Array]] | None = None,
  sharpened: Collection[str] = (),
  guard: guards.Guard | None = None,
) -> TrainStep:
  """Makes the jitted, donated, mesh-sharded update.

  More than half of these lines say what its many arguments are; the step itself is one sequence.

  Args:
    generator: LR image in, SR image out.
    discriminator: logits, or None where `adversarial` has no weight.
    weights: {term: weight} of the generator's loss, for terms of `terms.TERMS`. A term of weight 0
      or without an entry does not exist: it is not computed and not logged.
    pixel_loss: of `losses.PIXEL`.
    perceptual: needed where its weight is not 0.
    adversarial: needed where its weight is not 0.
    optimizer_g: of `make_optimizer`.
    optimizer_d: the discriminator's.
    learning_rate: of both networks.
    ema_decay: ema = decay * ema + (1 - decay) * params after each update of the generator.
    ema_warmup: use min(decay, (1 + step) / (10 + step)) instead, for runs so short that the average
      would still remember its start.
    accumulate_steps: gradients are averaged over so many micro-batches, one after the other. The
      means of RaGAN and of BatchNorm are then over a micro-batch (of all devices). Where there is
      neither, a single CPU may take more and smaller ones.
    frozen: of `freezing.frozen_masks`, or None. What is frozen keeps its value, its moments, its
      average and its BatchNorm statistics, and has no part in gradient norms.
    grey: whether the networks see the luma of colour images, [..., 1].
    mesh: of `sharding.create_mesh`; parameters are replicated, the batch is split.
    prepare: of `inputs.open_batches`. With it the step makes the batch of `state.step` itself, out
      of what takes the place of a batch: the arrays of all images, or crops to degrade.
    mix: of `recipe.make_mixing`, (lr, hr, step) -> (lr, hr) in [0, 1], or None.
    sharpened: the terms that compare with the sharpened HR images.
    guard: with it nothing is kept of a step that is not sound. It needs a state with `guard`, which
      also says how far the examples are ahead of the step, and what the rate is multiplied by.

  Returns:
    (state, batch, vgg_params) -> (state, metrics). The state is donated. The batch has 'lr'
    [N, h, w, c] and 'hr' [N, h*s, w*s, c], uint8, uint16 or float in [0, 1]. VGG's parameters are
    an argument because an array closed over would be baked into the program; None without a
    perceptual term. Metrics are float32 scalars: `loss_g`, `loss_d`, each term raw
    (`loss/pixel`) and weighted (`weighted/pixel`), `d_real` and `d_fake` (mean probabilities),
    `logit_real` and `logit_fake` (mean logits), gradient norms, the learning rate, and what
    `guard.keep_sound` counts; with `adversarial.rest_above` also `d_rests`, 1 where the
    discriminator was left alone.

  Raises:
    UserError: a term has weight and nothing to compute it with.
  """
  compute_losses = make_losses(
    generator, discriminator, weights, pixel_loss, perceptual, adversarial, sharpened
  )
  if discriminator is not None and mesh.size > 1:
    compute_losses = with_kernels_rounded_once(compute_losses, jnp.dtype(discriminator.dtype))
  # Where there is a discriminator, its convolutions decide how micro-batches are looped over.
  kernels = (generator if discriminator is None else discriminator).kernels
  gradients_of = functools.partial(_accumulate, compute_losses, slow_loops=kernels.slow_loops)
  rep, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)

  def train_step(state: TrainState, batch, vgg_params) -> tuple[TrainState, Metrics]:
    if prepare is not None or mix is not None:
      position = state.step if guard is None else state.step + state.guard.data_offset
    if prepare is not None:
      batch = jax.lax.with_sharding_constraint(prepare(batch, position), split)
    g, d = state.generator, state.discriminator
    params_d, stats_d = (None, None) if d is None else (d.params, d.batch_stats)
    lr, hr = _to_float(batch["lr"]), _to_float(batch["hr"])
    if grey:
      lr, hr = _luma(lr, _white(batch["lr"])), _luma(hr, _white(batch["hr"]))
    if mix is not None:
      lr, hr = mix(lr, hr, position)
    steps = accumulate_steps
    if d is None and not g.batch_stats:
      # Nothing looks at the batch as a whole, so it may be computed in parts.
      steps = max(steps, choose.batch_parts(lr.shape, generator.kernels.pixels))
    (grads_g, grads_d, metrics), (stats_g, stats_d) = gradients_of(
      steps, g.params, params_d, g.batch_stats, stats_d, lr, hr, vgg_params, state.ema_params
    )
    if frozen is not None:
      grads_g = _keep_frozen(frozen["params"], grads_g, jax.tree.map(jnp.zeros_like, grads_g))
    rate = learning_rate(state.step)
    if guard is not None:
      rate *= state.guard.rate_factor
    metrics |= {"learning_rate": rate, "grad_norm_g": optax.tree.norm(grads_g)}
    new_g = _update(optimizer_g, g, grads_g, rate, stats_g)
    decay = jnp.float32(ema_decay)
    if ema_warmup:
      decay = jnp.minimum(decay, (1.0 + state.step) / (10.0 + state.step))
    new_ema = jax.tree.map(
      lambda ema, new: decay * ema + (1 - decay) * new, state.ema_params, new_g.params
    )
    new_d = d
    if d is not None:
      metrics["grad_norm_d"] = optax.tree.norm(grads_d)
      new_d = _update(optimizer_d, d, grads_d, rate, stats_d)
      if adversarial.rest_above:
        rests = metrics["logit_real"] - metrics["logit_fake"] > adversarial.rest_above
        metrics["d_rests"] = rests.astype(jnp.float32)
        new_d = jax.tree.map(lambda new, old: jnp.where(rests, old, new), new_d, d)
      new_g, new_ema = _in_turn(adversarial, state.step, (new_g, new_ema), (g, state.ema_params))
    if frozen is not None:
      new_g = _freeze(frozen, new_g, g)
      new_ema = _keep_frozen(frozen["params"], new_ema, state.ema_params)
    new = TrainState(state.step + 1, new_g, new_d, new_ema)
    return (new, metrics) if guard is None else guards.keep_sound(guard, state, new, metrics, mesh)

  images = split if prepare is None else None  # None leaves the arrays where they are
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(rep, images, rep),
    out_shardings=(rep, rep),
    compiler_options=dict(generator.kernels.compiler_options),
  )


def with_kernels_rounded_once(compute_losses: Losses, dtype: jnp.dtype) -> Losses:
  """Rounds the discriminator's kernels to `dtype` before both of its batches, and not in each.

  The numbers are the same, but the gradients of the two batches are then added before the devices
  send them and not after, when they are float32 again: half as much to send (docs/scaling.md). On
  one device nothing is sent, and the sum stays in float32. What spectral norm divides by is
  computed from the kernels as they are.
  """

  def losses_of_rounded(params_g, params_d, stats_g, stats_d, *rest):
    def rounded(layer: str, name: str, leaf: jax.Array) -> jax.Array:
      is_plain = name == "kernel" and f"{layer}_norm" not in stats_d
      return leaf.astype(dtype) if is_plain else leaf

    params_d = {
      layer: {name: rounded(layer, name, leaf) for name, leaf in leaves.items()}
      for layer, leaves in params_d.items()
    }
    return compute_losses(params_g, params_d, stats_g, stats_d, *rest)

  return losses_of_rounded


def _gradients(compute_losses, params_g, params_d, stats_g, stats_d, lr, hr, *fixed):
  """Gradients of both losses, from one forward pass: ((G's, D's, logs), statistics)."""

  def both(params_g, params_d):
    return compute_losses(params_g, params_d, stats_g, stats_d, lr, hr, *fixed)

  _, pullback, (stats_g, stats_d, logs) = jax.vjp(both, params_g, params_d, has_aux=True)
  one, zero = jnp.ones(()), jnp.zeros(())
  grads_g, _ = pullback((one, zero))
  _, grads_d = pullback((zero, one))
  return (grads_g, grads_d, logs), (stats_g, stats_d)


def _accumulate(
  compute_losses, steps, params_g, params_d, stats_g, stats_d, lr, hr, *fixed, slow_loops
):
  """The means of `_gradients` over `steps` micro-batches, one after the other."""
  if steps == 1:
    return _gradients(compute_losses, params_g, params_d, stats_g, stats_d, lr, hr, *fixed)

  def micro_step(carry, images):
    stats, total = carry
    (*grads, logs), stats = _gradients(compute_losses, params_g, params_d, *stats, *images, *fixed)
    return (stats, jax.tree.map(jnp.add, total, tuple(grads))), logs

  # Every micro-batch takes its share from every device, so that nothing moves between devices.
  def split(x):
    return x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1)

  zeros = jax.tree.map(jnp.zeros_like, (params_g, params_d))
  (stats, total), logs = jax.lax.scan(
    micro_step,
    ((stats_g, stats_d), zeros),
    (split(lr), split(hr)),
    unroll=steps if slow_loops else 1,
  )
  grads_g, grads_d = jax.tree.map(lambda x: x / steps, total)
  return (grads_g, grads_d, jax.tree.map(jnp.mean, logs)), stats


def _in_turn(adversarial: Adversarial, step: jax.Array, new: Any, old: Any) -> Any:
  """The generator's new state in the steps where it is updated too, else its old one."""
  warmup, every = adversarial.warmup_steps, adversarial.steps_per_generator_step
  if not warmup and every == 1:
    return new
  turn = (step >= warmup) & ((step + 1) % every == 0)
  return jax.tree.map(lambda new, old: jnp.where(turn, new, old), new, old)


def _freeze(frozen: Mapping[str, Any], new: NetState, old: NetState) -> NetState:
  """The new state, where what is frozen is as it was, Adam's moments too."""
  moments, before = new.opt_state, old.opt_state
  return NetState(
    params=_keep_frozen(frozen["params"], new.params, old.params),
    opt_state=moments._replace(
      mu=_keep_frozen(frozen["params"], moments.mu, before.mu),
      nu=_keep_frozen(frozen["params"], moments.nu, before.nu),
    ),
    batch_stats=_keep_frozen(frozen["batch_stats"], new.batch_stats, old.batch_stats),
  )


def _keep_frozen(masks: Any, new: Any, old: Any) -> Any:
  return jax.tree.map(lambda frozen, new, old: jnp.where(frozen, old, new), masks, new, old)


def _update(optimizer, net, grads, rate, batch_stats) -> NetState:
  updates, opt_state = optimizer.update(grads, net.opt_state, net.params)
  params = jax.tree.map(lambda p, u: p - rate * u, net.params, updates)
  return NetState(params=params, opt_state=opt_state, batch_stats=batch_stats)


def _to_float(image: jax.Array) -> jax.Array:
  whole = jnp.issubdtype(image.dtype, jnp.integer)
  return image.astype(jnp.float32) / _white(image) if whole else image


def _white(image: jax.Array) -> float:
  """The largest value that the files of a batch's images can have."""
  return 65535.0 if image.dtype == jnp.uint16 else 255.0


def _luma(rgb: jax.Array, white: float) -> jax.Array:
  """BT.601's luma in full range, rounded to 1/white: what a grey file of the image would hold.

  It is what a trained grey network sees of colour images (`upscaling/upscaler.py`). The channels of
  a grey file are equal, and so is their luma.
  """
  if rgb.shape[-1] == 1:
    return rgb
  red, green, blue = rgb[..., :1], rgb[..., 1:2], rgb[..., 2:]
  return jnp.floor((0.299 * red + 0.587 * green + 0.114 * blue) * white + 0.5) / white
