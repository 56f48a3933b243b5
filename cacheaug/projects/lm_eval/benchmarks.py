"""Benchmarks with and without latents, through lm_eval (the `eval` extra).

  lm = cacheaug.load(DECODER).with_coprocessor(COPROCESSOR)
  scores = run_tasks(lm, ["gsm8k", "arc_easy"], data=DIR, limit=100)
  print(format_scores(scores))

Both columns answer the same documents after one reading of each prompt, so
that their difference has an interval of its own, by document.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np

from cacheaug.config import nearest
from cacheaug.errors import UserError
from cacheaug.evals import report
from cacheaug.lm import LM
from cacheaug.projects.lm_eval.answering import AUGMENTED, FROZEN, Answerer
from cacheaug.projects.lm_eval.benchmark_tasks import BENCHMARKS

THOUGHT = "Let's think step by step."
_Z95 = 1.959964


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over documents."""

  mean: float
  stderr: float  # nan for a single document
  documents: int

  @classmethod
  def of(cls, values: Sequence[float]) -> "Estimate":
    """Of a value a document; the sample's standard deviation over root n."""
    n = len(values)
    spread = np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return cls(float(np.mean(values)), float(spread), n)

  @property
  def interval(self) -> tuple[float, float]:
    """95 %, by the normal law."""
    half = _Z95 * self.stderr
    return self.mean - half, self.mean + half


@dataclasses.dataclass(frozen=True)
class Values:
  """One metric's values, a document each, in both columns' same order.

  Attributes:
    column: 'frozen' and, where latents were asked for, 'augmented'.
  """

  column: dict[str, tuple[float, ...]]

  @property
  def difference(self) -> Estimate | None:
    """Augmented less frozen, paired by document."""
    if AUGMENTED not in self.column:
      return None
    both = zip(self.column[AUGMENTED], self.column[FROZEN], strict=True)
    return Estimate.of([a - f for a, f in both])

  @property
  def changed(self) -> tuple[int, int]:
    """Documents that the latents made better, and worse."""
    both = list(
      zip(self.column.get(AUGMENTED, ()), self.column[FROZEN], strict=False)
    )
    return sum(a > f for a, f in both), sum(a < f for a, f in both)


@dataclasses.dataclass(frozen=True)
class Score:
  """One benchmark.

  Attributes:
    task: its name.
    title: the paper's.
    shots: worked examples before each document.
    shown: (metric, filter) that the table shows.
    values: of every (metric, filter) that lm_eval reports.
    subsets: names of those evaluated, of how many there are.
    known_subsets: how many there are.
    files: that were read, below the data directory.
    met: counts of requests (see `Answerer.counts`), and of empty answers by
      column ('frozen empty answers').
    cot: the words that asked for a chain of thought, if any.
  """

  task: str
  title: str
  shots: int
  shown: tuple[str, str]
  values: dict[tuple[str, str], Values]
  subsets: tuple[str, ...]
  known_subsets: int
  files: tuple[str, ...]
  met: dict[str, int]
  cot: str = ""

  @property
  def main(self) -> Values:
    """What the table shows."""
    return self.values[self.shown]

  def estimate(self, column: str) -> Estimate:
    """Of what the table shows."""
    return Estimate.of(self.main.column[column])


def run_tasks(
  lm: LM,
  tasks: Sequence[str],
  *,
  data: str | pathlib.Path,
  limit: int = 0,
  batch: int = 8,
  latents: bool | None = None,
  cot: str = "",
  max_gen_toks: int = 0,
  execute: bool = False,
  say: Callable[[str], None] = lambda line: None,
) -> list[Score]:
  """Evaluates benchmarks of `BENCHMARKS` on local files.

  All files are read and checked before anything is computed.

  Args:
    lm: with a tokenizer, and a coprocessor where latents are asked for.
    tasks: names; 'all' for those whose files are there.
    data: the directory of the files named in benchmark_tasks.py.
    limit: documents a benchmark, spread over its subsets; 0 for all.
    batch: contexts at a time.
    latents: the augmented column beside the frozen one; by default where a
      coprocessor is attached.
    cot: words put after each prompt, in place of worked examples (zero-shot
      chain of thought): THOUGHT is customary. For tasks that generate.
    max_gen_toks: in place of the tasks' own most new tokens; 0 keeps those.
    execute: consent to run programs that the model writes, on this machine.
    say: called with one line for each finished benchmark.

  Raises:
    UserError: a task that does not exist, files that are missing or of
      another form, no consent, no lm_eval; names what to change.
  """
  prepared = prepare(
    tasks,
    data=data,
    limit=limit,
    cot=cot,
    max_gen_toks=max_gen_toks,
    execute=execute,
  )
  answerer = Answerer(lm, latents=latents, batch=batch)
  scores = []
  for task in prepared:
    scores.append(_run(answerer, task))
    say(_line(scores[-1]))
  return scores


def prepare(tasks: Sequence[str], **options: Any) -> "list[Any]":
  """The tasks' documents and prompts; arguments as of `run_tasks`.

  Raises:
    UserError: as of `run_tasks`.
  """
  names = check(
    tasks, cot=options["cot"], execute=options["execute"], data=options["data"]
  )
  for key in ("limit", "max_gen_toks"):
    if options[key] < 0:
      raise UserError(f"{key}={options[key]} must be 0 (off) or more")
  try:
    import lm_eval.api.task  # noqa: F401
  except ImportError as e:
    raise UserError(
      f"lm_eval is missing ({e}): pip install 'cacheaug[eval]'"
    ) from e
  from cacheaug.projects.lm_eval import tasks as lm_eval_tasks

  with quiet():
    return [lm_eval_tasks.prepare(name, **options) for name in names]


def check(
  tasks: Sequence[str], *, cot: str, execute: bool, data: str | pathlib.Path
) -> list[str]:
  """The tasks' names, each once.

  Raises:
    UserError: one that does not exist, that runs code without consent, or
      that has no chain of thought to ask for; or no such directory.
  """
  if isinstance(tasks, str):
    raise UserError("tasks is one string: give a list of names")
  if not tasks:
    raise UserError(f"no task is named: give some of {', '.join(BENCHMARKS)}")
  data = pathlib.Path(data).expanduser()
  if not data.is_dir():
    raise UserError(
      f"{data}: no such directory: give the one that holds the benchmarks' "
      "files (their names: cacheaug/projects/lm_eval/benchmark_tasks.py)"
    )
  names = []
  for name in dict.fromkeys(tasks):
    names += _present(data, cot, execute) if name == "all" else [name]
  for name in names:
    if name not in BENCHMARKS:
      hint = nearest(name, list(BENCHMARKS))
      raise UserError(
        f"task {name!r} does not exist{hint or ': ' + ', '.join(BENCHMARKS)}"
      )
    benchmark = BENCHMARKS[name]
    if benchmark.executes and not execute:
      raise UserError(
        f"task {name!r} runs programs that the model writes, with your rights "
        "on this machine: consent with --execute (execute=True) or leave it "
        "out"
      )
    if cot and benchmark.thought_filter is None:
      able = [k for k, b in BENCHMARKS.items() if b.thought_filter is not None]
      raise UserError(
        f"task {name!r} has no zero-shot chain of thought (it chooses among "
        "given answers, ends at once, or is written to reason as it is): "
        f"leave cot out, or give {', '.join(able)}"
      )
  return list(dict.fromkeys(names))


def _present(data: pathlib.Path, cot: str, execute: bool) -> list[str]:
  """Of all tasks those that have files and may run."""
  found = []
  for name, b in BENCHMARKS.items():
    there = any(any(data.glob(f.format(subset="*"))) for f in b.files)
    able = not cot or b.thought_filter is not None
    if there and able and (execute or not b.executes):
      found.append(name)
  if not found:
    raise UserError(f"{data}: holds no benchmark's file that may be run")
  return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without lm_eval's and datasets' own lines and bars below errors."""
  import datasets
  import lm_eval.api.task
  import tqdm

  bar = functools.partial(tqdm.tqdm, disable=None)  # on a terminal alone
  logger = logging.getLogger("lm_eval")
  before, bars = logger.level, datasets.are_progress_bars_disabled()
  logger.setLevel(logging.ERROR)
  datasets.disable_progress_bars()
  try:
    with mock.patch.object(lm_eval.api.task, "tqdm", bar):
      yield
  finally:
    logger.setLevel(before)
    if not bars:
      datasets.enable_progress_bars()


def _run(answerer: Answerer, task: Any) -> Score:
  """All of one benchmark's documents, in both columns."""
  from cacheaug.projects.lm_eval import tasks as lm_eval_tasks
  from cacheaug.projects.lm_eval.model import AugmentedLM

  answerer.counts.clear()
  met: dict[str, int] = {}
  values: dict[tuple[str, str], dict[str, list[float]]] = {}
  for column in answerer.columns:
    model = AugmentedLM(answerer=answerer, latents=column == AUGMENTED)
    with quiet():
      samples = lm_eval_tasks.evaluate(model, task.tasks)
    # The second column finds its answers ready; its requests are the same.
    met = met or dict(answerer.counts)
    empty = 0
    for sample in samples:
      wrong = lm_eval_tasks.is_empty(sample)
      shown = sample["filter"] == task.shown[1]
      empty += wrong and shown
      for metric in sample["metrics"]:
        value = 0.0 if wrong else float(sample[metric])
        key = metric, sample["filter"]
        values.setdefault(key, collections.defaultdict(list))[column].append(
          value
        )
    met[f"{column} empty answers"] = empty
  return Score(
    task=task.name,
    title=BENCHMARKS[task.name].title,
    shots=task.shots,
    shown=task.shown,
    values={
      key: Values({c: tuple(v) for c, v in columns.items()})
      for key, columns in values.items()
    },
    subsets=task.subsets,
    known_subsets=task.known_subsets,
    files=task.files,
    met=met,
    cot=task.cot,
  )


HEADER = (
  "benchmark",
  "setting",
  "documents",
  "frozen",
  "augmented",
  "difference (95 %)",
  "better / worse",
)


def cells(score: Score) -> tuple[str, ...]:
  """A line of the table, percent; see HEADER."""
  frozen = score.estimate(FROZEN)
  setting = f"{score.shots}-shot {score.shown[0]}"
  if score.known_subsets > 1:
    setting += f", {len(score.subsets)} of {score.known_subsets} subsets"
  if score.cot:
    setting += ", chain of thought"
  row = [score.title, setting, str(frozen.documents), _percent(frozen)]
  difference = score.main.difference
  if difference is None:
    return (*row, "", "", "")
  low, high = difference.interval
  better, worse = score.main.changed
  return (
    *row,
    _percent(score.estimate(AUGMENTED)),
    f"{100 * difference.mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})",
    f"{better} / {worse}",
  )


def format_scores(scores: Sequence[Score]) -> str:
  """The table as markdown, and what was met below it."""
  rows = [HEADER, ("---",) * len(HEADER), *map(cells, scores)]
  lines = ["| " + " | ".join(row) + " |" for row in rows]
  lines += ["", *(_met(score) for score in scores)]
  return "\n".join(lines) + "\n"


def section(scores: Sequence[Score]) -> report.Section:
  """The scores' section of a report's page, and its files."""
  note = (
    "Percent, ± the standard error over documents. Both columns answer the "
    "same documents after one reading of each prompt, the augmented one with "
    "latents at the prompt's end; the difference's 95 % interval is paired "
    "by document. benchmarks.json has each document's value."
  )
  parts = ("## Benchmarks", format_scores(scores), note)
  return report.Section(parts, contents(scores))


def contents(scores: Sequence[Score]) -> dict[str, bytes]:
  """Files of a report: benchmarks.md and benchmarks.json.

  The second holds each document's value in each column, for every metric.
  """
  content = [
    {
      "task": s.task,
      "shots": s.shots,
      "shown": list(s.shown),
      "subsets": list(s.subsets),
      "files": list(s.files),
      "cot": s.cot,
      "met": s.met,
      "values": [
        {"metric": metric, "filter": name, **v.column}
        for (metric, name), v in s.values.items()
      ],
    }
    for s in scores
  ]
  return {
    "benchmarks.json": json.dumps(content, indent=1).encode(),
    "benchmarks.md": format_scores(scores).encode(),
  }


def _percent(estimate: Estimate) -> str:
  return f"{100 * estimate.mean:.2f} ± {100 * estimate.stderr:.2f}"


def _line(score: Score) -> str:
  names = ("", "", "documents", FROZEN, AUGMENTED, "difference", "")
  named = zip(names, cells(score), strict=True)
  return f"{score.title}: " + ", ".join(
    f"{name} {cell}" for name, cell in named if name and cell
  )


def _met(score: Score) -> str:
  """What the reader of a row must know, in one line."""
  notes = [f"{score.title}: {', '.join(score.files)}"]
  met = score.met
  notes.append(f"{met.get('requests', 0)} requests")
  if met.get("truncated"):
    notes.append(f"{met['truncated']} cut on the left")
  if met.get("empty"):
    notes.append(f"{met['empty']} with an empty context")
  if met.get("melted"):
    notes.append(
      f"{met['melted']} continuations that their context's last token "
      "swallows, encoded alone"
    )
  if met.get("short"):
    notes.append(f"{met['short']} too short for latents, answered without")
  for column in (FROZEN, AUGMENTED):
    count = met.get(f"{column} empty answers", 0)
    if count:
      notes.append(f"{count} empty answers of the {column} decoder, wrong")
  return "- " + "; ".join(notes)
