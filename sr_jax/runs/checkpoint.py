"""Saves, verifies and restores the checkpoints of a run.

Orbax writes the checkpoints: asynchronously, atomically, the newest k and the best one by a metric.
What it lacks is here: a bit flipped on disk comes back from it as a wrong number without an error,
and an empty folder of a newer step makes it fail instead of taking the one before. So every
checkpoint holds a digest of each of its leaves, and what is restored is the newest step that
verifies, else the next older.

A checkpoint `RUN/checkpoints/STEP` has three items: `model`, the variables that are evaluated and
shipped (averaged parameters and BatchNorm statistics); `state`, the rest of the training state; and
`manifest`, JSON: each leaf's shape, dtype and sha256, and what the caller adds.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from absl import logging
import jax
import numpy as np
import orbax.checkpoint as ocp

from sr_jax import UserError
from sr_jax.runs.state import TrainState
from sr_jax.networks import trees
from sr_jax.runs import storage

FORMAT = 1
Tree = Any


class DamagedCheckpoint(Exception):
  """The error of a checkpoint that cannot be read or is not what was written."""


def open_manager(
  run: str | storage.Folder, keep: int = 3, best_metric: str = ""
) -> ocp.CheckpointManager:
  """Opens RUN/checkpoints for saving and restoring.

  Args:
    run: the run's folder.
    keep: how many of the newest checkpoints are kept.
    best_metric: a key of the metrics that `save` gets; the checkpoint where this metric is largest
      is kept too. '' for none.
  """
  best_fn = None
  policies = [ocp.checkpoint_managers.LatestN(keep)]
  if best_metric:

    def best_fn(metrics):
      return metrics[best_metric]

    policies.append(
      ocp.checkpoint_managers.BestN(
        get_metric_fn=best_fn,
        n=1,
        keep_checkpoints_without_metrics=False,
      )
    )
  return ocp.CheckpointManager(
    _folder(run),
    options=ocp.CheckpointManagerOptions(
      best_fn=best_fn,  # without it the metrics are not written, and forgotten when a run resumes
      preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
      cleanup_tmp_directories=True,
    ),
  )


def save(
  manager: ocp.CheckpointManager,
  state: TrainState,
  *,
  extra: Mapping[str, Any],
  metrics: Mapping[str, float] | None = None,
  anew: bool = False,
) -> None:
  """Saves a state under its step; the writing goes on in the background.

  Args:
    manager: what `open_manager` returned.
    state: the state to save. It may be donated as soon as this returns.
    extra: JSON values, which `restore` returns.
    metrics: the scores of this step, by which the best checkpoint is found; None without scores.
    anew: whether there is a checkpoint of this step already, whose place this one takes.
  """
  if anew:
    manager.delete(int(state.step))
  items = jax.tree.map(_one_copy_a_process, _items(state))
  manifest = _manifest(items, extra)
  manager.save(
    int(state.step),
    args=ocp.args.Composite(
      model=ocp.args.StandardSave(items["model"]),
      state=ocp.args.StandardSave(items["state"]),
      manifest=ocp.args.JsonSave(manifest),
    ),
    metrics=dict(metrics) if metrics else None,
  )


def restore(
  run: str | storage.Folder, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
  """Restores the newest checkpoint that verifies, and sets damaged newer ones aside.

  Nothing is moved unless an older one verifies: if none does, the machine may be at fault.

  Args:
    run: the run's folder; damaged checkpoints move to RUN/damaged, so that their steps can be saved
      again.
    abstract: a state of `jax.ShapeDtypeStruct` with shardings. The result has these shardings,
      whatever devices wrote the checkpoint.

  Returns:
    The state, and the `extra` that `save` got; None if there is no checkpoint.

  Raises:
    UserError: a sound checkpoint belongs to another network (the error names the first
      difference), or there are checkpoints and none verifies.
  """
  if not _folder(run).is_dir():
    return None
  items, damaged = _items(abstract), {}
  with _open_reader(run) as manager:
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        restored, manifest = _restore_step(manager, step, items)
      except DamagedCheckpoint as error:
        damaged[step] = error
        continue
      for bad_step, error in damaged.items():
        aside = _set_aside(run, bad_step)
        logging.error("checkpoint of step %d is damaged (%s); moved to %s", bad_step, error, aside)
      state = restored["state"].replace(ema_params=restored["model"]["params"])
      return state, manifest["extra"]
  if damaged:
    reasons = "".join(f"\n  step {step}: {error}" for step, error in damaged.items())
    raise UserError(
      f"none of the checkpoints in {_folder(run)} can be restored:{reasons}\n"
      "nothing was changed; try again, or move that folder away to start from step 0"
    )
  return None


def restore_model(
  run: str | storage.Folder, abstract_variables: Tree, *, step: int | None = None
) -> tuple[Tree, int, dict[str, Any]]:
  """Restores the variables that are evaluated and shipped, from the newest sound checkpoint.

  It only reads: a damaged checkpoint stays where it is, and the log says so.

  Args:
    run: the run's folder.
    abstract_variables: {'params', 'batch_stats'}, trees of `jax.ShapeDtypeStruct`.
    step: the only step to try; None for the newest that verifies.

  Returns:
    The variables, their step, and the `extra` that `save` got.

  Raises:
    FileNotFoundError: no checkpoint verifies.
    UserError: a sound checkpoint belongs to another network.
  """
  if not _folder(run).is_dir():
    raise FileNotFoundError(f"{run} has no checkpoints/; is it the folder of a run?")
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract_variables
  )
  with _open_reader(run) as manager:
    steps = sorted(manager.all_steps(), reverse=True)
    for candidate in steps if step is None else [step]:
      try:
        restored, manifest = _restore_step(manager, candidate, {"model": target})
      except DamagedCheckpoint as error:
        logging.error("checkpoint %s/checkpoints/%d is damaged: %s", run, candidate, error)
        continue
      return restored["model"], candidate, manifest["extra"]
  wanted = "" if step is None else f"step {step} of "
  raise FileNotFoundError(f"no sound checkpoint in {wanted}{_folder(run)}; it holds steps {steps}")


def save_model(
  run: str | storage.Folder, variables: Tree, *, step: int, extra: Mapping[str, Any]
) -> None:
  """Writes a run that holds a model and nothing to train on: what `restore_model` reads."""
  manifest = _manifest({"model": variables}, extra)
  with ocp.CheckpointManager(_folder(run)) as manager:
    manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(variables), manifest=ocp.args.JsonSave(manifest)
      ),
    )
    manager.wait_until_finished()


def _folder(run: str | storage.Folder) -> storage.Folder:
  run = storage.run_folder(run)
  return (run if storage.is_bucket(run) else run.absolute()) / "checkpoints"


def _open_reader(run: str | storage.Folder) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(_folder(run), options=ocp.CheckpointManagerOptions(create=False))


def _items(state: TrainState) -> dict[str, Tree]:
  return {"model": state.ema_variables, "state": state.replace(ema_params=None)}


def _one_copy_a_process(leaf: jax.Array) -> jax.Array:
  """Returns the same replicated array on one device of each process.

  If Orbax gets copies on all devices, it has each device write a slice, and compiles the slicing.
  """
  devices = {}
  for device in sorted(leaf.sharding.device_set, key=lambda device: device.id):
    devices.setdefault(device.process_index, device)
  mesh = jax.sharding.Mesh(np.array(list(devices.values())), ("process",))
  mine = devices[jax.process_index()]
  copy = [shard.data for shard in leaf.addressable_shards if shard.device == mine]
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.make_array_from_single_device_arrays(leaf.shape, replicated, copy)


def _manifest(items: dict[str, Tree], extra: Mapping[str, Any]) -> dict[str, Any]:
  return {"format": FORMAT, "leaves": _describe(items, digest=True), "extra": dict(extra)}


def _describe(tree: Tree, *, digest: bool = False) -> dict[str, list]:
  """{path: [shape, dtype]} of a tree, with each leaf's sha256 on request."""
  leaves = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    entry = [list(leaf.shape), str(leaf.dtype)]
    if digest:
      # Replicated, so that any one shard is the whole leaf.
      array = leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf
      entry.append(hashlib.sha256(np.ascontiguousarray(array)).hexdigest())
    leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = entry
  return leaves


def _restore_step(
  manager: ocp.CheckpointManager, step: int, items: dict[str, Tree]
) -> tuple[dict[str, Tree], dict[str, Any]]:
  """Restores the given items of one step and compares every leaf with its digest."""
  try:
    manifest = manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore()))
    manifest = manifest["manifest"]
    written, version = manifest["leaves"], manifest["format"]
  except Exception as error:  # whatever Orbax raises for a file that is not what it wrote
    raise DamagedCheckpoint(f"its manifest cannot be read: {_first_line(error)}") from error
  if version > FORMAT:
    raise UserError(
      f"checkpoint of step {step} has format {version}, this sr_jax reads up to {FORMAT}; "
      "update sr_jax"
    )
  _check_structure(step, written, _describe(items), tuple(items))
  try:
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(tree) for name, tree in items.items()}
      ),
    )
    restored = {name: restored[name] for name in items}
  except Exception as error:
    raise DamagedCheckpoint(f"it cannot be read: {_first_line(error)}") from error
  for path, entry in _describe(restored, digest=True).items():
    if entry != written[path]:
      raise DamagedCheckpoint(f"{path} is not what was written (sha256 differs)")
  return restored, manifest


def _check_structure(step: int, written: dict, wanted: dict, items: tuple[str, ...]) -> None:
  written = {path: e[:2] for path, e in written.items() if path.split("/")[0] in items}
  if difference := trees.first_difference(written, wanted):
    path, theirs, ours = difference
    raise UserError(
      f"checkpoint of step {step} does not fit this configuration: {path} is {theirs} there and "
      f"{ours} here; use the configuration that wrote it, or another --workdir"
    )


def _set_aside(run: str | storage.Folder, step: int) -> storage.Folder:
  aside = _folder(run).parent / "damaged"
  number = len(list(aside.iterdir())) if aside.is_dir() else 0
  target = aside / f"{step}_{number}"
  if jax.process_index() == 0:
    storage.move(_folder(run) / str(step), target)
  return target


def _first_line(error: Exception) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
