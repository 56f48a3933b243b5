"""The shared architecture, and the pure functions everything is built from.

The decoder and the coprocessor are this one Linen module applied to two
parameter trees. A tree holds `embedder` (and `head` where untied), `blocks`
stacked over L, and `final_norm`; a coprocessor's tree has no embedder.

Reference: transformers' modeling_gemma2.py and its Gemma-3, Llama and Qwen3
siblings, to which each family is held in tests.
"""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from cacheaug.errors import UserError
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model import placement
from cacheaug.model.attention import QueryLayout
from cacheaug.model.cache import KVCache
from cacheaug.model.config import ModelConfig
from cacheaug.model.layers import Block, Embedder, Linear, RMSNorm
from cacheaug.model.rope import rope_table

Params = Any  # a tree of arrays
# Keys and values [L, B, M, G, K, E], and maybe the bias [L, B, M, G, K] of
# attention to them.
PastKV = tuple[jax.Array, ...]

# What the backward pass finds of a block, by name; it computes the rest again.
# lean: the projections' and attention's outputs, so that no matrix product and
# no attention tile is run twice, only what is between them.
REMAT_POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,
  "lean": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attention"),
  ),
  "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nn.Module):
  """The shared decoder architecture; see the module docstring."""

  config: ModelConfig
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  remat: str = "lean"  # of REMAT_POLICIES
  attention: Kernel = Kernel()  # of rows over a context
  keep_hidden: bool = False  # give every layer's output too (tests)

  def setup(self) -> None:
    """Blocks stacked over L, final norm, embedder, head where untied."""
    c = self.config
    self.blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
      length=c.layers,
      metadata_params={nn.PARTITION_NAME: "L"},
    )(c, self.dtype, self.param_dtype, self.attention)
    self.final_norm = RMSNorm(c.norm_eps, c.norm_offset, self.param_dtype)
    self.embedder = Embedder(c, self.dtype, self.param_dtype)
    if not c.tied_head:
      self.head = Linear(
        {"D": c.width},
        {"V": c.vocab_size},
        dtype=self.dtype,
        param_dtype=self.param_dtype,
      )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Tokens [B, T] to logits; for init alone, as it makes every parameter."""
    segments = jnp.ones_like(tokens)
    rows = QueryLayout.plain(jnp.cumsum(segments, -1) - 1, segments)
    ropes = rope_table(self.config, rows.positions)
    other = jnp.array(self.config.other_layers)
    x = self.embed(tokens)[:, None]
    x, _ = self.blocks(x, (other, None), rows, None, ropes)
    return self.logits(self.final_norm(x))

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Token embeddings in the residual stream's scale, [..., D]."""
    return self.embedder(tokens)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> [..., V] float32, soft-capped where the family does."""
    c = self.config
    if c.tied_head:
      out = self.embedder.attend(hidden)
    else:
      out = self.head(hidden)
    out = out.astype(jnp.float32)
    if c.final_softcap:
      out = c.final_softcap * jnp.tanh(out / c.final_softcap)
    return out


# --- pure functions ---------------------------------------------------------


def init(model: Transformer, key: jax.Array) -> Params:
  """Random parameters, boxed with their logical axes (nn.unbox to use)."""
  return model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def embed(model: Transformer, params: Params, tokens: jax.Array) -> jax.Array:
  """Tokens [...] -> [..., D] as the first block receives them."""
  return model.apply({"params": params}, tokens, method="embed")


def logits(model: Transformer, params: Params, hidden: jax.Array) -> jax.Array:
  """Hidden [..., D] -> float32 logits [..., V]."""
  return model.apply({"params": params}, hidden, method="logits")


def head_for_use(model: Transformer, params: Params) -> Params:
  """What `logits` reads, gathered once for many calls in a loop."""
  if model.config.tied_head:
    table = params["embedder"]["embedding"].astype(model.dtype)
    table = placement.for_use(table, ("V", "D"))
    return {"embedder": {"embedding": table}}
  kernel = params["head"]["kernel"].astype(model.dtype)
  return {"head": {"kernel": placement.for_use(kernel, ("D", "V"))}}


def run_blocks(
  model: Transformer,
  params: Params,
  x: jax.Array,  # [B, M, R, D]
  rows: QueryLayout,
  cache: KVCache | None,
  *,
  first_output_row: int = 0,
  trained: bool = False,
  past_kv: PastKV | None = None,
) -> jax.Array:  # [B, M, R - first_output_row, D]
  """M blocks of rows over one context; hidden states after the final norm.

  Args:
    model: the architecture.
    params: with `blocks` (stacked, or of decode_rows.unstack_layers) and
      `final_norm`.
    x: the rows' input embeddings.
    rows: where they stand.
    cache: the context; None for none.
    first_output_row: rows before this one have no output; the last layer makes
      no more than their keys and values.
    trained: gradients of `params` are needed too (they are right without it,
      and slow).
    past_kv: keys and values of each block's first G rows, which have no input:
      `rows` are then G + R, and `x` and the result their last R.
  """
  kw = dict(first_output_row=first_output_row, trained=trained, past_kv=past_kv)
  return run(model, params, x, rows, cache, **kw).hidden


@flax.struct.dataclass
class Pass:
  """What a run through all layers gives."""

  # After the final norm, of the rows from first_output_row on.
  hidden: jax.Array | None  # [B, M, R', D]
  keys: jax.Array  # [L, B, M, R, K, E], RoPE applied
  values: jax.Array  # [L, B, M, R, K, E]
  layers: jax.Array | None  # [L - 1, B, M, R, D], the inner layers' outputs


def run(
  model: Transformer,
  params: Params,
  x: jax.Array,  # [B, M, R, D]
  rows: QueryLayout,
  cache: KVCache | None,
  *,
  first_output_row: int = 0,
  trained: bool = False,
  past_kv: PastKV | None = None,
  kv_only: bool = False,
) -> Pass:
  """`run_blocks`, with the rows' own keys and values.

  With `kv_only` they are all that is asked for: the last layer stops at them,
  `params` needs no final norm and the result has no hidden states.
  """
  c = model.config
  block = Block(c, model.dtype, model.param_dtype, model.attention)
  ropes = rope_table(c, rows.positions[:, :, -x.shape[2] :])
  context = kv = None
  if cache is not None:
    context = cache.positions, cache.segments
    kv = cache.keys.astype(model.dtype), cache.values.astype(model.dtype)
  layers = params["blocks"], (jnp.array(c.other_layers), kv)

  def layer(x, this, past_kv, first_output_row):
    weights, of_layer = this
    return block.apply(
      {"params": weights},
      x,
      of_layer,
      rows,
      context,
      ropes,
      first_output_row,
      past_kv,
    )

  if model.remat != "none":
    layer = jax.checkpoint(
      layer,
      policy=REMAT_POLICIES[model.remat],
      prevent_cse=False,  # a loop's body is separate from its backward pass
      static_argnums=3,
    )
  x = x.astype(model.dtype)
  if isinstance(params["blocks"], tuple):  # of decode_rows.unstack_layers
    new_kv, hidden = [], None
    for i, weights in enumerate(params["blocks"]):
      of_layer, first = jax.tree.map(lambda a, i=i: a[i], (layers[1], past_kv))
      this = weights, of_layer
      x, pair = layer(
        x, this, first, first_output_row if i == c.layers - 1 else 0
      )
      new_kv.append(pair)
    k, v = (jnp.stack(pairs) for pairs in zip(*new_kv, strict=True))
  elif trained:
    # As the loop's own inputs, so that each layer's gradient is written once.
    assert not first_output_row
    through, hidden = (layers, past_kv), None
    if kv_only:
      through, last_layer = (
        jax.tree.map(lambda a, of=of: a[of], through)
        for of in (slice(c.layers - 1), slice(c.layers - 1, None))
      )
    x, (k, v) = jax.lax.scan(lambda x, this: layer(x, *this, 0), x, through)
    if kv_only:
      _, new_kv = layer(x, *jax.tree.map(lambda a: a[0], last_layer), 0)
      k, v = (
        jnp.concatenate([a, b[None]])
        for a, b in zip((k, v), new_kv, strict=True)
      )
  else:
    # The last layer is run by itself: what nobody reads of it (in a context's
    # pass everything but its keys and values) is left out, which XLA does not
    # do inside a loop. By index, since a slice of the weights would be a copy.
    last = c.layers - 1

    def inner(x, this):
      i, first = this
      x, new_kv = layer(x, jax.tree.map(lambda a: a[i], layers), first, 0)
      return x, (new_kv, x if model.keep_hidden else None)

    # `past_kv` as the loop's own input, for its gradient, as above.
    first = jax.tree.map(lambda a: a[:last], past_kv)
    x, ((k, v), hidden) = jax.lax.scan(inner, x, (jnp.arange(last), first))
    this, first = jax.tree.map(lambda a: a[last], (layers, past_kv))
    x, new_kv = layer(x, this, first, first_output_row)
    k, v = (
      jnp.concatenate([a, b[None]]) for a, b in zip((k, v), new_kv, strict=True)
    )
  if kv_only:
    return Pass(None, k, v, hidden)
  norm = RMSNorm(c.norm_eps, c.norm_offset, model.param_dtype)
  x = norm.apply({"params": params["final_norm"]}, x)
  return Pass(x, k, v, hidden)


def extend(
  model: Transformer,
  params: Params,
  cache: KVCache | None,
  x: jax.Array,  # [B, T] tokens, or [B, T, D] embeddings
  positions: jax.Array | None = None,  # [B, T]; 0.. where there is no cache
  segments: jax.Array | None = None,  # [B, T]; ones by default
) -> tuple[jax.Array, KVCache]:  # [B, T, D], the T rows' own cache
  """Runs T more rows on top of a cache; returns theirs, to concat or write.

  Raises:
    UserError: a cache without positions for the rows after it.
  """
  if x.ndim == 2:
    x = embed(model, params, x)
  b, t = x.shape[:2]
  if segments is None:
    segments = jnp.ones((b, t), jnp.int32)
  if positions is None:
    if cache is not None:
      raise UserError("extend needs positions where there is a cache")
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
  rows = QueryLayout.plain(positions, segments)
  return _own_cache(model, params, x, rows, cache)


def _own_cache(model, params, x, rows, cache):
  """Hidden [B, T, D] and the rows' own cache, of one block a sequence."""
  out = run(model, params, x[:, None], rows, cache)
  k, v = out.keys[:, :, 0], out.values[:, :, 0]
  return out.hidden[:, 0], KVCache(
    k, v, rows.positions[:, 0], rows.segments[:, 0]
  )


def prefill(
  model: Transformer,
  params: Params,
  tokens: jax.Array,  # [B, S]
  positions: jax.Array | None = None,  # [B, S]; 0.. by default
  segments: jax.Array | None = None,  # [B, S]; ones by default, 0 = padding
) -> tuple[jax.Array, KVCache]:  # [B, S, D], the cache
  """The decoder reads a context and leaves its kv-cache."""
  return extend(model, params, None, tokens, positions, segments)


def prefill_frozen(
  model: Transformer,
  params: Params,
  tokens: jax.Array,  # [B, S]
  segments: jax.Array,  # [B, S], 0 = padding
  starts: jax.Array,  # [B, S] slot where each token's segment begins
) -> tuple[jax.Array, KVCache]:  # [B, S, D], the cache
  """`prefill` of a frozen decoder, by tiles, positions being slots.

  Where the hidden states are not used, the last layer stops at its keys and
  values. No gradient goes through it.
  """
  b, s = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s))
  rows = QueryLayout.plain(positions, segments).replace(
    context_start=starts[:, None]
  )
  x = embed(model, params, tokens)
  return _own_cache(model, params, x, rows, None)


def train_pass(
  model: Transformer,
  params: Params,
  tokens: jax.Array,  # [B, S]
  segments: jax.Array,  # [B, S], 0 = padding
) -> jax.Array:  # [B, S, D]
  """Hidden states, for gradients with respect to `params`."""
  b, s = tokens.shape
  positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s))
  rows = QueryLayout.plain(positions, segments)
  x = embed(model, params, tokens)[:, None]
  return run_blocks(model, params, x, rows, None, trained=True)[:, 0]
