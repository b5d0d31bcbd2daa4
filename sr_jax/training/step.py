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
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sr_jax.kernels import choose
from sr_jax.machine import sharding
from sr_jax.networks import vgg
from sr_jax.runs.state import NetState, TrainState
from sr_jax.training import losses
from sr_jax.training import schedules
from sr_jax.training.terms import Adversarial, Perceptual, make_losses

Metrics = dict[str, jax.Array]
TrainStep = Callable[
  [TrainState, Mapping[str, jax.Array], vgg.Params | None], tuple[TrainState, Metrics]
]


def make_optimizer(
  *, b1: float, b2: float, eps: float = 1e-8, clip_norm: float = 0.0
) -> optax.GradientTransformation:
  """Adam without its learning rate, which the step applies by the run's own count.

  Args:
    b1: 0.9 in both papers.
    b2: 0.999 in ESRGAN's paper, 0.99 in its released code.
    eps: outside the square root, as in PyTorch.
    clip_norm: largest global norm of the gradient; 0 for none.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  return optax.chain(optax.clip_by_global_norm(clip_norm), adam) if clip_norm else adam


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
  mesh: jax.sharding.Mesh,
  cut: Callable[[Any, jax.Array], Mapping[str, jax.Array]] | None = None,
) -> TrainStep:
  """Makes the jitted, donated, mesh-sharded update.

  More than half of these lines say what its many arguments are; the step itself is one sequence.

  Args:
    generator: LR image in, SR image out.
    discriminator: logits, or None where `adversarial` has no weight.
    weights: {'pixel', 'perceptual', 'adversarial', 'tv': weight} of the generator's loss. A term of
      weight 0 or without an entry does not exist: it is not computed and not logged.
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
    mesh: of `sharding.create_mesh`; parameters are replicated, the batch is split.
    cut: of `device_input.make_cutter`. With it the step takes the arrays of all images in the place
      of a batch, and cuts the batch of `state.step` out of them itself.

  Returns:
    (state, batch, vgg_params) -> (state, metrics). The state is donated. The batch has 'lr'
    [N, h, w, c] and 'hr' [N, h*s, w*s, c], uint8 or float in [0, 1]. VGG's parameters are an
    argument because an array closed over would be baked into the program; None without a
    perceptual term. Metrics are float32 scalars: `loss_g`, `loss_d`, each term raw
    (`loss/pixel`) and weighted (`weighted/pixel`), `d_real` and `d_fake` (mean probabilities),
    `logit_real` and `logit_fake` (mean logits), gradient norms and the learning rate.

  Raises:
    UserError: a term has weight and nothing to compute it with.
  """
  compute_losses = make_losses(
    generator, discriminator, weights, pixel_loss, perceptual, adversarial
  )
  # Where there is a discriminator, its convolutions decide how micro-batches are looped over.
  kernels = (generator if discriminator is None else discriminator).kernels
  gradients_of = functools.partial(_accumulate, compute_losses, slow_loops=kernels.slow_loops)
  rep, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)

  def train_step(state: TrainState, batch, vgg_params) -> tuple[TrainState, Metrics]:
    if cut is not None:
      batch = jax.lax.with_sharding_constraint(cut(batch, state.step), split)
    g, d = state.generator, state.discriminator
    params_d, stats_d = (None, None) if d is None else (d.params, d.batch_stats)
    lr, hr = _to_float(batch["lr"]), _to_float(batch["hr"])
    steps = accumulate_steps
    if d is None and not g.batch_stats:
      # Nothing looks at the batch as a whole, so it may be computed in parts.
      steps = max(steps, choose.batch_parts(lr.shape, generator.kernels.pixels))
    (grads_g, grads_d, metrics), (stats_g, stats_d) = gradients_of(
      steps, g.params, params_d, g.batch_stats, stats_d, lr, hr, vgg_params
    )
    rate = learning_rate(state.step)
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
      new_g, new_ema = _in_turn(adversarial, state.step, (new_g, new_ema), (g, state.ema_params))
    return TrainState(state.step + 1, new_g, new_d, new_ema), metrics

  images = split if cut is None else None  # None leaves the arrays of all images where they are
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(rep, images, rep),
    out_shardings=(rep, rep),
    compiler_options=dict(generator.kernels.compiler_options),
  )


def _gradients(compute_losses, params_g, params_d, stats_g, stats_d, lr, hr, vgg_params):
  """Gradients of both losses, from one forward pass: ((G's, D's, logs), statistics)."""

  def both(params_g, params_d):
    return compute_losses(params_g, params_d, stats_g, stats_d, lr, hr, vgg_params)

  _, pullback, (stats_g, stats_d, logs) = jax.vjp(both, params_g, params_d, has_aux=True)
  one, zero = jnp.ones(()), jnp.zeros(())
  grads_g, _ = pullback((one, zero))
  _, grads_d = pullback((zero, one))
  return (grads_g, grads_d, logs), (stats_g, stats_d)


def _accumulate(
  compute_losses, steps, params_g, params_d, stats_g, stats_d, lr, hr, vgg_params, *, slow_loops
):
  """The means of `_gradients` over `steps` micro-batches, one after the other."""
  if steps == 1:
    return _gradients(compute_losses, params_g, params_d, stats_g, stats_d, lr, hr, vgg_params)

  def micro_step(carry, images):
    stats, total = carry
    (*grads, logs), stats = _gradients(
      compute_losses, params_g, params_d, *stats, *images, vgg_params
    )
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


def _update(optimizer, net, grads, rate, batch_stats) -> NetState:
  updates, opt_state = optimizer.update(grads, net.opt_state, net.params)
  params = jax.tree.map(lambda p, u: p - rate * u, net.params, updates)
  return NetState(params=params, opt_state=opt_state, batch_stats=batch_stats)


def _to_float(image: jax.Array) -> jax.Array:
  return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image
