"""sr_jax: single-image super-resolution from SRGAN to ESRGAN, in JAX."""

__version__ = "0.1.0"


class UserError(ValueError):
  """An error that the user can mend: a setting, a file, an argument.

  The programs print it in one line. Any other exception, except OSError, is a fault of the code and
  keeps its traceback.
  """


class MissingPackageError(UserError, ImportError):
  """The error of a package that is needed and not installed; the message names it."""


def printable(text: str, most: int = 200) -> str:
  """Writes a text on one line, without what a terminal would obey, and not endlessly.

  For all that a stranger may have written: names of files, what a file says of itself.
  """
  text = text if len(text) <= most else f"{text[:most]}..."
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def harmless(text: str) -> str:
  """Writes a text of lines without what a terminal would obey; what programs print is such."""
  return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
