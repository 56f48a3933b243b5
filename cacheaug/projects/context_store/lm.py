"""Decoding on from a store of contexts.

  lm = with_store(lm, Store("contexts"))
  lm.generate(["..."])     # reads on from the longest stored beginning

`python -m cacheaug.deliberate` fills a store ahead of time. A context goes
between device and store as one `Entry` a sequence: `entries_of`, `context_of`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from cacheaug.augment import point_sampling
from cacheaug.errors import UserError
from cacheaug.inference import context as contexts
from cacheaug.inference import padding
from cacheaug.inference.engine import Context
from cacheaug.inference.session import InsertionSchedule
from cacheaug.lm import LM
from cacheaug.model import transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params, Transformer
from cacheaug.projects.context_store.store import Entry, Identity, Store
from cacheaug.run.checksum import checksums
from cacheaug.weights import leaves


def entries_of(
  context: Context, latents_at: Sequence[int] | None = None
) -> list[Entry]:
  """One entry a sequence, copied to the host.

  Args:
    context: of any batch.
    latents_at: tokens before each augmentation, the same for all sequences;
      by default the end of each where the context is augmented.
  """
  context = jax.device_get(context)
  cache, found = context.cache, []
  for row, document in enumerate(context.documents):
    tokens = context.tokens[row][document >= 0]
    padding = len(document) - len(tokens)
    filled = np.flatnonzero(cache.segments[row])
    at = (len(tokens),) if context.augmented else ()
    found.append(
      Entry(
        tokens=tokens,
        keys=cache.keys[:, row, filled],
        values=cache.values[:, row, filled],
        positions=cache.positions[row, filled],
        segments=cache.segments[row, filled],
        slots=(filled - padding).astype(np.int32),
        hidden=context.hidden[row],
        position=int(context.position[row]),
        latents_at=at if latents_at is None else tuple(latents_at),
        padding=padding,
      )
    )
  return found


def context_of(
  entries: Sequence[Entry], *, pad_id: int = 0, length: int | None = None
) -> Context:
  """A batch to decode on from: every slot where it was.

  Positions stay those that were computed with, so sequences of a batch may
  count from different ones; only their differences matter to a decoder.

  Args:
    entries: at least one.
    pad_id: token that fills up shorter sequences, on the left.
    length: S; the least that keeps each entry's padding by default, with
      which a batch that was stored comes back bit for bit.
  """
  if length is None:
    length = max(len(e.tokens) + e.padding for e in entries)
  tokens, documents = padding.pad_left(
    [e.tokens.tolist() for e in entries], pad_id, length
  )
  pads = [length - len(e.tokens) for e in entries]
  ends = [e.slots.max() + 1 + pad for e, pad in zip(entries, pads, strict=True)]
  b, slots, first = len(entries), max(length, *ends), entries[0].keys
  layers, _, heads, size = first.shape
  keys, values = (
    np.zeros((layers, b, slots, heads, size), first.dtype) for _ in range(2)
  )
  positions, segments = (np.zeros((b, slots), np.int32) for _ in range(2))
  for row, (entry, pad) in enumerate(zip(entries, pads, strict=True)):
    at = entry.slots + pad
    keys[:, row, at], values[:, row, at] = entry.keys, entry.values
    positions[row, at], segments[row, at] = entry.positions, entry.segments
  return jax.device_put(
    Context(
      cache=KVCache(keys, values, positions, segments),
      tokens=tokens,
      documents=documents,
      hidden=np.stack([e.hidden for e in entries]),
      position=np.array([e.position for e in entries], np.int32),
      augmented=any(e.augmented for e in entries),
    )
  )


@functools.partial(jax.jit, static_argnames="model")
def _read_on(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  tokens: jax.Array,  # [1, T], padded on the right
  position: jax.Array,  # [1], of the first
  count: jax.Array,  # [], tokens that are there
) -> tuple[jax.Array, KVCache]:  # hidden [D] of the last one, the rows' cache
  index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
  hidden, rows = transformer.extend(
    model,
    decoder,
    cache,
    tokens,
    position[:, None] + index,
    (index < count).astype(jnp.int32),
  )
  return hidden[0, count - 1], rows


def _checksum(params: Params) -> list:
  flat = leaves.flatten(params)
  sums = checksums(flat.values())
  shapes = [[k, str(x.dtype), *x.shape] for k, x in flat.items()]
  return [shapes, sums.tolist()]


# Fields of ModelConfig that came after the first stores. At its default such a
# field says what was so before it: entries of then stay good.
_LATER = ("pre_norms", "qk_norm_joint", "qkv_bias")


def _entries(config: ModelConfig) -> dict[str, Any]:
  return {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _LATER or getattr(config, field.name) != field.default
  }


def _short(about: object) -> str:
  text = json.dumps(about, default=str, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredLM(LM):
  """An LM that reads on from the longest beginning that a store holds.

  Where latents are due at a prompt's end and the store has a beginning of the
  prompt with latents, they stay where they stand, the rest of the prompt is
  read after them, and none are added at its end: deliberated ahead, decoded
  now. Where it has none, the prompt is read (on from a plain beginning if
  there is one) and augmented at its end, as without a store. Frozen decoding
  (latents=False) goes on from plain entries only.

  Attributes:
    store: looked into by `generate`, `stream`, `complete` and `writer`.
    keep: put what was not found into the store.
  """

  store: Store | None = None
  keep: bool = False

  def __post_init__(self):
    """Refuses kinds of coprocessor that need more than a store keeps."""
    if self.coprocessor is not None:
      self.coprocessor.spec.kind.check("store")

  def identity(self, latents: bool) -> Identity:
    """The identity of contexts that this LM computes, with or without latents.

    Every bit of the weights counts: `fingerprint` rounds them to bfloat16,
    which would take a decoder for its own rounded copy.

    Raises:
      UserError: latents without a coprocessor.
    """
    if latents:
      self._coprocessor()
    return self._identities[latents]

  def entries(
    self, rows: list[list[int]], on: Sequence[bool]
  ) -> tuple[list[Entry], int]:
    """Each sequence's context, and how many of them the store had begun.

    Args:
      rows: tokens.
      on: which of them are to have latents.
    """
    found = [
      self._stored(row, latents) for row, latents in zip(rows, on, strict=True)
    ]
    hits = sum(entry is not None for entry in found)
    fresh = [i for i, entry in enumerate(found) if entry is None]
    for i, entry in zip(fresh, self._fresh(rows, fresh), strict=True):
      found[i] = entry
    for i, row in enumerate(rows):
      rest = row[len(found[i].tokens) :]
      if rest:
        found[i] = self.read_on(found[i], rest)
        self._put(found[i])
    bare = [i for i, e in enumerate(found) if on[i] and not e.augmented]
    if bare:
      context = self._together([found[i] for i in bare])
      for i, entry in zip(bare, entries_of(self.augment(context)), strict=True):
        found[i] = entry
        self._put(entry)
    return found, hits

  def check(self, tokens: list[int], latents: bool) -> None:
    """Refuses what `fill` cannot take, before any device work.

    Raises:
      UserError: too few tokens for the latents, or too many for the decoder.
    """
    (tokens,) = self._checked([tokens])
    if latents:
      spec = self._coprocessor().spec
      contexts.check_prompts([tokens], spec)
      if spec.positions == "insert":
        pushed = spec.latents * spec.rounds_per_point
        self._check_positions(len(tokens) + pushed, 0)

  def has(self, tokens: list[int], latents: bool) -> bool:
    """Whether `fill` has stored these tokens."""
    at = (len(tokens),) if latents else ()
    return self.store.has(self.identity(latents), tokens, at)

  def fill(
    self, rows: list[list[int]], latents: bool, batch: int
  ) -> list[bool]:
    """Reads each sequence, augments it at its end, and stores it.

    Args:
      rows: at most `batch`, tokens that `check` takes.
      latents: False stores the context as the decoder leaves it.
      batch: the programs' B, the rest being filled up.

    Returns:
      Which are stored; the others are larger than the store may be.
    """
    filled = rows + rows[-1:] * (batch - len(rows))
    context, _ = super()._begin(filled, [latents] * batch, InsertionSchedule())
    if latents:
      context = self.augment(context)
    return [
      self.store.put(self.identity(latents), entry)
      for entry in entries_of(context)[: len(rows)]
    ]

  def read_on(self, entry: Entry, tokens: Sequence[int]) -> Entry:
    """The decoder reads further tokens; latents stay where they stand.

    Raises:
      UserError: more tokens than the decoder has positions.
    """
    first = int(entry.positions.min())
    self._check_positions(entry.position - first + len(tokens), 0)
    context = context_of([entry], pad_id=self._pad_id)
    count = len(tokens)
    width = padding.round_up(count, padding.PROMPT)
    padded = np.zeros((1, width), np.int32)
    padded[0, :count] = tokens
    hidden, rows = jax.device_get(
      _read_on(
        self.model,
        self._layers,
        context.cache.pad(-context.cache.length % padding.CACHE),
        padded,
        context.position,
        count,
      )
    )

    def join(old, new, axis=0):
      return np.concatenate([old, new], axis)

    slots = np.arange(count, dtype=np.int32) + entry.slots.max() + 1
    return dataclasses.replace(
      entry,
      tokens=join(entry.tokens, padded[0, :count]),
      keys=join(entry.keys, rows.keys[:, 0, :count], 1),
      values=join(entry.values, rows.values[:, 0, :count], 1),
      positions=join(entry.positions, rows.positions[0, :count]),
      segments=join(entry.segments, rows.segments[0, :count]),
      slots=join(entry.slots, slots),
      hidden=hidden,
      position=entry.position + count,
    )

  @functools.cached_property
  def _identities(self) -> dict[bool, Identity]:
    about = [_entries(self.model.config), _checksum(self.decoder)]
    plain = Identity(_short(about), jnp.dtype(self.model.dtype).name)
    if self.coprocessor is None:
      return {False: plain}
    spec = point_sampling.to_entries(
      self.coprocessor.spec, self.coprocessor.draw
    )
    augmented = dataclasses.replace(
      plain,
      coprocessor=_short(_checksum(self.coprocessor.params)),
      spec=json.dumps(spec, sort_keys=True),
    )
    return {False: plain, True: augmented}

  def _stored(self, tokens: list[int], latents: bool) -> Entry | None:
    found = None
    if latents:
      found = self.store.longest(self._identities[True], tokens)
    return found or self.store.longest(self._identities[False], tokens)

  def _put(self, entry: Entry) -> None:
    if self.keep:
      self.store.put(self._identities[entry.augmented], entry)

  def _fresh(self, rows: list[list[int]], which: list[int]) -> list[Entry]:
    if not which:
      return []
    plain = [False] * len(which)
    context, _ = super()._begin(
      [rows[i] for i in which], plain, InsertionSchedule()
    )
    found = entries_of(context)
    for entry in found:
      self._put(entry)
    return found

  def _begin(
    self, rows: list[list[int]], on: Sequence[bool], plan: InsertionSchedule
  ) -> tuple[Context, InsertionSchedule]:
    """Contexts of the store; latents of the prompt's end are in them."""
    if plan.before:
      raise UserError(
        f"before={plan.before}: a store's contexts end where documents do; "
        "decode without one"
      )
    at_once = self.coprocessor is not None and 0 in plan.at
    found, hits = self.entries(rows, [at_once and x for x in on])
    logging.info("store: %d of %d prompts were begun in it", hits, len(rows))
    rest = tuple(step for step in plan.at if step)
    return self._together(found), dataclasses.replace(plan, at=rest)

  def _together(self, entries: Sequence[Entry]) -> Context:
    """A batch of a length as `writer` has: few programs are compiled."""
    length = max(len(e.tokens) + e.padding for e in entries)
    length = padding.round_up(length, padding.PROMPT)
    return context_of(entries, pad_id=self._pad_id, length=length)


def with_store(lm: LM, store: Store, *, keep: bool = False) -> StoredLM:
  """An LM of the same parts that reads from a store; see StoredLM."""
  fields = {f.name: getattr(lm, f.name) for f in dataclasses.fields(LM)}
  return StoredLM(**fields, store=store, keep=keep)
