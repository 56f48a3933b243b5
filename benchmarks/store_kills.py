"""The store of contexts under kill -9 and under writers that meet.

  python benchmarks/store_kills.py --kills=200

Each round two processes write entries of a small set of keys, often the same,
and are killed with SIGKILL after a random few milliseconds. What they had
committed (`put` had returned) must be there and right, now and after all later
rounds; of all else a lookup gives the whole entry or none. Then two writers
run to their end. Exits with status 1 where that did not hold.

SIGKILL leaves the kernel's page cache alone: this shows that renames are
atomic and nothing is left behind, not that the disk keeps what it was synced.
Processes are forked, so this never imports JAX.
"""

import contextlib
import os
import pathlib
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

import numpy as np
from absl import flags

from cacheaug.projects.context_store.store import Entry, Identity, Store

_IDENTITY = Identity("decoder", "float32")
_KEYS = 48
_WRITERS = 2
_STRUCT = struct.Struct("<i")

flags.DEFINE_integer("kills", 200, "rounds, each of two writers killed")
flags.DEFINE_integer("entries", 200, "each writer's, of two that go on")
flags.DEFINE_string("store", "", "directory; '': one that is removed after")


def sample(i: int) -> Entry:
  """Entry i: the same anywhere, 3 to 400 KB."""
  rng = np.random.default_rng(i)
  filled = 2 + (i * i * 7) % 200
  keys, values = rng.standard_normal((2, 4, filled, 2, 32), np.float32)
  index = np.arange(filled, dtype=np.int32)
  return Entry(
    tokens=rng.integers(0, 1000, filled, np.int32),
    keys=keys,
    values=values,
    positions=index,
    segments=np.ones(filled, np.int32),
    slots=index,
    hidden=keys[0, 0, 0],
    position=filled,
  )


def intact(store: Store, i: int) -> bool | None:
  """Whether entry i is served as it was written; None: not served."""
  want = sample(i)
  found = store.get(_IDENTITY, want.tokens)
  if found is None:
    return None
  return all(
    np.array_equal(getattr(found, name), getattr(want, name))
    for name in ("tokens", "keys", "values", "hidden", "position", "slots")
  )


@contextlib.contextmanager
def writers(directory: pathlib.Path, seed: int, entries: int) -> Iterator:
  """Forked writers: their process ids, and where they report commits."""
  read, write = os.pipe()
  processes = []
  for number in range(_WRITERS):
    process = os.fork()
    if not process:
      try:
        _write(directory, seed * _WRITERS + number, entries, write)
        os._exit(0)
      except BaseException:
        traceback.print_exc()
        os._exit(1)
    processes.append(process)
  os.close(write)
  try:
    yield processes, read
  finally:
    os.close(read)


def _write(directory, seed, entries, pipe):
  store, rng = Store(directory), random.Random(seed)
  for _ in range(entries):
    i = rng.randrange(_KEYS)
    store.put(_IDENTITY, sample(i))
    os.write(pipe, _STRUCT.pack(i))


def _committed(pipe: int) -> list[int]:
  """Reads to the end: all that writers, now dead, have reported."""
  data = b""
  while chunk := os.read(pipe, 1 << 16):
    data += chunk
  return [i for (i,) in _STRUCT.iter_unpack(data)]


def kill(directory: pathlib.Path, rounds: int) -> dict[str, int]:
  """Counts of what happened in so many rounds."""
  rng, committed = random.Random(0), set()
  seen = dict(commits=0, caught=0, lost=0, torn=0)
  for seed in range(rounds):
    with writers(directory, seed, 10**9) as (processes, pipe):
      time.sleep(rng.uniform(0.002, 0.2))
      for process in processes:
        os.kill(process, signal.SIGKILL)
      for process in processes:
        os.waitpid(process, 0)
      new = _committed(pipe)
    seen["commits"] += len(new)
    left = list(directory.glob("*/.tmp-*"))
    seen["caught"] += bool(left)  # a write was under way
    for path in left:
      path.unlink()
    committed |= {*new}
    _look(directory, {*new}, new, seen)
  _look(directory, range(_KEYS), committed, seen)
  return seen


def _look(directory, keys, committed, seen):
  store = Store(directory)
  for i in keys:
    found = intact(store, i)
    seen["torn"] += found is False
    seen["lost"] += found is None and i in committed


def together(directory: pathlib.Path, entries: int) -> tuple[float, int]:
  """Seconds that two writers take for so many entries each; what was wrong."""
  begun = time.perf_counter()
  with writers(directory, 10**6, entries) as (processes, pipe):
    done = _committed(pipe)
    failed = sum(os.waitpid(p, 0)[1] != 0 for p in processes)
  seconds = time.perf_counter() - begun
  store = Store(directory)
  wrong = sum(not intact(store, i) for i in set(done))
  left = len(list(directory.glob("*/.tmp-*")))
  missing = _WRITERS * entries - len(done)
  return seconds, failed + wrong + left + missing


def main() -> int:
  """Reads the flags above; the exit status."""
  values = flags.FLAGS
  values(sys.argv)
  with tempfile.TemporaryDirectory() as scratch:
    directory = pathlib.Path(values.store or scratch) / "killed"
    seen = kill(directory, values.kills)
    print(
      f"{values.kills} rounds of {_WRITERS} writers killed, "
      f"{seen['caught']} with a write under way: {seen['commits']} commits, "
      f"{seen['lost']} lost, {seen['torn']} served torn"
    )
    directory = directory.with_name("together")
    seconds, wrong = together(directory, values.entries)
    print(
      f"{_WRITERS} writers at once, {values.entries} entries each in "
      f"{seconds:.1f} s: {wrong} wrong"
    )
  return int(bool(seen["lost"] or seen["torn"] or wrong))


if __name__ == "__main__":
  sys.exit(main())
