"""Compares, at a run's start, what all of its processes must have in common.

Each host reads its own disk and its own command line. Hosts that see other text
or another decoder would train without an error, each on something else.
"""

import hashlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cacheaug.config import leaves
from cacheaug.errors import UserError, one_line

# Keys that may differ between hosts, since each host has its own paths.
_OWN = ("data.cache_dir", "data.workers", "decoder.path", "coprocessor.init")
_EDGE = 1 << 20  # bytes read at each end of a file of weights


def exchange(text: str) -> list[str]:
  """Returns all processes' texts, in order; all must call it together."""
  if jax.process_count() == 1:
    return [text]
  data = np.frombuffer(text.encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(data)))
  padded = np.zeros(max(1, int(sizes.max())), np.uint8)
  padded[: len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [
    bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)
  ]


def on_process_zero(action: Callable[[], None]) -> None:
  """Calls `action` on process 0; its UserError is raised on all processes."""
  reason = ""
  if not jax.process_index():
    try:
      action()
    except UserError as e:
      reason = str(e)
  if reason := exchange(reason)[0]:
    raise UserError(reason)


def check(facts: Callable[[], Mapping[str, str]]) -> None:
  """Refuses processes that differ; all must call it together.

  Args:
    facts: returns {name of a fact: this process's value}, both for a person to
      read. It is not called where there is one process.

  Raises:
    UserError: on every process, naming the first fact that differs.
  """
  if jax.process_count() == 1:
    return
  lines = (f"{k}\t{one_line(v, 1000)}" for k, v in facts().items())
  texts = exchange("\n".join(lines))
  tables = [dict(x.split("\t", 1) for x in t.splitlines()) for t in texts]
  for process, table in enumerate(tables):
    for name in dict.fromkeys([*tables[0], *table]):
      first, other = (t.get(name, "absent") for t in (tables[0], table))
      if first != other:
        raise UserError(
          f"{name} differs between processes: {first} on process 0, {other} "
          f"on process {process}: give all hosts the same"
        )


def of_config(config: ConfigDict) -> dict[str, str]:
  """Returns the facts of the command line and of the code that reads it."""
  facts = {
    "the cacheaug package": _package(),
    "the version of jax": jax.__version__,
    "the version of Python": platform.python_version(),
  }
  for key, value in leaves(config):
    own = key in _OWN or (key.startswith("data.sources.") and "path" in key)
    if not own and not key.startswith("local."):
      facts[f"config key {key}"] = repr(value)
  return facts


def of_directory(path: str | Path) -> str:
  """Returns a digest of the files directly in a directory, or of one file.

  The digest covers names, sizes, and the first and last MiB of each file.
  Reading all weights twice would double the time of a start, and two versions
  of weights differ everywhere.
  """
  path = Path(path)
  digest = hashlib.blake2b(digest_size=6)
  files = [path] if path.is_file() else sorted(path.iterdir())
  for file in (f for f in files if f.is_file() and f.name[0] != "."):
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as data:
      digest.update(data.read(_EDGE))
      data.seek(max(0, size - _EDGE))
      digest.update(data.read(_EDGE))
  return digest.hexdigest()


def _package() -> str:
  """Returns a digest of the package's own sources."""
  root = Path(__file__).resolve().parent.parent
  digest = hashlib.blake2b(digest_size=6)
  for path in sorted(root.rglob("*.py")):
    digest.update(path.relative_to(root).as_posix().encode() + b"\0")
    digest.update(path.read_bytes())
  return digest.hexdigest()
