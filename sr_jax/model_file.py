"""The place of `load_model` in version 0; it is in `sr_jax.models` now."""

import warnings
from typing import Any

from sr_jax import models


def load_model(*arguments: Any, **named: Any) -> Any:
  """Calls `sr_jax.models.load_model`; this name stays for one more version."""
  warnings.warn(
    "sr_jax.model_file.load_model has moved to sr_jax.models.load_model; the next version removes "
    "the old name",
    DeprecationWarning,
    stacklevel=2,
  )
  return models.load_model(*arguments, **named)
