"""Files that a source's `path` names, and the documents cut out of them."""

import functools
import glob
import gzip
import mmap
import os
import pathlib
import typing
import zlib

from cacheaug import errors

_SUFFIXES = {
  "text": (".txt", ".txt.gz"),
  "jsonl": (".jsonl", ".jsonl.gz"),
}


def expand(
  path: str, kind: str, label: str
) -> tuple[list[pathlib.Path], pathlib.Path]:
  """Files that a path names, sorted, and the directory that contains all."""
  path = os.path.expanduser(path)
  if os.path.isfile(path):
    return [pathlib.Path(path)], pathlib.Path(path).parent
  if os.path.isdir(path):
    root = pathlib.Path(path)
    if kind == "array_record":
      paths = [p for p in walk(root, ("",)) if ".array_record" in p.name]
      wanted = ".array_record"
    else:
      paths = walk(root, _SUFFIXES[kind])
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


def walk(
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


def spans(path: pathlib.Path, separator: bytes) -> list[tuple[int, int]]:
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


def read(path: pathlib.Path, start: int, end: int) -> bytes:
  """Bytes of a file, of what is in it where it is compressed."""
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


def stats(
  paths: list[pathlib.Path], names: list[str]
) -> list[tuple[str, int, int]]:
  """Name, size and time of change of each file."""
  stats = [path.stat() for path in paths]
  return [
    (name, stat.st_size, stat.st_mtime_ns)
    for name, stat in zip(names, stats, strict=True)
  ]


def and_more(paths: list[pathlib.Path]) -> str:
  """The first path, and how many there are besides."""
  more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
  return f"{paths[0]}{more}"
