"""config.json to ModelConfig and back, by the table of families.

Entries are understood both as transformers 5 writes them (`rope_parameters`,
`layer_types`) and as before (`rope_theta`, `rope_scaling`,
`sliding_window_pattern`).
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from cacheaug.errors import UserError
from cacheaug.model.config import (
  FAMILIES,
  GLOBAL,
  SLIDING,
  UNROTATED,
  ModelConfig,
)
from cacheaug.weights.families import TABLE, Family

_LAYER_TYPES = {"sliding_attention": SLIDING, "full_attention": GLOBAL}
# Keys whose null means none, where another's means the default.
_NULLS = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
_FIELD_TYPES = {f.name: f.type for f in dataclasses.fields(ModelConfig)}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# RoPE scalings -> keys that must be there, and keys that may.
_ORIGINAL = "original_max_position_embeddings"
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  "linear": (("factor",), ()),
  "dynamic": (("factor",), ()),
  "llama3": (
    ("factor", "high_freq_factor", "low_freq_factor", _ORIGINAL),
    (),
  ),
  "yarn": (
    ("factor", _ORIGINAL),
    (
      "attention_factor",
      "beta_fast",
      "beta_slow",
      "mscale",
      "mscale_all_dim",
      "truncate",
    ),
  ),
}


# --- reading ---------------------------------------------------------------


def config_from_entries(
  entries: Mapping[str, Any], path: pathlib.Path
) -> ModelConfig:
  """ModelConfig of config.json's entries; `path` is for messages.

  Raises:
    UserError: another family, or a feature that is not supported.
  """
  kind = entries.get("model_type")
  if kind == "gemma3":
    text = _mapping(entries, "text_config", path)
    entries = {"model_type": "gemma3_text", **text}
    kind = entries["model_type"]
  by_type = {f.model_type: name for name, f in TABLE.items()}
  if not isinstance(kind, str) or kind not in by_type:
    raise UserError(
      f"{path}: model_type {kind!r} is not supported (supported: "
      f"{', '.join(sorted(by_type))}, gemma3)"
    )
  _refuse(entries, path)
  name = by_type[kind]
  family = TABLE[name]
  present = {k: v for k, v in entries.items() if v is not None or k in _NULLS}
  entries = dict(family.defaults) | present
  heads = _field("heads", entries, "num_attention_heads", path)
  width = _field("width", entries, "hidden_size", path)
  entries.setdefault("num_key_value_heads", heads)
  entries.setdefault("head_dim", width // heads)
  if name == "gemma" and entries["hidden_act"] == "gelu":
    # The first releases' word for the same function; so does transformers.
    entries["hidden_act"] = "gelu_pytorch_tanh"
  fields = {f: _field(f, entries, k, path) for f, k in family.keys.items()}
  kinds = _layer_kinds(entries, fields, name, path)
  scale = fields["head_dim"]
  if entries.get("query_pre_attn_scalar") is not None:
    scale = _number(entries, "query_pre_attn_scalar", path)
  try:
    return ModelConfig(
      **FAMILIES[name]
      | fields
      | _rope(entries, family, fields["max_positions"], kinds, path)
      | dict(
        family=name,
        layer_kinds=kinds,
        query_scale=0.0 if scale == fields["head_dim"] else scale**-0.5,
      )
    )
  except UserError as e:  # of ModelConfig itself, which knows no file
    message = str(e)
    raise e if str(path) in message else UserError(f"{path}: {message}") from e


def _refuse(entries: Mapping[str, Any], path: pathlib.Path) -> None:
  """Features that would silently give other numbers."""
  for key in ("quantization_config", "use_bidirectional_attention"):
    if entries.get(key):
      raise UserError(f"{path}: {key} is not supported; use a plain release")


def _need(entries: Mapping[str, Any], key: str, path: pathlib.Path) -> Any:
  if key not in entries:
    raise UserError(f"{path}: has no {key!r}; is it a model's config.json?")
  return entries[key]


def _number(
  entries: Mapping[str, Any], key: str, path: pathlib.Path
) -> int | float:
  """A number above zero, with its type kept: 4 stays an int, 4.0 a float."""
  value = _need(entries, key, path)
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise UserError(f"{path}: {key} {value!r} is not a number")
  if not 0 < value < math.inf:
    raise UserError(f"{path}: {key} {value!r} must be above 0")
  return value


def _mapping(
  entries: Mapping[str, Any], key: str, path: pathlib.Path
) -> dict[str, Any]:
  """The JSON object under `key`; {} where there is none."""
  value = entries.get(key)
  if value is None:
    return {}
  if not isinstance(value, Mapping):
    raise UserError(f"{path}: {key} {value!r} is not a JSON object")
  return dict(value)


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
  right = isinstance(value, (int, float) if kind is float else kind)
  if not right or isinstance(value, bool) != (kind is bool):
    raise UserError(f"{path}: {key} {value!r} is not of type {kind.__name__}")
  if kind is int and value < 1:
    raise UserError(f"{path}: {key} {value!r} must be 1 or more")
  return kind(value)


def _known(table: Mapping, value: Any, path: pathlib.Path, key: str) -> Any:
  if not isinstance(value, str) or value not in table:
    raise UserError(
      f"{path}: {key} {value!r} is not supported ({', '.join(table)})"
    )
  return table[value]


# --- layers -----------------------------------------------------------------


def _layer_kinds(
  entries: Mapping[str, Any],
  fields: Mapping[str, Any],
  name: str,
  path: pathlib.Path,
) -> tuple[str, ...]:
  """Each layer's attention; the patterns are those before `layer_types`."""
  layers = fields["layers"]
  if name == "mistral":  # all layers or none; transformers reads no more
    kinds = (SLIDING if fields["window"] else GLOBAL,) * layers
  else:
    kinds = _attention_kinds(entries, layers, path)
  if SLIDING in kinds and not fields.get("window"):
    if "window" not in TABLE[name].keys:
      raise UserError(
        f"{path}: has sliding layers (layer_types, sliding_window_pattern), "
        f"which {TABLE[name].model_type} is without"
      )
    raise UserError(f"{path}: has sliding layers but no sliding_window")
  if name == "smollm3":
    rotated = _rotated_layers(entries, layers, path)
    kinds = tuple(
      kind if turns else UNROTATED
      for kind, turns in zip(kinds, rotated, strict=True)
    )
  return kinds


def _attention_kinds(
  entries: Mapping[str, Any], layers: int, path: pathlib.Path
) -> tuple[str, ...]:
  types = entries.get("layer_types")
  if types:
    if not isinstance(types, list) or len(types) != layers:
      raise UserError(
        f"{path}: layer_types must be a list of {layers} (num_hidden_layers)"
      )
    return tuple(
      _known(_LAYER_TYPES, kind, path, "layer_types") for kind in types
    )
  if entries.get("use_sliding_window"):
    first = entries.get("max_window_layers", 0)
    if first:
      first = _number(entries, "max_window_layers", path)
    return tuple(SLIDING if i >= first else GLOBAL for i in range(layers))
  every = 0  # the last of so many is global
  if entries.get("sliding_window_pattern"):
    every = _field("layers", entries, "sliding_window_pattern", path)
  return tuple(
    SLIDING if every and (i + 1) % every else GLOBAL for i in range(layers)
  )


def _rotated_layers(
  entries: Mapping[str, Any], layers: int, path: pathlib.Path
) -> list[bool]:
  """Whether each layer's queries and keys have RoPE (SmolLM3)."""
  flags = entries.get(
    "no_rope_layers"
  )  # 1 where they have it, despite its name
  if not flags:
    every = _field("layers", entries, "no_rope_layer_interval", path)
    return [bool((i + 1) % every) for i in range(layers)]
  if not isinstance(flags, list) or len(flags) < layers:
    raise UserError(
      f"{path}: no_rope_layers must be a list of {layers} (num_hidden_layers)"
    )
  return [bool(flag) for flag in flags[:layers]]


# --- RoPE -------------------------------------------------------------------


def _rope(
  entries: Mapping[str, Any],
  family: Family,
  positions: int,
  kinds: tuple[str, ...],
  path: pathlib.Path,
) -> dict[str, Any]:
  """Bases and scaling, from `rope_parameters` or from the keys before it.

  Where both are there, `rope_scaling` is the one that somebody added by hand,
  and is taken first, as transformers does.
  """
  old = {"rope_theta": entries.get("rope_theta", family.rope_base)}
  new = _mapping(entries, "rope_parameters", path)
  nested = "full_attention" in new or "sliding_attention" in new
  glob = _mapping(new, "full_attention", path) if nested else new
  by_hand = _mapping(entries, "rope_scaling", path)
  glob = old | _with_type(glob) | _with_type(by_hand)
  base = float(_number(glob, "rope_theta", path))
  found = {"rope_base": base, "rope_scaling": _scaling(glob, positions, path)}
  if family.sliding_rope:
    local = {"rope_theta": entries.get("rope_local_base_freq", 10_000.0)}
    local |= _with_type(_mapping(new, "sliding_attention", path))
    if _scaling(local, positions, path):
      raise UserError(f"{path}: rope scaling of sliding layers")
    found["rope_base_sliding"] = float(_number(local, "rope_theta", path))
  elif SLIDING in kinds:
    if found["rope_scaling"]:
      raise UserError(
        f"{path}: rope scaling with sliding layers is not supported for "
        f"{family.model_type}"
      )
    found["rope_base_sliding"] = base
  return found


def _with_type(rope: dict[str, Any]) -> dict[str, Any]:
  """With `rope_type` for what was once called `type`."""
  kind = rope.pop("type", None)
  return (
    rope if rope.get("rope_type") or not kind else {**rope, "rope_type": kind}
  )


def _scaling(
  rope: Mapping[str, Any], positions: int, path: pathlib.Path
) -> tuple[tuple[str, Any], ...]:
  """The items that rope.py needs, sorted; () for none."""
  kind = rope.get("rope_type") or "default"
  if rope.get("partial_rotary_factor") not in (None, 1.0):
    raise UserError(f"{path}: partial_rotary_factor is not supported")
  if kind == "default":
    return ()
  needed, optional = _known(_SCALINGS, kind, path, "rope_type")
  rope = {_ORIGINAL: positions} | {
    k: v for k, v in rope.items() if v is not None
  }
  items = {key: _number(rope, key, path) for key in needed}
  for key in optional:
    if key in rope:
      truncates = key == "truncate" and isinstance(rope[key], bool)
      items[key] = rope[key] if truncates else _number(rope, key, path)
  return tuple(sorted({"rope_type": kind, **items}.items()))


# --- writing ----------------------------------------------------------------


def config_entries(config: ModelConfig) -> dict[str, Any]:
  """config.json's entries, as transformers reads them, of 5 and before.

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
  entries |= _rope_entries(config, family) | _layer_entries(config)
  if "query_pre_attn_scalar" in family.defaults:
    entries["query_pre_attn_scalar"] = _pre_attention_scalar(config)
  entries["model_type"] = family.model_type
  entries["architectures"] = [family.architecture]
  _check_expressed(config, entries)
  return entries


def _rope_entries(config: ModelConfig, family: Family) -> dict[str, Any]:
  """Both spellings: readers before transformers 5 know the second alone."""
  glob = {"rope_theta": config.rope_base, "rope_type": "default"}
  rope = glob | dict(config.rope_scaling)
  scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
  old = {
    "rope_theta": config.rope_base,
    "rope_scaling": scaling if config.rope_scaling else None,
  }
  if not family.sliding_rope:
    return {"rope_parameters": rope, **old}
  local = glob | {"rope_theta": config.rope_base_sliding}
  return {
    "rope_parameters": {"full_attention": rope, "sliding_attention": local},
    "rope_local_base_freq": config.rope_base_sliding,
    **old,
  }


def _layer_entries(config: ModelConfig) -> dict[str, Any]:
  types = {ours: theirs for theirs, ours in _LAYER_TYPES.items()}
  types[UNROTATED] = types[GLOBAL]
  entries: dict[str, Any] = {}
  if config.family not in ("llama", "gemma", "mistral", "olmo2"):
    entries["layer_types"] = [types[kind] for kind in config.layer_kinds]
  if config.family in ("qwen2", "qwen3"):
    entries["use_sliding_window"] = SLIDING in config.layer_kinds
  if config.family == "smollm3":
    turned = [int(kind != UNROTATED) for kind in config.layer_kinds]
    entries["no_rope_layers"] = turned
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
