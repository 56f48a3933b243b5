"""What latents on top of earlier latents gain, with and without training.

  python benchmarks/rounds.py --workdir=runs/once --workdir=runs/again

Each run's coprocessor is taken three ways over the same held-out tokens:

  once    latents after every point, and no more
  again   --rounds of them, one every --stride tokens (augment/rounds.py); with
          --stride=0 all at one point
  fresh   latents only where the last round of `again` has its own

Tokens are counted from the first point; those of `fresh` are the last round's.
Perplexity change is against the frozen decoder. Exact match, where the run's
text has problems: latents at the question's end alone, or at those points
before it too that make it a chain's last.

Two runs that differ in traces.rounds and traces.stride alone:

  python -m cacheaug.main --config=configs/tiny_coprocessor.py \
      --config.data.sources.code.weight=0.0 --config.traces.tail=8 \
      --config.optimizer.steps=1500 --workdir=runs/once
  (the same with --config.traces.rounds=2 --config.traces.stride=4
  --workdir=runs/again)
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from absl import flags

from cacheaug import build
from cacheaug.augment.traces import Layout
from cacheaug.data import problem_rows, problems
from cacheaug.errors import UserError
from cacheaug.evals import exact_match, perplexity, report, run_report
from cacheaug.evals.bootstrap import AUGMENTED, FROZEN, DocumentSums
from cacheaug.inference.session import InsertionSchedule
from cacheaug.lm import LM
from cacheaug.run import command
from cacheaug.weights import trained

flags.DEFINE_multi_string("workdir", [], "a run; may be repeated")
flags.DEFINE_integer("rounds", 2, "of latents")
flags.DEFINE_integer("stride", 4, "tokens between them; 0: all at one point")
flags.DEFINE_integer("ahead", 4, "tokens after the last round's latents")
flags.DEFINE_integer("sequences", 256, "held-out sequences of each source")
flags.DEFINE_integer("problems", 1024, "problems answered; 0: none")
flags.DEFINE_string("json", "", "file to write the figures to")


def by_way(
  found: LM, batches: list, again: Layout, seed: int
) -> dict[str, list]:
  """Rows of `report` by way and token after the first point."""
  single = dataclasses.replace(
    again, rounds=1, stride=0, ahead=again.tokens_predicted
  )
  moved = (
    again.tokens_predicted - again.ahead
  )  # tokens from the first point to the last
  parts: dict[tuple[str, int], list] = {}
  for batch in batches:
    args = found.model, found.decoder, found.coprocessor.params
    text = batch["tokens"], batch["documents"]
    frozen, once, weights = _arrays(
      perplexity.both_nll(*args, *text, spec=single)
    )
    _, chain, _ = _arrays(perplexity.both_nll(*args, *text, spec=again))
    # Row p of `fresh` is the trace after p + moved.
    fresh = np.pad(once, ((0, 0), (0, moved), (0, 0)))[:, moved:]
    # The same contexts for all: those with room for the whole chain.
    keep = weights[..., -1] > 0
    for j in range(again.tokens_predicted):
      columns = {"once": once[..., j], "again": chain[..., j]}
      if moved and j >= moved:
        columns["fresh"] = fresh[..., j - moved]
      for way, nll in columns.items():
        row = frozen[..., j][keep], nll[keep], batch["documents"][keep]
        parts.setdefault((way, j + 1), []).append(row)
  rows: dict[str, list] = {}
  for (way, j), some in parts.items():
    columns = map(np.concatenate, zip(*some, strict=True))
    rows.setdefault(way, []).append(_row(j, *columns, seed=seed))
  return rows


def _row(
  position: int,
  frozen: np.ndarray,  # [T] nats
  nll: np.ndarray,  # [T] nats
  documents: np.ndarray,  # [T]
  *,
  seed: int,
) -> report.PositionRow:
  """The row of a table from single tokens."""
  numbers, owner = np.unique(documents, return_inverse=True)
  sums = {
    name: np.bincount(owner, values)[:, None]
    for name, values in ((FROZEN, frozen), (AUGMENTED, nll))
  }
  tokens = np.bincount(owner)[:, None]
  by_document = DocumentSums((position,), numbers, tokens, 0 * tokens, sums)
  (row,) = report.make_rows(by_document, seed=seed)
  return row


def _arrays(found) -> list[np.ndarray]:
  return [np.asarray(x) for x in found]


def answered(
  found: LM, source: Any, count: int, plan: InsertionSchedule | None
) -> tuple[int, int]:
  """(right, asked); `plan` None is the frozen decoder."""
  options = problem_rows.options_of(source, "source")
  asked = [
    problems.generate(0, i, options, split="validation") for i in range(count)
  ]
  right = 0
  for first in range(0, count, exact_match.BATCH):
    some = asked[first : first + exact_match.BATCH]
    said = found.generate(
      [p.question for p in some],
      exact_match.ANSWER_TOKENS,
      latents=plan is not None,
      plan=plan,
      stop=["\n"],
    )
    right += sum(
      problems.check(p.answer, text) for p, text in zip(some, said, strict=True)
    )
  return right, count


def measure(
  config: Any, found: LM, again: Layout, count: int
) -> dict[str, Any]:
  """Figures of one run."""
  out: dict[str, Any] = {}
  before = tuple(again.stride * i for i in range(1, again.rounds))
  plans = {
    "frozen": None,
    "once": InsertionSchedule(),
    "again": InsertionSchedule(
      before=before if again.stride else (), rounds=again.rounds_per_point
    ),
  }
  for name in run_report.source_names(config):
    batches = list(run_report.held_out(config, found.tokenizer, name))
    rows = by_way(found, batches, again, config.seed)
    out[name] = {
      way: [dataclasses.asdict(r) for r in some] for way, some in rows.items()
    }
    source = config.data.sources[name]
    if source.kind == run_report.PROBLEMS and count:
      out["match"] = {
        way: answered(found, source, count, plan) for way, plan in plans.items()
      }
  return out


def show(figures: dict[str, Any]) -> list[str]:
  """Tables of one run."""
  lines = []
  for name, ways in figures.items():
    lines.append(f"  {name}")
    for way, rows in ways.items():
      if name == "match":
        lines.append(f"    {way}: {run_report.percent(rows)} right")
        continue
      for r in rows:
        lines.append(
          f"    {way:5} token {r['position']:>2}: {r['change_percent']:+.2f} % "
          f"({r['low']:+.2f} to {r['high']:+.2f}; {r['tokens']} tokens)"
        )
  return lines


def main() -> None:
  """Reads the flags above."""
  values = flags.FLAGS
  if not values.workdir:
    raise UserError("--workdir is missing: give one run or more")
  if values.rounds < 2:
    raise UserError(f"--rounds={values.rounds} must be 2 or more")
  results = {}
  for workdir in values.workdir:
    config = trained.read_run(workdir).config
    config.eval.sequences = values.sequences
    if not config.decoder.path:
      raise UserError(f"{workdir}: its decoder is random, latents gain nothing")
    found = build.load(config.decoder.path).with_coprocessor(workdir)
    again = dataclasses.replace(
      found.coprocessor.spec,
      rounds=values.rounds,
      stride=values.stride,
      ahead=values.ahead,
    )
    figures = measure(config, found, again, values.problems)
    layout = config.traces.rounds, config.traces.stride
    results[workdir] = {"trained": layout} | figures
    print(f"{workdir}: traces.rounds={layout[0]}, traces.stride={layout[1]}")
    print("\n".join(show(figures)) + "\n", flush=True)
  if values.json:
    path = pathlib.Path(values.json)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  command.run(main, __doc__)
