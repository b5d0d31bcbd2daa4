"""Lets all processes of a run meet, to exchange values and to compare what must be equal."""

import itertools
import json
import time
from collections.abc import Mapping
from typing import Any

import jax

from sr_jax import UserError

TIMEOUT_SECONDS = 300


def meet(name: str, value: Any, *, seconds: int = TIMEOUT_SECONDS) -> list[Any]:
  """Exchanges a value with all processes.

  Args:
    name: what the error calls the meeting if a process does not come.
    value: a JSON value.
    seconds: how long to wait for the others.

  Returns:
    The values of all processes, in the order of their indices.

  Raises:
    TimeoutError: not all processes came; the error names those that did not.
  """
  return exchange(f"sr_jax/{next(_meetings)}/{name}", value, seconds)


def exchange(place: str, value: Any, seconds: int) -> list[Any]:
  """Does the same as `meet`, at a place that all processes name alike; a name can be used once."""
  client, index, count = group()
  if count == 1:
    return [json.loads(json.dumps(value))]
  client.key_value_set(f"{place}/{index}", json.dumps(value))
  try:
    client.wait_at_barrier(place, seconds * 1000)
  except jax.errors.JaxRuntimeError as error:  # DEADLINE_EXCEEDED, or a process died
    came = {int(key.rsplit("/", 1)[1]) for key, _ in client.key_value_dir_get(f"{place}/")}
    missing = ", ".join(str(i) for i in range(count) if i not in came) or "none"
    raise TimeoutError(
      f"{place.rpartition('/')[2]}: {len(came)} of {count} processes after {seconds} s; missing: "
      f"process {missing}. Is that host up, and was the same command started on it? "
      f"({str(error).splitlines()[0]})"
    ) from error
  texts = {int(key.rsplit("/", 1)[1]): text for key, text in client.key_value_dir_get(f"{place}/")}
  return [json.loads(texts[index]) for index in range(count)]


_meetings = itertools.count()  # all processes meet in the same order


def check_same(name: str, facts: Mapping[str, Any], *, seconds: int = TIMEOUT_SECONDS) -> None:
  """Compares facts over all processes.

  Args:
    name: what errors call the meeting.
    facts: {fact: JSON value}.
    seconds: how long to wait for the others.

  Raises:
    UserError: facts differ; the error lists each of them, with the values and the processes that
      have them.
    TimeoutError: not all processes came; the error names those that did not.
  """
  everyone = meet(name, dict(facts), seconds=seconds)
  problems = []
  for what in dict.fromkeys(key for theirs in everyone for key in theirs):
    holders: dict[str, list[int]] = {}
    for index, theirs in enumerate(everyone):
      holders.setdefault(json.dumps(theirs.get(what, "absent"), sort_keys=True), []).append(index)
    if len(holders) > 1:
      values = "; ".join(
        f"{text} on process {', '.join(map(str, who[:8]))}{' ...' if who[8:] else ''}"
        for text, who in holders.items()
      )
      problems.append(f"  {what}: {values}")
  if problems:
    let_others_leave(f"sr_jax/{next(_meetings)}/after {name}")
    raise UserError(
      f"the processes of this run differ ({name}); make them equal:\n" + "\n".join(problems)
    )


def let_others_leave(place: str) -> None:
  """Lets the other processes end before process 0; all of them must call it.

  Process 0 runs the coordination service, and JAX aborts every process that loses it.
  """
  exchange(place, None, 30)
  if group()[2] > 1 and group()[1] == 0:
    time.sleep(2)


def group() -> tuple[Any, int, int]:
  """Returns JAX's coordination client, this process's index, and the number of processes.

  For a single process that is (None, 0, 1). Unlike jax.process_count this starts no backend, and
  JAX offers no public way to the client.
  """
  from jax._src import distributed

  state = distributed.global_state
  return state.client, state.process_id or 0, state.num_processes or 1


# How much longer one process may take than another to decode or score images.
SLOWER_SECONDS = 3600
