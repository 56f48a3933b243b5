"""A static cache for decoding: rows are written in place, then attended to.

`KVCache` stacks its layers and keeps heads inside slots, which suits passes of
many rows over a context that does not change. A decoding step changes one slot
of every layer: here each layer is an array of its own with its heads outside,
so that a loop that carries it moves no more than the new rows.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from cacheaug.kernels.context_attention import MASKED
from cacheaug.model.attention import visible
from cacheaug.model.cache import KVCache


@flax.struct.dataclass
class StaticCache:
  """What KVCache holds, laid out for decoding.

  A slot whose segment is 0 is empty and never attended to.
  """

  keys: tuple[jax.Array, ...]  # L times [B, K, S, E], RoPE applied
  values: tuple[jax.Array, ...]  # L times [B, K, S, E]
  positions: jax.Array  # [B, S] int32
  segments: jax.Array  # [B, S] int32, 0 = empty slot

  @classmethod
  def of(cls, cache: KVCache, slots: int, dtype: Any) -> "StaticCache":
    """A copy with `slots` slots, those after the cache's own empty."""
    cache = cache.pad(slots - cache.length)

    def layers(array):
      return tuple(array.swapaxes(2, 3).astype(dtype))

    return cls(
      layers(cache.keys), layers(cache.values), cache.positions, cache.segments
    )

  def stacked(self) -> KVCache:
    """The same as a KVCache of as many slots: a copy."""
    keys, values = (
      jnp.stack(x).swapaxes(2, 3) for x in (self.keys, self.values)
    )
    return KVCache(keys, values, self.positions, self.segments)

  def write(self, rows: KVCache, slot: jax.Array | int) -> "StaticCache":
    """Writes `rows` over the slots from `slot` on, for all sequences alike."""

    def kv(layers, update):
      update = update.swapaxes(2, 3)
      return tuple(
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)
        for old, new in zip(layers, update, strict=True)
      )

    def put(array, update):
      return jax.lax.dynamic_update_slice(array, update, (0, slot))

    at = (0, 0, slot, 0)
    return StaticCache(
      kv(self.keys, rows.keys),
      kv(self.values, rows.values),
      put(self.positions, rows.positions),
      put(self.segments, rows.segments),
    )

  def pad(self, slots: int) -> "StaticCache":
    """A copy with so many further slots, empty."""
    row, kv = ((0, 0), (0, slots)), ((0, 0), (0, 0), (0, slots), (0, 0))
    return StaticCache(
      keys=tuple(jnp.pad(x, kv) for x in self.keys),
      values=tuple(jnp.pad(x, kv) for x in self.values),
      positions=jnp.pad(self.positions, row),
      segments=jnp.pad(self.segments, row),
    )

  def hide_after(self, limits: jax.Array) -> "StaticCache":
    """Empties every slot at a position beyond `limits` [B]."""
    keep = self.positions <= limits[:, None]
    return self.replace(segments=jnp.where(keep, self.segments, 0))

  def hide_before(self, limits: jax.Array) -> "StaticCache":
    """Empties every slot at a position before `limits` [B]."""
    keep = self.positions >= limits[:, None]
    return self.replace(segments=jnp.where(keep, self.segments, 0))

  def join(
    self,
    positions: jax.Array,  # [B, R]
    segments: jax.Array,  # [B, R]
    slot: jax.Array,  # []
    window: int | None,  # of sliding layers
  ) -> tuple["StaticCache", "CacheWrite"]:
    """Enters rows that start at `slot`; their keys and values follow."""

    def put(array, update):
      return jax.lax.dynamic_update_slice(array, update, (0, slot))

    cache = self.replace(
      positions=put(self.positions, positions),
      segments=put(self.segments, segments),
    )
    # Of the rows themselves none later; slots beyond them may hold latents.
    slots = jnp.arange(cache.positions.shape[1])[None] - slot  # [1, S]
    r = positions.shape[1]
    later = (slots > jnp.arange(r)[:, None]) & (slots < r)  # [R, S]

    def seen(window):
      mask = visible(
        positions, segments, cache.positions, cache.segments, window, False
      )
      return mask & ~later[None]

    return cache, CacheWrite(slot, seen(None), seen(window))


@flax.struct.dataclass
class CacheWrite:
  """R new rows a sequence: where they are written and what they see."""

  slot: jax.Array  # [], the first of R slots
  seen: jax.Array  # [B, R, S] bool, of the slots after writing
  near: jax.Array  # the same for sliding layers


@flax.struct.dataclass
class LayerCache:
  """One layer's keys and values, and the rows that are about to join them."""

  keys: jax.Array  # [B, K, S, E]
  values: jax.Array
  rows: CacheWrite
  sliding: bool = flax.struct.field(pytree_node=False)

  def attend(
    self,
    q: jax.Array,  # [B, 1, R, H, E], scaled, RoPE applied
    k: jax.Array,  # [B, 1, R, K, E], RoPE applied
    v: jax.Array,  # [B, 1, R, K, E]
    softcap: float,
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attention [B, 1, R, H, E] over all slots, and both arrays rewritten."""
    b, _, r, h, e = q.shape
    heads = k.shape[3]
    at = (0, 0, self.rows.slot, 0)
    keys, values = (
      jax.lax.dynamic_update_slice(old, new[:, 0].swapaxes(1, 2), at)
      for old, new in ((self.keys, k), (self.values, v))
    )
    q = q.reshape(b, r, heads, -1, e).swapaxes(1, 2)  # [B, K, R, G, E]
    q = q.reshape(b, heads, -1, e)
    scores = jnp.einsum(
      "bkqe,bkse->bkqs", q, keys, preferred_element_type=jnp.float32
    )
    if softcap:
      scores = softcap * jnp.tanh(scores / softcap)
    seen = self.rows.near if self.sliding else self.rows.seen
    scores = scores.reshape(b, heads, r, h // heads, -1)
    scores = jnp.where(seen[:, None, :, None], scores, MASKED)
    weights = jax.nn.softmax(scores).astype(values.dtype)
    weights = weights.reshape(b, heads, r * h // heads, -1)
    out = jnp.einsum("bkqs,bkse->bkqe", weights, values)
    out = out.reshape(b, heads, r, -1, e).swapaxes(1, 2)
    return out.reshape(b, 1, r, h, e), (keys, values)
