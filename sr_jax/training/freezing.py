"""Which of the generator's parameters a recipe freezes, by their paths.

A path is made of the names that BasicSR's files have, down to an array's, which is `kernel` or
`bias`: `conv_first/bias`, `body/3/rdb1/conv1`; Compact's are conv_first, prelu_first,
body/N/conv, body/N/prelu and conv_last. A pattern is the beginning of a path. Each part of it may
have the wildcards of file names (`*`, `conv_up*`), or be a range of numbers, both ends of which
count (`body/0-10`).
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
    frozen = [any(_begins(p, parts) for p in patterns) for parts in _in_files(path, leaf)]
    masks[path] = np.reshape(frozen, (len(frozen), *[1] * (len(leaf.shape) - 1)))
  return unflatten_dict(masks)


def _count(patterns: Sequence[str], variables: Any) -> int:
  """The number of parameters whose paths begin as one of the patterns."""
  masks, params = _masks(patterns, variables["params"]), dict(variables["params"])
  sizes = jax.tree.map(lambda mask, x: np.broadcast_to(mask, x.shape).sum(), masks, params)
  return int(sum(jax.tree.leaves(sizes)))


def _in_files(path: tuple[str, ...], leaf: Any) -> list[tuple[str, ...]]:
  """The paths that an array has in files: one for each block where it holds one for each."""
  if path[0] != "body":
    return [path]
  return [("body", str(block), *path[1:]) for block in range(leaf.shape[0])]


def _begins(pattern: str, path: Sequence[str]) -> bool:
  parts = pattern.strip("/").split("/")
  return len(parts) <= len(path) and all(map(_matches, parts, path))


def _matches(part: str, name: str) -> bool:
  span = re.fullmatch(r"(\d{1,6})-(\d{1,6})", part)
  if span and name.isdigit():
    return int(span[1]) <= int(name) <= int(span[2])
  return fnmatch.fnmatchcase(name, part)


def _refuse(pattern: str, patterns: Sequence[str], variables: Any) -> None:
  """Raises the error of a pattern that begins no path: with the names that stand in its place."""
  arrays = flatten_dict(dict(variables["params"])).items()
  paths = [parts for path, leaf in arrays for parts in _in_files(path, leaf)]
  parts = pattern.strip("/").replace(".", "/").split("/")
  found, names = _longest_beginning(parts, paths)
  close = _close(parts[len(found)], names) if len(found) < len(parts) and names else ""
  # The rest of the pattern may be right, or what stands before it be too much ('params').
  tries = ([*found, close, *parts[len(found) + 1 :]], [*found, close], parts[1:], found)
  others = tuple(p for p in patterns if p != pattern)
  total = _count(("*",), variables)
  for spelt in ("/".join(filter(None, words)) for words in tries):
    if spelt and _count((spelt,), variables) and _count((*others, spelt), variables) < total:
      others += (spelt,)
      break
  if not found:
    told_names = f"the paths begin with {_listed(names)}"
  else:
    told_names = f"below {'/'.join(found)} there {f'are {_listed(names)}' if names else 'is none'}"
  raise UserError(
    f"{told('freeze', tuple(patterns))}: {pattern!r} must be the beginning of a parameter's path; "
    f"{told_names}; try {setting('freeze', others)}"
  )


def _longest_beginning(
  parts: Sequence[str], paths: Sequence[tuple[str, ...]]
) -> tuple[list[str], list[str]]:
  """The parts of a pattern that begin a path, and the names that paths go on with after them."""
  found = []
  for i, part in enumerate(parts):
    fitting = [path for path in paths if len(path) > i and _matches(part, path[i])]
    if not fitting:
      break
    found, paths = [*found, part], fitting
  return found, sorted({path[len(found)] for path in paths if len(path) > len(found)})


def _close(part: str, names: Sequence[str]) -> str:
  """The name that a misspelt part of a pattern may mean; '' if none does."""
  if all(name.isdigit() for name in names):
    numbers = sorted(min(int(n), max(map(int, names))) for n in re.findall(r"\d{1,6}", part)[:2])
    return "-".join(map(str, dict.fromkeys(numbers)))
  if part == "weight" and "kernel" in names:  # PyTorch's name of it
    return "kernel"
  return next(iter(difflib.get_close_matches(part, names, n=1)), "")


def _listed(names: Sequence[str]) -> str:
  """Names for people; those that are numbers as a range."""
  numbers = sorted(int(name) for name in names if name.isdigit())
  rest = [name for name in names if not name.isdigit()]
  return ", ".join([*rest, *([f"{numbers[0]}-{numbers[-1]}"] if numbers else [])])
