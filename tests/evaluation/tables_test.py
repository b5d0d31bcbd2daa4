"""Tests of sr_jax/evaluation/tables.py and of the columns in sr_jax/metrics/table.py."""

import csv
import io
import math

from sr_jax.evaluation import tables
from sr_jax.metrics.table import columns

COLOUR = {"psnr_y": 28.4215, "ssim_y": 0.81035, "psnr_rgb": 26.691, "ssim_rgb": 1.0}
GREY = {"ssim_y": 0.5, "psnr_y": math.inf}
TABLE = {"b": {"Set5": COLOUR}, "my|model": {"a long name": GREY}}


def test_on_the_screen():
  assert tables.format_text(TABLE).splitlines() == [
    "model     set          psnr_y  ssim_y  psnr_rgb  ssim_rgb",
    "b         Set5          28.42  0.8104     26.69    1.0000",
    "my|model  a long name     inf  0.5000         -         -",
  ]


def test_as_markdown():
  assert tables.format_markdown(TABLE).splitlines() == [
    "| model | set | psnr_y | ssim_y | psnr_rgb | ssim_rgb |",
    "| --- | --- | ---: | ---: | ---: | ---: |",
    "| b | Set5 | 28.42 | 0.8104 | 26.69 | 1.0000 |",
    "| my\\|model | a long name | inf | 0.5000 | - | - |",
  ]


def test_as_csv_with_all_digits():
  rows = list(csv.DictReader(io.StringIO(tables.format_csv(TABLE))))
  assert float(rows[0]["psnr_y"]) == COLOUR["psnr_y"]
  assert rows[1] == {
    "model": "my|model", "set": "a long name", "psnr_y": "inf", "ssim_y": "0.5",
    "psnr_rgb": "", "ssim_rgb": "",
  }  # fmt: skip


def test_columns_are_in_one_order_and_only_those_there():
  assert columns({"a": {"s": {"pi": 1, "niqe": 2, "psnr_y": 3}}}) == ["psnr_y", "niqe", "pi"]
