"""The Mosaic GPU kernels in jax's interpreter, against dense attention.

The interpreter runs the three warpgroups as threads, with their barriers and
copies. It takes about a second for a block of 128 rows, so most cases are slow.
Compilation for an H100 needs jax's CUDA plugin and no GPU.
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
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from tolerances import ATTENTION, close, far, jit

from cacheaug.errors import UserError
from cacheaug.kernels import (
  context_attention,
  context_mosaic,
  dispatch,
  intervals,
  self_check,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent
# p and ds are rounded to 2^-9 of themselves before their products, here as in
# the XLA path, but p relative to another maximum. Norm of the difference over
# the norm. Seen: 5.7e-4, and 4.2e-6 of the gradient.
BFLOAT16 = 2e-3


def case(e, rows, slots, kind, batch=1, heads=1):
  """Arguments of forward, and dout."""
  rng = np.random.default_rng(e + rows)

  def normal(*shape, size=1.0):
    return jnp.asarray(size * rng.standard_normal(shape), jnp.bfloat16)

  stop = np.sort(rng.integers(1, slots + 1, (batch, rows)), 1)
  start = np.zeros_like(stop)
  if kind == "window":
    start = np.maximum(0, stop - 9)
  elif kind == "mixed":
    start = rng.integers(0, slots, stop.shape)
    stop[:, 5:9] = start[:, 5:9] - 3  # these see nothing
    start[:, 11], stop[:, 11] = 0, slots  # everything
  q = normal(batch, heads, rows, e, size=3 * e**-0.5)
  keys, values = (normal(batch, heads, slots, e) for _ in range(2))
  bounds = (jnp.asarray(x, jnp.int32) for x in (start, stop))
  return (q, keys, values, *bounds), normal(batch, heads, rows, e)


def compare(arguments, dout, softcap):
  """Both functions against the XLA path; returns the kernels' results."""
  cap = dict(softcap=softcap)
  out, lse = jit(functools.partial(context_attention.forward, **cap))(
    *arguments
  )
  delta = (out * dout).sum(-1)
  more = *arguments, lse, delta, dout
  dq = jit(functools.partial(context_attention.backward_dq, **cap))(*more)
  got = context_mosaic.forward(*arguments, **cap, interpret=True)
  got = *got, context_mosaic.backward_dq(*more, **cap, interpret=True)
  got = jax.device_get(got)
  assert not interpret_pallas_call.get_races().races_found
  assert [x.dtype for x in got] == [jnp.float32] * 3
  for x, y in ((got[0], out), (got[2], dq)):
    assert np.linalg.norm(x - y) <= BFLOAT16 * np.linalg.norm(y)
  # Scores are products of the same rounded numbers, added up in float32.
  close(got[1], lse, ATTENTION)
  start, stop = arguments[3:]
  empty = np.broadcast_to((stop <= start)[:, None], lse.shape)
  assert not got[0][empty].any() and not got[2][empty].any()
  assert got[0][~empty].any(-1).all()
  assert (got[1][empty] == intervals.MASKED).all()
  return got


def test_one_block_equals_the_xla_path():
  """Three and five tiles of keys, with room for two."""
  arguments, dout = case(64, 70, 300, "mixed")
  compare(arguments, dout, softcap=2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("e", "softcap", "kind", "batch", "heads"),
  [
    (64, 0.0, "points", 2, 2),
    (128, 2.0, "window", 1, 2),
    (128, 0.0, "mixed", 1, 1),
    (256, 50.0, "mixed", 1, 1),
    (256, 0.0, "window", 1, 1),
  ],
)
def test_kernels_equal_the_xla_path(e, softcap, kind, batch, heads):
  """Two blocks of rows."""
  arguments, dout = case(e, 150, 300, kind, batch, heads)
  compare(arguments, dout, softcap)


@pytest.mark.slow
def test_the_cap_and_the_bounds_matter():
  arguments, dout = case(64, 60, 150, "points")
  whole = compare(arguments, dout, 0.0)
  capped = compare(arguments, dout, 2.0)
  *first, start, stop = arguments
  cut = compare((*first, start + 1, stop), dout, 0.0)
  for x, y, z in zip(whole, capped, cut, strict=True):
    far(x, y)
    far(x, z)


@pytest.mark.slow
def test_tiles_that_no_row_sees_are_skipped():
  """What is computed reaches the output, if only as 0 x NaN."""
  arguments, dout = case(64, 60, 300, "points")
  q, keys, values, _, stop = arguments
  low, high = (jnp.full_like(stop, x) for x in (70, 120))
  clean = compare((q, keys, values, low, high), dout, 0.0)

  def poisoned(first, last):
    inside = (np.arange(300) >= first) & (np.arange(300) < last)
    new = (jnp.where(inside[:, None], x, jnp.nan) for x in (keys, values))
    run = functools.partial(context_mosaic.forward, softcap=0.0, interpret=True)
    return run(q, *new, low, high)

  for x, y in zip(poisoned(0, 128), clean, strict=False):
    np.testing.assert_array_equal(x, y)
  out, _ = poisoned(0, 127)
  assert np.isnan(out).all()


@pytest.mark.slow
@pytest.mark.parametrize(("e", "groups", "softcap"), [(64, 3, 0), (256, 2, 50)])
def test_the_self_check_finds_nothing(e, groups, softcap):
  if jax.__version_info__ < (0, 11):
    pytest.skip("jax 0.10 compiles every block of rows anew, for minutes")
  options = dict(softcap=softcap, interpret=True)
  problem = self_check.compare(
    functools.partial(context_mosaic.forward, **options),
    functools.partial(context_mosaic.backward_dq, **options),
    self_check.Shapes(e, groups, softcap, "bfloat16"),
    jax.devices()[0],
  )
  assert problem is None


@pytest.mark.slow
def test_kernels_compile_ahead_of_time_and_spill_nothing():
  if importlib.util.find_spec("jax_plugins") is None:
    pytest.skip("needs jax's CUDA plugin: pip install 'cacheaug[cuda]'")
  path = os.pathsep.join([str(ROOT), *sys.path])
  environment = {"PYTHONPATH": path, "MOSAIC_GPU_DUMP_PTXAS": "1"}
  done = subprocess.run(
    [sys.executable, ROOT / "tests/compile_kernels.py", "h100:1"],
    env=os.environ | environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  if "left out" in done.stdout:
    pytest.skip(done.stdout)
  for e in intervals.HEAD_DIMS:
    for kernel in "forward", "backward_dq":
      assert f"| h100:1 | mosaic {kernel}, E = {e} |" in done.stdout
  reports = (done.stdout + done.stderr).count(" 0 bytes spill stores")
  assert reports == 2 * len(intervals.HEAD_DIMS)


def test_chosen_by_name_alone():
  for platform in "gpu", "cuda", "cpu":
    name, _ = dispatch.choose("auto", platform, 256, jnp.bfloat16)
    assert name != "mosaic"
  name, why = dispatch.choose("mosaic", "gpu", 256, jnp.bfloat16)
  assert name == "mosaic" and "config.attention" in why


def test_reasons_against():
  for e in intervals.HEAD_DIMS:
    assert context_mosaic.supported(e, jnp.bfloat16, "9.0") is None
  assert "head_dim 80" in context_mosaic.supported(80, jnp.bfloat16, "9.0")
  assert "float32" in context_mosaic.supported(64, jnp.float32, "9.0")
  assert "not 10.0" in context_mosaic.supported(64, jnp.bfloat16, "10.0")
  shapes = self_check.Shapes(64, 2, 0.0, "float32")
  with pytest.raises(UserError, match="take bfloat16.*give attention=auto"):
    self_check.choose("mosaic", shapes, jax.devices())
