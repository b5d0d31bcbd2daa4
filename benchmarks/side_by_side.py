"""Times several programs of one case in turns, each in a process of its own that stays alive.

JAX and PyTorch do not share a card's memory well within a process, and a machine's clock drifts. So
each row of a table is a worker, `python -m benchmarks.side_by_side`, that makes the case ready and
then waits. It times one round when it is told to, while no other worker works, so that a round of
one row is next in time to the same round of the others.

A worker reads requests, one on each line, and answers in lines, all of them JSON. Its row is on the
first line, before all requests. {"case": ...} makes a case ready and is answered with facts;
{"round": true} times a round. If a request cannot be carried out, the answer is {"error": why}.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sr_jax.machine import cpus

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Who makes a row's case ready: the module's `prepare(row, case)`.
MODULES = {
  "jax": "benchmarks.jax_esrgan",
  "torch": "benchmarks.torch_esrgan",
  "onnxruntime": "benchmarks.onnx_engines",
  "openvino": "benchmarks.onnx_engines",
}

# The modes of torch_esrgan.py and what they compute in; here since torch may not be there.
TORCH_DTYPES = {
  "basicsr": "float32",
  "channels_last": "float32",
  "amp": "bfloat16",
  "compile": "bfloat16",
  "compile-max": "bfloat16",
}


class Prepared(NamedTuple):
  """A case made ready in a worker.

  Attributes:
    run: a function that does so many steps, waits for the last one and returns a number, which must
      be finite.
    peak_bytes: a function that returns the largest memory so far, of the device, or of the process
      on a CPU.
    facts: JSON values for the row.
    matmul: a function that measures the operations per second of a large matrix product, or None.
  """

  run: Callable[[int], float]
  peak_bytes: Callable[[], int]
  facts: dict[str, Any]
  matmul: Callable[[], float] | None = None


def has(module: str) -> bool:
  return importlib.util.find_spec(module) is not None


# In the worker.


def serve() -> None:
  """Answers requests until there are no more, which is also so if the asking program has died."""
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # what libraries print is no answer
  row = json.loads(sys.stdin.readline())
  prepared, steps = None, 1
  for line in sys.stdin:
    request = json.loads(line)
    try:
      if "case" in request:
        prepared = None  # before the next, which may need all of the memory
        gc.collect()
        prepared = importlib.import_module(MODULES[row["framework"]]).prepare(row, request["case"])
        steps = 0 if request.get("once") else warm_up(prepared.run, request["seconds"])
        answer = {**prepared.facts, "steps_a_round": steps, "peak_bytes": prepared.peak_bytes()}
      else:
        seconds, cpu_seconds = time_steps(prepared.run, steps)
        answer = {"seconds": seconds, "cpu_seconds": cpu_seconds}
        if prepared.matmul and request["matmul"]:
          answer["matmul_flops"] = prepared.matmul()
    except Exception as error:  # the table shows it: out of memory, a network that is too large
      answer = {
        "error": f"{type(error).__name__}: {str(error).strip() or '?'}".splitlines()[0][:300]
      }
    print(json.dumps(answer), file=answers, flush=True)


def time_steps(run: Callable[[int], float], steps: int) -> tuple[float, float]:
  """Measures the seconds for each step, of the clock and of CPU time."""
  begin, cpu = time.perf_counter(), time.process_time()
  value = run(steps)
  seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
  if not math.isfinite(value):
    raise FloatingPointError(f"the result is {value}: its time means nothing")
  return seconds / steps, cpu_seconds / steps


def warm_up(run: Callable[[int], float], seconds: float) -> int:
  """Runs until everything is compiled; returns how many steps make a round of `seconds`."""
  once, _ = time_steps(run, 1)
  if once < 0.5:  # CUDA graphs are recorded in the second and third call
    time_steps(run, 5)
    once, _ = time_steps(run, 3)
  return max(1, min(1000, round(seconds / once)))


# In the program.


class Worker:
  """The process that measures a row."""

  def __init__(self, row: Mapping[str, Any], environment: Mapping[str, str] | None = None):
    self._log = tempfile.TemporaryFile("w+")
    # The card is shared by living workers: JAX must not take three quarters of it at its start.
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **row.get("environment", {})}
    env |= environment or {}
    self.process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.side_by_side"],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT, env=env,
    )  # fmt: skip
    self._send(row)

  def _send(self, message: Mapping[str, Any]) -> None:
    try:
      self.process.stdin.write(json.dumps(message) + "\n")
      self.process.stdin.flush()
    except BrokenPipeError:
      pass  # it died; `ask` says how

  def ask(self, **request: Any) -> dict[str, Any]:
    """Sends a request and waits for the answer."""
    self._send(request)
    line = self.process.stdout.readline()
    if line:
      return json.loads(line)
    status = self.process.wait()
    self._log.seek(0)
    last = (self._log.read().strip().splitlines() or ["it said nothing"])[-1]
    return {"error": f"its process ended with status {status}: {last[:300]}"}

  def close(self) -> None:
    try:
      self.process.stdin.close()
      self.process.wait(timeout=30)
    except BrokenPipeError:
      self.process.wait()
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
    self.process.stdout.close()
    self._log.close()


def measure(
  rows: Sequence[Mapping[str, Any]],
  case: Mapping[str, Any],
  *,
  rounds: int,
  seconds: float,
  cold_start: bool = False,
) -> list[dict[str, Any]]:
  """Times rows of a case in turns.

  Args:
    rows: JSON values for the workers, with 'name' and 'framework'. JAX's rows come first, and the
      others must be on the same platform.
    case: JSON values for the workers.
    rounds: the number of rounds.
    seconds: how long a round of each row should take, about.
    cold_start: whether JAX's rows get an empty folder for compiled programs and, if programs are
      'kept', a second process that compiles from it: 'compile_s' and 'cached_compile_s'.

  Returns:
    The rows with what was measured: 'seconds' and 'cpu_seconds' for each step and, for JAX,
    'matmul_flops' per second, each as the median, and with '_of_rounds' in the name as a list; and
    the worker's facts. A row that could not be measured has the 'reason' instead.
  """
  results = [dict(row) for row in rows]
  workers: dict[int, Worker] = {}
  with tempfile.TemporaryDirectory(prefix="sr_jax_programs_") as programs:
    try:
      for i, result in enumerate(results):
        reason = _why_not(result, results[:i])
        if reason:
          result["reason"] = reason
          continue
        environment = {}
        if cold_start and result["framework"] == "jax":
          environment = _program_cache(f"{programs}/{i}")
        print(f"  {result['name']} ...", file=sys.stderr, flush=True)
        workers[i] = Worker(result, environment)
        answer = workers[i].ask(case=case, seconds=seconds)
        if environment and answer.get("kept"):
          again = Worker(result, environment)
          answer["cached_compile_s"] = again.ask(case=case, once=True).get("compile_s")
          again.close()
        reason = answer.get("error") or _why_not({**result, **answer}, results[:i])
        if reason:
          result["reason"] = reason
          workers.pop(i).close()
        else:
          result.update(answer)
      for turn in range(rounds):
        for i in list(workers)[:: -1 if turn % 2 else 1]:
          answer = workers[i].ask(round=True, matmul=True)
          if "error" in answer:
            results[i]["reason"] = answer["error"]
            workers.pop(i).close()
            continue
          for key, value in answer.items():
            results[i].setdefault(f"{key}_of_rounds", []).append(value)
    finally:
      for worker in workers.values():
        worker.close()
  for result in results:
    for key in ("seconds", "cpu_seconds", "matmul_flops"):
      if "reason" not in result and f"{key}_of_rounds" in result:
        result[key] = statistics.median(result[f"{key}_of_rounds"])
  return results


def _why_not(row: Mapping[str, Any], before: Iterable[Mapping[str, Any]]) -> str:
  """Says why a row cannot be compared with those before it; '' if it can."""
  if not has(row["framework"]):
    return f"no {row['framework']} is installed"
  ours = next((r for r in before if r["framework"] == "jax" and "platform" in r), None)
  if ours is None:
    return ""
  if row["framework"] in ("onnxruntime", "openvino") and ours["platform"] != "cpu":
    return "measured on a CPU only"
  if row.get("platform", ours["platform"]) != ours["platform"]:
    return f"it runs on {row['platform']}, sr_jax on {ours['platform']}"
  if row.get("parameters", ours["parameters"]) != ours["parameters"]:
    return f"another network: {row['parameters']} parameters, sr_jax's {ours['parameters']}"
  return ""


def _program_cache(folder: str) -> dict[str, str]:
  return {
    "JAX_COMPILATION_CACHE_DIR": folder,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def add_summary(results: Sequence[dict[str, Any]], batch_size: int, flops: int) -> None:
  """Adds what follows from the times to the rows that `measure` could measure.

  This is 'images_per_second'; 'ratios', how many times as fast as each row that is not JAX's;
  'tflops' per second; and 'matmul_share', the share of the rate that JAX's matmul had in the row's
  dtype, None if no rate was measured.

  Args:
    results: the rows that `measure` returned.
    batch_size: the images of a step.
    flops: the operations of a step.
  """
  measured = [row for row in results if "reason" not in row]
  others = {row["name"]: row["seconds"] for row in measured if row["framework"] != "jax"}
  matmuls: dict[str, list[float]] = {}
  for row in measured:
    if "matmul_flops" in row:
      matmuls.setdefault(row["dtype"], []).append(row["matmul_flops"])
  for row in measured:
    seconds, matmul = row["seconds"], matmuls.get(row["dtype"])
    row["images_per_second"] = batch_size / seconds
    row["ratios"] = {name: other / seconds for name, other in others.items()}
    row["tflops"] = flops / seconds / 1e12
    row["matmul_share"] = flops / seconds / statistics.median(matmul) if matmul else None


def check_measured(cases: Iterable[Mapping[str, Any]]) -> None:
  """Raises ValueError if no row of any case was measured."""
  if all("reason" in row for case in cases for row in case["rows"]):
    raise ValueError("nothing was measured; the reasons are above")


def print_table(
  results: Iterable[Mapping[str, Any]], columns: Mapping[str, Callable[[Mapping[str, Any]], str]]
) -> None:
  """Prints the measured rows by columns {head: cell of a row}, then why others were not."""
  results = list(results)
  measured = [row for row in results if "reason" not in row]
  width = max(len(row["name"]) for row in results)
  print(" " * width + "  " + "  ".join(f"{head:>10}" for head in columns))
  for row in measured:
    cells = [f"{cell(row):>{max(10, len(head))}}" for head, cell in columns.items()]
    print(f"{row['name']:{width}}  " + "  ".join(cells))
  for row in results:
    if "reason" in row:
      print(f"not measured: {row['name']}: {row['reason']}")
  print(flush=True)


def number(value: float | None, digits: int = 3) -> str:
  """Formats a cell with so many significant digits; '-' for a value that is not there."""
  if value is None:
    return "-"
  rounded = float(f"{value:.{digits}g}")
  return (
    f"{rounded:,.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}" if value else "0"
  )


def columns(results: Iterable[Mapping[str, Any]]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
  """Returns the columns that both benchmarks print, for `print_table`."""
  others = [row["name"] for row in results if row["framework"] != "jax" and "reason" not in row]
  return {
    "ms": lambda row: number(1000 * row["seconds"]),
    "CPU ms": lambda row: number(1000 * row["cpu_seconds"]),
    "images/s": lambda row: number(row["images_per_second"]),
    **{f"x {name}": lambda row, name=name: number(row["ratios"][name]) for name in others},
    "TFLOP/s": lambda row: number(row["tflops"]),
    "of matmul": lambda row: "-" if row["matmul_share"] is None else f"{row['matmul_share']:.0%}",
    "peak GB": lambda row: number(row["peak_bytes"] / 1e9),
    "program GB": lambda row: number(
      row["program_bytes"] / 1e9 if "program_bytes" in row else None
    ),
    "compile s": lambda row: number(row["compile_s"]),
  }


def add_arguments(parser: argparse.ArgumentParser, *, seconds: float) -> None:
  """Adds the arguments that all benchmarks have which measure rows in turns."""
  parser.add_argument("--dtype", default="float32,bfloat16", help="of sr_jax's convolutions")
  parser.add_argument("--torch", help="modes of torch_esrgan.py, or none; default: the device's")
  parser.add_argument(
    "--generator", action="append", metavar="FIELD=VALUE,...",
    help="fields of RRDBNet over 64, 23, 32; given twice, two ways side by side",
  )  # fmt: skip
  parser.add_argument(
    "--environment", action="append", default=[], metavar="NAME=VALUE",
    help="sr_jax's rows once more with it, as XLA_FLAGS=... or GLIBC_TUNABLES=...",
  )  # fmt: skip
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--seconds", type=float, default=seconds, help="a row and round, one step at least"
  )


def parse_generators(texts: Sequence[str], default: Mapping[str, int]) -> list[dict[str, Any]]:
  """Parses each 'field=value,field=value' over the default; values are numbers, true, false, text.

  Raises:
    ValueError: the text has another form, or a field that the other side lacks, or several texts
      are of different networks.
  """
  parsed = []
  for text in texts or [""]:
    fields = dict(default)
    for pair in filter(None, text.split(",")):
      field, equals, value = pair.partition("=")
      if not equals or field in ("scale", "out_channels", "input_unshuffle", "dtype"):
        raise ValueError(
          f"--generator={text}: {pair!r} must be FIELD=VALUE of RRDBNet, x4 of RGB; the dtype is "
          "--dtype's; try --generator=blocks=6"
        )
      try:
        fields[field] = json.loads(value)
      except json.JSONDecodeError:
        fields[field] = value
    parsed.append(fields)
  if any(generator[key] != parsed[0][key] for generator in parsed for key in default):
    raise ValueError(
      f"--generator={' and '.join(texts)} must agree in {', '.join(default)}: one table times one "
      "network; run once for each"
    )
  return parsed


def jax_rows(
  dtypes: Sequence[str],
  generators: Sequence[dict[str, Any]],
  default: Mapping[str, int],
  environments: Sequence[str] = (),
) -> list[dict]:
  """Makes a row for each dtype and way to compute the generator, as it is and in each environment.

  Raises:
    ValueError: an environment is not of the form NAME=VALUE.
  """
  rows = []
  for dtype in dtypes:
    for generator in generators:
      how = {key: value for key, value in generator.items() if key not in default}
      words = ["sr_jax", dtype, *(f"{key}={value}" for key, value in how.items())]
      for text in ("", *environments):
        name, equals, value = text.partition("=")
        if text and not (name and equals):
          raise ValueError(
            f"--environment={text} must be NAME=VALUE; try "
            "--environment=XLA_FLAGS=--xla_gpu_graph_min_graph_size=1"
          )
        row = {"framework": "jax", "dtype": dtype, "generator": how}
        row |= {"environment": {name: value}} if text else {}
        rows.append({"name": " ".join([*words, *filter(None, [text])]), **row})
  return rows


def torch_rows(text: str | None, quick: bool) -> list[dict[str, str]]:
  """Makes a row for each mode of --torch; for None, for the modes that suit the device."""
  if text == "none":
    return []
  modes = choose("--torch", text, TORCH_DTYPES) if text else _default_modes(quick)
  return [
    {"name": mode, "framework": "torch", "mode": mode, "dtype": TORCH_DTYPES[mode]}
    for mode in modes
  ]


def _default_modes(quick: bool) -> list[str]:
  """Asks for CUDA in a process of its own, so that this one holds nothing of a card."""
  if quick:
    return ["basicsr"]
  question = "import torch, sys; sys.exit(not torch.cuda.is_available())"
  if has("torch") and not subprocess.run([sys.executable, "-c", question]).returncode:
    return ["basicsr", "amp", "compile"]
  return ["basicsr", "channels_last", "amp"]


def choose(flag: str, text: str, known: Iterable[str]) -> list[str]:
  """Splits 'a,b' into known names."""
  chosen = text.split(",")
  for name in chosen:
    if name not in known:
      raise ValueError(f"{flag}={text}: {name!r} must be one of {', '.join(known)}")
  return chosen


def positive(flag: str, text: str) -> list[int]:
  """Splits '1,2' into numbers from 1 on."""
  try:
    numbers = [int(word) for word in text.split(",")]
  except ValueError:
    numbers = [0]
  if min(numbers) < 1:
    raise ValueError(f"{flag}={text} must be numbers from 1 on; try {flag}=1,16")
  return numbers


def machine() -> dict[str, Any]:
  """Describes the machine that the numbers are measured on."""
  load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
  return {"cpu": cpus.kind(), "cores": os.cpu_count(), "load": load}


def write_json(path: str, content: Mapping[str, Any]) -> None:
  file = pathlib.Path(path)
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(content, indent=2) + "\n")
  print(f"written: {file}")


if __name__ == "__main__":
  serve()
