"""Tiles of several images in one batch: the same results, in as few batches as there can be."""

import numpy as np
from PIL import Image
import pytest
from tiny_models import contrasting_model, photo

from sr_jax.images import reading
from sr_jax.networks.build import build_generator
from sr_jax.upscaling import batches
from sr_jax.upscaling import files
from sr_jax.upscaling import network as networks
from sr_jax.upscaling import stream

SIZES = [(20, 31), (32, 32), (9, 17), (25, 12), (31, 30)]


def network_of(model, batch: int) -> networks.Network:
  module = build_generator(model.name, model.kwargs)
  return networks.make_network(module, model.variables, batch=batch)


def folder_of_images(folder):
  folder.mkdir()
  for i, size in enumerate(SIZES):
    Image.fromarray(photo(*size, seed=i)).save(folder / f"{i}.png")
  return sorted(folder.iterdir())


def upscaled(sources, network, tiling, output) -> tuple[list[np.ndarray], files.Outcome]:
  tasks = [
    files.Task(path.name, path, reading.read_header(path), "png", output / path.name)
    for path in sources
  ]
  output.mkdir()
  outcome = files.upscale_files(tasks, network, tiling, files.Options())
  paths = [output / path.name for path in sources]
  return [np.asarray(Image.open(path)) for path in paths if path.exists()], outcome


def counting(network, started: list[int]) -> networks.Network:
  """The network, with a note of how many tiles were waiting when each result was fetched."""

  def run(tile, shape):
    pending = network.run(tile, shape)
    started.append(1)

    def fetched():
      started.append(-1)
      return pending()

    return fetched

  return network._replace(run=run)


@pytest.mark.parametrize(
  "tiling", [stream.Tiling(), stream.Tiling(16, 8, 0)], ids=["whole", "in tiles"]
)
def test_images_of_one_batch_are_those_of_one_each(tmp_path, tiling):
  model = contrasting_model(blocks=1, growth=2)
  sources = folder_of_images(tmp_path / "lr")
  alone, one_each = upscaled(sources, network_of(model, 1), tiling, tmp_path / "alone")
  together, outcome = upscaled(sources, network_of(model, 3), tiling, tmp_path / "together")
  assert one_each.done == outcome.done == len(SIZES) and not outcome.failed
  for a, b in zip(alone, together, strict=True):
    # A convolution of several images may round otherwise.
    assert a.shape == b.shape and np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 1e-3


def test_small_images_wait_for_each_other(tmp_path):
  """Three are handed over before the first is fetched, and not the fourth."""
  network, events = network_of(contrasting_model(blocks=1, growth=2), 3), []
  sources = folder_of_images(tmp_path / "lr")
  upscaled(sources, counting(network, events), stream.Tiling(), tmp_path / "out")
  assert events == [1, 1, 1, -1, 1, -1, 1, -1, -1, -1]


def test_an_image_that_fails_leaves_those_of_its_batch(tmp_path):
  sources = folder_of_images(tmp_path / "lr")
  sources[1].write_bytes(sources[1].read_bytes()[:60])  # its header is whole
  network = network_of(contrasting_model(blocks=1, growth=2), 3)
  images, outcome = upscaled(sources, network, stream.Tiling(), tmp_path / "out")
  assert outcome.done == len(images) == 4 and list(outcome.failed) == ["1.png"]


def test_a_batch_starts_when_it_is_full_or_asked_for():
  started = []

  def start(tiles, shape):
    started.append((len(tiles), shape))
    return lambda i: tiles[i] * 10

  run = batches.in_batches(start, 2)
  a, b, c, other = run(1, (8, 8)), run(2, (8, 8)), run(3, (8, 8)), run(4, (9, 9))
  assert started == [(2, (8, 8))]
  assert [b(), a(), c(), other()] == [20, 10, 30, 40]
  assert started == [(2, (8, 8)), (1, (8, 8)), (1, (9, 9))]
  assert run(5, (8, 8))() == 50  # a new batch


def test_a_batch_that_failed_is_started_again_for_the_next_result():
  calls = []

  def start(tiles, shape):
    calls.append(len(tiles))
    if len(calls) == 1:
      raise MemoryError
    return lambda i: tiles[i]

  run = batches.in_batches(start, 2)
  a = run("a", (8, 8))
  with pytest.raises(MemoryError):
    run("b", (8, 8))
  assert a() == "a" and calls == [2, 2]


def test_a_cpu_computes_one_at_a_time():
  assert networks.batch_for(100) == 1
