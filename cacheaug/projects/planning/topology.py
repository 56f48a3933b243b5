"""Machines by name, and their devices for the compiler where it is there."""

import dataclasses
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


class NoCompiler(Exception):
  """Why nothing can be compiled for a topology here, in one line."""


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many slices of so many chips, e.g. two of v5e:16x16."""

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
  """Devices that programs can be compiled for, though none is here.

  Raises:
    NoCompiler: a GPU, or no libtpu.
    UserError: a shape that the compiler does not know.
  """
  if topology.chip.kind != "tpu":
    raise NoCompiler("GPU programs are compiled on a GPU alone")
  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise NoCompiler(
      "libtpu is not installed: pip install 'cacheaug[tpu]'"
    ) from e
  from jax.experimental import topologies

  for key, value in _QUIET.items():
    os.environ.setdefault(key, value)
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
