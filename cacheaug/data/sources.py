"""Where documents come from: an ordered, indexable list of texts by kind.

  stdlib        the source of Python's own standard library, one file each
  text          files, plain or .gz; one file each, or split at `separator`
  jsonl         lines, plain or .gz; the text is `field`
  array_record  records of ArrayRecord files; each is UTF-8 text
  tfds          a TensorFlow Datasets name or directory; `split`, `field`

The sixth kind, `problems`, is endless: see problems.py and pipeline.py.
"""

import abc
import bisect
import functools
import glob
import gzip
import hashlib
import itertools
import json
import mmap
import os
import pathlib
import platform
import sysconfig
import typing
import zlib

import numpy as np

from cacheaug import errors

if typing.TYPE_CHECKING:
  import ml_collections

FILE_KINDS = ("stdlib", "text", "jsonl", "array_record", "tfds")
KINDS = (*FILE_KINDS, "problems")

_SUFFIXES = {
  "text": (".txt", ".txt.gz"),
  "jsonl": (".jsonl", ".jsonl.gz"),
}
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
  # Split of a tfds data set, in its own syntax, e.g. 'train[:10%]'.
  source.split = "train"
  # Key of the text in a jsonl object or a tfds example.
  source.field = "text"
  # Cuts a text file into documents; '' makes each file one document.
  source.separator = ""
  # Share of the training sequences, relative to the other sources'; 0 drops
  # the source.
  source.weight = 1.0
  # problems: the kinds drawn from.
  source.kinds = ("sum", "chain", "word")
  # problems: fewest and most additions and subtractions in one problem.
  source.steps_min = 1
  source.steps_max = 4
  # problems: sequences in the validation split (training has no end).
  source.validation_sequences = 64
  return source


class Documents(abc.ABC):
  """The documents of one source, in a fixed order. Can be pickled.

  Attributes:
    total_bytes: size of the text in bytes, or an estimate of it.
  """

  total_bytes: int

  @abc.abstractmethod
  def __len__(self) -> int:
    """Number of documents, at least 1."""

  @abc.abstractmethod
  def __getitem__(self, index: int) -> str:
    """Text of a document; UserError if it is not UTF-8."""

  @abc.abstractmethod
  def key(self, index: int) -> str:
    """Name of a document, independent of machine, seed and other documents.

    The train/validation split is decided by it.
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
    field: str = "",
  ):
    """Finds where each document starts and ends.

    Args:
      paths: files in order; `.gz` files are decompressed in memory.
      root: directory that document keys are relative to.
      label: config key of the source, for errors.
      separator: cuts files into documents; '' makes each file one document.
      field: when given, documents are JSON objects and the text is this key.

    Raises:
      UserError: when there is no document at all.
    """
    self._paths = paths
    self._names = [path.relative_to(root).as_posix() for path in paths]
    self._label = label
    self._separator = separator
    self._field = field
    found = [_spans(path, separator.encode()) for path in paths]
    spans = list(itertools.chain.from_iterable(found))
    if not spans:
      raise errors.UserError(
        f"{label}: no text in {_and_more(paths)}; give a file that is not empty"
      )
    self._file = np.repeat(np.arange(len(paths)), [len(f) for f in found])
    self._spans = np.array(spans, np.int64)  # [documents, (start, end)]
    self._first = np.searchsorted(self._file, np.arange(len(paths)))
    self.total_bytes = int((self._spans[:, 1] - self._spans[:, 0]).sum())

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, index: int) -> str:
    path = self._paths[self._file[index]]
    start, end = map(int, self._spans[index])
    try:
      text = _read(path, start, end).decode("utf-8")
    except UnicodeDecodeError as error:
      raise errors.UserError(
        f"{self._label}: {path} is not UTF-8 at byte {start + error.start}; "
        "convert it, e.g. with iconv"
      ) from error
    if self._field:
      return self._parse(text, path, index)
    # A separator usually stands on a line of its own.
    return text.strip("\n") if self._separator else text

  def _parse(self, line: str, path: pathlib.Path, index: int) -> str:
    number = index - int(self._first[self._file[index]]) + 1
    where = f"{self._label}: {path}, object {number}"
    try:
      record = json.loads(line)
    except ValueError as error:
      raise errors.UserError(f"{where}: not JSON ({error})") from error
    return _field(record, self._field, where)

  def key(self, index: int) -> str:
    file = int(self._file[index])
    return f"{self._names[file]}#{index - int(self._first[file])}"

  def fingerprint(self) -> str:
    cut = (self._separator, self._field)
    return repr((_stats(self._paths, self._names), cut))


class _StandardLibrary(_FileDocuments):
  """The UTF-8 files of Python's standard library, tests left out."""

  def __init__(self, *, label: str):
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.blake2b(digest_size=16)
    paths = []
    for path in _walk(root, (".py",), _STDLIB_SKIPPED):
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
    counts = [self._open(i).num_records() for i in range(len(paths))]
    self._ends = np.cumsum(counts).tolist()
    if not self._ends[-1]:
      raise errors.UserError(
        f"{label}: no record in {_and_more(paths)}: empty, or cut short"
      )
    self.total_bytes = sum(path.stat().st_size for path in paths)
    self._readers: dict[int, typing.Any] = {}

  def _open(self, file: int) -> typing.Any:
    from array_record.python import array_record_module

    path = self._paths[file]
    try:
      return array_record_module.ArrayRecordReader(str(path))
    except Exception as error:  # The library raises RuntimeError or ValueError.
      raise errors.UserError(
        f"{self._label}: {path} is not a readable ArrayRecord file"
      ) from error

  def __getstate__(self) -> dict[str, typing.Any]:
    return self.__dict__ | {"_readers": {}}  # Open files cannot be pickled.

  def __len__(self) -> int:
    return self._ends[-1]

  def _locate(self, index: int) -> tuple[int, int]:
    file = bisect.bisect_right(self._ends, index)
    return file, index - (self._ends[file - 1] if file else 0)

  def __getitem__(self, index: int) -> str:
    file, row = self._locate(index)
    if file not in self._readers:
      self._readers[file] = self._open(file)
    (record,) = self._readers[file].read([row])
    where = f"{self._label}: {self._paths[file]}, record {row}"
    return _decode(record, where)

  def key(self, index: int) -> str:
    file, row = self._locate(index)
    return f"{self._names[file]}#{row}"

  def fingerprint(self) -> str:
    return repr(_stats(self._paths, self._names))


class _TfdsDocuments(Documents):
  """One text field of a TensorFlow Datasets split."""

  def __init__(self, path: str, split: str, field: str, *, label: str):
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
    if field not in fields:
      raise errors.UserError(f"{label}.field={field!r}: {path} has {fields}")
    sizes = [
      (s.name, s.shard_lengths, s.num_bytes) for s in info.splits.values()
    ]
    self._fingerprint = repr((self._name, split, field, self._length, sizes))
    self.total_bytes = info.dataset_size

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
      reason = " ".join(str(error).split())[:200]
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
    if self._data is None:
      self._open()
    where = f"{self._label}: {self._path}, example {index}"
    return _field(self._data[index], self._field, where)

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
  if source.kind == "tfds":
    return _TfdsDocuments(source.path, source.split, source.field, label=label)
  paths, root = _expand(source.path, source.kind, label)
  if source.kind == "text":
    return _FileDocuments(paths, root, label=label, separator=source.separator)
  if source.kind == "array_record":
    return _ArrayRecordDocuments(paths, root, label=label)
  if not source.field:
    raise errors.UserError(f"{label}.field is empty; jsonl needs it")
  return _FileDocuments(
    paths, root, label=label, separator="\n", field=source.field
  )


def _expand(
  path: str, kind: str, label: str
) -> tuple[list[pathlib.Path], pathlib.Path]:
  """Files that a path names, sorted, and the directory that contains all."""
  path = os.path.expanduser(path)
  if os.path.isfile(path):
    return [pathlib.Path(path)], pathlib.Path(path).parent
  if os.path.isdir(path):
    root = pathlib.Path(path)
    if kind == "array_record":
      paths = [p for p in _walk(root, ("",)) if ".array_record" in p.name]
      wanted = ".array_record"
    else:
      paths = _walk(root, _SUFFIXES[kind])
      wanted = " or ".join(_SUFFIXES[kind])
    if not paths:
      raise errors.UserError(
        f"{label}.path={path!r}: no {wanted} file in this directory; give a "
        "glob such as 'DIR/**/*.md' for other names"
      )
    return paths, root
  paths = sorted(
    pathlib.Path(p)
    for p in glob.glob(path, recursive=True)
    if os.path.isfile(p)
  )
  if not paths:
    raise errors.UserError(f"{label}.path={path!r}: no such file or directory")
  return paths, pathlib.Path(os.path.commonpath([p.parent for p in paths]))


def _walk(
  root: pathlib.Path,
  suffixes: tuple[str, ...],
  skipped: frozenset[str] = frozenset(),
) -> list[pathlib.Path]:
  """Files below root, sorted by relative path.

  Hidden ones are left out, and directories whose name is in `skipped`.
  """
  found = []
  for directory, names, files in os.walk(root):
    names[:] = [n for n in names if not n.startswith(".") and n not in skipped]
    found.extend(
      pathlib.Path(directory, f)
      for f in files
      if f.endswith(suffixes) and not f.startswith(".")
    )
  return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _spans(path: pathlib.Path, separator: bytes) -> list[tuple[int, int]]:
  """Start and end byte of each document that is not blank."""
  if path.suffix == ".gz":
    return _split(_gunzip(path), separator)
  with _open(path) as file:
    size = os.fstat(file.fileno()).st_size
    if not separator or not size:  # An empty file cannot be mapped.
      return [(0, size)] if size else []
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return _split(data, separator)


def _split(data: bytes | mmap.mmap, separator: bytes) -> list[tuple[int, int]]:
  if not separator:
    return [(0, len(data))] if len(data) else []
  spans = []
  start = 0
  while start < len(data):
    end = data.find(separator, start)
    end = len(data) if end < 0 else end
    if data[start:end].strip():
      spans.append((start, end))
    start = end + len(separator)
  return spans


def _open(path: pathlib.Path) -> typing.BinaryIO:
  try:
    return path.open("rb")
  except OSError as error:
    raise errors.UserError(f"{path}: cannot read ({error.strerror})") from error


def _read(path: pathlib.Path, start: int, end: int) -> bytes:
  if path.suffix == ".gz":
    return _gunzip(path)[start:end]
  with _open(path) as file:
    file.seek(start)
    return file.read(end - start)


@functools.lru_cache(maxsize=1)  # Documents are read file by file, in order.
def _gunzip(path: pathlib.Path) -> bytes:
  try:
    with _open(path) as file:
      return gzip.decompress(file.read())
  except (OSError, EOFError, zlib.error) as error:
    raise errors.UserError(
      f"{path}: not a whole gzip file ({error}); fetch it again"
    ) from error


def _stats(
  paths: list[pathlib.Path], names: list[str]
) -> list[tuple[str, int, int]]:
  """Name, size and time of change of each file."""
  stats = [path.stat() for path in paths]
  return [
    (name, stat.st_size, stat.st_mtime_ns)
    for name, stat in zip(names, stats, strict=True)
  ]


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


def _and_more(paths: list[pathlib.Path]) -> str:
  more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
  return f"{paths[0]}{more}"
