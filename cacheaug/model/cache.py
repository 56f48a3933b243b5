"""The kv-cache: an explicit, frozen pytree that is an argument and a result."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class KVCache:
  """Keys and values a decoder has left behind, one slot a token.

  A slot whose segment is 0 is empty and never attended to, so a cache may be
  longer than what it holds and a batch may be padded on either side. Positions
  are those given to RoPE.
  """

  keys: jax.Array  # [L, B, S, K, E], RoPE applied
  values: jax.Array  # [L, B, S, K, E]
  positions: jax.Array  # [B, S] int32
  segments: jax.Array  # [B, S] int32, 0 = empty slot

  @property
  def length(self) -> int:
    """Slots, filled or not."""
    return self.positions.shape[1]

  def pad(self, slots: int) -> "KVCache":
    """Appends empty slots: room for `slots` more rows."""
    row = ((0, 0), (0, slots))
    kv = ((0, 0), (0, 0), (0, slots), (0, 0), (0, 0))
    return KVCache(
      keys=jnp.pad(self.keys, kv),
      values=jnp.pad(self.values, kv),
      positions=jnp.pad(self.positions, row),
      segments=jnp.pad(self.segments, row),
    )

  def concat(self, rows: "KVCache") -> "KVCache":
    """The slots of both, `rows` last."""
    slots = KVCache(keys=2, values=2, positions=1, segments=1)  # axis of each
    return jax.tree.map(
      lambda a, b, axis: jnp.concatenate([a, b], axis), self, rows, slots
    )

  def hide_after(self, limits: jax.Array) -> "KVCache":
    """Empties every slot at a position beyond `limits` [B]."""
    keep = self.positions <= limits[:, None]
    return self.replace(segments=jnp.where(keep, self.segments, 0))

  def hide_before(self, limits: jax.Array) -> "KVCache":
    """Empties every slot at a position before `limits` [B]."""
    keep = self.positions >= limits[:, None]
    return self.replace(segments=jnp.where(keep, self.segments, 0))
