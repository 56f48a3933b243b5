"""A run's directory: whose it is, and whether it may be written to."""

import json
import os
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from cacheaug.errors import UserError
from cacheaug.run import files

# Keys that may differ when a run is resumed: they change its numbers by
# rounding at most.
FREE_KEYS = (
  "mesh.",
  "checkpoint.",
  "data.workers",
  "data.cache_dir",
  "data.retries",
  "optimizer.accumulation",
  "remat",
  "deterministic",
  "eval.",
  "export",
  "local.",
  "profile",
  "watchdog.",
)


def check(config: ConfigDict, workdir: str) -> None:
  """Refuses a directory of another experiment, or one not to be written to.

  Writes nothing, so that a run refused later leaves no trace. A directory
  with neither metrics nor checkpoints is nobody's yet.

  Raises:
    UserError: naming the keys that differ, or what is wrong with the path.
  """
  root = files.absolute(workdir)
  try:
    if _begun(root):
      _same_experiment(json.loads((root / "config.json").read_text()), config)
  except ImportError as e:
    raise UserError(
      f"--workdir={workdir}: object storage wants a package more ({e}): "
      "pip install 'cacheaug[gcs]' for gs://"
    ) from e
  except (OSError, ValueError) as e:
    raise UserError(
      f"--workdir={workdir}: config.json cannot be read ({e}): give another"
    ) from e
  except UserError as e:
    raise UserError(
      f"--workdir={workdir} holds another experiment: {e}; give another "
      "--workdir"
    ) from e
  if files.is_remote(root):
    return  # `claim` is the first to write, and says what is wrong.
  parent = next(p for p in (root, *root.parents) if os.path.lexists(p))
  if not parent.is_dir():
    raise UserError(f"--workdir={workdir}: {parent} is not a directory")
  if not os.access(parent, os.W_OK | os.X_OK):
    raise UserError(f"--workdir={workdir}: no permission to write in {parent}")


def claim(config: ConfigDict, workdir: str) -> None:
  """Writes config.json, whole or not at all; `check` comes first.

  Raises:
    UserError: a directory that cannot be written to.
  """
  if jax.process_index():
    return
  root = epath.Path(workdir)
  text = json.dumps(_plain(config), indent=2, sort_keys=True)
  try:
    root.mkdir(parents=True, exist_ok=True)
    files.write_whole(root / "config.json", text.encode())
  except OSError as e:
    raise UserError(
      f"--workdir={workdir} cannot be written to ({e.strerror or e}): give "
      "another"
    ) from e


def has_checkpoints(workdir: str) -> bool:
  """Whether any checkpoint is there, whole or not."""
  checkpoints = files.absolute(workdir) / "checkpoints"
  return checkpoints.is_dir() and any(
    p.name.isdigit() for p in checkpoints.iterdir()
  )


def _begun(root: epath.Path) -> bool:
  """Whether a run has left anything there that is worth keeping."""
  metrics, checkpoints = root / "metrics.jsonl", root / "checkpoints"
  if metrics.is_file() and metrics.stat().length:
    return True
  return checkpoints.is_dir() and any(checkpoints.iterdir())


def _plain(config: ConfigDict) -> dict[str, Any]:
  return json.loads(config.to_json())


def _same_experiment(there: dict[str, Any], config: ConfigDict) -> None:
  old, new = dict(_flatten(there)), dict(_flatten(_plain(config)))
  other = sorted(
    k
    for k in old.keys() | new.keys()
    if old.get(k, "absent") != new.get(k, "absent")
    and not k.startswith(FREE_KEYS)
  )
  if other:
    shown = ", ".join(
      f"{k} ({old.get(k, 'absent')!r} there, {new.get(k, 'absent')!r} here)"
      for k in other[:4]
    )
    raise UserError(shown + (f" and {len(other) - 4} more" * (len(other) > 4)))


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  if isinstance(tree, dict) and tree:
    for key, value in tree.items():
      yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
  else:
    yield prefix, tree
