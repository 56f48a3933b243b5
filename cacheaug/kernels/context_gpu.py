"""Attention of rows over intervals of a constant context, on GPU (Pallas).

The mathematics and the interface are those of kernels/context_tpu.py; Pallas
lowers these kernels to Triton. **No GPU has run them.** Tests compare their
numbers in interpret mode, and tests/compile_kernels.py compiles them for an
H100 without one, through the same XLA that would run them there.

This package has its own kernels because cuDNN's attention has no soft cap,
tokamax's backward pass is slow at head_dim 256, and all of them compute the
context's dK and dV, which nobody needs here: 3 products in the backward pass,
not 5.

One program computes one block of rows of one key head, over the key blocks from
the first to the last one that any of its rows sees. The grid starts with the
last blocks of rows: traces are sorted by point, so these have the most work,
and the short blocks fill the gaps at the end.

jax 0.11 deprecates Pallas' Triton backend in favour of the Mosaic GPU one. It
works up to jax 0.12.0.1, the newest tried. context_mosaic.py has the kernels of
the other backend, for bfloat16 on Hopper.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from cacheaug.kernels import intervals
from cacheaug.kernels.intervals import BITS, LOWEST, MASKED, dot, masked_scores


def supported(
  head_dim: int, dtype: jnp.dtype, compute_capability: str | None = None
) -> str | None:
  """The reason why these kernels do not support shapes or device, or None.

  Args:
    head_dim: E.
    dtype: of q, keys and values.
    compute_capability: as jax.Device has it, "9.0" for an H100 or H200; None
      asks the first device of this process.
  """
  if compute_capability is None:
    device = jax.local_devices()[0]
    # Absent on what is not a GPU: compiling for one from elsewhere.
    compute_capability = getattr(device, "compute_capability", "9.0")
  if compute_capability.split(".")[0] not in ("9", "10"):
    return (
      "the tiles need the 227 KB of shared memory of compute capability 9 or "
      f"10, not {compute_capability}"
    )
  return intervals.unsupported(head_dim, dtype)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Rows and keys of a tile, and Triton's parameters for it."""

  q: int
  k: int
  warps: int
  stages: int  # of keys and values, loaded ahead of their use

  @property
  def params(self) -> plgpu.CompilerParams:
    """Compiler parameters that Pallas passes to Triton."""
    return plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages)


# bfloat16 tiles by head_dim. Triton 3.6 and ptxas report for compute capability
# 9.0: KB of shared memory (of 227), registers a thread, bytes spilled. All of
# them use the warpgroup products.
_FORWARD = {
  64: Tiles(128, 128, 8, 3),  # 112 KB, 164, 0
  128: Tiles(128, 128, 8, 2),  # 160 KB, 249, 0
  256: Tiles(128, 64, 8, 2),  # 192 KB, 255, 472; 128 x 32 spills 376
}
_BACKWARD = {
  64: Tiles(128, 64, 8, 3),  # 80 KB, 155, 0
  128: Tiles(128, 64, 8, 2),  # 128 KB, 192, 0
  256: Tiles(64, 64, 8, 2),  # 192 KB, 211, 0; with 4 warps 572 spilled
}
# float32 serves comparisons, not speed: its products are exact and so cannot
# use the matrix units. At head_dim 256 the backward pass spills 1 KB.
_FORWARD_FLOAT32 = Tiles(64, 32, 8, 2)
_BACKWARD_FLOAT32 = Tiles(32, 32, 4, 2)


def _tanh(x, dtype, interpret):
  """The cap's tanh.

  For bfloat16 operands it is one instruction, off by 2^-11 of its value at
  most; the score itself carries more from the rounding of q and keys (2^-9
  each). FlashAttention caps in the same way.
  """
  if dtype == jnp.float32 or interpret:
    return jnp.tanh(x)
  return plgpu.approx_tanh(x)


def _scores(q, keys, block, low, high, softcap, interpret):
  """`masked_scores` of a tile."""
  products = dot(q, keys, transposed=True)
  tanh = functools.partial(_tanh, dtype=q.dtype, interpret=interpret)
  return masked_scores(
    products, block, low[:, None], high[:, None], softcap, tanh
  )


def _forward_kernel(
  first_ref,  # [], as is last: this row block's
  last_ref,
  q_ref,  # [q, E]
  keys_ref,  # [S, E], as are values
  values_ref,
  start_ref,  # [q], as is stop
  stop_ref,
  out_ref,  # [q, E] float32
  lse_ref,  # [q] float32
  *,
  block_k,
  softcap,
  interpret,
):
  q, low, high = q_ref[...], start_ref[...], stop_ref[...]

  def add(block, carry):
    top, total, out = carry
    keys = keys_ref[pl.ds(block * block_k, block_k), :]
    scores, _ = _scores(q, keys, block, low, high, softcap, interpret)
    new_top = jnp.maximum(top, scores.max(1))
    p = jnp.exp2(scores - new_top[:, None])
    shrink = jnp.exp2(top - new_top)
    values = values_ref[pl.ds(block * block_k, block_k), :]
    out = out * shrink[:, None] + dot(p.astype(values.dtype), values)
    return new_top, total * shrink + p.sum(1), out

  top, total, out = jax.lax.fori_loop(
    first_ref[...],
    last_ref[...],
    add,
    (
      jnp.full(q.shape[:1], LOWEST, jnp.float32),
      jnp.zeros(q.shape[:1], jnp.float32),
      jnp.zeros(q.shape, jnp.float32),
    ),
  )
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  out_ref[...] = out / total[:, None]
  lse_ref[...] = jnp.where(empty, MASKED, (top + jnp.log2(total)) / BITS)


def _dq_kernel(
  first_ref,  # [], as is last: this row block's
  last_ref,
  q_ref,  # [q, E]
  keys_ref,  # [S, E], as are values
  values_ref,
  start_ref,  # [q], as are stop, lse and delta
  stop_ref,
  lse_ref,
  delta_ref,
  dout_ref,  # [q, E]
  dq_ref,  # [q, E] float32
  *,
  block_k,
  softcap,
  interpret,
):
  q, dout = q_ref[...], dout_ref[...]
  low, high, delta = start_ref[...], stop_ref[...], delta_ref[...]
  # The lse of a row that sees nothing is MASKED, as its scores are.
  lse = jnp.maximum(lse_ref[...] * BITS, LOWEST)

  def add(block, dq):
    keys = keys_ref[pl.ds(block * block_k, block_k), :]
    scores, slope = _scores(q, keys, block, low, high, softcap, interpret)
    p = jnp.exp2(scores - lse[:, None])
    values = values_ref[pl.ds(block * block_k, block_k), :]
    ds = p * (dot(dout, values, transposed=True) - delta[:, None])
    if softcap:
      ds *= slope
    return dq + dot(ds.astype(keys.dtype), keys)

  dq_ref[...] = jax.lax.fori_loop(
    first_ref[...], last_ref[...], add, jnp.zeros(q.shape, jnp.float32)
  )


def _specs(q, keys, block_q):
  """The grid, and block specs of bounds, queries, keys, row numbers [B, Q]
  and row numbers [B, K, Q].
  """
  b, k, rows, e = q.shape
  blocks = rows // block_q

  def from_last(i):
    return blocks - 1 - i

  return (
    (blocks, k, b),
    pl.BlockSpec((None, None), lambda i, h, b: (b, from_last(i))),
    pl.BlockSpec(
      (None, None, block_q, e), lambda i, h, b: (b, h, from_last(i), 0)
    ),
    pl.BlockSpec((None, None, keys.shape[2], e), lambda i, h, b: (b, h, 0, 0)),
    pl.BlockSpec((None, block_q), lambda i, h, b: (b, from_last(i))),
    pl.BlockSpec((None, None, block_q), lambda i, h, b: (b, h, from_last(i))),
  )


@functools.partial(jax.jit, static_argnames=("softcap", "interpret", "tiles"))
def forward(
  q: jax.Array,  # [B, K, Q, E], scaled
  keys: jax.Array,  # [B, K, S, E]
  values: jax.Array,  # [B, K, S, E]
  start: jax.Array,  # [B, Q] int32
  stop: jax.Array,  # [B, Q] int32
  *,
  softcap: float,
  interpret: bool = False,
  tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array]:
  """As `context_tpu.forward`: out [B, K, Q, E] and lse [B, K, Q], float32."""
  exact = q.dtype == jnp.float32
  tiles = tiles or (_FORWARD_FLOAT32 if exact else _FORWARD[q.shape[3]])
  rows = q.shape[2]
  q = intervals.pad(q, 2, tiles.q)
  keys, values = (intervals.pad(x, 2, tiles.k) for x in (keys, values))
  start, stop = (intervals.pad(x, 1, tiles.q) for x in (start, stop))
  grid, bound_spec, q_spec, key_spec, row_spec, head_spec = _specs(
    q, keys, tiles.q
  )
  out, lse = pl.pallas_call(
    functools.partial(
      _forward_kernel, block_k=tiles.k, softcap=softcap, interpret=interpret
    ),
    out_shape=(
      intervals.shape_like(q, q.shape, jnp.float32),
      intervals.shape_like(q, q.shape[:-1], jnp.float32),
    ),
    grid=grid,
    in_specs=[
      *(bound_spec, bound_spec, q_spec, key_spec, key_spec),
      *(row_spec, row_spec),
    ],
    out_specs=[q_spec, head_spec],
    compiler_params=tiles.params,
    cost_estimate=intervals.cost(q, keys, 2),
    interpret=interpret,
    name="context_forward",
  )(
    *intervals.block_bounds(start, stop, tiles.q, tiles.k),
    q,
    keys,
    values,
    start,
    stop,
  )
  return out[:, :, :rows], lse[:, :, :rows]


@functools.partial(jax.jit, static_argnames=("softcap", "interpret", "tiles"))
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
  tiles: Tiles | None = None,
) -> jax.Array:  # [B, K, Q, E] float32
  """As `context_tpu.backward_dq`: the context's share of q's gradient."""
  exact = q.dtype == jnp.float32
  tiles = tiles or (_BACKWARD_FLOAT32 if exact else _BACKWARD[q.shape[3]])
  rows = q.shape[2]
  dout = dout.astype(values.dtype)
  q, lse, delta, dout = (
    intervals.pad(x, 2, tiles.q) for x in (q, lse, delta, dout)
  )
  keys, values = (intervals.pad(x, 2, tiles.k) for x in (keys, values))
  start, stop = (intervals.pad(x, 1, tiles.q) for x in (start, stop))
  grid, bound_spec, q_spec, key_spec, row_spec, head_spec = _specs(
    q, keys, tiles.q
  )
  dq = pl.pallas_call(
    functools.partial(
      _dq_kernel, block_k=tiles.k, softcap=softcap, interpret=interpret
    ),
    out_shape=intervals.shape_like(q, q.shape, jnp.float32),
    grid=grid,
    in_specs=[
      *(bound_spec, bound_spec, q_spec, key_spec, key_spec),
      *(row_spec, row_spec, head_spec, head_spec, q_spec),
    ],
    out_specs=q_spec,
    compiler_params=tiles.params,
    cost_estimate=intervals.cost(q, keys, 3),
    interpret=interpret,
    name="context_dq",
  )(
    *intervals.block_bounds(start, stop, tiles.q, tiles.k),
    q,
    keys,
    values,
    start,
    stop,
    lse,
    delta,
    dout,
  )
  return dq[:, :, :rows]
