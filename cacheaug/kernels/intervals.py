"""Helpers of the context kernels: each row sees one interval of slots.

A row of a trace sees the context slots start <= s < stop and no others: its
point ends the interval; a packed document or a sliding window begins it. So a
mask is two integers a row, and only the tiles of scores that some row's
interval reaches into are computed:

    slots       0 . . . 4 . . . 8 . . .      block_q = 2, block_k = 4
    row 0 [0, 2)  # #     |       |          first 0, last 1: one tile
    row 1 [1, 4)    # # # |       |
    row 2 [2, 6)      # # | # #   |          first 0, last 2: two tiles
    row 3 [3, 7)        # | # # # |
    row 4 [5, 9)          |   # # | #        first 1, last 3: two tiles
    row 5 [5, 5)          |       |          sees nothing, counts for nothing
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from cacheaug.kernels.context_attention import MASKED

# Where a running maximum starts: far below every score, far above MASKED, so
# that exp(MASKED - maximum) is 0 even where a row has seen nothing yet.
LOWEST = -1.0e38

# The processors' exponential is to base 2: inside the kernels scores are in
# bits, which costs nothing where a soft cap multiplies them anyway.
BITS = math.log2(math.e)

HEAD_DIMS = (64, 128, 256)


def unsupported(head_dim: int, dtype: jnp.dtype) -> str | None:
  """The reason why no kernel supports these shapes, or None."""
  if head_dim not in HEAD_DIMS:
    return f"head_dim {head_dim} is none of {HEAD_DIMS}"
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"dtype {jnp.dtype(dtype).name} is neither float32 nor bfloat16"
  return None


def block_bounds(
  start: jax.Array,  # [B, Q] int32
  stop: jax.Array,  # [B, Q] int32
  block_q: int,
  block_k: int,
) -> tuple[jax.Array, jax.Array]:  # 2 x [B, Q / block_q] int32
  """First block of keys that a block of rows needs, and one past its last.

  The two are equal where no row sees anything. Rows whose intervals lie far
  apart should not share a block: sort the traces by point.
  """
  blocks = start.shape[0], -1, block_q
  empty = stop <= start
  start = jnp.where(empty, jnp.iinfo(jnp.int32).max, start)
  stop = jnp.where(empty, 0, stop)
  last = -(-stop.reshape(blocks).max(-1) // block_k)
  first = jnp.minimum(start.reshape(blocks).min(-1) // block_k, last)
  return first.astype(jnp.int32), last.astype(jnp.int32)


def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
  """Appends zeros to x along `axis` up to a multiple; x itself if it is one.

  A row of zeros has the interval [0, 0) and sees nothing; a key of zeros lies
  beyond every interval.
  """
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths)


def shape_like(
  x: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.ShapeDtypeStruct:
  """A kernel's result that varies over the same mesh axes as an operand [...].

  Without it a kernel inside shard_map is refused (check_vma).
  """
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def cost(
  q: jax.Array,  # [B, K, Q, E]
  keys: jax.Array,  # [B, K, S, E]
  matmuls: int,
) -> pl.CostEstimate:
  """Cost of a kernel with `matmuls` products a tile, for XLA's scheduler.

  Half of all pairs: uniform points see half of the context on average. The
  true share is known on the device only.
  """
  pairs = math.prod(q.shape[:-1]) * keys.shape[2] // 2
  size = q.size * (q.dtype.itemsize + 4) + 2 * keys.size * keys.dtype.itemsize
  return pl.CostEstimate(
    flops=2 * matmuls * pairs * q.shape[-1],
    transcendentals=2 * pairs,
    bytes_accessed=size,
  )


def masked_scores(
  products: jax.Array,  # [q, k] float32, q @ keys
  block: jax.Array,  # [] int32, which block of k keys
  start: jax.Array,  # [q, k] or [q, 1] int32
  stop: jax.Array,  # [q, k] or [q, 1] int32
  softcap: float,
  tanh: Callable[[jax.Array], jax.Array] = jnp.tanh,
  iota: Callable[..., jax.Array] = jax.lax.broadcasted_iota,
) -> tuple[jax.Array, jax.Array | None]:
  """A tile's scores in bits, MASKED beyond the intervals, and the cap's slope.

  The slope is d score / d product = 1 - (s / softcap)^2, None without a cap.
  """
  slope = None
  if softcap:
    capped = tanh(products * (1 / softcap))
    slope = 1 - capped * capped
    scores = capped * (softcap * BITS)
  else:
    scores = products * BITS
  slots = iota(jnp.int32, scores.shape, 1)
  slots += block * scores.shape[1]
  # Every tile is masked, not only those at an interval's end: four vector
  # operations a score, which on v5e and v5p hide behind the matrix unit.
  seen = (slots >= start) & (slots < stop)
  return jnp.where(seen, scores, MASKED), slope


def dot(a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
  """Product of a [m, e] and b [e, n] (or [n, e], transposed), in float32.

  float32 operands are not rounded, bfloat16 ones go through once, whatever the
  session's default precision is.
  """
  exact = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((1,), (1 if transposed else 0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
    preferred_element_type=jnp.float32,
  )
