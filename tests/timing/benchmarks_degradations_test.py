"""Tests of benchmarks/degradations.py."""

import pytest

from benchmarks import degradations


@pytest.mark.developer("torch")
def test_both_sides_are_timed(monkeypatch):
  monkeypatch.setattr(degradations, "CROP", 96)
  for measure in (degradations.time_sr_jax, degradations.time_torch):
    times = measure(2, 1)
    assert len(times) == 1 and times[0] > 0
