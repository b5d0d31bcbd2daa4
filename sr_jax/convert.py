"""Converts a trained generator from one form to another; the suffixes say which.

  python -m sr_jax.convert --input RUN --output model.safetensors
  python -m sr_jax.convert --input model.safetensors --output RUN
"""

from absl import flags

from sr_jax import cli
from sr_jax import model_file

_INPUT = flags.DEFINE_string("input", None, "A run's folder, or a .safetensors, .npz, .pth file.")
_OUTPUT = flags.DEFINE_string("output", None, "A .safetensors or .npz file, or a new run's folder.")


def main(argv: list[str]) -> None:
  del argv
  model = model_file.read_model(_INPUT.value)
  model_file.save_model(_OUTPUT.value, model)
  print(f"{_OUTPUT.value}: {model.name} {model.kwargs}, weights {model.info['digest']}")


if __name__ == "__main__":
  cli.run(main, required=["input", "output"])
