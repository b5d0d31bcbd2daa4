"""Draws and writes the scores of a sweep over alpha, from the PSNR model to the GAN model."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sr_jax import UserError
from sr_jax.evaluation import scoring
from sr_jax.metrics.table import SCORES, direction

_WIDTH, _HEIGHT, _LEFT, _TOP = 640, 360, 64, 24
_APART, _LINE = 32, 20
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def parse_alphas(text: str) -> list[float]:
  """Turns 'START:STOP:STEP' into alphas, both ends included: '0:1:0.1' has eleven.

  Raises:
    UserError: the text is none, or alphas leave [0, 1], or are more than 101.
  """
  try:
    start, stop, step = (float(part) for part in text.split(":"))
  except ValueError as error:
    raise UserError(f"--sweep={text!r} must be START:STOP:STEP; try --sweep=0:1:0.1") from error
  if not (0 <= start <= stop <= 1 and 0.01 <= step <= 1):
    raise UserError(
      f"--sweep={text!r} must go up within 0 to 1 by steps from 0.01 to 1; try --sweep=0:1:0.1"
    )
  count = int((stop - start) / step + 1e-9) + 1
  return [round(start + i * step, 10) for i in range(count)]


def parse_condition(condition: str) -> tuple[str, str, float]:
  """Turns 'psnr_drop<=0.3' into ('psnr_drop', '<=', 0.3).

  Raises:
    UserError: it is no condition.
  """
  match = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(-?\d+(?:\.\d+)?)\s*", condition)
  if not match:
    raise UserError(f'--select={condition!r} must be SCORE<=NUMBER; try --select="psnr_drop<=0.3"')
  return match[1], match[2], float(match[3])


def check_condition(condition: str, alphas: Sequence[float], computed: Sequence[str]) -> None:
  """Refuses a condition that no scores will decide, before they are computed.

  Args:
    condition: as for `select`.
    alphas: of the sweep.
    computed: the scores that it will have.

  Raises:
    UserError: it is no condition, its score will not be computed, or alpha 0 is lacking.
  """
  name, _, _ = parse_condition(condition)
  known = ["psnr_drop", "rmse", *computed]
  if name not in known:
    raise UserError(
      f"--select={condition!r}: {name} will not be computed; there are {', '.join(known)}"
    )
  if name == "psnr_drop" and min(alphas) > 0:
    raise UserError("--select=psnr_drop needs alpha 0; begin with --sweep=0:1:0.1")


def select(condition: str, scores: Mapping[float, Mapping[str, float]]) -> float:
  """Chooses the largest alpha, the one with most texture, that keeps a condition.

  Args:
    condition: 'psnr_drop<=0.3' (dB of Y that are lost against alpha 0), or a score of `SCORES`
      beside a number: 'rmse<=12.5', 'lpips_alex<=0.1', 'psnr_y>=28'.
    scores: {alpha: means}, alpha 0 among them for psnr_drop.

  Raises:
    UserError: the condition is none, its score was not computed, or no alpha keeps it.
  """
  name, sign, bound = parse_condition(condition)
  first = scores[min(scores)]
  if name == "psnr_drop" and min(scores) > 0:
    raise UserError("--select=psnr_drop needs alpha 0; begin with --sweep=0:1:0.1")
  values = {
    alpha: first["psnr_y"] - means["psnr_y"] if name == "psnr_drop" else means.get(name)
    for alpha, means in scores.items()
  }
  if None in values.values():
    there = ", ".join(["psnr_drop", *(key for key in SCORES if key in first)])
    raise UserError(f"--select={condition!r}: {name} was not computed; there are {there}")
  kept = [a for a, v in values.items() if (v <= bound if sign == "<=" else v >= bound)]
  if not kept:
    nearest = (min if sign == "<=" else max)(values.values())
    raise UserError(f"no alpha has {condition}; the nearest is {nearest:.4g}")
  return max(kept)


def plot(scores: Mapping[str, Mapping[float, Mapping[str, float]]]) -> str:
  """Draws PSNR against LPIPS and NIQE, as far as they were computed; a curve for each set.

  Args:
    scores: {set: {alpha: means}}.

  Returns:
    An SVG picture that needs no other file. Both axes are better to the top and to the left.
  """
  drawn = [
    key
    for key in ("lpips_alex", "niqe")
    if all(key in means for by_alpha in scores.values() for means in by_alpha.values())
  ]
  charts = [_chart(scores, key, i * (_WIDTH + 40)) for i, key in enumerate(drawn)]
  width, height = max(1, len(charts)) * (_WIDTH + 40), _HEIGHT + 70 + _LINE * len(scores)
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">'
    f'<rect width="100%" height="100%" fill="white"/>{"".join(charts)}</svg>\n'
  )


def _chart(scores: Mapping[str, Mapping[float, Mapping[str, float]]], key: str, left: float) -> str:
  points = {
    name: [(means[key], means["psnr_y"], alpha) for alpha, means in sorted(by_alpha.items())]
    for name, by_alpha in scores.items()
  }
  ends = [_ends([p[axis] for curve in points.values() for p in curve]) for axis in (0, 1)]

  def place(x: float, y: float) -> tuple[float, float]:
    across = (x - ends[0][0]) / (ends[0][1] - ends[0][0])
    up = (y - ends[1][0]) / (ends[1][1] - ends[1][0])
    return left + _LEFT + across * (_WIDTH - _LEFT), _TOP + (1 - up) * (_HEIGHT - _TOP)

  parts = []
  for fraction in (0, 0.25, 0.5, 0.75, 1):
    x, y = (low + fraction * (high - low) for low, high in ends)
    (across, _), (_, up) = place(x, ends[1][0]), place(ends[0][0], y)
    parts.append(_line([(across, _TOP), (across, _HEIGHT)], "#dddddd"))
    parts.append(_line([(left + _LEFT, up), (left + _WIDTH, up)], "#dddddd"))
    parts.append(_text(across, _HEIGHT + 18, f"{x:.{SCORES[key].digits - 1}f}", "middle"))
    parts.append(_text(left + _LEFT - 8, up + 4, f"{y:.2f}", "end"))
  better = "less" if direction(key) < 0 else "more"
  axis = f"{key} ({better} is better)"
  parts.append(_text(left + (_LEFT + _WIDTH) / 2, _HEIGHT + 40, axis, "middle"))
  parts.append(_text(left + 4, _TOP - 8, "PSNR-Y, dB", "start"))
  for i, (name, curve) in enumerate(points.items()):
    colour = _COLOURS[i % len(_COLOURS)]
    places = [place(x, y) for x, y, _ in curve]
    parts.append(_line(places, colour, 2))
    named: list[tuple[float, float]] = []  # alphas that lie too near to the last one are not named
    for (across, up), (_, _, alpha) in zip(places, curve, strict=True):
      parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="3" fill="{colour}"/>')
      if not named or math.dist(named[-1], (across, up)) > _APART:
        named.append((across, up))
        # To the upper left, since the curves rise to the right.
        parts.append(_text(across - 6, up - 3, f"{alpha:g}", "end", colour))
    x, y = left + _LEFT, _HEIGHT + 60 + i * _LINE
    parts.append(_line([(x, y), (x + 20, y)], colour, 2))
    parts.append(_text(x + 26, y + 4, name, "start"))
  return "".join(parts)


def _ends(values: Sequence[float]) -> tuple[float, float]:
  low, high = min(values), max(values)
  margin = 0.08 * (high - low) or 0.5
  return low - margin, high + margin


def _line(points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> str:
  path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
  return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "black") -> str:
  escaped = text.replace("&", "&amp;").replace("<", "&lt;")
  return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escaped}</text>'


def label(alpha: float) -> str:
  """What tables call an alpha."""
  return f"alpha {alpha:g}"


def over_all_sets(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
  """Returns one alpha's means over the images of all sets, with rmse as PIRM 2018 defines it.

  Args:
    sets: {set: what `scoring.evaluate_set` returned for this alpha}.
  """
  images = {
    f"{name}/{image}": scores
    for name, scored in sets.items()
    for image, scores in scored["images"].items()
  }
  means = {key: x for key, x in scoring.with_means(images).items() if key != "images"}
  return {**means, "rmse": scoring.rmse(images)}
