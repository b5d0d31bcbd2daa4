"""Tests of images/names.py: names of outputs."""

from hypothesis import given, strategies
import pytest

from sr_jax.images.names import output_name

PNG, JPG = (".png", ".apng"), (".jpg", ".jpeg")


@pytest.mark.parametrize(
  ("name", "suffixes", "addition", "expected"),
  [
    ("a.png", PNG, "", "a.png"),
    ("a.PNG", PNG, "", "a.PNG"),
    ("a.jpg", PNG, "", "a.jpg.png"),
    ("a.jpg", JPG, "", "a.jpg"),
    ("a.jpg.png", PNG, "", "a.jpg.png.png"),
    ("sub/b.tif", PNG, "", "sub/b.tif.png"),
    ("holiday 1.v2.png", PNG, "", "holiday 1.v2.png"),
    ("a.png", PNG, "_x4", "a_x4.png"),
    ("a.jpg", PNG, "_x4", "a.jpg_x4.png"),
    ("ä.png", PNG, "", "ä.png"),
    (".hidden.png", PNG, "", ".hidden.png"),
  ],
)
def test_names(name, suffixes, addition, expected):
  assert output_name(name, suffixes, addition) == expected


@pytest.mark.parametrize(
  "name",
  ["con.png", "NUL.tar.png", "lpt1", "sub/aux/a.png", "a?.png", "a\n.png", "x" * 300 + ".png"]
  + ["ü" * 200 + ".jpg", "trailing. ", "no suffix", "photo.v1", "com¹.png"],
)
def test_changed_names_are_marked_and_legal(name):
  result = output_name(name, PNG, "_x4")
  assert "~" in result and result != output_name(name + "x", PNG, "_x4")
  for part in result.split("/"):
    assert len(part.encode()) <= 255 and not set(part) & set('<>:"|?*\n')
    assert part.split(".")[0].strip().lower() not in ("con", "nul", "lpt1", "aux", "com¹")
    assert part == part.rstrip(". ")


PARTS = strategies.sampled_from(
  ["a", "b", ".png", ".jpg", ".PNG", ".v1", "~", " ", "con", "_x4", "?"]
)


@given(strategies.lists(strategies.lists(PARTS, min_size=1, max_size=5), min_size=2, max_size=6))
def test_no_two_names_meet(parts):
  names = {"".join(p) for p in parts}
  assert len({output_name(name, PNG, "_x4") for name in names}) == len(names)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "..\\a.png"])
def test_no_name_leads_out(name):
  parts = output_name(name, PNG).split("/")
  assert ".." not in parts and "" not in parts
