"""What the kernels share: a batch in chunks that fit the caches, and kernels turned around."""

import jax
import jax.numpy as jnp


def split(x: jax.Array, images: int) -> jax.Array:
  """[N, ...] -> [chunks, N / chunks, ...], with at most `images` images each, but at least one."""
  n = len(x)
  images = max(k for k in range(1, min(n, max(1, images)) + 1) if n % k == 0)
  return x.reshape(n // images, images, *x.shape[1:])


def join(parts):
  """[chunks, N / chunks, ...] -> [N, ...], of each array."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


def turned(kernel: jax.Array) -> jax.Array:
  """Returns the kernel of the input's gradient: rows and columns reversed, channels swapped."""
  return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
