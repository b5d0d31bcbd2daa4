"""Network interpolation (ESRGAN section 3.4): between the PSNR model and the GAN model.

python -m sr_jax.interpolate --psnr RUN/psnr --gan RUN --alpha 0.5 --output half.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging
import jax

from sr_jax import cli
from sr_jax import model_file

Tree = Any


def interpolate(psnr: Tree, gan: Tree, alpha: float) -> Tree:
  """Interpolates two parameter trees: (1 - alpha) psnr + alpha gan (ESRGAN, section 3.4).

  Exact at both ends: alpha 0 and 1 return the values of one tree bit for bit.

  Args:
    psnr: tree of arrays.
    gan: tree of the same structure and shapes.
    alpha: in [0, 1].

  Raises:
    ValueError: alpha is outside [0, 1], or the trees differ; names the first path that does.
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha={alpha} must be in [0, 1]: 0 is the PSNR model, 1 the GAN model")
  model_file.check_same_shapes({"the PSNR model": psnr, "the GAN model": gan})
  if alpha in (0, 1):
    return jax.tree.map(lambda x: x, (psnr, gan)[int(alpha)])
  return jax.tree.map(lambda p, g: ((1 - alpha) * p + alpha * g).astype(p.dtype), psnr, gan)


def interpolate_models(
  psnr: model_file.Model, gan: model_file.Model, alpha: float
) -> model_file.Model:
  """Interpolates two models; warns where the second was not fine-tuned from the first.

  Raises:
    ValueError: as `interpolate`, or the networks differ in what shapes do not show.
  """
  ours, theirs = _network(psnr), _network(gan)
  for field in {**ours, **theirs}:
    if ours.get(field) != theirs.get(field):
      raise ValueError(
        f"the PSNR model and the GAN model must be the same network: {field} is "
        f"{ours.get(field)!r} in the PSNR model and {theirs.get(field)!r} in the GAN model"
      )
  if psnr.info["digest"] not in gan.info["ancestry"]:
    logging.warning(
        "the GAN model does not record that it was fine-tuned from this PSNR model (%s is not "
        "among its ancestors %s); models trained apart do not interpolate well",
        psnr.info["digest"], gan.info["ancestry"],
    )  # fmt: skip
  variables = interpolate(psnr.variables, gan.variables, alpha)
  info = {
      "digest": model_file.digest(variables),
      "ancestry": [gan.info["digest"], *gan.info["ancestry"]],
      "interpolation": {
          "alpha": alpha, "psnr": psnr.info["digest"], "gan": gan.info["digest"]
      },
  }  # fmt: skip
  return model_file.Model(gan.name, gan.kwargs, variables, info)


def _network(model: model_file.Model) -> dict[str, Any]:
  """What decides the function that its weights compute; defaults filled in."""
  module = model_file.build_generator(model.name, model.kwargs)
  how = ("parent", "name", "dtype", "dense", "unroll", "remat")
  fields = {f: getattr(module, f) for f in module.__dataclass_fields__ if f not in how}
  return {"generator": model.name, **fields}


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m sr_jax.interpolate", description=__doc__)
  parser.add_argument("--psnr", required=True, help="the PSNR-oriented model: a run or a file")
  parser.add_argument("--gan", required=True, help="the model fine-tuned from it: a run or a file")
  parser.add_argument("--alpha", type=float, default=0.5, help="0: PSNR model, 1: GAN model")
  parser.add_argument("--output", required=True, help="file to write: .safetensors or .npz")
  args = parser.parse_args(argv)
  psnr, gan = model_file.read_model(args.psnr), model_file.read_model(args.gan)
  model = interpolate_models(psnr, gan, args.alpha)
  model_file.save_model(args.output, model)
  print(f"{args.output}: {model.name} x{model.kwargs['scale']}, alpha {args.alpha}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
