"""Makes the mesh, and says where batches and parameters live on it.

There is one axis, `data`: the batch is split over all devices of all hosts, parameters are
replicated.
Nothing in the step names the axis: under jit every mean over the batch, RaGAN's and BatchNorm's, is
a mean over the global batch because the compiler sees the global array.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from sr_jax import UserError

DATA_AXIS = "data"


def create_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """Creates the one-axis mesh over the given devices, by default all of them.

  The axis type is Auto: with Explicit, the default since jax 0.10, pixel shuffle's reshape is an
  error.
  """
  devices = jax.devices() if devices is None else devices
  return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of parameters, optimizer state and metrics."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: axis 0 is divided over all devices."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def global_batch(mesh: Mesh, host_batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Makes global arrays from each host's part of a batch.

  Args:
    mesh: what `create_mesh` returned.
    host_batch: arrays [n, ...], where n is the global batch size divided by the number of hosts.

  Returns:
    Arrays [N, ...], where N is the global batch size, sharded over the mesh.
  """
  sharding = batch_sharded(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, array)
    for name, array in host_batch.items()
  }


def check_batch_size(batch_size: int, accumulate_steps: int, mesh: Mesh) -> None:
  """Checks that a global batch can be split evenly.

  Raises:
    UserError: batch_size is not a multiple of the number of devices times accumulate_steps.
  """
  parts = mesh.size * accumulate_steps
  if batch_size < 1 or batch_size % parts:
    fit = max(parts, -(-batch_size // parts) * parts)
    raise UserError(
      f"batch_size={batch_size} must be divisible by {mesh.size} devices x "
      f"accumulate_steps={accumulate_steps}; try --config.data.batch_size={fit}"
    )
