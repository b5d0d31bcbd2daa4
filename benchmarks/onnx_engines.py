"""Runs RRDBNet in ONNX Runtime or OpenVINO on a CPU, for rows of benchmarks/infer.py.

The graph is sr_jax's own export of random weights. ONNX Runtime computes in float32, OpenVINO also
in bfloat16 if it is told to.
"""

import resource
import time
from typing import Any

import jax
import numpy as np

from benchmarks import jax_esrgan
from benchmarks import side_by_side
from sr_jax.formats import onnx_export
from sr_jax.networks.build import build_generator


def prepare(row: dict[str, Any], case: dict[str, Any]) -> side_by_side.Prepared:
  """Makes a case ready to be timed; see `side_by_side`."""
  kwargs = case["networks"]["generator"]
  generator = build_generator("rrdbnet", kwargs)
  lr = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
  shapes = jax.eval_shape(lambda lr: generator.init(jax.random.key(0), lr, train=False), lr)
  variables = {"batch_stats": {}, **jax_esrgan.draw(shapes)}
  graph = onnx_export.to_onnx("rrdbnet", kwargs, variables).SerializeToString()
  shape = (case["batch_size"], 3, case["size"], case["size"])
  lr = np.random.default_rng(0).random(shape, np.float32)

  begin = time.perf_counter()
  if row["framework"] == "onnxruntime":
    import onnxruntime

    version = onnxruntime.__version__
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])

    def upscale() -> np.ndarray:
      return session.run(None, {"input": lr})[0]

  else:
    import openvino

    version = openvino.__version__
    precision = {"float32": "f32", "bfloat16": "bf16"}[row["dtype"]]
    model = openvino.Core().read_model(graph)
    model.reshape(list(shape))
    request = openvino.compile_model(
      model, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    ).create_infer_request()

    def upscale() -> np.ndarray:
      return request.infer({0: lr}, share_inputs=True, share_outputs=True)[0]

  compile_s = time.perf_counter() - begin

  def run(count: int) -> float:
    for _ in range(count):
      sr = upscale()
    return float(sr[0, 0, 0, 0])

  facts = {
    "platform": "cpu",
    "device": "cpu",
    "version": version,
    "compile_s": compile_s,
    "parameters": {"generator": sum(x.size for x in jax.tree.leaves(variables))},
  }
  return side_by_side.Prepared(
    run, lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, facts
  )
