"""Tests of sr_jax/data/packed.py."""

import dataclasses
import hashlib
import json
import logging
import os

import numpy as np
import pytest

from sr_jax import images, resize
from sr_jax.data import packed, sources


def photograph(seed: int, height: int, width: int) -> np.ndarray:
  noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
  return np.clip(np.cumsum(noise, axis=1) + 128, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
  """Eleven images of several sizes, none a multiple of 4."""
  for i in range(11):
    images.write_image(tmp_path / "data" / f"{i:02d}.png", photograph(i, 33 + i, 42 + 2 * i))
  return tmp_path / "data"


def contents(pack: packed.Pack) -> list[bytes]:
  count = range(len(pack.names))
  return [image(pack, i).tobytes() for image in (packed.hr_image, packed.lr_image) for i in count]


def test_a_pack_holds_cropped_hr_and_its_lr(folder, tmp_path):
  pack = packed.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  assert pack.names == tuple(f"{i:02d}.png" for i in range(11))
  assert pack.scale == 4
  for i in range(11):
    whole = photograph(i, 33 + i, 42 + 2 * i)
    hr = whole[: whole.shape[0] // 4 * 4, : whole.shape[1] // 4 * 4]
    np.testing.assert_array_equal(packed.hr_image(pack, i), hr)
    np.testing.assert_array_equal(packed.lr_image(pack, i), resize.imresize(hr, 1 / 4))
    assert tuple(pack.hr_sizes[i]) == hr.shape[:2]
    assert tuple(pack.lr_sizes[i] * 4) == hr.shape[:2]


def test_a_pack_is_a_map_of_its_files_not_a_copy(folder, tmp_path):
  pack = packed.build_pack(sources.open_source(str(folder)), 2, str(tmp_path / "cache"))
  assert isinstance(pack.hr.base, np.memmap)
  assert pack.hr.base.filename == tmp_path / "cache" / pack.digest / "hr.bin"
  assert np.shares_memory(packed.lr_image(pack, 3), pack.lr)


def test_the_index_has_a_sum_of_each_image(folder, tmp_path):
  pack = packed.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  index = json.loads((tmp_path / "cache" / pack.digest / "index.json").read_text())
  assert index["scale"] == 4
  assert index["convention"] == "uint8_mirror_round_between"
  for i, entry in enumerate(index["images"]):
    assert entry["hr_sha256"] == hashlib.sha256(packed.hr_image(pack, i).tobytes()).hexdigest()
    assert entry["lr_sha256"] == hashlib.sha256(packed.lr_image(pack, i).tobytes()).hexdigest()


def test_the_second_run_decodes_nothing(folder, tmp_path):
  source = sources.open_source(str(folder))
  first = packed.build_pack(source, 4, str(tmp_path / "cache"))

  def load(i):
    raise AssertionError("decoded again")

  blind = dataclasses.replace(source, load=load)
  second = packed.build_pack(blind, 4, str(tmp_path / "cache"))
  assert contents(second) == contents(first)
  assert second.digest == first.digest


def test_other_files_scale_or_convention_make_another_pack(folder, tmp_path):
  def digest(scale=4, **options):
    source = sources.open_source(str(folder))
    return packed.build_pack(source, scale, str(tmp_path / "cache"), **options).digest

  digests = [digest(), digest(scale=2), digest(convention="double_mirror")]
  os.utime(folder / "03.png", ns=(5, 5))
  digests.append(digest())
  (folder / "03.png").unlink()
  digests.append(digest())
  assert len(set(digests)) == 5
  assert digest() == digests[-1]


def test_the_cache_is_where_the_environment_says(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("SR_JAX_CACHE", str(tmp_path / "elsewhere"))
  pack = packed.build_pack(sources.open_source(str(folder)), 4)
  assert sorted(file.name for file in (tmp_path / "elsewhere" / pack.digest).iterdir()) == [
    "hr.bin",
    "index.json",
    "lr.bin",
  ]


def test_threads_change_nothing(folder, tmp_path):
  source = sources.open_source(str(folder))
  one = packed.build_pack(source, 4, str(tmp_path / "one"), threads=1)
  many = packed.build_pack(source, 4, str(tmp_path / "many"), threads=7)
  for key in ("hr.bin", "lr.bin", "index.json"):
    files = [tmp_path / cache / one.digest / key for cache in ("one", "many")]
    assert files[0].read_bytes() == files[1].read_bytes()
  assert contents(one) == contents(many)


def test_given_lr_images_are_taken_as_they_are(tmp_path):
  lr = [photograph(i, 9, 10 + i) for i in range(3)]
  for i in range(3):
    images.write_image(tmp_path / "HR" / f"{i}.png", photograph(i, 37, 41 + 4 * i))
    images.write_image(tmp_path / "LR" / f"{i}x4.png", lr[i])
  source = sources.open_source(str(tmp_path / "HR"), str(tmp_path / "LR"))
  pack = packed.build_pack(source, 4, str(tmp_path / "cache"))
  for i in range(3):
    np.testing.assert_array_equal(packed.lr_image(pack, i), lr[i])


def test_lr_images_that_do_not_fit_are_all_named(tmp_path):
  for i, height in enumerate((8, 9, 8, 7)):
    images.write_image(tmp_path / "HR" / f"{i}.png", photograph(i, 32, 40))
    images.write_image(tmp_path / "LR" / f"{i}.png", photograph(i, height, 10))
  source = sources.open_source(str(tmp_path / "HR"), str(tmp_path / "LR"))
  with pytest.raises(ValueError, match="must be HR / 4 in size") as error:
    packed.build_pack(source, 4, str(tmp_path / "cache"))
  assert str(error.value).splitlines()[1:] == [
    "  1.png: HR 40x32, LR 10x9",
    "  3.png: HR 40x32, LR 10x7",
  ]
  assert not list((tmp_path / "cache").iterdir())


def test_a_few_bad_files_are_left_out_with_one_warning(folder, tmp_path, caplog):
  data = (folder / "05.png").read_bytes()
  (folder / "05.png").write_bytes(data[: len(data) // 2])
  source = sources.open_source(str(folder))
  for _ in range(2):  # when decoding, and when found in the cache
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
      pack = packed.build_pack(source, 4, str(tmp_path / "cache"))
    assert len(caplog.records) == 1
    assert "left out 1 images" in caplog.text
    assert "05.png" in caplog.text
    assert "06.png" not in caplog.text
    assert pack.names == tuple(f"{i:02d}.png" for i in range(11) if i != 5)
    np.testing.assert_array_equal(packed.hr_image(pack, 5), photograph(6, 39, 54)[:36, :52])


def test_many_bad_files_stop_and_are_all_named(folder, tmp_path):
  (folder / "02.png").write_bytes(b"")
  (folder / "07.png").write_bytes(b"this is text")
  with pytest.raises(ValueError, match="^2 of 11 images of .* unusable, and at most 10%") as error:
    packed.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  listed = str(error.value).splitlines()[1:]
  assert [line.split(":")[0].strip() for line in listed] == ["02.png", "07.png"]
  assert not list((tmp_path / "cache").iterdir())  # the fixed files are decoded anew


def test_small_images_are_left_out_of_the_same_pack(folder, tmp_path, caplog):
  source = sources.open_source(str(folder))
  everything = packed.build_pack(source, 4, str(tmp_path / "cache"), min_hr=32)
  assert len(everything.names) == 11
  with caplog.at_level(logging.WARNING, logger="absl"), pytest.raises(ValueError) as error:
    packed.build_pack(source, 4, str(tmp_path / "cache"), min_hr=36)
  assert "3 of 11" in str(error.value)  # of 33, 34 and 35 rows: 32 after the crop
  assert "00.png: 40x32 pixels, smaller than 36x36" in str(error.value)
  assert "--config.data.hr_patch" in str(error.value)
  (folder / "00.png").unlink()
  (folder / "01.png").unlink()
  for i in range(2):
    images.write_image(folder / f"more{i}.png", photograph(i, 64, 64))
  with caplog.at_level(logging.WARNING, logger="absl"):
    pack = packed.build_pack(
      sources.open_source(str(folder)), 4, str(tmp_path / "cache"), min_hr=36
    )
  assert "left out 1 images" in caplog.text
  assert "02.png" not in pack.names
  np.testing.assert_array_equal(packed.hr_image(pack, 0), photograph(3, 36, 48))


def test_a_failed_build_leaves_nothing(folder, tmp_path):
  source = sources.open_source(str(folder))

  def load(i):
    if i == 6:
      raise RuntimeError("a fault of the program")
    return source.load(i)

  with pytest.raises(RuntimeError, match="a fault of the program"):
    packed.build_pack(dataclasses.replace(source, load=load), 4, str(tmp_path / "cache"))
  assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_a_damaged_pack_is_made_anew(folder, tmp_path, damage):
  source = sources.open_source(str(folder))
  pack = packed.build_pack(source, 4, str(tmp_path / "cache"))
  expected = contents(pack)
  place = tmp_path / "cache" / pack.digest
  if damage == "truncated":
    os.truncate(place / "hr.bin", 100)
  elif damage == "missing":
    (place / "lr.bin").unlink()
  else:
    (place / "index.json").write_text("{")
  assert contents(packed.build_pack(source, 4, str(tmp_path / "cache"))) == expected


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"give a folder with more room by --config.data.cache_dir"):
    packed.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "file" / "cache"))


def test_the_loser_of_a_race_takes_the_winners_pack(folder, tmp_path):
  source = sources.open_source(str(folder))

  def load(i):
    if i == 10:  # another process finishes first
      packed.build_pack(source, 4, str(tmp_path / "cache"))
    return source.load(i)

  pack = packed.build_pack(dataclasses.replace(source, load=load), 4, str(tmp_path / "cache"))
  assert len(contents(pack)) == 22
  assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [pack.digest]


def test_a_pack_in_memory_equals_one_on_disk(folder, tmp_path):
  disk = packed.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  memory = packed.pack_from_arrays([photograph(i, 33 + i, 42 + 2 * i) for i in range(11)], 4)
  assert contents(memory) == contents(disk)
  np.testing.assert_array_equal(memory.hr_offsets, disk.hr_offsets)
  np.testing.assert_array_equal(memory.lr_sizes, disk.lr_sizes)
  other = packed.pack_from_arrays([photograph(1, 33, 42)], 4)
  assert other.digest != memory.digest
  with pytest.raises(ValueError, match=r"image 0, \[8, 8, 3\] and \[3, 2, 3\], must be"):
    packed.pack_from_arrays([photograph(0, 8, 8)], 4, [photograph(0, 3, 2)])
