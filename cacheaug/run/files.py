"""Files that are whole or absent, on a disk or on object storage (gs://)."""

import os

from etils import epath


def is_remote(path: epath.Path) -> bool:
  """Whether `path` is on object storage: no append, no cheap rename."""
  return "://" in os.fspath(path)


def absolute(path: str | epath.Path) -> epath.Path:
  """The path from the root."""
  # epath's own would put gs:// below the working directory.
  path = epath.Path(path)
  return path if is_remote(path) else path.absolute()


def write_whole(path: epath.Path, data: bytes) -> None:
  """Writes a file so that a reader never sees a part of it.

  Raises:
    OSError: no space, no permission, no such directory.
  """
  if is_remote(path):
    path.write_bytes(data)  # An object appears when its upload ends.
    return
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.write_bytes(data)
  temporary.replace(path)
