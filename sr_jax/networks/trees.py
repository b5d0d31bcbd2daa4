"""Trees of arrays: where two differ, what is not finite, and a digest that identifies one."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sr_jax import UserError

Variables = dict[str, Any]


def digest(variables: Variables) -> str:
  """Returns 16 hex digits that identify a tree of arrays: names, shapes and float32 values."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    leaf = np.ascontiguousarray(leaf, np.float32)
    sha.update(f"{jax.tree_util.keystr(path, simple=True, separator='/')}{leaf.shape}".encode())
    sha.update(leaf)
  return sha.hexdigest()[:16]


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  """Returns {path: shape} of a tree of arrays."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def first_difference(
  one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
  """Compares what two networks have at each path, their shapes for example.

  Returns:
    The first path, in sorted order, where they differ, and what each of them has there ('absent'
    for nothing); None if they are equal.
  """
  for path in sorted(one.keys() | other.keys()):
    ours, theirs = one.get(path, "absent"), other.get(path, "absent")
    if ours != theirs:
      return path, ours, theirs
  return None


def check_same_shapes(trees: Mapping[str, Any]) -> None:
  """Checks that two trees of arrays have the same shapes; `jax.tree.map` would broadcast silently.

  Args:
    trees: {what the error calls the tree: tree}, for two trees.

  Raises:
    UserError: the shapes differ; the error names the first path where they do, with both shapes.
  """
  one, other = trees
  if difference := first_difference(shapes(trees[one]), shapes(trees[other])):
    path, ours, theirs = difference
    raise UserError(
      f"{one} and {other} are different networks: {path} is {ours} in {one} and {theirs} in {other}"
    )


def not_finite(tree: Any) -> dict[str, tuple[int, int]]:
  """Finds NaN and Inf in arrays of numpy or JAX; of a replicated one this process's first copy.

  Returns:
    {path: (values that are not finite, all values)} of the arrays that have any.
  """
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.asarray(leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf)
    if lost := array.size - int(np.count_nonzero(np.isfinite(array))):
      found[jax.tree_util.keystr(path, simple=True, separator="/")] = lost, array.size
  return found


def check_finite(what: str, tree: Any, remedy: str) -> None:
  """Checks that there is no NaN and no Inf in a tree of arrays.

  Args:
    what: what the error calls the tree.
    tree: arrays of numpy or JAX.
    remedy: the end of the error.

  Raises:
    UserError: there is; the error names the first array.
  """
  if found := not_finite(tree):
    path, (lost, size) = next(iter(found.items()))
    others = f" (and {len(found) - 1} more arrays)" if len(found) > 1 else ""
    raise UserError(
      f"{what}: {path}{others} must be finite, and {lost:,} of its {size:,} values are NaN or Inf; "
      f"{remedy}"
    )
