"""Tests of sr_jax/evaluation/report.py: what the page says, that it is safe, and that a
reader can use it.

The last ones drive a headless browser: tests/headless.py says where it comes from.
"""

import base64
import hashlib
import html.parser
import json
import math
import os
import pathlib
import re

import headless
import numpy as np
import pytest
from PIL import Image

from sr_jax.evaluation import report

VOID = {"meta", "img", "input", "br", "hr", "link"}
HOSTILE = ['<img src=x onerror="alert(1)">', "</script><script>alert(2)</script>", "'\"&{{curves}}"]


class Page(html.parser.HTMLParser):
  """The elements of a page in order, as (tag, attributes, own text); fails where tags mismatch."""

  def __init__(self, text: str):
    super().__init__()
    self.text, self.elements, self._open = text, [], []
    self.feed(text)
    self.close()
    assert not self._open, f"never closed: {self._open}"

  def handle_starttag(self, tag, attributes):
    self.elements.append([tag, dict(attributes), ""])
    if tag not in VOID:
      self._open.append((tag, self.elements[-1]))

  def handle_endtag(self, tag):
    assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
    self._open.pop()

  def handle_data(self, data):
    if self._open:
      for _, element in self._open:
        element[2] += data

  def all(self, tag: str, **attributes) -> list:
    attributes = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
    return [
      element
      for element in self.elements
      if element[0] == tag and attributes.items() <= element[1].items()
    ]

  def rows(self) -> list[list[tuple[str, str]]]:
    """Rows of the first table, as (text, class) of their cells."""
    table = re.search(r"<table.*?</table>", self.text, re.S)[0]
    return [
      [
        (Page(cell).elements[0][2].strip(), Page(cell).elements[0][1].get("class", ""))
        for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)
      ]
      for row in re.findall(r"<tr.*?</tr>", table, re.S)
    ]

  def data(self) -> dict:
    def refuse(constant):
      raise AssertionError(f"{constant} is no JSON")

    return json.loads(self.all("script", id="data")[0][2], parse_constant=refuse)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def add(page: report.Report, set_name: str, name: str, psnr: float = 20.0, side: int = 16) -> None:
  hr, sr = noise(side, side, 3), noise(side, side, 3, seed=1)
  lr = noise(side // 4, side // 4, 3, seed=2)
  page.add_image(set_name, name, lr, hr, {"A": sr}, {"A": {"psnr_y": psnr}})


def write(page: report.Report, folder: pathlib.Path, **options) -> Page:
  page.write(folder / "report.html", **{"title": "A title", "table": {}, **options})
  assert [path.name for path in folder.iterdir()] == ["report.html"]
  return Page((folder / "report.html").read_text(encoding="utf-8"))


def whole_of(page: Page) -> dict[str, int]:
  """{image: number of its layers in the page as a whole}."""
  names = re.findall(r'<span class="name">(.*?)</span>', page.text)
  templates = re.findall(r'<template class="whole">(.*?)</template>', page.text, re.S)
  return {name: template.count("<img") for name, template in zip(names, templates, strict=True)}


def test_the_table_shows_the_means_and_marks_the_best_of_each_column(tmp_path):
  table = {
    "bicubic": {"Set5": {"psnr_y": 28.42, "lpips_alex": 0.34, "niqe": 7.0, "images": {}}},
    "GAN": {
      "Set5": {"psnr_y": 26.2, "lpips_alex": 0.07, "niqe": 7.00001, "new_score": 1.0},
      "Set14": {"psnr_y": 25.0},
    },
    "PSNR": {"Set5": {"psnr_y": 30.444, "lpips_alex": math.nan}, "Set14": {"psnr_y": math.inf}},
  }
  page = write(report.Report(), tmp_path, table=table)
  head, set5, bicubic, gan, psnr, set14, gan14, psnr14 = page.rows()
  texts = [text for text, _ in head]
  assert texts == ["model", "PSNR Y ↑", "LPIPS ALEX ↓", "NIQE ↓", "NEW SCORE"]
  assert set5[0][0] == "Set5" and set14[0][0] == "Set14"
  # What is the same to all digits shown is equally good; nobody knows which new score is.
  assert bicubic == [
    ("bicubic", ""), ("28.42", ""), ("0.3400", ""), ("7.0000", "best"), ("–", "")
  ]  # fmt: skip
  assert gan == [
    ("GAN", ""), ("26.20", ""), ("0.0700", "best"), ("7.0000", "best"), ("1.0000", "")
  ]  # fmt: skip
  assert psnr == [("PSNR", ""), ("30.44", "best"), ("NaN", ""), ("–", ""), ("–", "")]
  assert gan14[:2] == [("GAN", ""), ("25.00", "")]
  assert psnr14[:2] == [("PSNR", ""), ("∞", "best")]
  chosen = write(report.Report(), tmp_path, table=table, columns=["niqe"])
  assert [text for text, _ in chosen.rows()[0]] == ["model", "NIQE ↓"]


def test_a_score_of_rgb_stands_beside_that_of_y(tmp_path):
  names = ["psnr_y", "ssim_y", "lpips_alex", "psnr_rgb", "mine", "ssim_rgb", "x_rgb"]
  table = {"A": {"Set": dict.fromkeys(names, 1.0)}}
  page = write(report.Report(), tmp_path, table=table, columns=names)
  assert [text.split(" ↑")[0].split(" ↓")[0] for text, _ in page.rows()[0]] == [
    "model", "PSNR Y", "PSNR RGB", "SSIM Y", "SSIM RGB", "LPIPS ALEX", "MINE", "X RGB"
  ]  # fmt: skip
  # A row that is folded has no heading above it: its cells name themselves.
  assert [a["data-metric"] for _, a, _ in page.all("td")][:2] == ["PSNR Y", "PSNR RGB"]


def test_pictures_come_first_and_curves_below_the_scores(tmp_path):
  collected = report.Report()
  add(collected, "Set", "a")
  table = {"A": {"Set": {"psnr_y": 20.0}}}
  page = write(collected, tmp_path, table=table, curves={"A": {"loss": [(1, 1.0)]}})
  places = ["set-0", "scores", "curves", "about"]
  assert [a["id"] for _, a, _ in page.all("section")] == places
  assert [a["href"] for _, a, _ in page.all("a")] == [f"#{place}" for place in places]


def test_protocol_and_facts_are_there(tmp_path):
  protocol, facts = {"crop_border": "scale"}, {"GAN": {"sha256": "0123abcd"}}
  page = write(report.Report(), tmp_path, protocol=protocol, facts=facts)
  assert "crop_border" in [text for _, _, text in page.all("dt")]
  assert {"scale", "0123abcd"} <= {text for _, _, text in page.all("dd")}
  assert page.all("title")[0][2] == "A title"


def test_the_page_refers_to_nothing_and_lets_nothing_else_run(tmp_path):
  collected = report.Report()
  add(collected, "Set", "a.png")
  page = write(collected, tmp_path, curves={"RUN": {"loss": [(1, 2.0)]}})
  for tag, attributes, _ in page.elements:
    for key, value in attributes.items():
      if key in ("src", "href", "srcset", "action", "data", "poster"):
        assert re.match(r"data:image/webp;base64,|#", value), (tag, key, value[:80])
      assert not key.startswith("on"), (tag, key)
  assert not re.search(r"url\(|@import|import\(|fetch\(|XMLHttpRequest|eval\(", page.text)
  policy = page.all("meta", http_equiv="Content-Security-Policy")[0][1]["content"]
  rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
  assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
  scripts = [text for _, attributes, text in page.all("script") if "type" not in attributes]
  assert len(scripts) == 1
  digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
  assert rules["script-src"] == f"'sha256-{digest}'"


def hostile_page(folder: pathlib.Path) -> pathlib.Path:
  """A report where everything that comes from outside is an attack."""
  collected = report.Report()
  image, lr = noise(16, 16, 3), noise(4, 4, 3)
  for bad in HOSTILE:
    scores = {bad: {bad: 1.0, "psnr_y": 20.0}}
    collected.add_image(bad, bad, lr, image, {bad: image, "B": image}, scores)
  path = folder / "report.html"
  collected.write(
    path,
    title="".join(HOSTILE),
    table={bad: {bad: {bad: 1.0}} for bad in HOSTILE},
    protocol={bad: bad for bad in HOSTILE},
    facts={bad: {bad: bad} for bad in HOSTILE},
    curves={bad: {bad: [(1, 2.0), (2, 3.0)]} for bad in HOSTILE},
  )
  return path


def test_names_of_files_and_models_are_text_and_never_markup(tmp_path):
  page = Page(hostile_page(tmp_path).read_text(encoding="utf-8"))
  assert len(page.all("script")) == 2
  # The images of the comparator get theirs from the script.
  assert {attributes.get("src", "data:")[:5] for _, attributes, _ in page.all("img")} == {"data:"}
  assert [text for _, _, text in page.all("h1")] == ["".join(HOSTILE)]
  assert [text for _, _, text in page.all("span", class_="name")] == HOSTILE
  assert page.data()["runs"] == HOSTILE


def test_a_name_that_is_no_text_does_not_cost_the_report(tmp_path):
  collected = report.Report()
  name = os.fsdecode(b"caf\xe9.png")
  add(collected, "Set", name)
  page = write(collected, tmp_path, curves={name: {"loss": [(1, 2.0)]}})
  assert page.all("span", class_="name")[0][2] == "caf\\udce9.png"


def test_infinite_and_missing_scores_of_images(tmp_path):
  collected = report.Report()
  image = noise(16, 16, 3)
  srs = {"bicubic": image, "A": image, "B": ~image}
  scores = {"A": {"psnr_y": math.inf}, "B": {"psnr_y": math.nan}}
  collected.add_image("Set", "a", noise(4, 4, 3), image, srs, scores)
  page = write(collected, tmp_path, columns=["psnr_y"])
  assert "∞ dB" in page.text and "inf dB" not in page.text
  assert [text for _, _, text in page.all("span", class_="rank")] == ["PSNR Y ∞"]
  assert [text for _, _, text in page.all("td")][1:] == ["∞", "NaN"], "the first is a corner"


def test_curves_are_json_with_failures_as_null_and_an_axis_to_suit(tmp_path):
  curves = {
    "one": {
      "grad_norm_g": [(1, 5.0), (2, 6.0)],
      "loss/pixel": [(1, 1.0), (2, math.nan), (3, math.inf), (4, 0.01)],
      "eval/psnr_y": [(2, 20.0)],
    },
    "two": {"eval/psnr_y": [(2, 25.0)], "loss/signed": [(1, -1.0), (2, 1000.0)], "none": []},
  }
  data = write(report.Report(), tmp_path, curves=curves).data()
  assert data["runs"] == ["one", "two"]
  charts = {chart["name"]: chart for chart in data["charts"]}
  assert list(charts) == ["eval/psnr_y", "loss/pixel", "loss/signed", "grad_norm_g"]
  assert charts["loss/pixel"]["lines"] == [[0, [1, 2, 3, 4], [1.0, None, None, 0.01], [], []]]
  assert [line[0] for line in charts["eval/psnr_y"]["lines"]] == [0, 1]
  assert {name for name, chart in charts.items() if chart["log"]} == {"loss/pixel"}
  assert {name for name, chart in charts.items() if not chart["main"]} == {"grad_norm_g"}


def test_thinning_keeps_the_ends_the_extremes_and_failures():
  values = np.random.default_rng(0).normal(size=10_000)
  values[1234], values[4321], values[7777], values[8888] = 50.0, -50.0, math.nan, math.inf
  points = list(enumerate(values.tolist()))
  thinned = report.thin(points)
  assert 300 < len(thinned) <= 500
  assert thinned[0] == points[0] and thinned[-1] == points[-1]
  steps = [step for step, _ in thinned]
  assert {1234, 4321, 7777, 8888} <= set(steps)
  assert steps == sorted(set(steps))
  assert all(repr(points[step]) == repr((step, value)) for step, value in thinned)
  assert report.thin(points[:500]) == points[:500]
  assert len(report.thin(points, 5)) <= 5


def test_a_long_series_has_its_means_over_all_points(tmp_path):
  values = np.random.default_rng(0).normal(size=1000)
  values[10] = math.nan
  curves = {"RUN": {"loss": [(float(i), float(v)) for i, v in enumerate(values)]}}
  (chart,) = write(report.Report(), tmp_path, curves=curves).data()["charts"]
  _, _, _, steps, means = chart["lines"][0]
  np.testing.assert_allclose(means, np.nanmean(values.reshape(50, 20), axis=1), rtol=1e-12)
  np.testing.assert_allclose(steps[1:], np.arange(1000).reshape(50, 20).mean(axis=1)[1:])


def windows_by_a_loop(sr: np.ndarray, hr: np.ndarray, side: int, step: int):
  """The worst and the best corner (y, x), the slow way."""
  height, width = min(side, hr.shape[0]), min(side, hr.shape[1])
  rows = []
  for y in range(0, hr.shape[0] - height + 1, step):
    for x in range(0, hr.shape[1] - width + 1, step):
      a, b = (i[y : y + height, x : x + width].astype(float) for i in (sr, hr))
      flat = b.reshape(height, width, -1).sum(axis=2)
      rows.append(((y, x), ((a - b) ** 2).sum(), flat.var()))
  median = np.median([detail for _, _, detail in rows])
  worst = max(rows, key=lambda row: row[1])
  best = min((row for row in rows if row[2] >= median - 1e-9), key=lambda row: row[1])
  return worst[0], best[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(40, 52, 3), (40, 52), (12, 60, 3)])
def test_the_windows_are_those_of_a_loop(shape, seed):
  hr, sr = noise(*shape, seed=seed), noise(*shape, seed=seed + 10)
  hr[:20] //= 3  # parts with less detail
  worst, best = report.extreme_windows(sr, hr, 16, 4)
  found = [(rows.start, columns.start) for rows, columns in (worst, best)]
  assert tuple(found) == windows_by_a_loop(sr, hr, 16, 4)
  sizes = {
    (rows.stop - rows.start, columns.stop - columns.start) for rows, columns in (worst, best)
  }
  assert sizes == {(min(16, shape[0]), 16)}


def test_a_flat_sky_without_error_is_not_the_best_window():
  hr = noise(64, 64, 3)
  sr = hr.copy()
  hr[:32], sr[:32] = 128, 128
  sr[32:, :32] += 1
  _, (rows, columns) = report.extreme_windows(sr, hr, 16, 16)
  assert rows.start >= 32 and columns.start >= 32


@pytest.mark.parametrize("grey", [False, True])
def test_the_windows_of_the_page_are_the_pixels_of_the_images(tmp_path, grey):
  shape = () if grey else (3,)
  hr, lr = noise(160, 120, *shape), noise(40, 30, *shape, seed=1)
  sr, bicubic = hr.copy(), noise(160, 120, *shape, seed=2)
  sr[80:100, 40:60] = ~sr[80:100, 40:60]
  collected = report.Report()
  srs = {"A": sr, "B": noise(160, 120, *shape, seed=3), "bicubic": bicubic}
  collected.add_image("Set", "a", lr, hr, srs, {})
  page = write(collected, tmp_path)
  worst, best = report.extreme_windows(sr, hr, 72, 4)
  for kind, (rows, columns) in (("worst", worst), ("best", best)):
    start = page.text.index(f'data-view="{kind}"')
    text = page.text[start : page.text.index("</h3>", start)]
    assert f'data-box="{columns.start} {rows.start} 72 72"' in text
    assert f"x {columns.start}–{columns.stop}, y {rows.start}–{rows.stop}" in text
    strip = re.findall(r'data-key="(.*?)".*?src="(.*?)"', page.text[start:])[:5]
    assert [key for key, _ in strip] == ["lr", "sr:bicubic", "sr:A", "sr:B", "hr"]
    small = slice(rows.start // 4, rows.stop // 4), slice(columns.start // 4, columns.stop // 4)
    crops = [lr[small], bicubic[rows, columns], sr[rows, columns], srs["B"][rows, columns]]
    crops.append(hr[rows, columns])
    for (_, uri), crop in zip(strip, crops, strict=True):
      expected = np.stack([crop] * 3, axis=2) if grey else crop
      np.testing.assert_array_equal(headless.decoded(uri), expected)
  worst_psnr = 10 * math.log10(255**2 / np.mean((sr[worst] - hr[worst].astype(float)) ** 2))
  assert f"<b>A</b><span>{worst_psnr:.2f} dB</span>" in page.text


@pytest.mark.parametrize("grey", [False, True])
def test_whole_images_are_close_and_lr_is_exact(tmp_path, grey):
  y, x = np.mgrid[:96, :128]
  smooth = np.stack([y * 2, x, 255 - y - x], axis=2).astype(np.uint8)
  hr = smooth[:, :, 0] if grey else smooth
  collected = report.Report()
  collected.add_image("Set", "a", np.ascontiguousarray(hr[::4, ::4]), hr, {"A": hr}, {})
  page = write(collected, tmp_path)
  template = re.search(r'<template class="whole">(.*?)</template>', page.text, re.S)[1]
  layers = {
    key: headless.decoded(uri) for key, uri in re.findall(r'key="(.*?)".*?src="(.*?)"', template)
  }
  assert list(layers) == ["lr", "sr:A", "hr"]
  rgb = np.stack([hr] * 3, axis=2) if grey else hr
  np.testing.assert_array_equal(layers["lr"], rgb[::4, ::4])
  assert np.abs(layers["hr"].astype(float) - rgb).mean() < 3
  assert "lossy WebP of quality 90" in page.text


def test_a_small_image_is_one_window(tmp_path):
  collected = report.Report()
  add(collected, "Set", "a.png", side=16)
  page = write(collected, tmp_path)
  assert page.text.count('class="strip"') == 1 and "Only window of A" in page.text


def test_the_worst_and_the_best_image_of_a_set_are_flagged(tmp_path):
  collected = report.Report()
  image, lr = noise(16, 16, 3), noise(4, 4, 3)
  for name, lpips in [("a", 0.3), ("b", 0.1), ("c", 0.5), ("d", 0.2)]:
    scores = {"bicubic": {"lpips_alex": 1 - lpips}, "A": {"mine": 1.0, "lpips_alex": lpips}}
    collected.add_image("Set", name, lr, image, {"bicubic": image, "A": image}, scores)
  page = write(collected, tmp_path, columns=["lpips_alex", "psnr_y"])
  cells = [(attributes.get("class"), text) for _, attributes, text in page.all("td")]
  assert cells[:3] == [(None, ""), (None, "0.7000"), ("best", "0.3000")]
  assert len(cells) == 4 * 3, "a score that no model has is no column"
  flags = re.findall(r'class="name">(.)</span><span class="chip (\w+)"', page.text)
  assert flags == [("b", "best"), ("c", "worst")]
  opened = [a["data-rank"] for _, a, _ in page.all("details", class_="image") if "open" in a]
  assert opened == ["-0.5"]


def test_whole_images_are_shared_among_sets_and_the_extremes_stay(tmp_path):
  collected = report.Report(max_full_images=8)
  for i in range(20):
    add(collected, "Large", f"l{i:02}", psnr={13: 10.0, 17: 40.0}.get(i, 20.0 + i / 100))
  for i in range(3):
    add(collected, "Small", f"s{i}", psnr=20.0 + i)
  page = write(collected, tmp_path)
  whole = {name for name, layers in whole_of(page).items() if layers == 3}
  assert whole == {"l00", "l01", "l02", "l13", "l17", "s0", "s1", "s2"}
  assert sum(whole_of(page).values()) == 24
  assert "8 of 23 are in this page" in page.text and "20 images; 5 of them whole" in page.text


@pytest.mark.parametrize("pixels, whole", [(10**9, 4), (2 * (16 + 512), 2), (527, 0)])
def test_whole_images_have_a_budget_of_pixels(tmp_path, pixels, whole):
  collected = report.Report(max_full_pixels=pixels)  # an image here: 16 + 256 + 256
  for name in "abcd":
    add(collected, "Set", name)
  assert sum(layers > 0 for layers in whole_of(write(collected, tmp_path)).values()) == whole


def test_images_that_do_not_belong_together_are_refused():
  page, hr, lr = report.Report(), noise(16, 16, 3), noise(4, 4, 3)
  with pytest.raises(ValueError, match=r"x\.png: A has the shape \(16, 12, 3\), HR has"):
    page.add_image("Set", "x.png", lr, hr, {"A": noise(16, 12, 3)}, {})
  with pytest.raises(ValueError, match="no multiple of LR"):
    page.add_image("Set", "x.png", noise(4, 5, 3), hr, {"A": hr}, {})
  with pytest.raises(ValueError, match="float32; images must be uint8"):
    page.add_image("Set", "x.png", lr, hr.astype(np.float32), {"A": hr}, {})
  with pytest.raises(ValueError, match="no SR image"):
    page.add_image("Set", "x.png", lr, hr, {}, {})


# In a browser.

RED, BLUE, YELLOW = (220, 20, 30), (20, 40, 220), (230, 220, 20)


def drive(path: pathlib.Path, output: pathlib.Path) -> dict:
  return headless.drive("drive.mjs", path, output)


def colour(value: tuple[int, int, int], height: int, width: int) -> np.ndarray:
  return np.full((height, width, 3), value, np.uint8)


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
  """What the browser saw of a report where bicubic is red, the model blue and LR yellow."""
  folder = tmp_path_factory.mktemp("visit")
  collected = report.Report(max_full_images=2)
  srs = {"bicubic": colour(RED, 192, 256), "A": colour(BLUE, 192, 256)}
  for i, name in enumerate("abc"):
    scores = {"bicubic": {"psnr_y": 20.0}, "A": {"psnr_y": 21.0 + i}}
    collected.add_image("Set", name, colour(YELLOW, 48, 64), noise(192, 256, 3), srs, scores)
  table = {
    name: {"Set": {"psnr_y": value}}
    for name, value in [("bicubic", 20.0), ("A", math.inf), ("none", math.nan), ("B", 9.0)]
  }
  steps = range(1, 2001)
  losses = [(step, math.nan if step == 1000 else 1 / step) for step in steps]
  curves = {
    "one": {"loss/pixel": losses, "eval/psnr_y": [(1, 20.0)], "flat": [(1, 0.0), (2, 0.0)]},
    "two": {"loss/pixel": losses[:9], "bad": [(1, math.nan)], "tiny": [(5, 1e-9), (9, 2e-9)]},
  }
  collected.write(folder / "report.html", title="Colours", table=table, curves=curves)
  return drive(folder / "report.html", folder / "seen") | {"folder": folder / "seen"}


def picture(visit: dict, name: str) -> np.ndarray:
  return np.asarray(Image.open(visit["folder"] / f"{name}.png").convert("RGB")).astype(int)


def sides(visit: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Median colours left and right of the divide, clear of its handle; the image is 512 wide."""
  pixels, divide = picture(visit, name), round(visit["states"][name]["divide"])
  return tuple(
    np.median(part.reshape(-1, 3), axis=0)
    for part in (pixels[:, : divide - 20], pixels[:, divide + 20 :])
  )


@pytest.mark.developer
def test_the_page_asks_for_nothing_and_has_no_error(visit):
  assert visit["requests"] == [] and visit["errors"] == [] and visit["dialogs"] == []
  assert visit["title"] == "Colours"
  assert (visit["folder"] / "page.png").stat().st_size > 10_000


@pytest.mark.developer
def test_the_policy_holds_and_the_count_of_requests_is_no_empty_promise(visit, tmp_path):
  page = (visit["folder"].parent / "report.html").read_text(encoding="utf-8")
  planted = page.replace("<footer>", '<img src="http://127.0.0.1:9/x.png" loading="eager"><footer>')
  (tmp_path / "planted.html").write_text(planted, encoding="utf-8")
  seen = drive(tmp_path / "planted.html", tmp_path / "seen")
  assert seen["requests"] == [] and "Content Security Policy" in seen["errors"][0]
  open_page = planted.replace("http-equiv", "data-was")
  (tmp_path / "open.html").write_text(open_page, encoding="utf-8")
  assert drive(tmp_path / "open.html", tmp_path / "seen")["requests"] == [
    "http://127.0.0.1:9/x.png"
  ]


@pytest.mark.parametrize(
  "name, percent",
  [("start", 50), ("moved", 25), ("keyboard", 30), ("clicked", 40), ("dragged", 80)],
)
@pytest.mark.developer
def test_the_slider_divides_the_left_image_from_the_right(visit, name, percent):
  state = visit["states"][name]
  assert float(state["value"]) == pytest.approx(percent, abs=0.5)
  assert state["width"] == 512
  assert state["divide"] == pytest.approx(512 * percent / 100, abs=3)
  assert state["clip"] == f"inset(0px {100 - float(state['value']):g}% 0px 0px)"
  assert (state["left"], state["right"]) == ("bicubic", "A")
  assert state["says"] == f"{state['value']} % bicubic, then A"
  left, right = sides(visit, name)
  np.testing.assert_allclose(left, RED, atol=12)
  np.testing.assert_allclose(right, BLUE, atol=12)


@pytest.mark.developer
def test_moving_the_slider_changes_the_picture_between_the_two_places(visit):
  start, moved = picture(visit, "start"), picture(visit, "moved")
  changed = (np.abs(start - moved).max(axis=2) > 60).mean(axis=0)
  # The outline of a window is in the way of two columns.
  assert (changed[150:230] > 0.9).sum() > 70, "from 25 to 50 %, red became blue"
  assert changed[:90].max() == 0 and changed[300:].max() == 0, "and nothing else did"


@pytest.mark.developer
def test_a_choice_changes_the_right_image_and_a_view_shows_a_window(visit):
  left, right = sides(visit, "selected")
  np.testing.assert_allclose(left, RED, atol=12)
  np.testing.assert_allclose(right, YELLOW, atol=3)
  assert visit["states"]["selected"]["right"] == "LR"
  assert visit["views"] == ["whole", "worst", "best"]
  window = visit["states"]["window"]
  assert window["view"] == "best" and window["width"] == 72 * 8
  np.testing.assert_array_equal(sides(visit, "window")[0], RED, "a window is lossless")


@pytest.mark.developer
def test_a_heading_sorts_and_what_is_no_number_is_last(visit):
  given, falling, rising = ([row[0] for row in rows] for rows in visit["columns"])
  assert given == ["bicubic", "A", "none", "B"]
  assert falling == ["A", "bicubic", "B", "none"]
  assert rising == ["B", "bicubic", "A", "none"]


@pytest.mark.developer
def test_every_image_comes_up_and_every_curve_is_drawn(visit):
  assert visit["comparators"] == 3 and visit["undecoded"] == 0
  assert visit["charts"] == 5 and visit["broken"] == 2
  # loss/pixel: one of 2000 points with its mean, one of 9; eval, flat and tiny: one each.
  assert visit["lines"] == 3 + 3
  assert visit["overflow"] == 0 and visit["overflowOnPhone"] == 0


@pytest.mark.developer
def test_a_crowded_page_is_never_scrolled_sideways_and_hr_stays_in_sight(tmp_path):
  """Twelve models, long names, every score, fourteen images: on a phone and on a desktop."""
  labels = ["bicubic", *(f"alpha {i / 10:g}" for i in range(9))]
  labels += ["a model of the authors, whose name is a whole sentence", "x" * 90]
  names = ["psnr_y", "ssim_y", "psnr_rgb", "ssim_rgb", "lpips_alex", "lpips_vgg", "niqe"]
  collected = report.Report(max_full_images=2)
  scores = {label: dict.fromkeys(names, 26.9876) for label in labels}
  for i in range(14):
    name = f"{i} {'long name ' * 9}{'y' * 90}.png" if i == 1 else f"{i}.png"
    hr = noise(96, 96, 3, seed=i)
    srs = {label: colour(BLUE, 96, 96) for label in labels}
    collected.add_image("Set", name, colour(YELLOW, 24, 24), hr, srs, scores)
  table = {label: {"Set": values, "Other": values} for label, values in scores.items()}
  curves = {label: {"loss": [(1, 1.0), (2, 0.5)]} for label in labels}
  path = tmp_path / "report.html"
  collected.write(path, title=" ".join(labels), table=table, columns=names, curves=curves)
  seen = drive(path, tmp_path / "seen")
  assert seen["overflow"] == 0 and seen["overflowOnPhone"] == 0
  assert seen["sideways"] == []
  assert len(seen["hrInSight"][0]) == 6 * (len(labels) + 2)
  assert all(seen["hrInSight"][0]) and all(seen["hrInSight"][1])


@pytest.mark.developer
def test_hostile_names_do_nothing_in_a_browser(tmp_path):
  seen = drive(hostile_page(tmp_path), tmp_path / "seen")
  assert seen["dialogs"] == [] and seen["requests"] == [] and seen["errors"] == []
  start = seen["states"]["start"]
  assert (start["left"], start["right"]) == ("LR", HOSTILE[0])
  assert seen["undecoded"] == 0 and seen["overflowOnPhone"] == 0
