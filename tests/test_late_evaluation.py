"""Evaluation at a fixed lateness: perplexity, generation, exact match."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from cases import slow_but
from packed import DOCUMENTS, STARTS_AT, S, setup
from tolerances import LOSS, NLL, close, far, jit

from cacheaug.augment import objective, traces
from cacheaug.augment.traces import Layout
from cacheaug.data import tokenizers
from cacheaug.data.problems import Options
from cacheaug.evals import exact_match, perplexity
from cacheaug.inference import context as contexts
from cacheaug.inference import padding
from cacheaug.model import transformer

N = 4


@functools.cache
def quick():
  """both_nll as the package compiles it, but for optimisation."""
  both = perplexity.both_nll.__wrapped__
  return jit(
    lambda *args, **kw: both(*args, **kw),
    static_argnums=0,
    static_argnames=("spec", "context"),
  )


@functools.cache
def evaluated(late=None, room=None):
  model, spec, decoder, coproc, tokens = setup(3, "harmless", "replace")
  kw = {}
  if late is not None:
    kw = {"late": np.int32(late), "late_room": np.int32(room)}
  out = quick()(model, decoder, coproc, tokens, DOCUMENTS, spec=spec, **kw)
  return [np.asarray(x) for x in out]


def test_perplexity_at_a_lateness_is_the_objectives():
  model, spec, decoder, coproc, tokens = setup(3, "harmless", "replace")
  frozen, augmented, weights = evaluated(2, 2)

  @jit
  def nll(points, late):
    laid = traces.layout_traces(tokens, DOCUMENTS, points, spec, late)
    _, cache = objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)
    return objective.traces_nll(model, decoder, coproc, cache, laid)[:, 0]

  for p in range(S - 1):
    there = weights[:, p, 0] > 0
    # 3 tokens that are read, 2 that are not, one of the same document after.
    fits = [
      p + 1 - STARTS_AT[DOCUMENTS[b, p]] >= 5
      and DOCUMENTS[b, p + 1] == DOCUMENTS[b, p]
      for b in range(2)
    ]
    assert there.tolist() == fits, p
    points = np.where(there, p, -1).astype(np.int32)[:, None]
    expected = nll(points, np.where(points < 0, 0, 2))
    keep = weights[:, p] > 0
    close(augmented[:, p][keep], np.asarray(expected)[keep], NLL)
  on_time = evaluated()
  close((frozen * weights), (on_time[0] * weights), NLL)
  far(augmented * weights, on_time[1] * weights)


def test_each_lateness_is_compared_on_the_same_tokens():
  late, on_time = evaluated(4, 4), evaluated(0, 4)
  np.testing.assert_array_equal(late[2], on_time[2])
  whole = evaluated()
  assert 0 < on_time[2].sum() < whole[2].sum()
  # On time, in a table of lateness: the numbers of the plain table.
  kept = on_time[2]
  close(on_time[1] * kept, whole[1] * kept, NLL)


def test_table_takes_a_lateness(monkeypatch):
  monkeypatch.setattr(perplexity, "both_nll", quick())
  model, spec, decoder, coproc, tokens = setup(3, "harmless", "replace")
  batches = [{"tokens": tokens, "documents": DOCUMENTS}]
  rows = perplexity.by_position(
    model, decoder, coproc, batches, spec, positions=(1,), late=2, late_room=4
  )
  _, augmented, _ = evaluated(2, 4)
  keep = evaluated(2, 4)[2][..., 0] > 0
  assert rows[0].tokens == keep.sum()
  close(rows[0].augmented_nll, augmented[..., 0][keep].mean(), LOSS)


@pytest.mark.parametrize("scheme", traces.POSITIONS)
@pytest.mark.parametrize("start", slow_but(traces.STARTS, quick=(1,)))
def test_generation_inserts_late_latents_as_trained(start, scheme):
  model, spec, decoder, coproc, tokens = setup(N, start, scheme)
  tokens, d = tokens[:, :12], 3
  prompts = [row[:k].tolist() for row, k in zip(tokens, (12, 9), strict=True)]
  padded, documents = padding.pad_left(prompts, 0)
  spec = dataclasses.replace(spec, ahead=1)

  @jit
  def first(tokens, documents):
    context = contexts.read(model, decoder, tokens, documents)
    context = contexts.augment_context(
      model, decoder, coproc, context, spec, late=np.full(2, d, np.int32)
    )
    logits = transformer.logits(model, decoder, context.hidden)
    return jax.nn.log_softmax(logits), context.position

  logp, position = first(padded, documents)
  assert position.tolist() == [12 + (N if scheme == "insert" else 0)] * 2
  for b, k in enumerate((12, 9)):
    row = np.concatenate([tokens[b, :k], [5]])[None].astype(np.int32)
    laid = traces.layout_traces(
      row, 0 * row, np.array([[k - 1]]), spec, np.array([[d]])
    )
    _, cache = objective.context_pass(model, decoder, row, 0 * row, spec)
    nll = objective.traces_nll(model, decoder, coproc, cache, laid)
    close(-logp[b, 5], nll[0, 0, 0], NLL)


def test_exact_match_late_in_two_ways(monkeypatch):
  """What is asked of generation, and what comes of answers begun alone."""
  calls, said = [], set()
  tokenizer, spec = tokenizers.load("byte"), Layout(2, 4)
  asked = exact_match.of_problems(Options(("sum",), (4, 4)), tokenizer, 3)

  def greedy(model, decoder, coproc, tokens, documents, **kw):
    on = coproc is not None
    late = 0 if kw["late"] is None else int(kw["late"][0])
    calls.append((on, late, kw["max_new_tokens"], tokens.shape[1]))
    (digit,) = tokenizer.encode("1" if on else "0")
    return np.full((len(tokens), kw["max_new_tokens"]), digit)

  monkeypatch.setattr(contexts, "greedy", greedy)
  monkeypatch.setattr(
    exact_match.problems, "check", lambda _, text: said.add(text) or True
  )

  def ask(coproc="coprocessor", **kw):
    calls.clear()
    said.clear()
    exact_match.exact_match(None, None, coproc, tokenizer, spec, asked, **kw)
    return list(calls), "/".join(said)

  ((on, late, new, width),), text = ask()
  assert (on, late, new, text) == (True, 0, exact_match.ANSWER_TOKENS, "111111")
  # Read in time, inserted after two tokens that the decoder said alone.
  begun = [(False, 0, 6, width + 2), (True, 2, 4, width + 2)]
  assert ask(late=2) == (begun, "001111")
  # Inserted at the question's end, whose last two tokens were not read.
  assert ask(late=2, early=True) == ([(True, 2, 6, width)], "111111")
  # Later than the answer's end: the frozen decoder's.
  assert ask(late=8) == ([(False, 0, 6, width + 6)], "000000")
  assert ask(coproc=None, late=3) == ([(False, 0, 6, width)], "000000")
  # Of a short question it has read as much as it needs.
  ((_, late, _, _),), _ = ask(late=40, early=True)
  assert late == len(asked[0].prompt) - 2


def test_questions_too_short_for_latents_are_answered_without(monkeypatch):
  """Each coprocessor is asked the same questions, whatever its N."""
  tokenizer = tokenizers.load("byte")
  options = Options(("sum", "word"), (4, 4))
  asked = exact_match.of_problems(options, tokenizer, 40)
  lengths = [len(question.prompt) for question in asked]
  spec = Layout(int(np.median(lengths)), 4)
  said = []

  def greedy(model, decoder, coproc, tokens, documents, **kw):
    (digit,) = tokenizer.encode("0" if coproc is None else "1")
    return np.full((len(tokens), kw["max_new_tokens"]), digit)

  monkeypatch.setattr(contexts, "greedy", greedy)
  monkeypatch.setattr(
    exact_match.problems, "check", lambda _, text: said.append(text) or True
  )
  for late in (0, 3):
    said.clear()
    exact_match.exact_match(
      None, None, "coprocessor", tokenizer, spec, asked, late=late, early=True
    )
    short = [text == "000000" for text in said]
    assert short == [n < spec.context_needed for n in lengths]
    assert any(short) and not all(short)
