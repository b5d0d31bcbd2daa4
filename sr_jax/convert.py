"""Converts a trained network from one form to another, or says what a file is.

  python -m sr_jax.convert --input RUN --output model.safetensors        what spandrel reads
  python -m sr_jax.convert --input model.pth --output RUN                to fine-tune or evaluate
  python -m sr_jax.convert --input model.pth --output model.onnx --dtype float16
  python -m sr_jax.convert --inspect model.pth

The suffixes say which form: .safetensors, .pth, .npz, .onnx, .stablehlo, or a run's folder. A
generator may come in any of ESRGAN's key dialects, fresh from somebody's training or published.
"""

import argparse
import collections
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from sr_jax import cli
from sr_jax import discriminators
from sr_jax import generators
from sr_jax import model_card
from sr_jax import model_file
from sr_jax import storage
from sr_jax import vgg
from sr_jax.formats import stablehlo_export


def read_network(path: str) -> model_file.Model:
  """Reads a generator, or where the file holds none a discriminator.

  Raises:
    ValueError: it is neither; the error is the generator's.
  """
  try:
    return model_file.read_model(path)
  except ValueError as error:
    if storage.run_folder(path).is_dir():
      raise
    try:
      return model_file.read_discriminator(path)
    except ValueError:
      raise error from None


def inspect(path: str) -> dict[str, Any]:
  """Describes a run or a file: what it is, how it is written, where it comes from.

  Returns:
    {what: value}, in the order to show them.

  Raises:
    ValueError: it is nothing that sr_jax knows.
  """
  facts: dict[str, Any] = {"path": path}
  file = pathlib.Path(path)
  if file.is_file():
    facts |= {"size": f"{file.stat().st_size:,} bytes", "sha256": model_card.sha256(file)}
  if file.suffix == ".onnx" and file.is_file():
    return facts | _inspect_onnx(file)
  if file.suffix == ".stablehlo" and file.is_file():
    return facts | _inspect_stablehlo(file)
  try:
    model = read_network(path)
  except ValueError as error:
    try:
      network = vgg.load_vgg(path)
    except (ValueError, OSError):
      raise error from None
    sizes = [np.size(array) for layer in network.params.values() for array in layer.values()]
    count = sum(sizes) - sum(np.size(array) for array in network.params["input"].values())
    facts |= {"network": network.name, "parameters": f"{count:,}"}
    return facts | {"convention": network.convention}
  facts |= {"network": model.name}
  facts |= model.kwargs
  facts["parameters"] = f"{model_file.parameter_count(model):,}"
  facts |= model.info.get("file", {"format": "run", "dtype": "float32"})
  facts |= {"weights": model.info["digest"]}
  facts["trained from"] = ", ".join(model.info["ancestry"]) or "not recorded"
  if "step" in model.info:
    facts["step"] = model.info["step"]
  if model.name in generators.GENERATORS:
    objection = model_file.spandrel_objection(model)
    facts["spandrel"] = objection or "reads it (chaiNNer, ComfyUI), as .safetensors or .pth"
  return facts


def _inspect_onnx(file: pathlib.Path) -> dict[str, Any]:
  try:
    import onnx
  except ImportError as error:
    raise ImportError(f"{file}: reading it needs the package onnx: pip install onnx") from error
  try:
    model = onnx.load_model_from_string(file.read_bytes())
    onnx.checker.check_model(model)
  except Exception as error:  # protobuf's and the checker's errors have no common class
    reason = str(error).partition("\n")[0]
    raise ValueError(f"{file} cannot be read as ONNX: {reason}") from error
  told = {entry.key: entry.value for entry in model.metadata_props}
  sides = {}
  for what, values in (("input", model.graph.input), ("output", model.graph.output)):
    if not values:
      raise ValueError(f"{file} has no {what}: it is a graph, but no model")
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
  """The digest in the metadata that `save_model` writes; '' in others' files."""
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


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m sr_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--input", help="a run, or a .safetensors, .npz or .pth file")
  parser.add_argument(
    "--output", help="a .safetensors, .pth, .npz, .onnx or .stablehlo file, or a new run"
  )
  parser.add_argument(
    "--dtype", default="float32", help=f"of the weights: {', '.join(model_file.DTYPES)}"
  )
  parser.add_argument("--inspect", metavar="X", help="say what a run or a file is")
  parser.add_argument(
    "--card",
    action="store_true",
    help="beside the output: its sha256, an OpenModelDB entry, a model card",
  )
  for field in ("name", "author", "license", "description"):
    parser.add_argument(f"--{field}", help="for --card")
  args = parser.parse_args(argv)
  if args.inspect and (args.input or args.output):
    raise ValueError("--inspect=X stands alone; to convert, give --input and --output")
  if args.inspect:
    facts = inspect(args.inspect)
    facts = {key: value for key, value in facts.items() if value != ""}
    width = max(map(len, facts))
    print("\n".join(f"{key:{width}}  {value}" for key, value in facts.items()))
    return
  if not (args.input and args.output):
    parser.error("the following arguments are required: --input and --output, or --inspect")

  model = read_network(args.input)
  output = storage.local_path("--output", args.output)
  is_generator = model.name not in discriminators.DISCRIMINATORS
  if args.card and not (is_generator and output.suffix):
    raise ValueError(f"--card describes a generator's file, which --output={output} will not be")
  model_file.save_model(output, model, dtype=args.dtype)
  print(f"{output}: {model.name} {model.kwargs}, weights {model.info['digest']}")
  if is_generator and output.suffix in (".safetensors", ".pth"):
    if objection := model_file.spandrel_objection(model):
      print(f"note: {objection}")
  if args.card:
    fields = {
      field: value
      for field in ("name", "author", "license", "description")
      if (value := getattr(args, field))
    }
    written, missing = model_card.write_beside(model, output, fields)
    print("\n".join(str(path) for path in written))
    for suffix in (".md", ".openmodeldb.json"):
      if not any(str(path).endswith(suffix) for path in written):
        print(f"{output}{suffix} is left as it is; move it away for a new one")
    print(f"left for you to fill in: {', '.join(missing)}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
