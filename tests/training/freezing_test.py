"""Tests of sr_jax/training/freezing.py: which parameters the patterns mean."""

import jax
import numpy as np
import pytest

from tiny_models import make_model

from sr_jax.formats import state_dicts
from sr_jax.training.freezing import describe, frozen_masks

MODEL = make_model("srresnet", features=4, blocks=12, prelu_per_channel=True)


def frozen_keys(patterns, model=MODEL):
  """The names in a file of what is frozen."""
  masks = frozen_masks(patterns, model.variables)
  masks = jax.tree.map(lambda m, x: np.broadcast_to(m, x.shape), masks, model.variables)
  assert jax.tree.structure(masks) == jax.tree.structure(model.variables)
  state = state_dicts.to_state_dict(model.name, masks)
  for key, array in state.items():
    assert array.all() or not array.any(), key
  return {key for key, array in state.items() if array.all()}


def keys(*starts):
  state = state_dicts.to_state_dict(MODEL.name, MODEL.variables)
  return {key for key in state if key.startswith(starts)}


@pytest.mark.parametrize(
  "patterns, starts",
  [
    (("conv_first",), ("conv_first.",)),
    (("conv_first/bias",), ("conv_first.bias",)),
    (("body/0-10",), tuple(f"body.{i}." for i in range(11))),
    (("body/1",), ("body.1.",)),  # and not body.10, body.11
    (("body/2-3/conv1", "prelu_first"), ("body.2.conv1", "body.3.conv1", "prelu_first")),
    (("body",), ("body.",)),
    (("conv_up*",), ("conv_up1", "conv_up2")),
    (("body/*/bn2/",), tuple(f"body.{i}.bn2." for i in range(12))),
    (("body/10-99",), ("body.10.", "body.11.")),
  ],
)
def test_patterns_begin_the_paths_of_what_is_frozen(patterns, starts):
  assert frozen_keys(patterns) == keys(*starts) != set()


def test_it_is_told_how_much_is_frozen():
  lines = describe(("conv_first", "body/0-1/conv1"), MODEL.variables)
  assert lines == [
    "frozen: conv_first, 976 parameters",  # 9 x 9 x 3 x 4 + 4
    "frozen: body/0-1/conv1, 296 parameters",  # 2 (3 x 3 x 4 x 4 + 4)
    f"1,272 of the generator's {sum(x.size for x in jax.tree.leaves(MODEL.variables['params'])):,} "
    "parameters are frozen",
  ]


@pytest.mark.parametrize(
  "patterns, message",
  [
    (
      ("conv_frist",),
      r"'conv_frist' must .*; the paths begin with bn_body, body, .*"
      r"; try --config.freeze=\"\('conv_first',",
    ),
    (
      ("prelu_first", "body/12"),
      r"'body/12' must .*; below body there are 0-11; try .*\('prelu_first', 'body/11'\)",
    ),
    (("body/5-2",), r"below body there are 0-11; try .*\('body/2-5',\)"),
    (("body/99-104/bn1",), r"below body there are 0-11; try .*\('body/11/bn1',\)"),
    (
      ("body/0-3/conv3/bias",),
      r"below body/0-3 there are bn1, bn2, conv1, conv2, prelu; try .*\('body/0-3/conv2/bias',\)",
    ),
    (("body/0/xyz",), r"below body/0 there are bn1.*; try .*\('body/0',\)"),
    (("conv_first/bias/x",), r"below conv_first/bias there is none; try .*\('conv_first/bias',\)"),
    # PyTorch's and Flax's spellings.
    (("body.3.conv1.weight",), r"below body/3/conv1 there are bias, kernel; .*/3/conv1/kernel',\)"),
    (("body.3.conv1",), r"try .*\('body/3/conv1',\)"),
    (("params/conv_up1",), r"try .*\('conv_up1',\)"),
    # A remedy that froze all would be refused in its turn.
    (("[!p]*", "prelu_up*", "prelu_frist"), r"try .*\('\[!p\]\*', 'prelu_up\*'\)"),
    (("conv",), "'conv' must be"),  # the names of parts are whole
    (("*",), r"all of the generator's parameters.*try --config.freeze=\"\(\)\""),
  ],
)
def test_what_freezes_nothing_or_everything_is_refused(patterns, message):
  with pytest.raises(ValueError, match=message):
    frozen_masks(patterns, MODEL.variables)
