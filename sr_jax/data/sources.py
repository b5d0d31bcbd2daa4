"""Where images come from: a folder, a folder of pairs, a published data set, TFDS, a pack, or
photographs that come installed.

A source names its images and loads one at a time; nothing is read before `load`. What is done
with them is in `packing.py` (training) and in `evaluation/test_sets.py`. Nothing is downloaded.
"""

import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sr_jax import UserError
from sr_jax.data.folders import SKIMAGE, merge, open_folder, open_skimage
from sr_jax.data.pack import FORMAT_VERSION, is_pack
from sr_jax.data.source import Source
from sr_jax.data.tfds import open_tfds


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


def open_source(spec: str, lr_spec: str = "", scale: int = 4, *, keep_grey: bool = False) -> Source:
  """Open a set of images by its text form.

  Args:
    spec: one of `FORMS`. A folder of `LAYOUTS` comes with the LR images published with it, where
      they lie beside it; the HR folder itself has none.
    lr_spec: folder of the LR images of a folder `spec`, matched by relative path without suffix;
      `babyx4.png` is the partner of `baby.png` as well. '' for none.
    scale: HR size / LR size; for the names of LR files, and a pack must have it.
    keep_grey: load grey files as [H, W], as evaluation wants it.

  Returns:
    The source, its names sorted (TFDS: in the data set's order).

  Raises:
    UserError: an unknown form, an empty folder, partners that are missing, TFDS data that are
      not prepared on this machine, a pack of another scale.
  """
  scheme, _, rest = spec.partition(":")
  folder = pathlib.Path(spec).expanduser()
  several = "," in spec and not folder.is_dir()
  if lr_spec and (several or scheme in SCHEMES or is_pack(folder)):
    raise UserError(f"lr_source={lr_spec!r} goes with a folder, not with {spec!r}; leave it out")
  if several:
    parts = [part.strip() for part in spec.split(",")]
    return merge([open_source(part, "", scale, keep_grey=keep_grey) for part in parts])
  if scheme in SCHEMES and rest:
    return SCHEMES[scheme].open(rest, keep_grey)
  if spec and is_pack(folder):
    return _open_pack(folder, scale, keep_grey)
  if spec and folder.is_dir():
    return open_folder(folder, lr_spec, scale, keep_grey)
  raise UserError(f"source {spec!r} must be an existing folder or one of these forms:\n{FORMS}")


def _open_pack(folder: pathlib.Path, scale: int, keep_grey: bool) -> Source:
  try:
    index = json.loads((folder / "index.json").read_text())
    version, made_for, entries = index["format"], index["scale"], index["images"]
  except (ValueError, LookupError, TypeError) as error:
    raise UserError(f"{folder}/index.json cannot be read ({error!r}); prepare it again") from error
  if version != FORMAT_VERSION:
    raise UserError(
      f"{folder} is a pack of format {version} and must be of {FORMAT_VERSION}; prepare it again"
    )
  if made_for != scale:
    raise UserError(
      f"{folder} was prepared for scale {made_for} and the scale must be {scale}; prepare another "
      f"with --scale={scale}, or set --config.scale={made_for}"
    )

  def load(i: int) -> tuple[np.ndarray, np.ndarray | None]:
    pair = []
    for key in ("hr", "lr"):
      (height, width), offset = entries[i][key], entries[i][f"{key}_offset"]
      pixels = np.fromfile(folder / f"{key}.bin", np.uint8, height * width * 3, offset=offset)
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
  )
