"""Starts a network from a model of another scale, width or depth: what fits is taken.

An array fits if the network has one of the same name and shape. Names are those of files, so the
blocks of a body are looked at one by one: a network of 6 blocks takes the first 6 of 23. Compact's
layers, which files number, have the names that they have here: of another depth conv_last fits too.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sr_jax.networks.trees import Variables


def fitted(fresh: Variables, model: Variables) -> Variables:
  """Returns the variables of a network with those of a model in the place of what they fit.

  Args:
    fresh: {'params', 'batch_stats'} of the network.
    model: the same of the model.
  """
  theirs = flatten_dict(model)
  merged = {}
  for path, ours in flatten_dict(fresh, keep_empty_nodes=True).items():
    count = _fitting_blocks(path, ours, theirs.get(path))
    if count is None:
      merged[path] = ours
    elif not count:
      merged[path] = jnp.asarray(theirs[path])
    else:
      merged[path] = jnp.concatenate([theirs[path][:count], ours[count:]])
  return unflatten_dict(merged)


class Fit(NamedTuple):
  """What a network takes from a model, as beginnings of paths: 'conv_first', 'body/0-5'.

  Attributes:
    taken: of the network, from the model.
    fresh: of the network, not in the model or of another shape.
    unused: of the model, not in the network or of another shape.
  """

  taken: list[str]
  fresh: list[str]
  unused: list[str]


def fit(network: Variables, model: Variables) -> Fit:
  """Compares a network's variables, or their shapes, with a model's."""
  ours, theirs = (_by_file_name(x) for x in (network, model))
  taken = {path: theirs.get(path) == shape for path, shape in ours.items()}
  unused = {path: ours.get(path) != shape for path, shape in theirs.items()}
  fresh = {path: not fits for path, fits in taken.items()}
  return Fit(*map(_beginnings, (taken, fresh, unused)))


def _fitting_blocks(path: tuple[str, ...], ours: Any, theirs: Any) -> int | None:
  """None where nothing fits; for a body the number of blocks that do, 0 for any other array."""
  if theirs is None or not hasattr(ours, "shape"):
    return None
  if path[1] == "body":
    fits = ours.shape[1:] == theirs.shape[1:]
    return min(len(ours), len(theirs)) if fits else None
  return 0 if ours.shape == theirs.shape else None


def _by_file_name(variables: Variables) -> dict[tuple[str, ...], tuple[int, ...]]:
  """{('body', '3', 'conv1', 'kernel'): shape}, of parameters and statistics together."""
  shapes = {}
  for (_, *path), leaf in flatten_dict(variables).items():
    if path[0] == "body":
      for i in range(leaf.shape[0]):
        shapes["body", str(i), *path[1:]] = tuple(leaf.shape[1:])
    else:
      shapes[tuple(path)] = tuple(leaf.shape)
  return shapes


def _beginnings(chosen: Mapping[tuple[str, ...], bool]) -> list[str]:
  """The shortest beginnings of paths of which all is chosen; equal blocks in a row as one."""
  found, blocks = [], {}
  for name, part in sorted(unflatten_dict(dict(chosen)).items()):
    if name == "body":
      blocks = {int(i): tuple(_whole(block)) for i, block in part.items()}
    else:
      found += [_joined(name, end) for end in _whole(part)]
  first = None
  for i in sorted(blocks):
    first = i if first is None else first
    if blocks.get(i + 1) != blocks[i]:
      span = f"body/{first}-{i}" if i > first else f"body/{i}"
      found += [_joined(span, end) for end in blocks[i]]
      first = None
  return found


def _whole(tree: Any) -> list[str]:
  """The beginnings within a part of the tree: [''] where all of it is chosen, [] for nothing."""
  if not isinstance(tree, Mapping):
    return [""] if tree else []
  parts = {name: _whole(part) for name, part in tree.items()}
  if all(ends == [""] for ends in parts.values()):
    return [""]
  return [_joined(name, end) for name, ends in parts.items() for end in ends]


def _joined(name: str, end: str) -> str:
  return f"{name}/{end}" if end else name
