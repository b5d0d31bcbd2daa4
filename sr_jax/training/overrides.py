"""Reads settings of a recipe from the command line: --config.NAME=VALUE.

All that is wrong is told at once, a line for each mistake, with a setting that works.
"""

import ast
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sr_jax.networks import build
from sr_jax import printable
from sr_jax.training.fields import FIELDS, kind, setting, told

_SETTING = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_TRUE = ("true", "t", "yes", "y", "on", "1")
_FALSE = ("false", "f", "no", "n", "off", "0")

# What other programs call a section: our name.
SECTIONS = {
  "datasets": "data",
  "model": "generator",
  "net_d": "discriminator",
  "net_g": "generator",
  "network_d": "discriminator",
  "network_g": "generator",
  "optim": "optimizer",
  "test": "eval",
  "train": "data",
  "val": "eval",
  "valid": "eval",
  "validation": "eval",
}
# What other programs call a field, within a section that has one of our name.
LEAVES = {
  "dir": "source",
  "folder": "source",
  "freq": "every_steps",
  "frequency": "every_steps",
  "interval": "every_steps",
  "lr": "lr_source",
  "lr_dir": "lr_source",
  "metric": "best_metric",
  "name": "name",
  "path": "source",
  "pretrain": "init_from",
  "pretrained": "init_from",
  "resume": "init_from",
  "root": "source",
  "type": "name",
}
# What other programs have a field for, and we a flag.
FLAGS = {
  name: "--workdir is the folder of the run, and of its checkpoints"
  for name in ("checkpoint.path", "checkpoint.dir", "log.dir", "logdir", "output_dir", "workdir",
               "work_dir", "output", "save_dir")
}  # fmt: skip
# What other programs call a field, by the last part of the name: our name.
SYNONYMS = {
  "adversarial.type": "adversarial.loss",
  "amp": "dtype",
  "augment": "data.rotate",
  "batch": "data.batch_size",
  "best": "checkpoint.best_metric",
  "beta1": "optimizer.b1",
  "beta2": "optimizer.b2",
  "betas": "optimizer.b1",
  "bf16": "dtype",
  "crop": "data.hr_patch",
  "batchsize": "data.batch_size",
  "bs": "data.batch_size",
  "checkpoint": "init_from",
  "clip": "optimizer.clip_norm",
  "clip_grad": "optimizer.clip_norm",
  "color.weight": "chroma.weight",
  "colour.weight": "chroma.weight",
  "data_dir": "data.source",
  "dataset": "data.source",
  "dense": "generator.kwargs.algorithm",
  "epoch": "total_steps",
  "epochs": "total_steps",
  "factor": "scale",
  "fft.weight": "focal_frequency.weight",
  "flip": "data.rotate",
  "fp16": "dtype",
  "gan.loss": "adversarial.loss",
  "gan.weight": "adversarial.weight",
  "generator.init_from": "init_from",
  "grad_clip": "optimizer.clip_norm",
  "gradient_clip": "optimizer.clip_norm",
  "gray": "data.channels",
  "grayscale": "data.channels",
  "grey": "data.channels",
  "gt_size": "data.hr_patch",
  "hr_patch_size": "data.hr_patch",
  "hflip": "data.rotate",
  "in_channels": "data.channels",
  "iterations": "total_steps",
  "iters": "total_steps",
  "l1": "pixel.weight",
  "l1.weight": "pixel.weight",
  "learning_rate": "learning_rate.base",
  "lr": "learning_rate.base",
  "load_from": "init_from",
  "lr_min": "learning_rate.eta_min",
  "max_epochs": "total_steps",
  "max_grad_norm": "optimizer.clip_norm",
  "max_iter": "total_steps",
  "max_iters": "total_steps",
  "max_norm": "optimizer.clip_norm",
  "max_steps": "total_steps",
  "metric": "checkpoint.best_metric",
  "min_lr": "learning_rate.eta_min",
  "mixed_precision": "dtype",
  "nb": "generator.kwargs.blocks",
  "nf": "generator.kwargs.features",
  "num_block": "generator.kwargs.blocks",
  "num_blocks": "generator.kwargs.blocks",
  "num_feat": "generator.kwargs.features",
  "num_in_ch": "data.channels",
  "n_epochs": "total_steps",
  "num_epochs": "total_steps",
  "num_iterations": "total_steps",
  "num_iters": "total_steps",
  "num_steps": "total_steps",
  "patch": "data.hr_patch",
  "patch_size": "data.hr_patch",
  "path": "data.source",
  "precision": "dtype",
  "pretrain": "init_from",
  "pretrained": "init_from",
  "resume": "init_from",
  "resume_from": "init_from",
  "print_freq": "log.every_steps",
  "save_every": "checkpoint.every_steps",
  "save_freq": "checkpoint.every_steps",
  "save_interval": "checkpoint.every_steps",
  "scale_factor": "scale",
  "sf": "scale",
  "skip_nan": "guard.enabled",
  "source": "data.source",
  "steps": "total_steps",
  "total_iter": "total_steps",
  "total_iters": "total_steps",
  "train_dir": "data.source",
  "threshold": "guard.outlier",
  "upscale": "scale",
  "use_flip": "data.rotate",
  "use_hflip": "data.rotate",
  "use_rot": "data.rotate",
  "val_dir": "eval.source",
  "val_freq": "eval.every_steps",
  "warmup": "learning_rate.warmup_steps",
  "vgg.weight": "perceptual.weight",
  "warmup_iter": "learning_rate.warmup_steps",
  "warmup_iters": "learning_rate.warmup_steps",
  "warmup_steps": "learning_rate.warmup_steps",
}
# What other programs have a setting for, and we have none.
FIXED = {
  "gpu": "CUDA_VISIBLE_DEVICES=0 in the environment chooses devices; all that are seen train",
  "gpus": "CUDA_VISIBLE_DEVICES=0,1 in the environment chooses devices; all that are seen train",
  "num_workers": "the decoded images are kept, and no field sets how many threads read them",
  "optimizer.name": "the optimizer is Adam, as in the papers",
  "optimizer.type": "the optimizer is Adam, as in the papers",
  "shuffle": "crops are always shuffled, by config.seed",
  "weight_decay": "the optimizer is Adam without weight decay, as in the papers",
}


def parse(arguments: Sequence[str], known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
  """Reads settings.

  Args:
    arguments: `--config.NAME=VALUE`, `--config.NAME`, `VALUE`, or for fields that are true or
      false `--config.NAME` and `--noconfig.NAME`. Of several settings of one field the last holds.
    known: {name: value} of all fields of the recipe, both stages; a value's type is the field's.

  Returns:
    {name: value}, and a line for each mistake.
  """
  given: dict[str, Any] = {}
  wrong: dict[str, str] = {}  # of the last value of each field
  problems: list[str] = []
  waiting = list(arguments)
  while waiting:
    argument = waiting.pop(0)
    match = _SETTING.fullmatch(argument)
    if not match:
      problems.append(_stray(argument, known))
      continue
    negated, name, text = match.groups()
    follows = bool(waiting) and not waiting[0].startswith("--")
    if name not in known:
      given_as = argument.partition("=")[0]
      problems.append(f"{printable(given_as)}: {meant(name, known)}")
      if text is None and follows:
        waiting.pop(0)  # its value
      continue
    plain = known[name]
    if negated and not isinstance(plain, bool):
      problems.append(
        f"{printable(argument)}: --no goes with fields that are true or false; "
        f"try {setting(name, plain)}"
      )
      continue
    if negated and (text is not None or (follows and _is_bool(waiting[0]))):
      value = "" if text is not None else f" {waiting.pop(0)}"
      problems.append(
        f"{printable(argument + value)}: --no means false and takes no value; "
        f"try {setting(name, 'false')}"
      )
      continue
    if text is None and isinstance(plain, bool) and not (follows and _is_bool(waiting[0])):
      text = "false" if negated else "true"
    elif text is None and follows:
      text = waiting.pop(0)
    elif text is None:
      problems.append(f"--config.{name} has no value; try {setting(name, plain)}")
      continue
    for earlier in (given, wrong):
      earlier.pop(name, None)
    try:
      given[name] = convert(text, plain)
    except (ValueError, OverflowError, SyntaxError, TypeError, MemoryError, RecursionError):
      fix = _bool_meant(text, plain) if isinstance(plain, bool) else plain
      wrong[name] = f"{told(name, text)} must be {kind(name, plain)}; try {setting(name, fix)}"
  return given, problems + list(wrong.values())


def convert(text: str, plain: Any) -> Any:
  """Reads a value of the type that a field's value has.

  Raises:
    ValueError: the text is of another type; SyntaxError and TypeError too, of tuples.
  """
  if isinstance(plain, bool):
    if not _is_bool(text):
      raise ValueError(text)
    return text.strip().lower() in _TRUE
  if isinstance(plain, int):
    return _whole(text)
  if isinstance(plain, float):
    return float(text)
  if isinstance(plain, (tuple, list)):
    return _tuple(text)
  return text


def _is_bool(text: str) -> bool:
  return text.strip().lower() in (*_TRUE, *_FALSE)


def _bool_meant(text: str, plain: bool) -> bool:
  close = difflib.get_close_matches(text.strip().lower(), _TRUE + _FALSE, n=1)
  return close[0] in _TRUE if close else plain


def _whole(text: str) -> int:
  """Reads a whole number; 1e6 and 16.0 are some, too."""
  if len(text) > 40:
    raise ValueError("too long for a number of steps, pixels or images")
  if re.fullmatch(r"\s*[+-]?\d+\s*", text):
    return int(text)
  number = float(text)
  if number != int(number):  # raises OverflowError, a kind of ArithmeticError, for inf
    raise ValueError(text)
  return int(number)


def _tuple(text: str) -> tuple[Any, ...]:
  """Reads `(1, 2)`, `[1, 2]`, `1,2`, `("conv5_4:1.0",)` or `conv5_4:1.0,relu2_2`."""
  text = text.strip()
  if re.fullmatch(r"[(\[].*[)\]]", text, re.DOTALL):
    value = ast.literal_eval(text)
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return tuple(int(x) if isinstance(x, float) and x.is_integer() else x for x in values)
  if not text or re.search(r"[()\[\]{}]", text):
    raise ValueError(text)
  parts = [part.strip().strip("'\"") for part in text.strip(",").split(",")]
  return tuple(_number(part) for part in parts)


def _number(text: str) -> int | float | str:
  """Reads an element of a tuple: a number if it looks like one, 5e4 as 50000, else text."""
  if len(text) > 40 or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.I):
    return text
  number = float(text)
  return int(number) if number.is_integer() else number


def _stray(argument: str, known: Mapping[str, Any]) -> str:
  """Says what is wrong with an argument that is no setting."""
  name, equals, value = argument.lstrip("-\u2014\u2013").partition("=")
  for prefix in ("config.", "Config.", "conf.", "config_", "cfg."):
    name = name.removeprefix(prefix)
  value = value if equals else "VALUE"
  if name in known:
    return f"{printable(argument)}: did you mean --config.{name}={printable(value)}?"
  field = similar_field(name, known, guess=False) if argument.startswith("--") else ""
  if field:
    return f"{printable(argument)}: did you mean --config.{field}={printable(value)}?"
  if argument.startswith("-"):
    return (
      f"{printable(argument)} is no flag; a field of the recipe is set by --config.NAME=VALUE, and "
      "--help lists the other flags"
    )
  return (
    f"unexpected argument {printable(argument)!r}; a value with spaces or commas needs quotes: "
    '--config.data.source="my photos"'
  )


def meant(name: str, known: Mapping[str, Any]) -> str:
  """Says which field a wrong name may mean, the most likely first."""
  prefix, own = _stage_of(name)
  if prefix and not any(field.startswith("psnr.") for field in known):
    rest = f"; try --config.{own}" if own in known else ""
    return f"this recipe has no first stage{rest}"
  inside = [field for field in known if field.startswith(f"{name}.")]
  if inside:
    order = {field: number for number, field in enumerate(FIELDS)}
    inside.sort(key=lambda field: order.get(field.removeprefix("psnr."), len(order)))
    fields = ", ".join(f"--config.{field}" for field in inside[:3])
    return f"it is a section; set one of its fields, such as {fields}"
  if own.startswith("generator.kwargs."):
    field = own.removeprefix("generator.kwargs.")
    owners = [n for n in build.GENERATORS if field in build.generator_fields(n)]
    if owners and field != "scale":
      have = [k.rpartition(".")[2] for k in known if k.startswith(f"{prefix}generator.kwargs.")]
      return (
        f"{field} is a field of {', '.join(owners)}; this recipe's generator, "
        f"{known[f'{prefix}generator.name']}, has {', '.join(have)}: leave it out, or change the "
        f"generator; try {setting('generator.name', owners[0])}"
      )
  if own.lower() in FLAGS:
    return FLAGS[own.lower()]
  if told := FIXED.get(own.lower()) or FIXED.get(own.lower().rpartition(".")[2]):
    return f"there is no such field: {told}; leave it out"
  if field := similar_field(own, known):
    return f"did you mean --config.{prefix}{field}? There is no field {printable(name)!r}"
  section = own.rpartition(".")[0]
  fields = [f.removeprefix(f"{section}.") for f in FIELDS if f.startswith(f"{section}.")]
  if section and fields:
    have = ", ".join(field for field in fields if "." not in field)
    return f"there is no such field; {section} has {have}: take one of them, or leave it out"
  return "there is no such field; --list shows all fields"


def _stage_of(name: str) -> tuple[str, str]:
  """Splits a name into 'psnr.', if it seems to be of the first stage, and the rest."""
  first, _, rest = re.sub(r"^psnr_", "psnr.", name, flags=re.I).partition(".")
  called = ("psnr", "stage1", "stage_1", "stage0", "first", "first_stage", "pretraining")
  if rest and (first.lower() in called or sorted(first.lower()) == sorted("psnr")):
    return "psnr.", rest
  return "", name


def similar_field(name: str, known: Iterable[str], *, guess: bool = True) -> str:
  """Returns the field that a wrong name most likely means; '' where none is like it.

  Args:
    name: what somebody wrote.
    known: the names of all fields.
    guess: whether a name may be spelt otherwise; else it is one that other programs have, or the
      end of one of ours.
  """
  own = [field for field in known if not field.startswith("psnr.")]
  lower = name.lower()
  section, _, last = lower.rpartition(".")
  sections = {field.rpartition(".")[0] for field in own} - {""}
  if section in SECTIONS or section in sections:
    section = section if section in sections else SECTIONS[section]
    inside = {f.rpartition(".")[2]: f for f in own if f.rpartition(".")[0] == section}
    for wrong in (last, LEAVES.get(last)):
      if wrong in inside:
        return inside[wrong]
    longer = [field for leaf, field in inside.items() if leaf.startswith(f"{last}_")]
    if len(longer) == 1:
      return longer[0]
  for wrong in (lower, last):
    if wrong in SYNONYMS:
      return SYNONYMS[wrong]
  outer = section
  while outer:  # data.degradation.name
    if outer in own:
      return outer
    outer = outer.rpartition(".")[0]
  exact = [field for field in own if field.lower() == lower]
  exact = exact or [field for field in own if field.rpartition(".")[2].lower() == last]
  if exact:
    return max(exact, key=lambda field: difflib.SequenceMatcher(None, field, lower).ratio())
  if not guess:
    return ""
  by_lower = {field.lower(): field for field in own}
  if section in sections:  # what is spelt right would make any of its fields look alike
    leaves = {f.rpartition(".")[2]: f for f in own if f.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(last, leaves, n=1, cutoff=0.6):
      by_lower = leaves
  else:
    close = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.6)
  if not close:
    lasts = {field.rpartition(".")[2].lower(): field for field in own}
    close = difflib.get_close_matches(last, lasts, n=1, cutoff=0.7)
    by_lower = lasts
  return by_lower[close[0]] if close else ""
