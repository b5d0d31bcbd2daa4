"""Prepares a stage for its first step: `open_stage`, `find`, `pack_images`, `start_state` in turn.

Each of them returns one part of what the stage needs, complete when it is made.
"""

from typing import Any, NamedTuple

import jax
from absl import logging

from sr_jax import UserError
from sr_jax.data import packing
from sr_jax.data import sources
from sr_jax.data.pack import Pack
from sr_jax.data.source import Source
from sr_jax.evaluation.scoring import smallest_side
from sr_jax.evaluation.test_sets import TestImage, packed_image
from sr_jax.formats import vgg_weights
from sr_jax.machine import sharding
from sr_jax.metrics.table import ALWAYS
from sr_jax.models.model import Model
from sr_jax.models.read import read_discriminator, read_model
from sr_jax.networks import trees
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.runs import storage
from sr_jax.runs.settings import Config
from sr_jax.runs.state import TrainState
from sr_jax.training import recipe


class Stage(NamedTuple):
  """A stage's settings, its networks, and its checkpoint if there is one.

  Attributes:
    config: the recipe.
    run: the folder of the stage's run.
    mesh: the mesh to train on.
    networks: the networks to train.
    abstract: the shapes of the training state.
    restored: the state and the record of the checkpoint to go on from; None without a checkpoint.
  """

  config: Config
  run: storage.Folder
  mesh: jax.sharding.Mesh
  networks: recipe.Networks
  abstract: TrainState
  restored: tuple[TrainState, dict[str, Any]] | None

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
    scored = self.has_scores or not self.config.eval.source
    return self.restored is not None and self.step >= self.config.total_steps and scored


class Found(NamedTuple):
  """What a stage trains on and starts from.

  Attributes:
    source: the training images.
    test_source: the images to score, or None.
    vgg: the weights of the perceptual term, or None.
    step_arguments: the arguments of `make_train_step`, all but `cut`.
    model: the model that the generator starts from, or None.
    discriminator: the model that the discriminator starts from, or None.
  """

  source: Source
  test_source: Source | None
  vgg: vgg_weights.VGG | None
  step_arguments: dict[str, Any]
  model: Model | None
  discriminator: Model | None

  def facts(self) -> dict[str, Any]:
    """Returns what must be equal on all hosts, or their replicas would drift apart."""
    return {
      "config.init_from": self.model and self.model.info["digest"],
      "config.discriminator.init_from": self.discriminator and self.discriminator.info["digest"],
      "config.perceptual.weights": self.vgg and trees.digest(self.vgg.params),
    }


class Images(NamedTuple):
  """The decoded images, those to train on and those to score."""

  train: Pack
  test: list[TestImage]


def open_stage(config: Config, run: storage.Folder, mesh: jax.sharding.Mesh | None = None) -> Stage:
  """Builds a stage's networks and reads its checkpoint.

  Args:
    config: the recipe.
    run: the folder of the stage's run, which need not exist.
    mesh: the mesh to train on; by default it has all devices.

  Raises:
    UserError: settings do not fit together, or a checkpoint does not fit them; the error says how
      to mend it.
  """
  mesh = mesh or sharding.create_mesh()
  sharding.check_batch_size(config.data.batch_size, config.optimizer.accumulate_steps, mesh)
  if config.data.hr_patch % config.scale:
    raise UserError(
      f"hr_patch={config.data.hr_patch} must be a multiple of scale={config.scale}; try "
      f"--config.data.hr_patch={-(-config.data.hr_patch // config.scale) * config.scale}"
    )
  best = config.checkpoint.best_metric
  if best and best not in ALWAYS:
    raise UserError(f"checkpoint.best_metric={best!r} must be one of {', '.join(ALWAYS)}, or ''")
  networks = recipe.build_networks(config, mesh)
  abstract = jax.eval_shape(lambda: recipe.create_state(config, networks))
  replicated = sharding.replicated(mesh)
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), abstract
  )
  return Stage(config, run, mesh, networks, abstract, checkpoint.restore(run, target))


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
      problems.append(str(error))

  def open_source(spec: str, lr_spec: str = "") -> Source:
    return sources.open_source(spec, lr_spec, scale=scale, keep_grey=True)

  def find_weights() -> tuple[Any, ...]:
    weights = vgg_weights.load_vgg(config.perceptual.weights) if config.perceptual.weight else None
    step = recipe.step_arguments(config, stage.networks, stage.mesh, weights)
    model = discriminator = None
    if stage.restored is None and config.init_from:
      model = read_start_model(stage, config.init_from)
    if stage.restored is None and config.discriminator.init_from and stage.networks.discriminator:
      discriminator = read_start_discriminator(stage, config.discriminator.init_from)
    return weights, step, model, discriminator

  source = attempt(open_source, data.source, data.lr_source)
  test_source = attempt(open_source, config.eval.source) if config.eval.source else None
  rest = attempt(find_weights)
  return (None, problems) if problems else (Found(source, test_source, *rest), [])


def read_start_model(stage: Stage, path: str) -> Model:
  """Reads the model to start from, and checks that it is this network.

  Raises:
    FileNotFoundError: there is nothing at this path.
    UserError: it is another network.
  """
  model = read_model(path)
  trees.check_same_shapes({"config.generator": stage.abstract.ema_variables, path: model.variables})
  return model


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
  cache = config.data.cache_dir
  train = packing.build_pack(found.source, scale, cache, min_hr=config.data.hr_patch)
  if not found.test_source:
    return Images(train, [])
  pack = packing.build_pack(found.test_source, scale, cache, min_hr=smallest_side(scale))
  count = min(config.eval.max_images or len(pack.names), len(pack.names))
  return Images(train, [packed_image(pack, i) for i in range(count)])


def start_state(stage: Stage, found: Found, images: Images) -> tuple[TrainState, dict[str, Any]]:
  """Returns the state to train from, and the record of where it comes from.

  The state is that of the checkpoint. Without one it is a state at step 0, fresh or from a model.
  """
  run, digest = stage.run, images.train.digest
  if stage.restored:
    state, record = stage.restored
    logs.say(f"{run}: resuming at step {stage.step}")
    if record["data"] != digest:
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
  # LLVM's costly optimizations take most of the compile time, and changed no bit on AVX-512.
  on_cpus = stage.mesh.devices.flat[0].platform == "cpu"
  create = jax.jit(
    lambda *variables: recipe.create_state(stage.config, stage.networks, *variables),
    out_shardings=sharding.replicated(stage.mesh),
    compiler_options={"xla_backend_optimization_level": 1} if on_cpus else None,
  )
  return create(variables, variables_d), {"info": {"ancestry": ancestry}, "data": digest}
