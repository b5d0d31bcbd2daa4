"""Scores models on test images, as the papers count.

  python -m sr_jax.evaluate --model RUN --data DIR,DIR --output OUT
  python -m sr_jax.evaluate --model bicubic,RUN/psnr,RUN --data skimage:test --output OUT

The protocol: HR is cropped to a multiple of the scale; LR is MATLAB's bicubic of it, rounded to
uint8; the SR image is clipped, rounded to uint8 and saved, and what is saved is scored; `scale`
pixels are cut from each side; PSNR and SSIM of RGB and of Y (BT.601, studio range); the mean over
the images of a set. A grey file has its values as Y and no RGB scores.
"""

import functools
import json
import pathlib
from typing import Any, NamedTuple
from collections.abc import Callable, Iterable, Iterator, Mapping

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sr_jax import cli
from sr_jax import comparison
from sr_jax import images
from sr_jax import metrics
from sr_jax import model_file
from sr_jax import resize
from sr_jax.data import sources

# uint8 LR [h, w, c] in, uint8 SR [h*s, w*s, c] out; c may be missing (grey).
Upscaler = Callable[[np.ndarray], np.ndarray]
Scores = dict[str, float]

PROTOCOL = {
    "lr": "MATLAB bicubic of the HR image, uint8, rounded between rows and columns",
    "sr": "clipped to [0, 255], rounded half up, uint8",
    "crop_border": "scale",
    "y": "BT.601 studio range: 65.481 R + 128.553 G + 24.966 B + 16; a grey file as it stands",
    "psnr": "10 log10(255^2 / MSE), float64, mean over images",
    "ssim": "11x11 Gaussian, sigma 1.5, valid area, per channel, mean over images",
}

_MODEL = flags.DEFINE_list(
    "model", None, "bicubic, a run's folder or a model file; several, also as LABEL=MODEL."
)
_DATA = flags.DEFINE_list("data", None, "Folders of HR images, skimage:test or tfds:NAME:SPLIT.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for results.json and the SR images.")
_SCALE = flags.DEFINE_integer("scale", 4, "Upsampling factor of bicubic; models know theirs.")


class TestImage(NamedTuple):
  """One image of a test set: uint8, [H, W, 3], or [H, W] for a grey file."""

  name: str
  hr: np.ndarray
  lr: np.ndarray


def make_upscaler(module: nn.Module, variables: Mapping[str, Any]) -> Upscaler:
  """Makes a function that upscales images of any size with few compiled programs.

  An image is padded to the next of few sizes. The result is the unpadded one's all the same: the
  input of each convolution is set to zero outside the image, which is what the convolution's own
  zero padding would have put there, and the padding repeats the border, as resizing does.

  Args:
    module: a generator.
    variables: of `model_file.load_model`.

  Returns:
    uint8 [h, w, 3] -> uint8 [h*s, w*s, 3]; for models of one channel and for grey input [h, w].
  """
  multiple = _unshuffle(module)
  in_channels = model_file.in_channels(variables, {"input_unshuffle": multiple})
  forward = _make_forward(module)
  variables = jax.device_put(variables)

  def upscale(lr: np.ndarray) -> np.ndarray:
    grey = lr.ndim == 2
    image = np.repeat(lr[:, :, None], in_channels, axis=2) if grey else lr
    if image.shape[2] != in_channels:
      image = _luma(image)[:, :, None]
    height, width = image.shape[:2]
    even = [-(-n // multiple) * multiple for n in (height, width)]
    padded = [_bucket(n) for n in even]
    image = np.pad(
        image, [(0, padded[0] - height), (0, padded[1] - width), (0, 0)], mode="edge"
    )
    sr = np.asarray(forward(variables, image[None], *even))[0]
    sr = sr[: height * module.scale, : width * module.scale]
    if sr.shape[2] == 1:
      return sr[:, :, 0]
    return _luma(sr) if grey else sr

  return upscale


def bicubic_upscaler(scale: int) -> Upscaler:
  """The baseline: MATLAB's bicubic, float all through, rounded once."""
  return lambda lr: resize.imresize(lr, scale, convention="double_mirror")


def score(sr: np.ndarray, hr: np.ndarray, scale: int) -> Scores:
  """Scores one saved image.

  Args:
    sr: uint8 [H, W, 3], or [H, W] for a grey file.
    hr: the same shape.
    scale: pixels cut from each side.

  Returns:
    psnr_y, ssim_y in dB and [-1, 1]; psnr_rgb, ssim_rgb where there is colour.
  """
  if hr.ndim == 2:
    return {
        "psnr_y": metrics.psnr(sr, hr, border=scale),
        "ssim_y": metrics.ssim(sr, hr, border=scale),
    }
  sr_y, hr_y = metrics.rgb_to_y(sr), metrics.rgb_to_y(hr)
  return {
      "psnr_y": metrics.psnr(sr_y, hr_y, border=scale),
      "ssim_y": metrics.ssim(sr_y, hr_y, border=scale),
      "psnr_rgb": metrics.psnr(sr, hr, border=scale),
      "ssim_rgb": metrics.ssim(sr, hr, border=scale),
  }


def evaluate_images(
    upscale: Upscaler,
    test_images: Iterable[TestImage],
    scale: int,
    keep: Callable[[TestImage, np.ndarray, Scores], None] | None = None,
) -> dict[str, Any]:
  """Scores a model on a set.

  Args:
    upscale: of `make_upscaler` or `bicubic_upscaler`.
    test_images: the set.
    scale: the upsampling factor.
    keep: called with each image, its SR image and its scores.

  Returns:
    {'psnr_y': mean, ..., 'images': {name: scores}}. RGB means are over the colour images.
  """
  per_image = {}
  for image in test_images:
    sr = upscale(image.lr)
    per_image[image.name] = score(sr, image.hr, scale)
    if keep:
      keep(image, sr, per_image[image.name])
  if not per_image:
    raise ValueError("there is no image to evaluate")
  keys = dict.fromkeys(key for scores in per_image.values() for key in scores)
  means = {
      key: float(np.mean([scores[key] for scores in per_image.values() if key in scores]))
      for key in keys
  }
  return {**means, "images": per_image}


def open_test_set(spec: str, scale: int) -> tuple[str, int, Iterator[TestImage]]:
  """Opens the images of a `--data` entry: its name, their number, and the images one by one."""
  source = sources.open_source(spec, scale=scale, keep_grey=True)

  def test_images() -> Iterator[TestImage]:
    for i, name in enumerate(source.names):
      hr, lr = source.load(i)
      hr = hr[: hr.shape[0] // scale * scale, : hr.shape[1] // scale * scale]
      yield TestImage(name, hr, resize.imresize(hr, 1 / scale) if lr is None else lr)

  return source.set_name, len(source.names), test_images()


@functools.lru_cache(maxsize=8)  # evaluation during training comes back with the same module
def _make_forward(module: nn.Module):
  """Compiles (variables, uint8 [1, H, W, c], height, width) -> uint8, once a module and shape."""

  @jax.jit
  def forward(variables, padded, height, width):
    rows = jnp.arange(padded.shape[1]) < height
    columns = jnp.arange(padded.shape[2]) < width
    inside = (rows[:, None] & columns[None, :]).astype(jnp.float32)[None, :, :, None]
    with nn.intercept_methods(_zero_outside(inside)):
      sr = module.apply(variables, padded.astype(jnp.float32) / 255.0, train=False)
    return jnp.floor(jnp.clip(sr, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)

  return forward


def _zero_outside(inside: jax.Array):
  """Makes an interceptor that zeroes each convolution's input outside the image."""

  def interceptor(call, args, kwargs, context):
    if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
      (x,) = args
      mask, (ours, theirs) = inside, (inside.shape[1], x.shape[1])
      if theirs > ours:
        mask = mask.repeat(theirs // ours, axis=1).repeat(theirs // ours, axis=2)
      elif theirs < ours:
        mask = mask[:, :: ours // theirs, :: ours // theirs]
      args = (x * mask.astype(x.dtype),)
    return call(*args, **kwargs)

  return interceptor


def _bucket(size: int) -> int:
  """Rounds up to 32, 48, 64, 96, 128, 192, ...: at most half again as long, few programs."""
  bucket = 32
  while bucket < size:
    bucket = bucket * 3 // 2 if bucket & (bucket - 1) == 0 else bucket * 4 // 3
  return bucket


def _luma(rgb: np.ndarray) -> np.ndarray:
  """BT.601 luma in full range, uint8: what a grey file of this image would hold."""
  return np.floor(rgb @ np.array([0.299, 0.587, 0.114]) + 0.5).astype(np.uint8)


def _unshuffle(module: nn.Module) -> int:
  return getattr(module, "input_unshuffle", 1)


def _load_upscaler(spec: str, scale: int) -> tuple[Upscaler, int]:
  if spec == "bicubic":
    return bicubic_upscaler(scale), scale
  module, variables = model_file.load_model(spec)
  return make_upscaler(module, variables), module.scale


def _label(spec: str) -> tuple[str, str]:
  """Splits 'LABEL=MODEL'; without a label it is the path's last parts."""
  if "=" in spec:
    label, _, model = spec.partition("=")
    return label, model
  path = pathlib.Path(spec)
  return (path.stem if path.suffix else "_".join(path.parts[-2:])), spec


def main(argv: list[str]) -> None:
  del argv
  output = pathlib.Path(_OUTPUT.value)
  several = len(_MODEL.value) > 1
  table, panels = {}, comparison.Panels()
  for label, spec in map(_label, _MODEL.value):
    upscale, scale = _load_upscaler(spec, _SCALE.value)
    folder = images.safe_output_path(output, label) if several else output
    results = {"model": spec, "scale": scale, "protocol": PROTOCOL, "sets": {}}
    for data in _DATA.value:
      set_name, count, test_images = open_test_set(data, scale)

      def keep(image, sr, scores, set_name=set_name, folder=folder, label=label):
        stem = pathlib.Path(image.name).stem
        images.write_image(images.safe_output_path(folder / set_name, f"{stem}.png"), sr)
        panels.add(f"{set_name}/{stem}", image.lr, image.hr, label, sr, scores)

      progress = tqdm.tqdm(test_images, total=count, desc=f"{label} on {set_name}", leave=False)
      results["sets"][set_name] = evaluate_images(upscale, progress, scale, keep)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table[label] = results["sets"]
  images.write_image(output / "comparison.png", panels.draw())
  print(format_table(table))
  print(f"\n{output}/comparison.png, and results.json and the SR images of each model, are there.")


def format_table(table: Mapping[str, Mapping[str, Scores]]) -> str:
  """Formats {model: {set: scores}} as text, a row a model and set."""
  columns = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
  width = max(len(label) for label in table)
  lines = [f"{'model':{width}}  {'set':12}" + "".join(f"{c:>10}" for c in columns)]
  for label, sets in table.items():
    for set_name, scores in sets.items():
      cells = (
          f"{scores[c]:10.{2 if c.startswith('psnr') else 4}f}" if c in scores else f"{'-':>10}"
          for c in columns
      )
      lines.append(f"{label:{width}}  {set_name:12}" + "".join(cells))
  return "\n".join(lines)


if __name__ == "__main__":
  cli.run(main, required=["model", "data", "output"])
