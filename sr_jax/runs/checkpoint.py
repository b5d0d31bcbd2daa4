"""Saves, verifies and restores the checkpoints of a run.

Orbax writes the checkpoints: asynchronously, atomically, the newest k and the best one by a metric.
What it lacks is here: a bit flipped on disk comes back from it as a wrong number without an error,
and an empty folder of a newer step makes it fail instead of taking the one before. So every
checkpoint holds a digest of each of its leaves, and what is restored is the newest step that
verifies, else the next older.

A checkpoint `RUN/checkpoints/STEP` has three items: `model`, the variables that are evaluated and
shipped (averaged parameters and BatchNorm statistics); `state`, the rest of the training state; and
`manifest`, JSON: each leaf's shape, dtype and sha256, what the caller adds, and a digest of all
this. A step that was scored has `metrics` too, its scores. What is wrong with a file of one step
concerns no other step.
"""

import hashlib
import json
import logging as standard_logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from absl import logging
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from sr_jax import UserError, printable
from sr_jax.runs.state import GuardState, NetState, TrainState, create_guard_state
from sr_jax.networks import trees
from sr_jax.runs import storage

# 1 had no digest of the manifest itself.
FORMAT = 2
_MAX_JSON = 64 * 2**20  # bytes; a manifest of a thousand leaves has 200,000
Tree = Any


class DamagedCheckpoint(Exception):
  """The error of a checkpoint that cannot be read or is not what was written."""


def open_manager(
  run: str | storage.Folder, keep: int = 3, best_metric: str = "", *, largest: bool = True
) -> ocp.CheckpointManager:
  """Opens RUN/checkpoints for saving and restoring.

  Args:
    run: the run's folder.
    keep: how many of the newest checkpoints are kept.
    best_metric: a key of the metrics that `save` gets; the checkpoint that is best by it is kept
      too. '' for none.
    largest: whether the largest value of it is best, or the smallest.
  """
  best_fn, sign = None, 1 if largest else -1
  policies = [ocp.checkpoint_managers.LatestN(keep)]
  if best_metric:

    def best_fn(metrics):
      return sign * metrics.get(best_metric, -sign * float("inf"))

    policies.append(
      ocp.checkpoint_managers.BestN(
        get_metric_fn=best_fn,
        n=1,
        keep_checkpoints_without_metrics=False,
      )
    )
  quiet_orbax()
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

  Raises:
    UserError: the state is not finite; the error names the first leaf that is not.
  """
  items = jax.tree.map(_one_copy_a_process, _as_saved(_items(state)))
  trees.check_finite(f"step {int(state.step)} is not saved", items, "go on from an earlier step")
  if anew:
    manager.delete(int(state.step))
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
  folder = _folder(run)
  if folder.exists() and not folder.is_dir():
    raise UserError(f"{folder} is a file, where a run has a folder; move it away")
  if not folder.is_dir():
    return None
  items, damaged = _items(abstract), _no_folders(folder)
  with _open_reader(run) as manager:
    steps = [step for step in manager.all_steps() if step not in damaged]
    for step in steps:  # older ones too: Orbax reads the scores of all when it opens a run to save
      try:
        _check_scores(folder / str(step))
      except DamagedCheckpoint as error:
        damaged[step] = error
    for step in sorted(set(steps) - damaged.keys(), reverse=True):
      try:
        restored, manifest = _restore_step(manager, folder, step, items)
      except DamagedCheckpoint as error:
        damaged[step] = error
        continue
      for bad_step, error in damaged.items():
        aside = _set_aside(run, bad_step)
        logging.error("checkpoint of step %d is damaged (%s); moved to %s", bad_step, error, aside)
      state = restored["state"].replace(ema_params=restored["model"]["params"])
      return state.replace(guard=_guard_for(abstract, state.guard)), manifest["extra"]
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
        restored, manifest = _restore_step(manager, _folder(run), candidate, {"model": target})
      except DamagedCheckpoint as error:
        logging.error("checkpoint %s/checkpoints/%d is damaged: %s", run, candidate, error)
        continue
      return restored["model"], candidate, manifest["extra"]
  wanted = "" if step is None else f"step {step} of "
  raise FileNotFoundError(f"no sound checkpoint in {wanted}{_folder(run)}; it holds steps {steps}")


def quiet_orbax() -> None:
  """Shows what Orbax logs only to those who ask for debugging.

  Where a disk is full, it logs a traceback of each of its threads, hundreds of lines, and then
  raises the error that is told in one; and it warns of each checkpoint that has no scores.
  """
  for logger in (logging.get_absl_logger(), standard_logging.getLogger("asyncio")):
    if _is_ours not in logger.filters:
      logger.addFilter(_is_ours)


def _is_ours(record: Any) -> bool:
  # asyncio's are of the tasks that Orbax leaves behind when one of them fails.
  parts = record.pathname.replace("\\", "/").split("/")
  return not {"orbax", "asyncio"} & set(parts) or logging.get_verbosity() >= logging.DEBUG


def save_model(
  run: str | storage.Folder, variables: Tree, *, step: int, extra: Mapping[str, Any]
) -> None:
  """Writes a run that holds a model and nothing to train on: what `restore_model` reads."""
  manifest = _manifest({"model": variables}, extra)
  quiet_orbax()
  with ocp.CheckpointManager(_folder(run)) as manager:
    manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(variables), manifest=ocp.args.JsonSave(manifest)
      ),
    )
    manager.wait_until_finished()


def steps(run: str | storage.Folder) -> list[int]:
  """Lists the steps that have a checkpoint, in order."""
  if not _folder(run).is_dir():
    return []
  with _open_reader(run) as manager:
    return sorted(manager.all_steps())


def withdraw(run: str | storage.Folder, step: int) -> storage.Folder:
  """Moves a checkpoint that a run shall not go on from to RUN/withdrawn; process 0 calls it."""
  aside = _folder(run).parent / "withdrawn"
  number = len(list(aside.iterdir())) if aside.is_dir() else 0
  storage.move(_folder(run) / str(step), aside / f"{step}_{number}")
  return aside


def _folder(run: str | storage.Folder) -> storage.Folder:
  run = storage.run_folder(run)
  return (run if storage.is_bucket(run) else run.absolute()) / "checkpoints"


def _open_reader(run: str | storage.Folder) -> ocp.CheckpointManager:
  quiet_orbax()
  # Lightweight: otherwise it reads files of every step, and a damaged one of any step is an error.
  options = ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True)
  return ocp.CheckpointManager(_folder(run), options=options)


def _items(state: TrainState) -> dict[str, Tree]:
  return {"model": state.ema_variables, "state": state.replace(ema_params=None)}


def _as_saved(items: dict[str, Tree]) -> dict[str, Tree]:
  """Makes a dictionary of the state, which has no guard where there is none, as in version 0."""
  state = {field.name: getattr(items["state"], field.name) for field in fields(items["state"])}
  if state["guard"] is None:
    del state["guard"]
  return {**items, "state": state}


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
  manifest = {"format": FORMAT, "leaves": _describe(items, digest=True), "extra": dict(extra)}
  manifest = json.loads(json.dumps(manifest))  # tuples become lists, as they will be read
  return {**manifest, "digest": manifest_digest(manifest)}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
  """Returns the sha256 of a manifest's JSON, all but the digest itself."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read_json(path: storage.Folder) -> dict[str, Any]:
  """Reads a JSON object of a checkpoint; raises DamagedCheckpoint, which names the file."""
  try:
    with path.open("rb") as file:
      text = file.read(_MAX_JSON + 1)
    if len(text) > _MAX_JSON:
      raise ValueError(f"it has more than {_MAX_JSON} bytes")
    told = json.loads(text)
  except (OSError, ValueError, RecursionError) as error:
    raise DamagedCheckpoint(f"{path} cannot be read: {_first_line(error)}") from error
  if not isinstance(told, dict):
    raise DamagedCheckpoint(f"{path} is no JSON object")
  return told


def _read_manifest(folder: storage.Folder) -> dict[str, Any]:
  """Reads the manifest of a step; raises DamagedCheckpoint, or UserError for a newer format."""
  path = folder / "manifest" / "metadata"
  told = _read_json(path)
  version, digest = told.get("format"), told.pop("digest", None)
  if digest is not None or version != 1:
    if digest != manifest_digest(told):
      raise DamagedCheckpoint(f"{path} is not what was written (sha256 differs)")
    if type(version) is int and version > FORMAT:
      raise UserError(
        f"{folder} has format {version}, this sr_jax reads up to {FORMAT}; update sr_jax"
      )
  leaves, extra = told.get("leaves"), told.get("extra")
  sound = type(version) is int and isinstance(leaves, dict) and isinstance(extra, dict)
  if not (sound and all(map(_is_leaf, leaves.values())) and _is_record(extra)):
    raise DamagedCheckpoint(f"{path} is no manifest that sr_jax wrote")
  return told


def _is_leaf(entry: Any) -> bool:
  """Whether this is what `_describe` says of a leaf: [shape, dtype, sha256]."""
  if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], list)):
    return False
  return all(type(side) is int for side in entry[0]) and all(type(x) is str for x in entry[1:])


def _is_record(extra: dict[str, Any]) -> bool:
  """Whether what the caller added is of the types that its readers rely on."""
  info, scores, data = extra.get("info", {}), extra.get("scores"), extra.get("data", "")
  ancestry = info.get("ancestry", []) if isinstance(info, dict) else None
  return (
    isinstance(ancestry, list)
    and all(isinstance(digest, str) for digest in ancestry)
    and (scores is None or _are_scores(scores))
    and isinstance(data, str)
  )


def _are_scores(scores: Any) -> bool:
  return isinstance(scores, dict) and all(type(score) in (int, float) for score in scores.values())


def _check_scores(folder: storage.Folder) -> None:
  """Raises DamagedCheckpoint if a step has scores that cannot be read."""
  path = folder / "metrics" / "metrics"
  if path.parent.exists() and not _are_scores(_read_json(path)):
    raise DamagedCheckpoint(f"{path} holds no scores")


def _no_folders(folder: storage.Folder) -> dict[int, DamagedCheckpoint]:
  """Finds what is named like a step and is none: files, and links, which Orbax cannot delete."""
  found = {}
  for path in [] if storage.is_bucket(folder) else folder.iterdir():
    is_step = path.name.isascii() and path.name.isdigit() and path.name == str(int(path.name))
    if is_step and (path.is_symlink() or not path.is_dir()):
      kind = "a symbolic link" if path.is_symlink() else "a file"
      found[int(path.name)] = DamagedCheckpoint(f"{path} is {kind}, where a step has a folder")
  return found


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
  manager: ocp.CheckpointManager, folder: storage.Folder, step: int, items: dict[str, Tree]
) -> tuple[dict[str, Tree], dict[str, Any]]:
  """Restores the given items of one step of a folder and compares every leaf with its digest."""
  manifest = _read_manifest(folder / str(step))
  _check_scores(folder / str(step))
  written = manifest["leaves"]
  if clipped := any("/opt_state/1/" in path for path in written) and "state" in items:
    items = {**items, "state": _opt_states(items["state"], lambda adam: (optax.EmptyState(), adam))}
  if "state" in items:
    items = _as_saved({**items, "state": _guarded_as(written, items["state"])})
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
    raise DamagedCheckpoint(f"{folder / str(step)}: {_first_line(error)}") from error
  for path, entry in _describe(restored, digest=True).items():
    if entry != written[path]:
      raise DamagedCheckpoint(
        f"{path} in {folder / str(step)} is not what was written (sha256 differs)"
      )
  if "state" in items:
    restored["state"] = TrainState(**{"guard": None, **restored["state"]})
  if clipped:
    restored["state"] = _opt_states(restored["state"], lambda chain: chain[1])
  return restored, manifest


def _opt_states(state: TrainState, change: Callable[[Any], Any]) -> TrainState:
  """Changes the state of both optimizers.

  In checkpoints of version 0 it was a pair where gradients were clipped: clipping's state, which is
  empty, and Adam's.
  """

  def changed(net: NetState | None) -> NetState | None:
    return net and net.replace(opt_state=change(net.opt_state))

  return state.replace(
    generator=changed(state.generator), discriminator=changed(state.discriminator)
  )


def _guarded_as(written: Mapping[str, Any], state: TrainState) -> TrainState:
  """Gives an abstract state a guard if a checkpoint has one, or takes it away if it has none."""
  if not any(path.startswith("state/guard/") for path in written):
    return state.replace(guard=None)
  abstract = jax.eval_shape(create_guard_state)
  return state.replace(
    guard=jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=state.step.sharding), abstract
    )
  )


def _guard_for(abstract: TrainState, restored: GuardState | None) -> GuardState | None:
  """What a run's guard goes on with: a fresh one where its checkpoint has none."""
  if abstract.guard is None or restored is not None:
    return abstract.guard and restored
  return jax.jit(create_guard_state, out_shardings=abstract.step.sharding)()


class OtherNetwork(UserError):
  """The error of a sound checkpoint that belongs to another network, or another discriminator."""


def _check_structure(step: int, written: dict, wanted: dict, items: tuple[str, ...]) -> None:
  written = {path: e[:2] for path, e in written.items() if path.split("/")[0] in items}
  if difference := trees.first_difference(written, wanted):
    path, theirs, ours = difference
    raise OtherNetwork(
      f"checkpoint of step {step} does not fit this configuration: {path} is {theirs} there and "
      f"{ours} here; use the configuration that wrote it, or another --workdir"
    )


def _set_aside(run: str | storage.Folder, step: int) -> storage.Folder:
  aside = _folder(run).parent / "damaged"
  number = len(list(aside.iterdir())) if aside.is_dir() else 0
  while (target := aside / f"{step}_{number}").exists():
    number += 1
  if jax.process_index() == 0:
    storage.move(_folder(run) / str(step), target)
  return target


def _first_line(error: Exception) -> str:
  return printable((str(error).strip() or type(error).__name__).splitlines()[0])
