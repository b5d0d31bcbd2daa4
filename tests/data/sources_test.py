"""Tests of sr_jax/data/sources.py, folders.py, tfds.py and source.py."""

import logging
import os
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from sr_jax import UserError
from sr_jax.data.folders import SKIMAGE
from sr_jax.data.source import Flags, Source, hold_out, name_list
from sr_jax.data import packing, sources
from sr_jax.data.tfds import in_order
from sr_jax.images.files import write_image


def write(folder, *names: str, size: int = 8, grey: bool = False) -> None:
  for value, name in enumerate(names):
    shape = (size, size) if grey else (size, size, 3)
    write_image(folder / name, np.full(shape, value, np.uint8))


@pytest.mark.parametrize("size", [(99, 64), (96, 63), (100, 64), (92, 64), (97, 65)])
def test_lr_images_of_another_scale_than_it_seems_are_refused_by_their_headers(tmp_path, size):
  """24x16 is what rounding down makes of 99x64; all bad pairs are in one error, none is decoded."""
  for name in ("a", "b", "good"):
    hr = (96, 64) if name == "good" else size
    for folder, (width, height) in (("hr", hr), ("lr", (24, 16))):
      path = tmp_path / folder / f"{name}.png"
      path.parent.mkdir(exist_ok=True)
      Image.new("RGB", (width, height)).save(path)
      path.write_bytes(path.read_bytes()[:60])  # the header alone
  with pytest.raises(UserError) as error:
    sources.open_source(str(tmp_path / "hr"), str(tmp_path / "lr"), 4)
  told = str(error.value)
  for name in ("a", "b"):
    assert f"{name}.png: HR {size[0]}x{size[1]}, LR 24x16" in told
  assert "HR must be 96x64" in told and "good.png" not in told
  sources.open_source(str(tmp_path / "hr"), "", 4)  # the remedy
  shutil.copytree(tmp_path / "hr", tmp_path / "set" / "HR")
  shutil.copytree(tmp_path / "lr", tmp_path / "set" / "LR")
  shutil.copytree(tmp_path / "set", tmp_path / "other")
  with pytest.raises(UserError) as error:
    sources.open_source(f"{tmp_path}/set,{tmp_path}/other", flags=Flags("--input", "--lr_input"))
  told = str(error.value)
  assert told.startswith("--input: ") and "without --lr_input" in told
  assert f"{tmp_path}/set/HR/a.png" in told and f"{tmp_path}/other/HR/a.png" in told


@pytest.mark.parametrize(
  "spec, why, fix",
  [
    ("{0}/birds,", "a comma with nothing beside it", "{0}/birds"),
    ("{0}/brids", "does not exist", "{0}/birds"), ("{0}/birds/a.png", "is a file", "{0}/birds"),
    ("Skimage:train", "is no scheme", "skimage:train"),
  ],
)  # fmt: skip
def test_a_misspelt_source_is_told_in_one_line_with_the_likely_one(tmp_path, spec, why, fix):
  (tmp_path / "birds").mkdir()
  write(tmp_path / "birds", "a.png")
  flags = Flags("--config.data.source", "--config.data.lr_source", "--config.scale")
  with pytest.raises(UserError) as error:
    sources.open_source(spec.format(tmp_path), flags=flags)
  told = str(error.value)
  assert told.startswith("--config.data.source=") and why in told and "\n" not in told
  remedy = told.rpartition("; try --config.data.source=")[2]
  assert remedy == fix.format(tmp_path)
  sources.open_source(remedy)


def test_a_link_to_nothing_is_an_unreadable_image_and_not_the_end(tmp_path):
  write(tmp_path, *(f"{i:02d}.png" for i in range(10)))
  (tmp_path / "10.png").symlink_to(tmp_path / "nowhere.png")
  pack = packing.build_pack(sources.open_source(str(tmp_path)), 4, str(tmp_path / "cache"))
  assert len(pack.names) == 10 and "10.png" not in pack.names


@pytest.mark.parametrize(
  "count, every, held",
  [(20, 10, [9, 19]), (19, 10, [9]), (5, 10, [4]), (2, 10, [1]), (3, 1, [1, 2]), (7, 3, [2, 5])],
)
def test_every_nth_image_is_held_out(tmp_path, count, every, held):
  write(tmp_path, *(f"{i:02d}.png" for i in range(count)))
  source = sources.open_source(str(tmp_path))
  train, test = hold_out(source, every)
  assert test.names == tuple(source.names[i] for i in held)
  assert set(train.names) | set(test.names) == set(source.names)
  assert not set(train.names) & set(test.names)
  for part in (train, test):
    for i, name in enumerate(part.names):
      assert part.load(i)[0][0, 0, 0] == source.names.index(name)
      assert part.size(i) == (8, 8)
      assert part.stamps[i] == source.stamps[source.names.index(name)]
  assert train.fingerprint != test.fingerprint


def test_of_one_image_none_is_held_out(tmp_path):
  write(tmp_path, "a.png")
  with pytest.raises(UserError, match="of one image none can be held out"):
    hold_out(sources.open_source(str(tmp_path)), 10)


def test_files_that_are_not_images_are_counted_and_named(tmp_path, caplog):
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  for name in ("COPYRIGHT.txt", "b.heic", "c.psd", ".hidden", "sub/d.mp4"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
  assert sources.open_source(str(tmp_path)).names == ("a.png",)
  assert "4 of 5 files are not taken for images" in caplog.text
  for name in ("COPYRIGHT.txt", "b.heic", "c.psd", "sub/d.mp4"):
    assert f"\n  {name}" in caplog.text
  assert ".hidden" not in caplog.text


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


def unpacked(folder, *names: str) -> None:
  """Data sets as their archives unpack, with two images each and a scale 2 that is not wanted."""
  for name in names:
    if name == "OST":
      write(folder / "OutdoorSceneTrain_v2" / "animal", "animal_0001.png", size=32)
      write(folder / "OutdoorSceneTrain_v2" / "water", "water_0001.png", size=32)
      continue
    prefix, stems = {
      "DIV2K": ("DIV2K_train", ("0001", "0800")),
      "DIV2K_valid": ("DIV2K_valid", ("0801", "0900")),
      "Flickr2K": ("Flickr2K", ("000001", "002650")),
    }[name]
    write(folder / f"{prefix}_HR", *(f"{stem}.png" for stem in stems), size=32)
    for scale in (2, 4):
      lr_folder = folder / f"{prefix}_LR_bicubic" / f"X{scale}"
      write(lr_folder, *(f"{stem}x{scale}.png" for stem in stems), size=32 // scale)


def test_published_layouts_are_known_by_name(tmp_path, caplog):
  for name in ("DIV2K", "Flickr2K", "OST"):
    unpacked(tmp_path / "some" / name, name)
  unpacked(tmp_path / "some" / "DIV2K", "DIV2K_valid")
  with caplog.at_level(logging.WARNING, logger="absl"):
    source = sources.open_source(str(tmp_path / "some" / "DIV2K"))
  assert "DIV2K_train_HR, LR from" in caplog.text and "DIV2K_train_LR_bicubic/X4" in caplog.text
  assert (source.set_name, source.names) == ("DIV2K", ("0001.png", "0800.png"))
  assert source.has_lr
  assert [source.load(1)[i].shape for i in range(2)] == [(32, 32, 3), (8, 8, 3)]
  half = sources.open_source(str(tmp_path / "some" / "DIV2K"), scale=2)
  assert half.load(0)[1].shape == (16, 16, 3)
  third = sources.open_source(str(tmp_path / "some" / "DIV2K"), scale=3)
  assert not third.has_lr  # not unpacked
  own = sources.open_source(str(tmp_path / "some" / "DIV2K" / "DIV2K_train_HR"))
  assert own.set_name == "DIV2K_train_HR" and not own.has_lr
  source = sources.open_source(str(tmp_path / "some" / "Flickr2K"))
  assert (source.set_name, source.has_lr, len(source.names)) == ("Flickr2K", True, 2)
  source = sources.open_source(str(tmp_path / "some" / "OST"))
  assert source.set_name == "OST" and not source.has_lr
  assert source.names == ("animal/animal_0001.png", "water/water_0001.png")


def test_a_folder_of_a_published_test_set(tmp_path):
  unpacked(tmp_path, "DIV2K_valid")
  source = sources.open_source(str(tmp_path))
  assert (source.set_name, source.names) == ("DIV2K_valid", ("0801.png", "0900.png"))
  assert source.load(1)[1].shape == (8, 8, 3)


def test_a_folder_of_several_published_sets_is_all_of_them(tmp_path):
  unpacked(tmp_path, "DIV2K", "Flickr2K", "DIV2K_valid")
  source = sources.open_source(str(tmp_path))
  assert source.set_name == "DIV2K+Flickr2K"
  assert source.names == (
    "DIV2K/0001.png", "DIV2K/0800.png", "Flickr2K/000001.png", "Flickr2K/002650.png"
  )  # fmt: skip
  with pytest.raises(ValueError, match="goes with one of DIV2K_train_HR, Flickr2K_HR"):
    sources.open_source(str(tmp_path), str(tmp_path))


def test_sets_are_merged(tmp_path, caplog):
  unpacked(tmp_path / "x", "DIV2K")
  unpacked(tmp_path / "y", "OST")
  write(tmp_path / "birds", "a.png", size=24)
  spec = f"{tmp_path}/x, {tmp_path}/y,{tmp_path}/birds"
  source = sources.open_source(spec)
  assert source.names[0] == "DIV2K/0001.png" and source.names[-1] == "birds/a.png"
  assert source.set_name == "DIV2K+OST+birds"
  assert not source.has_lr  # not of all
  hr, lr = source.load(1)
  assert hr[0, 0, 0] == 1 and lr.shape == (8, 8, 3)
  assert source.load(4)[0].shape == (24, 24, 3) and source.load(4)[1] is None
  assert source.size(4) == (24, 24)
  assert source.fingerprint != sources.open_source(f"{tmp_path}/y,{tmp_path}/x").fingerprint
  with pytest.raises(
    ValueError, match="must have different names, but these are called birds, birds; .* rename"
  ):
    sources.open_source(f"{tmp_path}/birds,{tmp_path}/birds")
  with pytest.raises(ValueError, match="nowhere does not exist"):
    sources.open_source(f"{tmp_path}/birds,{tmp_path}/nowhere")
  (tmp_path / "with,comma").mkdir()
  write(tmp_path / "with,comma", "a.png")
  assert sources.open_source(f"{tmp_path}/with,comma").set_name == "with,comma"


def test_sizes_are_known_without_decoding(tmp_path):
  write_image(tmp_path / "a.png", np.zeros((7, 9, 3), np.uint8))
  (tmp_path / "b.png").write_bytes(b"nothing")
  source = sources.open_source(str(tmp_path))
  assert [source.size(i) for i in range(2)] == [(7, 9), (0, 0)]


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
    "/HR/a.png: expected exactly one LR image named a or ax4, found 2",
    "/HR/b.png: expected exactly one LR image named b or bx4, found 0",
    "/LR/d.png: expected exactly one HR image for this LR image, found 2",
    "/LR/z.png: expected exactly one HR image for this LR image, found 0",
  ]


def test_long_lists_are_cut_with_a_count():
  text = name_list([str(i) for i in range(123)])
  assert text.splitlines()[0] == "  0"
  assert text.splitlines()[19:] == ["  19", "  ... and 103 more"]
  assert name_list(["a"]) == "  a"


def test_the_fingerprint_follows_the_files(tmp_path):
  write(tmp_path, "a.png", "b.png")
  first = sources.open_source(str(tmp_path)).fingerprint
  assert sources.open_source(str(tmp_path)).fingerprint == first
  os.utime(tmp_path / "b.png", ns=(1, 1))
  second = sources.open_source(str(tmp_path)).fingerprint
  (tmp_path / "b.png").rename(tmp_path / "c.png")
  assert first != second != sources.open_source(str(tmp_path)).fingerprint != first


def test_photographs_of_skimage_are_two_sets_apart():
  assert not set(SKIMAGE["train"]) & set(SKIMAGE["test"])
  for part in ("train", "test"):
    source = sources.open_source(f"skimage:{part}")
    assert source.set_name == f"skimage_{part}"
    assert source.names == SKIMAGE[part]
    for i in range(len(source.names)):
      hr, lr = source.load(i)
      assert lr is None
      assert hr.dtype == np.uint8
      assert hr.ndim == 3
      assert min(hr.shape[:2]) >= 192
      assert hr.std() > 10


@pytest.mark.parametrize("spec", ["", "nowhere/at/all", "tfds:", "skimage:", "http://a/b"])
def test_unknown_forms_are_told_the_known_ones(spec):
  with pytest.raises(ValueError, match="^--data=.* it must be a folder") as error:
    sources.open_source(spec)
  assert "\n" not in str(error.value)
  for form in ("DIR", "tfds:NAME[:SPLIT]", "skimage:train", "skimage:test"):
    assert form in str(error.value)
  with pytest.raises(
    ValueError, match="--data=skimage:all: .* must be skimage:train or skimage:test"
  ):
    sources.open_source("skimage:all")


def test_a_source_has_images_and_no_two_of_one_name():
  how = dict(set_name="a", load=None, has_lr=False, fingerprint=[], description="photos.txt")
  with pytest.raises(ValueError, match="photos.txt: there is no image in it"):
    Source(names=(), **how)
  with pytest.raises(ValueError, match="photos.txt: two images are called b.png; rename one"):
    Source(names=("a.png", "b.png", "b.png"), **how)


def test_a_folder_without_images(tmp_path):
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(ValueError, match=r"no images \(.png, .*\) found in .*; give the folder"):
    sources.open_source(str(tmp_path))


def test_lr_images_go_with_a_folder():
  with pytest.raises(
    ValueError, match="--lr=some/folder goes with a folder, not with --data=skimage:train"
  ):
    sources.open_source("skimage:train", "some/folder")


def test_links_that_lead_nowhere_or_round_are_told_when_they_are_read(tmp_path):
  write_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
  (tmp_path / "b.png").symlink_to("nowhere.png")
  (tmp_path / "c.png").symlink_to("c.png")
  source = sources.open_source(str(tmp_path))
  assert len(source.names) == len(set(source.stamps)) == 3
  source.load(0)
  for i, target in ((1, "nowhere.png"), (2, "c.png")):
    with pytest.raises(UserError, match=f"is a link to {target}, which does not exist"):
      source.load(i)


def test_tfds_that_is_not_prepared_stops_at_once(tmp_path, monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  monkeypatch.setitem(sys.modules, "tensorflow", None)  # not even imported
  start = time.monotonic()
  with pytest.raises(ValueError, match="`tfds build div2k/bicubic_x4`") as error:
    sources.open_source("tfds:div2k/bicubic_x4:train")
  assert time.monotonic() - start < 10  # TFDS asks servers that are not there for minutes
  assert str(error.value).endswith(": --data=DIR")
  assert str(tmp_path) in str(error.value)


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
  """Prepared data sets: `pairs`, with lr and hr, and `single`, with an image alone."""
  pytest.importorskip("tensorflow")
  pytest.importorskip("tensorflow_datasets")
  from sr_jax.machine.tensorflow import import_tensorflow

  tf = import_tensorflow()
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

  get = in_order(records)
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


def test_images_that_are_left_out_count_over_the_folder_that_they_were_held_out_of(tmp_path):
  write(tmp_path, *(f"{i:02d}.png" for i in range(20)))
  (tmp_path / "09.png").write_bytes(b"no image")
  halves = hold_out(sources.open_source(str(tmp_path)), 10)
  packs = [packing.build_pack(half, 4, str(tmp_path / "cache")) for half in halves]
  assert [len(pack.names) for pack in packs] == [18, 1]  # 1 of 20, and not 1 of 2
  (tmp_path / "19.png").write_bytes(b"no image")
  with pytest.raises(UserError, match="2 of 20 images"):  # none is left to score
    packing.build_pack(
      hold_out(sources.open_source(str(tmp_path)), 10)[1], 4, str(tmp_path / "cache")
    )
