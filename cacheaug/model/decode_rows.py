"""Rows that join a static cache, and weights as they are best held for it."""

import jax

from cacheaug.model.layers import Block, RMSNorm
from cacheaug.model.rope import rope_table
from cacheaug.model.static_cache import StaticCache
from cacheaug.model.transformer import Params, Transformer


def unstack_layers(params: Params) -> Params:
  """The same tree with `blocks` a tuple of L trees; every pass takes either.

  Worth holding where rows are few: a loop that takes one layer after another
  from the stack copies every weight at every step on XLA's CPU backend, which
  doubled the time of a token.
  """
  blocks = params["blocks"]
  if isinstance(blocks, tuple):
    return params

  def layer(i):
    return jax.tree.map(lambda x: x[i], blocks)

  layers = range(len(jax.tree.leaves(blocks)[0]))
  return {**params, "blocks": tuple(map(layer, layers))}


def write_rows(
  model: Transformer,
  params: Params,  # stacked, or of unstack_layers
  cache: StaticCache,
  x: jax.Array,  # [B, R, D]
  positions: jax.Array,  # [B, R]
  *,
  segments: jax.Array,  # [B, R]; 0 leaves a row's slot empty
  slot: jax.Array | int,  # [], the first of the R slots to fill
) -> tuple[jax.Array, StaticCache]:  # [B, R, D], the cache with the rows in it
  """Runs R rows that join a static cache: `extend` and a write, in place.

  A row sees every filled slot of its segment, whatever its position, and of
  the rows themselves none later.
  """
  c = model.config
  cache, rows = cache.join(positions, segments, slot, c.decoding_window)
  block = Block(c, model.dtype, model.param_dtype, model.attention)
  ropes = rope_table(c, positions[:, None])
  x, keys, values = x[:, None].astype(model.dtype), [], []
  for i, weights in enumerate(unstack_layers(params)["blocks"]):
    layer = c.other_layers[i], (cache.keys[i], cache.values[i])
    x, new_kv = block.apply({"params": weights}, x, layer, None, rows, ropes)
    keys.append(new_kv[0])
    values.append(new_kv[1])
  norm = RMSNorm(c.norm_eps, c.norm_offset, model.param_dtype)
  x = norm.apply({"params": params["final_norm"]}, x)
  return x[:, 0], cache.replace(keys=tuple(keys), values=tuple(values))
