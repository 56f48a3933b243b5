"""The context kernels, in interpret mode, against dense attention.

The reference is the definition: one softmax over [all context slots | own
keys] with a dense mask, every query head with its own copy of the keys, and
automatic differentiation. Compilation for TPUs is tests/compile_kernels.py.
"""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compile_kernels import TOPOLOGIES, shares
from jax.sharding import PartitionSpec as P
from tolerances import ATTENTION, close, close_trees, far, jit

from cacheaug.kernels import (
  context_gpu,
  context_mosaic,
  context_tpu,
  dispatch,
  intervals,
)

# Several blocks of rows and of keys, and on a TPU two chunks of keys. Neither
# Q (42, 84 or 168) nor S is a multiple of them.
SMALL = {
  "tpu": dict(block_q=16, block_k=128, chunk_k=256),
  "gpu": dict(tiles=context_gpu.Tiles(16, 32, 4, 2)),
}
MODULES = {"tpu": context_tpu, "gpu": context_gpu}
BLOCK_K = {"tpu": 128, "gpu": 32}
B, K, S, ROWS, OWN = 2, 2, 300, 42, 3
# p and ds are rounded to 2^-9 of themselves before the second product, dout
# and the inputs too, but these are rounded for the reference as well. Norm of
# the difference over the norm. Seen: 1.6e-3.
BFLOAT16 = 5e-3

kernels = pytest.mark.parametrize("kernel", ["tpu", "gpu"])


def bounds_of(kind):
  """Intervals [B, ROWS] of random traces of three rows, sorted by point."""
  rng = np.random.default_rng(3)
  point = np.sort(rng.integers(0, S, (B, ROWS // 3))).repeat(3, 1)
  stop = point + 1
  start = np.zeros_like(stop)
  if kind == "documents":
    edges = np.array([0, 90, 200])  # where each document starts
    start = edges[np.searchsorted(edges, point, side="right") - 1]
  elif kind == "window":
    start = np.maximum(0, stop - 7 + np.arange(ROWS) % 3)
  elif kind == "mixed":
    start = rng.integers(0, S, stop.shape)
    stop = np.where(rng.random(stop.shape) < 0.2, start + 1, stop)
    stop[:, 5:12] = start[:, 5:12] - 3  # sees nothing
    stop[0, :16] = start[0, :16]  # nor does a whole block of rows
    start[:, 20], stop[:, 20] = 0, S  # everything
  return jnp.asarray(start, jnp.int32), jnp.asarray(stop, jnp.int32)


def case(e, g, kind, dtype=jnp.float32):
  """q [B, H, ROWS, E], arrays of the context, own keys, bounds, dout."""
  rng = np.random.default_rng(e + g)

  def normal(*shape, size=1.0):
    x = jnp.asarray(size * rng.standard_normal(shape), jnp.float32)
    return x.astype(dtype)

  heads = B, K * g, ROWS
  return dict(
    q=normal(*heads, e, size=3 * e**-0.5),
    keys=normal(B, K, S, e),
    values=normal(B, K, S, e),
    own_keys=normal(B, K, OWN, e),
    own_values=normal(B, K, OWN, e),
    bounds=bounds_of(kind),
    dout=normal(*heads, e),
  )


def flat(x):
  """[B, H, q, ...] -> [B, K, q G, ...], the kernels' order of rows."""
  g = x.shape[1] // K
  x = x.reshape(B, K, g, *x.shape[2:]).swapaxes(2, 3)
  return x.reshape(B, K, -1, *x.shape[4:])


def flat_bounds(c):
  """Bounds of the flattened rows: a trace row's query heads share them."""
  g = c["q"].shape[1] // K
  return tuple(x.repeat(g, 1) for x in c["bounds"])


def dense(c, q, own_q, softcap, own=True):
  """Output [B, H, q, E] and log-sum-exp [B, H, q] by the definition.

  The own keys' scores come from own_q, equal to q, so that the two parts of
  q's gradient can be told apart.
  """
  g = q.shape[1] // K

  def scores(q, keys):
    keys = keys.astype(jnp.float32).repeat(g, 1)
    s = jnp.einsum("bhqe,bhse->bhqs", q, keys)
    return softcap * jnp.tanh(s / softcap) if softcap else s

  start, stop = c["bounds"]
  slots = jnp.arange(S)[None, None]
  seen = (slots >= start[..., None]) & (slots < stop[..., None])
  s = jnp.where(seen[:, None], scores(q, c["keys"]), -jnp.inf)
  values = c["values"]
  if own:
    s = jnp.concatenate([s, scores(own_q, c["own_keys"])], -1)
    values = jnp.concatenate([values, c["own_values"]], 2)
  lse = jax.nn.logsumexp(s, -1)
  p = jnp.exp(s - jnp.where(jnp.isfinite(lse), lse, 0.0)[..., None])
  values = values.astype(jnp.float32).repeat(g, 1)
  return jnp.einsum("bhqs,bhse->bhqe", p, values), lse


def expected(c, softcap):
  """What forward and backward_dq must give, and the global lse and delta."""

  @jit
  def run(c):
    q = c["q"].astype(jnp.float32)
    dout = c["dout"].astype(jnp.float32)
    out, lse = dense(c, q, q, softcap, own=False)
    both, back = jax.vjp(lambda x: dense(c, x, q, softcap)[0], q)
    _, total = dense(c, q, q, softcap)
    delta = (dout * both).sum(-1)
    lse = jnp.where(jnp.isfinite(lse), lse, intervals.MASKED)
    return jax.tree.map(flat, (out, lse, back(dout)[0], total, delta))

  return run(c)


def computed(kernel, c, softcap, lse, delta, **changes):
  """Output, log-sum-exp and dq of the kernels."""

  @jit
  def run(c, lse, delta):
    module, options = MODULES[kernel], SMALL[kernel] | changes
    options |= dict(softcap=softcap, interpret=True)
    args = flat(c["q"]), c["keys"], c["values"], *flat_bounds(c)
    out = module.forward(*args, **options)
    dout = flat(c["dout"])
    return *out, module.backward_dq(*args, lse, delta, dout, **options)

  return run(c, lse, delta)


@kernels
@pytest.mark.parametrize(
  "e, g, softcap, kind",
  [
    (64, 1, 0.0, "points"),
    (64, 4, 2.0, "mixed"),
    (128, 4, 0.0, "documents"),
    (256, 2, 2.0, "window"),
    (256, 1, 0.0, "mixed"),
  ],
)
def test_kernels_equal_dense_attention(kernel, e, g, softcap, kind):
  c = case(e, g, kind)
  out, lse, dq, total, delta = expected(c, softcap)
  got = computed(kernel, c, softcap, total, delta)
  assert [x.dtype for x in got] == [jnp.float32] * 3
  close(got[0], out, ATTENTION)
  close(got[1], lse, ATTENTION)
  close_trees(got[2], dq, ATTENTION)
  empty = np.asarray(lse) == intervals.MASKED
  assert empty.any() == (kind == "mixed")
  assert not np.asarray(got[0])[empty].any()
  assert not np.asarray(got[2])[empty].any()
  if softcap:
    uncapped = computed(kernel, c, 0.0, total, delta)
    for x, y in zip(got, uncapped, strict=True):
      far(x, y)


@kernels
def test_bfloat16(kernel):
  c = case(64, 2, "points", jnp.bfloat16)
  out, lse, dq, total, delta = expected(c, 2.0)
  got = computed(kernel, c, 2.0, total, delta)
  assert [x.dtype for x in got] == [jnp.float32] * 3
  close_trees(got[0], out, BFLOAT16)
  # Scores are products of the same rounded numbers, added up in float32.
  close(got[1], lse, ATTENTION)
  close_trees(got[2], dq, BFLOAT16)
  assert np.abs(got[0] - out).max() > ATTENTION, "it ran in float32"


@kernels
def test_a_row_that_sees_nothing_anywhere_gets_nothing(kernel):
  # Padding: no context, and no own block to make the log-sum-exp finite.
  c = case(64, 1, "mixed")
  _, lse, _, _, delta = expected(c, 0.0)
  _, _, dq = computed(kernel, c, 0.0, lse, delta)
  assert np.isfinite(dq).all()
  empty = np.asarray(lse) == intervals.MASKED
  assert empty.any() and not np.asarray(dq)[empty].any()
  assert np.asarray(dq)[~empty].any(-1).all()


@kernels
def test_blocks_that_no_row_sees_are_skipped(kernel):
  # What is computed reaches the output, if only as 0 x NaN: all keys beyond
  # the blocks needed may be NaN, but not one slot more.
  c = case(64, 1, "points")
  block = BLOCK_K[kernel]
  low, high = 165, 185  # within one block
  c["bounds"] = tuple(jnp.full((B, ROWS), x, jnp.int32) for x in (low, high))
  _, _, _, total, delta = expected(c, 0.0)
  clean = computed(kernel, c, 0.0, total, delta)
  first, last = low // block * block, -(-high // block) * block

  def poisoned(first, last):
    slots = np.arange(S)[:, None]
    inside = (slots >= first) & (slots < last)
    new = {x: jnp.where(inside, c[x], np.nan) for x in ("keys", "values")}
    return computed(kernel, c | new, 0.0, total, delta)

  for x, y in zip(clean, poisoned(first, last), strict=True):
    np.testing.assert_array_equal(x, y)
  for changed in (first + 1, last), (first, last - 1):
    out, lse, dq = poisoned(*changed)
    assert np.isnan(out).all() and np.isnan(dq).all()
    # The scores themselves are masked by selection.
    np.testing.assert_array_equal(lse, clean[1])


def test_bounds_are_those_of_the_drawing():
  start = jnp.array([[0, 1, 2, 3, 4, 5]], jnp.int32)
  stop = jnp.array([[2, 4, 6, 7, 9, 5]], jnp.int32)
  first, last = intervals.block_bounds(start, stop, 2, 4)
  assert first.tolist() == [[0, 0, 1]] and last.tolist() == [[1, 2, 3]]
  nothing = jnp.full((1, 4), 7, jnp.int32)
  first, last = intervals.block_bounds(nothing, nothing - 7, 2, 4)
  assert (first == last).all()


@kernels
def test_kernels_under_shard_map(kernel):
  c = case(64, 1, "points")
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:B]), ("data",))
  args = c["q"], c["keys"], c["values"], *c["bounds"]
  run = functools.partial(
    MODULES[kernel].forward, softcap=0.0, interpret=True, **SMALL[kernel]
  )
  # Interpreted kernels do not say over which mesh axes their inner values
  # vary; compiled ones need not (tests/compile_kernels.py checks them).
  sharded = jax.shard_map(
    run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
  )
  for x, y in zip(jit(sharded)(*args), jit(run)(*args), strict=True):
    close(x, y, ATTENTION)


@pytest.mark.parametrize("e", intervals.HEAD_DIMS)
@pytest.mark.parametrize(
  ("module", "dtype", "backend"),
  [
    (context_gpu, jnp.bfloat16, "xla.gpu.triton"),
    (context_gpu, jnp.float32, "xla.gpu.triton"),
    (context_mosaic, jnp.bfloat16, "mosaic_gpu"),
  ],
)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
def test_gpu_kernels_lower_without_a_gpu(e, module, dtype, backend):
  q = jax.ShapeDtypeStruct((1, 4, 7936, e), dtype)
  keys = jax.ShapeDtypeStruct((1, 4, 2048, e), dtype)
  row = jax.ShapeDtypeStruct((1, 7936), jnp.int32)
  number = jax.ShapeDtypeStruct((1, 4, 7936), jnp.float32)
  args = q, keys, keys, row, row, number, number, q
  for name, count in {"forward": 5, "backward_dq": 8}.items():
    run = functools.partial(getattr(module, name), softcap=50.0)
    try:
      lowered = (
        jax.jit(run).trace(*args[:count]).lower(lowering_platforms=("cuda",))
      )
    except RuntimeError as error:
      if "No supported GPU devices found" not in str(error):
        raise
      pytest.skip("from jax 0.12 on, lowering for CUDA needs a GPU")
    assert backend in lowered.as_text()


def test_reasons_against():
  for dtype in jnp.float32, jnp.bfloat16:
    for e in intervals.HEAD_DIMS:
      assert context_tpu.supported(e, dtype) is None
      assert context_gpu.supported(e, dtype, "9.0") is None
      assert context_gpu.supported(e, dtype) is None
  assert "head_dim 80" in context_tpu.supported(80, jnp.bfloat16)
  assert "float16" in context_gpu.supported(64, jnp.float16, "9.0")
  assert "not 8.6" in context_gpu.supported(64, jnp.bfloat16, "8.6")


def test_chosen_by_platform():
  assert dispatch.choose("auto", "tpu", 256, jnp.bfloat16)[0] == "tpu"
  assert dispatch.choose("auto", "gpu", 256, jnp.bfloat16)[0] == "gpu"
  name, why = dispatch.choose("auto", "gpu", 8, jnp.bfloat16)
  assert name == "xla" and "head_dim 8" in why


def test_share_of_pairs_computed():
  # Points 0, 1, ..., S - 1 with one row each: half, and half a tile more.
  points = np.arange(64)[None]
  needed, done = shares(points, 1, 64, 1, 1)
  assert needed == done == pytest.approx(65 / 128)
  assert shares(points, 1, 64, 16, 16)[1] == pytest.approx((4 + 1) / 8)
  # 62 rows a point and 512 a block: the last block is not full.
  needed, done = shares(np.arange(0, 2048, 16)[None], 62, 2048, 512, 256)
  assert needed < done < 1.3 * needed


@pytest.mark.slow
def test_tpu_kernels_compile_ahead_of_time():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("needs libtpu: pip install 'cacheaug[tpu]'")
  here = pathlib.Path(__file__).resolve().parent
  path = os.pathsep.join([str(here.parent), *sys.path])
  done = subprocess.run(
    [sys.executable, str(here / "compile_kernels.py")],
    env=os.environ | {"PYTHONPATH": path},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  for topology in TOPOLOGIES:
    for kernel in "forward", "backward_dq":
      assert f"| {topology} | {kernel} |" in done.stdout
