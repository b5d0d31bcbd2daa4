"""Small generators with random weights, for the tests of what is done with trained ones."""

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax.models.model import Model
from sr_jax.networks.build import build_generator
from sr_jax.networks import trees

KWARGS = {
  "srresnet": {"features": 4, "blocks": 2},
  "msrresnet": {"features": 4, "blocks": 2},
  "rrdbnet": {"features": 4, "blocks": 2, "growth": 3},
  "residualnet": {"features": 4, "blocks": 2},
  "compact": {"features": 4, "blocks": 2},
}


def make_model(name: str = "rrdbnet", *, seed: int = 0, **kwargs) -> Model:
  """Draws a model with numpy: compiling the networks' own initialisers takes seconds.

  Args:
    name: of the generator.
    seed: of the weights.
    **kwargs: stand over KWARGS; the network takes as many channels as it makes.
  """
  kwargs = {"scale": 4, **KWARGS[name], **kwargs}
  module = build_generator(name, kwargs)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      return rng.normal(scale=np.prod(leaf.shape[-4:-1]) ** -0.5, size=leaf.shape)
    return rng.uniform(0.2, 0.6, leaf.shape)  # positive, since variances are among them

  image = jnp.zeros((1, 8, 8, kwargs.get("out_channels", 3)))
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, train=False))
  variables = jax.tree_util.tree_map_with_path(draw, {"batch_stats": {}, **shapes})
  variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
  info = {"ancestry": [], "digest": trees.digest(variables)}
  return Model(name, kwargs, variables, info)


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
  """A smooth image with texture: uint8 [height, width, channels], or [height, width] for 0."""
  rng = np.random.default_rng(seed)
  image = rng.normal(0, 40, (height, width, max(channels, 1)))
  image = np.cumsum(np.cumsum(image, axis=0), axis=1)
  image = 128 + 60 * (image - image.mean()) / image.std() + rng.normal(0, 12, image.shape)
  image = np.clip(np.round(image), 0, 255).astype(np.uint8)
  return image if channels else image[:, :, 0]


def apply(model: Model, image: np.ndarray) -> np.ndarray:
  """The network on one uint8 image, unpadded: float32 [H, W, C] before any rounding."""
  module = build_generator(model.name, model.kwargs)
  lr = image[None].astype(np.float32) / 255
  return np.asarray(jax.jit(lambda v, lr: module.apply(v, lr, train=False))(model.variables, lr))[0]


def contrasting_model(name: str = "rrdbnet", **kwargs) -> Model:
  """A random model whose SR images are neither black, white nor flat: else all would be equal."""
  model = make_model(name, **kwargs)
  last = model.variables["params"]["conv_last"]
  sr = apply(model, photo(16, 16, kwargs.get("out_channels", 3)))
  factor = np.float32(0.2 / sr.std())
  last["kernel"] = last["kernel"] * factor
  last["bias"] = (last["bias"] - sr.mean()) * factor
  if name not in ("msrresnet", "compact"):  # which add the LR image, grey on average
    last["bias"] = last["bias"] + np.float32(0.5)
  return model


def assert_same_pixels(actual, expected) -> None:
  """Equal uint8 images, but for few values that the last bit of a float32 rounds the other way."""
  assert actual.dtype == np.uint8 and actual.shape == expected.shape
  error = np.abs(actual.astype(int) - expected)
  assert error.max() <= 1, f"{(error > 1).sum()} wrong values, first {np.argwhere(error > 1)[0]}"
  assert np.sum(error > 0) <= 3 + 1e-3 * error.size


def assert_equal_trees(actual, expected) -> None:
  """Same paths, dtypes and values, bit for bit."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    assert x.dtype == y.dtype, path
    np.testing.assert_array_equal(np.asarray(x), y, err_msg=str(path))


def nearest_model(scale: int = 4, channels: int = 3) -> Model:
  """An RRDBNet that enlarges exactly by repeating pixels, so that every output pixel is known."""
  model = make_model(blocks=1, growth=2, scale=scale, out_channels=channels)
  variables = jax.tree.map(np.zeros_like, model.variables)
  params = variables["params"]
  for name in ("conv_first", "conv_up1", "conv_up2", "conv_hr", "conv_last"):
    if name in params:
      kernel = params[name]["kernel"]
      for i in range(min(kernel.shape[2:])):
        kernel[1, 1, i, i] = 1
  return model._replace(variables=variables, info={**model.info, "digest": trees.digest(variables)})
