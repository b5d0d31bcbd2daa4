"""The five diffs of docs/extending.md: each applies, and what they add works together."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
DIFFS = re.findall(r"```diff\n(.*?)\n```", (ROOT / "docs" / "extending.md").read_text(), re.S)


def apply(diff: str, root: pathlib.Path) -> None:
  """Applies a unified diff; every line of context must be there, once."""
  for part in re.split(r"(?m)^(?=--- )", diff)[1:]:
    old, new, *lines = part.rstrip("\n").split("\n")
    path = root / new.removeprefix("+++ b/")
    text = "" if old == "--- /dev/null" else path.read_text()
    hunks, hunk = [], []
    for line in lines:
      if line.startswith("@@"):
        hunk = []
        hunks.append(hunk)
      else:
        hunk.append(line)
    for hunk in hunks:
      before = "".join(f"{line[1:]}\n" for line in hunk if line[:1] != "+")
      after = "".join(f"{line[1:]}\n" for line in hunk if line[:1] != "-")
      assert text.count(before) == 1 or not text, f"{path} has not the lines\n{before}"
      text = text.replace(before, after, 1) if text else after
    path.write_text(text)


def copy(target: pathlib.Path) -> pathlib.Path:
  for name in ("sr_jax", "configs"):
    shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
  return target


@pytest.mark.parametrize("diff", DIFFS, ids=["generator", "loss", "score", "source", "format"])
def test_each_touches_one_room(diff, tmp_path):
  """One new file or none, one table; a generator has a recipe too."""
  apply(diff, copy(tmp_path))
  changed = re.findall(r"(?m)^\+\+\+ b/sr_jax/(.*)$", diff)
  assert len({path.split("/")[0] for path in changed}) == 1 and len(changed) <= 2


USE_THEM = """
import pathlib, sys
import jax
import numpy as np
from configs import espcn
from sr_jax import convert, evaluate
from sr_jax.data.sources import open_source
from sr_jax.models import load_model
from sr_jax.training.run import train_and_evaluate

config = espcn.get_config()
config.data.update(source="list:photos.txt", batch_size=8, hr_patch=32, input="device")
config.update(total_steps=2)
config.eval.source = "list:photos.txt"
config.log.tensorboard = False
config.generator.kwargs.features = 8
config.pixel.loss = "huber"
assert train_and_evaluate(config, "run") == ""
evaluate.main(
  ["--model", "bicubic,NEW=run", "--data", "list:photos.txt", "--output", "out", "--metrics", "mae"]
)
convert.main(["--input", "run", "--output", "model.msgpack"])
convert.main(["--inspect", "model.msgpack"])
convert.main(["--input", "model.msgpack", "--output", "model.safetensors", "--card"])
try:
  open_source("nowhere")
except ValueError as error:
  print(error)
try:
  convert.main(["--input", "run", "--output", "model.onnx"])
except ValueError as error:
  print("refused:", error)
lr = np.random.default_rng(0).random((1, 5, 7, 3), np.float32)
images = []
for path in ("run", "model.msgpack", "model.safetensors"):
  module, variables = load_model(path)
  images.append(np.asarray(module.apply(variables, lr, train=False)))
assert images[0].shape == (1, 20, 28, 3)
assert all(np.array_equal(images[0], image) for image in images)
"""


def test_all_of_them_work_together(tmp_path):
  root = copy(tmp_path)
  for diff in DIFFS:
    apply(diff, root)
  rng = np.random.default_rng(0)
  for i in range(2):
    small = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
    small.resize((48, 40), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
  (tmp_path / "photos.txt").write_text("0.png\n1.png\n")
  environment = {**os.environ, "PYTHONPATH": str(root)}
  ran = subprocess.run(
    [sys.executable, "-c", USE_THEM], cwd=root, env=environment, capture_output=True, text=True
  )
  assert ran.returncode == 0, ran.stderr[-3000:]
  assert re.search(r"bicubic .*\bmae\b|model .*\bmae\b", ran.stdout)
  assert "espcn" in ran.stdout  # the inspection
  assert "list:FILE" in ran.stderr + ran.stdout  # in the error about a source that is none
  if "pip install onnx" not in ran.stdout:
    assert re.search(r"refused: .*no \.onnx of the network 'espcn'", ran.stdout)
  assert '"mae": "mean absolute error of 8-bit values"' in (root / "out/table.json").read_text()
