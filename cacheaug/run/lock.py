"""One trainer at a time in a workdir."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from typing import Any

from absl import logging
from etils import epath

from cacheaug.errors import UserError
from cacheaug.run import files
from cacheaug.run.heartbeat import EVERY, RUNNING

# Errors of file systems without locks. NFS cannot lock a directory that is open
# for reading.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)
# Seconds after which a heartbeat counts as one of a process that has ended.
_OLD = 24 * EVERY
# A living trainer writes its heartbeat at least once in this time, in seconds.
_WATCH = 3 * EVERY


class Lock:
  """Keeps a second trainer out of a workdir, within `with`.

  It is a lock of the operating system on the directory itself, which ends with
  the process, however that ends. Such a lock may not reach other hosts, and
  object storage has none. For these cases heartbeat.json is watched for a few
  seconds: if it changes, another trainer is alive.

  Args:
    workdir: of the run; need not exist yet.
  """

  def __init__(self, workdir: str | os.PathLike) -> None:
    self._name = os.fspath(workdir)
    self._root = files.absolute(workdir)
    self._opened: int | None = None
    self._watched = False

  def __enter__(self) -> "Lock":
    return self

  def __exit__(self, *_: object) -> None:
    if self._opened is not None:
      os.close(self._opened)
      self._opened = None

  def acquire(self) -> None:
    """Takes the directory; does nothing if it is taken already, or absent.

    Raises:
      UserError: another trainer is at work there.
    """
    if not self._watched and self._root.is_dir():
      beat = _heartbeat(self._root)
      if not files.is_remote(self._root):
        self._flock(beat)
      self._watch(beat)
      self._watched = True

  def _flock(self, beat: dict[str, Any]) -> None:
    opened = os.open(self._root, os.O_RDONLY)
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(opened)
      raise self._refusal(beat) from None
    except OSError as e:
      os.close(opened)
      if e.errno not in _NO_LOCKS:
        raise
      return
    self._opened = opened

  def _watch(self, beat: dict[str, Any]) -> None:
    """Watches a heartbeat until it changes, or rests for long enough."""
    if beat.get("state") not in RUNNING:
      return
    if beat.get("host") == socket.gethostname():
      # The lock, if the file system has locks, reaches every process here.
      if self._opened is not None or not _lives(beat.get("pid")):
        return
    if abs(time.time() - beat.get("written", 0.0)) > _OLD:
      return
    logging.info(
      "%s: a trainer on %s was at work %.0f s ago: watching whether it still "
      "is",
      self._name,
      beat.get("host"),
      time.time() - beat["written"],
    )
    end = time.monotonic() + _WATCH
    while time.monotonic() < end:
      time.sleep(EVERY / 5)
      now = _heartbeat(self._root)
      if now.get("state") not in RUNNING:
        return  # it has ended meanwhile
      if now.get("written") != beat.get("written"):
        raise self._refusal(now)

  def _refusal(self, beat: dict[str, Any]) -> UserError:
    who = ""
    if beat.get("state") in RUNNING:
      who = f" (pid {beat.get('pid')} on {beat.get('host')})"
    return UserError(
      f"--workdir={self._name}: another trainer is at work there{who}: wait "
      "until it ends, or end it, or give another --workdir"
    )


def _heartbeat(root: epath.Path) -> dict[str, Any]:
  """Returns the content of heartbeat.json; {} if it cannot be read."""
  with contextlib.suppress(OSError, ValueError):
    beat = json.loads((root / "heartbeat.json").read_text())
    return beat if isinstance(beat, dict) else {}
  return {}


def _lives(pid: Any) -> bool:
  """Returns whether another process with this number runs on this host."""
  if not isinstance(pid, int) or pid == os.getpid():
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return True
