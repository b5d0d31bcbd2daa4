"""Scores models on test images, as the papers count.

  python -m sr_jax.evaluate --model RUN --data DIR,DIR --output OUT
  python -m sr_jax.evaluate --model bicubic,RUN/psnr,RUN --data skimage:test --output OUT

The protocol: HR is cropped to a multiple of the scale; LR is MATLAB's bicubic of it, rounded to
uint8; the SR image is clipped, rounded to uint8 and saved, and what is saved is scored; `scale`
pixels are cut from each side; PSNR and SSIM of RGB and of Y (BT.601, studio range); the mean over
the images of a set. A grey file has its values as Y and no RGB scores.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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
from sr_jax.data import packed
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


SCORES = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")


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
    uint8 [h, w, 3] -> uint8 [h*s, w*s, 3], [h, w] -> [h*s, w*s]. A model of one channel upscales
    the luma of a colour image, bicubic its colours.

  Raises:
    ValueError: a model of other channels than images have.
  """
  multiple = getattr(module, "input_unshuffle", 1)
  channels = model_file.in_channels(variables, {"input_unshuffle": multiple})
  if channels not in (1, 3) or module.out_channels != channels:
    raise ValueError(
      f"the model makes {module.out_channels} channels of {channels}; images have 3, grey ones 1"
    )
  forward = _make_forward(module)
  variables = jax.device_put(variables)

  def run(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    even = [-(-n // multiple) * multiple for n in (height, width)]
    padded = [_bucket(n) for n in even]
    image = np.pad(image, [(0, padded[0] - height), (0, padded[1] - width), (0, 0)], mode="edge")
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


def score(sr: np.ndarray, hr: np.ndarray, scale: int) -> Scores:
  """Scores one saved image.

  Args:
    sr: uint8 [H, W, 3], or [H, W] for a grey file.
    hr: the same shape.
    scale: pixels cut from each side.

  Returns:
    psnr_y, ssim_y in dB and [-1, 1]; psnr_rgb, ssim_rgb where there is colour.
  """
  sr_y, hr_y = metrics.rgb_to_y(sr), metrics.rgb_to_y(hr)  # a grey image as it stands
  scores = {
    "psnr_y": metrics.psnr(sr_y, hr_y, border=scale),
    "ssim_y": metrics.ssim(sr_y, hr_y, border=scale),
  }
  if hr.ndim == 3:
    scores["psnr_rgb"] = metrics.psnr(sr, hr, border=scale)
    scores["ssim_rgb"] = metrics.ssim(sr, hr, border=scale)
  return scores


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
    try:
      per_image[image.name] = score(sr, image.hr, scale)
    except ValueError as error:
      raise ValueError(f"{image.name}: {error}") from error
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


def smallest_side(scale: int) -> int:
  """The smallest side, in HR pixels, that can be scored: SSIM's window within the cut border."""
  return -(-(11 + 2 * scale) // scale) * scale


def packed_image(pack: packed.Pack, i: int) -> TestImage:
  """Image i of a pack as the evaluation wants it: a grey file has two axes."""
  hr, lr = packed.hr_image(pack, i), packed.lr_image(pack, i)
  if pack.grey[i]:
    hr, lr = hr[:, :, 0], lr[:, :, 0]
  return TestImage(pack.names[i], hr, lr)


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


def _load_upscaler(spec: str, scale: int) -> tuple[Upscaler, int]:
  if spec == "bicubic":
    return bicubic_upscaler(scale), scale
  module, variables = model_file.load_model(spec)
  return make_upscaler(module, variables), module.scale


def _label(spec: str) -> tuple[str, str]:
  """Splits 'LABEL=MODEL'; without a label it is the file's stem or the run's last folders."""
  path = pathlib.Path(spec)
  if "=" in spec and not path.exists():
    label, _, model = spec.partition("=")
    return label, model
  if path.is_file():
    return path.stem, spec
  parts = [part for part in path.parts if part not in (path.anchor, "..")]
  return "_".join(parts[-2:]) or path.resolve().name, spec


def _check_distinct(flag: str, names: list[Any], remedy: str) -> None:
  for name in names:
    if names.count(name) > 1:
      raise ValueError(f"{flag} names two {name}, and one would overwrite the other; {remedy}")


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m sr_jax.evaluate", description=__doc__)
  parser.add_argument("--model", required=True, help="bicubic, a run or a file; or A,LABEL=B,...")
  parser.add_argument(
    "--data", required=True, help="folders of HR images, skimage:test, tfds:NAME:SPLIT; or A,B,..."
  )
  parser.add_argument("--output", required=True, help="folder for results.json and SR images")
  parser.add_argument("--scale", type=int, default=4, help="of bicubic; models know theirs")
  args = parser.parse_args(argv)
  output = pathlib.Path(args.output)
  models = [_label(spec) for spec in args.model.split(",")]
  folders = [output]
  if len(models) > 1:
    folders = [images.safe_output_path(output, label) for label, _ in models]
    _check_distinct("--model", folders, "give each its name: LABEL=MODEL")
  upscalers = [_load_upscaler(spec, args.scale) for _, spec in models]
  scale = upscalers[0][1]
  if any(other != scale for _, other in upscalers):
    raise ValueError(
      f"--model={args.model} has scales {[scale for _, scale in upscalers]}; compare models of one "
      "scale, and give --scale for bicubic's"
    )
  data = args.data.split(",")
  set_names = [open_test_set(spec, scale)[0] for spec in data]
  _check_distinct("--data", set_names, "results are by the folder's name; rename one")

  table, panels = {}, comparison.Panels()
  for (label, spec), folder, (upscale, _) in zip(models, folders, upscalers, strict=True):
    results = {"model": spec, "scale": scale, "protocol": PROTOCOL, "sets": {}}
    taken: set[pathlib.Path] = set()
    for set_spec in data:
      set_name, count, test_images = open_test_set(set_spec, scale)

      def keep(image, sr, scores, set_folder=folder / set_name, label=label, taken=taken):
        name = pathlib.PurePosixPath(image.name).with_suffix(".png").as_posix()
        path = images.safe_output_path(set_folder, name)
        images.write_image(images.unused_path(path, taken), sr)
        panels.add(f"{set_folder.name}/{image.name}", image.lr, image.hr, label, sr, scores)

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
  width = max(len(label) for label in ["model", *table])
  set_width = max(len(set_name) for sets in table.values() for set_name in ["set", *sets])
  lines = [f"{'model':{width}}  {'set':{set_width}}" + "".join(f"{c:>10}" for c in SCORES)]
  for label, sets in table.items():
    for set_name, scores in sets.items():
      cells = (
        f"{scores[c]:10.{2 if c.startswith('psnr') else 4}f}" if c in scores else f"{'-':>10}"
        for c in SCORES
      )
      lines.append(f"{label:{width}}  {set_name:{set_width}}" + "".join(cells))
  return "\n".join(lines)


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
