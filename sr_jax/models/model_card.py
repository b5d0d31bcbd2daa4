"""What to publish beside a model file: an OpenModelDB entry and a model card.

Everything in them is known from the file; what only its author knows (name, licence, tags, example
images) is left out and listed, never made up.
"""

import datetime
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from sr_jax.machine.writing import write_file
from sr_jax.models.catalog import sha256
from sr_jax.models.model import Model, parameter_count, spandrel_objection
from sr_jax.networks.build import in_channels

# What OpenModelDB calls the architectures that it has.
_ARCHITECTURES = {"rrdbnet": "esrgan", "compact": "compact"}
_PLATFORMS = {".pth": "pytorch", ".safetensors": "pytorch", ".onnx": "onnx"}
# What says how large a network is, by the network's fields.
_SIZES = {"features": "nf", "blocks": "nb"}
# The fields of an entry that no file can tell.
_BY_HAND = ("name", "author", "license", "tags", "description", "images")


def openmodeldb_entry(
  model: Model,
  path: pathlib.Path,
  file_sha256: str,
  fields: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Makes the entry of a model for OpenModelDB (the fields of its `src/lib/schema.ts`).

  Args:
    model: the model.
    path: the model's file, which must exist.
    file_sha256: what `sha256(path)` returned.
    fields: values of the fields of `_BY_HAND`, from the model's author.

  Returns:
    JSON values. Fields that are not known are left out.
  """
  kwargs, config = model.kwargs, model.info.get("config", {})
  channels = in_channels(model.variables, kwargs)
  entry = {
    **(fields or {}),
    "date": datetime.date.today().isoformat(),
    "architecture": _ARCHITECTURES.get(model.name, model.name),
    "size": [f"{kwargs[field]}{unit}" for field, unit in _SIZES.items() if field in kwargs],
    "scale": kwargs["scale"],
    "inputChannels": channels,
    "outputChannels": kwargs.get("out_channels", 3),
    "resources": [
      {
        "platform": _PLATFORMS.get(path.suffix, "sr_jax"),
        "type": path.suffix.removeprefix("."),
        "size": path.stat().st_size,
        "sha256": file_sha256,
        "urls": [],
      }
    ],
    "trainingIterations": model.info.get("step"),
    "trainingBatchSize": _get(config, "data", "batch_size"),
    "trainingHRSize": _get(config, "data", "hr_patch"),
    # Bicubic LR images, and those of one's own, are made beforehand.
    "trainingOTF": _degradation(config) != "bicubic" if config.get("data") else None,
    "dataset": _get(config, "data", "source"),
    "pretrainedModelG": config.get("init_from") or next(iter(model.info["ancestry"]), None),
    "pretrainedModelD": _get(config, "discriminator", "init_from") or None,
  }
  return {key: value for key, value in entry.items() if value is not None}


def _degradation(config: Mapping[str, Any]) -> str:
  """How LR images were made; models from before this could be chosen have bicubic ones."""
  return _get(config, "data", "degradation") or "bicubic"


def left_to_the_author(entry: Mapping[str, Any]) -> list[str]:
  """Lists the fields of an entry that are still to be filled in."""
  return [field for field in _BY_HAND if field not in entry]


def model_card(
  model: Model,
  path: pathlib.Path,
  file_sha256: str,
  fields: Mapping[str, Any] | None = None,
) -> str:
  """Writes a model card in Markdown, with the header that the Hugging Face Hub reads.

  Args:
    model: the model.
    path: the model's file.
    file_sha256: what `sha256(path)` returned.
    fields: 'name', 'author', 'license' and 'description', as far as the model's author gives them.
  """
  fields, info, config = fields or {}, model.info, model.info.get("config", {})
  name = fields.get("name", path.stem)
  header = ["---", "library_name: sr_jax", "pipeline_tag: image-to-image", "tags:"]
  header += ["- super-resolution", f"- {model.name}"]
  if "license" in fields:
    header.append(f"license: {json.dumps(fields['license'].lower())}")
  network = {
    "architecture": model.name,
    **model.kwargs,
    "parameters": f"{parameter_count(model):,}",
    "weights": info["digest"],
    "trained from": ", ".join(info["ancestry"]) or "nothing, as far as the file says",
    "sha256": f"`{file_sha256}`",
  }
  lines = [*header, "---", "", f"# {_line(name)}", ""]
  if fields.get("description"):
    lines += [_line(fields["description"]), ""]
  lines += [f"Upscales images x{model.kwargs['scale']}. {_by(fields)}", "", *_rows(network), ""]
  if "interpolation" in info:
    lines += ["## Interpolation", "", *_rows(info["interpolation"]), ""]
  if config.get("data"):
    training = {
      "steps": info.get("step"),
      "batch size": config["data"].get("batch_size"),
      "HR crop": config["data"].get("hr_patch"),
      "images": config["data"].get("source"),
      "LR images": _degradation(config),
      **{f"{term} loss": config[term] for term in config if _get(config, term, "weight")},
      "learning rate": config.get("learning_rate"),
      "seed": config.get("seed"),
    }
    lines += ["## Training", "", *_rows(training), ""]
  lines += ["## Use", "", *_usage(model, path)]
  return "\n".join(lines) + "\n"


def write_beside(
  model: Model, path: pathlib.Path, fields: Mapping[str, Any] | None = None
) -> tuple[list[pathlib.Path], list[str]]:
  """Writes FILE.sha256, FILE.openmodeldb.json and FILE.md beside a model file.

  A card or an entry that is there already is left as it is, since its author may have edited it.

  Returns:
    The files that were written, and the fields that are left to the author.
  """
  digest = sha256(path)
  entry = openmodeldb_entry(model, path, digest, fields)
  contents = {
    ".sha256": f"{digest}  {path.name}\n",
    ".openmodeldb.json": json.dumps(entry, indent=2) + "\n",
    ".md": model_card(model, path, digest, fields),
  }
  written = []
  for suffix, text in contents.items():
    file = path.with_name(path.name + suffix)
    if suffix == ".sha256" or not file.exists():
      write_file(file, text)
      written.append(file)
  return written, left_to_the_author(entry)


def _usage(model: Model, path: pathlib.Path) -> list[str]:
  objection = spandrel_objection(model)
  if path.suffix == ".onnx":
    return ["NCHW, RGB from 0 to 1, any size. ONNX Runtime, or a converter to ncnn or TensorRT."]
  if path.suffix == ".stablehlo":
    return ["`jax.export.deserialize`; NHWC, RGB from 0 to 1, any size."]
  lines = [f"    python -m sr_jax.upscale --model {path.name} --input photo.jpg --output upscaled"]
  if path.suffix in (".safetensors", ".pth"):
    lines += ["", objection or "chaiNNer, ComfyUI and whatever reads with spandrel take the file."]
  return lines


def _rows(values: Mapping[str, Any]) -> list[str]:
  rows = [
    f"| {_line(key)} | {_line(_words(value))} |"
    for key, value in values.items()
    if value not in (None, "")
  ]
  return ["| | |", "| --- | --- |", *rows]


def _words(value: Any) -> str:
  if isinstance(value, Mapping):
    return ", ".join(f"{key} {_words(item)}" for key, item in value.items() if item not in ("", []))
  if isinstance(value, (list, tuple)):
    return " ".join(map(str, value))
  return str(value)


def _line(text: Any) -> str:
  """Puts a text on one line of a table: whatever would end the cell or start HTML is escaped."""
  text = " ".join(str(text).split())
  return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _by(fields: Mapping[str, Any]) -> str:
  return f"By {_line(fields['author'])}." if fields.get("author") else ""


def _get(config: Mapping[str, Any], section: str, key: str) -> Any:
  part = config.get(section)
  return part.get(key) if isinstance(part, Mapping) else None
