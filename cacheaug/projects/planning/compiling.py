"""Compiles the trainer's own step for machines that need not be attached."""

import contextlib
import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cacheaug import build, optim, sharding
from cacheaug.model.config import ModelConfig
from cacheaug.step import make_step


@dataclasses.dataclass(frozen=True)
class Compiled:
  """The compiler's figures of one step on one device.

  They are those of one version: another one chooses other layouts and overlaps
  other transfers with compute.
  """

  arguments: float  # bytes
  temporaries: float
  others: float  # outputs that are not in place, code
  seconds: float
  text: str | None  # the program; None where this jaxlib cannot read it


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
  """The compiler's refusal of a step that does not fit."""

  needed: float | None  # bytes, where it says them
  limit: float | None
  message: str
  seconds: float


def compile_step(
  config: ConfigDict, model_config: ModelConfig, devices: Sequence[jax.Device]
) -> Compiled | OutOfMemory:
  """One training step compiled, or refused where it does not fit.

  Args:
    config: checked, without 'auto' precision.
    model_config: the decoder's.
    devices: of topology.compiler_devices.
  """
  mesh = sharding.make_mesh(config.mesh, devices)
  state, decoder, batch = build.abstract_arguments(config, model_config, mesh)
  optimizer, _ = optim.make_optimizer(config.optimizer, config.optimizer.steps)
  step = make_step(
    config,
    build.make_model(config, model_config, mesh),
    optimizer,
    mesh,
    jax.tree.map(lambda x: x.sharding, state),
  )
  whole = sharding.replicated(mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
  reset = jax.ShapeDtypeStruct((), jnp.bool_, sharding=whole)
  began = time.monotonic()
  platform, options, context = "tpu", {}, contextlib.nullcontext()
  if devices[0].platform != "tpu":
    # Nothing can be timed here, so nothing is chosen by timing; and kernels
    # ask the context which GPU they are for.
    platform, options = "cuda", {"xla_gpu_autotune_level": 0}
    context = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
  with context:
    traced = step.trace(state, decoder, batch, key, reset)
    lowered = traced.lower(lowering_platforms=(platform,))
  try:
    # Nothing of it could run here, so there is nothing worth keeping.
    with _no_cache():
      compiled = lowered.compile(compiler_options=options)
  except jax.errors.JaxRuntimeError as e:
    if "RESOURCE_EXHAUSTED" not in str(e):
      raise
    return _out_of_memory(str(e), time.monotonic() - began)
  stats = compiled.memory_analysis()
  return Compiled(
    arguments=stats.argument_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    others=stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.generated_code_size_in_bytes,
    seconds=time.monotonic() - began,
    text=_text(compiled),
  )


def versions(platform: str) -> str:
  """The compiler's and jax's, which every figure of theirs belongs to.

  Args:
    platform: 'tpu' or 'gpu'.
  """
  compiler = "libtpu" if platform == "tpu" else "jaxlib"
  found = []
  for name in (compiler, "jax"):
    try:
      found.append(f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
      found.append(f"{name} of unknown version")
  return ", ".join(found)


def _text(compiled: jax.stages.Compiled) -> str | None:
  # libtpu may be newer than jaxlib, and use instructions that it cannot parse
  # (jaxlib 0.10.2 with libtpu 0.0.52: asynchronous updates, on v5p and v6e).
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError:
    return None


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)


def _out_of_memory(message: str, seconds: float) -> OutOfMemory:
  numbers = [
    float(number) * 1024 ** " KMGT".index(unit)
    for number, unit in re.findall(r"([\d.]+)([KMGT])\b", message)
  ]
  line = " ".join(message.split()).partition(" HLO module")[0]
  return OutOfMemory(
    needed=numbers[0] if numbers else None,
    limit=numbers[1] if len(numbers) > 1 else None,
    message=line.partition(": ")[2][:240],
    seconds=seconds,
  )
