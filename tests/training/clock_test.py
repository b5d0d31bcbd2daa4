"""What a run says about the time ahead, by a clock of the test's own, and the count behind it."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops, recipes
from sr_jax.formats.vgg_weights import VGG
from sr_jax.main import read_config
from sr_jax.networks import vgg
from sr_jax.networks.build import build_discriminator, build_generator
from sr_jax.training import clock, cost
from sr_jax.training.run import look_ahead

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def now(monkeypatch):
  """A clock that stands still unless it is moved."""
  seconds = [0.0]
  monkeypatch.setattr(clock.time, "monotonic", lambda: seconds[0])
  return seconds


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3599.7, "1 h 0 min"), (11_520, "3 h 12 min"),
    (86_399, "23 h 59 min"), (90_000, "1 d 1 h"), (204 * 86400 + 11_000, "204 d 3 h"),
  ],
)  # fmt: skip
def test_durations_have_their_two_largest_units(seconds, text):
  assert clock.duration(seconds) == text


def said(progress, now, capsys, seconds: float, steps: int) -> list[str]:
  """Lets some steps take their time; returns the forecasts, with the step they came at."""
  lines = []
  for step in range(1, steps + 1):
    now[0] += seconds
    progress.forecast(step, jnp.zeros(()))
    lines += [f"{step}:{line}" for line in capsys.readouterr().out.splitlines()]
  return lines


def test_after_ten_steps_a_run_says_once_how_long_it_takes(now, capsys):
  progress = clock.Progress(0, 1000, 16)
  assert said(progress, now, capsys, 2.0, 30) == ["10:  forecast: 33 min 0 s for 990 steps"]


def test_slow_steps_are_not_waited_for_longer_than_a_minute(now, capsys):
  progress = clock.Progress(0, 1_000_000, 16)
  assert said(progress, now, capsys, 25.0, 12) == ["3:  forecast: 289 d 8 h for 999,997 steps"]


def test_the_first_of_two_stages_foretells_both(now, capsys):
  progress = clock.Progress(0, 100, 16, clock.Ahead(1, 2, later=300.0))
  assert said(progress, now, capsys, 1.0, 20) == [
    "10:  forecast: stage 1 of 2: 1 min 30 s at this speed, about 6 min 30 s with the next"
  ]
  now[0] += 1.0
  assert progress.report(21)["eta_seconds"] == pytest.approx(100 - 21 + 300)


def test_the_count_of_products_is_that_of_the_benchmarks():
  """`benchmarks/flops.py` counts layer by layer from the networks' descriptions."""
  config = read_config("esrgan", ["--config.generator.kwargs.blocks=2"])
  generator = dict(features=64, blocks=2, growth=32)
  network = build_generator("rrdbnet", {"scale": 4, **generator})
  layers = flops.generator_layers(16, 24, **generator)
  expected = sum(map(flops.flops, layers)) / 2
  assert cost.products_of_network(network, (1, 16, 24, 3)) == expected
  discriminator = sum(map(flops.flops, flops.discriminator_layers(128, 64))) / 2
  network = build_discriminator("vgg", {"features": 64})
  assert cost.products_of_network(network, (1, 128, 128, 3)) == discriminator

  params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0)))
  features = sum(map(flops.flops, flops.vgg_layers(128))) / 2
  patch = sum(map(flops.flops, flops.generator_layers(32, 32, **generator))) / 2
  step = cost.step_products(config, VGG(params, "torchvision", "vgg19", "the test"))
  assert step == 16 * (3 * patch + 3 * features + 7 * discriminator)
  assert cost.step_products(config.psnr, None) == 16 * 3 * patch * (192 / 128) ** 2


def test_what_the_documentation_says_of_a_recipes_cost_is_what_is_counted():
  page = (ROOT / "docs" / "reproduce.md").read_text()
  for recipe in ("srresnet", "srgan:basicsr"):
    assert f"\n{recipes.row(recipe, 198, 0.15)} " in page


def test_what_is_ahead_is_counted_in_steps_of_the_stage_that_trains():
  class Stage:
    def __init__(self, config, step=0):
      self.config, self.step = config, step

  class Found:
    vgg = None

  overrides = ["--config.perceptual.weight=0", "--config.adversarial.weight=0",
               "--config.total_steps=100", "--config.data.hr_patch=64"]  # fmt: skip
  config = read_config("esrgan", overrides)
  with config.psnr.unlocked():
    config.psnr.data.hr_patch = 128
  first, second = Stage(config.psnr), Stage(config, 20)
  ahead = look_ahead([first, second], [Found, Found], 2)
  assert ahead == (1, 2, pytest.approx(80 / 4))
  assert look_ahead([second], [Found], 2) == (2, 2, 0.0)
  assert look_ahead([second], [Found], 1) == (1, 1, 0.0)
