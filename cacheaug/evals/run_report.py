"""The report at a run's end: tables, plot, exact match."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.augment import objective
from cacheaug.augment.traces import Layout
from cacheaug.data import opening, pipeline, problem_rows
from cacheaug.data.tokenizers import Tokenizer
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, exact_match, perplexity, report
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.model.transformer import Params, Transformer
from cacheaug.weights import trained

PROBLEMS = "problems"
CONTINUED = "continued"  # a decoder trained on from the frozen one


def held_out(
  config: ConfigDict,
  tokenizer: Tokenizer,
  name: str,
  *,
  split: str = "validation",
  mixed: bool = False,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of one source: eval.sequences of them, evenly spaced.

  Args:
    config: of the run.
    tokenizer: the decoder's.
    name: of the source.
    split: of its documents.
    mixed: a batch's sequences come from all over the text, so that it holds
      many documents; in order otherwise.
  """
  data = ConfigDict(config.data.to_dict())
  data.sources = ConfigDict({name: config.data.sources[name].to_dict()})
  batches = opening.open_batches(data, tokenizer, split=split, seed=config.seed)
  count = min(config.eval.sequences, batches.num_examples)
  chosen = np.linspace(0, batches.num_examples - 1, count).astype(int)
  size = min(config.eval.batch, count)
  runs = -(-count // size)
  for i in range(runs):
    here = chosen[i::runs] if mixed else chosen[i * size : (i + 1) * size]
    yield pipeline.pad_rows(batches.take(here), size)


def source_names(config: ConfigDict) -> list[str]:
  """Sources in use, problems last."""
  used = [k for k, v in config.data.sources.items() if v.weight]
  return sorted(used, key=lambda k: config.data.sources[k].kind == PROBLEMS)


def sums_by_source(
  config: ConfigDict,
  model: Transformer,
  decoder: Params,
  coproc: Params,
  tokenizer: Tokenizer,
  spec: Layout,
) -> dict[str, DocumentSums]:
  """The sums that each source's perplexity table is made of."""
  spec = spec.with_horizon(config.eval.ahead)
  return {
    name: perplexity.coprocessor_sums(
      model,
      decoder,
      coproc,
      held_out(config, tokenizer, name),
      spec,
      context=config.eval.context,
    )
    for name in source_names(config)
  }


def questions(
  config: ConfigDict, tokenizer: Tokenizer
) -> list[exact_match.Question]:
  """Held-out questions of the sources that have answers.

  eval.problems a source: generated problems by kind and steps, documents of an
  `answer_field` by source. [] where none are asked for.

  Raises:
    UserError: answers that cannot be compared.
  """
  found, count = [], config.eval.problems
  for name in source_names(config) if count else ():
    source = config.data.sources[name]
    if source.kind == PROBLEMS:
      options = problem_rows.options_of(source, f"data.sources.{name}")
      found += exact_match.of_problems(options, tokenizer, count)
    elif source.answer_field:
      marked = config.copy_and_resolve_references()
      marked.unlock()
      marked.data.answers_only = True
      # A row holds one document at least.
      marked.eval.sequences = max(count, config.eval.sequences)
      rows = held_out(marked, tokenizer, name)
      found += exact_match.of_rows(rows, tokenizer, count, name=name)
  return found


def answers(
  config: ConfigDict,
  model: Transformer,
  decoder: Params,
  coproc: Params | None,
  tokenizer: Tokenizer,
  spec: Layout | None,
) -> dict[str, tuple[int, int]]:
  """Exact match over `questions`; {} where none are asked for."""
  asked = questions(config, tokenizer)
  if not asked:
    return {}
  return exact_match.exact_match(model, decoder, coproc, tokenizer, spec, asked)


def percent(right_asked: tuple[int, int]) -> str:
  """'61.2 % (306/500)'."""
  right, asked = right_asked
  return f"{100 * right / asked:.1f} % ({right}/{asked})"


def right_asked(text: str) -> tuple[int, int]:
  """The two numbers in a text of `percent`; ValueError if it is none."""
  right, asked = text[text.rindex("(") + 1 :].rstrip(")").split("/")
  return int(right), int(asked)


def coprocessor_report(
  config: ConfigDict,
  workdir: str,
  model: Transformer,
  decoder: Params,
  coproc: Params,
  tokenizer: Tokenizer,
  spec: Layout,
  meta: dict[str, Any],
) -> str:
  """Writes report/; returns what the terminal shows."""
  args = config, model, decoder, coproc, tokenizer, spec
  sums = sums_by_source(*args)
  asked = questions(config, tokenizer)
  columns = {}
  if asked:
    columns[bootstrap.FROZEN] = exact_match.exact_match(
      model, decoder, None, tokenizer, None, asked
    )
    for name, found in _beside(config, model, decoder):
      columns[name] = exact_match.exact_match(
        model, decoder, found.params, tokenizer, found.spec, asked
      )
    columns[bootstrap.AUGMENTED] = exact_match.exact_match(
      model, decoder, coproc, tokenizer, spec, asked
    )
  return _write(config, workdir, sums, columns, meta)


def _beside(
  config: ConfigDict, model: Transformer, decoder: Params
) -> Iterator[tuple[str, Any]]:
  """Name and content of each coprocessor of eval.beside.

  Raises:
    UserError: none there, or one of another decoder.
  """
  for name, path in config.eval.beside.items():
    try:
      yield name, trained.open_coprocessor(path, model.config, decoder)
    except UserError as e:
      raise UserError(f"eval.beside.{name}={path!r}: {e}") from e


def _write(
  config: ConfigDict,
  workdir: str,
  sums: dict[str, DocumentSums],
  columns: dict[str, exact_match.Answers],
  meta: dict[str, Any],
  *,
  name: str = report.AUGMENTED_NAME,
  title: str = report.TITLE,
) -> str:
  """Writes report/; returns what the terminal shows.

  `columns` are of `exact_match`, {} where nothing is asked; `name` is what is
  compared with the frozen decoder.
  """
  by_source = {
    source: report.make_rows(some, seed=config.seed)
    for source, some in sums.items()
  }
  shown: dict[str, exact_match.Answers] = {}
  directory = epath.Path(workdir) / "report"
  if columns:
    exact_match.save(directory, columns)
    shown = {
      name if column == bootstrap.AUGMENTED else column: found
      for column, found in columns.items()
    }
    picture = {"exact_match.png": exact_match.plot(shown)}
    report.write_files(directory, picture)
  first, *others = by_source
  extras = {
    f"Perplexity change on {source}": {
      f"token {r.position}": (
        f"{r.change_percent:+.2f} % ({report.interval(r.low, r.high)}; "
        f"{r.tokens} tokens)"
      )
      for r in by_source[source]
    }
    for source in others
  }
  if shown:
    header, *cells = exact_match.table(shown)
    extras["Exact match on held-out questions"] = {
      row[0]: ", ".join(map(" ".join, zip(header[1:], row[1:], strict=True)))
      for row in cells
    }
  meta = {**meta, "evaluated on": f"{first}, held-out documents"}
  path = report.write_report(
    workdir,
    rows=by_source[first],
    meta=meta,
    documents=sums,
    extras=extras,
    title=title,
    name=name,
  )
  lines = []
  if shown:
    lines += [report.aligned(exact_match.table(shown)), ""]
  for source, rows in by_source.items():
    table = report.format_table(rows, name)
    lines += [f"{source}: held-out perplexity", table, ""]
  return "\n".join([*lines, f"report: {path}"])


def language_model_report(
  config: ConfigDict,
  workdir: str,
  model: Transformer,
  params: Params,
  tokenizer: Tokenizer,
  decoder: Params | None,
  meta: dict[str, Any],
) -> tuple[dict[str, Any], str]:
  """Held-out loss by source and exact match; figures, and as text.

  Of a decoder trained on from another, `decoder`, writes report/ too:
  perplexity by position, over the very tokens that a coprocessor's table of
  this config is over.
  """
  mask = config.traces.mask_documents
  loss = jax.jit(
    partial(objective.language_model_loss, model, mask_documents=mask)
  )
  figures: dict[str, Any] = {}
  for name in source_names(config):
    sums = [
      np.asarray(loss(params, batch))[:, 0]
      for batch in held_out(config, tokenizer, name)
    ]
    nll, count = np.sum(sums, axis=0, dtype=np.float64)
    figures[f"{name} held-out bits per token"] = nll / count / math.log(2)
    figures[f"{name} held-out tokens"] = int(count)
  found = answers(config, model, params, None, tokenizer, None)
  figures |= {f"problems {k}": percent(v) for k, v in found.items()}
  text = "\n".join(f"{k}: {v}" for k, v in figures.items())
  if decoder is None:
    return figures, text
  spec = configs.layout_of(config)
  spec = spec.with_horizon(config.eval.ahead)
  models = {
    bootstrap.FROZEN: (model, decoder),
    bootstrap.AUGMENTED: (model, params),
  }
  sums = {
    name: perplexity.plain_sums(
      models,
      held_out(config, tokenizer, name),
      spec,
      context=config.eval.context,
    )
    for name in source_names(config)
  }
  columns = {}
  if found:
    frozen = answers(config, model, decoder, None, tokenizer, None)
    columns = {bootstrap.FROZEN: frozen, bootstrap.AUGMENTED: found}
  title = "Perplexity change by position, continued training"
  table = _write(
    config, workdir, sums, columns, meta, name=CONTINUED, title=title
  )
  return figures, f"{text}\n\n{table}"
