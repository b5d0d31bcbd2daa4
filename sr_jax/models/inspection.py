"""Describes a model file without running it."""

import collections
import json
import math
import pathlib
from typing import Any

import numpy as np

from sr_jax import MissingPackageError, UserError
from sr_jax.formats import stablehlo_export
from sr_jax.formats import vgg_weights
from sr_jax.models.model import Model, parameter_count, spandrel_objection
from sr_jax.models import catalog
from sr_jax.models.read import read_discriminator, read_model
from sr_jax.networks.build import GENERATORS
from sr_jax.runs import storage


def read_network(path: str) -> Model:
  """Reads a generator, or a discriminator if the file holds no generator.

  Raises:
    UserError: the file holds neither; the error says why it holds no generator.
  """
  try:
    return read_model(path)
  except UserError as error:
    if storage.run_folder(path).is_dir():
      raise
    try:
      return read_discriminator(path)
    except UserError:
      raise error from None


def inspect(path: str) -> dict[str, Any]:
  """Describes a run or a file: what it is, how it is written, where it comes from.

  Returns:
    {property: value}, in the order to show them.

  Raises:
    UserError: the file is nothing that sr_jax knows.
    MissingPackageError: it is an .onnx file, and the package onnx is not installed.
  """
  facts: dict[str, Any] = {"path": path}
  file = pathlib.Path(path)
  if file.is_file():
    facts |= {"size": f"{file.stat().st_size:,} bytes", "sha256": catalog.sha256(file)}
  if file.suffix == ".onnx" and file.is_file():
    return facts | _inspect_onnx(file)
  if file.suffix == ".stablehlo" and file.is_file():
    return facts | _inspect_stablehlo(file)
  try:
    model = read_network(path)
  except UserError as error:
    try:
      network = vgg_weights.load_vgg(path)
    except (UserError, OSError):
      raise error from None
    sizes = [np.size(array) for layer in network.params.values() for array in layer.values()]
    count = sum(sizes) - sum(np.size(array) for array in network.params["input"].values())
    facts |= {"network": network.name, "parameters": f"{count:,}"}
    return facts | {"convention": network.convention}
  facts |= {"network": model.name}
  facts |= model.kwargs
  facts["parameters"] = f"{parameter_count(model):,}"
  facts |= model.info.get("file", {"format": "run", "dtype": "float32"})
  facts |= {"weights": model.info["digest"]}
  facts["trained from"] = ", ".join(model.info["ancestry"]) or "not recorded"
  if "step" in model.info:
    facts["step"] = model.info["step"]
  if model.name in GENERATORS:
    objection = spandrel_objection(model)
    facts["spandrel"] = objection or "reads it (chaiNNer, ComfyUI), as .safetensors or .pth"
  return facts


def _inspect_onnx(file: pathlib.Path) -> dict[str, Any]:
  try:
    import onnx
  except ImportError as error:
    raise MissingPackageError(
      f"{file}: reading it needs the package onnx: pip install onnx"
    ) from error
  try:
    model = onnx.load_model_from_string(file.read_bytes())
    onnx.checker.check_model(model)
  except Exception as error:  # protobuf's and the checker's errors have no common class
    reason = str(error).partition("\n")[0]
    raise UserError(f"{file} cannot be read as ONNX: {reason}") from error
  told = {entry.key: entry.value for entry in model.metadata_props}
  sides = {}
  for what, values in (("input", model.graph.input), ("output", model.graph.output)):
    if not values:
      raise UserError(f"{file} has no {what}: it is a graph, but no model")
    kind = values[0].type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    sides[what] = f"{onnx.TensorProto.DataType.Name(kind.elem_type).lower()} {shape}"
  operations = collections.Counter(node.op_type for node in model.graph.node)
  return {
    "network": told.get("architecture", model.graph.name),
    **sides,
    "opset": ", ".join(str(opset.version) for opset in model.opset_import),
    "operations": ", ".join(f"{count} {name}" for name, count in operations.most_common()),
    "parameters": f"{sum(math.prod(array.dims) for array in model.graph.initializer):,}",
    **({"weights": digest} if (digest := _digest(told.get("sr_jax", "{}"))) else {}),
  }


def _digest(told: str) -> str:
  """Returns the digest in the metadata that `save_model` writes; '' for other programs' files."""
  try:
    return str(json.loads(told)["info"]["digest"])
  except (ValueError, KeyError, TypeError, RecursionError):
    return ""


def _inspect_stablehlo(file: pathlib.Path) -> dict[str, Any]:
  exported = stablehlo_export.read_exported(file.read_bytes())
  return {
    "input": str(exported.in_avals[0]),
    "output": str(exported.out_avals[0]),
    "platforms": ", ".join(exported.platforms),
  }
