"""Tests of sr_jax/data/pack.py, packing.py and cost.py."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sr_jax.data.cost import decoding_cost
from sr_jax.data.pack import (
  SmallImages,
  is_pack,
  Pack,
  SubImages,
  hr_image,
  lr_image,
  open_pack,
  read_index,
  verify_pack,
  window_starts,
)
from sr_jax.data import packing
from sr_jax.data.source import Source
from sr_jax.data import sources
from sr_jax.images.files import write_image
from sr_jax.images import resize
from sr_jax.machine import folders
from sr_jax.machine.folders import fcntl, locked


def photograph(seed: int, height: int, width: int) -> np.ndarray:
  noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
  return np.clip(np.cumsum(noise, axis=1) + 128, 0, 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
  """Eleven images of several sizes, none a multiple of 4."""
  for i in range(11):
    write_image(tmp_path / "data" / f"{i:02d}.png", photograph(i, 33 + i, 42 + 2 * i))
  return tmp_path / "data"


def only_folder(cache: pathlib.Path) -> pathlib.Path:
  """The one pack of a cache."""
  (folder,) = cache.iterdir()
  return folder


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {file.name: file.read_bytes() for file in folder.iterdir()}


def contents(pack: Pack) -> list[bytes]:
  count = range(len(pack.names))
  return [image(pack, i).tobytes() for image in (hr_image, lr_image) for i in count]


def test_a_pack_holds_cropped_hr_and_its_lr(folder, tmp_path):
  pack = packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  assert pack.names == tuple(f"{i:02d}.png" for i in range(11))
  assert pack.scale == 4
  for i in range(11):
    whole = photograph(i, 33 + i, 42 + 2 * i)
    hr = whole[: whole.shape[0] // 4 * 4, : whole.shape[1] // 4 * 4]
    np.testing.assert_array_equal(hr_image(pack, i), hr)
    np.testing.assert_array_equal(lr_image(pack, i), resize.imresize(hr, 1 / 4))
    assert tuple(pack.hr_sizes[i]) == hr.shape[:2]
    assert tuple(pack.lr_sizes[i] * 4) == hr.shape[:2]


def test_a_pack_is_a_map_of_its_files_not_a_copy(folder, tmp_path):
  pack = packing.build_pack(sources.open_source(str(folder)), 2, str(tmp_path / "cache"))
  assert isinstance(pack.hr.base, np.memmap)
  assert pack.hr.base.filename == only_folder(tmp_path / "cache") / "hr.bin"
  assert np.shares_memory(lr_image(pack, 3), pack.lr)


def test_the_index_has_a_sum_of_each_image(folder, tmp_path):
  pack = packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  index = read_index(only_folder(tmp_path / "cache"))
  assert index["scale"] == 4
  assert index["convention"] == "uint8_mirror_round_between"
  for i, entry in enumerate(index["images"]):
    assert entry["hr_sha256"] == hashlib.sha256(hr_image(pack, i).tobytes()).hexdigest()
    assert entry["lr_sha256"] == hashlib.sha256(lr_image(pack, i).tobytes()).hexdigest()


def test_the_second_run_decodes_nothing(folder, tmp_path, monkeypatch):
  source = sources.open_source(str(folder))
  first = packing.build_pack(source, 4, str(tmp_path / "cache"))

  def load(i):
    raise AssertionError("decoded again")

  blind = dataclasses.replace(source, load=load)
  monkeypatch.setattr(packing, "locked", None)  # nor does it write: the cache may be read-only
  second = packing.build_pack(blind, 4, str(tmp_path / "cache"))
  assert contents(second) == contents(first)
  assert second.digest == first.digest


def test_images_that_another_pack_has_are_not_decoded_again(folder, tmp_path):
  """One file is removed and one changed; the rest is copied, to the same bytes."""
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  (folder / "03.png").unlink()
  write_image(folder / "05.png", photograph(99, 40, 44))
  source, loaded = sources.open_source(str(folder)), []

  def load(i):
    loaded.append(source.names[i])
    return source.load(i)

  cache = str(tmp_path / "cache")
  pack = packing.build_pack(dataclasses.replace(source, load=load), 4, cache)
  assert loaded == ["05.png"]
  assert contents(pack) == contents(packing.build_pack(source, 4, str(tmp_path / "anew")))
  loaded.clear()
  packing.build_pack(dataclasses.replace(source, load=load), 2, cache)  # another scale
  assert len(loaded) == 10


def test_damaged_pixels_of_another_pack_are_not_copied(folder, tmp_path):
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  pixels = only_folder(tmp_path / "cache") / "hr.bin"
  data = bytearray(pixels.read_bytes())
  data[10] ^= 1
  pixels.write_bytes(data)
  (folder / "03.png").unlink()
  source = sources.open_source(str(folder))
  pack = packing.build_pack(source, 4, str(tmp_path / "cache"))
  assert contents(pack) == contents(packing.build_pack(source, 4, str(tmp_path / "anew")))


def test_packs_used_longest_ago_are_removed_beyond_the_limit(folder, tmp_path, caplog):
  cache = tmp_path / "cache"
  (cache / "mine").mkdir(parents=True)
  (cache / "mine" / "note.txt").write_text("not a pack")
  shutil.copytree(folder, cache / ("f" * 20))  # a name alone makes no pack
  made = []
  for scale in (1, 2, 4):
    packing.build_pack(sources.open_source(str(folder)), scale, str(cache))
    made.append(next(p for p in cache.iterdir() if is_pack(p) and p not in made))
    os.utime(made[-1] / "index.json", (scale, scale))
  packing.build_pack(sources.open_source(str(folder)), 1, str(cache))  # used again just now
  size = sum(file.stat().st_size for file in made[2].iterdir())
  packing.remove_old_packs(cache, 3.2 * size / 1e9, keep=[made[2]])
  assert not made[1].exists() and str(made[1]) in caplog.text
  assert "--config.data.cache_gb=" in caplog.text
  assert (
    made[2].exists() and (cache / "mine" / "note.txt").exists() and (cache / ("f" * 20)).exists()
  )
  packing.remove_old_packs(cache, 0, keep=[])  # no limit
  source = sources.open_source(str(folder))
  assert packing.pack_folder(source, 4, str(cache)) == made[2] and made[0].exists()
  packing.remove_old_packs(cache, 1e-9, keep=[made[2]])
  assert made[2].exists() and not made[0].exists()  # what is being used stays


def test_other_files_scale_or_convention_make_another_pack(folder, tmp_path):
  def count(scale=4, **options):
    source = sources.open_source(str(folder))
    packing.build_pack(source, scale, str(tmp_path / "cache"), **options)
    return len(list((tmp_path / "cache").iterdir()))

  assert [count(), count(scale=2), count(convention="double_mirror"), count()] == [1, 2, 3, 3]
  os.utime(folder / "03.png", ns=(5, 5))
  assert count() == 4
  (folder / "03.png").unlink()
  assert [count(), count()] == [5, 5]


def test_the_digest_is_of_the_content_wherever_it_lies(folder, tmp_path):
  def digest(of, **options):
    source = sources.open_source(str(of))
    return packing.build_pack(source, 4, str(tmp_path / "cache"), **options).digest

  first = digest(folder)
  copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
  os.utime(copy / "03.png", ns=(5, 5))
  assert digest(copy) == first
  in_memory = packing.pack_from_arrays([photograph(i, 33 + i, 42 + 2 * i) for i in range(11)], 4)
  names = {f"{i:02d}.png": str(i) for i in range(11)}
  for old, new in names.items():
    (copy / old).rename(copy / f"{new}.png")
  assert digest(copy) != first  # other names are another order
  assert in_memory.digest not in (first, digest(copy))  # its names are 0, 1, ...
  (copy / "10.png").unlink()
  assert digest(copy, min_hr=20) != digest(folder, min_hr=20)
  changed = photograph(4, 37, 50)
  changed[5, 6, 1] ^= 1
  write_image(folder / "04.png", changed)
  assert digest(folder) != first


def test_the_cache_is_where_the_environment_says(folder, tmp_path, monkeypatch):
  monkeypatch.setenv("SR_JAX_CACHE", str(tmp_path / "elsewhere"))
  packing.build_pack(sources.open_source(str(folder)), 4)
  assert set(files(only_folder(tmp_path / "elsewhere"))) == {"hr.bin", "index.json", "lr.bin"}


def test_threads_change_nothing(folder, tmp_path):
  source = sources.open_source(str(folder))
  one = packing.build_pack(source, 4, str(tmp_path / "one"), threads=1)
  many = packing.build_pack(source, 4, str(tmp_path / "many"), threads=7)
  assert files(only_folder(tmp_path / "one")) == files(only_folder(tmp_path / "many"))
  assert contents(one) == contents(many)


def test_given_lr_images_are_taken_as_they_are(tmp_path):
  lr = [photograph(i, 9, 10 + i) for i in range(3)]
  for i in range(3):
    write_image(tmp_path / "HR" / f"{i}.png", photograph(i, 36, 40 + 4 * i))
    write_image(tmp_path / "LR" / f"{i}x4.png", lr[i])
  source = sources.open_source(str(tmp_path / "HR"), str(tmp_path / "LR"))
  pack = packing.build_pack(source, 4, str(tmp_path / "cache"))
  for i in range(3):
    np.testing.assert_array_equal(lr_image(pack, i), lr[i])


def test_lr_images_that_do_not_fit_are_all_named(tmp_path):
  """Of a source that does not know sizes before it decodes; a folder does, see sources_test.py."""
  heights = (8, 9, 8, 7)

  def load(i):
    return photograph(i, 32, 40), photograph(i, heights[i], 10)

  names = tuple(f"{i}.png" for i in range(4))
  source = Source("set", names, load, True, ["stamp"], "the test's images")
  with pytest.raises(ValueError, match="size of its HR image divided by 4") as error:
    packing.build_pack(source, 4, str(tmp_path / "cache"))
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
      pack = packing.build_pack(source, 4, str(tmp_path / "cache"))
    assert len(caplog.records) == 1
    assert "left out 1 images" in caplog.text
    assert "05.png" in caplog.text
    assert "06.png" not in caplog.text
    assert pack.names == tuple(f"{i:02d}.png" for i in range(11) if i != 5)
    np.testing.assert_array_equal(hr_image(pack, 5), photograph(6, 39, 54)[:36, :52])


def test_many_bad_files_stop_and_are_all_named(folder, tmp_path):
  (folder / "02.png").write_bytes(b"")
  (folder / "07.png").write_bytes(b"this is text")
  with pytest.raises(ValueError, match="^2 of 11 images of .* unusable, and at most 10%") as error:
    packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  listed = str(error.value).splitlines()[1:]
  assert [line.split(":")[0].strip() for line in listed] == ["02.png", "07.png"]
  assert not list((tmp_path / "cache").iterdir())  # the fixed files are decoded anew


def test_small_images_are_left_out_of_the_same_pack(folder, tmp_path, caplog):
  source = sources.open_source(str(folder))
  everything = packing.build_pack(source, 4, str(tmp_path / "cache"), min_hr=32)
  assert len(everything.names) == 11
  with caplog.at_level(logging.WARNING, logger="absl"), pytest.raises(SmallImages) as error:
    packing.build_pack(source, 4, str(tmp_path / "cache"), min_hr=36)
  assert "3 of 11" in str(error.value)  # of 33, 34 and 35 rows: 32 after the crop
  assert "00.png: 40x32 pixels, smaller than 36x36" in str(error.value)
  assert error.value.side == 32  # one of eleven may be left out
  (folder / "00.png").unlink()
  (folder / "01.png").unlink()
  for i in range(2):
    write_image(folder / f"more{i}.png", photograph(i, 64, 64))
  with caplog.at_level(logging.WARNING, logger="absl"):
    pack = packing.build_pack(
      sources.open_source(str(folder)), 4, str(tmp_path / "cache"), min_hr=36
    )
  assert "left out 1 images" in caplog.text
  assert "02.png" not in pack.names
  np.testing.assert_array_equal(hr_image(pack, 0), photograph(3, 36, 48))


class Counted:
  """A source that counts what it decodes, and fails at one image."""

  def __init__(self, source, fails_at=-1):
    self.loaded, self.inner, self.fails_at = [], source, fails_at
    self.source = dataclasses.replace(source, load=self.load)

  def load(self, i):
    if i == self.fails_at:
      raise RuntimeError("a fault of the program")
    self.loaded.append(i)
    return self.inner.load(i)


def interrupted(folder, cache, at=6) -> Counted:
  """Leaves a pack in the cache whose build broke off."""
  counted = Counted(sources.open_source(str(folder)), at)
  with pytest.raises(RuntimeError, match="a fault of the program"):
    packing.build_pack(counted.source, 4, str(cache), threads=1)
  return counted


def test_an_interrupted_build_goes_on_where_it_was(folder, tmp_path, caplog):
  (folder / "02.png").write_bytes(b"this is no image")  # what is left out is remembered too
  interrupted(folder, tmp_path / "cache")
  assert only_folder(tmp_path / "cache").name.endswith(".partial")
  counted = Counted(sources.open_source(str(folder)))
  with caplog.at_level(logging.WARNING, logger="absl"):
    resumed = packing.build_pack(counted.source, 4, str(tmp_path / "cache"))
  assert "6 of 11 images were decoded before" in caplog.text
  assert sorted(counted.loaded) == [6, 7, 8, 9, 10]
  whole = packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "whole"))
  assert contents(resumed) == contents(whole)
  assert files(only_folder(tmp_path / "cache")) == files(only_folder(tmp_path / "whole"))


@pytest.mark.parametrize("fault", ["pixels", "short", "torn", "journal", "extra"])
def test_of_an_interrupted_build_only_what_is_sound_is_kept(folder, tmp_path, fault):
  interrupted(folder, tmp_path / "cache")
  partial = only_folder(tmp_path / "cache")
  journal = (partial / packing.JOURNAL).read_bytes()
  lines = journal.splitlines(keepends=True)
  fourth = json.loads(lines[4])
  kept = 6
  if fault == "pixels":  # as after a power failure
    with open(partial / "hr.bin", "r+b") as file:
      file.seek(fourth["hr_offset"] + 100)
      file.write(b"\0\1\2\3")
    kept = 3
  elif fault == "short":
    os.truncate(partial / "lr.bin", fourth["lr_offset"] + 7)
    kept = 3
  elif fault == "torn":
    (partial / packing.JOURNAL).write_bytes(journal[:-30])
    kept = 5
  elif fault == "journal":
    (partial / packing.JOURNAL).write_bytes(b"".join(lines[:3]) + b"\xff\n" + b"".join(lines[4:]))
    kept = 2
  else:  # pixels that were written when the journal did not know yet
    with open(partial / "hr.bin", "ab") as file:
      file.write(b"more")
  counted = Counted(sources.open_source(str(folder)))
  packing.build_pack(counted.source, 4, str(tmp_path / "cache"))
  assert sorted(counted.loaded) == list(range(kept, 11))
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "whole"))
  assert files(only_folder(tmp_path / "cache")) == files(only_folder(tmp_path / "whole"))


def test_a_build_may_be_interrupted_again(folder, tmp_path):
  interrupted(folder, tmp_path / "cache")
  journal = only_folder(tmp_path / "cache") / packing.JOURNAL
  os.truncate(journal, journal.stat().st_size - 30)  # torn in its last line
  # Images after the fault may be decoded as well, ahead of their turn.
  assert interrupted(folder, tmp_path / "cache", at=9).loaded[:4] == [5, 6, 7, 8]
  assert interrupted(folder, tmp_path / "cache", at=10).loaded == [9]
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "whole"))
  assert files(only_folder(tmp_path / "cache")) == files(only_folder(tmp_path / "whole"))


def test_an_unfinished_pack_of_other_files_is_not_gone_on_with(folder, tmp_path):
  """A user's folder has one name whatever the files are."""
  source = Counted(sources.open_source(str(folder)), 6).source
  with pytest.raises(RuntimeError):
    packing.write_pack(tmp_path / "pack", source, 4, threads=1)
  write_image(folder / "01.png", photograph(77, 40, 40))
  counted = Counted(sources.open_source(str(folder)))
  packing.write_pack(tmp_path / "pack", counted.source, 4)
  assert len(counted.loaded) == 11
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "whole"))
  assert files(tmp_path / "pack") == files(only_folder(tmp_path / "whole"))


SLOW_BUILD = r"""
import dataclasses, os, sys, time
from sr_jax.data import packing, sources
source = sources.open_source(sys.argv[1])
def load(i):
  time.sleep(0.05 if i < int(sys.argv[3]) else 600)
  os.write(1, b"%d\n" % i)
  return source.load(i)
packing.build_pack(dataclasses.replace(source, load=load), 4, sys.argv[2], threads=2)
"""


def slow_build(folder, cache, until: int = 99) -> subprocess.Popen:
  """A build that prints each image it has read; it never reads one with a number of `until` on."""
  command = [sys.executable, "-c", SLOW_BUILD, str(folder), str(cache), str(until)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_ends_with_the_bytes_of_one_that_was_not(folder, tmp_path):
  with slow_build(folder, tmp_path / "cache", until=8) as process:
    for _ in range(8):
      process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  left = sorted(path.suffix for path in (tmp_path / "cache").iterdir())
  assert left == [".lock", ".partial"]  # the system has let go of the lock
  counted = Counted(sources.open_source(str(folder)))
  packing.build_pack(counted.source, 4, str(tmp_path / "cache"))
  assert 3 <= len(counted.loaded) < 10
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "whole"))
  assert files(only_folder(tmp_path / "cache")) == files(only_folder(tmp_path / "whole"))


def test_of_two_processes_one_decodes(folder, tmp_path):
  with slow_build(folder, tmp_path / "cache") as a, slow_build(folder, tmp_path / "cache") as b:
    decoded = [len(process.stdout.read().split()) for process in (a, b)]
  assert (a.returncode, b.returncode) == (0, 0)
  assert sorted(decoded) == [0, 11]
  packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "whole"))
  assert files(only_folder(tmp_path / "cache")) == files(only_folder(tmp_path / "whole"))


def test_of_several_threads_one_decodes_and_after_a_failure_the_next(folder, tmp_path):
  """The lock is handed on five times, and its file is not left behind."""
  loaded, packs, lock = [], [], threading.Lock()
  source = sources.open_source(str(folder))

  def load(i):
    time.sleep(0.005)
    with lock:
      loaded.append(i)
      if len(loaded) == 4:
        raise RuntimeError("the first fails")
    return source.load(i)

  def build():
    try:
      pack = packing.build_pack(dataclasses.replace(source, load=load), 4, str(tmp_path / "cache"))
      packs.append(contents(pack))
    except RuntimeError as error:
      packs.append(str(error))

  threads = [threading.Thread(target=build) for _ in range(5)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert packs.count("the first fails") == 1
  expected = contents(packing.build_pack(source, 4, str(tmp_path / "whole")))
  assert packs.count(expected) == 4
  assert files(only_folder(tmp_path / "cache")) == files(only_folder(tmp_path / "whole"))


def test_a_lock_has_one_holder_though_its_file_is_removed_and_made_again(tmp_path):
  inside, leave, order = threading.Event(), threading.Event(), []

  def wait_and_hold():
    with locked(tmp_path / "pack"):
      order.append("second")
      inside.set()
      leave.wait()
      order.append("second leaves")

  def come_late():
    with locked(tmp_path / "pack"):
      order.append("third")

  second, third = threading.Thread(target=wait_and_hold), threading.Thread(target=come_late)
  with locked(tmp_path / "pack"):
    second.start()
    time.sleep(0.2)  # it has opened the file that is removed now
  inside.wait()
  third.start()
  time.sleep(0.2)
  leave.set()
  second.join()
  third.join()
  assert order == ["second", "second leaves", "third"]
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refused", ["no fcntl", "no locks"])
def test_without_locks_a_build_is_still_whole_or_not_there(folder, tmp_path, monkeypatch, refused):
  source = sources.open_source(str(folder))

  def no_lock(*_):
    raise OSError(38, "Function not implemented")

  if refused == "no fcntl":
    monkeypatch.setattr(folders, "fcntl", None)
  else:
    monkeypatch.setattr(fcntl, "flock", no_lock)

  def load(i):
    if i == 10:  # another process finishes first
      packing.build_pack(source, 4, str(tmp_path / "cache"))
    return source.load(i)

  with pytest.raises(RuntimeError):
    packing.build_pack(Counted(source, 6).source, 4, str(tmp_path / "cache"))
  assert not list((tmp_path / "cache").iterdir())  # nobody could go on with it
  packing.build_pack(dataclasses.replace(source, load=load), 4, str(tmp_path / "cache"))
  packing.build_pack(source, 4, str(tmp_path / "whole"))
  assert files(only_folder(tmp_path / "cache")) == files(only_folder(tmp_path / "whole"))


def test_a_full_disk_is_told_before_the_first_image(folder, tmp_path, monkeypatch):
  source = sources.open_source(str(folder))
  cost = decoding_cost(source, 4)
  assert cost.images == 11
  assert cost.pixels == sum((33 + i) * (42 + 2 * i) for i in range(11))
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=cost.disk_bytes - 1))
  counted = Counted(source)
  with pytest.raises(OSError, match=f"{cost.disk_bytes:,} bytes are needed .*--output"):
    packing.build_pack(counted.source, 4, str(tmp_path / "cache"))
  assert not counted.loaded
  monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=cost.disk_bytes))
  packing.build_pack(counted.source, 4, str(tmp_path / "cache"))


@pytest.mark.parametrize("damage", ["truncated", "missing", "index"])
def test_a_damaged_pack_is_made_anew(folder, tmp_path, damage):
  source = sources.open_source(str(folder))
  pack = packing.build_pack(source, 4, str(tmp_path / "cache"))
  expected = contents(pack)
  place = only_folder(tmp_path / "cache")
  if damage == "truncated":
    os.truncate(place / "hr.bin", 100)
  elif damage == "missing":
    (place / "lr.bin").unlink()
  else:
    (place / "index.json").write_text("{")
  assert contents(packing.build_pack(source, 4, str(tmp_path / "cache"))) == expected


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match=r"a folder that can be written to by --config.data.cache_dir"):
    packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "file" / "cache"))


def test_a_pack_in_memory_equals_one_on_disk(folder, tmp_path):
  disk = packing.build_pack(sources.open_source(str(folder)), 4, str(tmp_path / "cache"))
  memory = packing.pack_from_arrays([photograph(i, 33 + i, 42 + 2 * i) for i in range(11)], 4)
  assert contents(memory) == contents(disk)
  np.testing.assert_array_equal(memory.hr_offsets, disk.hr_offsets)
  np.testing.assert_array_equal(memory.lr_sizes, disk.lr_sizes)
  other = packing.pack_from_arrays([photograph(1, 33, 42)], 4)
  assert other.digest != memory.digest
  with pytest.raises(ValueError, match=r"image 0, \[8, 8, 3\] and \[3, 2, 3\], must be"):
    packing.pack_from_arrays([photograph(0, 8, 8)], 4, [photograph(0, 3, 2)])


def test_a_prepared_pack_is_opened_where_it_lies(folder, tmp_path):
  first = packing.write_pack(tmp_path / "pack", sources.open_source(str(folder)), 4)
  (tmp_path / "pack").rename(tmp_path / "moved")
  shutil.rmtree(folder)
  source = sources.open_source(str(tmp_path / "moved"), scale=4)
  assert source.names == first.names
  again = packing.build_pack(source, 4, str(tmp_path / "cache"))
  assert contents(again) == contents(first)
  assert again.digest == first.digest
  assert not (tmp_path / "cache").exists()
  for i in (0, 7):  # as evaluation reads it
    hr, lr = source.load(i)
    np.testing.assert_array_equal(hr, hr_image(first, i))
    np.testing.assert_array_equal(lr, lr_image(first, i))
  with pytest.raises(ValueError, match="prepared for scale 4 .* must be 2; .*try --scale=4"):
    sources.open_source(str(tmp_path / "moved"), scale=2)
  with pytest.raises(ValueError, match="prepared for scale 4, not 2"):
    packing.build_pack(source, 2)
  with pytest.raises(ValueError, match="--lr=x goes with a folder"):
    sources.open_source(str(tmp_path / "moved"), "x")
  os.truncate(tmp_path / "moved" / "lr.bin", 1000)
  with pytest.raises(ValueError, match="moved is damaged"):
    packing.build_pack(source, 4)
  with pytest.raises(ValueError, match="lr.bin is cut off"):
    source.load(10)
  (tmp_path / "moved" / "index.json").write_text("[]")
  with pytest.raises(ValueError, match="index.json cannot be read"):
    sources.open_source(str(tmp_path / "moved"))


def test_grey_files_stay_grey_in_a_pack(tmp_path):
  write_image(tmp_path / "in" / "a.png", photograph(0, 32, 32)[:, :, 0])
  write_image(tmp_path / "in" / "b.png", photograph(1, 32, 32))
  source = sources.open_source(str(tmp_path / "in"), keep_grey=True)
  assert packing.write_pack(tmp_path / "pack", source, 4).grey == (True, False)
  source = sources.open_source(str(tmp_path / "pack"), keep_grey=True)
  assert [source.load(i)[0].ndim for i in range(2)] == [2, 3]
  assert sources.open_source(str(tmp_path / "pack")).load(0)[1].shape == (8, 8, 3)


def brute_force_sub_images(height, width, size=480, step=240):
  """Corners by BasicSR's rule: a list of steps, and the border where the last does not reach it."""
  spaces = []
  for side in (height, width):
    starts, start = [], 0
    while start + size <= side:
      starts.append(start)
      start += step
    if starts[-1] + size < side:
      starts.append(side - size)
    spaces.append(starts)
  return [(y, x) for y in spaces[0] for x in spaces[1]]


@pytest.mark.parametrize(
  "height, width, count",
  # BasicSR's meta_info_DIV2K800sub_GT.txt has 40, 56 and 40 sub-images of 0001, 0002 and 0003.
  [(1404, 2040, 40), (1848, 2040, 56), (1356, 2040, 40), (480, 480, 1), (484, 720, 4)],
)
def test_sub_images_are_basicsrs(height, width, count):
  starts = [window_starts(side, 480, 240) for side in (height, width)]
  expected = brute_force_sub_images(height, width)
  assert [(y, x) for y in starts[0] for x in starts[1]] == expected
  # In closed form.
  assert len(expected) == count == np.prod([-(-(s - 480) // 240) + 1 for s in (height, width)])


def test_sub_images_are_windows_of_pixels_stored_once(tmp_path):
  shapes = [(52, 76), (32, 64), (24, 41), (96, 33)]
  for i, shape in enumerate(shapes):
    write_image(tmp_path / "in" / "sub" / f"{i}.png", photograph(i, *shape))
  source = sources.open_source(str(tmp_path / "in"))
  whole = packing.build_pack(source, 4, str(tmp_path / "cache"))
  square = SubImages(32, 16)
  pack = packing.write_pack(tmp_path / "pack", source, 4, sub_images=square)
  assert (tmp_path / "pack" / "hr.bin").read_bytes() == whole.hr.tobytes()
  corners = [
    (i, y, x, min(32, height // 4 * 4), min(32, width // 4 * 4))
    for i, (height, width) in enumerate(shapes)
    for y, x in brute_force_sub_images(max(height // 4 * 4, 32), max(width // 4 * 4, 32), 32, 16)
  ]
  assert len(corners) == len(pack.names) == 3 * 4 + 3 + 2 + 5
  assert pack.names[:2] == ("sub/0_s001.png", "sub/0_s002.png")
  assert pack.names[-1] == "sub/3_s005.png"
  for j, (i, y, x, height, width) in enumerate(corners):
    hr, lr = hr_image(whole, i), lr_image(whole, i)
    np.testing.assert_array_equal(hr_image(pack, j), hr[y : y + height, x : x + width])
    lr = lr[y // 4 : (y + height) // 4, x // 4 : (x + width) // 4]
    np.testing.assert_array_equal(lr_image(pack, j), lr)
  assert pack.digest != whole.digest
  reopened = packing.build_pack(sources.open_source(str(tmp_path / "pack")), 4)
  assert contents(reopened) == contents(pack)
  with pytest.raises(ValueError, match="sub-images of 30, every 16, must be multiples of scale=4"):
    packing.write_pack(tmp_path / "other", source, 4, sub_images=SubImages(30, 16))


@pytest.mark.parametrize("key", ["hr", "lr"])
def test_a_flipped_byte_is_found_and_named(folder, tmp_path, key):
  pack = packing.write_pack(tmp_path / "pack", sources.open_source(str(folder)), 4)
  assert verify_pack(tmp_path / "pack") == []
  offsets = pack.hr_offsets if key == "hr" else pack.lr_offsets
  with open(tmp_path / "pack" / f"{key}.bin", "r+b") as file:
    file.seek(int(offsets[8]) - 1)  # the last of image 7
    byte = file.read(1)[0]
    file.seek(int(offsets[8]) - 1)
    file.write(bytes([byte ^ 16]))
  assert verify_pack(tmp_path / "pack") == [
    f"07.png: {key.upper()} pixels differ from their sha256"
  ]


def test_files_that_are_cut_or_gone_are_named(folder, tmp_path):
  packing.write_pack(tmp_path / "pack", sources.open_source(str(folder)), 4)
  size = (tmp_path / "pack" / "lr.bin").stat().st_size
  os.truncate(tmp_path / "pack" / "lr.bin", size - 1)
  assert verify_pack(tmp_path / "pack") == [
    f"lr.bin has {size - 1} bytes, must have {size}",
    "10.png: LR pixels differ from their sha256",
  ]
  (tmp_path / "pack" / "lr.bin").unlink()
  assert verify_pack(tmp_path / "pack") == [f"lr.bin has 0 bytes, must have {size}"]
  (tmp_path / "pack" / "index.json").write_text("{}")
  assert "index.json cannot be read" in verify_pack(tmp_path / "pack")[0]


def flip(path: pathlib.Path, place: int = 5) -> None:
  data = bytearray(path.read_bytes())
  data[place] ^= 1
  path.write_bytes(data)


@pytest.mark.parametrize("file", ["hr.bin", "lr.bin"])
def test_damaged_pixels_are_decoded_anew_and_the_others_copied(
  folder, tmp_path, monkeypatch, caplog, file
):
  source = sources.open_source(str(folder))
  cache = str(tmp_path / "cache")
  pack = packing.build_pack(source, 4, cache)
  place = packing.pack_folder(source, 4, cache)
  sound = {name: (place / name).read_bytes() for name in ("hr.bin", "lr.bin")}
  del pack
  flip(place / file)
  assert (
    packing.build_pack(source, 4, cache).hr[:] == np.frombuffer(sound["hr.bin"], np.uint8)
  ).all() == (file == "lr.bin"), "nobody looks unless asked"
  loaded = []
  counting = dataclasses.replace(source, load=lambda i: loaded.append(i) or source.load(i))
  packing.build_pack(counting, 4, cache, verify=True)
  assert loaded == [0]
  assert f"{place} is damaged; these images are decoded anew" in caplog.text
  assert f"{file[:2].upper()} pixels differ from their sha256" in caplog.text
  assert {name: (place / name).read_bytes() for name in sound} == sound
  assert [path.name for path in place.parent.iterdir() if path.is_dir()] == [place.name]
  packing.build_pack(counting, 4, cache, verify=True)
  assert loaded == [0]


def test_a_prepared_pack_with_damaged_pixels_is_refused(folder, tmp_path):
  packing.write_pack(tmp_path / "pack", sources.open_source(str(folder)), 4)
  source = sources.open_source(str(tmp_path / "pack"))
  packing.build_pack(source, 4, verify=True)
  flip(tmp_path / "pack" / "lr.bin")
  with pytest.raises(
    ValueError, match="pack is damaged: .* LR pixels differ(?s:.*)prepare it again"
  ):
    packing.build_pack(source, 4, verify=True)


@pytest.mark.parametrize(
  "change",
  [
    lambda index: index.update(images=3),
    lambda index: index["images"][0].update(hr=[10**12, 10**12]),
    lambda index: index["images"][0].update(hr=["8", "8"]),
    lambda index: index["images"][0].update(hr_offset=-4),
    lambda index: index["images"][1].update(hr_offset=0),
    lambda index: index["images"][0].update(name={}),
    lambda index: index.update(unreadable=[]),
    lambda index: index.update(scale="4"),
    lambda index: index.update(sub_images=[0, 0]),
    lambda index: index.pop("source"),
  ],
)
def test_a_strangers_index_of_other_types_is_refused_in_one_line(folder, tmp_path, change):
  packing.write_pack(tmp_path / "pack", sources.open_source(str(folder)), 4)
  path = tmp_path / "pack" / "index.json"
  index = json.loads(path.read_text())
  change(index)
  path.write_text(json.dumps(index))
  with pytest.raises(ValueError, match="pack is damaged|index.json is no index") as error:
    open_pack(tmp_path / "pack")
  assert "\n" not in str(error.value)
