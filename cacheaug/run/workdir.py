"""Checks that a directory belongs to this run, and claims it for the run."""

import copy
import functools
import json
import os
import secrets
import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug.data import sources
from cacheaug.errors import UserError, one_line
from cacheaug.run import agreement, files
from cacheaug.run.lock import Lock

# Keys that may differ when a run is resumed: they change its numbers by
# rounding at most.
FREE_KEYS = (
  "decoder.how_to_get",  # words for a person
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


# Old name of a key -> its present name.
RENAMED: dict[str, str] = {}
# Removed key -> the value that the code now implies. A run with another value
# is another experiment.
DROPPED: dict[str, Any] = {}

_PROBE = 10.0  # seconds until a file of process 0 must be seen by the others


def read_config(workdir: str | os.PathLike) -> ConfigDict:
  """Reads the config of the run in a directory, as this version writes it.

  A key that the file lacks gets its value in `configs.base`, or of a source in
  `source_defaults`: these describe the behaviour before the key existed.

  Raises:
    UserError: no run there, or a config.json that is not a run's.
  """
  path = files.absolute(workdir) / "config.json"
  with files.reading(path):
    if not path.exists():
      raise UserError(f"{path}: missing; give the --workdir of a run")
    try:
      return completed(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as e:
      raise UserError(
        f"{path}: not a run's config ({one_line(e)}); give the --workdir of a "
        "run of this version"
      ) from e


def completed(saved: dict[str, Any]) -> ConfigDict:
  """Converts a config of an older version to one of this version.

  Raises:
    KeyError, TypeError, ValueError: it is no run's config at all.
  """
  saved = copy.deepcopy(saved)
  if missing := {"decoder", "data", "coprocessor"} - set(saved):
    raise KeyError(min(missing))
  for old, new in RENAMED.items():
    if holder := _holder(saved, old):
      *parents, name = new.split(".")
      target = functools.reduce(
        lambda x, k: x.setdefault(k, {}), parents, saved
      )
      target[name] = holder.pop(old.rpartition(".")[2])
  for key, value in DROPPED.items():
    holder, name = _holder(saved, key), key.rpartition(".")[2]
    if holder and holder[name] == value:
      del holder[name]
  config = ConfigDict(saved)
  for source in config.data.sources.values():  # of the experiment's own names
    _fill(source, sources.source_defaults())
  return _fill(config, configs.base())


def _holder(saved: dict[str, Any], key: str) -> dict[str, Any] | None:
  """Returns the dictionary that holds the key; None if there is no such key."""
  *parents, name = key.split(".")
  for part in parents:
    saved = saved.get(part, {})
  return saved if name in saved else None


def _fill(config: ConfigDict, base: ConfigDict) -> ConfigDict:
  # Below these, the experiment chooses the keys, so none of them is missing.
  own = ("sources", "multipliers", "beside", "local")
  for key, value in base.items():
    if key not in config:
      config[key] = value
    elif isinstance(value, ConfigDict) and key not in own:
      _fill(config[key], value)
  return config


def check(config: ConfigDict, workdir: str) -> None:
  """Refuses a directory of another experiment, or one that is not writable.

  It writes nothing, so that a run that is refused later leaves no trace. A
  directory without metrics and checkpoints belongs to no run yet.

  Raises:
    UserError: naming the keys that differ, or what is wrong with the path.
  """
  root = files.absolute(workdir)
  try:
    if _has_run(root):
      _same_experiment(completed(_saved(root)), config)
  except ImportError as e:
    raise UserError(
      f"--workdir={workdir}: object storage wants a package more ({e}): "
      "pip install 'cacheaug[gcs]' for gs://"
    ) from e
  except (OSError, ValueError, TypeError, AttributeError, KeyError) as e:
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


def _saved(root: epath.Path) -> dict[str, Any]:
  return json.loads((root / "config.json").read_text())


def claim(config: ConfigDict, workdir: str, lock: Lock | None = None) -> None:
  """Takes the directory's lock and writes config.json.

  Call `check` first. All processes call this together; process 0 writes.

  Args:
    config: of the run.
    workdir: its directory; created if absent.
    lock: taken before anything is written.

  Raises:
    UserError: on every process; a directory that cannot be written to, where
      another trainer is at work, or that the processes do not share.
  """

  def write() -> None:
    root = files.absolute(workdir)
    text = json.dumps(_json_config(config), indent=2, sort_keys=True)
    try:
      root.mkdir(parents=True, exist_ok=True)
      if lock is not None:
        lock.acquire()
        files.remove_temporary(root)
      files.write_whole(root / "config.json", text.encode())
    except OSError as e:
      raise UserError(
        f"--workdir={workdir} cannot be written to ({e.strerror or e}): give "
        "another"
      ) from e

  agreement.on_process_zero(write)
  if jax.process_count() > 1:
    _probe(workdir)


def _probe(workdir: str) -> None:
  """Refuses a path that is a different directory on another host.

  The first checkpoint would wait for ever for the other hosts' files.
  """
  root = files.absolute(workdir)
  path = (
    root / f"{files.TEMPORARY}{agreement.exchange(secrets.token_hex(8))[0]}"
  )

  def write() -> None:
    with files.disk_errors(root, "write there"):
      path.write_text("")

  agreement.on_process_zero(write)
  end = time.monotonic() + _PROBE
  # Read rather than looked for: clients of object storage keep listings.
  while not (seen := _is_readable(path)) and time.monotonic() < end:
    time.sleep(0.2)
  answers = agreement.exchange("seen" if seen else "")
  if not jax.process_index():
    path.unlink()
  if blind := [i for i, answer in enumerate(answers) if not answer]:
    raise UserError(
      f"--workdir={workdir}: process {blind[0]} does not see what process 0 "
      "writes there: give a directory that all hosts share, or gs://"
    )


def _is_readable(path: epath.Path) -> bool:
  try:
    path.read_text()
  except (OSError, ValueError):
    return False
  return True


def has_checkpoints(workdir: str) -> bool:
  """Returns whether the directory has any checkpoint, whole or not."""
  checkpoints = files.absolute(workdir) / "checkpoints"
  return checkpoints.is_dir() and any(
    p.name.isdigit() for p in checkpoints.iterdir()
  )


def _has_run(root: epath.Path) -> bool:
  """Returns whether a run has left metrics or checkpoints in the directory."""
  metrics, checkpoints = root / "metrics.jsonl", root / "checkpoints"
  if metrics.is_file() and metrics.stat().length:
    return True
  return checkpoints.is_dir() and any(checkpoints.iterdir())


def _json_config(config: ConfigDict) -> dict[str, Any]:
  return json.loads(config.to_json())


def _same_experiment(saved: ConfigDict, config: ConfigDict) -> None:
  old, new = (
    dict(configs.leaves(saved)),
    dict(configs.leaves(_as_saved(config))),
  )
  other = sorted(
    k
    for k in old.keys() | new.keys()
    if old.get(k, "absent") != new.get(k, "absent")
    and not k.startswith(FREE_KEYS)
  )
  if "optimizer.steps" in other and _can_be_longer(old, new):
    other.remove("optimizer.steps")
  if other:
    shown = ", ".join(
      f"{k} ({old.get(k, 'absent')!r} there, {new.get(k, 'absent')!r} here)"
      for k in other[:4]
    )
    if other == ["optimizer.steps"]:
      shown += (
        "; only more steps of optimizer.schedule='constant' go on where a run "
        "has ended, another run may begin from it by coprocessor.init=DIR"
      )
    raise UserError(shown + (f" and {len(other) - 4} more" * (len(other) > 4)))


def _can_be_longer(old: dict[str, Any], new: dict[str, Any]) -> bool:
  """Returns whether the new number of steps changes no step already taken."""
  schedules = {old["optimizer.schedule"], new["optimizer.schedule"]}
  return schedules == {"constant"} and (
    new["optimizer.steps"] > old["optimizer.steps"]
  )


def _as_saved(config: ConfigDict) -> ConfigDict:
  """Returns the config as its file gives it back."""
  return ConfigDict(_json_config(config))
