"""Scores SR images as the papers do; `metrics/table.py` has the protocol."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging
import jax
import numpy as np

from sr_jax import UserError
from sr_jax import metrics
from sr_jax.evaluation.given import GivenImages
from sr_jax.evaluation.test_sets import TestImage
from sr_jax.metrics.psnr_ssim import SSIM_WINDOW
from sr_jax.metrics.table import METRICS, SCORES, Scores
from sr_jax.upscaling import upscaler


class Extra(NamedTuple):
  """What the scores beside PSNR and SSIM need.

  Attributes:
    lpips: {'alex' or 'vgg': what `metrics.load_lpips` returned}.
    niqe: what `metrics.load_niqe` returned, or None.
    functions: {score: its function in `table.SCORES`}.
  """

  lpips: Mapping[str, Any] = {}
  niqe: Any = None
  functions: Mapping[str, Callable[[np.ndarray, np.ndarray, int], float]] = {}


NO_EXTRA = Extra()


def score(sr: np.ndarray, hr: np.ndarray, scale: int, extra: Extra = NO_EXTRA) -> Scores:
  """Scores one saved image.

  Args:
    sr: uint8 [H, W, 3], or [H, W] for a grey file.
    hr: the same shape.
    scale: pixels cut from each side.
    extra: further scores.

  Returns:
    psnr_y in dB and ssim_y in [-1, 1]; psnr_rgb, ssim_rgb where there is colour; lpips_alex,
    lpips_vgg, niqe and scores with a function of their own where `extra` has them.

  Raises:
    UserError: shapes that differ, or are too small.
  """
  return _score_batch([sr], [hr], scale, extra)[0]


def evaluate_set(
  upscalers: Mapping[str, upscaler.Upscaler | GivenImages],
  test_images: Iterable[TestImage],
  scale: int,
  *,
  extra: Extra = NO_EXTRA,
  bad: dict[str, str] | None = None,
  keep: Callable[[TestImage, dict[str, np.ndarray], dict[str, Scores]], None] | None = None,
) -> dict[str, dict[str, Any]]:
  """Scores models on a set, each image decoded once.

  Args:
    upscalers: {label: what `make_upscaler` or `bicubic_upscaler` returned, or SR images that are
      given}.
    test_images: the set.
    scale: the upsampling factor.
    extra: scores beside PSNR and SSIM.
    bad: gets {name: error} of images that cannot be scored, which are left out for all models; by
      default they are errors.
    keep: called with each image, its SR images and its scores by label. Images of like sizes come
      together, so not in the set's order.

  Returns:
    {label: {'psnr_y': mean, ..., 'images': {name: scores}}}. A mean is over the images that have
    the score: RGB's over the colour images.

  Raises:
    UserError: no image at all, an image that is too small, or sizes that do not belong together.
  """
  per_image: dict[str, dict[str, Scores]] = {label: {} for label in upscalers}
  names = []

  def named() -> Iterator[TestImage]:
    for image in test_images:
      if bad is not None and (problem := _too_small(image, scale)):
        bad[image.name] = problem
        continue
      names.append(image.name)
      yield image

  for batch in batches(named(), scale):
    # Image by image: the upscalers of `make_sweep` share what they compute of the last one.
    of_image = []
    for image in list(batch):
      try:
        of_image.append([_upscaled(upscale, image) for upscale in upscalers.values()])
      except UserError as error:
        if bad is None:
          raise
        bad[image.name] = str(error)
        batch.remove(image)
        names.remove(image.name)
    if not batch:
      continue
    srs = dict(zip(upscalers, map(list, zip(*of_image, strict=True)), strict=True))
    for label in upscalers:
      try:
        scores = _score_batch(srs[label], [image.hr for image in batch], scale, extra)
      except UserError as error:
        raise UserError(f"{', '.join(image.name for image in batch)}: {error}") from error
      per_image[label] |= {image.name: s for image, s in zip(batch, scores, strict=True)}
    for i, image in enumerate(batch):
      if keep:
        sr_of = {label: srs[label][i] for label in upscalers}
        keep(image, sr_of, {label: per_image[label][image.name] for label in upscalers})
  if not names:
    why = "".join(f"; {name}: {error}" for name, error in list((bad or {}).items())[:1])
    raise UserError(f"there is no image to evaluate{why}")
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
    UserError: a set, an image or a NIQE is missing.
  """
  for set_name, given in ma.items():
    if set_name not in results:
      raise UserError(f"--ma names the set {set_name!r}; there are {', '.join(results)}")
    per_image = results[set_name]["images"]
    for name, scores in per_image.items():
      if name not in given or "niqe" not in scores:
        lacks = "a score in --ma" if name not in given else "a NIQE; give --niqe_params"
        raise UserError(f"PI of {set_name} needs every image; {name} lacks {lacks}")
      scores["ma"] = float(given[name])
    means = results[set_name]
    means["ma"] = float(np.mean([scores["ma"] for scores in per_image.values()]))
    means["pi"] = metrics.perceptual_index(means["ma"], means["niqe"])
    means["rmse"] = rmse(per_image)
    results[set_name] = {**{k: v for k, v in means.items() if k != "images"}, "images": per_image}


def rmse(per_image: Mapping[str, Scores]) -> float:
  """Computes the root of the mean squared error of Y over images (PIRM 2018), from their PSNR."""
  errors = [255**2 / 10 ** (scores["psnr_y"] / 10) for scores in per_image.values()]
  return math.sqrt(np.mean(errors))


def batches(test_images: Iterable[TestImage], scale: int) -> Iterator[list[TestImage]]:
  """Gathers images that are padded to the same size, as many as are scored by one call.

  Raises:
    UserError: an image that is too small for SSIM.
  """
  count = _batch_size()
  waiting: dict[tuple[int, ...], list[TestImage]] = {}
  for image in test_images:
    if problem := _too_small(image, scale):
      raise UserError(f"{image.name}: {problem}")
    size = upscaler.bucket(image.hr.shape[0]), upscaler.bucket(image.hr.shape[1])
    waiting.setdefault(size, []).append(image)
    if len(waiting[size]) == count:
      yield waiting.pop(size)
  yield from waiting.values()


def _too_small(image: TestImage, scale: int) -> str:
  """Says why an image is too small for SSIM, or returns ''."""
  smallest, (height, width) = SSIM_WINDOW + 2 * scale, image.hr.shape[:2]
  if min(height, width) >= smallest:
    return ""
  return (
    f"border={scale} of a {width}x{height} image must leave {SSIM_WINDOW}x{SSIM_WINDOW} pixels, "
    f"SSIM's window; sides must be {smallest} or more"
  )


def _upscaled(upscale: upscaler.Upscaler | GivenImages, image: TestImage) -> np.ndarray:
  return upscale(image) if isinstance(upscale, GivenImages) else upscale(image.lr)


def _batch_size() -> int:
  """Images that are scored by one call; a CPU gains nothing from several."""
  return 1 if jax.default_backend() == "cpu" else 8


def _score_batch(
  srs: Sequence[np.ndarray], hrs: Sequence[np.ndarray], scale: int, extra: Extra
) -> list[Scores]:
  """Scores images that are padded to one size together."""
  for sr, hr in zip(srs, hrs, strict=True):
    if sr.shape != hr.shape:
      raise UserError(
        f"SR and HR images must have the same shape; they have {list(sr.shape)} and "
        f"{list(hr.shape)}; is the LR image of another scale?"
      )
  count = len(srs)
  # The last batch is filled up with its first image: a batch of another size would compile anew.
  srs, hrs = (list(part) + [part[0]] * (-count % _batch_size()) for part in (srs, hrs))
  sizes = np.array([hr.shape[:2] for hr in hrs], np.int32)
  grey = np.array([hr.ndim == 2 for hr in hrs])
  shape = [upscaler.bucket(n) for n in sizes.max(axis=0)]
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
    there = [key for key in SCORES if key in batch and key not in left_out]
    own = {key: function(srs[i], hrs[i], scale) for key, function in extra.functions.items()}
    own = {key: value for key, value in own.items() if not math.isnan(value)}
    scores.append({**{key: float(batch[key][i]) for key in there}, **own})
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
  return -(-(SSIM_WINDOW + 2 * scale) // scale) * scale


def load_extra(wanted: Sequence[str], niqe_params: str = "", *, missing_ok: bool = False) -> Extra:
  """Loads what the scores beside PSNR and SSIM need.

  Args:
    wanted: some of METRICS; () for all that can be computed here, with a warning for what cannot.
    niqe_params: path of BasicSR's niqe_pris_params.npz, or '' for no NIQE.
    missing_ok: whether to warn of missing weights of a score that is wanted too.

  Raises:
    UserError: an unknown metric, or NIQE without its file.
    FileNotFoundError: a metric that was asked for has no weights here.
  """
  for name in wanted:
    if name not in METRICS:
      raise UserError(f"--metrics: {name!r} must be one of {', '.join(METRICS)}")
  if "niqe" in wanted and not niqe_params:
    raise UserError("--metrics=niqe needs --niqe_params=FILE, BasicSR's niqe_pris_params.npz")
  lpips = {}
  for net in ("alex", "vgg"):
    if wanted and f"lpips_{net}" not in wanted:
      continue
    try:
      lpips[net] = metrics.load_lpips(net)
    except (OSError, UserError) as error:
      if wanted and not missing_ok:
        raise
      logging.warning("no LPIPS (%s)", error)
  functions = {
    key: score.function
    for key, score in SCORES.items()
    if score.function and (not wanted or score.metric in wanted)
  }
  return Extra(lpips, metrics.load_niqe(niqe_params) if niqe_params else None, functions)
