"""The loop, read from top to bottom: from a configuration to a trained run.

A run of two stages (SRGAN, ESRGAN) holds its first stage as a complete run in RUN/psnr. The same
call resumes in whichever stage it was and does nothing where both are finished.
"""

import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import time
from typing import Any
from collections.abc import Iterator, Mapping

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from ml_collections import config_dict
import numpy as np

from sr_jax import checkpoint
from sr_jax import discriminators
from sr_jax import distributed
from sr_jax import evaluate
from sr_jax import logs
from sr_jax import losses
from sr_jax import model_file
from sr_jax import onednn
from sr_jax import schedules
from sr_jax import sharding
from sr_jax import storage
from sr_jax import train_state
from sr_jax import train_step
from sr_jax import vgg
from sr_jax.data import device_input
from sr_jax.data import packed
from sr_jax.data import sources

Config = config_dict.ConfigDict
_SLOWER_SECONDS = 3600  # that one process may be slower than another in decoding or scoring images


def train_and_evaluate(
  config: Config, workdir: str | pathlib.Path, stop: distributed.Stop | None = None
) -> str:
  """Trains a recipe, or resumes it.

  Args:
    config: of configs/; not changed.
    workdir: folder of the run, or gs://BUCKET/RUN; the same for all processes.
    stop: notices signals; the run then saves its step and returns.

  Returns:
    '' where the run is finished, or what stopped it before.

  Raises:
    ValueError: settings do not fit, or data or weights are not there; says how to mend each.
    FloatingPointError: a loss is not finite.
  """
  run, stop = storage.run_folder(workdir), stop or distributed.Stop()
  distributed.check_same("the same command and code", preflight_facts(config))
  storage.check_access(run)
  main = Stage(config, run)
  if main.finished:
    _say(f"{run} is finished: {config.total_steps} steps. Nothing to do.")
    return ""
  stages = [main]
  if "psnr" in config and not config.init_from and main.restored is None:
    first = Stage(config.psnr, run / "psnr")
    model_file.check_same_shapes(
      {
        "config.generator": main.abstract.ema_variables,
        "config.psnr.generator": first.abstract.ema_variables,
      }
    )
    stages = [first, main]
  stages = [stage for stage in stages if not stage.finished]
  # Whatever is missing in either stage is missed now, before minutes of decoding and training.
  problems = dict.fromkeys(problem for stage in stages for problem in stage.open())
  if problems:
    raise ValueError("\n".join(problems))
  for stage in stages:
    stage.pack()
  distributed.check_same("the same images and checkpoints", {
    f"{stage.run.name}/{what}": value
    for stage in stages
    for what, value in {
      "step": int(stage.restored[0].step) if stage.restored else 0,
      "images": [len(stage.train_pack.names), stage.train_pack.digest],
      "test images": [image.name for image in stage.test_images],
    }.items()
  }, seconds=_SLOWER_SECONDS)  # fmt: skip
  for stage in stages:
    if stage is main and main.restored is None and not config.init_from and "psnr" in config:
      main.model = main.load_model(str(run / "psnr"))
    stopped = train_stage(stage, stop)
    if not stopped and stage is not main:  # a signal too late for the stage's last step
      everyone = distributed.meet(f"end of {stage.run.name}", stop.pending)
      stopped = next(filter(None, everyone), "")
    if stopped:
      _say(f"{stage.run}: stopped by {stopped}; the same command goes on from here")
      return stopped
  return ""


def preflight_facts(config: Config) -> dict[str, Any]:
  """What must be equal on all hosts before they compile: settings, code, packages.

  Paths may differ: where the data lie is each host's matter, what is in them is compared later.
  """
  paths = ("source", "lr_source", "cache_dir", "weights", "init_from")
  fields = _flat(json.loads(json.dumps(config.to_dict())))
  facts = {f"config.{k}": v for k, v in fields.items() if k.rsplit(".", 1)[-1] not in paths}
  folder = pathlib.Path(__file__).parent
  sha = hashlib.sha256()
  for file in sorted(folder.rglob("*.py")):
    sha.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
  return {
    **facts,
    "sha256 of sr_jax": sha.hexdigest()[:16],
    **{f"version of {name}": importlib.metadata.version(name) for name in packages},
  }


class Stage:
  """One stage before it trains: its networks, its inputs, its checkpoint where there is one.

  Attributes:
    abstract: shapes of its state.
    restored: the state and the record that it goes on from, or None.
  """

  def __init__(self, config: Config, run: storage.Folder):
    self.config, self.run = config, run
    self.mesh = sharding.create_mesh()
    sharding.check_batch_size(config.data.batch_size, config.optimizer.accumulate_steps, self.mesh)
    if config.data.hr_patch % config.scale:
      raise ValueError(
        f"hr_patch={config.data.hr_patch} must be a multiple of scale={config.scale}; try "
        f"--config.data.hr_patch={-(-config.data.hr_patch // config.scale) * config.scale}"
      )
    best = config.checkpoint.best_metric
    if best and best not in evaluate.SCORES:
      raise ValueError(
        f"checkpoint.best_metric={best!r} must be one of {', '.join(evaluate.SCORES)}, or ''"
      )
    self.generator = model_file.build_generator(
      config.generator.name, {"scale": config.scale, **config.generator.kwargs}, dtype=config.dtype
    )
    self.discriminator = build_discriminator(config) if config.adversarial.weight else None
    self.abstract = jax.eval_shape(self.create_state)
    replicated = sharding.replicated(self.mesh)
    target = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), self.abstract
    )
    self.restored = checkpoint.restore(run, target)

  @property
  def finished(self) -> bool:
    if self.restored is None or int(self.restored[0].step) < self.config.total_steps:
      return False
    # A signal may have come when all but the last scores was there.
    wanted = bool(self.config.eval.source)
    return not wanted or logs.has_scores(self.run, self.config.total_steps)

  def create_state(
    self, generator_variables: Any = None, discriminator_variables: Any = None
  ) -> train_state.TrainState:
    """Initialises the state; pure, for jit and eval_shape."""
    config = self.config
    patch, scale = config.data.hr_patch, config.scale
    channels = config.generator.kwargs.get("out_channels", 3)
    return train_state.create_train_state(
      config.seed,
      self.generator,
      self.discriminator,
      self.optimizer(),
      self.optimizer() if self.discriminator else None,
      (1, patch // scale, patch // scale, 3),
      (1, patch, patch, channels),
      generator_variables,
      discriminator_variables,
    )

  def optimizer(self):
    """Makes Adam as the recipe has it: the same for both networks, in both papers."""
    settings = self.config.optimizer
    return train_step.make_optimizer(b1=settings.b1, b2=settings.b2, clip_norm=settings.clip_norm)

  def load_model(self, path: str) -> model_file.Model:
    """Reads the model to start from, and checks that it is this network."""
    model = model_file.read_model(path)
    model_file.check_same_shapes(
      {"config.generator": self.abstract.ema_variables, path: model.variables}
    )
    return model

  def load_discriminator(self, path: str) -> model_file.Model:
    """Reads the discriminator to start from, and checks that it is this network."""
    model, ours = model_file.read_discriminator(path), self.abstract.discriminator
    model_file.check_same_shapes(
      {
        "config.discriminator": {"params": ours.params, "batch_stats": ours.batch_stats},
        path: model.variables,
      }
    )
    return model

  def open(self) -> list[str]:
    """Finds data and weights, and turns the recipe's words into functions.

    Returns:
      What is missing or wrong, each with what supplies it; [] where the stage can train.
    """
    problems = []
    for find in (self._find_images, self._find_weights):
      try:
        find()
      except (ValueError, OSError, ImportError) as error:
        problems.append(str(error))
    return problems

  def _find_images(self) -> None:
    data, evaluation, scale = self.config.data, self.config.eval, self.config.scale
    self.source = sources.open_source(data.source, data.lr_source, scale=scale, keep_grey=True)
    self.test_source = None
    if evaluation.source:
      self.test_source = sources.open_source(evaluation.source, scale=scale, keep_grey=True)

  def _find_weights(self) -> None:
    config = self.config
    self.vgg = vgg.load_vgg(config.perceptual.weights) if config.perceptual.weight else None
    self.step = make_step(self, self.vgg)  # not compiled yet
    self.model, self.model_d = None, None
    if self.restored is None:
      if config.init_from:
        self.model = self.load_model(config.init_from)
      if config.discriminator.init_from and self.discriminator:
        self.model_d = self.load_discriminator(config.discriminator.init_from)

  def pack(self) -> None:
    """Decodes what is not in the cache yet."""
    config, scale = self.config, self.config.scale
    cache = config.data.cache_dir
    self.train_pack = packed.build_pack(self.source, scale, cache, min_hr=config.data.hr_patch)
    self.test_images = []
    if self.test_source:
      smallest = evaluate.smallest_side(scale)
      pack = packed.build_pack(self.test_source, scale, cache, min_hr=smallest)
      count = min(config.eval.max_images or len(pack.names), len(pack.names))
      self.test_images = [evaluate.packed_image(pack, i) for i in range(count)]


def train_stage(stage: Stage, stop: distributed.Stop) -> str:
  """Trains one stage from its checkpoint where there is one.

  Returns:
    '' at its last step, or what stopped it before.
  """
  config, run, mesh = stage.config, stage.run, stage.mesh
  run.mkdir(parents=True, exist_ok=True)
  write_config(config, run)
  replicated = sharding.replicated(mesh)
  if stage.restored:
    state, extra = stage.restored
    _say(f"{run}: resuming at step {int(state.step)}")
    if extra["data"] != stage.train_pack.digest:
      logging.warning("the training images are not those that %s was trained on so far", run)
  else:
    state, extra = start_state(stage)
  extra = {**extra, "data": stage.train_pack.digest}
  start = int(state.step)
  logs.cut_back(run, start)
  manager = checkpoint.open_manager(
    run, keep=config.checkpoint.keep, best_metric=config.checkpoint.best_metric
  )
  writer = logs.Writer(run, tensorboard=config.log.tensorboard)

  vgg_params = jax.device_put(stage.vgg.params, replicated) if stage.vgg else None
  batches, cut = open_batches(config, stage.train_pack, start, mesh)
  step_of = stage.step if cut is None else make_step(stage, stage.vgg, cut)
  progress = Progress(start, config.total_steps, config.data.batch_size)
  begin = last_save = time.monotonic()
  pending = None  # metrics of the step before: read when the next is on its way
  stopped = ""
  gigabytes = (stage.train_pack.hr.size + stage.train_pack.lr.size) / 1e9
  _say(
    f"{run}: {config.total_steps - start} steps on {mesh.size} {jax.devices()[0].device_kind}, "
    f"{len(stage.train_pack.names)} images, {gigabytes:.2f} GB decoded; compiling ..."
  )
  try:
    if owes_scores(stage):  # it was stopped while it was scored
      if evaluate_state(stage, state, writer, start, stop) is None:
        stopped = stop.pending or "a signal to another process"
    for step in range(start + 1, config.total_steps + 1):
      if stopped:
        break
      batch = progress.wait_for(batches)
      state, metrics = step_of(state, batch, vgg_params)
      if step == start + 1:
        jax.block_until_ready(metrics)
        _say(f"  compiled in {time.monotonic() - begin:.0f} s")
        progress.resume(step)
      if pending:
        write_metrics(writer, progress, *pending)
      last = step == config.total_steps
      logging_now = _due(step, config.log.every_steps) or last
      pending = (step, metrics) if logging_now else None

      stopped = stop()
      evaluating = _scores_due(stage, step) and not stopped
      saving = (
        _due(step, config.checkpoint.every_steps)
        or last
        or bool(stopped)
        or minutes_due(config.checkpoint.every_minutes, last_save, ask=logging_now)
      )
      if not (evaluating or saving):
        continue
      if pending:  # what a checkpoint follows is on disk before it
        write_metrics(writer, progress, *pending)
        pending = None
      check_finite(step, jax.device_get(metrics))
      scores = evaluate_state(stage, state, writer, step, stop) if evaluating else None
      if evaluating and scores is None:
        stopped = stop.pending or "a signal to another process"
      if saving or stopped:
        writer.sync()
        checkpoint.save(manager, state, extra=extra, metrics=scores)
        last_save = time.monotonic()
      progress.resume(step)
  finally:
    manager.close()  # waits for what is being written
    writer.close()
    stop.saved()
  return stopped


def minutes_due(every_minutes: float, since: float, *, ask: bool) -> bool:
  """Whether a checkpoint by the clock is due.

  All processes must save the same step, so process 0's clock counts; and since its answer is a
  message, many processes ask only now and then.

  Args:
    every_minutes: between checkpoints; 0 for none by the clock.
    since: of the last one, of `time.monotonic`.
    ask: whether this is a step to ask process 0 at.
  """
  due = bool(every_minutes) and time.monotonic() - since >= 60 * every_minutes
  if jax.process_count() == 1 or not every_minutes:
    return due
  return ask and bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))


def owes_scores(stage: Stage) -> bool:
  """Whether the step that a stage goes on from was to be scored and was not."""
  step = int(stage.restored[0].step) if stage.restored else 0
  return step > 0 and _scores_due(stage, step) and not logs.has_scores(stage.run, step)


def _scores_due(stage: Stage, step: int) -> bool:
  config = stage.config
  due = _due(step, config.eval.every_steps) or step == config.total_steps
  return bool(stage.test_images) and due


def start_state(stage: Stage) -> tuple[train_state.TrainState, dict[str, Any]]:
  """Creates the state at step 0, fresh or from a model, and the record of where it comes from."""
  # LLVM's costly optimizations take most of the time to compile, and changed no bit on AVX-512.
  quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
  create = jax.jit(
    stage.create_state,
    out_shardings=sharding.replicated(stage.mesh),
    compiler_options=quick,
  )
  variables_d = None
  if stage.model_d:
    _say(f"{stage.run}: starting from the discriminator {stage.model_d.info['digest']}")
    variables_d = stage.model_d.variables
  if stage.model is None:
    return create(None, variables_d), {"info": {"ancestry": []}}
  info = stage.model.info
  _say(f"{stage.run}: starting from the model {info['digest']}")
  ancestry = [info["digest"], *info["ancestry"]]
  return create(stage.model.variables, variables_d), {"info": {"ancestry": ancestry}}


def make_step(
  stage: Stage, weights: vgg.VGG | None, cut: device_input.Cut | None = None
) -> train_step.TrainStep:
  """Turns the recipe's words into the functions of one jitted step.

  Args:
    stage: the recipe and its networks.
    weights: of the perceptual term, or None.
    cut: what makes a batch inside the step, or None where it comes from the host.
  """
  config = stage.config
  rate = config.learning_rate
  if rate.schedule == "cosine_restarts" and sum(rate.periods) < config.total_steps:
    raise ValueError(
      f"learning_rate.periods={tuple(rate.periods)} end before total_steps={config.total_steps}: "
      f"the rest would train at eta_min={rate.eta_min}; try "
      f'--config.learning_rate.periods="({config.total_steps},)"'
    )
  adversarial = None
  if config.adversarial.weight:
    scopes = {"global": 1, "replica": stage.mesh.size}
    adversarial = train_step.Adversarial(
      loss=_look_up("adversarial.loss", losses.ADVERSARIAL, config.adversarial.loss),
      discriminator_weight=config.adversarial.discriminator_weight,
      warmup_steps=config.discriminator.warmup_steps,
      steps_per_generator_step=config.discriminator.steps_per_generator_step,
      replicas=_look_up("adversarial.scope", scopes, config.adversarial.scope),
    )
  return train_step.make_train_step(
    stage.generator,
    stage.discriminator,
    weights={name: config[name].weight for name in ("pixel", "perceptual", "adversarial", "tv")},
    pixel_loss=_look_up("pixel.loss", losses.PIXEL, config.pixel.loss),
    perceptual=make_perceptual(config, weights) if weights else None,
    adversarial=adversarial,
    optimizer_g=stage.optimizer(),
    optimizer_d=stage.optimizer() if stage.discriminator else None,
    learning_rate=schedules.make_schedule(**config.learning_rate),
    ema_decay=config.ema.decay,
    ema_warmup=config.ema.warmup,
    accumulate_steps=config.optimizer.accumulate_steps,
    dtype=jnp.dtype(config.dtype),
    mesh=stage.mesh,
    cut=cut,
  )


def make_perceptual(config: Config, weights: vgg.VGG) -> train_step.Perceptual:
  """Turns 'layer:weight' pairs into the perceptual term, checked against the loaded weights."""
  settings = config.perceptual
  layers = {}
  for entry in settings.layers:
    layer, _, weight = entry.partition(":")
    layers[layer] = float(weight or 1)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  with onednn.left_to_xla():  # raises where these weights do not have a layer
    jax.eval_shape(
      lambda params, image: vgg.vgg_features(params, image, tuple(layers)), weights.params, image
    )
  scales = {
    layer: settings.feature_scale
    * vgg.magnitude_factor(layer, weights.convention, settings.magnitude)
    for layer in layers
  }
  return train_step.Perceptual(
    layers, scales, _look_up("perceptual.criterion", losses.PIXEL, settings.criterion)
  )


def build_discriminator(config: Config):
  """Builds the discriminator of a recipe."""
  module = _look_up("discriminator.name", discriminators.DISCRIMINATORS, config.discriminator.name)
  return module(**config.discriminator.kwargs, dtype=model_file.check_dtype(config.dtype))


def open_batches(
  config: Config, pack: packed.Pack, start_step: int, mesh: jax.sharding.Mesh
) -> tuple[Iterator[Any], device_input.Cut | None]:
  """Opens the input.

  Returns:
    What the step takes, step by step, and None: global batches {'lr', 'hr'} from `start_step` on,
    sharded over the mesh. Or, where the images live on the devices, those again and again, and the
    function with which the step cuts its batch out of them.
  """
  arguments = dict(
    batch_size=config.data.batch_size,
    lr_patch=config.data.hr_patch // config.scale,
    seed=config.seed,
  )
  kind = config.data.input
  if kind in ("tf", "auto"):
    from sr_jax.data import tf_input

    try:
      tf_input.import_tensorflow()
    except ImportError:
      if kind == "tf":
        raise
      kind = "device"
    else:
      count = jax.process_count()
      ram = tf_input.ram_bytes(
        pack,
        batch_size=config.data.batch_size,
        lr_patch=arguments["lr_patch"],
        process_count=count,
      )
      _say(f"  input: tf.data, at most {ram / 1e6:,.1f} MB of each host's memory")
      host_batches = tf_input.make_tf_input(
        pack,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=count,
        **arguments,
      )
      return (sharding.global_batch(mesh, batch) for batch in host_batches), None
  if kind == "device":
    arrays, cut = device_input.make_cutter(pack, sharding=sharding.batch_sharded(mesh), **arguments)
    held = sum(array.addressable_shards[0].data.nbytes for array in arrays.values())
    _say(f"  input: the images, {held / 1e6:,.1f} MB of each device's memory")
    return itertools.repeat(arrays), cut
  raise ValueError(f"data.input={kind!r} must be one of auto, tf, device")


def evaluate_state(
  stage: Stage,
  state: train_state.TrainState,
  writer: logs.Writer,
  step: int,
  stop: distributed.Stop,
) -> dict[str, float] | None:
  """Scores the averaged weights, each process its share of the images, and writes the scores.

  Returns:
    The means, equal on all processes; None where a signal came, and nothing is written.
  """
  upscale = evaluate.make_upscaler(stage.generator, jax.device_get(state.ema_variables))
  grids = {}

  def keep(image, srs, scores):
    del scores
    if len(grids) < 4:
      scale = stage.config.scale
      lr = image.lr.repeat(scale, axis=0).repeat(scale, axis=1)
      grid = np.concatenate([lr, srs["ema"], image.hr], axis=1)
      grids[f"eval/{image.name}"] = (grid if grid.ndim == 3 else grid[:, :, None])[None]

  names = [image.name for image in stage.test_images]
  share = stage.test_images[jax.process_index() :: jax.process_count()]
  rest = itertools.takewhile(lambda _: not stop.pending, share[1:])
  per_image = {}
  if share:
    images = itertools.chain(share[:1], rest)
    scored = evaluate.evaluate_set({"ema": upscale}, images, stage.config.scale, keep=keep)
    per_image = scored["ema"]["images"]
  everyone = distributed.meet(
    f"scores of step {step}", [bool(stop.pending), per_image], seconds=_SLOWER_SECONDS
  )
  if any(gave_way for gave_way, _ in everyone):
    return None
  gathered = {name: scores for _, theirs in everyone for name, scores in theirs.items()}
  scored = evaluate.with_means({name: gathered[name] for name in names})
  means = {key: value for key, value in scored.items() if key != "images"}
  writer.scalars(step, {f"eval/{key}": value for key, value in means.items()}, {})
  writer.images(step, grids)
  _say(f"  step {step}: " + "  ".join(f"{key} {value:.4f}" for key, value in means.items()))
  return means


class Progress:
  """Counts steps, seconds, and seconds spent waiting for data; evaluation and saving apart."""

  def __init__(self, start: int, total: int, batch_size: int):
    self._total, self._batch_size = total, batch_size
    self._step, self._since, self._waited = start, time.monotonic(), 0.0

  def wait_for(self, batches: Iterator[Any]) -> Any:
    """Takes the next batch, counting the wait."""
    begin = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - begin
    return batch

  def report(self, step: int) -> dict[str, float]:
    """Returns the rates since the last report and starts anew; {} where no step was counted."""
    if step == self._step:
      return {}
    seconds = time.monotonic() - self._since
    rate = (step - self._step) / seconds
    report = {
      "steps_per_second": rate,
      "images_per_second": rate * self._batch_size,
      "data_wait_share": self._waited / seconds,
      "eta_seconds": (self._total - step) / rate,
    }
    self.resume(step)
    return report

  def resume(self, step: int) -> None:
    """Starts counting anew at a step, leaving out what was not training before."""
    self._step, self._since, self._waited = step, time.monotonic(), 0.0


def write_metrics(
  writer: logs.Writer, progress: Progress, step: int, metrics: Mapping[str, jax.Array]
) -> None:
  """Reads a step's metrics, writes and prints them, and stops where they are not finite."""
  scalars = {name: float(value) for name, value in sorted(jax.device_get(metrics).items())}
  timing = progress.report(step)
  writer.scalars(step, scalars, timing)
  speed = ""
  if timing:
    minutes, seconds = divmod(int(timing["eta_seconds"]), 60)
    speed = (
      f"  {timing['steps_per_second']:.2f} steps/s  ETA {minutes}:{seconds:02d}  "
      f"data wait {timing['data_wait_share']:.0%}"
    )
  shown = {k: v for k, v in scalars.items() if k.startswith(("loss", "d_"))}
  values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
  _say(f"  step {step}{speed}  {values}  lr {scalars['learning_rate']:.3g}")
  check_finite(step, scalars)


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
  """Stops a run whose numbers are lost, before it saves them over good ones.

  Raises:
    FloatingPointError: names what is not finite.
  """
  lost = [name for name, value in sorted(metrics.items()) if not np.isfinite(value)]
  if lost:
    raise FloatingPointError(
      f"{', '.join(lost)} not finite at step {step}; nothing was saved since. The same command "
      "goes on from the last checkpoint; a lower --config.learning_rate.base, "
      "--config.optimizer.clip_norm=1 or --config.dtype=float32 may help"
    )


def write_config(config: Config, run: storage.Folder) -> None:
  """Writes RUN/config.json and says what changed where there was one."""
  if jax.process_index() != 0:
    return
  path = run / "config.json"
  new = json.loads(json.dumps(config.to_dict()))
  if path.exists():
    try:
      old = checkpoint.read_json(path)
    except ValueError as error:
      logging.warning("%s; it is written anew", error)
      old = new
    before, after = _flat(old), _flat(new)
    for key in sorted(before.keys() | after.keys()):
      if before.get(key) != after.get(key):
        logging.warning(
          "config.%s of %s was %s, is now %s", key, run, before.get(key), after.get(key)
        )
  storage.write_text(path, json.dumps(new, indent=2) + "\n")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
  return flat


def _due(step: int, every_steps: int) -> bool:
  """Whether something of every so many steps is due; 0 is never (but for the last step)."""
  return bool(every_steps) and step % every_steps == 0


def _look_up(field: str, table: Mapping[str, Any], name: str) -> Any:
  if name not in table:
    raise ValueError(f"{field}={name!r} must be one of {', '.join(table)}")
  return table[name]


def _say(line: str) -> None:
  if jax.process_index() == 0:
    print(line, flush=True)
