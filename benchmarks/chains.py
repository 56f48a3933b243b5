"""How many lines of references a decoder follows, by examples in its prompt.

  python benchmarks/chains.py --decoder=NAME [--coprocessor=DIR] [--shots=0,4]

Chains of references in words (data/serial.py): eight lines such as "B = K" and
"K = apple", shuffled, then "B is" -> " apple". Exact match by k lines over
held-out facts; a shot is another solved problem of 1 to 4 lines before the one
that is asked, the same for all. With a coprocessor latents stand at the
prompt's end. Prints a Markdown table.
"""

import zlib

from absl import flags

import cacheaug
from cacheaug.data import problems
from cacheaug.errors import UserError
from cacheaug.evals import exact_match
from cacheaug.lm import LM
from cacheaug.run import command

_DECODER = flags.DEFINE_string("decoder", "", "a name, directory or GGUF file")
_COPROCESSOR = flags.DEFINE_string("coprocessor", "", "of that decoder")
_SHOTS = flags.DEFINE_list("shots", ["0", "4"], "solved problems before one")
_PROBLEMS = flags.DEFINE_integer(
  "problems", 128, "of each number of lines", lower_bound=1
)
_LINES = flags.DEFINE_integer(
  "lines", 4, "most lines of a chain", lower_bound=1, upper_bound=8
)
_BATCH = flags.DEFINE_integer("batch", 16, "prompts at once", lower_bound=1)


def asked(lines: int, count: int) -> list[problems.Problem]:
  """Held-out problems whose chain has so many lines."""
  # No chain among the facts is longer than the one that is asked for.
  options = problems.Options(("chains",), (lines, lines))
  return [
    problems.generate(0, i, options, split="validation") for i in range(count)
  ]


def examples(count: int, most: int) -> str:
  """Solved problems of 1 to `most` lines, none of them held out."""
  options = problems.Options(("chains",), (1, most))
  seed = zlib.crc32(b"shots")
  made = (problems.generate(seed, i, options) for i in range(count))
  return "".join(f"{problem.text}\n" for problem in made)


def right(lm: LM, prompts: list[str], answers: list[str]) -> int:
  """How many most likely continuations are the answer."""
  count = 0
  for at in range(0, len(prompts), _BATCH.value):
    texts = lm.generate(prompts[at : at + _BATCH.value], 4, stop=("\n",))
    pairs = zip(answers[at : at + _BATCH.value], texts, strict=True)
    count += sum(problems.check(answer, text) for answer, text in pairs)
  return count


def main() -> None:
  """Prints a row for each number of shots."""
  if not _DECODER.value:
    raise UserError("give --decoder")
  if unknown := [shots for shots in _SHOTS.value if not shots.isdecimal()]:
    raise UserError(f"--shots={unknown[0]!r} must be numbers, 0 or more")
  lm = cacheaug.load(_DECODER.value, dtype="float32")
  if _COPROCESSOR.value:
    lm = lm.with_coprocessor(_COPROCESSOR.value)
  head = [f"k={k + 1}" for k in range(_LINES.value)]
  print("| shots | " + " | ".join(head) + " |")
  print("|---" * (1 + len(head)) + "|")
  for shots in map(int, _SHOTS.value):
    before, cells = examples(shots, _LINES.value), []
    for k in range(1, _LINES.value + 1):
      found = asked(k, _PROBLEMS.value)
      prompts = [before + problem.question for problem in found]
      count = right(lm, prompts, [problem.answer for problem in found])
      low, high = exact_match.interval(count, len(found))
      share = 100 * count / len(found)
      cells.append(f"{share:.1f} ({100 * low:.1f} to {100 * high:.1f})")
    print(f"| {shots} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
  command.run(main, __doc__)
