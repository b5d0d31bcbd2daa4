"""Every remedy that an error prints as a setting is applied here, or by the test that is named.

The first test reads the code: a setting in an error that is not in the table below makes it fail.
Of modules that put their settings together from parts it only knows the test that applies them.
"""

import ast
import pathlib
import re

import numpy as np
import pytest

from sr_jax import UserError, main
from sr_jax.data import device_input, packing, sampling, sources, tf_input
from sr_jax.data.source import Flags, hold_out
from sr_jax.images.files import write_image
from sr_jax.machine import sharding

ROOT = pathlib.Path(__file__).resolve().parent.parent

# {module: {field that it suggests: the test that applies it}}. Fields of checks.py come from the
# table of fields, and are applied one by one by checks_test.py.
APPLIED = {
  "data/device_input.py": {
    "data.batch_size": "test_a_batch_that_devices_cannot_share",
    "data.input": "test_images_that_do_not_fit_devices_are_read_by_tf_data",
  },
  "data/packing.py": {
    "data.cache_dir": "test_another_cache_is_used",
    "data.cache_gb": "test_packs_used_longest_ago_are_removed_beyond_the_limit",
    "scale": "test_lr_images_of_another_scale_fit_with_it",
  },
  "data/sampling.py": {
    "data.detail_draws": "test_what_sampling_suggests",
    "data.hr_patch": "test_what_sampling_suggests",
    "data.input": "test_images_that_do_not_fit_devices_are_read_by_tf_data",
    "seed": "test_what_sampling_suggests",
  },
  "data/source.py": {"data.hold_out": "test_one_image_is_not_held_out"},
  "data/tf_input.py": {"data.batch_size": "test_a_batch_that_hosts_cannot_share"},
  "formats/vgg_weights.py": {
    "perceptual.weights": "test_a_folder_in_one_flag_trains_both_stages",
  },
  "machine/sharding.py": {"data.batch_size": "test_a_batch_that_devices_cannot_share"},
  "machine/tensorflow.py": {
    "data.input": "test_trains_evaluates_and_converts_without_tensorflow",
  },
  "main.py": {
    "data.hold_out": "test_held_out_photographs_are_scored_and_not_trained_on",
    "eval.source": "test_a_folder_in_one_flag_trains_both_stages",
  },
}
# Modules whose settings are put together from parts; the tests that apply all that they print.
PUT_TOGETHER = {
  "training/checks.py": "test_a_wrong_setting_is_refused_with_value_rule_and_a_remedy_that_works",
  "training/memory.py": "test_without_memory_a_run_ends_in_one_line_with_settings_that_are_taken",
  "training/recovery.py": "test_a_run_that_cannot_go_on_reports_what_it_met",
  "training/scores.py": "test_an_image_too_large_to_score_is_cut",
  "training/stage.py": "test_a_model_of_another_network_is_refused_with_the_settings_that_fit",
}
# Pages and findings.
NO_REMEDIES = {
  "training/fields.py", "training/overrides.py", "prepare.py", "doctor", "recipe_files.py",
}  # fmt: skip


def texts(tree: ast.AST) -> list[str]:
  """The strings of code that are no docstrings; what is put into an f-string is `{}`."""
  found, skipped = [], set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
      skipped.add(id(node.value))
    if isinstance(node, ast.JoinedStr):
      parts = node.values
      skipped |= {id(part) for part in parts}
      found.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts))
  constants = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in skipped)
  return found + [node.value for node in constants if isinstance(node.value, str)]


def test_each_setting_that_an_error_suggests_is_applied_by_a_test():
  suggested, assembled = {}, set()
  for path in sorted((ROOT / "sr_jax").rglob("*.py")):
    module = path.relative_to(ROOT / "sr_jax").as_posix()
    if module in NO_REMEDIES or module.split("/")[0] in NO_REMEDIES:
      continue
    for text in texts(ast.parse(path.read_text())):
      for field in re.findall(r"--config\.([a-z_.]*[a-z_]|\{\})", text):
        if module in PUT_TOGETHER:
          continue
        if "{}" in field:
          assembled.add(module)
        elif (module, field) != ("main.py", "data.batch_size"):  # an example in the help
          suggested.setdefault(module, set()).add(field)
  assert suggested == {module: set(fields) for module, fields in APPLIED.items()}
  assert assembled == {"main.py"}  # the list of all fields
  defined = "".join(path.read_text() for path in (ROOT / "tests").rglob("*_test.py"))
  names = {name for fields in APPLIED.values() for name in fields.values()}
  for name in names | set(PUT_TOGETHER.values()):
    assert f"def {name}(" in defined, name


def remedy(error: Exception, field: str) -> str:
  """The value that an error suggests for a field."""
  return re.search(rf"--config\.{re.escape(field)}=([^\s;,)]+)", str(error))[1]


@pytest.fixture
def pack():
  rng = np.random.default_rng(0)
  return packing.pack_from_arrays([rng.integers(0, 256, (40, 48, 3), np.uint8)] * 3, 4)


def test_a_batch_that_devices_cannot_share(pack):
  mesh = sharding.create_mesh()
  with pytest.raises(UserError) as error:
    sharding.check_batch_size(12, 2, mesh)
  sharding.check_batch_size(int(remedy(error.value, "data.batch_size")), 2, mesh)
  options = dict(lr_patch=8, seed=0, sharding=sharding.batch_sharded(mesh), placement="sharded")
  with pytest.raises(UserError) as error:
    device_input.make_cutter(pack, batch_size=12, **options)
  batch = int(remedy(error.value, "data.batch_size"))
  assert batch == 16
  device_input.make_cutter(pack, batch_size=batch, **options)


def test_a_batch_that_hosts_cannot_share(pack):
  options = dict(lr_patch=8, seed=0, start_step=0, process_index=0, process_count=3)
  with pytest.raises(UserError) as error:
    tf_input.make_tf_input(pack, batch_size=8, **options)
  batch = int(remedy(error.value, "data.batch_size"))
  assert batch == 9
  assert next(iter(tf_input.make_tf_input(pack, batch_size=batch, **options)))["lr"].shape[0] == 3


def test_what_sampling_suggests(pack):
  for field, arguments, name in (
    ("data.detail_draws", (0, 8, 65), "draws"),
    ("seed", (-1, 8, 1), "seed"),
    ("data.hr_patch", (0, 20, 1), "lr_patch"),
  ):
    given = dict(zip(("seed", "lr_patch", "draws"), arguments, strict=True))
    with pytest.raises(UserError) as error:
      sampling.check_pack(pack, **given)
    value = int(remedy(error.value, field))
    sampling.check_pack(pack, **{**given, name: value // 4 if name == "lr_patch" else value})
  with pytest.raises(UserError, match="--config.data.input=tf"):
    sampling.traced_positions(np, np.uint32(0), 2**20, 2**13)


def test_images_that_do_not_fit_devices_are_read_by_tf_data(pack):
  class Device:
    device_kind, process_index = "small", 0

    def memory_stats(self):
      return {"bytes_limit": 10, "bytes_in_use": 0}

  with pytest.raises(UserError) as error:
    device_input.choose_placement(pack.hr.size, [Device()], "auto")
  assert remedy(error.value, "data.input") == "tf"
  options = dict(lr_patch=8, seed=0, start_step=0, process_index=0, process_count=1)
  next(iter(tf_input.make_tf_input(pack, batch_size=8, **options)))


FLAGS = Flags("--config.data.source", "--config.data.lr_source", "--config.scale")


def pairs(folder: pathlib.Path, scale: int) -> tuple[str, str]:
  for name, shape in (("hr", (24 * scale, 16 * scale, 3)), ("lr", (24, 16, 3))):
    write_image(folder / name / "a.png", np.zeros(shape, np.uint8))
  return str(folder / "hr"), str(folder / "lr")


def test_lr_images_of_another_scale_fit_with_it(tmp_path):
  hr, lr = pairs(tmp_path, 2)
  with pytest.raises(UserError) as error:
    sources.open_source(hr, lr, 4, flags=FLAGS)
  source = sources.open_source(hr, lr, int(remedy(error.value, "scale").rstrip(":")))
  assert packing.build_pack(source, 2, str(tmp_path / "cache")).scale == 2


def test_a_pack_of_another_scale_is_taken_with_it(tmp_path):
  hr, _ = pairs(tmp_path, 4)
  packing.write_pack(tmp_path / "pack", sources.open_source(hr, "", 2), 2)
  with pytest.raises(UserError) as error:
    sources.open_source(str(tmp_path / "pack"), "", 4, flags=FLAGS)
  scale = int(remedy(error.value, "scale"))
  assert sources.open_source(str(tmp_path / "pack"), "", scale).pack
  main.read_config("esrgan", [f"--config.scale={scale}"])


def test_another_cache_is_used(tmp_path, monkeypatch):
  hr, _ = pairs(tmp_path, 4)
  source = sources.open_source(hr)
  (tmp_path / "full").write_text("no folder can be made here")
  with pytest.raises(OSError, match="written to by --config.data.cache_dir"):
    packing.build_pack(source, 4, str(tmp_path / "full"))
  packing.build_pack(source, 4, str(tmp_path / "room"))


def test_one_image_is_not_held_out(tmp_path):
  hr, _ = pairs(tmp_path, 4)
  with pytest.raises(UserError) as error:
    hold_out(sources.open_source(hr), 10)
  every = remedy(error.value, "data.hold_out")
  config = main.read_config("esrgan:photos", [f"--config.data.hold_out={every}"])
  assert config.data.hold_out == 0
