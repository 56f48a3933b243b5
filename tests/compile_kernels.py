"""Compiles the kernels for devices that are not there, and prints a table.

  python tests/compile_kernels.py [TOPOLOGY ...]

Needs libtpu (the `tpu` extra) or jax's CUDA plugin (`cuda`), no TPU and no GPU;
what is missing is left out. Shapes: one sequence a chip of Gemma-2 2B's pass 3
with N = 16, A = 16: M = 128 traces of R = 31 rows, S = 2048, bfloat16, soft cap
50; the Mosaic GPU kernels also at the other head_dims. Ends with the share of
(row, slot) pairs that tiles of several sizes compute, beside the share needed.
With MOSAIC_GPU_DUMP_PTXAS=1 ptxas prints the registers of the Mosaic kernels.
"""

import functools
import os
import sys
import time

import numpy as np

# Four chips of each kind; those of a larger slice run the same program.
TOPOLOGIES = "v5e:2x2", "v5p:2x2x1", "v6e:2x2"
GPUS = ("h100:1",)
K, G, E, S, M, R = 4, 2, 256, 2048, 128, 31
ROWS = R * G  # of one trace and key head


def shares(
  points: np.ndarray,  # [B, M] sorted
  rows: int,
  slots: int,
  block_q: int,
  block_k: int,
) -> tuple[float, float]:
  """Shares of all (row, slot) pairs that are needed, and that are computed.

  Args:
    points: last slot that a trace's rows see.
    rows: rows of a trace, times query heads of a key head.
    slots: S.
    block_q: rows of a tile; the last one may be cut.
    block_k: keys of a tile.
  """
  import jax.numpy as jnp

  from cacheaug.kernels import intervals

  stop = (points + 1).repeat(rows, 1)
  padded = intervals.pad(jnp.asarray(stop, jnp.int32), 1, block_q)
  first, last = intervals.block_bounds(0 * padded, padded, block_q, block_k)
  done = int((last - first).sum()) * block_q * block_k
  return float(stop.sum() / stop.size / slots), done / stop.size / slots


def compile_for(topology: str):
  """Yields (kernel, seconds, bytes of temporary memory a chip)."""
  from cacheaug.kernels import (
    context_gpu,
    context_mosaic,
    context_tpu,
    intervals,
  )

  if topology not in GPUS:
    yield from _compile(topology, context_tpu, "", E)
    return
  yield from _compile(topology, context_gpu, "", E)
  for e in intervals.HEAD_DIMS:
    yield from _compile(topology, context_mosaic, "mosaic ", e, f", E = {e}")


def _compile(topology, kernels, before, e, after=""):
  import jax
  import jax.numpy as jnp
  from jax.sharding import NamedSharding, PartitionSpec

  from cacheaug.projects.planning import topology as topologies

  chips = topologies.compiler_devices(topologies.parse(topology))
  gpu = topology in GPUS
  # As for a plan: nothing can be timed here.
  options = {"xla_gpu_autotune_level": 0} if gpu else {}
  mesh = jax.sharding.Mesh(np.array(chips), ("data",))
  spec = PartitionSpec("data")

  def array(*shape, dtype=jnp.bfloat16):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct((len(chips), *shape), dtype, sharding=sharding)

  q, keys = array(K, M * ROWS, e), array(K, S, e)
  row = array(M * ROWS, dtype=jnp.int32)
  number = array(K, M * ROWS, dtype=jnp.float32)
  args = q, keys, keys, row, row, number, number, q
  for name, count in {"forward": 5, "backward_dq": 8}.items():
    run = functools.partial(getattr(kernels, name), softcap=50.0)
    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec)
    begin = time.perf_counter()
    platform = "cuda" if gpu else "tpu"
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      lowered = (
        jax.jit(run).trace(*args[:count]).lower(lowering_platforms=(platform,))
      )
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis().temp_size_in_bytes
    yield f"{before}{name}{after}", seconds, memory


def main() -> None:
  """Prints both tables."""
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  print("| topology | kernel | compilation, s | temporary bytes |")
  print("|---|---|---|---|")
  from cacheaug.projects.planning.topology import NoCompiler

  for topology in sys.argv[1:] or (*TOPOLOGIES, *GPUS):
    try:
      for name, seconds, size in compile_for(topology):
        print(f"| {topology} | {name} | {seconds:.1f} | {size} |", flush=True)
    except NoCompiler as e:
      print(f"| {topology} | left out: {e} | | |", flush=True)
  rng = np.random.default_rng(0)
  points = [rng.choice(S - 16, M, replace=False) for _ in range(64)]
  points = np.sort(np.stack(points), -1)
  print(
    f"\nUniform points, M = {M}, S = {S}, {ROWS} rows a trace and key head:"
  )
  print("\n| tile | pairs needed | pairs computed | skipped |")
  print("|---|---|---|---|")
  for tile in (64, 64), (128, 64), (256, 256), (512, 256), (512, 512):
    needed, done = shares(points, ROWS, S, *tile)
    name = " x ".join(map(str, tile))
    print(f"| {name} | {needed:.1%} | {done:.1%} | {1 - done:.1%} |")


if __name__ == "__main__":
  main()
