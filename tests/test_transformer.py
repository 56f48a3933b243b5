"""Decode equals forward, scan equals a loop, and every switch matters."""

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
  write_token,
)

from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout
from cacheaug.model.layers import Block, RMSNorm
from cacheaug.model.rope import rope_table
from cacheaug.model.static_cache import StaticCache

T = 7  # beyond the window of 5, so that decoding drops keys


@functools.partial(jit, static_argnums=0)
def forward(model, params, tokens, positions=None, segments=None):
  return transformer.prefill(model, params, tokens, positions, segments)


def setup(**changes):
  model = make_model(**changes)
  return model, make_params(model), tokens_of(model, 2, T)


def test_decode_equals_forward_at_every_split():
  """Prefill t tokens, then the rest at once, on the plain cache."""
  model, params, tokens = setup()
  whole, _ = forward(model, params, tokens)

  @jit
  def splits(params, tokens):
    outs = []
    for t in range(1, T):
      head, cache = transformer.prefill(model, params, tokens[:, :t])
      positions = jnp.broadcast_to(jnp.arange(t, T)[None], (2, T - t))
      tail, _ = transformer.extend(
        model, params, cache, tokens[:, t:], positions
      )
      outs.append(jnp.concatenate([head, tail], 1))
    return jnp.stack(outs)

  close(splits(params, tokens), np.stack([whole] * (T - 1)), HIDDEN)


def test_steps_after_left_padding_equal_forward_at_every_split():
  """Prompts of 1 to T - 1 tokens in one batch, on one static cache."""
  model, params, _ = setup()
  tokens = tokens_of(model, T)
  whole = forward(model, params, tokens[None])[0][0]
  slots = T - 1
  prompts = np.full((T - 1, slots), 7, np.int32)
  real = np.zeros((T - 1, slots), np.int32)
  for i, t in enumerate(range(1, T)):
    prompts[i, slots - t :], real[i, slots - t :] = tokens[:t], 1
  # Step k of the prompt of t tokens reads token t + k, while there is one.
  index = np.arange(1, T)[:, None] + np.arange(T - 1)[None]
  given = tokens[np.minimum(index, T - 1)]

  @jit
  def run(params):
    _, cache = transformer.prefill(model, params, prompts, segments=real)

    def step(cache, k_and_token):
      k, token = k_and_token
      position = jnp.full((T - 1,), slots, jnp.int32) + k
      hidden, cache = write_token(
        model, params, cache, token, position, slots + k
      )
      return cache, hidden

    cache = StaticCache.of(cache, slots + T - 1, model.dtype)
    steps = jnp.arange(T - 1), given.T
    return jax.lax.scan(step, cache, steps)[1].swapaxes(0, 1)

  there = index < T
  close(run(params)[there], whole[index[there]], HIDDEN)


def test_a_token_fills_its_slot():
  model, params, tokens = setup()
  whole, full = forward(model, params, tokens)

  @jit
  def run(params):
    _, cache = transformer.prefill(model, params, tokens[:, :-1])
    position = jnp.full((2,), T - 1, jnp.int32)
    cache = StaticCache.of(cache, T + 2, model.dtype)
    last, cache = write_token(
      model, params, cache, tokens[:, -1], position, T - 1
    )
    return last, cache.stacked()

  last, cache = run(params)
  close(last, whole[:, -1], HIDDEN)
  close(cache.keys[:, :, :T], full.keys, HIDDEN)
  np.testing.assert_array_equal(
    cache.segments, np.broadcast_to(np.arange(T + 2) < T, (2, T + 2))
  )


def test_scan_equals_a_loop_over_layers():
  model, params, tokens = setup(layers=3)
  c = model.config
  whole, cache = forward(model, params, tokens)

  def loop(order):
    x = transformer.embed(model, params, tokens)[:, None]
    positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
    rows = QueryLayout.plain(positions, jnp.ones_like(positions))
    block = Block(c, jnp.float32, jnp.float32, model.attention)
    keys = []
    for i in order:
      one = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
      layer = jnp.asarray(c.layer_kinds[i] == "sliding"), None
      x, (k, _) = block.apply(
        {"params": one}, x, layer, rows, None, rope_table(c, rows.positions)
      )
      keys.append(k[:, 0])
    norm = RMSNorm(c.norm_eps, c.norm_offset)
    return norm.apply({"params": params["final_norm"]}, x)[:, 0], keys

  hidden, keys = jit(lambda: loop([0, 1, 2]))()
  close(hidden, whole, HIDDEN)
  close(jnp.stack(keys), cache.keys, HIDDEN)
  far(jit(lambda: loop([1, 0, 2]))()[0], whole)


def test_documents_of_a_sequence_do_not_see_each_other():
  model, params, tokens = setup()
  segments = np.array([[1] * 3 + [2] * 4] * 2, np.int32)
  packed, _ = forward(model, params, tokens, None, segments)
  second, _ = forward(model, params, tokens[:, 3:])
  # Apart it starts at position 0: RoPE is relative.
  close(packed[:, 3:], second, HIDDEN)
  far(forward(model, params, tokens)[0][:, 3:], second)


def test_positions_are_relative_and_matter():
  model, params, tokens = setup()
  whole, _ = forward(model, params, tokens)
  index = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
  close(forward(model, params, tokens, index + 50)[0], whole, HIDDEN)
  far(forward(model, params, tokens, index // 2 * 2)[0], whole)


@pytest.mark.parametrize(
  "changes",
  [
    dict(window=4),
    dict(layer_kinds=("global", "global")),
    dict(attention_softcap=0.0),
    dict(rope_base=100.0),
    dict(rope_base_sliding=100.0),
    dict(query_scale=0.1),
  ],
  ids=str,
)
def test_switches_matter(changes):
  """Same parameters, one switch: other hidden states."""
  model, params, tokens = setup()
  far(
    forward(make_model(**changes), params, tokens)[0],
    forward(model, params, tokens)[0],
  )


def test_final_soft_cap_bounds_the_logits():
  model, params, tokens = setup()
  hidden, _ = forward(model, params, tokens)
  free = make_model(final_softcap=0.0)
  run = jit(transformer.logits, static_argnums=0)
  capped, free = run(model, params, hidden), run(free, params, hidden)
  close(capped, 5.0 * np.tanh(np.asarray(free) / 5.0), HIDDEN)
  far(capped, free)


def test_a_window_as_long_as_the_sequence_is_none():
  _, params, tokens = setup()
  long = forward(make_model(window=T), params, tokens)[0]
  no = forward(make_model(layer_kinds=("global",) * 2), params, tokens)[0]
  close(long, no, HIDDEN)
  far(forward(make_model(window=T - 4), params, tokens)[0], no)


@pytest.mark.parametrize(
  "kinds, reach",  # of token 0: window - 1 rows further a sliding layer
  [
    (("sliding", "sliding"), 5),
    (("sliding", "global"), T),
    (("global", "sliding"), T),
  ],
)
def test_only_sliding_layers_have_the_window(kinds, reach):
  _, params, tokens = setup()
  model = make_model(window=3, layer_kinds=kinds)
  other = tokens.copy()
  other[:, 0] = (other[:, 0] + 1) % 37
  a, b = (np.asarray(forward(model, params, x)[0]) for x in (tokens, other))
  changed = (a != b).any((0, 2))
  assert changed.tolist() == [t < reach for t in range(T)]


def test_repeated_key_heads_equal_grouped_queries():
  model, params, tokens = setup()
  full = make_model(kv_heads=4)

  def repeat(order):
    def at(path, x):
      name = jax.tree_util.keystr(path)
      if "['k']" in name or "['v']" in name:
        return jnp.repeat(x, 2, axis=2)[:, :, order]  # [L, D, K, E]
      return x

    return jax.tree_util.tree_map_with_path(at, params)

  whole, _ = forward(model, params, tokens)
  straight = forward(full, repeat(np.arange(4)), tokens)[0]
  close(straight, whole, HIDDEN)
  dealt = forward(full, repeat(np.array([0, 2, 1, 3])), tokens)[0]
  far(dealt, whole)


@functools.cache
def remat_gradient(remat):
  model, params, tokens = setup(remat=remat)

  def loss(params):
    hidden = transformer.train_pass(
      model, params, tokens, jnp.ones_like(tokens)
    )
    return jnp.sin(transformer.logits(model, params, hidden)).mean()

  traced = jit(jax.grad(loss)).trace(params)
  text = str(traced.jaxpr)
  # Forward products and those computed again for the backward pass.
  return traced.lower().compile()(params), text.count("dot_general"), text


@pytest.mark.parametrize("remat", ["lean", "full"])
def test_remat_changes_no_gradient(remat):
  plain, dots, text = remat_gradient("none")
  again, more, again_text = remat_gradient(remat)
  close_trees(again, plain, GRADIENT)
  assert "remat" in again_text and "remat" not in text
  # 'lean' keeps the weights' products and repeats only the attention's.
  assert more > dots, "nothing is computed again"


def test_full_remat_repeats_more_than_lean():
  assert remat_gradient("full")[1] > remat_gradient("lean")[1]


@functools.cache
def loop_gradient():
  """Of a plain loop over three layers."""
  model, params, tokens = setup(layers=3)
  c = model.config
  positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
  rows = QueryLayout.plain(positions, jnp.ones_like(positions))
  block = Block(c, jnp.float32, jnp.float32, model.attention)

  def loss(params):
    x = transformer.embed(model, params, tokens)[:, None]
    x = jax.lax.stop_gradient(x)
    for i, kind in enumerate(c.layer_kinds):
      one = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
      layer = jnp.asarray(kind == "sliding"), None
      x, _ = block.apply(
        {"params": one}, x, layer, rows, None, rope_table(c, rows.positions)
      )
    norm = RMSNorm(c.norm_eps, c.norm_offset)
    x = norm.apply({"params": params["final_norm"]}, x)
    return jnp.sin(x).mean()

  return jit(jax.grad(loss))(params)


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_of_weights_by_either_loop(trained):
  """`trained` changes how layers are gone through, and no number."""
  model, params, tokens = setup(layers=3)
  positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
  rows = QueryLayout.plain(positions, jnp.ones_like(positions))
  x = transformer.embed(model, params, tokens)[:, None]

  def loss(params, trained):
    out = transformer.run_blocks(model, params, x, rows, None, trained=trained)
    return jnp.sin(out).mean()

  found = jit(jax.grad(loss), static_argnums=1)(params, trained)
  for part in ("blocks", "final_norm"):
    close_trees(found[part], loop_gradient()[part], GRADIENT)


def test_rows_not_wanted_change_nothing():
  model, params, tokens = setup(layers=3)
  positions = jnp.broadcast_to(jnp.arange(T)[None], (2, T))
  rows = QueryLayout.plain(positions, jnp.ones_like(positions))
  x = transformer.embed(model, params, tokens)[:, None]
  run = functools.partial(transformer.run, model, params, x, rows, None)
  whole, some = jit(run)(), jit(functools.partial(run, first_output_row=4))()
  assert some.hidden.shape == (2, 1, T - 4, 16)
  close(some.hidden, whole.hidden[:, :, 4:], HIDDEN)
  close(some.keys, whole.keys, HIDDEN)
  close(some.values, whole.values, HIDDEN)


def test_a_context_pass_stops_at_the_last_keys_and_values():
  """Of the last layer's seven weight products two are left, by XLA itself."""
  model, params, tokens = setup(layers=1)
  ones = jnp.ones_like(tokens)

  def products(keep):
    def run(params):
      out = transformer.prefill_frozen(
        model, params, tokens, ones, jnp.zeros_like(ones)
      )
      return keep(*out)

    text = jit(run).lower(params).compile().as_text()
    return sum(" dot(" in line or "ynn" in line for line in text.splitlines())

  whole = products(lambda hidden, cache: (hidden, cache))
  some = products(lambda hidden, cache: cache)
  assert 2 <= some < whole / 2


def test_extend_on_a_cache_needs_positions():
  model, params, tokens = setup()
  _, cache = forward(model, params, tokens)
  with pytest.raises(UserError, match="positions"):
    transformer.extend(model, params, cache, tokens)
