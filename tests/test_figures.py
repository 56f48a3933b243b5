"""The site's figures: what is committed is what the package computes."""

import re
import runpy
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from fenced import ROOT

from cacheaug.augment import dense_masks, drawing, traces
from cacheaug.augment.traces import Layout

_SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def script():
  return runpy.run_path(str(ROOT / "docs" / "figures.py"))


def test_committed_figures_are_todays(script):
  drawn = script["figures"]()
  files = {p.name: p.read_text() for p in script["DIRECTORY"].iterdir()}
  assert sorted(files) == sorted(drawn)
  stale = [name for name in drawn if drawn[name] != files[name]]
  assert stale == [], "run `python docs/figures.py`"


def _marks(text: str) -> dict[str, list[tuple[int, int]]]:
  """Class -> (x, y) of each of its boxes."""
  found: dict[str, list[tuple[int, int]]] = {}
  for box in ET.fromstring(text).iter(f"{_SVG}rect"):
    place = int(box.get("x")), int(box.get("y"))
    found.setdefault(box.get("class"), []).append(place)
  return found


@pytest.mark.parametrize("scheme", traces.POSITIONS)
def test_mask_figure_shows_the_dense_mask(script, scheme):
  """Its boxes put back on a grid, against the mask by the definition."""
  words, documents = drawing.parse_text(script["TEXT"])
  points = drawing.parse_points(script["POINTS"], len(words))
  spec = Layout(script["LATENTS"], script["AHEAD"], scheme)
  wanted = dense_masks.dense_mask(documents, points, spec)
  boxes = [
    p for places in _marks(script["mask"](scheme)).values() for p in places
  ]
  cell = script["CELL"]
  left, top = (min(p[i] for p in boxes) for i in (0, 1))
  found = np.zeros_like(wanted)
  for x, y in boxes:
    found[(y - top) // cell, (x - left) // cell] = True
  np.testing.assert_array_equal(found, wanted)


def test_tiles_drawn_are_those_that_some_row_sees(script):
  share, first, last, stop, (s, block_q, block_k) = script["staircase_tiles"]()
  needed = 0
  for i in range(0, len(stop), block_q):
    needed += -(-int(stop[i : i + block_q].max()) // block_k)
  assert (last - first).sum() == needed
  assert share == needed / (len(stop) // block_q * (s // block_k)) < 0.7
  text = script["staircase"]()
  assert len(_marks(text)["ca-tile"]) == needed
  assert f"{share:.0%}" in text


def test_late_rows_see_less_and_stand_earlier(script):
  text = script["late"]()
  seen: dict[int, int] = {}
  for _, y in _marks(text)["ca-context"]:
    seen[y] = seen.get(y, 0) + 1
  assert list(dict(sorted(seen.items())).values()) == [5, 5, 3, 3]
  rows = re.findall(r">(\d)</text>", text)
  assert rows == ["3", "4", "1", "2"]


def test_figures_are_legible_in_both_schemes(script):
  """Lines and text take the page's colour; fills stand out on both grounds."""

  def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
      c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

  def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)

  style = script["_STYLE"]
  for kind in ("text", "line"):
    assert re.search(rf"\.ca-{kind} {{ \w+: var\(--md-default-fg", style)
  fills = re.findall(r"fill: (#\w{6})", style)
  assert len(fills) >= 4
  for fill in fills:
    # Of large shapes, WCAG 2.1 wants 3; white, and Material's slate.
    assert contrast(fill, "#ffffff") >= 2.7, fill
    assert contrast(fill, "#1e2129") >= 3.0, fill
