"""Tests of benchmarks/train.py, benchmarks/infer.py and what they are made of."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from benchmarks import flops
from benchmarks import infer
from benchmarks import jax_esrgan
from benchmarks import side_by_side
from benchmarks import train
from sr_jax.formats import vgg_weights
from sr_jax.machine import sharding
from sr_jax.networks import vgg

ROOT = pathlib.Path(__file__).resolve().parents[2]
NETWORKS = {
  "generator": {"features": 8, "blocks": 1, "growth": 4},
  "discriminator": 8,
  "vgg": 1 / 16,
}
OTHERS = ("torch", "openvino", "matplotlib")  # what a user need not have


@pytest.fixture(autouse=True)
def light_workers(monkeypatch):
  jax.devices()  # this process keeps the tests' eight
  # Not eight devices, and sooner compiled.
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  monkeypatch.setenv("SR_JAX_ONEDNN", "0")  # whose programs cannot be kept
  monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for one another on a busy machine


@pytest.fixture(
  params=[
    pytest.param("alone", marks=pytest.mark.slow),
    pytest.param("all", marks=pytest.mark.developer(*OTHERS)),
  ]
)
def all_installed(request, monkeypatch) -> bool:
  """Whether PyTorch, OpenVINO and Matplotlib are there; or as where a user has none of them."""
  if request.param == "alone":
    find = side_by_side.has
    monkeypatch.setattr(side_by_side, "has", lambda name: name not in OTHERS and find(name))
  return request.param == "all"


def test_a_quick_training_run_writes_times_and_the_ratios_of_them(tmp_path, capsys, all_installed):
  output = tmp_path / "out" / "train.json"
  steps = ["gan", "psnr"] if all_installed else ["psnr"]
  train.main(["--quick", "--what", ",".join(steps), "--output", str(output)])
  said, content = capsys.readouterr().out, json.loads(output.read_text())
  assert [case["what"] for case in content["cases"]] == steps
  for case in content["cases"]:
    rows = {row["name"]: row for row in case["rows"]}
    assert list(rows) == ["sr_jax float32", "basicsr"]
    ours, theirs = rows.values()
    work = 2 * sum(case["flops_per_image"].values())
    for row in rows.values() if all_installed else [ours]:
      assert "reason" not in row
      first, second = row["seconds_of_rounds"]
      assert row["seconds"] == pytest.approx((first + second) / 2)
      assert row["images_per_second"] * row["seconds"] == pytest.approx(2)
      assert row["tflops"] * row["seconds"] == pytest.approx(work / 1e12)
      assert row["matmul_share"] == pytest.approx(1e12 * row["tflops"] / ours["matmul_flops"])
      assert row["peak_bytes"] > 1e7 and row["cpu_seconds"] > 0 and row["compile_s"] > 0
    # A program that is read is there sooner than one that is compiled.
    assert 0 < ours["cached_compile_s"] < ours["compile_s"]
    if all_installed:
      assert ours["ratios"] == {"basicsr": pytest.approx(theirs["seconds"] / ours["seconds"])}
      assert theirs["ratios"] == {"basicsr": 1}
      assert theirs["parameters"] == ours["parameters"]
    else:
      assert ours["ratios"] == {} and theirs["reason"] == "no torch is installed"
      assert "seconds" not in theirs
  assert all(f"{what} step, batch 2, HR 32, on cpu" in said for what in steps)
  assert ("x basicsr" in said) == all_installed
  assert ("not measured: basicsr: no torch is installed" in said) != all_installed


def test_a_quick_upscaling_run_writes_cases_and_scaling(tmp_path, capsys, all_installed):
  output = tmp_path / "infer.json"
  infer.main(["--quick", "--output", str(output)])
  capsys.readouterr()
  content = json.loads(output.read_text())
  (case,) = content["cases"]
  rows = {row["name"]: row for row in case["rows"]}
  assert list(rows) == ["sr_jax float32", "basicsr", "onnxruntime float32", "openvino float32"]
  missing = [] if all_installed else ["basicsr", "openvino float32"]
  assert [name for name in rows if "reason" in rows[name]] == missing
  for row in rows.values():
    if "reason" in row:
      assert row["reason"] == f"no {row['framework']} is installed"
      continue
    assert row["ns_per_pixel"] == pytest.approx(row["seconds"] * 1e9 / 64**2)
    for name, ratio in row["ratios"].items():
      assert ratio == pytest.approx(rows[name]["seconds"] / row["seconds"])
  ours = [point for point in content["scaling"] if point["row"] == "sr_jax float32"]
  places = [(point["axis"], point["batch_size"], point["size"]) for point in ours]
  assert places == [("batch_size", 1, 8), ("batch_size", 2, 8), ("size", 1, 8), ("size", 1, 16)]
  for point in ours:
    pixels = point["batch_size"] * (4 * point["size"]) ** 2
    assert point["ns_per_pixel"] == pytest.approx(point["seconds"] * 1e9 / pixels)
  assert output.with_suffix(".png").exists() == all_installed


def test_engines_to_time_beside_are_known_ones():
  with pytest.raises(ValueError, match="'tensorrt' must be one of onnxruntime, openvino"):
    infer.main(["--quick", "--engines", "tensorrt"])


@pytest.mark.slow  # architecture_test has the imports
def test_it_imports_where_tensorflow_and_the_recipes_packages_are_not():
  code = """
import sys
for name in ("tensorflow", "tensorflow_datasets", "ml_collections", "clu", "torch"):
  sys.modules[name] = None
from benchmarks import infer, jax_esrgan, train
assert "jax" in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ})


@pytest.mark.parametrize("what", [pytest.param("psnr", marks=pytest.mark.slow), "gan"])
def test_the_timed_program_is_the_one_that_the_recipe_trains_with(what, tmp_path):
  """The same operations in the same order, as text."""
  pytest.importorskip("ml_collections")
  from configs import esrgan
  from configs import esrgan_psnr
  from sr_jax.training.recipe import step_arguments
  from sr_jax.training.stage import open_stage
  from sr_jax.training.step import make_train_step

  recipe = {"psnr": esrgan_psnr, "gan": esrgan}[what]
  config = recipe.get_config("basicsr")
  config.generator.kwargs.update(NETWORKS["generator"])
  config.discriminator.kwargs.features = NETWORKS["discriminator"]
  config.data.hr_patch, config.dtype = 32, "bfloat16"
  stage = open_stage(config, tmp_path)
  params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0), 19, NETWORKS["vgg"]))
  weights = vgg_weights.VGG(params, "torchvision", "vgg19", "shapes") if what == "gan" else None
  batch = jax_esrgan.make_batch(16, 32)
  arguments = batch, params if what == "gan" else None
  step = make_train_step(**step_arguments(config, stage.networks, stage.mesh, weights))
  wanted = step.lower(stage.abstract, *arguments).as_text()

  create_state, step = jax_esrgan.make_train(
    what, NETWORKS, how={}, dtype="bfloat16", hr_patch=32, mesh=sharding.create_mesh()
  )
  assert step.lower(jax.eval_shape(create_state), *arguments).as_text() == wanted


def test_flops_of_a_layer_are_those_of_a_hand_count():
  # 4 x 6 outputs of 5 channels, each a sum over 3 x 3 x 2: 24 * 5 * 18 products and as many sums.
  layer = flops.Layer("conv", 2, 5, height=4, width=6)
  assert flops.flops(layer) == 2 * 24 * 5 * 18
  # Of the 4 rows' 12 taps the first row lacks one and the last, of the 6 columns' 18 taps too.
  assert flops.flops(layer, border=False) == 2 * 10 * 16 * 2 * 5
  # Stride 2, padding 1: 4 x 4 taps, of an 8 x 8 image 4 x 4 outputs.
  assert flops.flops(flops.Layer("conv", 3, 7, 8, 8, kernel=4, stride=2)) == 2 * 16 * 16 * 3 * 7
  assert flops.flops(flops.Layer("linear", 100, 10, 1, 1, kernel=1)) == 2 * 100 * 10


def test_the_count_of_the_full_generator():
  """Kernels times pixels: the body at 32 x 32, one up-convolution at 64, the rest at 128."""
  dense = 9 * (64 * 32 + 96 * 32 + 128 * 32 + 160 * 32 + 192 * 64)
  wide, narrow = 9 * 64 * 64, 9 * 3 * 64
  products = (narrow + 23 * 3 * dense + wide) * 32**2 + wide * 64**2
  products += (2 * wide + narrow) * 128**2
  assert flops.infer_flops(32, 32, train.GENERATOR) == 2 * products


@pytest.mark.developer("torch")
def test_flops_are_those_that_pytorch_counts():
  """Forward passes, and whole steps: BasicSR's has three forward passes of D more."""
  import torch
  from torch.utils import flop_counter
  from benchmarks import torch_esrgan

  def count(run):
    with flop_counter.FlopCounterMode(display=False) as counter:
      run()
    return counter.get_total_flops()

  def total(layers):
    return sum(flops.flops(layer) for layer in layers)

  hr = torch.rand(2, 3, 64, 64)
  g = torch_esrgan.Generator(**NETWORKS["generator"])
  d, v = torch_esrgan.Discriminator(64, 8), torch_esrgan.VGG(1 / 16)
  assert count(lambda: g(hr)) == 2 * flops.infer_flops(64, 64, NETWORKS["generator"])
  assert count(lambda: d(hr)) == 2 * total(flops.discriminator_layers(64, 8))
  assert count(lambda: v(hr)) == 2 * total(flops.vgg_layers(64, 1 / 16))
  for what, extra in (("psnr", 0), ("gan", 3 * 2 * total(flops.discriminator_layers(64, 8)))):
    step, _ = torch_esrgan.make_train_step(what, "basicsr", 2, 64, NETWORKS)
    ours = 2 * sum(flops.train_flops(what, 64, **NETWORKS).values())
    assert count(step) == ours + extra


@pytest.mark.slow  # those that PyTorch counts are compared too
@pytest.mark.parametrize("what", ["psnr", "gan"])
def test_flops_are_those_that_xla_counts(what):
  """Of the compiled program, which has activations, BatchNorm and Adam beside."""
  networks = {
    "generator": {"features": 32, "blocks": 1, "growth": 16},
    "discriminator": 8,
    "vgg": 0.25,
  }
  mesh = sharding.create_mesh(jax.devices()[:1])
  create_state, step = jax_esrgan.make_train(
    what, networks, how={}, dtype="float32", hr_patch=32, mesh=mesh
  )
  params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0), 19, networks["vgg"]))
  program = step.lower(
    jax.eval_shape(create_state), jax_esrgan.make_batch(4, 32), params if what == "gan" else None
  ).compile()
  wanted = program.cost_analysis()["flops"]
  ours = 4 * sum(flops.train_flops(what, 32, **networks, border=False).values())
  assert ours == pytest.approx(wanted, rel=0.05)
  assert ours < wanted


@pytest.mark.developer("torch")
def test_torch_modes_have_their_dtypes_and_run():
  from benchmarks import torch_esrgan

  assert list(torch_esrgan.MODES) == list(side_by_side.TORCH_DTYPES)
  for name, mode in torch_esrgan.MODES.items():
    assert mode.bfloat16 == (side_by_side.TORCH_DTYPES[name] == "bfloat16")
  step, modules = torch_esrgan.make_train_step("gan", "amp", 2, 32, NETWORKS)
  before = {name: [p.clone() for p in net.parameters()] for name, net in modules.items()}
  assert float(step()) > 0
  for name, net in modules.items():  # both networks are updated
    assert any((p != q).any() for p, q in zip(net.parameters(), before[name], strict=True)), name


@pytest.mark.developer("torch")
def test_pytorchs_step_of_d_is_the_same_with_five_forward_passes_and_with_four(monkeypatch):
  """`compile` makes one program of D's loss; the update is BasicSR's all the same."""
  import torch
  from benchmarks import torch_esrgan

  monkeypatch.setattr(torch, "compile", lambda f, mode: f)
  modes = {"five": torch_esrgan.Mode(), "four": torch_esrgan.Mode(compile="as it is")}
  monkeypatch.setattr(torch_esrgan, "MODES", modes)
  parameters = {}
  for mode in modes:
    torch.manual_seed(0)
    step, modules = torch_esrgan.make_train_step("gan", mode, 2, 32, NETWORKS)
    step()
    grads = [p.grad for net in modules.values() for p in net.parameters()]
    parameters[mode] = torch.cat([grad.flatten() for grad in grads])
  torch.testing.assert_close(parameters["four"], parameters["five"], rtol=1e-4, atol=1e-6)


@pytest.mark.developer("torch")
def test_ours_and_pytorchs_networks_have_as_many_parameters():
  """Of full width, without drawing them: the published counts."""
  import torch
  from benchmarks import torch_esrgan

  with torch.device("meta"):
    nets = torch_esrgan.Generator(), torch_esrgan.Discriminator(128)
  counts = [sum(p.numel() for p in net.parameters()) for net in nets]
  assert counts == [16_697_987, 14_499_401]


def test_a_worker_says_what_went_wrong_and_goes_on():
  row = {"name": "x", "framework": "jax", "dtype": "float32", "generator": {"dens": 1}}
  worker = side_by_side.Worker(row)
  case = {"what": "infer", "batch_size": 1, "size": 8, "networks": NETWORKS}
  answer = worker.ask(case=case, seconds=0.01)
  assert "generator 'rrdbnet' has no field 'dens'" in answer["error"]
  assert "error" in worker.ask(case={**case, "what": "nothing"}, seconds=0.01)
  worker.process.terminate()
  worker.process.wait()
  assert "its process ended with status -15" in worker.ask(round=True)["error"]
  worker.close()


def test_a_result_that_is_not_finite_has_no_time():
  with pytest.raises(FloatingPointError, match="the result is nan"):
    side_by_side.time_steps(lambda count: float("nan"), 1)


def test_generator_fields_are_parsed_and_two_ways_make_two_rows():
  default = train.GENERATOR
  ways = ["blocks=6,remat=true", "blocks=6,dense=by_source"]
  parsed = side_by_side.parse_generators(ways, default)
  assert parsed == [
    {"features": 64, "blocks": 6, "growth": 32, "remat": True},
    {"features": 64, "blocks": 6, "growth": 32, "dense": "by_source"},
  ]
  names = [row["name"] for row in side_by_side.jax_rows(["bfloat16"], parsed, default)]
  assert names == ["sr_jax bfloat16 remat=True", "sr_jax bfloat16 dense=by_source"]


def test_rows_once_more_in_another_environment():
  plain, row = side_by_side.jax_rows(["float32"], [{}], {}, ["JAX_PLATFORMS=nonsense"])
  assert plain["name"] == "sr_jax float32" and "environment" not in plain
  assert row["name"] == "sr_jax float32 JAX_PLATFORMS=nonsense"
  worker = side_by_side.Worker(row)
  case = {"what": "psnr", "batch_size": 1, "hr_patch": 32, "networks": NETWORKS}
  assert "nonsense" in worker.ask(case=case, seconds=0.01)["error"]
  worker.close()


def test_rows_once_more_without_the_guard(monkeypatch):
  measured = []
  monkeypatch.setattr(side_by_side, "measure", lambda rows, *_, **__: measured.extend(rows) or rows)
  monkeypatch.setattr(side_by_side, "add_summary", lambda *_: None)
  monkeypatch.setattr(train, "print_case", lambda case: None)
  monkeypatch.setattr(side_by_side, "check_measured", lambda cases: None)
  monkeypatch.setattr(side_by_side, "write_json", lambda path, contents: None)
  train.main(["--unguarded", "--what", "psnr", "--dtype", "float32", "--torch", "none"])
  assert [row["name"] for row in measured] == ["sr_jax float32", "sr_jax float32 unguarded"]
  for row, guarded in zip(measured, (True, False), strict=True):
    create_state, _ = jax_esrgan.make_train(
      "psnr", NETWORKS, how={}, dtype="float32", hr_patch=32,
      mesh=sharding.create_mesh(jax.devices()[:1]), guarded=row.get("guarded", True),
    )  # fmt: skip
    assert (jax.eval_shape(create_state).guard is not None) == guarded


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--generator", "scale=2"], "'scale=2' must be FIELD=VALUE"),
    (["--environment", "XLA_FLAGS"], "--environment=XLA_FLAGS must be NAME=VALUE"),
    (["--generator", "blocks"], "'blocks' must be FIELD=VALUE"),
    (["--generator", "blocks=6", "--generator", "blocks=7"], "must agree in features, blocks"),
    (["--dtype", "float16"], "'float16' must be one of float32, bfloat16"),
    (["--torch", "jit"], "'jit' must be one of basicsr"),
    (["--batch_size", "0"], "--batch_size=0 must be numbers from 1 on"),
    (["--hr_patch", "100"], "hr_patch=100 must be a multiple of 32"),
    (["--hr_patch", "102"], "hr_patch=102 must be a multiple of 4; try 104"),
  ],
)
def test_what_cannot_be_measured_is_refused(argv, message, monkeypatch):
  monkeypatch.setattr(side_by_side, "measure", lambda *_, **__: pytest.fail("it was measured"))
  with pytest.raises(ValueError, match=message):
    train.main(["--torch", "none", *argv])


def test_a_sweep_ends_before_it_takes_too_long(monkeypatch):
  """A worker that takes a microsecond for an LR pixel."""

  class Worker:
    def __init__(self, row):
      pass

    def ask(self, **request):
      if "case" in request:
        self.case = request["case"]
      return {"seconds": 1e-6 * self.case["batch_size"] * self.case["size"] ** 2}

    def close(self):
      pass

  monkeypatch.setattr(side_by_side, "Worker", Worker)
  sweeps = [("size", (10, 100, 1000, 2000, 4000), 1), ("batch_size", (1, 2), 10)]
  points = infer.scale([{"name": "a"}], {}, sweeps, rounds=1, seconds=1, limit=3)
  sizes = [(point["size"], point.get("seconds")) for point in points if point["axis"] == "size"]
  assert sizes == [(10, pytest.approx(1e-4)), (100, pytest.approx(1e-2)), (1000, pytest.approx(1)),
                   (2000, None)]  # fmt: skip
  assert "--limit=3" in points[3]["reason"]
  assert [point["batch_size"] for point in points if point["axis"] == "batch_size"] == [1, 2]


@pytest.mark.developer("matplotlib")
def test_the_picture_is_drawn(tmp_path):
  points = [
    {"row": "a", "axis": axis, "batch_size": n, "size": 8, "seconds": 0.1 * n, "ns_per_pixel": 5.0}
    for axis in ("batch_size", "size")
    for n in (1, 2)
  ]
  infer.draw(points, {"rows": [{"device": "cpu"}]}, tmp_path / "picture.png")
  assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_bfloat16_rows_take_the_share_of_bfloat16s_matmul():
  rows = [
    {"name": "a", "framework": "jax", "dtype": "float32", "seconds": 2.0, "matmul_flops": 4e12},
    {"name": "b", "framework": "jax", "dtype": "bfloat16", "seconds": 1.0, "matmul_flops": 8e12},
    {"name": "amp", "framework": "torch", "dtype": "bfloat16", "seconds": 4.0},
    {"name": "basicsr", "framework": "torch", "dtype": "float32", "reason": "no torch"},
  ]
  side_by_side.add_summary(rows, 16, int(2e12))
  assert [row.get("matmul_share") for row in rows] == [0.25, 0.25, 0.0625, None]
  assert [row.get("ratios") for row in rows] == [{"amp": 2}, {"amp": 4}, {"amp": 1}, None]
  assert [row.get("images_per_second") for row in rows] == [8, 16, 4, None]


def test_numbers_have_three_digits():
  cells = [side_by_side.number(value) for value in (None, 0, 12345.6, 9.996, 1.234, 0.00012345)]
  assert cells == ["-", "0", "12,300", "10.0", "1.23", "0.000123"]
