"""Tests of upscaling/stream.py and network.py: tiles, programs, reach, and what a network does."""

import fractions

import numpy as np
import pytest
from tiny_models import contrasting_model, make_model, nearest_model, photo

from sr_jax.images import resize
from sr_jax.images.picture import Frame
from sr_jax.networks.build import build_generator
from sr_jax.upscaling import network as networks
from sr_jax.upscaling import stream
from sr_jax.upscaling.upscaler import make_upscaler


def network_of(model) -> networks.Network:
  return networks.make_network(build_generator(model.name, model.kwargs), model.variables)


@pytest.fixture(scope="module")
def model():
  return contrasting_model(blocks=1, growth=2)


@pytest.fixture(scope="module")
def network(model):
  return network_of(model)


@pytest.fixture(scope="module")
def reach(model):
  return networks.reach(build_generator(model.name, model.kwargs), model.variables)


def fake(scale=2, run=None, channels=3, multiple=1) -> networks.Network:
  """A network that repeats pixels, without JAX."""

  def nearest(tile, shape):
    assert shape[0] >= tile.shape[0] and shape[1] >= tile.shape[1]
    return tile.repeat(scale, axis=0).repeat(scale, axis=1)

  start = pending(run or nearest)
  return networks.Network(scale, channels, multiple, start, start, False, 1000)


def pending(run):
  """Makes a function whose result has to be fetched, as a network's is."""

  def start(tile, shape):
    result = run(tile, shape)
    return lambda: result

  return start


def whole(frame, job, dtype=np.float32, channels=None) -> np.ndarray:
  channels = channels or (1 if frame.color.ndim == 2 else 3)
  strips = list(stream.upscale(frame, job, channels, np.dtype(dtype)))
  assert all(strip.dtype == dtype for strip in strips)
  result = np.concatenate(strips)
  return result[..., 0] if channels == 1 else result


@pytest.mark.parametrize("size", [(70, 121), (33, 64), (200, 17), (129, 400), (1, 1)])
@pytest.mark.parametrize("tile", [16, 33, 100])
@pytest.mark.parametrize("multiple", [1, 2, 4])
def test_cuts_cover_an_image_once(size, tile, multiple):
  size = [-(-n // multiple) * multiple for n in size]
  for axis in stream.cut(*size, stream.Tiling(tile, 8, 0), multiple):
    length = axis.joints[-1]
    assert axis.joints[0] == 0 and list(axis.joints) == sorted(set(axis.joints))
    assert len(axis.starts) == len(axis.joints) - 1 and length in size
    step = -(-tile // multiple) * multiple + 2 * (-(-8 // multiple) * multiple)
    assert axis.size <= step and all(n % multiple == 0 for n in (axis.size, *axis.starts))
    for start, first, last in zip(axis.starts, axis.joints, axis.joints[1:], strict=False):
      assert 0 <= start and start + axis.size <= length  # nothing beyond the border is needed
      assert first == 0 or first - start >= 8
      assert last == length or start + axis.size - last >= 8


def test_whether_an_image_is_cut_depends_on_it_alone():
  one, same = stream.cut(1000, 1000, stream.Tiling()), stream.cut(1000, 1000, stream.Tiling())
  assert one == same and [len(axis.starts) for axis in one] == [1, 1]
  assert [len(axis.starts) for axis in stream.cut(1000, 1001, stream.Tiling())] == [3, 3]
  assert [len(axis.starts) for axis in stream.cut(20, 40_000, stream.Tiling())] == [1, 90]
  rows, columns = stream.cut(10_000, 100_000, stream.Tiling())
  assert rows.size < columns.size  # a row of tiles is kept until it is whole


@pytest.mark.parametrize("multiple", [1, 2])
def test_a_run_has_few_programs(multiple):
  rng = np.random.default_rng(0)
  sizes = [tuple(int(n) for n in rng.integers(10, 3000, 2)) for _ in range(1000)]
  tiling, net = stream.Tiling(), fake(multiple=multiple)
  shapes = stream.programs(sizes, net, tiling)
  assert 1 <= len(shapes) <= 3
  for height, width in sizes:
    even = [-(-n // multiple) * multiple for n in (height, width)]
    rows, columns = stream.cut(*even, tiling, multiple)
    assert any(h >= rows.size and w >= columns.size for h, w in shapes)
  assert stream.programs([(300, 200)] * 5, net, tiling) == [(320, 224)]
  assert stream.programs([], net, tiling) == []
  long = [(20, 40_000), (40_000, 20), (30, 30), (900, 1100), (1100, 900)]
  shapes = stream.programs(long, net, tiling)
  assert len(shapes) <= 3 and max(h * w for h, w in shapes) <= 1.7 * tiling.whole


def test_shapes_change_no_pixel(network):
  lr = photo(20, 30)
  results = [
    whole(Frame(lr), stream.Job(network, shapes=shapes)) for shapes in ([(32, 32)], [(64, 96)])
  ]
  np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5)


def test_it_computes_what_the_upscaler_computes(network, model):
  lr = photo(20, 30)
  upscale = make_upscaler(build_generator(model.name, model.kwargs), model.variables)
  sr = whole(Frame(lr), stream.Job(network), np.uint8)
  assert np.abs(sr.astype(int) - upscale(lr)).max() <= 1 and sr.std() > 20


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3])
def test_nearest_is_exact_in_every_depth(dtype, channels):
  rng = np.random.default_rng(0)
  shape = (50, 70, 3)[: 2 if channels == 1 else 3]
  if dtype == np.float32:
    color = rng.random(shape, np.float32)
  else:
    color = rng.integers(0, np.iinfo(dtype).max + 1, shape, dtype)
  job = stream.Job(network_of(nearest_model()), stream.Tiling(16, 8, 0))
  sr = whole(Frame(color), job, dtype)
  expected = color.repeat(4, axis=0).repeat(4, axis=1)
  np.testing.assert_allclose(sr, expected, rtol=0, atol=1e-6 if dtype == np.float32 else 0)


def test_floats_beyond_one_are_kept():
  color = np.linspace(-3, 7, 600, dtype=np.float32).reshape(20, 30)
  sr = whole(Frame(color), stream.Job(fake()))
  np.testing.assert_allclose(sr, color.repeat(2, axis=0).repeat(2, axis=1), atol=1e-5)
  seen = []
  run = lambda tile, shape: seen.append((tile.min(), tile.max())) or np.zeros((40, 60, 3))  # noqa: E731
  whole(Frame(color), stream.Job(fake(run=run)))
  assert seen == [(0, 1)]
  with pytest.raises(ValueError, match="1 values of the image are not finite"):
    whole(Frame(np.where(color == 7, np.nan, color)), stream.Job(fake()))


def test_grey_stays_grey(network):
  lr = photo(20, 30, channels=0)
  alone = whole(Frame(lr), stream.Job(network), np.uint8)
  color = whole(Frame(np.stack([lr] * 3, axis=2)), stream.Job(network), np.uint8)
  assert (color == color[..., :1]).all() and alone.std() > 10
  np.testing.assert_array_equal(color[..., 0], alone)
  tinted = np.stack([lr] * 3, axis=2)
  tinted[0, 0, 0] ^= 1  # the network itself tints: it is seen by colour images
  sr = whole(Frame(tinted), stream.Job(network), np.uint8)
  assert (sr != sr[..., :1]).any()


def test_no_hidden_colour_shows():
  yy, xx = np.mgrid[:48, :48]
  alpha = np.where((yy - 24) ** 2 + (xx - 24) ** 2 < 200, 255, 0).astype(np.uint8)
  color = np.full((48, 48, 3), 255, np.uint8)
  color[alpha == 0] = (0, 90, 0)

  def blur(tile, shape):
    mixed = (tile + np.roll(tile, 1, axis=0) + np.roll(tile, -1, axis=1)) / 3
    return mixed.repeat(2, axis=0).repeat(2, axis=1)

  sr = whole(Frame(color, alpha), stream.Job(fake(run=blur)), np.uint8, channels=4)
  assert sr[sr[..., 3] > 0][:, :3].min() == 255
  opacity = resize.imresize(alpha, 2, "double_mirror")
  np.testing.assert_array_equal(sr[..., 3], opacity)


def test_opaque_frames_among_transparent_ones():
  sr = whole(Frame(photo(8, 9)), stream.Job(fake()), np.uint16, channels=4)
  assert (sr[..., 3] == 65535).all()
  np.testing.assert_array_equal(sr[::2, ::2, :3], photo(8, 9).astype(np.uint16) * 257)


@pytest.mark.parametrize("outscale", ["2.5", "1/3", "3", "8"])
@pytest.mark.parametrize("tiling", [stream.Tiling(), stream.Tiling(16, 4, 0)], ids=["whole", "cut"])
def test_outscale_is_matlabs_bicubic_of_the_result(outscale, tiling):
  lr = photo(41, 55)
  factor = fractions.Fraction(outscale)
  job = stream.Job(fake(4), tiling, outscale=factor)
  sr = whole(Frame(lr), job, np.uint8)
  large = lr.repeat(4, axis=0).repeat(4, axis=1)
  expected = resize.imresize(large, factor / 4, "double_mirror")
  assert sr.shape[:2] == stream.output_size(41, 55, job) == expected.shape[:2]
  assert np.abs(sr.astype(int) - expected).max() <= 1
  assert (sr != expected).mean() < 0.01


def test_a_self_ensemble_is_the_mean_of_eight():
  rng = np.random.default_rng(0)
  weight = rng.random((12, 12, 3)).astype(np.float32)

  def run(tile, shape):  # differs for each turn
    big = tile.repeat(2, axis=0).repeat(2, axis=1)
    return big * weight[: big.shape[0], : big.shape[1]]

  lr = photo(6, 6).astype(np.float32) / 255
  sr = whole(Frame(lr), stream.Job(fake(run=run), ensemble=True))
  expected = []
  for mirror in (lambda x: x, np.fliplr):
    for k in range(4):
      expected.append(mirror(np.rot90(run(np.rot90(mirror(lr), k), None), -k)))
  np.testing.assert_allclose(sr, np.mean(expected, axis=0), atol=1e-6)


def test_reach_is_what_convolutions_see(reach):
  """Each 3x3 convolution sees one pixel further, at twice and four times the size less."""
  # conv_first, three dense blocks of five, conv_body; then half a pixel and three quarters.
  assert 18 <= reach <= 19
  plain = make_model("msrresnet", blocks=3)
  module = build_generator(plain.name, plain.kwargs)
  assert 1 + 3 * 2 <= networks.reach(module, plain.variables) <= 1 + 3 * 2 + 2
  nearest = nearest_model()  # whose weights are zero: the structure counts
  assert networks.reach(build_generator(nearest.name, nearest.kwargs), nearest.variables) == reach


def test_exact_tiles_equal_no_tiles(network, reach):
  frame, shapes = Frame(photo(60, 130)), [(64, 160)]  # one program for all
  expected = whole(frame, stream.Job(network, shapes=shapes))
  sr = whole(frame, stream.Job(network, stream.Tiling(32, reach, 0), shapes))
  np.testing.assert_allclose(sr, expected, rtol=0, atol=1e-5)
  cut_short = whole(frame, stream.Job(network, stream.Tiling(32, 4, 0), shapes))
  assert np.abs(cut_short - expected).max() > 1e-3


@pytest.mark.slow
def test_exact_tiles_of_a_network_that_unshuffles():
  model = contrasting_model(blocks=1, growth=2, scale=2, input_unshuffle=2)
  module = build_generator(model.name, model.kwargs)
  reach = networks.reach(module, model.variables)
  frame, network = Frame(photo(95, 130)), network_of(model)
  expected = whole(frame, stream.Job(network))
  sr = whole(frame, stream.Job(network, stream.Tiling(32, reach, 0)))
  np.testing.assert_allclose(sr, expected, rtol=0, atol=1e-5)


def test_seams_are_measured(network):
  frame = Frame(photo(60, 130))
  told = stream.seams(frame, stream.Job(network))
  assert told == "The image is upscaled at once: it has no seams."
  decibels = [
    float(
      stream.seams(frame, stream.Job(network, stream.Tiling(40, overlap, 0), [(64, 160)])).split()[
        -2
      ]
    )
    for overlap in (4, 16)
  ]
  assert 10 < decibels[0] < decibels[1]


def test_what_is_not_finite_is_computed_again():
  calls, told = [], []
  good = lambda tile, shape: np.full((2 * len(tile), 2 * tile.shape[1], 3), 0.5)  # noqa: E731

  def bad(tile, shape):
    calls.append(shape)
    result = good(tile, shape)
    result[0, 0] = np.nan
    return result

  net = fake(run=bad)._replace(run_plain=pending(good))
  sr = whole(Frame(photo(9, 9)), stream.Job(net, notice=told.append))
  assert (sr == 0.5).all() and len(calls) == 1
  assert told == ["The network's output was not finite; it was computed again in plain float32."]
  with pytest.raises(ValueError, match="3 of 972 values of the network's output are not finite"):
    whole(Frame(photo(9, 9)), stream.Job(fake(run=bad)))


def test_memory_decides_the_tiles(network):
  small = stream.fitting(network, 500 * 500 * network.pixel_bytes)
  assert small.tile < stream.TILE and small.whole <= 250_000
  large = stream.fitting(network, 10**12)
  assert (large.tile, large.whole) == (stream.TILE, stream.WHOLE)
  assert stream.fitting(network, 1).tile == stream.SMALLEST
  deeper = network_of(make_model(blocks=1, growth=2, features=16))
  assert deeper.pixel_bytes > 2 * network.pixel_bytes
  assert stream.smaller(large).tile == stream.TILE // 2


def test_an_accelerators_memory_is_its_own(monkeypatch):
  class Device:
    def memory_stats(self):
      return {"bytes_limit": 1000, "bytes_in_use": 400}

  assert networks.free_memory(Device()) == 600
  monkeypatch.setattr(networks, "memory", lambda: (123, 456))
  assert networks.free_memory() == 123


def test_the_next_tile_is_begun_before_one_is_fetched():
  events = []

  def run(tile, shape):
    number = len([event for event in events if event[0] == "begun"])
    events.append(("begun", number))

    def fetch():
      events.append(("fetched", number))
      return np.zeros((2 * len(tile), 2 * tile.shape[1], 3), np.float32)

    return fetch

  job = stream.Job(fake()._replace(run=run), stream.Tiling(16, 16, 0))
  whole(Frame(photo(64, 64)), job)
  assert [kind for kind, _ in events[:4]] == ["begun", "begun", "fetched", "begun"]
  assert [number for kind, number in events if kind == "fetched"] == [0, 1, 2, 3]


@pytest.mark.slow  # 23 blocks, narrower than ESRGAN's, which look as far
def test_exact_tiles_of_23_blocks():
  model = contrasting_model(blocks=23, features=8, growth=4)
  module = build_generator(model.name, model.kwargs)
  network = network_of(model)
  reach = networks.reach(module, model.variables)
  assert 1 + 23 * 15 + 1 < reach <= 1 + 23 * 15 + 1 + 2
  frame = Frame(photo(24, 1400))
  expected = whole(frame, stream.Job(network))
  sr = whole(frame, stream.Job(network, stream.Tiling(300, reach, 0)))
  np.testing.assert_allclose(sr, expected, rtol=0, atol=1e-5)
