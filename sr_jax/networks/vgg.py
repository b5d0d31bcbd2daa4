"""Fixed VGG features for the perceptual loss.

The loss itself is `losses.perceptual_loss`, and `formats/vgg_weights.py` loads the weights. Two
conventions of the same network are in use, which differ in the input that the weights expect. It is
kept with the parameters, as a scale and a shift of RGB in [0, 1].
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.kernels.choose import PLAIN, Kernels
from sr_jax.networks.layers import apply_conv

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


def vgg_features(
  params: Params,
  image: jax.Array,
  layers: Sequence[str],
  dtype: Any = jnp.float32,
  kernels: Kernels = PLAIN,
  pool: Callable[[jax.Array], jax.Array] | None = None,
) -> dict[str, jax.Array]:
  """Computes features of an image in one pass, only as deep as the deepest layer needs.

  Args:
    params: {'input': {'scale': [3], 'shift': [3]}, 'conv1_1': {'kernel': [3,3,3,64], 'bias': [64]},
      ...}; which VGG it is follows from the keys.
    image: [N, H, W, 3], RGB in [0, 1].
    layers: names of layers: 'conv5_4' is before the activation (ESRGAN), 'relu5_4' after it
      (SRGAN).
    dtype: the dtype to compute in; the input is normalised in float32.
    kernels: how to compute the convolutions, as `choose.choose` returns it.
    pool: takes the place of the max-pooling of 2x2 between the blocks.

  Returns:
    For each of `layers` [N, H / 2^(block - 1), W / 2^(block - 1), C], float32.

  Raises:
    UserError: this VGG does not have one of the layers.
  """
  convs = sorted(name for name in params if name.startswith("conv"))
  known = convs + [name.replace("conv", "relu") for name in convs]
  for layer in layers:
    if layer not in known:
      raise UserError(f"layer {layer!r} is unknown; this VGG has {', '.join(known)}")

  scale, shift = (params["input"][key].reshape(1, 1, 1, 3) for key in ("scale", "shift"))
  x = image * scale + shift
  features = {}
  for name in convs:
    if len(features) == len(set(layers)):
      break
    if name.endswith("_1") and name != "conv1_1":
      x = nn.max_pool(x, (2, 2), strides=(2, 2)) if pool is None else pool(x)
    x = apply_conv(x, params[name]["kernel"], dtype=dtype, kernels=kernels)
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
    layer: the name of a layer, 'conv5_4' or 'relu5_4' for example; only its block matters.
    convention: the convention of the weights, 'torchvision' or 'caffe'.
    magnitude: the convention whose magnitude is wanted.

  Returns:
    1 if both are the same; otherwise an approximation, see CAFFE_TO_TORCHVISION.

  Raises:
    UserError: the layer or one of the conventions is unknown.
  """
  for value in (convention, magnitude):
    if value not in INPUT:
      raise UserError(f"VGG convention {value!r} is unknown; choose {' or '.join(INPUT)}")
  match = re.fullmatch(r"(?:conv|relu)([1-5])_\d", layer)
  if match is None:
    raise UserError(f"layer {layer!r} is not a VGG layer; try conv5_4 or relu5_4")
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
    Params as `vgg_features` takes them, with torchvision's input convention.

  Raises:
    UserError: there is no VGG of this depth.
  """
  he = nn.initializers.he_normal()
  params, inputs = {"input": dict(INPUT["torchvision"])}, 3
  for name, block in conv_names(depth):
    key, subkey = jax.random.split(key)
    outputs = max(1, round(WIDTHS[block - 1] * width))
    params[name] = {"kernel": he(subkey, (3, 3, inputs, outputs)), "bias": jnp.zeros(outputs)}
    inputs = outputs
  return params


def conv_names(depth: int) -> list[tuple[str, int]]:
  """Returns name and block of each convolution, in order.

  Args:
    depth: 16 or 19.

  Raises:
    UserError: there is no VGG of this depth.
  """
  if depth not in BLOCKS:
    raise UserError(f"there is no VGG{depth} here; choose {' or '.join(map(str, BLOCKS))}")
  return [
    (f"conv{block}_{i}", block)
    for block, count in enumerate(BLOCKS[depth], 1)
    for i in range(1, count + 1)
  ]
