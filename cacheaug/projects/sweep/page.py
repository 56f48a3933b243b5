"""The report of a sweep: comparison.md with its tables, CSV files and plots."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from cacheaug.evals import bootstrap, report
from cacheaug.projects.sweep import curves, plan
from cacheaug.projects.sweep.comparison import Cell, Interval, Place, Result
from cacheaug.projects.sweep.rows import Run, Sweep

_NONE = "-"  # has no meaning for the row
_HOW = (
  "Each cell: change of perplexity in percent of the mean over seeds, below "
  "it the 95 % interval, from resampling documents of that mean (a document's "
  "nll is its mean over the seeds), and the smallest and largest change of a "
  "single seed. The interval holds for these seeds; seeds are not resampled. "
  "All rows are on the same tokens."
)


def write(
  directory: Path,
  *,
  title: str,
  sweep: Sweep,
  results: Sequence[Result],
  runs: Sequence[Run],
) -> Path:
  """Writes report/: comparison.md, comparison.csv, rows.csv and the plots.

  Args:
    directory: of the sweep.
    title: of the page.
    sweep: names the reference and the axis.
    results: of comparison.compare, at least one.
    runs: all of the sweep, finished or not.

  Returns:
    Path of comparison.md.

  Raises:
    UserError: it cannot be written.
  """
  found = curves.find(results, sweep.axis) if sweep.axis else []
  places = _places(results)
  contents = {
    "comparison.csv": _cells_csv(results),
    "rows.csv": _rows_csv(results),
  }
  plots = []
  if places:
    plots.append("comparison.png")
    contents["comparison.png"] = curves.draw_positions(results, places)
  if found:
    plots.append("scaling.png")
    contents["scaling.png"] = curves.draw_scaling(found, sweep.axis, places)
  parts = [f"# {title}", _what(results, sweep)]
  for source, positions in _by_source(places).items():
    parts += _tables(results, sweep, source, positions)
  parts += _bits(results)
  if any(r.problems for r in results):
    parts += ["## Exact match on held-out problems", _exact(results)]
  parts += ["## Cost", _costs(results)]
  parts += [f"![{name}]({name})" for name in plots]
  parts += _unfinished(results, runs)
  contents["comparison.md"] = ("\n\n".join(parts) + "\n").encode()
  below = directory / "report"
  report.write_files(epath.Path(below), contents)
  return below / "comparison.md"


def _places(results: Sequence[Result]) -> list[Place]:
  """Of any row, sources in the runs' order, positions ascending."""
  places = {place: None for r in results for place in r.cells}
  order = list(dict.fromkeys(source for source, _ in places))
  return sorted(places, key=lambda p: (order.index(p[0]), p[1]))


def _by_source(places: Iterable[Place]) -> dict[str, list[int]]:
  found: dict[str, list[int]] = {}
  for source, position in places:
    found.setdefault(source, []).append(position)
  return found


def _what(results: Sequence[Result], sweep: Sweep) -> str:
  config = results[0].built.config
  decoders = dict.fromkeys(
    r.built.config.decoder.path or "none" for r in results
  )
  text = (
    f"Decoder: {', '.join(decoders)}. Held-out text: {config.eval.sequences} "
    f"sequences of {config.data.sequence} tokens a source, at most; latents "
    "after every token that, with those of its document before it, makes "
    f"{config.eval.context or 'as many as N wants'}."
  )
  if sweep.reference in [r.name for r in results]:
    text += f" Reference row: {sweep.reference}."
  return f"{text}\n\n{_HOW}"


def _tables(
  results: Sequence[Result],
  sweep: Sweep,
  source: str,
  positions: Sequence[int],
) -> list[str]:
  """Of one source: against the frozen decoder, and against the reference."""
  header = ("row", "seeds", *(f"token {j}" for j in positions))

  def lines(cell):
    for r in results:
      cells = [r.cells.get((source, j)) for j in positions]
      yield (r.name, _seeds(r), *(cell(c) if c else _NONE for c in cells))

  size = max(
    (c for r in results for p, c in r.cells.items() if p[0] == source),
    key=lambda c: c.tokens,
  )
  parts = [
    f"## {source}: perplexity against the frozen decoder",
    _table(header, lines(_frozen_cell)),
    f"Over {size.tokens} tokens of {size.documents} documents at token "
    f"{positions[0]}.",
  ]
  if any(c.against_reference for r in results for c in r.cells.values()):
    parts += [
      f"## {source}: perplexity against {sweep.reference}",
      _table(header, lines(_reference_cell)),
    ]
  return parts


def _seeds(result: Result) -> str:
  done, all_ = len(result.runs), len(result.built.row.seeds)
  return str(done) if done == all_ else f"{done} of {all_}"


def _interval(interval: Interval) -> str:
  spread = report.interval(interval.low, interval.high)
  return f"{interval.change:+.2f}<br>{spread}"


def _frozen_cell(cell: Cell) -> str:
  text = _interval(cell.against_frozen)
  if len(cell.seeds) > 1:
    text += f"<br>seeds {min(cell.seeds):+.2f} to {max(cell.seeds):+.2f}"
  return text


def _reference_cell(cell: Cell) -> str:
  # The reference itself, and nothing else, has none.
  return _interval(cell.against_reference) if cell.against_reference else _NONE


def _exact(results: Sequence[Result]) -> str:
  some = [r for r in results if r.problems]
  kinds = list(dict.fromkeys(k for r in some for k in r.problems))
  # Frozen decoders first, each once: all rows ask them the same problems.
  frozen = {
    r.built.config.decoder.path: r
    for r in some
    if bootstrap.FROZEN in r.problems["all"]
  }
  lines = [
    (
      f"frozen {path or 'random'}",
      _NONE,
      *(_percent(r.problems[k][bootstrap.FROZEN][:1]) for k in kinds),
    )
    for path, r in frozen.items()
  ]
  for r in some:
    cells = [_percent(r.problems[k][bootstrap.AUGMENTED]) for k in kinds]
    lines.append((r.name, _seeds(r), *cells))
  asked = some[0].problems["all"][bootstrap.AUGMENTED][0][1]
  return (
    f"{_table(('row', 'seeds', *kinds), lines)}\n\nPercent right, mean over "
    f"seeds, of {asked} problems, the same ones for all; below it the smallest "
    "and largest of a seed."
  )


def _bits(results: Sequence[Result]) -> list[str]:
  """Of decoders trained from nothing, which nothing is compared with."""
  some = [r for r in results if r.bits]
  if not some:
    return []
  names = list(dict.fromkeys(name for r in some for name in r.bits))
  lines = [
    (r.name, _seeds(r), *(f"{statistics.fmean(r.bits[n]):.4f}" for n in names))
    for r in some
  ]
  return [
    "## Decoders trained from nothing: held-out bits a token",
    _table(("row", "seeds", *names), lines),
  ]


def _percent(answers: Sequence[tuple[int, int]]) -> str:
  each = [100.0 * right / asked for right, asked in answers]
  text = f"{statistics.fmean(each):.1f}"
  if len(each) > 1:
    text += f"<br>{min(each):.1f} to {max(each):.1f}"
  return text


def _costs(results: Sequence[Result]) -> str:
  header = (
    "row",
    "trained parameters",
    "others",
    "together",
    "steps",
    "training FLOP",
    "FLOP a token",
    "FLOP an augmentation",
    "training time",
  )
  return (
    f"{_table(header, map(_cost_cells, results))}\n\nFLOP are counted from "
    "shapes (cacheaug/flops.py): of a token decoded after data.sequence "
    "others, and what one augmentation there adds. Time is of the steps "
    "alone, mean over seeds, on the machine of the run."
  )


def _cost_cells(result: Result) -> tuple[str, ...]:
  b = result.built
  return (
    result.name,
    f"{b.trained:,}",
    f"{b.frozen:,}",
    f"{b.trained + b.frozen:,}",
    f"{b.config.optimizer.steps:,}",
    f"{b.flop:.3g}",
    f"{b.token:.3g}",
    _NONE if b.augmentation is None else f"{b.augmentation:.3g}",
    plan.clock(statistics.fmean(result.seconds)),
  )


def _unfinished(results: Sequence[Result], runs: Sequence[Run]) -> list[str]:
  done = {run.name for r in results for run in r.runs}
  missing = [run.name for run in runs if run.name not in done]
  if not missing:
    return []
  return ["## Not finished", ", ".join(missing)]


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  return report.markdown_table(header, list(lines))


def _cells_csv(results: Sequence[Result]) -> bytes:
  """A line a row, source and position."""
  lines = []
  for r in results:
    for (source, position), c in r.cells.items():
      reference = c.against_reference
      lines.append(
        {
          "row": r.name,
          "source": source,
          "position": position,
          "seeds": len(c.seeds),
          "frozen_nll": c.frozen_nll,
          "nll": c.nll,
          "change_percent": c.against_frozen.change,
          "low": c.against_frozen.low,
          "high": c.against_frozen.high,
          "seed_min": min(c.seeds),
          "seed_max": max(c.seeds),
          "against_reference": reference.change if reference else "",
          "reference_low": reference.low if reference else "",
          "reference_high": reference.high if reference else "",
          "tokens": c.tokens,
          "documents": c.documents,
        }
      )
  return report.csv_bytes(lines)


def _rows_csv(results: Sequence[Result]) -> bytes:
  """A line a row: its cost, and its answers all together."""
  lines = []
  for r in results:
    answers = r.problems.get("all", {})
    lines.append(
      {
        "row": r.name,
        "seeds": len(r.runs),
        "trained": r.built.trained,
        "others": r.built.frozen,
        "steps": r.built.config.optimizer.steps,
        "training_flop": r.built.flop,
        "token_flop": r.built.token,
        "augmentation_flop": r.built.augmentation,
        "training_seconds": statistics.fmean(r.seconds),
        **{
          f"exact_match_{column}": statistics.fmean(
            right / asked for right, asked in answers[column]
          )
          if column in answers
          else ""
          for column in (bootstrap.FROZEN, bootstrap.AUGMENTED)
        },
      }
    )
  return report.csv_bytes(lines)
