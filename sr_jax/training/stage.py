"""Prepares a stage for its first step: `open_stage`, `find`, `pack_images`, `start_state` in turn.

Each of them returns one part of what the stage needs, complete when it is made.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging

from sr_jax import UserError
from sr_jax.data import packing
from sr_jax.data import sources
from sr_jax.data.pack import Pack, SmallImages
from sr_jax.data.source import Flags, Source, hold_out
from sr_jax.evaluation import scoring
from sr_jax.evaluation.test_sets import TestImage, packed_image
from sr_jax.formats import vgg_weights
from sr_jax.machine import cache
from sr_jax.machine import sharding
from sr_jax.metrics.table import ALWAYS, LPIPS
from sr_jax.models import partial
from sr_jax.models.model import Model
from sr_jax.models.read import read_discriminator, read_model
from sr_jax.networks import build
from sr_jax.networks import trees
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.runs import storage
from sr_jax.runs.settings import Config, flat, read_config
from sr_jax.runs.state import TrainState
from sr_jax.training import recipe
from sr_jax.training.checks import HOW, largest_patch
from sr_jax.training.degradation import crop_side, fitting_crop
from sr_jax.training.fields import SHARED, setting, told
from sr_jax.training.freezing import frozen_masks


class Stage(NamedTuple):
  """A stage's settings, its networks, and its checkpoint if there is one.

  Attributes:
    config: the recipe.
    run: the folder of the stage's run.
    mesh: the mesh to train on.
    networks: the networks to train.
    abstract: the shapes of the training state.
    restored: the state and the record of the checkpoint to go on from; None without a checkpoint.
    prefix: of the stage's fields on the command line, '' or 'psnr.'.
  """

  config: Config
  run: storage.Folder
  mesh: jax.sharding.Mesh
  networks: recipe.Networks
  abstract: TrainState
  restored: tuple[TrainState, dict[str, Any]] | None
  prefix: str = ""

  @property
  def step(self) -> int:
    """The step that the stage goes on from."""
    return int(self.restored[0].step) if self.restored else 0

  @property
  def has_scores(self) -> bool:
    """Whether that step was scored before the run stopped."""
    if self.restored is None:
      return False
    record = self.restored[1]
    # Version 0's checkpoints do not say; their scores are in metrics.jsonl alone.
    return bool(record["scores"]) if "scores" in record else logs.has_scores(self.run, self.step)

  @property
  def finished(self) -> bool:
    """Whether the last step is done and, if there are images to score, scored."""
    # A signal may have stopped the run when only the scores of the last step were missing.
    scored = self.has_scores or not (self.config.eval.source or self.config.data.hold_out)
    return self.restored is not None and self.step >= self.config.total_steps and scored


class Found(NamedTuple):
  """What a stage trains on and starts from.

  Attributes:
    source: the training images.
    test_source: the images to score, or None.
    vgg: the weights of the perceptual term and of DISTS, or None.
    step_arguments: the arguments of `make_train_step`, all but `prepare`.
    model: the model that the generator starts from, or None.
    discriminator: the model that the discriminator starts from, or None.
    extra: what the scores beside PSNR and SSIM need.
    best_metric: the score by which the best checkpoint is kept, or ''.
  """

  source: Source
  test_source: Source | None
  vgg: vgg_weights.VGG | None
  step_arguments: dict[str, Any]
  model: Model | None
  discriminator: Model | None
  extra: scoring.Extra
  best_metric: str

  def facts(self) -> dict[str, Any]:
    """Returns what must be equal on all hosts, or their replicas would drift apart."""
    return {
      "config.init_from": self.model and self.model.info["digest"],
      "config.discriminator.init_from": self.discriminator and self.discriminator.info["digest"],
      "config.perceptual.weights": self.vgg and trees.digest(self.vgg.params),
      "scores in training": [*ALWAYS, *(f"lpips_{net}" for net in self.extra.lpips)],
    }


class Images(NamedTuple):
  """The decoded images, those to train on and those to score."""

  train: Pack
  test: list[TestImage]


def open_stage(
  config: Config,
  run: storage.Folder,
  mesh: jax.sharding.Mesh | None = None,
  *,
  prefix: str = "",
) -> Stage:
  """Builds a stage's networks and reads its checkpoint.

  Args:
    config: the recipe.
    run: the folder of the stage's run, which need not exist.
    mesh: the mesh to train on; by default it has all devices.
    prefix: of the stage's fields on the command line, '' or 'psnr.'.

  Raises:
    UserError: settings do not fit together, or a checkpoint does not fit them; the error says how
      to mend it.
  """
  mesh = mesh or sharding.create_mesh()
  sharding.check_batch_size(config.data.batch_size, config.optimizer.accumulate_steps, mesh)
  networks = recipe.build_networks(config, mesh)
  abstract = jax.eval_shape(lambda: recipe.create_state(config, networks))
  try:
    restored = restore_state(run, abstract, mesh)
  except checkpoint.OtherNetwork as error:
    raise UserError(f"{run}: {error}{settings_of_run(config, run, prefix)}") from error
  stage = Stage(config, run, mesh, networks, abstract, restored, prefix)
  if stage.step > config.total_steps:
    raise UserError(
      f"--config.{prefix}total_steps={config.total_steps} is less than {stage.step}, the step that "
      f"{run} has reached; try --config.{prefix}total_steps={stage.step}, with which the run is "
      "finished, or another --workdir"
    )
  return stage


def restore_state(
  run: storage.Folder, abstract: TrainState, mesh: jax.sharding.Mesh
) -> tuple[TrainState, dict[str, Any]] | None:
  """Restores the newest sound checkpoint of a run on a mesh, as `checkpoint.restore` does."""
  replicated = sharding.replicated(mesh)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), abstract
  )
  return checkpoint.restore(run, target)


def find(stage: Stage) -> tuple[Found | None, list[str]]:
  """Finds data and weights, and turns the recipe's settings into functions.

  Returns:
    What was found, and []; or None, and a list of what is missing or wrong, each with its remedy.
  """
  config, problems = stage.config, []
  data, scale = config.data, config.scale

  def attempt(function: Any, *arguments: Any) -> Any:
    try:
      return function(*arguments)
    except (UserError, OSError) as error:
      problems.append(_of_stage(str(error), stage.prefix))

  def open_source(section: str) -> Source:
    given, name = config[section], f"--config.{stage.prefix}{section}"
    flags = Flags(f"{name}.source", f"{name}.lr_source", "--config.scale")
    return sources.open_source(given.source, given.lr_source, scale, keep_grey=True, flags=flags)

  def find_weights() -> tuple[Any, ...]:
    weights = None
    if config.perceptual.weight or config.dists.weight:
      weights = vgg_weights.load_vgg(config.perceptual.weights)
    if config.dists.weight:
      weights = vgg_weights.with_dists(weights)
    step = recipe.step_arguments(config, stage.networks, stage.mesh, weights)
    model = discriminator = None
    if stage.restored is None and config.init_from:
      model = read_start_model(stage, config.init_from)
    if stage.restored is None and config.discriminator.init_from and stage.networks.discriminator:
      discriminator = read_start_discriminator(stage, config.discriminator.init_from)
    return weights, step, model, discriminator

  source = attempt(open_source, "data")
  test_source = None
  if data.hold_out and config.eval.source:
    logging.warning("data.hold_out=%d holds nothing out, because eval.source=%s is given",
                    data.hold_out, config.eval.source)  # fmt: skip
  elif source and data.hold_out:
    if halves := attempt(hold_out, source, data.hold_out):
      source, test_source = halves
  if config.eval.source:
    test_source = attempt(open_source, "eval")
  own = data.lr_source, config.eval.lr_source
  if any(own) != all(own) and config.eval.source:
    which, other = ("data", "eval") if own[0] else ("eval", "data")
    logging.warning(
      "config.%s.lr_source has LR images of its own, and those of %s.source are made by MATLAB's "
      "bicubic or published with it: training and scores see different LR images; give "
      "--config.%s%s.lr_source too", which, other, stage.prefix, other,
    )  # fmt: skip
  # What is misspelt shall be told, whether there are weights or not.
  if not config.freeze or attempt(frozen_masks, config.freeze, stage.abstract.generator.variables):
    rest = attempt(find_weights)
  if problems:
    return None, problems
  return Found(source, test_source, *rest, *find_scores(config)), []


def remove_old_packs(stages: Sequence[Stage], found: Sequence[Found]) -> None:
  """Keeps the caches of decoded images within their limits, but for what these stages use."""
  packs = [
    packing.pack_folder(source, stage.config.scale, stage.config.data.cache_dir, bits=bits)
    for stage, inputs in zip(stages, found, strict=True)
    for source, bits in ((inputs.source, 16), (inputs.test_source, 8))
    if source
  ]
  for stage in stages:
    data = stage.config.data
    packing.remove_old_packs(cache.cache_folder(data.cache_dir), data.cache_gb, packs)


def _of_stage(error: str, prefix: str) -> str:
  """Names the fields in an error as the stage's, but for those that both stages share."""

  def named(match: re.Match) -> str:
    shared = match[1].startswith((*SHARED, "psnr."))
    return match[0] if shared else f"--config.{prefix}{match[1]}"

  return re.sub(r"--config\.([a-z_.]+)", named, error)


def find_scores(config: Config) -> tuple[scoring.Extra, str]:
  """Loads what the scores in training need, and says by which of them the best checkpoint is kept.

  LPIPS is left out, with a warning, where its weights are not installed.
  """
  best, extra = config.checkpoint.best_metric, scoring.NO_EXTRA
  scored = config.eval.source or config.data.hold_out
  if scored and config.eval.lpips:
    extra = scoring.load_extra((LPIPS,), missing_ok=True)
  if best == LPIPS and scored and not extra.lpips:
    logging.warning("checkpoint.best_metric=%s is not computed: no best checkpoint is kept", best)
  return extra, best if best != LPIPS or extra.lpips else ""


def read_start_model(stage: Stage, path: str) -> Model:
  """Reads the model to start from, and checks that it is this network, or fits it in part.

  Raises:
    FileNotFoundError: there is nothing at this path.
    UserError: it is another network, of which nothing fits where `init_partial` asks for parts.
  """
  model = read_model(path)
  if stage.config.init_partial and stage.config.init_from:
    if not partial.fit(stage.abstract.ema_variables, model.variables).taken:
      raise UserError(
        f"nothing of {path} fits config.generator by name and shape; "
        f"{fitting_settings(stage.config, model)}"
      )
    return model
  try:
    trees.check_same_shapes(
      {"config.generator": stage.abstract.ema_variables, path: model.variables}
    )
  except UserError as error:
    raise UserError(f"{error}; {fitting_settings(stage.config, model)}") from error
  return model


def fitting_settings(config: Config, model: Model) -> str:
  """Says with which settings a recipe's generator is the network of a model."""
  settings = _generator_settings(config, model.name, model.kwargs)
  channels = build.in_channels(model.variables, model.kwargs)
  settings = _with_channels(config, settings, channels)
  if not settings:
    return "no setting makes them the same network"
  return f"the recipe has the model's network with {' '.join(settings)}"


def _with_channels(config: Config, settings: Sequence[str], channels: int) -> list[str]:
  """Adds the images' channels, which the generator's out_channels follow."""
  settings = [s for s in settings if s != setting("generator.kwargs.out_channels", channels)]
  first = [setting("data.channels", channels)] if channels != config.data.channels else []
  return first + settings


def _generator_settings(config: Config, name: str, kwargs: Mapping[str, Any]) -> list[str]:
  """Returns the settings that make a recipe's generator another one, `scale` among its kwargs."""
  settings, ours = [], {**build.generator_fields(name)}
  if name != config.generator.name:
    settings.append(setting("generator.name", name))
  else:
    ours |= config.generator.kwargs
  ours["scale"] = config.scale
  for field, value in kwargs.items():
    if field not in HOW and value != ours.get(field):
      settings.append(setting("scale" if field == "scale" else f"generator.kwargs.{field}", value))
  return settings


def settings_of_run(config: Config, run: storage.Folder, prefix: str) -> str:
  """Says with which settings a recipe has the networks that a run was trained with; '' if none."""
  try:
    theirs = flat(read_config(run))
    kwargs = {k.removeprefix("generator.kwargs."): v for k, v in theirs.items()
              if k.startswith("generator.kwargs.")}  # fmt: skip
    kwargs["scale"] = theirs["scale"]
    settings = _generator_settings(config, theirs["generator.name"], kwargs)
    settings = _with_channels(config, settings, theirs.get("data.channels", 3))
  except (OSError, UserError, KeyError, TypeError):
    return ""
  ours = flat(config.to_dict())
  trained = bool(theirs.get("adversarial.weight"))
  if trained != bool(config.adversarial.weight):
    settings.append(setting(f"{prefix}adversarial.weight", theirs.get("adversarial.weight", 0.0)))
  if trained:
    for field in ("discriminator.name", "discriminator.kwargs.features", "data.hr_patch"):
      if field in theirs and theirs[field] != ours[field]:
        name = field if field.startswith(SHARED) else f"{prefix}{field}"
        settings.append(setting(name, theirs[field]))
  return f"; the run was trained with {' '.join(settings)}" if settings else ""


def read_start_discriminator(stage: Stage, path: str) -> Model:
  """Reads the discriminator to start from, and checks that it is this network.

  Raises:
    FileNotFoundError: there is no such file.
    UserError: it is another network.
  """
  model, ours = read_discriminator(path), stage.abstract.discriminator
  trees.check_same_shapes({"config.discriminator": ours.variables, path: model.variables})
  return model


def pack_images(stage: Stage, found: Found) -> Images:
  """Decodes the images that are not in the cache yet.

  Raises:
    UserError: too many images are unusable, or LR images do not fit.
    OSError: there is not enough room on the disk.
  """
  config, scale = stage.config, stage.config.scale
  cache_dir, patch, verify = config.data.cache_dir, crop_side(config), config.data.verify
  try:
    train = packing.build_pack(found.source, scale, cache_dir, patch, verify=verify)
  except SmallImages as error:
    degraded = config.data.degradation != "bicubic"
    field = f"{stage.prefix}data.{'degraded_crop' if degraded else 'hr_patch'}"
    side = (fitting_crop if degraded else largest_patch)(config, error.side)
    remedy = f"try {setting(field, side)}" if side else "no smaller one fits the networks"
    raise UserError(
      f"{told(field, patch)} is too large for these images; {remedy}. {error}"
    ) from error
  if not found.test_source:
    return Images(train, [])
  smallest = scoring.smallest_side(scale)
  # Scores are those of `evaluate`, which reads 8 bits.
  pack = packing.build_pack(found.test_source, scale, cache_dir, smallest, verify=verify, bits=8)
  count = min(config.eval.max_images or len(pack.names), len(pack.names))
  crop = max(config.eval.crop, smallest) if config.eval.crop else 0
  return Images(train, [packed_image(pack, i, crop) for i in range(count)])


def start_state(stage: Stage, found: Found, images: Images) -> tuple[TrainState, dict[str, Any]]:
  """Returns the state to train from, and the record of where it comes from.

  The state is that of the checkpoint. Without one it is a state at step 0, fresh or from a model.
  """
  run, digest = stage.run, images.train.digest
  if stage.restored:
    state, record = stage.restored
    logs.say(f"{run}: resuming at step {stage.step}")
    if record.get("data") != digest:
      logging.warning("the training images are not those that %s was trained on so far", run)
    return state, {**record, "data": digest}
  variables = variables_d = None
  ancestry = []
  if found.discriminator:
    logs.say(f"{run}: starting from the discriminator {found.discriminator.info['digest']}")
    variables_d = found.discriminator.variables
  if found.model:
    info, variables = found.model.info, found.model.variables
    logs.say(f"{run}: starting from the model {info['digest']}")
    ancestry = [info["digest"], *info["ancestry"]]
  in_part = bool(found.model and stage.config.init_partial and stage.config.init_from)
  if in_part:
    for what, parts in partial.fit(stage.abstract.ema_variables, variables)._asdict().items():
      logs.say(f"  {what}: {', '.join(parts) or 'nothing'}")
  # LLVM's costly optimizations take most of the compile time, and changed no bit on AVX-512.
  on_cpus = stage.mesh.devices.flat[0].platform == "cpu"

  def create_state(variables: Any, variables_d: Any) -> TrainState:
    given = None if in_part else variables
    state = recipe.create_state(stage.config, stage.networks, given, variables_d)
    if not in_part:
      return state
    net = partial.fitted(state.generator.variables, variables)
    return state.replace(
      generator=state.generator.replace(**net), ema_params=jax.tree.map(jnp.copy, net["params"])
    )

  create = jax.jit(
    create_state,
    out_shardings=sharding.replicated(stage.mesh),
    compiler_options={"xla_backend_optimization_level": 1} if on_cpus else None,
  )
  return create(variables, variables_d), {"info": {"ancestry": ancestry}, "data": digest}
