"""Rows over keys and values that are given: a block's first rows run before."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import (
  GRADIENT,
  HIDDEN,
  close,
  close_trees,
  far,
  jit,
  make_model,
  make_params,
  tokens_of,
)

from cacheaug.kernels import context_attention
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import decode_rows, transformer
from cacheaug.model.attention import QueryLayout

B, M, R, G, S = 2, 3, 6, 2, 12
POINTS = np.array([[3, 7, 11], [4, 5, 9]], np.int32)


@functools.cache
def setup():
  """Sliding, global, sliding: a window of 3 ends among the given rows."""
  model = make_model(layers=3, window=3)
  rng = np.random.default_rng(0)
  x = rng.standard_normal((B, M, R, model.config.width)).astype(np.float32)
  tokens, params = tokens_of(model, B, S), make_params(model)
  _, cache = jit(lambda: transformer.prefill(model, params, tokens))()
  return model, params, cache, jnp.asarray(x)


def rows_of(first: int = 0):
  """The block's rows from `first` on, as replacing the last G entries."""
  at = POINTS[..., None] - G + 1 + np.arange(R, dtype=np.int32)[None, None]
  limits = POINTS[..., None] - G
  rows = QueryLayout(
    at, np.ones_like(at), limits, context_start=np.zeros_like(POINTS)[..., None]
  )
  return jax.tree.map(lambda a: a if a.shape[2] == 1 else a[:, :, first:], rows)


def forward(model, params, x, whole, trained=False, given=None):
  """Hidden states of the rows after the first G, either way."""
  cache = setup()[2]
  run = functools.partial(transformer.run, model, params, trained=trained)
  if whole:
    return run(x, rows_of(), cache).hidden[:, :, G:]
  if given is None:
    # Their own run: rows of the block that see nothing of the later ones.
    rows = jax.tree.map(
      lambda a: a if a.shape[2] == 1 else a[:, :, :G], rows_of()
    )
    first = run(x[:, :, :G], rows, cache)
    given = first.keys, first.values
  return run(x[:, :, G:], rows_of(), cache, past_kv=given).hidden


@functools.cache
def results(kernel, whole, trained):
  model, params, _, x = setup()
  model = model.clone(attention=Kernel(kernel))
  weight = np.random.default_rng(1).standard_normal((B, M, R - G, 1))

  def loss(x, params):
    hidden = forward(model, params, x, whole, trained)
    return (jnp.sin(hidden) * weight.astype(np.float32)).sum(), hidden

  @jit
  def run(x, blocks):
    args = x, params | {"blocks": blocks}
    return jax.grad(loss, (0, 1), has_aux=True)(*args)

  (dx, dparams), hidden = run(x, params["blocks"])
  return hidden, {"x": dx, "blocks": dparams["blocks"]}


@pytest.mark.parametrize("kernel", ["plain", "xla"])
@pytest.mark.parametrize("trained", [False, True])
def test_given_rows_are_the_blocks_first(kernel, trained, monkeypatch):
  """Forward, and the gradients of the rows and of all weights."""
  monkeypatch.setattr(context_attention, "ROWS", 7)
  monkeypatch.setattr(context_attention, "SLOTS", 5)
  hidden, grads = results(kernel, False, trained)
  expected, expected_grads = results(kernel, True, trained)
  close(hidden, expected, HIDDEN)
  close_trees(grads, expected_grads, GRADIENT)
  # Of the first rows it can have come through the given alone.
  assert np.abs(grads["x"][:, :, :G]).min(0).max() > 1e-3


def test_layers_apart_take_given_rows_too():
  model, params, _, x = setup()
  split = decode_rows.unstack_layers(params)
  found = jit(lambda x: forward(model, split, x, False))(x)
  close(found, results("plain", True, False)[0], HIDDEN)


def test_given_rows_matter_and_so_does_where_they_stand():
  model, params, _, x = setup()
  first = jax.tree.map(jnp.zeros_like, _given(model, params, x))
  run = jit(lambda x, given: forward(model, params, x, False, given=given))
  expected = results("plain", True, False)[0]
  far(run(x, first), expected)
  given = _given(model, params, x)
  close(run(x, given), expected, HIDDEN)
  swapped = jax.tree.map(lambda a: a[:, :, ::-1], given)
  far(run(x, swapped), expected)  # another trace's


def _given(model, params, x):
  @jit
  def run(x):
    out = transformer.run(model, params, x, rows_of(), setup()[2])
    return out.keys[:, :, :, :G], out.values[:, :, :, :G]

  return run(x)


def test_a_context_gets_no_gradient():
  """None of its numbers, though the given beside it have theirs."""
  model, params, cache, x = setup()
  model = model.clone(attention=Kernel("xla"))
  given = _given(model, params, x)

  @jit
  def gradient(given):
    def loss(given):
      rows = rows_of()
      out = transformer.run(
        model, params, x[:, :, G:], rows, cache, past_kv=given
      )
      return jnp.sin(out.hidden).sum()

    return jax.grad(loss)(given)

  keys, values = gradient(given)
  assert keys.shape == given[0].shape
  assert np.abs(values).max() > 1e-3 and np.abs(keys).max() > 1e-4
  with pytest.raises(TypeError, match="takes for constants"):
    jax.grad(
      lambda keys: transformer.run(
        model,
        params,
        x[:, :, G:],
        rows_of(),
        cache.replace(keys=keys),
        past_kv=given,
      ).hidden.sum()
    )(cache.keys)
