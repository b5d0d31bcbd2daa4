"""Scores models on test images, as the papers count.

  python -m sr_jax.evaluate --model RUN --data DIR,DIR --output OUT
  python -m sr_jax.evaluate --model bicubic,RUN/psnr,RUN --data skimage:test --output OUT

The protocol: HR is cropped to a multiple of the scale; LR is MATLAB's bicubic of it, rounded to
uint8; the SR image is clipped, rounded to uint8 and saved, and what is saved is scored; `scale`
pixels are cut from each side; PSNR and SSIM of RGB and of Y (BT.601, studio range), LPIPS and NIQE;
the mean over the images of a set. A grey file has its values as Y and no RGB scores.

OUT gets the SR images, results.json of each model, the table (.md, .csv, .json), report.html, which
opens offline, and comparison.png.
"""

import argparse
import functools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sr_jax import cli
from sr_jax import comparison
from sr_jax import engines
from sr_jax import images
from sr_jax import layers
from sr_jax import logs
from sr_jax import metrics
from sr_jax import model_file
from sr_jax import report
from sr_jax import resize
from sr_jax import sharding
from sr_jax import storage
from sr_jax import tables
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
  "psnr": "10 log10(255^2 / MSE), float64, mean over images; null (infinite) for equal images",
  "ssim": "11x11 Gaussian, sigma 1.5, valid area, per channel, float64, mean over images",
}
# Of the scores that are not always there.
MORE_PROTOCOL = {
  "lpips_alex": "LPIPS 0.1, AlexNet, RGB, mean over images; a grey file as three equal channels",
  "lpips_vgg": "LPIPS 0.1, VGG16, RGB, mean over images; a grey file as three equal channels",
  "niqe": "NIQE of Y, rounded, 96x96 blocks; images too small or flat for it are left out",
  "pi": "((10 - Ma) + NIQE) / 2 of the set's means (PIRM 2018); Ma was given",
  "rmse": "root of the set's mean squared error of Y (PIRM 2018)",
}  # and 'engine', which made the SR images, where another than JAX may have

SCORES = ("psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb")
METRICS = ("psnr", "ssim", "lpips_alex", "lpips_vgg", "niqe")


class TestImage(NamedTuple):
  """One image of a test set: uint8, [H, W, 3], or [H, W] for a grey file."""

  name: str
  hr: np.ndarray
  lr: np.ndarray


def make_upscaler(
  module: nn.Module, variables: Mapping[str, Any], run_engine: Upscaler | None = None
) -> Upscaler:
  """Makes a function that upscales images of any size with few compiled programs.

  An image is padded to the next of few sizes. The result is the unpadded one's all the same: the
  input of each convolution is set to zero outside the image, which is what the convolution's own
  zero padding would have put there, and the padding repeats the border, as resizing does.

  Args:
    module: a generator.
    variables: of `model_file.load_model`.
    run_engine: of `engines.open_engine`, instead of JAX; it takes images of any size as they are.

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
  if run_engine is None:
    forward = _make_forward(module)
    variables = jax.device_put(variables)

  def run(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    even = [-(-n // multiple) * multiple for n in (height, width)]
    padded = even if run_engine else [_bucket(n) for n in even]
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


class Extra(NamedTuple):
  """Weights of the scores beside PSNR and SSIM.

  Attributes:
    lpips: {'alex' or 'vgg': of `metrics.load_lpips`}.
    niqe: of `metrics.load_niqe`, or None.
  """

  lpips: Mapping[str, Any] = {}
  niqe: Any = None


NO_EXTRA = Extra()


def score(sr: np.ndarray, hr: np.ndarray, scale: int, extra: Extra = NO_EXTRA) -> Scores:
  """Scores one saved image.

  Args:
    sr: uint8 [H, W, 3], or [H, W] for a grey file.
    hr: the same shape.
    scale: pixels cut from each side.
    extra: further scores.

  Returns:
    psnr_y, ssim_y in dB and [-1, 1]; psnr_rgb, ssim_rgb where there is colour; lpips_alex,
    lpips_vgg, niqe where `extra` has them.

  Raises:
    ValueError: shapes that differ, or are too small.
  """
  return _score_batch([sr], [hr], scale, extra)[0]


def evaluate_set(
  upscalers: Mapping[str, Upscaler],
  test_images: Iterable[TestImage],
  scale: int,
  *,
  extra: Extra = NO_EXTRA,
  keep: Callable[[TestImage, dict[str, np.ndarray], dict[str, Scores]], None] | None = None,
) -> dict[str, dict[str, Any]]:
  """Scores models on a set, each image decoded once.

  Args:
    upscalers: {label: of `make_upscaler` or `bicubic_upscaler`}.
    test_images: the set.
    scale: the upsampling factor.
    extra: scores beside PSNR and SSIM.
    keep: called with each image, its SR images and its scores by label. Images of like sizes come
      together, so not in the set's order.

  Returns:
    {label: {'psnr_y': mean, ..., 'images': {name: scores}}}. A mean is over the images that have
    the score: RGB's over the colour images.
  """
  per_image: dict[str, dict[str, Scores]] = {label: {} for label in upscalers}
  names = []

  def named() -> Iterator[TestImage]:
    for image in test_images:
      names.append(image.name)
      yield image

  for batch in _batches(named(), scale):
    srs = {label: [upscale(image.lr) for image in batch] for label, upscale in upscalers.items()}
    for label in upscalers:
      try:
        scores = _score_batch(srs[label], [image.hr for image in batch], scale, extra)
      except ValueError as error:
        raise ValueError(f"{', '.join(image.name for image in batch)}: {error}") from error
      per_image[label] |= {image.name: s for image, s in zip(batch, scores, strict=True)}
    for i, image in enumerate(batch):
      if keep:
        sr_of = {label: srs[label][i] for label in upscalers}
        keep(image, sr_of, {label: per_image[label][image.name] for label in upscalers})
  if not names:
    raise ValueError("there is no image to evaluate")
  return {
    label: with_means({name: scores[name] for name in names}) for label, scores in per_image.items()
  }


def perceptual_indices(
  results: Mapping[str, dict[str, Any]], ma: Mapping[str, Mapping[str, float]]
) -> None:
  """Adds the perceptual index of PIRM 2018 to one model's sets, from Ma scores that were given.

  Args:
    results: {set: of `evaluate_set`}, changed: `ma` of each image; `ma`, `pi`, `rmse` of each set.
    ma: {set: {image: Ma et al.'s score, 0 to 10}}, all images of each set that it names.

  Raises:
    ValueError: a set, an image or a NIQE is missing.
  """
  for set_name, given in ma.items():
    if set_name not in results:
      raise ValueError(f"--ma names the set {set_name!r}; there are {', '.join(results)}")
    per_image = results[set_name]["images"]
    for name, scores in per_image.items():
      if name not in given or "niqe" not in scores:
        lacks = "a score in --ma" if name not in given else "a NIQE; give --niqe_params"
        raise ValueError(f"PI of {set_name} needs every image; {name} lacks {lacks}")
      scores["ma"] = float(given[name])
    mse = [255**2 / 10 ** (scores["psnr_y"] / 10) for scores in per_image.values()]
    means = results[set_name]
    means["ma"] = float(np.mean([scores["ma"] for scores in per_image.values()]))
    means["pi"] = metrics.perceptual_index(means["ma"], means["niqe"])
    means["rmse"] = math.sqrt(np.mean(mse))
    results[set_name] = {**{k: v for k, v in means.items() if k != "images"}, "images": per_image}


def _batches(test_images: Iterable[TestImage], scale: int) -> Iterator[list[TestImage]]:
  """Gathers images that are padded to the same size, as many as are scored by one call."""
  count = _batch_size()
  waiting: dict[tuple[int, ...], list[TestImage]] = {}
  for image in test_images:
    smallest, (height, width) = 11 + 2 * scale, image.hr.shape[:2]
    if min(height, width) < smallest:
      raise ValueError(
        f"{image.name}: border={scale} of a {width}x{height} image must leave 11x11 pixels, SSIM's "
        f"window; sides must be {smallest} or more"
      )
    size = _bucket(height), _bucket(width)
    waiting.setdefault(size, []).append(image)
    if len(waiting[size]) == count:
      yield waiting.pop(size)
  yield from waiting.values()


def _batch_size() -> int:
  """Images that are scored by one call; a CPU gains nothing from several."""
  return 1 if jax.default_backend() == "cpu" else 8


def _score_batch(
  srs: Sequence[np.ndarray], hrs: Sequence[np.ndarray], scale: int, extra: Extra
) -> list[Scores]:
  """Scores images that are padded to one size together."""
  for sr, hr in zip(srs, hrs, strict=True):
    if sr.shape != hr.shape:
      raise ValueError(
        f"SR and HR images must be of one shape, are {list(sr.shape)} and {list(hr.shape)}; is the "
        "LR image of another scale?"
      )
  count = len(srs)
  # The last batch of a size is filled up with its first image: another number is another program.
  srs, hrs = (list(part) + [part[0]] * (-count % _batch_size()) for part in (srs, hrs))
  sizes = np.array([hr.shape[:2] for hr in hrs], np.int32)
  grey = np.array([hr.ndim == 2 for hr in hrs])
  shape = [_bucket(n) for n in sizes.max(axis=0)]
  batch = metrics.score_batch(
    _stack(srs, shape), _stack(hrs, shape), sizes, grey, scale,
    lpips_params=extra.lpips, niqe_params=extra.niqe,
  )  # fmt: skip
  scores = []
  for i in range(count):
    # NaN: an image too small or too flat for the score.
    left_out = {key for key, values in batch.items() if math.isnan(values[i])}
    if grey[i]:
      left_out |= {"psnr_rgb", "ssim_rgb"}
    there = [key for key in tables.DIGITS if key in batch and key not in left_out]
    scores.append({key: float(batch[key][i]) for key in there})
  return scores


def _stack(arrays: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
  """Pads uint8 images [h, w, 3] or [h, w] to one shape: [N, H, W, 3]."""
  stacked = np.zeros((len(arrays), *shape, 3), np.uint8)
  for target, image in zip(stacked, arrays, strict=True):
    target[: image.shape[0], : image.shape[1]] = image if image.ndim == 3 else image[:, :, None]
  return stacked


def with_means(per_image: Mapping[str, Scores]) -> dict[str, Any]:
  """Adds a set's means to its images' scores; a mean is over the images that have the score."""
  keys = dict.fromkeys(key for scores in per_image.values() for key in scores)
  means = {
    key: float(np.mean([scores[key] for scores in per_image.values() if key in scores]))
    for key in keys
  }
  return {**means, "images": dict(per_image)}


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

  @functools.partial(jax.jit, compiler_options=sharding.compiler_options())
  def forward(variables, padded, height, width):
    rows = jnp.arange(padded.shape[1]) < height
    columns = jnp.arange(padded.shape[2]) < width
    inside = (rows[:, None] & columns[None, :]).astype(jnp.float32)[None, :, :, None]
    with nn.intercept_methods(_zero_outside(inside)):
      sr = module.apply(variables, padded.astype(jnp.float32) / 255.0, train=False)
    return jnp.floor(jnp.clip(sr, 0.0, 1.0) * 255.0 + 0.5).astype(jnp.uint8)

  return forward


def _zero_outside(inside: jax.Array):
  """Makes an interceptor that zeroes each convolution's input outside the image.

  What computes several convolutions at once asks `layers.Inside`, and gets the mask.
  """

  def interceptor(call, args, kwargs, context):
    is_inside = isinstance(context.module, layers.Inside)
    if (is_inside or isinstance(context.module, nn.Conv)) and context.method_name == "__call__":
      (x,) = args
      mask, (ours, theirs) = inside, (inside.shape[1], x.shape[1])
      if theirs > ours:
        mask = mask.repeat(theirs // ours, axis=1).repeat(theirs // ours, axis=2)
      elif theirs < ours:
        mask = mask[:, :: ours // theirs, :: ours // theirs]
      if is_inside:
        return mask
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


def _load_upscaler(spec: str, scale: int, choice: str) -> tuple[Upscaler, int, dict[str, str]]:
  """Returns the upscaler, its scale, and what the report says of the model."""
  if spec == "bicubic":
    return bicubic_upscaler(scale), scale, {"model": "MATLAB's bicubic"}
  model = model_file.read_model(spec)
  module = model_file.build_generator(model.name, model.kwargs)
  facts = {
    "model": spec,
    "network": model.name,
    "parameters": f"{model_file.parameter_count(model):,}",
    "weights": model.info["digest"],
    "trained from": ", ".join(model.info["ancestry"]),
    "step": str(model.info.get("step", "")),
  }
  facts = {key: value for key, value in facts.items() if value}
  engine = engines.open_engine(model, choice)
  if choice != "jax":
    print(f"upscaling {spec} with {engine.name}{engine.note}", file=sys.stderr)
    facts["engine"] = engine.name
  return make_upscaler(module, model.variables, engine.run), module.scale, facts


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


def load_extra(wanted: Sequence[str], niqe_params: str = "") -> Extra:
  """Loads what the scores beside PSNR and SSIM need.

  Args:
    wanted: of METRICS; () for all that can be computed here, with a warning for what cannot.
    niqe_params: BasicSR's niqe_pris_params.npz, or '' for no NIQE.
  """
  for name in wanted:
    if name not in METRICS:
      raise ValueError(f"--metrics: {name!r} must be one of {', '.join(METRICS)}")
  if "niqe" in wanted and not niqe_params:
    raise ValueError("--metrics=niqe needs --niqe_params=FILE, BasicSR's niqe_pris_params.npz")
  lpips = {}
  for net in ("alex", "vgg"):
    if wanted and f"lpips_{net}" not in wanted:
      continue
    try:
      lpips[net] = metrics.load_lpips(net)
    except (OSError, ValueError) as error:
      if wanted:
        raise
      logging.warning("no LPIPS (%s)", error)
  return Extra(lpips, metrics.load_niqe(niqe_params) if niqe_params else None)


def read_curves(model: str) -> dict[str, list[tuple[int, float]]]:
  """Reads a run's losses and scores: {name: [(step, value), ...]}; {} for a model file."""
  curves: dict[str, list[tuple[int, float]]] = {}
  for entry in logs.read(storage.run_folder(model)):
    step = entry.pop("step")
    for name, value in entry.items():
      if isinstance(value, (int, float)):
        curves.setdefault(name, []).append((step, float(value)))
  return curves


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m sr_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--model", required=True, help="bicubic, a run or a file; or A,LABEL=B,...")
  parser.add_argument(
    "--data", required=True, help="folders of HR images, skimage:test, tfds:NAME:SPLIT; or A,B,..."
  )
  parser.add_argument("--output", required=True, help="folder for results and SR images")
  parser.add_argument("--scale", type=int, default=4, help="of bicubic; models know theirs")
  parser.add_argument(
    "--metrics",
    default="",
    help=f"of {', '.join(METRICS)}; PSNR and SSIM always; by default all that can be computed",
  )
  parser.add_argument("--niqe_params", default="", help="BasicSR's niqe_pris_params.npz")
  parser.add_argument(
    "--ma", default="", help="JSON of Ma scores, {model: {set: {image: score}}}, for PI"
  )
  parser.add_argument(
    "--engine",
    choices=engines.CHOICES,
    default="jax",
    help="what upscales on the CPU (jax, which published scores are of); auto for the fastest",
  )
  args = parser.parse_args(argv)
  if args.scale < 1:
    raise ValueError(f"--scale={args.scale} must be 1 or more")
  output = storage.local_path("--output", args.output)
  models = [_label(spec) for spec in args.model.split(",")]
  folders = [output]
  if len(models) > 1:
    folders = [images.safe_output_path(output, label) for label, _ in models]
    _check_distinct("--model", folders, "give each its name: LABEL=MODEL")
  upscalers, scales, facts = {}, {}, {}
  for label, spec in models:
    upscalers[label], scales[label], facts[label] = _load_upscaler(spec, args.scale, args.engine)
  scale = scales[models[0][0]]
  if any(other != scale for other in scales.values()):
    raise ValueError(
      f"--model={args.model} has scales {list(scales.values())}; compare models of one "
      "scale, and give --scale for bicubic's"
    )
  data = args.data.split(",")
  test_sets = [open_test_set(spec, scale) for spec in data]
  set_names = [set_name for set_name, _, _ in test_sets]
  _check_distinct("--data", set_names, "results are by the folder's name; rename one")
  for spec, set_name in zip(data, set_names, strict=True):
    for folder in folders:
      _check_apart(folder / set_name, spec)
  extra = load_extra([name for name in args.metrics.split(",") if name], args.niqe_params)
  ma = _read_ma(args.ma, upscalers, set_names) if args.ma else {}
  if ma and extra.niqe is None:
    raise ValueError("--ma is for PI, which needs NIQE; give --niqe_params")

  results: dict[str, dict[str, Any]] = {label: {} for label in upscalers}
  taken: dict[str, set[pathlib.Path]] = {label: set() for label in upscalers}
  panels, page = comparison.Panels(), report.Report()
  for set_name, count, test_images in test_sets:

    def keep(image, srs, scores, set_name=set_name):
      name = pathlib.PurePosixPath(image.name).with_suffix(".png").as_posix()
      for (label, _), folder in zip(models, folders, strict=True):
        path = images.safe_output_path(folder / set_name, name)
        images.write_image(images.unused_path(path, taken[label]), srs[label])
        title = f"{set_name}/{image.name}"
        panels.add(title, image.lr, image.hr, label, srs[label], scores[label])
      if "bicubic" not in srs:  # what the eye compares with, whatever was asked for
        srs = {"bicubic": bicubic_upscaler(scale)(image.lr), **srs}
      page.add_image(set_name, image.name, image.lr, image.hr, srs, scores)

    progress = tqdm.tqdm(test_images, total=count, desc=set_name, leave=False)
    scored = evaluate_set(upscalers, progress, scale, extra=extra, keep=keep)
    for label in upscalers:
      results[label][set_name] = scored[label]
  for label, given in ma.items():
    perceptual_indices(results[label], given)

  table = {
    label: {
      set_name: {key: value for key, value in scores.items() if key != "images"}
      for set_name, scores in sets.items()
    }
    for label, sets in results.items()
  }
  protocol = PROTOCOL | {k: v for k, v in MORE_PROTOCOL.items() if k in tables.columns(table)}
  if used := dict.fromkeys(fact["engine"] for fact in facts.values() if "engine" in fact):
    protocol["engine"] = " and ".join(used)
  for (label, spec), folder in zip(models, folders, strict=True):
    own = {key: value for key, value in facts[label].items() if key == "engine"}
    one = {"model": spec, "scale": scale, "protocol": protocol | own, "sets": results[label]}
    _write_text(folder / "results.json", _json(one))
  images.write_image(output / "comparison.png", panels.draw())
  page.write(
    output / "report.html",
    title=f"{', '.join(upscalers)} on {', '.join(set_names)}",
    table=table,
    columns=tables.columns(table),
    protocol=protocol,
    curves={label: curves for label, spec in models if (curves := read_curves(spec))},
    facts=facts,
  )
  _write_table(output, table, protocol)
  print(
    f"\n{output}/report.html has the images side by side; comparison.png, the table (.md, .csv and "
    ".json), results.json and the SR images of each model are there too."
  )


def _write_table(output: pathlib.Path, table: tables.Table, protocol: Mapping[str, str]) -> None:
  """The one table of all models and sets: on the screen and in three files."""
  _write_text(output / "table.md", tables.format_markdown(table))
  _write_text(output / "table.csv", tables.format_csv(table))
  _write_text(output / "table.json", _json({"protocol": protocol, "models": table}))
  print(tables.format_text(table))


def _check_apart(target: pathlib.Path, data: str) -> None:
  """Refuses to write SR images where the HR images lie: they have the same names."""
  source, target = pathlib.Path(data).expanduser(), target.resolve()
  if source.is_dir():
    source = source.resolve()
    if target == source or target.is_relative_to(source) or source.is_relative_to(target):
      raise ValueError(
        f"--output would write SR images into {target}, which is or holds or lies in --data="
        f"{data}; choose another folder, so that no photograph is overwritten"
      )


def _read_ma(
  path: str, labels: Iterable[str], set_names: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
  given = json.loads(pathlib.Path(path).read_text())
  shape = isinstance(given, dict) and all(
    isinstance(sets, dict)
    and all(
      isinstance(scores, dict) and all(type(x) in (int, float) for x in scores.values())
      for scores in sets.values()
    )
    for sets in given.values()
  )
  if not shape:
    raise ValueError(f"--ma={path} must be JSON of the form {{model: {{set: {{image: score}}}}}}")
  labels = list(labels)
  for label in given:
    if label not in labels:
      raise ValueError(f"--ma={path} names the model {label!r}; there are {', '.join(labels)}")
    for set_name in given[label]:
      if set_name not in set_names:
        raise ValueError(
          f"--ma={path} names the set {set_name!r}; there are {', '.join(set_names)}"
        )
  return given


def _write_text(path: pathlib.Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text, encoding="utf-8")


def _json(tree: Any) -> str:
  """JSON as every reader takes it: an infinite PSNR is null."""

  def finite(node: Any) -> Any:
    if isinstance(node, dict):
      return {key: finite(value) for key, value in node.items()}
    return None if isinstance(node, float) and not math.isfinite(node) else node

  return json.dumps(finite(tree), indent=2) + "\n"


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
