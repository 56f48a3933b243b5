"""Endless word and arithmetic problems with answers that can be checked.

A problem is a question that ends with the cue after which the answer comes:

  sum    "4+7-3=" -> "8"
  chain  "a=4;b=a+3;c=b-2;c=" -> "5"
  word   "Ann has 7 pens. She gets 5, then loses 4. Ann has " -> "8"

Numbers and vocabulary are small on purpose: a byte-level decoder of 0.3M
parameters learns the form quickly and the arithmetic only in part, which
leaves room for what extra computation may add.
"""

import collections.abc
import dataclasses
import hashlib
import zlib

from cacheaug import errors

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
    answer: an integer in 0..99, in decimal.
    kind: one of `ALL`.
    steps: number of additions and subtractions between question and answer.
  """

  question: str
  answer: str
  kind: str
  steps: int

  @property
  def text(self) -> str:
    """The problem as a document, one line with its newline."""
    return f"{self.question}{self.answer}\n"


class _Draws:
  """Integers drawn from 256 hashed bits, read as a mixed-radix number.

  A problem needs about 60 bits, so the bias of the last draw is below 2^-150.
  Making one costs 2 us; seeding a numpy or stdlib generator costs 10 to 20.
  """

  __slots__ = ("bits",)

  def __init__(self, key: str):
    digest = hashlib.blake2b(key.encode(), digest_size=32).digest()
    self.bits = int.from_bytes(digest, "little")

  def below(self, n: int) -> int:
    self.bits, drawn = divmod(self.bits, n)
    return drawn


def _changes(draws: _Draws, value: int, steps: int) -> list[int]:
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


def _sum(draws: _Draws, steps: int) -> tuple[str, int]:
  start = 1 + draws.below(9)
  changes = _changes(draws, start, steps)
  return f"{start}{''.join(f'{c:+d}' for c in changes)}=", start + sum(changes)


def _chain(draws: _Draws, steps: int) -> tuple[str, int]:
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


def _word(draws: _Draws, steps: int) -> tuple[str, int]:
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


def _deeds(draws: _Draws, changes: list[int]) -> str:
  verbs = [(_GAINS if c > 0 else _LOSSES)[draws.below(3)] for c in changes]
  return _list([f"{v} {abs(c)}" for v, c in zip(verbs, changes, strict=True)])


def _list(parts: list[str]) -> str:
  """'x', 'x, then y', 'x, y, then z'."""
  if len(parts) == 1:
    return parts[0]
  return f"{', '.join(parts[:-1])}, then {parts[-1]}"


_MAKERS: dict[str, collections.abc.Callable] = {
  "sum": _sum,
  "chain": _chain,
  "word": _word,
}
ALL = tuple(_MAKERS)


def check_options(
  kinds: collections.abc.Sequence[str],
  steps: tuple[int, int],
  *,
  label: str = "problems",
) -> None:
  """Refuses kinds and step ranges that `generate` does not know.

  Args:
    kinds: non-empty, each one of `ALL`.
    steps: smallest and largest number of steps, 1 to `MAX_STEPS`.
    label: the config key that the error names.

  Raises:
    UserError: naming the offending value.
  """
  unknown = [kind for kind in kinds if kind not in _MAKERS]
  if unknown or not kinds:
    raise errors.UserError(
      f"{label}.kinds={tuple(kinds)}: choose one or more of {ALL}"
    )
  if not 1 <= steps[0] <= steps[1] <= MAX_STEPS:
    raise errors.UserError(
      f"{label}.steps_min={steps[0]}, steps_max={steps[1]}: need "
      f"1 <= steps_min <= steps_max <= {MAX_STEPS}"
    )


def is_validation(question: str) -> bool:
  """Whether a question belongs to the validation split (one in 16 does)."""
  return zlib.crc32(question.encode()) % _VALIDATION_ONE_IN == 0


def generate(
  seed: int,
  index: int,
  kinds: tuple[str, ...] = ALL,
  steps: tuple[int, int] = (1, 4),
  *,
  split: str = "train",
) -> Problem:
  """Makes problem `index` of an endless stream; a pure function.

  Args:
    seed: any integer.
    index: any integer; neighbouring indices give unrelated problems.
    kinds: drawn from uniformly; see `ALL`.
    steps: smallest and largest number of steps, drawn uniformly.
    split: 'train' or 'validation'. A question belongs to exactly one of the
      two, whatever seed and index it comes from.

  Returns:
    The problem.

  Raises:
    UserError: from `check_options`, or for an unknown split.
  """
  if split not in ("train", "validation"):
    raise errors.UserError(f"split={split!r}: use 'train' or 'validation'")
  check_options(kinds, steps)
  low, high = steps
  attempt = 0
  while True:
    draws = _Draws(f"{seed}/{index}/{split}/{attempt}")
    kind = kinds[draws.below(len(kinds))]
    count = low + draws.below(high - low + 1)
    question, answer = _MAKERS[kind](draws, count)
    if is_validation(question) == (split == "validation"):
      return Problem(question, str(answer), kind, count)
    attempt += 1


def check(problem: Problem, text: str) -> bool:
  """Whether generated `text` answers the problem.

  Args:
    problem: the problem whose question was the prompt.
    text: what came after the question.

  Returns:
    True when the first line of `text`, spaces stripped, is the answer.
  """
  return text.split("\n", 1)[0].strip() == problem.answer
