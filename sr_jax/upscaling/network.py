"""A network as a function of float tiles: what it needs, how far it looks, what it does."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from sr_jax import UserError
from sr_jax.images import resize
from sr_jax.machine.memory import memory
from sr_jax.networks.build import in_channels
from sr_jax.upscaling import batches
from sr_jax.upscaling import engines
from sr_jax.upscaling import spread
from sr_jax.upscaling import upscaler

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # BT.601, full range
BATCH = 8  # tiles at once on an accelerator, of as many images; not measured on one
_WIDEST = 2**15  # LR pixels up to which a network's reach is looked for


# Waits for what a device computes, and returns it: until it is called, the host can do other work.
Pending = Callable[[], np.ndarray]


class Network(NamedTuple):
  """What upscales tiles.

  Attributes:
    scale: of its output.
    channels: of its images, 1 or 3.
    multiple: what the sides of its input must be multiples of.
    run: (float32 [h, w, channels], shape) -> Pending float32 [h*scale, w*scale, channels]; computed
      by the program for images of `shape`, which is at least as large.
    run_plain: the same in float32, as the paper prints the network, for what `run` cannot do.
    any_shape: whether it takes any shape, so that nothing should be padded.
    pixel_bytes: of memory for each LR pixel, about.
    batch: how many tiles `run` computes at once, where it gets as many before their results are
      asked for.
  """

  scale: int
  channels: int
  multiple: int
  run: Callable[[np.ndarray, tuple[int, int]], Pending]
  run_plain: Callable[[np.ndarray, tuple[int, int]], Pending]
  any_shape: bool
  pixel_bytes: int
  batch: int = 1


def make_network(
  module: nn.Module,
  variables: Mapping[str, Any],
  engine: engines.Forward | None = None,
  device: jax.Device | None = None,
  mesh: jax.sharding.Mesh | None = None,
  batch: int = 1,
) -> Network:
  """Makes a network of a generator.

  Args:
    module: the generator.
    variables: its parameters and statistics, as `models.load_model` returns them.
    engine: what `engines.open_engine` returned as `forward`, instead of JAX.
    device: to compute on; by default this process's first.
    mesh: of `spread.make_mesh`, to compute each image on all its devices.
    batch: how many tiles one device is to compute at once, by JAX. A batch that is not full takes
      as long as one that is.

  Raises:
    UserError: a model of other channels than images have, or one that cannot be spread.
  """
  multiple = getattr(module, "input_unshuffle", 1)
  channels = in_channels(variables, {"input_unshuffle": multiple})
  if channels not in (1, 3) or module.out_channels != channels:
    raise UserError(
      f"the model makes {module.out_channels} channels of {channels}; images have 3, grey ones 1"
    )
  device = device or jax.local_devices()[0]
  blocks = tuple(mesh.shape.values()) if mesh else (1, 1)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) if mesh else device
  on_mesh = spread.make_spread_forward(module, mesh) if mesh else None
  scale = module.scale
  # The weights come to the device when they are needed.
  placed = functools.cache(lambda: jax.device_put(variables, place))

  def by_jax(plain: bool, tile: np.ndarray, shape: tuple[int, int]) -> Pending:
    shape = tuple(
      -(-n // (b * multiple)) * b * multiple for n, b in zip(shape, blocks, strict=True)
    )
    height, width = tile.shape[:2]
    forward = on_mesh or upscaler.make_float_forward(module, device, plain)
    sr = forward(placed(), _padded(tile, shape)[None], height, width)
    return lambda: np.asarray(sr)[0, : height * scale, : width * scale]

  def several(tiles: Sequence[np.ndarray], shape: tuple[int, int]) -> Callable[[int], np.ndarray]:
    lr = np.zeros((batch, *shape, channels), np.float32)
    sizes = np.zeros((2, batch), np.int32)
    for i, tile in enumerate(tiles):
      lr[i], sizes[:, i] = _padded(tile, shape), tile.shape[:2]
    sr = upscaler.make_float_forward(module, device)(placed(), lr, *sizes)
    fetched = functools.cache(lambda: np.asarray(sr))
    return lambda i: fetched()[i, : sizes[0, i] * scale, : sizes[1, i] * scale]

  def by_engine(tile: np.ndarray, shape: tuple[int, int]) -> Pending:
    sr = engine(np.ascontiguousarray(tile.transpose(2, 0, 1)[None]))
    return lambda: sr[0].transpose(1, 2, 0)

  run = functools.partial(by_jax, False)
  if engine:
    run = by_engine
  elif batch > 1:
    run = batches.in_batches(several, batch)
  return Network(
    scale=scale,
    channels=channels,
    multiple=multiple,
    run=run,
    run_plain=lambda tile, shape: by_jax(True, tile, shape),
    any_shape=engine is not None,
    pixel_bytes=-(-_pixel_bytes(module, variables, channels) * batch // (blocks[0] * blocks[1])),
    batch=batch,
  )


def _padded(tile: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Repeats the border of a tile [h, w, c] up to a shape."""
  pads = [(0, n - side) for n, side in zip(shape, tile.shape, strict=False)]
  return np.pad(tile, [*pads, (0, 0)], mode="edge")


def _pixel_bytes(module: nn.Module, variables: Mapping[str, Any], channels: int) -> int:
  """Estimates the bytes for each LR pixel: twice what the largest operation reads and writes.

  Counted in the traced program, for two sizes, whose difference leaves the weights out.
  """

  def largest(jaxpr) -> int:
    most = 0
    for equation in jaxpr.eqns:
      arrays = [v.aval for v in (*equation.invars, *equation.outvars) if hasattr(v, "aval")]
      size = sum(a.size * a.dtype.itemsize for a in arrays if hasattr(a, "shape"))
      inner = max(
        (largest(j) for j in jax.extend.core.jaxprs_in_params(equation.params)), default=0
      )
      most = max(most, size, inner)
    return most

  def at(side: int) -> int:
    lr = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    return largest(
      jax.make_jaxpr(lambda v, x: module.apply(v, x, train=False))(variables, lr).jaxpr
    )

  return max(2 * (at(128) - at(64)) // (128**2 - 64**2), 1)


def batch_for(images: int, device: jax.Device | None = None) -> int:
  """Chooses how many tiles a device computes at once: one on a CPU, else up to `BATCH`."""
  device = device or jax.local_devices()[0]
  return 1 if device.platform == "cpu" else max(1, min(images, BATCH))


def free_memory(device: jax.Device | None = None) -> int:
  """Returns the bytes that a device can still take: of an accelerator its own, else the host's."""
  device = device or jax.local_devices()[0]
  stats = device.memory_stats() or {}  # None on a CPU
  if "bytes_limit" in stats:
    return max(stats["bytes_limit"] - stats.get("bytes_in_use", 0), 1)
  return memory()[0] or 2**33


def reach(module: nn.Module, variables: Mapping[str, Any]) -> int:
  """Finds how many LR pixels around a pixel a network looks at, whatever its weights are.

  The network is differentiated, along a line of pixels, by the one in the middle: where the
  derivative is zero, the output does not depend on it. So that none vanishes by chance or in
  float32, all kernels are positive for this, and large.

  Returns:
    The radius in LR pixels, rounded up.

  Raises:
    UserError: the network looks at the whole image.
  """
  multiple = getattr(module, "input_unshuffle", 1)
  channels = in_channels(variables, {"input_unshuffle": multiple})
  plain = upscaler.plain(module)

  def positive(path, leaf) -> np.ndarray:
    name = path[-1].key
    value = 10 / leaf.shape[-2] if name == "kernel" else float(name not in ("bias", "mean"))
    return np.full(leaf.shape, value, np.float32)

  variables = jax.tree_util.tree_map_with_path(positive, variables)

  @jax.jit
  def derivative(variables, lr, direction):
    _, change = jax.jvp(lambda x: plain.apply(variables, x, train=False), (lr,), (direction,))
    return (change != 0).any(axis=(0, 1, 3))

  width = 1024
  while width <= _WIDEST:
    direction = np.zeros((1, multiple, width, channels), np.float32)
    middle = width // 2
    direction[:, :, middle] = 1
    seen = np.flatnonzero(derivative(variables, np.ones_like(direction), direction))
    first, last = seen[0] // module.scale, seen[-1] // module.scale
    if first > 0 and last < width - 1:
      # The pixels of an unshuffled block look differently far; the most is taken.
      return int(max(middle - first, last - middle)) + multiple - 1
    width *= 4
  raise UserError("the network looks at the whole image: no tiles can be exact; give --tile=0")


def make_tile_function(
  network: Network, grey: bool, ensemble: bool
) -> Callable[[np.ndarray, tuple[int, int], bool], Pending]:
  """Makes the function that upscales a tile of a grey or of a colour image.

  A colour network upscales a grey image as one of three equal channels, and the luma of its output
  is taken: no colour can come in. A grey network upscales the luma of a colour image, bicubic its
  colours.

  Args:
    network: what upscales.
    grey: whether the tiles are grey.
    ensemble: whether to take the mean over the eight turned and mirrored tiles (Timofte et al.,
      2016, arXiv 1511.02228, section 3.4: enhanced prediction).

  Returns:
    (float32 [h, w] or [h, w, 3], shape of the program, plain) -> Pending float32 [h*s, w*s] or
    with 3.
  """

  def run(tile: np.ndarray, shape: tuple[int, int], plain: bool) -> Pending:
    compute = network.run_plain if plain else network.run
    if not ensemble:
      return compute(tile, shape)
    ways = [(turn, mirrored) for turn in range(4) for mirrored in (False, True)]
    results = []
    for turn, mirrored in ways:
      turned = np.ascontiguousarray(np.rot90(tile[:, ::-1] if mirrored else tile, turn))
      results.append(compute(turned, shape[::-1] if turn % 2 else shape))

    def mean() -> np.ndarray:
      total = 0
      for (turn, mirrored), result in zip(ways, results, strict=True):
        sr = np.rot90(result(), -turn)
        total = total + (sr[:, ::-1] if mirrored else sr)
      return total / np.float32(len(ways))

    return mean

  def upscale(tile: np.ndarray, shape: tuple[int, int], plain: bool) -> Pending:
    if grey:
      sr = run(np.repeat(tile[:, :, None], network.channels, axis=2), shape, plain)
      return lambda: sr()[:, :, 0] if network.channels == 1 else sr() @ LUMA
    if network.channels == 3:
      return run(tile, shape, plain)
    luma = run((tile @ LUMA)[:, :, None], shape, plain)

    def with_colors() -> np.ndarray:
      height = len(tile) * network.scale
      bicubic = resize.resize_rows(tile, network.scale, 0, height).astype(np.float32)
      return bicubic + luma() - (bicubic @ LUMA)[:, :, None]

    return with_colors

  return upscale
