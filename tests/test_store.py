"""The store's files: whole or absent, found by prefix, within a limit."""

import dataclasses
import errno
import importlib.util
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cacheaug.errors import UserError
from cacheaug.projects.context_store.store import Entry, Identity, Store

_ROOT = Path(__file__).resolve().parent.parent
OWNER = Identity("decoder", "float32", "coprocessor", '{"latents": 4}')


def make(tokens, *, latents_at=(), dtype=np.float32, seed=0) -> Entry:
  rng = np.random.default_rng(seed)
  filled = len(tokens) + 2 * len(latents_at)
  keys, values = rng.standard_normal((2, 3, filled, 2, 4)).astype(dtype)
  index = np.arange(filled, dtype=np.int32)
  return Entry(
    tokens=np.array(tokens, np.int32),
    keys=keys,
    values=values,
    positions=index + 5,
    segments=np.ones(filled, np.int32),
    slots=index,
    hidden=rng.standard_normal(6).astype(dtype),
    position=filled + 5,
    latents_at=tuple(latents_at),
    padding=5,
  )


def same(a: Entry, b: Entry) -> None:
  for field in dataclasses.fields(Entry):
    x, y = getattr(a, field.name), getattr(b, field.name)
    if isinstance(y, np.ndarray):
      assert (x.dtype, x.shape) == (y.dtype, y.shape), field.name
      assert x.tobytes() == y.tobytes(), field.name
    else:
      assert x == y, field.name


@pytest.fixture
def lines():
  """Warnings of the store, which go through absl's logger."""
  found = []

  class Keep(logging.Handler):
    def emit(self, record):
      found.append(record.getMessage())

  handler = Keep(logging.WARNING)
  logging.getLogger("absl").addHandler(handler)
  yield found
  logging.getLogger("absl").removeHandler(handler)


@pytest.mark.parametrize(
  "dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str
)
def test_round_trip_in_another_process_s_store(tmp_path, dtype):
  entry = make([3, 1, 4], latents_at=(2, 3), dtype=dtype)
  assert Store(tmp_path).put(OWNER, entry)
  store = Store(tmp_path)
  same(store.get(OWNER, [3, 1, 4], (2, 3)), entry)
  assert store.has(OWNER, [3, 1, 4], (2, 3))
  ((_, path, size),) = store.files()
  assert size == path.stat().st_size
  # Any reader of safetensors can open it.
  with safetensors.safe_open(path, framework="numpy") as file:
    assert file.metadata()["format"] == "cacheaug-context-1"
    assert file.get_slice("keys").get_shape() == list(entry.keys.shape)


def test_all_that_decides_an_entry_is_in_its_key(tmp_path):
  store = Store(tmp_path)
  store.put(OWNER, make([1, 2, 3], latents_at=(3,)))
  for name, other in dict(
    decoder="another",
    dtype="bfloat16",
    coprocessor="another",
    spec='{"latents": 8}',
  ).items():
    owner = dataclasses.replace(OWNER, **{name: other})
    assert store.get(owner, [1, 2, 3], (3,)) is None, name
    assert store.longest(owner, [1, 2, 3]) is None, name
  for tokens, at in (([1, 2], (3,)), ([1, 2, 4], (3,)), ([1, 2, 3], ())):
    assert store.get(OWNER, tokens, at) is None
    assert not store.has(OWNER, tokens, at)
  assert store.get(OWNER, [1, 2, 3], (3,))


def test_longest_beginning(tmp_path):
  store = Store(tmp_path)
  assert store.longest(OWNER, [1]) is None
  text = list(range(300))
  for length in (2, 20, 256, 257):
    store.put(OWNER, make(text[:length], seed=length))
  store.put(OWNER, make([*text[:100], 0], seed=1))
  store.put(OWNER, make([0] * 20, seed=2))
  for asked, length in (
    (1, 0),
    (2, 2),
    (19, 2),
    (20, 20),
    (256, 256),
    (300, 257),
  ):
    found = store.longest(OWNER, text[:asked])
    assert (0 if found is None else len(found.tokens)) == length
    if found:
      same(found, make(text[:length], seed=length))
  # Of the same tokens, latents at the end first, whatever the hashes.
  for at in ((7,), (20,), (5, 20), (3,)):
    store.put(OWNER, make(text[:20], latents_at=at))
  assert store.longest(OWNER, text[:30]).latents_at == (20,)
  # A damaged one gives way to the next best.
  (path,) = [p for _, p, _ in store.files() if p.name.startswith("00000257")]
  path.write_bytes(b"")
  assert len(store.longest(OWNER, text).tokens) == 256


def test_a_lookup_opens_no_other_file(tmp_path, monkeypatch):
  store = Store(tmp_path)
  for i in range(20):
    store.put(OWNER, make([i, *range(i)]))
  opened, real = [], Path.open
  monkeypatch.setattr(
    Path, "open", lambda p, *a: opened.append(p.name) or real(p, *a)
  )
  assert len(store.longest(OWNER, [9, *range(15)]).tokens) == 10
  assert len(opened) == 1 and opened[0].startswith("00000010-")


def test_damage_is_reported_removed_and_a_miss(tmp_path, lines):
  store, entry = Store(tmp_path), make([1, 2, 3], latents_at=(3,))

  def spoil(change) -> str:
    lines.clear()
    store.put(OWNER, entry)
    ((_, path, _),) = store.files()
    path.write_bytes(change(path.read_bytes()))
    assert store.get(OWNER, [1, 2, 3], (3,)) is None
    assert len(lines) == 1 and str(path) in lines[0], lines
    assert "\n" not in lines[0] and not path.exists()
    assert store.get(OWNER, [1, 2, 3], (3,)) is None and len(lines) == 1
    return lines[0]

  store.put(OWNER, entry)
  ((_, path, size),) = store.files()
  data = path.read_bytes()
  end = int.from_bytes(data[:8], "little") + 8
  pad = len(data[8:end]) - len(data[8:end].rstrip())
  places = {*range(0, size, 37), *range(9), end, size - 1}
  for at in places - set(range(end - pad, end)):  # blanks: nothing to damage
    spoil(
      lambda data, at=at: data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :]
    )
  for length in (0, 4, 8, end, size // 2, size - 1):
    spoil(lambda data, length=length: data[:length])
  foreign = safetensors.numpy.save({"keys": np.zeros(3, np.float32)})
  spoil(lambda _: foreign)
  spoil(lambda _: safetensors.numpy.save({}, {"format": "another"}))
  spoil(lambda _: b"not a tensor in it\n" * 9)
  store.put(OWNER, entry)
  same(store.get(OWNER, [1, 2, 3], (3,)), entry)


def test_an_entry_under_another_s_name_is_not_served(tmp_path, lines):
  store = Store(tmp_path)
  store.put(OWNER, make([1, 2, 3]))
  ((_, path, _),) = store.files()
  data = path.read_bytes()
  other = dataclasses.replace(OWNER, decoder="another")
  for owner, tokens in ((OWNER, [1, 2, 4]), (other, [1, 2, 3])):
    store.put(owner, make(tokens))
    (wrong,) = [p for _, p, _ in store.files() if p != path]
    wrong.write_bytes(data)
    assert store.get(owner, tokens) is None
    assert len(lines) == 1 and "damaged" in lines.pop()
  same(store.get(OWNER, [1, 2, 3]), make([1, 2, 3]))


def test_a_file_that_replaced_a_damaged_one_stays(tmp_path, lines, monkeypatch):
  store, entry = Store(tmp_path), make([1, 2])
  store.put(OWNER, entry)
  ((_, path, _),) = store.files()
  with monkeypatch.context() as patch:

    def damaged(*_):
      # Between the read and the removal another writer commits.
      patch.undo()
      Store(tmp_path).put(OWNER, entry)
      raise ValueError("damaged")

    patch.setattr(Store, "_path", damaged)
    assert store._read(OWNER, path) is None
  assert len(lines) == 1
  same(store.get(OWNER, [1, 2]), entry)
  assert not list(tmp_path.glob("*/.tmp-*"))


def test_what_was_used_longest_ago_goes(tmp_path, lines):
  entries = [make([i, 1, 2]) for i in range(6)]
  Store(tmp_path).put(OWNER, entries[0])
  size = Store(tmp_path).files()[0][2]
  store = Store(tmp_path, max_bytes=4 * size + size // 2)

  def age(i, seconds):
    os.utime(store._path(OWNER, entries[i].tokens, ()), (seconds, seconds))

  def there():
    return [i for i, e in enumerate(entries) if store.has(OWNER, e.tokens, ())]

  for i in range(4):
    store.put(OWNER, entries[i])
    age(i, 1000 + i)
  assert store.get(OWNER, entries[0].tokens)  # used now: the newest
  store.put(OWNER, entries[4])
  assert there() == [0, 2, 3, 4] and store.evicted == 1
  assert store.longest(OWNER, [2, 1, 2, 9])
  store.put(OWNER, entries[5])
  assert there() == [0, 2, 4, 5]
  small = Store(tmp_path, max_bytes=size - 1)
  assert not small.put(OWNER, entries[1])
  assert there() == [0, 2, 4, 5] and "not stored" in lines[-1]
  # The one just written stays, even if a clock has it as the oldest.
  one = Store(tmp_path, max_bytes=size)
  for i in there():
    age(i, time.time() + 1000)
  one.put(OWNER, entries[1])
  assert there() == [1]


def test_eviction_under_a_reader_is_no_more_than_a_miss(tmp_path, lines):
  entries = [make([i, 1, 2], seed=i) for i in range(8)]
  Store(tmp_path).put(OWNER, entries[0])
  limit = Store(tmp_path).files()[0][2] * 3
  failed, stop = [], threading.Event()

  def write(seed):
    store, rng = Store(tmp_path, limit), np.random.default_rng(seed)
    try:
      while not stop.is_set():
        store.put(OWNER, entries[rng.integers(8)])
    except BaseException as e:
      failed.append(e)

  threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
  for thread in threads:
    thread.start()
  store, hits, misses = Store(tmp_path), 0, 0
  end = time.monotonic() + 20
  while (hits < 30 or misses < 30) and time.monotonic() < end:
    for entry in entries:
      found = store.longest(OWNER, [*entry.tokens, 7])
      hits, misses = hits + bool(found), misses + (not found)
      if found:
        same(found, entry)
  stop.set()
  for thread in threads:
    thread.join()
  assert not failed and not lines and hits >= 30 and misses >= 30
  assert sum(size for _, _, size in store.files()) <= limit * 2


def test_leftovers_go_by_age_and_other_files_stay(tmp_path):
  Store(tmp_path).put(OWNER, make([1]))
  owner = tmp_path / OWNER.owner
  old, new, foreign = (owner / n for n in (".tmp-old", ".tmp-new", "notes"))
  outside = tmp_path / ".tmp-outside"
  for path in (old, new, foreign, outside):
    path.write_bytes(b"x" * 10**6)
  hours_ago = time.time() - 2 * 3600
  for path in (old, foreign, outside):
    os.utime(path, (hours_ago, hours_ago))
  store = Store(tmp_path, max_bytes=4000)
  store.put(OWNER, make([2]))
  assert not old.exists() and new.exists()
  assert foreign.exists() and outside.exists() and len(store.files()) == 2


def test_bad_stores_are_one_line(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  for make_store, message in (
    (lambda: Store(tmp_path, -1), "max_bytes=-1 must be 0"),
    (lambda: Store(tmp_path / "file"), "cannot be a store"),
    (lambda: Store.existing(tmp_path / "none"), "no such store"),
  ):
    with pytest.raises(UserError, match=message):
      make_store()
  store = Store(tmp_path)

  def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")

  store.put(OWNER, make([1], seed=1))
  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    for tokens in ([1], [1, 2]):
      with pytest.raises(UserError, match="written .No space left"):
        store.put(OWNER, make(tokens))
  assert not list(tmp_path.glob("*/.tmp-*"))
  same(store.get(OWNER, [1]), make([1], seed=1))
  assert store.get(OWNER, [1, 2]) is None


def test_kills_lose_nothing_and_writers_may_meet(tmp_path):
  done = subprocess.run(
    [
      sys.executable,
      "benchmarks/store_kills.py",
      "--kills=20",
      "--entries=20",
      f"--store={tmp_path}",
    ],
    cwd=_ROOT,
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    timeout=200,
  )
  assert (done.returncode, done.stderr) == (0, "")
  kills, together = done.stdout.splitlines()
  assert kills.endswith("commits, 0 lost, 0 served torn")
  numbers = [int(x) for x in kills.replace(",", "").split() if x.isdigit()]
  rounds, caught, commits = numbers[0], *numbers[2:4]
  assert rounds == 20 and caught and commits, kills
  assert together.endswith("0 wrong")


def test_the_check_under_kills_can_fail(tmp_path):
  """It sees an entry that is gone, and one that is not what was written."""
  spec = importlib.util.spec_from_file_location(
    "store_kills", _ROOT / "benchmarks" / "store_kills.py"
  )
  kills = importlib.util.module_from_spec(spec)
  from absl import flags

  before = set(flags.FLAGS)
  spec.loader.exec_module(kills)
  for name in set(flags.FLAGS) - before:
    delattr(flags.FLAGS, name)
  store = Store(tmp_path)
  for i in range(4):
    store.put(kills._IDENTITY, kills.sample(i))
  wrong = dataclasses.replace(kills.sample(2), values=kills.sample(2).keys)
  store.put(kills._IDENTITY, wrong)
  store._path(kills._IDENTITY, kills.sample(3).tokens, ()).unlink()
  seen = dict(lost=0, torn=0)
  kills._look(tmp_path, range(4), range(4), seen)
  assert seen == dict(lost=1, torn=1)
