"""A generator as an ONNX graph, for ONNX Runtime, TensorRT, and converters such as ncnn's.

The graph is written node by node, not traced, so that it is made of few operations that all of them
know: Conv, LeakyRelu, PRelu, Concat, Add, Mul, Resize and DepthToSpace. Only a generator with
`final_activation='tanh'` needs one more, Tanh. Weights have the names of BasicSR's checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from sr_jax import MissingPackageError, UserError, __version__

from sr_jax.formats.state_dicts import to_state_dict
from sr_jax.kernels.leaky_relu import SLOPE
from sr_jax.networks.blocks import UPSAMPLING
from sr_jax.networks.build import build_checked

try:
  import onnx
  from onnx import helper, numpy_helper
except ImportError as error:
  raise MissingPackageError(
    f"ONNX export needs the package onnx: pip install onnx ({error})"
  ) from error

# The oldest opset whose Resize takes no region of interest. Nothing here needs a newer one, and the
# older the file, the more programs read it. IR version 7 is the one of its time.
_OPSET, _IR_VERSION = 13, 7
_DTYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}
_BATCH_NORM_EPSILON = 1e-5  # of `layers.batch_norm`


def to_onnx(
  name: str,
  kwargs: Mapping[str, Any],
  variables: Mapping[str, Any],
  *,
  dtype: str = "float32",
  metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
  """Writes a generator in inference as a graph from 'input' to 'output'.

  input is RGB [batch, c, height, width] in [0, 1], output [batch, out_channels, scale * height,
  scale * width], not clipped; all but the channels are free. BatchNorm is folded into the
  convolution before it, `input_unshuffle` into the first one. With the latter, 2 or 4, height and
  width must be multiples of it: ONNX cannot refuse others, and cuts the last rows or columns off.

  All weights are inside, and the same arguments give the same bytes of `SerializeToString()`.

  Args:
    name: a key of GENERATORS.
    kwargs: fields of the module; `dtype`, `algorithm`, `unroll`, `remat` say how JAX computes, and
      leave no trace in the graph.
    variables: {'params': ..., 'batch_stats': ...}.
    dtype: 'float32' or 'float16', of the weights and of input, output and all between. Programs see
      it in the input's type and feed what it says.
    metadata: text to keep in the file, which viewers of models show.

  Returns:
    A model that passes `onnx.checker`.

  Raises:
    UserError: there is no exporter for this network; the variables are another network's; a weight
      is too large for float16.
  """
  if name not in NETWORKS:
    raise UserError(
      f"there is no .onnx of the network {name!r}, only of {', '.join(NETWORKS)}; "
      "write .stablehlo or .safetensors"
    )
  if dtype not in _DTYPES:
    raise UserError(f"dtype={dtype!r} must be one of {', '.join(_DTYPES)}")
  metadata = dict(metadata or {})
  for key, value in metadata.items():
    if not (isinstance(key, str) and isinstance(value, str)):
      raise UserError(f"metadata {key!r}: {value!r} must be text; try json.dumps")
  module, channels = build_checked(name, kwargs, variables)

  graph = _Graph(to_state_dict(name, variables), dtype)
  NETWORKS[name](graph, module)
  graph.nodes[-1].output[0] = "output"

  s = module.scale
  sides = ["height", "width"] if s == 1 else [f"{s}*height", f"{s}*width"]
  shapes = {
    "input": ["batch", channels, "height", "width"],
    "output": ["batch", module.out_channels, *sides],
  }
  lr, sr = (helper.make_tensor_value_info(key, _DTYPES[dtype], shapes[key]) for key in shapes)
  model = helper.make_model(
    helper.make_graph(graph.nodes, name, [lr], [sr], list(graph.initializers.values())),
    opset_imports=[helper.make_opsetid("", _OPSET)],
    ir_version=_IR_VERSION,
    producer_name="sr_jax",
    producer_version=__version__,
  )
  helper.set_model_props(model, dict(sorted(metadata.items())))
  onnx.checker.check_model(model, full_check=True)
  return model


class _Graph:
  """Nodes and initialisers as they are written; each method adds a node and returns its output.

  Attributes:
    state: {BasicSR's key: array}, OIHW.
    dtype: of the weights, 'float32' or 'float16'.
    nodes: in the order of computation.
    initializers: {name: tensor}.
  """

  def __init__(self, state: Mapping[str, np.ndarray], dtype: str):
    self.state = state
    self.dtype = dtype
    self.nodes = []
    self.initializers = {}

  def conv(self, x: str, key: str, *, batch_norm: str = "", unshuffle: int = 1) -> str:
    """Convolves, with padding that keeps the size, after a pixel-unshuffle, before a BatchNorm.

    Args:
      x: what to convolve.
      key: of the convolution in the state dict.
      batch_norm: key of the BatchNorm; '' for none.
      unshuffle: factor of the pixel-unshuffle; 1 for none.
    """
    weight, bias = self.state[f"{key}.weight"], self.state[f"{key}.bias"]
    if batch_norm:
      weight, bias = self._folded(weight, bias, batch_norm)
    r, (_, channels, size, _) = unshuffle, weight.shape
    if r > 1:
      # Channel c r^2 + i r + j at (y, x) is the image's channel c at (r y + i, r x + j): a kernel r
      # times as large, in steps of r, reads the same numbers from the image itself.
      weight = weight.reshape(-1, channels // r**2, r, r, size, size).transpose(0, 1, 4, 2, 5, 3)
      weight = weight.reshape(-1, channels // r**2, r * size, r * size)
    weights = [self.constant(f"{key}.weight", weight), self.constant(f"{key}.bias", bias)]
    return self.node(
      "Conv",
      [x, *weights],
      key,
      kernel_shape=[r * size] * 2,
      strides=[r] * 2,
      pads=[r * (size // 2)] * 4,
    )

  def leaky_relu(self, x: str, slope: float) -> str:
    """With slope 0 the ReLU, which ncnn and TensorRT know in this form too."""
    return self.node("LeakyRelu", [x], alpha=float(slope))

  def prelu(self, x: str, key: str) -> str:
    """One slope for all channels is a leaky ReLU; the slopes of many are a weight."""
    slope = self.state[f"{key}.weight"]
    if slope.size == 1:
      return self.node("LeakyRelu", [x], key, alpha=float(slope[0]))
    return self.node("PRelu", [x, self.constant(f"{key}.weight", slope.reshape(-1, 1, 1))], key)

  def add(self, x: str, y: str) -> str:
    return self.node("Add", [x, y])

  def mul(self, x: str, factor: float, name: str) -> str:
    """Multiplies by a constant, which is in the graph once, under the given name."""
    return self.node("Mul", [x, self.constant(name, np.float32(factor))])

  def pixel_shuffle(self, x: str, r: int) -> str:
    """CRD is PyTorch's order of channels."""
    return self.node("DepthToSpace", [x], blocksize=r, mode="CRD")

  def upsample_nearest(self, x: str, r: int) -> str:
    """Asymmetric and floor: row i of the output is row i // r of x."""
    return self.node(
      "Resize",
      [x, "", self._scales(r)],
      mode="nearest",
      coordinate_transformation_mode="asymmetric",
      nearest_mode="floor",
    )

  def upsample_bilinear(self, x: str, r: int) -> str:
    """PyTorch's align_corners=False."""
    return self.node(
      "Resize",
      [x, "", self._scales(r)],
      mode="linear",
      coordinate_transformation_mode="half_pixel",
    )

  def node(self, op: str, inputs: list[str], name: str = "", **attributes) -> str:
    """Adds a node, whose output has the node's name; '' makes one up."""
    name = name or f"{op}_{len(self.nodes)}"
    self.nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
    return name

  def constant(self, name: str, array: np.ndarray) -> str:
    """Keeps a weight in the graph's dtype; the second time the name alone is enough."""
    if name not in self.initializers:
      with np.errstate(over="ignore"):
        cast = np.asarray(array, self.dtype)
      if np.isinf(cast).any() and not np.isinf(array).any():
        raise UserError(
          f"{name}: {np.abs(array).max():.6g} is too large for {self.dtype}; try dtype='float32'"
        )
      self.initializers[name] = numpy_helper.from_array(cast, name)
    return name

  def _scales(self, r: int) -> str:
    """Factors of N, C, H and W: float32 whatever the graph's dtype, as Resize demands."""
    name = f"scales_x{r}"
    self.initializers[name] = numpy_helper.from_array(np.array([1, 1, r, r], np.float32), name)
    return name

  def _folded(self, weight: np.ndarray, bias: np.ndarray, key: str) -> tuple[np.ndarray, ...]:
    """Weight OIHW and bias of a convolution that does what BatchNorm `key` does after it."""
    scale, shift, mean, var = (
      np.asarray(self.state[f"{key}.{leaf}"], np.float64)
      for leaf in ("weight", "bias", "running_mean", "running_var")
    )
    gain = scale / np.sqrt(var + _BATCH_NORM_EPSILON)
    return weight * gain[:, None, None, None], (bias - mean) * gain + shift


def _srresnet(graph: _Graph, net: nn.Module) -> None:
  x = y = graph.prelu(graph.conv("input", "conv_first"), "prelu_first")
  for i in range(net.blocks):
    block = f"body.{i}"
    z = graph.conv(y, f"{block}.conv1", batch_norm=f"{block}.bn1")
    z = graph.prelu(z, f"{block}.prelu")
    y = graph.add(y, graph.conv(z, f"{block}.conv2", batch_norm=f"{block}.bn2"))
  x = graph.add(x, graph.conv(y, "conv_body", batch_norm="bn_body"))
  for i, r in enumerate(UPSAMPLING[net.scale], 1):
    x = graph.pixel_shuffle(graph.conv(x, f"conv_up{i}"), r)
    x = graph.prelu(x, f"prelu_up{i}")
  x = graph.conv(x, "conv_last")
  if net.final_activation == "tanh":
    x = graph.add(graph.node("Tanh", [x]), graph.constant("one", np.float32(1)))
    graph.mul(x, 0.5, "half")


def _msrresnet(graph: _Graph, net: nn.Module) -> None:
  x = graph.leaky_relu(graph.conv("input", "conv_first"), 0.1)
  x = _residual_blocks(graph, x, net.blocks, slope=0.0, residual_scale=1.0)
  for i, r in enumerate(UPSAMPLING[net.scale], 1):
    x = graph.leaky_relu(graph.pixel_shuffle(graph.conv(x, f"upconv{i}"), r), 0.1)
  x = graph.leaky_relu(graph.conv(x, "conv_hr"), 0.1)
  x = graph.conv(x, "conv_last")
  graph.add(x, "input" if net.scale == 1 else graph.upsample_bilinear("input", net.scale))


def _rrdbnet(graph: _Graph, net: nn.Module) -> None:
  x = y = graph.conv("input", "conv_first", unshuffle=net.input_unshuffle)
  for i in range(net.blocks):
    rrdb = y
    for j in range(1, 4):
      dense = features = y
      for k in range(1, 5):
        new = graph.leaky_relu(graph.conv(features, f"body.{i}.rdb{j}.conv{k}"), SLOPE)
        features = graph.node("Concat", [features, new], axis=1)
      y = graph.conv(features, f"body.{i}.rdb{j}.conv5")
      y = graph.add(graph.mul(y, net.residual_scale, "residual_scale"), dense)
    y = graph.add(graph.mul(y, net.residual_scale, "residual_scale"), rrdb)
  x = graph.add(x, graph.conv(y, "conv_body"))
  _upsample_and_reconstruct(graph, x, net.scale * net.input_unshuffle)


def _residualnet(graph: _Graph, net: nn.Module) -> None:
  x = graph.conv("input", "conv_first")
  y = _residual_blocks(graph, x, net.blocks, slope=SLOPE, residual_scale=net.residual_scale)
  x = graph.add(x, graph.conv(y, "conv_body"))
  _upsample_and_reconstruct(graph, x, net.scale)


def _compact(graph: _Graph, net: nn.Module) -> None:
  x = "input"
  for i in range(0, 2 * net.blocks + 2, 2):
    x = graph.prelu(graph.conv(x, f"body.{i}"), f"body.{i + 1}")
  x = graph.conv(x, f"body.{2 * net.blocks + 2}")
  if net.scale == 1:
    graph.add(x, "input")
  else:
    x = graph.pixel_shuffle(x, net.scale)
    graph.add(x, graph.upsample_nearest("input", net.scale))


def _residual_blocks(
  graph: _Graph, x: str, blocks: int, *, slope: float, residual_scale: float
) -> str:
  """Residual blocks without BatchNorm."""
  for i in range(blocks):
    y = graph.leaky_relu(graph.conv(x, f"body.{i}.conv1"), slope)
    y = graph.conv(y, f"body.{i}.conv2")
    if residual_scale != 1:
      y = graph.mul(y, residual_scale, "residual_scale")
    x = graph.add(y, x)
  return x


def _upsample_and_reconstruct(graph: _Graph, x: str, factor: int) -> None:
  """ESRGAN's second half."""
  for i, r in enumerate(UPSAMPLING[factor], 1):
    key = "conv_up_x3" if r == 3 else f"conv_up{i}"
    x = graph.leaky_relu(graph.conv(graph.upsample_nearest(x, r), key), SLOPE)
  graph.conv(graph.leaky_relu(graph.conv(x, "conv_hr"), SLOPE), "conv_last")


NETWORKS = {
  "srresnet": _srresnet,
  "msrresnet": _msrresnet,
  "rrdbnet": _rrdbnet,
  "residualnet": _residualnet,
  "compact": _compact,
}
