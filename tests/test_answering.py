"""Many prompts at once, in both columns, against one at a time."""

import dataclasses

import numpy as np
import pytest
import tolerances
from cases import slow_but

from cacheaug.augment.traces import Layout
from cacheaug.data.tokenizers import ByteTokenizer
from cacheaug.errors import UserError
from cacheaug.inference import padding
from cacheaug.inference.sampling import Sampling
from cacheaug.lm import LM, Coprocessor
from cacheaug.projects.lm_eval.answering import (
  AUGMENTED,
  FROZEN,
  Answerer,
  Request,
)

CONTEXTS = [
  "def f(x):\n  return",
  "import os\nimport",
  "for i in range(10): pr",
]
CONTINUATIONS = [" x", " x + 1\n", "int(i)"]
NEW = 6


@pytest.fixture(scope="module")
def tiny():
  model = tolerances.make_model(vocab_size=260, max_positions=96)
  return LM(model, tolerances.make_params(model), ByteTokenizer(), "tiny")


def augmented(tiny, scheme, latents=3, kind="coprocessor"):
  start = "as_is" if scheme == "insert" else "harmless"
  spec = Layout(latents, 4, scheme, start, kind=kind)
  params = tolerances.make_coprocessor(tiny.model, spec)
  return dataclasses.replace(tiny, coprocessor=Coprocessor(params, spec))


def pairs_of(lm):
  return [
    (tuple(lm.encode(context)), tuple(lm.tokenizer.encode(continuation)))
    for context in CONTEXTS
    for continuation in CONTINUATIONS
  ]


def alone(lm, pairs, latents):
  """The same by `lm.nll`, which knows nothing of shared contexts."""
  length, ahead = max(len(c) for c, _ in pairs) + 9, 8
  rows = np.full((len(pairs), length), 5)
  for row, (context, continuation) in zip(rows, pairs, strict=True):
    row[: len(context) + len(continuation)] = [*context, *continuation]
  points = [[len(context) - 1] for context, _ in pairs]
  nll = lm.nll(rows, points, ahead=ahead, latents=latents)[:, 0]
  return [
    -row[: len(ids)].sum() for row, (_, ids) in zip(nll, pairs, strict=True)
  ]


@pytest.mark.parametrize(
  ("scheme", "kind"),
  slow_but(
    [
      ("insert", "coprocessor"),
      ("overlay", "coprocessor"),
      ("replace", "handover"),
      ("replace", "activations"),
    ],
    quick=(1, 3),
  ),
)
def test_continuations_of_shared_contexts(tiny, scheme, kind):
  lm = augmented(tiny, scheme, kind=kind)
  pairs = pairs_of(lm)
  found = Answerer(lm, latents=True, batch=4).loglikelihoods(pairs)
  for column, latents in ((FROZEN, False), (AUGMENTED, True)):
    want = alone(lm, pairs, latents)
    got = np.array([one[column][0] for one in found])
    np.testing.assert_allclose(got, want, atol=10 * tolerances.NLL, rtol=0)
  tolerances.far(
    np.array([one[FROZEN][0] for one in found]),
    np.array([one[AUGMENTED][0] for one in found]),
  )


@pytest.mark.parametrize("latents", [False, True])
def test_most_likely_is_what_would_be_said(tiny, latents):
  lm = augmented(tiny, "replace")
  column = AUGMENTED if latents else FROZEN
  context = tuple(lm.encode(CONTEXTS[0]))
  (said,) = lm.complete([CONTEXTS[0]], NEW, latents=latents)
  assert len(said.ids) > 2
  other = (*said.ids[:-1], (said.ids[-1] + 1) % 260)
  answerer = Answerer(lm, latents=True, batch=4)
  right, wrong = answerer.loglikelihoods(
    [(context, said.ids), (context, other)]
  )
  assert right[column][1] and not wrong[column][1]


def test_texts_are_those_of_generate(tiny):
  lm = augmented(tiny, "replace")
  asked = [Request(tuple(lm.encode(c)), NEW) for c in CONTEXTS]
  answerer = Answerer(lm, latents=True, batch=2)
  found = answerer.texts(asked)
  for column, latents in ((FROZEN, False), (AUGMENTED, True)):
    want = lm.complete(CONTEXTS, NEW, latents=latents)
    want = [lm.tokenizer.decode(one.ids) for one in want]
    assert [one[column] for one in found] == want
  # Drawn, for texts that vary: a stop string ends each column by itself.
  drawn = dataclasses.replace(asked[0], sampling=Sampling(1.0))
  (whole,) = answerer.texts([drawn])
  assert whole[FROZEN] != whole[AUGMENTED]
  stop = whole[FROZEN][2:4]
  (cut,) = answerer.texts([dataclasses.replace(drawn, stop=(stop,))])
  for column in (FROZEN, AUGMENTED):
    assert cut[column] == whole[column].split(stop)[0]
  assert len(cut[FROZEN]) < len(whole[FROZEN])


def test_short_contexts_are_answered_frozen_and_counted(tiny):
  lm = augmented(tiny, "replace", latents=4)
  continuation = tuple(lm.tokenizer.encode("abc"))
  short, enough = tuple(lm.encode("ab")), tuple(lm.encode("abc"))
  assert (len(short), len(enough)) == (3, 4)
  answerer = Answerer(lm, latents=True, batch=4)
  one, two = answerer.loglikelihoods(
    [(short, continuation), (enough, continuation)]
  )
  assert one[FROZEN] == one[AUGMENTED] and two[FROZEN] != two[AUGMENTED]
  assert answerer.counts["short"] == 1 and answerer.counts["requests"] == 2
  (one,) = answerer.texts([Request(short, NEW)])
  assert one[FROZEN] == one[AUGMENTED]


def test_answers_do_not_depend_on_the_batch(tiny):
  lm = augmented(tiny, "overlay")
  pairs = pairs_of(lm)
  one = Answerer(lm, latents=True, batch=1).loglikelihoods(pairs)
  many = Answerer(lm, latents=True, batch=8).loglikelihoods(pairs)
  for column in (FROZEN, AUGMENTED):
    np.testing.assert_allclose(
      [x[column][0] for x in one],
      [x[column][0] for x in many],
      atol=10 * tolerances.NLL,
      rtol=0,
    )
    assert [x[column][1] for x in one] == [x[column][1] for x in many]


@pytest.mark.parametrize(
  ("scheme", "kind"), [("insert", "coprocessor"), ("replace", "activations")]
)
def test_running_text_renews_latents_every_ahead_tokens(tiny, scheme, kind):
  lm = augmented(tiny, scheme, kind=kind)
  spec = lm.coprocessor.spec
  before, scored = (2,), tuple(lm.tokenizer.encode("def f(a, b):\n"))
  tokens = [[*before, *scored, 5, 5, 5, 5]]
  (found,) = Answerer(lm, latents=True, batch=2).running([(before, scored)])
  plain = lm.nll(tokens, [[0]], ahead=len(scored), latents=False)[0, 0]
  np.testing.assert_allclose(
    found[FROZEN], -plain.sum(), atol=10 * tolerances.NLL, rtol=0
  )
  # The first points have no room for latents, where they stand on tokens.
  first = spec.context_needed - 1
  points = np.arange(first, len(scored), spec.ahead)
  with_latents = lm.nll(tokens, [points], ahead=spec.ahead)[0].reshape(-1)
  want = plain[:first].sum() + with_latents[: len(scored) - first].sum()
  np.testing.assert_allclose(
    found[AUGMENTED], -want, atol=10 * tolerances.NLL, rtol=0
  )
  tolerances.far(np.array(found[FROZEN]), np.array(found[AUGMENTED]))


@pytest.mark.parametrize("scheme", ["insert", "replace"])
def test_too_long_contexts_lose_their_left_alike(tiny, scheme):
  lm = augmented(tiny, scheme)
  answerer = Answerer(lm, latents=True, batch=2)
  limit = lm.model.config.max_positions
  # Inserted latents take positions: room for them is kept in both columns.
  assert answerer.max_length == limit - (3 if scheme == "insert" else 0)
  answerer.max_length = 24  # as a decoder of so many positions would
  context = tuple(lm.encode("x = 1\n" * 9))
  continuation = tuple(lm.tokenizer.encode("abc"))
  (long,) = answerer.loglikelihoods([(context, continuation)])
  assert answerer.counts["truncated"] == 1
  cut = Answerer(lm, latents=True, batch=2)
  assert cut.loglikelihoods([(context[-22:], continuation)]) == [long]
  (text,) = answerer.texts([Request(context, NEW)])
  assert cut.texts([Request(context[-(24 - NEW) :], NEW)]) == [text]
  with pytest.raises(UserError, match="30 tokens exceeds the decoder's 24"):
    answerer.loglikelihoods([(context, context[:30])])
  with pytest.raises(UserError, match="max_gen_toks=24 leaves no room"):
    answerer.texts([Request(context, 24)])


def test_refusals(tiny):
  with pytest.raises(UserError, match="no coprocessor is attached"):
    Answerer(tiny, latents=True, batch=2)
  with pytest.raises(UserError, match="batch=0 must be at least 1"):
    Answerer(tiny, latents=False, batch=0)
  with pytest.raises(UserError, match="continuation has no tokens"):
    Answerer(tiny, latents=False, batch=2).loglikelihoods([((2, 5), ())])


def test_few_shapes():
  lengths = {padding.bucket(n) for n in range(1, 2049)}
  assert lengths == {
    32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048
  }  # fmt: skip
  assert all(padding.bucket(n) >= n for n in range(1, 2049))
  assert [padding.power(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
