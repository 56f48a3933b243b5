"""What is added to the objective, and the window, by three ways.

Structured (the loss itself), the dense mask over one sequence, and one trace
at a time over plain caches: the same number and the same gradients.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
from cases import slow_but
from ml_collections import ConfigDict
from tolerances import (
  GRADIENT,
  LOSS,
  close,
  close_trees,
  far,
  jit,
  make_coprocessor,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug.augment import coprocessor, dense_masks, objective, terms, traces
from cacheaug.augment.terms import Terms
from cacheaug.augment.traces import Layout
from cacheaug.data.sources import source_defaults
from cacheaug.errors import UserError
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout

N, A, S, J = 3, 3, 16, 2
DOCUMENTS = np.array([[0] * 12 + [1] * 4], np.int32)
POINTS = np.array([[6, 9]], np.int32)  # of the last a target is not there
RESULTS = np.full((1, S, J), -1, np.int32)
RESULTS[0, 6], RESULTS[0, 9] = (5, 7), (11, -1)
WINDOW, TOP = 5, 4


@functools.cache
def setup(positions="replace", window=0):
  model = make_model()
  layout = Layout(N, A, positions, window=window)
  coproc = make_coprocessor(model, Layout(N, A))
  batch = {
    "tokens": tokens_of(model, 1, S),
    "documents": DOCUMENTS,
    "results": RESULTS,
  }
  return model, layout, make_params(model), coproc, batch


@functools.cache
def structured(added, step=0, **changes):
  """(total, gradients) of the loss itself."""
  model, layout, decoder, coproc, batch = setup(**changes)

  @jit
  def run(coproc):
    def total(coproc):
      args = model, decoder, coproc, batch, POINTS, layout
      out, sums, extras = terms.coprocessor_loss(*args, terms=added, step=step)
      return out, (sums, extras)

    return jax.value_and_grad(total, has_aux=True)(coproc)

  return run(coproc)


def total_of(p, states, own, added, **changes):
  """The loss of the trace after p, of its rows [R, D] and the network's."""
  model, _, decoder, _, batch = setup(**changes)

  def logp(rows):
    return jax.nn.log_softmax(transformer.logits(model, decoder, rows))

  tokens = batch["tokens"][:, :12]
  if added.teacher:
    whole, _ = transformer.prefill(model, decoder, tokens)
  # Of mean 1: 0.5 ** (0, 1, 2) are 7 / 12 on average.
  along = np.array([12, 6, 3]) / 7 if added.decay == 0.5 else np.ones(A)
  out = 0.0
  for j in range(min(A, 11 - p)):
    row = logp(states[N - 1 + j])
    out -= along[j] * row[tokens[0, p + 1 + j]]
    if added.teacher:
      teacher = jax.lax.stop_gradient(logp(whole[0, p + j]))
      best = jnp.argsort(-teacher)[:TOP]
      likely = jnp.exp(teacher[best])
      kl = (likely * (teacher[best] - row[best])).sum()
      others = jnp.ones(row.shape, bool).at[best].set(False)
      left = jnp.where(others, jnp.exp(teacher), 0.0).sum()
      kl += left * jnp.log(left / jnp.where(others, jnp.exp(row), 0.0).sum())
      out += added.teacher * along[j] * kl
  rows = states if added.supervision_at == "decoder" else own
  for j, label in enumerate(RESULTS[0, p]):
    if label >= 0:
      out -= added.supervision * logp(rows[j])[label]
  return out


def by_trace(added, states_of, **changes):
  """(total, gradients), of states_of(coproc) -> [M] of (states [R, D], own)."""
  coproc = setup(**changes)[3]

  @jit
  def run(coproc):
    def total(coproc):
      out = 0.0
      for p, states in zip(POINTS[0], states_of(coproc), strict=True):
        out += total_of(p, *states, added, **changes)
      return out

    return jax.value_and_grad(total)(coproc)

  return run(coproc)


@functools.cache
def alone(added, **changes):
  """The prefix by itself, and rows at its end over a cache that is cut."""
  model, layout, decoder, _, batch = setup(**changes)
  tokens = batch["tokens"]

  def of_trace(coproc, p):
    _, cache = transformer.prefill(model, decoder, tokens[:, : p + 1])
    copied = transformer.embed(model, decoder, tokens[:, p - N + 1 : p + 1])
    inserted = layout.positions == "insert"
    at = jnp.arange(p - N + 1, p + 1)[None] + (N if inserted else 0)
    x = coproc["soft_tokens"][None] + copied
    own, _ = transformer.extend(model, coproc["transformer"], cache, x, at)
    z = copied + own @ coproc["latent_projection"]
    begin = max(p - layout.window + 1, 0) if layout.window else 0
    end = p + 1 - (N if layout.positions == "replace" else 0)
    cache = cache.replace(
      keys=cache.keys[:, :, begin:end],
      values=cache.values[:, :, begin:end],
      positions=cache.positions[:, begin:end],
      segments=cache.segments[:, begin:end],
    )
    fed = transformer.embed(model, decoder, tokens[:, p + 1 : p + A])
    after = jnp.arange(p + 1, p + A)[None] + (N if inserted else 0)
    states, _ = transformer.extend(
      model,
      decoder,
      cache,
      jnp.concatenate([z, fed], 1),
      jnp.concatenate([at, after], 1),
    )
    return states[0], own[0]

  def states_of(coproc):
    return [of_trace(coproc, p) for p in POINTS[0]]

  return by_trace(added, states_of, **changes)


def dense(added, **changes):
  """One sequence [context | all traces] under dense_masks.dense_mask."""
  model, layout, decoder, _, batch = setup(**changes)
  tokens, m = batch["tokens"], POINTS.shape[1]
  laid = traces.layout_traces(tokens, DOCUMENTS, POINTS, layout)
  flat = lambda x: x.reshape(1, 1, -1, *x.shape[3:])  # noqa: E731
  segments = traces.segments_of(DOCUMENTS, True)
  order = dense_masks.dense_mask(DOCUMENTS[0], POINTS[0], layout)[None, None]

  def states_of(coproc):
    copied = transformer.embed(model, decoder, laid.input_tokens)
    x = coproc["soft_tokens"][None, None] + copied
    _, cache = transformer.prefill(model, decoder, tokens, segments=segments)
    own = coprocessor.hidden_states(model, coproc, cache, laid, copied)
    z = copied + own @ coproc["latent_projection"]
    x = jnp.concatenate([z, transformer.embed(model, decoder, laid.ahead)], 2)
    context = transformer.embed(model, decoder, tokens)[:, None]
    rows = QueryLayout(
      jnp.concatenate(
        [jnp.arange(S)[None, None], flat(laid.rows.positions)], 2
      ),
      jnp.concatenate([segments[:, None], flat(laid.rows.segments)], 2),
      jnp.zeros((1, 1, 1), jnp.int32),
      order,
    )
    x = jnp.concatenate([context, flat(x)], 2)
    hidden = transformer.run_blocks(model, decoder, x, rows, None)
    states = hidden[0, 0, S:].reshape(m, layout.rows, -1)
    return zip(states, own[0], strict=True)

  return by_trace(added, states_of, **changes)


CASES = {
  "labels": (Terms(supervision=0.7), {}),
  "own labels": (Terms(supervision=0.7, supervision_at="coprocessor"), {}),
  "window": (Terms(), dict(window=WINDOW)),
  "teacher, decay": (
    Terms(teacher=0.6, teacher_top=TOP, decay=0.5),
    dict(window=WINDOW),
  ),
}


@pytest.mark.parametrize("case", slow_but(list(CASES), quick=(0, 2, 3)))
def test_structured_equals_one_at_a_time_equals_dense(case):
  added, changes = CASES[case]
  (total, _), grads = structured(added, **changes)
  plain = structured(Terms())[0][0]
  far(total, plain)  # it does something
  for way in (alone, dense):
    other, other_grads = way(added, **changes)
    close(total, other, LOSS)
    close_trees(grads, other_grads, GRADIENT)


@pytest.mark.parametrize("positions", traces.POSITIONS)
def test_the_window_is_a_windows_whatever_the_positions(positions):
  changes = dict(positions=positions, window=WINDOW)
  close(
    structured(Terms(), **changes)[0][0], alone(Terms(), **changes)[0], LOSS
  )


@pytest.mark.parametrize("kind", ["prefix", "handover"])
def test_a_bias_of_attention_in_tiles_equals_one_softmax(kind):
  """Of handed-over keys: loss and gradients, the bias's own among them."""
  model = make_model()
  layout = Layout(N, A, "replace", kind=kind, window=WINDOW, kv_bias=True)
  coproc, batch = make_coprocessor(model, layout), setup()[4]

  def run(name, coproc):
    other = model.clone(attention=Kernel(name))

    @jit
    def both(coproc):
      def loss(coproc):
        args = other, make_params(model), coproc, batch, POINTS, layout
        return objective.coprocessor_loss(*args)[0].sum()

      return jax.value_and_grad(loss)(coproc)

    return both(coproc)

  loss, grads = run("xla", coproc)
  plain, plain_grads = run("plain", coproc)
  close(loss, plain, LOSS)
  close_trees(grads, plain_grads, GRADIENT)
  assert np.abs(grads["kv_bias"]).max() > 1e-4
  none = coproc | {"kv_bias": jnp.zeros_like(coproc["kv_bias"])}
  far(run("xla", none)[0], loss)
  without = {k: v for k, v in coproc.items() if k != "kv_bias"}
  close(run("xla", none)[0], run("xla", without)[0], LOSS)


def test_divergence_is_none_of_a_prediction_from_itself():
  model, _, decoder, _, batch = setup()
  states, _ = transformer.prefill(model, decoder, batch["tokens"])
  own = states[:, POINTS[0, 0] : POINTS[0, 0] + A][:, None]
  for top in (TOP, 37, 99):  # of 37 tokens
    args = model, decoder, states, own, POINTS[:, :1], top
    none = terms.teacher_divergence(*args)
    assert none.shape == (1, 1, A) and np.abs(none).max() < 1e-5
    args = model, decoder, states, own + 0.1, POINTS[:, :1], top
    assert terms.teacher_divergence(*args).min() > 1e-5


def test_labels_weigh_less_with_every_step():
  added = Terms(supervision=2.0, supervision_until=10)
  weights = [float(terms.supervision_weight(added, s)) for s in (0, 5, 10, 11)]
  assert weights == [2.0, 1.0, 0.0, 0.0]
  assert terms.supervision_weight(Terms(supervision=2.0), 99) == 2.0


@pytest.mark.parametrize(
  "added, layout, said",
  [
    (dict(supervision=-1), {}, "supervision.weight=-1"),
    (dict(supervision_at="head"), {}, "supervision.at='head' is not one"),
    (dict(supervision=1), dict(kind="prefix"), "coprocessor.kind='prefix'"),
    (
      dict(supervision=1, supervision_at="coprocessor"),
      dict(kind="pause"),
      "supervision.at='coprocessor'.*'pause'",
    ),
    (dict(supervision=1), dict(rounds=2, stride=2), "traces.stride=2"),
    (dict(supervision=1), dict(latents=1), "coprocessor.latents=1"),
    (dict(teacher=1), {}, "teacher.weight=1 with traces.window=0"),
    (dict(teacher_top=0), {}, "teacher.top=0"),
    ({}, dict(kv_bias=True), "coprocessor.kv_bias.*'coprocessor'"),
    (dict(decay=0.0), {}, "traces.decay=0.0"),
    ({}, dict(window=2), "traces.window=2 is less than the 3 tokens"),
    ({}, dict(window=9, rounds=2), "traces.window=9 with traces.rounds=2"),
  ],
  ids=str,
)
def test_terms_that_cannot_be_are_refused(added, layout, said):
  with pytest.raises(UserError, match=said) as caught:
    Terms(**added).check(Layout(**dict(latents=N, ahead=A) | layout))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at, free", [("decoder", 2), ("coprocessor", 3)])
def test_results_beyond_the_latents_are_not_taught(at, free):
  added = Terms(supervision=1.0, supervision_at=at)
  layout = Layout(N, A)
  assert added.labelled(layout) == free
  assert added.labelled(dataclasses.replace(layout, rounds=2)) == free + N
  results = np.zeros((1, S, 4), np.int32)
  results[0, POINTS[0, 1], 1:] = -1
  points = np.append(POINTS, [[-1]], 1)
  labels, weights = terms.labels_of(results, points, free)
  assert labels.shape == (1, 3, free)
  assert weights.sum(-1).tolist() == [[free, 1, 0]]


# --- in the trainer ----------------------------------------------------------


def steps_of(tmp_path, **changes):
  config = small_runs.get_config(str(tmp_path))
  source = source_defaults()
  source.kind, source.kinds = "problems", ("hops",)
  source.steps_min, source.steps_max = 2, 3
  config.data.sources = ConfigDict({"hops": source})
  config.data.answers_only = config.data.results = True
  config.data.sequence, config.coprocessor.latents = 64, 4
  config.traces.count = 2
  config.update_from_flattened_dict(
    {"supervision.weight": 0.5, "supervision.until": 4, "traces.decay": 0.5}
    | changes
  )
  return small_runs.Steps(config)


def test_training_learns_labels_and_accumulates_them(tmp_path):
  whole = steps_of(tmp_path)
  batch = whole.batches.at(0)
  assert (batch["results"] >= 0).any()
  losses = whole.take(3)
  halves = steps_of(tmp_path, **{"optimizer.accumulation": 2})
  np.testing.assert_allclose(halves.take(3), losses, rtol=1e-5)
  plain = steps_of(tmp_path, **{"supervision.weight": 0.0, "traces.decay": 1.0})
  assert plain.take(1) == pytest.approx(
    losses[:1], rel=1e-6
  )  # of the nll alone
  far(plain.take(2)[-1], losses[-1])
