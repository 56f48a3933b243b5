"""Nll over a vocabulary: against the definition, and chunked against whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import GRADIENT, NLL, close, close_trees, far, jit

from cacheaug.kernels import cross_entropy
from cacheaug.kernels.cross_entropy import token_nll

V, D = 11, 4


def arrays():
  rng = np.random.default_rng(0)
  hidden = rng.standard_normal((3, 5, D)).astype(np.float32)
  weight = rng.standard_normal((D, V)).astype(np.float32)
  targets = rng.integers(0, V, (3, 5)).astype(np.int32)
  return hidden, weight, targets


def capped(hidden, weight):
  return 3.0 * jnp.tanh((hidden @ weight) / 3.0)


def value_and_grads(hidden, weight, targets, frozen=False):
  """Nll, and gradients of a weighted sum, freshly traced."""

  @jit
  def run(hidden, weight):
    def loss(hidden, weight):
      nll = token_nll(
        lambda h: capped(h, weight),
        hidden,
        targets,
        vocab_size=V,
        frozen=frozen,
      )
      # Unequal weights, so that rows in a wrong order are found out.
      factors = jnp.arange(1.0, 1.0 + nll.size).reshape(nll.shape)
      return (nll * factors).sum(), nll

    wanted = 0 if frozen else (0, 1)
    (_, nll), grads = jax.value_and_grad(loss, wanted, has_aux=True)(
      hidden, weight
    )
    return nll, grads

  return run(hidden, weight)


def test_nll_is_minus_log_softmax_at_the_target():
  hidden, weight, targets = arrays()
  nll, _ = value_and_grads(hidden, weight, targets)
  logits = np.asarray(capped(hidden, weight), np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  rows, columns = np.indices(targets.shape)
  close(nll, -np.log(p[rows, columns, targets]), NLL)


# Of 3 x 5 rows: one, two and three of the five at a time.
@pytest.mark.parametrize("rows", [3, 6, 9])
@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_equal_all_rows_at_once(rows, frozen, monkeypatch):
  hidden, weight, targets = arrays()
  whole, whole_grads = value_and_grads(hidden, weight, targets)
  chunks = []
  apart = jax.lax.map

  def spy(f, xs):
    chunks.append(xs[0].shape)
    return apart(f, xs)

  monkeypatch.setattr(cross_entropy.jax.lax, "map", spy)
  monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
  monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", rows)
  nll, grads = value_and_grads(hidden, weight, targets, frozen)
  turns = -(-5 // (rows // 3))
  expected = (turns, 3, -(-5 // turns), D)
  assert chunks and set(chunks) == {expected}, "the chunked path did not run"
  close(nll, whole, NLL)
  close_trees(grads, whole_grads[0] if frozen else whole_grads, GRADIENT)


def test_a_frozen_head_needs_two_products_and_not_three():
  hidden, weight, targets = arrays()

  def products(frozen):
    def loss(hidden):
      return token_nll(
        lambda h: capped(h, weight),
        hidden,
        targets,
        vocab_size=V,
        frozen=frozen,
      ).sum()

    return str(jax.make_jaxpr(jax.grad(loss))(hidden)).count("dot_general")

  assert (products(True), products(False)) == (2, 3)


def test_a_wrong_target_changes_the_nll():
  hidden, weight, targets = arrays()
  right, _ = value_and_grads(hidden, weight, targets)
  wrong, _ = value_and_grads(hidden, weight, (targets + 1) % V)
  far(right, wrong)


def test_large_logits_give_no_infinity():
  targets = np.array([0, 1], np.int32)
  hidden = np.array([[1e4, -1e4], [1e4, -1e4]], np.float32)
  nll = jit(lambda h: token_nll(lambda x: x, h, targets, vocab_size=2))(hidden)
  np.testing.assert_array_equal(nll, [0.0, 2e4])
