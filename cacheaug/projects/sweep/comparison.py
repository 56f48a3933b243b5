"""Rows of a sweep against the frozen decoder and against each other.

Everything is computed from the runs' report/documents.csv. Rows are compared on
the same tokens, and a row's seeds are one thing: a document's nll is its mean
over them. An interval resamples documents of that mean. The spread between
seeds is shown beside the interval and is not part of it.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cacheaug import config as configs
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, exact_match, run_report
from cacheaug.projects.sweep import runner
from cacheaug.projects.sweep.rows import Built, Run

Place = tuple[str, int]  # source, position
RESAMPLING_SEED = 0  # of every interval


@dataclasses.dataclass(frozen=True)
class Interval:
  """A change of perplexity in percent, with its 95 % interval."""

  change: float
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Cell:
  """One row at one position of one source.

  Attributes:
    against_frozen: change against the frozen decoder, of the seeds' mean.
    seeds: the change of each seed.
    against_reference: change against the reference row; None where there is
      none, or this is it.
    frozen_nll: mean of the frozen decoder, nats a token.
    nll: mean of the row, over tokens and seeds.
    tokens: how many the means are over.
    documents: how many they come from.
  """

  against_frozen: Interval
  seeds: tuple[float, ...]
  against_reference: Interval | None
  frozen_nll: float
  nll: float
  tokens: int
  documents: int


@dataclasses.dataclass(frozen=True)
class Result:
  """A row, as far as its runs have finished.

  Attributes:
    built: the row.
    runs: those of its runs that have finished, at least one.
    cells: source and position -> figures; empty for a decoder trained from
      nothing, which has no frozen one to be compared with.
    problems: kind of problem -> column (of paired) -> (right, asked) by seed;
      empty where none were asked. A decoder that was trained has the augmented
      column only.
    bits: source -> held-out bits a token of each seed, of a decoder trained
      from nothing.
    seconds: of training, of each run.
  """

  built: Built
  runs: tuple[Run, ...]
  cells: Mapping[Place, Cell]
  problems: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]]
  bits: Mapping[str, tuple[float, ...]]
  seconds: tuple[float, ...]

  @property
  def name(self) -> str:
    """The row's."""
    return self.built.row.name


@dataclasses.dataclass(frozen=True)
class _Pooled:
  """A row's nll at one place, [T] documents, ascending, of the same tokens."""

  documents: np.ndarray
  tokens: np.ndarray
  checksum: np.ndarray
  # [seeds, T]; a decoder without a path is another one for each seed.
  frozen: np.ndarray
  augmented: np.ndarray


def compare(
  built: Sequence[Built], runs: Sequence[Run], reference: str
) -> list[Result]:
  """Every row that has a finished run.

  Args:
    built: the sweep's rows.
    runs: of rows.runs_of.
    reference: the row that others are compared with, or ''.

  Raises:
    UserError: a finished run without its files; runs of other tokens.
  """
  done = {b.row.name: [] for b in built}
  for run in runs:
    if runner.finished(run):
      done[run.built.row.name].append(run)
  pooled = {}
  for b in built:
    mine = [run for run in done[b.row.name] if _compared(b)]
    if mine:
      pooled[b.row.name] = _pool(mine)
  _check_tokens(pooled)
  return [
    Result(
      built=b,
      runs=tuple(done[b.row.name]),
      cells=_cells(
        pooled.get(b.row.name, {}),
        pooled.get(reference) if reference != b.row.name else None,
      ),
      problems=_problems(done[b.row.name]),
      bits={} if _compared(b) else _bits(done[b.row.name]),
      seconds=tuple(training_seconds(run) for run in done[b.row.name]),
    )
    for b in built
    if done[b.row.name]
  ]


def _compared(built: Built) -> bool:
  """Whether there is a frozen decoder to compare the row with."""
  config = built.config
  return config.objective == "coprocessor" or bool(config.decoder.path)


def _pool(runs: Sequence[Run]) -> dict[Place, _Pooled]:
  """A row's seeds beside each other, by source and position."""
  tables = [bootstrap.read_csv(run.workdir) for run in runs]
  first = tables[0]
  for run, table in zip(runs, tables, strict=True):
    _same_tokens(first, table, runs[0].name, run.name)
  places: dict[Place, list[int]] = {}
  for source, document, position in sorted(first):
    places.setdefault((source, position), []).append(document)
  pooled = {}
  for (source, position), documents in places.items():
    keys = [(source, d, position) for d in documents]
    pooled[source, position] = _Pooled(
      documents=np.array(documents),
      tokens=np.array([first[k].tokens for k in keys]),
      checksum=np.array([first[k].checksum for k in keys]),
      frozen=np.array([[t[k].frozen for k in keys] for t in tables]),
      augmented=np.array([[t[k].augmented for k in keys] for t in tables]),
    )
  return pooled


def _same_tokens(first, other, first_name: str, name: str) -> None:
  for key in sorted(first.keys() | other.keys()):
    a, b = first.get(key), other.get(key)
    if (
      a is None
      or b is None
      or ((a.tokens, a.checksum) != (b.tokens, b.checksum))
    ):
      source, document, position = key
      raise UserError(
        f"{first_name} and {name} were not evaluated on the same tokens "
        f"({source}, document {document}, position {position}): give all rows "
        "one eval.context, not 0, and run the sweep again: finished runs only "
        "report again"
      )


def _check_tokens(pooled: Mapping[str, Mapping[Place, _Pooled]]) -> None:
  """Refuses rows that were evaluated on other tokens than the first."""
  names = list(pooled)
  for name in names[1:]:
    _same_tokens(_flat(pooled[names[0]]), _flat(pooled[name]), names[0], name)


@dataclasses.dataclass(frozen=True)
class _Which:
  """Of one document at one place."""

  tokens: int
  checksum: int


def _flat(row: Mapping[Place, _Pooled]) -> dict[tuple[str, int, int], _Which]:
  return {
    (source, int(d), position): _Which(int(t), int(c))
    for (source, position), p in row.items()
    for d, t, c in zip(p.documents, p.tokens, p.checksum, strict=True)
  }


def _cells(
  row: Mapping[Place, _Pooled], reference: Mapping[Place, _Pooled] | None
) -> dict[Place, Cell]:
  cells = {}
  for place, p in row.items():
    frozen, mean, total = p.frozen.mean(0), p.augmented.mean(0), p.tokens.sum()
    other = None
    if reference:
      yours = reference[place].augmented.mean(0)
      other = _interval(yours, mean, p.tokens)
    cells[place] = Cell(
      against_frozen=_interval(frozen, mean, p.tokens),
      seeds=tuple(
        _interval(*one, p.tokens).change
        for one in zip(p.frozen, p.augmented, strict=True)
      ),
      against_reference=other,
      frozen_nll=float(frozen.sum() / total),
      nll=float(mean.sum() / total),
      tokens=int(total),
      documents=len(p.documents),
    )
  return cells


def _interval(base, other, tokens) -> Interval:
  return Interval(
    *bootstrap.paired_interval(base, other, tokens, seed=RESAMPLING_SEED)
  )


def _problems(runs: Sequence[Run]):
  """Exact match by kind, column and seed."""
  if not runs or not asks_problems(runs[0].built):
    return {}
  found = [_answers(run) for run in runs]
  return {
    kind: {
      column: tuple(f[kind][column] for f in found) for column in found[0][kind]
    }
    for kind in found[0]
  }


def _answers(run: Run) -> dict[str, dict[str, tuple[int, int]]]:
  """Kind -> column -> (right, asked)."""
  if configs.has_decoder(run.config):
    return exact_match.read(run.workdir / "report")
  prefix, figures = "problems ", _figures(run)
  return {
    key.removeprefix(prefix): {
      bootstrap.AUGMENTED: run_report.right_asked(value)
    }
    for key, value in figures.items()
    # A source of text may be called problems, too.
    if key.startswith(prefix) and isinstance(value, str)
  }


def _bits(runs: Sequence[Run]) -> dict[str, tuple[float, ...]]:
  """Held-out bits a token, by source, of each run."""
  suffix, figures = " held-out bits per token", [_figures(run) for run in runs]
  return {
    key.removesuffix(suffix): tuple(f[key] for f in figures)
    for key in (figures[0] if figures else ())
    if key.endswith(suffix)
  }


def _figures(run: Run) -> dict[str, Any]:
  """report.json, which a decoder's training ends with."""
  path = run.workdir / "report.json"
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise UserError(
      f"{path} cannot be read ({type(e).__name__}): run it again"
    ) from e


def asks_problems(built: Built) -> bool:
  """Whether a row's runs answer problems at their end."""
  sources = built.config.data.sources.values()
  return bool(built.config.eval.problems) and any(
    s.kind == "problems" and s.weight for s in sources
  )


def training_seconds(run: Run) -> float:
  """Wall time of a run's steps, over all its starts.

  Raises:
    UserError: a file that cannot be read.
  """
  path = run.workdir / "speed.jsonl"
  try:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    steps = np.array([line["step"] for line in lines])
    times = np.array([line["step_time"] for line in lines])
  except (OSError, ValueError, KeyError) as e:
    raise UserError(f"{path} cannot be read ({e}): train it again") from e
  return float(np.diff(steps, prepend=0) @ times)
