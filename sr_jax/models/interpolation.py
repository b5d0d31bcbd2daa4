"""Network interpolation (ESRGAN, arXiv 1809.00219, section 3.4)."""

from typing import Any

from absl import logging
import jax

from sr_jax import UserError
from sr_jax.models.model import Model
from sr_jax.networks.build import build_generator
from sr_jax.networks import trees

Tree = Any


def interpolate(psnr: Tree, gan: Tree, alpha: float) -> Tree:
  """Interpolates two parameter trees: (1 - alpha) psnr + alpha gan (ESRGAN, section 3.4).

  Exact at both ends: alpha 0 and 1 return the values of one tree bit for bit.

  Args:
    psnr: a tree of arrays.
    gan: a tree of the same structure and shapes.
    alpha: the share of `gan`, in [0, 1].

  Raises:
    UserError: alpha is outside [0, 1], or the trees differ; the error names the first path where
      they do.
  """
  check_alpha(alpha)
  trees.check_same_shapes({"the PSNR model": psnr, "the GAN model": gan})
  if alpha in (0, 1):
    return jax.tree.map(lambda x: x, (psnr, gan)[int(alpha)])
  return jax.tree.map(lambda p, g: ((1 - alpha) * p + alpha * g).astype(p.dtype), psnr, gan)


def check_alpha(alpha: float) -> None:
  """Raises a UserError where a share of the GAN model is outside of [0, 1], or NaN."""
  if not 0 <= alpha <= 1:
    raise UserError(
      f"--alpha={alpha:g} must be in [0, 1]: 0 is the PSNR model, 1 the GAN model; try --alpha=0.5"
    )


def interpolate_models(psnr: Model, gan: Model, alpha: float) -> Model:
  """Interpolates two models; warns where the second was not fine-tuned from the first.

  Raises:
    UserError: as for `interpolate`; or the networks differ in a field that shapes do not show.
  """
  ours, theirs = _network(psnr), _network(gan)
  for field in {**ours, **theirs}:
    if ours.get(field) != theirs.get(field):
      raise UserError(
        f"the PSNR model and the GAN model must be the same network: {field} is "
        f"{ours.get(field)!r} in the PSNR model and {theirs.get(field)!r} in the GAN model; "
        "give a GAN model that was fine-tuned from the PSNR model"
      )
  if psnr.info["digest"] not in gan.info["ancestry"]:
    logging.warning(
        "the GAN model does not record that it was fine-tuned from this PSNR model (%s is not "
        "among its ancestors %s); models trained apart do not interpolate well",
        psnr.info["digest"], gan.info["ancestry"],
    )  # fmt: skip
  variables = interpolate(psnr.variables, gan.variables, alpha)
  info = {
      "digest": trees.digest(variables),
      "ancestry": [gan.info["digest"], *gan.info["ancestry"]],
      "interpolation": {
          "alpha": alpha, "psnr": psnr.info["digest"], "gan": gan.info["digest"]
      },
  }  # fmt: skip
  return Model(gan.name, gan.kwargs, variables, info)


def _network(model: Model) -> dict[str, Any]:
  """Returns the fields that decide what function the weights compute, defaults included."""
  module = build_generator(model.name, model.kwargs)
  how = ("parent", "name", "dtype", "kernels", "algorithm", "unroll", "remat")
  fields = {f: getattr(module, f) for f in module.__dataclass_fields__ if f not in how}
  return {"generator": model.name, **fields}
