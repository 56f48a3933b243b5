"""Greedy generation on a static cache, augmented once at the prompt's end.

Prompts are padded on the left, so that a batch's last tokens and its free
slots line up; slots double as positions, which RoPE, being relative, allows.
"""

import functools

import flax.struct
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


@flax.struct.dataclass
class Context:
  """Prompts that the decoder has read, as `decode` goes on from them."""

  cache: KVCache
  tokens: jax.Array  # [B, S] from pad_left
  documents: jax.Array  # [B, S], -1 = padding
  hidden: jax.Array  # [B, D], of the row that predicts the next token
  position: jax.Array  # [B], of the next token
  augmented: bool = flax.struct.field(pytree_node=False, default=False)


def read(
  model: Transformer,
  decoder: Params,
  tokens: jax.Array,  # [B, S] from pad_left
  documents: jax.Array,  # [B, S]
) -> Context:
  """The decoder reads the prompts, each one document."""
  b, s = tokens.shape
  plain = TraceSpec(latents=1, ahead=1)
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, plain
  )
  position = jnp.full((b,), s, jnp.int32)
  return Context(cache, tokens, documents, hidden[:, -1], position)


def augment_context(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  context: Context,
  spec: TraceSpec,
) -> Context:
  """`augment`, of all that `decode` needs."""
  hidden, cache, position = augment(
    model,
    decoder,
    coproc,
    context.cache,
    context.tokens,
    context.documents,
    spec,
  )
  return context.replace(
    cache=cache, hidden=hidden, position=position, augmented=True
  )


def decode(
  model: Transformer,
  decoder: Params,
  context: Context,
  *,
  max_new_tokens: int,
  stop_ids: tuple[int, ...] = (-1,),
) -> jax.Array:  # [B, max_new_tokens]
  """The most likely continuation.

  A sequence ends with the first of `stop_ids` that it says, and is filled up
  with stop_ids[0]; the -1 by default is no token and ends none.
  """
  b, position = len(context.tokens), context.position
  fill, stops = stop_ids[0], jnp.array(stop_ids, jnp.int32)
  first_slot = context.cache.length
  cache = context.cache.pad(max_new_tokens)

  def choose(hidden):
    return jnp.argmax(transformer.logits(model, decoder, hidden), -1)

  def unfinished(carry):
    step, _, _, _, done = carry
    return (step < max_new_tokens) & ~done.all()

  def body(carry):
    step, last, cache, out, done = carry
    token = jnp.where(done, fill, choose(last)).astype(jnp.int32)
    out = out.at[:, step].set(token)
    done |= (token[:, None] == stops[None]).any(-1)
    last, cache = transformer.decode_step(
      model,
      decoder,
      cache,
      jnp.maximum(token, 0),
      position + step,
      first_slot + step,
    )
    return step + 1, last, cache, out, done

  out = jnp.full((b, max_new_tokens), fill, jnp.int32)
  carry = jnp.int32(0), context.hidden, cache, out, jnp.zeros((b,), bool)
  return jax.lax.while_loop(unfinished, body, carry)[3]


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
  """All three in one program; `coproc` None decodes without latents."""
  context = read(model, decoder, tokens, documents)
  if coproc is not None:
    context = augment_context(model, decoder, coproc, context, spec)
  return decode(
    model,
    decoder,
    context,
    max_new_tokens=max_new_tokens,
    stop_ids=(stop_id,),
  )
