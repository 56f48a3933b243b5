"""What late latents cost: perplexity and exact match against lateness.

  python benchmarks/lateness.py --workdir=runs/on_time --workdir=runs/late

The latents of each run's coprocessor come 0 to 8 tokens after what it has
read (augment/traces.py). Perplexity change against the frozen decoder is over
the same tokens at every lateness: those of points where 8 is possible too.
Exact match, where the run's text has problems, in two ways: `said`, the
coprocessor has read the question and the decoder says so many tokens of the
answer by itself first (the paper's table 8); `early`, latents come at the
question's end and the coprocessor has not read its last so many tokens.

Two runs that differ in traces.late_max alone:

  python -m cacheaug.main --config=configs/tiny_coprocessor.py \
      --config.data.sources.code.weight=0.0 --config.optimizer.steps=3000 \
      --config.traces.late_max=0 --workdir=runs/on_time
  (the same with --config.traces.late_max=8 --workdir=runs/late)
"""

import dataclasses
import json
import pathlib
from typing import Any

from absl import flags

from cacheaug import build
from cacheaug.data import problem_rows
from cacheaug.errors import UserError
from cacheaug.evals import exact_match, perplexity, run_report
from cacheaug.lm import LM
from cacheaug.run import command
from cacheaug.weights import trained

flags.DEFINE_multi_string("workdir", [], "a run; may be repeated")
flags.DEFINE_list("late", [str(d) for d in range(9)], "tokens of lateness")
flags.DEFINE_list("positions", ["1", "2", "4", "8"], "ahead tokens reported")
flags.DEFINE_integer("sequences", 256, "held-out sequences of each source")
flags.DEFINE_integer("problems", 1024, "problems answered; 0: none")
flags.DEFINE_string("json", "", "file to write the figures to")


def measure(
  config: Any,
  found: LM,
  late: list[int],
  positions: tuple[int, ...],
  problems: int,
) -> dict[str, Any]:
  """Figures of one run by source and lateness."""
  spec, coproc = found.coprocessor.spec, found.coprocessor.params
  spec = dataclasses.replace(spec, ahead=max(positions))
  args = found.model, found.decoder
  out: dict[str, Any] = {}
  for name in run_report.source_names(config):
    batches = list(run_report.held_out(config, found.tokenizer, name))
    for d in late:
      rows = perplexity.by_position(
        *args,
        coproc,
        batches,
        spec,
        positions=positions,
        seed=config.seed,
        late=d,
        late_room=max(late),
      )
      key = f"{name} perplexity"
      out.setdefault(key, {})[d] = [dataclasses.asdict(r) for r in rows]
    source = config.data.sources[name]
    if source.kind != run_report.PROBLEMS or not problems:
      continue
    options = problem_rows.options_of(source, f"data.sources.{name}")
    asked = exact_match.of_problems(options, found.tokenizer, problems)
    rest = found.tokenizer, spec, asked
    out["frozen match"] = exact_match.exact_match(*args, None, *rest)
    for way in ("said", "early"):
      out[f"match, {way}"] = {
        d: exact_match.exact_match(
          *args, coproc, *rest, late=d, early=way == "early"
        )
        for d in late
      }
  return out


def show(figures: dict[str, Any], late: list[int]) -> list[str]:
  """A table of one run, a row a lateness."""
  lines = []
  for key, by_late in figures.items():
    if key == "frozen match":
      lines.append(
        f"  frozen decoder: {run_report.percent(by_late['all'])} right"
      )
      continue
    lines.append(f"  {key}")
    for d in late:
      if key.startswith("match"):
        lines.append(f"    d={d}: {run_report.percent(by_late[d]['all'])}")
        continue
      cells = [
        f"token {r['position']}: {r['change_percent']:+.2f} % "
        f"({r['low']:+.2f} to {r['high']:+.2f})"
        for r in by_late[d]
      ]
      lines.append(f"    d={d}: " + ", ".join(cells))
  return lines


def main() -> None:
  """Reads the flags above."""
  values = flags.FLAGS
  if not values.workdir:
    raise UserError("--workdir is missing: give one run or more")
  try:
    late = sorted(int(d) for d in values.late)
    positions = tuple(sorted(int(j) for j in values.positions))
  except ValueError:
    raise UserError("--late and --positions: give numbers, as 0,1,2") from None
  if not late or late[0] < 0 or not positions or positions[0] < 1:
    raise UserError("--late must be 0 or more, --positions 1 or more")
  results = {}
  for workdir in values.workdir:
    config = trained.read_run(workdir).config
    config.eval.sequences = values.sequences
    if not config.decoder.path:
      raise UserError(f"{workdir}: its decoder is random, latents gain nothing")
    found = build.load(config.decoder.path).with_coprocessor(workdir)
    figures = measure(config, found, late, positions, values.problems)
    results[workdir] = {"late_max": config.traces.late_max} | figures
    print(f"{workdir}: traces.late_max={config.traces.late_max}")
    print("\n".join(show(figures, late)) + "\n", flush=True)
  if values.json:
    path = pathlib.Path(values.json)
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  command.run(main, __doc__)
