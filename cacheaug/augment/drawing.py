"""Figure 2b of the paper (arXiv 2412.17747) for any text, in a terminal.

  python -m cacheaug.augment.traces --text="a b c d e f"

prints the extended input with its positions and targets, who sees whom, and
each trace's rows. Words are split at spaces; a word `|` ends a document. With
--late=1 the latents come a word late, and the coprocessor's own rows are shown
too.
"""

import argparse
import sys

import numpy as np

from cacheaug.augment import dense_masks, point_sampling, traces
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError

NOTHING = "-"  # a row that predicts nothing, or a token of another document


def grid(rows: list[list[str]], starts: set[int]) -> str:
  """Aligned text: a name and its cells a row, bars where blocks start."""
  names = max(len(row[0]) for row in rows) + 2
  widths = [max(map(len, column)) + 1 for column in zip(*rows, strict=True)]
  lines = []
  for i, (name, *cells) in enumerate(rows):
    line = name.ljust(names)
    for j, (cell, width) in enumerate(zip(cells, widths[1:], strict=True)):
      bar = "  " if i else "| "  # in the first row only
      line += (bar if j in starts else "") + cell.ljust(width)
    lines.append(line.rstrip())
  return "\n".join(lines)


def draw(labels: list[str], mask: np.ndarray, starts: set[int]) -> str:
  """The mask [T, T] as text, a bar before the columns in `starts`."""
  cells = [["#" if seen else "" for seen in row] for row in mask]
  rows = [[label, *row] for label, row in zip(labels, cells, strict=True)]
  return grid([["", *labels], *rows], starts)


def parse_text(text: str) -> tuple[list[str], np.ndarray]:
  """Words, and the document of each [S].

  Raises:
    UserError: a document without words.
  """
  parts: list[list[str]] = [[]]
  for word in text.split():
    if word == "|":
      parts.append([])
    else:
      parts[-1].append(word)
  if not all(parts):
    raise UserError("--text: a document without words; give at least one word")
  documents = np.repeat(np.arange(len(parts)), [len(p) for p in parts])
  return sum(parts, []), documents


def parse_points(text: str, words: int) -> np.ndarray:
  """'1,3' -> [1, 3].

  Raises:
    UserError: what is no number, does not ascend or is beyond the text.
  """
  try:
    points = [int(point) for point in text.split(",")]
  except ValueError as e:
    raise UserError(f"--points={text}: not numbers like 1,3") from e
  if points != sorted(set(points)):
    raise UserError(f"--points={text}: must ascend, each once")
  if points[0] < 0 or points[-1] >= words:
    raise UserError(
      f"--points={text}: the text's {words} words are numbered from 0 to "
      f"{words - 1}"
    )
  return np.array(points)


def check_points(
  words: list[str],
  documents: np.ndarray,
  points: np.ndarray,
  layout: Layout,
  late: int = 0,
) -> None:
  """Looks whether a trace, `late` words late, fits at each point.

  Raises:
    UserError: naming the word of the first at which none does.
  """
  if late < 0:
    raise UserError(f"--late={late}: must be 0 or more words")
  valid = np.asarray(point_sampling.valid_points(documents[None], layout))[0]
  for p in points[~valid[points]]:
    raise UserError(
      f"--points: no trace fits after word {p} ({words[p]}): its document "
      f"must hold {layout.context_needed} or more words up to there and 1 "
      "or more after it"
    )
  room = np.asarray(
    point_sampling.late_room(documents[None], points[None], layout)
  )[0]
  for p, most in zip(points, room, strict=True):
    if most < late:
      raise UserError(
        f"--late={late}: latents after word {p} ({words[p]}) can come at most "
        f"{most} words late: the coprocessor must have read "
        f"{layout.context_needed} of the document's"
      )


def latent_labels(word: str, latents: int) -> list[str]:
  """B' for one latent after b; b'1 b'2 .. for more."""
  if latents == 1:
    return [f"{word}'"]
  return [f"{word}'{i}" for i in range(1, latents + 1)]


def draw_latents(
  words: list[str],
  documents: np.ndarray,
  points: np.ndarray,
  layout: Layout,
  late: int,
) -> str:
  """Whom the coprocessor's rows see, and where they stand."""
  delay, tokens = np.full_like(points, late), np.arange(len(words))
  one = (x[None] for x in (tokens, documents, points))
  placed = traces.layout_traces(*one, layout, delay[None])
  positions = np.asarray(placed.latent_rows.positions).ravel()
  mask = dense_masks.dense_latent_mask(documents, points, layout, delay)
  labels = sum((latent_labels(words[p], layout.latents) for p in points), [])
  rows = [["", "position", *words, *labels]]
  for label, position, row in zip(labels, positions, mask, strict=True):
    rows.append([label, str(position), *("#" if seen else "" for seen in row)])
  starts = range(len(words), len(words) + len(labels), layout.latents)
  return grid(rows, {1 + start for start in starts})


def describe(text: str, points: str, layout: Layout, late: int = 0) -> str:
  """All that the command prints; the numbers are `traces.layout_traces`'s."""
  words, documents = parse_text(text)
  where = parse_points(points, len(words))
  check_points(words, documents, where, layout, late)
  s, n = len(words), layout.latents
  # A word's token is its index, so tokens name words even if one is repeated.
  placed = traces.layout_traces(
    np.arange(s)[None], documents[None], where[None], layout
  )
  positions = np.asarray(placed.rows.positions)[0]  # [M, R]
  ahead, targets = np.asarray(placed.ahead)[0], np.asarray(placed.targets)[0]
  counts = np.asarray(placed.weights)[0] > 0

  blocks = []  # of rows: number, position, input, target, document
  for m, p in enumerate(where):
    inputs = latent_labels(words[p], n) + [words[t] for t in ahead[m]]
    targets_of_rows = [NOTHING] * (n - 1)
    for t, counted in zip(targets[m], counts[m], strict=True):
      targets_of_rows.append(words[t] if counted else NOTHING)
    rows = range(s + m * layout.rows, s + (m + 1) * layout.rows)
    document = [documents[p]] * layout.rows
    columns = rows, positions[m], inputs, targets_of_rows, document
    blocks.append(list(zip(*columns, strict=True)))
  context = [
    (t, t, word, NOTHING, d)
    for t, (word, d) in enumerate(zip(words, documents, strict=True))
  ]
  everything = context + sum(blocks, [])
  number, position, inputs, targets_of_rows, document = (
    [str(cell) for cell in column] for column in zip(*everything, strict=True)
  )
  starts = {s + m * layout.rows for m in range(len(where))}
  lines = [
    ["input", *inputs],
    ["position", *position],
    ["target", *targets_of_rows],
  ]
  if documents[-1]:
    lines.append(["document", *document])
  mask = dense_masks.dense_mask(documents, where, layout)
  out = [grid(lines, starts), draw(inputs, mask, starts)]
  for m, (p, block) in enumerate(zip(where, blocks, strict=True)):
    table = [[str(cell) for cell in row[:4]] for row in block]
    head = ["row", "position", "input", "target"]
    out.append(f"trace {m}, after {words[p]}\n" + grid([head, *table], set()))
  if late:
    picture = draw_latents(words, documents, where, layout, late)
    out.append(f"the coprocessor, {late} late\n{picture}")
  return "\n\n".join(out)


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    raise UserError(message)


def main(argv: list[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = _Parser(
    prog="python -m cacheaug.augment.traces",
    description="Draws traces: extended input, positions, targets and mask.",
  )
  add = parser.add_argument
  add("--text", required=True, help="words; a word | ends a document")
  add("--points", default="1,3", help="indices of the words before latents")
  add("--latents", type=int, default=1, help="N, latents a trace")
  add("--ahead", type=int, default=2, help="A, tokens predicted a trace")
  add("--scheme", default="insert", help=" | ".join(traces.POSITIONS))
  add("--late", type=int, default=0, help="words by which the latents are late")
  try:
    args = parser.parse_args(argv)
    layout = Layout(args.latents, args.ahead, args.scheme, start="as_is")
    print(describe(args.text, args.points, layout, args.late))
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
