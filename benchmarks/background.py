"""Decoding while a slow coprocessor works in the background.

  python benchmarks/background.py --decoder=shipped:tiny
  python benchmarks/background.py --decoder=random --look=1 --what=speed
  python benchmarks/background.py --what=load --prompts=1000

'random' is a decoder of 37M parameters, for which a step takes long beside what
a look at the worker costs.

The coprocessor is random, of the decoder's architecture. Two parts:

  speed  tokens per second of one batch with a coprocessor that takes so many
         seconds longer than it must, over those of the frozen decoder alone,
         with a 95 % interval (turns.py). 'never' gives no latents before the
         end; 'waiting' waits for them before it goes on; 'plain' is the frozen
         decoder over itself: the measurement's own error.
  load   prompts of mixed lengths through one batch: some without latents, some
         cancelled, some empty, some past the context length. Counts what came
         back, compares every answer without latents with the same prompt's in
         another order and without a worker, and prints the host's memory.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import random
import statistics
import threading
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import turns
from absl import flags

import cacheaug
from cacheaug.augment import coprocessor
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import context as contexts
from cacheaug.inference.engine import Context
from cacheaug.inference.session import InsertionSchedule, Session
from cacheaug.model import config as model_config
from cacheaug.model import transformer
from cacheaug.model.transformer import Params, Transformer
from cacheaug.projects.background.serve import Answer, Server
from cacheaug.projects.background.session import BackgroundSession
from cacheaug.projects.background.worker import (
  Job,
  Limits,
  Metrics,
  Snapshot,
  Worker,
)
from cacheaug.run import command

_PARTS = ("speed", "load")
_NEVER = float("inf")

_RANDOM = dict(
  vocab_size=8192,
  width=512,
  layers=8,
  heads=8,
  kv_heads=8,
  head_dim=64,
  mlp_width=2048,
  max_positions=2048,
)

flags.DEFINE_string(
  "decoder", "shipped:tiny", "a Hugging Face directory, or random"
)
flags.DEFINE_list("what", list(_PARTS), "parts to run")
flags.DEFINE_integer("latents", 16, "N")
flags.DEFINE_integer("batch", 16, "B, sequences decoded together")
flags.DEFINE_integer("prompt_tokens", 64, "S, of speed")
flags.DEFINE_integer("new_tokens", 128, "T, of speed, and the most of load")
flags.DEFINE_list("slow", ["0", "0.02", "0.1"], "seconds the coprocessor adds")
flags.DEFINE_integer("look", 8, "tokens between looks at the worker")
flags.DEFINE_integer("repeats", 15, "blocks of speed, after one not timed")
flags.DEFINE_integer("prompts", 1000, "of load")
flags.DEFINE_string("json", "", "file to write the figures to")


class Slow(Worker):
  """A coprocessor that sleeps before it computes."""

  def __init__(self, *arguments: Any, seconds: float, **options: Any):
    self._seconds, self._wake = seconds, threading.Event()
    super().__init__(*arguments, **options)

  def compute(self, taken: Snapshot) -> np.ndarray:
    """As Worker's, later."""
    if self._seconds:
      self._wake.wait(None if self._seconds == _NEVER else self._seconds)
    return super().compute(taken)

  def close(self) -> None:
    """Also wakes what sleeps."""
    self._wake.set()
    super().close()


class Waiting(Slow):
  """Decoding waits for it."""

  def submit(self, *arguments: Any, **options: Any) -> Job | None:
    """As Worker's, once there is an outcome."""
    job = super().submit(*arguments, **options)
    if job is not None:
      job.wait()
    return job


@dataclasses.dataclass(frozen=True)
class Parts:
  """What all runs share."""

  model: Transformer
  decoder: Params
  coproc: Params
  spec: Layout

  def worker(self, kind: type[Slow], seconds: float, **options: Any) -> Slow:
    """A fresh one."""
    return kind(self.model, self.coproc, self.spec, seconds=seconds, **options)


def open_parts(path: str, n: int) -> Parts:
  """The decoder, and a coprocessor whose latents are no copies."""
  key = jax.random.key(0)
  if path == "random":
    model = Transformer(model_config.make("llama", **_RANDOM))
    decoder = nn.unbox(jax.jit(transformer.init, static_argnums=0)(model, key))
  else:
    lm = cacheaug.load(path, dtype="float32")
    model, decoder = lm.model, lm.decoder
  spec = Layout(n, 1, "overlay", "harmless")
  coproc = coprocessor.init(model, spec, key, decoder)
  shape = coproc["latent_projection"].shape
  coproc["latent_projection"] = 0.02 * jax.random.normal(key, shape)
  coproc["transformer"] = contexts.unstack_on_cpu(coproc["transformer"])
  return Parts(model, contexts.unstack_on_cpu(decoder), coproc, spec)


def bits(session: Session) -> list[bytes]:
  """All that a session has come to."""
  state = session.state
  return [np.asarray(x).tobytes() for x in (state.generated, state.hidden)]


def speed(parts: Parts, context: Context, slow: list[float]) -> dict[str, Any]:
  """Ratios to the decoder alone, lateness, and whether bits agree."""
  values = flags.FLAGS
  new = values.new_tokens

  def timed(session: Session) -> float:
    jax.block_until_ready(session.state)
    begun = time.perf_counter()
    session.run(new)
    jax.block_until_ready(session.state)
    return time.perf_counter() - begun

  def plain() -> tuple[float, Session]:
    session = Session(parts.model, parts.decoder, context, max_new_tokens=new)
    return timed(session), session

  def behind(kind, seconds) -> tuple[float, Session, Metrics]:
    with parts.worker(kind, seconds) as worker:
      session = BackgroundSession(
        parts.model,
        parts.decoder,
        context,
        worker=worker,
        max_new_tokens=new,
        poll_every=values.look,
      )
      took = timed(session)
      return took, session, worker.metrics()

  kinds = {f"{s:g} s": (Slow, s) for s in slow}
  kinds |= {f"waiting {s:g} s": (Waiting, s) for s in slow[-1:]}
  kinds |= {"never": (Slow, _NEVER), "plain": None, "alone": None}
  late = {name: collections.Counter() for name in kinds}
  ends: dict[str, list[bytes]] = {}

  def timed_way(name) -> float:
    if kinds[name] is None:
      took, session = plain()
    else:
      took, session, metrics = behind(*kinds[name])
      late[name] += metrics.lateness
    if name in ("never", "plain"):
      ends[name] = bits(session)
    return took

  ways = {name: functools.partial(timed_way, name) for name in kinds}
  seconds = turns.take(ways, values.repeats)
  base = seconds.pop("alone")
  found: dict[str, Any] = {
    "alone": statistics.median(base),
    "ratios": {k: turns.ratio(base, v) for k, v in seconds.items()},
    "lateness": {k: dict(sorted(late[k].items())) for k in seconds},
    "never equals plain": ends["never"] == ends["plain"],
  }
  ready = Session(
    parts.model,
    parts.decoder,
    context,
    max_new_tokens=new,
    coproc=parts.coproc,
    spec=parts.spec,
  )
  ready.run(new)
  late_by_none = bits(behind(Waiting, 0.0)[1])
  found["late by 0 equals synchronous"] = bits(ready) == late_by_none
  return found


@dataclasses.dataclass(frozen=True)
class Asked:
  """One request of the load."""

  prompt: list[int]
  most: int
  latents: bool
  kind: str  # "whole", "cancelled", "empty" or "long"


def requests(parts: Parts, count: int, new: int) -> list[Asked]:
  """Random ones: one in 20 of each kind that does not run to its end."""
  rng, config = random.Random(0), parts.model.config
  room = config.max_positions - new
  out = []
  for i in range(count):
    kind = {0: "empty", 1: "long", 2: "cancelled"}.get(i % 20, "whole")
    tokens = rng.randint(parts.spec.context_needed, min(200, room))
    tokens = {"empty": 0, "long": config.max_positions}.get(kind, tokens)
    prompt = [rng.randrange(3, config.vocab_size) for _ in range(tokens)]
    most = rng.randint(new // 4, new)
    out.append(Asked(prompt, most, rng.random() < 0.7, kind))
  rng.shuffle(out)
  return out


def megabytes() -> float:
  """Of this process's memory that is resident."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def load(parts: Parts, asked: list[Asked], seconds: float) -> dict[str, Any]:
  """Counts, times, memory and the worker's metrics."""
  values = flags.FLAGS
  options = dict(
    max_new_tokens=values.new_tokens, batch=values.batch, poll_every=values.look
  )
  plan = InsertionSchedule(every=values.new_tokens // 2)
  with parts.worker(Slow, seconds, limits=Limits(waiting=2)) as worker:
    server = Server(
      parts.model, parts.decoder, worker=worker, plan=plan, **options
    )
    begun = time.perf_counter()
    answers, memory = drive(server, asked)
    took = time.perf_counter() - begun
    metrics = worker.metrics()
  plain = Server(parts.model, parts.decoder, **options)
  again, _ = drive(plain, asked[::-1])
  again = again[::-1]
  kinds = collections.Counter()
  wrong = 0
  for one, answer, alone in zip(asked, answers, again, strict=True):
    kinds[f"{one.kind}: {answer.ended}"] += 1
    wrong += crossed(one, answer, alone, parts.spec.latents)
  return {
    "seconds": took,
    "answers": dict(sorted(kinds.items())),
    "wrong": wrong,
    "compared": sum(a.ended == "length" and not a.insertions for a in answers),
    "errors": sorted({a.error for a in answers if a.error}),
    "tokens per second": sum(len(a.ids) for a in answers) / took,
    "memory": memory,
    "metrics": dataclasses.asdict(metrics)
    | {"lateness": dict(sorted(metrics.lateness.items()))},
    "hit rate": metrics.hit_rate,
  }


def crossed(one: Asked, answer: Answer, alone: Answer, n: int) -> bool:
  """Whether an answer cannot be this request's."""
  if one.kind in ("empty", "long"):
    return answer.ended != "error" or "\n" in answer.error
  places = [x.position - x.step + n for x in answer.insertions]
  if any(place != len(one.prompt) for place in places):
    return True  # Latents of a prompt of another length.
  if answer.insertions and not one.latents:
    return True
  if one.kind == "whole" and len(answer.ids) != one.most:
    return True
  first = min((x.step for x in answer.insertions), default=len(answer.ids))
  # Up to its first latents a request says what the frozen decoder says.
  first = min(first, len(alone.ids))
  return answer.ids[:first] != alone.ids[:first]


def drive(
  server: Server, asked: list[Asked]
) -> tuple[list[Answer], dict[str, float]]:
  """Answers in the order asked, and memory at shares of the answers."""
  rng, numbers, found = random.Random(1), [], {}
  memory: dict[str, float] = {}
  ahead, cancel = list(asked), []
  while ahead or server.pending:
    # As a queue of callers would: never all at once.
    while ahead and server.pending < 200:
      one = ahead.pop(0)
      numbers.append(
        server.submit(one.prompt, max_new_tokens=one.most, latents=one.latents)
      )
      if one.kind == "cancelled":
        cancel.append(numbers[-1])
    for answer in server.step():
      if answer.request in found:
        raise RuntimeError(f"two answers to request {answer.request}")
      found[answer.request] = answer
      share = f"{len(found) * 10 // len(asked) * 10} %"
      memory[share] = megabytes()
    if cancel and rng.random() < 0.3:
      # The oldest, which run or wait; those that have ended stay whole.
      server.cancel(cancel.pop(0))
  lost = set(numbers) - set(found)
  if lost:
    raise RuntimeError(f"no answer to requests {sorted(lost)}")
  return [found[number] for number in numbers], memory


def show_speed(found: dict[str, Any], tokens: int) -> None:
  """Prints the table."""
  rate = tokens / found["alone"]
  print(f"frozen decoder alone: {rate:.0f} tokens/s")
  print("coprocessor     over the decoder alone  lateness: sequences")
  for name, ratio in found["ratios"].items():
    late = ", ".join(f"{d}: {c}" for d, c in found["lateness"][name].items())
    print(f"{name:14}  {turns.shown(ratio):22}  {late or 'none came'}")
  for name in ("never equals plain", "late by 0 equals synchronous"):
    print(f"{name}, bit for bit: {found[name]}")


def show_load(found: dict[str, Any]) -> None:
  """Prints what came of it."""
  for kind, count in found["answers"].items():
    print(f"{count:5}  {kind}")
  print("\n".join(f"  {line}" for line in found["errors"][:4]))
  print(
    f"lost 0, crossed or otherwise wrong {found['wrong']}; whole answers "
    f"without latents, all compared: {found['compared']}"
  )
  print(
    f"{found['seconds']:.1f} s, {found['tokens per second']:.0f} tokens/s; "
    "resident MB at shares of the answers: "
    + ", ".join(f"{k} {v:.0f}" for k, v in found["memory"].items())
  )
  counts = found["metrics"]
  print(f"hit rate {found['hit rate']:.3f}; {counts}")


def main() -> None:
  """Reads the flags above."""
  values = flags.FLAGS
  if set(values.what) - set(_PARTS):
    raise UserError(f"--what={','.join(values.what)}: {' and '.join(_PARTS)}")
  parts = open_parts(values.decoder, values.latents)
  size = sum(x.size for x in jax.tree.leaves(parts.decoder))
  print(
    f"{size / 1e6:.2f}M parameters, batch {values.batch}, N={values.latents}, "
    f"a look every {values.look} tokens, {jax.default_backend()}",
    flush=True,
  )
  results: dict[str, Any] = {}
  if "speed" in values.what:
    shape = values.batch, values.prompt_tokens
    tokens = np.random.default_rng(0).integers(
      3, parts.model.config.vocab_size, shape, dtype=np.int32
    )
    read = jax.jit(contexts.read, static_argnames="model")
    context = read(parts.model, parts.decoder, tokens, np.zeros_like(tokens))
    results["speed"] = speed(parts, context, [float(s) for s in values.slow])
    show_speed(results["speed"], values.batch * values.new_tokens)
  if "load" in values.what:
    asked = requests(parts, values.prompts, values.new_tokens)
    slowest = max(map(float, values.slow))
    results["load"] = load(parts, asked, slowest)
    show_load(results["load"])
  if values.json:
    pathlib.Path(values.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
  command.run(main, __doc__)
