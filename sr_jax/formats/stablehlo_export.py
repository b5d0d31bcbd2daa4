"""Exports a generator as one StableHLO program with its weights inside, for any size of image.

`jax.export` reads and runs it, and so does whatever else compiles portable StableHLO, without the
networks' Python code. JAX promises to read such a file for six months at least, so
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

  N, h and w are symbols of the program. With an `input_unshuffle` of r, the program refuses an h or
  w that r does not divide. The same arguments give the same bytes on any machine, since the file
  holds no paths of source files.

  Args:
    name: a key of GENERATORS.
    kwargs: fields of the module.
    variables: {'params': ..., 'batch_stats': ...}; these become constants of the program.
    platforms: the platforms to lower for, of PLATFORMS; they may differ from this machine's.

  Returns:
    The contents of a .stablehlo file, which `from_stablehlo` reads.

  Raises:
    UserError: the network cannot be built, the variables belong to another one, or a platform is
      unknown.
    ImportError: the package flatbuffers is not installed, with which JAX writes these files.
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

  A damaged file is not always noticed, because it has no checksum.

  Args:
    data: the file's contents.

  Returns:
    A jitted function from lr [N, h, w, c] float32 to sr, which is compiled once for each size of
    image. It raises ValueError for an lr of another type or shape than the program's.

  Raises:
    UserError: the data are not a program that jax.export reads.
  """
  return jax.jit(read_exported(data).call)


def read_exported(data: bytes) -> jax.export.Exported:
  """Reads a program and what is known about it: shapes and platforms.

  Raises:
    UserError: the data are not a program that jax.export reads.
  """
  try:
    return jax.export.deserialize(bytearray(data))
  except ImportError:
    raise
  except Exception as error:  # whatever flatbuffers and the parser of types meet: struct.error, ...
    raise UserError(
      f"these {len(data)} bytes are not a program that jax.export {jax.__version__} reads: {error}"
    ) from error
