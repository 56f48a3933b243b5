"""What is added to the objective, and the window, by three ways.

Structured (the loss itself), the dense mask over one sequence, and one trace
at a time over plain caches: the same number and the same gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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

from cacheaug.augment import coprocessor, terms, traces
from cacheaug.augment.terms import Terms
from cacheaug.augment.traces import Layout
from cacheaug.model import transformer
from cacheaug.model.attention import Rows

N, A, S, J = 3, 3, 16, 2
DOCUMENTS = np.array([[0] * 12 + [1] * 4], np.int32)
POINTS = np.array([[6, 8, 9]], np.int32)  # of the last a target is not there
STEPS = np.full((1, S, J), -1, np.int32)
STEPS[0, 6], STEPS[0, 8], STEPS[0, 9] = (5, 7), (9, -1), (11, 3)
WINDOW = 5


@functools.cache
def setup(positions="replace", window=0, kind="coprocessor"):
  model = make_model()
  layout = Layout(N, A, positions, window=window, kind=kind)
  coproc = make_coprocessor(model, Layout(N, A, kind=kind))
  batch = {
    "tokens": tokens_of(model, 1, S),
    "documents": DOCUMENTS,
    "steps": STEPS,
  }
  return model, layout, make_params(model), coproc, batch


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


def total_of(model, decoder, states, own, at, labels, targets, added):
  """The loss of one trace [..., D] written out: weights by hand."""

  def nll(rows, wanted):
    logp = jax.nn.log_softmax(transformer.logits(model, decoder, rows))
    return -jnp.take_along_axis(logp, wanted[:, None], -1)[:, 0].sum()

  out = nll(states[N - 1 : N - 1 + len(targets)], targets)
  rows = states if at == "decoder" else own
  for j, label in enumerate(labels):
    if label >= 0:
      out += added.supervision * nll(rows[j : j + 1], jnp.array([label]))
  return out


def by_trace(added, states_of, **changes):
  """(total, gradients), of states_of(coproc, m) -> (states [R, D], own)."""
  model, _, decoder, coproc, batch = setup(**changes)

  @jit
  def run(coproc):
    def total(coproc):
      out = 0.0
      for m, p in enumerate(POINTS[0]):
        states, own = states_of(coproc, m)
        targets = batch["tokens"][0, p + 1 : min(p + 1 + A, 12)]
        at, labels = added.supervision_at, STEPS[0, p]
        out += total_of(model, decoder, states, own, at, labels, targets, added)
      return out

    return jax.value_and_grad(total)(coproc)

  return run(coproc)


def alone(added, **changes):
  """The prefix by itself, and rows at its end over a cache that is cut."""
  model, layout, decoder, _, batch = setup(**changes)
  tokens = batch["tokens"]

  def states_of(coproc, m):
    p = POINTS[0, m]
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

  return by_trace(added, states_of, **changes)


def dense(added, **changes):
  """One sequence [context | all traces] under traces.dense_mask."""
  model, layout, decoder, _, batch = setup(**changes)
  tokens, m = batch["tokens"], POINTS.shape[1]
  laid = traces.lay_out(tokens, DOCUMENTS, POINTS, layout)
  flat = lambda x: x.reshape(1, 1, -1, *x.shape[3:])  # noqa: E731
  segments = traces.segments_of(DOCUMENTS, True)
  order = traces.dense_mask(DOCUMENTS[0], POINTS[0], layout)[None, None]

  def states_of(coproc, which):
    copied = transformer.embed(model, decoder, laid.copied)
    x = coproc["soft_tokens"][None, None] + copied
    _, cache = transformer.prefill(model, decoder, tokens, segments=segments)
    own = coprocessor.hidden_states(model, coproc, cache, laid, copied)
    z = copied + own @ coproc["latent_projection"]
    x = jnp.concatenate([z, transformer.embed(model, decoder, laid.ahead)], 2)
    context = transformer.embed(model, decoder, tokens)[:, None]
    rows = Rows(
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
    return states[which], own[0, which]

  return by_trace(added, states_of, **changes)


CASES = {
  "labels": (Terms(supervision=0.7), {}),
  "own labels": (Terms(supervision=0.7, supervision_at="coprocessor"), {}),
  "window": (Terms(), dict(window=WINDOW)),
}


@pytest.mark.parametrize("case", CASES)
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
