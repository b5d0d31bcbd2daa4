"""Which of the generator's parameters a recipe freezes, by their paths.

A path is made of the names that the parameters have in files: `conv_first`, `body/3/rdb1/conv1`. A
pattern is the beginning of a path. Each part of it may have the wildcards of file names (`*`,
`conv_up*`), or be a range of numbers, both ends of which count (`body/0-10`).
"""

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sr_jax import UserError
from sr_jax.training.fields import setting, told


def frozen_masks(patterns: Sequence[str], variables: Any) -> dict[str, Any]:
  """Says which arrays are frozen, or which blocks of an array that holds one for each block.

  Args:
    patterns: of `config.freeze`.
    variables: {'params', 'batch_stats'} of the generator, or their shapes.

  Returns:
    The same tree of bool arrays, which have as many axes as the variables and broadcast with them.

  Raises:
    UserError: a pattern is the beginning of no path, or all parameters are frozen.
  """
  for pattern in patterns:
    if not _count((pattern,), variables):
      _refuse(pattern, patterns, variables)
  masks = {kind: _masks(patterns, tree) for kind, tree in variables.items()}
  if all(mask.all() for mask in jax.tree.leaves(masks["params"])):
    raise UserError(
      f"{told('freeze', tuple(patterns))} freezes all of the generator's parameters: there is "
      f"nothing to train; try {setting('freeze', ())}"
    )
  return masks


def describe(patterns: Sequence[str], variables: Any) -> list[str]:
  """Returns a line for each pattern, with the number of parameters that it freezes, and a sum."""
  total = _count(("*",), variables)
  return [
    *(f"frozen: {pattern}, {_count((pattern,), variables):,} parameters" for pattern in patterns),
    f"{_count(patterns, variables):,} of the generator's {total:,} parameters are frozen",
  ]


def _masks(patterns: Sequence[str], tree: Any) -> Any:
  masks = {}
  for path, leaf in flatten_dict(dict(tree)).items():
    blocks = leaf.shape[0] if path[0] == "body" else 1
    frozen = [any(_begins(p, _in_file(path, i)) for p in patterns) for i in range(blocks)]
    masks[path] = np.reshape(frozen, (blocks, *[1] * (len(leaf.shape) - 1)))
  return unflatten_dict(masks)


def _count(patterns: Sequence[str], variables: Any) -> int:
  """The number of parameters whose paths begin as one of the patterns."""
  masks, params = _masks(patterns, variables["params"]), dict(variables["params"])
  sizes = jax.tree.map(lambda mask, x: np.broadcast_to(mask, x.shape).sum(), masks, params)
  return int(sum(jax.tree.leaves(sizes)))


def _in_file(path: tuple[str, ...], block: int) -> tuple[str, ...]:
  """('body', 'conv1', 'kernel'), 3 -> ('body', '3', 'conv1', 'kernel')."""
  return ("body", str(block), *path[1:]) if path[0] == "body" else path


def _begins(pattern: str, path: Sequence[str]) -> bool:
  parts = pattern.strip("/").split("/")
  return len(parts) <= len(path) and all(map(_matches, parts, path))


def _matches(part: str, name: str) -> bool:
  span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", part)
  if span and name.isdigit():
    return int(span[1]) <= int(name) <= int(span[2])
  return fnmatch.fnmatchcase(name, part)


def _refuse(pattern: str, patterns: Sequence[str], variables: Any) -> None:
  params = variables["params"]
  names = [name for name in params if name != "body"]
  if "body" in params:
    names.append(f"body/0-{jax.tree.leaves(params['body'])[0].shape[0] - 1}")
  close = difflib.get_close_matches(pattern, names, n=1)
  others = tuple(p for p in patterns if p != pattern)
  raise UserError(
    f"{told('freeze', tuple(patterns))}: {pattern!r} must be the beginning of a parameter's path; "
    f"the paths begin with {', '.join(names)}; try {setting('freeze', (*others, *close))}"
  )
