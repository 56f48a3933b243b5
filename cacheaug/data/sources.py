"""Sources of documents: an ordered, indexable list of texts for each kind.

  stdlib        the source of Python's standard library, a document per file
  text          files, plain or .gz; a document per file, or split at
                `separator`
  jsonl         lines, plain or .gz; the text is in `field`, or a question is
                in `field` and its answer in `answer_field`
  array_record  records of ArrayRecord files; each is UTF-8 text
  tfds          a TensorFlow Datasets name or directory; `split`, `field`

The sixth kind, `problems`, is endless: see problems.py and pipeline.py.
"""

import abc
import bisect
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import platform
import sysconfig
import typing

import numpy as np

from cacheaug import errors
from cacheaug.data import files, record_files

if typing.TYPE_CHECKING:
  import ml_collections

FILE_KINDS = ("stdlib", "text", "jsonl", "array_record", "tfds")
KINDS = (*FILE_KINDS, "problems")

# lib2to3 holds Python 2 and is gone in 3.13.
_STDLIB_SKIPPED = frozenset(
  "site-packages dist-packages test tests idle_test lib2to3 __pycache__".split()
)


def source_defaults() -> "ml_collections.ConfigDict":
  """Every key of a source, with the value it has when a config names none."""
  import ml_collections

  source = ml_collections.ConfigDict()
  # stdlib, text, jsonl, array_record, tfds or problems.
  source.kind = "stdlib"
  # File, directory or glob; for tfds a data set's name or directory.
  source.path = ""
  # Split of a tfds data set, in the syntax of tfds, e.g. 'train[:10%]'.
  source.split = "train"
  # Key of the text in a jsonl object or a tfds example.
  source.field = "text"
  # Key of an answer, likewise: a document is then `prompt`, whose {} is the
  # text of `field`, and the answer. Such documents stay within a row.
  source.answer_field = ""
  source.prompt = "{}\n"
  # Cuts a text file into documents; '' makes each file a document.
  source.separator = ""
  # Share of the training sequences, relative to the other sources'; 0 drops
  # the source.
  source.weight = 1.0
  # problems: the kinds drawn from.
  source.kinds = ("sum", "chain", "word")
  # problems: fewest and most steps (sums, lookups, factors) in one problem.
  source.steps_min = 1
  source.steps_max = 4
  # problems of serial kinds (data/serial.py): fewest and most letters of a
  # cycle, symbols that are permuted, or lines of chains.
  source.size_min = 8
  source.size_max = 8
  # problems of serial kinds: questions about the same facts.
  source.questions = 1
  # problems: what data.answers_only takes for the answer: that alone ('cue'),
  # or all that follows the facts, questions too ('facts'); 'after_facts' has
  # the points of 'facts' and learns the answers alone.
  source.answers_from = "cue"
  # problems: sequences in the validation split (training has no end).
  source.validation_sequences = 64
  return source


class Documents(abc.ABC):
  """The documents of a source, in a fixed order. Can be pickled.

  Attributes:
    total_bytes: size of the text in bytes, or an estimate of it.
    answered: whether each is a prompt and its answer.
  """

  total_bytes: int
  answered: bool = False

  @abc.abstractmethod
  def __len__(self) -> int:
    """Number of documents, at least 1."""

  @abc.abstractmethod
  def __getitem__(self, index: int) -> str:
    """Text of a document; UserError if it is not UTF-8."""

  def parts(self, index: int) -> tuple[str, str]:
    """The prompt and its answer; ('', text) where there are no answers."""
    return "", self[index]

  @abc.abstractmethod
  def key(self, index: int) -> str:
    """Name of a document, independent of machine, seed and other documents.

    It decides whether the document is held out.
    """

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Changes when the documents change; part of cache addresses."""


class _FileDocuments(Documents):
  """Documents that are byte spans of files."""

  def __init__(
    self,
    paths: list[pathlib.Path],
    root: pathlib.Path,
    *,
    label: str,
    separator: str = "",
    field: "_Fields | None" = None,
  ):
    """Opens no file: documents are located when they are first needed.

    Args:
      paths: files in order; `.gz` files are decompressed in memory.
      root: directory that document keys are relative to.
      label: config key of the source, for errors.
      separator: cuts files into documents; '' makes each file a document.
      field: when given, documents are JSON objects and the text is in these.
    """
    self._paths = paths
    self._names = [path.relative_to(root).as_posix() for path in paths]
    self._label = label
    self._separator = separator
    self._field = field
    self.answered = field is not None and bool(field.answer)

  @functools.cached_property
  def _index(self) -> "_Index":
    spans = []
    for path in self._paths:
      try:
        spans_of_file = files.spans(path, self._separator)
      except errors.UserError as error:
        raise errors.UserError(f"{self._label}: {error}") from error
      spans.append(np.array(spans_of_file, np.int64).reshape(-1, 2))
    if not any(map(len, spans)):
      raise errors.UserError(
        f"{self._label}: no text in {files.and_more(self._paths)}; give a file "
        "that is not empty"
      )
    return _Index.of(spans)

  @property
  def total_bytes(self) -> int:
    spans = self._index.spans
    return int((spans[:, 1] - spans[:, 0]).sum())

  def __len__(self) -> int:
    return len(self._index.spans)

  def __getitem__(self, index: int) -> str:
    return "".join(self.parts(index))

  def parts(self, index: int) -> tuple[str, str]:
    path = self._paths[self._index.file[index]]
    start, end = map(int, self._index.spans[index])
    try:
      text = files.read(path, start, end).decode("utf-8")
    except UnicodeDecodeError as error:
      raise errors.UserError(
        f"{self._label}: {path} is not UTF-8 at byte {start + error.start}; "
        "convert it, e.g. with iconv"
      ) from error
    if self._field:
      return self._parse(text, path, index)
    # A separator is usually a whole line.
    return "", text.strip("\r\n") if self._separator else text

  def _parse(
    self, line: str, path: pathlib.Path, index: int
  ) -> tuple[str, str]:
    file, place = self._index.locate(index)
    where = f"{self._label}: {path}, object {place + 1}"
    if line.lstrip().startswith("["):
      raise errors.UserError(
        f"{where}: one JSON array; give one object a line, `jq -c '.[]'`"
      )
    if line.strip() == "{":
      raise errors.UserError(
        f"{where}: one JSON object over several lines; give one object a line, "
        "`jq -c .`"
      )
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise errors.UserError(f"{where}: not JSON ({error})") from error
    return self._field.read(record, where)

  def key(self, index: int) -> str:
    file, place = self._index.locate(index)
    return f"{self._names[file]}#{place}"

  def fingerprint(self) -> str:
    cut = (self._separator, self._field.name if self._field else "")
    if self.answered:
      cut += (self._field.answer, self._field.prompt)
    return repr((files.stats(self._paths, self._names), cut))


@dataclasses.dataclass(frozen=True)
class _Index:
  """Where each document of several files is."""

  file: np.ndarray  # int [documents]
  spans: np.ndarray  # int [documents, (start, end)], bytes of its file
  first: np.ndarray  # int [files]: the first document of each

  @classmethod
  def of(cls, spans: list[np.ndarray]) -> "_Index":
    """From the spans of each file, int [documents, 2]."""
    file = np.repeat(np.arange(len(spans)), [len(s) for s in spans])
    first = np.searchsorted(file, np.arange(len(spans)))
    return cls(file, np.concatenate(spans), first)

  def locate(self, index: int) -> tuple[int, int]:
    """A document's file, and its number within that file."""
    file = int(self.file[index])
    return file, index - int(self.first[file])


class _StandardLibrary(_FileDocuments):
  """The UTF-8 files of Python's standard library, tests left out."""

  def __init__(self, *, label: str):
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.blake2b(digest_size=16)
    paths = []
    for path in files.walk(root, (".py",), _STDLIB_SKIPPED):
      data = path.read_bytes()
      try:
        data.decode("utf-8")
      except UnicodeDecodeError:
        continue
      digest.update(path.relative_to(root).as_posix().encode() + b"\0" + data)
      paths.append(path)
    # By content: two machines with the same Python share a cache.
    self._digest = f"{platform.python_version()} {digest.hexdigest()}"
    super().__init__(paths, root, label=label)

  def fingerprint(self) -> str:
    return self._digest


class _ArrayRecordDocuments(Documents):
  """UTF-8 records of ArrayRecord files."""

  def __init__(
    self, paths: list[pathlib.Path], root: pathlib.Path, *, label: str
  ):
    self._paths = paths
    self._names = [path.relative_to(root).as_posix() for path in paths]
    self._label = label
    self.total_bytes = sum(path.stat().st_size for path in paths)

  @functools.cached_property
  def _ends(self) -> list[int]:
    """Records up to the end of each file."""
    counts = [self._of(path, record_files.count) for path in self._paths]
    ends = np.cumsum(counts).tolist()
    if not ends[-1]:
      raise errors.UserError(
        f"{self._label}: no record in {files.and_more(self._paths)}: empty, or "
        "cut short"
      )
    return ends

  def _of(
    self, path: pathlib.Path, function: typing.Callable, *args: typing.Any
  ) -> typing.Any:
    try:
      return function(path, *args)
    except Exception as error:  # The library raises RuntimeError or ValueError.
      remedy = record_files.explain(error) or "is it one, and whole?"
      raise errors.UserError(
        f"{self._label}: {path} is not a readable ArrayRecord file; {remedy}"
      ) from error

  def __len__(self) -> int:
    return self._ends[-1]

  def _locate(self, index: int) -> tuple[int, int]:
    file = bisect.bisect_right(self._ends, index)
    return file, index - (self._ends[file - 1] if file else 0)

  def __getitem__(self, index: int) -> str:
    file, row = self._locate(index)
    (record,) = self._of(self._paths[file], record_files.read, [row])
    where = f"{self._label}: {self._paths[file]}, record {row}"
    return _decode(record, where)

  def key(self, index: int) -> str:
    file, row = self._locate(index)
    return f"{self._names[file]}#{row}"

  def fingerprint(self) -> str:
    return repr(files.stats(self._paths, self._names))


class _TfdsDocuments(Documents):
  """One text field of a TensorFlow Datasets split."""

  def __init__(self, path: str, split: str, field: "_Fields", *, label: str):
    self._path = path
    self._split = split
    self._field = field
    self._label = label
    self._data: typing.Any = None
    info = self._open().info
    self._length = len(self._data)
    if not self._length:
      raise errors.UserError(f"{label}: split {split!r} of {path} is empty")
    self._name = info.full_name
    fields = list(info.features or ())
    for key, name in (("field", field.name), ("answer_field", field.answer)):
      if name not in ("", *fields) or not field.name:
        raise errors.UserError(f"{label}.{key}={name!r}: {path} has {fields}")
    self.answered = bool(field.answer)
    sizes = [
      (s.name, s.shard_lengths, s.num_bytes) for s in info.splits.values()
    ]
    cut = field if self.answered else field.name
    self._fingerprint = repr((self._name, split, cut, self._length, sizes))
    self.total_bytes = info.dataset_size
    self._files = sum(len(lengths or ()) for _, lengths, _ in sizes)

  def _open(self) -> typing.Any:
    """Opens the data source and returns the builder."""
    import tensorflow_datasets as tfds

    path = os.path.expanduser(self._path)
    try:
      if os.path.isdir(path):
        builder = tfds.builder_from_directory(path)
      else:
        builder = tfds.builder(self._path, file_format="array_record")
      self._data = builder.as_data_source(split=self._split)
    except Exception as error:  # tfds has some twenty classes for this.
      reason = errors.one_line(error, 200)
      raise errors.UserError(
        f"{self._label}: cannot open split {self._split!r} of tfds data set "
        f"{self._path!r} ({reason}); prepare it with `tfds build "
        "--file_format=array_record`"
      ) from error
    return builder

  def __getstate__(self) -> dict[str, typing.Any]:
    return self.__dict__ | {"_data": None}  # Open files cannot be pickled.

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> str:
    return "".join(self.parts(index))

  def parts(self, index: int) -> tuple[str, str]:
    if self._data is None:
      self._open()
    record_files.allow(self._files)
    where = f"{self._label}: {self._path}, example {index}"
    try:
      record = self._data[index]
    except Exception as error:  # The library raises RuntimeError, ValueError.
      remedy = record_files.explain(error) or "prepare the data set again"
      raise errors.UserError(f"{where}: cannot be read; {remedy}") from error
    return self._field.read(record, where)

  def key(self, index: int) -> str:
    return f"{self._name}/{self._split}#{index}"

  def fingerprint(self) -> str:
    return self._fingerprint


def open_documents(
  source: "ml_collections.ConfigDict", *, label: str = "source"
) -> Documents:
  """Opens the documents of a source.

  Args:
    source: the keys of `source_defaults`; `kind` is one of `FILE_KINDS`.
    label: config key of the source, for errors.

  Returns:
    The documents.

  Raises:
    UserError: for an unknown kind, and for files that are missing, empty or
      unreadable. Text that is not UTF-8 is found when it is read.
  """
  if source.kind == "stdlib":
    return _StandardLibrary(label=label)
  if source.kind not in FILE_KINDS:
    raise errors.UserError(
      f"{label}.kind={source.kind!r}: use one of {', '.join(KINDS)}"
    )
  if not source.path:
    raise errors.UserError(f"{label}.path is empty; {source.kind} needs it")
  field = _fields(source, label)
  if source.kind == "tfds":
    return _TfdsDocuments(source.path, source.split, field, label=label)
  paths, root = files.expand(source.path, source.kind, label)
  if source.kind == "text":
    return _FileDocuments(paths, root, label=label, separator=source.separator)
  if source.kind == "array_record":
    return _ArrayRecordDocuments(paths, root, label=label)
  if not source.field:
    raise errors.UserError(f"{label}.field is empty; jsonl needs it")
  return _FileDocuments(paths, root, label=label, separator="\n", field=field)


@dataclasses.dataclass(frozen=True)
class _Fields:
  """Where a record's text is."""

  name: str
  answer: str = ""  # '' where it is not a question
  prompt: str = ""

  def read(self, record: typing.Any, where: str) -> tuple[str, str]:
    """(prompt, answer), or ('', text)."""
    text = _field(record, self.name, where)
    if not self.answer:
      return "", text
    return self.prompt.replace("{}", text), _field(record, self.answer, where)


def _fields(source: "ml_collections.ConfigDict", label: str) -> _Fields:
  """Reads the keys of fields; refuses those that do not fit together."""
  if not source.answer_field:
    return _Fields(source.field)
  if source.kind not in ("jsonl", "tfds"):
    raise errors.UserError(
      f"{label}.answer_field={source.answer_field!r}: {source.kind} has no "
      "fields; use jsonl or tfds"
    )
  if source.prompt.count("{}") != 1:
    raise errors.UserError(
      f"{label}.prompt={source.prompt!r} must have {{}} once, where the "
      "question goes"
    )
  return _Fields(source.field, source.answer_field, source.prompt)


def _field(record: typing.Any, field: str, where: str) -> str:
  """The text under `field` of a record that was read."""
  if not isinstance(record, dict) or field not in record:
    raise errors.UserError(f"{where}: no field {field!r} in {str(record)[:99]}")
  value = record[field]
  if isinstance(value, np.ndarray) and not value.shape:
    value = value[()]
  if isinstance(value, bytes):
    return _decode(value, where)
  if not isinstance(value, str):
    raise errors.UserError(
      f"{where}: field {field!r} is {type(value).__name__}, not text"
    )
  return value


def _decode(data: bytes, where: str) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f"{where}: not UTF-8 at byte {error.start}; convert it first"
    ) from error
