"""Packed sequences, and three passes over them, one trace at a time.

Two sequences with several documents, over the model of tolerances.py: grouped
heads, both soft caps, and a window of 5, shorter than every prefix.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tolerances import jit, make_coprocessor, make_model, make_params, tokens_of

from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.point_sampling import Draw, sample_points
from cacheaug.augment.traces import Layout

A, S = 4, 28
DOCUMENTS = np.array(
  [[0] * 12 + [1] * 16, [2] * 15 + [3] * 12 + [-1]], np.int32
)
# Prefixes of 9 and 12 tokens within their documents. The trace after 8 of the
# first sequence has three tokens left of its document, so has 23 of the second.
POINTS = np.array([[-1, 8, 20, 23], [-1, 8, 11, 23]], np.int32)
STARTS_AT = {0: 0, 1: 12, 2: 0, 3: 15}  # of each document


def note(name, value):
  """Shown by `pytest -rP`: the figures in RESULTS.md."""
  print(f"{name}: {value:.2g}")


def setup(latents, start, scheme="insert", *, kind="coprocessor", **changes):
  """(model, spec, decoder, coproc, tokens [2, S]); one coproc a start."""
  model = make_model()
  spec = Layout(latents, A, scheme, start, kind=kind, **changes)
  inserted = Layout(latents, A, "insert", start, kind=kind)
  coproc = make_coprocessor(model, inserted)
  return model, spec, make_params(model), coproc, tokens_of(model, 2, S)


def layout_traces(tokens, spec, points=POINTS, late=None):
  run = jit(lambda: traces.layout_traces(tokens, DOCUMENTS, points, spec, late))
  return run()


def with_gradient(nll_of):
  """jit of (coproc, weights, ...) -> (mean loss, nll, gradients)."""

  def loss(coproc, weights, *args):
    nll = nll_of(coproc, *args)
    return (nll * weights).sum(), nll

  @functools.partial(jit, static_argnames=("cut",))
  def run(coproc, weights, *args, cut=None):
    bound = args if cut is None else (*args, cut)
    (total, nll), grads = jax.value_and_grad(loss, has_aux=True)(
      coproc, weights, *bound
    )
    return total, nll, grads

  return run


def one_at_a_time(alone, coproc, tokens, spec, points=POINTS, late=None):
  """(mean loss, nll by (b, m), gradients), summed over traces with targets.

  `alone` is with_gradient of nll [A] of (coproc, prefix [1, T], ahead
  [1, A - 1], targets [A], position of the first latent and of the first ahead
  token, cut: whether latents stand in place of tokens). Late traces' has the
  prefix that the coprocessor has read before `cut`.
  """
  total, count, grads, nlls = 0.0, 0, None, {}
  for b, m in np.ndindex(points.shape):
    p = points[b, m]
    if p < 0:
      continue
    begin = STARTS_AT[DOCUMENTS[b, p]]
    end = begin + (DOCUMENTS[b] == DOCUMENTS[b, p]).sum()
    if p + 1 == end:
      continue
    prefix = tokens[b : b + 1, begin : p + 1]
    length = prefix.shape[1]  # alone, the document starts at position 0
    # A document's last traces have fewer targets; the rest weigh nothing.
    following = np.resize(tokens[b, p + 1 : min(p + 1 + A, end)], A)
    weights = (np.arange(A) < end - p - 1).astype(np.float32)
    insert = spec.positions == "insert"
    read = () if late is None else (prefix[:, : length - late[b, m]],)
    loss, nll, g = alone(
      coproc,
      weights,
      prefix,
      following[None, :-1],
      following,
      length if insert else length - spec.latents,
      length + spec.latents if insert else length,
      *read,
      cut=spec.positions == "replace",
    )
    total, count = total + loss, count + weights.sum()
    nlls[b, m] = np.asarray(nll)[weights > 0]
    grads = g if grads is None else jax.tree.map(jnp.add, grads, g)
  return total / count, nlls, jax.tree.map(lambda g: g / count, grads)


def cut_off(cache, keep):
  """The cache of the first `keep` tokens."""
  return cache.replace(
    keys=cache.keys[:, :, :keep],
    values=cache.values[:, :, :keep],
    positions=cache.positions[:, :keep],
    segments=cache.segments[:, :keep],
  )


def nll_at_start(start, scheme, kind="coprocessor"):
  """(augmented, frozen) nll [A] of an untrained coprocessor."""
  model, spec, decoder, _, tokens = setup(3, start, scheme, kind=kind)
  batch = {"tokens": tokens, "documents": DOCUMENTS}

  @jit
  def run(decoder):
    key = jax.random.key(1)
    fresh = coprocessor.init(model, spec, key, decoder)
    draw = Draw(6, min_ahead=2)
    points = sample_points(key, DOCUMENTS, spec, draw)
    return (
      objective.coprocessor_loss(model, decoder, fresh, batch, points, spec),
      objective.frozen_loss(model, decoder, batch, points, spec),
    )

  (nll, count), (frozen, same) = run(decoder)
  np.testing.assert_array_equal(count, same)
  assert count[0] == 12 and 0 < count[-1] < 12
  return nll / count, frozen / count
