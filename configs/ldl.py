"""LDL (arXiv 2203.09195): RRDB-PSNR, fine-tuned with ESRGAN's losses and one against artifacts.

  python -m sr_jax.main --config configs/ldl.py

Paper, section 4.1, and released options: the generator starts from the PSNR stage (`config.psnr`,
trained first unless `config.init_from` names a model); loss = L1 1e-2 + LDL 1 + VGG19's features
before activation, L1, of conv1_2 (0.1), conv2_2 (0.1), conv3_4, conv4_4, conv5_4 (1 each) + RaGAN
5e-3; Adam (0.9, 0.99); learning rate 1e-4, constant; 300,000 updates; crops of 128x128. The
released options train on 4 GPUs with batches of 16 each: on fewer images at a time,
`--config.data.batch_size=16`. The average of 0.999 is in the loss, not only in what is shipped.

RaGAN is the released code's, as in `esrgan.py:basicsr`: half the sum of both terms (2.5e-3 and
0.5), gradients of the means detached in the discriminator. The paper trains on DF2K, here DIV2K is
the default.

Expected (x4, measured by the authors of AESOP, arXiv 2412.00124): PSNR-Y Set14 27.23, BSD100 25.95,
Urban100 25.46 dB; LPIPS (alex) .1132, .1535, .1084, where ESRGAN has .1241, .1616, .1229. Not yet
run here at full length.

Variants:
  demo: both stages on installed photographs in some minutes on two CPU cores, with VGG16's
    features. It shows that everything runs, not how good LDL can be.
"""

from ml_collections import config_dict

from configs import common
from configs import esrgan


def get_config(variant: str = "") -> config_dict.ConfigDict:
  """Returns the recipe.

  Args:
    variant: '' or 'demo'.

  Raises:
    UserError: the recipe has no such variant.
  """
  if variant not in ("", "demo"):
    raise common.unknown_variant(variant, ("demo",))
  config = esrgan.get_config(variant or "basicsr")
  config.ldl.weight = 1.0
  config.adversarial.weight = 2.5e-3
  config.adversarial.loss = "ragan_detached"
  config.adversarial.discriminator_weight = 0.5
  config.learning_rate.schedule = "constant"
  config.learning_rate.milestones = ()
  config.optimizer.b2 = 0.99
  if variant == "":
    config.total_steps = 300_000
    config.data.batch_size = 64
    config.perceptual.layers = (
      "conv1_2:0.1", "conv2_2:0.1", "conv3_4:1.0", "conv4_4:1.0", "conv5_4:1.0",
    )  # fmt: skip
  return config
