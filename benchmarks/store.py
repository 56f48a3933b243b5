"""Time to the first token: a context from the store against reading it.

  python benchmarks/store.py --tokens=128,512,1000
  python benchmarks/store.py --decoder=path/to/tinystories --tokens=512,2000

Random tokens, one sequence, programs compiled; milliseconds, the least of the
repeats, which take turns, and in brackets the median of the processor's time
(all threads), which other work on the machine disturbs less. `read` reads the
prompt; `read, augment` inserts latents at its end as well; `stored` opens the
entry of either (checksum and all, from the page cache) and puts it on the
device; `begun` does so for all but the last 16 tokens and reads those. Each
ends with the first token said. Without --coprocessor, and with a --decoder,
the coprocessor is a random one.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

from cacheaug.augment import coprocessor
from cacheaug.augment.traces import Layout
from cacheaug.build import open_lm
from cacheaug.inference.engine import Context
from cacheaug.inference.session import Session
from cacheaug.lm import LM, Coprocessor
from cacheaug.projects.context_store.lm import StoredLM, context_of, with_store
from cacheaug.projects.context_store.store import Store
from cacheaug.run import command

_REST = 16  # tokens that `begun` has to read

flags.DEFINE_string("decoder", "", "a Hugging Face directory, or shipped:NAME")
flags.DEFINE_string("coprocessor", "", "as of cacheaug.generate")
flags.DEFINE_list(
  "tokens", ["128", "512", "1000"], "S, a row of the table each"
)
flags.DEFINE_integer("repeats", 9, "timed, after one that is not")


def open_both(decoder: str, coproc: str) -> LM:
  """The decoder, with a coprocessor in any case."""
  if coproc or not decoder:
    return open_lm("", decoder, coproc, True)
  lm = open_lm("", decoder, "", False)
  spec = Layout(latents=8, ahead=1)
  params = coprocessor.init(lm.model, spec, jax.random.key(0), lm.decoder)
  fields = {**vars(lm), "coprocessor": Coprocessor(params, spec)}
  return LM(**{k: v for k, v in fields.items() if not k.startswith("_")})


def first_token(lm: StoredLM, context: Context) -> int:
  """Says one."""
  session = Session(lm.model, lm._layers, context, max_new_tokens=64)
  return int(session.run(1)[0, 0])


def measure(lm: StoredLM, tokens: list[int], repeats: int) -> dict[str, str]:
  """Milliseconds by name, as shown; the entry's size."""
  start, kinds = tokens[:-_REST], (False, True)
  for latents in kinds:
    lm.fill([tokens], latents, 1)

  def stored(latents):
    at = (len(tokens),) if latents else ()
    found = lm.store.get(lm.identity(latents), tokens, at)
    return context_of([found])

  def begun():
    found = lm.store.longest(lm.identity(True), tokens)
    assert len(found.tokens) == len(start)
    return context_of([lm.read_on(found, tokens[-_REST:])])

  def turns(ways: dict[str, Callable[[], Context]]):
    wall, busy = ({name: [] for name in ways} for _ in range(2))
    said = {}
    for _ in range(repeats + 1):
      for name, way in ways.items():
        begin = time.perf_counter(), time.process_time()
        said[name] = first_token(lm, way())
        wall[name].append(time.perf_counter() - begin[0])
        busy[name].append(time.process_time() - begin[1])
    shown = {
      name: f"{1e3 * min(wall[name][1:]):.1f} "
      f"({1e3 * statistics.median(busy[name][1:]):.1f})"
      for name in ways
    }
    return shown, said

  found, said = turns(
    {
      "read": lambda: lm.prefill([tokens]),
      "stored": lambda: stored(False),
      "read, augment": lambda: lm.augment(lm.prefill([tokens])),
      "stored, augmented": lambda: stored(True),
    }
  )
  assert said["read"] == said["stored"]
  assert said["read, augment"] == said["stored, augmented"]
  for _, path, size in lm.store.files():
    found["MiB"] = f"{size / 2**20:.2f}"  # of the last, which is augmented
    path.unlink()
  lm.fill([start], True, 1)
  return found | turns({"begun": begun})[0]


def main() -> None:
  """Reads the flags above."""
  values = flags.FLAGS
  lm = open_both(values.decoder, values.coprocessor)
  size = sum(x.size for x in jax.tree.leaves(lm.decoder))
  print(f"{size / 1e6:.2f}M parameters, N={lm.coprocessor.spec.latents}, ms")
  names = ("read", "stored", "read, augment", "stored, augmented", "begun")
  print("tokens   MiB" + "".join(f"{name:>19}" for name in names))
  for count in map(int, values.tokens):
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, lm.model.config.vocab_size, count).tolist()
    with tempfile.TemporaryDirectory() as scratch:
      found = measure(with_store(lm, Store(scratch)), tokens, values.repeats)
    shown = "".join(f"{found[name]:>19}" for name in names)
    print(f"{count:6}  {found['MiB']:>4}{shown}", flush=True)


if __name__ == "__main__":
  command.run(main, __doc__)
