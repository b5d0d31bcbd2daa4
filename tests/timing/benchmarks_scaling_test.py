"""Tests of benchmarks/scaling.py: its arithmetic, and that programs are compiled once."""

import pytest

from benchmarks import scaling


def case(crops: int, convolutions: float, total: float, topology: str = "v5e:4x4"):
  return {
    "recipe": "esrgan", "batch_size": 16, "updates": 400_000, "flops": 179e9,
    "topology": topology, "crops_per_chip": crops,
    "estimated_ms": {"convolutions": convolutions, "sum": total},
    "held_bytes": 5e8, "temporary_bytes": 1.5e9, "sent_bytes": 100e6, "messages": 7,
  }  # fmt: skip


@pytest.mark.parametrize(
  "topology, expected",
  [
    # Twice 100 MB, but for a chip's own part, at 200 GB/s.
    ("v5e:16x16", 200 / 200 * 255 / 256),
    # Without a way around a chip at the corner has half of its links.
    ("v5e:4x4", 200 / 100 * 15 / 16),
    ("v6e:8x8", 200 / 200 * 63 / 64),
  ],
)
def test_sending_takes_the_bytes_by_the_links(topology, expected):
  assert scaling.communication_ms(100_000_000, topology) == pytest.approx(expected)


def test_the_row_of_a_chip():
  cells = scaling.chip_row(case(16, convolutions=40, total=80))
  # 16 crops of 179 GFLOP are 2.864 TFLOP: 71.6 TFLOP/s in 40 ms, of 197.
  expected = ["40 - 80", "2.5 - 5", "18% - 36%", "2.00", "100.0 in 7"]
  assert cells == ["esrgan", "v5e", "16", *expected]


def test_the_row_of_a_pod():
  cells = scaling.pod_row(case(16, convolutions=40, total=78.125), "v5e-16")
  # 256 crops are 16 of the recipe's batches: 25,000 updates see as many images, 100,000 are by the
  # square root. 40 to 78.125 + 1.875 ms each.
  hours = ["0.278 - 0.556", "1.11 - 2.22"]
  assert cells == ["esrgan", "v5e-16", "16", "256", "1.9", "40 - 80", "200 - 400", *hours]


def test_sending_is_hidden_at_best_and_added_at_worst():
  assert scaling.pod_row(case(1, convolutions=0.5, total=1), "v5e-256")[5] == "0.996 - 2"


def test_what_a_step_costs_without_crops():
  few, many = case(4, 10, total=30), case(64, 10, total=150)
  assert scaling.fixed_and_per_crop(few, many) == pytest.approx((22, 2))
  text = scaling.to_markdown([few, many])
  assert "* esrgan on v5e: 22.0 ms a step and 2.00 ms a crop (sum, from 4 to 64 crops)." in text
  assert text.count("| esrgan | v5e |") == text.count("| esrgan | v5e-256 |") == 2
  assert "v6e-64" not in text


def test_a_program_is_compiled_once(monkeypatch, tmp_path, capsys):
  compiled = []

  def compile_case(recipe, chip, crops):
    compiled.append((recipe, chip, crops))
    return case(crops, 1, 2)

  monkeypatch.setattr(scaling, "compile_case", compile_case)
  command = ["--recipe=esrgan", "--chip=v5e", "--output", str(tmp_path)]
  scaling.main([*command, "--crops=4"])
  scaling.main([*command, "--crops=4,16"])
  assert compiled == [("esrgan", "v5e", 4), ("esrgan", "v5e", 16)]
  assert "ESTIMATES by TPU's compiler" in capsys.readouterr().out
