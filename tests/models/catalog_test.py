"""Tests of sr_jax/models/catalog.py: names stand for verified files."""

import ast
import json
import re

import numpy as np
import pytest

from sr_jax import recipe_files
from sr_jax import upscale
from sr_jax.images.files import read_image, write_image
from sr_jax.models import catalog
from sr_jax.models.read import load_model, read_model
from sr_jax.models.write import save_model
from tiny_models import make_model

FOLDER = catalog.folder()


@pytest.fixture
def other_folder(tmp_path, monkeypatch):
  """A catalog of one model, 'small', in a folder of the test's own."""
  folder = tmp_path / "shipped"
  save_model(folder / "small.safetensors", make_model("rrdbnet", scale=2))
  sha256 = catalog.sha256(folder / "small.safetensors")
  entry = {"file": "small.safetensors", "sha256": sha256, "license": "", "what": ""}
  (folder / "manifest.json").write_text(json.dumps({"models": {"small": entry}}))
  monkeypatch.setattr(catalog, "FOLDERS", (folder,))
  return folder


def test_what_comes_with_sr_jax_is_whole_and_has_a_card():
  models = catalog.manifest()
  assert {"srresnet", "srgan"} <= set(models)
  for name, entry in models.items():
    assert not catalog.damage(FOLDER / entry["file"], entry["sha256"])
    card = (FOLDER / f"{name}.md").read_text()
    assert entry["license"] in card and entry["sha256"] in card
    assert f"({name}.md)" in (FOLDER / "README.md").read_text()
  assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 30e6
  named = {entry["file"] for entry in models.values()}
  assert named == {path.name for path in FOLDER.glob("*.safetensors")}


def test_a_name_is_a_model_wherever_one_is_asked_for(other_folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  module, _ = load_model("small")
  assert module.scale == 2
  write_image(tmp_path / "a.png", np.full((9, 8, 3), 200, np.uint8))
  upscale.main(["--model", "small", "--input", "a.png", "--output", "out", "--engine", "jax"])
  assert read_image(tmp_path / "out" / "a.png").shape == (18, 16, 3)


def test_what_lies_in_the_current_folder_comes_first(other_folder, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "small").mkdir()
  with pytest.raises(FileNotFoundError, match="small has no config.json"):
    read_model("small")


def test_a_damaged_or_missing_model_is_refused_and_an_unknown_one_named(other_folder):
  file = other_folder / "small.safetensors"
  data = bytearray(file.read_bytes())
  data[-1] ^= 1
  file.write_bytes(data)
  with pytest.raises(ValueError, match="'small' that comes with sr_jax is damaged: .*git checkout"):
    read_model("small")
  file.unlink()
  with pytest.raises(ValueError, match="'small' that comes with sr_jax is missing: "):
    read_model("small")
  with pytest.raises(FileNotFoundError, match="or one of the models that come with sr_jax: small"):
    read_model("smal")


def test_a_list_that_cannot_be_read_is_said(other_folder):
  (other_folder / "manifest.json").write_text("{")
  with pytest.raises(ValueError, match="manifest.json cannot be read .*git checkout models"):
    read_model("small")


def test_without_the_folder_names_are_paths(monkeypatch, tmp_path):
  monkeypatch.setattr(catalog, "FOLDERS", (tmp_path / "nowhere",))
  with pytest.raises(FileNotFoundError) as error:
    read_model("srgan")
  assert re.fullmatch("srgan does not exist; give a run's folder or a model file", str(error.value))


@pytest.mark.parametrize("recipe", recipe_files.names())
def test_recipes_start_from_models_that_are_there(recipe):
  """Every variant that a recipe's docstring lists; '' is a fresh network."""
  path, _ = recipe_files.find(recipe)
  listed = re.findall(r"^  (\w+): ", ast.get_docstring(ast.parse(path.read_text())), re.MULTILINE)
  for variant in ("", *listed):
    config = recipe_files.load(path, variant)
    assert not config.init_from or catalog.find(config.init_from), (recipe, variant)
