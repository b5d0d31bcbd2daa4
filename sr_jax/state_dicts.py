"""Our variables to and from state dicts with PyTorch's names, as numpy arrays in memory.

The names are BasicSR's where it has the network. Nothing here touches files: those, and wrappers
such as `params_ema`, are their readers' matter. A file in another dialect of the same networks is
to be renamed to these keys first; `from_state_dict` then needs to know of no dialect.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sr_jax.discriminators import DISCRIMINATORS
from sr_jax.generators import GENERATORS

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


def to_state_dict(name: str, variables: Mapping[str, Any]) -> StateDict:
  """Renames a generator's variables for PyTorch.

  Args:
    name: a key of GENERATORS.
    variables: {'params': ..., 'batch_stats': ...}, the latter where there is BatchNorm. Any tree of
      this structure will do, gradients for example.

  Returns:
    {'conv_first.weight': [O, I, H, W], 'body.0.rdb1.conv1.weight': ..., ...}.
  """
  if name not in GENERATORS:
    raise ValueError(f"{name!r} is unknown; choose one of {', '.join(GENERATORS)}")
  state = {}
  for path, array in _flatten(variables):
    if path[1] == "body":
      for i, block in enumerate(array):
        state[_key(path, i)] = _to_torch(path, block)
    else:
      state[_key(path)] = _to_torch(path, array)
  return state


def from_state_dict(state: Mapping[str, Any]) -> tuple[str, dict[str, Any], Variables]:
  """Recognises a generator by its keys and shapes, and renames its arrays for us.

  What leaves no trace in the arrays keeps its default: `residual_scale`, `final_activation`.

  Args:
    state: as `to_state_dict` returns it; arrays of any float dtype.

  Returns:
    A key of GENERATORS, the arguments that build the module, and its variables, np.ndarray float32.

  Raises:
    ValueError: naming the first key that is unknown, missing or of another shape.
  """
  state = _without_counters(state)
  name = _recognise(state)
  kwargs = _infer(name, state)
  channels = np.shape(state["conv_first.weight"])[1] // kwargs.get("input_unshuffle", 1) ** 2
  shapes = _shapes(GENERATORS[name](**kwargs), jnp.zeros((1, 8, 8, channels)))
  _compare(state, to_state_dict(name, shapes), name)

  variables = {}
  for path, like in _flatten(shapes):
    keys = [_key(path, i) for i in range(len(like))] if path[1] == "body" else [_key(path)]
    arrays = [_from_torch(path, np.asarray(state[key], np.float32)) for key in keys]
    variables[path] = np.stack(arrays) if path[1] == "body" else arrays[0]
  return name, kwargs, unflatten_dict(variables)


def discriminator_to_state_dict(variables: Mapping[str, Any]) -> StateDict:
  """Renames a discriminator's variables for PyTorch; which one follows from them.

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
    state: as `discriminator_to_state_dict` returns it; arrays of any float dtype.

  Returns:
    A key of DISCRIMINATORS, the arguments that build the module, and its variables, float32.

  Raises:
    ValueError: naming the first key that is unknown, missing or of another shape.
  """
  state = _without_counters(state)
  if "conv1.weight_orig" in state:
    name, first, size = "unet", "conv0.weight", 8
  else:
    name = "srgan" if _shape(state, "conv0_1.weight", 4)[2] == 3 else "vgg"
    first, (outputs, side, channels) = "conv0_0.weight", _linear1(state)
    size = side * 2 ** len(_stages(state))
  features, in_channels = _shape(state, first, 4)[:2]
  kwargs = {"features": features}
  image = jnp.zeros((1, size, size, in_channels))
  shapes = _shapes(DISCRIMINATORS[name](**kwargs), image)
  _compare(state, discriminator_to_state_dict(shapes), name)

  state = {
    key.replace("weight_orig", "weight"): np.asarray(array, np.float32)
    for key, array in state.items()
  }
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
  """Path and array of each leaf of params and batch_stats."""
  for path, array in flatten_dict(dict(variables)).items():
    yield path, np.asarray(array)


def _key(path: tuple[str, ...], block: int | None = None) -> str:
  """('params', 'body', 'conv1', 'kernel') of block 0 -> 'body.0.conv1.weight'."""
  _, *modules, leaf = path
  if block is not None:
    modules.insert(1, str(block))
  return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def _to_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """HWIO -> OIHW, and IO -> OI for linear layers; the rest as it is."""
  if path[-1] != "kernel":
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
  """Undoes `_to_torch`."""
  if path[-1] != "kernel":
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _right_vector(kernel: np.ndarray, u: np.ndarray) -> np.ndarray:
  """v of a kernel OIHW from u [O], as one power iteration computes it."""
  v = kernel.reshape(len(u), -1).T @ u
  return v / max(np.linalg.norm(v), 1e-12)


def _stages(state: Mapping[str, Any]) -> list[str]:
  """Keys of a VGG-like discriminator's convolutions of stride 2, in order."""
  return sorted(key for key in state if re.fullmatch(r"conv\d_1\.weight", key))


def _linear1(state: Mapping[str, Any]) -> tuple[int, int, int]:
  """Outputs of linear1, and side and channels of the square of features that it flattens."""
  outputs, inputs = _shape(state, "linear1.weight", 2)
  channels = _shape(state, _stages(state)[-1], 4)[0]
  return outputs, math.isqrt(inputs // channels), channels


def _recognise(state: Mapping[str, Any]) -> str:
  """The generator whose own keys are there."""
  for name, keys in (
    ("rrdbnet", {"body.0.rdb1.conv1.weight"}),
    ("srresnet", {"body.0.bn1.weight"}),
    ("residualnet", {"body.0.conv1.weight", "conv_body.weight"}),
    ("msrresnet", {"body.0.conv1.weight"}),
  ):
    if keys <= set(state):
      return name
  raise ValueError(
    f"the state dict is of none of {', '.join(GENERATORS)}; its first key is "
    f"{next(iter(state), None)!r}"
  )


def _infer(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
  """The module's arguments, from keys and shapes."""
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
    kwargs["input_unshuffle"] = {4: 2, 16: 4}.get(in_channels / out_channels, 1)
  kwargs["scale"] = scale // kwargs.get("input_unshuffle", 1)
  return kwargs


def _shapes(module: nn.Module, image: jax.Array) -> Variables:
  """The module's variables as zeros that take no memory."""
  tree = jax.eval_shape(lambda: module.init(jax.random.key(0), image, train=False))
  return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), tree)


def _compare(state: Mapping[str, Any], expected: Mapping[str, np.ndarray], name: str):
  """Raises ValueError naming the first key in which a state dict differs from what is expected."""
  for key, array in state.items():
    if key not in expected:
      raise ValueError(f"the state dict looks like {name}, which has no {key!r}")
    if np.shape(array) != expected[key].shape:
      raise ValueError(
        f"{name}: {key!r} has shape {list(np.shape(array))}, expected {list(expected[key].shape)}"
      )
  for key in expected:
    if key not in state:
      raise ValueError(f"the state dict looks like {name}, but lacks {key!r}")


def _shape(state: Mapping[str, Any], key: str, ndim: int) -> tuple[int, ...]:
  """Shape of an array that must be there, of so many axes."""
  if key not in state:
    raise ValueError(f"the state dict lacks {key!r}; its first key is {next(iter(state), None)!r}")
  shape = np.shape(state[key])
  if len(shape) != ndim or 0 in shape:
    raise ValueError(f"{key!r} has shape {list(shape)}, expected {ndim} axes, none empty")
  return shape


def _without_counters(state: Mapping[str, Any]) -> dict[str, Any]:
  """PyTorch's BatchNorm counts its batches; with a fixed momentum nothing reads the count."""
  return {key: array for key, array in state.items() if not key.endswith("num_batches_tracked")}
