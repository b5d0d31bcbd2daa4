"""Recipes made so small that a run takes seconds, and what tests ask of such runs."""

import json
import os
import pathlib

import jax
import numpy as np
from PIL import Image
import pytest

from configs import common, esrgan
from sr_jax.machine import folders
from sr_jax.runs import checkpoint
from sr_jax.runs import storage
from sr_jax.training import clock
from sr_jax.training import loop
from sr_jax.training import recipe
from sr_jax.training.run import train_and_evaluate
from sr_jax.training.stage import open_stage


def made_once(tmp_path_factory, name: str, make) -> pathlib.Path:
  """A folder that the first worker to ask for it fills by make(folder); all workers share it."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
  folder.mkdir(exist_ok=True)
  with folders.locked(folder):
    if not (folder / "done").exists():
      make(folder / "it")
      (folder / "done").touch()
  return folder / "it"


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> pathlib.Path:
  """A folder of five small images with something to learn in them."""

  def make(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
      coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8))
      coarse.resize((88 + 4 * i, 72), Image.Resampling.BICUBIC).save(folder / f"{i}.png")

  return made_once(tmp_path_factory, "photographs", make)


def tiny(photographs: pathlib.Path, recipe=esrgan, **overrides):
  """A recipe's demo made so small that a run takes seconds.

  Its images live on the devices, since TensorFlow takes longer to import than the run takes; where
  tf.data is to be seen, tests override `data.input`.
  """
  config = recipe.get_config("demo")
  for stage in (config.psnr, config):
    stage.data.source = str(photographs)
    stage.data.hr_patch = 32
    stage.data.batch_size = 8
    stage.data.input = "device"
    stage.eval.source = str(photographs)
    stage.eval.max_images = 2
    stage.eval.every_steps = 2
    stage.eval.lpips = False  # AlexNet takes longer to compile than all else
    stage.checkpoint.every_steps = 2
    stage.log.every_steps = 1
    stage.log.tensorboard = False
    if recipe is esrgan:  # its smaller network compiles in two thirds of the time
      stage.generator = common.generator("residualnet")
    stage.generator.kwargs.features = 8
    stage.generator.kwargs.blocks = 1
    stage.total_steps = 4
  config.psnr.learning_rate.periods = (4,)
  config.discriminator.kwargs.features = 4
  config.perceptual.layers = ("conv1_1:1.0",)
  config.update_from_flattened_dict(overrides)
  return config.lock()


@pytest.fixture(scope="session", autouse=True)
def shared_programs():
  """Lets the runs of a process share the step of equal stages, which takes seconds to trace."""
  arguments, steps = {}, {}
  step_arguments, make_train_step = recipe.step_arguments, loop.make_train_step

  def shared_arguments(config, networks, mesh, weights):
    key = config.to_json(), mesh, weights and weights.convention
    if key not in arguments:
      arguments[key] = step_arguments(config, networks, mesh, weights)
    return dict(arguments[key])

  def shared_step(**given):
    # Equal ones make the same batches.
    key = given["prepare"], *(id(given[name]) for name in sorted(given) if name != "prepare")
    if key not in steps:
      steps[key] = make_train_step(**given), given  # what is kept has an id of its own
    return steps[key][0]

  with pytest.MonkeyPatch.context() as patched:
    patched.setattr(recipe, "step_arguments", shared_arguments)
    patched.setattr(loop, "make_train_step", shared_step)
    yield


@pytest.fixture(scope="session")
def whole_run(photographs, tmp_path_factory):
  """One undisturbed run of both stages, which several tests look at."""
  config = tiny(photographs)
  run = made_once(tmp_path_factory, "whole", lambda run: train_and_evaluate(config, run))
  return run, config


def named_leaves(state) -> dict[str, jax.Array]:
  """{path: leaf} of a tree."""
  paths = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def leaves(run: storage.Folder, config) -> dict[str, np.ndarray]:
  """Every leaf of a run's newest state."""
  state, record = open_stage(config, run).restored
  assert record["data"]
  return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def lines(run: storage.Folder) -> list[dict]:
  """metrics.jsonl without what the clock measured."""
  parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in line.items() if k != "timing"} for line in parsed]


def assert_same_run(a: storage.Folder, b: storage.Folder, config) -> None:
  ours, theirs = leaves(a, config), leaves(b, config)
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
  assert lines(a) == lines(b)


class Killed(BaseException):
  """What a test throws where a machine would die."""


def killed_after(monkeypatch, updates: int) -> None:
  """Makes the run die when it asks for the batch after so many updates."""
  count = 0
  wait_for = clock.Progress.wait_for

  def dying(self, batches):
    nonlocal count
    if count == updates:
      raise Killed
    count += 1
    return wait_for(self, batches)

  monkeypatch.setattr(clock.Progress, "wait_for", dying)


def manifest_file(run: pathlib.Path, step: int) -> pathlib.Path:
  """Where a checkpoint's manifest lies."""
  return run / "checkpoints" / str(step) / "manifest" / "metadata"


def change_record(run: pathlib.Path, step: int, change) -> None:
  """Calls `change` with the record of a checkpoint, {'scores': ..., ...}, and writes it back."""
  path = manifest_file(run, step)
  manifest = json.loads(path.read_text())
  change(manifest["extra"])
  del manifest["digest"]
  path.write_text(json.dumps({**manifest, "digest": checkpoint.manifest_digest(manifest)}))
