"""Tests of benchmarks/input.py."""

import re
import sys

import numpy as np
import pytest

from benchmarks import input as input_benchmark
from sr_jax.data import packing
from sr_jax.images.files import write_image


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(3):
    image = rng.integers(0, 256, (200, 220, 3), dtype=np.uint8)
    write_image(tmp_path / "data" / f"{i}.png", image)
  return tmp_path / "data"


@pytest.mark.developer("torch")
def test_the_table_has_all_rows_and_their_ratios(folder, capsys):
  pytest.importorskip("tensorflow")
  input_benchmark.main(["--quick", "--data", str(folder), "--batch_size", "4"])
  said = capsys.readouterr().out
  assert "3 sub-images" in said
  rates = {}
  for name in ("pack, numpy, uint8", "pack, tf.data, uint8", "DataLoader, PNG files"):
    (line,) = [line for line in said.splitlines() if line.startswith(name)]
    numbers = line.removeprefix(name).replace(",", "").split()
    rates[name] = float(numbers[0])
    assert rates[name] > 0
    assert re.fullmatch(r"[\d.]+", numbers[4])
  (line,) = [line for line in said.splitlines() if line.startswith("pack, numpy, uint8")]
  ratio = rates["pack, numpy, uint8"] / rates["DataLoader, PNG files"]
  assert float(line.replace(",", "").split()[7]) == pytest.approx(ratio, rel=0.02, abs=0.06)


def test_without_torch_it_measures_ours_and_says_so(folder, capsys, monkeypatch):
  find = input_benchmark.has
  monkeypatch.setattr(
    input_benchmark, "has", lambda m: m not in ("torch", "tensorflow") and find(m)
  )
  monkeypatch.setitem(sys.modules, "torch", None)
  input_benchmark.main(["--quick", "--data", str(folder), "--batch_size", "4"])
  said = capsys.readouterr().out
  assert "pack, numpy, uint8" in said and "DataLoader" not in said
  assert "not measured: BasicSR's way: no torch" in said
  assert "not measured: pack, tf.data: no tensorflow" in said


@pytest.mark.developer("torch")
def test_the_pytorch_way_cuts_pairs_that_belong_together(tmp_path):
  """HR repeats each LR pixel: after the crop and the flips it must still."""
  lr = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
  hr = lr.repeat(4, axis=1).repeat(4, axis=2)
  pack = packing.pack_from_arrays(list(hr), 4, list(lr))
  names = input_benchmark.write_png_folders(pack, tmp_path)
  batches = input_benchmark.torch_batches(input_benchmark.file_reader(tmp_path), names, 8, 12)
  batch = next(batches)
  assert batch["lq"].shape == (8, 3, 12, 12) and batch["gt"].shape == (8, 3, 48, 48)
  gt, lq = batch["gt"].numpy(), batch["lq"].numpy()
  np.testing.assert_array_equal(gt, lq.repeat(4, axis=2).repeat(4, axis=3))
  for crop in lq:  # RGB, of one of the images
    pixels = np.round(crop.transpose(1, 2, 0) * 255).astype(np.uint8)
    whole = lr.reshape(-1, 3).tolist()
    assert pixels[0, 0].tolist() in whole


@pytest.mark.developer("lmdb")
def test_lmdb_holds_the_same_files(tmp_path):
  pack = packing.pack_from_arrays([np.zeros((32, 32, 3), np.uint8)] * 2, 4)
  names = input_benchmark.write_png_folders(pack, tmp_path)
  input_benchmark.write_lmdb(tmp_path, names)
  read = input_benchmark.lmdb_reader(tmp_path)
  assert read("LQ", names[1]) == (tmp_path / "LQ" / names[1]).read_bytes()
