"""Converts a trained generator from one form to another; the suffixes say which.

python -m sr_jax.convert --input RUN --output model.safetensors
python -m sr_jax.convert --input model.safetensors --output RUN
"""

import argparse
import sys
from collections.abc import Sequence

from sr_jax import cli
from sr_jax import model_file


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(prog="python -m sr_jax.convert", description=__doc__)
  parser.add_argument("--input", required=True, help="a run, or a .safetensors, .npz, .pth file")
  parser.add_argument("--output", required=True, help="a .safetensors or .npz file, or a new run")
  args = parser.parse_args(argv)
  model = model_file.read_model(args.input)
  model_file.save_model(args.output, model)
  print(f"{args.output}: {model.name} {model.kwargs}, weights {model.info['digest']}")


if __name__ == "__main__":
  cli.guarded(main)(sys.argv[1:])
