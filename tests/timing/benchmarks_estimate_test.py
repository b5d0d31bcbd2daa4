"""Tests of benchmarks/estimate.py: how the compiler's estimates are read and summed."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import estimate
from sr_jax import UserError
from sr_jax.machine import sharding
from sr_jax.networks import vgg

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Where `make test-developer` puts TPU's compiler.
LIBRARY = pathlib.Path(sys.prefix, "tpu", "libtpu", "libtpu.so")

# A loop of 12 turns around a convolution, one of 3 by its condition alone, a choice, a copy.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused_conv (p: bf16[2,4], q: bf16[4,4]) -> bf16[2,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  %q = bf16[4,4]{1,0} parameter(1)
  ROOT %d = bf16[2,4]{1,0} convolution(%p, %q), dim_labels=bf_io->bf
}

%body (x: bf16[2,4]) -> bf16[2,4] {
  %x = bf16[2,4]{1,0:T(8,128)} parameter(0)
  %k = bf16[4,4]{1,0} constant({...})
  %a = bf16[2,4]{1,0} fusion(%x, %k), kind=kOutput, calls=%fused_conv, metadata={op_name="jit(f)/Net/while/body/conv1/conv_general_dilated"}, backend_config={"estimated_cycles":"10"}
  ROOT %b = bf16[2,4]{1,0} copy(%a)
}

%condition (x: bf16[2,4]) -> pred[] {
  ROOT %c = pred[] constant(true)
}

%short (y: f32[2]) -> f32[2] {
  ROOT %s = f32[2]{0} fusion(%y), kind=kLoop, backend_config={"estimated_cycles":"100"}
}

%counted (y: f32[2]) -> pred[] {
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%dear (x: f32[2]) -> f32[2] {
  ROOT %e = f32[2]{0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"7"}
}

%cheap (x: f32[2]) -> f32[2] {
  ROOT %g = f32[2]{0} fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"5"}
}

ENTRY %main (x: bf16[2,4], y: f32[2]) -> f32[2] {
  %x = bf16[2,4]{1,0} parameter(0)
  %y = f32[2]{0} parameter(1)
  %w = bf16[2,4]{1,0} while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"12"}}
  %v = f32[2]{0} while(%y), condition=%counted, body=%short
  %h = f32[2]{0} conditional(%p, %v, %v), branch_computations={%dear, %cheap}
  ROOT %f = f32[2]{0} fusion(%h), kind=kLoop, backend_config={"estimated_cycles":"1"}
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run_and_of_a_choice_the_dearest():
  summed = estimate.sum_up(PROGRAM, "v5e", operations=10**6)
  assert summed["estimated_cycles"] == {"convolutions": 12 * 10, "sum": 12 * 10 + 3 * 100 + 7 + 1}
  # 1.5 cycles a nanosecond; 197,000 operations a nanosecond are the peak.
  assert summed["estimated_ms"]["convolutions"] == pytest.approx(80e-6)
  low, high = summed["estimated_mfu"]
  assert high == pytest.approx(1e6 / 80 / 197e3) and low == pytest.approx(high * 120 / 428)
  # The copy reads and writes 2 x 4 numbers of 2 bytes in each turn.
  assert summed["bytes_by_operation"] == {"copy": 12 * 2 * 16}
  assert summed["bytes_without_estimate"] == 384 and summed["loops_of_unknown_length"] == 0
  first, second, *_ = summed["dearest"]
  assert first["cycles"] == 308 and not first["convolves"] and first["share"] == 308 / 428
  assert second["name"] == "Net/conv1/conv_general_dilated" and second["convolves"]
  assert second["times"] == 12


def test_what_is_written_in_another_way_means_the_same():
  two = PROGRAM.replace("branch_computations={%dear, %cheap}",
                        "true_computation=%cheap, false_computation=%dear")  # fmt: skip
  assert estimate.sum_up(two, "v5e")["estimated_cycles"]["sum"] == 428
  unknown = PROGRAM.replace("constant(3)", "parameter(3)")
  summed = estimate.sum_up(unknown, "v5e")
  assert summed["loops_of_unknown_length"] == 1
  assert summed["estimated_cycles"]["sum"] == 428 - 2 * 100


@pytest.mark.parametrize(
  "types, expected",
  [
    ("f32[2,3]{1,0:T(8,128)}", 24),
    ("(bf16[4]{0}, pred[3], u8[5])", 16),
    ("s4[8]", 4),
    ("f8e4m3fn[7]", 7),
    ("f32[]", 4),
    ("token[]", 0),
  ],
)
def test_bytes_of_types(types, expected):
  assert estimate.size(types) == expected


@pytest.mark.parametrize(
  "convolutions, total, memory, pays",
  [
    (90, 90, 100, True),
    (90, 100, 100, True),
    (90, 101, 100, False),
    (100, 100, 100, False),
    (102, 102, 66, True),
    (103, 90, 66, False),
    (102, 102, 67, False),
    (102, 102, 0, True),
  ],
)
def test_what_pays_by_the_count(convolutions, total, memory, pays):
  def figures(convolutions, total, memory):
    cycles = {"convolutions": 1000 * convolutions, "sum": 1000 * total}
    return {"estimated_cycles": cycles, "temporary_bytes": memory}

  found = estimate.verdict(figures(100, 100, 100), figures(convolutions, total, memory))
  assert found["pays"] is pays
  assert found["sum"] == pytest.approx(total / 100)
  # A program that needed no memory before cannot need less.
  small = estimate.verdict(figures(100, 100, 0), figures(convolutions, total, 0))
  assert small["pays"] is (convolutions < 100 and total <= 100)


def test_the_critics_are_the_gan_step_without_its_generator():
  """Gradients of the SR images and of the discriminator's parameters."""
  networks = {"discriminator": 4, "vgg": 1 / 16}
  shape = (2, 32, 32, 3)
  mesh = sharding.create_mesh([jax.devices()[0]])
  variables, gradients = estimate.gradients_of_critics(shape, networks, "float32", mesh)
  image = jax.ShapeDtypeStruct(shape, "float32")
  vgg_params = jax.eval_shape(lambda: vgg.init_vgg(jax.random.key(0), 19, networks["vgg"]))
  params, stats = variables["params"], variables["batch_stats"]
  of_sr, of_params = jax.eval_shape(gradients, image, params, stats, image, vgg_params)
  assert of_sr["sr"].shape == shape
  assert jax.tree.map(jnp.shape, of_params) == jax.tree.map(jnp.shape, params)


def test_an_unknown_revision_is_refused():
  with pytest.raises(UserError, match="--against=no-such-revision: git cannot read it .*HEAD"):
    estimate.estimate_at("no-such-revision", [])


@pytest.mark.developer
def test_tpus_compiler_estimates_a_tiny_network_now_and_at_a_revision(tmp_path):
  """The sum is that of a plain reading of the program's lines, as nothing in it runs twice."""
  if not (LIBRARY.is_file() or "TPU_LIBRARY_PATH" in os.environ):
    pytest.skip(f"TPU's compiler, the package libtpu, is not at {LIBRARY}")
  output = tmp_path / "estimate.json"
  command = [sys.executable, "-m", "benchmarks.estimate", "--quick", "--what", "forward",
             "--chip", "v5e", "--batch_size", "2", "--size", "16", "--output", str(output),
             "--program", str(tmp_path / "program.txt")]  # fmt: skip
  in_git = (ROOT / ".git").exists()
  command += ["--against=HEAD"] if in_git else []
  done = subprocess.run(
    command, cwd=ROOT, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(output.read_text())
  assert done.stdout.startswith("ESTIMATE of TPU's compiler, not measured: forward")
  assert 0 < found["estimated_cycles"]["convolutions"] <= found["estimated_cycles"]["sum"]
  program = (tmp_path / "program.txt").read_text()
  entry = program[program.index("\nENTRY") :]
  plain = sum(int(number) for number in re.findall(r'"estimated_cycles":"?(\d+)', entry))
  loop = found["estimated_cycles"]["sum"] - plain
  assert loop >= 0 and (" while(" in program or loop == 0)
  low, high = found["estimated_mfu"]
  assert 0 < low <= high < 1
  assert 0.5 < found["calibration"]["share_of_peak"] < 1.1
  assert 0 < len(found["dearest"]) <= 20 and found["held_bytes"] > 0
  if in_git:
    assert found["change"]["sum"] > 0 and "before, at HEAD" in done.stdout
