"""Tests of sr_jax/data/sources.py."""

import os
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from sr_jax import images
from sr_jax.data import sources


def write(folder, *names: str, size: int = 8, grey: bool = False) -> None:
  for value, name in enumerate(names):
    shape = (size, size) if grey else (size, size, 3)
    images.write_image(folder / name, np.full(shape, value, np.uint8))


def test_a_folder(tmp_path):
  write(tmp_path / "birds", "b.png", "a.png", "more/c.png")
  source = sources.open_source(str(tmp_path / "birds"))
  assert source.set_name == "birds"
  assert source.names == ("a.png", "b.png", "more/c.png")
  assert [source.load(i)[0][0, 0, 0] for i in range(3)] == [1, 0, 2]
  assert source.load(0)[1] is None
  assert not source.has_lr


@pytest.mark.parametrize("inner", ["HR", "GT", "original"])
def test_the_hr_folder_is_found_and_named_by_its_parent(tmp_path, inner):
  write(tmp_path / "Set5" / inner, "baby.png")
  write(tmp_path / "Set5" / "LRx4", "babyx4.png")
  for folder in (tmp_path / "Set5", tmp_path / "Set5" / inner):
    source = sources.open_source(str(folder))
    assert source.set_name == "Set5"
    assert source.names == ("baby.png",)


def test_grey_files_are_kept_where_asked(tmp_path):
  write(tmp_path, "a.png", grey=True)
  assert sources.open_source(str(tmp_path)).load(0)[0].shape == (8, 8, 3)
  assert sources.open_source(str(tmp_path), keep_grey=True).load(0)[0].shape == (8, 8)


def test_pairs_are_matched_by_stem_with_or_without_the_scale(tmp_path):
  write(tmp_path / "HR", "a.png", "b.jpg", "sub/a.png", size=32)
  write(tmp_path / "LR", "a.bmp", "bx4.png", "sub/ax4.png")
  source = sources.open_source(str(tmp_path), str(tmp_path / "LR"), scale=4)
  assert source.has_lr
  assert source.names == ("a.png", "b.jpg", "sub/a.png")
  assert [source.load(i)[1][0, 0, 0] for i in range(3)] == [0, 1, 2]


def test_missing_and_ambiguous_partners_are_all_named(tmp_path):
  write(tmp_path / "HR", "a.png", "b.png", "c.png", "d.png", "d.bmp")
  write(tmp_path / "LR", "a.png", "ax4.png", "c.png", "d.png", "z.png")
  with pytest.raises(ValueError, match="must have one partner") as error:
    sources.open_source(str(tmp_path / "HR"), str(tmp_path / "LR"))
  lines = str(error.value).splitlines()[1:]
  said = [line.strip().removeprefix(str(tmp_path)) for line in lines]
  assert said == [
    "/HR/a.png: 2 LR images a or ax4, must be one",
    "/HR/b.png: 0 LR images b or bx4, must be one",
    "/LR/d.png: 2 HR images, must be one",
    "/LR/z.png: 0 HR images, must be one",
  ]


def test_long_lists_are_cut_with_a_count():
  text = sources.name_list([str(i) for i in range(123)])
  assert text.splitlines()[0] == "  0"
  assert text.splitlines()[19:] == ["  19", "  ... and 103 more"]
  assert sources.name_list(["a"]) == "  a"


def test_the_fingerprint_follows_the_files(tmp_path):
  write(tmp_path, "a.png", "b.png")
  first = sources.open_source(str(tmp_path)).fingerprint
  assert sources.open_source(str(tmp_path)).fingerprint == first
  os.utime(tmp_path / "b.png", ns=(1, 1))
  second = sources.open_source(str(tmp_path)).fingerprint
  (tmp_path / "b.png").rename(tmp_path / "c.png")
  assert first != second != sources.open_source(str(tmp_path)).fingerprint != first


def test_photographs_of_skimage_are_two_sets_apart():
  assert not set(sources.SKIMAGE["train"]) & set(sources.SKIMAGE["test"])
  for part in ("train", "test"):
    source = sources.open_source(f"skimage:{part}")
    assert source.set_name == f"skimage_{part}"
    assert source.names == sources.SKIMAGE[part]
    for i in range(len(source.names)):
      hr, lr = source.load(i)
      assert lr is None
      assert hr.dtype == np.uint8
      assert hr.ndim == 3
      assert min(hr.shape[:2]) >= 192
      assert hr.std() > 10


@pytest.mark.parametrize("spec", ["", "nowhere/at/all", "tfds:", "skimage:all", "http://a/b"])
def test_unknown_forms_are_told_the_known_ones(spec):
  with pytest.raises(ValueError, match="must be an existing folder or one of") as error:
    sources.open_source(spec)
  for form in ("DIR", "tfds:NAME[:SPLIT]", "skimage:train", "skimage:test"):
    assert form in str(error.value)


def test_a_folder_without_images(tmp_path):
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(ValueError, match=r"must hold images \(.png, .*has none"):
    sources.open_source(str(tmp_path))


def test_lr_images_go_with_a_folder():
  with pytest.raises(ValueError, match="goes with a folder, not with 'skimage:train'"):
    sources.open_source("skimage:train", "some/folder")


def test_tfds_that_is_not_prepared_stops_at_once(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # not even imported
  start = time.monotonic()
  with pytest.raises(ValueError, match="tfds build div2k/bicubic_x4\n") as error:
    sources.open_source("tfds:div2k/bicubic_x4:train")
  assert time.monotonic() - start < 1
  assert "--config.data.source=DIR" in str(error.value)
  assert str(tmp_path) in str(error.value)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """Prepared data sets: `pairs`, with lr and hr, and `single`, with an image alone."""
  pytest.importorskip("tensorflow")
  pytest.importorskip("tensorflow_datasets")
  from sr_jax.data import tf_input

  tf = tf_input.import_tensorflow()
  import tensorflow_datasets as tfds

  folder = tmp_path_factory.mktemp("tfds")

  def prepare(name, version, split_sizes, sizes):
    def examples(count):
      for i in range(count):
        yield {key: np.full((side, side + 4, 3), i, np.uint8) for key, side in sizes.items()}

    spec = {key: tf.TensorSpec((None, None, 3), tf.uint8) for key in sizes}
    image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    tfds.dataset_builders.store_as_tfds_dataset(
      name,
      version=version,
      features=tfds.features.FeaturesDict(dict.fromkeys(sizes, image)),
      split_datasets={
        split: tf.data.Dataset.from_generator(examples, output_signature=spec, args=[count])
        for split, count in split_sizes.items()
      },
      data_dir=str(folder),
      disable_shuffling=True,
    )

  prepare("pairs", "1.9.0", {"train": 1}, {"hr": 16, "lr": 4})
  prepare("pairs", "1.10.0", {"train": 10, "validation": 3}, {"hr": 32, "lr": 8})
  prepare("single", "1.0.0", {"train": 2}, {"image": 32})
  prepare("unclear", "1.0.0", {"train": 1}, {"left": 32, "right": 32})
  return folder


def test_tfds_pairs(tfds_folder, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
  source = sources.open_source("tfds:pairs")  # the newest version, and the split 'train'
  assert source.has_lr
  assert len(source.names) == len(set(source.names)) == 10
  for i in (0, 1, 5, 4, 9, 2):  # any order
    hr, lr = source.load(i)
    assert (hr.shape, lr.shape) == ((32, 36, 3), (8, 12, 3))
    assert np.all(hr == i)
    assert np.all(lr == i)
  assert len(sources.open_source("tfds:pairs:validation").names) == 3
  part = sources.open_source("tfds:pairs:train[50%:]")
  assert [part.load(i)[0][0, 0, 0] for i in range(len(part.names))] == [5, 6, 7, 8, 9]
  assert part.fingerprint != source.fingerprint
  assert sources.open_source("tfds:pairs/1.9.0").load(0)[0].shape == (16, 20, 3)


def test_tfds_of_single_images(tfds_folder, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
  source = sources.open_source("tfds:single:train")
  assert source.set_name == "single"
  assert not source.has_lr
  assert np.all(source.load(1)[0] == 1)
  assert source.load(1)[1] is None


def test_tfds_mistakes_are_named(tfds_folder, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
  with pytest.raises(ValueError, match="split 'test' of pairs must be one of train, validation"):
    sources.open_source("tfds:pairs:test")
  with pytest.raises(ValueError, match=r"image features 'hr' and 'lr'.*\['left', 'right'\]"):
    sources.open_source("tfds:unclear")


def test_a_sequential_reader_serves_threads_that_ask_about_in_order():
  opened = []

  def records():
    opened.append(1)
    return iter(range(500))

  get = sources._in_order(records)
  wrong = []

  def ask(worker):
    wrong.extend(i for i in range(worker, 500, 8) if get(i) != i)

  threads = [threading.Thread(target=ask, args=[worker]) for worker in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
  assert get(3) == 3  # back to the start
  before = len(opened)
  assert [get(i) for i in range(4, 200)] == list(range(4, 200))
  assert len(opened) == before
  with pytest.raises(ValueError, match="ends before record 500"):
    get(500)


def test_load_does_not_keep_files_open(tmp_path):
  write(tmp_path, "a.png")
  source = sources.open_source(str(tmp_path))
  before = len(os.listdir("/proc/self/fd"))
  for _ in range(20):
    source.load(0)
  assert len(os.listdir("/proc/self/fd")) == before
  assert Image.MAX_IMAGE_PIXELS is not None
