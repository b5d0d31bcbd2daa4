"""What self-contained HTML pages have in common: their frame is filled, images are data URIs.

A page opens offline. Its frame is an HTML file with styles and one script, and with {{names}} where
text is filled in; a Content-Security-Policy names the script's digest, so that no other script runs
and nothing is loaded from elsewhere, whatever a file's name contains.
"""

import base64
import hashlib
import html
import io
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from sr_jax.machine.writing import write_file

LOSSY = {"quality": 90, "method": 4}
LOSSLESS = {"lossless": True, "quality": 60, "method": 4}
WEBP_MAX_SIDE = 16383


def fill(frame: pathlib.Path, texts: Mapping[str, str]) -> str:
  """Fills the frame of a page.

  Args:
    frame: an HTML file with {{name}} where a text belongs, and with one script.
    texts: {name: text}, which must be `escape`d, `to_json` or markup; {{policy}} is the source of
      the script and is filled in here.
  """
  text = frame.read_text(encoding="utf-8")
  script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  texts = {**texts, "policy": f"'sha256-{digest}'"}
  # One pass: a title that holds '{{sections}}' stays a title.
  return re.sub(r"\{\{(\w+)\}\}", lambda match: texts[match[1]], text)


def write(path: str | os.PathLike, page: str) -> None:
  """Writes a page, whole or not at all; the folder exists."""
  # Names of files may hold bytes that are no text; they must not cost the page.
  write_file(pathlib.Path(path), page.encode("utf-8", "backslashreplace"))


def escape(text: Any) -> str:
  """Escapes text from outside for elements and attributes."""
  return html.escape(str(text), quote=True)


def to_json(value: Any) -> str:
  """Formats JSON that cannot end its script element; a NaN, which would break the page, raises."""
  return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def encode(image: np.ndarray, options: Mapping[str, Any]) -> bytes:
  """Encodes uint8 [H, W, 3] or [H, W] as WebP.

  Args:
    image: with sides of at most WEBP_MAX_SIDE.
    options: LOSSY, LOSSLESS, or others of Pillow's for WebP.
  """
  buffer = io.BytesIO()
  Image.fromarray(image).convert("RGB").save(buffer, "WEBP", **options)
  return buffer.getvalue()


def uri(data: bytes) -> str:
  """The data URI of a WebP file."""
  return "data:image/webp;base64," + base64.b64encode(data).decode()
