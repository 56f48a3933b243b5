"""Problems: answers are right, short, reproducible; splits are disjoint."""

import re
import time

import pytest

from cacheaug import errors
from cacheaug.data import problems


def _options(*kinds: str, **changes) -> problems.Options:
  return problems.Options(kinds, **changes)


def _solve(problem: problems.Problem) -> int:
  """Works the answer out from the text alone, not from how it was made."""
  text = problem.question
  if problem.kind == "sum":
    return sum(map(int, re.findall(r"[+-]?\d+", text)))
  if problem.kind == "chain":
    values = {}
    *assignments, asked = text.rstrip("=").split(";")
    for assignment in assignments:
      name, expression = assignment.split("=")
      first, sign, second = re.fullmatch(
        r"(\w)([+-]?)(\d*)", expression
      ).groups()
      value = values[first] if first.isalpha() else int(first)
      values[name] = value + int(f"{sign}{second}" or 0)
    return values[asked]
  if " than " in text:
    values = {}
    for sentence in text.split(". "):
      if more := re.match(r"(\w+) has (\d+) (more|less) than (\w+)", sentence):
        name, count, direction, other = more.groups()
        sign = 1 if direction == "more" else -1
        values[name] = values[other] + sign * int(count)
      elif start := re.match(r"(\w+) has (\d+)", sentence):
        values[start[1]] = int(start[2])
    return values[text.split(". ")[-1].split()[0]]
  sign = {"gets": 1, "finds": 1, "buys": 1, "adds": 1, "has": 1}
  return sum(
    sign.get(verb, -1) * int(count)
    for verb, count in re.findall(r"(\w+) (\d+)", text)
  )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_are_right(split):
  for index in range(1500):
    problem = problems.generate(0, index, split=split)
    assert _solve(problem) == int(problem.answer), problem
    assert 0 <= int(problem.answer) <= 99


def test_intermediate_values_stay_in_range():
  for index in range(1000):
    problem = problems.generate(1, index, _options("sum", steps=(8, 8)))
    value = 0
    for change in re.findall(r"[+-]?\d+", problem.question):
      value += int(change)
      assert 0 <= value <= 99, problem


@pytest.mark.parametrize(
  ("kind", "longest"), [("sum", 14), ("chain", 33), ("word", 90)]
)
def test_text_is_one_short_line(kind, longest):
  for index in range(1000):
    problem = problems.generate(2, index, _options(kind))
    assert problem.kind == kind
    assert problem.text == f"{problem.question}{problem.answer}\n"
    assert problem.text.count("\n") == 1
    assert len(problem.text.encode()) <= longest, problem


def test_steps_are_uniform_and_count_the_changes():
  options = _options("sum", steps=(2, 4))
  found = [problems.generate(3, i, options) for i in range(3000)]
  for problem in found:
    assert len(re.findall(r"[+-]", problem.question)) == problem.steps
  for steps in (2, 3, 4):
    share = sum(p.steps == steps for p in found) / len(found)
    # 1/3 within five standard deviations of 3000 draws.
    assert abs(share - 1 / 3) < 0.043


def test_chains_have_distractors():
  counts = {True: 0, False: 0}
  for index in range(200):
    problem = problems.generate(4, index, _options("chain", steps=(2, 2)))
    counts[problem.question.count(";") > problem.steps + 1] += 1
  assert min(counts.values()) > 50


def test_is_a_function_of_seed_and_index():
  first = [problems.generate(5, i) for i in range(100)]
  again = [problems.generate(5, i) for i in reversed(range(100))][::-1]
  other = [problems.generate(6, i) for i in range(100)]
  assert first == again
  assert sum(a == b for a, b in zip(first, other, strict=True)) < 20


def test_splits_share_no_question_even_across_seeds():
  train = {problems.generate(7, i).question for i in range(4000)}
  validation = {
    problems.generate(8, i, split="validation").question for i in range(1000)
  }
  # Without the split the two would overlap: sums of one step are few.
  overlap = {problems.generate(9, i).question for i in range(1000)} & train
  assert overlap
  assert not train & validation


def test_check_reads_the_first_line():
  assert problems.check("11", "11\n4+3=7")
  assert problems.check("11", " 11 ")
  for wrong in ("", "\n11", "1", "111", "11.", "12\n11"):
    assert not problems.check("11", wrong)


def test_bad_options_name_the_value():
  with pytest.raises(errors.UserError, match="riddle"):
    problems.generate(0, 0, _options("riddle"))
  with pytest.raises(errors.UserError, match="kinds"):
    problems.generate(0, 0, _options())
  for steps in ((0, 2), (3, 2), (1, 9)):
    with pytest.raises(errors.UserError, match="steps_min"):
      problems.generate(0, 0, _options("sum", steps=steps))
  with pytest.raises(errors.UserError, match="test"):
    problems.generate(0, 0, split="test")


def test_is_fast():
  start = time.process_time()
  for index in range(5000):
    problems.generate(10, index)
  # 100,000 a second on an idle core; a tenth of it still feeds a trainer.
  assert time.process_time() - start < 0.5
