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
(`tests/train_step_test.py` measures both). With spectral norm, one power iteration a
forward, five forwards see five weights and these two see two.
"""

import functools
from typing import Any, NamedTuple
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sr_jax import generators
from sr_jax import losses
from sr_jax import onednn
from sr_jax import schedules
from sr_jax import sharding
from sr_jax import train_state
from sr_jax import vgg

# LR pixels that one CPU works on at a time.
CACHED_PIXELS = 4096

TrainState = train_state.TrainState
Metrics = dict[str, jax.Array]
TrainStep = Callable[
  [TrainState, Mapping[str, jax.Array], vgg.Params | None], tuple[TrainState, Metrics]
]


class Perceptual(NamedTuple):
  """The perceptual term: `losses.perceptual_loss` without its arrays."""

  layers: Mapping[str, float]
  scales: Mapping[str, float]
  criterion: Callable[[jax.Array, jax.Array], jax.Array]


class Adversarial(NamedTuple):
  """The game.

  Attributes:
    loss: a pair of `losses.ADVERSARIAL`.
    discriminator_weight: factor of D's loss; Adam does not see it, gradient clipping does.
    warmup_steps: D alone is updated in the first so many steps (BasicSR: net_d_init_iters).
    steps_per_generator_step: G is updated in every n-th step (BasicSR: net_d_iters).
    replicas: parts of the batch that each have their own RaGAN means, as data-parallel PyTorch
      computes them, to compare with its results; 1 is the paper's mean over the global batch.
  """

  loss: losses.AdversarialLoss
  discriminator_weight: float = 1.0
  warmup_steps: int = 0
  steps_per_generator_step: int = 1
  replicas: int = 1


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
  dtype: jnp.dtype = jnp.float32,
  mesh: jax.sharding.Mesh,
  cut: Callable[[Any, jax.Array], Mapping[str, jax.Array]] | None = None,
) -> TrainStep:
  """Makes the jitted, donated, mesh-sharded update.

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
      means of RaGAN and of BatchNorm are then over a micro-batch (of all devices). Without either,
      one CPU may use more.
    dtype: of VGG's convolutions; the networks have their own. Losses are float32.
    mesh: of `sharding.create_mesh`; parameters are replicated, the batch is split.
    cut: of `device_input.make_cutter`: the step then takes that function's arrays, the images, in
      the place of a batch, and cuts the batch of `state.step` itself.

  Returns:
    (state, batch, vgg_params) -> (state, metrics). The state is donated. The batch has 'lr'
    [N, h, w, c] and 'hr' [N, h*s, w*s, c], uint8 or float in [0, 1]. VGG's parameters are an
    argument because an array closed over would be baked into the program; None without a
    perceptual term. Metrics are float32 scalars: `loss_g`, `loss_d`, each term raw
    (`loss/pixel`) and weighted (`weighted/pixel`), `d_real` and `d_fake` (mean probabilities),
    `logit_real` and `logit_fake` (mean logits), gradient norms and the learning rate.

  Raises:
    ValueError: a term has weight and nothing to compute it with.
  """
  weights = {name: weight for name, weight in weights.items() if weight}
  unknown = set(weights) - {"pixel", "perceptual", "adversarial", "tv"}
  if unknown:
    raise ValueError(f"unknown loss terms {sorted(unknown)}")
  if not weights:
    raise ValueError("every loss term has weight 0: nothing to train; give one a weight")
  for term, needed in {"perceptual": perceptual, "adversarial": adversarial}.items():
    if term in weights and needed is None:
      raise ValueError(f"the {term} term has weight {weights[term]} but nothing defines it")
  if ("adversarial" in weights) != (discriminator is not None):
    raise ValueError("a discriminator and an adversarial weight come together or not at all")

  def compute_losses(params_g, params_d, stats_g, stats_d, lr, hr, vgg_params):
    sr, stats_g = _apply(generator, params_g, stats_g, lr)
    terms, logs, loss_d = {}, {}, jnp.zeros(())
    if "pixel" in weights:
      terms["pixel"] = pixel_loss(sr, hr)
    if "perceptual" in weights:
      terms["perceptual"] = losses.perceptual_loss(
        vgg_params, sr, hr, dtype=dtype, **perceptual._asdict()
      )
    if "tv" in weights:
      terms["tv"] = losses.tv_loss(sr)
    if "adversarial" in weights:
      real, stats_d = _apply(discriminator, params_d, stats_d, hr)
      fake, stats_d = _apply(discriminator, params_d, stats_d, sr)
      loss = adversarial.loss
      terms["adversarial"] = _by_replica(loss.generator, adversarial.replicas)(real, fake)
      loss_d = _by_replica(loss.discriminator, adversarial.replicas)(real, fake)
      loss_d = adversarial.discriminator_weight * loss_d
      logs = {
        "loss_d": loss_d,
        "d_real": jnp.mean(jax.nn.sigmoid(real)),
        "d_fake": jnp.mean(jax.nn.sigmoid(fake)),
        "logit_real": jnp.mean(real),
        "logit_fake": jnp.mean(fake),
      }
    weighted = {name: weights[name] * value for name, value in terms.items()}
    loss_g = sum(weighted.values())
    logs["loss_g"] = loss_g
    logs |= {f"loss/{name}": value for name, value in terms.items()}
    logs |= {f"weighted/{name}": value for name, value in weighted.items()}
    return (loss_g, loss_d), (stats_g, stats_d, logs)

  def compute_gradients(params_g, params_d, stats_g, stats_d, lr, hr, vgg_params):
    def both(params_g, params_d):
      return compute_losses(params_g, params_d, stats_g, stats_d, lr, hr, vgg_params)

    _, pullback, (stats_g, stats_d, logs) = jax.vjp(both, params_g, params_d, has_aux=True)
    one, zero = jnp.ones(()), jnp.zeros(())
    grads_g, _ = pullback((one, zero))
    _, grads_d = pullback((zero, one))
    return (grads_g, grads_d, logs), (stats_g, stats_d)

  def accumulate(steps, params_g, params_d, stats_g, stats_d, lr, hr, vgg_params):
    def micro_step(carry, images):
      stats, total = carry
      (*grads, logs), stats = compute_gradients(params_g, params_d, *stats, *images, vgg_params)
      return (stats, jax.tree.map(jnp.add, total, tuple(grads))), logs

    # Every micro-batch takes its share from every device, so that nothing moves between devices.
    def split(x):
      return x.reshape(-1, steps, *x.shape[1:]).swapaxes(0, 1)

    # The discriminator's convolutions are XLA's or oneDNN's.
    alone = discriminator is None
    loops = generators.loops_on_a_cpu(generator) if alone else onednn.usable(dtype)
    slow = jax.default_backend() == "cpu" and not loops
    zeros = jax.tree.map(jnp.zeros_like, (params_g, params_d))
    (stats, total), logs = jax.lax.scan(
      micro_step,
      ((stats_g, stats_d), zeros),
      (split(lr), split(hr)),
      unroll=steps if slow else 1,
    )
    grads_g, grads_d = jax.tree.map(lambda x: x / steps, total)
    return (grads_g, grads_d, jax.tree.map(jnp.mean, logs)), stats

  rep, split = sharding.replicated(mesh), sharding.batch_sharded(mesh)

  def train_step(state: TrainState, batch, vgg_params) -> tuple[TrainState, Metrics]:
    if cut is not None:
      batch = jax.lax.with_sharding_constraint(cut(batch, state.step), split)
    g, d = state.generator, state.discriminator
    params_d, stats_d = (None, None) if d is None else (d.params, d.batch_stats)
    lr, hr = _to_float(batch["lr"]), _to_float(batch["hr"])
    steps = accumulate_steps
    if d is None and not g.batch_stats:
      # Nothing looks at the batch as a whole.
      steps = max(steps, _parts_for_the_caches(lr.shape, generator))
    gradients = compute_gradients if steps == 1 else functools.partial(accumulate, steps)
    (grads_g, grads_d, metrics), (stats_g, stats_d) = gradients(
      g.params, params_d, g.batch_stats, stats_d, lr, hr, vgg_params
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
      if adversarial.warmup_steps or adversarial.steps_per_generator_step > 1:
        turn = (state.step >= adversarial.warmup_steps) & (
          (state.step + 1) % adversarial.steps_per_generator_step == 0
        )
        new_g, new_ema = jax.tree.map(
          lambda new, old: jnp.where(turn, new, old), (new_g, new_ema), (g, state.ema_params)
        )
    return TrainState(state.step + 1, new_g, new_d, new_ema), metrics

  images = split if cut is None else None  # None: as they lie
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(rep, images, rep),
    out_shardings=(rep, rep),
    compiler_options=sharding.compiler_options(),
  )


def _parts_for_the_caches(shape: tuple[int, ...], generator: nn.Module) -> int:
  """Into how many parts one CPU should divide a batch of LR images [N, h, w, c].

  The update is that of the whole batch but for rounding, in a tenth less time and with a third less
  memory (docs/cpu.md); parts of a size that is far from CACHED_PIXELS take longer.
  """
  n, h, w, _ = shape
  near = [k for k in range(1, n) if n % k == 0 and 2 / 3 < k * h * w / CACHED_PIXELS < 3 / 2]
  one = jax.default_backend() == "cpu" and jax.device_count() == 1
  if not (near and one and generators.loops_on_a_cpu(generator)):
    return 1
  return n // min(near, key=lambda k: abs(k * h * w - CACHED_PIXELS))


def _by_replica(loss: Callable[..., jax.Array], replicas: int) -> Callable[..., jax.Array]:
  """The mean of a loss (real, fake) -> [] over equal parts of the batch, each on its own."""
  if replicas == 1:
    return loss

  def mean(real: jax.Array, fake: jax.Array) -> jax.Array:
    parts = (x.reshape(replicas, -1, *x.shape[1:]) for x in (real, fake))
    return jnp.mean(jax.vmap(loss)(*parts))

  return mean


def _apply(
  module: nn.Module, params: Any, batch_stats: Any, image: jax.Array
) -> tuple[jax.Array, Any]:
  variables = {"params": params, "batch_stats": batch_stats}
  output, updated = module.apply(variables, image, train=True, mutable=["batch_stats"])
  return output, updated.get("batch_stats", batch_stats)


def _update(optimizer, net, grads, rate, batch_stats) -> train_state.NetState:
  updates, opt_state = optimizer.update(grads, net.opt_state, net.params)
  params = jax.tree.map(lambda p, u: p - rate * u, net.params, updates)
  return train_state.NetState(params=params, opt_state=opt_state, batch_stats=batch_stats)


def _to_float(image: jax.Array) -> jax.Array:
  return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image
