"""Deliberate once, answer many: latents in a store before questions come.

  python benchmarks/ask_many.py --workdir=runs/before_question

For a run of configs/before_question.py. Facts of held-out cycles are read, get
their latents and are stored (`stored`); then each question is asked by itself,
one at a time, in three ways that take turns: the frozen decoder reads facts and
question; so it does, and latents come after the question (--after); it opens
what is stored and reads the question. Right answers with 95 % intervals over
cycles, and milliseconds an answer, programs compiled: the median of the clock,
and of the processor's time, which other work on the machine disturbs less.
"""

import statistics
import tempfile
import time

import numpy as np
from absl import flags, logging

from cacheaug import build
from cacheaug.data import problem_rows, problems
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, report, run_report
from cacheaug.lm import LM
from cacheaug.projects.context_store.lm import with_store
from cacheaug.projects.context_store.store import Store
from cacheaug.run import command
from cacheaug.weights import trained

flags.DEFINE_string("workdir", "", "a run of configs/before_question.py")
flags.DEFINE_string(
  "after", "shipped:hops_coprocessor", "of the same decoder, for comparison"
)
flags.DEFINE_integer("cycles", 128, "held-out ones, each with its questions")

_NEW = 3  # tokens at most, of an answer of one


def cells(right: np.ndarray, seconds: list[tuple[float, float]]) -> list[str]:
  """Of right [cycles, questions] and (clock, processor) of each answer."""
  shares = np.concatenate(
    [
      drawn @ right.mean(1) / len(right)
      for drawn in bootstrap.resample(len(right), seed=0)
    ]
  )
  low, high = 100 * np.percentile(shares, (2.5, 97.5))
  clock, busy = (1e3 * statistics.median(x) for x in zip(*seconds, strict=True))
  share = f"{100 * right.mean():.1f} ({low:.1f} to {high:.1f})"
  return [share, f"{clock:.2f}", f"{busy:.2f}"]


def ask(lm: LM, prompt: str, latents: bool) -> tuple[str, tuple[float, float]]:
  """The line that is said, and seconds of the clock and of the processor."""
  begin = time.perf_counter(), time.process_time()
  (said,) = lm.generate([prompt], _NEW, latents=latents, stop=("\n",))
  return said, (time.perf_counter() - begin[0], time.process_time() - begin[1])


def measure(
  workdir: str, after: str, cycles: list[problems.Problem]
) -> list[tuple[str, ...]]:
  """Header and a row a way.

  Raises:
    UserError: the run or the coprocessor cannot be read.
  """
  found = build.open_lm(workdir, "", "", latents=True)
  facts = [cycle.question[: cycle.facts] for cycle in cycles]
  asked = [
    [turn.question.removeprefix(fact) for turn in cycle.turns]
    for cycle, fact in zip(cycles, facts, strict=True)
  ]
  with tempfile.TemporaryDirectory() as scratch:
    stored = with_store(found, Store(scratch))
    deliberated = []
    for fact in facts:
      begin = time.perf_counter(), time.process_time()
      stored.fill([stored.encode(fact)], True, 1)
      now = time.perf_counter(), time.process_time()
      deliberated.append((now[0] - begin[0], now[1] - begin[1]))
    ways = {
      "frozen": (found, False),
      "latents after the question": (found.with_coprocessor(after), True),
      "latents before it, stored": (stored, True),
    }
    right: dict[str, list[bool]] = {name: [] for name in ways}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for cycle, fact, questions in zip(cycles, facts, asked, strict=True):
      for turn, question in zip(cycle.turns, questions, strict=True):
        for name, (lm, latents) in ways.items():
          said, took = ask(lm, fact + question, latents)
          right[name].append(said == turn.answer)
          seconds[name].append(took)
  skip = len(asked[0])  # the first cycle's, which compile
  rows = [("", "right, %", "ms", "ms of the processor")]
  for name in ways:
    shaped = np.reshape(right[name], (len(cycles), -1)).astype(float)
    rows.append((name, *cells(shaped, seconds[name][skip:])))
  clock, busy = (
    1e3 * statistics.median(x) for x in zip(*deliberated[1:], strict=True)
  )
  rows.append(
    ("facts read, latents, stored", "", f"{clock:.2f}", f"{busy:.2f}")
  )
  return rows


def main() -> None:
  """Prints the table."""
  values = flags.FLAGS
  if not values.workdir:
    raise UserError("--workdir: give a run of configs/before_question.py")
  if values.cycles < 2:
    raise UserError(f"--cycles={values.cycles} must be at least 2")
  logging.set_verbosity(logging.WARNING)  # the store reports every prompt
  config = trained.read_run(values.workdir).config
  (name,) = run_report.source_names(config)
  options = problem_rows.options_of(
    config.data.sources[name], f"data.sources.{name}"
  )
  cycles = [
    problems.generate(0, i, options, split="validation")
    for i in range(values.cycles)
  ]
  print(report.aligned(measure(values.workdir, values.after, cycles)))


if __name__ == "__main__":
  command.run(main, __doc__)
