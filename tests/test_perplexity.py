"""Perplexity by position against the objective, point by point."""

import dataclasses
import functools

import numpy as np
import pytest
from tolerances import (
  LOSS,
  NLL,
  close,
  far,
  jit,
  make_coprocessor,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug.augment import objective
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.evals import perplexity

BOTH_NLL = perplexity.both_nll
A, S = 4, 14
DOCUMENTS = np.array(
  [[0] * 6 + [1] * 8, [2] * 5 + [3] * 6 + [-1] * 3, [-1] * S], np.int32
)
# Ahead tokens of points with N = 3 tokens up to them, per document of length
# n at token j: n - (N - 1) - j of them.
COUNTS = {j: sum(n - 2 - j for n in (6, 8, 5, 6) if n > 2 + j) for j in (1, 2)}
COUNTS[4] = 0 + 2 + 0 + 0


@functools.cache
def setup():
  model = make_model(layers=1, layer_kinds=("sliding",))
  spec = Layout(3, A, "replace")
  return (
    model,
    make_params(model),
    make_coprocessor(model, Layout(3, A)),
    spec,
  )


@functools.cache
def both(tokens_key=0, at_once=64):
  model, decoder, coproc, spec = setup()
  tokens = tokens_of(model, 3, S, seed=tokens_key)
  run = quick()  # traced anew, so that the constant is read
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(perplexity, "POINTS_AT_ONCE", at_once)
    out = run(model, decoder, coproc, tokens, DOCUMENTS, spec=spec)
  return tokens, [np.asarray(x) for x in out]


def quick():
  """both_nll as the package compiles it, but for optimisation."""
  both = BOTH_NLL.__wrapped__
  return jit(
    lambda *args, **kw: both(*args, **kw),
    static_argnums=0,
    static_argnames=("spec", "context"),
  )


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(perplexity, "both_nll", quick())
    yield


def table(documents=DOCUMENTS, **kw):
  model, decoder, coproc, spec = setup()
  batches = [
    {"tokens": tokens_of(model, 3, S), "documents": documents},
  ]
  positions = kw.pop("positions", (1, 2, 4, 8))
  return perplexity.by_position(
    model, decoder, coproc, batches, spec, positions=positions, **kw
  )


def test_weights_are_of_points_that_fit():
  _, (_, _, weights) = both()
  for b, p, j in np.ndindex(3, S, A):
    first, last = p - 2, p + 1 + j
    inside = first >= 0 and last < S and DOCUMENTS[b, p] >= 0
    # Of one document: the N tokens up to p, and the ahead token.
    fits = inside and len(set(DOCUMENTS[b, first : last + 1])) == 1
    assert weights[b, p, j] == fits, (b, p, j)
  assert weights[0].any() and not weights[2].any()


def test_both_nll_are_the_objectives_at_every_point():
  model, decoder, coproc, spec = setup()
  tokens, (frozen, augmented, weights) = both()

  @jit
  def sums(points):
    batch = {"tokens": tokens, "documents": DOCUMENTS}
    args = batch, points, spec
    return (
      objective.frozen_loss(model, decoder, *args),
      objective.coprocessor_loss(model, decoder, coproc, *args),
    )

  for p in range(2, S - 1):
    # One point a sequence, -1 where it cannot bear a trace.
    there = weights[:, p, 0] > 0
    points = np.where(there, p, -1).astype(np.int32)[:, None]
    (plain, count), (nll, same) = sums(points)
    np.testing.assert_array_equal(weights[:, p].sum(0), count)
    np.testing.assert_array_equal(count, same)
    close((frozen[:, p] * weights[:, p]).sum(0), plain, 3 * NLL)
    close((augmented[:, p] * weights[:, p]).sum(0), nll, 3 * NLL)
  far(frozen[weights > 0], augmented[weights > 0])


def test_points_in_turns_equal_all_at_once():
  _, whole = both()
  _, turns = both(at_once=4)  # 14 points: three full turns and a padded one
  np.testing.assert_array_equal(turns[2], whole[2])
  for a, b in zip(turns[:2], whole[:2], strict=True):
    close(a * whole[2], b * whole[2], NLL)


def test_table_is_the_mean_over_the_tokens_that_count():
  _, (frozen, augmented, weights) = both()
  rows = {row.position: row for row in table()}
  assert set(rows) == {1, 2, 4}  # 8 is beyond A
  for j, row in rows.items():
    keep = weights[..., j - 1] > 0
    assert row.tokens == keep.sum() == COUNTS[j]
    assert row.documents == len(np.unique(DOCUMENTS[keep]))
    close(row.frozen_nll, frozen[..., j - 1][keep].mean(), LOSS)
    close(row.augmented_nll, augmented[..., j - 1][keep].mean(), LOSS)
    change = 100 * np.expm1(row.augmented_nll - row.frozen_nll)
    assert abs(row.change_percent - change) < 1e-3


def test_padding_and_other_documents_have_no_part():
  model, decoder, coproc, spec = setup()
  tokens = tokens_of(model, 3, S)
  rows = table()
  tokens[DOCUMENTS < 0] = 5
  batch = {"tokens": tokens, "documents": DOCUMENTS}
  again = perplexity.by_position(model, decoder, coproc, [batch], spec)
  assert [dataclasses.astuple(r) for r in again] == [
    dataclasses.astuple(r) for r in rows
  ]
  tokens[0, 0] = (tokens[0, 0] + 1) % 37  # a document's first token has one
  changed = perplexity.by_position(model, decoder, coproc, [batch], spec)
  far(changed[0].augmented_nll, rows[0].augmented_nll)


def test_batches_add_up():
  model, decoder, coproc, spec = setup()
  tokens = tokens_of(model, 3, S)
  # As the reader pads the last batch: rows of padding only.
  apart = []
  for b in range(2):
    documents = np.full_like(DOCUMENTS, -1)
    documents[0] = DOCUMENTS[b]
    apart.append({"tokens": np.roll(tokens, -b, 0), "documents": documents})
  split = perplexity.by_position(model, decoder, coproc, apart, spec)
  for a, b in zip(split, table(), strict=True):
    assert (a.position, a.tokens, a.documents) == (
      b.position,
      b.tokens,
      b.documents,
    )
    close(a.augmented_nll, b.augmented_nll, LOSS)


def test_positions_that_no_document_reaches_are_left_out():
  short = np.array([[0] * 4 + [-1] * (S - 4)] * 3, np.int32)
  assert [(r.position, r.tokens) for r in table(short)] == [(1, 3)]


def test_no_point_at_all_is_refused():
  none = np.array([[0] * 3 + [-1] * (S - 3)] * 3, np.int32)
  with pytest.raises(UserError, match="no token to compare"):
    table(none)


def test_points_want_as_much_context_as_asked():
  rows = {n: table(context=n) for n in (0, 3, 4)}
  assert [dataclasses.astuple(r) for r in rows[0]] == [
    dataclasses.astuple(r) for r in rows[3]
  ]
  # One token fewer of each document: 4, 6, 3 and 4 less j - 1 with N = 3.
  assert [r.tokens for r in rows[4]] == [2 + 4 + 1 + 2, 1 + 3 + 0 + 1, 1]
  assert [r.documents for r in rows[4]] == [4, 3, 1]


def test_plain_models_are_compared_on_the_same_tokens():
  model, decoder, coproc, spec = setup()
  batch = {"tokens": tokens_of(model, 3, S), "documents": DOCUMENTS}
  other = make_params(model, seed=5)
  kw = dict(positions=(1, 2, 4), context=4)
  plain = perplexity.plain_sums(
    {"frozen": (model, decoder), "augmented": (model, other)},
    [batch],
    spec,
    **kw,
  )
  table = perplexity.coprocessor_sums(
    model, decoder, coproc, [batch], spec, **kw
  )
  for name in ("documents", "tokens", "checksum"):
    np.testing.assert_array_equal(getattr(plain, name), getattr(table, name))
  close(plain.nll["frozen"], table.nll["frozen"], 3 * NLL)
  far(plain.nll["augmented"], table.nll["augmented"])
  _, (_, _, weights) = both()
  np.testing.assert_array_equal(
    perplexity.point_weights(DOCUMENTS, spec), weights
  )


def test_no_text_at_all_is_refused():
  model, decoder, coproc, spec = setup()
  with pytest.raises(UserError, match="no text"):
    perplexity.by_position(model, decoder, coproc, [], spec)
