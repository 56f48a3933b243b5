"""Least seconds of a step, and days of a run at an assumed MFU."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from ml_collections import ConfigDict

from cacheaug import build, flops, sharding
from cacheaug.model.config import ModelConfig
from cacheaug.projects.planning import memory
from cacheaug.projects.planning.collectives import CollectiveBytes
from cacheaug.projects.planning.topology import Topology
from cacheaug.run.machine import Chip


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one step: what each resource needs alone, and an estimate."""

  compute: float  # useful FLOP at the chips' peak
  memory: float  # weights and what is kept, through HBM once a use
  ici: float  # collectives within a slice over all links at once
  dcn: float  # collectives between slices
  estimate: float  # at the assumed MFU, or the floor where that is longer

  @property
  def floor(self) -> float:
    """The longest of the four: a step cannot be faster."""
    return max(self.compute, self.memory, self.ici, self.dcn)

  @property
  def bound(self) -> str:
    """Which of the four that is."""
    return max(("compute", "memory", "ici", "dcn"), key=self.__getattribute__)


def of_step(
  config: ConfigDict,
  model_config: ModelConfig,
  topology: Topology,
  traffic: Sequence[CollectiveBytes],
  *,
  mfu: float,
) -> Times:
  """Floors and estimate for a config on a topology.

  Args:
    config: checked.
    model_config: the decoder's.
    topology: chips and their number.
    traffic: of the compiled program, or `expected_traffic`.
    mfu: useful FLOP/s over peak that is assumed, 0 to 1.
  """
  chip = topology.chip
  useful = flops.of_step(config, model_config).total
  compute = useful / (chip.flops * topology.devices)
  times = Times(
    compute=compute,
    memory=_hbm_bytes(config, model_config, topology) / chip.memory_bandwidth,
    ici=_seconds(traffic, "devices", chip),
    dcn=_seconds(traffic, "slices", chip),
    estimate=0.0,
  )
  return dataclasses.replace(times, estimate=max(compute / mfu, times.floor))


def _seconds(
  traffic: Sequence[CollectiveBytes], between: str, chip: Chip
) -> float:
  speed = chip.ici if between == "devices" else chip.dcn
  return sum(t.bytes for t in traffic if t.between == between) / speed


def _weights(config: ConfigDict, model_config: ModelConfig) -> dict[str, float]:
  """Bytes of whole parameter trees as they are used, by whose they are."""
  c = model_config
  itemsize = jnp.dtype(config.precision.compute).itemsize
  blocks = flops.body_per_row(c) / 2 * itemsize
  embedding = c.vocab_size * c.width * itemsize
  return {"blocks": blocks, "embedding": embedding}


def _uses(config: ConfigDict) -> tuple[int, int]:
  """Times that a micro-batch uses (frozen, trained) blocks.

  Frozen: passes 1 and 3, and the backward of 3. Trained: forward, backward.
  Each backward pass uses them once more where it computes products again.
  """
  again = 1 if config.remat == "full" else 0
  if config.objective == "language_model":
    return 0, 2 + again
  return 3 + again, 2 + again


def _hbm_bytes(
  config: ConfigDict, model_config: ModelConfig, topology: Topology
) -> float:
  mesh = sharding.abstract_mesh(config, topology.devices)
  weights = _weights(config, model_config)
  micro = sum(_uses(config)) * weights["blocks"] + 2 * weights["embedding"]
  kept = memory.micro_batch(config, mesh) * memory.kept_per_sequence(
    config, model_config
  )
  state, _, _ = build.abstract_arguments(config, model_config, mesh)
  each = micro / mesh.shape["tensor"] + 2 * kept
  # A step reads and writes the state, and each micro-batch its gradients.
  each += 2 * memory.on_device(state.params)
  return config.optimizer.accumulation * each + 2 * memory.on_device(state)


def expected_traffic(
  config: ConfigDict, model_config: ModelConfig, topology: Topology
) -> list[CollectiveBytes]:
  """Collectives that this split needs, by arithmetic; loops' counts are 0.

  Over fsdp: weights gathered for every use, gradients reduced and scattered,
  every micro-batch. Over data: gradients reduced once a step (once more
  between slices). Over tensor: two sums of the rows a layer and direction.
  """
  mesh = sharding.abstract_mesh(config, topology.devices)
  data, fsdp, tensor = (mesh.shape[a] for a in ("data", "fsdp", "tensor"))
  k, weights = config.optimizer.accumulation, _weights(config, model_config)
  state, _, _ = build.abstract_arguments(config, model_config, mesh)
  gradients = memory.on_device(state.params)
  sizes = flops.sizes_of(config)
  rows = sizes.sequence + 2 * (sizes.latent_rows + sizes.decoder_rows)
  if config.objective == "language_model":
    rows = 2 * sizes.sequence
  found = []

  def add(kind: str, size: float, between: str = "devices") -> None:
    if size:
      found.append(CollectiveBytes(kind, between, 0, size))

  used = sum(_uses(config)) * weights["blocks"] + 2 * weights["embedding"]
  add("all-gather", k * used / tensor * (fsdp - 1) / fsdp)
  # Float32 once summed on a device; sent as they are computed.
  sent = gradients / 4 * jnp.dtype(config.precision.compute).itemsize
  add("reduce-scatter", k * sent * (fsdp - 1))
  within = data // topology.slices
  add("all-reduce", 2 * gradients * (within - 1) / within)
  if tensor > 1:
    row = model_config.width * jnp.dtype(config.precision.compute).itemsize
    sums = 2 * model_config.layers * rows * memory.micro_batch(config, mesh)
    add("all-reduce", k * sums * row * 2 * (tensor - 1) / tensor)
  slices = topology.slices
  add("all-reduce", 2 * gradients * (slices - 1) / slices, "slices")
  return found


def days(seconds: float, steps: int) -> float:
  """Days of a number of steps."""
  return seconds * steps / 86_400
