"""Answers apart from questions: data, points, losses."""

import json

import jax
import numpy as np
import pytest
import tolerances
from ml_collections import ConfigDict
from tolerances import jit

from cacheaug.augment import objective, traces
from cacheaug.augment.point_sampling import Draw, sample_points, valid_points
from cacheaug.data import opening, sources, tokenizers
from cacheaug.errors import UserError
from cacheaug.evals import exact_match, perplexity

BYTES = tokenizers.ByteTokenizer()


def _config(tmp_path, **changes):
  source = sources.source_defaults()
  source.update(kind="jsonl", path=str(tmp_path / "qa.jsonl"))
  source.update(field="q", answer_field="a", prompt="Q: {}\nA: ")
  source.update(changes)
  lines = [
    {"q": "x" * (3 + i % 5), "a": f"{i} " * (1 + i % 3)} for i in range(40)
  ]
  lines.append({"q": "long", "a": "z" * 60})
  text = "\n".join(json.dumps(line) for line in lines)
  (tmp_path / "qa.jsonl").write_text(text)
  return ConfigDict(
    {
      "sources": {"qa": source},
      "sequence": 32,
      "batch": 4,
      "cache_dir": str(tmp_path / "cache"),
      "validation_fraction": 0.2,
      "workers": 1,
      "answers_only": True,
      "results": False,
    }
  )


def _open(config, split="train"):
  return opening.open_batches(config, BYTES, split=split, seed=0)


def _documents(batch):
  """(question, answer) texts of every document of a batch."""
  found = []
  for tokens, documents, answers in zip(
    batch["tokens"], batch["documents"], batch["answers"], strict=True
  ):
    assert not answers[documents < 0].any()
    for number in np.unique(documents[documents >= 0]):
      here = documents == number
      parts = (tokens[here & ~answers], tokens[here & answers])
      found.append(tuple(BYTES.decode(part.tolist()) for part in parts))
  return found


def test_every_document_is_whole_and_its_answer_marked(tmp_path):
  found = []
  for split in ("train", "validation"):
    rows = _open(_config(tmp_path), split)
    found += _documents(rows.take(np.arange(rows.num_examples)))
  assert len(found) == 41
  long = [pair for pair in found if "long" in pair[0]]
  # Cut off at the row's end; nothing of it is in another row. A BOS is first.
  assert long == [("Q: long\nA: ", "z" * (32 - 1 - 11))]
  for question, answer in set(found) - set(long):
    first = int(answer.split()[0])
    assert question == f"Q: {'x' * (3 + first % 5)}\nA: "
    assert answer == f"{first} " * (1 + first % 3)


def test_problems_are_marked_and_otherwise_the_same(tmp_path):
  config = _config(tmp_path, kind="problems", answer_field="")
  config.sequence = 96
  batch = _open(config).at(0)
  for question, answer in _documents(batch):
    assert answer.strip().isdigit() and answer.endswith("\n")
    assert not question[-1].isdigit()
  config.answers_only = False
  plain = _open(config).at(0)
  assert set(plain) == {"tokens", "documents"}
  np.testing.assert_array_equal(plain["tokens"], batch["tokens"])
  np.testing.assert_array_equal(plain["documents"], batch["documents"])


def test_without_answers_only_the_text_is_the_same(tmp_path):
  config = _config(tmp_path)
  marked = _open(config).at(0)
  config.answers_only = False
  plain = _open(config).at(0)
  assert set(plain) == {"tokens", "documents"}
  np.testing.assert_array_equal(plain["tokens"], marked["tokens"])
  np.testing.assert_array_equal(plain["documents"], marked["documents"])


def test_padding_rows_have_no_answers(tmp_path):
  rows = _open(_config(tmp_path), "validation")
  batches = list(rows.epoch())
  assert all(b["answers"].shape == (4, 32) for b in batches)
  documents = np.concatenate([b["documents"] for b in batches])
  answers = np.concatenate([b["answers"] for b in batches])
  assert answers.any() and not answers[documents < 0].any()


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"answer_field": ""}, ("sources.qa", "no answers", "answer_field")),
    ({"answer_field": "b"}, ("no field 'b'",)),
    ({"prompt": "Q: "}, ("sources.qa.prompt='Q: '", "{}")),
    ({"kind": "text"}, ("sources.qa.answer_field='a'", "jsonl")),
  ],
)
def test_bad_sources_are_refused(tmp_path, changes, words):
  with pytest.raises(UserError) as caught:
    _open(_config(tmp_path, **changes))
  assert [w for w in words if w not in str(caught.value)] == []


# --- points and losses --------------------------------------------------------

DOCUMENTS = np.array([[0] * 6 + [1] * 5 + [-1]], np.int32)
ANSWERS = np.array([[0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0]], bool)


def test_points_stand_before_answers_their_beginnings_first():
  spec, of_two = traces.Layout(latents=2, ahead=3), Draw(2)
  valid = jit(lambda: valid_points(DOCUMENTS, spec, answers=ANSWERS))()
  assert np.flatnonzero(valid).tolist() == [3, 4, 7, 8, 9]
  draw = jit(lambda key: sample_points(key, DOCUMENTS, spec, of_two, ANSWERS))
  plain = jit(lambda key: sample_points(key, DOCUMENTS, spec, of_two))
  keys = [jax.random.key(i) for i in range(8)]
  assert all(draw(key).tolist() == [[3, 7]] for key in keys)
  # Control: without answers they are anywhere.
  assert len({str(plain(key).tolist()) for key in keys}) > 3


def test_tables_have_latents_where_answers_begin():
  ones = np.ones((*DOCUMENTS.shape, 2), np.float32)
  marked = {"documents": DOCUMENTS, "answers": ANSWERS}
  weights = perplexity.of_answers(ones, marked)
  assert np.flatnonzero(weights[0, :, 0]).tolist() == [3, 7]
  plain = perplexity.of_answers(ones, {"documents": DOCUMENTS})
  assert plain.sum() == ones.sum()


def test_questions_are_read_out_of_rows(tmp_path):
  """Whole documents with short answers of one line, each once."""
  config = _config(tmp_path)
  rows = _open(config, "train")
  asked = exact_match.of_rows(rows.epoch(), BYTES, 99, name="qa")
  for question in asked:
    text = BYTES.decode(question.prompt)
    first = int(question.answer.split()[0])
    assert text == f"Q: {'x' * (3 + first % 5)}\nA: "
    assert question.answer == " ".join([str(first)] * (1 + first % 3))
    assert question.prompt[0] == BYTES.bos_id and question.name == "qa"
  assert len({question.answer for question in asked}) == len(asked) > 20
  assert len(exact_match.of_rows(rows.epoch(), BYTES, 5, name="qa")) == 5


def test_answers_of_several_lines_are_not_asked_for(tmp_path):
  batch = _open(_config(tmp_path), "train").at(0)
  ends = batch["answers"] & (batch["tokens"] == ord(" ") + 4)
  batch["tokens"] = np.where(ends, ord("\n") + 4, batch["tokens"])
  asked = exact_match.of_rows([batch], BYTES, 99, name="qa")
  assert all(" " not in q.answer and "\n" not in q.answer for q in asked)
  batch["answers"][:] = False
  with pytest.raises(UserError, match=r"data\.sources\.qa has no held-out"):
    exact_match.of_rows([batch], BYTES, 99, name="qa")


def test_shares_have_wilsons_interval():
  """By its equation: |share - p| = z sqrt(p (1 - p) / n) at both ends."""
  for right, asked in ((0, 50), (7, 50), (50, 50), (600, 1024)):
    low, high = exact_match.interval(right, asked)
    for p in (p for p in (low, high) if 1e-9 < p < 1 - 1e-9):
      spread = 1.959964 * (p * (1 - p) / asked) ** 0.5
      assert abs(right / asked - p) == pytest.approx(spread, abs=1e-7)
    assert low - 1e-9 <= right / asked <= high + 1e-9
  assert exact_match.interval(0, 50)[0] == 0.0
  columns = {"frozen": {"all": (1, 4), "hops-1": (1, 2), "hops-2": (0, 2)}}
  assert [row[0] for row in exact_match.table(columns)][1:] == [
    "hops-1",
    "hops-2",
    "all",
  ]
  assert exact_match.plot(columns).startswith(b"\x89PNG")


def test_losses_are_over_answers_alone():
  model = tolerances.make_model()
  params = tolerances.make_params(model)
  spec = traces.Layout(latents=2, ahead=3)
  tokens = tolerances.tokens_of(model, 1, 12)
  batch = {"tokens": tokens, "documents": DOCUMENTS, "answers": ANSWERS}

  @jit
  def run():
    points = sample_points(jax.random.key(0), DOCUMENTS, spec, Draw(5), ANSWERS)
    hidden, _ = objective.context_pass(model, params, tokens, DOCUMENTS, spec)
    return (
      objective.next_token_nll(model, params, hidden, tokens)[0],
      objective.language_model_loss(model, params, batch, True),
      objective.frozen_loss(model, params, batch, points, spec),
    )

  plain, (nll, count), frozen = jax.device_get(run())
  answered = np.flatnonzero(ANSWERS[0])
  assert count == len(answered) == 5
  tolerances.close(nll, plain[answered - 1].sum()[None], 5 * tolerances.LOSS)
  # Position j of five traces: the tokens j after 3, 4, 7, 8 and 9.
  for j in range(3):
    reached = [t + j for t in answered if t + j in answered]
    reached = [t for t in reached if ANSWERS[0][t - j : t + 1].all()]
    assert frozen[1][j] == len(reached)
    expected = plain[np.array(reached) - 1].sum()
    tolerances.close(frozen[0][j], expected, 5 * tolerances.LOSS)
