"""Draws the site's figures from what the package itself computes.

  python docs/figures.py            writes docs/figures/*.svg

Positions, masks and tiles are those of cacheaug/augment/traces.py and
cacheaug/kernels/intervals.py; nothing is drawn by hand. Colours follow the
site's light or dark scheme where a page holds the figure, and are readable on
both where a file is opened alone. tests/test_figures.py fails where a
committed file is not what this script writes.
"""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np

from cacheaug.augment import dense_masks, drawing, traces
from cacheaug.augment.traces import Layout
from cacheaug.kernels import intervals

DIRECTORY = Path(__file__).resolve().parent / "figures"

TEXT = "Natalia sold clips to 48 of her friends"
POINTS = "2,4"
LATENTS, AHEAD = 2, 3

CELL = 22  # pixels
_STYLE = """
.ca-text { fill: var(--md-default-fg-color, #777); font: 12px sans-serif; }
.ca-end { text-anchor: end; }
.ca-middle { text-anchor: middle; }
.ca-line { stroke: var(--md-default-fg-color--light, #888); fill: none; }
.ca-thin { stroke: var(--md-default-fg-color--lighter, #aaa); fill: none; }
.ca-context { fill: #4c86d8; }
.ca-latent { fill: #d9822b; }
.ca-ahead { fill: #3a9d6e; }
.ca-tile { fill: #4c86d8; fill-opacity: 0.25; }
.ca-empty { fill: #888; fill-opacity: 0.08; }
""".strip()


class _Svg:
  """A drawing of so many pixels, written as one element a line."""

  def __init__(self, width: int, height: int, title: str, least: int = 0):
    # As wide as it is drawn, narrower where the page is; below `least` the
    # page scrolls it (docs/site.css), so that its words can be read.
    self._root = ET.Element(
      "svg",
      xmlns="http://www.w3.org/2000/svg",
      viewBox=f"0 0 {width} {height}",
      width=str(width),
      role="img",
      style=f"max-width: 100%; min-width: {least}px; height: auto",
    )
    ET.SubElement(self._root, "title").text = title
    ET.SubElement(self._root, "style").text = _STYLE

  def box(self, x, y, width, height, kind):
    place = dict(x=x, y=y, width=width, height=height)
    place = {key: str(value) for key, value in place.items()}
    ET.SubElement(self._root, "rect", {**place, "class": f"ca-{kind}"})

  def line(self, x1, y1, x2, y2, kind="line"):
    place = dict(x1=x1, y1=y1, x2=x2, y2=y2)
    place = {key: str(value) for key, value in place.items()}
    ET.SubElement(self._root, "line", {**place, "class": f"ca-{kind}"})

  def text(self, x, y, words, *kinds, turned=False):
    names = " ".join(f"ca-{kind}" for kind in ("text", *kinds))
    place = {"x": str(x), "y": str(y), "class": names}
    if turned:
      place["transform"] = f"rotate(-60 {x} {y})"
    ET.SubElement(self._root, "text", place).text = words

  def __str__(self) -> str:
    ET.indent(self._root, "")
    return ET.tostring(self._root, encoding="unicode") + "\n"


def mask(scheme: str) -> str:
  """Who sees whom in the decoder's pass, and at which position each stands."""
  words, documents = drawing.parse_text(TEXT)
  points = drawing.parse_points(POINTS, len(words))
  spec = Layout(LATENTS, AHEAD, scheme)
  laid = _lay_out(documents, points, spec)
  seen = dense_masks.dense_mask(documents, points, spec)
  labels, kinds = list(words), ["context"] * len(words)
  for m, p in enumerate(points):
    labels += drawing.latent_labels(words[p], LATENTS)
    labels += [words[t] for t in np.asarray(laid.ahead)[0, m]]
    kinds += ["latent"] * LATENTS + ["ahead"] * (AHEAD - 1)
  positions = [*range(len(words)), *np.asarray(laid.rows.positions)[0].ravel()]
  return _grid(
    f"Mask of the decoder's pass, scheme {scheme}: rows are queries",
    seen,
    rows=labels,
    columns=labels,
    kinds=kinds,
    positions=positions,
    bars=[len(words) + m * spec.rows for m in range(len(points))],
  )


def late(delay: int = 2) -> str:
  """The coprocessor's own rows where its latents come `delay` words late."""
  words, documents = drawing.parse_text(TEXT)
  points = drawing.parse_points("4", len(words))
  spec = Layout(LATENTS, AHEAD, "replace")
  drawing.check_points(words, documents, points, spec, delay)
  seen, rows, positions = [], [], []
  for d in (0, delay):
    by = np.full_like(points, d)
    laid = _lay_out(documents, points, spec, by)
    seen.append(dense_masks.dense_latent_mask(documents, points, spec, by))
    names = drawing.latent_labels(words[points[0]], LATENTS)
    rows += [f"{name}, {d} late" for name in names]
    positions += list(np.asarray(laid.latent_rows.positions)[0].ravel())
  own = drawing.latent_labels(words[points[0]], LATENTS)
  return _grid(
    f"What the coprocessor reads for latents that come {delay} words late",
    np.concatenate(seen),
    rows=rows,
    columns=[*words, *own],
    kinds=["context"] * len(words) + ["latent"] * LATENTS,
    positions=positions,
    bars=[len(words)],
    row_bars=[LATENTS],
  )


def _lay_out(documents, points, spec, delay=None) -> traces.Traces:
  # A word's token is its index, so tokens name words even if one is repeated.
  tokens = np.arange(len(documents))
  delay = None if delay is None else delay[None]
  return traces.layout_traces(
    tokens[None], documents[None], points[None], spec, delay
  )


def _grid(title, seen, *, rows, columns, kinds, positions, bars, row_bars=None):
  """A mask as squares: labels left and on top, positions on the right."""
  left, top = 16 + 7 * max(map(len, rows)), 70
  width, height = CELL * len(columns), CELL * len(rows)
  svg = _Svg(left + width + 66, top + height + 8, title)
  for i in range(len(rows) + 1):
    svg.line(left, top + CELL * i, left + width, top + CELL * i, "thin")
  for j in range(len(columns) + 1):
    svg.line(left + CELL * j, top, left + CELL * j, top + height, "thin")
  for i, j in np.argwhere(seen):
    x, y = left + CELL * j, top + CELL * i
    svg.box(x + 2, y + 2, CELL - 4, CELL - 4, kinds[j])
  for bar in bars:
    svg.line(left + CELL * bar, top - 6, left + CELL * bar, top + height)
  for bar in bars if row_bars is None else row_bars:
    svg.line(left - 6, top + CELL * bar, left + width, top + CELL * bar)
  for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
    y = top + CELL * i + 15
    svg.text(left - 8, y, row, "end")
    svg.text(left + width + 33, y, str(position), "middle")
  svg.text(left + width + 33, top - 8, "position", "middle")
  for j, column in enumerate(columns):
    svg.text(left + CELL * j + 13, top - 8, column, turned=True)
  return str(svg)


def positions() -> str:
  """One trace's rows on the axis of positions, by scheme."""
  words, documents = drawing.parse_text(TEXT)
  points = drawing.parse_points("4", len(words))
  p, wide = int(points[0]), 50
  last = p + LATENTS + AHEAD
  title = "Positions of one trace's rows, by scheme"
  svg = _Svg(90 + wide * last, 330, title, least=480)
  for i, scheme in enumerate(traces.POSITIONS):
    spec = Layout(LATENTS, AHEAD, scheme)
    laid = _lay_out(documents, points, spec)
    limit = int(np.asarray(laid.rows.context_limit).max())
    stands = np.asarray(laid.rows.positions)[0, 0]
    names = drawing.latent_labels(words[p], LATENTS)
    names += [words[t] for t in np.asarray(laid.ahead)[0, 0]]
    y = 20 + 105 * i
    svg.text(74, y + 32, scheme, "end")
    for position in range(last):
      svg.text(90 + wide * position + 23, y + 80, str(position), "middle")
    for t in range(p + 1):
      if t <= limit:  # else hidden from the block
        _named(svg, 90 + wide * t, y, words[t], "context")
    for j, (name, position) in enumerate(zip(names, stands, strict=True)):
      kind = "latent" if j < LATENTS else "ahead"
      _named(svg, 90 + wide * int(position), y + 34, name, kind)
    svg.line(90, y + 66, 90 + wide * last, y + 66, "thin")
  return str(svg)


def _named(svg: _Svg, x: int, y: int, name: str, kind: str) -> None:
  svg.box(x + 2, y + 22, 42, 6, kind)
  svg.text(x + 23, y + 17, name, "middle")


def staircase() -> str:
  """Which tiles of context scores are computed, of all."""
  share, first, last, stop, sizes = staircase_tiles()
  s, block_q, block_k = sizes
  rows = len(stop)
  x0, y0, dot = 64, 34, 5
  title = f"Tiles computed: {share:.0%} of the context's scores"
  svg = _Svg(x0 + dot * s + 16, y0 + dot * rows + 10, title)
  svg.text(x0, 20, "context slots")
  svg.text(x0 - 8, y0 + 12, "rows", "end")
  for i, (a, b) in enumerate(zip(first, last, strict=True)):
    for j in range(a, b):
      x, y = x0 + dot * block_k * j, y0 + dot * block_q * i
      svg.box(x, y, dot * block_k, dot * block_q, "tile")
  for i, end in enumerate(stop):
    svg.box(x0, y0 + dot * i, dot * int(end), dot, "context")
  for i in range(rows // block_q + 1):
    y = y0 + dot * block_q * i
    svg.line(x0, y, x0 + dot * s, y, "line")
  for j in range(s // block_k + 1):
    x = x0 + dot * block_k * j
    svg.line(x, y0, x, y0 + dot * rows, "line")
  return str(svg)


def staircase_tiles() -> tuple[
  float, np.ndarray, np.ndarray, np.ndarray, tuple
]:
  """Share of tiles computed; their bounds [Q / block_q]; each row's stop [Q].

  Sixteen traces of four rows over a context of 96, tiles of 8 x 16; the points
  are a fixed draw of the uniform law.
  """
  s, block_q, block_k = 96, 8, 16
  points = [3, 9, 14, 16, 23, 31, 38, 40, 47, 55, 58, 66, 71, 80, 84, 90]
  spec = Layout(LATENTS, AHEAD, "replace")
  laid = _lay_out(np.zeros(s, int), np.array(points), spec)
  limits = np.asarray(laid.rows.context_limit)[0]  # [M, 1]
  stop = np.broadcast_to(limits + 1, (len(points), spec.rows)).reshape(1, -1)
  stop = stop.astype(np.int32)
  start = np.zeros_like(stop)
  bounds = intervals.block_bounds(start, stop, block_q, block_k)
  first, last = (np.asarray(x)[0] for x in bounds)
  share = (last - first).sum() / (len(first) * (s // block_k))
  return float(share), first, last, stop[0], (s, block_q, block_k)


def reach() -> str:
  """Exact match by lookups asked for and rounds, of the table that has it."""
  rows = reach_table()
  x0, y0, wide, high = 250, 40, 64, 30
  count = len(rows[0][1])
  title = "Exact match by lookups asked for: each round of latents adds one"
  svg = _Svg(x0 + wide * count + 10, y0 + high * len(rows) + 10, title)
  for j in range(count):
    svg.text(x0 + wide * j + wide // 2, y0 - 10, f"k = {j + 1}", "middle")
  for i, (name, cells) in enumerate(rows):
    svg.text(x0 - 10, y0 + high * i + 20, name, "end")
    for j, percent in enumerate(cells):
      x, y = x0 + wide * j, y0 + high * i
      svg.box(x + 1, y + 1, wide - 2, high - 2, "empty")
      if percent is not None:
        full = round((wide - 2) * percent / 100)
        svg.box(x + 1, y + 1, full, high - 2, "tile")
        svg.text(x + wide // 2, y + 20, f"{percent:g}", "middle")
  return str(svg)


def reach_table() -> list[tuple[str, list[float | None]]]:
  """Name and exact match in percent at k = 1, 2, ...; None: not measured.

  The first table of docs/results/depth.md's section Reach, whose first column
  is a name, and whose second the layers in series.
  """
  page = DIRECTORY.parent / "results" / "depth.md"
  section = page.read_text().partition("\n## Reach\n")[2]
  lines = [k for k in section.partition("\n\n| ")[2].splitlines()]
  rows = []
  for line in lines[2:]:
    if not line.startswith("|"):
      break
    name, layers, *cells = (cell.strip() for cell in line.strip("|").split("|"))
    figures = [float(cell.split()[0]) if cell else None for cell in cells]
    rows.append((f"{name}, {layers} layers", figures))
  return rows


def figures() -> dict[str, str]:
  """File name -> its text."""
  drawn = {f"mask_{scheme}.svg": mask(scheme) for scheme in traces.POSITIONS}
  drawn["positions.svg"] = positions()
  drawn["staircase.svg"] = staircase()
  drawn["late.svg"] = late()
  drawn["reach.svg"] = reach()
  return drawn


if __name__ == "__main__":
  DIRECTORY.mkdir(exist_ok=True)
  for name, text in figures().items():
    (DIRECTORY / name).write_text(text)
    print(DIRECTORY / name)
