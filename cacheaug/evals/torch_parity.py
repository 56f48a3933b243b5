"""What JAX computes with a coprocessor, for transformers to be held to."""

from typing import Any

import jax
import numpy as np

from cacheaug.inference import context as contexts
from cacheaug.inference import engine

TEXTS = (
  "Once upon a time there was a small town by the sea where everybody knew "
  "everybody, and nothing had happened for",
  "The first thing to do before a long journey is",
)
AHEAD = 16  # tokens scored after each prompt
TOKENS = 50  # greedy ones

_compute_latents = jax.jit(
  engine.compute_latents, static_argnames=("model", "spec", "last")
)


def prompts_of(lm: Any, seed: int = 0) -> list[list[int]]:
  """Two prompts of unequal length: texts, or tokens without a tokenizer.

  Args:
    lm: an LM with a coprocessor.
    seed: of the tokens.
  """
  if lm.tokenizer is not None:
    return [lm.encode(text) for text in TEXTS]
  rng = np.random.default_rng(seed)
  n, vocab = lm.coprocessor.spec.latents, lm.model.config.vocab_size
  return [rng.integers(0, vocab, n + length).tolist() for length in (17, 4)]


def expected(
  lm: Any,
  prompts: list[list[int]],
  *,
  tokens: int = TOKENS,
  ahead: int = AHEAD,
) -> dict[str, np.ndarray]:
  """Arrays that weights/transformers_side/compare.py takes.

  Args:
    lm: an LM with a coprocessor.
    prompts: tokens of each, padded here on the left.
    tokens: greedy ones to give.
    ahead: A, tokens to score; drawn at random.

  Returns:
    prompts, mask [B, S]; z [B, N, D] unless latents are keys and values; ahead
    [B, A] and its nll [B, A]; tokens [B, tokens].

  Raises:
    UserError: a prompt too short for the latents, or too long for the decoder.
  """
  spec = lm.coprocessor.spec
  read = lm.prefill(prompts)
  out = {
    "prompts": np.asarray(read.tokens),
    "mask": (np.asarray(read.documents) >= 0).astype(np.int32),
  }
  out["tokens"] = lm.decode(lm.augment(read), tokens, stop_ids=())
  if not spec.reruns and spec.rounds == 1:
    decoder, coproc = contexts.unstack_on_cpu(lm.decoder), lm.coprocessor.layers
    args = lm.model, decoder, coproc, read.cache, read.tokens, read.documents
    last = read.tokens.shape[1] - 1
    where = dict(last=last, position=read.position, spec=spec)
    out["z"] = np.asarray(
      _compute_latents(*args, **where, states=read.states).z
    )
  rng = np.random.default_rng(1)
  vocab = lm.model.config.vocab_size
  out["ahead"] = rng.integers(0, vocab, (len(prompts), ahead)).astype(np.int32)
  length = out["prompts"].shape[1] + ahead
  rows = [
    [*prompt, *after.tolist()] + [0] * (length - len(prompt) - ahead)
    for prompt, after in zip(prompts, out["ahead"], strict=True)
  ]
  points = [[len(prompt) - 1] for prompt in prompts]
  out["nll"] = lm.nll(rows, points, ahead)[:, 0]
  return {name: np.asarray(x) for name, x in out.items()}
