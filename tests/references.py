"""What the tests compare with: the same definitions as slow loops, without jax and sr_jax."""

import math
from fractions import Fraction

import numpy as np


def cubic(x: Fraction) -> Fraction:
  """Keys' kernel with a = -1/2, exactly."""
  x = abs(x)
  if x <= 1:
    return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
  if x < 2:
    return -Fraction(1, 2) * x**3 + Fraction(5, 2) * x**2 - 4 * x + 2
  return Fraction(0)


def resize_line(line: list, scale: Fraction, border: str) -> list[Fraction]:
  """One row or column, unrounded: every source pixel near enough is weighed."""
  n, shrink = len(line), min(scale, Fraction(1))
  result = []
  for out in range(math.ceil(n * scale)):
    center = (Fraction(out) + Fraction(1, 2)) / scale - Fraction(1, 2)
    reach = math.ceil(2 / shrink) + 1
    total = weights = Fraction(0)
    for i in range(math.floor(center) - reach, math.floor(center) + reach + 1):
      weight = cubic((center - i) * shrink)
      source = i
      if border == "mirror":
        while not 0 <= source < n:
          source = -1 - source if source < 0 else 2 * n - 1 - source
      else:
        source = min(max(source, 0), n - 1)
      total += weight * line[source]
      weights += weight
    result.append(total / weights)
  return result


def round_half_up(value: Fraction) -> int:
  """To uint8."""
  return min(max(math.floor(value + Fraction(1, 2)), 0), 255)


def imresize(image: np.ndarray, scale: Fraction, border: str, round_between: bool) -> np.ndarray:
  """Grey uint8 [H, W] -> exact fractions [h, w], not rounded at the end."""
  columns = [resize_line([int(v) for v in column], scale, border) for column in image.T]
  if round_between:
    columns = [[round_half_up(value) for value in column] for column in columns]
  rows = [list(row) for row in zip(*columns, strict=True)]
  return np.array([resize_line(row, scale, border) for row in rows], dtype=object)


def luma(rgb: np.ndarray) -> np.ndarray:
  """Y of BT.601 in studio range, unrounded, of [H, W, 3]."""
  r, g, b = np.moveaxis(rgb.astype(float), 2, 0)
  return (65.481 * r + 128.553 * g + 24.966 * b) / 255 + 16


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """Of two equally shaped images, pixel by pixel."""
  errors = [(float(x) - float(y)) ** 2 for x, y in zip(a.ravel(), b.ravel(), strict=True)]
  return 20 * math.log10(255) - 10 * math.log10(math.fsum(errors) / len(errors))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
  """Of two grey images [H, W], window by window."""
  kernel = [[math.exp(-(i**2 + j**2) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)]
  kernel = np.array(kernel) / np.sum(kernel)
  c1, c2 = 6.5025, 58.5225
  scores = []
  for y in range(a.shape[0] - 10):
    for x in range(a.shape[1] - 10):
      p, q = a[y : y + 11, x : x + 11].astype(float), b[y : y + 11, x : x + 11].astype(float)
      mp, mq = (kernel * p).sum(), (kernel * q).sum()
      vp, vq = (kernel * (p - mp) ** 2).sum(), (kernel * (q - mq) ** 2).sum()
      cov = (kernel * (p - mp) * (q - mq)).sum()
      scores.append((2 * mp * mq + c1) * (2 * cov + c2) / (mp**2 + mq**2 + c1) / (vp + vq + c2))
  return math.fsum(scores) / len(scores)


def block_means(image: np.ndarray, block: int) -> np.ndarray:
  """[H, W, C] -> the means of whole blocks, [rows, columns, C]."""
  rows, columns = image.shape[0] // block, image.shape[1] // block
  means = np.empty((rows, columns, image.shape[2]))
  for y in range(rows):
    for x in range(columns):
      tile = image[y * block : (y + 1) * block, x * block : (x + 1) * block]
      means[y, x] = [math.fsum(channel.ravel()) / block**2 for channel in np.moveaxis(tile, 2, 0)]
  return means


def chroma(rgb: np.ndarray) -> np.ndarray:
  """Cb and Cr of BT.601 in studio range, of RGB in [0, 1]; 0 to 255, from luma and the primaries.

  Cb is (B - Y) scaled to 112 for pure blue, Cr (R - Y) scaled to 112 for pure red, with full-range
  Y of weights 0.299, 0.587, 0.114.
  """
  r, g, b = np.moveaxis(rgb, -1, 0)
  y = 0.299 * r + 0.587 * g + 0.114 * b
  return np.stack([112 * (b - y) / (1 - 0.114), 112 * (r - y) / (1 - 0.299)], axis=-1) + 128


def ms_ssim(a: np.ndarray, b: np.ndarray, scales: int) -> float:
  """Of two grey images [H, W] in [0, 1], window by window."""
  exponents = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales]
  kernel = np.array([[math.exp(-(i**2 + j**2) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
  kernel /= kernel.sum()
  product = 1.0
  for scale, exponent in enumerate(exponents):
    scores = []
    for y in range(a.shape[0] - 10):
      for x in range(a.shape[1] - 10):
        p, q = a[y : y + 11, x : x + 11], b[y : y + 11, x : x + 11]
        mp, mq = (kernel * p).sum(), (kernel * q).sum()
        vp, vq = (kernel * (p - mp) ** 2).sum(), (kernel * (q - mq) ** 2).sum()
        cov = (kernel * (p - mp) * (q - mq)).sum()
        score = (2 * cov + 9e-4) / (vp + vq + 9e-4)
        if scale == scales - 1:
          score *= (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
        scores.append(score)
    product *= max(math.fsum(scores) / len(scores), 1e-6) ** (exponent / sum(exponents))
    a, b = (block_means(image[:, :, None], 2)[..., 0] for image in (a, b))
  return product


def spectrum(image: np.ndarray) -> np.ndarray:
  """The orthonormal DFT of [H, W], frequency by frequency."""
  height, width = image.shape
  y, x = np.mgrid[:height, :width]
  waves = [
    [(image * np.exp(-2j * np.pi * (u * y / height + v * x / width))).sum() for v in range(width)]
    for u in range(height)
  ]
  return np.array(waves) / math.sqrt(height * width)


def focal_frequency(a: np.ndarray, b: np.ndarray, weighed_by: np.ndarray, alpha: float) -> float:
  """Of two grey images [H, W]; the weights are those of `weighed_by` in the place of a."""
  weights = np.abs(spectrum(weighed_by - b)) ** alpha
  return float((weights / weights.max() * np.abs(spectrum(a - b)) ** 2).mean())


def ldl(sr: np.ndarray, hr: np.ndarray, ema_sr: np.ndarray) -> float:
  """Of one image [H, W, C], pixel by pixel."""
  height, width, channels = sr.shape
  residual = np.abs(hr - sr).sum(axis=2)
  averaged = np.abs(hr - ema_sr).sum(axis=2)
  whole = residual.var(ddof=1) ** 0.2

  def reflected(i: int, n: int) -> int:
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

  total = 0.0
  for y in range(height):
    for x in range(width):
      if residual[y, x] < averaged[y, x]:
        continue
      around = [
        residual[reflected(y + i, height), reflected(x + j, width)]
        for i in range(-3, 4)
        for j in range(-3, 4)
      ]
      weight = whole * np.var(around, ddof=1)
      total += sum(abs(weight * sr[y, x, c] - weight * hr[y, x, c]) for c in range(channels))
  return total / sr.size


def murmur3(words: list[int], seed: int) -> int:
  """MurmurHash3 x86 32-bit of 32-bit words, in unbounded integers."""
  mask = 0xFFFFFFFF

  def rotated(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & mask

  h = seed
  for word in words:
    h ^= rotated(word * 0xCC9E2D51 & mask, 15) * 0x1B873593 & mask
    h = (rotated(h, 13) * 5 + 0xE6546B64) & mask
  h ^= 4 * len(words)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    h ^= h >> shift
    h = h * factor & mask
  return h


def plan(seed: int, epoch: int, position: int, lr_sizes: list, lr_patch: int, rounds: int) -> tuple:
  """Image, y, x and dihedral of one example: swap-or-not, then three draws."""
  n, image = len(lr_sizes), position
  for i in range(rounds):
    partner = (murmur3([seed, epoch, i], seed=0) - image) % n
    if murmur3([seed, epoch, i, max(image, partner)], seed=0) >= 2**31:
      image = partner
  height, width = lr_sizes[image]
  y, x, dihedral = (murmur3([seed, epoch, position, i], seed=1) for i in range(3))
  return image, y % (height - lr_patch + 1), x % (width - lr_patch + 1), dihedral % 8


def dihedral(image: np.ndarray, op: int) -> np.ndarray:
  """Square [n, n, C]: mirror left-right (1), then top-bottom (2), then transpose (4)."""
  n = len(image)
  result = np.empty_like(image)
  for y in range(n):
    for x in range(n):
      to_y, to_x = y, x
      if op & 1:
        to_x = n - 1 - to_x
      if op & 2:
        to_y = n - 1 - to_y
      if op & 4:
        to_y, to_x = to_x, to_y
      result[to_y, to_x] = image[y, x]
  return result


def generalised_gaussian(values: np.ndarray) -> tuple[float, float, float, float]:
  """Shape, mean and both spreads of an asymmetric generalised Gaussian; NaN of an empty side."""
  values = [float(value) for value in values.ravel()]

  def deviation(side: list) -> float:
    return math.sqrt(math.fsum(v * v for v in side) / len(side)) if side else math.nan

  left, right = deviation([v for v in values if v < 0]), deviation([v for v in values if v > 0])
  shape = 0.2  # the first of the table, where there is no ratio to look for
  if not math.isnan(left * right):
    shape = generalised_gaussian_shape(values, left / right)
  spread = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
  mean = (right - left) * spread * math.gamma(2 / shape) / math.gamma(1 / shape)
  return shape, mean, left * spread, right * spread


def generalised_gaussian_shape(values: list, skew: float) -> float:
  """The shape in the table whose moments are nearest to those of the values."""
  absolute, square = math.fsum(map(abs, values)), math.fsum(v * v for v in values)
  ratio = absolute**2 / len(values) / square
  ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2

  def error(shape: float) -> float:
    return abs(math.gamma(2 / shape) ** 2 / math.gamma(1 / shape) / math.gamma(3 / shape) - ratio)

  return min((0.2 + 0.001 * i for i in range(9801)), key=error)


def niqe_features(luma: np.ndarray, window: np.ndarray) -> np.ndarray:
  """Rounded Y [H, W] -> [blocks, 36], block by block and pixel by pixel."""
  rows, columns = (n // 96 for n in luma.shape)
  image = luma[: rows * 96, : columns * 96].astype(float)
  scales = []
  for block in (96, 48):
    contrast = np.empty_like(image)
    around = np.pad(image, 3, mode="edge")
    for y in range(image.shape[0]):
      for x in range(image.shape[1]):
        patch = around[y : y + 7, x : x + 7] - image[y, x]  # all zeros where it is flat
        mean = (window * patch).sum()
        variance = (window * patch**2).sum() - mean**2
        contrast[y, x] = -mean / (math.sqrt(abs(variance)) + 1)
    features = []
    for top in range(0, image.shape[0], block):
      for left in range(0, image.shape[1], block):
        tile = contrast[top : top + block, left : left + block]
        shape, _, below, above = generalised_gaussian(tile)
        features.append([shape, (below + above) / 2])
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
          neighbour = np.array(
            [[tile[(y - dy) % block, (x - dx) % block] for x in range(block)] for y in range(block)]
          )
          features[-1] += generalised_gaussian(tile * neighbour)
    scales.append(features)
    for _ in range(2):  # rows, then columns
      half = resize_line(list(image), Fraction(1, 2), "mirror")
      image = np.array(half, float).T
  return np.concatenate(scales, axis=1)


def niqe(luma: np.ndarray, mean: np.ndarray, covariance: np.ndarray, window: np.ndarray) -> float:
  """Distance of a photograph's statistics from a model's, of Y [H, W]."""
  features = niqe_features(luma, window)
  whole = [row for row in features if not any(map(math.isnan, row))]
  center = sum(whole) / len(whole)
  spread = sum(np.outer(row - center, row - center) for row in whole) / (len(whole) - 1)
  columns = [[value for value in column if not math.isnan(value)] for column in features.T]
  difference = np.array([math.fsum(column) / len(column) for column in columns]) - mean
  return math.sqrt(difference @ np.linalg.solve((covariance + spread) / 2, difference))
