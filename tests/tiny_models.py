"""Small generators with random weights, for the tests of what is done with trained ones."""

import jax
import jax.numpy as jnp
import numpy as np

from sr_jax import model_file

KWARGS = {
  "srresnet": {"features": 4, "blocks": 2},
  "msrresnet": {"features": 4, "blocks": 2},
  "rrdbnet": {"features": 4, "blocks": 2, "growth": 3},
  "residualnet": {"features": 4, "blocks": 2},
}


def make_model(name: str = "rrdbnet", *, seed: int = 0, **kwargs) -> model_file.Model:
  """Draws a model with numpy: compiling the networks' own initialisers takes seconds.

  Args:
    name: of the generator.
    seed: of the weights.
    **kwargs: stand over KWARGS; the network takes as many channels as it makes.
  """
  kwargs = {"scale": 4, **KWARGS[name], **kwargs}
  module = model_file.build_generator(name, kwargs)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-1].key == "kernel":
      return rng.normal(scale=np.prod(leaf.shape[-4:-1]) ** -0.5, size=leaf.shape)
    return rng.uniform(0.2, 0.6, leaf.shape)  # positive, since variances are among them

  image = jnp.zeros((1, 8, 8, kwargs.get("out_channels", 3)))
  shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), image, train=False))
  variables = jax.tree_util.tree_map_with_path(draw, {"batch_stats": {}, **shapes})
  variables = jax.tree.map(lambda x: x.astype(np.float32), variables)
  info = {"ancestry": [], "digest": model_file.digest(variables)}
  return model_file.Model(name, kwargs, variables, info)


def assert_equal_trees(actual, expected) -> None:
  """Same paths, dtypes and values, bit for bit."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
  ):
    assert x.dtype == y.dtype, path
    np.testing.assert_array_equal(np.asarray(x), y, err_msg=str(path))
