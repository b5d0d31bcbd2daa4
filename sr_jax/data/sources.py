"""Where images come from: a folder, a folder of pairs, a published data set, TFDS, a pack, or
photographs that come installed.

A source names its images and loads one at a time; nothing is read before `load`. What is done
with them is in `packing.py` (training) and in `evaluation/test_sets.py`. Nothing is downloaded.
"""

import difflib
import json
import pathlib
import shlex
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sr_jax import UserError
from sr_jax.data import folders
from sr_jax.data.folders import SKIMAGE, merge, open_folder, open_skimage
from sr_jax.data.pack import FORMATS, dtype_of, is_pack
from sr_jax.data.source import Flags, Source
from sr_jax.data.tfds import open_tfds
from sr_jax.machine.paths import user_path


class Scheme(NamedTuple):
  """A kind of source that is named by SCHEME:REST.

  Attributes:
    open: (REST, keep_grey) -> the source.
    forms: {what to write: what it is}, for help and errors.
  """

  open: Callable[[str, bool], Source]
  forms: dict[str, str]


SCHEMES = {
  "tfds": Scheme(
    open_tfds,
    {"tfds:NAME[:SPLIT]": "a prepared TensorFlow data set, as tfds:div2k/bicubic_x4:train"},
  ),
  "skimage": Scheme(
    open_skimage,
    {
      f"skimage:{part}": f"{len(names)} photographs that come with scikit-image"
      for part, names in SKIMAGE.items()
    },
  ),
}

FORMS = """\
  DIR                  a folder of images, or one that holds them in HR/, GT/ or original/, or as
                       DIV2K, Flickr2K and OST are unpacked; or a pack of sr_jax.prepare
  DIR,DIR              several of them as one""" + "".join(
  f"\n  {form:20} {what}" for scheme in SCHEMES.values() for form, what in scheme.forms.items()
)


EVALUATED = Flags()


def open_source(
  spec: str,
  lr_spec: str = "",
  scale: int = 4,
  *,
  keep_grey: bool = False,
  check_sizes: bool = True,
  flags: Flags = EVALUATED,
) -> Source:
  """Open a set of images by its text form.

  Args:
    spec: one of `FORMS`. A folder of `LAYOUTS` comes with the LR images published with it, where
      they lie beside it; the HR folder itself has none.
    lr_spec: folder of the LR images of a folder `spec`, matched by relative path without suffix;
      `babyx4.png` is the partner of `baby.png` as well. '' for none.
    scale: HR size / LR size; for the names of LR files, and a pack must have it.
    keep_grey: load grey files as [H, W], as evaluation wants it.
    check_sizes: whether LR images whose sizes do not belong to HR's are an error here; else it is
      for the caller to look at each image.
    flags: what the first three are called where they were given, for errors.

  Returns:
    The source, its names sorted (TFDS: in the data set's order).

  Raises:
    UserError: an unknown form, an empty folder, partners that are missing or of another scale,
      TFDS data that are not prepared on this machine, a pack of another scale.
  """
  try:
    source = _open(spec, lr_spec, scale, keep_grey, flags)
    if check_sizes:
      folders.check_sizes(source, scale, flags)
  except UserError as error:
    if type(error) is not UserError or str(error).startswith((flags.source, flags.lr)):
      raise
    folder = f": {flags.source}=DIR" if spec.startswith("tfds:") else ""
    raise UserError(f"{flags.source}={spec}: {error}{folder}") from error
  return source


def _open(spec: str, lr_spec: str, scale: int, keep_grey: bool, flags: Flags) -> Source:
  scheme, _, rest = spec.partition(":")
  folder = user_path(spec)
  several = "," in spec and not folder.is_dir()
  if lr_spec and (several or scheme in SCHEMES or is_pack(folder)):
    raise UserError(
      f"{flags.lr}={lr_spec} goes with a folder, not with {flags.source}={spec}; leave it out"
    )
  if several:
    parts = [part.strip() for part in spec.split(",")]
    if not all(parts):
      there = ",".join(filter(None, parts))
      raise UserError(
        f"{flags.source}={spec} has a comma with nothing beside it; "
        f"try {flags.source}={shlex.quote(there or 'skimage:train')}"
      )
    return merge([_open(part, "", scale, keep_grey, flags) for part in parts])
  if scheme in SCHEMES and rest:
    return SCHEMES[scheme].open(rest, keep_grey)
  if spec and is_pack(folder):
    return _open_pack(folder, scale, keep_grey, flags)
  if lr_spec and not user_path(lr_spec).is_dir():
    raise UserError(
      f"{flags.lr}={lr_spec} must be an existing folder, of the LR images of {spec}; leave it out "
      "for LR images that are made"
    )
  if spec and folder.is_dir():
    return open_folder(folder, lr_spec, scale, keep_grey)
  why, fix = _meant(spec, folder)
  raise UserError(
    f"{flags.source}={spec} {why}; it must be a folder of images, several as DIR,DIR, a pack of "
    f"sr_jax.prepare, or one of {', '.join(_SHORT)}"
    + (f"; try {flags.source}={shlex.quote(fix)}" if fix else "")
  )


_SHORT = [form for scheme in SCHEMES.values() for form in scheme.forms]


def _meant(spec: str, folder: pathlib.Path) -> tuple[str, str]:
  """Says what is wrong with a source of no form, and returns the one that it may mean, or ''."""
  scheme, colon, rest = spec.partition(":")
  similar = difflib.get_close_matches(scheme.lower(), SCHEMES, n=1)
  if not spec.strip():
    return "is empty", ""
  if scheme in SCHEMES and colon:
    return f"lacks what comes after {scheme}:", ""
  if colon and similar:
    return f"begins with {scheme}:, which is no scheme", f"{similar[0]}:{rest}"
  if folder.is_file():
    return "is a file", str(folder.parent)
  try:
    near = [path.name for path in folder.parent.iterdir() if path.is_dir()]
  except OSError:
    near = []
  close = difflib.get_close_matches(folder.name, near, n=1)
  return "does not exist", str(folder.parent / close[0]) if close else ""


def _open_pack(folder: pathlib.Path, scale: int, keep_grey: bool, flags: Flags) -> Source:
  try:
    index = json.loads((folder / "index.json").read_text())
    version, made_for, entries = index["format"], index["scale"], index["images"]
  except (ValueError, LookupError, TypeError) as error:
    raise UserError(f"{folder}/index.json cannot be read ({error!r}); prepare it again") from error
  if version not in FORMATS.values():
    known = " or ".join(map(str, FORMATS.values()))
    raise UserError(
      f"{folder} is a pack of format {version} and must be of {known}; prepare it again"
    )
  if made_for != scale:
    raise UserError(
      f"{folder} was prepared for scale {made_for} and the scale must be {scale}; prepare another "
      f"by sr_jax.prepare --scale={scale}, or try {flags.scale}={made_for}"
    )

  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    pair = []
    for key in ("hr", "lr"):
      (height, width), offset = entries[i][key], entries[i][f"{key}_offset"]
      dtype = dtype_of(entries[i])
      pixels = np.fromfile(folder / f"{key}.bin", dtype, height * width * 3, offset=offset)
      if pixels.size < height * width * 3:
        raise UserError(f"{folder}/{key}.bin is cut off; prepare it again")
      image = pixels.reshape(height, width, 3)
      pair.append(image[:, :, 0] if keep_grey and entries[i]["grey"] else image)
    return tuple(pair)

  return Source(
    set_name=folder.resolve().name,
    names=tuple(entry["name"] for entry in entries),
    load=load,
    has_lr=True,
    fingerprint=[[entry[key] for key in ("name", "hr_sha256", "lr_sha256")] for entry in entries],
    description=f"{folder}, prepared from {index['source']}",
    size=lambda i: tuple(entries[i]["hr"]),
    pack=folder,
    bits=lambda i: 8 * dtype_of(entries[i]).itemsize,
  )
