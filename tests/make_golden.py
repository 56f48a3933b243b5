"""Writes tests/golden from `transformers`: python tests/make_golden.py.

Needs torch and transformers (the `parity` extra). Each directory holds a tiny
random model in bfloat16 and what transformers computes with it in float32 (all
arithmetic after reading the weights). Write them anew only when a family or a
case is added; a change of the package's code is no reason.
"""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
LENGTH = 24
PADDING = 5  # rows of padding on the left of the second sequence
_SHAPES = dict(
  vocab_size=72,
  hidden_size=24,
  intermediate_size=32,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  max_position_embeddings=64,
)
_LLAMA3 = dict(
  rope_type="llama3",
  rope_theta=10_000.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,
)
_BASE = dict(rope_type="default", rope_theta=10_000.0)
_YARN = _BASE | dict(
  rope_type="yarn", factor=4.0, original_max_position_embeddings=16
)
_LINEAR = dict(rope_type="linear", rope_theta=10_000.0, factor=4.0)
# Case -> (family's prefix of transformers' classes, config). Windows of 8 are
# a third of the length; seven layers give Gemma-3's pattern a global one.
CASES = {
  "gemma2": (
    "Gemma2",
    dict(num_hidden_layers=3, sliding_window=8, query_pre_attn_scalar=24),
  ),
  "gemma2_mqa": (
    "Gemma2",
    dict(num_hidden_layers=2, sliding_window=8, num_key_value_heads=1),
  ),
  "gemma3": (
    "Gemma3",
    dict(
      num_hidden_layers=7,
      sliding_window=8,
      query_pre_attn_scalar=24,
      final_logit_softcapping=20.0,
      rope_parameters={
        "full_attention": _LINEAR | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
      },
    ),
  ),
  "llama": (
    "Llama",
    dict(num_hidden_layers=3, rope_parameters=_LLAMA3, rms_norm_eps=1e-5),
  ),
  "llama_tied_mqa_biased": (
    "Llama",
    dict(
      num_hidden_layers=2,
      num_key_value_heads=1,
      tie_word_embeddings=True,
      attention_bias=True,
      mlp_bias=True,
      rope_parameters=_LINEAR,
    ),
  ),
  "gemma": ("Gemma", dict(num_hidden_layers=2, num_key_value_heads=1)),
  "mistral": (
    "Mistral",
    dict(num_hidden_layers=2, sliding_window=8, rms_norm_eps=1e-5),
  ),
  "mistral_global": (
    "Mistral",
    dict(num_hidden_layers=2, sliding_window=None, tie_word_embeddings=True),
  ),
  "olmo2": (
    "Olmo2",
    dict(num_hidden_layers=2, rope_parameters=_BASE | {"rope_theta": 5e5}),
  ),
  "qwen2": (
    "Qwen2",
    dict(num_hidden_layers=2, rope_parameters=_YARN),
  ),
  "qwen2_tied_sliding": (
    "Qwen2",
    dict(
      num_hidden_layers=3,
      tie_word_embeddings=True,
      use_sliding_window=True,
      sliding_window=8,
      max_window_layers=1,
    ),
  ),
  "smollm3": (
    "SmolLM3",
    dict(num_hidden_layers=3, no_rope_layers=[1, 0, 1], pad_token_id=0),
  ),
  "llama_yarn_by_hand": (
    "Llama",
    dict(
      num_hidden_layers=2,
      rope_parameters=_YARN
      | dict(beta_fast=8.0, beta_slow=2.0, truncate=False)
      | dict(mscale=0.7, mscale_all_dim=0.5),
    ),
  ),
  "llama_dynamic": (
    "Llama",
    dict(
      num_hidden_layers=2,
      max_position_embeddings=16,
      rope_parameters=_BASE | dict(rope_type="dynamic", factor=2.0),
    ),
  ),
  "qwen3": (
    "Qwen3",
    dict(num_hidden_layers=3, tie_word_embeddings=True),
  ),
  "qwen3_untied_mha": (
    "Qwen3",
    dict(num_hidden_layers=2, num_key_value_heads=4),
  ),
  "qwen3_sliding": (
    "Qwen3",
    dict(
      num_hidden_layers=3,
      use_sliding_window=True,
      sliding_window=8,
      max_window_layers=1,
    ),
  ),
}
GOLDEN_CASES = (
  "gemma",
  "gemma2",
  "gemma3",
  "llama",
  "mistral",
  "olmo2",
  "qwen2",
  "qwen3",
  "smollm3",
)


def build(case, **changes):
  """A random model of a case, float32, on the CPU."""
  import torch
  import transformers

  name, shapes = CASES[case]
  config = "TextConfig" if name == "Gemma3" else "Config"
  config = getattr(transformers, name + config)(
    **_SHAPES | shapes | changes, attn_implementation="eager"
  )
  torch.manual_seed(0)
  model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
  randomise(model)
  return model


def randomise(model):
  """Weights under which every mistake shows: norms and biases are random."""
  import torch

  offset = "Gemma" not in type(model).__name__  # whose norms add one
  with torch.no_grad():
    for name, p in model.named_parameters():
      scale = 0.3 if p.ndim == 1 else p.shape[-1] ** -0.5
      p.copy_(torch.randn_like(p) * scale)
      if "norm" in name and offset:
        p.add_(1.0)


def batch(vocab, length=LENGTH):
  """(tokens, mask) [2, length]; the second sequence is padded on the left."""
  tokens = np.random.default_rng(0).integers(0, vocab, (2, length))
  mask = np.ones((2, length), np.int32)
  mask[1, :PADDING] = 0
  return tokens.astype(np.int32), mask


def reference(model, tokens, mask):
  """(logits [B, T, V], hidden [L, B, T, D]) of transformers.

  Hidden is each layer's output; the last is after the final norm.
  """
  import torch

  rope = model.config.rope_parameters
  if rope.get("rope_type") == "dynamic" and len(tokens) > 1:
    # transformers takes one base for a batch, of its longest sequence, and
    # keeps that of the longest that it has seen: the shorter one goes first.
    rows = [
      reference(model, tokens[i : i + 1], mask[i : i + 1]) for i in (1, 0)
    ]
    logits, hidden = zip(*reversed(rows), strict=True)
    return np.concatenate(logits), np.concatenate(hidden, 1)
  mask = torch.tensor(mask)
  with torch.no_grad():
    out = model(
      torch.tensor(tokens).long(),
      attention_mask=mask,
      position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
      output_hidden_states=True,
    )
  hidden = torch.stack(out.hidden_states[1:])
  return out.logits.numpy(), hidden.numpy()


def main():
  """Writes every golden case."""
  import transformers

  for case in GOLDEN_CASES:
    directory = GOLDEN / case
    build(case).bfloat16().save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    # Read back, not converted: the model's own tables (RoPE, the embeddings'
    # multiplier) stay rounded where they have once been bfloat16.
    model = transformers.AutoModelForCausalLM.from_pretrained(
      directory, dtype="float32", attn_implementation="eager"
    )
    tokens, mask = batch(model.config.vocab_size)
    logits, hidden = reference(model, tokens, mask)
    np.savez_compressed(
      directory / "expected.npz",
      tokens=tokens,
      mask=mask,
      logits=logits,
      hidden=hidden,
    )


if __name__ == "__main__":
  main()
