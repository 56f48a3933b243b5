"""Names the machine and the commit behind a figure; peaks of known chips."""

import dataclasses
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one chip; nobody reaches them, so times from them are floors."""

  name: str
  kind: str  # 'tpu' or 'gpu'
  flops: float  # FLOP/s, dense bfloat16 matrix products, float32 sums
  memory: float  # bytes of HBM that one program may use
  memory_bandwidth: float  # bytes/s
  ici: float  # bytes/s out of the chip over all its fast links
  dcn: float  # bytes/s out of the chip's share of its host's network card


# TPU: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e. ICI there counts both
# directions (v5e 400 GB/s, v5p 1200, v6e 800, v4 600): half of it leaves. DCN
# is the pod's or host's network over its chips (v5e 6.4 Tbit/s over 256, v6e
# 25.6 over 256, v4 and v5p 200 Gbit/s over a host's four).
# Memory is what their compiler admits.
# GPU: NVIDIA's data sheets of the SXM parts, without sparsity. NVLink there
# counts both directions (900 GB/s, A100 600). DCN is one InfiniBand port a GPU,
# as in the makers' eight-GPU machines (400 Gbit/s, A100 200). L4 and RTX 4090
# have PCIe 4.0 x16 in NVLink's place (32 GB/s each way) and, assumed, 100 and
# 10 Gbit/s of network.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", "tpu", 275e12, 30.75 * 2**30, 1.228e12, 300e9, 6.25e9),
    Chip("v5e", "tpu", 197e12, 15.75 * 2**30, 0.819e12, 200e9, 3.125e9),
    Chip("v5p", "tpu", 459e12, 95.73 * 2**30, 2.765e12, 600e9, 6.25e9),
    Chip("v6e", "tpu", 918e12, 31.24 * 2**30, 1.638e12, 400e9, 12.5e9),
    Chip("h100", "gpu", 989e12, 80e9, 3.35e12, 450e9, 50e9),
    Chip("h200", "gpu", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    Chip("a100", "gpu", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    Chip("l4", "gpu", 121e12, 24e9, 0.3e12, 32e9, 12.5e9),
    Chip("rtx4090", "gpu", 165.2e12, 24e9, 1.008e12, 32e9, 1.25e9),
  )
}

# What jax calls them (jax.Device.device_kind), by its start: the longest that
# matches wins. Other parts whose names begin alike (PCIe, NVL, laptops) are
# left out, so that no MFU is shown for them.
_KINDS = {
  "TPU v4": "v4",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
  "NVIDIA H100 80GB HBM3": "h100",
  "NVIDIA H200": "h200",
  "NVIDIA A100-SXM4": "a100",
  "NVIDIA L4": "l4",
  "NVIDIA GeForce RTX 4090": "rtx4090",
}
_OTHERS = (
  "TPU v4 lite",
  "NVIDIA H200 NVL",
  "NVIDIA L40",
  "NVIDIA GeForce RTX 4090 ",  # D, Laptop GPU
)


def of_device_kind(kind: str) -> Chip | None:
  """The chip behind jax's `device_kind`; None where its peaks are unknown."""
  if kind.startswith(_OTHERS):
    return None
  prefixes = [k for k in _KINDS if kind.startswith(k)]
  return CHIPS[_KINDS[max(prefixes, key=len)]] if prefixes else None


def peak_flops(devices: Iterable[Any]) -> float | None:
  """FLOP/s of all devices together; None where one's peak is unknown."""
  chips = [of_device_kind(device.device_kind) for device in devices]
  return None if None in chips else sum(chip.flops for chip in chips)


def commit() -> str:
  """The checkout's commit, '+ changes' if it has any; 'unknown' without git."""

  def git(*arguments):
    return subprocess.run(
      ["git", *arguments],
      cwd=Path(__file__).resolve().parent.parent,  # the package's folder
      capture_output=True,
      text=True,
      check=True,
      timeout=20,
    ).stdout.strip()

  try:
    head = git("rev-parse", "--short=10", "HEAD")
    # Of the package alone: results lie in checkouts, too.
    return head + (" + changes" if git("status", "--porcelain", ".") else "")
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def hardware() -> str:
  """Devices, processor cores, versions."""
  devices = jax.devices()
  return (
    f"{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} processor "
    f"cores, {platform.machine()}, Python {platform.python_version()}, jax "
    f"{jax.__version__}"
  )
