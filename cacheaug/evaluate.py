"""What latents gain on held-out text, and what is in them.

  python -m cacheaug.evaluate --workdir=runs/tiny_coprocessor
  python -m cacheaug.evaluate --config=configs/tiny_coprocessor.py \
      --coprocessor=shipped:tiny_coprocessor --out=runs/evaluation
  python -m cacheaug.evaluate --workdir=DIR --latents=2,4 --text=book.txt \
      --out=runs/book

The paper's table 1: latents after every token of the text, perplexity of the
tokens 1 to eval.ahead after them against the frozen decoder's, with 95 %
intervals over documents. --latents uses fewer than were trained (the last soft
tokens; all columns are over the same tokens). Then the diagnostics: other
latents in the same places, their geometry, the attention they get, the tokens
nearest to them (evals/latent_stats.py).

With --tasks, the paper's table 2, by lm_eval on local files: the frozen decoder
and the augmented one answer the same documents, latents at each prompt's end.

  python -m cacheaug.evaluate --workdir=DIR --tasks=gsm8k,arc_easy \
      --data=BENCHMARKS --limit=100 --notables --out=runs/scores
  python -m cacheaug.evaluate --decoder=DIR --tasks=gsm8k --data=BENCHMARKS \
      --out=runs/frozen

The second is a decoder without a coprocessor.

Text is streamed, eval.batch sequences at a time: memory does not grow with it,
lower eval.batch if a batch does not fit. Without --text it is the held-out text
of the run's own sources. The report appears whole at the end in --out, by
default WORKDIR/report/evaluation; nothing that is there is replaced.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from cacheaug import build, validate
from cacheaug import config as configs
from cacheaug.augment import coprocessor
from cacheaug.augment.traces import Layout
from cacheaug.data import sources
from cacheaug.errors import UserError
from cacheaug.evals import (
  diagnose,
  diagnosis_section,
  page,
  perplexity,
  report,
  run_report,
)
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.evals.diagnose import Diagnosis
from cacheaug.evals.perplexity import Batch
from cacheaug.lm import LM
from cacheaug.run import command, machine
from cacheaug.run.files import refuse_remote
from cacheaug.run.metrics import Progress
from cacheaug.weights import trained

TEXT = "text"  # the name of --text as a source
_COMPARED = (
  "documents.csv holds the sums that tables and intervals are made of: with "
  "`cacheaug.evals.bootstrap.compare` two evaluations of the same tokens are "
  "compared directly."
)


@dataclasses.dataclass(frozen=True)
class Tasks:
  """Benchmarks that are asked for; keys of benchmarks.run_tasks."""

  names: tuple[str, ...] = ()
  data: str = ""
  limit: int = 0
  batch: int = 8
  cot: str = ""
  execute: bool = False


def open_config(
  workdir: str, coproc: str, given: ConfigDict | None, decoder: str = ""
) -> tuple[ConfigDict, str]:
  """The config to evaluate by, and where the coprocessor is, '' for none.

  Args:
    workdir: of a run, or ''.
    coproc: an export, or ''.
    given: of --config.
    decoder: of --decoder, alone.

  Raises:
    UserError: flags that do not go together, or no run in the workdir.
  """
  if decoder:
    if workdir or coproc or given is not None:
      raise UserError(
        "--decoder is a decoder alone: leave out --workdir, --config and "
        "--coprocessor, or give the decoder as --config.decoder.path"
      )
    config = configs.base()
    config.decoder.path = decoder
    return configs.resolve(config), ""
  if bool(workdir) == bool(coproc):
    raise UserError(
      "give either --workdir, or --config and --coprocessor, or --decoder"
    )
  if coproc:
    if given is None:
      raise UserError(
        "--config is missing: the text and decoder to evaluate on"
      )
    return configs.resolve(given), coproc
  if given is not None:
    raise UserError(
      "--workdir and --config: a run has its own config; give one of the two"
    )
  run = trained.read_run(workdir)
  if run.spec is None:
    raise UserError(
      f"--workdir={workdir} holds a decoder (objective='language_model'): give "
      "a coprocessor's run"
    )
  return run.config, workdir


def use_text(config: ConfigDict, path: str, field: str) -> str:
  """Puts one's own text in place of the sources; returns the split to read.

  Raises:
    UserError: neither .txt nor .jsonl (or .gz of either).
  """
  kinds = {".txt": "text", ".jsonl": "jsonl"}
  suffix = Path(path.removesuffix(".gz")).suffix
  if suffix not in kinds:
    raise UserError(
      f"--text={path} is neither .txt nor .jsonl (nor .gz of them): give a "
      "text file, one document, or JSON lines, a document each"
    )
  refuse_remote(path, "--text")
  if not Path(path).expanduser().is_file():
    raise UserError(f"--text={path}: no such file")
  source = sources.source_defaults()
  source.kind, source.field = kinds[suffix], field
  source.path = str(Path(path).expanduser())
  config.data.sources = ConfigDict({TEXT: source})
  config.data.validation_fraction = 0.0
  # A text file has no separate answers.
  config.data.answers_only = config.data.results = False
  return "train"


def asked_latents(asked: list[str], spec: Layout) -> list[int]:
  """N of each column, ascending; as trained by default.

  Raises:
    UserError: not numbers, or more than were trained.
  """
  try:
    found = sorted({int(n) for n in asked}) or [spec.latents]
  except ValueError:
    raise UserError(
      f"--latents={','.join(asked)}: give numbers, as 1,2,4"
    ) from None
  for n in found:
    if not 1 <= n <= spec.latents:
      raise UserError(
        f"--latents={n}: this coprocessor was trained for {spec.latents}; give "
        f"1 to {spec.latents}"
      )
  return found


def adapt(config: ConfigDict, found: LM) -> Layout:
  """Checks the text's layout for this coprocessor; its spec for the table.

  Raises:
    UserError: no room, in sequences or in the decoder's positions.
  """
  spec = found.coprocessor.spec
  config.coprocessor.latents = spec.latents
  config.coprocessor.positions = spec.positions
  config.coprocessor.kind = spec.kind.value
  config.traces.rounds, config.traces.stride = spec.rounds, spec.stride
  validate.check_eval(config, spec)
  validate.check_model(config, found.model.config)
  return spec.with_horizon(config.eval.ahead)


def evaluate(
  found: LM,
  text: Callable[[], Iterable[Batch]],
  spec: Layout,
  *,
  latents: list[int],
  context: int,
  diagnostics: bool,
  seed: int = 0,
) -> tuple[dict[int, DocumentSums], Diagnosis | None]:
  """Table 1, N -> sums, and, if asked for, diagnostics of one text.

  Args:
    found: decoder and coprocessor.
    text: gives the same batches at each call.
    spec: the coprocessor's, with A of the table.
    latents: N of each column.
    context: tokens that precede and include a point, in all columns.
    diagnostics: of the trained N.
    seed: of who gets whose latents.

  Raises:
    UserError: no token to compare.
  """
  args, coproc = (found.model, found.decoder), found.coprocessor.params
  tables = {}
  for n in latents:
    params, fewer = coprocessor.fewer(coproc, spec, n)
    tables[n] = perplexity.coprocessor_sums(
      *args, params, text(), fewer, context=context
    )
    if not len(tables[n].documents):
      raise UserError(
        "config.eval: no token to compare: give longer or more documents"
      )
  diagnosed = None
  if diagnostics:
    diagnosed = diagnose.diagnose(
      *args, coproc, text, spec, context=context, seed=seed
    )
  return tables, diagnosed


def describe(config: ConfigDict, path: str, found: LM) -> dict[str, Any]:
  """What was run, for the page."""
  decoder = f"{config.decoder.path} ({found.fingerprint})"
  where = {
    "activations": str(found.model.dtype),
    "hardware": machine.hardware(),
    "commit": machine.commit(),
  }
  if found.coprocessor is None:
    return {"decoder": decoder, "coprocessor": "none", **where}
  spec = found.coprocessor.spec
  sizes = [x.size for x in jax.tree.leaves(found.coprocessor.params)]
  return {
    "decoder": decoder,
    "coprocessor": f"{path}, {sum(sizes):,} parameters",
    "latents N, trained": spec.latents,
    "ahead tokens A, trained": spec.ahead,
    "kind": spec.kind,
    "positions": spec.positions,
    "start": spec.start,
    "sequence": config.data.sequence,
    "sequences of each text, at most": config.eval.sequences,
    "context before a point": config.eval.context or spec.context_needed,
    "seed": config.seed,
    **where,
  }


def show_token(tokenizer: Any, token: int) -> str:
  """A token as code for a Markdown page; its number where it is no text."""
  text = tokenizer.decode([token])
  if not text or "\ufffd" in text or "`" in text:
    return f"<{token}>"
  return f"`{repr(text)[1:-1]}`"


def run(
  config: ConfigDict,
  path: str,
  out: epath.Path,
  *,
  latents: list[str],
  text: str,
  field: str,
  diagnostics: bool,
  tables: bool = True,
  tasks: Tasks | None = None,
) -> epath.Path:
  """Evaluates, prints the tables and writes the report; returns its page.

  Args:
    config: of `open_config`; changed to what is evaluated.
    path: the coprocessor's; '' answers --tasks by the decoder alone.
    out: of page.check_out.
    latents: of --latents.
    text: of --text, '' for held-out text.
    field: of --field.
    diagnostics: look into the latents, too.
    tables: perplexity by position; without, there are no diagnostics either.
    tasks: benchmarks, if any.

  Raises:
    UserError: bad input, before anything is computed or written.
  """
  tables = tables and bool(path)
  if not tables and not tasks:
    why = "--notables" if path else "--decoder without a coprocessor"
    raise UserError(f"{why} leaves nothing to do: give --tasks")
  if tasks and not tasks.data:
    raise UserError("--tasks needs --data: the directory of their files")
  if not config.decoder.path:
    raise UserError("decoder.path is empty: a random decoder gains nothing")
  split = use_text(config, text, field) if text else "validation"
  found = build.load(config.decoder.path, dtype=config.precision.compute)
  asked: list[int] = []
  if path:
    found = found.with_coprocessor(path)
    asked = asked_latents(latents, found.coprocessor.spec)
    spec = adapt(config, found)
    if diagnostics and tables:
      diagnose.check_kind(spec)
    context = config.eval.context or found.coprocessor.spec.context_needed

  def read(name) -> Iterator[Batch]:
    tokenizer = found.tokenizer
    return run_report.held_out(config, tokenizer, name, split=split, mixed=True)

  names = run_report.source_names(config) if tables else []
  # Read once before anything is computed: bad text is refused here.
  try:
    batches = sum(1 for name in names for _ in read(name))
  except UserError as e:
    raise UserError(f"--text={text}: {e}" if text else str(e)) from e
  # Before, since the checkout may change while this runs.
  meta = describe(config, path, found)
  if tables:
    meta["text"] = text or f"held-out documents of {', '.join(names)}"
  scored = []
  if tasks:
    from cacheaug.projects.lm_eval import benchmarks

    options = dataclasses.asdict(tasks)
    scores = benchmarks.run_tasks(
      found, options.pop("names"), **options, say=print
    )
    scored.append(benchmarks.section(scores))
  done = 0
  total = (len(asked) + (2 if diagnostics else 0)) * batches
  sections, printed = [], []
  show = functools.partial(show_token, found.tokenizer)
  with Progress(total, 0, "evaluate") as progress:

    def counted(name):
      nonlocal done
      for batch in read(name):
        yield batch
        done += 1
        progress.update(done)

    for name in names:
      sums, diagnosis = evaluate(
        found,
        functools.partial(counted, name),
        spec,
        latents=asked,
        context=context,
        diagnostics=diagnostics,
        seed=config.seed,
      )
      sections.append(report.perplexity_section(name, sums, seed=config.seed))
      if diagnosis:
        sections.append(
          diagnosis_section.section(
            name, diagnosis, seed=config.seed, show=show
          )
        )
      for n, some in sums.items():
        rows = report.make_rows(some, seed=config.seed)
        printed.append(f"{name}: N={n}\n{report.format_table(rows)}\n")
  if sections:
    sections.append(report.Section([_COMPARED]))
  files = page.contents([*sections, *scored], meta)
  for table in printed:
    print(table)
  return page.write(out, files)


def tasks_of(values: Any) -> Tasks | None:
  """Of the flags; None where no benchmark is named.

  Raises:
    UserError: a benchmark option without --tasks.
  """
  if values.tasks:
    return Tasks(
      tuple(values.tasks),
      values.data,
      values.limit,
      values.batch,
      values.cot,
      values.execute,
    )
  for name in ("data", "limit", "cot", "execute"):
    if getattr(values, name):
      raise UserError(f"--{name} says how to run benchmarks: give --tasks, too")
  return None


def main() -> None:
  """Reads the flags that are defined below."""
  values = flags.FLAGS
  given = values.config if "config" in values else None
  config, path = open_config(
    values.workdir, values.coprocessor, given, values.decoder
  )
  out = values.out
  if not out and not values.workdir:
    raise UserError("--out is missing: a new directory for the report")
  written = run(
    config,
    path,
    page.check_out(out or f"{path.rstrip('/')}/report/evaluation"),
    latents=values.latents,
    text=values.text,
    field=values.field,
    diagnostics=values.diagnostics,
    tables=values.tables,
    tasks=tasks_of(values),
  )
  print(f"report: {written}")


if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "a run: its coprocessor, decoder and text")
  flags.DEFINE_string(
    "coprocessor", "", "with --config: an exported coprocessor, shipped:NAME"
  )
  flags.DEFINE_string(
    "decoder", "", "with --tasks: a decoder without a coprocessor"
  )
  flags.DEFINE_list(
    "latents", [], "N of each column, 1,2,4; as trained if none"
  )
  flags.DEFINE_string("text", "", "your own: .txt, or .jsonl, plain or .gz")
  flags.DEFINE_string("field", "text", "key of the text in each jsonl object")
  flags.DEFINE_string("out", "", "new directory for the report")
  flags.DEFINE_bool("diagnostics", True, "look into the latents, too")
  flags.DEFINE_bool("tables", True, "perplexity by position")
  flags.DEFINE_list(
    "tasks", [], "benchmarks, gsm8k,mmlu; 'all' that have files"
  )
  flags.DEFINE_string("data", "", "the directory of the benchmarks' files")
  flags.DEFINE_integer("limit", 0, "documents of each benchmark, 0 for all")
  flags.DEFINE_integer("batch", 8, "prompts at a time")
  flags.DEFINE_string(
    "cot", "", 'zero-shot, with these words: "Let\'s think step by step."'
  )
  flags.DEFINE_bool(
    "execute", False, "consent to run programs that the model writes"
  )
  if any(a.lstrip("-").startswith("config") for a in sys.argv[1:]):
    # Only then: cacheaug.run.command insists on a flag of this name.
    config_flags.DEFINE_config_file("config", help_string="text and decoder")
  command.run(main, __doc__)
