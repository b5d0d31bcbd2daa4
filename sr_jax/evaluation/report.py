"""Writes an evaluation as one self-contained HTML page: every image to compare, scores, curves.

The page opens offline: images are data URIs, the script and the styles are inline, and its
Content-Security-Policy forbids the network. `report.html` beside this file is its frame, with the
styles and the script; this module fills the frame. `comparison.py` draws a single picture instead,
which needs no browser.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sr_jax import UserError
from sr_jax.evaluation import page
from sr_jax.evaluation.page import LOSSLESS, LOSSY, encode, escape, to_json, uri
from sr_jax.metrics.table import direction
from sr_jax.upscaling.upscaler import BASELINE

# [(step, value), ...] of one series of a run.
Points = Sequence[tuple[float, float]]
Window = tuple[slice, slice]


_FRAME = pathlib.Path(__file__).with_name("report.html")
_THUMBNAIL = 80
_MAX_POINTS = 500
_MEAN_PARTS = 50
_MAIN_CURVES = ("eval/", "loss/")  # the others are folded away


class Report:
  """Collects the images of an evaluation one by one, as encoded bytes, and writes the page.

  Every image has lossless windows where the first model errs most and least. Whole images are
  lossy, and there are only as many as the budget allows: once it is spent, the set with the most
  whole images gives up its latest one, but not its worst or its best.

  Args:
    max_full_images: how many test images are embedded whole, at most, each with all its SR images.
    max_full_pixels: how many pixels all of these may have together; 80 million are some 25 MB.
    window: side of the windows in HR pixels; 72 holds whole LR pixels at scale 2, 3, 4 and 8.
  """

  def __init__(
    self, *, max_full_images: int = 40, max_full_pixels: int = 80_000_000, window: int = 72
  ):
    self._max_images, self._max_pixels, self._window = max_full_images, max_full_pixels, window
    self._images: list[_Image] = []

  def add_image(
    self,
    set_name: str,
    name: str,
    lr: np.ndarray,
    hr: np.ndarray,
    sr: Mapping[str, np.ndarray],
    scores: Mapping[str, Mapping[str, float]],
  ) -> None:
    """Adds one image of a set, upscaled by every model.

    Args:
      set_name: the name of the test set.
      name: the name of the image, unique within the set.
      lr: uint8 [h, w, 3] or [h, w].
      hr: uint8 [h*s, w*s, 3] or [h*s, w*s].
      sr: {label: image of the shape of `hr`}; the first that is not 'bicubic' is the model whose
        worst and best windows are shown.
      scores: {label: {metric: value}}; labels may be missing. The first metric of the first model
        ranks the images of the set.

    Raises:
      UserError: the sizes do not belong together, or there is no SR image.
    """
    scale = _check(name, lr, hr, sr)
    labels = sorted(sr, key=lambda label: label != BASELINE)  # LR, bicubic, the models, HR
    model = next((label for label in labels if label != BASELINE), labels[0])
    side = max(self._window // scale, 1) * scale
    worst, best = extreme_windows(sr[model], hr, side, scale)
    stack = {"lr": lr, **{f"sr:{label}": sr[label] for label in labels}, "hr": hr}
    strips = [_strip("worst", worst, stack, scale)]
    if best != worst:
      strips.append(_strip("best", best, stack, scale))
    image = _Image(
      set_name,
      name,
      hr.shape[:2],
      lr.shape[:2],
      model,
      {label: dict(scores[label]) for label in labels if label in scores},
      strips,
      _thumbnail(hr),
    )
    image.pixels = sum(math.prod(layer.shape[:2]) for layer in stack.values())
    image.is_whole = max(hr.shape[:2]) <= page.WEBP_MAX_SIDE
    self._images.append(image)
    self._keep_to_budget()
    if image.is_whole:
      image.whole = {
        key: encode(layer, LOSSLESS if key == "lr" else LOSSY) for key, layer in stack.items()
      }

  def write(
    self,
    path: str | os.PathLike,
    *,
    title: str,
    table: Mapping[str, Mapping[str, Mapping[str, Any]]],
    columns: Sequence[str] | None = None,
    protocol: Mapping[str, str] | None = None,
    facts: Mapping[str, Mapping[str, str]] | None = None,
    curves: Mapping[str, Mapping[str, Points]] | None = None,
  ) -> None:
    """Writes the page, whole or not at all.

    Args:
      path: the path of the HTML file, whose folder exists.
      title: the heading of the page.
      table: {label: {set: {metric: mean}}}; values that are not numbers are left out. Infinite
        values are shown as such.
      columns: the metrics of the tables, in order, but that a score of RGB stands beside that of Y;
        by default all those of `table`.
      protocol: {subject: how it is computed}, as in `results.json`.
      facts: {label: {fact: value}} about the models: file, digest, architecture, steps.
      curves: {run: {series: [(step, value), ...]}}, as in metrics.jsonl; long series are thinned.
    """
    columns = _rgb_beside_y(columns if columns is not None else _metrics_of(table))
    charts = _charts(curves or {})
    sets = list(dict.fromkeys(image.set_name for image in self._images))
    parts, links = [], []
    for i, set_name in enumerate(sets):
      images = [image for image in self._images if image.set_name == set_name]
      parts.append(_set_section(i, set_name, images, columns))
      links.append((f"set-{i}", set_name))
    parts.append(_scores_section(table, columns, facts or {}))
    links.append(("scores", "Scores"))
    if charts["charts"]:
      parts.append(_CURVES_SECTION)
      links.append(("curves", "Curves"))
    parts.append(self._about_section(protocol or {}))
    links.append(("about", "Protocol"))
    models = _count(len(table), "model")
    texts = {
      "title": escape(title),
      "subtitle": f"{models}, {_count(len(sets), 'set')}, {_count(len(self._images), 'image')}",
      "links": "".join(f'<a href="#{to}">{escape(text)}</a>' for to, text in links),
      "sections": "\n".join(parts),
      "curves": to_json(charts),
    }
    page.write(path, page.fill(_FRAME, texts))

  def _keep_to_budget(self) -> None:
    whole = [image for image in self._images if image.is_whole]
    pixels = sum(image.pixels for image in whole)
    while len(whole) > self._max_images or pixels > self._max_pixels:
      of_set: dict[str, list[_Image]] = {}
      for image in whole:
        of_set.setdefault(image.set_name, []).append(image)
      group = max(reversed(of_set.values()), key=len)
      kept = _worst_and_best(group)
      last = next((image for image in reversed(group) if image not in kept), group[-1])
      last.is_whole, last.whole = False, {}
      whole = [image for image in whole if image is not last]
      pixels -= last.pixels

  def _about_section(self, protocol: Mapping[str, str]) -> str:
    count, whole = len(self._images), sum(image.is_whole for image in self._images)
    notes = {
      "windows": f"{self._window} HR pixels wide (less in a small image), where the first model's "
      "squared error against HR is largest, and where it is least among the half of the windows "
      "with the most detail; a flat sky would win otherwise. PSNR under a window is of its pixels "
      "alone, over all channels.",
      "encoding": "windows and LR are lossless; whole images are lossy WebP of quality "
      f"{LOSSY['quality']}, to be looked at and not to be measured. All scores are of the saved "
      "images.",
      "whole images": f"all {count} are in this page"
      if whole == count
      else f"{whole} of {count} are in this page, to keep it small; of the others, the windows.",
    }
    rows = "".join(
      f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
      for key, value in [*protocol.items(), *(notes.items() if count else [])]
    )
    return f'<section id="about"><h2>Protocol</h2><dl class="rows">{rows}</dl></section>'


def extreme_windows(
  sr: np.ndarray, hr: np.ndarray, side: int, step: int = 1
) -> tuple[Window, Window]:
  """Finds where an image errs most, and where it errs least although there is something to see.

  Args:
    sr: uint8 [H, W, 3] or [H, W].
    hr: the same shape.
    side: the side of the windows; they are smaller where the image is.
    step: windows start at multiples of this.

  Returns:
    The window with the largest sum of squared errors, and the one with the smallest among the
    windows whose variance in HR (of the sum over channels) is not below the median. Of several
    equal ones, the first.
  """
  sr, hr = (np.atleast_3d(image).astype(np.int64) for image in (sr, hr))
  height, width = min(side, hr.shape[0]), min(side, hr.shape[1])
  sums = [
    _window_sums(values, height, width, step)
    for values in (np.square(sr - hr).sum(axis=2), hr.sum(axis=2), np.square(hr.sum(axis=2)))
  ]
  error, total, squares = sums
  detail = height * width * squares - np.square(total)  # the variance times n^2: exact
  worst = int(np.argmax(error))
  best = int(np.argmin(np.where(detail >= np.median(detail), error, np.iinfo(np.int64).max)))
  corners = [(step * int(i) for i in np.unravel_index(flat, error.shape)) for flat in (worst, best)]
  worst_window, best_window = ((slice(y, y + height), slice(x, x + width)) for y, x in corners)
  return worst_window, best_window


def thin(points: Points, max_points: int = _MAX_POINTS) -> list[tuple[float, float]]:
  """Thins a series and keeps what a reader looks for: its ends, its peaks, and its failures.

  Args:
    points: (step, value) of each point, in order.
    max_points: the number of points to keep, at most; 5 or more.

  Returns:
    The first and the last point and, of each of equal parts between them, the points of the
    smallest, the largest and the first non-finite value.
  """
  points = [(step, float(value)) for step, value in points]
  if len(points) <= max_points:
    return points
  kept = {0, len(points) - 1}
  for start, stop in _parts(1, len(points) - 1, (max_points - 2) // 3):
    finite = [i for i in range(start, stop) if math.isfinite(points[i][1])]
    failed = [i for i in range(start, stop) if not math.isfinite(points[i][1])]
    if finite:
      kept |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
    kept.update(failed[:1])
  return [points[i] for i in sorted(kept)]


def _parts(start: int, stop: int, count: int) -> list[tuple[int, int]]:
  """Cuts a range into equal parts."""
  bounds = np.linspace(start, stop, count + 1).astype(int).tolist()
  return list(zip(bounds[:-1], bounds[1:], strict=True))


def _means(points: Points) -> list[tuple[float, float]]:
  """Averages a noisy series: returns the mean of each part that has finite values."""
  if len(points) < 2 * _MEAN_PARTS:
    return []
  means = []
  for start, stop in _parts(0, len(points), _MEAN_PARTS):
    part = [(step, value) for step, value in points[start:stop] if math.isfinite(value)]
    if part:
      means.append(tuple(np.mean(part, axis=0).tolist()))
  return means


@dataclasses.dataclass
class _Strip:
  """One window of an image: the same place in LR, in each SR image and in HR."""

  kind: str  # worst, best
  box: tuple[int, int, int, int]  # x, y, width, height in HR pixels
  crops: dict[str, bytes]  # WebP files by 'lr', 'sr:LABEL', 'hr'
  psnr: dict[str, float]  # PSNR in the window, by the same keys


@dataclasses.dataclass(eq=False)  # two files may hold the same image
class _Image:
  """What the page needs to show one image."""

  set_name: str
  name: str
  hr_size: tuple[int, int]  # height, width
  lr_size: tuple[int, int]
  model: str  # the label of the model whose windows are shown
  scores: dict[str, dict[str, float]]
  strips: list[_Strip]
  thumbnail: bytes
  pixels: int = 0  # the number of pixels of all its layers
  is_whole: bool = False
  whole: dict[str, bytes] = dataclasses.field(default_factory=dict)

  def rank(self) -> float | None:
    """Returns the first score of the first model, negated if less is better."""
    for metric, value in self.scores.get(self.model, {}).items():
      if direction(metric) and _is_number(value) and not math.isnan(value):
        return direction(metric) * value
    return None


def _check(name: str, lr: np.ndarray, hr: np.ndarray, sr: Mapping[str, np.ndarray]) -> int:
  """Returns the scale of images; raises UserError if they do not belong together."""
  if not sr:
    raise UserError(f"{name}: there is no SR image to show; pass at least one model's")
  for label, image in {"LR": lr, "HR": hr, **sr}.items():
    if image.dtype != np.uint8:
      raise UserError(f"{name}: {label} is {image.dtype}; images must be uint8, as saved")
  for label, image in sr.items():
    if image.shape != hr.shape:
      raise UserError(f"{name}: {label} has the shape {image.shape}, HR has {hr.shape}")
  scale = hr.shape[0] // lr.shape[0]
  if hr.shape[:2] != (lr.shape[0] * scale, lr.shape[1] * scale):
    raise UserError(
      f"{name}: HR of {hr.shape[:2]} is no multiple of LR of {lr.shape[:2]}; crop HR first"
    )
  return scale


def _window_sums(values: np.ndarray, height: int, width: int, step: int) -> np.ndarray:
  """Computes the sums of all windows from an integral image of integers, without rounding."""
  integral = np.pad(values, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
  sums = integral[height:, width:] - integral[:-height, width:]
  sums += integral[:-height, :-width] - integral[height:, :-width]
  return sums[::step, ::step]


def _strip(kind: str, window: Window, stack: Mapping[str, np.ndarray], scale: int) -> _Strip:
  rows, columns = window
  small = tuple(slice(s.start // scale, s.stop // scale) for s in window)
  crops = {key: layer[small if key == "lr" else window] for key, layer in stack.items()}
  psnr = {key: _psnr(crop, crops["hr"]) for key, crop in crops.items() if key.startswith("sr:")}
  box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
  return _Strip(kind, box, {key: encode(crop, LOSSLESS) for key, crop in crops.items()}, psnr)


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
  error = np.square(a.astype(np.float64) - b).mean()
  return 10 * math.log10(255**2 / error) if error else math.inf


def _thumbnail(image: np.ndarray) -> bytes:
  small = Image.fromarray(image).convert("RGB")
  small.thumbnail((_THUMBNAIL, _THUMBNAIL))
  return encode(np.asarray(small), {"quality": 70})


def _worst_and_best(images: Iterable[_Image]) -> tuple[_Image | None, _Image | None]:
  ranked = [image for image in images if image.rank() is not None]
  if len(ranked) < 2:
    return None, None
  return min(ranked, key=_Image.rank), max(ranked, key=_Image.rank)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _metrics_of(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
  scores = [scores for sets in table.values() for scores in sets.values()]
  return list(dict.fromkeys(key for each in scores for key in each if _is_number(each[key])))


# What the page is made of. All text from outside goes through `escape` or `to_json`.


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}" + ("" if number == 1 else "s")


def _rgb_beside_y(metrics: Sequence[str]) -> list[str]:
  """Orders metrics so that `X_rgb` follows `X_y`."""
  first = {metric.removesuffix("_y"): i for i, metric in enumerate(metrics) if metric[-2:] == "_y"}
  places = {m: (first.get(m.removesuffix("_rgb"), i), i) for i, m in enumerate(metrics)}
  places |= {m: (i, -1) for i, m in enumerate(metrics) if m[-2:] == "_y"}
  return sorted(metrics, key=places.get)


def _metric_name(metric: str) -> str:
  return metric.replace("_", " ").upper()


def _number(metric: str, value: Any) -> str:
  if not _is_number(value):
    return "–"
  if not math.isfinite(value):
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
  return f"{value:.{2 if metric.startswith('psnr') else 4}f}"


def _best_text(metric: str, values: Iterable[Any]) -> str | None:
  """Returns the best value as it is shown: values that look the same are equally good."""
  sign = direction(metric)
  values = [float(v) for v in values if _is_number(v) and not math.isnan(v)]
  if not sign or len(values) < 2:
    return None
  return _number(metric, max(values, key=lambda value: sign * value))


def _metric_head(metric: str) -> str:
  arrow, hint = {1: ("↑", "higher is better"), -1: ("↓", "lower is better"), 0: ("", "")}[
    direction(metric)
  ]
  return f'{escape(_metric_name(metric))} <span class="arrow" title="{hint}">{arrow}</span>'


def _cell(metric: str, value: Any, best: str | None) -> str:
  text = _number(metric, value)
  mark = ' class="best"' if text == best else ""
  sort = f' data-value="{float(value)!r}"' if _is_number(value) else ""
  # The name is for narrow screens, where a row is folded and has no heading above it.
  return f'<td{mark}{sort} data-metric="{escape(_metric_name(metric))}">{text}</td>'


def _rows_of_models(scores: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
  """Makes rows from {label: {metric: value}}, with the best value of each column marked."""
  best = {
    metric: _best_text(metric, (values.get(metric) for values in scores.values()))
    for metric in columns
  }
  return "".join(
    f'<tr><th scope="row">{escape(label)}</th>'
    + "".join(_cell(metric, values.get(metric), best[metric]) for metric in columns)
    + "</tr>"
    for label, values in scores.items()
  )


def _table(kind: str, caption: str, head: str, bodies: str) -> str:
  """Makes a table that is folded, a card for each row, where it is wider than its place."""
  return (
    f'<div class="fit" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
    f"<thead><tr>{head}</tr></thead>{bodies}</table></div>"
  )


def _image_table(scores: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> str:
  """Makes a table of one image's scores, a row for each model, to stand beside the image."""
  there = [m for m in columns if any(_is_number(values.get(m)) for values in scores.values())]
  if not there:
    return ""
  head = "".join(f'<th scope="col">{_metric_head(metric)}</th>' for metric in there)
  rows = _rows_of_models(scores, there)
  return _table("own", "Scores of this image", f"<td></td>{head}", f"<tbody>{rows}</tbody>")


def _scores_section(
  table: Mapping[str, Mapping[str, Mapping[str, Any]]],
  columns: Sequence[str],
  facts: Mapping[str, Mapping[str, str]],
) -> str:
  bodies = []
  for set_name in dict.fromkeys(set_name for sets in table.values() for set_name in sets):
    scores = {label: sets[set_name] for label, sets in table.items() if set_name in sets}
    bodies.append(
      f'<tbody><tr class="set"><th scope="rowgroup" colspan="{len(columns) + 1}">'
      f"{escape(set_name)}</th></tr>{_rows_of_models(scores, columns)}</tbody>"
    )
  head = "".join(
    f'<th scope="col"><button type="button" class="sort" data-sign="{direction(metric) or 1}">'
    f"{_metric_head(metric)}</button></th>"
    for metric in columns
  )
  cards = "".join(
    f"<article><h3>{escape(label)}</h3><dl>"
    + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs.items())
    + "</dl></article>"
    for label, pairs in facts.items()
  )
  models = f'<details class="fold"><summary>The models</summary><div class="cards">{cards}</div>'
  return (
    '<section id="scores"><h2>Scores</h2>'
    '<p class="note">Means over each set. The best of a set is <b class="best">marked</b>; '
    "a heading sorts.</p>"
    + _table("scores", "Scores", f'<th scope="col">model</th>{head}', "".join(bodies))
    + f"{models + '</details>' if cards else ''}</section>"
  )


_CURVES_SECTION = (
  '<section id="curves"><h2>Curves</h2>'
  '<p class="note">Of a long series, means in bold over all that the run logged; a red cross is a '
  "value that was not finite. Hover, or move with the arrow keys, to read values.</p>"
  '<ul class="legend"></ul><div class="charts"></div>'
  '<details class="fold more"><summary>More curves</summary><div class="charts"></div></details>'
  "</section>"
)


def _charts(curves: Mapping[str, Mapping[str, Points]]) -> dict[str, Any]:
  """Returns what the page draws.

  {'runs': labels, 'charts': [{'name', 'main', 'log', 'lines': [[run, steps, values, mean steps,
  mean values], ...]}, ...]}; a value that is not finite is None.
  """
  names = dict.fromkeys(name for series in curves.values() for name in series)
  charts = []
  for name in sorted(names, key=lambda name: [not name.startswith(p) for p in _MAIN_CURVES]):
    lines, shown = [], []
    for run, series in enumerate(curves.values()):
      points = [(step, float(value)) for step, value in series.get(name, [])]
      if points:
        values = [value if math.isfinite(value) else None for _, value in thin(points)]
        shown += [value for value in values if value is not None]
        means = _means(points)
        steps = [[step for step, _ in some] for some in (thin(points), means)]
        lines.append([run, steps[0], values, steps[1], [value for _, value in means]])
    # Over two decades, a linear axis shows all but the first steps as one flat line.
    log = bool(shown) and min(shown) > 0 and max(shown) >= 100 * min(shown)
    if lines:
      main = name.startswith(_MAIN_CURVES)
      charts.append({"name": name, "main": main, "log": log, "lines": lines})
  return {"runs": list(curves), "charts": charts}


def _layer_name(key: str) -> str:
  return key.removeprefix("sr:") if key.startswith("sr:") else key.upper()


def _set_section(
  index: int, set_name: str, images: Sequence[_Image], columns: Sequence[str]
) -> str:
  worst, best = _worst_and_best(images)
  opened = worst or images[0]
  shown = []
  for image in images:
    flag = "worst" if image is worst else "best" if image is best else ""
    shown.append(_image_details(image, columns, flag, image is opened))
  whole = sum(image.is_whole for image in images)
  note = "" if whole == len(images) else f"; {whole} of them whole, of the others two windows"
  order = (
    '<label class="order">Order <select><option value="">of the set</option>'
    '<option value="1">worst first</option><option value="-1">best first</option></select></label>'
  )
  return (
    f'<section class="set" id="set-{index}"><div class="set-head"><h2>{escape(set_name)}</h2>'
    f'<p class="note">{_count(len(images), "image")}{note}.</p>{order if worst else ""}</div>'
    f'<div class="images">{"".join(shown)}</div></section>'
  )


def _image_details(image: _Image, columns: Sequence[str], flag: str, opened: bool) -> str:
  height, width = image.hr_size
  rank = image.rank()
  metric = next((m for m in image.scores.get(image.model, {}) if direction(m)), None)
  chip = f'<span class="chip {flag}">{flag} of the set</span>' if flag else ""
  summary = ""
  if metric:
    text = _number(metric, image.scores[image.model][metric])
    summary = f'<span class="rank">{escape(_metric_name(metric))} {text}</span>'
  whole = "".join(
    f'<img data-key="{escape(key)}" alt="" src="{uri(data)}">' for key, data in image.whole.items()
  )
  small = f"{image.lr_size[1]}×{image.lr_size[0]}"
  return (
    f'<details class="image" data-rank="{"" if rank is None else repr(float(rank))}"'
    f' data-size="{width} {height}"{" open" if opened else ""}>'
    f'<summary><span class="thumb"><img alt="" src="{uri(image.thumbnail)}"></span>'
    f'<span class="name">{escape(image.name)}</span>{chip}'
    f'<span class="size">{small} → {width}×{height}</span>{summary}</summary>'
    # A template is inert: whole images are not decoded before someone looks at them.
    f'<template class="whole">{whole}</template>'
    '<div class="look"><div class="comparator"></div>'
    f'<div class="side">{_image_table(image.scores, columns)}</div></div>'
    f'<div class="strips">{"".join(_strip_html(image, strip) for strip in image.strips)}</div>'
    "</details>"
  )


def _strip_html(image: _Image, strip: _Strip) -> str:
  x, y, width, height = strip.box
  kind = strip.kind if len(image.strips) > 1 else "only"
  figures = {}
  for key, data in strip.crops.items():
    name = escape(_layer_name(key))
    psnr = f"<span>{_number('psnr', strip.psnr[key])} dB</span>" if key in strip.psnr else ""
    figures[key] = (
      f'<figure><img data-key="{escape(key)}" data-name="{name}" width="{width * 3}"'
      f' height="{height * 3}" alt="{name}, {kind} window" src="{uri(data)}">'
      f"<figcaption><b>{name}</b>{psnr}</figcaption></figure>"
    )
  return (
    f'<div class="strip" data-view="{strip.kind}" data-box="{x} {y} {width} {height}">'
    f'<h3><span class="key {strip.kind}"></span>{kind.capitalize()} window of '
    f"{escape(image.model)} <small>x {x}–{x + width}, y {y}–{y + height}</small></h3>"
    # HR has a place of its own, where it stays in sight beside all the others.
    f'<div class="crops"><div>{"".join(figures[key] for key in figures if key != "hr")}</div>'
    f'<div class="hr">{figures["hr"]}</div></div></div>'
  )
