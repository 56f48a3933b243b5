"""Benchmarks' published files, read from a directory.

A file holds one JSON object a line (.jsonl, .jsonl.gz), or a list of them, or
BIG-Bench Hard's {"examples": [...]} (.json). Nothing is downloaded.
"""

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from cacheaug.errors import UserError, one_line

Record = dict[str, Any]
_NAMES = {
  str: "a text",
  int: "a whole number",
  bool: "true or false",
  list: "a list",
  dict: "an object",
  type(None): "null",
}


def _same(record: Record) -> Record:
  return record


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
  """A schema that a benchmark's records are published in.

  Attributes:
    keys: each key that is needed, and the type or types of its value.
    convert: makes of a record what lm_eval's task reads; raises ValueError
      with what is wrong with its values.
    processed: the task's own `process_docs` is already done by `convert`.
  """

  keys: Mapping[str, type | tuple[type, ...]]
  convert: Callable[[Record], Record] = _same
  processed: bool = False


@dataclasses.dataclass(frozen=True)
class Records:
  """A file's records, converted, and whether `process_docs` is done."""

  path: pathlib.Path
  rows: list[Record]
  processed: bool


def find(data: pathlib.Path, names: tuple[str, ...]) -> pathlib.Path | None:
  """The first of the files that is there."""
  paths = (data / name for name in names)
  return next((path for path in paths if path.is_file()), None)


def read(
  path: pathlib.Path, forms: tuple[Form, ...], keep: tuple[str, ...] = ()
) -> Records:
  """All records of a file.

  Args:
    path: .jsonl, .jsonl.gz or .json.
    forms: schemas that it may be in; the first record decides which.
    keep: keys that `convert` leaves out and the caller needs.

  Raises:
    UserError: not JSON, no record, or one of another schema; names the file,
      the line and the key.
  """
  form, rows = None, []
  for where, record in _objects(path):
    if not isinstance(record, dict):
      raise UserError(f"{where}: not an object: give one with keys and values")
    if form is None:
      form = _form_of(record, forms, where)
    _check(record, form, where)
    try:
      row = form.convert(record)
    except (ValueError, KeyError, IndexError, TypeError) as e:
      raise UserError(f"{where}: {one_line(e, 1000)}") from e
    rows.append({key: record[key] for key in keep} | row)
  if form is None:
    raise UserError(f"{path}: holds no record: give at least one")
  return Records(path, rows, form.processed)


def _objects(path: pathlib.Path):
  """(where, value) of each record."""
  try:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
  except (OSError, EOFError) as e:
    raise UserError(f"{path}: cannot be read ({one_line(e, 1000)})") from e
  except UnicodeDecodeError as e:
    raise UserError(f"{path}: not UTF-8 text") from e
  if path.suffix == ".json":
    whole = _parsed(text, str(path))
    if isinstance(whole, dict):
      whole = whole.get("examples")
    if not isinstance(whole, list):
      raise UserError(
        f"{path}: key 'examples' is missing: give a list of records, or an "
        "object that holds one there"
      )
    yield from ((f"{path}: record {i}", x) for i, x in enumerate(whole, 1))
    return
  for i, line in enumerate(text.split("\n"), 1):
    if line.strip():
      yield f"{path}:{i}", _parsed(line, f"{path}:{i}")


def _parsed(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as e:
    raise UserError(f"{where}: not JSON ({e.msg}, column {e.colno})") from e


def _form_of(record: Record, forms: tuple[Form, ...], where: str) -> Form:
  """The first that fits; UserError by the one that it is nearest to."""
  faults = {form: _faults(record, form) for form in forms}
  form = min(forms, key=lambda form: len(faults[form]))
  _check(record, form, where)
  return form


def _check(record: Record, form: Form, where: str) -> None:
  for fault in _faults(record, form)[:1]:
    raise UserError(f"{where}: {fault}")


def _faults(record: Record, form: Form) -> list[str]:
  """Faults of a record's keys under each form; empty where it fits."""
  faults = []
  for key, kinds in form.keys.items():
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    if key not in record:
      needed = ", ".join(form.keys)
      faults.append(f"key {key!r} is missing: a record has {needed}")
      continue
    value = record[key]
    number = isinstance(value, bool) and bool not in kinds
    if number or not isinstance(value, kinds):
      wanted = " or ".join(_NAMES[kind] for kind in kinds)
      faults.append(f"key {key!r} is {value!r:.40}, not {wanted}")
  return faults
