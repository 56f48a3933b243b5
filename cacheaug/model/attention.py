"""Attention of rows over [context cache | their own block].

Rows come as [B, M, R]: M blocks a sequence, R rows a block. A plain forward
pass is one block (M = 1) without context; one decoding step is one block of
one row over a static cache; the paper's passes 2 and 3 are M blocks, one a
trace, over one shared context. Blocks never see each other, so scores are
[M R, S + R] and no (S + M R) x (S + M R) mask is ever formed.

A block's first rows may have been run before, or never: then their keys and
values are given and only the block's last rows are queries (`past_kv` of
transformer.run). They are rows like the others: `QueryLayout` says where they
stand and they get gradients, which a context does not.

`attend` has two ways:

1. Each row sees one interval of context slots (training;
   QueryLayout.context_start is set): computed in tiles, unseen tiles skipped,
   nothing of the context's length kept for the backward pass, no gradient to
   the context (kernels/context_attention.py).
2. Otherwise (decoding, caches with empty slots): one masked softmax, with
   gradients to everything.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cacheaug.kernels.context_attention import MASKED
from cacheaug.kernels.dispatch import Kernel
from cacheaug.model.cache import KVCache

NO_LIMIT = 2**30  # beyond every position


@flax.struct.dataclass
class QueryLayout:
  """Where the rows of a pass stand.

  Attributes:
    positions: of each row.
    segments: the document of each row; 0 is padding.
    context_limit: the last context position that rows may see.
    block_mask: replaces "no later row of the block" where one block stands for
      many (the dense reference).
    context_start: a promise that the context's positions are its slots, that a
      row's document begins at that slot and has no hole up to the limit, and
      that no gradient with respect to the context is needed.
    first_visible: the first context position that rows may see; None: all.
  """

  positions: jax.Array  # [B, M, R] int32
  segments: jax.Array  # [B, M, R] int32, 0 = padding
  context_limit: jax.Array  # [B, M, R] or [B, M, 1] int32
  block_mask: jax.Array | None = None  # [B, M, R, R] bool
  context_start: jax.Array | None = None  # [B, M, R] or [B, M, 1] int32
  first_visible: jax.Array | None = None  # [B, M, R] or [B, M, 1] int32

  @classmethod
  def plain(cls, positions: jax.Array, segments: jax.Array) -> "QueryLayout":
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
  rows: QueryLayout, cache: KVCache, window: jax.Array | int | None
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
  at = cache.positions[:, None, None, :]
  seen &= at <= rows.context_limit[..., None]
  if rows.first_visible is not None:
    seen &= at >= rows.first_visible[..., None]
  return seen


def block_mask(
  rows: QueryLayout, window: jax.Array | int | None
) -> jax.Array:  # [B, M, R, R] bool
  """What each row sees of its own block: `visible`, and not a later row."""
  args = rows.positions, rows.segments
  if rows.block_mask is not None:
    # Causality is the caller's: latents may stand at earlier positions than
    # the context tokens that they see.
    return visible(*args, *args, window, causal=False) & rows.block_mask
  seen = visible(*args, *args, window)
  # Among rows at equal positions, the later sees the earlier.
  tri = jnp.tri(rows.positions.shape[-1], dtype=bool)
  return seen & tri[None, None]


def _scores(q, keys, mask, softcap):
  """Scores [B, K, m, r, G, T] of q over keys, float32, masked if asked.

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
  if mask is None:
    return scores
  return jnp.where(mask[:, None, :, :, None], scores, MASKED)


def _weighted(weights, values):
  """Sum of values by weights [B, K, m, r, G, T] -> [B, K, m, r, G, E]."""
  flat = weights.reshape(*values.shape[:-2], -1, weights.shape[-1])
  flat = flat.astype(values.dtype)
  out = jnp.einsum("...qt,...te->...qe", flat, values)
  return out.reshape(*weights.shape[:-1], -1)


def _biased(scores, bias):
  """Scores [B, K, m, r, G, T] plus their keys' bias [B, K, m, 1, 1, T]."""
  return scores if bias is None else scores + bias


def _attend(q, own_k, own_v, own_mask, bias, context, softcap):
  """Joint softmax over [context | own block] for one run of blocks."""
  own = _biased(_scores(q, own_k, own_mask, softcap), bias)
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


def _interval(
  rows: QueryLayout, window: jax.Array | int | None
) -> tuple[jax.Array, jax.Array]:  # [B, M, R] each
  """The slots start <= s < stop that `context_mask` lets each row see."""
  start = jnp.broadcast_to(rows.context_start, rows.positions.shape)
  if rows.first_visible is not None:
    start = jnp.maximum(start, rows.first_visible)
  if window is not None:
    start = jnp.maximum(start, rows.positions - window + 1)
  stop = jnp.where(rows.segments != 0, rows.context_limit + 1, 0)
  return start, stop


@functools.partial(jax.custom_vjp, nondiff_argnums=(9, 10))
def _joint(
  q,  # [B, K, M, R, G, E]
  own_k,  # [B, K, M, R, E]
  own_v,
  keys,  # [B, K, S, E], constants
  values,
  start,  # [B, M, R]
  stop,
  own_mask,  # [B, M, R, R]
  bias,  # [B, K, M, 1, 1, R] or None
  softcap,
  kernel,
):
  """Softmax over [context interval | own block], joined by log-sum-exp."""
  return _joint_forward(
    q, own_k, own_v, keys, values, start, stop, own_mask, bias, softcap, kernel
  )[0]


def _joint_forward(
  q, own_k, own_v, keys, values, start, stop, own_mask, bias, softcap, kernel
):
  own = _biased(_scores(q, own_k, own_mask, softcap), bias)
  context_out, context_lse = kernel.forward(
    _merge(q),
    keys,
    values,
    _repeat(start, q),
    _repeat(stop, q),
    softcap=softcap,
  )
  context_out, context_lse = (
    context_out.reshape(q.shape),
    context_lse.reshape(q.shape[:-1]),
  )
  lse = jnp.logaddexp(context_lse, jax.nn.logsumexp(own, -1))
  out = context_out * jnp.exp(context_lse - lse)[..., None]
  out += _weighted(jnp.exp(own - lse[..., None]), own_v).astype(jnp.float32)
  # Named, so that a checkpoint policy can keep them: the tiles are not run
  # again in the backward pass.
  out = checkpoint_name(out.astype(own_v.dtype), "attention")
  lse = checkpoint_name(lse, "attention")
  saved = q, own_k, own_v, keys, values, start, stop, own_mask, bias, out, lse
  return out, saved


def _joint_backward(softcap, kernel, saved, dout):
  q, own_k, own_v, keys, values, start, stop, own_mask, bias, out, lse = saved
  b, k, m, r, g, e = q.shape
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1)
  dq = kernel.backward_dq(
    _merge(q),
    keys,
    values,
    _repeat(start, q),
    _repeat(stop, q),
    lse.reshape(b, k, -1),
    delta.reshape(b, k, -1),
    _merge(dout),
    softcap=softcap,
  ).reshape(q.shape)
  own = _scores(q, own_k, own_mask, softcap)  # [B, K, M, R, G, R]
  weights = jnp.exp(_biased(own, bias) - lse[..., None])
  back = weights * (_scores(dout, own_v, None, 0.0) - delta[..., None])
  dbias = None if bias is None else back.sum((3, 4), keepdims=True)
  if softcap:
    back *= 1.0 - (jnp.clip(own, -softcap, softcap) / softcap) ** 2
  dq += _weighted(back, own_k).astype(jnp.float32)

  def down(weights, rows):  # sum over the rows and groups that saw a key
    weights = weights.reshape(b, k, m, r * g, -1).astype(rows.dtype)
    rows = rows.reshape(b, k, m, r * g, e)
    return jnp.einsum("bkmqt,bkmqe->bkmte", weights, rows)

  dk, dv = down(back, q), down(weights, dout.astype(own_v.dtype))
  return (
    dq.astype(q.dtype),
    dk.astype(own_k.dtype),
    dv.astype(own_v.dtype),
    *(None,) * 5,
    dbias,
  )


def _joint_checked(
  q, own_k, own_v, keys, values, start, stop, own_mask, bias, softcap, kernel
):
  if keys.perturbed or values.perturbed:
    raise TypeError(
      "a gradient with respect to a context's keys or values is wanted, which "
      "tiled attention takes for constants: use the kernel 'plain'"
    )
  args = q, own_k, own_v, keys, values, start, stop, own_mask
  bias = None if bias is None else bias.value
  return _joint_forward(*(x.value for x in args), bias, softcap, kernel)


_joint.defvjp(_joint_checked, _joint_backward, symbolic_zeros=True)


def _merge(q):
  """[B, K, M, R, G, E] -> [B, K, M R G, E]."""
  return q.reshape(*q.shape[:2], -1, q.shape[-1])


def _repeat(x, q):
  """[B, M, R] -> [B, M R G], for the rows of `_merge`."""
  groups = q.shape[4]
  return jnp.broadcast_to(x[..., None], (*x.shape, groups)).reshape(
    x.shape[0], -1
  )


def attend(
  q: jax.Array,  # [B, M, Q, H, E], scaled, RoPE applied; the last Q of R rows
  k: jax.Array,  # [B, M, R, K, E], RoPE applied
  v: jax.Array,  # [B, M, R, K, E]
  rows: QueryLayout,
  cache: KVCache | None,  # one layer's: keys and values [B, S, K, E]
  *,
  window: jax.Array | int | None,
  softcap: float,
  kernel: Kernel,
  bias: jax.Array | None = None,  # [B, M, R, K] float32
) -> jax.Array:  # [B, M, Q, H, E]
  """Grouped-query attention over [cache | own block], softmax in float32.

  `bias` is added to every score of the block's own keys, after any soft cap.
  """
  b, m, r, h, e = q.shape
  heads, first = k.shape[3], k.shape[2] - r
  query_layout = jax.tree.map(
    lambda x: x if x.shape[2] == 1 else x[:, :, first:], rows
  )
  q = q.reshape(b, m, r, heads, h // heads, e)
  q = q.transpose(0, 3, 1, 2, 4, 5)  # [B, K, M, Q, G, E]
  k, v = (x.transpose(0, 3, 1, 2, 4) for x in (k, v))  # [B, K, M, R, E]
  if bias is not None:
    bias = bias.transpose(0, 3, 1, 2)[:, :, :, None, None]
  own_mask = block_mask(rows, window)[:, :, first:]
  context = None
  if cache is not None:
    context = [x.swapaxes(1, 2) for x in (cache.keys, cache.values)]
  if rows.context_start is None or kernel.name == "plain":
    if cache is not None:
      context.append(context_mask(query_layout, cache, window))
    out = _attend(q, k, v, own_mask, bias, context, softcap)
  elif cache is not None:
    interval = _interval(query_layout, window)
    args = q, k, v, *context, *interval, own_mask, bias
    out = _joint(*args, softcap, kernel)
  else:
    # A context that reads itself: each row up to its own slot.
    interval = _interval(
      query_layout.replace(context_limit=query_layout.positions), window
    )
    args = _merge(q), k[:, :, 0], v[:, :, 0], *(_repeat(x, q) for x in interval)
    out, _ = kernel.forward(*args, softcap=softcap)
    out = out.reshape(q.shape).astype(v.dtype)
  return out.transpose(0, 2, 3, 1, 4, 5).reshape(b, m, r, h, e)
