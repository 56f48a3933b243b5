"""The files of a source, and the documents that they are cut into."""

import codecs
import collections.abc
import functools
import glob
import gzip
import mmap
import os
import pathlib
import re
import typing
import zlib

from cacheaug import errors
from cacheaug.data import file_kinds

_SUFFIXES = {
  "text": (".txt", ".txt.gz"),
  "jsonl": (".jsonl", ".jsonl.gz"),
}


def expand(
  path: str, kind: str, label: str
) -> tuple[list[pathlib.Path], pathlib.Path]:
  """Lists the files that a path names.

  Args:
    path: a file, a directory or a glob pattern.
    kind: 'text', 'jsonl' or 'array_record'.
    label: config key of the source, for errors.

  Returns:
    The files, sorted, and the directory that contains all of them.

  Raises:
    UserError: if there is no such file.
  """
  path = os.path.expanduser(path)
  if os.path.isfile(path):
    return [pathlib.Path(path)], pathlib.Path(path).parent
  if os.path.isdir(path):
    root = pathlib.Path(path)
    if kind == "array_record":
      paths = [p for p in walk(root, ("",)) if ".array_record" in p.name]
      suffixes = ".array_record"
    else:
      paths = walk(root, _SUFFIXES[kind])
      suffixes = " or ".join(_SUFFIXES[kind])
    if not paths:
      raise errors.UserError(
        f"{label}.path={path!r}: no {suffixes} file in this directory; give a "
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


def walk(
  root: pathlib.Path,
  suffixes: tuple[str, ...],
  skipped: frozenset[str] = frozenset(),
) -> list[pathlib.Path]:
  """Lists the files below root, sorted by relative path.

  Args:
    root: a directory.
    suffixes: ends of the names that are listed.
    skipped: names of directories that are left out, as hidden ones are.
  """
  paths = []
  for directory, names, files in os.walk(root):
    names[:] = [n for n in names if not n.startswith(".") and n not in skipped]
    paths.extend(
      pathlib.Path(directory, f)
      for f in files
      if f.endswith(suffixes) and not f.startswith(".")
    )
  return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def spans(path: pathlib.Path, separator: str) -> list[tuple[int, int]]:
  """Finds the start and end byte of each document that is not blank.

  A byte order mark belongs to no document. A line break in the separator
  stands for the file's own: LF, CR LF, or CR where there is no LF.

  Raises:
    UserError: a file that cannot be read, or holds no text.
  """
  if path.suffix == ".gz":
    return _split(_gunzip(path), separator, path)
  with _open(path) as file:
    if not os.fstat(file.fileno()).st_size:  # It cannot be mapped.
      return []
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      return _split(data, separator, path)


def _split(
  data: bytes | mmap.mmap, separator: str, path: pathlib.Path
) -> list[tuple[int, int]]:
  why = file_kinds.explain(data[: file_kinds.HEAD])
  if why:
    raise errors.UserError(f"{path}: {why}")
  start = len(codecs.BOM_UTF8) if data[:3] == codecs.BOM_UTF8 else 0
  if not separator:
    return [(start, len(data))] if len(data) > start else []
  spans = []
  for cut, after in _cuts(data, separator, start):
    if data[start:cut].strip():
      spans.append((start, cut))
    start = after
  return spans


def _cuts(
  data: bytes | mmap.mmap, separator: str, start: int
) -> collections.abc.Iterator[tuple[int, int]]:
  """Finds the start and end of each separator, and the end of the data."""
  mark = separator.replace("\r\n", "\n").encode()
  if b"\n" in mark and data.find(b"\r") >= 0:
    if data.find(b"\n") >= 0:
      pattern = rb"\r?\n".join(map(re.escape, mark.split(b"\n")))
      yield from (match.span() for match in re.finditer(pattern, data))
      yield len(data), len(data)
      return
    mark = mark.replace(b"\n", b"\r")
  while (cut := data.find(mark, start)) >= 0:
    start = cut + len(mark)
    yield cut, start
  yield len(data), len(data)


def _open(path: pathlib.Path) -> typing.BinaryIO:
  try:
    return path.open("rb")
  except OSError as error:
    raise errors.UserError(f"{path}: cannot read ({error.strerror})") from error


def read(path: pathlib.Path, start: int, end: int) -> bytes:
  """Reads bytes of a file; of a .gz file, bytes of its content."""
  if path.suffix == ".gz":
    return _gunzip(path)[start:end]
  with _open(path) as file:
    file.seek(start)
    return file.read(end - start)


@functools.lru_cache(maxsize=1)  # Documents are read file by file, in order.
def _gunzip(path: pathlib.Path) -> bytes:
  content = b""
  try:
    with _open(path) as file:
      content = file.read()
    return gzip.decompress(content)
  except (OSError, EOFError, zlib.error) as error:
    why = file_kinds.explain(content[: file_kinds.HEAD])
    if why and "gzip" not in why:
      raise errors.UserError(f"{path}: {why}") from error
    raise errors.UserError(
      f"{path}: not a whole gzip file ({error}); fetch it again"
    ) from error


def stats(
  paths: list[pathlib.Path], names: list[str]
) -> list[tuple[str, int, int]]:
  """Gives the name, size and time of change of each file."""
  stats = [path.stat() for path in paths]
  return [
    (name, stat.st_size, stat.st_mtime_ns)
    for name, stat in zip(names, stats, strict=True)
  ]


def and_more(paths: list[pathlib.Path]) -> str:
  """Names the first path and counts the others: 'a.txt and 3 more'."""
  more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
  return f"{paths[0]}{more}"
