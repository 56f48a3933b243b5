"""Attention of rows over intervals of a constant context, on Hopper (Pallas).

The mathematics and the interface are those of kernels/context_gpu.py. jax 0.11
deprecates the Triton backend of that module; these kernels use the Mosaic GPU
one, where copies, barriers and the warpgroups' products are explicit. **No GPU
has run them**, and `auto` does not choose them. Tests compare their numbers in
jax's interpreter, which also finds races and deadlocks, and
tests/compile_kernels.py compiles them for an H100 without one.

A block has three warpgroups of 128 threads. Two of them compute, each 64 rows
of one key head. The third loads the tiles of keys and values that any of the
128 rows sees, as far ahead as there is room. With room for two tiles of each:

    loads     K0 V0 K1 V1 . . K2 . . V2
               |  |        |     |
               |  |       free  free      both others have used K0, V0
              full full                   K0, V0 have arrived
    computes  K0 V0 K1 V1 K2 V2

A tile costs two products in the forward pass (q K' and p V) and three in the
backward pass (q K', dout V' and ds K); p, ds and all sums stay in registers.
The grid starts with the last blocks of rows, which see most.

FlashAttention-3 (arXiv 2407.08608) has these warpgroups. Its ping-pong between
the two that compute, and the overlap of one tile's softmax with the next
product, are left out: only a GPU can show that they pay.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cacheaug.errors import UserError
from cacheaug.kernels import intervals
from cacheaug.kernels.intervals import BITS, LOWEST, MASKED, masked_scores

# Warpgroups that compute, and the rows of each, which are those of one product.
GROUPS, ROWS = 2, 64
# Registers a thread of a warpgroup that computes, and of the one that loads:
# 2 x 240 + 24 of the 512 that a multiprocessor has for them.
COMPUTES, LOADS = 240, 24

_Carry = TypeVar("_Carry")


def supported(
  head_dim: int, dtype: jnp.dtype, compute_capability: str | None = None
) -> str | None:
  """As `context_gpu.supported`: Hopper GPUs and bfloat16 alone."""
  if compute_capability is None:
    device = jax.local_devices()[0]
    compute_capability = getattr(device, "compute_capability", "9.0")
  if compute_capability.split(".")[0] != "9":
    return (
      "the warpgroups' products are those of compute capability 9, not "
      f"{compute_capability}"
    )
  if dtype != jnp.bfloat16:
    return f"the warpgroups' products take bfloat16, not {jnp.dtype(dtype)}"
  return intervals.unsupported(head_dim, dtype)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Keys of a tile, and the tiles of keys and of values in shared memory."""

  k: int
  keys: int
  values: int
  q = GROUPS * ROWS  # rows of a block


# By head_dim; KB of shared memory, of 227. ptxas 13.5 reports no spilled
# register for any of them, with a cap and without.
_FORWARD = {
  64: Tiles(128, 2, 2),  # 80 KB
  128: Tiles(128, 2, 2),  # 160 KB
  256: Tiles(64, 2, 2),  # 192 KB
}
_BACKWARD = {
  64: Tiles(64, 2, 2),  # 64 KB
  128: Tiles(64, 2, 2),  # 128 KB
  256: Tiles(64, 2, 1),  # 224 KB
}


@dataclasses.dataclass(frozen=True)
class _Warpgroup:
  """Operations on a warpgroup's registers.

  jax's interpreter lacks products whose first operand is in registers, and in
  jax 0.10 those of transposed tiles and registers' layouts: there, jnp's.
  """

  interpret: bool

  @property
  def _plain(self) -> bool:
    return self.interpret and not hasattr(plgpu, "InterpretGPUParams")

  def rows(self, ref: Any) -> jax.Array:
    """Numbers [ROWS] from global memory."""
    if self._plain:
      return ref[...]
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    layout = plgpu.Layout.WGMMA.reduce(1)
    return plgpu.load(ref, *index, layout=layout, optimized=False)

  def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
    """A constant [ROWS] or [ROWS, n]."""
    return self._laid_out(jnp.full(shape, value, jnp.float32))

  def iota(self, *args: Any) -> jax.Array:
    """As jax.lax.broadcasted_iota, of [ROWS, n]."""
    if self._plain:
      return jax.lax.broadcasted_iota(*args)
    return plgpu.broadcasted_iota(*args, layout=plgpu.Layout.WGMMA)

  def scores(self, a: Any, b: Any) -> jax.Array:
    """Product [ROWS, k] of tiles [ROWS, E] and [k, E]."""
    if self._plain:
      return intervals.dot(_read(a), _read(b), transposed=True)

    def multiply(total):
      plgpu.wgmma(total, a, b.transpose((1, 0)))
      return total[...]

    shape = a.shape[0], b.shape[0]
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

  def add_product(self, total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
    """Adds the product of a [ROWS, k] and a tile [k, E] to total [ROWS, E]."""
    a = a.astype(b.dtype)
    if self.interpret:
      return total + intervals.dot(a, _read(b))
    run = pl.run_state(lambda total: plgpu.wgmma(total, a, b))
    return run(plgpu.ACC.init(total))

  def _laid_out(self, x):
    layout = plgpu.Layout.WGMMA
    layout = layout if x.ndim == 2 else layout.reduce(1)
    return x if self._plain else plgpu.layout_cast(x, layout)


def _read(tile):
  """A tile's numbers, in the interpreter."""
  numbers = tile[...]
  plgpu.commit_smem()  # or the next copy into it would be a race
  return numbers


def _opaque(index):
  """The same index [], of which the compiler knows nothing.

  Of a tile whose address does not change it takes the products' 64-bit
  descriptors, one for each 16 columns, out of the loop and keeps them in
  registers. In the backward pass at head_dim 256 that was 352 bytes spilled.
  """
  return jax.lax.optimization_barrier(index)


def _wide(x, like):
  """Repeats x [ROWS] for each column of `like` [ROWS, n]."""
  return jax.lax.broadcast_in_dim(x, like.shape, (0,))


@dataclasses.dataclass(frozen=True)
class _Stream:
  """Tiles of keys or values that the third warpgroup loads for the others."""

  source: Any  # [S, E] in global memory
  tiles: Any  # [room, k, E] in shared memory
  full: Any  # barriers [room]: a tile has arrived
  free: Any  # barriers [room]: both warpgroups have used it

  def load(self, step: jax.Array, first: jax.Array, steps: jax.Array) -> None:
    """Loads tile first + step as soon as there is room for it.

    Goes on until the last tile has been used: steps + room calls.
    """
    room, count, block_k = self._room(step), *self.tiles.shape[:2]

    @pl.when((step >= count) & (step < steps + count))
    def _wait():
      plgpu.barrier_wait(self.free.at[room])

    @pl.when(step < steps)
    def _copy():
      slots = pl.ds((first + step) * block_k, block_k)
      plgpu.copy_gmem_to_smem(
        self.source.at[slots], self.tiles.at[room], self.full.at[room]
      )

  @contextlib.contextmanager
  def tile(self, step: jax.Array) -> Iterator[Any]:
    """Tile [k, E], waited for; its room is free at the end."""
    room = self._room(step)
    plgpu.barrier_wait(self.full.at[room])
    yield self.tiles.at[room]
    plgpu.barrier_arrive(self.free.at[room])

  def _room(self, step):
    count = self.tiles.shape[0]
    return _opaque(jnp.int32(0) if count == 1 else jax.lax.rem(step, count))


@dataclasses.dataclass(frozen=True)
class _Rows:
  """What a warpgroup knows of its rows, and the tiles that they see."""

  group: jax.Array  # [] which warpgroup
  tiles: tuple[Any, ...]  # [GROUPS, ROWS, E] in shared memory: q (and dout)
  numbers: tuple[jax.Array, ...]  # [ROWS]: start, stop (and lse, delta)
  keys: _Stream
  values: _Stream
  first: jax.Array  # [] block of keys, as is last: the one after the last
  last: jax.Array
  softcap: float
  do: _Warpgroup

  def tile(self, i: int) -> Any:
    """Tile i [ROWS, E] of this warpgroup's rows."""
    return self.tiles[i].at[_opaque(self.group)]

  def add_up(self, add: Callable[..., _Carry], carry: _Carry) -> _Carry:
    """Carry after `add`(step, carry) of each tile."""
    return jax.lax.fori_loop(0, self.last - self.first, add, carry)

  def scores(self, step: jax.Array, keys: Any) -> tuple[jax.Array, Any]:
    """`masked_scores` of a tile."""
    products = self.do.scores(self.tile(0), keys)
    low, high = (_wide(x, products) for x in self.numbers[:2])
    return masked_scores(
      *(products, self.first + step, low, high, self.softcap),
      iota=self.do.iota,
    )


def _forward(rows: _Rows) -> tuple[jax.Array, jax.Array]:
  """Computes out [ROWS, E] and lse [ROWS]; see context_gpu._forward_kernel."""
  do = rows.do

  def add(step, carry):
    top, total, out = carry
    with rows.keys.tile(step) as keys:
      scores, _ = rows.scores(step, keys)
    new_top = jnp.maximum(top, scores.max(1))
    p = jnp.exp2(scores - _wide(new_top, scores))
    shrink = jnp.exp2(top - new_top)
    total = total * shrink + p.sum(1)
    with rows.values.tile(step) as values:
      out = do.add_product(out * _wide(shrink, out), p, values)
    return new_top, total, out

  shape = rows.tiles[0].shape[1:]
  top, total, out = rows.add_up(
    add,
    (do.full(shape[:1], LOWEST), do.full(shape[:1], 0.0), do.full(shape, 0.0)),
  )
  empty = total == 0
  total = jnp.where(empty, 1.0, total)
  lse = jnp.where(empty, MASKED, (top + jnp.log2(total)) / BITS)
  return out / _wide(total, out), lse


def _dq(rows: _Rows) -> tuple[jax.Array]:
  """Computes dq [ROWS, E]; see context_gpu._dq_kernel."""
  do = rows.do
  _, _, lse, delta = rows.numbers
  # The lse of a row that sees nothing is MASKED, as its scores are.
  lse = jnp.maximum(lse * BITS, LOWEST)

  def add(step, dq):
    with rows.keys.tile(step) as keys:
      scores, slope = rows.scores(step, keys)
      p = jnp.exp2(scores - _wide(lse, scores))
      if slope is not None:  # before the next product: one array fewer
        p *= slope
      with rows.values.tile(step) as values:
        back = do.scores(rows.tile(1), values)
      ds = p * (back - _wide(delta, back))
      return do.add_product(dq, ds, keys)

  return (rows.add_up(add, do.full(rows.tiles[0].shape[1:], 0.0)),)


def _run(
  body: Callable[[_Rows], tuple[jax.Array, ...]],
  own: tuple[jax.Array, ...],  # [B, K, Q, E]: q (and dout)
  keys: jax.Array,  # [B, K, S, E]
  values: jax.Array,  # [B, K, S, E]
  numbers: tuple[jax.Array, ...],  # start, stop [B, Q] (lse, delta [B, K, Q])
  *,
  outputs: tuple[int, ...],  # their ranks: 4 for [B, K, Q, E], 3 for [B, K, Q]
  softcap: float,
  interpret: bool,
  tiles: Tiles,
) -> list[jax.Array]:
  """`body` for all rows of all key heads."""
  q = own[0]
  if reason := supported(q.shape[3], q.dtype):
    raise UserError(f"config.attention=mosaic: {reason}: give attention=auto")
  length = q.shape[2]
  own = tuple(intervals.pad(x.astype(q.dtype), 2, Tiles.q) for x in own)
  numbers = tuple(intervals.pad(x, x.ndim - 1, Tiles.q) for x in numbers)
  keys, values = (intervals.pad(x, 2, tiles.k) for x in (keys, values))
  bounds = intervals.block_bounds(*numbers[:2], Tiles.q, tiles.k)
  b, heads, padded, e = own[0].shape
  blocks = padded // Tiles.q

  def kernel(first, last, keys, values, *refs):
    own_refs, refs = refs[: len(own)], refs[len(own) :]
    number_refs, refs = refs[: len(numbers)], refs[len(numbers) :]
    out_refs, (own_tiles, arrived, *streams) = refs[:-4], refs[-4:]
    b, h = jax.lax.axis_index("sequence"), jax.lax.axis_index("head")
    block = blocks - 1 - jax.lax.axis_index("block")
    group = jax.lax.axis_index("group")
    first, last = first[b, block], last[b, block]
    keys, values = (
      _Stream(ref.at[b, h], *stream)
      for ref, stream in zip((keys, values), streams, strict=True)
    )

    @pl.when(group == GROUPS)
    def _load():
      plgpu.set_max_registers(LOADS, action="decrease")

      @pl.loop(0, last - first + max(tiles.keys, tiles.values))
      def _(step):
        keys.load(step, first, last - first)
        values.load(step, first, last - first)

    @pl.when(group < GROUPS)
    def _compute():
      plgpu.set_max_registers(COMPUTES, action="increase")
      rows = pl.ds((block * GROUPS + group) * ROWS, ROWS)
      do = _Warpgroup(interpret)
      for ref, tile in zip(own_refs, own_tiles, strict=True):
        plgpu.copy_gmem_to_smem(
          ref.at[b, h, rows], tile.at[group], arrived.at[group]
        )
      row_numbers = tuple(
        do.rows(x.at[(b, h, rows) if len(x.shape) == 3 else (b, rows)])
        for x in number_refs
      )
      plgpu.barrier_wait(arrived.at[group])
      results = body(
        _Rows(
          *(group, own_tiles, row_numbers, keys, values),
          *(first, last, softcap, do),
        )
      )
      for ref, x in zip(out_refs, results, strict=True):
        ref[b, h, rows] = x

  def shared(*shape):
    # The layout that the products read: rows of 64 numbers, 8 together.
    transforms = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
    return plgpu.SMEM(shape, q.dtype, transforms=transforms)

  def stream(room):
    return (
      shared(room, tiles.k, e),
      plgpu.Barrier(num_barriers=room),
      plgpu.Barrier(num_arrivals=GROUPS, num_barriers=room),
    )

  run = plgpu.kernel(
    kernel,
    out_type=tuple(
      intervals.shape_like(q, own[0].shape[:rank], jnp.float32)
      for rank in outputs
    ),
    scratch_types=(
      tuple(shared(GROUPS, ROWS, e) for _ in own),
      plgpu.Barrier(num_arrivals=len(own), num_barriers=GROUPS),
      stream(tiles.keys),
      stream(tiles.values),
    ),
    grid=(blocks, heads, b),
    grid_names=("block", "head", "sequence"),
    num_threads=GROUPS + 1,
    thread_name="group",
    # tanh and exp2 as one instruction, see context_gpu._tanh.
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=_interpreter() if interpret else False,
    kernel_name=f"context{body.__name__}",
  )
  results = run(*bounds, keys, values, *own, *numbers)
  return [x[:, :, :length] for x in results]


def _interpreter():
  """The interpreter of these kernels in jax, which reports races."""
  # plgpu has this name too, but not in jax 0.10. A callback may hang there: it
  # did with an array of 390 KB, one device and two cores; not with eight.
  from jax._src.pallas.mosaic_gpu.interpret import params

  return params.InterpretGPUParams(detect_races=True)


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
  """As `context_gpu.forward`: out [B, K, Q, E] and lse [B, K, Q], float32.

  Raises:
    UserError: shapes or numbers that are not supported.
  """
  out, lse = _run(
    *(_forward, (q,), keys, values, (start, stop)),
    outputs=(4, 3),
    softcap=softcap,
    interpret=interpret,
    tiles=tiles or _FORWARD.get(q.shape[3]),
  )
  return out, lse


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
  """As `context_gpu.backward_dq`: the context's share of q's gradient.

  Raises:
    UserError: shapes or numbers that are not supported.
  """
  (dq,) = _run(
    *(_dq, (q, dout), keys, values, (start, stop, lse, delta)),
    outputs=(4,),
    softcap=softcap,
    interpret=interpret,
    tiles=tiles or _BACKWARD.get(q.shape[3]),
  )
  return dq
