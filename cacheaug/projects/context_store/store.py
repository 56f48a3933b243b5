"""The store of contexts that were read, and deliberated on, before.

A directory of safetensors files, one an entry: what one sequence's decoding
goes on from, as host arrays. This is the layer of files; it knows nothing of
JAX (projects/context_store/lm.py does), so that other tools can read and fill
a store.

  DIR/<owner>/<tokens>-<hash of the tokens>-<key>.safetensors

The owner is a hash of what computed the entry (`Identity`), the key one of
everything that decides what it holds. A lookup lists names and opens the files
it wants. There is no index, no lock and no server: nothing to be left behind.

- An entry is whole or absent: it is written to a temporary file in its own
  directory, synced, renamed, and the directory synced. Writers of one key may
  meet; the last one's file stays.
- Every read is held against a checksum and against the key in the name. What
  fails is logged in one line, removed, and a miss.
- Beyond `max_bytes` the entries used longest ago go. A reader that has a file
  open keeps it; one that comes late has a miss.
- Temporary files of killed writers go when they are an hour old.

Never pickle.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import secrets
import time
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from cacheaug.errors import UserError, one_line
from cacheaug.run import files

FORMAT = "cacheaug-context-1"
_NAME = re.compile(r"(\d{8})-([0-9a-f]{32})-([0-9a-f]{64})\.safetensors")
_OWNER = re.compile(r"[0-9a-f]{16}")
_STALE = 3600.0  # seconds since a temporary file was last written to
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I32": np.dtype(np.int32),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Identity:
  """Identifies the models of an entry; another's is never served."""

  decoder: str  # fingerprint of weights and architecture
  dtype: str  # of the activations, and so of the cache
  coprocessor: str = ""  # fingerprint of its weights; "" = no latents
  spec: str = ""  # how latents are laid out, as JSON; "" = no latents

  @property
  def owner(self) -> str:
    """The directory of its entries."""
    return hashlib.sha256(self._text()).hexdigest()[:16]

  def key(self, tokens: np.ndarray, latents_at: Sequence[int]) -> str:
    """sha256 of all that decides what an entry holds."""
    found = hashlib.sha256(self._text())
    found.update(json.dumps([FORMAT, *map(int, latents_at)]).encode())
    found.update(np.asarray(tokens, "<i4").tobytes())
    return found.hexdigest()

  def _text(self) -> bytes:
    return json.dumps(dataclasses.asdict(self), sort_keys=True).encode()


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
  """One sequence's context: T filled slots, no padding."""

  tokens: np.ndarray  # [S] int32
  keys: np.ndarray  # [L, T, K, E], RoPE applied
  values: np.ndarray  # [L, T, K, E]
  positions: np.ndarray  # [T] int32, those given to RoPE
  segments: np.ndarray  # [T] int32
  slots: np.ndarray  # [T] int32, the sequence's first token at slot 0
  hidden: np.ndarray  # [D], of the row that predicts the next token
  position: int  # of the next token
  latents_at: tuple[int, ...] = ()  # tokens before each augmentation
  padding: int = 0  # slots before the first token, where it was computed

  @property
  def augmented(self) -> bool:
    """Whether there are latents in it."""
    return bool(self.latents_at)


_ARRAYS = (
  "tokens",
  "keys",
  "values",
  "positions",
  "segments",
  "slots",
  "hidden",
)


class Store:
  """Entries in a directory, for any number of processes.

  Attributes:
    directory: where they are.
    max_bytes: limit on the entries' size; 0 = none.
    evicted: entries that this object has removed to keep the limit.
  """

  def __init__(self, directory: str | pathlib.Path, max_bytes: int = 0):
    """Opens a store, making its directory where there is none.

    Raises:
      UserError: a negative limit, or a directory that cannot be made.
    """
    if max_bytes < 0:
      raise UserError(f"max_bytes={max_bytes} must be 0 (no limit) or more")
    files.refuse_remote(directory, "store")
    self.directory = pathlib.Path(files.expanded(directory))
    self.max_bytes = max_bytes
    self.evicted = 0
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
      raise UserError(
        f"{self.directory}: cannot be a store ({e.strerror}); give a directory"
      ) from e
    self._clean()

  @classmethod
  def existing(cls, directory: str | pathlib.Path) -> "Store":
    """A store that is there already, to be read.

    Raises:
      UserError: no such directory.
    """
    files.refuse_remote(directory, "store")
    if not files.expanded(directory).is_dir():
      raise UserError(
        f"{directory}: no such store; fill one by python -m cacheaug.deliberate"
      )
    return cls(directory)

  def put(self, identity: Identity, entry: Entry) -> bool:
    """Commits an entry; on the disk when it returns.

    False, and one line logged, where it alone exceeds max_bytes.

    Raises:
      UserError: the disk is full, or the directory is not to be written to.
    """
    path = self._path(identity, entry.tokens, entry.latents_at)
    data = _to_bytes(identity, entry)
    if self.max_bytes and len(data) > self.max_bytes:
      logging.warning(
        "%s: an entry of %d tokens takes %d bytes, not stored: max_bytes=%d",
        self.directory,
        len(entry.tokens),
        len(data),
        self.max_bytes,
      )
      return False
    try:
      if not path.parent.is_dir():
        path.parent.mkdir(exist_ok=True)
        files.sync_directory(self.directory)
      files.write_whole(path, data, sync=True)
    except OSError as e:
      raise UserError(f"{path}: cannot be written ({e.strerror})") from e
    self._evict(path)
    return True

  def has(
    self, identity: Identity, tokens: Sequence[int], latents_at: Sequence[int]
  ) -> bool:
    """Whether there is such an entry, unread."""
    return self._path(identity, tokens, latents_at).exists()

  def get(
    self,
    identity: Identity,
    tokens: Sequence[int],
    latents_at: Sequence[int] = (),
  ) -> Entry | None:
    """The entry of exactly these tokens; None where there is none."""
    return self._read(identity, self._path(identity, tokens, latents_at))

  def longest(self, identity: Identity, tokens: Sequence[int]) -> Entry | None:
    """The entry of most tokens that `tokens` begin with; None without any.

    Of several with the same tokens, the one with latents at their end.
    """
    tokens = np.asarray(tokens, "<i4")
    for name in self._prefixes(identity, tokens):
      entry = self._read(identity, self.directory / identity.owner / name)
      if entry is not None:
        return entry
    return None

  def files(self) -> list[tuple[int, pathlib.Path, int]]:
    """(time of last use in ns, file, bytes) of every entry, oldest first."""
    found = []
    for path in self._below(_NAME.fullmatch):
      with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
        stat = path.stat()
        found.append((stat.st_mtime_ns, path, stat.st_size))
    return sorted(found)

  def _path(self, identity, tokens, latents_at) -> pathlib.Path:
    tokens = np.asarray(tokens, "<i4")
    key = identity.key(tokens, latents_at)
    name = f"{_prefix(len(tokens), hashlib.sha256(tokens.tobytes()))}-{key}"
    return self.directory / identity.owner / f"{name}.safetensors"

  def _prefixes(self, identity: Identity, tokens: np.ndarray) -> list[str]:
    """Names of entries that `tokens` begin with, longest first."""
    names: dict[int, list[re.Match]] = {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      for name in os.listdir(self.directory / identity.owner):
        match = _NAME.fullmatch(name)
        if match:
          names.setdefault(int(match[1]), []).append(match)
    found, done, running = [], 0, hashlib.sha256()
    for length in sorted(n for n in names if n <= len(tokens)):
      running.update(tokens[done:length].tobytes())
      done, prefix = length, _prefix(length, running)
      best = identity.key(tokens[:length], (length,))
      same = [m for m in names[length] if m[0].startswith(prefix)]
      same.sort(key=lambda m: (m[3] != best, m[3]))
      found = [m[0] for m in same] + found
    return found

  def _read(self, identity: Identity, path: pathlib.Path) -> Entry | None:
    """An entry that holds what its name says; None, and it goes, where not."""
    try:
      with path.open("rb") as file:
        data, inode = file.read(), os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
      return None
    except OSError as e:
      logging.warning("%s: cannot be read (%s): a miss", path, e.strerror)
      return None
    try:
      entry = _from_bytes(data, identity)
      if self._path(identity, entry.tokens, entry.latents_at) != path:
        raise ValueError("it is not what its name says")
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as e:
      reason = one_line(e, 120)
      logging.warning(
        "%s: damaged (%s): removed, to be computed again", path, reason
      )
      _remove(path, inode)
      return None
    with contextlib.suppress(OSError):  # evicted, or a store of another user's
      os.utime(path)
    return entry

  def _evict(self, kept: pathlib.Path) -> None:
    """Removes what was used longest ago, but not the entry just written."""
    if not self.max_bytes:
      return
    files = self.files()
    excess = sum(size for _, _, size in files) - self.max_bytes
    for _, path, size in files:
      if excess <= 0:
        return
      if path != kept:
        # Another process may be about the same files, oldest first too: what
        # it has removed is gone for both.
        with contextlib.suppress(FileNotFoundError):
          path.unlink()
          self.evicted += 1
        excess -= size

  def _clean(self) -> None:
    """Removes what killed writers have left."""
    for path in self._below(lambda name: name.startswith(files.TEMPORARY)):
      with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _STALE:
          path.unlink()

  def _below(self, wanted) -> Iterator[pathlib.Path]:
    """Files of owners whose names are wanted; others' are left alone."""
    for owner in os.listdir(self.directory):
      if _OWNER.fullmatch(owner):
        with contextlib.suppress(NotADirectoryError):
          for name in os.listdir(self.directory / owner):
            if wanted(name):
              yield self.directory / owner / name


def _prefix(length: int, running) -> str:
  return f"{length:08d}-{running.hexdigest()[:32]}"


def _to_bytes(identity: Identity, entry: Entry) -> bytes:
  """Safetensors with a header that says what it is, and its checksum."""
  arrays = {
    name: np.ascontiguousarray(getattr(entry, name)) for name in _ARRAYS
  }
  for name, array in arrays.items():
    if array.dtype not in _CODES:
      raise ValueError(f"{name} is {array.dtype}, not of {[*_CODES]}")
  text = json.dumps(
    {
      "identity": dataclasses.asdict(identity),
      "position": int(entry.position),
      "latents_at": [int(at) for at in entry.latents_at],
      "padding": int(entry.padding),
    },
    sort_keys=True,
  )
  header = {"format": FORMAT, "entry": text, "sha256": _digest(text, arrays)}
  return safetensors.numpy.save(arrays, header)


def _from_bytes(data: bytes, identity: Identity) -> Entry:
  """The reverse; an error of any of four kinds where it is not whole."""
  parts = dict(safetensors.deserialize(data))
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])["__metadata__"]
  if header["format"] != FORMAT:
    raise ValueError(f"its format is {header['format']}, not {FORMAT}")
  arrays = {
    name: np.frombuffer(
      parts[name]["data"], _DTYPES[parts[name]["dtype"]]
    ).reshape(parts[name]["shape"])
    for name in _ARRAYS
  }
  if _digest(header["entry"], arrays) != header["sha256"]:
    raise ValueError("its checksum is wrong")
  meta = json.loads(header["entry"])
  if meta["identity"] != dataclasses.asdict(identity):
    raise ValueError("another decoder or coprocessor computed it")
  return Entry(
    **arrays,
    position=meta["position"],
    latents_at=tuple(meta["latents_at"]),
    padding=meta["padding"],
  )


def _digest(text: str, arrays: dict[str, np.ndarray]) -> str:
  found = hashlib.sha256(text.encode())
  for name in _ARRAYS:
    array = arrays[name]
    about = [name, _CODES[array.dtype], *array.shape]
    found.update(json.dumps(about).encode())
    found.update(array.view(np.uint8).data)
  return found.hexdigest()


def _remove(path: pathlib.Path, inode: int) -> None:
  """Removes the file that was read, and not one that came in its place."""
  aside = path.with_name(f"{files.TEMPORARY}{secrets.token_hex(8)}")
  with contextlib.suppress(OSError):
    path.rename(aside)
    if aside.stat().st_ino != inode:
      # A writer was quicker; where there is a still newer one, that one stays.
      with contextlib.suppress(FileExistsError):
        os.link(aside, path)
    aside.unlink()
