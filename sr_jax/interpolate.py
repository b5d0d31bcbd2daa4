"""Network interpolation (ESRGAN section 3.4): between the PSNR model and the GAN model.

python -m sr_jax.interpolate --psnr RUN/psnr --gan RUN --alpha 0.5 --output half.safetensors
"""

import argparse
import sys
from collections.abc import Sequence

from sr_jax import cli
from sr_jax.models.interpolation import interpolate_models
from sr_jax.models.read import read_model
from sr_jax.models.write import check_apart, save_model
from sr_jax.runs import storage


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="python -m sr_jax.interpolate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--psnr", required=True, help="the PSNR-oriented model: a run, a file or a name"
  )
  parser.add_argument(
    "--gan", required=True, help="the model fine-tuned from it: a run, a file or a name"
  )
  parser.add_argument("--alpha", type=float, default=0.5, help="0: PSNR model, 1: GAN model")
  parser.add_argument("--output", required=True, help="file to write: .safetensors or .npz")
  args = parser.parse_args(argv)
  check_apart(storage.local_path("--output", args.output), args.psnr, args.gan)
  psnr, gan = read_model(args.psnr), read_model(args.gan)
  model = interpolate_models(psnr, gan, args.alpha)
  save_model(args.output, model)
  print(f"{args.output}: {model.name} x{model.kwargs['scale']}, alpha {args.alpha}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
