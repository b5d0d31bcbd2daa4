"""RRDB-PSNR: the first stage of ESRGAN (arXiv 1809.00219, section 4.1 and supplement section 4).

  python -m sr_jax.main --config configs/esrgan_psnr.py

Paper: RRDBNet with 23 blocks, L1, Adam (0.9, 0.999), learning rate 2e-4 halved every 200,000
updates, batches of 16 crops of 192x192 ("192x192 for PSNR-oriented methods"), curves to 1e6
updates. The paper trains on DF2K, here DIV2K is the default (`--config.data.source=DIR` takes any
folder). It names no average of the weights; the EMA of 0.999 is BasicSR's.

Expected (paper, supplement, table 2, DIV2K): PSNR-Y Set5 32.60, Set14 28.88, BSD100 27.76 dB. Not
yet run here at full length.

Variants:
  basicsr: as released (BasicSR's 051): crops of 128, betas (0.9, 0.99), cosine restarts
    4 x 250,000 from 2e-4 to 1e-7.
  residual: the paper's ablation, 16 plain residual blocks instead of 23 RRDBs.
  demo: 1,200 updates of a small network, about two minutes on two CPU cores.
"""

from ml_collections import config_dict

from configs import common


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    variant: '', 'basicsr', 'demo' or 'residual'.

  Raises:
    UserError: the recipe has no such variant.
  """
  config = common.get_config()
  config.total_steps = 1_000_000
  config.data.batch_size = 16
  config.data.hr_patch = 192
  config.generator = common.generator("rrdbnet", features=64, blocks=23, growth=32)
  config.pixel.weight = 1.0
  config.pixel.loss = "l1"
  config.learning_rate.schedule = "multi_step"
  config.learning_rate.base = 2e-4
  config.learning_rate.milestones = (200_000, 400_000, 600_000, 800_000)
  config.learning_rate.gamma = 0.5
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999

  if variant == "basicsr":
    config.data.hr_patch = 128
    config.optimizer.b2 = 0.99
    config.learning_rate.schedule = "cosine_restarts"
    config.learning_rate.periods = (250_000,) * 4
    config.learning_rate.eta_min = 1e-7
  elif variant == "demo":
    common.make_demo(config)
    config.total_steps = 1200
    config.generator = common.generator("rrdbnet", features=32, blocks=2, growth=16)
    config.learning_rate.schedule = "cosine_restarts"
    config.learning_rate.base = 1e-3
    config.learning_rate.periods = (1200,)
  elif variant == "residual":
    config.generator = common.generator("residualnet")
  elif variant:
    raise common.unknown_variant(variant, ("basicsr", "demo", "residual"))
  return config
