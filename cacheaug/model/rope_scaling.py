"""The frequencies of RoPE, with the scalings that published decoders use.

Reference: transformers' modeling_rope_utils.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.errors import UserError
from cacheaug.model.config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
  """Radians a position of global layers, [E/2] float32."""
  return scaled_frequencies(config, config.rope_base, dict(config.rope_scaling))


def scaled_frequencies(
  config: ModelConfig, base: float, scaling: dict
) -> np.ndarray:
  """Radians a position, [E/2] float32; of 'dynamic', within max_positions.

  Raises:
    UserError: a type of scaling that is not supported.
  """
  e = config.head_dim
  freq = 1.0 / base ** (np.arange(0, e, 2, dtype=np.float32) / e)
  kind = scaling["rope_type"] if scaling else "default"
  if kind in ("default", "dynamic"):
    return freq.astype(np.float32)
  if kind == "linear":
    return (freq / scaling["factor"]).astype(np.float32)
  if kind == "llama3":
    return _llama3(freq, scaling)
  if kind == "yarn":
    return _yarn(freq, base, scaling)
  raise UserError(
    f"rope_scaling type {kind!r} is not supported (default, linear, llama3, "
    "yarn, dynamic)"
  )


def _yarn(freq: np.ndarray, base: float, scaling: dict) -> np.ndarray:
  """Slow frequencies divided by `factor`, fast kept, a ramp in between.

  Source: arXiv 2309.00071, as transformers has it.
  """
  half = len(freq)

  def dimension(turns: float) -> float:
    """The dimension that turns so often within the original length."""
    length = scaling["original_max_position_embeddings"]
    return half * math.log(length / (turns * 2 * math.pi)) / math.log(base)

  low = dimension(scaling.get("beta_fast", 32))
  high = dimension(scaling.get("beta_slow", 1))
  if scaling.get("truncate", True):
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, 2 * half - 1)
  width = high - low or 0.001
  ramp = (np.arange(half, dtype=np.float32) - np.float32(low)) / width
  slowed = np.clip(ramp, 0.0, 1.0).astype(np.float32)
  out = freq / scaling["factor"] * slowed + freq * (1 - slowed)
  return out.astype(np.float32)


def attention_factor(scaling: dict) -> float:
  """What cosines and sines are multiplied by; 1 but for 'yarn'."""
  if scaling.get("rope_type") != "yarn":
    return 1.0
  if "attention_factor" in scaling:
    return scaling["attention_factor"]

  def mscale(weight: float) -> float:
    factor = scaling["factor"]
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

  weights = scaling.get("mscale"), scaling.get("mscale_all_dim")
  if all(weights):
    return mscale(weights[0]) / mscale(weights[1])
  return mscale(1.0)


def dynamic_frequencies(
  config: ModelConfig,
  base: float,
  factor: float,
  positions: jax.Array,  # [B, ...]
) -> jax.Array:  # [..., E/2], of positions' rank, B first
  """Frequencies of a sequence that may be longer than max_positions.

  The base grows with the sequence's last position among `positions`: keys
  that a cache holds from before keep the base of their time, as they do in
  transformers.
  """
  e = config.head_dim
  axes = tuple(range(1, positions.ndim))
  length = positions.max(axes, keepdims=True).astype(jnp.float32) + 1
  longer = jnp.maximum(length / config.max_positions, 1.0)
  scale = (factor * longer - (factor - 1)) ** (e / (e - 2))
  powers = jnp.arange(0, e, 2, dtype=jnp.float32) / e
  powers = powers.reshape((1,) * positions.ndim + (-1,))
  return 1.0 / (base * scale[..., None]) ** powers


def _llama3(freq: np.ndarray, scaling: dict) -> np.ndarray:
  """Long wavelengths slowed by `factor`, short kept, smooth in between."""
  low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
  turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
  smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
  slowed = freq / scaling["factor"]
  return ((1 - smooth) * slowed + smooth * freq).astype(np.float32)
