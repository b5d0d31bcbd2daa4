"""Converts our variables to and from state dicts with PyTorch's names: numpy arrays in memory.

If BasicSR has the network, the names are BasicSR's. `read_generator` and `read_discriminator` take
what a file holds, whichever program wrote it: `dialects.py` opens its wrappers and renames its
keys, so that `from_state_dict` has to know these names only. Nothing here touches files.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
from flax.traverse_util import flatten_dict
from flax.traverse_util import unflatten_dict
import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.formats import dialects
from sr_jax.networks.blocks import UPSAMPLING
from sr_jax.networks.build import DISCRIMINATORS, GENERATORS, image_channels

StateDict = dict[str, np.ndarray]
Variables = dict[str, Any]

# Last part of a variable's path -> last part of its key.
_LEAVES = {
  "kernel": "weight",
  "bias": "bias",
  "scale": "weight",
  "slope": "weight",
  "mean": "running_mean",
  "var": "running_var",
}


# No network has more channels; without a limit a damaged file could ask for any amount of memory.
_MOST = 2**20


Told = tuple[Any, dict[str, Any]]  # a network's name and fields, according to the file itself


def read_generator(
  tree: Any, told: Told = (None, {})
) -> tuple[str, dict[str, Any], Variables, dict[str, str]]:
  """Recognises a generator in what a file of weights holds, whichever program wrote it.

  Args:
    tree: nested dicts with arrays, as they were given to `torch.save` or the like.
    told: name and fields of the generator that the file says it holds. They are believed if the
      arrays are those of that network; otherwise keys and shapes decide.

  Returns:
    What `from_state_dict` returns, and facts for people: the 'dialect' of the keys, the 'wrapper'
    that was opened ('' for none), and the 'dtype' of the file's arrays.

  Raises:
    UserError: it is no generator that sr_jax knows; the error names the first key that does not
      fit.
  """
  state, wrapper = dialects.unwrap(tree)
  if (model := _as_told(state, *told)) is not None:
    return *model, _facts(state, "basicsr", wrapper)
  renamed, dialect = dialects.rename(state)
  try:
    name, kwargs, variables = from_state_dict(renamed)
  except UserError as error:
    if dialect == "basicsr":
      raise
    raise UserError(f"{error} (as BasicSR names what is in the dialect {dialect!r})") from error
  kwargs |= dialects.FIELDS.get(dialect, {})
  return name, kwargs, variables, _facts(state, dialect, wrapper)


def read_discriminator(
  tree: Any, told: Told = (None, {})
) -> tuple[str, dict[str, Any], Variables, dict[str, str]]:
  """Recognises a discriminator as `read_generator` does a generator.

  Args:
    tree: nested dicts with arrays.
    told: not used, since keys and shapes say everything.

  Returns:
    What `discriminator_from_state_dict` returns, and facts: 'dialect', 'wrapper', 'dtype'.

  Raises:
    UserError: it is no discriminator that sr_jax knows; the error names the first key that does not
      fit.
  """
  del told
  state, wrapper = dialects.unwrap(tree, "discriminator")
  renamed, dialect = dialects.rename_discriminator(state)
  return *discriminator_from_state_dict(renamed), _facts(state, dialect, wrapper)


def to_state_dict(name: str, variables: Mapping[str, Any]) -> StateDict:
  """Renames a generator's variables for PyTorch.

  Args:
    name: a key of GENERATORS.
    variables: {'params': ..., 'batch_stats': ...}, the latter if there is BatchNorm. Any tree of
      this structure will do, gradients for example.

  Returns:
    {'conv_first.weight': [O, I, H, W], 'body.0.rdb1.conv1.weight': ..., ...}.

  Raises:
    UserError: there is no generator of this name.
  """
  if name not in GENERATORS:
    raise UserError(f"{name!r} is unknown; choose one of {', '.join(GENERATORS)}")
  arrays = dict(_flatten(variables))
  blocks = next((len(array) for path, array in arrays.items() if path[1] == "body"), 0)
  state = {}
  for path, array in arrays.items():
    if path[1] == "body":
      for i, block in enumerate(array):
        state[_file_key(name, _key(path, i), blocks)] = _to_torch(path, block)
    else:
      state[_file_key(name, _key(path), blocks)] = _to_torch(path, array)
  return state


def from_state_dict(state: Mapping[str, Any]) -> tuple[str, dict[str, Any], Variables]:
  """Recognises a generator by its keys and shapes, and renames its arrays for us.

  Fields that leave no trace in the arrays keep their defaults: `residual_scale`,
  `final_activation`.

  Args:
    state: a state dict with the names that `to_state_dict` gives, its arrays of any float dtype.

  Returns:
    A key of GENERATORS, the arguments that build the module, and its variables, np.ndarray float32.

  Raises:
    UserError: a key is unknown, missing or of another shape; the error names it.
  """
  state = _without_counters(state)
  name = _recognise(state)
  kwargs = _infer(name, state)
  return name, kwargs, _variables(name, kwargs, state)


def _variables(name: str, kwargs: Mapping[str, Any], state: Mapping[str, Any]) -> Variables:
  """Renames the arrays of a known generator for us; raises UserError if they are not its."""
  blocks = kwargs.get("blocks", 0)
  inputs = _shape(state, _file_key(name, "conv_first.weight", blocks), 4)[1]
  channels = image_channels(inputs, kwargs)
  shapes = _shapes(GENERATORS[name](**kwargs), (1, 8, 8, channels))
  expected = {key: array.shape for key, array in to_state_dict(name, shapes).items()}
  _compare(state, expected, name)
  variables = {}
  for path, like in _flatten(shapes):
    keys = [_key(path, i) for i in range(len(like))] if path[1] == "body" else [_key(path)]
    keys = [_file_key(name, key, blocks) for key in keys]
    arrays = [_from_torch(path, _float32(state, key)) for key in keys]
    variables[path] = np.stack(arrays) if path[1] == "body" else arrays[0]
  return unflatten_dict(variables)


def _as_told(
  state: Mapping[str, Any], name: Any, kwargs: dict[str, Any]
) -> tuple[str, dict[str, Any], Variables] | None:
  """Returns the generator that a file says it holds; None if its arrays are not those of it."""
  if name not in GENERATORS:
    return None
  sizes = [value for value in kwargs.values() if type(value) is int]
  # Blocks are counted one by one: there cannot be more of them than arrays.
  if max(sizes, default=0) > _MOST or kwargs.get("blocks", 1) > len(state):
    return None
  try:
    variables = _variables(name, kwargs, _without_counters(state))
    module = GENERATORS[name](**kwargs)
    return name, kwargs | {"scale": module.scale, "out_channels": module.out_channels}, variables
  except (TypeError, ValueError):
    return None


def spandrel_objection(
  name: str, kwargs: Mapping[str, Any], *, in_channels: int | None = None
) -> str | None:
  """Says why spandrel, which chaiNNer and ComfyUI read models with, cannot use a generator's file.

  Spandrel does not refuse all of these files: some it silently takes for another network. This was
  found with spandrel 0.4.2.

  Args:
    name: a key of GENERATORS.
    kwargs: fields of the module.
    in_channels: channels of the LR image; None if they are as many as out_channels.

  Returns:
    What is wrong and what to do; None if spandrel computes the same as the module.
  """
  advice = "write .onnx for other programs instead"
  if name == "compact":
    return None
  if name != "rrdbnet":
    return f"spandrel knows no {name}, of the generators here only rrdbnet and compact; {advice}"
  net = GENERATORS[name](**kwargs)
  if net.growth != 32:
    return f"spandrel builds each ESRGAN with growth=32, this one has {net.growth}; {advice}"
  if net.residual_scale != 0.2:
    return (
      f"spandrel computes each ESRGAN with residual_scale=0.2, this one has {net.residual_scale}; "
      f"{advice}"
    )
  if net.scale * net.input_unshuffle == 3:
    return f"spandrel takes an x3 ESRGAN of sr_jax for an x1; {advice}"
  channels = (in_channels or net.out_channels) * net.input_unshuffle**2
  if _unshuffle(channels, net.out_channels) != net.input_unshuffle:
    return (
      f"spandrel takes an ESRGAN whose first convolution sees 4 or 16 times its out_channels="
      f"{net.out_channels}, and no other, for one that pixel-unshuffles its input; this one sees "
      f"{channels}, with input_unshuffle={net.input_unshuffle}; {advice}"
    )
  return None


def discriminator_to_state_dict(variables: Mapping[str, Any]) -> StateDict:
  """Renames a discriminator's variables for PyTorch; which network it is follows from them.

  linear1's columns are permuted, since PyTorch flattens C, H, W. Spectral normalisation becomes
  torch.nn.utils.spectral_norm's weight_orig, weight_u and weight_v.

  Args:
    variables: {'params': ..., 'batch_stats': ...}.

  Returns:
    {'conv0_0.weight': [O, I, H, W], ...}.
  """
  state = {
    _key(path): _to_torch(path, array)
    for path, array in _flatten(variables)
    if not path[1].endswith("_norm")
  }
  for name, stats in variables.get("batch_stats", {}).items():
    if name.endswith("_norm"):
      layer = name.removesuffix("_norm")
      kernel, u = state.pop(f"{layer}.weight"), np.asarray(stats[f"{layer}/kernel/u"])[0]
      state[f"{layer}.weight_orig"] = kernel
      state[f"{layer}.weight_u"] = u
      state[f"{layer}.weight_v"] = _right_vector(kernel, u)
  if "linear1.weight" in state:
    outputs, side, channels = _linear1(state)
    kernel = state["linear1.weight"].reshape(outputs, side, side, channels)
    state["linear1.weight"] = kernel.transpose(0, 3, 1, 2).reshape(outputs, -1)
  return state


def discriminator_from_state_dict(
  state: Mapping[str, Any],
) -> tuple[str, dict[str, Any], Variables]:
  """Recognises a discriminator by its keys and shapes, and renames its arrays for us.

  Args:
    state: a state dict with the names that `discriminator_to_state_dict` gives, its arrays of any
      float dtype.

  Returns:
    A key of DISCRIMINATORS, the arguments that build the module, and its variables, float32.

  Raises:
    UserError: a key is unknown, missing or of another shape; the error names it.
  """
  state = _without_counters(state)
  if "conv1.weight_orig" in state:
    name, first, size = "unet", "conv0.weight", 8
  elif "bn3.weight" in state:
    name, first, size = "patch", "conv0.weight", 24
  else:
    name = "srgan" if _shape(state, "conv0_1.weight", 4)[2] == 3 else "vgg"
    first, (outputs, side, channels) = "conv0_0.weight", _linear1(state)
    size = side * 2 ** len(_stages(state))
  features, in_channels = _shape(state, first, 4)[:2]
  kwargs = {"features": features}
  shapes = _shapes(DISCRIMINATORS[name](**kwargs), (1, size, size, in_channels))
  _compare(state, _discriminator_shapes(shapes), name)

  state = {key.replace("weight_orig", "weight"): _float32(state, key) for key in state}
  if "linear1.weight" in state:
    kernel = state["linear1.weight"].reshape(outputs, channels, side, side)
    state["linear1.weight"] = kernel.transpose(0, 2, 3, 1).reshape(outputs, -1)
  variables = {}
  for path, _ in _flatten(shapes):
    if path[1].endswith("_norm"):
      layer = path[1].removesuffix("_norm")
      kernel, u = state[f"{layer}.weight"], state[f"{layer}.weight_u"]
      sigma = u @ kernel.reshape(len(u), -1) @ _right_vector(kernel, u)
      variables[path] = u.reshape(1, -1) if path[-1].endswith("/u") else np.asarray(sigma)
    else:
      variables[path] = _from_torch(path, state[_key(path)])
  return name, kwargs, unflatten_dict(variables)


def _flatten(variables: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
  """Yields path and array of each leaf of params and batch_stats."""
  for path, array in flatten_dict(dict(variables)).items():
    yield path, np.asarray(array)


def _key(path: tuple[str, ...], block: int | None = None) -> str:
  """Makes a key of a path: ('params', 'body', 'conv1', 'kernel'), 0 -> 'body.0.conv1.weight'."""
  _, *modules, leaf = path
  if block is not None:
    modules.insert(1, str(block))
  return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _file_key(name: str, key: str, blocks: int) -> str:
  """Names an array as BasicSR does: Compact's layers are numbered, those of others are named.

  They are conv_first, its PReLU, then convolution and PReLU of each block, and conv_last.
  """
  if name != "compact":
    return key
  layer, _, leaf = key.rpartition(".")
  number = {"conv_first": 0, "prelu_first": 1, "conv_last": 2 * blocks + 2}.get(layer)
  if number is None:
    _, block, part = layer.split(".")
    number = 2 * int(block) + 2 + (part == "prelu")
  return f"body.{number}.{leaf}"


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """Transposes kernels, HWIO -> OIHW, and IO -> OI for linear layers; leaves the rest as it is."""
  if path[-1] != "kernel":
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """Undoes `_to_torch`."""
  if path[-1] != "kernel":
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _right_vector(kernel: np.ndarray, u: np.ndarray) -> np.ndarray:
  """Computes v of a kernel OIHW from u [O], as one power iteration does."""
  v = kernel.reshape(len(u), -1).T @ u
  return v / max(np.linalg.norm(v), 1e-12)


def _stages(state: Mapping[str, Any]) -> list[str]:
  """Returns the keys of a VGG-like discriminator's convolutions of stride 2, in order."""
  return sorted(key for key in state if re.fullmatch(r"conv\d_1\.weight", key))


def _linear1(state: Mapping[str, Any]) -> tuple[int, int, int]:
  """Returns linear1's outputs, and side and channels of the square of features that it flattens."""
  outputs, inputs = _shape(state, "linear1.weight", 2)
  channels = _shape(state, _stages(state)[-1], 4)[0]
  side = math.isqrt(inputs // channels)
  if side**2 * channels != inputs:
    raise UserError(
      f"'linear1.weight' has {inputs} inputs, expected a square of pixels times {channels} channels"
    )
  return outputs, side, channels


def _recognise(state: Mapping[str, Any]) -> str:
  """Returns the name of the generator that has such keys."""
  for name, marks in (
    ("rrdbnet", (r"body\.\d+\.rdb1\.",)),
    ("srresnet", (r"body\.\d+\.bn1\.",)),
    ("residualnet", (r"body\.\d+\.conv1\.", r"conv_body\.")),
    ("msrresnet", (r"body\.\d+\.conv1\.",)),
    ("compact", (r"body\.0\.weight", r"body\.1\.weight")),
  ):
    if all(any(re.match(mark, key) for key in state) for mark in marks):
      return name
  raise UserError(
    f"the state dict is of none of {', '.join(GENERATORS)}; its first key is "
    f"{next(iter(state), None)!r}"
  )


def _infer(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
  """Infers the module's arguments from keys and shapes."""
  if name == "compact":
    return _infer_compact(state)
  features, in_channels = _shape(state, "conv_first.weight", 4)[:2]
  out_channels = _shape(state, "conv_last.weight", 4)[0]
  blocks = {int(match[1]) for key in state if (match := re.match(r"body\.(\d+)\.", key))}
  kwargs = {"features": features, "blocks": len(blocks), "out_channels": out_channels}

  up = [key for key in state if re.fullmatch(r"(conv_up|upconv)\d\.weight", key)]
  if name in ("srresnet", "msrresnet"):  # each makes r^2 as many channels, then a pixel shuffle
    scale = math.prod(math.isqrt(_shape(state, key, 4)[0] // features) for key in up)
  else:
    scale = 3 if "conv_up_x3.weight" in state else 2 ** len(up)

  if name == "srresnet":
    kwargs["prelu_per_channel"] = _shape(state, "prelu_first.weight", 1)[0] > 1
  if name == "rrdbnet":
    kwargs["growth"] = _shape(state, "body.0.rdb1.conv1.weight", 4)[0]
    # BasicSR's x2 and x1 models see 4 and 16 times the image's channels, and upsample x4 inside.
    # A network with too few up-convolutions for that must have an image of so many channels.
    unshuffle = _unshuffle(in_channels, out_channels)
    kwargs["input_unshuffle"] = 1 if scale % unshuffle else unshuffle
  kwargs["scale"] = scale // kwargs.get("input_unshuffle", 1)
  return kwargs


def _infer_compact(state: Mapping[str, Any]) -> dict[str, Any]:
  """The same of a Compact, whose layers are numbered; its last one makes scale^2 as many channels.

  SR has as many channels as LR, or the two could not be added.
  """
  last = max(int(match[1]) for key in state if (match := re.match(r"body\.(\d{1,6})\.", key)))
  features, channels = _shape(state, "body.0.weight", 4)[:2]
  outputs = _shape(state, f"body.{last}.weight", 4)[0]
  scale = math.isqrt(outputs // channels)
  if scale not in UPSAMPLING or scale**2 * channels != outputs:
    raise UserError(
      f"'body.{last}.weight' makes {outputs} channels of an image of {channels}: its scale is none "
      f"of {', '.join(map(str, UPSAMPLING))}, or the network has another activation than PReLU"
    )
  blocks = last // 2 - 1
  if blocks > len(state):
    raise UserError(f"the state dict has {len(state)} arrays, too few for 'body.{last}.weight'")
  return {"features": features, "blocks": blocks, "scale": scale, "out_channels": channels}


def _unshuffle(in_channels: int, out_channels: int) -> int:
  """Infers the factor of the pixel-unshuffle from the channels at both ends, as spandrel does.

  Like spandrel, it takes a network from RGBA to grey for one that unshuffles a grey image.
  """
  return {4: 2, 16: 4}.get(in_channels / out_channels, 1)


def _float32(state: Mapping[str, Any], key: str) -> np.ndarray:
  """Returns an array of the state dict as float32; raises UserError if it does not hold floats."""
  array = np.asarray(state[key])
  if not jnp.issubdtype(array.dtype, jnp.floating):  # knows bfloat16, unlike numpy
    raise UserError(f"{key!r} has dtype {array.dtype}, expected floats")
  return array.astype(np.float32, copy=False)


def _facts(state: Mapping[str, Any], dialect: str, wrapper: str) -> dict[str, str]:
  dtypes = sorted({str(array.dtype) for array in state.values()})
  return {"dialect": dialect, "wrapper": wrapper, "dtype": ", ".join(dtypes)}


def _shapes(module: nn.Module, image: tuple[int, ...]) -> Variables:
  """Makes the module's variables for an image of this shape, as zeros that take no memory."""
  tree = jax.eval_shape(
    lambda image: module.init(jax.random.key(0), image, train=False),
    jax.ShapeDtypeStruct(image, jnp.float32),
  )
  return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)


def _discriminator_shapes(shapes: Variables) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of `discriminator_to_state_dict`'s arrays without making the arrays."""
  state = {}
  for path, array in _flatten(shapes):
    if not path[1].endswith("_norm"):
      state[_key(path)] = _to_torch(path, array).shape
  for name in shapes.get("batch_stats", {}):
    if name.endswith("_norm"):
      layer = name.removesuffix("_norm")
      shape = state.pop(f"{layer}.weight")
      state[f"{layer}.weight_orig"] = shape
      state[f"{layer}.weight_u"] = shape[:1]
      state[f"{layer}.weight_v"] = (math.prod(shape[1:]),)
  return state


def _compare(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], name: str):
  """Raises UserError for the first key in which a state dict differs from what is expected."""
  for key, array in state.items():
    if key not in expected:
      raise UserError(f"the state dict looks like {name}, which has no {key!r}")
    if np.shape(array) != expected[key]:
      raise UserError(
        f"{name}: {key!r} has shape {list(np.shape(array))}, expected {list(expected[key])}"
      )
  for key in expected:
    if key not in state:
      raise UserError(f"the state dict looks like {name}, but lacks {key!r}")


def _shape(state: Mapping[str, Any], key: str, ndim: int) -> tuple[int, ...]:
  """Returns the shape of an array; raises UserError if it is absent or has not so many axes."""
  if key not in state:
    raise UserError(f"the state dict lacks {key!r}; its first key is {next(iter(state), None)!r}")
  shape = np.shape(state[key])
  if len(shape) != ndim or 0 in shape or max(shape) > _MOST:
    raise UserError(
      f"{key!r} has shape {list(shape)}, expected {ndim} axes, none empty or longer than {_MOST}"
    )
  return shape


def _without_counters(state: Mapping[str, Any]) -> dict[str, Any]:
  """Leaves out the counts of batches of PyTorch's BatchNorm, which nothing reads here."""
  for key in state:
    if not isinstance(key, str):
      raise UserError(f"the state dict has the key {key!r}, expected text")
  return {key: array for key, array in state.items() if not key.endswith("num_batches_tracked")}
