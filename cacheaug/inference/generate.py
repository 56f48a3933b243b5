"""Greedy generation on a static cache, augmented once at the prompt's end.

Prompts are padded on the left, so that a batch's last tokens and its free
slots line up; slots double as positions, which RoPE, being relative, allows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.traces import TraceSpec
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, Transformer


def pad_left(
  prompts: list[list[int]], pad_id: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Ragged prompts -> tokens [B, S] and documents [B, S] (-1 = padding).

  Raises:
    UserError: an empty prompt, or one longer than `length`.
  """
  for i, prompt in enumerate(prompts):
    if not prompt:
      raise UserError(f"prompt {i} is empty: give at least one token")
  longest = max(map(len, prompts))
  length = longest if length is None else length
  if longest > length:
    raise UserError(f"a prompt has {longest} tokens, room for {length}")
  tokens = np.full((len(prompts), length), pad_id, np.int32)
  documents = np.full((len(prompts), length), -1, np.int32)
  for row, prompt in enumerate(prompts):
    tokens[row, length - len(prompt) :] = prompt
    documents[row, length - len(prompt) :] = 0
  return tokens, documents


def check_prompts(prompts: list[list[int]], spec: TraceSpec) -> None:
  """Refuses what cannot be augmented at its end, before any device work.

  Raises:
    UserError: a prompt with fewer tokens than the latents stand on.
  """
  for i, prompt in enumerate(prompts):
    if len(prompt) < spec.context_needed:
      raise UserError(
        f"prompt {i} has {len(prompt)} tokens: with latents={spec.latents} "
        f"(positions={spec.scheme!r}, start={spec.start!r}) it needs at least "
        f"{spec.context_needed}; lengthen it, or decode without latents"
      )


def augment(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  spec: TraceSpec,
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Inserts N latents at the end of the context.

  Returns the last latent's hidden state [B, D], which predicts the next token,
  the cache with N more slots, and that token's position [B].
  """
  b, s = tokens.shape
  points = jnp.full((b, 1), s - 1, jnp.int32)
  laid = traces.lay_out(tokens, documents, points, spec)
  copied = transformer.embed(model, decoder, laid.copied)
  z = coprocessor.latents(model, coproc, cache, laid, copied)[:, 0]
  if spec.scheme == "replace":
    cache = cache.hide_after(laid.rows.limits[:, 0, 0])
  positions = laid.latent_rows.positions[:, 0]
  hidden, rows = transformer.extend(
    model, decoder, cache, z, positions, laid.latent_rows.segments[:, 0]
  )
  return hidden[:, -1], cache.concat(rows), positions[:, -1] + 1


@functools.partial(
  jax.jit, static_argnames=("model", "spec", "max_new_tokens", "stop_id")
)
def greedy(
  model: Transformer,
  decoder: Params,
  coproc: Params | None,
  tokens: jax.Array,  # [B, S] from pad_left
  documents: jax.Array,  # [B, S]
  *,
  spec: TraceSpec | None,
  max_new_tokens: int,
  stop_id: int = -1,
) -> jax.Array:  # [B, max_new_tokens], stop_id from the first one on
  """The most likely continuation; `coproc` None decodes without latents."""
  b, s = tokens.shape
  plain = spec or traces.TraceSpec(latents=1, ahead=1)
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, plain
  )
  last, position = hidden[:, -1], jnp.full((b,), s, jnp.int32)
  if coproc is not None:
    last, cache, position = augment(
      model, decoder, coproc, cache, tokens, documents, spec
    )
  first_slot = cache.length
  cache = cache.pad(max_new_tokens)

  def choose(hidden):
    return jnp.argmax(transformer.logits(model, decoder, hidden), -1)

  def unfinished(carry):
    step, _, _, _, done = carry
    return (step < max_new_tokens) & ~done.all()

  def body(carry):
    step, last, cache, out, done = carry
    token = jnp.where(done, stop_id, choose(last)).astype(jnp.int32)
    out = out.at[:, step].set(token)
    done |= token == stop_id
    last, cache = transformer.decode_step(
      model,
      decoder,
      cache,
      jnp.maximum(token, 0),
      position + step,
      first_slot + step,
    )
    return step + 1, last, cache, out, done

  out = jnp.full((b, max_new_tokens), stop_id, jnp.int32)
  carry = jnp.int32(0), last, cache, out, jnp.zeros((b,), bool)
  return jax.lax.while_loop(unfinished, body, carry)[3]
