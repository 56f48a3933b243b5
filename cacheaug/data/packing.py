"""Tokenised documents packed to rows of S tokens, once, on disk.

The cache's directory is named by a hash of everything that its content depends
on. Documents are cut into contiguous shards; each shard is packed on its own,
so shards are made in parallel and an interrupted run goes on with those that
are missing. Documents follow one another without a gap and go on into the next
row; only the last row of a shard is padded. Prompts with their answers stay in
one row, and rows are padded. See shards.py for the files.
"""

import collections.abc
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import sys
import time
import typing

import numpy as np

from cacheaug import errors
from cacheaug.data import shards as packed
from cacheaug.data import sources, tokenizers
from cacheaug.run import files

# Part of the address: raise it when the bytes of a cache change.
_FORMAT = 2
# Text per shard: 3 s of work on one core at the 1.3 MB/s of a 2,048-word
# `tokenizer.json` (bytes: 7 MB/s), and one padded row in some 10,000.
_SHARD_BYTES = 4 << 20
# Below this, starting workers (each imports the main module, hence jax, again)
# costs about as much as it saves.
_IN_PROCESS_BYTES = 16 << 20
# Errors of network file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def is_validation(
  documents: sources.Documents, fraction: float, *, label: str = "source"
) -> np.ndarray:
  """Decides which documents are held out, by hashing their keys.

  A document's split does not depend on seeds or on other documents, except
  that the smallest and largest hash go to validation and train, so that
  neither split is empty.

  Args:
    documents: the documents of a source.
    fraction: share of validation documents, 0 <= fraction < 1; 0 gives none.
    label: config key of the source, for errors.

  Returns:
    bool [number of documents].

  Raises:
    UserError: if there are fewer than two documents to divide.
  """
  if not 0 <= fraction < 1:
    raise errors.UserError(
      f"data.validation_fraction={fraction}: need 0 <= fraction < 1"
    )
  n = len(documents)
  if not fraction:
    return np.zeros(n, bool)
  if n < 2:
    raise errors.UserError(
      f"{label}: one document cannot be split into training and validation; "
      "give a separator or more files, or set data.validation_fraction=0"
    )
  hashes = np.array([_hash(documents.key(i)) for i in range(n)], np.uint64)
  held_out = hashes < np.uint64(fraction * 2**64)
  held_out[np.argmin(hashes)] = True
  held_out[np.argmax(hashes)] = False
  return held_out


def _hash(key: str) -> int:
  digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "little")


@dataclasses.dataclass(frozen=True)
class _Job:
  """All that packing a shard depends on; sent once to each worker."""

  documents: sources.Documents
  tokenizer: tokenizers.Tokenizer
  sequence: int
  held_out: np.ndarray
  edges: list[int]
  directory: pathlib.Path


def pack(
  documents: sources.Documents,
  tokenizer: tokenizers.Tokenizer,
  *,
  sequence: int,
  validation_fraction: float,
  cache_dir: str | pathlib.Path,
  workers: int = 0,
  label: str = "source",
) -> pathlib.Path:
  """Packs documents unless a complete cache of them exists already.

  Processes that call this at the same time wait for the first one. A killed
  run leaves its finished shards, which the next run keeps.

  Args:
    documents: from `sources.open_documents`.
    tokenizer: its `name` is part of the cache's address.
    sequence: S, tokens in a row.
    validation_fraction: share of documents held out, by `is_validation`.
    cache_dir: directory that holds caches; made if missing.
    workers: processes; 0 for one a core. Small sources use none.
    label: config key of the source, for errors and progress.

  Returns:
    Directory of the complete cache; see `packed.open_rows`.

  Raises:
    UserError: for text that cannot be read, a split that would be empty, a
      directory that cannot be written, or a worker that died.
  """
  address = {
    "format": _FORMAT,
    "shard_bytes": _SHARD_BYTES,
    "documents": documents.fingerprint(),
    "tokenizer": tokenizer.name,
    "sequence": sequence,
    "validation_fraction": validation_fraction,
  }
  digest = hashlib.blake2b(json.dumps(address).encode(), digest_size=10)
  directory = pathlib.Path(cache_dir).expanduser() / digest.hexdigest()
  try:
    if packed.is_complete(directory):
      return directory
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory, label):
      if not packed.is_complete(directory):
        # Documents are looked at here alone: it takes minutes for a corpus.
        held_out = is_validation(documents, validation_fraction, label=label)
        count = max(1, documents.total_bytes // _SHARD_BYTES)
        count = min(count, len(documents))
        job = _Job(
          documents=documents,
          tokenizer=tokenizer,
          sequence=sequence,
          held_out=held_out,
          edges=[len(documents) * i // count for i in range(count + 1)],
          directory=directory,
        )
        _build(job, workers, address, label)
  except OSError as error:
    reason = error.strerror or errors.one_line(error, 200)
    raise errors.UserError(
      f"data.cache_dir: cannot write {directory} ({reason}); give a directory "
      "with space and permission"
    ) from error
  return directory


def _build(
  job: _Job, workers: int, address: dict[str, typing.Any], label: str
) -> None:
  """Packs the shards that are missing, then writes `meta.json`."""
  start = time.monotonic()
  count = len(job.edges) - 1
  missing = [
    i for i in range(count) if packed.read_shard_json(job.directory, i) is None
  ]
  if job.documents.total_bytes < _IN_PROCESS_BYTES:
    workers = 1
  workers = min(workers or os.cpu_count() or 1, len(missing))
  if workers > 1:
    done = _in_workers(job, missing, workers)
  else:
    done = (_pack_shard(job, i) for i in missing)
  for _ in _progress(done, len(missing), f"packing {label}"):
    pass
  shards = [packed.read_shard_json(job.directory, i) for i in range(count)]
  meta = {
    "address": address,
    "sequence": job.sequence,
    "dtype": _dtype(job.tokenizer).name,
    "num_documents": len(job.documents),
    "shards": shards,
  }
  packed.write_json(job.directory / "meta.json", meta)
  rows = {
    split: sum(s[split]["rows"] for s in shards) for split in packed.SPLITS
  }
  print(
    f"packed {label}: {len(job.documents)} documents into {rows['train']} "
    f"training and {rows['validation']} validation rows of {job.sequence} "
    f"tokens in {time.monotonic() - start:.1f} s",
    file=sys.stderr,
  )
  cut, lost = (
    sum(shard[split][key] for shard in shards for split in packed.SPLITS)
    for key in ("cut", "lost")
  )
  if cut or lost:
    print(
      f"packed {label}: {cut} answers are cut off at the end of a row of "
      f"{job.sequence} tokens, and {lost} are lost as they lie beyond it; "
      "raise data.sequence",
      file=sys.stderr,
    )


_worker_job: _Job | None = None


def _start_worker(job: _Job) -> None:
  global _worker_job
  _worker_job = job


def _pack_in_worker(shard: int) -> None:
  _pack_shard(_worker_job, shard)


def _in_workers(
  job: _Job, missing: list[int], workers: int
) -> collections.abc.Iterator[None]:
  """Packs shards in processes; yields once for each that is done."""
  pool = concurrent.futures.ProcessPoolExecutor(
    workers,
    # A fork of a process in which jax runs threads may hang.
    mp_context=multiprocessing.get_context("spawn"),
    initializer=_start_worker,
    initargs=(job,),
  )
  try:
    futures = [pool.submit(_pack_in_worker, i) for i in missing]
    for future in concurrent.futures.as_completed(futures):
      yield future.result()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise errors.UserError(
      "a packing worker died: out of memory, or a script without "
      "`if __name__ == '__main__':`; run again with data.workers=1 (finished "
      "shards are kept)"
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)


def _pack_shard(job: _Job, shard: int) -> None:
  """Tokenises, packs and writes one shard, its JSON file last."""
  marks: dict[bool, list[np.ndarray]] = {False: [], True: []}
  tokens: dict[bool, list[np.ndarray]] = {False: [], True: []}
  dtype = _dtype(job.tokenizer)
  cut, lost = {False: 0, True: 0}, {False: 0, True: 0}
  for number in range(job.edges[shard], job.edges[shard + 1]):
    held_out = bool(job.held_out[number])
    # Encoded separately, as a prompt is encoded before there is an answer.
    prompt, text = job.documents.parts(number)
    before = [*job.tokenizer.prefix]
    before += job.tokenizer.encode(prompt) if prompt else []
    ids = before + job.tokenizer.encode(text) + [*job.tokenizer.suffix]
    mark = np.full(len(ids), number, np.int32)
    if job.documents.answered:
      mark[len(before) :] += packed.ANSWER
      lost[held_out] += len(before) >= job.sequence
      cut[held_out] += len(before) < job.sequence < len(ids)
    marks[held_out].append(mark)
    tokens[held_out].append(np.array(ids, dtype))
  entry = {}
  for held_out, split in enumerate(packed.SPLITS):
    parts = tokens[bool(held_out)]
    rows = _whole if job.documents.answered else _rows
    records = rows(
      parts, marks[bool(held_out)], job.sequence, job.tokenizer.pad_id
    )
    entry[split] = {
      "rows": len(records),
      "documents": len(parts),
      "tokens": sum(map(len, parts)),
      # Answers of which a row holds a part, and answers of which it holds none.
      "cut": cut[bool(held_out)],
      "lost": lost[bool(held_out)],
    }
    if records:
      path = packed.shard_path(job.directory, split, shard)
      entry[split] |= packed.write_records(path, records)
  packed.write_json(packed.json_path(job.directory, shard), entry)


def _whole(
  tokens: list[np.ndarray],
  marks: list[np.ndarray],
  sequence: int,
  pad_id: int,
) -> list[bytes]:
  """Makes records of rows; no document crosses the end of a row.

  A document that is longer than a row is cut off at the row's end.
  """
  rows: list[tuple[list[np.ndarray], list[np.ndarray]]] = []
  room = 0
  for ids, mark in zip(tokens, marks, strict=True):
    if len(ids) > room:
      rows.append(([], []))
      room = sequence
    for part, row in zip((ids, mark), rows[-1], strict=True):
      row.append(part[:room])
    room -= min(room, len(ids))
  return [record for row in rows for record in _rows(*row, sequence, pad_id)]


def _rows(
  tokens: list[np.ndarray],
  marks: list[np.ndarray],  # the document of each token
  sequence: int,
  pad_id: int,
) -> list[bytes]:
  """Concatenates documents and cuts them into records of one row each."""
  if not tokens:
    return []
  flat, documents = np.concatenate(tokens), np.concatenate(marks)
  padding = (0, -len(flat) % sequence)
  flat = np.pad(flat, padding, constant_values=pad_id)
  documents = np.pad(documents, padding, constant_values=-1)
  return [
    row.tobytes() + document_row.tobytes()
    for row, document_row in zip(
      flat.reshape(-1, sequence), documents.reshape(-1, sequence), strict=True
    )
  ]


def _dtype(tokenizer: tokenizers.Tokenizer) -> np.dtype:
  return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)


@contextlib.contextmanager
def _lock(
  directory: pathlib.Path, label: str
) -> collections.abc.Iterator[None]:
  """Holds the directory's lock; the system frees it if the process dies."""
  with (directory / "lock").open("w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"{label}: waiting for another process to pack", file=sys.stderr)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      # Two processes may then do the same work; renames keep it whole.
      yield
      return
    files.remove_temporary(directory)  # of a process that was killed
    yield


def _progress(
  items: collections.abc.Iterable, total: int, label: str
) -> collections.abc.Iterator:
  """A bar on a terminal; elsewhere a line every ten seconds."""
  if sys.stderr.isatty():
    import tqdm

    yield from tqdm.tqdm(items, desc=label, total=total, unit="shard")
    return
  last = time.monotonic()
  for done, item in enumerate(items, start=1):
    yield item
    if time.monotonic() - last > 10:
      last = time.monotonic()
      print(f"{label}: {done} of {total} shards", file=sys.stderr)
