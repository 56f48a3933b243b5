"""Attention of rows over [context cache | their own block].

Rows come as [B, M, R]: M blocks a sequence, R rows a block. A plain forward
pass is one block (M = 1) without context; one decoding step is one block of
one row over a static cache; the paper's passes 2 and 3 are M blocks, one a
trace, over one shared context. Blocks never see each other, so scores are
[M R, S + R] and no (S + M R) x (S + M R) mask is ever formed.
"""

import flax.struct
import jax
import jax.numpy as jnp

from cacheaug.model.cache import KVCache

# Finite, so that a row that sees nothing (padding) gives no NaN.
MASKED = -2.0e38
NO_LIMIT = 2**30  # beyond every position


@flax.struct.dataclass
class Rows:
  """Where the rows of a pass stand.

  `limits` is the last context position that rows may see. `staircase`
  promises, statically, how much context equal runs of blocks can need: with
  bounds (b_1, ..., b_G), blocks of run g see no context slot at or beyond b_g,
  so those scores are never computed. `order` replaces "no later row of the
  block" where one block stands for many (the dense reference).
  """

  positions: jax.Array  # [B, M, R] int32
  segments: jax.Array  # [B, M, R] int32, 0 = padding
  limits: jax.Array  # [B, M, R] or [B, M, 1] int32
  order: jax.Array | None = None  # [B, M, R, R] bool
  staircase: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

  @classmethod
  def plain(cls, positions: jax.Array, segments: jax.Array) -> "Rows":
    """One block a sequence, [B, T] -> [B, 1, T], seeing the whole cache."""
    limits = jnp.full((positions.shape[0], 1, 1), NO_LIMIT, jnp.int32)
    return cls(positions[:, None], segments[:, None], limits)


def visible(
  q_positions: jax.Array,  # [..., Q]
  q_segments: jax.Array,  # [..., Q]
  k_positions: jax.Array,  # [..., T]
  k_segments: jax.Array,  # [..., T]
  window: jax.Array | int | None = None,
  causal: bool = True,
) -> jax.Array:  # [..., Q, T] bool
  """The one mask: same document, not ahead, within the window.

  Positions decide, never array indices, so that the same function serves
  training, prefill and decoding. Five tokens of two documents, window 3:

        0 1 2 3 4
      0 #            a query sees itself and up to window - 1 keys back,
      1 # #          within its own document (here 0-3 and 4)
      2 # # #
      3   # # #
      4         #

  Without `causal`, keys ahead are seen too: what is ahead is then decided by
  the caller.
  """
  back = q_positions[..., :, None] - k_positions[..., None, :]
  same = q_segments[..., :, None] == k_segments[..., None, :]
  seen = same & (k_segments[..., None, :] != 0)
  if causal:
    seen &= back >= 0
  if window is not None:
    seen &= back < window
  return seen


def context_mask(
  rows: Rows, cache: KVCache, window: jax.Array | int | None
) -> jax.Array:  # [B, M, R, S] bool
  """What each row sees of the context: `visible`, up to its block's limit.

  The limit takes the place of causality: latents may stand at the positions of
  context tokens, and every row of a block sees the context up to its point.
  """
  seen = visible(
    rows.positions,
    rows.segments,
    cache.positions[:, None],
    cache.segments[:, None],
    window,
    causal=False,
  )
  return seen & (cache.positions[:, None, None, :] <= rows.limits[..., None])


def block_mask(
  rows: Rows, window: jax.Array | int | None
) -> jax.Array:  # [B, M, R, R] bool
  """What each row sees of its own block: `visible`, and not a later row."""
  args = rows.positions, rows.segments
  if rows.order is not None:
    # Causality is the caller's: latents may stand at earlier positions than
    # the context tokens that they see.
    return visible(*args, *args, window, causal=False) & rows.order
  seen = visible(*args, *args, window)
  # Among rows at equal positions, the later sees the earlier.
  tri = jnp.tri(rows.positions.shape[-1], dtype=bool)
  return seen & tri[None, None]


def _scores(q, keys, mask, softcap):
  """Masked scores [B, K, m, r, G, T] of q over keys, float32.

  q [B, K, m, r, G, E]; keys [B, K, T, E], or [B, K, m, T, E] where each block
  has its own; mask [B, m, r, T]. Batch axes lead and the rest is one matrix
  product: the order in which XLA's CPU compiler is 3 times faster.
  """
  b, k, m, r, g, e = q.shape
  flat = q.reshape(*keys.shape[:-2], -1, e)
  spec = "...qe,...te->...qt"
  scores = jnp.einsum(spec, flat, keys, preferred_element_type=jnp.float32)
  scores = scores.reshape(b, k, m, r, g, -1)
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  return jnp.where(mask[:, None, :, :, None], scores, MASKED)


def _weighted(weights, values):
  """Sum of values by weights [B, K, m, r, G, T] -> [B, K, m, r, G, E]."""
  flat = weights.reshape(*values.shape[:-2], -1, weights.shape[-1])
  flat = flat.astype(values.dtype)
  out = jnp.einsum("...qt,...te->...qe", flat, values)
  return out.reshape(*weights.shape[:-1], -1)


def _attend(q, own_k, own_v, own_mask, context, softcap):
  """Joint softmax over [context | own block] for one run of blocks."""
  own = _scores(q, own_k, own_mask, softcap)
  if context is None:
    return _weighted(jax.nn.softmax(own), own_v)
  keys, values, mask = context
  ahead = _scores(q, keys, mask, softcap)
  top = jnp.maximum(ahead.max(-1), own.max(-1))[..., None]
  top = jax.lax.stop_gradient(top)
  ahead, own = jnp.exp(ahead - top), jnp.exp(own - top)
  total = ahead.sum(-1) + own.sum(-1)  # [B, K, m, r, G]
  out = _weighted(ahead, values) + _weighted(own, own_v)
  return (out / total[..., None]).astype(own_v.dtype)


def attend(
  q: jax.Array,  # [B, M, R, H, E], scaled, RoPE applied
  k: jax.Array,  # [B, M, R, K, E], RoPE applied
  v: jax.Array,  # [B, M, R, K, E]
  rows: Rows,
  cache: KVCache | None,  # one layer's: keys and values [B, S, K, E]
  *,
  window: jax.Array | int | None,
  softcap: float,
) -> jax.Array:  # [B, M, R, H, E]
  """Grouped-query attention over [cache | own block], softmax in float32."""
  b, m, r, h, e = q.shape
  heads = k.shape[3]
  q = q.reshape(b, m, r, heads, h // heads, e)
  q = q.transpose(0, 3, 1, 2, 4, 5)  # [B, K, M, R, G, E]
  k, v = (x.transpose(0, 3, 1, 2, 4) for x in (k, v))  # [B, K, M, R, E]
  own_mask = block_mask(rows, window)
  if cache is None:
    out = _attend(q, k, v, own_mask, None, softcap)
  else:
    seen = context_mask(rows, cache, window)
    keys, values = (x.swapaxes(1, 2) for x in (cache.keys, cache.values))
    bounds = rows.staircase or (cache.positions.shape[1],)
    step = m // len(bounds)
    outs = []
    for i, bound in enumerate(bounds):
      run = slice(i * step, (i + 1) * step)
      context = (
        keys[:, :, :bound],
        values[:, :, :bound],
        seen[:, run, :, :bound],
      )
      mine = (x[:, :, run] for x in (q, k, v))
      outs.append(_attend(*mine, own_mask[:, run], context, softcap))
    out = jnp.concatenate(outs, 2)
  return out.transpose(0, 2, 3, 1, 4, 5).reshape(b, m, r, h, e)
