"""Without latents, and with harmless ones untrained: the frozen decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from packed import DOCUMENTS, A, S, layout_traces, nll_at_start, note, setup
from tolerances import HIDDEN, LOSS, MATTERS, close, far, jit, tokens_of

from cacheaug.augment import coprocessor, objective
from cacheaug.augment.point_sampling import Draw, sample_points
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout


def test_harmless_replacement_begins_as_the_frozen_decoder():
  augmented, frozen = nll_at_start("harmless", "replace")
  note("loss, harmless start", close(augmented, frozen, LOSS))


@pytest.mark.parametrize(
  "scheme, start",
  [("overlay", "harmless"), ("insert", "harmless"), ("replace", "as_is")],
)
def test_other_starts_do_not(scheme, start):
  far(*nll_at_start(start, scheme))


def test_frozen_loss_is_the_plain_models():
  """Each document by itself, token by token, against the sums."""
  model, spec, decoder, _, tokens = setup(3, "harmless", "replace")
  batch = {"tokens": tokens, "documents": DOCUMENTS}
  draw = Draw(6, min_ahead=2)
  run = jit(lambda key: sample_points(key, DOCUMENTS, spec, draw))
  points = np.asarray(run(jax.random.key(1)))

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
    rows = QueryLayout.plain(positions, segments)
    first = [[list(d).index(x) for x in d] for d in DOCUMENTS]
    rows = rows.replace(context_start=jnp.array(first)[:, None])
    return transformer.run_blocks(model, decoder, x[:, None], rows, None)[:, 0]

  return np.asarray(run(decoder))


def test_without_latents_hidden_states_are_the_frozen_decoders():
  """Bit for bit; to rounding in a program that also trains latents."""
  model, spec, decoder, coproc, tokens = setup(4, "harmless", "replace")
  laid = layout_traces(tokens, spec)
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
  model, spec, decoder, _, _ = setup(2, "harmless", "overlay")
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
    points = sample_points(key, DOCUMENTS, spec, Draw(count=8))

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
