"""The parts of benchmarks/on_gpu.sh; each writes its figures as they come.

  python benchmarks/on_gpu.py PART --out=DIR [--seconds=N] [--tiny]

PART: kernels, mosaic, step, deterministic, flex, cross_entropy, decode. Figures
are lines of DIR/PART.jsonl, one a case. A case that is there is not measured
again, one that fails leaves its reason, and none begins after --seconds. --tiny
runs every line of a part at small shapes, on any machine.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import cross_entropy as vocabulary
import jax
import jax.numpy as jnp
import numpy as np
import on_gpu_report

from cacheaug import benchmark, sharding
from cacheaug import config as configs
from cacheaug.kernels import (
  context_attention,
  context_gpu,
  context_mosaic,
  self_check,
)
from cacheaug.lm import LM
from cacheaug.model import config as model_configs
from cacheaug.model import transformer
from cacheaug.projects.planning import memory
from cacheaug.run import machine
from cacheaug.weights import published

S, M, A = 2048, 128, 16
STEP = (("gemma2_2b", 16), ("gemma3_270m", 16), ("gemma2_2b", 32))
STEP += (("gemma3_270m", 32),)


class Figures:
  """The lines of one part's file, and what is left of its time."""

  def __init__(self, out: pathlib.Path, part: str, seconds: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    self.directory = out
    self._path = out / f"{part}.jsonl"
    self._end = time.monotonic() + seconds
    self._known = {
      line["case"]: line for line in on_gpu_report.read(self._path)
    }

  def measure(self, case: str, run: Callable[[], dict[str, Any]]) -> bool:
    """Writes what `run` returns, or why it failed; a known case is left.

    Returns whether its figures are there.
    """
    if case not in self._known:
      if time.monotonic() > self._end:
        print(f"{case}: no time left for it", flush=True)
        return False
      self._write({"case": case, "device": device_name(), **_outcome(run)})
    return "failed" not in self._known[case]

  def _write(self, line: dict[str, Any]) -> None:
    self._known[line["case"]] = line
    text = json.dumps(line)
    with self._path.open("a") as f:
      f.write(f"\n{text}\n")  # the line before may have been cut short
    print(text, flush=True)


def _outcome(run):
  try:
    return run()
  except Exception as e:  # the next case may well work
    reason = " ".join(str(e).split())[:300]
    return {"failed": f"{type(e).__name__}: {reason}"}


def device_name() -> str:
  """What jax calls the device."""
  return jax.devices()[0].device_kind


# --- kernels ------------------------------------------------------------------


def kernels(figures: Figures, tiny: bool) -> None:
  """Every published decoder's shapes: errors; useful TFLOP/s at full size."""
  dtypes = ("bfloat16",) if tiny else ("bfloat16", "float32")
  modules = [("kernel", context_gpu), ("xla", context_attention)]
  for names, shape in _decoders(tiny):
    for dtype in dtypes:
      run = functools.partial(_kernel, *shape, dtype, modules, tiny)
      figures.measure(f"{names} {dtype}", run)


def mosaic(figures: Figures, tiny: bool) -> None:
  """The same of the Mosaic kernels; a part, so that their failure is theirs."""
  for names, shape in _decoders(tiny):
    modules = [("kernel", context_mosaic)]
    run = functools.partial(_kernel, *shape, "bfloat16", modules, tiny)
    figures.measure(f"{names} bfloat16 mosaic", run)


def _decoders(tiny):
  """Pairs of names and their (head_dim, groups, softcap, key heads)."""
  seen = {}
  for name in published.PUBLISHED:
    c = model_of(name)
    key = c.head_dim, c.heads // c.kv_heads, c.attention_softcap, c.kv_heads
    seen.setdefault(key, []).append(name)
  found = [(", ".join(names), key) for key, names in seen.items()]
  return found[:1] if tiny else found


def _kernel(head_dim, groups, softcap, heads, dtype, modules, tiny):
  shapes = self_check.Shapes(head_dim, groups, softcap, dtype)
  found = {"shapes": dataclasses.asdict(shapes)}
  _, module = modules[0]
  if tiny and module is context_mosaic:
    # The interpreter of jax 0.10 hangs at larger arrays, like the check's.
    shapes = dataclasses.replace(shapes, head_dim=64)
  else:
    found |= _errors(shapes, module, tiny)
  if shapes.dtype == "bfloat16":
    found |= _speeds(shapes, heads, modules, tiny)
  return found


def _errors(shapes, module, tiny):
  case = self_check.make_case(shapes)
  first = case.q, case.keys, case.values, case.start, case.stop
  rest = case.lse.astype(np.float32), case.delta.astype(np.float32), case.dout
  keywords = _keywords(shapes, module, tiny)
  began = time.perf_counter()
  run = functools.partial(module.forward, **keywords)
  out, lse = jax.device_get(jax.jit(run)(*first))
  run = functools.partial(module.backward_dq, **keywords)
  dq = jax.device_get(jax.jit(run)(*first, *rest))
  return {
    "tolerance": self_check.TOLERANCE[shapes.dtype],
    "errors": self_check.errors_of(case, out, lse, dq),
    "check_seconds": time.perf_counter() - began,
  }


def _speeds(shapes, heads, modules, tiny):
  """At one sequence of the paper's traces: R = N + A - 1 rows, N = 16."""
  traces, rows, slots = (4, 3, 64) if tiny else (M, 31, S)
  heads = 1 if tiny else heads
  random = np.random.default_rng(0)
  points = np.sort(random.integers(0, slots, (1, traces)), 1)
  stop = (points + 1).repeat(rows * shapes.groups, 1).astype(np.int32)
  q_shape = 1, heads, stop.shape[1], shapes.head_dim
  k_shape = 1, heads, slots, shapes.head_dim
  keys = jax.random.split(jax.random.key(0), 4)

  def normal(key, shape):
    return jax.random.normal(key, shape, jnp.bfloat16)

  q, dout = normal(keys[0], q_shape), normal(keys[1], q_shape)
  k, v = normal(keys[2], k_shape), normal(keys[3], k_shape)
  q *= shapes.head_dim**-0.5
  pairs = heads * int(stop.sum())  # that are seen
  found = {}
  for name, module in modules:
    keywords = _keywords(shapes, module, tiny)
    forward = jax.jit(functools.partial(module.forward, **keywords))
    backward = jax.jit(functools.partial(module.backward_dq, **keywords))
    arguments = q, k, v, 0 * stop, stop
    out, lse = forward(*arguments)
    delta = (out * dout).sum(-1)
    for part, products, run in (
      ("forward", 2, functools.partial(forward, *arguments)),
      ("dq", 3, functools.partial(backward, *arguments, lse, delta, dout)),
    ):
      seconds = seconds_of(run, 1, 0) if tiny else seconds_of(run, 20)
      flop = 2 * products * pairs * shapes.head_dim
      speed = flop / seconds / 1e12
      found[f"{name} {part}"] = {"ms": 1e3 * seconds, "tflops": speed}
  return found


def _keywords(shapes, module, tiny):
  interpret = tiny and module is not context_attention
  more = {"interpret": True} if interpret else {}
  return {"softcap": shapes.softcap, **more}


def seconds_of(run: Callable[[], Any], repeats: int, before: int = 2) -> float:
  """Median of the time of `run`, waited for, after `before` other calls."""
  times = []
  for _ in range(before + repeats):
    began = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - began)
  return statistics.median(times[before:])


# --- the training step --------------------------------------------------------


def step(figures: Figures, tiny: bool) -> None:
  """Step time, MFU and memory; ratio to the dense references; largest batch."""
  for name, latents in STEP[:1] if tiny else STEP:
    case = f"{name} N={latents}"
    config = step_config(name, latents, tiny=tiny)
    peers = benchmark.PEERS[-1:] if tiny else benchmark.PEERS
    variants = ["structured", *peers]
    run = functools.partial(_step, config, variants)
    figures.measure(f"{case} batch 1", run)
    batch = largest_batch(config, doublings=1 if tiny else 4)
    while batch > 1:
      config.data.batch = batch
      run = functools.partial(_step, config, ["structured"])
      if figures.measure(f"{case} batch {batch}", run):
        break
      batch //= 2
  config = step_config("gemma2_2b", 16, tiny=tiny)
  config.attention = "xla"
  run = functools.partial(_step, config, ["structured"])
  figures.measure("gemma2_2b N=16 batch 1 attention=xla", run)
  figures.measure(
    "gemma2_2b N=16 profile",
    functools.partial(
      _profile, step_config("gemma2_2b", 16, tiny=tiny), figures.directory
    ),
  )


def deterministic(figures: Figures, tiny: bool) -> None:
  """The same step twice: equal bit for bit, and what that costs."""
  for on in (False, True):
    config = step_config("gemma2_2b", 16, tiny=tiny)
    config.deterministic = on
    run = functools.partial(_repeat, config)
    figures.measure(f"gemma2_2b N=16 batch 1 deterministic={on}", run)


def step_config(name: str, latents: int, *, tiny: bool = False) -> Any:
  """A published decoder's shape with random weights; nothing is read."""
  c = published.experiment(name)
  c.decoder.how_to_get = ""
  c.coprocessor.latents = latents
  c.traces.count, c.data.batch, c.mesh.fsdp = M, 1, 1
  c.optimizer.accumulation = 1
  if tiny:
    c.decoder.shape.update(
      vocab_size=512, width=64, layers=1, mlp_width=128, head_dim=32
    )
    c.coprocessor.latents, c.traces.count, c.data.sequence = 4, 4, 64
    c.precision.compute = c.precision.decoder = "float32"
    c.mesh.data = 1
    c.mesh.fsdp = jax.device_count()
    c.data.batch = jax.device_count()
  return configs.resolve(c, given=())


def largest_batch(config: Any, doublings: int) -> int:
  """The largest power of two that should fit, by arithmetic over shapes.

  Args:
    config: of the batch to begin with.
    doublings: of it, at most.
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  limit = stats.get("bytes_limit", 2**30)
  model_config = configs.model_of(config)
  batch = config.data.batch
  for _ in range(doublings):
    bigger = configs.resolve(config, given=())
    bigger.data.batch = 2 * batch
    sizes = memory.arithmetic(bigger, model_config, jax.device_count())
    if sizes.total > 0.95 * limit:
      break
    batch *= 2
  return batch


def _step(config, variants):
  found = benchmark.measure(config, variants, repeats=2, peers_remat="full")
  stats = jax.local_devices()[0].memory_stats() or {}
  return {
    "variants": [dataclasses.asdict(row) for row in found],
    # Of all that this process has run so far.
    "peak_bytes": stats.get("peak_bytes_in_use"),
  }


def _prepared(config):
  """A compiled step and its arguments."""
  from cacheaug import step as steps

  mesh = sharding.make_mesh(config.mesh)
  made = benchmark.prepare(config, mesh)
  batch = benchmark.random_batch(config, made.model, mesh)
  run = steps.make_step(
    config, made.model, made.optimizer, mesh, made.shardings
  )
  rest = made.decoder, batch, jax.random.key(0), np.bool_(False)
  return run.lower(made.state, *rest).compile(), made.state, rest


def _repeat(config):
  """Sums of the parameters after three steps, twice from the same state."""
  sums, times = [], []
  for _ in range(2):
    run, state, rest = _prepared(config)
    for _ in range(3):
      began = time.perf_counter()
      state, metrics = jax.block_until_ready(run(state, *rest))
      times.append(time.perf_counter() - began)
    # As integers: a sum of floats could hide what it should show.
    bits = jax.tree.map(
      lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32).sum(),
      state.params,
    )
    sums.append([int(x) for x in jax.tree.leaves(bits)])
    loss = float(metrics["loss"])
    del run, state, rest
  return {
    "ms": 1e3 * min(times),
    "loss": loss,
    "bit_identical": sums[0] == sums[1],
  }


def _profile(config, directory):
  """The five operations that take most of a step's time on the device."""
  run, state, rest = _prepared(config)
  state, _ = jax.block_until_ready(run(state, *rest))
  with jax.profiler.trace(str(directory / "profile")):
    jax.block_until_ready(run(state, *rest))
  return {"top": top_operations(directory / "profile", 5)}


def top_operations(directory: pathlib.Path, count: int) -> list[dict[str, Any]]:
  """[{name, ms, share}] of a trace's device lines; the host's without any."""
  path = max(directory.rglob("*.xplane.pb"), key=os.path.getmtime)
  planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
  chosen = [p for p in planes if "/device:" in p.name] or planes
  totals: dict[str, float] = {}
  for plane in chosen:
    for line in plane.lines:
      if "/device:" in plane.name and "Stream" not in line.name:
        continue  # the same time again, by module and by step
      for event in line.events:
        totals[event.name] = totals.get(event.name, 0.0) + event.duration_ns
  whole = sum(totals.values()) or 1.0
  best = sorted(totals.items(), key=lambda x: -x[1])[:count]
  return [{"name": k, "ms": v / 1e6, "share": v / whole} for k, v in best]


# --- loss over the vocabulary, decoding ---------------------------------------


def cross_entropy(figures: Figures, tiny: bool) -> None:
  """Errors against float64, time and memory, at two vocabularies."""
  # Rows of one sequence, M x A, and the width of each vocabulary's decoder.
  for v, width in ((512, 32),) if tiny else ((256_128, 2304), (262_144, 640)):
    for dtype in vocabulary.DTYPES:
      rows = 64 if tiny else M * A

      def run(v=v, dtype=dtype, rows=rows, width=width):
        found = vocabulary.measure(v, dtype, rows=rows, width=width)
        return {"rows": [dataclasses.asdict(row) for row in found]}

      figures.measure(f"V={v} {dtype}", run)


def decode(figures: Figures, tiny: bool) -> None:
  """Tokens a second beside what reading the weights alone would take."""
  chip = machine.of_device_kind(jax.devices()[0].device_kind)
  for name in ("gemma3_270m", "gemma2_2b"):
    for batch in (2,) if tiny else (1, 16):
      run = functools.partial(_decode, name, batch, chip, tiny)
      figures.measure(f"{name} batch {batch}", run)


def _decode(name, batch, chip, tiny):
  config = step_config(name, 16, tiny=tiny)
  c = configs.model_of(config)
  dtype = jnp.float32 if tiny else jnp.bfloat16
  model = transformer.Transformer(c, dtype=dtype)
  decoder = _random(model, dtype)
  lm = LM(model, decoder, None, "random")
  prompt, short, long = (8, 2, 6) if tiny else (512, 16, 144)
  tokens = np.random.default_rng(0).integers(0, c.vocab_size, (batch, prompt))
  context = lm.prefill(tokens)

  def seconds(new):
    return seconds_of(
      lambda: lm.decode(context, new, stop_ids=()), 1 if tiny else 3
    )

  each = (seconds(long) - seconds(short)) / (long - short)
  weights = sum(x.nbytes for x in jax.tree.leaves(decoder))
  size = jnp.dtype(dtype).itemsize
  slots = prompt + (long + short) / 2
  cache = 2 * c.layers * c.kv_heads * c.head_dim * slots * size * batch
  found = {
    "ms": 1e3 * each,
    "tokens_per_second": batch / each,
    "bytes": weights + cache,
  }
  if chip:
    floor = (weights + cache) / chip.memory_bandwidth
    found |= {"floor_ms": 1e3 * floor, "of_roofline": floor / each}
  return found


def _random(model, dtype):
  """A decoder's parameters, in the dtype that they are stored in."""
  import flax.linen as nn

  def init(key):
    params = nn.unbox(transformer.init(model, key))
    return jax.tree.map(lambda x: x.astype(dtype), params)

  return jax.jit(init)(jax.random.key(0))


def model_of(name: str) -> model_configs.ModelConfig:
  """A published decoder's architecture."""
  _, _, family, shape = published.PUBLISHED[name]
  return model_configs.make(family, **shape)


def flex(figures: Figures, tiny: bool) -> None:
  """The same step in PyTorch with FlexAttention's block masks."""
  import flex_peer

  figures.measure("same loss, small shapes", flex_peer.compare)
  names = ("gemma3_270m", "gemma2_2b")
  for name in names[:1] if tiny else names:
    config = step_config(name, 16, tiny=tiny)
    figures.measure(
      f"{name} N=16 batch 1", functools.partial(flex_peer.measure, config)
    )


PARTS = {
  "kernels": kernels,
  "mosaic": mosaic,
  "step": step,
  "deterministic": deterministic,
  "flex": flex,
  "cross_entropy": cross_entropy,
  "decode": decode,
}


def main() -> None:
  """Runs one part."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("part", choices=list(PARTS))
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--seconds", type=float, default=600.0)
  parser.add_argument("--tiny", action="store_true")
  args = parser.parse_args()
  # A part that is run again finds its programs.
  jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  figures = Figures(args.out, args.part, args.seconds)
  PARTS[args.part](figures, args.tiny)


if __name__ == "__main__":
  main()
