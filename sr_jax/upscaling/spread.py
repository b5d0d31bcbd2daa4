"""One image over several devices: each holds a block of it, and neighbours exchange borders.

Before each convolution a device gets the rows and columns next to its block from its neighbours
(halo exchange), so that nothing is computed twice and each device needs its share of the memory.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from sr_jax import UserError
from sr_jax.networks.masking import zero_outside
from sr_jax.networks.srresnet import MSRResNet
from sr_jax.upscaling.upscaler import plain

_AXES = ("rows", "columns")


def make_mesh(shape: tuple[int, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Arranges devices as an image's blocks.

  Args:
    shape: how many blocks an image has from top to bottom, and from left to right.
    devices: by default this process's; the first ones are taken.

  Raises:
    UserError: there are not as many.
  """
  devices = list(devices or jax.local_devices())
  if not 1 <= shape[0] * shape[1] <= len(devices):
    raise UserError(
      f"--mesh={shape[0]}x{shape[1]} needs {shape[0] * shape[1]} devices, and there are "
      f"{len(devices)}; give --mesh=1x{len(devices)}"
    )
  return Mesh(np.array(devices[: shape[0] * shape[1]]).reshape(shape), _AXES)


@functools.lru_cache(maxsize=8)
def make_spread_forward(module: nn.Module, mesh: Mesh) -> Callable[..., jax.Array]:
  """Makes the function that upscales one image on a mesh of devices.

  Args:
    module: a generator whose operations but convolutions look at single pixels of the LR image.
    mesh: of `make_mesh`.

  Returns:
    (variables, float32 [1, H, W, c], height, width) -> float32 [1, H*s, W*s, out_channels], both
    divided over the mesh; H and W are multiples of the mesh's sides and `input_unshuffle`. Height
    and width say how much of the image is not padding.

  Raises:
    UserError: the generator resizes the whole image.
  """
  if isinstance(module, MSRResNet):
    raise UserError(
      "msrresnet adds the image enlarged as a whole: it runs on one device, no --mesh"
    )
  module = plain(module)
  image = PartitionSpec(None, *_AXES, None)

  def local(variables, lr, height, width):
    rows, columns = _inside(lr.shape[1], "rows", height), _inside(lr.shape[2], "columns", width)
    inside = rows[:, None] & columns[None, :]
    mask = zero_outside(inside.astype(jnp.float32)[None, :, :, None])

    begun = set()  # `layers.conv`'s module calls linen's, whose call is intercepted too

    def interceptor(call, args, kwargs, context):
      is_call = isinstance(context.module, nn.Conv) and context.method_name == "__call__"
      if not is_call or context.module.path in begun:
        return call(*args, **kwargs)
      begun.add(context.module.path)
      try:
        halo = context.module.kernel_size[0] // 2
        return mask(functools.partial(_with_halo, call, halo), args, kwargs, context)
      finally:
        begun.remove(context.module.path)

    with nn.intercept_methods(interceptor):
      return module.apply(variables, lr, train=False)

  spread = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(PartitionSpec(), image, PartitionSpec(), PartitionSpec()),
    out_specs=image,
    check_vma=False,
  )
  return jax.jit(spread)


def _inside(size: int, axis: str, length: jax.Array) -> jax.Array:
  """Whether each of a block's rows or columns is in the image."""
  return jax.lax.axis_index(axis) * size + jnp.arange(size) < length


def _with_halo(call: Callable[..., Any], halo: int, x: jax.Array, **kwargs: Any) -> jax.Array:
  """Convolves a block with its neighbours' borders around it, and cuts what these become off."""
  for dimension, axis in enumerate(_AXES, 1):
    x = _exchange(x, halo, dimension, axis)
  y = call(x, **kwargs)
  return y[:, halo : y.shape[1] - halo, halo : y.shape[2] - halo]


def _exchange(x: jax.Array, halo: int, dimension: int, axis: str) -> jax.Array:
  """Puts the neighbours' borders on both sides of a block; beyond the image there are zeros."""
  count, length = jax.lax.axis_size(axis), x.shape[dimension]
  if length < halo:
    raise UserError(f"a block of {length} pixels must have {halo} or more; use fewer devices")
  first = jax.lax.slice_in_dim(x, 0, halo, axis=dimension)
  last = jax.lax.slice_in_dim(x, length - halo, length, axis=dimension)
  before = jax.lax.ppermute(last, axis, [(i, i + 1) for i in range(count - 1)])
  after = jax.lax.ppermute(first, axis, [(i + 1, i) for i in range(count - 1)])
  return jnp.concatenate([before, x, after], axis=dimension)
