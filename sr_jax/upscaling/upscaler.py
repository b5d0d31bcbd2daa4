"""A network as a function from uint8 image to uint8 image, of any size."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.images import resize
from sr_jax.kernels.choose import PLAIN, choose
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
  if run_engine is None:
    device = device or jax.local_devices()[0]
    forward = make_forward(module, device)
    placed = jax.device_put(variables, device)

  def run(image: np.ndarray) -> np.ndarray:
    if run_engine:
      padded, _ = _pad(module, image, lambda n: n)
      sr = run_engine(padded)
    else:
      padded, even = _pad(module, image, bucket)
      sr = np.asarray(forward(placed, padded[None], *even))[0]
    return sr[: image.shape[0] * module.scale, : image.shape[1] * module.scale]

  return _of_any_image(module, variables, run)


def make_sweep(
  module: nn.Module,
  psnr: Mapping[str, Any],
  gan: Mapping[str, Any],
  alphas: Sequence[float],
  device: jax.Device | None = None,
) -> list[Upscaler]:
  """Makes an upscaler for each alpha between two models (ESRGAN, section 3.4), in one program.

  The program goes through the alphas one after the other, so that it needs the memory of one, and
  is compiled once for each size, not once for each alpha. The upscalers share what it computes: if
  they are called with the same image in turn, it runs once.

  Args:
    module: the generator of both models.
    psnr: the PSNR model's parameters and statistics.
    gan: the GAN model's.
    alphas: shares of the GAN model, each in [0, 1].
    device: to compute on; by default this process's first.

  Returns:
    For each alpha what `make_upscaler` returns for `interpolation.interpolate(psnr, gan, alpha)`.

  Raises:
    UserError: a model of other channels than images have.
  """
  device = device or jax.local_devices()[0]
  forward = make_forward(module, device)
  placed = jax.device_put((psnr, gan), device)
  shares = np.array([(1 - alpha, alpha) for alpha in alphas], np.float32)

  @jax.jit
  def forward_all(psnr, gan, shares, padded, height, width):
    def one(share):
      mixed = jax.tree.map(lambda p, g: share[0] * p + share[1] * g, psnr, gan)
      return forward(mixed, padded, height, width)[0]

    return jax.lax.map(one, shares)

  @functools.lru_cache(maxsize=1)
  def run_all(pixels: bytes, shape: tuple[int, ...]) -> np.ndarray:
    image = np.frombuffer(pixels, np.uint8).reshape(shape)
    padded, even = _pad(module, image, bucket)
    srs = np.asarray(forward_all(*placed, shares, padded[None], *even))
    return srs[:, : image.shape[0] * module.scale, : image.shape[1] * module.scale]

  def run(i: int, image: np.ndarray) -> np.ndarray:
    return run_all(image.tobytes(), image.shape)[i]

  return [_of_any_image(module, psnr, functools.partial(run, i)) for i in range(len(alphas))]


def _pad(
  module: nn.Module, image: np.ndarray, size: Callable[[int], int]
) -> tuple[np.ndarray, list[int]]:
  """Pads an image [h, w, c]; returns it, and height and width that the network can divide."""
  multiple = getattr(module, "input_unshuffle", 1)
  even = [-(-n // multiple) * multiple for n in image.shape[:2]]
  pads = [(0, size(n) - side) for n, side in zip(even, image.shape, strict=False)]
  return np.pad(image, [*pads, (0, 0)], mode="edge"), even


def _of_any_image(module: nn.Module, variables: Mapping[str, Any], run: Upscaler) -> Upscaler:
  """Makes an upscaler of colour and grey images of one of images with the model's channels.

  Args:
    module: the generator.
    variables: its parameters.
    run: uint8 [h, w, c] -> uint8 [h*s, w*s, c].

  Raises:
    UserError: a model of other channels than images have.
  """
  channels = in_channels(variables, {"input_unshuffle": getattr(module, "input_unshuffle", 1)})
  if channels not in (1, 3) or module.out_channels != channels:
    raise UserError(
      f"the model makes {module.out_channels} channels of {channels}; images have 3, grey ones 1"
    )

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
    sr = _apply(module, variables, padded.astype(jnp.float32) / 255.0, height, width)
    return jnp.floor(jnp.clip(sr, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)

  return forward


@functools.lru_cache(maxsize=8)
def make_float_forward(
  module: nn.Module, device: jax.Device, plain_form: bool = False
) -> Callable[..., jax.Array]:
  """Makes the same function of float images, neither rounded nor clipped.

  Args:
    module: the generator.
    device: to compute on.
    plain_form: whether to compute as the paper prints it, in float32, whatever would be faster.

  Returns:
    (variables, float32 [N, H, W, c], height, width) -> float32 [N, H*s, W*s, out_channels]. Height
    and width are numbers, or [N], and say how much of each image is not padding.
  """
  if plain_form:
    module = plain(module)
  else:
    module = module.clone(kernels=choose([device], module.dtype, module))

  @functools.partial(jax.jit, compiler_options=dict(module.kernels.compiler_options))
  def forward(variables, padded, height, width):
    return _apply(module, variables, padded, height, width)

  return forward


def plain(module: nn.Module) -> nn.Module:
  """Returns a generator that computes as the paper prints it, by plain XLA in float32."""
  form = {"algorithm": "concat"} if hasattr(module, "algorithm") else {}
  return module.clone(kernels=PLAIN, dtype=jnp.float32, **form)


def _apply(
  module: nn.Module,
  variables: Mapping[str, Any],
  lr: jax.Array,
  height: int | jax.Array,
  width: int | jax.Array,
) -> jax.Array:
  """Upscales images [N, H, W, c] of which only height and width are not padding."""
  rows = jnp.arange(lr.shape[1])[None] < jnp.reshape(height, (-1, 1))
  columns = jnp.arange(lr.shape[2])[None] < jnp.reshape(width, (-1, 1))
  inside = (rows[:, :, None] & columns[:, None, :]).astype(jnp.float32)[..., None]
  with nn.intercept_methods(zero_outside(inside)):
    return module.apply(variables, lr, train=False)


def bucket(size: int) -> int:
  """Rounds up to 32, 48, 64, 96, 128, 192, ...: at most half again as long, few programs."""
  bucket = 32
  while bucket < size:
    bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
  return bucket


def _luma(rgb: np.ndarray) -> np.ndarray:
  """BT.601 luma in full range, uint8: what a grey file of this image would hold."""
  return np.floor(rgb @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)
