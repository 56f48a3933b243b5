"""What a run reports at its end: tables, plot, exact match."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from cacheaug.augment import objective
from cacheaug.augment.traces import TraceSpec
from cacheaug.data import pipeline
from cacheaug.data.tokenizers import Tokenizer
from cacheaug.evals import exact_match, paired, perplexity, report
from cacheaug.evals.paired import DocumentSums
from cacheaug.model.transformer import Params, Transformer

PROBLEMS = "problems"


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
  batches = pipeline.open_batches(
    data, tokenizer, split=split, seed=config.seed
  )
  count = min(config.eval.sequences, batches.num_examples)
  chosen = np.linspace(0, batches.num_examples - 1, count).astype(int)
  size = min(config.eval.batch, count)
  runs = -(-count // size)
  for i in range(runs):
    here = chosen[i::runs] if mixed else chosen[i * size : (i + 1) * size]
    some = batches.take(here)
    missing = ((0, size - len(some["tokens"])), (0, 0))
    yield {
      "tokens": np.pad(some["tokens"], missing),
      "documents": np.pad(some["documents"], missing, constant_values=-1),
    }


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
  spec: TraceSpec,
) -> dict[str, DocumentSums]:
  """What one perplexity table a source is made of."""
  spec = dataclasses.replace(spec, ahead=config.eval.ahead, min_ahead=1)
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


def answers(
  config: ConfigDict,
  model: Transformer,
  decoder: Params,
  coproc: Params | None,
  tokenizer: Tokenizer,
  spec: TraceSpec | None,
) -> dict[str, tuple[int, int]]:
  """Exact match over the problem sources; {} where none are asked for."""
  found = {}
  for name in source_names(config):
    source = config.data.sources[name]
    if source.kind == PROBLEMS and config.eval.problems:
      found |= exact_match.exact_match(
        model,
        decoder,
        coproc,
        tokenizer,
        spec,
        count=config.eval.problems,
        kinds=tuple(source.kinds),
        steps=(source.steps_min, source.steps_max),
      )
  return found


def percent(right_asked: tuple[int, int]) -> str:
  """'61.2 % (306/500)'."""
  right, asked = right_asked
  return f"{100 * right / asked:.1f} % ({right}/{asked})"


def right_asked(text: str) -> tuple[int, int]:
  """What `percent` was made of; ValueError if it is none."""
  right, asked = text[text.rindex("(") + 1 :].rstrip(")").split("/")
  return int(right), int(asked)


def coprocessor_report(
  config: ConfigDict,
  workdir: str,
  model: Transformer,
  decoder: Params,
  coproc: Params,
  tokenizer: Tokenizer,
  spec: TraceSpec,
  meta: dict[str, Any],
) -> str:
  """Writes report/; returns what the terminal shows."""
  args = config, model, decoder, coproc, tokenizer, spec
  sums = sums_by_source(*args)
  by_source = {
    name: report.make_rows(some, seed=config.seed)
    for name, some in sums.items()
  }
  frozen = answers(config, model, decoder, None, tokenizer, None)
  augmented = answers(*args)
  if frozen:
    columns = {paired.FROZEN: frozen, paired.AUGMENTED: augmented}
    exact_match.save(epath.Path(workdir) / "report", columns)
  match = {
    k: f"frozen {percent(frozen[k])}, with latents {percent(augmented[k])}"
    for k in frozen
  }
  first, *others = by_source
  extras = {
    f"Perplexity change on {name}": {
      f"token {r.position}": (
        f"{r.change_percent:+.2f} % ({r.low:+.2f} to {r.high:+.2f}; "
        f"{r.tokens} tokens)"
      )
      for r in by_source[name]
    }
    for name in others
  }
  if match:
    extras["Exact match on held-out problems"] = match
  meta = {**meta, "evaluated on": f"{first}, held-out documents"}
  path = report.write_report(
    workdir, rows=by_source[first], meta=meta, documents=sums, extras=extras
  )
  lines = []
  for name, rows in by_source.items():
    lines += [f"{name}: held-out perplexity", report.format_table(rows), ""]
  lines += [f"problems {k}: {v}" for k, v in match.items()]
  return "\n".join([*lines, f"report: {path}"])


def language_model_report(
  config: ConfigDict,
  model: Transformer,
  params: Params,
  tokenizer: Tokenizer,
) -> tuple[dict[str, Any], str]:
  """Held-out loss by source and exact match; figures, and as text."""
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
  return figures, text
