"""sr_jax: single-image super-resolution from SRGAN to ESRGAN, in JAX."""

__version__ = "0.1.0"
