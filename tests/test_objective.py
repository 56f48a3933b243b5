"""The paper's three passes: one trace at a time = in parallel = dense mask.

Sequences are packed with several documents; the model has grouped heads, both
soft caps, and a window of 5, shorter than every prefix.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import (
  GRADIENT,
  HIDDEN,
  LOSS,
  MATTERS,
  NLL,
  close,
  close_trees,
  far,
  jit,
  make_coprocessor,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.traces import TraceSpec
from cacheaug.kernels import context_attention
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import transformer
from cacheaug.model.attention import Rows

A, S = 4, 28
DOCUMENTS = np.array(
  [[0] * 12 + [1] * 16, [2] * 15 + [3] * 12 + [-1]], np.int32
)
# Prefixes of 9 and 12 tokens within their documents. The trace after 8 of the
# first sequence has three tokens left of its document, so has 23 of the second.
POINTS = np.array([[-1, 8, 20, 23], [-1, 8, 11, 23]], np.int32)
STARTS_AT = {0: 0, 1: 12, 2: 0, 3: 15}  # of each document
CASES = [(1, "as_is"), (4, "harmless"), (8, "harmless")]


def note(name, value):
  """Shown by `pytest -rP`: the figures in RESULTS.md."""
  print(f"{name}: {value:.2g}")


def setup(latents, start, scheme="insert", **changes):
  model = make_model()
  spec = TraceSpec(latents, A, scheme, start, **changes)
  coproc = make_coprocessor(model, TraceSpec(latents, A, "insert", start))
  return model, spec, make_params(model), coproc, tokens_of(model, 2, S)


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
      keep = prefix.shape[1] - latents
      cache = cache.replace(
        keys=cache.keys[:, :, :keep],
        values=cache.values[:, :, :keep],
        positions=cache.positions[:, :keep],
        segments=cache.segments[:, :keep],
      )
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


def one_at_a_time(latents, start, scheme):
  """(mean loss, nll of each trace by (b, m), gradients), summed over traces."""
  _, _, _, coproc, tokens = setup(latents, start)
  total, count, grads, nlls = 0.0, 0, None, {}
  for b, m in np.ndindex(POINTS.shape):
    p = POINTS[b, m]
    if p < 0:
      continue
    begin = STARTS_AT[DOCUMENTS[b, p]]
    end = begin + (DOCUMENTS[b] == DOCUMENTS[b, p]).sum()
    length = p + 1 - begin  # alone, the document starts at position 0
    # A document's last traces have fewer targets; the rest weigh nothing.
    following = np.resize(tokens[b, p + 1 : min(p + 1 + A, end)], A)
    weights = (np.arange(A) < end - p - 1).astype(np.float32)
    insert = scheme == "insert"
    loss, nll, g = alone(latents, start)(
      coproc,
      weights,
      tokens[b : b + 1, begin : p + 1],
      following[None, :-1],
      following,
      length if insert else length - latents,
      length + latents if insert else length,
      cut=scheme == "replace",
    )
    total, count = total + loss, count + weights.sum()
    nlls[b, m] = np.asarray(nll)[weights > 0]
    grads = g if grads is None else jax.tree.map(jnp.add, grads, g)
  return total / count, nlls, jax.tree.map(lambda g: g / count, grads)


@functools.cache
def dense(latents, start):
  """One sequence [context | all traces], one block, its mask given."""
  model, _, decoder, _, tokens = setup(latents, start)
  m, n = POINTS.shape[1], latents

  @with_gradient
  def nll(coproc, laid, segments, order, latent_order):
    flat = lambda x: x.reshape(2, 1, -1, *x.shape[3:])  # noqa: E731
    copied = transformer.embed(model, decoder, laid.copied)
    soft = jnp.broadcast_to(coproc["soft_tokens"][None, None], copied.shape)
    x = soft + copied if start == "harmless" else soft
    # The context's keys and values are the decoder's, hence a cache; all
    # latents are one block, and its mask keeps the traces apart.
    _, cache = transformer.prefill(model, decoder, tokens, segments=segments)
    at = laid.latent_rows
    limits = jnp.broadcast_to(at.limits, at.positions.shape)
    rows = Rows(*map(flat, (at.positions, at.segments, limits)), latent_order)
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
    rows = Rows(
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
  laid = laid_out(tokens, spec)
  w = laid.weights / laid.weights.sum()
  return laid, parallel(latents, start, together)(coproc, w, laid)


def laid_out(tokens, spec):
  run = jit(lambda: traces.lay_out(tokens, DOCUMENTS, POINTS, spec))
  return run()


def run_dense(latents, start, scheme, together=False):
  _, spec, _, coproc, tokens = setup(latents, start, scheme)
  spec = dataclasses.replace(spec, mask_documents=not together)
  laid = laid_out(tokens, spec)
  pairs = zip(DOCUMENTS, POINTS, strict=True)
  order = np.stack([traces.dense_mask(d, p, spec) for d, p in pairs])
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


@pytest.mark.parametrize("scheme", traces.SCHEMES)
@pytest.mark.parametrize("latents, start", CASES)
def test_parallel_equals_one_at_a_time_equals_dense(latents, start, scheme):
  laid, (loss, nll, grads) = run_parallel(latents, start, scheme)
  assert laid.weights.sum() == 21
  single, nlls, single_grads = one_at_a_time(latents, start, scheme)
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


@pytest.mark.parametrize("scheme", traces.SCHEMES)
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
  losses = {s: run_parallel(latents, start, s)[1][0] for s in traces.SCHEMES}
  far(losses["insert"], losses["overlay"])
  far(losses["overlay"], losses["replace"])
  laid = laid_out(tokens, setup(latents, start, "overlay")[1])
  for changes in (
    dict(window=6),
    dict(attention_softcap=0.0),
    dict(final_softcap=0.0),
  ):
    other = make_model(**changes)

    @jit
    def loss(coproc, other=other):
      spec = TraceSpec(latents, A)
      args = other, decoder
      _, cache = objective.context_pass(*args, tokens, DOCUMENTS, spec)
      nll = objective.traces_nll(*args, coproc, cache, laid)
      return (nll * laid.weights).sum() / laid.weights.sum()

    far(loss(coproc), losses["overlay"])


@pytest.mark.parametrize("law", traces.LAWS)
def test_tiles_equal_one_masked_softmax(law, monkeypatch):
  """Through the loss itself, with several tiles of rows and of slots."""
  model, spec, decoder, coproc, tokens = setup(
    2, "harmless", "replace", count=14, law=law
  )
  documents = np.where(DOCUMENTS < 0, 3, DOCUMENTS)
  key = jax.random.key(5)
  batch = {"tokens": tokens, "documents": documents}

  def run(name):
    @jit
    def sums(coproc):
      points = traces.sample_points(key, documents, spec)

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
  laid = laid_out(tokens, spec)

  def loss(decoder):
    _, cache = transformer.prefill(model, decoder, tokens)
    return objective.traces_nll(model, decoder, coproc, cache, laid).sum()

  with pytest.raises(TypeError, match="plain"):
    jax.grad(loss)(decoder)


# --- what depends on what ---------------------------------------------------


@pytest.mark.parametrize("scheme", traces.SCHEMES)
def test_causality_by_gradient(scheme):
  """d nll / d latents of any trace, and / d embedding of any token.

  All tokens differ and the head is untied, so that row t of the embedding's
  gradient is the influence of token t and of nothing else.
  """
  n, points = 2, np.array([[4, 7, 15, 20]], np.int32)
  documents = DOCUMENTS[:1]
  model = make_model(tied_head=False).clone(attention=Kernel("plain"))
  spec = TraceSpec(n, A, scheme)
  decoder, coproc = make_params(model), make_coprocessor(model, spec)
  tokens = np.random.default_rng(0).permutation(37)[None, :S].astype(np.int32)
  laid = jit(lambda: traces.lay_out(tokens, documents, points, spec))()

  def nll(table, bump):
    params = decoder | {"embedder": {"embedding": table}}
    _, cache = objective.context_pass(model, params, tokens, documents, spec)
    copied = transformer.embed(model, params, laid.copied)
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


# --- the frozen decoder -----------------------------------------------------


def nll_at_start(scheme, start="harmless"):
  """(augmented, frozen) sums of an untrained coprocessor."""
  model, spec, decoder, _, tokens = setup(
    3, start, scheme, count=6, min_ahead=2
  )
  batch = {"tokens": tokens, "documents": DOCUMENTS}

  @jit
  def run(decoder):
    key = jax.random.key(1)
    fresh = coprocessor.init(model, spec, key, decoder)
    points = traces.sample_points(key, DOCUMENTS, spec)
    return (
      objective.coprocessor_loss(model, decoder, fresh, batch, points, spec),
      objective.frozen_loss(model, decoder, batch, points, spec),
    )

  (nll, count), (frozen, same) = run(decoder)
  np.testing.assert_array_equal(count, same)
  assert count[0] == 12 and 0 < count[-1] < 12
  return nll / count, frozen / count


def test_harmless_replacement_begins_as_the_frozen_decoder():
  augmented, frozen = nll_at_start("replace")
  note("loss, harmless start", close(augmented, frozen, LOSS))


@pytest.mark.parametrize(
  "scheme, start",
  [("overlay", "harmless"), ("insert", "harmless"), ("replace", "as_is")],
)
def test_other_starts_do_not(scheme, start):
  far(*nll_at_start(scheme, start))


def test_frozen_loss_is_the_plain_models():
  """Each document by itself, token by token, against the sums."""
  model, spec, decoder, _, tokens = setup(
    3, "harmless", "replace", count=6, min_ahead=2
  )
  batch = {"tokens": tokens, "documents": DOCUMENTS}
  draw = jit(lambda key: traces.sample_points(key, DOCUMENTS, spec))
  points = np.asarray(draw(jax.random.key(1)))

  @jit
  def logp(document):
    hidden, _ = transformer.prefill(model, decoder, document)
    return jax.nn.log_softmax(transformer.logits(model, decoder, hidden))[0]

  sums, counts = np.zeros(A), np.zeros(A)
  for b in range(2):
    for d in np.unique(DOCUMENTS[b][DOCUMENTS[b] >= 0]):
      where = np.flatnonzero(DOCUMENTS[b] == d)
      document = tokens[b, where]
      table = np.asarray(logp(document[None]))
      for p in points[b]:
        for j in range(1, A + 1):
          if p in where and p + j in where:
            t = p + j - where[0]
            sums[j - 1] -= table[t - 1, document[t]]
            counts[j - 1] += 1
  nll, count = jit(
    lambda: objective.frozen_loss(model, decoder, batch, points, spec)
  )()
  np.testing.assert_array_equal(count, counts)
  close(nll / count, sums / counts, LOSS)


def test_language_model_loss_is_over_tokens_within_documents():
  model, _, decoder, _, tokens = setup(1, "harmless")

  def run(tokens, mask_documents=True):
    batch = {"tokens": tokens, "documents": DOCUMENTS}
    return jit(
      lambda: objective.language_model_loss(
        model, decoder, batch, mask_documents
      )
    )()

  nll, count = run(tokens)
  assert nll.shape == (1,) and count[0] == 11 + 15 + 14 + 11
  assert abs(float(run(tokens, False)[0][0] - nll[0])) > MATTERS
  padding, first = tokens.copy(), tokens.copy()
  padding[1, 27] = (padding[1, 27] + 1) % 37
  np.testing.assert_array_equal(run(padding)[0], nll)
  first[0, 12] = (first[0, 12] + 1) % 37
  assert abs(float(run(first)[0][0] - nll[0])) > MATTERS  # as an input


def frozen_hidden(model, decoder, tokens):
  """The decoder by itself: no cache, nothing of the augmentation."""

  @jit
  def run(decoder):
    segments = jnp.where(DOCUMENTS >= 0, DOCUMENTS + 1, 0)
    x = model.apply({"params": decoder}, tokens, method="embed")
    positions = jnp.broadcast_to(jnp.arange(S)[None], (2, S))
    rows = Rows.plain(positions, segments)
    first = [[list(d).index(x) for x in d] for d in DOCUMENTS]
    rows = rows.replace(starts=jnp.array(first)[:, None])
    return transformer.run_blocks(model, decoder, x[:, None], rows, None)[:, 0]

  return np.asarray(run(decoder))


def test_without_latents_hidden_states_are_the_frozen_decoders():
  """Bit for bit; to rounding in a program that also trains latents."""
  model, spec, decoder, coproc, tokens = setup(4, "harmless", "replace")
  laid = laid_out(tokens, spec)
  expected = frozen_hidden(model, decoder, tokens)

  @jit
  def context(decoder):
    return objective.context_pass(model, decoder, tokens, DOCUMENTS, spec)[0]

  np.testing.assert_array_equal(context(decoder), expected)
  moved = jax.tree.map(lambda x: x * 1.0001, decoder)
  assert (np.asarray(context(moved)) != expected).any()

  @jit
  def training(decoder, coproc):
    hidden, cache = objective.context_pass(
      model, decoder, tokens, DOCUMENTS, spec
    )

    def loss(coproc):
      nll = objective.traces_nll(model, decoder, coproc, cache, laid)
      return (nll * laid.weights).sum()

    return hidden, jax.grad(loss)(coproc)

  # XLA fuses this program otherwise, and so rounds otherwise.
  hidden, grads = training(decoder, coproc)
  note("hidden states beside latents", close(hidden, expected, HIDDEN))
  assert np.abs(grads["soft_tokens"]).max() > 0


def test_twenty_steps_leave_the_decoder_bit_identical():
  model, spec, decoder, _, _ = setup(2, "harmless", "overlay", count=8)
  before = jax.tree.map(lambda x: np.array(x, copy=True), decoder)
  tokens = tokens_of(model, 2, S)
  hidden = frozen_hidden(model, decoder, tokens)
  optimizer = optax.adam(1e-2)

  @jit
  def begin(decoder):
    coproc = coprocessor.init(model, spec, jax.random.key(0), decoder)
    return coproc, optimizer.init(coproc)

  @functools.partial(jit, donate_argnums=(1, 2))
  def step(decoder, coproc, state, tokens, key):
    points = traces.sample_points(key, DOCUMENTS, spec)

    def loss(coproc):
      batch = {"tokens": tokens, "documents": DOCUMENTS}
      nll, count = objective.coprocessor_loss(
        model, decoder, coproc, batch, points, spec
      )
      return nll.sum() / count.sum()

    value, grads = jax.value_and_grad(loss)(coproc)
    updates, state = optimizer.update(grads, state, coproc)
    return optax.apply_updates(coproc, updates), state, value, grads

  coproc, state = begin(decoder)
  first = jax.tree.map(np.array, coproc)
  losses = []
  for i in range(20):
    key = jax.random.key(7)  # the same points: the loss must fall
    coproc, state, loss, grads = step(decoder, coproc, state, tokens, key)
    losses.append(float(loss))
    if i == 0:
      shapes = lambda t: jax.tree.map(jnp.shape, t)  # noqa: E731
      assert shapes(grads) == shapes(first)
  jax.tree.map(np.testing.assert_array_equal, decoder, before)
  again = frozen_hidden(model, decoder, tokens)
  np.testing.assert_array_equal(again, hidden)
  # Training happened: every leaf moved and the loss fell.
  assert losses[-1] < losses[0] - 0.1
  jax.tree.map(far, coproc, first)
  # The optimizer holds two moments of each trained leaf, and a count.
  trained = sorted(x.shape for x in jax.tree.leaves(first))
  held = sorted(x.shape for x in jax.tree.leaves(state))
  assert held == sorted([*trained, *trained, ()])
  names = [jax.tree_util.keystr(path) for path, _ in _leaves(state)]
  names += [jax.tree_util.keystr(path) for path, _ in _leaves(grads)]
  assert not any("embedder" in n or "head" in n for n in names)


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)
