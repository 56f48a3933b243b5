"""The families: their config.json, their tensors' names, in one table.

`TABLE` holds what is particular to each; all else here is the same for all.
Entries are understood both as transformers 5 writes them (`rope_parameters`,
`layer_types`) and as before (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`).

Reference: transformers' configuration_*.py and modeling_*.py of the families.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from cacheaug.errors import UserError
from cacheaug.model.config import FAMILIES, GLOBAL, SLIDING, ModelConfig

_LAYER_TYPES = {"sliding_attention": SLIDING, "full_attention": GLOBAL}
# Keys whose null means none, where another's means the default.
_NULLS = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
_FIELD_TYPES = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALINGS = {
  "linear": ("factor",),
  "llama3": (
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
  ),
}


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
_LLAMA_DEFAULTS = dict(
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  attention_bias=False,
  mlp_bias=False,
  hidden_act="silu",
)

TABLE = {
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
    keys=_KEYS | {"activation": "hidden_act", "mlp_bias": "mlp_bias"},
    defaults=_LLAMA_DEFAULTS
    | dict(vocab_size=32_000, max_position_embeddings=2048),
    rope_base=10_000.0,
  ),
  "qwen3": Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    norms=_PRE,
    keys=_KEYS | {"activation": "hidden_act", "window": "sliding_window"},
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
}


def config_from_entries(
  entries: Mapping[str, Any], path: pathlib.Path
) -> ModelConfig:
  """ModelConfig of config.json's entries; `path` is for messages.

  Raises:
    UserError: another family, or a feature that is not supported.
  """
  kind = entries.get("model_type")
  if kind == "gemma3":
    entries = {"model_type": "gemma3_text", **entries.get("text_config", {})}
    kind = entries["model_type"]
  by_type = {f.model_type: name for name, f in TABLE.items()}
  if kind not in by_type:
    raise UserError(
      f"{path}: model_type {kind!r} is not supported (supported: "
      f"{', '.join(sorted(by_type))}, gemma3)"
    )
  _refuse(entries, path)
  name = by_type[kind]
  family = TABLE[name]
  given = {k: v for k, v in entries.items() if v is not None or k in _NULLS}
  entries = dict(family.defaults) | given
  heads = _field("heads", entries, "num_attention_heads", path)
  width = _field("width", entries, "hidden_size", path)
  entries.setdefault("num_key_value_heads", heads)
  entries.setdefault("head_dim", width // heads)
  fields = {f: _field(f, entries, k, path) for f, k in family.keys.items()}
  kinds = _layer_kinds(entries, fields["layers"], name, path)
  if SLIDING in kinds and not fields["window"]:
    raise UserError(f"{path}: has sliding layers but no sliding_window")
  scale = entries.get("query_pre_attn_scalar", fields["head_dim"])
  return ModelConfig(
    **FAMILIES[name]
    | fields
    | _rope(entries, family, SLIDING in kinds, path)
    | dict(
      family=name,
      layer_kinds=kinds,
      query_scale=0.0 if scale == fields["head_dim"] else scale**-0.5,
    )
  )


def _refuse(entries: Mapping[str, Any], path: pathlib.Path) -> None:
  """Features that would silently give other numbers."""
  for key in ("quantization_config", "use_bidirectional_attention"):
    if entries.get(key):
      raise UserError(f"{path}: {key} is not supported; use a plain release")


def _need(entries: Mapping[str, Any], key: str, path: pathlib.Path) -> Any:
  if key not in entries:
    raise UserError(f"{path}: has no {key!r}; is it a model's config.json?")
  return entries[key]


def _field(
  field: str, entries: Mapping[str, Any], key: str, path: pathlib.Path
) -> Any:
  """The value of a ModelConfig field, of the field's own type."""
  value = _need(entries, key, path)
  if field == "activation":
    return _known(_ACTIVATIONS, value, path, key)
  kind = _FIELD_TYPES[field]
  if value is None and key in _NULLS:
    return kind()  # zero: none
  if not isinstance(value, (int, float) if kind is float else kind):
    raise UserError(f"{path}: {key} {value!r} is not of type {kind.__name__}")
  if kind is int and value < 1:
    raise UserError(f"{path}: {key} {value!r} must be 1 or more")
  return kind(value)


def _known(table: Mapping, value: Any, path: pathlib.Path, key: str) -> Any:
  if value not in table:
    raise UserError(
      f"{path}: {key} {value!r} is not supported ({', '.join(table)})"
    )
  return table[value]


def _layer_kinds(
  entries: Mapping[str, Any], layers: int, name: str, path: pathlib.Path
) -> tuple[str, ...]:
  """Each layer's attention; the patterns are those before `layer_types`."""
  if entries.get("layer_types"):
    return tuple(
      _known(_LAYER_TYPES, kind, path, "layer_types")
      for kind in entries["layer_types"]
    )
  if name == "qwen3" and entries.get("use_sliding_window"):
    first = entries["max_window_layers"]
    return tuple(SLIDING if i >= first else GLOBAL for i in range(layers))
  every = entries.get("sliding_window_pattern")  # the last of so many is global
  return tuple(
    SLIDING if every and (i + 1) % every else GLOBAL for i in range(layers)
  )


def _rope(
  entries: Mapping[str, Any], family: Family, slides: bool, path: pathlib.Path
) -> dict[str, Any]:
  """Bases and scaling, from `rope_parameters` or from the keys before it."""
  old = {"rope_theta": entries.get("rope_theta", family.rope_base)}
  new = entries.get("rope_parameters") or {}
  glob = new.get("full_attention", {} if "sliding_attention" in new else new)
  glob = old | (entries.get("rope_scaling") or {}) | glob
  base = float(glob["rope_theta"])
  found = {"rope_base": base, "rope_scaling": _scaling(glob, path)}
  if family.sliding_rope:
    local = {"rope_theta": entries.get("rope_local_base_freq", 10_000.0)}
    local |= new.get("sliding_attention", {})
    if _scaling(local, path):
      raise UserError(f"{path}: rope scaling of sliding layers")
    found["rope_base_sliding"] = float(local["rope_theta"])
  elif slides:
    if found["rope_scaling"]:
      raise UserError(
        f"{path}: rope scaling with sliding layers is not supported for "
        f"{family.model_type}"
      )
    found["rope_base_sliding"] = base
  return found


def _scaling(rope: Mapping[str, Any], path: pathlib.Path) -> tuple:
  """The items that rope.py needs, sorted; () for none."""
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor", 1.0) != 1.0:
    raise UserError(f"{path}: partial_rotary_factor is not supported")
  if kind == "default":
    return ()
  keys = _known(_SCALINGS, kind, path, "rope_type")
  items = {key: _need(rope, key, path) for key in keys}
  return tuple(sorted({"rope_type": kind, **items}.items()))


def config_entries(config: ModelConfig) -> dict[str, Any]:
  """config.json's entries, as transformers reads them.

  Raises:
    UserError: `config` has a switch that its family cannot express.
  """
  family = TABLE[config.family]
  entries = {k: getattr(config, f) for f, k in family.keys.items()}
  activations = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
  key = family.keys["activation"]
  entries[key] = activations[entries[key]]
  for key in family.keys.values():
    if key in _NULLS:
      entries[key] = entries[key] or None
  types = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
  glob = {"rope_theta": config.rope_base, "rope_type": "default"}
  entries["rope_parameters"] = rope = glob | dict(config.rope_scaling)
  if family.sliding_rope:
    local = glob | {"rope_theta": config.rope_base_sliding}
    entries["rope_parameters"] = {
      "full_attention": rope,
      "sliding_attention": local,
    }
  if config.family != "llama":
    entries["layer_types"] = [types[kind] for kind in config.layer_kinds]
  if config.family == "qwen3":
    entries["use_sliding_window"] = SLIDING in config.layer_kinds
  if "query_pre_attn_scalar" in family.defaults:
    entries["query_pre_attn_scalar"] = _pre_attention_scalar(config)
  entries["model_type"] = family.model_type
  entries["architectures"] = [family.architecture]
  _check_expressed(config, entries)
  return entries


def _pre_attention_scalar(config: ModelConfig) -> float | int:
  if not config.query_scale:
    return config.head_dim
  scalar = config.query_scale**-2
  # transformers wants an integer, which two powers may miss by a rounding.
  return round(scalar) if math.isclose(scalar, round(scalar)) else scalar


def _check_expressed(config: ModelConfig, entries: Mapping[str, Any]) -> None:
  """What is written must be read back as the same model."""
  back = config_from_entries(entries, pathlib.Path("config.json"))
  for field in dataclasses.fields(ModelConfig):
    ours, read = getattr(config, field.name), getattr(back, field.name)
    if ours == read:
      continue
    unused = field.name in ("window", "rope_base_sliding")
    if unused and SLIDING not in config.layer_kinds:
      continue
    raise UserError(
      f"decoder shape {field.name}={ours!r} cannot be written as a "
      f"{config.family} model, which has {read!r}"
    )


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
