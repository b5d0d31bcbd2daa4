"""Tests of benchmarks/accelerator.py: its parts one by one, and all of it as a rehearsal."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

import without_tensorflow
from benchmarks import accelerator
from sr_jax.images.resize import imresize

ROOT = pathlib.Path(__file__).resolve().parents[2]


def part(name: str, code: str, seconds: float = 60) -> accelerator.Part:
  """A part that runs this code, in which `output` is its file and `count` adds a line to a file."""
  start = "import pathlib, sys, time; output = pathlib.Path(sys.argv[1]); "
  start += f"open(output.parent / '{name}.count', 'a').write('x'); "
  return accelerator.Part(name, seconds, lambda results, output, _: ["-c", start + code, output])


def test_each_part_is_kept_and_what_failed_is_tried_again(tmp_path):
  works, fails = "output.write_text('{\"value\": 1}')", "sys.exit('out of luck')"
  parts = [
    part("a", works),
    part("b", fails),
    part("c", f"{works}; time.sleep(60)", seconds=1),
    accelerator.Part("d", 60, lambda results, *_: f"not with value {results['a']['value']}"),
    part("e", works),
  ]
  for again in (1, 2):
    found = accelerator.run(parts, tmp_path, 60, quick=True)
    assert found["a"] == found["e"] == {"value": 1}
    assert found["b"] == {"reason": "failed with status 1: out of luck"}
    assert found["c"]["reason"].startswith("stopped after 1 s; ")
    assert found["d"] == {"reason": "not with value 1"}
    counts = {name: len((tmp_path / f"{name}.count").read_text()) for name in "abce"}
    assert counts == {"a": 1, "b": again, "c": again, "e": 1}
  text = accelerator.report(found, quick=True)
  assert "* Not measured: b: failed with status 1: out of luck." in text
  assert text.count("| not measured |") == 9


def test_it_ends_when_its_time_is_over(tmp_path):
  begin = time.monotonic()
  found = accelerator.run([part("a", ""), part("b", "")], tmp_path, 4, quick=True)
  assert time.monotonic() - begin < 2 and not list(tmp_path.iterdir())
  assert {result["reason"] for result in found.values()} == {
    "no time was left; run the same command again"
  }


def test_the_processes_of_a_part_end_with_it(tmp_path):
  """A worker that writes after a second would outlive a part that is stopped after half of one."""
  late = f"import time; time.sleep(1.5); open({str(tmp_path / 'late')!r}, 'w')"
  code = f"import subprocess; subprocess.Popen([sys.executable, '-c', {late!r}]).wait()"
  accelerator.run([part("a", code, seconds=1)], tmp_path, 60, quick=True)
  time.sleep(1.5)
  assert not (tmp_path / "late").exists()


def test_a_part_ends_with_a_run_that_is_stopped(tmp_path):
  command = [sys.executable, "-m", "benchmarks.accelerator", "--quick", "--output", str(tmp_path)]
  program = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
  while not (tmp_path / "rates.log").exists():  # its first part has begun
    assert program.poll() is None
    time.sleep(0.05)
  time.sleep(0.5)
  program.terminate()
  assert program.communicate(timeout=30)[1].endswith("stopped by SIGTERM\n")
  assert program.returncode == 128 + 15
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    with contextlib.suppress(OSError):  # it ended in the meantime
      assert str(tmp_path).encode() not in path.read_bytes()


def rows(ms: dict[str, float], **ours):
  """What `train` writes of sr_jax and of PyTorch's modes."""
  jax = {"name": "sr_jax bfloat16", "framework": "jax", "seconds": ms["jax"] / 1e3,
         "ratios": {k: v / ms["jax"] for k, v in ms.items() if k != "jax"}, **ours}  # fmt: skip
  torch = [
    {"name": k, "framework": "torch", "seconds": v / 1e3, "peak_bytes": 30e9}
    for k, v in ms.items()
    if k != "jax"
  ]
  return [jax, *torch]


def test_the_rows_of_the_goals():
  gan = dict(matmul_share=0.41, peak_bytes=12e9, compile_s=25.04, cached_compile_s=2.5)
  times = {"jax": 20.0, "basicsr": 220.0, "compile": 50.0, "amp": 70.0}
  upscaled = {"jax": 10.0, "compile": 21.0}
  results = {
    "rates": {"device": "a chip", "jax": "0", "matmul_flops": {"bfloat16": 8e14},
              "copy_bytes": 4e12},
    "gan_16": {"cases": [{"rows": rows(times, **gan)}]},
    "gan_64": {"cases": [{"rows": rows({**times, "basicsr": 130.0}, **gan)}]},
    "infer": {"cases": [
      {"size": size, "rows": rows(upscaled, matmul_share=0.5, ns_per_pixel=40.0)}
      for size in (512, 128)
    ]},
    "estimate": {"estimated_ms": {"convolutions": 15.0, "sum": 30.0}},
    "degradations": {"seconds_an_example": 1e-3},
  }  # fmt: skip
  assert [measured for *_, measured in accelerator.goals(results)] == [
    "2.50 x compile, 2.50 x compile",
    "11.00 x basicsr",
    "6.50 x basicsr",
    "2.10 x compile, 2.10 x compile",
    "41%",
    "50%, 50%",
    "0.40 of compile's",
    "25.0 s, 2.5 s",
    "LR 128: 40 ns, LR 512: 40 ns",
  ]
  text = accelerator.report(results, quick=False)
  assert "20 ms measured; TPU's compiler estimated 15 (convolutions) to 30 ms (sum)" in text
  assert "16 of them 80% of a GAN step" in text and "bfloat16 800 TFLOP/s" in text


def test_the_goals_are_those_of_the_readme():
  readme = (ROOT / "benchmarks" / "README.md").read_text()
  for what, goal, _ in accelerator.goals({}):
    assert f"| {what} | {goal} |" in readme


def test_the_crops_are_photographs_and_their_lr_images():
  crops = np.load(accelerator.CROPS)
  hr, lr = crops["hr"], crops["lr"]
  assert hr.shape == (sum(accelerator.PHOTOGRAPHS.values()), 128, 128, 3)
  assert lr.dtype == hr.dtype == np.uint8
  np.testing.assert_array_equal(lr[7], imresize(hr[7], 0.25))
  assert accelerator.CROPS.stat().st_size < 2e6
  assert len({crop.tobytes() for crop in hr}) == len(hr)


# Neither TensorFlow, as on a bare machine, nor what else it lacks.
LACKING = without_tensorflow.BLOCK.replace(
  '"tensorboard")', '"tensorboard", "clu", "ml_collections")'
)


@pytest.mark.slow
def test_a_rehearsal_of_all_of_it(tmp_path):
  """Takes about three minutes of CPU time."""
  assert "clu" in LACKING
  (tmp_path / "sitecustomize.py").write_text(LACKING)
  environment = {**os.environ, "PYTHONPATH": str(tmp_path), "SR_JAX_ONEDNN": "0",
                 "XLA_FLAGS": "--xla_backend_optimization_level=0"}  # fmt: skip
  question = "import importlib.util as u; print([u.find_spec(n) for n in ('clu', 'tensorflow')])"
  asked = [sys.executable, "-c", question]
  assert subprocess.check_output(asked, env=environment, text=True).strip() == "[None, None]"
  folder = tmp_path / "measured"
  command = [sys.executable, "-m", "benchmarks.accelerator", "--quick", "--minutes", "8",
             "--output", str(folder)]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
  names = {each.name for each in accelerator.PARTS}
  assert set(found) == names - {"estimate"}, done.stdout
  assert "* Not measured: estimate: TPU's compiler has no estimate of cpu." in done.stdout
  assert found["rates"]["platform"] == "cpu" and found["rates"]["copy_bytes"] > 1e6
  training = found["training"]
  assert len(training["float32"]["loss_g"]) == 10 and min(training["float32"]["loss_g"]) > 0
  assert 0 < training["largest_difference"] < 0.1
  assert found["degradations"]["seconds_an_example"] > 0
  report = (folder / "report.md").read_text()
  assert report.startswith("# A rehearsal: its numbers mean nothing") and report in done.stdout
  # Without PyTorch there is nothing to compare with.
  has_torch = any("ratios" in row and row["ratios"] for row in found["gan_16"]["cases"][0]["rows"])
  assert ("x basicsr |" in report) == has_torch
  assert "| compiling the GAN step, cold and cached | 30 s, 3 s | not measured |" not in report
  # Once all is there, the same command measures nothing again.
  begin = time.monotonic()
  subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
  assert time.monotonic() - begin < 60
