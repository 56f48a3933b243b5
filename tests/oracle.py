"""What transformers computes for traces, from exported files alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import make_golden
import numpy as np
import safetensors.numpy

from cacheaug.augment import coprocessor
from cacheaug.model.transformer import Transformer
from cacheaug.weights import pretrained

# Float32 rounding through three passes; a row that sees one token too many or
# stands one position off gives 1e-2 and more.
TOLERANCE = 1e-4
WHY_TORCH = "needs torch and transformers: pip install 'cacheaug[parity]'"
FAMILIES = ("gemma2", "llama", "qwen3")


def random_params(model, spec):
  """A coprocessor's parameters, no leaf zero or like a decoder's."""
  shapes = nn.unbox(
    jax.eval_shape(
      lambda key: coprocessor.init_boxed(model, spec, key), jax.random.key(0)
    )
  )
  leaves, structure = jax.tree.flatten(shapes)
  rng = np.random.default_rng(1)
  values = [
    jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for x in leaves
  ]
  return jax.tree.unflatten(structure, values)


def make_decoder(family, directory):
  """(ours, its parameters, transformers') of a family, written there."""
  # transformers' windows count indices, ours positions: none binds here.
  changes = {"sliding_window": 64} if family == "gemma2" else {}
  reference = make_golden.build(family, **changes)
  reference.save_pretrained(directory)
  config = pretrained.read_config(directory)
  params = pretrained.load(directory, config, dtype=jnp.float32)
  return Transformer(config), params, reference


def traces_nll(reference, directory, tokens, points, spec):
  """nll [B, M, A] of an exported coprocessor, a trace at a time."""
  import torch
  import transformers

  extra = safetensors.numpy.load_file(directory / "coprocessor.safetensors")
  theirs = transformers.AutoModel.from_config(
    reference.config, attn_implementation="eager"
  ).eval()
  state = {
    name.removeprefix("model."): torch.tensor(value)
    for name, value in extra.items()
    if name.startswith("model.")
  }
  lacking = theirs.load_state_dict(state, strict=False)
  assert lacking.missing_keys == ["embed_tokens.weight"]
  assert not lacking.unexpected_keys
  with torch.no_grad():
    return np.array(
      [
        [oracle(reference, theirs, extra, row, p, spec) for p in at]
        for row, at in zip(tokens, points, strict=True)
      ]
    )


def oracle(decoder, coproc, extra, tokens, point, spec):
  """nll [A] of one trace, from transformers' own models and caches.

  Reads only exported files and the paper's description: the coprocessor's
  rows see the context up to the point and, causally, each other; then the
  decoder reads [z | ahead tokens] likewise.
  """
  import torch

  n, p = spec.latents, point
  context = torch.tensor(tokens[: p + 1])[None].long()
  ahead = torch.tensor(tokens[p + 1 : p + 1 + spec.ahead])[None].long()
  shift = n if spec.positions == "insert" else 0

  def past(entries):
    """The decoder's cache of the first tokens, made afresh."""
    if not entries:
      return None
    return decoder(context[:, :entries], use_cache=True).cache

  def read(model, entries, x, first):
    """Rows x at positions first.. over that many entries of context."""
    rows = x.shape[1]
    return model(
      inputs_embeds=x,
      cache=past(entries),
      position_ids=torch.arange(first, first + rows)[None],
      # Without it transformers takes a jump of positions for a new document.
      attention_mask=torch.ones(1, entries + rows, dtype=torch.long),
    )

  embed = decoder.get_input_embeddings()
  soft = torch.tensor(extra["soft_tokens"])[None]
  first = p - n + 1 + shift
  copied = embed(context[:, p - n + 1 :]) if spec.start == "harmless" else 0
  z = read(coproc, p + 1, soft + copied, first).last_hidden_state
  if spec.start == "harmless":
    z = copied + z @ torch.tensor(extra["latent_projection"])
  entries = p - n + 1 if spec.positions == "replace" else p + 1
  x = torch.cat([z, embed(ahead[:, :-1])], dim=1)
  logits = read(decoder, entries, x, first).logits[:, n - 1 :]
  return torch.nn.functional.cross_entropy(
    logits[0], ahead[0], reduction="none"
  ).numpy()
