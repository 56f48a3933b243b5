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


def value_and_grads(hidden, weight, targets):
  """Nll, and gradients of a weighted sum, freshly traced."""

  @jit
  def run(hidden, weight):
    def loss(hidden, weight):
      nll = token_nll(lambda h: capped(h, weight), hidden, targets, V)
      # Unequal weights, so that rows in a wrong order are found out.
      factors = jnp.arange(1.0, 1.0 + nll.size).reshape(nll.shape)
      return (nll * factors).sum(), nll

    (_, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
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


@pytest.mark.parametrize("rows", [1, 4, 7])  # 15 rows: whole and padded chunks
def test_chunks_equal_all_rows_at_once(rows, monkeypatch):
  hidden, weight, targets = arrays()
  whole, whole_grads = value_and_grads(hidden, weight, targets)
  chunks = []
  apart = jax.lax.map

  def spy(f, xs):
    chunks.append(xs[0].shape)
    return apart(f, xs)

  monkeypatch.setattr(cross_entropy.jax.lax, "map", spy)
  monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * V)
  nll, grads = value_and_grads(hidden, weight, targets)
  assert chunks == [(-(-15 // rows), rows, D)], "the chunked path did not run"
  close(nll, whole, NLL)
  close_trees(grads, whole_grads, GRADIENT)


def test_a_wrong_target_changes_the_nll():
  hidden, weight, targets = arrays()
  right, _ = value_and_grads(hidden, weight, targets)
  wrong, _ = value_and_grads(hidden, weight, (targets + 1) % V)
  far(right, wrong)


def test_large_logits_give_no_infinity():
  targets = np.array([0, 1], np.int32)
  hidden = np.array([[1e4, -1e4], [1e4, -1e4]], np.float32)
  nll = jit(lambda h: token_nll(lambda x: x, h, targets, 2))(hidden)
  np.testing.assert_array_equal(nll, [0.0, 2e4])
