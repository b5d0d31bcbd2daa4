"""Several runs of one recipe as one row, and the difference of two models with its uncertainty."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
import numpy as np

from sr_jax import UserError
from sr_jax.machine.writing import write_file
from sr_jax.metrics.table import SCORES

RESAMPLES = 10_000


def group_rows(
  results: Mapping[str, Mapping[str, Mapping[str, Any]]], groups: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, dict[str, tuple[float, float]]]]:
  """Takes runs together that differ in nothing but their seed.

  Args:
    results: {label: {set: what `scoring.evaluate_set` returned for this label}}.
    groups: {name of the group: labels}, at least two labels each.

  Returns:
    {group: {set: {score: (mean over the runs of the set's mean, standard deviation of a run, with
    n - 1)}}}.
  """
  rows: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
  for group, labels in groups.items():
    sets = results[labels[0]]
    rows[group] = {
      name: {
        key: (float(np.mean(values)), float(np.std(values, ddof=1)))
        for key in SCORES
        if all(key in results[label][name] for label in labels)
        and (values := [results[label][name][key] for label in labels])
      }
      for name in sets
    }
  return rows


def paired(
  a: Mapping[str, Mapping[str, float]], b: Mapping[str, Mapping[str, float]], *, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
  """Compares two models on the same images.

  Args:
    a: {image: scores} of one model.
    b: the same of the other.
    seed: of the resampling.

  Returns:
    {score: (mean of b - a over the images, and the ends of its 95 % interval)}. The interval is the
    percentile bootstrap's over images (Efron, 1979), 10,000 times: what the mean might be on other
    images of this kind. It says nothing of other seeds of the training.

  Raises:
    UserError: there are fewer than two images.
  """
  names = [name for name in a if name in b]
  if len(names) < 2:
    raise UserError(f"{len(names)} images have scores of both models; an interval needs 2 or more")
  found = {}
  for key in SCORES:
    both = [(a[n][key], b[n][key]) for n in names if key in a[n] and key in b[n]]
    differences = np.array([y - x for x, y in both if np.isfinite([x, y]).all()])
    if len(differences) < 2:
      continue
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.percentile(differences[drawn].mean(axis=1), [2.5, 97.5])
    found[key] = float(differences.mean()), float(low), float(high)
  return found


def members_of(entry: str) -> list[str]:
  """Returns what 'NAME=A,B,...' names: labels of models, or models."""
  return [part.strip() for part in entry.partition("=")[2].split(",") if part.strip()]


def parse_groups(
  entries: Sequence[str], labels: Sequence[str], specs: Mapping[str, str] | None = None
) -> dict[str, list[str]]:
  """Turns 'NAME=LABEL,LABEL,...' into groups.

  Args:
    entries: the texts.
    labels: of all models.
    specs: {model as the command line gives it: its label}, which may stand for the label.

  Raises:
    UserError: an entry has no name, fewer than two labels, or a label that no model has.
  """
  groups = {}
  for entry in entries:
    name = entry.partition("=")[0]
    members = [(specs or {}).get(member, member) for member in members_of(entry)]
    if not name or len(set(members)) < 2:
      raise UserError(f"--group={entry!r} must be NAME=LABEL,LABEL,... with two labels or more")
    if unknown := [member for member in members if member not in labels]:
      raise UserError(
        f"--group={entry!r}: no model is called {unknown[0]!r}; there are {', '.join(labels)}"
      )
    groups[name] = members
  return groups


def parse_pairs(entries: Sequence[str], labels: Sequence[str]) -> list[tuple[str, str]]:
  """Turns 'A,B' into pairs of labels.

  Raises:
    UserError: an entry does not have two labels of models.
  """
  pairs = []
  for entry in entries:
    a, _, b = entry.partition(",")
    if not {a, b} <= set(labels) or a == b:
      raise UserError(f"--paired={entry} must be two of the models' labels: {', '.join(labels)}")
    pairs.append((a, b))
  return pairs


def write(
  path: pathlib.Path,
  results: Mapping[str, Mapping[str, Mapping[str, Any]]],
  groups: Mapping[str, Sequence[str]],
  pairs: Sequence[tuple[str, str]],
) -> None:
  """Writes groups and differences as JSON, and prints them.

  Args:
    path: the file.
    results: {label: {set: what `scoring.evaluate_set` returned for this label}}.
    groups: what `parse_groups` returned.
    pairs: what `parse_pairs` returned.
  """
  grouped = group_rows(results, groups)
  differences: dict[str, dict[str, Any]] = {f"{b} - {a}": {} for a, b in pairs}
  for a, b in pairs:
    for name in results[a]:
      try:
        images = [results[label][name]["images"] for label in (a, b)]
        differences[f"{b} - {a}"][name] = paired(*images)
      except UserError as error:  # the other sets have theirs
        logging.warning("no difference %s - %s on %s: %s", b, a, name, error)
  told = {"groups": grouped, "differences": differences}
  write_file(path, json.dumps(told, indent=2) + "\n")
  print(f"\n{to_text(grouped, differences)}")


def to_text(
  groups: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]],
  differences: Mapping[str, Mapping[str, Mapping[str, tuple[float, float, float]]]],
) -> str:
  """Writes groups and differences for the screen.

  Args:
    groups: what `group_rows` returned.
    differences: {'B - A': {set: what `paired` returned}}.
  """
  lines = []
  for group, sets in groups.items():
    for name, scores in sets.items():
      cells = [f"{key} {m:.{SCORES[key].digits}f} +- {s:.{SCORES[key].digits}f}"
               for key, (m, s) in scores.items()]  # fmt: skip
      lines.append(f"{group}  {name}  " + "  ".join(cells))
  for pair, sets in differences.items():
    for name, scores in sets.items():
      cells = [
        f"{key} {m:+.{SCORES[key].digits}f} [{low:+.{SCORES[key].digits}f}, "
        f"{high:+.{SCORES[key].digits}f}]"
        for key, (m, low, high) in scores.items()
      ]
      lines.append(f"{pair}  {name}  " + "  ".join(cells))
  return "\n".join(lines)
