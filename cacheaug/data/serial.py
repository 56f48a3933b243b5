r"""Problems whose every step reads the result of the step before.

Facts end their own lines; the questions about them follow, one a line:

  hops     a cycle of letters as pairs, shuffled; "3b" asks f(f(f(b))):
           "da cb ac bd\n3b" -> "c", by way of d and a
  compose  named permutations; "ab=" asks for a first, then b, and questions
           name a run of them in the order of the facts:
           "a231 b132\nab=" -> "321"
  reorder  the same, the questions naming them in any order
  chains   references in words, shuffled, chains that nobody asks for among
           them: "B = K\nP = pear\nK = apple\nB is" -> " apple"

A kind is a function (draws, size, most steps) -> (facts, ask); ask(k) gives a
cue and the results of its k steps, the answer last.
"""

import string
from collections.abc import Callable

from cacheaug import errors
from cacheaug.data.draws import Draws

Ask = Callable[[int], tuple[str, list[str]]]

_LETTERS = string.ascii_lowercase
# One token each, with a space before it, in the vocabularies of the published
# decoders that this package reads.
_WORDS = (
  "apple bread chair cloud dance earth field glass horse house light money "
  "music night ocean paper plant river stone table tiger train water world"
).split()


def _hops(draws: Draws, size: int, most: int) -> tuple[str, Ask]:
  del most
  letters = draws.sample(_LETTERS, size)
  after = dict(zip(letters, letters[1:] + letters[:1], strict=True))
  pairs = [f"{a}{after[a]}" for a in draws.sample(letters, size)]

  def ask(steps: int) -> tuple[str, list[str]]:
    start = at = letters[draws.below(size)]
    results = []
    for _ in range(steps):
      at = after[at]
      results.append(at)
    return f"{steps}{start}", results

  return f"{' '.join(pairs)}\n", ask


def _compose(draws: Draws, size: int, most: int) -> tuple[str, Ask]:
  names, factors, facts = _permutations(draws, size, most)

  def ask(steps: int) -> tuple[str, list[str]]:
    first = draws.below(most - steps + 1)
    return _product(names[first : first + steps], factors)

  return facts, ask


def _reorder(draws: Draws, size: int, most: int) -> tuple[str, Ask]:
  names, factors, facts = _permutations(draws, size, most)

  def ask(steps: int) -> tuple[str, list[str]]:
    return _product("".join(draws.sample(names, steps)), factors)

  return facts, ask


def _permutations(
  draws: Draws, size: int, count: int
) -> tuple[str, dict[str, str], str]:
  """Names, name -> where symbols 1, 2, ... go, and the line that says so."""
  names, symbols = _LETTERS[:count], string.digits[1 : size + 1]
  factors = {name: "".join(draws.sample(symbols, size)) for name in names}
  return names, factors, " ".join(map("".join, factors.items())) + "\n"


def _product(names: str, factors: dict[str, str]) -> tuple[str, list[str]]:
  """The cue and the product after each factor; the first one acts first."""
  at, results = "".join(sorted(factors[names[0]])), []
  for name in names:
    at = "".join(factors[name][int(symbol) - 1] for symbol in at)
    results.append(at)
  return f"{names}=", results


def _chains(draws: Draws, size: int, most: int) -> tuple[str, Ask]:
  # One chain is long enough for every question; of the other lines each
  # begins a chain of its own or goes on with one that is there.
  names = draws.sample(string.ascii_uppercase, size)
  words = draws.sample(_WORDS, size)
  refers: dict[str, str] = {}
  depth: dict[str, int] = {}
  for i, name in enumerate(names):
    earlier = names[i - 1 : i] if i < most else names[most:i]
    other = earlier[draws.below(len(earlier))] if earlier else ""
    if i and i < most or other and depth[other] < most and draws.below(most):
      refers[name], depth[name] = other, depth[other] + 1
    else:
      refers[name], depth[name] = words[i], 1
  lines = [f"{a} = {refers[a]}\n" for a in draws.sample(names, size)]

  def ask(steps: int) -> tuple[str, list[str]]:
    among = [name for name in names if depth[name] == steps]
    start = at = among[draws.below(len(among))]
    results = []
    while at in refers:
      at = refers[at]
      results.append(at)
    return f"{start} is", results

  return "".join(lines), ask


KINDS: dict[str, Callable[[Draws, int, int], tuple[str, Ask]]] = {
  "hops": _hops,
  "compose": _compose,
  "reorder": _reorder,
  "chains": _chains,
}
SPACES = {"chains": " "}  # between a cue and its answer
_SIZES = {  # fewest and most, and of what
  "hops": (2, len(_LETTERS), "letters of a cycle"),
  "compose": (3, 5, "symbols that are permuted"),
  "reorder": (3, 5, "symbols that are permuted"),
  "chains": (2, len(_WORDS), "lines of chains"),
}


def check_size(
  kind: str, steps: tuple[int, int], size: tuple[int, int], *, label: str
) -> None:
  """Refuses facts that are too small or large for a kind or its questions.

  Args:
    kind: of `KINDS`.
    steps: smallest and largest number of steps.
    size: smallest and largest size of the facts.
    label: the config key that the error names.

  Raises:
    UserError: naming the key and the limits.
  """
  fewest, most, what = _SIZES[kind]
  low, high = size
  if not fewest <= low <= high <= most:
    raise errors.UserError(
      f"{label}.size_min={low}, size_max={high}: kind {kind!r} takes {fewest} "
      f"to {most} {what}, size_min <= size_max"
    )
  if kind == "hops" and steps[1] >= low:
    raise errors.UserError(
      f"{label}.steps_max={steps[1]} hops come round a cycle of {low} letters: "
      f"give fewer, or {label}.size_min={steps[1] + 1} or more"
    )
  if kind == "chains" and steps[1] > low:
    raise errors.UserError(
      f"{label}.steps_max={steps[1]} is longer than the {low} lines of its "
      f"chains: give fewer, or {label}.size_min={steps[1]} or more"
    )
