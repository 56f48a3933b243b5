"""ModelConfig: one architecture, by flags, for every supported family."""

import dataclasses
import math
from typing import Any

from cacheaug.errors import UserError

# A layer's attention: within a window, over everything, or over everything
# with queries and keys that RoPE does not rotate.
SLIDING = "sliding"
GLOBAL = "global"
UNROTATED = "unrotated"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shapes and switches of a decoder (axis letters: V D L H K E F).

  The defaults are Gemma-2's switches; `FAMILIES` holds the other families'.
  `layer_kinds` names each layer's attention, of SLIDING, GLOBAL and UNROTATED.
  """

  family: str = "gemma2"
  vocab_size: int = 260  # V
  width: int = 64  # D
  layers: int = 2  # L
  heads: int = 4  # H
  kv_heads: int = 2  # K
  head_dim: int = 16  # E
  mlp_width: int = 256  # F
  max_positions: int = 8192
  window: int = 4096  # sliding layers see keys less than this many back
  layer_kinds: tuple[str, ...] = ()  # () repeats the family's pattern
  rope_base: float = 10_000.0
  rope_base_sliding: float = 10_000.0
  rope_scaling: tuple[tuple[str, Any], ...] = ()  # global layers only
  query_scale: float = 0.0  # 0 means head_dim ** -0.5
  attention_softcap: float = 50.0  # 0 means none
  final_softcap: float = 30.0  # 0 means none
  norm_eps: float = 1e-6
  norm_offset: float = 1.0  # RMSNorm multiplies by offset + scale
  pre_norms: bool = True  # a norm before each sublayer
  post_norms: bool = True  # a norm after each sublayer too
  qk_norm: bool = False  # RMSNorm of queries and keys over E
  qk_norm_joint: bool = False  # of all heads together, over H E and K E
  scale_embeddings: bool = True  # multiply token embeddings by sqrt(D)
  tied_head: bool = True
  attention_bias: bool = False  # of queries, keys, values and output
  qkv_bias: bool = False  # of queries, keys and values alone
  mlp_bias: bool = False
  activation: str = "gelu_tanh"  # or "silu"

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise UserError(
        f"decoder family {self.family!r} is not one of "
        f"{', '.join(sorted(FAMILIES))}"
      )
    if self.heads % self.kv_heads:
      raise UserError(
        f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}"
      )
    if self.head_dim % 2:
      raise UserError(f"head_dim={self.head_dim} must be even for RoPE")
    if not self.layer_kinds:
      pattern = LAYER_PATTERNS[self.family]
      kinds = (pattern * (self.layers // len(pattern) + 1))[: self.layers]
      object.__setattr__(self, "layer_kinds", kinds)
    if len(self.layer_kinds) != self.layers:
      raise UserError(
        f"layer_kinds names {len(self.layer_kinds)} layers, "
        f"layers={self.layers}"
      )
    if {SLIDING, UNROTATED} <= set(self.layer_kinds):
      raise UserError(
        "layer_kinds has sliding layers and layers without RoPE: one decoder "
        "may have one of the two"
      )

  @property
  def other_layers(self) -> tuple[bool, ...]:
    """Which layers are not GLOBAL: they have a RoPE of their own, or none."""
    return tuple(kind != GLOBAL for kind in self.layer_kinds)

  @property
  def decoding_window(self) -> int | None:
    """The window of sliding layers; None where no layer slides."""
    return self.window if SLIDING in self.layer_kinds else None

  @property
  def longest_context(self) -> int:
    """The positions that RoPE's scaling makes of `max_positions`.

    'yarn' and 'dynamic' stretch a decoder's positions while it generates;
    training keeps to `max_positions`.
    """
    scaling = dict(self.rope_scaling)
    kind, factor = scaling.get("rope_type"), scaling.get("factor", 1.0)
    if kind == "dynamic":
      return int(self.max_positions * factor)
    if kind == "yarn":
      stretched = scaling["original_max_position_embeddings"] * factor
      return max(self.max_positions, int(stretched))
    return self.max_positions

  @property
  def attention_scale(self) -> float:
    """What queries are multiplied by."""
    return self.query_scale or self.head_dim**-0.5

  @property
  def embedding_scale(self) -> float:
    """What token embeddings are multiplied by."""
    return math.sqrt(self.width) if self.scale_embeddings else 1.0


# Which layers slide, repeated over the depth (transformers' layer_types).
LAYER_PATTERNS = {
  "gemma": (GLOBAL,),
  "gemma2": (SLIDING, GLOBAL),
  "gemma3": (SLIDING,) * 5 + (GLOBAL,),
  "llama": (GLOBAL,),
  "mistral": (GLOBAL,),
  "olmo2": (GLOBAL,),
  "qwen2": (GLOBAL,),
  "qwen3": (GLOBAL,),
  "smollm3": (GLOBAL,) * 3 + (UNROTATED,),
}

_LLAMA_LIKE = dict(
  attention_softcap=0.0,
  final_softcap=0.0,
  norm_offset=0.0,
  post_norms=False,
  scale_embeddings=False,
  activation="silu",
  window=0,
)

# The switches in which each family differs from Gemma-2.
FAMILIES: dict[str, dict[str, Any]] = {
  "gemma": dict(
    attention_softcap=0.0, final_softcap=0.0, post_norms=False, window=0
  ),
  "gemma2": {},
  "gemma3": dict(
    attention_softcap=0.0,
    final_softcap=0.0,
    qk_norm=True,
    rope_base=1_000_000.0,
    window=512,
  ),
  "llama": dict(_LLAMA_LIKE, norm_eps=1e-5, rope_base=500_000.0),
  "mistral": dict(_LLAMA_LIKE, norm_eps=1e-5),
  "olmo2": dict(
    _LLAMA_LIKE,
    pre_norms=False,
    post_norms=True,
    qk_norm=True,
    qk_norm_joint=True,
    rope_base=500_000.0,
  ),
  "qwen2": dict(_LLAMA_LIKE, qkv_bias=True, rope_base=1_000_000.0),
  "qwen3": dict(_LLAMA_LIKE, qk_norm=True, rope_base=1_000_000.0),
  "smollm3": dict(_LLAMA_LIKE, rope_base=2_000_000.0),
}


def make(family: str, **shapes: Any) -> ModelConfig:
  """A family's ModelConfig with the given shapes.

  Raises:
    UserError: an unknown family or key, or values that cannot be.
  """
  if family not in FAMILIES:
    raise UserError(
      f"decoder family {family!r} is not one of {', '.join(sorted(FAMILIES))}"
    )
  known = {f.name for f in dataclasses.fields(ModelConfig)}
  unknown = sorted(set(shapes) - known)
  if unknown:
    raise UserError(f"unknown model key {unknown[0]!r}; known: {sorted(known)}")
  return ModelConfig(**{"family": family, **FAMILIES[family], **shapes})
