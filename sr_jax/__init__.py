"""sr_jax: single-image super-resolution from SRGAN to ESRGAN, in JAX."""

__version__ = "0.1.0"


class UserError(ValueError):
  """An error that the user can mend: a setting, a file, an argument.

  The programs print it in one line. Any other exception, except OSError, is a fault of the code and
  keeps its traceback.
  """


class MissingPackageError(UserError, ImportError):
  """The error of a package that is needed and not installed; the message names it."""
