"""Tests of sr_jax/formats/onnx_export.py: ONNX Runtime computes what the networks compute."""

import importlib
import sys

import jax
import numpy as np
import pytest

from tiny_models import make_model

from sr_jax.formats.onnx_export import to_onnx
from sr_jax.formats import state_dicts
from sr_jax.networks.build import GENERATORS

onnx = pytest.importorskip("onnx", reason="ONNX export is an extra: pip install onnx")

# The operations that converters to ncnn and TensorRT are known to have.
ALLOWED = {"Conv", "LeakyRelu", "PRelu", "Concat", "Add", "Mul", "Resize", "DepthToSpace"}

# Between them every field, each scale with each way of upsampling, colour and grey.
CASES = [
  ("srresnet", {}),
  ("srresnet", {"scale": 3, "prelu_per_channel": True}),
  ("srresnet", {"scale": 2, "final_activation": "tanh", "out_channels": 1}),
  ("srresnet", {"scale": 8, "blocks": 1}),
  ("srresnet", {"scale": 1}),
  ("msrresnet", {}),
  ("msrresnet", {"scale": 3}),
  ("msrresnet", {"scale": 2, "out_channels": 1}),
  ("msrresnet", {"scale": 8, "blocks": 1}),
  ("msrresnet", {"scale": 1}),
  ("rrdbnet", {}),
  ("rrdbnet", {"scale": 3, "residual_scale": 0.5}),
  ("rrdbnet", {"scale": 2, "input_unshuffle": 2}),
  ("rrdbnet", {"scale": 1, "input_unshuffle": 4, "out_channels": 1}),
  ("rrdbnet", {"scale": 8, "blocks": 1}),
  ("residualnet", {}),
  ("residualnet", {"scale": 3, "residual_scale": 0.3}),
  ("residualnet", {"scale": 1, "out_channels": 1}),
  ("compact", {}),
  ("compact", {"scale": 3, "out_channels": 1}),
  ("compact", {"scale": 1}),
]
BY_NAME = [case for i, case in enumerate(CASES) if case[0] not in {c[0] for c in CASES[:i]}]


def run(model, lr):
  """What ONNX Runtime makes of lr [N, h, w, c], in float32 and channels last too."""
  runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
  session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
  dtype = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
  (sr,) = session.run(["output"], {"input": lr.transpose(0, 3, 1, 2).astype(dtype)})
  assert sr.dtype == dtype
  return sr.astype(np.float32).transpose(0, 2, 3, 1)


def compute(model, lr):
  net = GENERATORS[model.name](**model.kwargs)
  return np.asarray(jax.jit(lambda v, x: net.apply(v, x, train=False))(model.variables, lr))


def error(actual, expected):
  """Largest difference by largest value."""
  assert actual.shape == expected.shape
  return np.abs(actual - expected).max() / np.abs(expected).max()


def images(model):
  """Two batches, of other sizes and neither square."""
  r = model.kwargs.get("input_unshuffle", 1)
  rng = np.random.default_rng(1)
  for n, h, w in ((1, 7, 5), (2, 4, 9)):
    yield rng.uniform(size=(n, r * h, r * w, model.kwargs.get("out_channels", 3))).astype("f")


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_onnx_runtime_computes_the_same_at_any_size(name, kwargs):
  model = make_model(name, **kwargs)
  exported = to_onnx(name, model.kwargs, model.variables)
  for lr in images(model):
    assert error(run(exported, lr), compute(model, lr)) < 1e-5


@pytest.mark.parametrize(("name", "kwargs"), BY_NAME, ids=str)
def test_float16_within_two_thousandths(name, kwargs):
  model = make_model(name, **kwargs)
  exported = to_onnx(name, model.kwargs, model.variables, dtype="float16")
  for lr in images(model):
    assert 1e-6 < error(run(exported, lr), compute(model, lr)) < 2e-3


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_only_operations_that_converters_know(name, kwargs, dtype):
  model = make_model(name, **kwargs)
  nodes = to_onnx(name, model.kwargs, model.variables, dtype=dtype).graph.node
  assert {node.op_type for node in nodes} - ALLOWED == (
    {"Tanh"} if kwargs.get("final_activation") == "tanh" else set()
  )


def test_sizes_that_the_unshuffle_does_not_divide_lose_the_last_row():
  model = make_model("rrdbnet", scale=2, input_unshuffle=2)
  exported = to_onnx("rrdbnet", model.kwargs, model.variables)
  lr = np.zeros((1, 9, 8, 3), np.float32)
  assert run(exported, lr).shape == (1, 16, 16, 3)


def test_the_graph_tells_what_it_is():
  model = make_model("rrdbnet", scale=2, input_unshuffle=2, out_channels=1)
  exported = to_onnx(
    "rrdbnet", model.kwargs, model.variables, dtype="float16", metadata={"b": "2", "a": "1"}
  )

  def shape(value):
    assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

  (lr,), (sr,) = exported.graph.input, exported.graph.output
  assert (lr.name, shape(lr)) == ("input", ["batch", 1, "height", "width"])
  assert (sr.name, shape(sr)) == ("output", ["batch", 1, "2*height", "2*width"])
  assert [(p.key, p.value) for p in exported.metadata_props] == [("a", "1"), ("b", "2")]
  assert exported.producer_name == "sr_jax"
  assert {(o.domain, o.version) for o in exported.opset_import} == {("", 13)}
  weights = {w.name: w for w in exported.graph.initializer}
  # The name of BasicSR's checkpoint, and 3x3 on 4 channels as 6x6 on the image.
  assert list(weights["conv_first.weight"].dims) == [4, 1, 6, 6]
  assert "body.1.rdb3.conv5.bias" in weights
  assert {w.data_type for w in weights.values()} == {
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.FLOAT,
  }
  assert {n for n, w in weights.items() if w.data_type == onnx.TensorProto.FLOAT} == {"scales_x2"}


def test_same_model_same_bytes():
  first, second = (
    to_onnx("srresnet", m.kwargs, m.variables, metadata=metadata).SerializeToString()
    for m, metadata in (
      (make_model("srresnet"), {"a": "1", "b": "2"}),
      (make_model("srresnet", unroll=2, remat=True), {"b": "2", "a": "1"}),
    )
  )
  assert first == second


def test_refuses_what_it_cannot_write():
  model = make_model("residualnet", blocks=1)
  arguments = ("residualnet", model.kwargs, model.variables)
  with pytest.raises(ValueError, match="dtype='bfloat16' must be one of float32, float16"):
    to_onnx(*arguments, dtype="bfloat16")
  with pytest.raises(ValueError, match="metadata 'step': 3 must be text"):
    to_onnx(*arguments, metadata={"step": 3})
  large = jax.tree.map(lambda x: x * 1e6, model.variables)
  with pytest.raises(ValueError, match=r"conv_first.weight: .* is too large for float16"):
    to_onnx("residualnet", model.kwargs, large, dtype="float16")
  with pytest.raises(ValueError, match="no .onnx of the network 'swinir', only of srresnet"):
    to_onnx("swinir", *arguments[1:])


def test_without_onnx_it_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "onnx", None)
  monkeypatch.delitem(sys.modules, "sr_jax.formats.onnx_export")
  with pytest.raises(ImportError, match="pip install onnx"):
    importlib.import_module("sr_jax.formats.onnx_export")


def test_published_weights_give_their_published_output(shared):
  """Golden output: computed with torch 2.13.0 in float32."""
  stem = "realesrgan_x4plus_anime"
  state = dict(np.load(shared / "weights" / f"{stem}_f16.npz"))
  golden = np.load(shared / "golden" / "rrdb_golden.npz")
  lr = golden["input_u8"][None] / np.float32(255)
  exported = to_onnx(*state_dicts.from_state_dict(state))
  assert error(run(exported, lr)[0], golden[f"out_f32_{stem}"]) < 1e-4
