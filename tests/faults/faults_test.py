"""The short form of each fault; `make faults` plants full counts."""

import pytest

from planted import FAULTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder of the module: what cases share is made once in it."""
  return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.short])
def test_it_is_survived(folder, name):
  fault = FAULTS[name]
  if reason := fault.needs():
    pytest.skip(reason)
  for i in range(fault.short):
    # Spread over the cases of the full count, each kind at least once where there is room.
    case = i * max(1, fault.full // fault.short) if fault.full < 100 else i
    place = folder / f"{name}_{i}"
    place.mkdir()
    fault.plant(case, place)
