"""Times upscaling on the CPU: by the function that the program calls, and by the engines alone.

python -m benchmarks.engines --model FILE --sides 64,128 --rounds 7

Each round calls everything once, in another order, so that other work on the machine slows all of
them alike; the ratios are medians of each round's ratios. CPU seconds are those of all threads.
They are the better measure on a machine that does other work too, where threads wait for one
another.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from sr_jax import cli
from sr_jax.models.read import read_model
from sr_jax.networks.build import build_generator
from sr_jax.upscaling import engines
from sr_jax.upscaling import upscaler


def bare_openvino(contents: bytes) -> Callable[[np.ndarray], np.ndarray]:
  """Opens OpenVINO as its guide does, but in float32; its default is bfloat16 if the CPU has it."""
  sys.modules.setdefault("openvino_telemetry", None)  # as upscaling/engines.py does: no messages
  import openvino

  core = openvino.Core()
  settings = {"INFERENCE_PRECISION_HINT": "f32"}
  compiled = core.compile_model(core.read_model(contents), "CPU", settings)
  return lambda lr: compiled(lr)[0]


def bare_onnxruntime(contents: bytes) -> Callable[[np.ndarray], np.ndarray]:
  import onnxruntime

  session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
  return lambda lr: session.run(None, {"input": lr})[0]


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
  parser.add_argument("--model", required=True, help="a run or a model file, in colour")
  parser.add_argument("--sides", default="64,128", help="of the LR images, in pixels")
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument("--engines", default="openvino,onnxruntime,jax", help="of its CHOICES")
  args = parser.parse_args(argv)
  model = read_model(args.model)
  module = build_generator(model.name, model.kwargs)
  contents = engines.export(model)
  bare = {"bare OpenVINO": bare_openvino(contents), "bare ONNX Runtime": bare_onnxruntime(contents)}
  ours = {}
  for choice in args.engines.split(","):
    start = time.perf_counter()
    engine = engines.open_engine(model, choice)
    print(f"{engine.name} opened in {time.perf_counter() - start:.1f} s")
    ours[f"--engine={choice}"] = upscaler.make_upscaler(module, model.variables, engine.run)
  for side in map(int, args.sides.split(",")):
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    lr = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / 255
    calls = {name: (call, lr) for name, call in bare.items()}
    calls |= {name: (call, image) for name, call in ours.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for i in range(args.rounds + 1):  # the first one warms up
      for name in random.sample(list(calls), len(calls)):
        call, argument = calls[name]
        start = time.perf_counter(), time.process_time()
        call(argument)
        if i:
          seconds[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    best = min(bare, key=lambda name: np.median(seconds[name], axis=0)[0])
    for name, times in seconds.items():
      wall, cpu = np.median(times, axis=0)
      wall_ratio, cpu_ratio = np.median(np.array(times) / np.array(seconds[best]), axis=0)
      print(
        f"LR {side}x{side}  {name:22} {wall:6.2f} s, {wall_ratio:.2f} of {best}; "
        f"{cpu:6.2f} CPU s, {cpu_ratio:.2f}; fastest {np.min(times, axis=0)[0]:.2f} s",
        flush=True,
      )


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
