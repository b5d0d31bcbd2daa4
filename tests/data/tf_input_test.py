"""Tests of sr_jax/data/tf_input.py."""

import itertools
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sr_jax.data import device_input
from sr_jax.data.pack import Pack, SubImages, divide
from sr_jax.data import packing
from sr_jax.data import sampling
from sr_jax.data import tf_input
from sr_jax.machine.tensorflow import import_tensorflow

pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def pack() -> Pack:
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (48 + 4 * i, 60 - 4 * i, 3), dtype=np.uint8) for i in range(5)]
  return packing.pack_from_arrays(images, 4)


def batches(pack, count, **options):
  options = {"batch_size": 8, "lr_patch": 8, "seed": 3} | options
  return list(itertools.islice(tf_input.make_tf_input(pack, **options), count))


def assert_equal(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys() == {"lr", "hr"}
    for key in x:
      np.testing.assert_array_equal(x[key], y[key])


def test_batches_are_the_planned_crops(pack):
  for step, batch in enumerate(batches(pack, 4)):
    assert batch["lr"].shape == (8, 8, 8, 3)
    assert batch["hr"].shape == (8, 32, 32, 3)
    assert batch["lr"].dtype == batch["hr"].dtype == np.uint8
    epoch, position = sampling.batch_positions(step, 8, 5)
    plan = sampling.example_plan(np, 3, epoch, position, pack.lr_sizes, 8)
    for j, row in enumerate(zip(*plan, strict=True)):
      lr, hr = sampling.take_example(pack, sampling.Plan(*row), 8)
      np.testing.assert_array_equal(batch["lr"][j], lr)
      np.testing.assert_array_equal(batch["hr"][j], hr)


def test_threads_do_not_change_the_order(pack):
  assert_equal(batches(pack, 20, threads=1), batches(pack, 20, threads=6))


def test_a_resumed_stream_goes_on_where_it_was(pack):
  assert_equal(batches(pack, 3, start_step=5), batches(pack, 8)[5:])


def test_a_late_start_costs_nothing(pack):
  batches(pack, 1)
  start = time.monotonic()
  batches(pack, 1, start_step=10**12)
  assert time.monotonic() - start < 10


def test_hosts_share_the_global_batch(pack):
  whole = batches(pack, 5)
  parts = [batches(pack, 5, process_index=p, process_count=4) for p in range(4)]
  together = [
    {key: np.concatenate([batch[key] for batch in hosts]) for key in ("lr", "hr")}
    for hosts in zip(*parts, strict=True)
  ]
  assert_equal(together, whole)


def test_another_seed_gives_other_examples(pack):
  a, b = batches(pack, 1)[0], batches(pack, 1, seed=4)[0]
  assert np.mean(a["hr"] == b["hr"]) < 0.5


def test_memory_depends_on_the_batch_and_not_on_the_data(pack):
  options = {"batch_size": 16, "lr_patch": 8, "threads": 2}
  batch = 16 * 3 * (8 * 8 + 32 * 32)
  assert tf_input.ram_bytes(pack, **options) == batch * (4 + 4 + 1)
  assert tf_input.ram_bytes(pack, **options, process_count=4) == batch // 4 * 9
  more = divide(pack, SubImages(32, 4))
  assert tf_input.ram_bytes(more, **options) == tf_input.ram_bytes(pack, **options)


def held() -> tuple[int, int]:
  """Memory of this process that is no file's, in bytes, and its open files."""
  with open("/proc/self/status") as file:
    (line,) = [line for line in file if line.startswith("RssAnon")]
  return int(line.split()[1]) * 1024, len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize(
  "kind", ["tf", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("device", "numpy"))]
)
def test_a_thousand_batches_leave_memory_and_files_flat(pack, kind):
  options = {"batch_size": 8, "lr_patch": 10, "seed": 3}
  if kind == "tf":
    stream = tf_input.make_tf_input(pack, **options)
  elif kind == "device":
    arrays, cut = device_input.make_cutter(pack, **options)
    cut = jax.jit(cut)
    stream = (cut(arrays, np.uint32(step)) for step in itertools.count())
  else:
    stream = (sampling.cut_batch(pack, step, **options) for step in itertools.count())
  samples = []
  for step in range(1300):
    next(stream)
    if step >= 300 and step % 50 == 0:
      samples.append(held())
  memory, files = np.array(samples).T
  # A file kept in every ten batches would be a hundred more; what other tests left open may close.
  assert files[-1] < files[0] + 10
  batch = 8 * 3 * (10 * 10 + 40 * 40)
  # A batch kept in every ten would be five times this; a jump or three may be other threads'.
  growth = np.sort(np.diff(memory))
  assert np.median(growth) < batch
  assert growth[:-3].sum() < 30 * batch


def test_mistakes_are_named(pack):
  with pytest.raises(ValueError, match=r"batch_size=9 .* 2 hosts; try --config.data.batch_size=10"):
    batches(pack, 1, batch_size=9, process_count=2)
  with pytest.raises(ValueError, match="hr_patch=64 must be at most"):
    batches(pack, 1, lr_patch=16)


def test_accelerators_are_hidden_from_tensorflow(monkeypatch):
  import tensorflow as tf

  hidden = []
  monkeypatch.setattr(tf.config, "set_visible_devices", lambda *args: hidden.append(args))
  import_tensorflow.cache_clear()
  assert import_tensorflow() is tf
  assert hidden == [([], "GPU"), ([], "TPU")]


def test_without_tensorflow_the_error_says_what_to_do(monkeypatch, pack):
  import_tensorflow.cache_clear()
  monkeypatch.setitem(sys.modules, "tensorflow", None)
  with pytest.raises(ImportError, match="pip install tensorflow-cpu.*--config.data.input=device"):
    batches(pack, 1)


def run(code: str) -> str:
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def test_nothing_else_imports_tensorflow():
  print(
    run(
      "import sys\n"
      "from sr_jax import metrics\n"
      "from sr_jax.data import device_input, packing, sampling, sources, tf_input\n"
      "from sr_jax.images import files, resize\n"
      "sources.open_source('skimage:test').load(0)\n"
      "assert 'tensorflow' not in sys.modules\n"
    )
  )


def test_a_run_that_ends_exits():
  """tf.data's threads used to wait for the interpreter that was waiting for them."""
  code = (
    "import numpy as np\n"
    "from sr_jax.data import packing, tf_input\n"
    "pack = packing.pack_from_arrays([np.zeros((99, 99, 3), np.uint8)], 1)\n"
    "stream = tf_input.make_tf_input(pack, batch_size=64, lr_patch=96, seed=0)\n"
    "for _ in range(3): next(stream)\n"
    "print('end', flush=True)\n"
  )
  assert run(code).endswith("end\n")
