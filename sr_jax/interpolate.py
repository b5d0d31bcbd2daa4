"""Network interpolation (ESRGAN section 3.4): between the PSNR model and the GAN model.

  python -m sr_jax.interpolate --psnr RUN/psnr --gan RUN --alpha 0.5 --output half.safetensors
"""

from typing import Any

from absl import flags
from absl import logging
import jax

from sr_jax import cli
from sr_jax import model_file

Tree = Any

_PSNR = flags.DEFINE_string("psnr", None, "The PSNR-oriented model: a run's folder or a file.")
_GAN = flags.DEFINE_string("gan", None, "The model fine-tuned from it: a run's folder or a file.")
_ALPHA = flags.DEFINE_float("alpha", 0.5, "0 is the PSNR model, 1 the GAN model.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write: .safetensors or .npz.")


def interpolate(psnr: Tree, gan: Tree, alpha: float) -> Tree:
  """Interpolates two parameter trees: (1 - alpha) psnr + alpha gan (ESRGAN, eq. 5).

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
  """Interpolates two models; warns where the second was not fine-tuned from the first."""
  if (psnr.name, psnr.kwargs.get("scale")) != (gan.name, gan.kwargs.get("scale")):
    raise ValueError(
        f"the PSNR model is {psnr.name} x{psnr.kwargs.get('scale')}, the GAN model {gan.name} "
        f"x{gan.kwargs.get('scale')}; both must be the same network"
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


def main(argv: list[str]) -> None:
  del argv
  psnr, gan = model_file.read_model(_PSNR.value), model_file.read_model(_GAN.value)
  model = interpolate_models(psnr, gan, _ALPHA.value)
  model_file.save_model(_OUTPUT.value, model)
  print(f"{_OUTPUT.value}: {model.name} x{model.kwargs['scale']}, alpha {_ALPHA.value}")


if __name__ == "__main__":
  cli.run(main, required=["psnr", "gan", "output"])
