"""A network as a function from uint8 image to uint8 image, of any size."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.images import resize
from sr_jax.kernels.choose import choose
from sr_jax.networks.build import in_channels
from sr_jax.networks.masking import zero_outside

BASELINE = "bicubic"  # what everybody compares with; `--model bicubic` asks for it
# uint8 LR [h, w, c] in, uint8 SR [h*s, w*s, c] out; c may be missing (grey).
Upscaler = Callable[[np.ndarray], np.ndarray]


def make_upscaler(
  module: nn.Module,
  variables: Mapping[str, Any],
  run_engine: Upscaler | None = None,
  device: jax.Device | None = None,
) -> Upscaler:
  """Makes a function that upscales images of any size with few compiled programs.

  An image is padded to the next of few sizes. The result is still that of the unpadded image: the
  input of each convolution is set to zero outside the image, which is what the convolution's own
  zero padding would have put there, and the padding repeats the border, as resizing does.

  Args:
    module: a generator.
    variables: its parameters and statistics, as `models.load_model` returns them.
    run_engine: what `engines.open_engine` returned as `run`, instead of JAX; it takes images of any
      size as they are.
    device: to compute on; by default this process's first.

  Returns:
    uint8 [h, w, 3] -> uint8 [h*s, w*s, 3], [h, w] -> [h*s, w*s]. A model of one channel upscales
    the luma of a colour image, bicubic its colours.

  Raises:
    UserError: a model of other channels than images have.
  """
  multiple = getattr(module, "input_unshuffle", 1)
  channels = in_channels(variables, {"input_unshuffle": multiple})
  if channels not in (1, 3) or module.out_channels != channels:
    raise UserError(
      f"the model makes {module.out_channels} channels of {channels}; images have 3, grey ones 1"
    )
  if run_engine is None:
    device = device or jax.local_devices()[0]
    forward = make_forward(module, device)
    variables = jax.device_put(variables, device)

  def run(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    even = [-(-n // multiple) * multiple for n in (height, width)]
    padded = even if run_engine else [bucket(n) for n in even]
    image = np.pad(image, [(0, padded[0] - height), (0, padded[1] - width), (0, 0)], mode="edge")
    if run_engine:
      sr = run_engine(image)
    else:
      sr = np.asarray(forward(variables, image[None], *even))[0]
    return sr[: height * module.scale, : width * module.scale]

  def upscale(lr: np.ndarray) -> np.ndarray:
    if lr.ndim == 2:
      sr = run(np.repeat(lr[:, :, None], channels, axis=2))
      return sr[:, :, 0] if channels == 1 else _luma(sr)
    if channels == 3:
      return run(lr)
    bicubic = bicubic_upscaler(module.scale)(lr).astype(int)
    detail = run(_luma(lr)[:, :, None]) - _luma(bicubic)[:, :, None].astype(int)
    return np.clip(bicubic + detail, 0, 255).astype(np.uint8)

  return upscale


def bicubic_upscaler(scale: int) -> Upscaler:
  """The baseline: MATLAB's bicubic, float all through, rounded once."""
  return lambda lr: resize.imresize(lr, scale, convention="double_mirror")


@functools.lru_cache(maxsize=8)  # evaluation during training comes back with the same module
def make_forward(module: nn.Module, device: jax.Device) -> Callable[..., jax.Array]:
  """Makes the function that upscales on one device, by the kernels that are chosen for it.

  Returns:
    (variables, uint8 [1, H, W, c], height, width) -> uint8 [1, H*s, W*s, out_channels], compiled
    once for each H and W. Height and width say how much of the image is not padding.
  """
  module = module.clone(kernels=choose([device], module.dtype, module))

  @functools.partial(jax.jit, compiler_options=dict(module.kernels.compiler_options))
  def forward(variables, padded, height, width):
    rows = jnp.arange(padded.shape[1]) < height
    columns = jnp.arange(padded.shape[2]) < width
    inside = (rows[:, None] & columns[None, :]).astype(jnp.float32)[None, :, :, None]
    with nn.intercept_methods(zero_outside(inside)):
      sr = module.apply(variables, padded.astype(jnp.float32) / 255.0, train=False)
    return jnp.floor(jnp.clip(sr, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)

  return forward


def bucket(size: int) -> int:
  """Rounds up to 32, 48, 64, 96, 128, 192, ...: at most half again as long, few programs."""
  bucket = 32
  while bucket < size:
    bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
  return bucket


def _luma(rgb: np.ndarray) -> np.ndarray:
  """BT.601 luma in full range, uint8: what a grey file of this image would hold."""
  return np.floor(rgb @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)
