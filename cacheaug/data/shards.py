"""A cache of packed rows: its files, and reading rows from them.

A cache is a directory. A shard is an ArrayRecord file of rows for each split,
plus a JSON file with their sizes and checksums, which is renamed into place
after them; `meta.json` is written last. A shard without its JSON file does not
exist.

A row is the bytes of tokens uint16[S] (int32[S] for a vocabulary over 65536)
followed by documents int32[S]: the number of the document each token belongs
to, counted over the whole source, and -1 on padding. `ANSWER` is added to it on
tokens of an answer, and `ASKED` too on those of questions between answers.
"""

import hashlib
import json
import pathlib
import sys
import typing
import zlib

import numpy as np

from cacheaug import errors
from cacheaug.data import record_files
from cacheaug.run import files

SPLITS = ("train", "validation")
ANSWER = 1 << 30  # above every number of a document
ASKED = 1 << 29  # likewise, added beside ANSWER where it is not learned

# Rows of a split up to this size are kept in memory: reading one at random
# from disk takes 30 us, from memory less than 1.
_IN_MEMORY_BYTES = 256 << 20


class _CorruptError(Exception):
  """A shard's file has not the size or checksum of its JSON file."""

  def __init__(self, shard: int, path: pathlib.Path):
    super().__init__(str(path))
    self.shard = shard
    self.path = path


class UnreadableError(errors.UserError):
  """Rows that cannot be read; another try may succeed."""


class PackedRows:
  """The packed rows of one split, readable at random from any thread.

  Attributes:
    num_documents: documents in this split.
    num_source_documents: documents in both; document numbers are below it.
    num_tokens: tokens in this split, padding not counted.
    num_lost: documents whose answer lies wholly beyond its row.
  """

  def __init__(self, directory: pathlib.Path, split: str):
    """Opens a complete cache, small ones into memory.

    Args:
      directory: a complete cache, from `packing.pack`.
      split: 'train' or 'validation'.
    """
    meta = json.loads((directory / "meta.json").read_text())
    shards = [shard[split] for shard in meta["shards"]]
    text = json.dumps(shards, sort_keys=True).encode()
    self._digest = hashlib.blake2b(text, digest_size=4).hexdigest()
    self._sequence = meta["sequence"]
    self._dtype = np.dtype(meta["dtype"])
    self._directory = directory
    self._length = sum(shard["rows"] for shard in shards)
    self.num_documents = sum(shard["documents"] for shard in shards)
    self.num_source_documents = meta["num_documents"]
    self.num_tokens = sum(shard["tokens"] for shard in shards)
    self.num_lost = sum(shard.get("lost", 0) for shard in shards)
    width = self._sequence * (self._dtype.itemsize + 4)
    self._in_memory = self._length * width <= _IN_MEMORY_BYTES
    files = [
      (i, shard_path(directory, split, i), shard)
      for i, shard in enumerate(shards)
      if shard["rows"]
    ]
    if self._in_memory:
      records = [r for file in files for r in _read_shard(*file)]
      self._tokens, self._documents = self._parse(records)
    elif files:
      self._source = record_files.RecordFiles(
        [str(path) for _, path, _ in files],
        [shard["rows"] for _, _, shard in files],
      )

  def __len__(self) -> int:
    return self._length

  def describe(self) -> str:
    """What the rows are: two hosts that say the same have the same rows."""
    return (
      f"{self.num_source_documents} documents in {len(self)} rows "
      f"({self._digest})"
    )

  def _parse(self, records: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    raw = np.frombuffer(b"".join(records), np.uint8)
    raw = raw.reshape(len(records), self._sequence * (self._dtype.itemsize + 4))
    cut = self._sequence * self._dtype.itemsize
    tokens = np.ascontiguousarray(raw[:, :cut]).view(self._dtype)
    return tokens, np.ascontiguousarray(raw[:, cut:]).view(np.int32)

  def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reads rows by number.

    Args:
      rows: int [n], each in 0..len(self)-1.

    Returns:
      tokens and documents, both int32 [n, S], with ANSWER where it is one.

    Raises:
      UnreadableError: the disk fails, or the cache has been damaged since it
        was opened.
    """
    if self._in_memory:
      return self._tokens[rows].astype(np.int32), self._documents[rows]
    try:
      records = self._source.take(rows)
    except Exception as error:  # The library raises RuntimeError, ValueError.
      remedy = record_files.explain(error) or (
        "check the disk, or delete this directory to pack it again"
      )
      raise UnreadableError(
        f"{self._directory}: cannot read the packed data; {remedy}"
      ) from error
    tokens, documents = self._parse(records)
    return tokens.astype(np.int32), documents


def open_rows(directory: pathlib.Path, split: str) -> PackedRows | None:
  """Opens a cache; None, and the damaged shard dropped, if it is corrupt."""
  try:
    return PackedRows(directory, split)
  except _CorruptError as error:
    print(f"{error.path} is damaged: packing it again", file=sys.stderr)
    (directory / "meta.json").unlink(missing_ok=True)
    json_path(directory, error.shard).unlink(missing_ok=True)
    return None


def write_records(path: pathlib.Path, records: list[bytes]) -> dict[str, int]:
  """Writes an ArrayRecord file by rename; returns its size and checksum."""
  from array_record.python import array_record_module

  temporary = files.temporary(path)
  try:
    # Random access reads a whole group: one record each.
    writer = array_record_module.ArrayRecordWriter(
      str(temporary), "group_size:1"
    )
    for record in records:
      writer.write(record)
    writer.close()
  except (RuntimeError, ValueError) as error:  # Its words for a full disk.
    raise OSError(str(error)) from error
  size, checksum = _checksum(temporary)
  temporary.replace(path)
  return {"bytes": size, "crc32": checksum}


def _read_shard(
  shard: int, path: pathlib.Path, entry: dict[str, int]
) -> list[bytes]:
  from array_record.python import array_record_module

  try:
    intact = _checksum(path) == (entry["bytes"], entry["crc32"])
  except OSError:
    intact = False
  if not intact:
    raise _CorruptError(shard, path)
  reader = array_record_module.ArrayRecordReader(str(path))
  records = reader.read_all()
  reader.close()
  return records


def _checksum(path: pathlib.Path) -> tuple[int, int]:
  """Size and CRC-32 of a file."""
  size = checksum = 0
  with path.open("rb") as file:
    while chunk := file.read(1 << 20):
      size += len(chunk)
      checksum = zlib.crc32(chunk, checksum)
  return size, checksum


def shard_path(directory: pathlib.Path, split: str, shard: int) -> pathlib.Path:
  """Where the rows of a shard are."""
  return directory / f"{split}-{shard:05d}.array_record"


def json_path(directory: pathlib.Path, shard: int) -> pathlib.Path:
  """Where the sizes and checksums of a shard are."""
  return directory / f"shard-{shard:05d}.json"


def write_json(path: pathlib.Path, entries: dict[str, typing.Any]) -> None:
  """Writes a JSON file by rename, so that it is whole or absent."""
  files.write_whole(path, json.dumps(entries).encode())


def read_shard_json(
  directory: pathlib.Path, shard: int
) -> dict[str, typing.Any] | None:
  """Reads the sizes and checksums of a shard; None if it is incomplete."""
  try:
    entry = json.loads(json_path(directory, shard).read_text())
  except (FileNotFoundError, ValueError):
    return None
  return entry if _sizes_match(directory, shard, entry) else None


def _sizes_match(
  directory: pathlib.Path, shard: int, entry: dict[str, typing.Any]
) -> bool:
  for split in SPLITS:
    path = shard_path(directory, split, shard)
    if entry[split]["rows"]:
      if not path.exists() or path.stat().st_size != entry[split]["bytes"]:
        return False
  return True


def is_complete(directory: pathlib.Path) -> bool:
  """Whether every shard exists and has its size."""
  try:
    meta = json.loads((directory / "meta.json").read_text())
  except (FileNotFoundError, ValueError):
    return False
  return all(
    _sizes_match(directory, i, entry) for i, entry in enumerate(meta["shards"])
  )
