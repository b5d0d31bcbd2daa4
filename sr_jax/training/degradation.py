"""How a recipe's LR images are made: `config.data.degradation`."""

from sr_jax.data.degrade import chain
from sr_jax.data.degrade.draws import LIGHT, End, Order, Settings
from sr_jax.runs.settings import Config

DEGRADATIONS = ("bicubic", "real_esrgan", "bsr_light")


def read_settings(config: Config) -> Settings | None:
  """Returns the laws of a recipe's degradations; None where LR images are bicubic or given."""
  data = config.data
  if data.degradation == "bicubic":
    return None
  if data.degradation == "bsr_light":
    laws = LIGHT._replace(**_plain(data.bsr_light))
    return Settings(config.scale, laws, None, End(), sharpen=False)
  real = data.real_esrgan
  first, second = (Order(**_plain(laws)) for laws in (real.first, real.second))
  return Settings(config.scale, first, second, End(**_plain(real.end)), real.sharpen)


def crop_side(config: Config) -> int:
  """The side of the crops that are taken from HR images, pixels."""
  data = config.data
  return data.hr_patch if data.degradation == "bicubic" else data.degraded_crop


def crop_problem(config: Config, side: int) -> str:
  """Says which rule a side of the crops that are degraded breaks; '' if none."""
  least = max(chain.smallest_side(read_settings(config)), config.data.hr_patch)
  if side < least or side % config.scale:
    return f"a multiple of scale={config.scale} from {-(-least // config.scale) * config.scale} on"
  return ""


def fitting_crop(config: Config, limit: int) -> int | None:
  """The largest side of crops up to a limit that may be degraded, if there is one."""
  side = limit // config.scale * config.scale
  return side if side and not crop_problem(config, side) else None


def _plain(laws: Config) -> dict:
  """The laws as hashable values: lists, which JSON makes of tuples, are tuples again."""
  return {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in laws.items()}
