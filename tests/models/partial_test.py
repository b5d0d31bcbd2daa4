"""Tests of sr_jax/models/partial.py: what a network takes of a model of another scale or size."""

import jax
import numpy as np
import pytest

from tiny_models import make_model

from sr_jax.formats import state_dicts
from sr_jax.models.partial import fit, fitted


def state(model, variables=None):
  return state_dicts.to_state_dict(model.name, variables or model.variables)


@pytest.mark.parametrize(
  "ours, theirs",
  [
    (("rrdbnet", {"scale": 2}), ("rrdbnet", {"scale": 4})),
    (("rrdbnet", {"scale": 2, "input_unshuffle": 2}), ("rrdbnet", {"scale": 4})),
    (("rrdbnet", {"scale": 3}), ("rrdbnet", {"scale": 4})),
    (("rrdbnet", {"blocks": 2}), ("rrdbnet", {"blocks": 5})),
    (("rrdbnet", {"blocks": 5}), ("rrdbnet", {"blocks": 2})),
    (("rrdbnet", {"features": 6}), ("rrdbnet", {})),
    (("rrdbnet", {"growth": 5}), ("rrdbnet", {})),
    (("rrdbnet", {"out_channels": 1}), ("rrdbnet", {})),
    (("srresnet", {"scale": 2, "blocks": 3}), ("srresnet", {"scale": 4})),
    (("compact", {"scale": 2}), ("compact", {"scale": 4})),
    (("residualnet", {}), ("msrresnet", {})),
  ],
  ids=str,
)
def test_each_array_of_equal_name_and_shape_is_taken_and_no_other(ours, theirs):
  """Told by the names and shapes of files, apart from how arrays are stacked here."""
  ours, theirs = make_model(ours[0], **ours[1]), make_model(theirs[0], seed=1, **theirs[1])
  merged = jax.tree.map(np.asarray, fitted(ours.variables, theirs.variables))
  assert jax.tree.structure(merged) == jax.tree.structure(ours.variables)
  assert ours.name == theirs.name or ours.name == "residualnet"
  if ours.name == "compact":  # whose conv_last has another number in another depth, not here
    assert ours.kwargs["blocks"] == theirs.kwargs["blocks"]
  before, given, after = state(ours), state(theirs), state(ours, merged)
  taken = 0
  for key, array in after.items():
    fits = key in given and given[key].shape == array.shape
    np.testing.assert_array_equal(array, given[key] if fits else before[key], err_msg=key)
    taken += fits
  assert 0 < taken
  told = fit(ours.variables, theirs.variables)
  assert told.taken and (taken < len(after)) == bool(told.fresh)


def test_both_are_listed():
  ours = make_model("rrdbnet", scale=2, input_unshuffle=2, blocks=5)
  theirs = make_model("rrdbnet", scale=8, blocks=3)
  told = fit(ours.variables, theirs.variables)
  assert sorted(told.taken) == [
    "body/0-2", "conv_body", "conv_first/bias", "conv_hr", "conv_last", "conv_up1", "conv_up2",
  ]  # fmt: skip
  assert told.fresh == ["conv_first/kernel", "body/3-4"]
  assert sorted(told.unused) == ["conv_first/kernel", "conv_up3"]
  told = fit(make_model("rrdbnet", growth=5).variables, make_model("rrdbnet").variables)
  assert "body/0-1/rdb1/conv1" in told.fresh and "body/0-1/rdb1/conv5/bias" in told.taken
