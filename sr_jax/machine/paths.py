"""Turns what people write into paths; imports nothing but the standard library."""

import os
import pathlib


def user_path(path: str | os.PathLike) -> pathlib.Path:
  """Makes a path of what a person wrote, who may mean their home folder by `~`.

  The shell replaces `~` only at the beginning of a word, and so not in `--workdir=~/runs`.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError:  # no such person, or nobody's home is known
    return pathlib.Path(path)
