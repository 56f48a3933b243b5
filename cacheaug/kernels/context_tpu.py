"""Attention of rows over intervals of a constant context, on TPU (Pallas).

These kernels compute the context part of the structured attention: many rows,
each of which sees one interval of the context's slots (kernels/intervals.py);
keys and values are constants. Mosaic lowers them. Tests compare their numbers
in interpret mode, and tests/compile_kernels.py compiles them for v5e, v5p and
v6e; **no TPU has run them.**

Splash attention (jax.experimental.pallas.ops.tpu.splash_attention) has soft
cap, GQA and head_dim 256 too. It costs more, per (row, slot) pair and unit of
head_dim, at 2 FLOP a product:

                         splash                        here
  forward                2 products                    2 products
  backward               7: scores and dP twice, as    3: scores, dP, dQ. The
                         dQ and dK/dV are separate     context is a constant:
                         kernels (5 when fused)        dK and dV do not exist
  mask                   a mask known on the device    two int32 a row, and two
                         only, as random points make   comparisons a score
                         it, is an array of one byte
                         a pair, cut into tiles and
                         read again by each kernel
  keys of a query group  read once for each of the G   read once: the group's
                         query heads                   heads are rows
  the own block          appended to keys and mask:    joined outside by
                         its log-sum-exp output has    log-sum-exp
                         no gradient

The grid is (B, K, blocks of rows, chunks of keys), the chunks innermost. A
chunk is what is fetched at once, all keys of S = 2048 at Gemma's shapes, so
that they are fetched once a key head; a loop inside walks the blocks of it
that the rows need. Chunks that no row needs are neither computed nor fetched:
step j names chunk `first chunk + j`, and beyond the last one that last again,
which is there already.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cacheaug.kernels import intervals
from cacheaug.kernels.intervals import BITS, LOWEST, MASKED, dot, masked_scores

LANES = 128  # of a vector register; a tile's last axis is a multiple of it

# Rows by keys of one tile of scores. Small tiles follow the staircase closely:
# of all pairs 62 % are computed with this one, 68 % with 512 x 512, 50 % needed
# (tests/compile_kernels.py). Large ones keep the matrix unit busy: libtpu's
# schedule for v5e puts a tile's other work into 1,090 bundles forward and
# 1,462 backward beside products of 1,024 and 1,536 cycles (head_dim 256,
# bfloat16); half the keys would still need 850.
BLOCK_Q = 512
BLOCK_K = 256
# Keys of one chunk, and as many values: two of each in flight are 4 MiB of the
# 16 MiB that a kernel gets by default.
CHUNK_BYTES = 2**20


def supported(head_dim: int, dtype: jnp.dtype) -> str | None:
  """The reason why these kernels do not support the shapes, or None."""
  return intervals.unsupported(head_dim, dtype)


def _column(row):
  """Row numbers [1, q] as [q, LANES], equal along the lanes.

  Rows lie along the lanes in memory, 128 times smaller than columns would be;
  turning them once a row block is cheap, once a tile is not.
  """
  return jnp.broadcast_to(jnp.expand_dims(row[0], -1), (row.shape[1], LANES))


def _wide(column, width):
  """[q, LANES] of equal lanes as [q, width], without moving data."""
  return jnp.tile(column, (1, pl.cdiv(width, LANES)))[:, :width]


def _scores(q, keys, block, low, high, softcap):
  """`masked_scores` of a tile."""
  products = dot(q, keys, transposed=True)
  low, high = (_wide(x[...], products.shape[1]) for x in (low, high))
  return masked_scores(products, block, low, high, softcap)


def _chunk(first, j, blocks):
  """The chunk of step j, `blocks` key blocks each, from a row block's first."""
  return jax.lax.div(first, blocks) + j


def _walk(first, last, keys_ref, values_ref, block_k, add):
  """Calls add(block, keys, values) for this chunk's blocks in [first, last)."""
  row_block = pl.program_id(0), pl.program_id(2)
  blocks = keys_ref.shape[0] // block_k
  begin = _chunk(first[row_block], pl.program_id(3), blocks) * blocks

  def step(block, _):
    slots = pl.ds(pl.multiple_of((block - begin) * block_k, block_k), block_k)
    add(block, keys_ref[slots, :], values_ref[slots, :])

  low = jnp.maximum(first[row_block], begin)
  high = jnp.minimum(last[row_block], begin + blocks)
  jax.lax.fori_loop(low, high, step, None)


def _forward_kernel(
  first,  # [B, blocks] in scalar memory, as is last
  last,
  q_ref,  # [q, E]
  keys_ref,  # [chunk, E], as are values
  values_ref,
  start_ref,  # [1, q]
  stop_ref,  # [1, q]
  out_ref,  # [q, E] float32, the running sum
  lse_ref,  # [1, q] float32
  low,  # [q, LANES] int32, as is high
  high,
  top,  # [q, LANES] float32, running maximum and sum of exponentials
  total,
  *,
  softcap,
  block_k,
):
  j = pl.program_id(3)

  @pl.when(j == 0)
  def _begin():
    low[...] = _column(start_ref[...])
    high[...] = _column(stop_ref[...])
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    out_ref[...] = jnp.zeros_like(out_ref)

  def add(block, keys, values):
    q = q_ref[...]
    scores, _ = _scores(q, keys, block, low, high, softcap)
    before = top[...]
    new_top = jnp.maximum(before, scores.max(1, keepdims=True))
    p = jnp.exp2(scores - _wide(new_top, scores.shape[1]))
    shrink = jnp.exp2(before - new_top)
    top[...] = new_top
    total[...] = total[...] * shrink + p.sum(1, keepdims=True)
    out_ref[...] = out_ref[...] * _wide(shrink, q.shape[1]) + dot(
      p.astype(values.dtype), values
    )

  _walk(first, last, keys_ref, values_ref, block_k, add)

  @pl.when(j == pl.num_programs(3) - 1)
  def _end():
    empty = total[...] == 0
    sums = jnp.where(empty, 1.0, total[...])
    out_ref[...] *= _wide(1 / sums, out_ref.shape[1])
    lse = jnp.where(empty, MASKED, top[...] / BITS + jnp.log(sums))
    lse_ref[...] = lse.T[:1]


def _dq_kernel(
  first,  # [B, blocks] in scalar memory, as is last
  last,
  q_ref,  # [q, E]
  keys_ref,  # [chunk, E], as are values
  values_ref,
  start_ref,  # [1, q], as are stop, lse, delta
  stop_ref,
  lse_ref,
  delta_ref,
  dout_ref,  # [q, E]
  dq_ref,  # [q, E] float32, the running sum
  low,  # [q, LANES], as are high, lse, delta
  high,
  lse,
  delta,
  *,
  softcap,
  block_k,
):
  j = pl.program_id(3)

  @pl.when(j == 0)
  def _begin():
    low[...] = _column(start_ref[...])
    high[...] = _column(stop_ref[...])
    # The lse of a row that sees nothing is MASKED, as its scores are.
    lse[...] = jnp.maximum(_column(lse_ref[...]) * BITS, LOWEST)
    delta[...] = _column(delta_ref[...])
    dq_ref[...] = jnp.zeros_like(dq_ref)

  def add(block, keys, values):
    q = q_ref[...]
    scores, slope = _scores(q, keys, block, low, high, softcap)
    width = scores.shape[1]
    p = jnp.exp2(scores - _wide(lse[...], width))
    dp = dot(dout_ref[...], values, transposed=True)
    ds = p * (dp - _wide(delta[...], width))
    if softcap:
      ds *= slope
    dq_ref[...] += dot(ds.astype(keys.dtype), keys)

  _walk(first, last, keys_ref, values_ref, block_k, add)


def _chunks(keys, block_k, chunk_k):
  """Number of chunks of at most chunk_k keys, and the blocks in each."""
  fitting = chunk_k or CHUNK_BYTES // (keys.shape[3] * keys.dtype.itemsize)
  blocks = pl.cdiv(keys.shape[2], block_k)
  chunks = pl.cdiv(blocks, max(1, fitting // block_k))
  return chunks, pl.cdiv(blocks, chunks)


def _specs(e, block_q, block_k, blocks):
  """Block specs of queries, keys, row numbers [B, 1, Q] and [B, K, 1, Q]."""

  def key_index(b, h, i, j, first, last):
    end = jnp.maximum(last[b, i] - 1, 0)
    chunk = _chunk(first[b, i], j, blocks)
    return b, h, jnp.minimum(chunk, jax.lax.div(end, blocks)), 0

  return (
    pl.BlockSpec((None, None, block_q, e), lambda b, h, i, *_: (b, h, i, 0)),
    pl.BlockSpec((None, None, blocks * block_k, e), key_index),
    pl.BlockSpec((None, 1, block_q), lambda b, h, i, *_: (b, 0, i)),
    pl.BlockSpec((None, None, 1, block_q), lambda b, h, i, *_: (b, h, 0, i)),
  )


def _fit(rows, block_q):
  """Rows of a tile: no more than there are, in whole vector registers.

  Queries may end inside the last row block. The rows beyond them hold arbitrary
  numbers, which reach no other row and are not written back: q is never copied.
  """
  return min(block_q, pl.cdiv(rows, LANES) * LANES)


_PARAMS = pltpu.CompilerParams(
  dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
)


@functools.partial(
  jax.jit,
  static_argnames=("softcap", "interpret", "block_q", "block_k", "chunk_k"),
)
def forward(
  q: jax.Array,  # [B, K, Q, E], scaled
  keys: jax.Array,  # [B, K, S, E]
  values: jax.Array,  # [B, K, S, E]
  start: jax.Array,  # [B, Q] int32
  stop: jax.Array,  # [B, Q] int32
  *,
  softcap: float,
  interpret: bool = False,
  block_q: int = BLOCK_Q,
  block_k: int = BLOCK_K,
  chunk_k: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Softmax over each row's interval of the context, and its log-sum-exp.

  Args:
    q: rows of all traces and of the query heads of one key head. Any number;
      traces sorted by point, so that neighbours need the same keys.
    keys: of the context; constants, as are `values`.
    values: of the context.
    start: first slot that a row sees.
    stop: one past the last; a row with stop <= start sees nothing.
    softcap: scores become softcap * tanh(scores / softcap); 0 for none.
    interpret: compute without a TPU, slowly.
    block_q: rows of a tile, a multiple of 128 on a TPU.
    block_k: keys of a tile, a multiple of 128.
    chunk_k: keys fetched at once; None for CHUNK_BYTES of them.

  Returns:
    out [B, K, Q, E] float32, 0 where a row sees nothing, and lse [B, K, Q]
    float32, MASKED there.
  """
  block_q = _fit(q.shape[2], block_q)
  chunks, blocks = _chunks(keys, block_k, chunk_k)
  keys, values = (intervals.pad(x, 2, blocks * block_k) for x in (keys, values))
  start, stop = (intervals.pad(x, 1, block_q) for x in (start, stop))
  q_spec, key_spec, row_spec, head_spec = _specs(
    q.shape[3], block_q, block_k, blocks
  )
  column = functools.partial(pltpu.VMEM, (block_q, LANES))
  lse_shape = *q.shape[:2], 1, start.shape[1]
  out, lse = pl.pallas_call(
    functools.partial(_forward_kernel, softcap=softcap, block_k=block_k),
    out_shape=(
      intervals.shape_like(q, q.shape, jnp.float32),
      intervals.shape_like(q, lse_shape, jnp.float32),
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(*q.shape[:2], pl.cdiv(q.shape[2], block_q), chunks),
      in_specs=[q_spec, key_spec, key_spec, row_spec, row_spec],
      out_specs=[q_spec, head_spec],
      scratch_shapes=[
        *(column(jnp.int32) for _ in range(2)),
        *(column(jnp.float32) for _ in range(2)),
      ],
    ),
    compiler_params=_PARAMS,
    cost_estimate=intervals.cost(q, keys, 2),
    interpret=interpret,
    name="context_forward",
  )(
    *intervals.block_bounds(start, stop, block_q, block_k),
    q,
    keys,
    values,
    start[:, None],
    stop[:, None],
  )
  return out, lse[:, :, 0, : q.shape[2]]


@functools.partial(
  jax.jit,
  static_argnames=("softcap", "interpret", "block_q", "block_k", "chunk_k"),
)
def backward_dq(
  q: jax.Array,  # [B, K, Q, E], scaled
  keys: jax.Array,  # [B, K, S, E]
  values: jax.Array,  # [B, K, S, E]
  start: jax.Array,  # [B, Q] int32
  stop: jax.Array,  # [B, Q] int32
  lse: jax.Array,  # [B, K, Q] float32
  delta: jax.Array,  # [B, K, Q] float32
  dout: jax.Array,  # [B, K, Q, E]
  *,
  softcap: float,
  interpret: bool = False,
  block_q: int = BLOCK_Q,
  block_k: int = BLOCK_K,
  chunk_k: int | None = None,
) -> jax.Array:  # [B, K, Q, E] float32
  """The context's share of the gradient with respect to q.

  p = exp(s - lse) on the interval, ds = p (dout . v - delta) times the soft
  cap's 1 - (s / softcap)^2, dq = ds @ keys. This is FlashAttention's backward
  pass with the `lse` and `delta` of the whole softmax, over context and own
  block together, as in ring attention; the other arguments are `forward`'s.

  Args:
    q: as in `forward`, as are the next four.
    keys: of the context.
    values: of the context.
    start: first slot that a row sees.
    stop: one past the last.
    lse: log-sum-exp of all scores of the row, wherever they were computed.
    delta: sum of dout * out over E, out being the row's joined output.
    dout: gradient of that output; rounded to the values' dtype.
    softcap: 0 for none.
    interpret: compute without a TPU, slowly.
    block_q: rows of a tile, a multiple of 128 on a TPU.
    block_k: keys of a tile, a multiple of 128.
    chunk_k: keys fetched at once; None for CHUNK_BYTES of them.
  """
  block_q = _fit(q.shape[2], block_q)
  chunks, blocks = _chunks(keys, block_k, chunk_k)
  keys, values = (intervals.pad(x, 2, blocks * block_k) for x in (keys, values))
  start, stop = (intervals.pad(x, 1, block_q) for x in (start, stop))
  lse, delta = (intervals.pad(x, 2, block_q) for x in (lse, delta))
  q_spec, key_spec, row_spec, head_spec = _specs(
    q.shape[3], block_q, block_k, blocks
  )
  column = functools.partial(pltpu.VMEM, (block_q, LANES))
  return pl.pallas_call(
    functools.partial(_dq_kernel, softcap=softcap, block_k=block_k),
    out_shape=intervals.shape_like(q, q.shape, jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(*q.shape[:2], pl.cdiv(q.shape[2], block_q), chunks),
      in_specs=[
        *(q_spec, key_spec, key_spec, row_spec, row_spec),
        *(head_spec, head_spec, q_spec),
      ],
      out_specs=q_spec,
      scratch_shapes=[
        *(column(jnp.int32) for _ in range(2)),
        *(column(jnp.float32) for _ in range(2)),
      ],
    ),
    compiler_params=_PARAMS,
    cost_estimate=intervals.cost(q, keys, 3),
    interpret=interpret,
    name="context_dq",
  )(
    *intervals.block_bounds(start, stop, block_q, block_k),
    q,
    keys,
    values,
    start[:, None],
    stop[:, None],
    lse[:, :, None],
    delta[:, :, None],
    dout.astype(values.dtype),
  )
