"""The steps of Real-ESRGAN's degradations, each beside something that knows nothing of sr_jax."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import scipy.ndimage
import scipy.special
import scipy.stats
import skimage.data

from sr_jax.data.degrade import jpeg, kernels, noise, resize, sharpen, webp

REACH = 10


def planar(image: np.ndarray) -> np.ndarray:
  return np.moveaxis(image, -1, 0)


def photograph(height: int, width: int, y: int = 60, x: int = 150) -> np.ndarray:
  """A crop of a face, [height, width, 3] in [0, 1]."""
  return skimage.data.astronaut()[y : y + height, x : x + width].astype(np.float32) / 255


def slow_kernel(kind, side, sigma_x, sigma_y, angle, beta, cutoff):
  """A kernel by its definition in float64, point by point, in the middle of 21x21."""
  half, kernel = side // 2, np.zeros((21, 21))
  if kind % 2 == 0:
    sigma_y, angle = sigma_x, 0.0
  turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
  inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
  for y in range(-half, half + 1):
    for x in range(-half, half + 1):
      q = np.array([x, y]) @ inverse @ np.array([x, y])
      if kind == kernels.SINC:
        r = np.hypot(x, y)
        value = cutoff**2 / (4 * np.pi)
        if r:
          value = cutoff * scipy.special.j1(cutoff * r) / (2 * np.pi * r)
      elif kind < 2:
        value = np.exp(-q / 2)
      elif kind < 4:
        value = np.exp(-(q**beta) / 2)
      else:
        value = 1 / (1 + q**beta)
      kernel[y + 10, x + 10] = value
  return kernel / kernel.sum()


def test_kernels_are_their_definitions():
  rng = np.random.default_rng(0)
  n = 140
  kind = np.arange(n) % 7
  side = 7 + 2 * rng.integers(0, 8, n)
  sigma_x, sigma_y = rng.uniform(0.2, 3, (2, n))
  angle, beta = rng.uniform(-np.pi, np.pi, n), rng.uniform(0.5, 4, n)
  cutoff = rng.uniform(np.pi / 5, np.pi, n)

  @jax.jit
  @jax.vmap
  def made(kind, side, sigma_x, sigma_y, angle, beta, cutoff):
    bell = kernels.bell(kind, side, sigma_x, sigma_y, angle, beta, REACH)
    return jnp.where(kind == kernels.SINC, kernels.sinc(side, cutoff, REACH), bell)

  drawn = (kind, side, sigma_x, sigma_y, angle, beta, cutoff)
  for kernel, *parameters in zip(made(*drawn), *drawn, strict=True):
    np.testing.assert_allclose(kernel, slow_kernel(*parameters), atol=1e-6)


@pytest.mark.parametrize("reach", [10, 3])
def test_blur_reflects_at_the_edges_of_the_valid_part(reach):
  rng = np.random.default_rng(1)
  image = rng.random((3, 45, 45), np.float32)
  kernel = rng.random((2 * reach + 1, 2 * reach + 1), np.float32)
  kernel /= kernel.sum()
  blur = jax.jit(kernels.blur)
  for size in (11, 24, 37, 45):
    expected = [
      scipy.ndimage.correlate(plane[:size, :size].astype(float), kernel, mode="mirror")
      for plane in image
    ]
    np.testing.assert_allclose(
      blur(image, kernel, np.int32(size))[:, :size, :size], expected, atol=1e-6
    )


@pytest.mark.developer("torch")
def test_resizing_is_pytorchs_interpolate():
  import torch
  import torch.nn.functional as F

  rng = np.random.default_rng(2)
  image = rng.random((3, 40, 40), np.float32)
  resized = jax.jit(resize.resize, static_argnames="new_side")
  for factor in rng.uniform(0.15, 1.5, 30).astype(np.float32):
    size = int(rng.integers(20, 41))
    valid = torch.tensor(image[None, :, :size, :size])
    for mode, name in enumerate(resize.MODES):
      for by_factor in (True, False):
        new = int(np.floor(size * factor))
        how = {"scale_factor": float(factor)} if by_factor else {"size": (new, new)}
        expected = F.interpolate(valid, mode=name, **how)[0].numpy()
        assert expected.shape[1] == new
        given = factor if by_factor else None
        ours = np.asarray(resized(image, mode, np.int32(size), np.int32(new), 60, given))
        np.testing.assert_allclose(ours[:, :new, :new], expected, atol=1e-5)
        assert not ours[:, new:].any() and not ours[:, :, new:].any()


def test_the_kept_size_is_the_image_itself():
  image = np.random.default_rng(3).random((3, 24, 24), np.float32)
  resized = jax.jit(resize.resize, static_argnums=4)
  for mode in range(3):
    kept = resized(image, mode, 20, 20, 24, np.float32(1))
    np.testing.assert_allclose(kept[:, :20, :20], image[:, :20, :20], atol=1e-6)


def slow_jpeg(image: np.ndarray, quality: float) -> np.ndarray:
  """JPEG's loss in float64: the cosine sums, coefficient by coefficient. [H, W, 3] in [0, 1]."""
  height, width = image.shape[:2]
  image = np.pad(image.astype(float), ((0, -height % 16), (0, -width % 16), (0, 0))) * 255
  r, g, b = np.moveaxis(image, -1, 0)
  y = 0.299 * r + 0.587 * g + 0.114 * b
  cb = -0.168736 * r - 0.331264 * g + 0.5 * b + 128
  cr = 0.5 * r - 0.418688 * g - 0.081312 * b + 128
  scale = (5000 / quality if quality < 50 else 200 - 2 * quality) / 100

  def halved(plane):
    return (plane[::2, ::2] + plane[1::2, ::2] + plane[::2, 1::2] + plane[1::2, 1::2]) / 4

  def coded(plane, table):
    n = np.arange(8)
    wave = np.cos((2 * n[None] + 1) * n[:, None] * np.pi / 16)  # [frequency, position]
    norm = np.where(n == 0, 1 / np.sqrt(2), 1) / 2
    result = np.zeros_like(plane)
    for i in range(0, plane.shape[0], 8):
      for j in range(0, plane.shape[1], 8):
        block = plane[i : i + 8, j : j + 8] - 128
        for u in range(8):  # vertical
          for v in range(8):
            c = norm[u] * norm[v] * (block * wave[u][:, None] * wave[v][None]).sum()
            step = table[u, v] * scale
            c = np.round(c / step) * step if step else c
            wave_uv = wave[u][:, None] * wave[v][None]
            result[i : i + 8, j : j + 8] += norm[u] * norm[v] * c * wave_uv
    return result + 128

  # The standard's tables as Pillow knows them, which libjpeg writes at quality 50.
  file = io.BytesIO()
  Image.new("RGB", (16, 16)).save(file, "JPEG", quality=50)
  luma, chroma = (np.reshape(Image.open(file).quantization[i], (8, 8)) for i in (0, 1))
  y, cb, cr = coded(y, luma), coded(halved(cb), chroma), coded(halved(cr), chroma)
  cb, cr = (plane.repeat(2, 0).repeat(2, 1) - 128 for plane in (cb, cr))
  rgb = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
  return np.clip(np.stack(rgb, -1), 0, 255)[:height, :width] / 255


@functools.cache
def compressed():
  return jax.jit(jpeg.compress)


@pytest.mark.parametrize("quality, size", [(30.0, 48), (49.9, 33), (50.0, 48), (95.0, 41)])
def test_jpeg_is_the_slow_one(quality, size):
  image = photograph(48, 48)
  ours = compressed()(planar(image), np.float32(quality), np.int32(size))
  expected = slow_jpeg(image[:size, :size], quality)
  # Where a coefficient lies halfway between two steps, float32 may take the other one.
  wrong = np.abs(ours[:, :size, :size] - planar(expected)) > 1e-5
  blocks = np.pad(wrong.any(0), ((0, -size % 16), (0, -size % 16))).reshape(-1, 16, 3, 16)
  assert blocks.any((1, 3)).sum() <= 1, wrong.mean()


def pillow_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
  file = io.BytesIO()
  Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:2:0")
  return np.asarray(Image.open(file))


@pytest.mark.parametrize("quality", [30, 50, 70, 95])
def test_jpeg_is_near_libjpegs(quality):
  image = photograph(192, 192)
  theirs = pillow_jpeg((image * 255).astype(np.uint8), quality).astype(float)
  ours = compressed()(planar(image), np.float32(quality), np.int32(192)) * 255
  difference = np.abs(ours - planar(theirs)).mean()
  lost = np.abs(image * 255 - theirs).mean()
  assert difference < min(2.5, 0.7 * lost), (difference, lost)


def test_webp_is_pillows():
  """In a loop of a compiled program, with a valid part of another size each time."""
  image = planar(photograph(64, 64))
  quality, size = np.float32([30, 80.4]), np.int32([64, 41])
  compress = jax.jit(
    lambda quality, size: jax.lax.map(lambda each: webp.compress(image, *each), (quality, size))
  )
  for ours, q, n in zip(compress(quality, size), (30, 80), size, strict=True):
    file = io.BytesIO()
    valid = np.moveaxis(np.round(image[:, :n, :n] * 255), 0, -1).astype(np.uint8)
    Image.fromarray(valid).save(file, "WEBP", quality=q)
    theirs = planar(np.asarray(Image.open(file).convert("RGB")))
    np.testing.assert_array_equal(np.round(ours[:, :n, :n] * 255), theirs)


def test_poisson_numbers_are_distributed_as_poissons():
  draw, n = jax.jit(noise.poisson), 2 * 10**5
  # Evenly spread probabilities stand for samples, without the noise of samples.
  normal = scipy.stats.norm.ppf((np.arange(n) + 0.5) / n).astype(np.float32)
  for mean in (0.0, 0.05, 0.7, 2.0, 3.99, 4.0, 7.5, 30.0, 120.0, 256.0):
    counts = np.asarray(draw(np.full(n, mean, np.float32), normal))
    assert (counts == np.round(counts)).all() and counts.min() >= 0
    top = int(counts.max()) + 1
    share = np.bincount(counts.astype(int), minlength=top) / n
    exact = scipy.stats.poisson.pmf(np.arange(top), mean)
    assert np.abs(share - exact).sum() / 2 < 4e-3, mean  # the total variation
    assert abs(counts.mean() - mean) < 2e-3 * max(1, mean**0.5)
    assert abs(counts.var() - mean) < 3e-3 * max(1, mean)


def test_noise_by_its_moments():
  gaussian, poisson = jax.jit(noise.add_gaussian), jax.jit(noise.add_poisson)
  flat = np.full((3, 600, 600), 0.5, np.float32)  # 10^6 samples
  normal = np.random.default_rng(5).standard_normal(flat.shape, np.float32)
  for grey in (False, True):
    added = (np.asarray(gaussian(flat, normal, np.float32(12), grey)) - 0.5) * 255
    assert abs(added.mean()) < 0.1 and abs(added.std() - 12) < 0.05
    assert (np.ptp(added, axis=0) == 0).all() == grey
    # One level only: n = 1, so that the noise is (Poisson(128/255) - 128/255) scale.
    added = np.asarray(poisson(flat, normal, np.float32(0.05), grey, 600)) - 0.5
    assert abs(added.mean()) < 3e-4 and abs(added.std() - 0.05 * (128 / 255) ** 0.5) < 2e-4
    assert (np.ptp(added, axis=0) == 0).all() == grey
  for value in (0.0, 1.0):  # noise is clipped
    image = np.full_like(flat, value)
    for noisy in (
      gaussian(image, normal, np.float32(30), False),
      poisson(image, normal, np.float32(3), False, 600),
    ):
      assert 0 <= float(noisy.min()) and float(noisy.max()) <= 1


def test_only_levels_of_the_valid_part_are_counted():
  count = jax.jit(lambda levels, inside: noise.distinct(levels, inside))
  levels = np.full((3, 45, 45), 200, np.uint32)
  levels[:, :41, :41] = np.arange(100, 141)
  inside = (np.arange(45) < 41)[None, None, :] & (np.arange(45) < 41)[None, :, None]
  assert int(count(levels, inside)) == 41
  assert int(count(levels, np.ones_like(inside))) == 42
  everything = np.arange(256, dtype=np.uint32).reshape(1, 16, 16)
  assert int(jax.jit(noise.distinct)(everything, np.ones((1, 1, 1), bool))) == 256
  powers = jax.jit(jax.vmap(noise.power_of_two))(np.uint32([1, 2, 3, 41, 64, 65, 129, 256]))
  np.testing.assert_array_equal(powers, [1, 2, 4, 64, 64, 128, 256, 256])


@pytest.mark.developer("cv2")
@pytest.mark.parametrize("height, width", [(96, 96), (60, 80)])
def test_sharpening_is_opencvs(height, width):
  import cv2

  image = photograph(height, width).astype(np.float64)
  blur = functools.partial(
    cv2.GaussianBlur, ksize=(51, 51), sigmaX=0, borderType=cv2.BORDER_REFLECT_101
  )
  difference = image - blur(image)
  mask = blur((np.abs(difference) * 255 > 10).astype(float))
  assert 0.1 < mask.mean() < 0.9
  expected = mask * np.clip(image + 0.5 * difference, 0, 1) + (1 - mask) * image
  ours = jax.jit(sharpen.sharpen)(image.astype(np.float32)[None])[0]
  np.testing.assert_allclose(ours, expected, atol=2e-5)
