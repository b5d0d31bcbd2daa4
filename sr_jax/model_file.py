"""Where `load_model` was in version 0; it is in `sr_jax.models` now."""

import warnings
from typing import Any

from sr_jax import models


def load_model(*arguments: Any, **named: Any) -> Any:
  """`sr_jax.models.load_model`, for one version more."""
  warnings.warn(
    "sr_jax.model_file.load_model is sr_jax.models.load_model now; this name goes with the next "
    "version",
    DeprecationWarning,
    stacklevel=2,
  )
  return models.load_model(*arguments, **named)
