"""Trained networks, read and written; other programs load one by `load_model`."""

from sr_jax.models.read import load_model

__all__ = ["load_model"]
