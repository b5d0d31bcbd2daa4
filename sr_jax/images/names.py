"""Names of output files: each is a function of the input's name alone.

So a second run, with more or fewer files beside it, gives no file another one's name.
"""

import hashlib
import re
from collections.abc import Sequence

from sr_jax.images import reading
from sr_jax.images import video

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[\d¹²³]|lpt[\d¹²³])", re.IGNORECASE)
_SUFFIXES = (*reading.SUFFIXES, *video.SUFFIXES)
_LONGEST = 255  # bytes of a name, on all usual file systems
_SHORTENED = 120


def output_name(name: str, suffixes: Sequence[str], addition: str = "") -> str:
  """Names the output of an input file.

  'sub/a.png' stays 'sub/a.png' where PNG is written, and 'sub/a.jpg' becomes 'sub/a.jpg.png', so
  that the two never meet. What file systems refuse is replaced: characters, devices of Windows,
  more than 255 bytes. A part that was changed so, and a file's name without a suffix of
  images or videos, ends in '~' and eight digits of its digest.

  Args:
    name: the input's path, relative to the folder that was given, with '/'.
    suffixes: of the format to write; the first one is appended.
    addition: to put before the suffix, '_x4'.
  """
  *folders, file = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
  stem, dot, suffix = file.rpartition(".")
  suffix = (dot + suffix) if stem else ""
  inner = "." + stem.rpartition(".")[2].lower()
  if suffix.lower() in suffixes and inner not in _SUFFIXES:
    kept, ending = stem, suffix
  else:
    kept, ending = file, suffixes[0]
    if suffix.lower() not in _SUFFIXES:
      kept = f"{file}~{_digest(file)}"
  room = _LONGEST - len(f"{addition}{ending}".encode())
  return "/".join([*(_safe(part, _LONGEST) for part in folders), _safe(kept, room)]) + (
    f"{addition}{ending}"
  )


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _safe(part: str, longest: int) -> str:
  """Returns a part of a path as every file system takes it, marked if it had to be changed."""
  clean = re.sub(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]', "_", part).rstrip(". ") or "_"
  size = len(clean.encode())
  if clean == part and size <= longest and not _RESERVED.fullmatch(clean.split(".")[0].rstrip()):
    return part
  if size + 9 > longest:
    clean = clean.encode()[:_SHORTENED].decode("utf-8", "ignore")
  stem, dot, rest = clean.partition(".")
  if _RESERVED.fullmatch(stem.rstrip()):
    return f"{stem}~{_digest(part)}{dot}{rest}"
  return f"{clean}~{_digest(part)}"
