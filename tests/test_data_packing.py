"""Packing: rows hold every document once; caches are whole or absent."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from cacheaug import errors
from cacheaug.data import packing, shards, sources, tokenizers

_S = 16


def _documents(path, texts):
  path.mkdir(exist_ok=True)
  for i, text in enumerate(texts):
    (path / f"{i:03d}.txt").write_text(text, encoding="utf-8")
  source = sources.source_defaults()
  source.update(kind="text", path=str(path))
  return sources.open_documents(source)


def _pack(documents, cache_dir, tokenizer=None, **changes):
  options = {"sequence": _S, "validation_fraction": 0.25} | changes
  return packing.pack(
    documents,
    tokenizer or tokenizers.ByteTokenizer(),
    cache_dir=cache_dir,
    **options,
  )


def _rows(directory, split):
  rows = shards.open_rows(directory, split)
  return rows, *rows.take(np.arange(len(rows)))


def _files(directory):
  """Bytes of every file but the lock, by name."""
  return {
    p.name: p.read_bytes() for p in directory.iterdir() if p.name != "lock"
  }


@pytest.fixture
def texts():
  rng = np.random.default_rng(0)
  return [f"{i}:" + "é" * int(rng.integers(1, 40)) for i in range(40)]


@pytest.fixture
def small_shards(monkeypatch):
  """Six shards instead of one."""
  monkeypatch.setattr(packing, "_SHARD_BYTES", 300)


def test_every_document_is_in_one_split_and_whole(
  tmp_path, texts, small_shards
):
  documents = _documents(tmp_path / "in", texts)
  directory = _pack(documents, tmp_path / "cache")
  assert len(list(directory.glob("shard-*.json"))) > 3
  tokenizer = tokenizers.ByteTokenizer()
  found = {}
  for split in shards.SPLITS:
    rows, tokens, numbers = _rows(directory, split)
    assert tokens.dtype == numbers.dtype == np.int32
    assert tokens.shape == numbers.shape == (len(rows), _S)
    assert rows.num_source_documents == len(texts)
    assert rows.num_tokens == (numbers >= 0).sum()
    in_split = set(np.unique(numbers[numbers >= 0]).tolist())
    assert rows.num_documents == len(in_split) > 0
    assert not in_split & set(found)
    for number in in_split:
      ids = tokens[numbers == number]
      assert ids[0] == tokenizer.bos_id
      assert (ids[1:] != tokenizer.bos_id).all()
      found[number] = tokenizer.decode(ids)
    # Padding: its token, and only at the end of a row.
    assert (tokens[numbers < 0] == tokenizer.pad_id).all()
    assert (np.diff((numbers < 0).astype(int), axis=1) >= 0).all()
  assert found == dict(enumerate(texts))


def test_only_the_last_row_of_a_shard_is_padded(tmp_path, texts):
  directory = _pack(_documents(tmp_path / "in", texts), tmp_path / "cache")
  for split in shards.SPLITS:
    _, _, numbers = _rows(directory, split)
    assert (numbers[:-1] >= 0).all()
    # A long document goes on in the next row with the same number.
    assert any(
      a[-1] == b[0] for a, b in zip(numbers, numbers[1:], strict=False)
    )


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_read_alike_from_disk_and_memory(
  tmp_path, texts, small_shards, monkeypatch, on_disk
):
  directory = _pack(_documents(tmp_path / "in", texts), tmp_path / "cache")
  _, tokens, numbers = _rows(directory, "train")
  if on_disk:
    monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 0)
  order = np.random.default_rng(1).permutation(len(tokens))
  again = shards.open_rows(directory, "train").take(order)
  np.testing.assert_array_equal(again[0], tokens[order])
  np.testing.assert_array_equal(again[1], numbers[order])


def test_large_vocabularies_are_not_cut_to_16_bits(tmp_path):
  class Large(tokenizers.ByteTokenizer):
    name = "large"
    vocab_size = 100_000

    def encode(self, text):
      return [99_000 + b for b in text.encode()]

  documents = _documents(tmp_path / "in", ["abc", "def"])
  directory = _pack(documents, tmp_path / "cache", Large())
  _, tokens, _ = _rows(directory, "train")
  assert tokens.max() > 99_000


def test_split_depends_on_the_document_alone(tmp_path, texts):
  documents = _documents(tmp_path / "in", texts)
  before = packing.is_validation(documents, 0.3)
  assert 3 < before.sum() < 25
  (tmp_path / "in" / "!sorted-first.txt").write_text("new")
  more = _documents(tmp_path / "in", texts + ["new"] * 20)
  after = packing.is_validation(more, 0.3)[1 : len(texts) + 1]
  # But for the two extremes that keep both splits non-empty.
  assert (before != after).sum() <= 2


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_split_gets_a_document(tmp_path, fraction):
  documents = _documents(tmp_path / "in", ["a", "b"])
  held_out = packing.is_validation(documents, fraction)
  assert sorted(held_out) == [False, True]


def test_one_document_cannot_be_split(tmp_path):
  documents = _documents(tmp_path / "in", ["text"])
  with pytest.raises(errors.UserError, match="one document"):
    _pack(documents, tmp_path / "cache")
  directory = _pack(documents, tmp_path / "cache", validation_fraction=0.0)
  assert len(shards.open_rows(directory, "train")) == 1
  assert len(shards.open_rows(directory, "validation")) == 0
  with pytest.raises(errors.UserError, match="validation_fraction=1"):
    _pack(documents, tmp_path / "cache", validation_fraction=1.0)


def test_address_follows_all_that_rows_depend_on(tmp_path, texts, monkeypatch):
  documents = _documents(tmp_path / "in", texts)
  cache = tmp_path / "cache"

  class Renamed(tokenizers.ByteTokenizer):
    name = "renamed"

  found = {
    _pack(documents, cache),
    _pack(documents, cache, Renamed()),
    _pack(documents, cache, sequence=_S + 1),
    _pack(documents, cache, validation_fraction=0.5),
  }
  monkeypatch.setattr(packing, "_FORMAT", -1)
  found.add(_pack(documents, cache))
  (tmp_path / "in" / "000.txt").write_text("changed")
  found.add(_pack(_documents(tmp_path / "in", texts), cache))
  assert len(found) == 6


def test_a_complete_cache_is_not_packed_again(tmp_path, texts, monkeypatch):
  documents = _documents(tmp_path / "in", texts)
  directory = _pack(documents, tmp_path / "cache")
  monkeypatch.setattr(packing, "_pack_shard", None)
  assert _pack(documents, tmp_path / "cache") == directory


def test_resumed_packing_equals_uninterrupted(
  tmp_path, texts, small_shards, monkeypatch
):
  documents = _documents(tmp_path / "in", texts)
  whole = _pack(documents, tmp_path / "whole")
  pack_shard, write = packing._pack_shard, shards.write_json
  done = []

  def interrupted(job, shard):
    done.append(shard)
    if shard == 2:  # After its rows are written, before its JSON file is.
      monkeypatch.setattr(shards, "write_json", None)
    pack_shard(job, shard)

  monkeypatch.setattr(packing, "_pack_shard", interrupted)
  with pytest.raises(TypeError):
    _pack(documents, tmp_path / "cut")
  cut = tmp_path / "cut" / whole.name
  names = set(_files(cut))
  assert "meta.json" not in names and "train-00002.array_record" in names
  assert not shards.is_complete(cut)
  (cut / ".tmp-left-over").write_text("half a shard")
  monkeypatch.setattr(shards, "write_json", write)
  done.clear()
  monkeypatch.setattr(
    packing, "_pack_shard", lambda j, i: (done.append(i), pack_shard(j, i))
  )
  assert _pack(documents, tmp_path / "cut") == cut
  assert done[0] == 2  # Shards 0 and 1 were kept.
  assert _files(cut) == _files(whole)


_KILLED = """
  import sys, time
  from cacheaug.data import packing, sources, tokenizers

  class Slow(tokenizers.ByteTokenizer):
    def encode(self, text):
      time.sleep(0.02)
      return super().encode(text)

  packing._SHARD_BYTES = 300
  source = sources.source_defaults()
  source.update(kind="text", path=sys.argv[1])
  packing.pack(sources.open_documents(source), Slow(), sequence=16,
               validation_fraction=0.25, cache_dir=sys.argv[2])
"""


def _start(*arguments):
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(_KILLED), *map(str, arguments)],
    cwd=pathlib.Path(__file__).parent.parent,
    stderr=subprocess.PIPE,
    text=True,
  )


def test_kill_leaves_no_cache_and_two_at_once_agree(
  tmp_path, texts, small_shards
):
  documents = _documents(tmp_path / "in", texts)
  whole = _pack(documents, tmp_path / "whole")
  cut = tmp_path / "cut" / whole.name
  process = _start(tmp_path / "in", tmp_path / "cut")
  deadline = time.monotonic() + 60
  while not (cut / "shard-00001.json").exists():
    assert process.poll() is None, process.stderr.read()
    assert time.monotonic() < deadline
    time.sleep(0.005)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert not (cut / "meta.json").exists()
  assert not shards.is_complete(cut)
  # Its lock died with it; now two processes go on at once.
  processes = [_start(tmp_path / "in", tmp_path / "cut") for _ in range(2)]
  outputs = [process.communicate(timeout=60)[1] for process in processes]
  assert [process.returncode for process in processes] == [0, 0], outputs
  assert sum("packed source" in output for output in outputs) == 1
  assert _files(cut) == _files(whole)


def test_workers_give_the_same_bytes(
  tmp_path, texts, small_shards, monkeypatch
):
  documents = _documents(tmp_path / "in", texts)
  alone = _pack(documents, tmp_path / "alone")
  monkeypatch.setattr(packing, "_IN_PROCESS_BYTES", 0)
  shared = _pack(documents, tmp_path / "shared", workers=2)
  assert _files(alone) == _files(shared)


def test_an_error_in_a_worker_arrives_whole(
  tmp_path, texts, small_shards, monkeypatch
):
  documents = _documents(tmp_path / "in", texts)
  (tmp_path / "in" / "030.txt").write_bytes(b"caf\xe9")
  monkeypatch.setattr(packing, "_IN_PROCESS_BYTES", 0)
  with pytest.raises(errors.UserError, match="030.txt is not UTF-8 at byte"):
    _pack(documents, tmp_path / "cache", workers=2)
  assert not list((tmp_path / "cache").glob("*/meta.json"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_shards_are_packed_again(
  tmp_path, texts, small_shards, damage, capfd
):
  documents = _documents(tmp_path / "in", texts)
  directory = _pack(documents, tmp_path / "cache")
  before = _files(directory)
  path = directory / "train-00001.array_record"
  content = bytearray(path.read_bytes())
  if damage == "flip":
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    # The size is right, so only reading finds it.
    assert _pack(documents, tmp_path / "cache") == directory
    assert shards.open_rows(directory, "train") is None
    assert f"{path} is damaged" in capfd.readouterr().err
  elif damage == "cut":
    path.write_bytes(content[:-100])
  else:
    path.unlink()
  assert not shards.is_complete(directory)
  _pack(documents, tmp_path / "cache")
  assert _files(directory) == before


def test_damage_after_opening_names_the_directory(tmp_path, texts, monkeypatch):
  directory = _pack(_documents(tmp_path / "in", texts), tmp_path / "cache")
  monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 0)
  rows = shards.open_rows(directory, "train")
  path = directory / "train-00000.array_record"
  content = bytearray(path.read_bytes())
  content[100:-100] = bytes(len(content) - 200)
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match=directory.name):
    rows.take(np.arange(len(rows)))


def test_a_directory_that_cannot_be_written(tmp_path, texts):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.UserError, match="data.cache_dir"):
    _pack(_documents(tmp_path / "in", texts), tmp_path / "file")


def test_a_disk_that_is_full(tmp_path, texts, monkeypatch):
  # What the writer says when it cannot write, here for a missing directory.
  absent = tmp_path / "absent" / "x.tmp"
  monkeypatch.setattr(shards.files, "temporary", lambda path: absent)
  with pytest.raises(errors.UserError, match="data.cache_dir") as raised:
    _pack(_documents(tmp_path / "in", texts), tmp_path / "cache")
  assert "\n" not in str(raised.value)


def test_packing_without_file_locks(tmp_path, texts, monkeypatch):
  def refuse(*_):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(packing.fcntl, "flock", refuse)
  directory = _pack(_documents(tmp_path / "in", texts), tmp_path / "cache")
  assert shards.is_complete(directory)


def test_meta_tells_what_was_packed(tmp_path, texts):
  directory = _pack(_documents(tmp_path / "in", texts), tmp_path / "cache")
  meta = json.loads((directory / "meta.json").read_text())
  assert meta["address"]["tokenizer"] == "byte"
  assert (meta["sequence"], meta["dtype"]) == (_S, "uint16")
