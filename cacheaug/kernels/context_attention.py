"""Attention of many rows over one frozen context, in tiles.

This module computes the context part of passes 1 to 3. Each row sees the slots
start <= s < stop of a cache: a trace's point, a packed document and a sliding
window are all such intervals. Rows are sorted by their points, so that
neighbouring rows need few of the context's tiles; the others are skipped: rows
of a later trace see a longer part of the context, so the tiles needed have the
shape of stairs. The context is a constant: its keys and values get no gradient,
so a tile costs three products in the backward pass and not five.

The XLA form here runs on a CPU, and is the reference of the kernels in
context_tpu.py and context_gpu.py, which have the same two functions.
"""

import jax
import jax.numpy as jnp

# Finite, so that a row that sees nothing (padding) gives no NaN.
MASKED = -2.0e38

# A tile is ROWS x SLOTS scores for each sequence and key head: on a CPU it
# should stay in the cache between the products that write and read it.
ROWS = 1024
SLOTS = 256


def forward(
  q: jax.Array,  # [B, K, Q, E], scaled; Q = M R G, sorted by trace
  keys: jax.Array,  # [B, K, S, E]
  values: jax.Array,  # [B, K, S, E]
  start: jax.Array,  # [B, Q] first slot that a row sees
  stop: jax.Array,  # [B, Q] the slot after its last; empty where <= start
  *,
  softcap: float,
) -> tuple[jax.Array, jax.Array]:
  """Softmax over the interval times values [B, K, Q, E]; log-sum-exp [B, K, Q].

  Both are float32; a row that sees nothing has 0 and MASKED.
  """

  def tile(carry, rows, slots):
    q, start, stop = rows
    keys, values, slot = slots
    top, total, out = carry
    scores, seen = _scores(q, keys, start, stop, slot, softcap)
    higher = jnp.maximum(top, jnp.where(seen, scores, MASKED).max(-1))
    weights = jnp.where(seen, jnp.exp(scores - higher[..., None]), 0.0)
    shrink = jnp.exp(top - higher)
    total = total * shrink + weights.sum(-1)
    out = out * shrink[..., None] + _product(
      "bkqt,bkte->bkqe", weights.astype(values.dtype), values
    )
    return higher, total, out

  def begin(rows):
    shape = rows[0].shape
    flat = jnp.zeros(shape[:-1], jnp.float32)
    return flat + MASKED, flat, jnp.zeros(shape, jnp.float32)

  def finish(carry):
    top, total, out = carry
    sees_any = total > 0
    total = jnp.where(sees_any, total, 1.0)
    lse = jnp.where(sees_any, top + jnp.log(total), MASKED)
    return out / total[..., None], lse

  rows = q, start, stop
  return _over_tiles(tile, begin, finish, rows, keys, values, start, stop)


def backward_dq(
  q: jax.Array,  # [B, K, Q, E]
  keys: jax.Array,  # [B, K, S, E]
  values: jax.Array,  # [B, K, S, E]
  start: jax.Array,  # [B, Q]
  stop: jax.Array,  # [B, Q]
  lse: jax.Array,  # [B, K, Q] over the context and the row's own block
  delta: jax.Array,  # [B, K, Q] sum of out * dout over E, out of both too
  dout: jax.Array,  # [B, K, Q, E]
  *,
  softcap: float,
) -> jax.Array:  # [B, K, Q, E] float32
  """The context's part of the gradient of q."""

  def tile(dq, rows, slots):
    q, start, stop, lse, delta, dout = rows
    keys, values, slot = slots
    scores, seen = _scores(q, keys, start, stop, slot, softcap)
    weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0.0)
    back = _product("bkqe,bkte->bkqt", dout, values) - delta[..., None]
    back *= weights
    if softcap:
      back *= 1.0 - (scores / softcap) ** 2
    return dq + _product("bkqt,bkte->bkqe", back.astype(keys.dtype), keys)

  def begin(rows):
    return jnp.zeros(rows[0].shape, jnp.float32)

  rows = q, start, stop, lse, delta, dout.astype(values.dtype)
  return _over_tiles(
    tile, begin, lambda dq: dq, rows, keys, values, start, stop
  )


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _scores(q, keys, start, stop, slot, softcap):
  """Scores [B, K, q, t] of a tile, and the mask of those that rows see."""
  scores = _product("bkqe,bkte->bkqt", q, keys)
  if softcap:
    scores = softcap * jnp.tanh(scores / softcap)
  slot = slot[None, None]
  seen = (start[..., None] <= slot) & (slot < stop[..., None])
  return scores, seen[:, None]


def _last(stop, slots):
  """Index of the tile after the last one that any of these rows sees."""
  return -(-stop.max() // slots)


def _over_tiles(tile, begin, finish, rows, keys, values, start, stop):
  """Applies `tile` to groups of rows and, for each, the tiles that it sees.

  rows: arrays [B, Q] or [B, K, Q, ...]. The results of `finish` are joined
  along Q.
  """
  b, heads, q, _ = rows[0].shape
  s = keys.shape[2]
  if q <= ROWS and s <= SLOTS:
    slots = keys, values, jnp.arange(s)
    return finish(tile(begin(rows), rows, slots))
  groups = -(-q // ROWS)
  size = -(-q // groups)
  slots = min(SLOTS, s)

  def split(x):  # [B, (K,) Q, ...] -> [groups, B, (K,) size, ...]
    axis = 1 if x.ndim == 2 else 2
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, groups * size - q)
    x = jnp.pad(x, pad).reshape(
      *x.shape[:axis], groups, size, *x.shape[axis + 1 :]
    )
    return jnp.moveaxis(x, axis, 0)

  def join(x):  # [groups, B, K, size, ...] -> [B, K, Q, ...]
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(b, heads, groups * size, *x.shape[4:])[:, :, :q]

  pad = ((0, 0), (0, 0), (0, -s % slots), (0, 0))
  keys, values = jnp.pad(keys, pad), jnp.pad(values, pad)

  def attend_group(args):
    rows, start, stop = args
    sees_any = start < stop
    first = jnp.where(sees_any, start, s).min() // slots
    last = _last(jnp.where(sees_any, stop, 0), slots)

    def body(i, carry):
      def cut(x):
        return jax.lax.dynamic_slice_in_dim(x, i * slots, slots, 2)

      slot = i * slots + jnp.arange(slots)
      return tile(carry, rows, (cut(keys), cut(values), slot))

    return finish(jax.lax.fori_loop(first, last, body, begin(rows)))

  args = jax.tree.map(split, (rows, start, stop))
  return jax.tree.map(join, jax.lax.map(attend_group, args))
