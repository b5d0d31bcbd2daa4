"""Tests of benchmarks/results.py: what is in the page was in the files, and nothing else is."""

import json
import re

import pytest

from benchmarks import results


def write(folder, *, psnr=30.125, weights="a" * 16, sets=("Set5",), **more):
  folder.mkdir(parents=True)
  scores = {"psnr_y": psnr, "ssim_y": 0.5, "lpips_alex": 0.25, "images": {"a": {}, "b": {}}}
  made = {"date": "2026-01-02", "sr_jax": "1", "jax": "2", "device": "a chip"}
  facts = {"weights": weights, "step": "7"} if weights else {}
  contents = {"model": "m", "scale": 4, "facts": facts, "made": made, "protocol": {}, **more}
  (folder / "results.json").write_text(json.dumps(contents | {"sets": dict.fromkeys(sets, scores)}))


def test_the_page_has_what_the_files_have(tmp_path):
  write(tmp_path / "out" / "ours", sets=("Set5", "own"))
  write(tmp_path / "out" / "bicubic", psnr=28.4, weights="")
  results.main([str(tmp_path / "out"), "--output", str(tmp_path / "page.md")])
  page = (tmp_path / "page.md").read_text()
  assert page.count("| ours | 30.12 | 0.5000 | - | - | 0.2500 | - |") == 2
  assert page.count("| bicubic | 28.40 |") == 1
  assert "| ours | aaaaaaaaaaaaaaaa | 7 | 2026-01-02 | 1 | 2 | a chip |" in page
  assert "| bicubic | - | - | 2026-01-02" in page
  # Published rows are in italics, and only where the set was measured.
  assert "| *SRGAN, its paper* | *29.40* | *0.8472* |" in page and "Set14" not in page
  measured = re.findall(r"^\| ([^*|]+) \| \d", page, re.MULTILINE)
  assert set(measured) == {"ours", "bicubic"}


def test_two_models_of_one_name_and_a_set_scored_twice_are_refused(tmp_path):
  write(tmp_path / "a" / "ours")
  write(tmp_path / "b" / "ours", weights="b" * 16, sets=("Set14",))
  with pytest.raises(ValueError, match="another model was called ours too"):
    results.read([str(tmp_path / "a"), str(tmp_path / "b")])
  write(tmp_path / "c" / "ours")
  with pytest.raises(ValueError, match="ours was scored on Set5 twice"):
    results.read([str(tmp_path / "a"), str(tmp_path / "c")])
  with pytest.raises(ValueError, match="there is no results.json"):
    results.read([str(tmp_path / "d")])
