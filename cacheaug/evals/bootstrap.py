"""Nll summed by document and position, and intervals from those sums.

Whatever is compared is compared on the same tokens, and intervals resample
documents; so sums by document are all that a table needs, however much text
there is. They are kept as report/documents.csv, from which two runs that were
evaluated on the same tokens can be compared later (`compare`).
"""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from cacheaug.errors import UserError
from cacheaug.run.files import expanded

FROZEN, AUGMENTED = "frozen", "augmented"
COLUMNS = (
  "source",
  "document",
  "position",
  "frozen",
  "augmented",
  "tokens",
  "checksum",
)
# Numbers of one run of the bootstrap, of which there are as many as it takes.
_DRAWN_AT_ONCE = 1 << 22


@dataclasses.dataclass(frozen=True)
class DocumentSums:
  """Sums over the tokens of each document, one for each position.

  Attributes:
    positions: J of them, tokens after the latents, from 1.
    documents: [T] their numbers, ascending.
    tokens: [T, J] how many tokens the sums are over.
    checksum: [T, J] of which tokens stand where; the same for all columns.
    nll: column -> [T, J] float64, nats.
  """

  positions: tuple[int, ...]
  documents: np.ndarray
  tokens: np.ndarray
  checksum: np.ndarray
  nll: Mapping[str, np.ndarray]

  def column(self, name: str, position: int) -> tuple[np.ndarray, ...]:
    """(sums, tokens) of the documents that reach `position`, [T] each."""
    j = self.positions.index(position)
    there = self.tokens[:, j] > 0
    return self.nll[name][there, j], self.tokens[there, j]


def sums_of_batch(
  batch: Mapping[str, np.ndarray],  # tokens, documents [B, S]
  nll: Mapping[str, np.ndarray],  # column -> [B, S, A] nats
  weights: np.ndarray,  # [B, S, A], 0 where a token does not count
  positions: Sequence[int],
) -> DocumentSums:
  """The sums of one batch; row p of S is the point after token p."""
  numbers = np.asarray(batch["documents"])
  documents, owner = np.unique(numbers, return_inverse=True)
  owner = owner.reshape(numbers.shape)
  ids = np.asarray(batch["tokens"]).astype(np.int64)
  shape = len(documents), len(positions)
  tokens, checksum = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
  sums = {name: np.zeros(shape) for name in nll}
  for j, position in enumerate(positions):
    # keep [B, S]; who [T], the document of each token that counts.
    keep = np.asarray(weights)[..., position - 1] > 0
    who, (row, point) = owner[keep], np.nonzero(keep)
    tokens[:, j] = np.bincount(who, minlength=shape[0])
    target = point + position
    # A token weighs by its slot: order and place count, batches do not.
    np.add.at(
      checksum[:, j], who, (ids[row, target] + 1) * (target.astype(int) + 1)
    )
    for name, values in nll.items():
      values = np.asarray(values)[..., position - 1][keep].astype(np.float64)
      sums[name][:, j] = np.bincount(who, values, minlength=shape[0])
  there = tokens.any(1)
  return DocumentSums(
    tuple(positions),
    documents[there],
    tokens[there],
    checksum[there],
    {name: x[there] for name, x in sums.items()},
  )


def merge(parts: Iterable[DocumentSums]) -> DocumentSums:
  """The sums of several batches of one text; parts of a document add up."""
  parts = list(parts)
  documents, owner = np.unique(
    np.concatenate([p.documents for p in parts]), return_inverse=True
  )

  def add(arrays):
    stacked = np.concatenate(arrays)
    out = np.zeros((len(documents), stacked.shape[1]), stacked.dtype)
    np.add.at(out, owner, stacked)
    return out

  return DocumentSums(
    parts[0].positions,
    documents,
    add([p.tokens for p in parts]),
    add([p.checksum for p in parts]),
    {name: add([p.nll[name] for p in parts]) for name in parts[0].nll},
  )


def paired_interval(
  base: np.ndarray,
  other: np.ndarray,
  tokens: np.ndarray,
  *,
  seed: int,
  resamples: int = 1000,
) -> tuple[float, float, float]:
  """Relative change of perplexity with a 95 % interval, in percent.

  A bootstrap over whole documents: tokens of one document are alike, and an
  interval over tokens would be too narrow.

  Args:
    base: [T] nats, a document's sum.
    other: [T] nats, the same documents' sums by what is compared with it.
    tokens: [T] how many tokens each sum is over, at least 1.
    seed: of the resampling.
    resamples: bootstrap samples.

  Returns:
    (change, low, high), 100 * (exp(mean difference) - 1). With a single
    document there is nothing to resample: low and high are NaN.

  Raises:
    UserError: no tokens at all.
    ValueError: arrays of other shapes than [T].
  """
  base, other, tokens = (
    np.asarray(x, np.float64) for x in (base, other, tokens)
  )
  if base.ndim != 1 or not base.shape == other.shape == tokens.shape:
    raise ValueError(
      f"shapes {base.shape}, {other.shape}, {tokens.shape} must be the same [T]"
    )
  if not base.size:
    raise UserError(
      "config.eval: no token to compare: give longer or more documents"
    )
  sums, n = other - base, len(base)
  change = _percent(sums.sum() / tokens.sum())
  if n == 1:
    return float(change), math.nan, math.nan
  means = [
    (drawn @ sums) / (drawn @ tokens)
    for drawn in resample(n, seed=seed, resamples=resamples)
  ]
  low, high = np.percentile(_percent(np.concatenate(means)), [2.5, 97.5])
  return float(change), float(low), float(high)


def resample(
  n: int, *, seed: int, resamples: int = 1000
) -> Iterator[np.ndarray]:
  """Counts of how often each of n documents is drawn, [resamples, n] in parts.

  The same as drawing n with replacement, without an index array of tokens; in
  turns, so that memory does not grow with documents times resamples.
  """
  rng, shares = np.random.default_rng(seed), np.full(n, 1.0 / n)
  at_once = max(1, _DRAWN_AT_ONCE // n)
  for start in range(0, resamples, at_once):
    yield rng.multinomial(n, shares, size=min(at_once, resamples - start))


def _percent(difference: np.ndarray) -> np.ndarray:
  return 100.0 * np.expm1(difference)


# --- documents.csv, and runs compared by it ---------------------------------


def csv_lines(by_source: Mapping[str, DocumentSums]) -> list[dict[str, Any]]:
  """Lines of documents.csv: one a source, document and position."""
  lines = []
  for source, sums in by_source.items():
    for t, j in np.argwhere(sums.tokens > 0):
      values = (
        source,
        int(sums.documents[t]),
        sums.positions[j],
        # Python's floats are written with all their digits.
        float(sums.nll[FROZEN][t, j]),
        float(sums.nll[AUGMENTED][t, j]),
        int(sums.tokens[t, j]),
        int(sums.checksum[t, j]),
      )
      lines.append(dict(zip(COLUMNS, values, strict=True)))
  return lines


@dataclasses.dataclass(frozen=True)
class _Sums:
  """One line of documents.csv."""

  frozen: float
  augmented: float
  tokens: int
  checksum: int


_Key = tuple[str, int, int]  # source, document, position


def read_csv(path: str | epath.Path) -> dict[_Key, _Sums]:
  """(source, document, position) -> sums, of a run or of its documents.csv.

  Args:
    path: the file, a report's directory, or a run's.

  Raises:
    UserError: no such file, or one of another form; names file and line.
  """
  path = expanded(path)
  for below in ("documents.csv", "report/documents.csv"):
    if (path / below).is_file():
      path = path / below
      break
  try:
    text = path.read_text()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(
      f"{path}: no documents.csv that can be read ({type(e).__name__}): give a "
      "run that has reported, or run cacheaug.evaluate on it"
    ) from e
  lines = csv.reader(io.StringIO(text))
  if tuple(next(lines, ())) != COLUMNS:
    raise UserError(
      f"{path}: line 1 is not {','.join(COLUMNS)}: give a report's "
      "documents.csv"
    )
  found = {}
  for number, line in enumerate(lines, 2):
    try:
      source, document, position, frozen, augmented, tokens, checksum = line
      key = source, int(document), int(position)
      found[key] = _Sums(
        float(frozen), float(augmented), int(tokens), int(checksum)
      )
    except ValueError as e:
      raise UserError(
        f"{path}: line {number} is damaged ({e}): write the report again"
      ) from e
  return found


@dataclasses.dataclass(frozen=True)
class ComparedRow:
  """Run a against run b on the same tokens, at one position of one source.

  Attributes:
    source: of the text.
    position: 1 is the first token after the latents.
    nll: of run a with latents, mean, nats a token.
    base_nll: of run b.
    change_percent: of the perplexity of a against b's; below zero a is better.
    low: lower end of its 95 % interval, over the documents.
    high: upper end.
    tokens: how many the means are over.
    documents: how many they come from, those that both runs have.
  """

  source: str
  position: int
  nll: float
  base_nll: float
  change_percent: float
  low: float
  high: float
  tokens: int
  documents: int


def compare(
  a: str | epath.Path,
  b: str | epath.Path,
  *,
  seed: int = 0,
  against_frozen: bool = False,
) -> list[ComparedRow]:
  """Change of perplexity of run `a` against run `b`, a row a position.

  Over the documents, sources and positions that both have.

  Args:
    a: a run, its report's directory, or its documents.csv.
    b: the same of the run that it is compared with.
    seed: of the intervals' resampling.
    against_frozen: compare with the frozen column of `b`, not its augmented.

  Raises:
    UserError: a file that cannot be read; nothing in common; a document of
      which the two have other tokens, the first of which it names.
  """
  first, second = read_csv(a), read_csv(b)
  common = sorted(first.keys() & second.keys())
  if not common:
    raise UserError(
      f"{a} and {b} have no source, document and position in common: evaluate "
      "both on the same text"
    )
  for key in common:
    x, y = first[key], second[key]
    if (x.tokens, x.checksum) != (y.tokens, y.checksum):
      source, document, position = key
      what = (
        f"{x.tokens} tokens in {a}, {y.tokens} in {b}"
        if x.tokens != y.tokens
        else f"{x.tokens} tokens in both, but other ones"
      )
      raise UserError(
        f"{a} and {b} are not of the same tokens: {source} document "
        f"{document} has {what} at position {position}; evaluate both with "
        "the same eval.context, eval.sequences, data.sequence, tokenizer and "
        "text"
      )
  rows = []
  places = dict.fromkeys((source, position) for source, _, position in common)
  for source, position in sorted(places):
    keys = [k for k in common if (k[0], k[2]) == (source, position)]
    mine = np.array([first[k].augmented for k in keys])
    base = FROZEN if against_frozen else AUGMENTED
    yours = np.array([getattr(second[k], base) for k in keys])
    tokens = np.array([first[k].tokens for k in keys])
    change, low, high = paired_interval(yours, mine, tokens, seed=seed)
    rows.append(
      ComparedRow(
        source=source,
        position=position,
        nll=float(mine.sum() / tokens.sum()),
        base_nll=float(yours.sum() / tokens.sum()),
        change_percent=change,
        low=low,
        high=high,
        tokens=int(tokens.sum()),
        documents=len(keys),
      )
    )
  return rows
