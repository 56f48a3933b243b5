"""Faults of asking an LM: wrong types, latents unset, lm_eval's requests.

Each was seen, here or by users of neighbouring projects.
"""

import dataclasses

import numpy as np
import pytest
import tolerances

import cacheaug
from cacheaug import build
from cacheaug.augment.traces import Layout
from cacheaug.data.tokenizers import ByteTokenizer
from cacheaug.errors import UserError
from cacheaug.inference.sampling import Sampling
from cacheaug.inference.session import InsertionSchedule
from cacheaug.lm import LM, Coprocessor

NEW = 3


@pytest.fixture(scope="module")
def lm():
  """Without a coprocessor."""
  model = tolerances.make_model(vocab_size=260, max_positions=96)
  return LM(model, tolerances.make_params(model), ByteTokenizer(), "tiny")


@pytest.fixture(scope="module")
def augmented(lm):
  spec = Layout(2, 4, "replace")
  params = tolerances.make_coprocessor(lm.model, spec)
  return dataclasses.replace(lm, coprocessor=Coprocessor(params, spec))


# --- latents unset ----------------------------------------------------------


def test_unset_latents_are_where_there_is_a_coprocessor(lm, augmented):
  assert lm.generate(["abc"], NEW) == lm.generate(["abc"], NEW, latents=False)
  (done,) = augmented.complete(["abc"], NEW)
  assert done.insertions
  tokens, points = [lm.encode("abcdef")], [[2]]
  np.testing.assert_array_equal(
    lm.nll(tokens, points, 2), augmented.nll(tokens, points, 2, latents=False)
  )
  tolerances.far(augmented.nll(tokens, points, 2), lm.nll(tokens, points, 2))
  for ask in (
    lambda: lm.generate(["abc"], NEW, latents=True),
    lambda: lm.generate(["abc"], NEW, latents=[False]),
    lambda: lm.nll(tokens, points, 2, latents=True),
  ):
    with pytest.raises(UserError, match="no coprocessor is attached"):
      ask()


def test_commands_without_a_coprocessor_decode():
  assert build.open_lm("", "shipped:nano", "").coprocessor is None
  assert build.open_lm("", "", "").coprocessor.spec.latents == 4
  with pytest.raises(UserError, match="--coprocessor is missing"):
    build.open_lm("", "shipped:nano", "", True)
  flags = [build.latents_of(flag) for flag in (None, "on", "off")]
  assert flags == [None, True, False]


# --- wrong types ------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  (
    (dict(max_new_tokens=4.0), "max_new_tokens=4.0 is not a whole number"),
    (dict(max_new_tokens=None), "max_new_tokens=None is not a whole"),
    (dict(max_new_tokens="4"), "max_new_tokens='4' is not a whole"),
    (dict(max_new_tokens=True), "max_new_tokens=True is not a whole"),
    (dict(max_new_tokens=2**70), "exceed the decoder's 96 positions"),
    (dict(prompts=None), "prompts is None: give a list of strings"),
    (dict(prompts=3), "prompts is 3: give a list of strings"),
    (dict(prompts={"a": 1}), "prompts is {'a': 1}: give a list"),
    (dict(prompts=b"a"), "prompts is one string"),
    (dict(prompts=["a", None]), "prompts: entry 1 is None, not a string"),
    (dict(prompts=[b"a"]), "prompts: entry 0 is b'a', not a string"),
    (dict(seed=2**64), "seed=18446744073709551616 must be at most"),
    (dict(seed=-(2**64)), "seed=-18446744073709551616 must be at least"),
    (dict(seed=1.0), "seed=1.0 is not a whole number"),
    (dict(seed=None), "seed=None is not a whole number"),
    (dict(stop=3), "stop is 3: give a list of strings"),
    (dict(stop=[None]), "stop: entry 0 is None, not a string"),
    (dict(stop=[1]), "stop: entry 0 is 1, not a string"),
    (dict(latents="off"), "latents='off': give True or False"),
    (dict(latents=1), "latents is 1: give a list of True and False"),
    (dict(latents=[1]), "latents: 1 is neither True nor False"),
    (dict(plan=(0,)), r"plan is \(0,\): give a InsertionSchedule"),
    (dict(sampling=0.7), "sampling is 0.7: give a Sampling"),
    (dict(gate=3), "gate=3 is neither"),
  ),
)
def test_wrong_types_are_one_line(lm, options, message):
  with pytest.raises(UserError, match=message):
    lm.generate(**(dict(prompts=["abc"], max_new_tokens=NEW) | options))


def test_what_callers_may_give(augmented):
  expected = augmented.generate(["abc"], NEW)
  for options in (
    dict(stop=None),  # as OpenAI-style callers
    dict(max_new_tokens=np.int64(NEW)),
    dict(prompts=("abc",)),
    dict(prompts=iter(["abc"])),
    dict(latents=np.bool_(True)),
    dict(latents=np.array([True])),
    dict(seed=-1),
    dict(seed=2**40),
    dict(seed=np.uint8(3)),
    dict(plan=InsertionSchedule(at=[0])),
    dict(gate=None),
  ):
    asked = dict(prompts=["abc"], max_new_tokens=NEW) | options
    assert augmented.generate(**asked) == expected, options


def test_wrong_types_of_laws_and_plans():
  for make, message in (
    (lambda: InsertionSchedule(at=0), "at is 0: give a list of whole numbers"),
    (
      lambda: InsertionSchedule(after=("a",)),
      "after: an entry='a' is not a whole",
    ),
    (lambda: InsertionSchedule(every=1.5), "every=1.5 is not a whole number"),
    (lambda: Sampling("hot"), "temperature is 'hot': give a number"),
    (lambda: Sampling(float("nan")), "temperature=nan must be 0"),
    (lambda: Sampling(1.0, top_k=1.5), "top_k=1.5 is not a whole number"),
    (lambda: Sampling(top_p=None), "top_p is None: give a number"),
  ):
    with pytest.raises(UserError, match=message):
      make()


def test_wrong_types_of_tokens(lm):
  context = lm.prefill([[2, 5]])
  for ask, message in (
    (lambda: lm.prefill(None), "tokens: give .B, S. ids"),
    (lambda: lm.prefill(3), "tokens: give .B, S. ids"),
    (lambda: lm.prefill([[1, [2]]]), "tokens: give .B, S. ids"),
    (lambda: lm.prefill("abc"), "a row is a number"),
    (lambda: lm.prefill([[1.0]]), "1.0 in row 0 is not a token"),
    (lambda: lm.prefill([[True]]), "True in row 0 is not a token"),
    (lambda: lm.decode([[2]], 2), r"context is \[\[2\]\]: give a Context"),
    (lambda: lm.decode(context, 2.5), "max_new_tokens=2.5 is not a whole"),
    (lambda: lm.decode(context, 2, stop_ids=3), "stop_ids is 3: give a list"),
    (lambda: lm.decode(context, 2, stop_ids=[1.0]), "entry=1.0 is not a whole"),
    (lambda: lm.nll([[2, 3, 4]], [[1]], 1.0), "ahead=1.0 is not a whole"),
    (lambda: lm.nll([[2, 3, 4]], None, 1), "points: give whole numbers"),
    (lambda: lm.nll([[2, 3, 4]], [[0], [0, 1]], 1), "points: give whole"),
    (lambda: lm.nll(None, [[1]], 1), "tokens: give .B, S. ids"),
    (lambda: lm.nll([[2, 3, 4]], [[0]], 1, latents="x"), "latents='x': give"),
    (lambda: lm.encode(None), "text is None: give a string"),
    (lambda: cacheaug.load(None), "None: no such directory"),
    (lambda: lm.with_coprocessor(None), "None: no such directory"),
  ):
    with pytest.raises(UserError, match=message):
      ask()


# --- lm_eval's requests -----------------------------------------------------


class Melting(ByteTokenizer):
  """Bytes, but for the token 3, which is "Answer"."""

  def encode(self, text):
    start, found, rest = text.partition("Answer")
    ids = super().encode(start) + [3] * bool(found)
    return ids + (self.encode(rest) if rest else [])

  def decode(self, ids):
    return "".join(
      "Answer" if i == 3 else super(Melting, self).decode([i]) for i in ids
    )


@pytest.fixture(scope="module")
def asked(lm):
  """lm_eval's model over a tokenizer that merges."""
  pytest.importorskip("lm_eval", reason="pip install 'cacheaug[eval]'")
  from cacheaug.projects.lm_eval.answering import Answerer
  from cacheaug.projects.lm_eval.model import AugmentedLM

  merging = dataclasses.replace(lm, tokenizer=Melting())
  return AugmentedLM(answerer=Answerer(merging, batch=2))


def requests(kind, *arguments):
  from lm_eval.api.instance import Instance

  return [
    Instance(request_type=kind, doc={}, arguments=args, idx=i)
    for i, args in enumerate(arguments)
  ]


def test_latents_unset_is_the_frozen_column(asked):
  assert asked.column == "frozen"


def test_running_text_has_one_bos(asked, lm):
  (got,) = asked.loglikelihood_rolling(
    requests("loglikelihood_rolling", ("ab",))
  )
  ids = lm.encode("ab")
  nll = lm.nll([[*ids, 5]], [[0]], ahead=len(ids) - 1)
  np.testing.assert_allclose(got, -nll.sum(), atol=10 * tolerances.NLL, rtol=0)
  twice = lm.nll([[ids[0], *ids, 5]], [[0]], ahead=len(ids))
  tolerances.far(got, -twice.sum())


def test_a_continuation_that_melts_into_its_context(asked, lm):
  asked.answerer.counts.clear()
  pairs = (("Ans", "wer"), ("Ans", "x"))
  got = asked.loglikelihood(requests("loglikelihood", *pairs))
  assert asked.answerer.counts["melted"] == 1
  ids = [*lm.encode("Ans"), *lm.tokenizer.encode("wer")]
  nll = lm.nll([[*ids, 5]], [[3]], ahead=3)
  np.testing.assert_allclose(
    got[0][0], -nll.sum(), atol=10 * tolerances.NLL, rtol=0
  )
  with pytest.raises(UserError, match="neither context nor continuation"):
    asked.loglikelihood(requests("loglikelihood", ("", "")))
  with pytest.raises(UserError, match="a continuation has no tokens"):
    asked.loglikelihood(requests("loglikelihood", ("a", "")))


def test_arguments_that_do_nothing_are_taken(asked):
  plain = {"until": ["\n"], "do_sample": False}
  expected = asked._request("a", plain)
  for more in (
    dict(num_beams=1),
    dict(repetition_penalty=1, min_p=0, no_repeat_ngram_size=0),
    dict(num_return_sequences=1, length_penalty=1.0, early_stopping=False),
    dict(top_k=None, top_p=None, num_beams=None),
    dict(until=["\n", "", None]),
  ):
    assert asked._request("a", plain | more) == expected, more
  for more, message in (
    (dict(num_beams=4), "num_beams=4 is not supported"),
    (dict(repetition_penalty=1.2), "repetition_penalty=1.2 is not"),
    (dict(bad_words=["a"]), "'bad_words' is not known"),
  ):
    with pytest.raises(UserError, match=message):
      asked._request("a", plain | more)
  with pytest.raises(UserError, match="max_gen_toks=0 must be at least 1"):
    none = dict(max_gen_toks=0)
    asked.generate_until(requests("generate_until", ("a", plain | none)))
