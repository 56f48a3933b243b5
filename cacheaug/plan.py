"""What a run needs on machines that are not here, before paying for them.

  python -m cacheaug.plan --config=configs/gemma2b.py --topology=v5e:16x16
      [--slices=N] [--mfu=0.4] [--nocompile] [--json] [--config.key=value ...]

Topologies: v4, v5e, v5p and v6e with a slice's shape (v5e:16x16, v5p:4x4x8),
h100, h200 and a100 with a number (h100:8); --slices joins several over the
data-centre network.

Where libtpu is installed (pip install 'cacheaug[tpu]') the whole training step
is compiled for TPUs without one: its memory, or the compiler's refusal, and its
collectives are then the compiler's own. That takes minutes for a large model.
Everything else is arithmetic over shapes. No weights are needed: the decoder is
known by its shape, or by config.json where decoder.path is given.
"""

import contextlib
import dataclasses
import json
import re
import time
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from cacheaug import command
from cacheaug.errors import UserError

_GIGA = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says about one step on one device."""

  arguments: float  # bytes
  temporaries: float
  others: float  # outputs that are not in place, code
  seconds: float
  text: str


@dataclasses.dataclass(frozen=True)
class Refused:
  """The compiler's word that a step does not fit."""

  needed: float | None  # bytes, where it says them
  limit: float | None
  message: str
  seconds: float


def prepare(config: ConfigDict, *, slices: int = 0):
  """(config, model_config) to plan with; no weights, no device.

  Raises:
    UserError: a shape that is not known.
  """
  from cacheaug import config as configs
  from cacheaug.model import pretrained

  config = ConfigDict(config.copy_and_resolve_references())
  # On accelerators, which is where plans are for.
  for key in ("compute", "decoder"):
    if config.precision[key] == "auto":
      config.precision[key] = "bfloat16"
  if slices:
    config.mesh.slices = slices
  if config.decoder.path:
    model_config = pretrained.read_config(
      pretrained.resolve(config.decoder.path)
    )
  else:
    config.decoder.how_to_get = ""
    if all(value is None for value in config.decoder.shape.values()):
      raise UserError(
        "decoder.shape is empty: give its keys, or decoder.path of a directory "
        "with config.json"
      )
    model_config = configs.model_of(config)
  configs.validate_model(config, model_config)
  return config, model_config


def compile_step(config: ConfigDict, model_config, devices) -> Any:
  """The trainer's own step compiled for devices that are not here.

  Returns:
    Compiled, or Refused where it does not fit.
  """
  import jax
  import jax.numpy as jnp

  from cacheaug import optim, sharding, train
  from cacheaug.planning import memory

  mesh = sharding.make_mesh(config.mesh, devices)
  state, decoder, batch = memory.abstract_arguments(config, model_config, mesh)
  optimizer, _ = optim.make_optimizer(config.optimizer, config.optimizer.steps)
  step = train.make_step(
    config,
    train.make_model(config, model_config),
    optimizer,
    mesh,
    jax.tree.map(lambda x: x.sharding, state),
  )
  whole = sharding.replicated(mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
  reset = jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole)
  began = time.monotonic()
  traced = step.trace(state, decoder, batch, key, reset)
  try:
    # Nothing of it could run here, so there is nothing worth keeping.
    with _no_cache():
      compiled = traced.lower(lowering_platforms=("tpu",)).compile()
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return _refused(str(e), time.monotonic() - began)
  stats = compiled.memory_analysis()
  return Compiled(
    arguments=stats.argument_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    others=stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.generated_code_size_in_bytes,
    seconds=time.monotonic() - began,
    text=compiled.as_text(),
  )


@contextlib.contextmanager
def _no_cache():
  import jax

  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def _refused(message: str, seconds: float) -> Refused:
  numbers = [
    float(number) * 1024 ** " KMGT".index(unit)
    for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)
  ]
  line = " ".join(message.split()).partition(" HLO module")[0]
  return Refused(
    needed=numbers[0] if numbers else None,
    limit=numbers[1] if len(numbers) > 1 else None,
    message=line.partition(": ")[2][:240],
    seconds=seconds,
  )


def plan(
  config: ConfigDict, topology, *, mfu: float = 0.4, compiling: bool = True
) -> dict[str, Any]:
  """Everything that the command prints, as one JSON-like dictionary.

  Args:
    config: resolved (see config.resolve).
    topology: of planning.topology.parse.
    mfu: useful FLOP/s over peak that the estimate assumes.
    compiling: ask the compiler where there is one.

  Raises:
    UserError: what would stop the run itself too.
  """
  from cacheaug import config as configs
  from cacheaug import flops
  from cacheaug.planning import advice, collectives, memory, times
  from cacheaug.planning import topology as topologies

  config, model_config = prepare(config, slices=topology.slices)
  devices = topology.devices
  configs.validate(config, devices)
  mesh = memory.abstract_mesh(config, devices)
  bytes_of = memory.arithmetic(config, model_config, devices)

  compiled, reason = None, "--compile=False"
  if compiling:
    try:
      found = topologies.compiler_devices(topology)
      compiled = compile_step(config, model_config, found)
    except topologies.NoCompiler as e:
      reason = str(e)

  expected = times.expected_traffic(config, model_config, topology)
  traffic, limit = expected, topology.chip.memory
  arguments, temporaries = bytes_of.arguments, bytes_of.temporaries
  others, fits = 0.0, bytes_of.total <= limit
  if isinstance(compiled, Compiled):
    arguments, temporaries = compiled.arguments, compiled.temporaries
    others, fits = compiled.others, True  # or it would have been refused
    traffic = collectives.of_program(compiled.text, topology.slices)
  elif isinstance(compiled, Refused):
    fits, limit = False, compiled.limit or limit
    # Its number is of temporaries alone, or of everything.
    needed = compiled.needed or 0.0
    if "temporaries" not in compiled.message:
      needed -= arguments
    temporaries = max(needed, 1.01 * limit - arguments)

  found = times.of_step(config, model_config, topology, traffic, mfu=mfu)
  steps = config.optimizer.steps
  parameters = memory.abstract_arguments(config, model_config, mesh)
  return {
    "topology": topology.name,
    "slices": topology.slices,
    "devices": devices,
    "mesh": dict(mesh.shape),
    "parameters": {
      "frozen": times.parameters(parameters[1]),
      "trained": times.parameters(parameters[0].params),
    },
    "batch": {
      "sequences": config.data.batch,
      "accumulation": config.optimizer.accumulation,
      "on_device_at_once": memory.micro_batch(config, mesh),
      "tokens": config.data.batch * config.data.sequence,
    },
    "memory": {
      "kinds": bytes_of.kinds,
      "arguments": bytes_of.arguments,
      "temporaries": bytes_of.temporaries,
      "arithmetic": bytes_of.total,
      "total": arguments + temporaries + others,
      "limit": limit,
      "fits": fits,
    },
    "compiled": _describe(compiled, reason),
    "remedies": []
    if fits
    else [
      dataclasses.asdict(r)
      for r in advice.remedies(
        config,
        model_config,
        devices,
        temporaries=temporaries,
        others=others,
        limit=limit,
      )
    ],
    "collectives": [dataclasses.asdict(t) for t in traffic],
    "collectives_expected": [dataclasses.asdict(t) for t in expected],
    "flops": {
      "useful": flops.of_step(config, model_config).total,
      "peak": topology.chip.flops * devices,
    },
    "seconds": dataclasses.asdict(found)
    | {"floor": found.floor, "bound": found.bound},
    "mfu_assumed": mfu,
    "steps": steps,
    "days": times.days(found.estimate, steps),
    "days_at_the_floor": times.days(found.floor, steps),
    "device_hours": 24 * devices * times.days(found.estimate, steps),
  }


def _describe(compiled: Any, reason: str) -> dict[str, Any]:
  if compiled is None:
    return {"done": False, "reason": reason}
  found = dataclasses.asdict(compiled)
  found.pop("text", None)
  return {"done": True, "fits": isinstance(compiled, Compiled)} | found


def table(p: dict[str, Any]) -> str:
  """A plan as a person reads it."""
  slices = f"{p['slices']} slices of " if p["slices"] > 1 else ""
  mesh = ", ".join(f"{k} {v}" for k, v in p["mesh"].items())
  batch = p["batch"]
  lines = [
    f"{slices}{p['topology']}: {p['devices']} devices, mesh {mesh}",
    f"{p['parameters']['frozen']:,} parameters frozen, "
    f"{p['parameters']['trained']:,} trained",
    f"{batch['sequences']:,} sequences a step in {batch['accumulation']} "
    f"micro-batches, {batch['on_device_at_once']} on a device at once",
    "",
    *_memory_lines(p),
    "",
    *_traffic_lines(p),
    "",
    *_time_lines(p),
  ]
  return "\n".join(lines)


def _memory_lines(p: dict[str, Any]) -> list[str]:
  from cacheaug.planning import memory

  m, c = p["memory"], p["compiled"]
  lines = [f"{'GiB on each device':34}{'shapes':>10}{'compiler':>10}"]

  def row(name: str, size: float, compiler: float | None = None) -> None:
    said = "" if compiler is None else f"{compiler / _GIGA:10.2f}"
    lines.append(f"{name:34}{size / _GIGA:10.2f}{said}")

  for kind in memory.ARGUMENTS:
    row(f"  {kind}", m["kinds"][kind])
  row("before a step", m["arguments"], c.get("arguments"))
  for kind in memory.TEMPORARIES:
    row(f"  {kind}", m["kinds"][kind])
  row("made and freed by a step", m["temporaries"], c.get("temporaries"))
  if "others" in c:
    lines.append(f"{'code, new outputs':44}{c['others'] / _GIGA:10.2f}")
  row("total", m["arithmetic"], m["total"] if c["done"] else None)
  left = (m["limit"] - m["total"]) / _GIGA
  lines.append(
    f"of {m['limit'] / _GIGA:.2f}: "
    + (
      f"fits, {left:.2f} left" if m["fits"] else f"DOES NOT FIT by {-left:.2f}"
    )
  )
  if not c["done"]:
    lines.append(f"nothing was compiled ({c['reason']}): shapes alone")
  elif not c["fits"]:
    lines.append(f"the compiler, in {c['seconds']:.0f} s: {c['message']}")
  else:
    lines.append(f"compiled in {c['seconds']:.0f} s")
  if p["remedies"]:
    lines += ["", "keys that would help, GiB (by shapes; ask again with them):"]
  for r in p["remedies"]:
    fits = "fits" if r["fits"] else "not enough"
    other = "" if r["same_result"] else ", another experiment"
    lines.append(
      f"  {r['keys']}: saves {r['saves'] / _GIGA:.2f}, leaves "
      f"{r['total'] / _GIGA:.2f}: {fits}{other}"
    )
  return lines


def _traffic_lines(p: dict[str, Any]) -> list[str]:
  def one(t: dict[str, Any]) -> str:
    times = f"{t['count']:>9,} x" if t["count"] else " " * 11
    return f"  {t['kind']:20}{t['between']:9}{times}{t['bytes'] / 1e9:12.3f}"

  head = f"{'collectives a step, GB out of a device':44}"
  if p["compiled"]["done"] and p["compiled"]["fits"]:
    wanted = sum(t["bytes"] for t in p["collectives_expected"]) / 1e9
    found = sum(t["bytes"] for t in p["collectives"]) / 1e9
    return [
      f"{head}(compiled)",
      *map(one, p["collectives"]),
      f"{'  all':42}{found:12.3f}",
      f"{'  what the mesh needs, by arithmetic':42}{wanted:12.3f}",
    ]
  return [f"{head}(by arithmetic)", *map(one, p["collectives"])]


def _time_lines(p: dict[str, Any]) -> list[str]:
  s = p["seconds"]
  useful = p["flops"]["useful"]
  return [
    f"seconds a step: floor {s['floor']:.3f} ({s['bound']}): compute "
    f"{s['compute']:.3f} (useful {useful / 1e12:,.0f} TFLOP), HBM "
    f"{s['memory']:.3f}, ICI {s['ici']:.3f}, DCN {s['dcn']:.3f}",
    f"estimate {s['estimate']:.3f}, assuming {p['mfu_assumed']:.0%} of the "
    "peak (an assumption, not a measurement: --mfu)",
    f"{p['steps']:,} steps: {p['days']:.1f} days, {p['device_hours']:,.0f} "
    f"device-hours; at the floor {p['days_at_the_floor']:.1f} days",
  ]


def main() -> None:
  """Reads the flags that are defined below."""
  import jax

  # Whatever is attached here is not what is planned for.
  jax.config.update("jax_platforms", "cpu")
  from cacheaug import config as configs
  from cacheaug.planning import topology as topologies

  values = flags.FLAGS
  if not values.topology:
    raise UserError("--topology is missing: for example --topology=v5e:16x16")
  if not 0.0 < values.mfu <= 1.0:
    raise UserError(f"--mfu={values.mfu} must be above 0 and at most 1")
  flag = values["config"]
  config = configs.resolve(
    flag.value, given=config_flags.get_override_values(flag)
  )
  slices = config.mesh.slices if values.slices is None else values.slices
  if slices < 1:
    raise UserError(f"--slices={slices} must be at least 1")
  topology = topologies.parse(values.topology, slices)
  found = plan(config, topology, mfu=values.mfu, compiling=values.compile)
  print(json.dumps(found, indent=2) if values.json else table(found))


if __name__ == "__main__":
  config_flags.DEFINE_config_file("config", None, "experiment file")
  flags.DEFINE_string("topology", "", "CHIP:SHAPE, for example v5e:16x16")
  flags.DEFINE_integer(
    "slices", None, "slices joined by the network; default: mesh.slices"
  )
  flags.DEFINE_float("mfu", 0.4, "share of the peak that is assumed")
  flags.DEFINE_bool("compile", True, "ask the compiler where it is installed")
  flags.DEFINE_bool("json", False, "print all figures as JSON")
  command.run(main, __doc__)
