"""Tables, figures and files of reports, whoever reports.

An evaluator renders itself as a `Section`. What they share stands here, and the
paper's table 1: the change of perplexity, in percent, at each token after the
latents.
"""

import csv
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from cacheaug.errors import UserError
from cacheaug.evals import bootstrap
from cacheaug.evals.bootstrap import (
  AUGMENTED,
  FROZEN,
  DocumentSums,
  paired_interval,
)
from cacheaug.run import files

PERPLEXITY_CSV = "perplexity.csv"


@dataclasses.dataclass(frozen=True)
class Section:
  """One evaluator's part of a report's page.

  Attributes:
    parts: paragraphs of Markdown, in order, a heading first.
    files: name -> content, written beside the page.
    lines: CSV file -> its lines; sections of several texts share a file.
    figures: text -> everything that the parts show, for programs.
  """

  parts: Sequence[str]
  files: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  lines: Mapping[str, Sequence[Mapping[str, Any]]] = dataclasses.field(
    default_factory=dict
  )
  figures: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )


@dataclasses.dataclass(frozen=True)
class PositionRow:
  """One token position after the latents.

  Attributes:
    position: 1 is the first token after the latents.
    frozen_nll: mean of the frozen decoder, nats a token.
    augmented_nll: mean with latents, nats a token, on the same tokens.
    change_percent: of the perplexity; below zero the latents help.
    low: lower end of its 95 % interval.
    high: upper end.
    tokens: how many the means are over.
    documents: how many they come from; the interval resamples these.
  """

  position: int
  frozen_nll: float
  augmented_nll: float
  change_percent: float
  low: float
  high: float
  tokens: int
  documents: int


def make_rows(
  sums: DocumentSums,
  *,
  seed: int,
  column: str = AUGMENTED,
  base: str = FROZEN,
) -> list[PositionRow]:
  """A row for each position that a document reaches.

  Args:
    sums: of both columns, and of no others' tokens.
    seed: of the intervals' resampling.
    column: what is compared, in the rows' `augmented_nll`.
    base: what it is compared with, in the rows' `frozen_nll`.

  Raises:
    UserError: there is no token at all.
  """
  rows = []
  for position in sums.positions:
    before, tokens = sums.column(base, position)
    after, _ = sums.column(column, position)
    # Short documents may not reach the far positions, and tokens of questions
    # do not count; no token at all is refused.
    if not len(tokens) and sums.tokens.any():
      continue
    change, low, high = paired_interval(before, after, tokens, seed=seed)
    rows.append(
      PositionRow(
        position=position,
        frozen_nll=float(before.sum() / tokens.sum()),
        augmented_nll=float(after.sum() / tokens.sum()),
        change_percent=change,
        low=low,
        high=high,
        tokens=int(tokens.sum()),
        documents=len(tokens),
      )
    )
  return rows


AUGMENTED_NAME = "with latents"  # what is compared with the frozen decoder
TITLE = "Perplexity change by position after the latents"


def _header(name: str) -> tuple[str, ...]:
  return (
    "token after latents",
    "frozen nll",
    name,
    "perplexity change",
    "95% interval",
    "tokens",
    "documents",
  )


def interval(low: float, high: float, unit: str = "") -> str:
  """'-4.88 to -3.90', or that one document alone gives none."""
  if math.isnan(low):
    return "of 1 document"
  return f"{low:+.2f} to {high:+.2f}{unit}"


def _cells(row: PositionRow) -> tuple[str, ...]:
  return (
    str(row.position),
    f"{row.frozen_nll:.4f}",
    f"{row.augmented_nll:.4f}",
    f"{row.change_percent:+.2f}%",
    interval(row.low, row.high, "%"),
    str(row.tokens),
    str(row.documents),
  )


def format_table(
  rows: Sequence[PositionRow], name: str = AUGMENTED_NAME
) -> str:
  """The table as aligned plain text, for a terminal."""
  return aligned([_header(name), *(_cells(r) for r in rows)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
  """Any cells as plain text, for a terminal; columns end at the right."""
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
    for line in lines
  )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
  """Any cells as a table of a Markdown page."""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(
    "| " + " | ".join(str(c).replace("|", r"\|") for c in line) + " |"
    for line in lines
  )


def csv_bytes(
  lines: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()
) -> bytes:
  """A CSV file; its columns are the first line's keys by default."""
  out = io.StringIO()
  columns = columns or list(lines[0] if lines else ())
  writer = csv.DictWriter(out, columns, lineterminator="\n")
  writer.writeheader()
  writer.writerows(lines)
  return out.getvalue().encode()


def _plot(rows: Sequence[PositionRow], title: str, name: str) -> bytes:
  """PNG: change against position, its interval as a band."""
  figure = make_figure(7, 4)
  axes = figure.add_subplot()
  x = [r.position for r in rows]
  axes.axhline(0.0, color="0.4", linewidth=1.0, label="frozen decoder")
  axes.fill_between(
    x,
    [r.low for r in rows],
    [r.high for r in rows],
    color="C0",
    alpha=0.25,
    linewidth=0,
    label="95% interval over documents",
  )
  axes.plot(x, [r.change_percent for r in rows], "o-", color="C0", label=name)
  label_positions(axes, x, title)
  return to_png(figure)


def make_figure(width: float, height: float, dpi: int = 150) -> Any:
  """An empty figure, its size in inches."""
  # Imported here: a second that only a report needs. The figure is made
  # without pyplot, so that no display and no global state is touched.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def label_positions(axes: Any, positions: Sequence[int], title: str) -> None:
  """Axes of perplexity change against position."""
  axes.set_xscale("log", base=2)
  axes.set_xticks(positions, [str(p) for p in positions])
  axes.minorticks_off()
  axes.set_xlabel("token after the latents")
  axes.set_ylabel("perplexity change (%)")
  axes.set_title(title)
  axes.grid(alpha=0.3)
  axes.legend()


def to_png(figure: Any) -> bytes:
  """The figure's file."""
  out = io.BytesIO()
  # No software version in the file: the same table gives the same bytes.
  figure.savefig(out, format="png", metadata={"Software": None})
  return out.getvalue()


def lines_figure(
  tables: Mapping[str, Sequence[PositionRow]], title: str
) -> bytes:
  """PNG: change against position, a line and a band a table."""
  figure = make_figure(7, 4)
  axes = figure.add_subplot()
  axes.axhline(0.0, color="0.4", linewidth=1.0, label="frozen decoder")
  for i, (name, rows) in enumerate(tables.items()):
    x, color = [r.position for r in rows], f"C{i}"
    low, high = [r.low for r in rows], [r.high for r in rows]
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    changes = [r.change_percent for r in rows]
    axes.plot(x, changes, "o-", color=color, label=name)
  label_positions(axes, x, title)
  return to_png(figure)


def change(row: PositionRow) -> str:
  """'-4.40% (-4.88 to -3.90)'."""
  return f"{row.change_percent:+.2f}% ({interval(row.low, row.high)})"


Tables = Mapping[Any, Sequence[PositionRow]]


def csv_lines(source: str, kinds: Mapping[str, Tables]) -> list[dict[str, Any]]:
  """Lines of PERPLEXITY_CSV: kind of table -> latents -> rows, of one text."""
  return [
    {"source": source, "table": kind, "latents": latents}
    | dataclasses.asdict(row)
    for kind, tables in kinds.items()
    for latents, rows in tables.items()
    for row in rows
  ]


def figures_of(kinds: Mapping[str, Tables]) -> dict[str, Any]:
  """The rows as JSON, for programs: kind of table -> latents -> rows."""
  return {
    kind: {str(k): [dataclasses.asdict(r) for r in v] for k, v in some.items()}
    for kind, some in kinds.items()
  }


def perplexity_section(
  name: str, sums: Mapping[int, DocumentSums], *, seed: int
) -> Section:
  """Table 1 of one text.

  Args:
    name: of the text.
    sums: N -> sums of the frozen and the augmented decoder, all over the same
      tokens.
    seed: of the intervals' resampling.
  """
  tables = {n: make_rows(some, seed=seed) for n, some in sums.items()}
  first = next(iter(tables.values()))
  header = ["token after latents", "frozen nll"]
  header += [f"N={n}" for n in tables] + ["tokens", "documents"]
  cells = [
    [row.position, f"{row.frozen_nll:.4f}"]
    + [change(some[i]) for some in tables.values()]
    + [row.tokens, row.documents]
    for i, row in enumerate(first)
  ]
  file = f"perplexity_{name}.png"
  named = {f"N={n}": some for n, some in tables.items()}
  lines = {PERPLEXITY_CSV: csv_lines(name, {"table": tables})}
  for n, some in sums.items():
    documents = "documents.csv" if n == max(sums) else f"documents_n{n}.csv"
    lines[documents] = bootstrap.csv_lines({name: some})
  return Section(
    [
      f"## {name}: perplexity by position",
      markdown_table(header, cells),
      "Change of perplexity against the frozen decoder, in percent, with its "
      "95 % interval over documents; latents stand after every token that has "
      "the context, and all columns are over the same tokens. Below zero the "
      "latents help; an interval that holds zero says that they may do "
      "nothing.",
      f"![Perplexity by position]({file})",
    ],
    {file: lines_figure(named, f"{name}: latents after every token")},
    lines,
    {name: figures_of({"table": tables})},
  )


def _page(
  rows: Sequence[PositionRow],
  title: str,
  meta: Mapping[str, Any],
  extras: Mapping[str, Mapping[str, Any]],
  name: str,
) -> bytes:
  parts = [f"# {title}", "## What was run"]
  parts.append(markdown_table(("", "value"), list(meta.items())))
  parts.append("## Perplexity by position")
  parts.append(markdown_table(_header(name), [_cells(r) for r in rows]))
  parts.append(
    f"nll in nats a token, on the same held-out tokens. Below zero '{name}' is "
    "better than the frozen decoder; intervals are from resampling documents."
  )
  parts.append("![Perplexity by position](perplexity_by_position.png)")
  for heading, values in extras.items():
    parts.append(f"## {heading}")
    table = [(k, _number(v)) for k, v in values.items()]
    parts.append(markdown_table(("", "value"), table))
  return ("\n\n".join(parts) + "\n").encode()


def _number(value: Any) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_report(
  workdir: str | epath.Path,
  *,
  rows: Sequence[PositionRow],
  meta: Mapping[str, Any],
  documents: Mapping[str, DocumentSums],
  extras: Mapping[str, Mapping[str, Any]] | None = None,
  title: str = TITLE,
  name: str = AUGMENTED_NAME,
) -> epath.Path:
  """Writes report/perplexity_by_position.{csv,png}, documents.csv, report.md.

  Each file appears whole or not at all.

  Args:
    workdir: of the run.
    rows: by ascending position; at least one.
    meta: what was run, in the order to show: config, decoder, steps, seed.
    documents: source -> sums by document, for `bootstrap.compare`.
    extras: further tables, heading -> name -> value, such as exact match.
    title: of the page and the plot.
    name: of what is compared with the frozen decoder.

  Returns:
    Path of report.md.

  Raises:
    UserError: no space or no permission in the workdir.
    ValueError: no rows.
  """
  if not rows:
    raise ValueError("a report needs at least one row")
  contents = {
    "perplexity_by_position.csv": csv_bytes([*map(dataclasses.asdict, rows)]),
    "perplexity_by_position.png": _plot(rows, title, name),
    "documents.csv": csv_bytes(bootstrap.csv_lines(documents)),
    # Last, because it refers to the others.
    "report.md": _page(rows, title, meta, extras or {}, name),
  }
  directory = epath.Path(workdir) / "report"
  write_files(directory, contents)
  return directory / "report.md"


def write_files(directory: epath.Path, contents: Mapping[str, bytes]) -> None:
  """Writes a report's files, by name and in their order.

  Raises:
    UserError: no space or no permission.
  """
  try:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
      files.write_whole(directory / name, data)
  except OSError as e:
    raise UserError(
      f"{directory}: the report cannot be written ({e.strerror or e}): free "
      "space or give another --workdir"
    ) from e
