"""What stands before the data of a GGUF file: key-value pairs, and tensors.

The `gguf` library's reader makes four arrays a vocabulary entry, 11 seconds
for Gemma's 262,144; this takes 0.2. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import dataclasses
import functools
import mmap
import pathlib
import struct
from typing import Any

import numpy as np

from cacheaug import errors

_SCALARS = {
  0: "<B",
  1: "<b",
  2: "<H",
  3: "<h",
  4: "<I",
  5: "<i",
  6: "<f",
  7: "<?",
  10: "<Q",
  11: "<q",
  12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorEntry:
  """Where a tensor is; `kind` is a number of ggml's enum ggml_type."""

  shape: tuple[int, ...]  # as numpy has it, rows first
  kind: int
  offset: int  # bytes from the file's start


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """All key-value pairs of a GGUF file; its tensors are not read.

  Args:
    path: a file of version 2 or 3, little-endian.

  Returns:
    key -> number, bool, text, or a list of texts, or a numpy array.

  Raises:
    UserError: if the file cannot be read, is no GGUF file or is cut short.
  """
  return read_all(path)[0]


def read_all(
  path: str | pathlib.Path,
) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
  """`read`, and name -> entry of every tensor."""
  try:
    status = pathlib.Path(path).stat()
  except OSError as error:
    raise errors.UserError(f"{path}: cannot read ({error.strerror})") from error
  return _read_all(str(path), status.st_size, status.st_mtime_ns)


# The shape, the weights and the tokenizer ask for the same one after the other.
@functools.lru_cache(maxsize=1)
def _read_all(
  path: str, size: int, changed: int
) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
  del size, changed  # They tell a file from its successor.
  try:
    with open(path, "rb") as file:
      with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data).everything()
  except OSError as error:
    raise errors.UserError(f"{path}: cannot read ({error.strerror})") from error
  except (struct.error, ValueError, KeyError, IndexError) as error:
    raise errors.UserError(
      f"{path}: not a whole GGUF file of version 2 or 3 "
      f"({type(error).__name__}: {error}); download it again"
    ) from error


class _Reader:
  """Reads values from the start of a file in sequence."""

  def __init__(self, data: mmap.mmap):
    self._data = data
    self._at = 0

  def everything(self) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    magic, version, tensors, pairs = (
      self._take(f) for f in ("4s", "<I", "<Q", "<Q")
    )
    if magic != b"GGUF" or version not in (2, 3):
      raise ValueError(f"it begins with {magic!r}, version {version}")
    metadata = {}
    for _ in range(pairs):
      key = self._text()
      metadata[key] = self._value(self._take("<I"))
    entries = [self._tensor() for _ in range(tensors)]
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-self._at // alignment) * alignment
    return metadata, {
      name: TensorEntry(shape, kind, start + offset)
      for name, shape, kind, offset in entries
    }

  def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
    name = self._text()
    shape = [self._take("<Q") for _ in range(self._take("<I"))]
    kind, offset = self._take("<I"), self._take("<Q")
    return name, tuple(reversed(shape)), kind, offset

  def _take(self, form: str) -> Any:
    (value,) = struct.unpack_from(form, self._data, self._at)
    self._at += struct.calcsize(form)
    return value

  def _text(self) -> str:
    size = self._take("<Q")
    start, self._at = self._at, self._at + size
    if self._at > len(self._data):
      raise ValueError("a text goes beyond the file's end")
    return self._data[start : self._at].decode("utf-8", errors="replace")

  def _value(self, kind: int) -> Any:
    if kind == _STRING:
      return self._text()
    if kind != _ARRAY:
      return self._take(_SCALARS[kind])
    kind, size = self._take("<I"), self._take("<Q")
    if kind not in _SCALARS:  # Texts, or arrays within an array.
      return [self._value(kind) for _ in range(size)]
    dtype = np.dtype(_SCALARS[kind])
    start, self._at = self._at, self._at + size * dtype.itemsize
    return np.frombuffer(self._data[start : self._at], dtype)
