"""Zeros outside the image before every convolution: a padded image gives the unpadded result."""

import flax.linen as nn
import jax


def zero_outside(inside: jax.Array):
  """Makes an interceptor that zeroes each convolution's input outside the image.

  A module that computes several convolutions at once calls `Inside`, which returns it the mask.
  """

  def interceptor(call, args, kwargs, context):
    is_inside = isinstance(context.module, Inside)
    if (is_inside or isinstance(context.module, nn.Conv)) and context.method_name == "__call__":
      (x,) = args
      mask, (ours, theirs) = inside, (inside.shape[1], x.shape[1])
      if theirs > ours:
        mask = mask.repeat(theirs // ours, axis=1).repeat(theirs // ours, axis=2)
      elif theirs < ours:
        mask = mask[:, :: ours // theirs, :: ours // theirs]
      if is_inside:
        return mask
      args = (x * mask.astype(x.dtype),)
    return call(*args, **kwargs)

  return interceptor


class Inside(nn.Module):
  """Returns None, or an interceptor's mask [1, H, W, 1], 0 where x [N, H, W, C] is only padding."""

  def __call__(self, x: jax.Array) -> jax.Array | None:
    return None
