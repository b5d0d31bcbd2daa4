"""Resizes images as MATLAB does, by antialiased bicubic: how LR images are made from HR images.

`imresize` is the reference: it runs on the host, in float64, and equals MATLAB's bit for bit.
`downsample` is the same resampling in float32 inside a jitted function, for a loss or an
augmentation on the device. LR for training and for tests always comes from `imresize`.

Other libraries' "bicubic" differ: OpenCV's has a = -0.75 and no antialiasing, TensorFlow's and
JAX's renormalise the weights at the borders where MATLAB mirrors the image.
"""

import fractions
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError

# How to treat what lies outside of the image, and whether to round between the two passes.
CONVENTIONS = {
  "uint8_mirror_round_between": ("mirror", True),  # imresize(uint8 image) of today's MATLAB
  "uint8_clamp_round_between": ("clamp", True),
  "double_mirror": ("mirror", False),  # im2uint8(imresize(im2double(image)))
}
DEFAULT_CONVENTION = "uint8_mirror_round_between"


def imresize(
  image: np.ndarray,
  scale: float | fractions.Fraction,
  convention: str = DEFAULT_CONVENTION,
) -> np.ndarray:
  """Resize an image as MATLAB's `imresize(image, scale, 'bicubic')` does.

  The kernel is Keys' cubic with a = -0.5, widened by 1/scale when the image shrinks. Rows come
  first, then columns. Rounding is floor(x + 0.5), since half to even would differ from MATLAB at
  ties. Images of 16 bits are rounded to 16 bits, as MATLAB rounds to the class of its input.

  Args:
    image: uint8 or uint16, [H, W] or [H, W, C].
    scale: output size / input size, for instance 4, 0.25 or Fraction(1, 3). A float is taken as
      the nearest fraction with a denominator up to 10,000: 1/3 means one third.
    convention: a key of `CONVENTIONS`. LR images are made with the default; the bicubic baseline
      enlarges with 'double_mirror'.

  Returns:
    Of the image's dtype, [ceil(H * scale), ceil(W * scale)] or with C.

  Raises:
    UserError: it is neither uint8 nor uint16, the scale is not positive, or the convention is
      unknown.
  """
  if convention not in CONVENTIONS:
    raise UserError(f"convention={convention!r} must be one of {', '.join(CONVENTIONS)}")
  if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3) or not image.size:
    raise UserError(
      f"image of {image.dtype} {list(image.shape)} must be a uint8 or uint16 [H, W] or [H, W, C]; "
      "convert floats with np.floor(image * 255 + 0.5).astype(np.uint8)"
    )
  border, round_between = CONVENTIONS[convention]
  scale = _exact(scale)
  rows = _resize_axis(image, 0, scale, border)
  if round_between:
    rows = _rounded(rows, image.dtype)
  return _rounded(_resize_axis(rows, 1, scale, border), image.dtype)


def downsample(batch: jax.Array, scale: float | fractions.Fraction) -> jax.Array:
  """Resize a batch on the device as `imresize` with 'double_mirror' does, unrounded, in float32.

  Each pass is a product with a small constant matrix, which is what an accelerator does best.
  Rounded to uint8, one value in 85,000 (BSD100, x4) differs from 'double_mirror', by 1/255, because
  it is a tie. One in 10 differs from the default convention, which rounds between the passes.

  Args:
    batch: float32 in [0, 1], [N, H, W, C].
    scale: output size / input size, a Python number, because it decides the output's shape.

  Returns:
    float32, [N, ceil(H * scale), ceil(W * scale), C]. The values are not rounded, and may leave
    [0, 1] at edges.

  Raises:
    UserError: the scale is not positive.
  """
  scale = _exact(scale)
  rows = jnp.asarray(_matrix(batch.shape[1], scale), batch.dtype)
  columns = jnp.asarray(_matrix(batch.shape[2], scale), batch.dtype)
  # The default precision of TPUs and recent GPUs would keep 8 to 11 bits of each factor.
  batch = jnp.einsum("oh,nhwc->nowc", rows, batch, precision=jax.lax.Precision.HIGHEST)
  return jnp.einsum("pw,nowc->nopc", columns, batch, precision=jax.lax.Precision.HIGHEST)


def resize_rows(
  image: np.ndarray, scale: float | fractions.Fraction, first: int, last: int
) -> np.ndarray:
  """Computes some rows of an enlarged or shrunk image as `imresize` with 'double_mirror' does.

  Args:
    image: [H, W] or [H, W, C], of any dtype.
    scale: output size / input size.
    first, last: rows of the output, the last one excluded.

  Returns:
    float64 [last - first, ceil(W * scale)] or with C, not rounded; it may leave the image's range.
  """
  scale = _exact(scale)
  weight, index = _taps(len(image), scale, "mirror")
  rows = _weighted(image, weight[first:last], index[first:last])
  return _resize_axis(rows, 1, scale, "mirror")


def resize_strips(
  strips: Iterable[np.ndarray], height: int, scale: float | fractions.Fraction
) -> Iterator[np.ndarray]:
  """Resizes an image that comes in strips of rows, as `resize_rows` resizes one in memory.

  Args:
    strips: of [n, W] or [n, W, C], from the top down.
    height: of the image, the rows of all strips.
    scale: output size / input size.

  Yields:
    Strips of float64 rows of the result, which has ceil(height * scale) of them.
  """
  scale = _exact(scale)
  weight, index = _taps(height, scale, "mirror")
  # A row can be computed when the rows that it needs have come, and frees those before them.
  lowest, needed = np.minimum.accumulate(index[::-1].min(axis=1))[::-1], index.max(axis=1)
  rows, top, done = None, 0, 0
  for strip in strips:
    rows = strip if rows is None else np.concatenate([rows, strip])
    ready = int(np.searchsorted(np.maximum.accumulate(needed), top + len(rows)))
    if ready > done:
      resized = _weighted(rows, weight[done:ready], index[done:ready] - top)
      yield _resize_axis(resized, 1, scale, "mirror")
      done = ready
      free = (lowest[done] if done < len(lowest) else height) - top
      rows, top = rows[free:], top + free


def _exact(scale: float | fractions.Fraction) -> fractions.Fraction:
  exact = fractions.Fraction(scale).limit_denominator(10_000)
  if exact <= 0:
    raise UserError(f"scale={scale} must be positive; 0.25 makes an image four times smaller")
  return exact


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel with a = -0.5."""
  x = np.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return np.where(x <= 1, near, np.where(x <= 2, far, 0))


@functools.lru_cache(maxsize=256)
def _taps(size: int, scale: fractions.Fraction, border: str) -> tuple[np.ndarray, np.ndarray]:
  """Returns the weights and source indices of one axis, both [output size, taps]."""
  output = -(-size * scale.numerator // scale.denominator)
  shrink = min(float(scale), 1.0)  # antialiasing: the kernel widens when the image shrinks
  center = (np.arange(output) + 0.5) / float(scale) - 0.5
  first = np.floor(center - 2 / shrink).astype(np.int64)
  index = first[:, None] + np.arange(int(np.ceil(4 / shrink)) + 2)
  weight = _cubic(shrink * (center[:, None] - index))
  weight /= weight.sum(axis=1, keepdims=True)
  if border == "mirror":  # ... 1 0 | 0 1 ... n-1 | n-1 n-2 ...
    index %= 2 * size
    index = np.minimum(index, 2 * size - 1 - index)
  else:
    index = np.clip(index, 0, size - 1)
  used = np.any(weight != 0, axis=0)
  return weight[:, used], index[:, used]


def _matrix(size: int, scale: fractions.Fraction) -> np.ndarray:
  """Returns the taps with mirrored borders as a matrix, float64 [output size, size]."""
  weight, index = _taps(size, scale, "mirror")
  matrix = np.zeros((len(weight), size))
  np.add.at(matrix, (np.arange(len(weight))[:, None], index), weight)
  return matrix


def _resize_axis(
  image: np.ndarray, axis: int, scale: fractions.Fraction, border: str
) -> np.ndarray:
  """Resample one axis of whole numbers or float64 [H, W] or [H, W, C] to float64."""
  image = np.swapaxes(image, 0, axis)
  weight, index = _taps(image.shape[0], scale, border)
  return np.swapaxes(_weighted(image, weight, index), 0, axis)


def _weighted(image: np.ndarray, weight: np.ndarray, index: np.ndarray) -> np.ndarray:
  """Sums lines of the first axis by the weights and source indices of `_taps`, in float64."""
  lines = np.ascontiguousarray(image).reshape(len(image), -1)
  # The sum goes tap by tap and is no matrix product: at scale 1/3 one value in 162 is a tie that
  # the last bit decides, and BLAS adds in another order on another CPU.
  result = np.zeros((len(weight), lines.shape[1]))
  term = np.empty_like(result)
  for tap in range(weight.shape[1]):
    result += np.multiply(weight[:, tap, None], lines[index[:, tap]], out=term)
  return result.reshape(-1, *image.shape[1:])


def _rounded(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
  return np.clip(np.floor(image + 0.5), 0, np.iinfo(dtype).max).astype(dtype)
