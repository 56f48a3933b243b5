"""The report of an evaluation: a page of sections, and their files.

Everything is made in memory and appears at once: `contents` puts together what
the evaluators have rendered, `write` puts the files in place.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from cacheaug.errors import UserError
from cacheaug.evals.report import Section, csv_bytes, markdown_table
from cacheaug.run import files as storage


def contents(
  sections: Sequence[Section], meta: Mapping[str, Any]
) -> dict[str, bytes]:
  """The report's files, report.md last.

  Args:
    sections: in the order of the page. Lines that several have for one CSV file
      stand in it one after another.
    meta: what was run, in the order to show.
  """
  parts = ["# Evaluation", "## What was run"]
  parts.append(markdown_table(("", "value"), list(meta.items())))
  files: dict[str, bytes] = {}
  lines: dict[str, list[Mapping[str, Any]]] = {}
  sources: dict[str, dict[str, Any]] = {}
  for section in sections:
    parts += section.parts
    files |= section.files
    for name, some in section.lines.items():
      lines.setdefault(name, []).extend(some)
    for name, figures in section.figures.items():
      sources.setdefault(name, {}).update(_without_nan(figures))
  files |= {name: csv_bytes(some) for name, some in lines.items()}
  figures = {"meta": dict(meta), "sources": sources}
  files["figures.json"] = (json.dumps(figures, indent=1) + "\n").encode()
  files["report.md"] = ("\n\n".join(parts) + "\n").encode()
  return files


def _without_nan(x: Any) -> Any:
  if isinstance(x, dict):
    return {k: _without_nan(v) for k, v in x.items()}
  if isinstance(x, list):
    return [_without_nan(v) for v in x]
  return None if isinstance(x, float) and math.isnan(x) else x


def check_out(out: str) -> epath.Path:
  """Where to write; nothing may be there yet.

  Raises:
    UserError: there is something.
  """
  path = storage.expanded(out)
  with storage.reading(path):
    if path.exists():
      raise UserError(
        f"--out={out} exists: give another directory, or move this one away"
      )
  return path


def write(path: epath.Path, files: Mapping[str, bytes]) -> epath.Path:
  """Writes all files or none; returns the page's path.

  Raises:
    UserError: no space, no permission, or `path` has come to be meanwhile.
  """
  remote = storage.is_remote(path)
  # Object storage cannot rename a directory: there the page, which refers to
  # the others, comes last.
  place = path if remote else path.with_name(f".{path.name}.tmp")
  try:
    if not remote:
      shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
    place.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
      storage.write_whole(place / name, data)
    if not remote:
      place.rename(path)
  except OSError as e:
    if not remote:
      shutil.rmtree(place, ignore_errors=True)
    raise UserError(
      f"--out={path} cannot be written ({e.strerror or e}): free space or give "
      "another"
    ) from e
  return path / "report.md"
