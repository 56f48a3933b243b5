"""From the sources of a config to batches; text is packed first."""

import os
import pathlib
import typing

from cacheaug import errors
from cacheaug.data import (
  packing,
  pipeline,
  problem_rows,
  shards,
  sources,
  tokenizers,
)

if typing.TYPE_CHECKING:
  import ml_collections


def open_batches(
  data_config: "ml_collections.ConfigDict",
  tokenizer: tokenizers.Tokenizer,
  *,
  split: str,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> pipeline.Batches:
  """Opens the sources of a config, packing those that are not packed yet.

  Args:
    data_config: sources (name -> the keys of `sources.source_defaults`),
      sequence (S), batch (B, global), cache_dir ('' for
      $XDG_CACHE_HOME/cacheaug or ~/.cache/cacheaug), validation_fraction,
      workers, answers_only.
    tokenizer: makes the tokens.
    split: 'train' or 'validation'.
    seed: any integer; decides order and training problems, not the split.
    process_index: p, this process.
    process_count: P, processes that share a batch.

  Returns:
    The batches.

  Raises:
    UserError: for a bad config or unreadable text, naming the key or file.
  """
  if split not in shards.SPLITS:
    raise errors.UserError(f"split={split!r}: use one of {shards.SPLITS}")
  sequence, batch = data_config.sequence, data_config.batch
  if sequence < 2:
    raise errors.UserError(f"data.sequence={sequence}: need at least 2")
  if batch < 1 or batch % process_count:
    raise errors.UserError(
      f"data.batch={batch}: must be a positive multiple of the "
      f"{process_count} processes"
    )
  used = {}
  for name, source in data_config.sources.items():
    if source.weight < 0:
      raise errors.UserError(
        f"data.sources.{name}.weight={source.weight}: must not be negative"
      )
    if source.weight:
      used[name] = source
  if not used:
    raise errors.UserError("data.sources: no source with a weight above 0")
  return pipeline.Batches(
    [
      open_rows(data_config, name, source, tokenizer, split=split, seed=seed)
      for name, source in used.items()
    ],
    [float(source.weight) for source in used.values()],
    labels=[f"data.sources.{name}" for name in used],
    seed=seed,
    batch=batch,
    sequence=sequence,
    pad_id=tokenizer.pad_id,
    process_index=process_index,
    process_count=process_count,
    answers=data_config.answers_only,
    results=data_config.results,
  )


def open_rows(
  data_config: "ml_collections.ConfigDict",
  name: str,
  source: "ml_collections.ConfigDict",
  tokenizer: tokenizers.Tokenizer,
  *,
  split: str,
  seed: int,
) -> pipeline.Rows:
  """The rows of one source, packed first where they are not packed yet.

  Args:
    data_config: as of `open_batches`.
    name: of the source.
    source: its keys.
    tokenizer: makes the tokens.
    split: 'train' or 'validation'.
    seed: of the training problems.

  Raises:
    UserError: unreadable or too little text, naming the key or file.
  """
  label = f"data.sources.{name}"
  if source.kind == "problems":
    return problem_rows.ProblemRows(
      source,
      tokenizer,
      sequence=data_config.sequence,
      split=split,
      seed=seed,
      label=label,
      answers=data_config.answers_only,
      results=data_config.results,
    )
  if data_config.results:
    raise errors.UserError(
      f"{label} has no results of steps, which data.results=True asks for: set "
      f"it to False, or {label}.weight=0"
    )
  documents = sources.open_documents(source, label=label)
  if data_config.answers_only and not documents.answered:
    raise errors.UserError(
      f"{label} has no answers, and data.answers_only=True learns from nothing "
      f"else: give {label}.answer_field, or {label}.weight=0"
    )
  for _ in range(2):  # A damaged cache is dropped and packed again, once.
    directory = packing.pack(
      documents,
      tokenizer,
      sequence=data_config.sequence,
      validation_fraction=data_config.validation_fraction,
      cache_dir=_cache_dir(data_config.cache_dir),
      workers=data_config.workers,
      label=label,
    )
    rows = shards.open_rows(directory, split)
    if rows is not None:
      break
  else:
    raise errors.UserError(
      f"{directory}: damaged again after packing; check the disk, or give "
      "another data.cache_dir"
    )
  if data_config.answers_only and 0 < rows.num_documents == rows.num_lost:
    raise errors.UserError(
      f"{label}: no {split} answer begins within a row of data.sequence="
      f"{data_config.sequence} tokens, so that nothing could be learned; raise "
      "data.sequence, or shorten the questions"
    )
  if not len(rows):
    raise errors.UserError(
      f"{label}: no {split} documents with data.validation_fraction="
      f"{data_config.validation_fraction}"
    )
  if split == "train" and rows.num_tokens < data_config.sequence:
    raise errors.UserError(
      f"{label}: {rows.num_tokens} training tokens are fewer than one row of "
      f"data.sequence={data_config.sequence}; give more text or lower it"
    )
  return rows


def _cache_dir(cache_dir: str) -> pathlib.Path:
  if cache_dir:
    return pathlib.Path(cache_dir).expanduser()
  # An unset or empty variable means the default, by the XDG specification.
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(root).expanduser() / "cacheaug"
