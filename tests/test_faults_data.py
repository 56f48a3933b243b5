"""Faults that users of neighbouring projects met: text files and packing.

Each test fails without its cure. The neighbours of a fault that were tried are
its parameters. Tokens are in test_faults_tokens.py, streaming (36) in
test_generate_text.py.
"""

import bz2
import gzip
import json
import os
import pickle
import resource

import numpy as np
import pytest

from cacheaug import config as configs
from cacheaug.data import (
  files,
  opening,
  packing,
  record_files,
  shards,
  sources,
  tokenizers,
)
from cacheaug.errors import UserError

# --- 9: many shards ---------------------------------------------------------


@pytest.fixture
def many_shards(tmp_path, monkeypatch):
  """A cache of some two hundred shards, none of it held in memory."""
  monkeypatch.setattr(packing, "_SHARD_BYTES", 200)
  monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 0)
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"text": f"some words of line {i}"}) for i in range(1200)]
  path.write_text("\n".join(lines))
  documents = open_source("jsonl", path)
  return packing.pack(
    documents,
    tokenizers.load("byte"),
    sequence=32,
    validation_fraction=0.02,
    cache_dir=tmp_path / "cache",
    workers=1,
  )


def open_source(kind, path, **keys):
  source = sources.source_defaults()
  source.kind, source.path = kind, str(path)
  source.update(keys)
  return sources.open_documents(source, label="data.sources.x")


def open_files():
  return len(os.listdir("/proc/self/fd"))


def test_9_few_of_many_shards_are_open(many_shards, monkeypatch):
  monkeypatch.setattr(record_files, "_most_open", lambda: 16)
  rows = shards.open_rows(many_shards, "train")
  assert (
    len(json.loads((many_shards / "meta.json").read_text())["shards"]) > 150
  )
  order = np.random.default_rng(0).permutation(len(rows))
  before = open_files()
  parts = [rows.take(part) for part in np.array_split(order, 20)]
  assert open_files() < before + 40
  monkeypatch.setattr(shards, "_IN_MEMORY_BYTES", 1 << 30)
  tokens, documents = shards.open_rows(many_shards, "train").take(order)
  np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), tokens)
  np.testing.assert_array_equal(
    np.concatenate([p[1] for p in parts]), documents
  )


def test_9_the_limit_is_named_where_it_is_met(many_shards, monkeypatch):
  rows = shards.open_rows(many_shards, "train")
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (open_files(), hard))
  try:
    with pytest.raises(shards.UnreadableError, match="raise `ulimit -n`"):
      rows.take(np.arange(len(rows)))
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  rows.take(np.arange(8))  # Another try succeeds.


def test_9_source_files_are_closed_too(tmp_path, monkeypatch):
  monkeypatch.setattr(record_files, "_most_open", lambda: 16)
  for i in range(100):
    path = tmp_path / f"x.array_record-{i:05d}-of-00100"
    shards.write_records(path, [b"text %d" % i])
  documents = open_source("array_record", tmp_path)
  before = open_files()
  assert [documents[i] for i in range(100)] == [f"text {i}" for i in range(100)]
  assert open_files() < before + 40


# --- 15: answers beyond a row -----------------------------------------------


def data_config(tmp_path, source, sequence, **keys):
  data = configs.base().data
  data.sources = {"x": source}
  data.update(sequence=sequence, batch=2, cache_dir=str(tmp_path / "cache"))
  data.update(validation_fraction=0.2, **keys)
  return data


def answered(tmp_path, questions, sequence):
  path = tmp_path / "a.jsonl"
  lines = [json.dumps({"q": q, "a": "seven"}) for q in questions]
  path.write_text("\n".join(lines))
  source = sources.source_defaults()
  source.update(kind="jsonl", path=str(path), field="q", answer_field="a")
  return data_config(tmp_path, source, sequence, answers_only=True)


def test_15_cut_answers_are_counted(tmp_path, capfd):
  questions = [f"why {i}" for i in range(8)]
  questions += [f"long {i} " * 6 for i in range(8)]  # 42 or more
  questions += [f"cut {i:02} " * 4 for i in range(4)]  # 28: "seven" is cut
  data = answered(tmp_path, questions, sequence=32)
  opening.open_batches(data, tokenizers.load("byte"), split="train", seed=0)
  line = [x for x in capfd.readouterr().err.splitlines() if "cut off" in x]
  assert len(line) == 1
  assert "4 answers are cut off" in line[0]
  assert "8 are lost" in line[0]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_15_no_answer_left_is_an_error(tmp_path, split):
  data = answered(tmp_path, [f"long {i} " * 20 for i in range(20)], 32)
  for _ in range(2):  # With the cache there, too.
    with pytest.raises(UserError, match="no .* answer begins within a row"):
      opening.open_batches(data, tokenizers.load("byte"), split=split, seed=0)
  data.answers_only = False  # The questions can be learned.
  opening.open_batches(data, tokenizers.load("byte"), split=split, seed=0)


# --- 25 and 26: byte order mark, line ends ----------------------------------

MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
  "kind, content, keys, texts",
  [
    ("text", b"Hello", {}, ["Hello"]),
    ("text", b"a\n\nb", dict(separator="\n\n"), ["a", "b"]),
    ("text", b"", {}, None),
    ("jsonl", b'{"text":"a"}\n{"text":"b"}\n', {}, ["a", "b"]),
  ],
)
def test_25_a_byte_order_mark_is_no_text(
  tmp_path, kind, content, keys, texts, packed
):
  suffix = {"text": ".txt", "jsonl": ".jsonl"}[kind] + ".gz" * packed
  path = tmp_path / f"a{suffix}"
  path.write_bytes(gzip.compress(MARK + content) if packed else MARK + content)
  documents = open_source(kind, path, **keys)
  if texts is None:
    with pytest.raises(UserError, match="no text in"):
      len(documents)
    return
  assert [documents[i] for i in range(len(documents))] == texts


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n---\n", "\n"])
def test_26_a_line_break_is_the_files_own(tmp_path, end, separator):
  unix = separator.replace("\r\n", "\n")
  content = f"one\nline{unix}two{unix}three\n".replace("\n", end)
  path = tmp_path / "w.txt"
  path.write_bytes(content.encode())
  documents = open_source("text", path, separator=separator)
  texts = [documents[i].replace(end, "\n") for i in range(len(documents))]
  expected = ["one\nline", "two", "three"]
  assert texts == (
    ["one", "line", "two", "three"] if unix == "\n" else expected
  )


def test_26_a_lone_cr_among_lf_is_text(tmp_path):
  path = tmp_path / "w.txt"
  path.write_bytes(b"a\r\rb\n\nc\r\n\r\nd")
  documents = open_source("text", path, separator="\n\n")
  assert [documents[i] for i in range(3)] == ["a\r\rb", "c", "d"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_26_json_lines_end_as_they_like(tmp_path, end):
  path = tmp_path / "w.jsonl"
  path.write_bytes(end.join([b'{"text": "a"}', b'{"text": "b"}', b""]))
  documents = open_source("jsonl", path)
  assert [documents[i] for i in range(len(documents))] == ["a", "b"]


# --- 34: files of another kind ----------------------------------------------

FOREIGN = {
  "zstd": (b"\x28\xb5\x2f\xfd\x04", "zstd: unpack it first"),
  "gzip": (gzip.compress(b"x"), "gzip: let its name end in .gz"),
  "xz": (b"\xfd7zXZ\0\0", "xz: unpack it first"),
  "bzip2": (bz2.compress(b"text"), "bzip2: unpack it first"),
  "zip": (b"PK\x03\x04\0", "zip: unpack it first"),
  "parquet": (b"PAR1\x15\0", "Parquet: write its rows as JSON lines"),
  "arrow": (b"ARROW1\0\0", "Arrow: write its rows as JSON lines"),
  "utf-16": ("text".encode("utf-16"), "UTF-16: convert it"),
  "pickle": (pickle.dumps({"text": 1}), "pickle"),
  "tar": (b"name".ljust(257, b"\0") + b"ustar", "tar archive: unpack it first"),
}


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("name", FOREIGN)
def test_34_foreign_files_are_named(tmp_path, kind, name):
  content, words = FOREIGN[name]
  path = tmp_path / "data.jsonl"
  path.write_bytes(content)
  with pytest.raises(UserError, match=words) as raised:
    len(open_source(kind, path))
  assert "data.sources.x" in str(raised.value)
  if name != "gzip":
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
      len(open_source(kind, path))


@pytest.mark.parametrize("text", ["PAR1 is a magic number", "BZh", "ORCHARD"])
def test_34_text_may_begin_like_a_foreign_file(tmp_path, text):
  path = tmp_path / "a.txt"
  path.write_text(text)
  assert open_source("text", path)[0] == text


@pytest.mark.parametrize(
  "content, words",
  [
    ('[{"text": "a"}, {"text": "b"}]', "one JSON array"),
    ('[\n{"text": "a"}\n]', "one JSON array"),
    ("[" * 200_000, "one JSON array"),
    ('{\n "text": "a"\n}', "object over several lines"),
    ('{"text": ' + "[" * 200_000, "not JSON"),
    ("7", "no field 'text'"),
  ],
)
def test_34_json_of_another_shape(tmp_path, content, words):
  path = tmp_path / "a.jsonl"
  path.write_text(content)
  with pytest.raises(UserError, match=words) as raised:
    open_source("jsonl", path)[0]
  assert "\n" not in str(raised.value)


# --- 38: a second start -----------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt"])
def test_38_a_second_start_reads_no_text(tmp_path, monkeypatch, suffix):
  path = tmp_path / f"a{suffix}"
  lines = [json.dumps({"text": f"words of line {i}"}) for i in range(200)]
  content = "\n".join(lines).encode()
  path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
  source = sources.source_defaults()
  kind = "text" if suffix == ".txt" else "jsonl"
  source.update(kind=kind, path=str(path), separator="\n")
  config = data_config(tmp_path, source, 16)
  tokenizer = tokenizers.load("byte")
  first = opening.open_batches(config, tokenizer, split="train", seed=0)
  for module, name in (
    (files, "spans"),
    (files, "read"),
    (packing, "is_validation"),
  ):
    monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("text read"))
  second = opening.open_batches(config, tokenizer, split="train", seed=0)
  np.testing.assert_array_equal(first.at(3)["tokens"], second.at(3)["tokens"])
  path.write_bytes(path.read_bytes() + b" ")  # Another size: packed again.
  with pytest.raises(pytest.fail.Exception):
    opening.open_batches(config, tokenizer, split="train", seed=0)


def test_9_a_reader_of_all_files_is_allowed_them():
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    record_files.allow(100)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 356
    record_files.allow(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 356
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
