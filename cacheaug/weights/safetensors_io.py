"""Safetensors in and out, one tensor at a time. Never pickle.

Reading goes through the safetensors library; writing does not, because the
library wants every tensor in memory at once. The format: eight bytes with the
header's length, a JSON header of dtypes, shapes and offsets, then the data.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import BinaryIO

import jax
import numpy as np
import safetensors

from cacheaug.errors import UserError, one_line
from cacheaug.run.files import disk_errors, write_whole

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
COPROCESSOR = "coprocessor.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jax.numpy.bfloat16),
}
_ROWS = 4096  # compared at a time, a few MB
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def read_json(path: pathlib.Path) -> dict:
  """A JSON object; UserError names the file where it is not one."""
  try:
    entries = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as e:
    raise UserError(
      f"{path}: cannot be read as JSON ({one_line(e, 120)})"
    ) from e
  if not isinstance(entries, dict):
    raise UserError(f"{path}: not a JSON object")
  return entries


def locate(directory: pathlib.Path) -> dict[str, pathlib.Path]:
  """Tensor name -> its file, from the index or the single file.

  Raises:
    UserError: no safetensors there, or a file that the index names is missing.
  """
  index = directory / INDEX
  if index.exists():
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
      raise UserError(f"{index}: has no weight_map: download it again")
    for shard in sorted(set(map(str, names.values()))):
      if not (directory / shard).exists():
        raise UserError(
          f"{directory / shard}: missing, though {INDEX} names it: download "
          "that file too"
        )
    return {name: directory / str(shard) for name, shard in names.items()}
  if (directory / SINGLE).exists():
    return {name: directory / SINGLE for name in headers([directory / SINGLE])}
  for pattern in _PICKLES:
    for found in sorted(directory.glob(pattern)):
      raise UserError(
        f"{found}: a pickle, which can run code when read and is never "
        f"opened: convert it to safetensors ({SINGLE}) first"
      )
  raise UserError(f"{directory}: holds neither {SINGLE} nor {INDEX}")


def headers(
  paths: Iterable[pathlib.Path],
) -> dict[str, tuple[tuple[int, ...], str]]:
  """Shape and dtype code of every tensor, by name; reads no data."""
  found = {}
  for path in sorted(set(paths)):
    with _open(path) as file:
      for name in file.keys():
        part = file.get_slice(name)
        found[name] = (tuple(part.get_shape()), part.get_dtype())
  return found


def check_dtype(path: pathlib.Path, name: str, code: str) -> None:
  """Looks at a tensor's dtype, as its file's header has it.

  Raises:
    UserError: one that is not plain floating point.
  """
  if code not in _DTYPES:
    raise UserError(
      f"{path}: {name} is {code}: quantised weights are not supported, "
      "use a float32, float16 or bfloat16 release"
    )


def read(path: pathlib.Path, name: str) -> np.ndarray:
  """One tensor as a copy in memory.

  The file is mapped only meanwhile: pages of a mapping that stays open count
  as this process's memory, a second copy of the weights.

  Raises:
    UserError: a file that is damaged, or has no such tensor.
  """
  with _open(path) as file:
    try:
      return file.get_tensor(name)
    except safetensors.SafetensorError as e:
      raise _damaged(path, e) from e


def equal(
  first: tuple[pathlib.Path, str], second: tuple[pathlib.Path, str]
) -> bool:
  """Whether two tensors [rows, ...] of one shape hold the same values."""
  with _open(first[0]) as a, _open(second[0]) as b:
    a, b = a.get_slice(first[1]), b.get_slice(second[1])
    rows = a.get_shape()[0]
    parts = (slice(i, min(i + _ROWS, rows)) for i in range(0, rows, _ROWS))
    return all(np.array_equal(a[part], b[part]) for part in parts)


def _open(path: pathlib.Path):
  try:
    return safetensors.safe_open(path, framework="numpy")
  except (OSError, safetensors.SafetensorError) as e:
    raise _damaged(path, e) from e


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
  text = one_line(error, 120)
  return UserError(
    f"{path}: cannot be read as safetensors, truncated or damaged ({text}): "
    "download it again"
  )


def write(
  path: pathlib.Path,
  shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
  tensors: Iterable[np.ndarray],
) -> None:
  """Writes tensors as they come, in the order of `shapes`, atomically.

  The bytes depend on names and values alone.
  """
  # transformers refuses a file that does not say which framework's layout
  # it holds; a Linear's weight is [out, in], as torch has it.
  header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for name, (shape, dtype) in shapes.items():
    size = int(np.prod(shape)) * dtype.itemsize
    header[name] = {
      "dtype": _CODES[dtype],
      "shape": list(shape),
      "data_offsets": [offset, offset + size],
    }
    offset += size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # data starts at a multiple of eight

  def body(file):
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for tensor, (shape, dtype) in zip(tensors, shapes.values(), strict=True):
      if tensor.shape != tuple(shape) or tensor.dtype != dtype:
        raise ValueError(f"{tensor.shape} {tensor.dtype}, not {shape} {dtype}")
      file.write(np.ascontiguousarray(tensor).view(np.uint8).data)

  atomically(path, body)


def write_json(path: pathlib.Path, entries: Mapping) -> None:
  """Writes a JSON object, keys sorted, atomically."""
  text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
  atomically(path, lambda file: file.write(text.encode()))


def atomically(path: pathlib.Path, body: Callable[[BinaryIO], None]) -> None:
  """`body(file)` into a file that is whole or absent.

  Raises:
    UserError: a place that cannot be written to.
  """
  with disk_errors(path, "write it", "give another directory"):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, body, sync=True)
