"""Endless problems with answers that can be checked.

A problem is a question that ends with the cue after which the answer comes:

  sum    "4+7-3=" -> "8"
  chain  "a=4;b=a+3;c=b-2;c=" -> "5"
  word   "Ann has 7 pens. She gets 5, then loses 4. Ann has " -> "8"

These ask for no serial computation: each answer is a sum, which one layer of
attention can take at once. The kinds of serial.py do ask for it: the result
of each step is what the next one reads.

Numbers and vocabulary are small on purpose: a byte-level decoder of 0.3M
parameters learns the form quickly and the arithmetic only in part, which
leaves room for what extra computation may add.
"""

import collections.abc
import dataclasses
import zlib

from cacheaug import errors
from cacheaug.data import serial
from cacheaug.data.draws import Draws

MAX_STEPS = 8  # 9 + 8 * 9 = 81: running values never pass 99.
_VALIDATION_ONE_IN = 16

_PEOPLE = (("Ann", "She"), ("Ben", "He"), ("Sue", "She"), ("Tom", "He"))
_THINGS = ("pens", "eggs", "cups", "nuts")
_GAINS = ("gets", "finds", "buys")
_LOSSES = ("loses", "sells", "gives")


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
  """One problem.

  Attributes:
    question: text up to and including the cue.
    answer: what `check` compares with.
    kind: one of `ALL`.
    steps: serial steps from question to answer: additions and subtractions,
      lookups, or factors of a product.
    facts: number of characters of `question` that all questions share.
    results: of each step, the answer last; () for kinds without them.
    more: further questions on the same facts, which they do not repeat.
    space: what a document has between a cue and its answer.
  """

  question: str
  answer: str
  kind: str
  steps: int
  facts: int = 0
  results: tuple[str, ...] = ()
  more: tuple["Problem", ...] = ()
  space: str = ""

  @property
  def turns(self) -> tuple["Problem", ...]:
    """All questions in order, this one first."""
    return (self, *self.more)

  @property
  def ending(self) -> str:
    """What comes after the cue: the answer and its newline."""
    return f"{self.space}{self.answer}\n"

  @property
  def text(self) -> str:
    """The problem as a document; each answer ends its line."""
    return "".join(turn.question + turn.ending for turn in self.turns)


def _changes(draws: Draws, value: int, steps: int) -> list[int]:
  """Signed changes of 1..9 that keep the running value in 0..99."""
  changes = []
  for _ in range(steps):
    if value and draws.below(2):
      change = -1 - draws.below(min(value, 9))
    else:
      change = 1 + draws.below(9)
    value += change
    changes.append(change)
  return changes


def _sum(draws: Draws, steps: int) -> tuple[str, int]:
  start = 1 + draws.below(9)
  changes = _changes(draws, start, steps)
  return f"{start}{''.join(f'{c:+d}' for c in changes)}=", start + sum(changes)


def _chain(draws: Draws, steps: int) -> tuple[str, int]:
  start = 1 + draws.below(9)
  changes = _changes(draws, start, steps)
  # One assignment that the answer does not need, in half of the short chains.
  distractor = -1
  if steps < 4 and draws.below(2):
    distractor = draws.below(steps + 1)
  names = iter("abcdefghijk")
  last = next(names)
  parts = [f"{last}={start};"]
  for i, change in enumerate(changes):
    if i == distractor:
      parts.append(f"{next(names)}={1 + draws.below(9)};")
    name = next(names)
    parts.append(f"{name}={last}{change:+d};")
    last = name
  if distractor == steps:
    parts.append(f"{next(names)}={1 + draws.below(9)};")
  return f"{''.join(parts)}{last}=", start + sum(changes)


def _word(draws: Draws, steps: int) -> tuple[str, int]:
  start = 1 + draws.below(9)
  changes = _changes(draws, start, steps)
  first = draws.below(4)
  thing = _THINGS[draws.below(4)]
  # A comparison takes 25 bytes a step; beyond two it would pass 90.
  template = draws.below(3 if steps <= 2 else 2)
  name, pronoun = _PEOPLE[first]
  if template == 0:
    text = f"{name} has {start} {thing}. {pronoun} {_deeds(draws, changes)}."
    return f"{text} {name} has ", start + sum(changes)
  if template == 1:
    moves = [f"{'adds' if c > 0 else 'takes'} {abs(c)}" for c in changes]
    text = f"A box has {start} {thing}. {name} {_list(moves)}."
    return f"{text} It has ", start + sum(changes)
  parts = [f"{name} has {start} {thing}."]
  for i, change in enumerate(changes, start=1):
    other = _PEOPLE[(first + i) % 4][0]
    more = "more" if change > 0 else "less"
    parts.append(f"{other} has {abs(change)} {more} than {name}.")
    name = other
  return f"{' '.join(parts)} {name} has ", start + sum(changes)


def _deeds(draws: Draws, changes: list[int]) -> str:
  verbs = [(_GAINS if c > 0 else _LOSSES)[draws.below(3)] for c in changes]
  return _list([f"{v} {abs(c)}" for v, c in zip(verbs, changes, strict=True)])


def _list(parts: list[str]) -> str:
  """'x', 'x, then y', 'x, y, then z'."""
  if len(parts) == 1:
    return parts[0]
  return f"{', '.join(parts[:-1])}, then {parts[-1]}"


_SUMS: dict[str, collections.abc.Callable] = {
  "sum": _sum,
  "chain": _chain,
  "word": _word,
}
ALL = (*_SUMS, *serial.KINDS)


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
  """Which problems a stream consists of; see `sources.source_defaults`.

  Attributes:
    kinds: drawn from uniformly, each one of `ALL`.
    steps: smallest and largest number of steps, drawn uniformly.
    size: of the facts of serial kinds, smallest and largest, drawn uniformly:
      letters of a cycle, symbols that are permuted, lines of chains.
    questions: on the same facts; sums have no facts and are one each.
  """

  kinds: tuple[str, ...] = tuple(_SUMS)
  steps: tuple[int, int] = (1, 4)
  size: tuple[int, int] = (8, 8)
  questions: int = 1

  @property
  def has_results(self) -> bool:
    """Whether every kind tells the result of each step."""
    return all(kind in serial.KINDS for kind in self.kinds)

  def check(self, label: str = "problems") -> None:
    """Refuses what `generate` cannot make.

    Args:
      label: the config key that the error names.

    Raises:
      UserError: naming the offending value.
    """
    unknown = [kind for kind in self.kinds if kind not in ALL]
    if unknown or not self.kinds:
      raise errors.UserError(
        f"{label}.kinds={tuple(self.kinds)}: choose one or more of {ALL}"
      )
    low, high = self.steps
    if not 1 <= low <= high <= MAX_STEPS:
      raise errors.UserError(
        f"{label}.steps_min={low}, steps_max={high}: need "
        f"1 <= steps_min <= steps_max <= {MAX_STEPS}"
      )
    if self.questions < 1:
      raise errors.UserError(
        f"{label}.questions={self.questions}: need at least 1"
      )
    for kind in self.kinds:
      if kind in serial.KINDS:
        serial.check_size(kind, self.steps, self.size, label=label)
      elif self.questions > 1:
        raise errors.UserError(
          f"{label}.questions={self.questions}: kind {kind!r} has no facts "
          f"that several questions could share; use {serial.KINDS}, or "
          f"{label}.questions=1"
        )


def is_validation(question: str) -> bool:
  """Whether a question belongs to the validation split (one in 16 does)."""
  return zlib.crc32(question.encode()) % _VALIDATION_ONE_IN == 0


def generate(
  seed: int,
  index: int,
  options: Options | None = None,
  *,
  split: str = "train",
) -> Problem:
  """Makes problem `index` of an endless stream; a pure function.

  Args:
    seed: any integer.
    index: any integer; neighbouring indices give unrelated problems.
    options: which problems; by default sums of 1 to 4 steps.
    split: 'train' or 'validation'. A question without facts belongs to exactly
      one of the two, whatever seed and index it comes from; so do facts, with
      all questions about them.

  Returns:
    The problem.

  Raises:
    UserError: from `Options.check`, or for an unknown split.
  """
  if split not in ("train", "validation"):
    raise errors.UserError(f"split={split!r}: use 'train' or 'validation'")
  options = options or Options()
  options.check()
  attempt = 0
  while True:
    draws = Draws(f"{seed}/{index}/{split}/{attempt}")
    problem = _make(draws, options)
    kept = problem.question[: problem.facts] or problem.question
    if is_validation(kept) == (split == "validation"):
      return problem
    attempt += 1


def _make(draws: Draws, options: Options) -> Problem:
  kind = options.kinds[draws.below(len(options.kinds))]
  low, high = options.steps
  if kind in _SUMS:
    count = low + draws.below(high - low + 1)
    question, answer = _SUMS[kind](draws, count)
    return Problem(question, str(answer), kind, count)
  size = options.size[0] + draws.below(options.size[1] - options.size[0] + 1)
  facts, ask = serial.KINDS[kind](draws, size, high)
  turns = []
  for _ in range(options.questions):
    cue, results = ask(low + draws.below(high - low + 1))
    turns.append(
      Problem(
        cue,
        results[-1],
        kind,
        len(results),
        results=tuple(results),
        space=serial.SPACES.get(kind, ""),
      )
    )
  return dataclasses.replace(
    turns[0],
    question=facts + turns[0].question,
    facts=len(facts),
    more=tuple(turns[1:]),
  )


def check(answer: str, text: str) -> bool:
  """Whether generated `text` is the answer.

  Args:
    answer: of the question that was the prompt.
    text: what came after the question.

  Returns:
    True when the first line of `text`, spaces stripped, is the answer.
  """
  return text.split("\n", 1)[0].strip() == answer
