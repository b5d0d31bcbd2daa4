"""Zeroes what is outside the image before each convolution, so that padding changes no result."""

import flax.linen as nn
import jax


def zero_outside(inside: jax.Array):
  """Makes an interceptor that zeroes each convolution's input outside the image.

  The mask is fitted to a convolution's input x by whole factors. This is right because networks
  enlarge and unshuffle images by whole factors only, and because height and width, those of the
  image as well as those with its padding, are multiples of a network's `input_unshuffle`: so each
  pixel of a smaller x is either inside or outside as a whole.

  A module that computes several convolutions at once calls `Inside`, which returns the mask to it.

  Args:
    inside: [1, H, W, 1], 1 inside the image and 0 in its padding, or [N, H, W, 1] for each image.
  """

  def interceptor(call, args, kwargs, context):
    is_inside = isinstance(context.module, Inside)
    if (is_inside or isinstance(context.module, nn.Conv)) and context.method_name == "__call__":
      (x,) = args
      mask, image_height, height = inside, inside.shape[1], x.shape[1]
      if height > image_height:
        factor = height // image_height
        mask = mask.repeat(factor, axis=1).repeat(factor, axis=2)
      elif height < image_height:
        step = image_height // height
        mask = mask[:, ::step, ::step]
      if is_inside:
        return mask
      args = (x * mask.astype(x.dtype),)
    return call(*args, **kwargs)

  return interceptor


class Inside(nn.Module):
  """Returns None, or an interceptor's mask, 0 where x [N, H, W, C] is only padding."""

  def __call__(self, x: jax.Array) -> jax.Array | None:
    return None
