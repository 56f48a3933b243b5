"""GGUF files, the format of llama.cpp: config and weights, dequantised.

What a file says of the decoder's shape is turned into the entries of a
config.json and read as one. Weights are what transformers reads from the same
file, bit for bit: the `gguf` library dequantises to float32, and what
llama.cpp's converter changed is changed back.

Source: llama.cpp's convert_hf_to_gguf.py and src/llama-model.cpp, transformers'
modeling_gguf_pytorch_utils.py. Where transformers reads less of the metadata
than llama.cpp (RoPE scaling, Qwen3's head size), llama.cpp is followed.
"""

import collections
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cacheaug.data import gguf_metadata
from cacheaug.data.gguf_metadata import TensorEntry
from cacheaug.errors import UserError
from cacheaug.model import rope_scaling
from cacheaug.model.config import ModelConfig
from cacheaug.model.transformer import Params
from cacheaug.weights import config_json, leaves

SUFFIX = ".gguf"
_HINT = "is it a whole file of a text decoder?"
# general.architecture -> model_type. Mistral's files are 'llama' ones.
_ARCHITECTURES = {
  "gemma": "gemma",
  "gemma2": "gemma2",
  "gemma3": "gemma3_text",
  "llama": "llama",
  "olmo2": "olmo2",
  "qwen2": "qwen2",
  "qwen3": "qwen3",
  "smollm3": "smollm3",
}
# Key of the metadata, after the architecture -> key of config.json.
_KEYS = {
  "context_length": "max_position_embeddings",
  "block_count": "num_hidden_layers",
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "attention.key_length": "head_dim",
  "attention.sliding_window": "sliding_window",
  "attention.sliding_window_pattern": "sliding_window_pattern",
  "attn_logit_softcapping": "attn_logit_softcapping",
  "final_logit_softcapping": "final_logit_softcapping",
  "rope.freq_base": "rope_theta",
  "rope.freq_base_swa": "rope_local_base_freq",
}
_SCALING_KEYS = {
  "factor": "factor",
  "original_context_length": "original_max_position_embeddings",
  "yarn_beta_fast": "beta_fast",
  "yarn_beta_slow": "beta_slow",
}
# (architecture, layers) of 27B, whose queries are scaled by (D / H) ** -0.5.
_SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
# Our part of a block -> llama.cpp's.
_PARTS = {
  "attention_norm": "attn_norm",
  "attention_post_norm": "post_attention_norm",
  "mlp_norm": "ffn_norm",
  "mlp_post_norm": "post_ffw_norm",
  "attention/q": "attn_q",
  "attention/k": "attn_k",
  "attention/v": "attn_v",
  "attention/o": "attn_output",
  "attention/q_norm": "attn_q_norm",
  "attention/k_norm": "attn_k_norm",
  "mlp/gate": "ffn_gate",
  "mlp/up": "ffn_up",
  "mlp/down": "ffn_down",
}
_WHOLE = {
  "embedder/embedding": "token_embd.weight",
  "final_norm/scale": "output_norm.weight",
  "head/kernel": "output.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"
_PLAIN = ("F32", "F16", "BF16", "F64")
# Factors of Llama 3.1 and 3.2, whose files hold the frequencies alone.
_LLAMA3_FACTORS = (8.0, 32.0)


@dataclasses.dataclass(frozen=True)
class _File:
  """What stands before the tensors' data."""

  path: pathlib.Path
  architecture: str
  metadata: Mapping[str, Any]
  tensors: Mapping[str, TensorEntry]

  def get(self, key: str) -> Any:
    """The architecture's own value under `key`, or None."""
    value = self.metadata.get(f"{self.architecture}.{key}")
    return _short(value) if isinstance(value, float) else value


def _short(value: float) -> float:
  """A float32 as the shortest decimal that gives it: 1e-06, not 9.99e-07."""
  return float(str(np.float32(value)))


def is_gguf(path: str | pathlib.Path) -> bool:
  """Whether `path` names a GGUF file."""
  return pathlib.Path(path).suffix.lower() == SUFFIX


def _open(path: str | pathlib.Path) -> _File:
  path = pathlib.Path(path)
  metadata, tensors = gguf_metadata.read_all(path)
  architecture = metadata.get("general.architecture")
  if architecture not in _ARCHITECTURES:
    raise UserError(
      f"{path}: architecture {architecture!r} is not supported (supported: "
      f"{', '.join(_ARCHITECTURES)})"
    )
  if metadata.get("split.count", 1) > 1:
    raise UserError(
      f"{path}: one part of {metadata['split.count']}: join them first, with "
      "llama.cpp's `llama-gguf-split --merge`"
    )
  return _File(path, architecture, metadata, tensors)


# --- config -----------------------------------------------------------------


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """ModelConfig of a GGUF file's metadata.

  Raises:
    UserError: not a GGUF file, another architecture, or a feature that is not
      supported.
  """
  file = _open(path)
  config = config_json.config_from_entries(_entries(file), file.path)
  return _with_rope_factors(file, config)


def _entries(file: _File) -> dict[str, Any]:
  """The metadata as a config.json has it."""
  entries: dict[str, Any] = {
    "model_type": _ARCHITECTURES[file.architecture],
    "tie_word_embeddings": "output.weight" not in file.tensors,
    "attention_bias": "blk.0.attn_output.bias" in file.tensors,
    "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
  }
  for key, name in _KEYS.items():
    value = file.get(key)
    if isinstance(value, (list, np.ndarray)):
      if len(set(value)) != 1:
        raise UserError(
          f"{file.path}: {key} differs by layer, which is not supported"
        )
      value = value[0].item() if isinstance(value, np.ndarray) else value[0]
    if value is None:
      continue
    if not isinstance(value, (int, float)) or value < 0:
      raise UserError(
        f"{file.path}: {file.architecture}.{key} {value!r} is not a number of "
        "0 or more"
      )
    entries[name] = value
  if file.get("expert_count"):
    raise UserError(f"{file.path}: mixtures of experts are not supported")
  if "token_embd.weight" in file.tensors:
    entries["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
  if "hidden_size" in entries and entries.get("num_attention_heads"):
    per_head = entries["hidden_size"] // entries["num_attention_heads"]
    entries.setdefault("head_dim", file.get("rope.dimension_count") or per_head)
    entries["query_pre_attn_scalar"] = entries["head_dim"]
    shape = file.architecture, entries.get("num_hidden_layers")
    if shape in _SCALED_BY_WIDTH:
      entries["query_pre_attn_scalar"] = per_head
  turned = file.get("rope.dimension_count") or entries.get("head_dim")
  if turned != entries.get("head_dim"):
    raise UserError(
      f"{file.path}: RoPE of {turned} of {entries['head_dim']} dimensions is "
      "not supported"
    )
  return entries | _scaling(file)


def _scaling(file: _File) -> dict[str, Any]:
  """config.json's rope_scaling, as an entry; {} for none."""
  kind = file.get("rope.scaling.type")
  if kind in (None, "none"):
    return {}
  scaling = {"rope_type": kind}
  for key, name in _SCALING_KEYS.items():
    value = file.get(f"rope.scaling.{key}")
    if value is not None:
      scaling[name] = value
  # llama.cpp multiplies the paper's factor of cosines and sines by this one.
  extra = file.get("rope.scaling.attn_factor")
  if extra is not None and kind == "yarn":
    paper = 0.1 * math.log(scaling.get("factor", 1.0)) + 1.0
    scaling["attention_factor"] = extra * paper
  return {"rope_scaling": scaling}


def _with_rope_factors(file: _File, config: ModelConfig) -> ModelConfig:
  """With Llama 3's scaling, which a file holds as a divisor a frequency.

  Raises:
    UserError: divisors that no scaling known here gives.
  """
  entry = file.tensors.get(_ROPE_FACTORS)
  if entry is None:
    return config
  divisors = _read(file, _ROPE_FACTORS)
  plain = rope_scaling.frequencies(dataclasses.replace(config, rope_scaling=()))
  for factor in _LLAMA3_FACTORS:
    scaling = dict(
      factor=factor,
      high_freq_factor=4.0,
      low_freq_factor=1.0,
      original_max_position_embeddings=8192,
      rope_type="llama3",
    )
    scaled = dataclasses.replace(
      config, rope_scaling=tuple(sorted(scaling.items()))
    )
    if np.allclose(
      plain / rope_scaling.frequencies(scaled), divisors, rtol=1e-3
    ):
      return scaled
  raise UserError(
    f"{file.path}: {_ROPE_FACTORS} holds RoPE divisors that are not Llama "
    "3's, which is not supported"
  )


# --- weights ----------------------------------------------------------------


def load(
  path: str | pathlib.Path,
  config: ModelConfig,
  *,
  dtype: Any,
  shardings: Params | None = None,
) -> Params:
  """A decoder's parameters, dequantised; arguments as of `pretrained.load`.

  One tensor at a time is in host memory as float32.

  Raises:
    UserError: tensors that are missing, misshapen, cut off, or of a
      quantisation that the `gguf` library does not know.
  """
  file = _open(path)
  leaf_list = leaves.leaves_of(config)
  where, wanted = {}, {}
  for leaf in leaf_list:
    for layer, name in enumerate(leaf.names):
      stored = _tensor_name(leaf.path, layer)
      undo = _undo(file.architecture, leaf.path, config)
      where[name] = (stored, undo)
      wanted[stored] = leaf.tensor_shape
  ignored = (_ROPE_FACTORS, ".attn_rot_embd.weight")
  found = {
    name: entry.shape
    for name, entry in file.tensors.items()
    if not name.endswith(ignored)
  }
  leaves.check_shapes(
    file.path, wanted, found, wants="the metadata wants", hint=_HINT
  )

  def read(stored: str, undo: Callable[[np.ndarray], np.ndarray] | None):
    tensor = _read(file, stored)
    return tensor if undo is None else undo(tensor)

  return leaves.read_leaves(leaf_list, where, dtype, shardings, read)


def _tensor_name(path: str, layer: int) -> str:
  """Our leaf's path -> llama.cpp's name of one layer's tensor."""
  if path in _WHOLE:
    return _WHOLE[path]
  part, _, leaf = path.removeprefix("blocks/").rpartition("/")
  kind = "bias" if leaf == "bias" else "weight"
  return f"blk.{layer}.{_PARTS[part]}.{kind}"


def _undo(
  architecture: str, path: str, config: ModelConfig
) -> Callable[[np.ndarray], np.ndarray] | None:
  """What turns llama.cpp's tensor into Hugging Face's; None for nothing."""
  if architecture.startswith("gemma") and path.endswith("/scale"):
    return lambda tensor: tensor - 1
  heads = {"q": config.heads, "k": config.kv_heads}
  part = path.removeprefix("blocks/attention/").partition("/")[0]
  if architecture in ("llama", "smollm3") and part in heads:
    # llama.cpp's RoPE turns neighbours, ours the two halves of a head.
    def halves(tensor: np.ndarray) -> np.ndarray:
      pairs = tensor.reshape(heads[part], -1, 2, *tensor.shape[1:])
      return pairs.swapaxes(2, 1).reshape(tensor.shape)

    return halves
  return None


def _read(file: _File, name: str) -> np.ndarray:
  """One tensor, dequantised to float32."""
  library = _library()
  entry = file.tensors[name]
  try:
    kind = library.GGMLQuantizationType(entry.kind)
    block, size = library.GGML_QUANT_SIZES[kind]
  except (ValueError, KeyError) as e:
    raise UserError(
      f"{file.path}: {name} is of type {entry.kind}, which the gguf library "
      "does not know: update it, or take another quantisation"
    ) from e
  *rows, columns = entry.shape
  if columns % block:
    raise UserError(
      f"{file.path}: {name} has rows of {columns}, not a multiple of "
      f"{kind.name}'s {block}: download the file again"
    )
  shape = (*rows, columns // block * size)
  raw = np.fromfile(
    file.path, np.uint8, count=math.prod(shape), offset=entry.offset
  )
  if raw.size != math.prod(shape):
    raise UserError(f"{file.path}: cut off within {name}: download it again")
  try:
    return library.dequantize(raw.reshape(shape), kind)
  except NotImplementedError as e:
    raise UserError(
      f"{file.path}: {name} is {kind.name}, which the gguf library cannot "
      "dequantise: take another quantisation"
    ) from e


def _library():
  try:
    import gguf
  except ImportError as e:
    raise UserError(
      "GGUF files need the gguf library: pip install 'cacheaug[gguf]'"
    ) from e
  return gguf


# --- what else a file says --------------------------------------------------


def quantisation(path: str | pathlib.Path) -> str:
  """The types of the quantised tensors, most frequent first; '' for none."""
  library = _library()
  kinds = [
    library.GGMLQuantizationType(entry.kind).name
    for entry in _open(path).tensors.values()
  ]
  counts = collections.Counter(kind for kind in kinds if kind not in _PLAIN)
  return ", ".join(kind for kind, _ in counts.most_common())


def licence(path: str | pathlib.Path) -> str:
  """What the file says of its licence; '' for nothing."""
  return str(_open(path).metadata.get("general.license", ""))


def stop_ids(path: str | pathlib.Path) -> tuple[int, ...]:
  """Ids of the tokens that end a text, a turn or a message."""
  metadata = _open(path).metadata
  found = {
    int(metadata[key])
    for key in (
      f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")
    )
    if key in metadata
  }
  return tuple(sorted(found))
