"""Machines by name, and their devices for a compiler where one is installed."""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from cacheaug.errors import UserError, one_line
from cacheaug.run.machine import CHIPS, Chip

_DIMENSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}
# libtpu looks for a machine's metadata, and prints what it does not find.
_QUIET = {
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TF_CPP_MIN_LOG_LEVEL": "3",
}


# What XLA knows of a GPU that it compiles for (stream_executor's
# GpuTargetConfigProto, from its own h100_sxm description): bytes of memory,
# bytes/s of it, and its name.
_GPU_TARGETS = {
  "h100": (84_929_347_584, 3_352_320_000_000, "NVIDIA H100 80GB HBM3"),
  "h200": (150_754_820_096, 4_800_000_000_000, "NVIDIA H200"),
}
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  device_memory_size: %d
  memory_bandwidth: %d
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "%s"
"""


class NoCompiler(Exception):
  """The reason why nothing can be compiled for a topology, in one line."""


@dataclasses.dataclass(frozen=True)
class Topology:
  """A number of slices of a chip, e.g. two of v5e:16x16."""

  chip: Chip
  shape: tuple[int, ...]  # of one slice
  slices: int = 1

  @property
  def name(self) -> str:
    """As --topology takes it."""
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def devices(self) -> int:
    """Chips of all slices."""
    return self.slices * math.prod(self.shape)


def parse(name: str, slices: int = 1) -> Topology:
  """The topology called `name`, CHIP:AxB[xC] or CHIP:NUMBER for GPUs.

  Raises:
    UserError: an unknown chip, or a shape that it does not come in.
  """
  chip, _, shape = name.partition(":")
  if chip not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
    raise UserError(
      f"--topology={name!r} is not CHIP:SHAPE with a chip of "
      f"{', '.join(CHIPS)}: for example v5e:16x16, v5p:4x4x8 or h100:8"
    )
  sizes = tuple(int(n) for n in shape.split("x"))
  dimensions = _DIMENSIONS.get(chip, 1)
  if len(sizes) != dimensions:
    example = "x".join("4" * dimensions) if dimensions > 1 else "8"
    raise UserError(
      f"--topology={name!r}: {chip} comes in {dimensions} "
      f"dimension{'s' if dimensions > 1 else ''}: for example {chip}:{example}"
    )
  return Topology(CHIPS[chip], sizes, slices)


def compiler_devices(topology: Topology) -> list[jax.Device]:
  """Devices to compile for, which need not be attached.

  Raises:
    NoCompiler: no libtpu, no CUDA plugin, or a GPU that is not described here.
    UserError: a shape that the compiler does not know.
  """
  for key, value in _QUIET.items():
    os.environ.setdefault(key, value)
  if topology.chip.kind == "gpu":
    return _gpus(topology)
  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise NoCompiler(
      "libtpu is not installed: pip install 'cacheaug[tpu]'"
    ) from e
  from jax.experimental import topologies

  more = {"num_slices": topology.slices} if topology.slices > 1 else {}
  if topology.chip.name == "v4":
    more["chip_config_name"] = "megacore"
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology.name, **more
    ).devices
  except jax.errors.JaxRuntimeError as e:
    reason = one_line(e)
    raise UserError(
      f"--topology={topology.name}: the compiler refuses it ({reason}): give "
      "a shape that is sold"
    ) from e


def _gpus(topology: Topology) -> list[jax.Device]:
  """See `compiler_devices`; XLA's own description of a Hopper GPU."""
  name = topology.chip.name
  if name not in _GPU_TARGETS:
    raise NoCompiler(
      f"GPU programs are compiled for {' and '.join(_GPU_TARGETS)} alone"
    )
  if importlib.util.find_spec("jax_plugins") is None:
    raise NoCompiler(
      "jax's CUDA plugin is not installed: pip install 'cacheaug[cuda]'"
    )
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(
      platform="cuda",
      target_config=_TARGET % _GPU_TARGETS[name],
      topology=f"{topology.slices}x1x{topology.shape[0]}",
    ).devices
  except Exception as e:  # plugins of several makers and versions
    reason = one_line(e)
    raise NoCompiler(f"jax's CUDA plugin refuses ({reason})") from e
