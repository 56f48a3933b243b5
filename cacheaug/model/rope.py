"""Rotary position embeddings, with the scalings that the families use.

Layout: the two halves of E rotate together ("rotate half"), as transformers
and Google's Gemma do. Reference: transformers' modeling_rope_utils.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.errors import UserError
from cacheaug.model.config import SLIDING, ModelConfig

Rope = tuple[jax.Array, jax.Array]  # cos, sin [..., E/2]


def _frequencies(config: ModelConfig, base: float, scaling: dict) -> np.ndarray:
  """Radians a position, [E/2] float32."""
  e = config.head_dim
  freq = 1.0 / base ** (np.arange(0, e, 2, dtype=np.float32) / e)
  kind = scaling["rope_type"] if scaling else "default"
  if kind == "default":
    return freq.astype(np.float32)
  if kind == "linear":
    return (freq / scaling["factor"]).astype(np.float32)
  if kind == "llama3":
    return _llama3(freq, scaling)
  raise UserError(
    f"rope_scaling type {kind!r} is not supported (default, linear, llama3)"
  )


def _llama3(freq: np.ndarray, scaling: dict) -> np.ndarray:
  """Long wavelengths slowed by `factor`, short kept, smooth in between."""
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
  smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
  slowed = freq / scaling["factor"]
  return ((1 - smooth) * slowed + smooth * freq).astype(np.float32)


def rope_table(config: ModelConfig, positions: jax.Array) -> tuple[Rope, ...]:
  """Of positions [...]: for global layers and, where it differs, sliding.

  Raises:
    UserError: a scaling that is not supported.
  """

  def table(base, scaling):
    freq = jnp.asarray(_frequencies(config, base, scaling))
    freq = freq.reshape((1,) * positions.ndim + (-1,))
    angle = positions[..., None].astype(jnp.float32) * freq
    return jnp.cos(angle), jnp.sin(angle)

  scaling = dict(config.rope_scaling)
  tables = [table(config.rope_base, scaling)]
  same = config.rope_base == config.rope_base_sliding and not scaling
  if SLIDING in config.layer_kinds and not same:
    tables.append(table(config.rope_base_sliding, {}))
  return tuple(tables)


def rope_of_layers(
  config: ModelConfig,
  positions: jax.Array,  # [...]
) -> Rope:  # [L or 1, ..., E/2]
  """`rope_table` by layer, for what is stacked over L."""
  tables = rope_table(config, positions)
  if len(tables) == 1:
    return tuple(table[None] for table in tables[0])
  return tuple(
    jnp.stack([tables[kind == SLIDING][i] for kind in config.layer_kinds])
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
