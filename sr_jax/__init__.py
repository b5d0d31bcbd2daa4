"""sr_jax: single-image super-resolution from SRGAN to ESRGAN, in JAX."""

__version__ = "0.1.0"


class UserError(ValueError):
  """An error that the user can mend: a setting, a file, an argument. Programs print one line.

  Any other exception is a fault of the code, and keeps its traceback.
  """


class MissingPackageError(UserError, ImportError):
  """A package that was asked for is not installed; the message names it."""
