"""Random access to the records of many ArrayRecord files, few of them open.

Grain's source keeps every file open that it has read from: a packed corpus of
4 GB has a thousand files, and `ulimit -n` is often 1024.
"""

import collections
import concurrent.futures
import functools
import os
import pathlib
import resource
import threading
import typing

import numpy as np

# Files read at once; a network's latency is then paid once for as many.
_THREADS = 16
_lock = threading.Lock()
_Key = tuple[str, int, int, int]
# Readers that no thread uses now, those used longest ago first.
_idle: "collections.OrderedDict[_Key, typing.Any]" = collections.OrderedDict()


def open_reader(path: pathlib.Path | str) -> typing.Any:
  """An `ArrayRecordReader` without read-ahead; the caller closes it.

  Raises:
    RuntimeError, ValueError: the library's words for a file it cannot read.
  """
  from array_record.python import array_record_module

  return array_record_module.ArrayRecordReader(
    str(path),
    options="readahead_buffer_size:0",
    file_reader_buffer_size=1 << 15,
  )


def count(path: pathlib.Path | str) -> int:
  """Records of a file; errors as of `open_reader`."""
  reader = open_reader(path)
  try:
    return reader.num_records()
  finally:
    reader.close()


def read(path: pathlib.Path | str, rows: list[int]) -> list[bytes]:
  """Records of one file by number; errors as of `open_reader`, or OSError."""
  stat = os.stat(path)  # Another file may have taken the name.
  key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
  with _lock:
    reader = _idle.pop(key, None)
  reader = reader or open_reader(path)
  try:
    records = reader.read(rows)
  except BaseException:
    reader.close()  # Another try opens the file again.
    raise
  with _lock:
    twice = _idle.pop(key, None)  # Another thread read from it meanwhile.
    _idle[key] = reader
    surplus = [] if twice is None else [twice]
    while len(_idle) > _most_open():
      surplus.append(_idle.popitem(last=False)[1])
  for reader in surplus:
    reader.close()
  return records


class RecordFiles:
  """Files one after the other, as one list of records. From any thread."""

  def __init__(self, paths: list[str], counts: list[int]):
    """Opens nothing yet.

    Args:
      paths: files in order.
      counts: records of each.
    """
    self._paths = paths
    self._ends = np.cumsum(counts)

  def take(self, rows: np.ndarray) -> list[bytes]:
    """Records by number, each below the sum of counts, in the given order.

    Raises:
      RuntimeError, ValueError, OSError: a file that cannot be read.
    """
    rows = np.asarray(rows)
    file_of = np.searchsorted(self._ends, rows, side="right")
    starts = np.concatenate([[0], self._ends[:-1]])
    groups = [(f, np.flatnonzero(file_of == f)) for f in np.unique(file_of)]

    def read_group(group: tuple[int, np.ndarray]) -> list[bytes]:
      file, places = group
      return read(self._paths[file], (rows[places] - starts[file]).tolist())

    if len(groups) == 1:
      parts = [read_group(groups[0])]
    else:
      parts = list(_threads().map(read_group, groups))
    records: list[bytes] = [b""] * len(rows)
    for (_, places), part in zip(groups, parts, strict=True):
      for place, record in zip(places, part, strict=True):
        records[place] = record
    return records


def allow(count: int) -> None:
  """Raises the limit of open files by `count`, where the system permits it.

  For a reader that keeps all of its files open.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + 256  # 256 for libraries, sockets and logs
  if soft != resource.RLIM_INFINITY and soft < needed:
    if hard != resource.RLIM_INFINITY:
      needed = min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))


def explain(error: BaseException) -> str:
  """A remedy where the limit of open files was met; else ''."""
  if "Too many open files" not in str(error):
    return ""
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return f"the process may open {soft} files at once: raise `ulimit -n`"


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(_THREADS, "record_files")


@functools.cache
def _most_open() -> int:
  """A share of the process's limit, for all sources together."""
  soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
  return max(8, min(soft // 4, 512))
