"""The models that come with sr_jax, by their names.

They lie in the repository's folder `models/`, each with a card, and are installed with the package.
`models/manifest.json` lists them: {name: {file, sha256, license, what}}. A name stands for its file
wherever a model is asked for, unless something of this name lies in the current folder.
"""

import hashlib
import json
import pathlib

from sr_jax import UserError

_PACKAGE = pathlib.Path(__file__).resolve().parent.parent
DEFAULT = "srgan"  # what upscales where no model is named
# In an installed package, and in a checkout.
FOLDERS = (_PACKAGE / "shipped", _PACKAGE.parent / "models")


def folder() -> pathlib.Path | None:
  """Returns the folder of the models that come with sr_jax, or None where it was removed."""
  return next((path for path in FOLDERS if (path / "manifest.json").is_file()), None)


def manifest() -> dict[str, dict[str, str]]:
  """Returns {name: {'file', 'sha256', 'license', 'what'}} of the models that should be there.

  Raises:
    UserError: the list cannot be read.
  """
  path = folder()
  return _read_manifest(path / "manifest.json") if path else {}


def _read_manifest(path: pathlib.Path) -> dict[str, dict[str, str]]:
  try:
    return json.loads(path.read_text())["models"]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise UserError(f"{path} cannot be read ({error}); {REMEDY}") from error


def find(name: str) -> pathlib.Path | None:
  """Returns the file of a model that comes with sr_jax, its digest verified.

  Args:
    name: a name of the manifest; '' or another text is none.

  Returns:
    The file, or None where no model has this name.

  Raises:
    UserError: the file is missing, or is not the one that the manifest names.
  """
  entry = manifest().get(name)
  if entry is None:
    return None
  path = folder() / entry["file"]
  if problem := damage(path, entry["sha256"]):
    raise UserError(f"the model {name!r} that comes with sr_jax {problem}; {REMEDY}")
  return path


def damage(path: pathlib.Path, expected: str) -> str:
  """Says what is wrong with a file, '' where its digest is as it should be."""
  if not path.is_file():
    return f"is missing: {path}"
  found = sha256(path)
  return "" if found == expected else f"is damaged: {path} has sha256 {found}, not {expected}"


def sha256(path: pathlib.Path) -> str:
  """Returns the sha256 of a file, in hex."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


REMEDY = "in a checkout `git checkout models` brings it back, else install sr_jax again"
