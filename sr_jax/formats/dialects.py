"""Reads state dicts of other programs: opens their wrappers, and renames their arrays.

`unwrap` finds the state dict in what a file holds, `rename` gives its arrays the names that
`state_dicts.py` reads. Both work on trees in memory, which may be untrusted: whatever is wrong with
a tree raises UserError. Files are read elsewhere.
"""

import re
from collections.abc import Mapping
from typing import Any

from sr_jax import UserError

# Where programs put a state dict. The first of these keys that is there is taken, in spandrel's
# order, so that a file is the same network here and in the programs that are built on spandrel.
# torch.compile adds `_orig_mod`, DataParallel and AveragedModel add `module`.
_WRAPPERS = (
  "model_state_dict",
  "state_dict",
  "params_ema",
  "params-ema",
  "params",
  "model",
  "net",
  "module",
  "_orig_mod",
)
_ROLES = {
  "generator": ("generator", "netG", "net_g", "g", "G"),
  "discriminator": ("discriminator", "netD", "net_d", "d", "D"),
}
# What programs add to one of these names for the averaged weights, where the plain name has the
# weights that were averaged: generator_ema, ema_model, net_g_swa, or just ema.
_AVERAGED = re.compile(r"(^|[-_])(ema|avg|average|averaged|swa|shadow)([-_]|$)", re.IGNORECASE)
_DEEPEST = 8  # wrappers that are opened, at most: a tree that holds itself has no last one

# How dialects are recognised, in this order: by the start of a key that no other dialect has.
_MARKS = {
  "old": r"model\.\d+\.",
  "rrdb_trunk": r"RRDB_trunk\.|trunk_conv\.",
  "mmsr": r"recon_trunk\.",
  "leftthomas": r"block1\.0\.",
  "basicsr": r"conv_first\.|body\.\d+\.((rdb|conv|bn)\d\.|weight$)",
}

# Fields of the network that follow from the dialect and not from the arrays.
FIELDS = {"leftthomas": {"final_activation": "tanh"}}


def unwrap(tree: Any, role: str = "generator") -> tuple[dict[str, Any], str]:
  """Finds the state dict in what a file of weights holds.

  Wrappers are dicts in dicts ({'params_ema': {...}}) or prefixes of keys ('module.conv.weight'),
  also within each other. Averaged weights are preferred to the weights that were averaged. Values
  that are not arrays, and scalars (counters such as `step` or `num_batches_tracked`), are left out.

  Args:
    tree: nested dicts with arrays of any library.
    role: 'generator' or 'discriminator', in case a file holds both.

  Returns:
    {key: array}, and the wrappers that were opened, for example 'state_dict.module'; '' for none.

  Raises:
    UserError: there are no named arrays.
  """
  opened = []
  while (inner := _open(tree, role)) and len(opened) < _DEEPEST:
    name, tree = inner
    opened.append(name)
  wrapper = ".".join(opened)
  where = f" in {wrapper!r}" if wrapper else ""
  if not isinstance(tree, Mapping):
    raise UserError(f"expected arrays by name{where}, found a {type(tree).__name__}")
  state = _arrays(tree)
  for key in state:
    if not isinstance(key, str):
      raise UserError(f"the key {key!r}{where} is no text; keys are names as 'conv_first.weight'")
  if not state:
    raise UserError(f"there are no arrays{where}; its first key is {next(iter(tree), None)!r}")
  return state, wrapper


def rename(state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """Renames a generator's arrays to BasicSR's keys.

  Dialects: 'basicsr' itself; 'old', ESRGAN's first release and most community models
  (model.1.sub.0.RDB1.conv1.0.weight); 'rrdb_trunk', its second release, RealSR and BSRGAN; 'mmsr',
  MSRResNet before BasicSR renamed it; 'leftthomas', that author's SRGAN. The number of
  up-convolutions gives the scale; an old x3 model, with one of them, cannot be told from x2.

  Args:
    state: {key: array}, as `unwrap` returns it.

  Returns:
    {BasicSR's key: the same array}, and the dialect. FIELDS has the network's fields that follow
    from the dialect.

  Raises:
    UserError: the dialect is unknown, or it does not have one of the keys, which the error names.
  """
  plus = next((key for key in state if ".conv1x1." in key), None)
  if plus is not None:
    raise UserError(
      f"{plus!r} is of ESRGAN+, whose dense blocks have one more convolution: it is not supported"
    )
  dialect = next(
    (name for name, mark in _MARKS.items() if any(re.match(mark, key) for key in state)), None
  )
  if dialect is None:
    raise UserError(
      f"the keys are in none of the dialects {', '.join(_MARKS)}; its first key is "
      f"{next(iter(state), None)!r}"
    )
  layers = {
    "old": _old_layers,
    "rrdb_trunk": _rrdb_trunk_layers,
    "mmsr": _mmsr_layers,
    "leftthomas": _leftthomas_layers,
    "basicsr": _basicsr_layers,
  }[dialect](state)
  return _rename(state, layers, dialect), dialect


def rename_discriminator(state: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """Renames a discriminator's arrays to BasicSR's keys.

  Spectral normalisation has two dialects: torch.nn.utils.spectral_norm's weight_orig, which BasicSR
  has, and since PyTorch 1.9 'parametrizations'. PatchGAN's layers are numbered in 'pix2pix'.

  Args:
    state: {key: array}, as `unwrap(tree, 'discriminator')` returns it.

  Returns:
    {BasicSR's key: the same array}, and the dialect, 'basicsr', 'parametrizations' or 'pix2pix'.

  Raises:
    UserError: a key belongs to another parametrisation; the error names it.
  """
  if "model.11.weight" in state:
    layers = ("conv0", "conv1", "bn1", "conv2", "bn2", "conv3", "bn3", "conv4")
    numbers = (0, 2, 3, 5, 6, 8, 9, 11)
    named = {rf"model\.{number}": layer for number, layer in zip(numbers, layers, strict=True)}
    return _rename(state, named, "pix2pix"), "pix2pix"
  if not any(".parametrizations." in key for key in state):
    return dict(state), "basicsr"
  ours = {"original": "weight_orig", "0._u": "weight_u", "0._v": "weight_v"}
  renamed = {}
  for key, array in state.items():
    layer, found, rest = key.partition(".parametrizations.weight.")
    if ".parametrizations." in key and not (found and rest in ours):
      raise UserError(
        f"{key!r} is of a parametrisation other than spectral_norm: it is not supported"
      )
    renamed[f"{layer}.{ours[rest]}" if found else key] = array
  if len(renamed) < len(state):
    raise UserError("an array is there twice, under both names that torch's spectral_norm has had")
  return renamed, "parametrizations"


def _open(tree: Any, role: str) -> tuple[str, Mapping] | None:
  """Returns the outermost wrapper and what is in it; None if there is no wrapper."""
  if not isinstance(tree, Mapping):
    return None
  names = (*_ROLES[role], *_WRAPPERS)
  dicts = {key: inner for key, inner in tree.items() if isinstance(inner, Mapping) and inner}
  for name in (*_averaged(dicts, role), *names):
    if name in dicts:
      return name, dicts[name]
  if len(tree) == 1 and isinstance(only := next(iter(tree.values())), Mapping):
    return str(next(iter(tree))), only

  # Prefixes. One before a number is a layer: 'model.0.weight' is the old dialect's own.
  prefixes = {
    key: match[1]
    for key in _arrays(tree)
    if isinstance(key, str) and (match := re.match(r"([\w-]+)\.(?!\d+\.)", key))
  }
  parts: dict[str, dict[str, Any]] = {}
  for key, head in prefixes.items():
    parts.setdefault(head, {})[key[len(head) + 1 :]] = tree[key]
  averaged = _averaged(parts, role)
  known = {*_WRAPPERS, *averaged, *(name for names in _ROLES.values() for name in names)}
  others = {head for head in parts if _AVERAGED.sub("", head) in known}
  complete = len(prefixes) == len(_arrays(tree)) and set(parts) <= known | others
  for name in (*averaged, *names):
    if name in parts and (complete or name in averaged or name in _ROLES[role]):
      return name, parts[name]
  return None


def _averaged(parts: Mapping[Any, Mapping], role: str) -> list[str]:
  """Lists the parts of a file that are averaged weights of a network of a role, its own first.

  Args:
    parts: {name: what is called so}.
    role: 'generator' or 'discriminator'.
  """
  own, generic = [], []
  others = {name.lower() for names in _ROLES.values() for name in names} - {
    name.lower() for name in _ROLES[role]
  }
  for part in parts:
    plain = _AVERAGED.sub("", part) if isinstance(part, str) else part
    if plain == part or plain.lower() in others:
      continue
    if plain in _ROLES[role]:
      own.append(part)
    # Of several networks it is the one whose names it has.
    elif not any(name in parts and set(parts[name]) != set(parts[part]) for name in _ROLES[role]):
      if plain in ("", *_WRAPPERS, *parts):
        generic.append(part)
  return own + generic


def _arrays(tree: Mapping[Any, Any]) -> dict[Any, Any]:
  """Returns the values that can be weights: arrays that are not scalars."""
  return {
    key: value
    for key, value in tree.items()
    if len(getattr(value, "shape", ())) > 0 and hasattr(value, "dtype")
  }


def _rename(state: Mapping[str, Any], layers: Mapping[str, str], dialect: str) -> dict[str, Any]:
  """Replaces the layer in each key, which is everything but the key's last part.

  Args:
    state: {key: array}.
    layers: {pattern of a layer's whole name: its replacement}; no two layers get the same name.
    dialect: what errors call the dialect.
  """
  renamed = {}
  for key, array in state.items():
    layer, _, leaf = key.rpartition(".")
    for pattern, replacement in layers.items():
      if match := re.fullmatch(pattern, layer):
        renamed[f"{match.expand(replacement)}.{leaf}"] = array
        break
    else:
      raise UserError(
        f"{key!r} is not of the dialect {dialect!r}, as other keys here are; the dialects known "
        f"are {', '.join(_MARKS)}"
      )
  return renamed


def _basicsr_layers(state: Mapping[str, Any]) -> dict[str, str]:
  """Lists all layers of the generators in `networks/`, a few of which BasicSR does not have."""
  layers = (
    r"conv_(first|body|hr|last|up\d|up_x3)|upconv\d|bn_body|prelu_(first|up\d)",
    r"body\.\d+\.(rdb[123]\.conv[1-5]|conv[12]|bn[12]|prelu)",
    r"body\.\d+",  # Compact's
  )
  return {layer: r"\g<0>" for layer in layers}


def _rrdb_trunk_layers(state: Mapping[str, Any]) -> dict[str, str]:
  return {
    "conv_first|conv_last": r"\g<0>",
    r"RRDB_trunk\.(\d+)\.RDB([123])\.(conv[1-5])": r"body.\1.rdb\2.\3",
    "trunk_conv": "conv_body",
    r"upconv(\d)": r"conv_up\1",
    "HRconv": "conv_hr",
  }


def _mmsr_layers(state: Mapping[str, Any]) -> dict[str, str]:
  return {
    r"conv_first|conv_last|upconv\d": r"\g<0>",
    r"recon_trunk\.(\d+)\.(conv[12])": r"body.\1.\2",
    "HRconv": "conv_hr",
  }


def _old_layers(state: Mapping[str, Any]) -> dict[str, str]:
  """Names the layers of a Sequential by their numbers.

  They are conv_first, the body with conv_body as its last layer, then [upsampling, conv_up,
  activation] for each factor of 2, conv_hr, activation, conv_last.
  """
  ups = max((_numbers(state, "model.")[-1] - 4) // 3, 0)
  blocks = _numbers(state, "model.1.sub.")[-1]
  return {
    r"model\.0": "conv_first",
    r"model\.1\.sub\.(\d+)\.RDB([123])\.(conv[1-5])\.0": r"body.\1.rdb\2.\3",
    rf"model\.1\.sub\.{blocks}": "conv_body",
    **{rf"model\.{3 * i}": f"conv_up{i}" for i in range(1, ups + 1)},
    rf"model\.{3 * ups + 2}": "conv_hr",
    rf"model\.{3 * ups + 4}": "conv_last",
  }


def _leftthomas_layers(state: Mapping[str, Any]) -> dict[str, str]:
  """Names the layers of block1 to block8.

  They are conv_first with its PReLU, five residual blocks, conv_body with its BatchNorm, and the
  upsampling with conv_last as its last layer.
  """
  last = _numbers(state, "block8.")[-1]
  return {
    r"block1\.0": "conv_first",
    r"block1\.1": "prelu_first",
    **{rf"block{i + 2}\.(conv[12]|bn[12]|prelu)": rf"body.{i}.\1" for i in range(5)},
    r"block7\.0": "conv_body",
    r"block7\.1": "bn_body",
    **{rf"block8\.{i}\.(conv|prelu)": rf"\1_up{i + 1}" for i in range(last)},
    rf"block8\.{last}": "conv_last",
  }


def _numbers(state: Mapping[str, Any], prefix: str) -> list[int]:
  """Returns the numbers that follow a prefix in keys, in order.

  Numbers of more than four digits are refused: a table is made for so many layers, and int() fails
  for thousands of digits.
  """
  pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
  found = {match[1] for key in state if (match := pattern.match(key))}
  if not found or max(map(len, found)) > 4:
    raise UserError(
      f"expected keys as '{prefix}0.weight', with numbers below 10000; found "
      f"{sorted(found)[:3] or 'none'}"
    )
  return sorted(map(int, found))
