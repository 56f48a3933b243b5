"""Checkpoints that are whole or are not used: Orbax plus end-to-end checksums.

Each checkpoint is `<directory>/<step>/{state,meta,files.json}`, renamed into
place by Orbax once every file is written, so that a kill at any instant
leaves the ones before it. Two checks find damage:

- files.json lists every file's size and a small file's CRC. It is looked at
  first and costs next to nothing; reading tens of gigabytes back for their
  CRC before the rename would outlast a preemption's grace period.
- `meta` holds checksums of the arrays, computed on the devices: they do not
  depend on the mesh, cost one pass over memory, and cover the whole way to
  the disk and back.
"""

import json
import sys
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from cacheaug.errors import UserError, one_line
from cacheaug.run import files
from cacheaug.run.checksum import checksums, named_leaves

_FILES = "files.json"
_MERGED = "manifest.ocdbt"  # What Orbax merges the processes' files into.
_SMALL = 2**20  # Bytes up to which a file's CRC is kept.


class Unreadable(Exception):
  """A checkpoint is damaged; the message names the damage."""


def _describe(flat: Mapping[str, Any]) -> dict[str, list]:
  return {k: [list(x.shape), str(x.dtype)] for k, x in flat.items()}


def _crc(document: Any) -> int:
  return zlib.crc32(json.dumps(document, sort_keys=True).encode())


def _all_succeeded(ok: bool) -> bool:
  """Returns whether every process succeeded: all continue, or none does."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


def _disk_errors(
  directory: epath.Path, *, others: bool = True
) -> AbstractContextManager[None]:
  """Turns a full or forbidden disk into one clear line.

  Args:
    directory: of the checkpoints.
    others: every other OSError as well.
  """
  return files.disk_errors(directory, "save a checkpoint", others=others)


def _quiet_late_reads() -> None:
  """Keeps a damaged checkpoint to its one line.

  The first array that cannot be read ends Orbax's event loop; each read that
  is still under way then has a traceback printed, 'Event loop is closed', some
  of them after the restore has returned.
  """
  previous = sys.unraisablehook
  if getattr(previous, "late_reads", False):
    return

  def hook(unraisable: "sys.UnraisableHookArgs") -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
      previous(unraisable)

  hook.late_reads = True
  sys.unraisablehook = hook


class Checkpoints:
  """The checkpoints of one run, newest last; saves in the background.

  Every process of the run calls every method, in the same order.

  Args:
    directory: created if absent; local or gs://.
    keep: how many of the newest to keep; 2 or more lets a damaged one be
      survived.
    save_every: steps between saves.

  Raises:
    UserError: a directory that cannot be created, or a number below 1.
  """

  def __init__(
    self, directory: str | epath.Path, keep: int, save_every: int
  ) -> None:
    for key, value in (("keep", keep), ("every", save_every)):
      if value < 1:
        raise UserError(f"config.checkpoint.{key}: {value} must be 1 or more")
    self._directory = files.absolute(directory)
    self._keep, self._save_every = keep, save_every
    self._manager: ocp.CheckpointManager | None = None
    self._saving: int | None = None
    with _disk_errors(self._directory):
      self._directory.mkdir(parents=True, exist_ok=True)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    agreed = kind is None or issubclass(kind, (UserError, SystemExit))
    # After any other error other processes may be gone, and a save under way
    # would wait for them.
    if agreed or jax.process_count() == 1:
      self.close()

  def steps(self) -> list[int]:
    """Steps with a checkpoint, ascending; damaged ones may be among them."""
    return _steps(self._directory)

  def save(
    self, step: int, state: Any, meta: Mapping[str, Any], force: bool = False
  ) -> bool:
    """Starts a save if `step` is due or `force`; returns whether it did.

    Args:
      step: steps taken so far.
      state: pytree of jax.Array. May be donated as soon as this returns.
      meta: JSON values, given back by `restore_latest`.
      force: save off the interval as well (last step, SIGTERM).

    Raises:
      UserError: no space or no permission, now or in the save before.
    """
    if not force and step % self._save_every:
      return False
    with _disk_errors(self._directory):
      manager = self._open()
      if step in manager.all_steps():
        return False
      flat = named_leaves(state)
      sums = checksums(flat.values())
      body = {
        "meta": dict(meta),
        "tree": _describe(flat),
        "checksums": dict(zip(flat, sums.tolist(), strict=True)),
      }
      manager.wait_until_finished()
      self._saving = step
      return manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(flat),
          meta=ocp.args.JsonSave({**body, "crc": _crc(body)}),
        ),
        force=True,
      )

  def restore_latest(
    self, abstract_state: Any
  ) -> tuple[Any, dict[str, Any], int] | None:
    """Restores the newest checkpoint that is whole; None if there is none.

    A damaged one is reported in one line, renamed to `<step>.unreadable-<n>`
    and left for a person to look at; the one before it is tried.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings, on any
        mesh.

    Returns:
      (state, meta, step).

    Raises:
      UserError: the checkpoint is whole but holds another tree of arrays, or
        it may not be read.
    """
    self.wait()
    for step in reversed(self.steps()):
      path = self._directory / str(step)
      try:
        with _disk_errors(self._directory, others=False):
          state, meta = self._restore(path, abstract_state)
      except Unreadable as e:
        aside = self._move_aside(path)
        logging.warning(
          "checkpoint %s cannot be read (%s): moved to %s, trying the one "
          "before it",
          path,
          e,
          aside.name,
        )
        continue
      return state, meta, step
    return None

  def wait(self) -> None:
    """Returns when every save has reached the disk; raises what `save` does."""
    if self._manager is not None:
      with _disk_errors(self._directory):
        self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then ends the background threads; saving again reopens."""
    if self._manager is not None:
      manager, self._manager = self._manager, None
      with _disk_errors(self._directory):
        manager.close()

  def _open(self) -> ocp.CheckpointManager:
    """The manager, made at the first save.

    It reads what is there, and `restore_latest` has moved damaged checkpoints
    out of its way by then.
    """
    if self._manager is None:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=self._keep,
        create=False,
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._list_files
        ),
      )
      self._manager = ocp.CheckpointManager(self._directory, options=options)
    return self._manager

  def _list_files(self) -> None:
    """Writes files.json; Orbax calls it just before the rename.

    A checkpoint that nobody could read again raises UserError and is not kept.

    It does so on process 0, in the background, once every process's files are
    complete.
    """
    step = str(self._saving)
    # Where renames are not atomic (gs://) Orbax writes to the final name and
    # commits by a marker file instead.
    for path in self._directory.iterdir():
      if path.name == step or path.name.startswith(f"{step}.orbax-"):
        if not (path / "state" / _MERGED).exists():
          raise UserError(
            f"{path}: the arrays were not put together, so that nobody could "
            "read them again: give another --workdir"
          )
        sizes = {item: _measure(path / item) for item in ("state", "meta")}
        (path / _FILES).write_text(json.dumps(sizes))

  def _restore(self, path: epath.Path, abstract: Any) -> tuple[Any, dict]:
    self._read_on_all(lambda: _check_files(path))
    body = self._read_on_all(lambda: _read_meta(path))
    flat = named_leaves(abstract)
    _check_tree(path, body["tree"], _describe(flat))

    # The handler itself rather than the manager: it has no barrier between
    # processes, so one that fails to read cannot leave the others waiting.
    handler = ocp.StandardCheckpointHandler()
    _quiet_late_reads()
    try:
      restored = self._read_on_all(
        lambda: handler.restore(
          path / "state", args=ocp.args.StandardRestore(flat)
        )
      )
    finally:
      handler.close()
    sums = checksums([restored[k] for k in flat])
    for name, checksum in zip(flat, sums.tolist(), strict=True):
      if checksum != body["checksums"][name]:
        raise Unreadable(f"checksum of {name} differs")
    leaves = [restored[k] for k in flat]
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
    return state, body["meta"]

  def _read_on_all(self, read) -> Any:
    """Calls `read` on all processes; Unreadable on all if it fails on one."""
    reason, result = "another process could not read it", None
    ok = True
    try:
      result = read()
    except Exception as e:  # Orbax and tensorstore raise many types.
      if isinstance(e, (MemoryError, PermissionError)) or (
        "RESOURCE_EXHAUSTED" in str(e)
      ):
        raise  # The checkpoint may be whole: nothing to move aside.
      ok, reason = False, one_line(e)
    if not _all_succeeded(ok):
      raise Unreadable(reason)
    return result

  def _move_aside(self, path: epath.Path) -> epath.Path:
    n = 1
    while (path.parent / f"{path.name}.unreadable-{n}").exists():
      n += 1
    aside = path.parent / f"{path.name}.unreadable-{n}"
    _all_succeeded(True)  # Nobody still looks for the name below.
    if jax.process_index() == 0:
      with _disk_errors(self._directory):
        path.rename(aside)
    _all_succeeded(True)
    return aside


def read_params(
  directory: str | epath.Path,
) -> tuple[dict[str, jax.Array], dict[str, Any], int] | None:
  """Reads the weights of a run's newest whole checkpoint.

  It reads the running average where the run keeps one, and the weights that a
  LoRA adapts where they are saved (their names begin with `frozen/`). It does
  not read the optimizer's state. A damaged checkpoint is reported, left in its
  place, and the checkpoint before it is tried: the run itself may still be
  writing.

  Args:
    directory: a run's `checkpoints`.

  Returns:
    ({'a/b/c': array on the default device}, meta, step), or None where there
    is no checkpoint that can be read.
  """
  directory = files.absolute(directory)
  for step in reversed(_steps(directory)):
    path = directory / str(step)
    try:
      params, meta = _read_params(path)
    except (Unreadable, OSError, ValueError, KeyError) as e:
      logging.warning("checkpoint %s cannot be read (%s)", path, one_line(e))
      continue
    return params, meta, step
  return None


def _read_params(path: epath.Path) -> tuple[dict[str, jax.Array], dict]:
  _check_files(path)
  body = _read_meta(path)
  tree = body["tree"]
  averaged = any(name.startswith("average/") for name in tree)
  prefix = "average/" if averaged else "params/"
  kinds = (prefix, "frozen/")
  device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())

  def item_of(name):
    if not name.startswith(kinds):
      return ocp.PLACEHOLDER
    shape, dtype = tree[name]
    return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

  item = {name: item_of(name) for name in tree}
  handler = ocp.PyTreeCheckpointHandler()
  _quiet_late_reads()
  try:
    restored = handler.restore(
      path / "state",
      args=ocp.args.PyTreeRestore(
        item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
      ),
    )
  finally:
    handler.close()
  params = {k: v for k, v in restored.items() if k.startswith(kinds)}
  sums = checksums(params.values())
  for name, crc in zip(params, sums.tolist(), strict=True):
    if crc != body["checksums"][name]:
      raise Unreadable(f"checksum of {name} differs")
  short = {k.removeprefix(prefix): v for k, v in params.items()}
  return short, body["meta"]


def _steps(directory: epath.Path) -> list[int]:
  """Names of checkpoints, ascending."""
  try:
    names = [p.name for p in directory.iterdir()]
  except FileNotFoundError:
    return []  # On object storage an empty directory is none.
  return sorted(int(n) for n in names if n.isdigit())


def _measure(path: epath.Path) -> dict[str, list[int]]:
  """[bytes, CRC or -1] of each file below `path`, by relative name."""
  sizes = {}
  for file in path.iterdir():
    if file.is_dir():
      inner = _measure(file)
      sizes.update({f"{file.name}/{k}": v for k, v in inner.items()})
    else:
      size = file.stat().length
      crc = zlib.crc32(file.read_bytes()) if size <= _SMALL else -1
      sizes[file.name] = [size, crc]
  return sizes


def _check_files(path: epath.Path) -> None:
  if not (path / _FILES).exists():
    raise Unreadable(f"{_FILES} is missing: not saved to its end")
  for item, expected in json.loads((path / _FILES).read_text()).items():
    present = _measure(path / item)
    for name, (size, crc) in expected.items():
      if name not in present:
        raise Unreadable(f"{item}/{name} is missing")
      if present[name][0] != size:
        raise Unreadable(
          f"{item}/{name} has {present[name][0]} of {size} bytes"
        )
      if present[name][1] != crc:
        raise Unreadable(f"CRC of {item}/{name} differs")


def _read_meta(path: epath.Path) -> dict[str, Any]:
  body = ocp.JsonCheckpointHandler().restore(path / "meta")
  crc = body.pop("crc")
  if crc != _crc(body):
    raise Unreadable("checksum of meta differs")
  return body


def _check_tree(path: epath.Path, stored: dict, expected: dict) -> None:
  """Refuses a whole checkpoint of another tree, naming the first leaf."""
  for name in sorted(stored.keys() | expected.keys()):
    if stored.get(name) != expected.get(name):
      raise UserError(
        f"{path}: {name} is {stored.get(name, 'absent')} there and "
        f"{expected.get(name, 'absent')} in this config: use the config that "
        "the run was started with, or another --workdir"
      )
