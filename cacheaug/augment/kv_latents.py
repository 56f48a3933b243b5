"""Latents as keys and values: what prefix and handover put in place of z.

Their N latents are entries of the decoder's cache and not rows that it runs:

  handover  the keys and values of the coprocessor's rows, in all layers.
  prefix    trained ones. Keys are kept as before RoPE and rotated to where they
            stand: a score then depends on how far away a row is, and not on
            where in the text. Harmless: added to the context's own entries of
            p-N+1 .. p.

With `coprocessor.kv_bias` a trained bias [L, N, K], 0 at the start, is added to
the scores of attention to them: how much of a row's attention N entries get
that stand for many.

There is no last latent to predict y_1 from, so the decoder runs x[p] again:
traces.py draws the block. With positions 'replace' and the harmless start both
begin as exactly the frozen decoder; handover if it is a copy of it, as its rows
then read what the hidden entries have read, the context up to p-N, and the
tokens after it from their inputs (`Layout.stands_in`).
"""

import jax
import jax.numpy as jnp

from cacheaug.augment import coprocessor
from cacheaug.augment.traces import Traces
from cacheaug.model import transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.rope import rope_of_layers, rotate
from cacheaug.model.transformer import Params, PastKV, Transformer


def latent_kv(
  model: Transformer,
  params: Params,
  cache: KVCache,
  traces: Traces,
  inputs: jax.Array,  # [B, M, N, D], embeddings of traces.input_tokens
) -> PastKV:  # keys, values [L, B, M, N, K, E], maybe bias [L, B, M, N, K]
  """Pass 2 of these kinds: the latents as keys and values, in place of z."""
  kv = _keys_and_values(model, params, cache, traces, inputs)
  if "kv_bias" not in params:
    return kv
  bias = params["kv_bias"].astype(jnp.float32)[:, None, None]
  return *kv, jnp.broadcast_to(bias, kv[0].shape[:-1])


def _keys_and_values(model, params, cache, traces, inputs):
  if "transformer" in params:
    rows = transformer.run(
      model,
      params["transformer"],
      coprocessor.input_rows(params, traces, inputs),
      traces.latent_rows,
      cache,
      trained=True,
      kv_only=True,
    )
    return rows.keys, rows.values
  keys, values = (
    params[name].astype(model.dtype)[:, None, None]  # [L, 1, 1, N, K, E]
    for name in ("prefix_keys", "prefix_values")
  )
  at = traces.latent_rows.positions  # [B, M, N]
  keys = rotate(keys, rope_of_layers(model.config, at))
  if traces.start == "harmless":
    entry_keys, entry_values, positions = _entries(cache, traces)
    # From the entries' positions to the latents', which 'insert' puts later.
    moved = rope_of_layers(model.config, at - positions, scaled=False)
    keys, values = keys + rotate(entry_keys, moved), values + entry_values
  return keys, jnp.broadcast_to(values, keys.shape)


def _entries(cache, traces):
  """Keys and values [L, B, M, N, K, E] of p-N+1 .. p, positions [B, M, N].

  A token's slot is its index: nothing was inserted before the point.
  """
  n = traces.input_tokens.shape[-1]
  slots = traces.points[..., None] + jnp.arange(1 - n, 1)[None, None]
  slots = jnp.maximum(slots, 0)

  def take(array, axis):
    return jax.vmap(lambda x, i: jnp.take(x, i, axis), (axis, 0), axis)(
      array, slots
    )

  return take(cache.keys, 1), take(cache.values, 1), take(cache.positions, 0)


def predict(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  kv: PastKV,  # of `latent_kv`
  traces: Traces,
) -> jax.Array:  # [B, M, A, D]
  """Pass 3 of these kinds: hidden states of x[p], run again, and y_1 .. ."""
  tokens = jnp.concatenate([traces.input_tokens[..., -1:], traces.ahead], -1)
  x = transformer.embed(model, decoder, tokens)
  return transformer.run_blocks(
    model, decoder, x, traces.rows, cache, past_kv=kv
  )
