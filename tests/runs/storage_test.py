"""Runs in a bucket: the real clients (gcsfs, tensorstore, google-cloud-storage) and a fake service.

What this cannot show: credentials, a real bucket's speed and faults, the newer kinds of buckets.
"""
# ruff: noqa: F811  (fixtures of tiny_runs are imported by name)

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

import fake_gcs
from sr_jax import convert
from sr_jax import evaluate
from sr_jax.models.read import read_model
from sr_jax.models.write import save_model
from sr_jax.runs import checkpoint
from sr_jax.runs import logs
from sr_jax.runs import storage
from sr_jax.training.run import train_and_evaluate
from sr_jax import upscale
import tiny_models
from tiny_runs import assert_same_run, Killed, killed_after
from tiny_runs import photographs, shared_programs, tiny, whole_run  # noqa: F401  (fixtures)
import tiny_states
import without_tensorflow

ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_gcsfs = pytest.mark.skipif(
  not (storage.installed("gcsfs") and storage.installed("google.cloud.storage")),
  reason="needs gcsfs (pip install gcsfs)",
)


@pytest.fixture(scope="module")
def bucket():
  """A fake service; one for the process, since the clients keep its address."""
  with fake_gcs.running() as fake, pytest.MonkeyPatch.context() as patched:
    for name, value in fake.environment().items():
      patched.setenv(name, value)
    yield fake


@pytest.fixture(scope="module")
def bucket_run(bucket, whole_run):
  """A run in the bucket that died in its second stage, and was resumed."""
  _, config = whole_run
  with pytest.MonkeyPatch.context() as patched:
    killed_after(patched, 7)
    with pytest.raises(Killed):
      train_and_evaluate(config, "gs://bucket/run")
  train_and_evaluate(config, "gs://bucket/run")
  return storage.run_folder("gs://bucket/run")


@needs_gcsfs
def test_a_run_that_was_killed_equals_one_on_the_disk(bucket, bucket_run, whole_run):
  whole, config = whole_run
  assert_same_run(bucket_run, whole, config)
  assert_same_run(bucket_run / "psnr", whole / "psnr", config.psnr)
  config_json = bucket.objects["run/config.json"][1]
  assert config_json == (whole / "config.json").read_bytes()
  steps = {name.split("/")[2] for name in bucket.names("run/checkpoints/")}
  assert steps == {"2", "4"}
  assert not [name for name in bucket.names() if ".probe" in name or name.endswith(".tmp")]


@needs_gcsfs
def test_a_finished_run_says_so_and_changes_nothing(bucket, bucket_run, whole_run, capsys):
  before = dict(bucket.objects)
  train_and_evaluate(whole_run[1], "gs://bucket/run")
  assert "gs://bucket/run is finished: 4 steps" in capsys.readouterr().out
  assert bucket.objects == before  # generations too: nothing was written over with the same


@needs_gcsfs
@pytest.mark.slow
def test_killed_by_the_kernel_and_resumed(bucket, whole_run, photographs):
  """kill -9 of a real process, once the first stage has a checkpoint."""
  whole, config = whole_run
  code = (
    "import pathlib, sys; sys.path.insert(0, 'tests'); import conftest, tiny_runs\n"
    "from sr_jax.training.run import train_and_evaluate\n"
    f"config = tiny_runs.tiny(pathlib.Path({str(photographs)!r}))\n"
    "train_and_evaluate(config, 'gs://bucket/killed')\n"
  )
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  committed = "killed/psnr/checkpoints/2/commit_success.txt"
  while committed not in bucket.names("killed/") and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
  written = [json.loads(x) for x in bucket.objects["killed/psnr/metrics.jsonl"][1].splitlines()]
  assert [line["step"] for line in written][:3] == [1, 2, 2]  # on disk before their checkpoint
  train_and_evaluate(config, "gs://bucket/killed")
  run = storage.run_folder("gs://bucket/killed")
  assert_same_run(run, whole, config)
  assert_same_run(run / "psnr", whole / "psnr", config.psnr)


@needs_gcsfs
@pytest.mark.slow  # checkpoint_test damages those of a disk
def test_a_damaged_checkpoint_is_set_aside(bucket, bucket_run, whole_run):
  whole, config = whole_run
  for name in bucket.names("run/"):
    bucket.objects[name.replace("run/", "damage/", 1)] = bucket.objects[name]
  arrays = bucket.names("damage/checkpoints/4/state/")
  largest = max(arrays, key=lambda name: len(bucket.objects[name][1]))
  generation, contents = bucket.objects[largest]
  damaged = bytearray(contents)
  damaged[len(damaged) // 2] ^= 8
  bucket.objects[largest] = (generation, bytes(damaged))
  step = "damage/checkpoints/4"
  before = [name.removeprefix(step) for name in bucket.names(step)]

  train_and_evaluate(config, "gs://bucket/damage")
  moved = [name.removeprefix("damage/damaged/4_0") for name in bucket.names("damage/damaged/")]
  assert moved == before
  there = largest.replace("checkpoints/4", "damaged/4_0")
  assert bucket.objects[there][1] == bytes(damaged)
  assert_same_run(storage.run_folder("gs://bucket/damage"), whole, config)


@needs_gcsfs
def test_models_and_curves_are_read_from_a_bucket(bucket, bucket_run, whole_run):
  whole, _ = whole_run
  del bucket.requests[:]
  for path in ("", "/psnr", "/checkpoints/2"):
    ours = read_model(f"gs://bucket/run{path}")
    theirs = read_model(f"{whole}{path}")
    tiny_models.assert_equal_trees(ours.variables, theirs.variables)
    assert (ours.kwargs, ours.info) == (theirs.kwargs, theirs.info)
  curves, local = logs.read_curves("gs://bucket/run"), logs.read_curves(str(whole))
  assert curves == local and len(curves["eval/psnr_y"]) == 2
  assert {method for method, _, _ in bucket.requests} == {"GET"}
  with pytest.raises(FileNotFoundError, match="gs://bucket/nothing is no run.*gcloud storage cp"):
    read_model("gs://bucket/nothing")


@needs_gcsfs
@pytest.mark.slow
def test_the_programs_take_a_run_of_a_bucket_without_tensorflow(bucket_run, photographs, tmp_path):
  (tmp_path / "in").mkdir()
  shutil.copy(photographs / "0.png", tmp_path / "in")
  run = "gs://bucket/run"
  code = without_tensorflow.BLOCK + (
    "import sys; sys.path.insert(0, 'tests'); import conftest\n"
    "from sr_jax import convert, evaluate, interpolate, upscale\n"
    f"evaluate.main(['--model=x={run},{run}/psnr', '--data=in', '--output=scores',\n"
    "  '--metrics=psnr'])\n"
    f"upscale.main(['--model={run}', '--input=in/0.png', '--output=sr'])\n"
    f"interpolate.main(['--psnr={run}/psnr', '--gan={run}', '--output=i.npz'])\n"
    f"convert.main(['--input={run}', '--output=c.safetensors'])\n"
    f"convert.main(['--inspect={run}'])\n"
    "assert not any(name.startswith('tensorflow') for name in sys.modules)\n"
  )
  code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); os.chdir({str(tmp_path)!r})\n{code}"
  code = code.replace("'tests'", repr(str(ROOT / "tests")))
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  table = json.loads((tmp_path / "scores" / "table.json").read_text())
  assert set(table["models"]) == {"x", "run_psnr"}
  assert "eval/psnr_y" in (tmp_path / "scores" / "report.html").read_text()  # its curves
  model = read_model(run)
  written = read_model(tmp_path / "c.safetensors")
  tiny_models.assert_equal_trees(written.variables, model.variables)
  assert (tmp_path / "sr" / "0.png").exists() and (tmp_path / "i.npz").exists()
  assert model.info["digest"] in result.stdout.splitlines()[-4]


@needs_gcsfs
def test_lines_are_uploaded_once_a_minute_and_before_a_checkpoint(bucket, monkeypatch):
  """An hour with a line every ten seconds and a checkpoint every 25 minutes and 10 seconds."""
  now = [1000.0]
  monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
  run = storage.run_folder("gs://bucket/lines")
  writer = logs.Writer(run, tensorboard=False)

  def uploads():  # of metrics.jsonl; the generation counts every object
    return bucket.objects["lines/metrics.jsonl"][0] - first

  first = bucket.count
  for i in range(1, 361):
    now[0] += 10
    writer.scalars(i, {"loss": i / 7}, {})
    if i % 151 == 0:
      assert len(logs.read(run)) == i - 1
      writer.sync()
      assert [entry["step"] for entry in logs.read(run)] == list(range(1, i + 1))
  assert uploads() == 25 + 1 + 25 + 1 + 9
  assert len(logs.read(run)) == 356
  writer.close()
  assert [entry["step"] for entry in logs.read(run)] == list(range(1, 361))
  assert uploads() == 62
  writer.close()  # nothing is left to write
  assert uploads() == 62

  writer = logs.Writer(run, tensorboard=False)  # goes on with what is there
  writer.scalars(361, {"loss": 0.5}, {})
  assert len(logs.read(run)) == 360
  writer.close()
  assert len(logs.read(run)) == 361
  logs.cut_back(run, 3)
  expected = "".join(json.dumps({"step": i, "loss": i / 7}) + "\n" for i in (1, 2, 3))
  assert bucket.objects["lines/metrics.jsonl"][1].decode() == expected


@needs_gcsfs
def test_no_tensorboard_files_in_a_bucket(bucket, caplog):
  logs.Writer(storage.run_folder("gs://bucket/board")).close()
  assert "no TensorBoard files in a bucket" in caplog.text
  assert bucket.names("board/") == []


@needs_gcsfs
@pytest.mark.slow  # checkpoint_test deletes those of a disk
def test_old_checkpoints_are_deleted(bucket, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  tiny_states.write("gs://bucket/keep", (1, 2, 3), keep=1)
  assert {name.split("/")[2] for name in bucket.names("keep/checkpoints/")} == {"3"}
  # What comes of gs:// where pathlib has its hands in it.
  assert not pathlib.Path("gs:").exists() and not pathlib.Path("/gs/bucket").exists()
  state = tiny_states.make_state(3)
  restored, extra = checkpoint.restore("gs://bucket/keep", tiny_states.abstract(state))
  tiny_states.assert_equal(restored, state)
  assert extra == {"data": "abc"}


@needs_gcsfs
@pytest.mark.slow
def test_a_checkpoint_is_withdrawn(bucket):
  tiny_states.write("gs://bucket/back", (1, 2, 3))
  for step in (2, 3):
    checkpoint.withdraw("gs://bucket/back", step)
  assert checkpoint.steps("gs://bucket/back") == [1]
  assert {name.split("/")[2] for name in bucket.names("back/withdrawn/")} == {"2_0", "3_1"}
  state = tiny_states.make_state(1)
  restored, _ = checkpoint.restore("gs://bucket/back", tiny_states.abstract(state))
  tiny_states.assert_equal(restored, state)


@needs_gcsfs
@pytest.mark.parametrize(
  "workdir, refused, message",
  [
    ("gs://nowhere/run", set(), "--workdir=gs://nowhere/run cannot be used: 404 .*bucket does not"),
    ("gs://bucket/new", {"POST"}, "--workdir=gs://bucket/new cannot be used: 403 .*objectAdmin"),
    ("gs://bucket/new", {"DELETE"}, "--workdir=gs://bucket/new cannot be used: 403 .*objectAdmin"),
    ("gs://bucket/new", {"GET"}, "--workdir=gs://bucket/new cannot be used: 403 .*legacyBucketR"),
  ],
)
def test_a_bucket_that_cannot_be_used_is_found_at_the_start(
  bucket,
  photographs,
  monkeypatch,
  workdir,
  refused,
  message,
):
  monkeypatch.setattr(bucket, "refused", refused)
  with pytest.raises(ValueError, match=message) as caught:
    train_and_evaluate(tiny(photographs), workdir)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "path",
  ["s3://bucket/run", "hf://a/b", "https://host/run", "gs://bucket", "gs://", "gs:/b/r"],
)
def test_other_places_are_refused_and_not_made_folders(path, photographs, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=f"^{path} must be a folder or gs://BUCKET/RUN; mount"):
    train_and_evaluate(tiny(photographs), path)
  with pytest.raises(ValueError, match="must be a folder or gs://BUCKET/RUN"):
    read_model(path)
  assert not list(tmp_path.iterdir())


def test_without_gcsfs_a_bucket_is_an_error_that_names_it(photographs, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(storage, "installed", lambda name: name != "gcsfs")
  with pytest.raises(ImportError, match="gs://bucket/run needs gcsfs; pip install gcsfs"):
    train_and_evaluate(tiny(photographs), "gs://bucket/run")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [evaluate, upscale, convert])
def test_results_for_people_are_not_written_to_a_bucket(program, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  model = tmp_path / "model.npz"
  save_model(model, tiny_models.make_model("srresnet"))
  (tmp_path / "in").mkdir()
  inputs = {
    evaluate: ["--model", "bicubic", "--data", "in"],
    upscale: ["--model", str(model), "--input", "in"],
    convert: ["--input", str(model)],
  }
  with pytest.raises(ValueError, match="--output=gs://b/r must be a local path"):
    program.main([*inputs[program], "--output", "gs://b/r"])
  assert not (tmp_path / "gs:").exists()


def test_a_local_path_is_pathlibs(tmp_path):
  assert storage.run_folder(str(tmp_path)) == tmp_path
  assert type(storage.run_folder("a/gs/b")) is type(pathlib.Path("a"))
  for path in (storage.run_folder("~/x"), storage.local_path("--output", "~/x")):
    assert path == pathlib.Path.home() / "x"
  assert storage.run_folder("~nobody.of.this.name/x") == pathlib.Path("~nobody.of.this.name/x")


@needs_gcsfs
def test_the_clients_are_set_up_at_the_first_path_of_a_bucket_and_not_before():
  code = """
import os
before = dict(os.environ)
from sr_jax.runs import storage
import fsspec
storage.run_folder("here")
assert dict(os.environ) == before and "gs" not in fsspec.config.conf
storage.run_folder("gs://b/r")
assert dict(os.environ).keys() - before == {"EPATH_USE_TF", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"}
assert fsspec.config.conf["gs"] == {"use_listings_cache": False}
"""
  names = ("EPATH_USE_TF", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
  environment = {name: value for name, value in os.environ.items() if name not in names}
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=environment)
