"""The paper's three passes: one trace at a time = in parallel = dense mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from packed import (
  DOCUMENTS,
  POINTS,
  STARTS_AT,
  A,
  S,
  cut_off,
  layout_traces,
  note,
  one_at_a_time,
  setup,
  with_gradient,
)
from tolerances import (
  GRADIENT,
  LOSS,
  NLL,
  close,
  close_trees,
  far,
  jit,
  make_coprocessor,
  make_model,
  make_params,
)

from cacheaug.augment import coprocessor, dense_masks, objective, traces
from cacheaug.augment.point_sampling import LAWS, Draw, sample_points
from cacheaug.augment.traces import Layout
from cacheaug.kernels import context_attention
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout

CASES = [(1, "as_is"), (4, "harmless"), (8, "harmless")]


# --- three ways to the same numbers -----------------------------------------


@functools.cache
def parallel(latents, start, together=False):
  model, spec, decoder, _, tokens = setup(latents, start)
  spec = dataclasses.replace(spec, mask_documents=not together)

  @with_gradient
  def nll(coproc, laid):
    _, cache = objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)
    return objective.traces_nll(model, decoder, coproc, cache, laid)

  return nll


@functools.cache
def alone(latents, start):
  """One trace: the prefix by itself, then rows at its end, plain caches."""
  model, _, decoder, _, _ = setup(latents, start)

  @with_gradient
  def nll(coproc, prefix, ahead, targets, first_latent, first_ahead, cut):
    _, cache = transformer.prefill(model, decoder, prefix)
    copied = transformer.embed(model, decoder, prefix[:, -latents:])
    at = (first_latent + jnp.arange(latents))[None]
    soft = coproc["soft_tokens"][None]
    rows = soft + copied if start == "harmless" else soft
    z, _ = transformer.extend(model, coproc["transformer"], cache, rows, at)
    if start == "harmless":
      z = copied + z @ coproc["latent_projection"]
    if cut:  # the latents stand in place of the last N context tokens
      cache = cut_off(cache, prefix.shape[1] - latents)
    fed = transformer.embed(model, decoder, ahead)
    after = (first_ahead + jnp.arange(A - 1))[None]
    hidden, _ = transformer.extend(
      model,
      decoder,
      cache,
      jnp.concatenate([z, fed], 1),
      jnp.concatenate([at, after], 1),
    )
    logits = transformer.logits(model, decoder, hidden[:, latents - 1 :])
    logp = jax.nn.log_softmax(logits)[0]
    return -logp[jnp.arange(A), targets]

  return nll


@functools.cache
def dense(latents, start):
  """One sequence [context | all traces], one block, its mask given."""
  model, _, decoder, _, tokens = setup(latents, start)
  m, n = POINTS.shape[1], latents

  @with_gradient
  def nll(coproc, laid, segments, order, latent_order):
    flat = lambda x: x.reshape(2, 1, -1, *x.shape[3:])  # noqa: E731
    copied = transformer.embed(model, decoder, laid.input_tokens)
    soft = jnp.broadcast_to(coproc["soft_tokens"][None, None], copied.shape)
    x = soft + copied if start == "harmless" else soft
    # The context's keys and values are the decoder's, hence a cache; all
    # latents are one block, and its mask keeps the traces apart.
    _, cache = transformer.prefill(model, decoder, tokens, segments=segments)
    at = laid.latent_rows
    limits = jnp.broadcast_to(at.context_limit, at.positions.shape)
    rows = QueryLayout(
      *map(flat, (at.positions, at.segments, limits)), latent_order
    )
    z = transformer.run_blocks(
      model, coproc["transformer"], flat(x), rows, cache
    ).reshape(copied.shape)
    if start == "harmless":
      z = copied + z @ coproc["latent_projection"]
    # The decoder's pass is literally one sequence, without any cache.
    ahead = transformer.embed(model, decoder, laid.ahead)
    context = transformer.embed(model, decoder, tokens)[:, None]
    blocks = flat(jnp.concatenate([z, ahead], 2))
    at = laid.rows
    positions = jnp.broadcast_to(jnp.arange(S)[None, None], (2, 1, S))
    rows = QueryLayout(
      jnp.concatenate([positions, flat(at.positions)], 2),
      jnp.concatenate([segments[:, None], flat(at.segments)], 2),
      jnp.zeros((2, 1, 1), jnp.int32),
      order,
    )
    x = jnp.concatenate([context, blocks], 2)
    hidden = transformer.run_blocks(model, decoder, x, rows, None)
    hidden = hidden[:, 0, S:].reshape(2, m, n + A - 1, -1)[:, :, n - 1 :]
    logits = transformer.logits(model, decoder, hidden)
    logp = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logp, laid.targets[..., None], -1)[..., 0]

  return nll


def run_parallel(latents, start, scheme, together=False):
  _, spec, _, coproc, tokens = setup(latents, start, scheme)
  spec = dataclasses.replace(spec, mask_documents=not together)
  laid = layout_traces(tokens, spec)
  w = laid.weights / laid.weights.sum()
  return laid, parallel(latents, start, together)(coproc, w, laid)


def run_dense(latents, start, scheme, together=False):
  _, spec, _, coproc, tokens = setup(latents, start, scheme)
  spec = dataclasses.replace(spec, mask_documents=not together)
  laid = layout_traces(tokens, spec)
  pairs = zip(DOCUMENTS, POINTS, strict=True)
  order = np.stack([dense_masks.dense_mask(d, p, spec) for d, p in pairs])
  own = np.kron(np.eye(POINTS.shape[1]), np.tri(latents)).astype(bool)
  w = laid.weights / laid.weights.sum()
  return dense(latents, start)(
    coproc,
    w,
    laid,
    traces.segments_of(DOCUMENTS, spec.mask_documents),
    order[:, None],
    np.broadcast_to(own, (2, 1, *own.shape)),
  )


@pytest.mark.parametrize("scheme", traces.POSITIONS)
@pytest.mark.parametrize("latents, start", slow_but(CASES, quick=(0, 2)))
def test_parallel_equals_one_at_a_time_equals_dense(latents, start, scheme):
  laid, (loss, nll, grads) = run_parallel(latents, start, scheme)
  assert laid.weights.sum() == 21
  _, spec, _, coproc, tokens = setup(latents, start, scheme)
  single, nlls, single_grads = one_at_a_time(
    alone(latents, start), coproc, tokens, spec
  )
  assert len(nlls) == 6
  note("loss, one at a time", close(loss, single, LOSS))
  for (b, m), expected in nlls.items():
    got = np.asarray(nll)[b, m][np.asarray(laid.weights)[b, m] > 0]
    note("nll, one at a time", close(got, expected, NLL))
  note("gradients, one at a time", close_trees(grads, single_grads, GRADIENT))
  whole, whole_nll, whole_grads = run_dense(latents, start, scheme)
  note("loss, dense", close(loss, whole, LOSS))
  there = np.asarray(laid.weights) > 0
  note("nll, dense", close(np.asarray(nll)[there], whole_nll[there], NLL))
  note("gradients, dense", close_trees(grads, whole_grads, GRADIENT))


@pytest.mark.parametrize("scheme", traces.POSITIONS)
def test_documents_that_see_each_other_equal_dense(scheme):
  args = 4, "harmless", scheme, True
  _, (loss, _, grads) = run_parallel(*args)
  whole, _, whole_grads = run_dense(*args)
  note("loss, dense", close(loss, whole, LOSS))
  note("gradients, dense", close_trees(grads, whole_grads, GRADIENT))
  far(loss, run_parallel(*args[:3])[1][0])


def test_schemes_and_windows_and_caps_are_told_apart():
  """What the equalities above would miss if it had no effect."""
  latents, start = 4, "harmless"
  _, _, decoder, coproc, tokens = setup(latents, start)
  losses = {s: run_parallel(latents, start, s)[1][0] for s in traces.POSITIONS}
  far(losses["insert"], losses["overlay"])
  far(losses["overlay"], losses["replace"])
  laid = layout_traces(tokens, setup(latents, start, "overlay")[1])
  for changes in (
    dict(window=6),
    dict(attention_softcap=0.0),
    dict(final_softcap=0.0),
  ):
    other = make_model(**changes)

    @jit
    def loss(coproc, other=other):
      spec = Layout(latents, A)
      args = other, decoder
      _, cache = objective.context_pass(*args, tokens, DOCUMENTS, spec)
      nll = objective.traces_nll(*args, coproc, cache, laid)
      return (nll * laid.weights).sum() / laid.weights.sum()

    far(loss(coproc), losses["overlay"])


@pytest.mark.parametrize("law", slow_but(LAWS, quick=(0,)))
def test_tiles_equal_one_masked_softmax(law, monkeypatch):
  """Through the loss itself, with several tiles of rows and of slots."""
  model, spec, decoder, coproc, tokens = setup(2, "harmless", "replace")
  documents = np.where(DOCUMENTS < 0, 3, DOCUMENTS)
  key = jax.random.key(5)
  batch = {"tokens": tokens, "documents": documents}

  def run(name):
    @jit
    def sums(coproc):
      points = sample_points(key, documents, spec, Draw(14, law))

      def loss(coproc):
        nll, tokens = objective.coprocessor_loss(
          model.clone(attention=Kernel(name)),
          decoder,
          coproc,
          batch,
          points,
          spec,
        )
        return nll.sum() / tokens.sum()

      return jax.value_and_grad(loss)(coproc)

    return sums(coproc)

  loss, grads = run("plain")
  monkeypatch.setattr(context_attention, "ROWS", 16)
  monkeypatch.setattr(context_attention, "SLOTS", 8)
  tiled, tiled_grads = run("xla")
  note("loss, tiles", close(tiled, loss, LOSS))
  note("gradients, tiles", close_trees(tiled_grads, grads, GRADIENT))
  # The tiles' bounds are real: without the last tile the loss is another.
  monkeypatch.setattr(context_attention, "_last", lambda stop, slots: 1)
  far(run("xla")[0], loss)


def test_gradient_of_the_context_is_refused():
  """Rather than wrong: it is a constant where tiles are skipped."""
  model, spec, decoder, coproc, tokens = setup(2, "harmless", "replace")
  laid = layout_traces(tokens, spec)

  def loss(decoder):
    _, cache = transformer.prefill(model, decoder, tokens)
    return objective.traces_nll(model, decoder, coproc, cache, laid).sum()

  with pytest.raises(TypeError, match="plain"):
    jax.grad(loss)(decoder)


# --- what depends on what ---------------------------------------------------


@pytest.mark.parametrize("scheme", traces.POSITIONS)
def test_causality_by_gradient(scheme):
  """d nll / d latents of any trace, and / d embedding of any token.

  All tokens differ and the head is untied, so that row t of the embedding's
  gradient is the influence of token t and of nothing else.
  """
  n, points = 2, np.array([[4, 7, 15, 20]], np.int32)
  documents = DOCUMENTS[:1]
  model = make_model(tied_head=False).clone(attention=Kernel("plain"))
  spec = Layout(n, A, scheme)
  decoder, coproc = make_params(model), make_coprocessor(model, spec)
  tokens = np.random.default_rng(0).permutation(37)[None, :S].astype(np.int32)
  laid = jit(lambda: traces.layout_traces(tokens, documents, points, spec))()

  def nll(table, bump):
    params = decoder | {"embedder": {"embedding": table}}
    _, cache = objective.context_pass(model, params, tokens, documents, spec)
    copied = transformer.embed(model, params, laid.input_tokens)
    z = coprocessor.latents(model, coproc, cache, laid, copied) + bump
    return objective.decoder_pass(model, params, cache, z, laid)[0]

  @jit
  def jacobians(table, bump):
    one = lambda m, j: jax.grad(  # noqa: E731
      lambda *args: nll(*args)[m, j], (0, 1)
    )(table, bump)
    m, j = np.indices((4, A)).reshape(2, -1)
    return jax.lax.map(lambda args: one(*args), (m, j))

  table = decoder["embedder"]["embedding"]
  by_token, by_latent = jacobians(table, jnp.zeros((1, 4, n, 16)))
  for row, (m, j) in enumerate(np.ndindex(4, A)):
    p = points[0, m]
    if p + j + 1 >= S or documents[0, p + j + 1] != documents[0, p]:
      continue  # weighs nothing
    used = np.abs(by_token[row]).max(-1)[tokens[0]] > 0  # by place in S
    begin = STARTS_AT[documents[0, p]]
    # Target j + 1 may depend on its document up to the token before it.
    expected = [begin <= t <= p + j for t in range(S)]
    assert used.tolist() == expected, (m, j)
    others = np.abs(by_latent[row, 0]).max(-1) > 0  # [M, N]
    assert others.tolist() == [[k == m] * n for k in range(4)], (m, j)
