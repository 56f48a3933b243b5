"""Which contexts get latents, and what the report says that this gains."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from tolerances import (
  NLL,
  close,
  jit,
  make_coprocessor,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug import build
from cacheaug.augment import objective
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import gates
from cacheaug.projects.gating import report
from cacheaug.projects.gating.report import (
  BEST,
  ENTROPY,
  LEARNED,
  RANDOM,
  Contexts,
)

DOCUMENTS = np.array([[0] * 6 + [1] * 8, [2] * 5 + [3] * 6 + [-1] * 3])
S, A, N = 14, 3, 2


def test_every():
  on = gates.every(jnp.arange(1, 9), 3)
  assert on.tolist() == [False, False, True] * 2 + [False, False]
  assert gates.every(jnp.arange(3), 1).all()
  with pytest.raises(UserError, match="k=0"):
    gates.every(jnp.arange(3), 0)


def test_entropy_is_of_the_next_token_and_gates_above_the_threshold():
  model = make_model()
  decoder, tokens = make_params(model), tokens_of(model, 2, S)
  spec = Layout(N, A)

  @jit
  def run(decoder):
    args = model, decoder, tokens, DOCUMENTS, spec
    hidden, _ = objective.context_pass(*args)
    found = gates.entropy(model, decoder, hidden)
    on = gates.uncertain(model, decoder, hidden, jnp.median(found))
    table = objective.transformer.logits(model, decoder, hidden)
    return found, on, table

  found, on, table = map(np.asarray, run(decoder))
  p = np.exp(table - table.max(-1, keepdims=True), dtype=np.float64)
  p /= p.sum(-1, keepdims=True)
  expected = -(p * np.log(p)).sum(-1)
  close(found, expected, NLL)
  np.testing.assert_array_equal(on, found > np.median(found))
  assert on.sum() == on.size / 2


@functools.cache
def fitted():
  """A gain that depends on two of eight features, in one of them bent."""
  rng = np.random.default_rng(0)
  hidden = rng.normal(2.0, 3.0, (4000, 8)).astype(np.float32)
  hidden[:, 7] = 1.0  # says nothing, and has no spread
  gain = 0.3 * np.maximum(hidden[:, 0], 0) - 0.2 * hidden[:, 3]
  noise = 0.1 * rng.normal(size=4000)
  head = gates.fit_head(
    jax.random.key(0), hidden[:3000], gain[:3000] + noise[:3000], steps=400
  )
  return head, hidden[3000:], gain[3000:]


def test_head_learns_the_gain_and_not_of_what_says_nothing():
  head, hidden, gain = fitted()
  found = np.asarray(gates.predicted_gain(head, hidden))
  assert np.corrcoef(found, gain)[0, 1] > 0.98
  assert abs(found.mean() - gain.mean()) < 0.1
  on = gates.worthwhile(head, hidden, 0.2)
  np.testing.assert_array_equal(on, found > 0.2)
  # Any leading axes.
  again = gates.predicted_gain(head, hidden.reshape(10, 100, 8))
  np.testing.assert_allclose(again.reshape(-1), found, atol=1e-5)
  with pytest.raises(UserError, match="no context"):
    gates.fit_head(jax.random.key(0), hidden[:0], gain[:0])


def test_head_comes_back_from_files(tmp_path):
  head, hidden, _ = fitted()
  gates.save_head(tmp_path / "gate", head, {"threshold": 0.25})
  again, meta = gates.load_head(tmp_path / "gate")
  assert meta == {"threshold": 0.25}
  np.testing.assert_array_equal(
    gates.predicted_gain(again, hidden), gates.predicted_gain(head, hidden)
  )
  with pytest.raises(UserError, match="gate.json: missing"):
    gates.load_head(tmp_path)
  path = tmp_path / "gate" / "gate.json"
  path.write_text(json.dumps({"format": "x"}))
  with pytest.raises(UserError, match="not a gate's head"):
    gates.load_head(tmp_path / "gate")
  gates.save_head(tmp_path / "gate", head | {"more": head["mean"]}, {})
  with pytest.raises(UserError, match="has .*more"):
    gates.load_head(tmp_path / "gate")


# --- the report -------------------------------------------------------------


def test_contexts_are_those_that_can_bear_a_trace():
  model = make_model(layers=1, layer_kinds=("sliding",))
  spec = Layout(N, A, "replace")
  decoder, coproc = make_params(model), make_coprocessor(model, spec)
  tokens = tokens_of(model, 2, S)
  batch = {"tokens": tokens, "documents": DOCUMENTS.astype(np.int32)}
  found = report.measure(model, decoder, coproc, [batch, batch], spec)
  where = [
    (b, p)
    for b in range(2)
    for p in range(1, S - 1)
    # N tokens up to the point, and one after, of its document.
    if len(set(DOCUMENTS[b, p - 1 : p + 2].tolist())) == 1
    and DOCUMENTS[b, p] >= 0
  ]
  assert len(found) == 2 * len(where)
  begins = {0: 0, 1: 6, 2: 0, 3: 5}
  documents = [int(DOCUMENTS[b, p]) for b, p in where]
  assert found.documents.tolist() == documents * 2
  so_far = [
    p - begins[d] + 1 for (_, p), d in zip(where, documents, strict=True)
  ]
  assert found.tokens.tolist() == so_far * 2

  @jit
  def sums(points):
    args = batch, points, spec
    frozen, _ = objective.frozen_loss(model, decoder, *args)
    augmented, _ = objective.coprocessor_loss(model, decoder, coproc, *args)
    hidden, _ = objective.context_pass(
      model, decoder, tokens, batch["documents"], spec
    )
    return (frozen - augmented).sum(), hidden

  for i in (0, 3, len(where) - 1):
    b, p = where[i]
    points = np.full((2, 1), -1, np.int32)
    points[b] = p
    gain, hidden = sums(points)
    close(found.gain[i], gain, 10 * NLL)
    close(found.hidden[i], hidden[b, p], NLL)
    entropy = gates.entropy(model, decoder, hidden[b, p])
    close(found.entropy[i], entropy, NLL)
  assert np.abs(found.gain).max() > 0.1
  short = batch | {"documents": np.arange(2 * S).reshape(2, S)}
  with pytest.raises(UserError, match="no token has room"):
    report.measure(model, decoder, coproc, [short], spec)


def contexts(gain, documents=None, **more):
  t = len(gain)
  return Contexts(
    hidden=more.get("hidden", np.zeros((t, 8), np.float32)),
    entropy=more.get("entropy", np.zeros(t)),
    tokens=np.arange(1, t + 1),
    gain=np.asarray(gain, np.float64),
    documents=np.zeros(t, int) if documents is None else np.array(documents),
  )


def test_gain_reached_by_share_worked_by_hand():
  gain = np.array([1.0, -2.0, 4.0, 3.0, -1.0])  # 5 in all
  score = np.array([5, 4, 3, 2, 1])
  shares = report.reached(score, gain, (0, 20, 40, 60, 80, 100))
  np.testing.assert_allclose(shares, [0, 20, -20, 60, 120, 100])
  best = report.reached(gain, gain, (0, 20, 40, 60, 80, 100))
  np.testing.assert_allclose(best, [0, 80, 140, 160, 140, 100])
  # Where all together lose, so says the sign.
  lost = report.reached(score, -gain, (100,))
  np.testing.assert_allclose(lost, [-100])


def test_every_k_and_join():
  some = contexts([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1])
  rows = {k: (share, gained) for k, share, gained in report.periodic(some)}
  assert rows[1] == (100, 100) and rows[2] == (50, 60) and rows[4] == (25, 40)
  both = report.join([some, some])
  assert both.documents.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
  assert both.gain.tolist() == [1, 2, 3, 4] * 2


def test_table_ranks_thresholds_and_intervals():
  head, hidden, gain = fitted()
  rng = np.random.default_rng(3)
  documents = np.repeat(np.arange(100), 10)
  some = contexts(
    gain, documents, hidden=hidden, entropy=gain + rng.normal(size=1000)
  )
  rows = {
    r.gate: r for r in report.table(some, head, {LEARNED: 0.1, ENTROPY: 99.0})
  }
  half = {name: row.percent[5] for name, row in rows.items()}
  assert half[BEST] >= half[LEARNED] > half[ENTROPY] > half[RANDOM]
  assert all(row.percent[0] == 0 for row in rows.values())
  assert all(abs(row.percent[10] - 100) < 1e-6 for row in rows.values())
  for row in rows.values():
    assert row.at_half[0] < row.percent[5] < row.at_half[1]
  on = np.asarray(gates.worthwhile(head, hidden, 0.1))
  assert abs(rows[LEARNED].share - 100 * on.mean()) < 1e-6
  reached = 100 * gain[on].sum() / abs(gain.sum())
  assert abs(rows[LEARNED].gained - reached) < 1e-6
  assert rows[ENTROPY].share == 0 and rows[RANDOM].share is None
  low, high = report.gain_interval(some)
  assert low < gain.mean() < high and low > 0
  text = report.format_table(some, list(rows.values()))
  assert "may be nothing" not in text
  nothing = gain - gain.mean()
  none = contexts(nothing, documents, hidden=hidden)
  assert "may be nothing" in report.format_table(
    none, report.table(none, head, {})
  )
  assert re.search(r"learned head: at 50 % \d+\.\d % of the gain", text)


def test_training_text_is_not_the_held_out(tmp_path):
  from cacheaug.evals import run_report

  config = small_runs.get_config(str(tmp_path))
  _, tokenizer = build.open_model(config)
  batches = list(report.training_text(config, tokenizer, "text"))
  assert [b["tokens"].shape for b in batches] == [(4, 32)]
  held = list(run_report.held_out(config, tokenizer, "text"))

  def numbers(batches):
    return {int(d) for b in batches for d in np.unique(b["documents"])} - {-1}

  assert numbers(batches) and not numbers(batches) & numbers(held)
