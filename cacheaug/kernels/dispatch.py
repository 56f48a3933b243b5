"""Chooses the kernel of the context's part of attention, and its devices."""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# Name -> module with context_attention.py's two functions.
KERNELS = {
  "xla": "cacheaug.kernels.context_attention",
  "tpu": "cacheaug.kernels.context_tpu",
  "gpu": "cacheaug.kernels.context_gpu",
  "mosaic": "cacheaug.kernels.context_mosaic",
}
NAMES = ("auto", "plain", *KERNELS)
# Run on a TPU, a GPU, a Hopper GPU. `auto` chooses the first two alone, until a
# GPU has measured the third.
PALLAS = ("tpu", "gpu", "mosaic")


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An implementation of context_attention.py's two functions.

  `plain` uses no kernel: one masked softmax over context and own block
  (model/attention.py). With a mesh, each device runs the kernel on its own
  sequences and key heads, because the compiler cannot split a kernel.
  """

  name: str = "xla"
  mesh: Mesh | None = None
  batch: tuple[str, ...] = ()  # mesh axes that split B
  heads: tuple[str, ...] = ()  # mesh axes that split K

  @property
  def shards(self) -> int:
    """Devices that B is split over."""
    if self.mesh is None:
      return 1
    return math.prod(self.mesh.shape[axis] for axis in self.batch)

  def forward(
    self, *args: jax.Array, softcap: float
  ) -> tuple[jax.Array, jax.Array]:
    """See context_attention.forward."""
    run = functools.partial(self._module().forward, softcap=softcap)
    return self._split(run, args, outputs=(4, 3))

  def backward_dq(self, *args: jax.Array, softcap: float) -> jax.Array:
    """See context_attention.backward_dq."""
    run = functools.partial(self._module().backward_dq, softcap=softcap)
    return self._split(run, args, outputs=4)

  def _module(self):
    return importlib.import_module(KERNELS[self.name])

  def _split(self, run, args, outputs):
    if self.mesh is None or self.mesh.size == 1:
      return run(*args)

    def spec(rank):  # [B, Q] or [B, K, ...]
      heads = () if rank == 2 else (self.heads,)
      return PartitionSpec(self.batch, *heads)

    return jax.shard_map(
      run,
      mesh=self.mesh,
      in_specs=tuple(spec(x.ndim) for x in args),
      out_specs=jax.tree.map(spec, outputs),
      check_vma=False,
    )(*args)


def choose(
  name: str, platform: str, head_dim: int, dtype: jnp.dtype
) -> tuple[str, str]:
  """The kernel to run, and the reason in words.

  Args:
    name: config.attention, of NAMES.
    platform: of the devices: cpu, tpu, gpu (or cuda).
    head_dim: E.
    dtype: of activations.
  """
  if name != "auto":
    return name, "config.attention asks for it"
  kernel = {"tpu": "tpu", "gpu": "gpu", "cuda": "gpu"}.get(platform)
  if kernel is None:
    return "xla", f"there is no kernel for {platform}"
  module = importlib.import_module(KERNELS[kernel])
  reason = module.supported(head_dim, dtype)
  if reason:
    return "xla", f"the {kernel} kernel does not support it: {reason}"
  return kernel, f"devices are {platform}"
