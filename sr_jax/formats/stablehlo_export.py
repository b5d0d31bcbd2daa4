"""A generator as one StableHLO program with its weights inside, for any size of image.

`jax.export` reads and runs it, and so does whatever else compiles portable StableHLO; the networks'
Python code is not needed for that. JAX promises to read such a file for six months at least, so
keep the model file that it came from.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from sr_jax import UserError
from sr_jax.networks.build import build_checked

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def to_stablehlo(
  name: str,
  kwargs: Mapping[str, Any],
  variables: Mapping[str, Any],
  *,
  platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
) -> bytes:
  """Exports a generator in inference, from lr [N, h, w, c] float32 in [0, 1] to float32 sr.

  N, h and w are symbols of the program; with `input_unshuffle` r, calls with an h or w that r does
  not divide are refused. The same arguments give the same bytes, on any machine: the file holds no
  path of a source file.

  Args:
    name: a key of GENERATORS.
    kwargs: fields of the module.
    variables: {'params': ..., 'batch_stats': ...}; these become constants of the program.
    platforms: to lower for, whatever this machine is; of PLATFORMS.

  Returns:
    What is to be written to a .stablehlo file; `from_stablehlo` reads it.

  Raises:
    UserError: an argument is not of a network that can be built, or not of this one.
    MissingPackageError: `flatbuffers` is missing, in which JAX writes these files.
  """
  unknown = [platform for platform in platforms if platform not in PLATFORMS]
  if unknown or not platforms:
    raise UserError(f"platforms={tuple(platforms)} must be some of {', '.join(PLATFORMS)}")
  module, channels = build_checked(name, kwargs, variables)
  if hasattr(module, "algorithm"):
    module = module.clone(algorithm="concat")  # as printed
  r = getattr(module, "input_unshuffle", 1)
  shape = jax.export.symbolic_shape(f"batch, {r}*height, {r}*width, {channels}")

  def upscale(lr: jax.Array) -> jax.Array:
    return module.apply(variables, lr, train=False)

  # Otherwise each operation carries the paths of the source files that it was traced from, which
  # tell of this machine and make the bytes depend on where sr_jax is installed.
  frames = jax.config.jax_traceback_in_locations_limit
  jax.config.update("jax_traceback_in_locations_limit", 0)
  try:
    exported = jax.export.export(jax.jit(upscale), platforms=tuple(platforms))(
      jax.ShapeDtypeStruct(shape, jnp.float32)
    )
  finally:
    jax.config.update("jax_traceback_in_locations_limit", frames)
  return bytes(exported.serialize())


def from_stablehlo(data: bytes) -> Callable[[jax.Array], jax.Array]:
  """Reads what `to_stablehlo` wrote.

  A damaged file is not always noticed: there is no checksum in it.

  Args:
    data: the file's content.

  Returns:
    A jitted function from lr [N, h, w, c] float32 to sr; each size of image is compiled once. It
    raises ValueError for an lr of another type or shape than the program's.

  Raises:
    UserError: data is not a program that jax.export reads.
  """
  return jax.jit(read_exported(data).call)


def read_exported(data: bytes) -> jax.export.Exported:
  """Reads a program with what is known of it: shapes, platforms; errors as `from_stablehlo`."""
  try:
    return jax.export.deserialize(bytearray(data))
  except ImportError:
    raise
  except Exception as error:  # whatever flatbuffers and the parser of types meet: struct.error, ...
    raise UserError(
      f"these {len(data)} bytes are not a program that jax.export {jax.__version__} reads: {error}"
    ) from error
