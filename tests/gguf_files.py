"""Small GGUF files as llama.cpp's converter would write them."""

import gguf
import numpy as np

from cacheaug.weights import huggingface, leaves

# Names of a block's tensors in Hugging Face's files and in llama.cpp's; the
# post norms of OLMo-2 and Gemma differ in the first alone.
NAMES = {
  "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k",
  "self_attn.v_proj": "attn_v",
  "self_attn.o_proj": "attn_output",
  "self_attn.q_norm": "attn_q_norm",
  "self_attn.k_norm": "attn_k_norm",
  "mlp.gate_proj": "ffn_gate",
  "mlp.up_proj": "ffn_up",
  "mlp.down_proj": "ffn_down",
  "input_layernorm": "attn_norm",
}
ARCHITECTURES = {"gemma3": "gemma3", "mistral": "llama"}


def permute(weights, heads):
  """llama.cpp's: the two halves of a head become neighbours."""
  halves = weights.reshape(heads, 2, -1, *weights.shape[1:])
  return halves.swapaxes(1, 2).reshape(weights.shape)


def converted(config, name, tensor):
  """(llama.cpp's name, its tensor) of a Hugging Face tensor."""
  if config.family.startswith("gemma") and "norm" in name:
    tensor = tensor + np.float32(1)
  if config.family in ("llama", "mistral", "smollm3"):
    for part, heads in (("q", config.heads), ("k", config.kv_heads)):
      if f"{part}_proj" in name:
        tensor = permute(tensor, heads)
  whole = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
  }
  if name in whole:
    return whole[name], tensor
  _, _, layer, *module, kind = name.split(".")
  names = dict(NAMES)
  if config.post_norms:
    names["post_attention_layernorm"] = "post_attention_norm"
    names["post_feedforward_layernorm"] = "post_ffw_norm"
    names["pre_feedforward_layernorm"] = "ffn_norm"
  else:
    names["post_attention_layernorm"] = "ffn_norm"
  return f"blk.{layer}.{names['.'.join(module)]}.{kind}", tensor


def start(path, config):
  """A writer with the metadata of `config`."""
  architecture = ARCHITECTURES.get(config.family, config.family)
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_name("a tiny one")
  writer.add_license("apache-2.0")
  writer.add_context_length(config.max_positions)
  writer.add_block_count(config.layers)
  writer.add_embedding_length(config.width)
  writer.add_feed_forward_length(config.mlp_width)
  writer.add_head_count(config.heads)
  writer.add_head_count_kv(config.kv_heads)
  writer.add_layer_norm_rms_eps(config.norm_eps)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_rope_dimension_count(config.head_dim)
  writer.add_key_length(config.head_dim)
  writer.add_value_length(config.head_dim)
  writer.add_vocab_size(config.vocab_size)
  if config.window:
    writer.add_sliding_window(config.window)
  if config.attention_softcap:
    writer.add_attn_logit_softcapping(config.attention_softcap)
  if config.final_softcap:
    writer.add_final_logit_softcapping(config.final_softcap)
  scaling = dict(config.rope_scaling)
  if scaling and scaling["rope_type"] in ("linear", "yarn"):
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
    writer.add_rope_scaling_factor(scaling["factor"])
    if scaling["rope_type"] == "yarn":
      length = scaling["original_max_position_embeddings"]
      writer.add_rope_scaling_orig_ctx_len(length)
  return writer


def finish(writer):
  """Writes the file."""
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def write_plain(path, directory, kind="F32", change=lambda writer: None):
  """A Hugging Face directory as a GGUF file; returns its config and tensors."""
  config = huggingface.read_config(directory)
  params = huggingface.load(directory, config, dtype="float32")
  writer = start(path, config)
  flat = leaves.flatten(params)
  for leaf in leaves.leaves_of(config):
    array = np.asarray(flat[leaf.path])
    parts = array if leaf.stacked else array[None]
    for name, part in zip(leaf.names, parts, strict=True):
      stored, tensor = converted(config, name, leaf.theirs(part))
      kinds = gguf.GGMLQuantizationType
      wanted = kinds["F32" if tensor.ndim == 1 else kind]
      data = gguf.quants.quantize(np.ascontiguousarray(tensor), wanted)
      writer.add_tensor(stored, data, raw_dtype=wanted)
  change(writer)
  finish(writer)
  return config, params


# Type -> bytes of a block that hold its float16 scales.
SCALES = {
  "Q8_0": (slice(0, 2),),
  "Q4_0": (slice(0, 2),),
  "Q4_1": (slice(0, 4),),
  "Q5_0": (slice(0, 2),),
  "Q5_1": (slice(0, 4),),
  "Q4_K": (slice(0, 4),),
  "Q5_K": (slice(0, 4),),
  "Q6_K": (slice(208, 210),),
}


def random_blocks(rng, rows, columns, kind):
  """Random quantised rows: every bit pattern but infinite scales."""
  kind = gguf.GGMLQuantizationType[kind]
  if kind.name not in SCALES:
    tensor = rng.standard_normal((rows, columns)).astype(np.float32)
    return gguf.quants.quantize(tensor, kind), kind
  block, size = gguf.GGML_QUANT_SIZES[kind]
  data = rng.integers(0, 256, (rows * columns // block, size), np.uint8)
  for place in SCALES[kind.name]:
    count = (place.stop - place.start) // 2
    scales = rng.standard_normal((len(data), count)).astype(np.float16)
    data[:, place] = scales.view(np.uint8)
  return data.reshape(rows, -1), kind


def write_random(path, config, kinds):
  """A file whose matrices are of `kinds`, one after the other."""
  rng = np.random.default_rng(0)
  writer = start(path, config)
  matrices = 0
  for leaf in leaves.leaves_of(config):
    for name in leaf.names:
      stored, _ = converted(config, name, np.zeros(leaf.tensor_shape))
      if len(leaf.tensor_shape) == 1:
        tensor = rng.standard_normal(leaf.tensor_shape).astype(np.float32)
        writer.add_tensor(stored, tensor)
        continue
      kind = kinds[matrices % len(kinds)]
      matrices += 1
      data, kind = random_blocks(rng, *leaf.tensor_shape, kind)
      writer.add_tensor(stored, data, raw_dtype=kind)
  finish(writer)
