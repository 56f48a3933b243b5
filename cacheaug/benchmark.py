"""Measures a config's training step against the ways most would write first.

  python -m cacheaug.benchmark --config=configs/benchmark.py
      [--against=naive,cached_dense] [--repeats=5] [--json]

Runs the step that `cacheaug.main` runs, of random tokens, and the same step
with the peers of projects/speed/dense_reference.py in place of the objective,
in one process, in turns of a few steps; prints the median of each. Peers keep
what automatic differentiation keeps (remat 'none'), as a first version would,
unless --peers_remat says otherwise. `useful` counts the structured step's FLOP
without recomputation, for every variant; MFU is their share of the devices'
peak, where that is known. Without weights (`decoder.path`), random ones.
"""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from cacheaug import build, validate
from cacheaug.errors import UserError
from cacheaug.run import command

PEERS = ("naive", "cached_dense")
STEPS = 3  # timed steps of a turn, after one that is not


@dataclasses.dataclass(frozen=True)
class Measured:
  """One variant's figures; times in seconds, memory in bytes."""

  variant: str
  loss: float  # of the first step
  seconds: float  # median of a step
  fastest: float
  compile_seconds: float
  temporary_bytes: int  # compiled, each device's
  traces_per_second: float
  useful_flop: float  # of a step, all devices
  mfu: float | None  # None where the devices' peak is not known
  gradient_difference: float | None  # largest of any leaf, relative


def measure(
  config: ConfigDict,
  variants: Sequence[str],
  *,
  repeats: int = 5,
  peers_remat: str = "none",
  gradients: bool = False,
) -> list[Measured]:
  """Figures of 'structured' and of any PEERS, run in turns.

  Args:
    config: an experiment with the coprocessor objective.
    variants: 'structured' and names of PEERS.
    repeats: turns of each variant, STEPS timed steps long.
    peers_remat: the peers' config.remat.
    gradients: also compare each variant's gradients with the first one's.

  Raises:
    UserError: an impossible config, or an unknown variant.
  """
  import jax

  from cacheaug import flops, sharding
  from cacheaug.augment import objective
  from cacheaug.projects.speed import dense_reference
  from cacheaug.run import machine
  from cacheaug.step import make_step

  losses = {
    "structured": objective.coprocessor_loss,
    "naive": dense_reference.naive_loss,
    "cached_dense": dense_reference.cached_dense_loss,
  }
  unknown = [name for name in variants if name not in losses]
  if unknown:
    raise UserError(
      f"--against={unknown[0]!r} is not one of {', '.join(PEERS)}"
    )
  if repeats < 1:
    raise UserError(f"--repeats={repeats} must be at least 1")
  if config.objective != "coprocessor":
    raise UserError(
      f"objective={config.objective!r}: only 'coprocessor' has variants"
    )
  validate.check_config(config, jax.device_count())
  config = ConfigDict(config)
  # All variants go on from one state: it must not move.
  config.optimizer.learning_rate = 1e-12
  mesh = sharding.make_mesh(config.mesh)
  made = prepare(config, mesh)
  model, decoder, state = made.model, made.decoder, made.state
  shardings = made.shardings
  batch = random_batch(config, model, mesh)
  key, reset = jax.random.key(config.seed), np.bool_(False)
  others = model.clone(remat=peers_remat)

  compiled, took = {}, {}
  for name in variants:
    runs = model if name == "structured" else others
    step = make_step(
      config, runs, made.optimizer, mesh, shardings, losses[name]
    )
    began = time.perf_counter()
    compiled[name] = step.lower(state, decoder, batch, key, reset).compile()
    took[name] = time.perf_counter() - began
  differences = dict.fromkeys(variants)
  if gradients:
    differences = _differences(
      config, {n: (losses[n], model) for n in variants}, state, decoder, batch
    )
  first, times = {}, {name: [] for name in variants}
  for _ in range(repeats):
    for name in variants:
      # Steps of a kind come one after the other, as in training: the first of
      # a turn, which finds the other variant's memory, is not counted.
      for i in range(1 + STEPS):
        began = time.perf_counter()
        state, metrics = compiled[name](state, decoder, batch, key, reset)
        jax.block_until_ready((state, metrics))
        if i:
          times[name].append(time.perf_counter() - began)
        first.setdefault(name, float(metrics["loss"]))
        # The same points for all, which are drawn by the step.
        zero = jax.device_put(np.int32(0), shardings.step)
        state = state.replace(step=zero)
  useful = flops.of_step(config, model.config).total
  peak = machine.peak_flops(mesh.devices.flat)
  found = []
  for name in variants:
    seconds = statistics.median(times[name])
    memory = compiled[name].memory_analysis()
    found.append(
      Measured(
        variant=name,
        loss=first[name],
        seconds=seconds,
        fastest=min(times[name]),
        compile_seconds=took[name],
        temporary_bytes=memory.temp_size_in_bytes,
        traces_per_second=config.data.batch * config.traces.count / seconds,
        useful_flop=useful,
        mfu=useful / seconds / peak if peak else None,
        gradient_difference=differences[name],
      )
    )
  return found


@dataclasses.dataclass
class Prepared:
  """What a step runs on."""

  model: Any
  decoder: Any
  state: Any
  shardings: Any  # of the state
  optimizer: Any


def prepare(config: ConfigDict, mesh: Any) -> Prepared:
  """Model, random weights (or those of decoder.path), a fresh state."""
  from functools import partial

  import jax

  from cacheaug import config as configs
  from cacheaug import optim
  from cacheaug.step import abstract_state, init_state

  if config.decoder.path:
    model, _ = build.open_model(config, mesh)
  else:
    model = build.make_model(config, configs.model_of(config), mesh)
  decoder, _ = build.load_decoder(config, model, mesh)
  optimizer, _ = optim.make_optimizer(config.optimizer, config.optimizer.steps)
  wanted = abstract_state(config, model, optimizer, decoder, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, wanted)
  fresh = partial(init_state, config, model, optimizer, False)
  key = jax.random.key(config.seed)
  state = jax.jit(fresh, out_shardings=shardings)(decoder, key)
  return Prepared(model, decoder, state, shardings, optimizer)


def random_batch(config: ConfigDict, model: Any, mesh: Any) -> dict[str, Any]:
  """Random tokens, a document a sequence."""
  from cacheaug import sharding

  shape = config.data.batch, config.data.sequence
  draw = np.random.default_rng(config.seed)
  batch = {
    "tokens": draw.integers(0, model.config.vocab_size, shape, np.int32),
    "documents": np.zeros(shape, np.int32),
  }
  return sharding.put_global(batch, sharding.batch_sharding(mesh))


def _differences(config, variants, state, decoder, batch):
  """Largest relative difference of any gradient leaf from the first's."""
  import jax
  import jax.numpy as jnp

  from cacheaug import config as configs
  from cacheaug.step import add_points

  spec = configs.layout_of(config)

  def gradient(name):
    sums, model = variants[name]

    @jax.jit
    def run(params, decoder, batch):
      points = add_points(config, batch, jax.random.key(config.seed), 0)[
        "points"
      ]

      def loss(params):
        nll, tokens = sums(model, decoder, params, batch, points, spec)
        return nll.sum() / tokens.sum()

      return jax.grad(loss)(params)

    return run(params, decoder, batch)

  params = state.params
  if "latent_projection" in params:
    # Of zeros it would give the coprocessor's body no gradient.
    w = params["latent_projection"]
    noise = 0.02 * jax.random.normal(jax.random.key(1), w.shape, w.dtype)
    params = params | {"latent_projection": noise}

  first, *others = variants
  reference = gradient(first)
  found = {first: 0.0}
  for name in others:
    differences = jax.tree.map(
      lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(b),
      gradient(name),
      reference,
    )
    found[name] = float(max(map(float, jax.tree.leaves(differences))))
  return found


def table(found: Sequence[Measured]) -> str:
  """Plain text; ratios are of the first row's time and memory."""
  first = found[0]
  head = (
    f"{'variant':14}{'step':>10}{'x':>7}{'temporary':>12}{'x':>7}"
    f"{'useful':>10}{'MFU':>7}{'traces/s':>10}{'loss':>10}"
  )
  lines = [head]
  for row in found:
    mfu = "-" if row.mfu is None else f"{100 * row.mfu:.1f}%"
    memory = row.temporary_bytes / max(first.temporary_bytes, 1)
    lines.append(
      f"{row.variant:14}{row.seconds * 1e3:>7.1f} ms"
      f"{row.seconds / first.seconds:>7.2f}"
      f"{row.temporary_bytes / 1e6:>9.1f} MB{memory:>7.2f}"
      f"{row.useful_flop / 1e9:>8.1f}GF{mfu:>7}"
      f"{row.traces_per_second:>10.1f}{row.loss:>10.5f}"
    )
    if row.gradient_difference:
      lines.append(
        f"{'':14}gradients differ by {row.gradient_difference:.1e} (relative, "
        "any leaf)"
      )
  return "\n".join(lines)


def main() -> None:
  """Reads the flags, measures, prints."""
  import jax

  from cacheaug import config as configs
  from cacheaug.model import transformer

  flag = flags.FLAGS["config"]
  config = configs.resolve(
    CONFIG.value, given=config_flags.get_override_values(flag)
  )
  if PEERS_REMAT.value not in transformer.REMAT_POLICIES:
    raise UserError(
      f"--peers_remat={PEERS_REMAT.value!r} is not one of "
      f"{', '.join(transformer.REMAT_POLICIES)}"
    )
  # Weights are not what is measured: random ones serve.
  config.decoder.how_to_get = ""
  found = measure(
    config,
    ["structured", *filter(None, AGAINST.value)],
    repeats=REPEATS.value,
    peers_remat=PEERS_REMAT.value,
    gradients=GRADIENTS.value,
  )
  if JSON.value:
    json.dump([dataclasses.asdict(row) for row in found], sys.stdout, indent=2)
    print()
    return
  device = jax.devices()[0]
  print(
    f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}, "
    f"remat {config.remat} (peers: {PEERS_REMAT.value}), median of "
    f"{REPEATS.value * STEPS} steps"
  )
  print(table(found))


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, "experiment file")
  AGAINST = flags.DEFINE_list("against", list(PEERS), "peers to measure too")
  REPEATS = flags.DEFINE_integer("repeats", 5, f"turns of {STEPS} timed steps")
  PEERS_REMAT = flags.DEFINE_string(
    "peers_remat", "none", "what peers compute again, as config.remat"
  )
  GRADIENTS = flags.DEFINE_bool("gradients", False, "compare gradients too")
  JSON = flags.DEFINE_bool("json", False, "print JSON in place of a table")
  command.run(main, __doc__)
