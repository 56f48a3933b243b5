"""Rows of problems, made as they are read; see problems.py."""

import collections.abc
import typing
import zlib

import numpy as np

from cacheaug import errors
from cacheaug.data import problems, serial, shards, tokenizers

if typing.TYPE_CHECKING:
  import ml_collections

ENDLESS = 1 << 40  # training rows are numbered from 0 to here
ANSWERS_FROM = ("cue", "facts", "after_facts")


def seed_for(seed: int, purpose: str) -> int:
  """32 bits that differ by purpose: Grain adds the epoch to its seed."""
  return zlib.crc32(f"{seed} {purpose}".encode())


def options_of(
  source: "ml_collections.ConfigDict", label: str
) -> problems.Options:
  """The problems that a source's keys ask for.

  Args:
    source: the keys of `sources.source_defaults`.
    label: config key of the source, for errors.

  Raises:
    UserError: keys that no problem fits.
  """
  options = problems.Options(
    kinds=tuple(source.kinds),
    steps=(source.steps_min, source.steps_max),
    size=(source.size_min, source.size_max),
    questions=source.questions,
  )
  options.check(label)
  if source.answers_from not in ANSWERS_FROM:
    raise errors.UserError(
      f"{label}.answers_from={source.answers_from!r} is not one of "
      f"{', '.join(ANSWERS_FROM)}"
    )
  return options


class ProblemRows:
  """Rows of problems made as they are read.

  Row i holds problems until one does not fit; each is a document of its own,
  and the rest of the row is padding.

  Attributes:
    num_documents: problems in the validation split; 0 for the endless one.
    num_source_documents: document numbers are below it.
    steps: K, the most results that a question has.
    asks: whether some tokens are marked as ASKED.
  """

  num_source_documents = 1 << 28

  def __init__(
    self,
    source: "ml_collections.ConfigDict",
    tokenizer: tokenizers.Tokenizer,
    *,
    sequence: int,
    split: str,
    seed: int,
    label: str,
    answers: bool = False,
    results: bool = False,
  ):
    """Checks the options and makes the validation rows.

    Args:
      source: the keys of `sources.source_defaults`.
      tokenizer: encodes each question and, where answers are marked, each
        answer on its own.
      sequence: S, tokens in a row.
      split: 'train' has no end; 'validation' is `validation_sequences` rows.
      seed: of the training rows. Validation rows are the same for every seed,
        so that runs with different seeds can be compared.
      label: config key of the source; part of the seed.
      answers: mark the tokens of answers.
      results: `results` will be asked for.

    Raises:
      UserError: for impossible options, results of kinds that have none, or S
        shorter than a problem.
    """
    self._options = options_of(source, label)
    if results and not self._options.has_results:
      raise errors.UserError(
        f"{label}.kinds={self._options.kinds} have no results of steps, which "
        f"data.results=True asks for: use {tuple(serial.KINDS)}, or "
        "data.results=False"
      )
    self.steps = source.steps_max
    self._answers_from = source.answers_from
    self.asks = answers and source.answers_from == "after_facts"
    self._tokenizer = tokenizer
    self._sequence = sequence
    self._answers = answers
    self._split = split
    self._label = label
    self._seed = seed_for(0 if split == "validation" else seed, label)
    self._length = ENDLESS
    self.num_documents = 0
    self._rows: tuple[np.ndarray, np.ndarray] | None = None
    if split == "validation":
      self._length = source.validation_sequences
      if self._length < 1:
        raise errors.UserError(
          f"{label}.validation_sequences={self._length}: need at least 1"
        )
      self._rows = self._make(range(self._length))
      documents = self._rows[1]
      self.num_documents = len(np.unique(documents[documents >= 0]))

  def __len__(self) -> int:
    return self._length

  def describe(self) -> str:
    """What the rows are: made from the config alone, the same everywhere."""
    return "generated problems"

  def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows by number: tokens and documents, both int32 [n, S]."""
    if self._rows is None:
      return self._make(rows)
    return self._rows[0][rows], self._rows[1][rows]

  def results(self, rows: np.ndarray) -> np.ndarray:  # int32 [n, S, K]
    """The first token of each step's result, where a question ends.

    Step k of the question whose last token is at p has it at [.., p, k]; -1
    elsewhere. The last result of a question is its answer.
    """
    found = np.full((len(rows), self._sequence, self.steps), -1, np.int32)
    for i, row in enumerate(rows):
      for start, _, problem, _ in self._problems(int(row)):
        end = start + len(self._tokenizer.prefix)
        for turn in problem.turns:
          end += len(self._tokenizer.encode(turn.question))
          for k, result in enumerate(turn.results):
            ids = self._tokenizer.encode(f"{turn.space}{result}")
            found[i, end - 1, k] = ids[0]
          end += len(self._tokenizer.encode(turn.ending))
    return found

  def _make(
    self, rows: collections.abc.Iterable[int]
  ) -> tuple[np.ndarray, np.ndarray]:
    rows = [int(row) for row in rows]
    shape = (len(rows), self._sequence)
    tokens = np.full(shape, self._tokenizer.pad_id, np.int32)
    documents = np.full(shape, -1, np.int32)
    for i, row in enumerate(rows):
      for start, number, _, (ids, marks) in self._problems(row):
        end = start + len(ids)
        tokens[i, start:end] = ids
        documents[i, start:end] = number + marks
    return tokens, documents

  def _problems(
    self, row: int
  ) -> collections.abc.Iterator[
    tuple[int, int, problems.Problem, tuple[list[int], np.ndarray]]
  ]:
    """Of one row: each problem's first slot, document number and tokens."""
    used = 0
    # A problem takes a token or more, so a row has fewer than S of them.
    for index in range(row * self._sequence, (row + 1) * self._sequence):
      problem = problems.generate(
        self._seed, index, self._options, split=self._split
      )
      encoded = self._encode(problem)
      length = len(encoded[0])
      if used + length > self._sequence:
        if not used:
          raise errors.UserError(
            f"data.sequence={self._sequence} is shorter than a problem of "
            f"{length} tokens; raise it or lower {self._label}.steps_max, "
            "size_max or questions"
          )
        return
      yield used, index % self.num_source_documents, problem, encoded
      used += length

  def _encode(self, problem: problems.Problem) -> tuple[list[int], np.ndarray]:
    """Tokens of a problem, and what marks those of answers, 0 elsewhere."""
    encode = self._tokenizer.encode
    if not self._answers:
      ids = tokenizers.with_special(self._tokenizer, problem.text)
      return ids, np.zeros(len(ids), np.int32)
    ids = list(self._tokenizer.prefix)
    marks = [0] * len(ids)
    for text, mark in self._parts(problem):
      new = encode(text)
      ids += new
      marks += [mark] * len(new)
    ids += self._tokenizer.suffix
    marks += [shards.ANSWER] * len(self._tokenizer.suffix)
    return ids, np.array(marks, np.int32)

  def _parts(self, problem: problems.Problem) -> list[tuple[str, int]]:
    """The text in parts that are encoded each on its own, and their marks."""
    facts = problem.question[: problem.facts]
    if self._answers_from == "facts":
      return [(facts, 0), (problem.text[len(facts) :], shards.ANSWER)]
    parts = []
    for turn in problem.turns:
      parts += (turn.question, 0), (turn.ending, shards.ANSWER)
    if self.asks:
      parts[0] = problem.question[len(facts) :], 0
      parts = [
        (text, mark or shards.ANSWER + shards.ASKED) for text, mark in parts
      ]
      parts.insert(0, (facts, 0))
    return parts
