"""Tests of sr_jax/upscaling/upscaler.py: what an upscaler returns, and with how few programs."""

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_models import apply, assert_same_pixels, contrasting_model, make_model, photo

from sr_jax.models.interpolation import interpolate
from sr_jax.models.model import Model
from sr_jax.networks.build import GENERATORS, build_generator
from sr_jax.upscaling.upscaler import Upscaler, bucket, make_sweep, make_upscaler

# LR heights and widths of Set14 at x4.
SET14 = [
  (120, 125), (144, 180), (128, 128), (72, 88), (90, 62), (69, 69), (90, 125),
  (88, 72), (128, 128), (128, 128), (128, 192), (128, 128), (164, 132), (97, 146),
]  # fmt: skip


def upscaler(model: Model) -> Upscaler:
  module = build_generator(model.name, model.kwargs)
  return make_upscaler(module, model.variables)


def to_uint8(sr: np.ndarray) -> np.ndarray:
  return np.floor(np.clip(sr, 0, 1) * 255 + 0.5).astype(np.uint8)


def assert_same_image(actual: np.ndarray, expected: np.ndarray) -> None:
  """The same pixels, of an image in which others would show."""
  assert expected.std() > 20 and np.mean((expected == 0) | (expected == 255)) < 0.2
  assert_same_pixels(actual, expected)


def test_a_sweep_is_a_loop_over_alpha_in_one_program():
  """Every alpha's image is that of its interpolated model; the program runs once for an image."""
  psnr, gan = (make_model("residualnet", seed=seed, blocks=1) for seed in (0, 1))
  module = build_generator(psnr.name, psnr.kwargs)
  alphas = [0.0, 0.3, 1.0]
  swept = make_sweep(module, psnr.variables, gan.variables, alphas)
  rng = np.random.default_rng(0)
  for shape in ((20, 33, 3), (17, 9)):
    lr = rng.integers(0, 256, shape).astype(np.uint8)
    for alpha, upscale in zip(alphas, swept, strict=True):
      mixed = interpolate(psnr.variables, gan.variables, alpha)
      expected = make_upscaler(module, mixed)(lr)
      difference = np.abs(upscale(lr).astype(int) - expected)
      assert difference.max() <= 1 and (difference > 0).mean() < 1e-3, alpha


@pytest.mark.parametrize("name", GENERATORS)
def test_padding_changes_nothing(name):
  model = contrasting_model(name)
  upscale = upscaler(model)
  for size in ((13, 37), (33, 20)):
    lr = photo(*size)
    assert_same_image(upscale(lr), to_uint8(apply(model, lr)))


@pytest.mark.parametrize(
  "algorithm", ["by_source", pytest.param("winograd", marks=pytest.mark.slow)]
)
def test_padding_changes_nothing_in_a_fast_form(algorithm):
  model = contrasting_model(algorithm=algorithm, features=8, growth=8, blocks=1)
  lr = photo(13, 37)
  assert_same_image(upscaler(model)(lr), to_uint8(apply(model, lr)))


@pytest.mark.parametrize("scale", [1, 2, 3, 8])
def test_padding_changes_nothing_at_any_scale(scale):
  model = contrasting_model("residualnet", scale=scale)
  lr = photo(7, 9)
  assert_same_image(upscaler(model)(lr), to_uint8(apply(model, lr)))


@pytest.mark.parametrize("unshuffle", [2, 4])
def test_sides_that_the_unshuffle_does_not_divide_are_continued(unshuffle):
  model = contrasting_model(scale=4 // unshuffle, input_unshuffle=unshuffle)
  upscale, scale = upscaler(model), model.kwargs["scale"]
  for height, width in ((13, 37), (34, 20)):
    lr = photo(height, width)
    even = np.pad(lr, [(0, -height % unshuffle), (0, -width % unshuffle), (0, 0)], mode="edge")
    assert even.shape[0] % unshuffle == even.shape[1] % unshuffle == 0
    expected = to_uint8(apply(model, even))[: height * scale, : width * scale]
    assert_same_image(upscale(lr), expected)


def test_few_programs_serve_a_test_set(caplog):
  model = make_model("residualnet", features=3, blocks=1)
  upscale = upscaler(model)
  with jax.log_compiles():
    for height, width in SET14:
      assert upscale(np.zeros((height, width, 3), np.uint8)).shape == (height * 4, width * 4, 3)
    upscaler(model)(np.zeros((120, 125, 3), np.uint8))  # as evaluation during training comes back
  compiled = [r for r in caplog.messages if r.startswith("Compiling jit(forward)")]
  assert 1 <= len(compiled) <= 7


def test_sizes_are_padded_by_half_at_most():
  buckets = [bucket(size) for size in range(1, 2000)]
  assert sorted(set(buckets))[:6] == [32, 48, 64, 96, 128, 192]
  for size, padded in enumerate(buckets, 1):
    assert size <= padded <= max(32, 1.5 * size)


def test_a_colour_model_takes_grey_images():
  model = contrasting_model()
  grey = photo(13, 20, channels=0)
  sr = upscaler(model)(grey)
  colour = to_uint8(apply(model, np.stack([grey] * 3, axis=2)))
  luma = np.asarray(Image.fromarray(colour).convert("L"))  # Pillow's fixed point, 16 bits
  assert sr.shape == (52, 80)
  assert_same_image(sr, luma)


def test_a_grey_model_takes_grey_and_colour_images():
  model = contrasting_model("msrresnet", out_channels=1)
  upscale = upscaler(model)
  grey = photo(13, 20, channels=0)
  sr = upscale(grey)
  assert_same_image(sr, to_uint8(apply(model, grey[:, :, None]))[:, :, 0])
  np.testing.assert_array_equal(upscale(np.stack([grey] * 3, axis=2)), np.stack([sr] * 3, axis=2))

  # A faint colour, so that nothing is clipped: its chroma stays, its luma is the model's.
  lr = (photo(13, 20) // 16 + np.array([130, 100, 110])).astype(np.uint8)
  y, cb, cr = np.moveaxis(np.asarray(Image.fromarray(lr).convert("YCbCr")).astype(int), 2, 0)
  sr_y, sr_cb, sr_cr = np.moveaxis(
    np.asarray(Image.fromarray(upscale(lr)).convert("YCbCr")).astype(int), 2, 0
  )
  expected = upscale(y.astype(np.uint8))
  inside = (expected > 40) & (expected < 215)
  assert inside.mean() > 0.3
  assert np.abs(sr_y - expected)[inside].max() <= 2
  assert np.abs(sr_cb[inside].mean() - cb.mean()) < 1
  assert np.abs(sr_cr[inside].mean() - cr.mean()) < 1


def test_models_of_other_channels_are_refused():
  model = make_model(out_channels=4)
  with pytest.raises(ValueError, match="makes 4 channels of 4; images have 3, grey ones 1"):
    upscaler(model)
  module = build_generator("rrdbnet", {**make_model().kwargs, "out_channels": 1})
  with pytest.raises(ValueError, match="makes 1 channels of 3"):
    make_upscaler(module, make_model().variables)
