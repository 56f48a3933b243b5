"""Schedules, global clipping, decay by path, multipliers, frozen leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from cacheaug import optim
from cacheaug.errors import UserError


def _config(**changes):
  config = ConfigDict(
    {
      "learning_rate": 0.1,
      "schedule": "constant",
      "warmup": 0,
      "final_fraction": 0.1,
      "b1": 0.9,
      "b2": 0.999,
      "eps": 1e-8,
      "weight_decay": 0.0,
      "clip": 0.0,
      "accumulation": 1,
      "multipliers": {"": 1.0},
    }
  )
  multipliers = changes.pop("multipliers", {"": 1.0})
  config.update(changes)
  config.multipliers = ConfigDict(multipliers)
  return config


def _params():
  return {
    "transformer": {
      "q": jnp.ones((2, 3)),
      "norm_scale": jnp.ones((2, 3)),
      "bias": jnp.ones((3,)),
      "gain": jnp.ones((3,)),
    },
    "soft_tokens": jnp.ones((4, 3)),
  }


def _updates(config, grads, params):
  optimizer, _ = optim.make_optimizer(config, 10)
  return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.parametrize(
  "schedule, at",
  [
    ("constant", {0: 0.05, 1: 0.1, 2: 0.1, 12: 0.1, 99: 0.1}),
    ("linear", {0: 0.05, 1: 0.1, 2: 0.1, 7: 0.055, 12: 0.01, 99: 0.01}),
    ("cosine", {0: 0.05, 1: 0.1, 2: 0.1, 7: 0.055, 12: 0.01, 99: 0.01}),
  ],
)
def test_schedule_values(schedule, at):
  f = optim.make_schedule(_config(schedule=schedule, warmup=2), 12)
  for step, value in at.items():
    assert float(f(step)) == pytest.approx(value, rel=1e-5), step


def test_cosine_is_not_linear():
  cosine = optim.make_schedule(_config(schedule="cosine"), 12)
  linear = optim.make_schedule(_config(schedule="linear"), 12)
  assert float(cosine(3)) > float(linear(3)) + 0.001


@pytest.mark.parametrize(
  "change",
  [
    {"schedule": "step"},
    {"warmup": 11},
    {"final_fraction": 1.5},
    {"learning_rate": 0.0},
  ],
)
def test_bad_schedule_is_refused_by_key(change):
  (key,) = change
  with pytest.raises(UserError, match=f"config.optimizer.{key}"):
    optim.make_optimizer(_config(**change), 10)


def test_equals_optax_adamw_on_matrices():
  params = {"w": jax.random.normal(jax.random.key(0), (4, 5))}
  ours, _ = optim.make_optimizer(_config(weight_decay=0.1), 10)
  theirs = optax.adamw(0.1, 0.9, 0.999, 1e-8, weight_decay=0.1)
  a, b = params, params
  state_a, state_b = ours.init(a), theirs.init(b)
  for i in range(3):
    grads = {"w": jax.random.normal(jax.random.key(i), (4, 5))}
    update, state_a = ours.update(grads, state_a, a)
    a = optax.apply_updates(a, update)
    update, state_b = theirs.update(grads, state_b, b)
    b = optax.apply_updates(b, update)
  np.testing.assert_allclose(a["w"], b["w"], rtol=1e-6)


def test_clip_is_by_the_norm_of_the_whole_trainable_tree():
  # With b1 = b2 = 0 and a large eps, the update is -lr * g / eps: linear in
  # the clipped gradient, which shows the factor that it was scaled by.
  eps = 1e6
  config = _config(
    clip=1.0,
    b1=0.0,
    b2=0.0,
    eps=eps,
    multipliers={"": 1.0, "soft_tokens": 2.0, "bias": 0.0},
  )
  params = _params()
  grads = jax.tree.map(jnp.ones_like, params)
  # The frozen leaf's gradient must not count.
  grads["transformer"]["bias"] = jnp.full((3,), 1e5)
  updates = _updates(config, grads, params)
  norm = np.sqrt(2 * 3 + 2 * 3 + 3 + 4 * 3)
  expected = -0.1 / eps / norm
  q = updates["transformer"]["q"]
  np.testing.assert_allclose(q, np.full(q.shape, expected), rtol=1e-5)
  soft = updates["soft_tokens"]
  np.testing.assert_allclose(soft, np.full(soft.shape, 2 * expected), rtol=1e-5)


def test_decay_spares_vectors_norms_and_soft_tokens():
  params = _params()
  grads = jax.tree.map(jnp.zeros_like, params)
  updates = _updates(_config(weight_decay=0.5), grads, params)
  np.testing.assert_allclose(
    updates["transformer"]["q"], np.full((2, 3), -0.05), rtol=1e-6
  )
  for leaf in (
    updates["transformer"]["norm_scale"],
    updates["transformer"]["bias"],
    updates["transformer"]["gain"],
    updates["soft_tokens"],
  ):
    assert not np.any(leaf)


def test_longest_multiplier_wins_whatever_the_order():
  found = optim.multiplier_tree(
    {"": 1.0, "transformer": 2.0, "transformer/norm": 3.0, "soft": 0.0},
    _params(),
  )
  assert found == {
    "transformer": {"q": 2.0, "norm_scale": 3.0, "bias": 2.0, "gain": 2.0},
    "soft_tokens": 0.0,
  }


def test_boxed_parameters_have_the_same_names():
  boxed = {"w": nn.Partitioned(jnp.ones((2, 2)), ("D", "F"))}
  found = optim.multiplier_tree({"^w$": 3.0}, boxed)
  assert jax.tree.leaves(found) == [3.0]


@pytest.mark.parametrize(
  "multipliers, word",
  [
    ({"transformer": 1.0}, "soft_tokens"),
    ({"": 1.0, "(": 1.0}, "regular expression"),
    ({"": -1.0}, "must be 0"),
  ],
)
def test_bad_multipliers_are_refused(multipliers, word):
  optimizer, _ = optim.make_optimizer(_config(multipliers=multipliers), 10)
  with pytest.raises(UserError, match=word):
    jax.eval_shape(optimizer.init, _params())


def test_frozen_parameters_stay_and_have_no_state():
  params = _params()
  config = _config(
    multipliers={"transformer": 0.0, "soft_tokens": 1.0}, weight_decay=0.5
  )
  optimizer, _ = optim.make_optimizer(config, 10)
  state = optimizer.init(params)
  sizes = {x.shape for x in jax.tree.leaves(state) if x.ndim}
  assert sizes == {(4, 3)}
  updates, _ = optimizer.update(params, state, params)
  assert not any(np.any(u) for u in updates["transformer"].values())
  assert np.all(updates["soft_tokens"] != 0)
