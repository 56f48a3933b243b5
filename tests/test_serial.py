"""Serial problems: answers by another way than they were made, and rows."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from cacheaug.augment import objective, point_sampling, traces
from cacheaug.data import (
  opening,
  problems,
  serial,
  sources,
  tokenizers,
)
from cacheaug.errors import UserError
from cacheaug.evals import perplexity

BYTES = tokenizers.ByteTokenizer()
_SIZES = {"hops": (5, 9), "compose": (3, 5), "reorder": (3, 5)}


def _options(kind, **changes) -> problems.Options:
  size = _SIZES.get(kind, (6, 12))
  return problems.Options(
    **{"kinds": (kind,), "steps": (1, 4), "size": size} | changes
  )


def _results(kind: str, facts: str, cue: str) -> list[str]:
  """The result of each step, read out of the text alone."""
  if kind == "hops":
    pairs, found = dict(facts.split()), [cue[1]]
    while len(found) <= int(cue[0]):
      found.append(pairs[found[-1]])
    return found[1:]
  if kind == "chains":
    lines = dict(line.split(" = ") for line in facts.splitlines())
    found = [cue.removesuffix(" is")]
    while found[-1] in lines:
      found.append(lines[found[-1]])
    return found[1:]
  factors = {word[0]: word[1:] for word in facts.split()}
  found = []
  for count in range(1, len(cue)):  # its last character is '='
    # From the last factor to the first, symbol by symbol.
    images = []
    for symbol in range(len(facts.split()[0]) - 1):
      for name in cue[:count]:
        symbol = int(factors[name][symbol]) - 1
      images.append(str(symbol + 1))
    found.append("".join(images))
  return found


@pytest.mark.parametrize("kind", serial.KINDS)
def test_every_step_is_right(kind):
  steps = []
  for index in range(300):
    problem = problems.generate(0, index, _options(kind, questions=2))
    facts = problem.question[: problem.facts]
    asked = (problem.question[problem.facts :], problem.more[0].question)
    for cue, turn in zip(asked, problem.turns, strict=True):
      assert list(turn.results) == _results(kind, facts, cue), problem.text
      assert turn.answer == turn.results[-1]
      assert turn.steps == len(turn.results) and turn.kind == kind
      steps.append(turn.steps)
    assert problem.text == "".join(
      f"{turn.question}{turn.space}{turn.answer}\n" for turn in problem.turns
    )
  assert np.bincount(steps)[1:].min() > 100  # of 600, each of 1..4


def test_compose_names_a_run_and_reorder_does_not():
  def sorted_share(kind):
    options = _options(kind, steps=(4, 4))
    cues = [
      p.question[p.facts : -1]
      for p in (problems.generate(1, i, options) for i in range(100))
    ]
    return sum(list(cue) == sorted(cue) for cue in cues)

  assert sorted_share("compose") == 100 and sorted_share("reorder") < 15


def test_the_order_of_factors_matters():
  """Negative control of _results: the products do not commute."""
  different = 0
  for index in range(50):
    problem = problems.generate(
      2, index, _options("reorder", steps=(2, 2), size=(5, 5))
    )
    facts, cue = problem.question[: problem.facts], problem.question[-3:]
    swapped = _results("reorder", facts, f"{cue[1]}{cue[0]}=")
    different += swapped[-1] != problem.answer
  assert different > 40


def test_facts_belong_to_one_split_with_all_their_questions():
  options = _options("hops", size=(3, 3), steps=(1, 2))
  facts = {
    split: {
      p.question[: p.facts]
      for p in (
        problems.generate(3, i, options, split=split) for i in range(99)
      )
    }
    for split in ("train", "validation")
  }
  assert not facts["train"] & facts["validation"]


def test_chains_have_others_beside_them():
  for index in range(50):
    problem = problems.generate(4, index, _options("chains", size=(12, 12)))
    words = {line.split()[-1] for line in problem.question.splitlines()[:-1]}
    assert len([word for word in words if len(word) > 1]) >= 2


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      {"kinds": ("hops",), "steps": (1, 5), "size": (5, 8)},
      ("steps_max=5", "cycle of 5 letters", "size_min=6"),
    ),
    (
      {"kinds": ("chains",), "steps": (1, 7), "size": (6, 9)},
      ("steps_max=7", "6 lines", "size_min=7"),
    ),
    ({"kinds": ("hops",), "size": (5, 27)}, ("size_max=27", "2 to 26")),
    ({"kinds": ("compose",), "size": (3, 6)}, ("size_max=6", "3 to 5")),
    ({"kinds": ("chains",), "size": (9, 8)}, ("size_min=9", "size_max=8")),
    ({"kinds": ("sum",), "questions": 2}, ("questions=2", "'sum'")),
    ({"kinds": ("hops",), "questions": 0}, ("questions=0",)),
  ],
)
def test_impossible_options_are_one_line(changes, words):
  with pytest.raises(UserError) as caught:
    problems.Options(**changes).check("data.sources.p")
  message = str(caught.value)
  assert "\n" not in message and "data.sources.p." in message
  assert [word for word in words if word not in message] == []


def _open(split="train", sequence=64, results=True, **changes):
  source = sources.source_defaults()
  source.update(kind="problems", kinds=("hops",), questions=3)
  source.update(changes)
  config = ConfigDict(
    {
      "sources": {"p": source},
      "sequence": sequence,
      "batch": 4,
      "cache_dir": "",
      "validation_fraction": 0.2,
      "workers": 1,
      "answers_only": True,
      "results": results,
    }
  )
  return opening.open_batches(config, BYTES, split=split, seed=0)


@pytest.mark.parametrize("kind", serial.KINDS)
def test_rows_have_the_results_where_questions_end(kind):
  low, high = _SIZES.get(kind, (6, 9))
  batch = _open(kinds=(kind,), sequence=160, size_min=low, size_max=high).at(0)
  tokens, answers = batch["tokens"], batch["answers"]
  ends = ~answers[:, :-1] & answers[:, 1:]
  told = (batch["results"][:, :-1] >= 0).any(-1)
  np.testing.assert_array_equal(told, ends)
  first = np.where(answers[:, 1:], tokens[:, 1:], 0)[ends]
  results = batch["results"][:, :-1][ends]
  count = (results >= 0).sum(-1)
  np.testing.assert_array_equal(
    np.take_along_axis(results, count[:, None] - 1, 1)[:, 0], first
  )
  assert set(count.tolist()) <= {1, 2, 3, 4} and len(set(count.tolist())) > 2


def test_answers_from_the_facts_on():
  batch = _open(answers_from="facts", results=False).at(0)
  for tokens, documents, answers in zip(*batch.values(), strict=True):
    here = documents == documents[0]
    facts, rest = (BYTES.decode(tokens[here & m]) for m in (~answers, answers))
    assert facts.count("\n") == 1 and len(facts) == 8 * 3
    assert len(rest) == 3 * 4 and rest.count("\n") == 3


def test_questions_after_the_facts_are_not_learned():
  batch = _open(answers_from="after_facts", results=False).at(0)
  whole = _open(answers_from="facts", results=False).at(0)
  for name, expected in whole.items():
    np.testing.assert_array_equal(batch[name], expected)
  asked = batch["asked"]
  learned = batch["answers"] & ~asked
  for tokens, here in zip(batch["tokens"], learned, strict=True):
    text = BYTES.decode(tokens[here])
    assert [len(line) for line in text.split("\n")[:3]] == [1, 1, 1]
  # A question is a digit and a letter, an answer a letter and its line's end.
  assert asked.sum() == learned.sum() > 0
  layout = traces.Layout(latents=2, ahead=12)
  begin = point_sampling.before_beginnings(batch["answers"])
  points = np.argmax(begin, 1)[:, None]
  placed = traces.layout_traces(
    batch["tokens"], batch["documents"], points, layout
  )
  weights = objective.learned(placed, batch)
  np.testing.assert_array_equal(weights[:, 0], np.tile([0, 0, 1, 1], (4, 3)))
  np.testing.assert_array_equal(objective.learned(placed, whole), 1.0)
  table = perplexity.point_weights(batch["documents"], layout)
  table = perplexity.of_answers(table, batch)
  rows = np.arange(4)
  np.testing.assert_array_equal(table[rows, points[:, 0]], weights[:, 0])


def test_validation_rows_are_filled_up():
  batches = list(_open("validation", validation_sequences=5).epoch())
  results = np.concatenate([b["results"] for b in batches])
  assert results.shape == (8, 64, 4)
  assert (results[:5] >= 0).any() and (results[5:] == -1).all()


def test_what_has_no_results_is_refused(tmp_path):
  with pytest.raises(UserError, match=r"p\.kinds=\('sum',\).*data\.results"):
    _open(kinds=("sum",), questions=1)
  path = tmp_path / "a.jsonl"
  path.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"text": "y"}))
  with pytest.raises(UserError, match=r"sources\.p has no results"):
    _open(kind="jsonl", path=str(path))
  with pytest.raises(UserError, match="answers_from='middle'"):
    _open(answers_from="middle")
  with pytest.raises(UserError, match="shorter than a problem of 37 tokens"):
    _open(sequence=30, results=False).at(0)
