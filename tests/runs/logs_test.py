"""Tests of sr_jax/runs/logs.py: the lines of metrics.jsonl, and TensorBoard's files where it is."""

import json

import numpy as np
import pytest

from sr_jax.machine import tensorflow
from sr_jax.runs import logs


def lines(run) -> list[dict]:
  return [json.loads(line) for line in (run / logs.METRICS).read_text().splitlines()]


def test_a_line_a_step(tmp_path):
  run = tmp_path / "new" / "run"
  writer = logs.Writer(run, tensorboard=False)
  writer.scalars(10, {"loss": 0.25, "loss/pixel": 1e-3}, {"steps_per_second": 3.5})
  writer.scalars(20, {"loss": 0.125}, {})
  # Read before it is closed: who watches a run sees each line at once.
  assert lines(run) == [
    {"step": 10, "loss": 0.25, "loss/pixel": 0.001, "timing": {"steps_per_second": 3.5}},
    {"step": 20, "loss": 0.125},
  ]
  writer.images(20, {"eval/a": np.zeros((1, 8, 8, 3), np.uint8)})  # nowhere to put it
  writer.close()
  writer = logs.Writer(run, tensorboard=False)
  writer.scalars(30, {"loss": 0.5}, {})
  writer.close()
  assert [line["step"] for line in lines(run)] == [10, 20, 30]
  assert [path.name for path in run.iterdir()] == [logs.METRICS]


@pytest.mark.parametrize("step, kept", [(9, []), (15, [10]), (20, [10, 20]), (99, [10, 20, 30])])
def test_a_resumed_run_writes_each_line_once(tmp_path, step, kept):
  writer = logs.Writer(tmp_path, tensorboard=False)
  for number in (10, 20, 30):
    writer.scalars(number, {"loss": 1 / number}, {"seconds": 1.0})
  writer.close()
  before = lines(tmp_path)
  logs.cut_back(tmp_path, step)
  assert lines(tmp_path) == [line for line in before if line["step"] in kept]
  assert [path.name for path in tmp_path.iterdir()] == [logs.METRICS]


def test_scores_that_will_be_written_anew_are_dropped_and_no_earlier_ones(tmp_path):
  writer = logs.Writer(tmp_path, tensorboard=False)
  for step in (10, 20):
    writer.scalars(step, {"loss": 0.5}, {})
    writer.scalars(step, {"eval/psnr_y": 25.0}, {})
  writer.close()
  before = lines(tmp_path)
  logs.cut_back(tmp_path, 20)
  assert lines(tmp_path) == before
  logs.cut_back(tmp_path, 20, scored=False)
  assert lines(tmp_path) == before[:-1]


@pytest.mark.parametrize(
  "torn", ['{"step": 20, "lo', '{"step": 2', "{", '{"loss": 1}\n', "\0" * 40, "17\n", "null\n"]
)
def test_a_torn_line_is_dropped(tmp_path, torn):
  whole = '{"step": 10, "loss": 0.1}\n'
  (tmp_path / logs.METRICS).write_text(whole + torn)
  logs.cut_back(tmp_path, 100)
  assert (tmp_path / logs.METRICS).read_text() == whole


def test_without_a_checkpoint_nothing_is_dropped(tmp_path, caplog):
  for number in range(2):  # the second one finds what the first one moved
    writer = logs.Writer(tmp_path, tensorboard=False)
    writer.scalars(10 + number, {"loss": 0.5}, {})
    writer.close()
    before = (tmp_path / logs.METRICS).read_bytes()
    logs.cut_back(tmp_path, 0, scored=False)
    assert (tmp_path / f"metrics_{number}.jsonl").read_bytes() == before
    assert f"has lines, but no checkpoint; moved to metrics_{number}.jsonl" in caplog.text
    assert not (tmp_path / logs.METRICS).exists()


@pytest.mark.parametrize(
  "line", [b"\xff\xfe\n", b"\0" * 9 + b"\n", b"[" * 9999 + b"\n", b'{"step": true}\n', b"17\n"]
)
def test_damaged_lines_are_cut_off_which_is_said_and_the_others_stay_as_they_are(
  tmp_path, caplog, line
):
  whole = b'{"step":1,  "loss": 1e-1}\n'
  (tmp_path / logs.METRICS).write_bytes(whole + line + whole + line)
  logs.cut_back(tmp_path, 5)
  assert (tmp_path / logs.METRICS).read_bytes() == whole + whole
  assert f"{tmp_path}/metrics.jsonl: 2 damaged lines are cut off" in caplog.text


def test_huge_numbers_of_a_stranger_are_left_out(tmp_path):
  (tmp_path / logs.METRICS).write_text('{"step": 1, "loss": 1' + "0" * 999 + ', "a": 1}\n')
  assert logs.read_curves(str(tmp_path)) == {"a": [(1, 1.0)]}


def test_a_new_run_has_nothing_to_cut(tmp_path):
  logs.cut_back(tmp_path, 0)
  assert not list(tmp_path.iterdir())


def test_without_tensorflow_the_numbers_are_in_the_file(tmp_path, monkeypatch, caplog):
  def fail():
    raise ImportError("TensorFlow cannot be imported")

  monkeypatch.setattr(tensorflow, "import_tensorflow", fail)
  writer = logs.Writer(tmp_path)
  writer.scalars(1, {"loss": 0.5}, {})
  writer.images(1, {"eval/a": np.zeros((1, 8, 8, 3), np.uint8)})
  writer.close()
  assert lines(tmp_path) == [{"step": 1, "loss": 0.5}]
  assert [path.name for path in tmp_path.iterdir()] == [logs.METRICS]
  (record,) = caplog.records
  assert "no TensorBoard files (TensorFlow cannot be imported)" in record.getMessage()


def test_only_the_first_process_writes(tmp_path, monkeypatch):
  (tmp_path / logs.METRICS).write_text('{"step": 9}\n')
  monkeypatch.setattr(logs.jax, "process_index", lambda: 1)
  writer = logs.Writer(tmp_path)
  writer.scalars(1, {"loss": 0.5}, {})
  writer.images(1, {})
  writer.close()
  logs.cut_back(tmp_path, 0)
  assert lines(tmp_path) == [{"step": 9}]
  assert [path.name for path in tmp_path.iterdir()] == [logs.METRICS]


def test_tensorboard_files_can_be_read_back(tmp_path):
  pytest.importorskip("tensorflow")
  pytest.importorskip("clu")
  accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  import tensorflow as tf

  picture = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), np.uint8)
  writer = logs.Writer(tmp_path)
  writer.scalars(10, {"loss": 0.25}, {"steps_per_second": 3.0})
  writer.scalars(20, {"loss": 0.125}, {})
  writer.images(20, {"eval/a.png": picture})
  writer.close()
  assert [line["step"] for line in lines(tmp_path)] == [10, 20]
  events = accumulator.EventAccumulator(str(tmp_path)).Reload()

  def values(tag):
    return [(e.step, tf.make_ndarray(e.tensor_proto).item()) for e in events.Tensors(tag)]

  assert values("loss") == [(10, 0.25), (20, 0.125)]
  assert values("steps_per_second") == [(10, 3.0)]
  (event,) = events.Tensors("eval/a.png")
  width, height, png = tf.make_ndarray(event.tensor_proto)
  assert (event.step, width, height) == (20, b"12", b"8")
  np.testing.assert_array_equal(tf.io.decode_png(png), picture[0])


def test_curves_of_a_run(tmp_path):
  lines = [
    '{"step": 1, "loss_g": 2.0, "timing": {"eta": 3}}',
    '{"step": 2, "loss_g": 1.5, "eval/psnr_y": 20}',
    '{"step": 3, "los',
  ]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  curves = logs.read_curves(str(tmp_path))
  assert curves == {"loss_g": [(1, 2.0), (2, 1.5)], "eval/psnr_y": [(2, 20.0)]}
  assert logs.read_curves("bicubic") == {}
