"""Prompts in, tokens out: reading, augmenting once at the end, decoding.

Prompts are padded on the left, so that a batch's last tokens and its free
slots line up; slots double as positions, which RoPE, being relative, allows.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from cacheaug.augment import objective
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.inference import engine
from cacheaug.inference.engine import Context
from cacheaug.model import decode_rows, transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, Transformer

_unstack = jax.jit(decode_rows.unstack_layers)


def unstack_on_cpu(params: Params) -> Params:
  """On the CPU a copy with unstacked layers; see decode_rows.py."""
  return _unstack(params) if jax.default_backend() == "cpu" else params


def check_prompts(
  prompts: list[list[int]],
  spec: Layout,
  *,
  on: Sequence[bool] | None = None,
  tokens_before: int = 0,
) -> None:
  """Refuses what cannot be augmented at its end, before any device work.

  Args:
    prompts: tokens of each.
    spec: of the coprocessor.
    on: which of them get latents; all by default.
    tokens_before: new tokens decoded before the first latents; -2: the latents
      stand two tokens before the prompt's end.

  Raises:
    UserError: a prompt with fewer tokens than the latents stand on.
  """
  for i, prompt in enumerate(prompts):
    if tokens_before < 0 and len(prompt) + tokens_before < 1:
      raise UserError(
        f"prompt {i} has {len(prompt)} tokens: latents of its batch stand "
        f"{-tokens_before} before its end; lengthen it, or give it in another "
        "call"
      )
    length = len(prompt) + tokens_before
    if (on is None or on[i]) and length < spec.context_needed:
      raise UserError(
        f"prompt {i} has {len(prompt)} tokens: with latents={spec.latents} "
        f"(positions={spec.positions!r}, start={spec.start!r}) it needs at "
        f"least {spec.context_needed - tokens_before}; lengthen it, or decode "
        "without latents"
      )


def augment(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  spec: Layout,
  *,
  position: jax.Array | None = None,  # [B], of the next token; S by default
  late: jax.Array | None = None,  # [B]
  states: jax.Array | None = None,  # [B, S, D], of coprocessor.source_cache
) -> tuple[jax.Array, KVCache, jax.Array]:
  """Inserts N latents at the end of the context.

  The coprocessor has read all of it, or all but its last `late` tokens.
  Returns the hidden state [B, D] that predicts the next token (the last
  latent's, or of the last token again where latents are keys and values), the
  cache with N more slots, and the next token's position [B].
  """
  b, s = tokens.shape
  if position is None:
    position = jnp.full((b,), s, jnp.int32)
  if late is not None:
    spec.kind.check("late")
  latents = engine.compute_latents(
    model,
    decoder,
    coproc,
    cache,
    tokens,
    documents,
    last=s - 1,
    position=position,
    spec=spec,
    states=states,
    late=late,
  )
  positions = latents.positions
  if spec.positions == "replace":
    cache = cache.hide_after(positions[:, 0] - 1)
  if spec.window:
    cache = cache.hide_before(position - spec.window)
  if latents.kv is not None:
    cache = cache.concat(latents.kv)
    hidden = engine.rerun_last_token(model, decoder, cache, latents)
  else:
    rows, new = transformer.extend(model, decoder, cache, latents.z, positions)
    cache, hidden = cache.concat(new), rows[:, -1]
  return hidden, cache, positions[:, -1] + 1


def reads_states(spec: Layout | None) -> bool:
  """Whether `read` is to keep the states; None: there is no coprocessor."""
  return spec is not None and spec.kind.reads_states


def read(
  model: Transformer,
  decoder: Params,
  tokens: jax.Array,  # [B, S] from pad_left
  documents: jax.Array,  # [B, S]
  keep_states: bool = False,
) -> Context:
  """Prefill: the decoder reads the prompts, each one document.

  With `keep_states` its hidden states stay for a coprocessor to read.
  """
  b, s = tokens.shape
  plain = Layout(latents=1, ahead=1)
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, plain
  )
  position = jnp.full((b,), s, jnp.int32)
  last = cache, tokens, documents, hidden[:, -1], position
  return Context(*last, states=hidden if keep_states else None)


def augment_context(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  context: Context,
  spec: Layout,
  late: jax.Array | None = None,  # [B]
) -> Context:
  """`augment`, of all that `decode` needs; in as many rounds as trained.

  Raises:
    UserError: several rounds that come late.
  """
  if late is not None and spec.rounds_per_point > 1:
    raise UserError(
      f"traces.rounds={spec.rounds}: latents of several rounds cannot come late"
    )
  for _ in range(spec.rounds_per_point):
    hidden, cache, position = augment(
      model,
      decoder,
      coproc,
      context.cache,
      context.tokens,
      context.documents,
      spec,
      position=context.position,
      late=late,
      states=context.states,
    )
    context = context.replace(
      cache=cache, hidden=hidden, position=position, augmented=True
    )
  return context


def decode(
  model: Transformer,
  decoder: Params,
  context: Context,
  *,
  max_new_tokens: int,
  stop_ids: tuple[int, ...] = (-1,),
) -> jax.Array:  # [B, max_new_tokens]
  """The most likely continuation.

  A sequence ends with its first token of `stop_ids`, and is filled up with
  stop_ids[0]; the -1 by default is no token and ends none.
  """
  # The barrier: once a call in place of once a step.
  decoder = jax.lax.optimization_barrier(unstack_on_cpu(decoder))
  keys = jax.random.split(jax.random.key(0), len(context.tokens))  # unused
  state = engine.start(model, context, keys, max_new_tokens=max_new_tokens)
  state = engine.decode(
    model, decoder, state, max_new_tokens, stop_ids=stop_ids
  )
  # All sequences may be done before the last step.
  decoded = jnp.arange(max_new_tokens)[None] < state.step
  return jnp.where(decoded, state.generated, stop_ids[0])


@functools.partial(
  jax.jit,
  static_argnames=("model", "spec", "max_new_tokens", "stop_id"),
)
def greedy(
  model: Transformer,
  decoder: Params,
  coproc: Params | None,
  tokens: jax.Array,  # [B, S] from pad_left
  documents: jax.Array,  # [B, S]
  *,
  spec: Layout | None,
  max_new_tokens: int,
  stop_id: int = -1,
  late: jax.Array | None = None,  # [B]
) -> jax.Array:  # [B, max_new_tokens], stop_id from the first one on
  """All three in one program; `coproc` None decodes without latents.

  With `late` the coprocessor has not read the prompts' last so many tokens.
  """
  keep = reads_states(None if coproc is None else spec)
  context = read(model, decoder, tokens, documents, keep)
  if coproc is not None:
    context = augment_context(model, decoder, coproc, context, spec, late)
  return decode(
    model,
    decoder,
    context,
    max_new_tokens=max_new_tokens,
    stop_ids=(stop_id,),
  )
