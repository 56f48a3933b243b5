"""Sources: every kind gives its documents in order, or one clear error."""

import gzip
import json
import pathlib
import pickle

import numpy as np
import pytest

from cacheaug import errors
from cacheaug.data import sources


def _source(kind, path="", **changes):
  source = sources.source_defaults()
  source.update(kind=kind, path=str(path), **changes)
  return source


def _texts(source):
  documents = sources.open_documents(source, label="data.sources.x")
  # Packing sends documents to its workers.
  for found in (documents, pickle.loads(pickle.dumps(documents))):
    texts = [found[i] for i in range(len(found))]
  assert len({documents.key(i) for i in range(len(documents))}) == len(texts)
  return texts


def _fails(source, *words):
  with pytest.raises(errors.UserError) as raised:
    _texts(source)
  message = str(raised.value)
  assert "\n" not in message
  for word in (*words, "data.sources.x"):
    assert word in message
  return message


def test_defaults_are_new_objects():
  first = sources.source_defaults()
  first.weight = 7.0
  assert sources.source_defaults().weight == 1.0


def test_stdlib_is_python_source_without_tests():
  documents = sources.open_documents(_source("stdlib"))
  names = [documents.key(i).split("#")[0] for i in range(len(documents))]
  assert names == sorted(names)
  assert "json/decoder.py" in names
  parts = {part for name in names for part in pathlib.Path(name).parts}
  assert not parts & {"site-packages", "test", "tests", "idle_test"}
  index = names.index("dataclasses.py")
  assert "def asdict(" in documents[index]
  # The standard library has 300 to 800 such files, 5 to 15 MB.
  assert 300 < len(documents) and 5e6 < documents.total_bytes < 2e7
  again = sources.open_documents(_source("stdlib"))
  assert again.fingerprint() == documents.fingerprint()


def test_text_file_directory_and_glob(tmp_path):
  (tmp_path / "sub").mkdir()
  (tmp_path / "b.txt").write_text("second é\n", encoding="utf-8")
  (tmp_path / "a.txt").write_text("first\n")
  (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"third\n"))
  (tmp_path / "LICENSE").write_text("not read")
  (tmp_path / "empty.txt").write_text("")
  assert _texts(_source("text", tmp_path / "a.txt")) == ["first\n"]
  everything = ["first\n", "second é\n", "third\n"]
  assert _texts(_source("text", tmp_path)) == everything
  assert _texts(_source("text", tmp_path / "**" / "*.txt*")) == everything
  assert _texts(_source("text", tmp_path / "LIC*")) == ["not read"]


@pytest.mark.parametrize("compressed", [False, True])
def test_text_is_cut_at_the_separator(tmp_path, compressed):
  content = "one\n<|end|>\ntwo\n\nlines\n<|end|>\n \n<|end|>tail é".encode()
  path = tmp_path / ("t.gz" if compressed else "t")
  path.write_bytes(gzip.compress(content) if compressed else content)
  source = _source("text", path, separator="<|end|>")
  assert _texts(source) == ["one", "two\n\nlines", "tail é"]


def test_key_does_not_depend_on_other_files(tmp_path):
  (tmp_path / "b.txt").write_text("b")
  before = sources.open_documents(_source("text", tmp_path))
  (tmp_path / "a.txt").write_text("a")
  after = sources.open_documents(_source("text", tmp_path))
  assert before.key(0) == after.key(1) != after.key(0)
  assert before.fingerprint() != after.fingerprint()


def test_fingerprint_follows_content_and_cut(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("x;y")
  found = {
    sources.open_documents(_source("text", path, **k)).fingerprint()
    for k in ({}, {"separator": ";"}, {"separator": "y"})
  }
  path.write_text("longer")
  found.add(sources.open_documents(_source("text", path)).fingerprint())
  assert len(found) == 4


@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl(tmp_path, compressed):
  lines = [json.dumps({"story": t, "n": 1}) for t in ("a\nb", "é", "c")]
  content = ("\n".join(lines[:2]) + "\n\n" + lines[2]).encode()
  path = tmp_path / ("x.jsonl.gz" if compressed else "x.jsonl")
  path.write_bytes(gzip.compress(content) if compressed else content)
  assert _texts(_source("jsonl", path, field="story")) == ["a\nb", "é", "c"]
  _fails(_source("jsonl", path, field="text"), "x.jsonl", "'text'", "story")
  _fails(_source("jsonl", path, field="n"), "int, not text")
  _fails(_source("jsonl", path, field=""), "field is empty")


def test_jsonl_names_the_bad_line(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_text('{"text": "a"}\n{"text": \n')
  _fails(_source("jsonl", path), "x.jsonl", "object 2", "not JSON")


def _write_records(path, records):
  from array_record.python import array_record_module

  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def test_array_record(tmp_path):
  first = tmp_path / "x.array_record-00000-of-00002"
  second = tmp_path / "x.array_record-00001-of-00002"
  _write_records(first, [b"a", "é".encode()])
  _write_records(second, [b"c"])
  assert _texts(_source("array_record", tmp_path)) == ["a", "é", "c"]
  assert _texts(_source("array_record", second)) == ["c"]
  _write_records(second, [b"fine", b"ab\xff"])
  _fails(_source("array_record", tmp_path), second.name, "record 1", "byte 2")


def test_array_record_that_is_not_one(tmp_path):
  path = tmp_path / "x.array_record"
  path.write_bytes(b"text")
  _fails(_source("array_record", path), "x.array_record")
  whole = tmp_path / "y.array_record"
  _write_records(whole, [bytes([65 + i % 26]) * 5000 for i in range(200)])
  path.write_bytes(whole.read_bytes()[:-70000])
  _fails(_source("array_record", path), "x.array_record")


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
  """A data set of five examples, built without TensorFlow."""
  import tensorflow_datasets as tfds

  class TinyStories(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    # The builder looks for package metadata beside the file of its class.
    pkg_dir_path = tmp_path_factory.mktemp("package")

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(
          {
            "story": tfds.features.Text(),
            "number": tfds.features.Scalar(np.int64),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {"train": self._examples(5), "test": self._examples(2)}

    def _generate_examples(self):
      raise NotImplementedError

    def _examples(self, n):
      for i in range(n):
        yield i, {"story": f"story {i} é", "number": i}

  builder = TinyStories(
    data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record"
  )
  builder.download_and_prepare()
  return builder.data_path


def test_tfds(tfds_directory):
  source = _source("tfds", tfds_directory, field="story")
  assert sorted(_texts(source)) == [f"story {i} é" for i in range(5)]
  assert _texts(source) == _texts(source)
  source.split = "train[:2]"
  assert len(_texts(source)) == 2
  source.split = "test"
  documents = sources.open_documents(source)
  assert len(documents) == 2 and documents.key(0).startswith("tiny_stories")


def test_tfds_errors(tfds_directory):
  _fails(_source("tfds", tfds_directory), "field='text'", "story")
  _fails(_source("tfds", tfds_directory, field="story", split="dev"), "'dev'")
  _fails(_source("tfds", "no_such_set_of_data"), "no_such_set_of_data")
  _fails(_source("tfds", tfds_directory, field="number"), "not text")


def test_missing_and_empty(tmp_path):
  _fails(_source("text", tmp_path / "absent"), "absent", "no such file")
  _fails(_source("text", tmp_path / "*.txt"), "no such file")
  _fails(_source("text", tmp_path), ".txt", "glob")
  _fails(_source("text"), "path is empty")
  _fails(_source("parquet", tmp_path), "'parquet'", "array_record")
  path = tmp_path / "empty.txt"
  path.write_text("")
  _fails(_source("text", path), "empty.txt", "no text")
  path.write_text("\n \n")
  _fails(_source("text", path, separator="\n"), "empty.txt", "no text")


@pytest.mark.parametrize("compressed", [False, True])
def test_not_utf8_names_file_and_byte(tmp_path, compressed):
  content = b"fine\nfine caf\xe9 more"
  path = tmp_path / ("latin.gz" if compressed else "latin")
  path.write_bytes(gzip.compress(content) if compressed else content)
  for separator in ("", "\n"):  # The offset is the file's, not the document's.
    source = _source("text", path, separator=separator)
    _fails(source, path.name, "not UTF-8 at byte 13")


def test_damaged_gzip(tmp_path):
  path = tmp_path / "x.txt.gz"
  path.write_bytes(gzip.compress(b"text" * 100)[:-12])
  _fails(_source("text", path), "x.txt.gz")
