"""Batches: a pure function of (seed, step), whatever reads them and how."""

import hashlib
import itertools
import os
import pathlib
import pickle
import subprocess
import sys
import threading

import ml_collections
import numpy as np
import pytest

from cacheaug import errors
from cacheaug.data import opening, shards, sources, tokenizers

_S, _B = 96, 8


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
  """Two directories of text: 'x' documents are all x, 'y' all y."""
  root = tmp_path_factory.mktemp("corpora")
  rng = np.random.default_rng(0)
  for letter, count in (("x", 60), ("y", 40)):
    (root / letter).mkdir()
    for i in range(count):
      text = letter * int(rng.integers(50, 300))
      (root / letter / f"{i:02d}.txt").write_text(text)
  return root


def _config(corpora, /, **named):
  config = ml_collections.ConfigDict()
  config.sources = ml_collections.ConfigDict()
  for name, changes in named.items():
    config.sources[name] = sources.source_defaults()
    config.sources[name].update(changes)
  config.sequence = _S
  config.batch = _B
  config.cache_dir = str(corpora / "cache")
  config.validation_fraction = 0.2
  config.workers = 1
  config.answers_only = config.results = False
  return config


def _text(corpora, letter, **changes):
  return {"kind": "text", "path": str(corpora / letter)} | changes


@pytest.fixture(params=["text", "problems", "mixture"])
def config(request, corpora):
  found = {
    "x": _text(corpora, "x"),
    "p": {"kind": "problems", "weight": 0.5, "validation_sequences": 5},
  }
  kept = {"text": "x", "problems": "p", "mixture": "xp"}[request.param]
  return _config(corpora, **{name: found[name] for name in kept})


def _open(config, split="train", seed=0, **changes):
  tokenizer = tokenizers.ByteTokenizer()
  return opening.open_batches(
    config, tokenizer, split=split, seed=seed, **changes
  )


def _python(code, *arguments, **environment):
  """What code prints in an interpreter of its own."""
  done = subprocess.run(
    [sys.executable, "-c", code, *arguments],
    capture_output=True,
    text=True,
    check=True,
    cwd=pathlib.Path(__file__).parent.parent,
    env=os.environ | environment,
  )
  return done.stdout


def _equal(a, b):
  return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_batches_are_a_function_of_seed_and_step(config, split):
  first = _open(config, split, seed=3)
  again = _open(config, split, seed=3)
  other = _open(config, split, seed=4)
  steps = [0, 1, 2, 7, 1000]
  found = {step: first.at(step) for step in steps}
  for step in reversed(steps):
    assert _equal(again.at(step), found[step])
    assert not _equal(other.at(step), found[step])
  for a, b in itertools.combinations(steps, 2):
    assert not _equal(found[a], found[b])


def test_batch_is_the_same_in_every_process(corpora):
  config = _config(corpora, x=_text(corpora, "x"), p={"kind": "problems"})
  script = """
import hashlib, pickle, sys
from cacheaug.data import opening, pipeline, tokenizers
config = pickle.loads(bytes.fromhex(sys.argv[1]))
batch = opening.open_batches(
  config, tokenizers.ByteTokenizer(), split="train", seed=5).at(11)
print(hashlib.sha256(batch["tokens"].tobytes()).hexdigest())
"""
  here = _open(config, seed=5).at(11)["tokens"].tobytes()
  # Python salts its own hashes per process: none may enter a batch.
  there = _python(script, pickle.dumps(config).hex(), PYTHONHASHSEED="1")
  assert there.split()[-1] == hashlib.sha256(here).hexdigest()


def test_iterating_gives_what_at_gives(config):
  batches = _open(config)
  for start in (0, 3):
    iterator = batches.iterate(start)
    for step in range(start, start + 20):
      assert _equal(next(iterator), batches.at(step))


def test_iterators_leave_no_thread(config):
  # Those of earlier tests may end meanwhile, so a count would not do.
  before = set(threading.enumerate())
  iterator = _open(config).iterate(0)
  next(iterator)
  assert set(threading.enumerate()) - before  # It reads ahead.
  del iterator
  deadline = threading.Event()
  for _ in range(500):
    if not set(threading.enumerate()) - before:
      return
    deadline.wait(0.02)
  raise AssertionError(threading.enumerate())


@pytest.mark.parametrize("on_disk", [False, True])
def test_one_process_equals_two(config, on_disk, monkeypatch):
  whole = _open(config)
  if on_disk:
    monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 0)
  parts = [_open(config, process_index=p, process_count=2) for p in range(2)]
  for step in (0, 5):
    halves = [part.at(step) for part in parts]
    joined = {
      name: np.concatenate([half[name] for half in halves])
      for name in halves[0]
    }
    assert halves[0]["tokens"].shape == (_B // 2, _S)
    assert _equal(joined, whole.at(step))
  assert _equal(next(parts[1].iterate(4)), parts[1].at(4))


def test_shapes_types_and_padding(config):
  batch = _open(config).at(0)
  assert set(batch) == {"tokens", "documents"}
  for array in batch.values():
    assert array.shape == (_B, _S) and array.dtype == np.int32
  assert (batch["tokens"][batch["documents"] < 0] == 0).all()
  assert (batch["tokens"] < 260).all() and (batch["tokens"] >= 0).all()


def test_an_epoch_of_training_reads_each_row_once(corpora):
  config = _config(corpora, x=_text(corpora, "x"))
  batches = _open(config)
  rows = [example["tokens"].tobytes() for example in batches.examples]
  n = len(rows)
  seen = []
  for step in range(2 * n // _B + 1):
    seen.extend(row.tobytes() for row in batches.at(step)["tokens"])
  assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == sorted(rows)
  assert seen[:n] != rows  # Shuffled,
  assert seen[:n] != seen[n : 2 * n]  # and anew in the second epoch.


def test_train_and_validation_share_no_document(corpora):
  config = _config(corpora, x=_text(corpora, "x"), y=_text(corpora, "y"))
  found = {}
  for split in shards.SPLITS:
    batches = _open(config, split)
    documents = np.concatenate([e["documents"] for e in batches.examples])
    found[split] = set(documents[documents >= 0].tolist())
    assert len(found[split]) == batches.num_documents
  assert not found["train"] & found["validation"]
  # 60 of x and 40 of y: numbers of different sources differ.
  assert found["train"] | found["validation"] == set(range(100))


def test_document_numbers_tell_sources_apart(corpora):
  config = _config(
    corpora,
    p={"kind": "problems"},
    x=_text(corpora, "x"),
    y=_text(corpora, "y"),
  )
  batches = _open(config)
  owners = {}
  for step in range(20):
    batch = batches.at(step)
    for row, documents in zip(batch["tokens"], batch["documents"], strict=True):
      letters = {ord(c) + 4: c for c in "xy"}
      kind = next((letters[t] for t in row.tolist() if t in letters), "p")
      for document in set(documents.tolist()) - {-1}:
        assert owners.setdefault(document, kind) == kind
  assert set(owners.values()) == {"x", "y", "p"}


def test_mixture_realises_the_weights(corpora):
  config = _config(
    corpora,
    x=_text(corpora, "x", weight=3.0),
    y=_text(corpora, "y", weight=1.0),
    p={"kind": "problems", "weight": 0.0},
  )
  batches = _open(config)
  rows = np.concatenate([batches.at(step)["tokens"] for step in range(50)])
  share = (rows == ord("x") + 4).any(axis=1).mean()
  assert share == pytest.approx(0.75, abs=0.01)
  config.sources.x.weight = 1.0
  rows = np.concatenate([_open(config).at(s)["tokens"] for s in range(50)])
  share = (rows == ord("x") + 4).any(axis=1).mean()
  assert share == pytest.approx(0.5, abs=0.01)


def test_epoch_is_one_ordered_pass(config):
  batches = _open(config, "validation")
  rows = [example["tokens"] for example in batches.examples]
  assert len(rows) == batches.num_examples == len(batches.examples)
  assert len(rows) % _B  # So the last batch has rows to fill up.
  epoch = list(batches.epoch())
  tokens = np.concatenate([batch["tokens"] for batch in epoch])
  documents = np.concatenate([batch["documents"] for batch in epoch])
  assert tokens.shape == (-(-len(rows) // _B) * _B, _S)
  np.testing.assert_array_equal(tokens[: len(rows)], rows)
  assert (documents[len(rows) :] == -1).all()
  assert (documents[: len(rows)] >= 0).any(axis=1).all()
  halves = [
    _open(config, "validation", process_index=p, process_count=2).epoch()
    for p in range(2)
  ]
  for whole, *parts in zip(epoch, *halves, strict=True):
    joined = np.concatenate([part["tokens"] for part in parts])
    np.testing.assert_array_equal(joined, whole["tokens"])


def test_validation_rows_do_not_depend_on_the_seed(config):
  first, second = (_open(config, "validation", seed=s) for s in (0, 1))
  for a, b in zip(first.examples, second.examples, strict=True):
    assert _equal(a, b)


def test_examples_end(config):
  examples = _open(config, "validation").examples
  assert _equal(examples[-1], examples[len(examples) - 1])
  with pytest.raises(IndexError):
    examples[len(examples)]


def test_endless_problems_have_no_epoch(corpora):
  batches = _open(_config(corpora, p={"kind": "problems"}))
  assert batches.num_examples is None and batches.num_documents == 0
  with pytest.raises(ValueError, match="endless"):
    len(batches.examples)


def test_problem_rows_hold_whole_problems(corpora):
  config = _config(
    corpora, p={"kind": "problems", "kinds": ("sum",), "steps_min": 2}
  )
  tokenizer = tokenizers.ByteTokenizer()
  questions = {}
  for split in shards.SPLITS:
    batch = _open(config, split).at(0)
    questions[split] = set()
    for tokens, documents in zip(*batch.values(), strict=True):
      used = documents >= 0
      numbers = np.unique(documents[used])
      assert len(numbers) >= 6  # At most 14 tokens each, in 96.
      assert not used[used.argmin() :].any() or used.all()
      for number in numbers:
        ids = tokens[documents == number]
        assert ids[0] == tokenizer.bos_id
        text = tokenizer.decode(ids)
        question, answer = text.removesuffix("\n").split("=")
        assert text.endswith("\n") and eval(question) == int(answer)
        questions[split].add(question)
  assert not questions["train"] & questions["validation"]


def test_damaged_cache_is_packed_again(corpora, tmp_path):
  config = _config(corpora, x=_text(corpora, "x"))
  config.cache_dir = str(tmp_path)
  before = _open(config).at(0)
  (path,) = tmp_path.glob("*/train-*.array_record")
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  assert _equal(_open(config).at(0), before)


def test_default_cache_directory(corpora, tmp_path, monkeypatch):
  config = _config(corpora, x=_text(corpora, "x"))
  config.cache_dir = ""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  _open(config)
  assert list((tmp_path / "cacheaug").glob("*/meta.json"))


def test_stdlib_is_the_default_source(corpora, tmp_path, monkeypatch):
  module = tmp_path / "stdlib"
  module.mkdir()
  for i in range(10):
    (module / f"m{i}.py").write_text(f"def f{i}():\n  return {i}\n" * 9)
  monkeypatch.setattr(
    sources.sysconfig, "get_paths", lambda: {"stdlib": str(module)}
  )
  batch = _open(_config(corpora, lib={})).at(0)
  text = tokenizers.ByteTokenizer().decode(batch["tokens"][0])
  assert "return" in text


@pytest.mark.parametrize(
  ("key", "value", "words"),
  [
    ("batch", 7, ["data.batch=7", "2 processes"]),
    ("batch", 0, ["data.batch=0"]),
    ("sequence", 1, ["data.sequence=1"]),
    ("sequence", 10**6, ["data.sources.x", "fewer than one row"]),
    ("sources.x.weight", -1.0, ["data.sources.x.weight=-1.0"]),
    ("sources.x.weight", 0.0, ["data.sources", "weight above 0"]),
    ("sources.x.path", "absent", ["data.sources.x.path='absent'"]),
    ("sources.x.kind", "csv", ["data.sources.x.kind='csv'"]),
    ("validation_fraction", 1.5, ["data.validation_fraction=1.5"]),
  ],
)
def test_bad_config_names_the_key(corpora, key, value, words):
  config = _config(corpora, x=_text(corpora, "x"))
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError) as raised:
    _open(config, process_count=2)
  assert all(word in str(raised.value) for word in words), raised.value


def test_bad_problems_and_splits(corpora):
  config = _config(corpora, p={"kind": "problems", "kinds": ("sums",)})
  with pytest.raises(errors.UserError, match="data.sources.p.kinds"):
    _open(config)
  config.sources.p.kinds = ("word",)
  config.sequence = 20
  with pytest.raises(errors.UserError, match="shorter than a problem"):
    _open(config).at(0)
  with pytest.raises(errors.UserError, match="shorter than a problem"):
    next(_open(config).iterate())
  config.sources.p.validation_sequences = 0
  with pytest.raises(errors.UserError, match="p.validation_sequences=0"):
    _open(config, "validation")
  config = _config(corpora, x=_text(corpora, "x"))
  with pytest.raises(errors.UserError, match="split='test'"):
    _open(config, "test")
  config.validation_fraction = 0.0
  with pytest.raises(errors.UserError, match="no validation documents"):
    _open(config, "validation")


def test_import_is_light():
  code = (
    "import sys, cacheaug.data.pipeline; print(sorted({'jax', 'grain', "
    "'tensorflow_datasets', 'array_record', 'tokenizers', 'sentencepiece'} "
    "& set(sys.modules)))"
  )
  assert _python(code).strip() == "[]"
