"""The next token's law: supports, frequencies, keys; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import WHY_TORCH

from cacheaug.errors import UserError
from cacheaug.inference import sampling
from cacheaug.inference.sampling import GREEDY, Sampling

SHARES = np.array([0.05, 0.5, 0.15, 0.3])
DRAWS = 4000


def draw(law, shares=SHARES, rows=DRAWS, seed=0, step=0):
  logits = jnp.broadcast_to(jnp.log(jnp.array(shares, jnp.float32)), (rows, 4))
  keys = jax.random.split(jax.random.key(seed), rows)
  return np.asarray(sampling.choose(logits, law, keys, jnp.int32(step)))


def test_most_likely_is_argmax_and_the_first_of_equals():
  logits = np.random.default_rng(0).integers(0, 5, (50, 9)).astype(np.float32)
  found = sampling.most_likely(jnp.asarray(logits))
  np.testing.assert_array_equal(found, logits.argmax(-1))
  keys = jax.random.split(jax.random.key(0), 50)
  for law in (GREEDY, Sampling(0.0, top_k=3, top_p=0.2)):
    found = sampling.choose(jnp.asarray(logits), law, keys, jnp.int32(0))
    np.testing.assert_array_equal(found, logits.argmax(-1))


@pytest.mark.parametrize(
  "law, expected",
  (
    (Sampling(1.0), SHARES),
    (Sampling(0.5), SHARES**2),
    (Sampling(1.0, top_k=2), SHARES * [0, 1, 0, 1]),
    (Sampling(1.0, top_k=99), SHARES),
    (Sampling(1.0, top_p=0.81), SHARES * [0, 1, 1, 1]),
    (Sampling(1.0, top_p=0.79), SHARES * [0, 1, 0, 1]),
    # Of the two that top_k leaves, the first alone has 0.625.
    (Sampling(1.0, top_k=2, top_p=0.6), SHARES * [0, 1, 0, 0]),
    (Sampling(1.0, top_p=1e-6), SHARES * [0, 1, 0, 0]),
    (Sampling(1e-4), SHARES * [0, 1, 0, 0]),
  ),
)
def test_draws_follow_the_law(law, expected):
  expected = expected / expected.sum()
  counts = np.bincount(draw(law), minlength=4) / DRAWS
  assert not counts[expected == 0].any()
  # Four standard deviations of a share of 0.5 over so many draws.
  assert np.abs(counts - expected).max() < 4 * 0.5 / DRAWS**0.5


def test_same_support_as_transformers():
  torch = pytest.importorskip("torch", reason=WHY_TORCH)
  transformers = pytest.importorskip("transformers", reason=WHY_TORCH)
  logits = np.random.default_rng(1).normal(size=(20, 30)).astype(np.float32)
  law = Sampling(0.7, top_k=12, top_p=0.8)
  theirs = torch.tensor(logits)
  for warp in (
    transformers.TemperatureLogitsWarper(law.temperature),
    transformers.TopKLogitsWarper(law.top_k),
    transformers.TopPLogitsWarper(law.top_p),
  ):
    theirs = warp(None, theirs)
  values, ids = sampling._kept(jnp.asarray(logits) / law.temperature, law)
  for row in range(20):
    kept = np.asarray(ids[row])[np.isfinite(values[row])]
    assert set(kept) == set(np.flatnonzero(np.isfinite(theirs[row].numpy())))
  assert (np.isfinite(values).sum(-1) < 12).any()  # top_p has its say


def test_a_draw_depends_on_its_own_key_step_and_logits_alone():
  law = Sampling(1.0, top_k=3)
  one = draw(law)
  np.testing.assert_array_equal(one, draw(law))
  assert (one != draw(law, seed=1)).any()
  assert (one != draw(law, step=1)).any()
  # Other rows, and fewer of them, change nothing.
  keys = jax.random.split(jax.random.key(0), DRAWS)
  logits = jnp.log(jnp.array([SHARES, SHARES[::-1]], jnp.float32))
  two = sampling.choose(logits, law, keys[:2], jnp.int32(0))
  assert int(two[0]) == one[0]


@pytest.mark.parametrize(
  "changes, message",
  (
    (dict(temperature=-0.1), "temperature=-0.1 must be 0"),
    (dict(temperature=float("nan")), "temperature=nan must be 0"),
    (dict(top_k=-1), "top_k=-1 must be 0"),
    (dict(top_p=0.0), "top_p=0.0 must be above 0"),
    (dict(top_p=1.5), "top_p=1.5 must be above 0"),
  ),
)
def test_laws_that_are_none(changes, message):
  with pytest.raises(UserError, match=message):
    Sampling(**changes)
