"""SRResNet: the PSNR-oriented network of the SRGAN paper (arXiv 1609.04802).

  python -m sr_jax.main --config configs/srresnet.py

Paper, sections 2.1 and 3.2: 16 residual blocks, MSE on images in [-1, 1], Adam with beta1 0.9,
learning rate 1e-4, 1e6 updates, batches of 16 crops of 96x96, LR by bicubic. The paper trains on
350,000 images of ImageNet; here it is DIV2K, as in later papers. The paper names neither beta2 nor
an average of the weights: both are 0.999 here, the latter an EMA.

Expected (paper, table 2; its SSIM is Daala's, not comparable with others'): Set5 32.05 dB, Set14
28.49 dB, BSD100 27.58 dB, PSNR-Y. Not yet run here at full length.

Variants:
  basicsr: MSRResNet as BasicSR trains it (its 001): no BN, L1, crops of 128, betas (0.9, 0.99),
    cosine restarts 4 x 250,000 from 2e-4 to 1e-7. Its model zoo: RGB Set5 30.25, Set14 26.78 dB.
  demo: a few minutes on two CPU cores.
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    variant: '', 'basicsr' or 'demo'.

  Raises:
    UserError: the recipe has no such variant.
  """
  config = common.get_config()
  config.total_steps = 1_000_000
  config.data.batch_size = 16
  config.data.hr_patch = 96
  config.generator = common.generator("srresnet")
  config.pixel.weight = 4.0  # MSE is counted on [-1, 1] in the paper, on [0, 1] here
  config.pixel.loss = "mse"
  config.learning_rate.schedule = "constant"
  config.learning_rate.base = 1e-4
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999

  if variant == "basicsr":
    config.generator = common.generator("msrresnet")
    config.data.hr_patch = 128
    config.pixel.weight = 1.0
    config.pixel.loss = "l1"
    config.optimizer.b2 = 0.99
    config.learning_rate.schedule = "cosine_restarts"
    config.learning_rate.base = 2e-4
    config.learning_rate.periods = (250_000,) * 4
    config.learning_rate.eta_min = 1e-7
  elif variant == "demo":
    common.make_demo(config)
    config.total_steps = 500
    config.generator = common.generator("srresnet", features=32, blocks=4)
    config.learning_rate.schedule = "cosine_restarts"
    config.learning_rate.base = 1e-3
    config.learning_rate.periods = (500,)
  elif variant:
    raise common.unknown_variant(variant, ("basicsr", "demo"))
  return config
