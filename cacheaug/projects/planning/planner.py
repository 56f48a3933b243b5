"""Makes a plan: all figures that the command prints, as plain numbers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from cacheaug import build, flops, sharding, validate
from cacheaug.model.config import ModelConfig
from cacheaug.projects.planning import (
  advice,
  collectives,
  compiling,
  memory,
  times,
)
from cacheaug.projects.planning import topology as topologies
from cacheaug.projects.planning.collectives import CollectiveBytes
from cacheaug.projects.planning.compiling import Compiled, OutOfMemory
from cacheaug.projects.planning.memory import Memory
from cacheaug.projects.planning.topology import Topology


def prepare(
  config: ConfigDict, *, slices: int = 0
) -> tuple[ConfigDict, ModelConfig]:
  """(config, model_config) to plan with; no weights, no device.

  Raises:
    UserError: a shape that is not known.
  """
  config = ConfigDict(config.copy_and_resolve_references())
  # On accelerators, which is where plans are for.
  for key in ("compute", "decoder"):
    if config.precision[key] == "auto":
      config.precision[key] = "bfloat16"
  if slices:
    config.mesh.slices = slices
  if not config.decoder.path:
    config.decoder.how_to_get = ""
  return config, build.described_model(config)


def plan(
  config: ConfigDict,
  topology: Topology,
  *,
  mfu: float = 0.4,
  use_compiler: bool = True,
) -> dict[str, Any]:
  """Everything that the command prints, as one JSON-like dictionary.

  Args:
    config: resolved (see config.resolve).
    topology: of planning.topology.parse.
    mfu: useful FLOP/s over peak that the estimate assumes.
    use_compiler: ask the compiler where there is one.

  Raises:
    UserError: what would stop the run itself too.
  """
  config, model_config = prepare(config, slices=topology.slices)
  validate.check_config(config, topology.devices)
  shapes = memory.arithmetic(config, model_config, topology.devices)
  compiled, reason = None, "--compile=False"
  if use_compiler:
    try:
      devices = topologies.compiler_devices(topology)
      compiled = compiling.compile_step(config, model_config, devices)
    except topologies.NoCompiler as e:
      reason = str(e)
  expected = times.expected_traffic(config, model_config, topology)
  traffic, unread = expected, None
  if isinstance(compiled, Compiled):
    try:
      traffic = collectives.of_program(compiled.text or "", topology.slices)
    except collectives.Unreadable as e:
      unread = str(e)
  return {
    **_subject(config, model_config, topology),
    "compiled": _describe(compiled, reason, unread, topology),
    **_memory(config, model_config, topology, shapes=shapes, compiled=compiled),
    "collectives": [dataclasses.asdict(t) for t in traffic],
    "collectives_expected": [dataclasses.asdict(t) for t in expected],
    **_times(config, model_config, topology, traffic=traffic, mfu=mfu),
  }


def _subject(
  config: ConfigDict, model_config: ModelConfig, topology: Topology
) -> dict[str, Any]:
  """What is planned, in numbers."""
  mesh = sharding.abstract_mesh(config, topology.devices)
  state, decoder, _ = build.abstract_arguments(config, model_config, mesh)
  return {
    "topology": topology.name,
    "slices": topology.slices,
    "devices": topology.devices,
    "mesh": dict(mesh.shape),
    "parameters": {
      "frozen": build.parameters(decoder),
      "trained": build.parameters(state.params),
    },
    "batch": {
      "sequences": config.data.batch,
      "accumulation": config.optimizer.accumulation,
      "on_device_at_once": memory.micro_batch(config, mesh),
      "tokens": config.data.batch * config.data.sequence,
    },
  }


def _describe(
  compiled: Compiled | OutOfMemory | None,
  reason: str | None,
  unread: str | None,
  topology: Topology,
) -> dict[str, Any]:
  if compiled is None:
    return {"done": False, "reason": reason}
  found = dataclasses.asdict(compiled)
  found.pop("text", None)
  if isinstance(compiled, Compiled):
    found["collectives_read"] = unread is None
    found["collectives_unread"] = unread
  found["by"] = compiling.versions(topology.chip.kind)
  return {"done": True, "fits": isinstance(compiled, Compiled)} | found


def _memory(
  config: ConfigDict,
  model_config: ModelConfig,
  topology: Topology,
  *,
  shapes: Memory,
  compiled: Compiled | OutOfMemory | None,
) -> dict[str, Any]:
  """Bytes by kind, whether they fit, and what would make them."""
  arguments, temporaries, others = shapes.arguments, shapes.temporaries, 0.0
  limit = topology.chip.memory
  fits = shapes.total <= limit
  if isinstance(compiled, Compiled):
    arguments, temporaries = compiled.arguments, compiled.temporaries
    others = compiled.others
    # A TPU's compiler would have refused it, a GPU's does not look.
    fits = topology.chip.kind == "tpu" or (
      arguments + temporaries + others <= limit
    )
  elif isinstance(compiled, OutOfMemory):
    fits, limit = False, compiled.limit or limit
    # Its number is of temporaries alone, or of everything.
    needed = compiled.needed or 0.0
    if "temporaries" not in compiled.message:
      needed -= arguments
    temporaries = max(needed, 1.01 * limit - arguments)
  suggestions = []
  if not fits:
    suggestions = advice.suggestions(
      config,
      model_config,
      topology.devices,
      temporaries=temporaries,
      others=others,
      limit=limit,
    )
  return {
    "memory": {
      "kinds": shapes.kinds,
      "arguments": shapes.arguments,
      "temporaries": shapes.temporaries,
      "arithmetic": shapes.total,
      "total": arguments + temporaries + others,
      "limit": limit,
      "fits": fits,
    },
    "suggestions": [dataclasses.asdict(r) for r in suggestions],
  }


def _times(
  config: ConfigDict,
  model_config: ModelConfig,
  topology: Topology,
  *,
  traffic: Sequence[CollectiveBytes],
  mfu: float,
) -> dict[str, Any]:
  """Seconds of a step, days and device-hours of the run."""
  found = times.of_step(config, model_config, topology, traffic, mfu=mfu)
  steps = config.optimizer.steps
  days = times.days(found.estimate, steps)
  return {
    "flops": {
      "useful": flops.of_step(config, model_config).total,
      "peak": topology.chip.flops * topology.devices,
    },
    "seconds": dataclasses.asdict(found)
    | {"floor": found.floor, "bound": found.bound},
    "mfu_assumed": mfu,
    "steps": steps,
    "days": days,
    "days_at_the_floor": times.days(found.floor, steps),
    "device_hours": 24 * topology.devices * days,
  }
