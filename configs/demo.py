"""What `make demo` trains: three minutes of ESRGAN's fine-tuning, on installed photographs.

  python -m sr_jax.main --config configs/demo.py

It starts from `rrdb-psnr`, which comes with sr_jax, and has all parts of ESRGAN's GAN stage:
features before activation (of VGG16, since it comes installed), RaGAN and L1. It is
`configs/esrgan.py:photos` with smaller crops, a smaller discriminator, fewer updates and a higher
learning rate.
"""

from ml_collections import config_dict

from configs import common
from configs import esrgan


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the recipe.

  Raises:
    UserError: a variant is asked for; there is none.
  """
  if variant:
    raise common.unknown_variant(variant, ())
  config = esrgan.get_config("photos")
  config.total_steps = 150
  config.data.source = "skimage:train"
  config.data.hold_out = 0
  config.data.batch_size = 4
  config.data.hr_patch = 64
  config.eval.source = "skimage:test"
  config.eval.every_steps = config.checkpoint.every_steps = 75
  config.discriminator.kwargs.features = 32
  config.discriminator.warmup_steps = 20
  config.learning_rate.base = 2e-4
  config.learning_rate.periods = (150,)
  return config
