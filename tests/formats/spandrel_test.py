"""Files go from PyTorch through sr_jax to spandrel, which computes what PyTorch and we compute.

spandrel is what chaiNNer and ComfyUI read models with. The modules that write the files are
torch_references.py's and, for the first ESRGAN's names, spandrel's own.
"""

import importlib.machinery
import sys
import types

import jax
import numpy as np
import pytest
import safetensors.numpy

from sr_jax.formats import state_dicts
from sr_jax.models.model import Model
from sr_jax.models.read import read_model
from sr_jax.models.write import save_model
from sr_jax.networks.build import GENERATORS

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.developer("einops", "spandrel", "torch")


class NoTorchvision:
  """An import finder that answers every torchvision.* with an empty module.

  spandrel imports torchvision at its top; ESRGAN needs nothing of it.
  """

  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] == "torchvision":
      return importlib.machinery.ModuleSpec(name, self, is_package=True)
    return None

  def create_module(self, spec):
    module = types.ModuleType(spec.name)
    module.__getattr__ = lambda attribute: type(attribute, (), {})
    return module

  def exec_module(self, module):
    pass


@pytest.fixture(scope="module")
def spandrel():
  before = set(sys.modules)
  finder = NoTorchvision()
  sys.meta_path.insert(0, finder)
  import spandrel

  yield spandrel
  sys.meta_path.remove(finder)
  for name in set(sys.modules) - before:
    if name.split(".")[0] in ("torchvision", "spandrel"):
      del sys.modules[name]


def our_module(**kwargs):
  import torch_references

  return torch_references.ESRGAN(**kwargs)


def old_module(scale, blocks=1):
  from spandrel.architectures.ESRGAN import ESRGAN

  return ESRGAN(num_filters=16, num_blocks=blocks, scale=scale)


SMALL = {"features": 16, "blocks": 1, "growth": 32}
# What is written: the module, the dtype of its weights, the file's suffix, what wraps the weights;
# and what is to be found in it.
VARIANTS = {
  "x4": (
    lambda: our_module(**{**SMALL, "blocks": 2}), "float32", ".safetensors", "",
    {"scale": 4, "blocks": 2}, "basicsr",
  ),
  "x2 by up-convolution": (
    lambda: our_module(**SMALL, ups=1), "float32", ".safetensors", "",
    {"scale": 2, "input_unshuffle": 1}, "basicsr",
  ),
  "x2 by unshuffle": (
    lambda: our_module(**SMALL, unshuffle=2), "float32", ".pth", "params_ema",
    {"scale": 2, "input_unshuffle": 2}, "basicsr",
  ),
  "x1 by unshuffle": (
    lambda: our_module(**SMALL, unshuffle=4), "float32", ".pth", "params",
    {"scale": 1, "input_unshuffle": 4}, "basicsr",
  ),
  "x1 without up-convolutions": (
    lambda: our_module(**SMALL, ups=0), "float32", ".pth", "",
    {"scale": 1, "input_unshuffle": 1}, "basicsr",
  ),
  "x8": (
    lambda: our_module(**SMALL, ups=3), "float32", ".pth", "state_dict",
    {"scale": 8}, "basicsr",
  ),
  "grey": (
    lambda: our_module(**SMALL, channels=1), "float32", ".safetensors", "",
    {"scale": 4, "out_channels": 1, "input_unshuffle": 1}, "basicsr",
  ),
  "grey x2 by unshuffle": (
    lambda: our_module(**SMALL, channels=1, unshuffle=2), "float32", ".safetensors", "",
    {"scale": 2, "out_channels": 1, "input_unshuffle": 2}, "basicsr",
  ),
  "32 features": (
    lambda: our_module(**{**SMALL, "features": 32}), "float32", ".pth", "model",
    {"scale": 4, "features": 32}, "basicsr",
  ),
  "old x4": (lambda: old_module(4, 2), "float32", ".pth", "", {"scale": 4, "blocks": 2}, "old"),
  "old x2": (lambda: old_module(2), "float32", ".safetensors", "", {"scale": 2}, "old"),
  "old x1": (lambda: old_module(1), "float32", ".pth", "", {"scale": 1}, "old"),
  "old x8": (lambda: old_module(8), "float16", ".safetensors", "", {"scale": 8}, "old"),
  "RRDB_trunk": (
    lambda: our_module(**SMALL, names="rrdb_trunk"), "float32", ".pth", "module",
    {"scale": 4}, "rrdb_trunk",
  ),
  "RRDB_trunk x2": (
    lambda: our_module(**SMALL, ups=1, names="rrdb_trunk"), "float32", ".safetensors", "",
    {"scale": 2}, "rrdb_trunk",
  ),
  "float16": (
    lambda: our_module(**SMALL), "float16", ".pth", "params-ema", {"scale": 4}, "basicsr",
  ),
  "bfloat16": (
    lambda: our_module(**SMALL), "bfloat16", ".pth", "params_ema", {"scale": 4}, "basicsr",
  ),
}  # fmt: skip


def write(path, state, wrapper):
  """Writes a torch state dict as other programs do."""
  if path.suffix == ".safetensors":
    from safetensors.torch import save_file

    save_file(state, path)
  elif wrapper == "module":
    torch.save({f"module.{key}": tensor for key, tensor in state.items()}, path)
  else:
    torch.save({wrapper: state, "iter": 7} if wrapper else state, path)


def run_torch(module, lr):
  with torch.no_grad():
    return module.eval()(torch.tensor(lr).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def run_ours(name, kwargs, variables, lr):
  net = GENERATORS[name](**kwargs)
  return np.asarray(jax.jit(lambda v, lr: net.apply(v, lr, train=False))(variables, lr))


def relative_error(actual, expected):
  assert actual.shape == expected.shape
  return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_torch_to_spandrel(spandrel, tmp_path, variant):
  make, dtype, suffix, wrapper, expected_kwargs, dialect = VARIANTS[variant]
  torch.manual_seed(0)
  module = make()
  with torch.no_grad():  # or the innermost blocks, scaled by 0.2 twice, would hardly be seen
    for parameter in module.parameters():
      parameter.mul_(2)
  module = module.to(getattr(torch, dtype))
  write(tmp_path / f"in{suffix}", module.state_dict(), wrapper)
  module = module.float()

  model = read_model(tmp_path / f"in{suffix}")
  name, kwargs, variables, info = model
  assert name == "rrdbnet"
  assert {key: kwargs[key] for key in expected_kwargs} == expected_kwargs
  assert info["file"] == {"dialect": dialect, "wrapper": wrapper, "dtype": dtype}

  channels = kwargs["out_channels"]
  lr = np.random.default_rng(1).uniform(size=(1, 12, 16, channels)).astype(np.float32)
  original, ours = run_torch(module, lr), run_ours(name, kwargs, variables, lr)
  assert state_dicts.spandrel_objection(name, kwargs) is None
  save_model(tmp_path / "out.safetensors", model)
  exported = safetensors.numpy.load_file(tmp_path / "out.safetensors")
  descriptor = spandrel.ModelLoader().load_from_file(tmp_path / "out.safetensors")
  assert (descriptor.scale, descriptor.output_channels) == (kwargs["scale"], channels)
  theirs = run_torch(descriptor.model, lr)
  errors = {
    "ours to the original": relative_error(ours, original),
    "ours to spandrel": relative_error(ours, theirs),
    "spandrel to the original": relative_error(theirs, original),
  }
  print(variant, errors)
  assert max(errors.values()) < 1e-4, errors

  # Bit by bit what was in the file; which array has which name dialects_test.py compares.
  arrays = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
  if dialect == "basicsr":
    assert set(arrays) == set(exported)
    for key, array in arrays.items():
      np.testing.assert_array_equal(exported[key], array)
  else:
    assert sorted(a.tobytes() for a in arrays.values()) == sorted(
      a.tobytes() for a in exported.values()
    )


@pytest.mark.parametrize(
  "name, kwargs, in_channels, message",
  [
    ("srresnet", {}, 3, "spandrel knows no srresnet"),
    ("msrresnet", {}, 3, "spandrel knows no msrresnet"),
    ("residualnet", {}, 3, "spandrel knows no residualnet"),
    *(("compact", {"scale": scale}, 3, None) for scale in (1, 2, 3, 4, 8)),
    ("compact", {"scale": 2, "out_channels": 1}, 1, None),
    ("rrdbnet", {"growth": 16}, 3, "growth=32, this one has 16"),
    ("rrdbnet", {"residual_scale": 0.3}, 3, "residual_scale=0.2, this one has 0.3"),
    ("rrdbnet", {"scale": 3}, 3, "takes an x3 ESRGAN of sr_jax for an x1"),
    ("rrdbnet", {"out_channels": 1}, 4, "this one sees 4, with input_unshuffle=1"),
    ("rrdbnet", {"out_channels": 1, "scale": 1}, 4, "this one sees 4, with input_unshuffle=1"),
    (
      "rrdbnet",
      {"out_channels": 1, "scale": 2, "input_unshuffle": 2},
      3,
      "this one sees 12, with input_unshuffle=2",
    ),
    # None: spandrel computes the same.
    ("rrdbnet", {}, 3, None),
    ("rrdbnet", {"out_channels": 1}, 3, None),
    ("rrdbnet", {"scale": 4, "input_unshuffle": 2}, 3, None),
    ("rrdbnet", {"scale": 1, "input_unshuffle": 2}, 3, None),
    ("rrdbnet", {"scale": 2, "input_unshuffle": 4}, 3, None),
    ("rrdbnet", {"scale": 1}, 3, None),
  ],
)
def test_objections_are_true(spandrel, tmp_path, name, kwargs, in_channels, message):
  kwargs = {"features": 8, "blocks": 1, **kwargs}
  net = GENERATORS[name](**kwargs)
  rng = np.random.default_rng(2)
  lr = rng.uniform(size=(1, 12, 16, in_channels)).astype(np.float32)
  in_channels = None if in_channels == net.out_channels else in_channels
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), lr, train=False))
  variables = jax.tree.map(
    lambda leaf: rng.normal(scale=0.1, size=leaf.shape).astype(np.float32), shapes
  )
  model = Model(name, {"scale": 4, **kwargs}, variables, {})
  save_model(tmp_path / "out.safetensors", model)
  objection = state_dicts.spandrel_objection(name, kwargs, in_channels=in_channels)
  try:
    model = spandrel.ModelLoader().load_from_file(tmp_path / "out.safetensors").model
    theirs = run_torch(model, lr)
  except (RuntimeError, spandrel.UnsupportedModelError):
    theirs = None
  ours = run_ours(name, kwargs, variables, lr)
  same = theirs is not None and theirs.shape == ours.shape and relative_error(ours, theirs) < 1e-4
  print(name, kwargs, "refused" if theirs is None else theirs.shape, same)
  if message is None:
    assert objection is None and same
  else:
    assert message in objection and objection.endswith("write .onnx for other programs instead")
    assert not same


def test_published_weights_reach_spandrel(spandrel, shared, tmp_path):
  path = shared / "weights" / "realesrgan_x4plus_anime_f16.npz"
  model = read_model(path)
  assert model.info["file"]["dialect"] == "basicsr"
  save_model(tmp_path / "out.safetensors", model)
  state, exported = np.load(path), safetensors.numpy.load_file(tmp_path / "out.safetensors")
  assert set(exported) == set(state)
  for key, array in state.items():
    np.testing.assert_array_equal(exported[key], array.astype(np.float32))
  lr = np.random.default_rng(1).uniform(size=(1, 8, 8, 3)).astype(np.float32)
  theirs = spandrel.ModelLoader().load_from_file(tmp_path / "out.safetensors").model
  ours = run_ours(model.name, model.kwargs, model.variables, lr)
  assert relative_error(ours, run_torch(theirs, lr)) < 1e-4


@pytest.mark.parametrize("blocks", [16, 32])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_compact_is_spandrels_there_and_back(spandrel, tmp_path, scale, blocks):
  """spandrel's own module, of full depth, to its file, through ours and back."""
  from spandrel.architectures.Compact import Compact

  torch.manual_seed(scale)
  module = Compact(num_feat=16, num_conv=blocks, upscale=scale)
  with torch.no_grad():  # so that neither the slopes nor the body are lost beside the LR image
    for name, parameter in module.named_parameters():
      if parameter.ndim == 1 and not name.endswith("bias"):
        parameter.uniform_(0.05, 0.9)
      else:
        parameter.mul_(1.6)
  torch.save({"params": module.state_dict()}, tmp_path / "in.pth")

  model = read_model(tmp_path / "in.pth")
  assert model.name == "compact"
  assert model.kwargs == {"features": 16, "blocks": blocks, "scale": scale, "out_channels": 3}
  lr = np.random.default_rng(3).uniform(size=(1, 9, 14, 3)).astype(np.float32)
  theirs = run_torch(module, lr)
  assert np.abs(theirs - lr.mean()).std() > 0.05
  assert relative_error(run_ours(*model[:3], lr), theirs) < 1e-5

  save_model(tmp_path / "out.safetensors", model)
  exported = safetensors.numpy.load_file(tmp_path / "out.safetensors")
  arrays = {key: tensor.numpy() for key, tensor in module.state_dict().items()}
  assert set(arrays) == set(exported)
  for key, array in arrays.items():
    np.testing.assert_array_equal(exported[key], array)
  descriptor = spandrel.ModelLoader().load_from_file(tmp_path / "out.safetensors")
  assert (descriptor.architecture.id, descriptor.scale) == ("Compact", scale)
  assert relative_error(run_torch(descriptor.model, lr), theirs) < 1e-6
