"""The trainer's own step, compiled for machines that are not here."""

import contextlib
import dataclasses
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
  """What the compiler says about one step on one device."""

  arguments: float  # bytes
  temporaries: float
  others: float  # outputs that are not in place, code
  seconds: float
  text: str | None  # the program; None where this jaxlib cannot read it


@dataclasses.dataclass(frozen=True)
class Refused:
  """The compiler's word that a step does not fit."""

  needed: float | None  # bytes, where it says them
  limit: float | None
  message: str
  seconds: float


def compile_step(
  config: ConfigDict, model_config: ModelConfig, devices: Sequence[jax.Device]
) -> Compiled | Refused:
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
    text=_text(compiled),
  )


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
