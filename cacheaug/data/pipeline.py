"""Batches as a pure function of (seed, step).

Row r of global batch t is global example t * B + r. Grain shuffles, repeats
and mixes the example numbers; process p of P reads rows p * B / P up to
(p + 1) * B / P. So there is no iterator state to save, and the global batch
does not depend on the number of processes.
"""

import collections.abc
import sys
import time
import typing

import numpy as np
from absl import logging

from cacheaug import errors
from cacheaug.data import (
  problem_rows,
  shards,
)

if typing.TYPE_CHECKING:
  import grain

Batch = dict[str, np.ndarray]
Rows = shards.PackedRows | problem_rows.ProblemRows

# Two threads read ahead while the trainer computes; more would only compete
# for the interpreter's lock.
_THREADS = 2
_PREFETCH = 16


class Examples(collections.abc.Sequence):
  """All rows of a finite split in order: `examples[i]` is one, unshuffled."""

  def __init__(self, batches: "Batches"):
    self._batches = batches

  def __len__(self) -> int:
    return self._batches.num_examples

  def __getitem__(self, index: int) -> Batch:
    """Row `index` as {'tokens': int32 [S], 'documents': int32 [S]}."""
    if not -len(self) <= index < len(self):
      raise IndexError(f"{index} of {len(self)} examples")
    batch = self._batches.take(np.array([index % len(self)]))
    return {name: array[0] for name, array in batch.items()}


class Batches:
  """The share of one process in every global batch of one split.

  Attributes:
    num_documents: documents in this split; endless problems count none.
    num_examples: rows in one pass over the split, or None if it has no end.
    sequence: S.
    rows: B / P, rows of a batch that this process reads.
  """

  def __init__(
    self,
    parts: list[Rows],
    weights: list[float],
    *,
    labels: list[str],
    seed: int,
    batch: int,
    sequence: int,
    pad_id: int,
    process_index: int,
    process_count: int,
    answers: bool = False,
    results: bool = False,
  ):
    """See `open_batches`, which makes the parts.

    Args:
      parts: rows of each source.
      weights: positive, relative.
      labels: config keys of the sources, for errors.
      seed: of the shuffle.
      batch: B, global.
      sequence: S.
      pad_id: token of the rows that fill up the last batch of `epoch`.
      process_index: p.
      process_count: P, a divisor of B.
      answers: batches hold 'answers', the mask of answers' tokens.
      results: batches say what each step of a question results in.
    """
    self._answers = answers
    self._results = max(part.steps for part in parts) if results else 0
    self._asks = any(getattr(part, "asks", False) for part in parts)
    self._parts = parts
    self._labels = labels
    self._starts = np.cumsum([0] + [len(part) for part in parts[:-1]])
    sizes = [part.num_source_documents for part in parts]
    self._offsets = np.cumsum([0] + sizes[:-1])
    if sum(sizes) >= 2**31:
      raise errors.UserError(
        f"data.sources: {sum(sizes)} documents do not fit int32 numbers; "
        "use fewer sources"
      )
    self._order = _order(parts, self._starts, weights, seed)
    # Grain sets its statistics up on first use, which is not thread-safe.
    self._order[0]  # noqa: B018
    self._batch = batch
    self._pad_id = pad_id
    self._process_index = process_index
    self.sequence = sequence
    self.rows = batch // process_count
    self.num_documents = sum(part.num_documents for part in parts)
    total = sum(len(part) for part in parts)
    self.num_examples = total if total < problem_rows.ENDLESS else None

  def describe(self) -> dict[str, str]:
    """Each source's rows, for comparing what different hosts see."""
    return {
      label: part.describe()
      for label, part in zip(self._labels, self._parts, strict=True)
    }

  def at(self, step: int) -> Batch:
    """Rows of global batch `step` that belong to this process.

    Args:
      step: 0 or more.

    Returns:
      {'tokens': int32 [B/P, S], 'documents': int32 [B/P, S]}, and with
      data.answers_only 'answers': bool [B/P, S], and maybe 'asked', which of
      them are questions' and not learned. Documents are unique over all
      sources, and -1 on padding, whose token is pad_id. With data.results
      'results': int32 [B/P, S, K], the first token of the result of each of K
      steps of the question that ends at a token, -1 elsewhere.
    """
    start = step * self._batch + self._process_index * self.rows
    return self.take(
      np.array([self._order[i] for i in range(start, start + self.rows)])
    )

  def iterate(
    self, start_step: int = 0, *, retries: int = 0
  ) -> collections.abc.Iterator[Batch]:
    """`at(start_step)`, `at(start_step + 1)`, ... without end, read ahead.

    Args:
      start_step: 0 or more.
      retries: further tries, after 1, 2, 4, ... seconds, where packed data
        cannot be read; then UserError.
    """
    step, failures = start_step, 0
    stream = self._read_ahead(step)
    while True:
      try:
        batch = next(stream)
      except shards.UnreadableError as error:
        if failures == retries:
          raise
        seconds = 2**failures
        logging.warning("%s: trying again in %d s", error, seconds)
        time.sleep(seconds)
        failures += 1
        stream = self._read_ahead(step)
        continue
      yield batch
      step, failures = step + 1, 0

  def _read_ahead(self, start_step: int) -> collections.abc.Iterator[Batch]:
    import grain

    options = grain.ReadOptions(
      num_threads=_THREADS, prefetch_buffer_size=_PREFETCH
    )
    steps = grain.MapDataset.source(_Steps(self, start_step))
    return iter(steps.to_iter_dataset(options))

  def epoch(self) -> collections.abc.Iterator[Batch]:
    """One pass over a finite split in order, in batches as `at` gives.

    The last batch is filled up with rows of padding, so that all processes
    see the same number of batches of the same shape.
    """
    examples = self.examples
    first = self._process_index * self.rows
    for start in range(first, len(examples) + first, self._batch):
      rows = np.arange(start, min(start + self.rows, len(examples)))
      batch = self.take(rows)
      yield pad_rows(batch, self.rows, self._pad_id)

  @property
  def examples(self) -> Examples:
    """All rows in order; ValueError if the split has no end."""
    if self.num_examples is None:
      raise ValueError("endless problems have no list of examples")
    return Examples(self)

  def take(self, examples: np.ndarray) -> Batch:
    """Rows by their number in `examples` order; int [n] to arrays [n, S]."""
    parts = np.searchsorted(self._starts, examples, side="right") - 1
    shape = (len(examples), self.sequence)
    tokens = np.empty(shape, np.int32)
    documents = np.empty(shape, np.int32)
    answers = np.empty(shape, bool)
    asked = np.empty(shape, bool)
    results = np.full((*shape, self._results), -1, np.int32)
    for k in np.unique(parts):
      chosen = parts == k
      try:
        tokens[chosen], marks = self._parts[k].take(
          examples[chosen] - self._starts[k]
        )
      except shards.UnreadableError as error:
        raise shards.UnreadableError(f"{self._labels[k]}: {error}") from error
      offset = np.int32(self._offsets[k])
      answers[chosen] = marks >= shards.ANSWER
      numbers = np.where(answers[chosen], marks - shards.ANSWER, marks)
      asked[chosen] = numbers >= shards.ASKED
      numbers = np.where(asked[chosen], numbers - shards.ASKED, numbers)
      documents[chosen] = np.where(numbers < 0, numbers, numbers + offset)
      if self._results:
        steps = self._parts[k].results(examples[chosen] - self._starts[k])
        results[chosen, :, : steps.shape[-1]] = steps
    batch = {"tokens": tokens, "documents": documents}
    if self._answers:
      batch["answers"] = answers
    if self._asks:
      batch["asked"] = asked
    return batch | {"results": results} if self._results else batch


def pad_rows(batch: Batch, rows: int, pad_id: int = 0) -> Batch:
  """The batch with rows of padding added, up to `rows` rows."""
  fill = {"tokens": pad_id, "documents": -1, "results": -1}
  fill |= {"answers": False, "asked": False}
  missing = rows - len(batch["tokens"])
  return {
    name: np.pad(
      array,
      ((0, missing), *((0, 0),) * (array.ndim - 1)),
      constant_values=fill[name],
    )
    for name, array in batch.items()
  }


class _Steps:
  """Batches from a step on, as a Grain data source."""

  def __init__(self, batches: "Batches", start_step: int):
    self._batches = batches
    self._start = start_step

  def __len__(self) -> int:
    return sys.maxsize - self._start

  def __getitem__(self, index: int) -> Batch:
    return self._batches.at(self._start + index)


def _order(
  parts: list[Rows], starts: np.ndarray, weights: list[float], seed: int
) -> "grain.MapDataset":
  """Endless shuffled, mixed row numbers; those of part k start at starts[k]."""
  import grain

  datasets = []
  for k, part in enumerate(parts):
    rows = grain.MapDataset.range(int(starts[k]), int(starts[k]) + len(part))
    if len(part) < problem_rows.ENDLESS:
      rows = rows.shuffle(
        seed=problem_rows.seed_for(seed, f"shuffle {k}")
      ).repeat()
    datasets.append(rows)
  if len(datasets) == 1:
    return datasets[0]
  return grain.MapDataset.mix(datasets, weights)
