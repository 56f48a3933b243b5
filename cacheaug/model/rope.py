"""Rotary position embeddings.

Layout: the two halves of E rotate together ("rotate half"), as transformers
and Google's Gemma do. rope_scaling.py has the frequencies.
"""

import jax
import jax.numpy as jnp

from cacheaug.model import rope_scaling
from cacheaug.model.config import SLIDING, UNROTATED, ModelConfig

Rope = tuple[jax.Array, jax.Array]  # cos, sin [..., E/2]


def rope_table(
  config: ModelConfig,
  positions: jax.Array,  # [B, ...]
  scaled: bool = True,
) -> tuple[Rope, ...]:
  """For global layers and, where theirs differs, for the other layers.

  Args:
    config: of the decoder.
    positions: of the rows to rotate.
    scaled: whether cosines and sines have yarn's factor; without, they turn
      keys on that have it already.

  Raises:
    UserError: a scaling that is not supported.
  """

  def table(base, scaling):
    if scaling and scaling["rope_type"] == "dynamic":
      freq = rope_scaling.dynamic_frequencies(
        config, base, scaling["factor"], positions
      )
    else:
      freq = jnp.asarray(rope_scaling.scaled_frequencies(config, base, scaling))
      freq = freq.reshape((1,) * positions.ndim + (-1,))
    angle = positions[..., None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    factor = rope_scaling.attention_factor(scaling) if scaled else 1.0
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)

  scaling = dict(config.rope_scaling)
  tables = [table(config.rope_base, scaling)]
  same = config.rope_base == config.rope_base_sliding and not scaling
  if SLIDING in config.layer_kinds and not same:
    tables.append(table(config.rope_base_sliding, {}))
  if UNROTATED in config.layer_kinds:
    cos, sin = tables[0]
    tables.append((jnp.ones_like(cos), jnp.zeros_like(sin)))
  return tuple(tables)


def rope_of_layers(
  config: ModelConfig,
  positions: jax.Array,  # [B, ...]
  scaled: bool = True,
) -> Rope:  # [L or 1, B, ..., E/2]
  """`rope_table` by layer, for what is stacked over L."""
  tables = rope_table(config, positions, scaled)
  if len(tables) == 1:
    return tuple(table[None] for table in tables[0])
  return tuple(
    jnp.stack([tables[other][i] for other in config.other_layers])
    for i in (0, 1)
  )


def rotate(
  x: jax.Array,  # [..., R, heads, E]
  rope: Rope,  # [..., R, E/2]
) -> jax.Array:  # [..., R, heads, E]
  """Rotates queries or keys by their positions, in float32."""
  cos, sin = (t[..., None, :] for t in rope)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)
