"""Converts a trained network from one form to another, or says what a file is.

  python -m sr_jax.convert --input RUN --output model.safetensors        what spandrel reads
  python -m sr_jax.convert --input model.pth --output RUN                to fine-tune or evaluate
  python -m sr_jax.convert --input model.pth --output model.onnx --dtype float16
  python -m sr_jax.convert --inspect model.pth

The suffix names the form: .safetensors, .pth, .npz, .onnx or .stablehlo; without a suffix it is a
run's folder. The names of a generator's weights may be in any of ESRGAN's dialects.
"""

from sr_jax.machine.signals import end_at_signals

if __name__ == "__main__":
  end_at_signals()  # the imports below take seconds

import sys
from collections.abc import Sequence

from sr_jax import UserError, harmless, printable
from sr_jax import cli
from sr_jax import command
from sr_jax.models.inspection import inspect, read_network
from sr_jax.models.model import spandrel_objection
from sr_jax.models import model_card
from sr_jax.models.write import DTYPES, check_apart, check_form, save_model
from sr_jax.networks.build import DISCRIMINATORS


CARD = ("name", "author", "license", "description")


def main(argv: Sequence[str]) -> None:
  parser = command.parser("convert", __doc__)
  parser.add_argument("--input", help="a run, or a .safetensors, .npz or .pth file")
  parser.add_argument(
    "--output", help="a .safetensors, .pth, .npz, .onnx or .stablehlo file, or a new run"
  )
  parser.add_argument("--dtype", default="float32", help=f"weights' dtype: {', '.join(DTYPES)}")
  parser.add_argument("--inspect", metavar="X", help="say what a run or a file is")
  parser.add_argument(
    "--card",
    action="store_true",
    help="write beside the output: its sha256, an OpenModelDB entry, a model card",
  )
  for field in CARD:
    parser.add_argument(f"--{field}", help=f"{field} of the model, for --card")
  args = parser.parse_args(argv)
  if args.inspect and (args.input or args.output):
    raise UserError("--inspect=X stands alone; to convert, give --input and --output")
  if args.inspect:
    facts = inspect(args.inspect)
    facts = {key: value for key, value in facts.items() if value != ""}
    width = max(map(len, facts))
    lines = (f"{key:{width}}  {printable(str(value), 2000)}" for key, value in facts.items())
    print("\n".join(map(harmless, lines)))
    return
  if not (args.input and args.output):
    parser.error("the following arguments are required: --input and --output, or --inspect")

  described = [field for field in CARD if getattr(args, field) is not None]
  if described and not args.card:
    raise UserError(f"--{described[0]} goes with --card, which writes it down; give --card too")
  output = check_form(args.output, args.dtype)
  check_apart(output, args.input)
  model = read_network(args.input)
  is_generator = model.name not in DISCRIMINATORS
  if args.card and not (is_generator and output.suffix):
    raise UserError(f"--card describes a generator's file, which --output={output} will not be")
  save_model(output, model, dtype=args.dtype)
  print(f"{output}: {model.name} {model.kwargs}, weights {model.info['digest']}")
  if is_generator and output.suffix in (".safetensors", ".pth"):
    if objection := spandrel_objection(model):
      print(f"note: {objection}")
  if args.card:
    fields = {field: value for field in CARD if (value := getattr(args, field))}
    written, missing = model_card.write_beside(model, output, fields)
    print("\n".join(str(path) for path in written))
    for suffix in (".md", ".openmodeldb.json"):
      if not any(str(path).endswith(suffix) for path in written):
        print(f"{output}{suffix} is left as it is; move it away for a new one")
    print(f"left for you to fill in: {', '.join(missing)}")


run = cli.guarded(main)

if __name__ == "__main__":
  run(sys.argv[1:])
