"""Writes files that are whole or absent, on a disk or on object storage."""

import contextlib
import errno
import glob
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath
from etils.epath import gpath

from cacheaug.errors import UserError, one_line

# The name of a file that is being written begins with this prefix; a killed
# process leaves such files behind.
TEMPORARY = ".tmp-"

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EEXIST,
)
# Libraries in C++ and Rust report the same conditions as text.
_NO_ROOM_TEXT = ("no space left", "quota exc", "os error 28")
_NO_ACCESS_TEXT = ("permission denied",)


# --- paths ------------------------------------------------------------------


class _Path(gpath.PosixGPath):
  """A local path whose own characters are never taken as a pattern.

  Orbax finds the files that it merges by `directory.glob`; etils puts the
  directory itself into that pattern, and '[1]' in it then matches nothing.
  """

  def glob(self, pattern: str) -> Iterator["_Path"]:
    for name in glob.glob(pattern, root_dir=os.fspath(self)):
      yield self / name


def is_remote(path: str | os.PathLike) -> bool:
  """Whether `path` is on object storage: no append, no cheap rename."""
  return "://" in os.fspath(path)


def expanded(path: str | os.PathLike) -> epath.Path:
  """Replaces a leading `~` or `~user` by that home directory.

  Shells do not expand the tilde in `--workdir=~/runs/a`.

  Raises:
    UserError: there is no such user, or no home directory.
  """
  text = os.fspath(path)
  if is_remote(text):
    return epath.Path(text)
  try:
    return _Path(pathlib.Path(text).expanduser())
  except RuntimeError as e:
    raise UserError(f"{text}: there is no such home directory ({e})") from e


def absolute(path: str | os.PathLike) -> epath.Path:
  """The path from the root, `~` expanded."""
  path = expanded(path)
  # epath's own would put gs:// below the working directory.
  return path if is_remote(path) else path.absolute()


def refuse_remote(path: str | os.PathLike, label: str) -> None:
  """Refuses a path on object storage where only a disk will do.

  Raises:
    UserError: naming `label`, the flag or key.
  """
  if is_remote(path):
    raise UserError(
      f"{label}={os.fspath(path)}: object storage is not read or written here: "
      "copy it to a disk first (gcloud storage cp -r), or give a local path"
    )


# --- writing ----------------------------------------------------------------


def temporary(path: pathlib.Path) -> pathlib.Path:
  """A name beside `path` to write to, before that is renamed to `path`."""
  return path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")


def write_whole(
  path: str | os.PathLike,
  data: bytes | Callable[[BinaryIO], None],
  *,
  sync: bool = False,
) -> None:
  """Writes a file so that a reader never sees a part of it.

  Args:
    path: its directory exists.
    data: the bytes, or a function that writes them to the file it is given.
    sync: return only when the file and its name are on the disk.

  Raises:
    OSError: no space, no permission, no such directory; an earlier file of
      this name is unchanged.
  """
  if is_remote(path):
    with _remote_errors(path):
      _upload(epath.Path(path), data)
    return
  path = pathlib.Path(path)
  beside = temporary(path)
  try:
    with beside.open("xb") as file:
      if callable(data):
        data(file)
      else:
        file.write(data)
      file.flush()
      if sync:
        os.fsync(file.fileno())
    beside.replace(path)
  finally:
    with contextlib.suppress(OSError):
      beside.unlink()
  if sync:
    sync_directory(path.parent)


def _upload(path: epath.Path, data: bytes | Callable) -> None:
  """Uploads an object; readers see it when the upload ends."""
  if not callable(data):
    path.write_bytes(data)
    return
  with tempfile.TemporaryFile() as file:
    data(file)
    file.seek(0)
    with path.open("wb") as target:
      shutil.copyfileobj(file, target, 1 << 24)


def sync_directory(directory: pathlib.Path) -> None:
  """Returns when the names of a directory's files are on the disk."""
  opened = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(opened)
  finally:
    os.close(opened)


@contextlib.contextmanager
def _remote_errors(path: str | os.PathLike) -> Iterator[None]:
  """Turns the many exceptions of object storage's clients into OSError."""
  try:
    yield
  except OSError:
    raise
  except Exception as e:
    raise OSError(errno.EIO, one_line(e), os.fspath(path)) from e


def remove_temporary(directory: epath.Path) -> None:
  """Removes files that a killed process left half written.

  No other process may be writing to the directory.
  """
  if is_remote(directory):
    return
  for path in pathlib.Path(directory).glob(f"{TEMPORARY}*"):
    with contextlib.suppress(OSError):
      path.unlink()


# --- errors -----------------------------------------------------------------


def is_full(error: BaseException) -> bool:
  """Whether the disk, or a quota on it, is full."""
  text = str(error).lower()
  return getattr(error, "errno", None) in _NO_ROOM or any(
    words in text for words in _NO_ROOM_TEXT
  )


def _is_forbidden(error: BaseException) -> bool:
  text = str(error).lower()
  return getattr(error, "errno", None) in _NO_ACCESS or any(
    words in text for words in _NO_ACCESS_TEXT
  )


@contextlib.contextmanager
def disk_errors(
  path: str | os.PathLike,
  what: str,
  remedy: str = "give another --workdir",
  *,
  others: bool = True,
) -> Iterator[None]:
  """Turns a disk that is full or forbidden into one clear line.

  Args:
    path: what is written, for the message.
    what: the action that failed, such as 'save a checkpoint'.
    remedy: what the user can do besides freeing space.
    others: whether every other OSError becomes a line as well.

  Raises:
    UserError: naming the path and the remedy.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as e:
    if is_full(e):
      raise UserError(
        f"{path}: no space left to {what}: free some, or {remedy}"
      ) from e
    if _is_forbidden(e):
      raise UserError(
        f"{path}: no access ({one_line(e)}): mend its permissions, or {remedy}"
      ) from e
    if others and isinstance(e, OSError):
      reason = e.strerror or one_line(e)
      raise UserError(f"{path}: cannot {what} ({reason}): {remedy}") from e
    raise


# --- whole directories on object storage ------------------------------------


@contextlib.contextmanager
def staged(
  directory: str | os.PathLike, last: str = "config.json"
) -> Iterator[pathlib.Path]:
  """Gives a local directory whose files end up in `directory`.

  On a disk it is `directory` itself. For object storage it is a temporary
  directory, whose files are uploaded when the block ends without an error.

  Args:
    directory: the place of the files at the end.
    last: the file to upload last, since readers look for it first.

  Raises:
    UserError: object storage that cannot be written to.
  """
  if not is_remote(directory):
    yield pathlib.Path(expanded(directory))
    return
  target = epath.Path(directory)
  with tempfile.TemporaryDirectory() as name:
    local = pathlib.Path(name)
    yield local
    paths = [p for p in sorted(local.rglob("*")) if p.is_file()]
    with disk_errors(directory, "write there", "give another place"):
      for path in sorted(paths, key=lambda p: p.name == last):
        place = target / path.relative_to(local).as_posix()
        with path.open("rb") as file:
          write_whole(
            place, lambda out, file=file: shutil.copyfileobj(file, out)
          )


@contextlib.contextmanager
def fetched(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Gives a local directory with the files of `directory`.

  On a disk it is `directory` itself; for object storage it is a temporary copy,
  which the end of the block removes.

  Raises:
    UserError: object storage that cannot be read.
  """
  if not is_remote(directory):
    yield pathlib.Path(expanded(directory))
    return
  with tempfile.TemporaryDirectory() as name:
    local = pathlib.Path(name)
    with reading(directory):
      for path in epath.Path(directory).iterdir():
        if path.is_dir():
          continue
        with path.open("rb") as file, (local / path.name).open("wb") as out:
          shutil.copyfileobj(file, out, 1 << 24)
    yield local


@contextlib.contextmanager
def reading(path: str | os.PathLike, label: str = "") -> Iterator[None]:
  """Turns object storage that cannot be read into one clear line.

  Args:
    path: what is read.
    label: the flag or key that names it.

  Raises:
    UserError: no such object, no package for it, no permission, no network.
  """
  place = f"{label}={os.fspath(path)}" if label else os.fspath(path)
  try:
    yield
  except UserError:
    raise
  except ImportError as e:
    if not is_remote(path):
      raise
    raise UserError(
      f"{place}: object storage wants another package ({one_line(e)}): pip "
      "install 'cacheaug[gcs]' for gs://"
    ) from e
  except Exception as e:
    if not is_remote(path):
      raise
    raise UserError(f"{place}: cannot be read ({one_line(e)})") from e
