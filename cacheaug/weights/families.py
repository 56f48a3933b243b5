"""The families: what is particular to each, in one table.

`TABLE` says how the config.json and the tensors of a family are called;
config_json.py reads and writes the one by it, leaves.py the other.

Reference: transformers' configuration_*.py and modeling_*.py of the families.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
  """What config.json and the tensors of one family look like.

  Attributes:
    model_type: config.json's name of the family.
    architecture: transformers' class.
    norms: our norm of a block -> Hugging Face's.
    keys: ModelConfig field -> key of config.json.
    defaults: what transformers takes for keys that are absent.
    rope_base: its default, of global layers.
    sliding_rope: whether sliding layers have a RoPE base of their own.
    prefixes: what may stand before 'embed_tokens' and 'layers'; the first is
      written.
    ignored: prefixes of tensors that are no part of the text decoder.
  """

  model_type: str
  architecture: str
  norms: Mapping[str, str]
  keys: Mapping[str, str]
  defaults: Mapping[str, Any]
  rope_base: float
  sliding_rope: bool = False
  prefixes: tuple[str, ...] = ("model.",)
  ignored: tuple[str, ...] = ()


_POST = {
  "attention_post_norm": "post_attention_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_SANDWICH = {
  "attention_norm": "input_layernorm",
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_PRE = {
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
}
_KEYS = {
  "vocab_size": "vocab_size",
  "width": "hidden_size",
  "layers": "num_hidden_layers",
  "heads": "num_attention_heads",
  "kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "mlp_width": "intermediate_size",
  "max_positions": "max_position_embeddings",
  "norm_eps": "rms_norm_eps",
  "tied_head": "tie_word_embeddings",
  "attention_bias": "attention_bias",
}
_WINDOW = {"window": "sliding_window"}
_LLAMA_KEYS = _KEYS | {"activation": "hidden_act"}
_GEMMA_KEYS = _KEYS | {
  "window": "sliding_window",
  "final_softcap": "final_logit_softcapping",
  "activation": "hidden_activation",
}
_GEMMA_DEFAULTS = dict(
  num_attention_heads=8,
  num_key_value_heads=4,
  head_dim=256,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
  attention_bias=False,
  sliding_window=4096,
  hidden_activation="gelu_pytorch_tanh",
  query_pre_attn_scalar=256,
)


def _without(keys: Mapping[str, str], field: str) -> dict[str, str]:
  """A family's keys, of which its config.json has no such field."""
  return {k: v for k, v in keys.items() if k != field}


_LLAMA_DEFAULTS = dict(
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  attention_bias=False,
  mlp_bias=False,
  hidden_act="silu",
)

TABLE = {
  "gemma": Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    norms=_PRE,
    keys=_LLAMA_KEYS,
    defaults=dict(
      vocab_size=256_000,
      max_position_embeddings=8192,
      head_dim=256,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      attention_bias=False,
      hidden_act="gelu_pytorch_tanh",
    ),
    rope_base=10_000.0,
  ),
  "gemma2": Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    norms=_SANDWICH,
    keys=_GEMMA_KEYS | {"attention_softcap": "attn_logit_softcapping"},
    defaults=_GEMMA_DEFAULTS
    | dict(
      vocab_size=256_000,
      max_position_embeddings=8192,
      attn_logit_softcapping=50.0,
      sliding_window_pattern=2,
      final_logit_softcapping=30.0,
    ),
    rope_base=10_000.0,
  ),
  "gemma3": Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    norms=_SANDWICH,
    keys=_GEMMA_KEYS,
    defaults=_GEMMA_DEFAULTS
    | dict(
      vocab_size=262_208,
      max_position_embeddings=131_072,
      final_logit_softcapping=None,
      sliding_window_pattern=6,
    ),
    rope_base=1_000_000.0,
    sliding_rope=True,
    # The larger ones are image-text models, of which this is the text half.
    prefixes=(
      "model.",
      "model.language_model.",
      "language_model.model.",
    ),
    ignored=(
      "vision_tower.",
      "multi_modal_projector.",
      "model.vision_tower.",
      "model.multi_modal_projector.",
    ),
  ),
  "llama": Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    norms=_PRE,
    keys=_LLAMA_KEYS | {"mlp_bias": "mlp_bias"},
    defaults=_LLAMA_DEFAULTS
    | dict(vocab_size=32_000, max_position_embeddings=2048),
    rope_base=10_000.0,
  ),
  "mistral": Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    norms=_PRE,
    keys=_without(_LLAMA_KEYS | _WINDOW, "attention_bias"),
    defaults=_LLAMA_DEFAULTS
    | dict(
      vocab_size=32_000,
      max_position_embeddings=131_072,
      num_key_value_heads=8,
      sliding_window=4096,
    ),
    rope_base=10_000.0,
  ),
  "olmo2": Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    norms=_POST,
    keys=_LLAMA_KEYS,
    defaults=_LLAMA_DEFAULTS
    | dict(vocab_size=50_304, max_position_embeddings=2048, rms_norm_eps=1e-5),
    rope_base=10_000.0,
  ),
  "qwen2": Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    norms=_PRE,
    keys=_without(_LLAMA_KEYS | _WINDOW, "attention_bias"),
    defaults=_LLAMA_DEFAULTS
    | dict(
      vocab_size=151_936,
      max_position_embeddings=32_768,
      num_key_value_heads=32,
      sliding_window=4096,
      max_window_layers=28,
    ),
    rope_base=10_000.0,
  ),
  "qwen3": Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    norms=_PRE,
    keys=_LLAMA_KEYS | _WINDOW,
    defaults=_LLAMA_DEFAULTS
    | dict(
      vocab_size=151_936,
      max_position_embeddings=32_768,
      head_dim=128,
      sliding_window=None,
      max_window_layers=28,
    ),
    rope_base=10_000.0,
  ),
  "smollm3": Family(
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    norms=_PRE,
    keys=_LLAMA_KEYS | {"mlp_bias": "mlp_bias"},
    defaults=_LLAMA_DEFAULTS
    | dict(
      vocab_size=128_256,
      max_position_embeddings=32_768,
      num_key_value_heads=4,
      tie_word_embeddings=True,
      no_rope_layer_interval=4,
    ),
    rope_base=2_000_000.0,
  ),
}


# --- names ------------------------------------------------------------------


def tensor_name(path: str, family: Family) -> str:
  """Leaf path -> Hugging Face's name, with {} where the layer goes."""
  whole = {
    "embedder/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
  }
  if path in whole:
    return whole[path]
  _, *modules, leaf = path.split("/")
  kind = "bias" if leaf == "bias" else "weight"
  if modules[0] in family.norms:
    return f"model.layers.{{}}.{family.norms[modules[0]]}.{kind}"
  part, name = modules
  part = {"attention": "self_attn", "mlp": "mlp"}[part]
  name = name if name.endswith("norm") else f"{name}_proj"
  return f"model.layers.{{}}.{part}.{name}.{kind}"


def tensor_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape of the tensor that holds one layer's leaf of `shape`.

  A kernel is [in..., out...] here and [out, in] there; a bias [out...] is
  flattened; embeddings and scales are alike.
  """
  if path.endswith("/bias"):
    return (math.prod(shape),)
  if not path.endswith("/kernel"):
    return shape
  split = len(shape) - 1 if path.endswith("/o/kernel") else 1
  return (math.prod(shape[split:]), math.prod(shape[:split]))
