"""Decoding on a static cache, with latents inserted at any token.

A cache of S prompt slots, T for the new tokens and N for each augmentation,
in this order. New tokens have the same slots with latents and without, and a
slot that stays empty weighs exactly nothing: a sequence without latents gets
the frozen decoder's tokens and logits bit for bit, whatever stands in the
other sequences of its batch.

`start` makes the state, `insert_latents` augments some of its sequences,
`decode` adds tokens in one loop on the device; the last two work in place.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from cacheaug.augment import coprocessor, kv_latents, objective, traces
from cacheaug.augment.traces import Layout, Traces
from cacheaug.errors import UserError
from cacheaug.inference import padding
from cacheaug.inference.sampling import GREEDY, Sampling, choose
from cacheaug.model import decode_rows, transformer
from cacheaug.model.attention import NO_LIMIT, QueryLayout
from cacheaug.model.cache import KVCache
from cacheaug.model.static_cache import StaticCache
from cacheaug.model.transformer import Params, Transformer


@flax.struct.dataclass
class Context:
  """Prompts that the decoder has read, as decoding goes on from them."""

  cache: KVCache
  tokens: jax.Array  # [B, S], padded on the left
  documents: jax.Array  # [B, S], -1 = padding
  hidden: jax.Array  # [B, D], of the row that predicts the next token
  position: jax.Array  # [B], of the next token
  # [B, S, D] of all tokens, where a coprocessor reads them.
  states: jax.Array | None = None
  augmented: bool = flax.struct.field(pytree_node=False, default=False)


@flax.struct.dataclass
class DecodeState:
  """Sequences that are being decoded, made by `start`.

  A function that takes a state donates it: the caller goes on with the result.
  """

  cache: StaticCache
  hidden: jax.Array  # [B, D], of the row that predicts the next token
  position: jax.Array  # [B], of the next token
  tokens: jax.Array  # [B, S + T], prompts and new tokens
  documents: jax.Array  # [B, S + T], -1 = padding
  nll: jax.Array  # [B, T] nats of the new tokens, where scored
  step: jax.Array  # [], new tokens so far
  done: jax.Array  # [B]
  paused: jax.Array  # [B], its last token is one to pause after
  keys: jax.Array  # [B] keys
  states: jax.Array | None  # [B, S + T, D] of the tokens, where they are read
  prompt: int = flax.struct.field(pytree_node=False)  # S
  first_slot: int = flax.struct.field(pytree_node=False)  # of the new tokens

  @property
  def room(self) -> int:
    """T, the most new tokens."""
    return self.tokens.shape[1] - self.prompt

  @property
  def generated(self) -> jax.Array:
    """[B, T] new tokens; those from `step` on are not yet decoded."""
    return self.tokens[:, self.prompt :]

  def latent_slot(self, count: int | jax.Array, n: int) -> int | jax.Array:
    """The first slot of augmentation `count` (from 0) of n latents."""
    return self.first_slot + self.room + count * n


@functools.partial(
  jax.jit, static_argnames=("model", "max_new_tokens", "latents")
)
def start(
  model: Transformer,
  context: Context,
  keys: jax.Array,  # [B]
  *,
  max_new_tokens: int,
  latents: int = 0,
) -> DecodeState:
  """A state after a context, with slots for the new tokens and latents."""
  b, s = context.tokens.shape
  slots = context.cache.length + max_new_tokens + latents
  slots = padding.round_up(slots, padding.CACHE)
  more = ((0, 0), (0, max_new_tokens))
  states = context.states
  if states is not None:
    states = jnp.pad(states, (*more, (0, 0)))
  return DecodeState(
    cache=StaticCache.of(context.cache, slots, model.dtype),
    hidden=context.hidden,
    position=context.position,
    tokens=jnp.pad(context.tokens, more),
    documents=jnp.pad(context.documents, more),
    nll=jnp.zeros((b, max_new_tokens), jnp.float32),
    step=jnp.int32(0),
    done=jnp.zeros((b,), bool),
    paused=jnp.zeros((b,), bool),
    keys=keys,
    states=states,
    prompt=s,
    first_slot=context.cache.length,
  )


def grow_cache(state: DecodeState, latents: int) -> DecodeState:
  """The state with slots for `latents`; a copy where it had fewer."""
  slots = padding.round_up(state.latent_slot(0, 0) + latents, padding.CACHE)
  more = slots - state.cache.positions.shape[1]
  return _grow_cache(state, more) if more > 0 else state


@functools.partial(jax.jit, static_argnames="more")
def _grow_cache(state, more):
  return state.replace(cache=state.cache.pad(more))


@flax.struct.dataclass
class Latents:
  """N latents for each sequence, computed and not yet in its cache.

  Embeddings for the decoder to read, or keys and values in their place, over
  which it reads the last token again.
  """

  positions: jax.Array  # [B, N], where they are to stand
  z: jax.Array | None = None  # [B, N, D]
  kv: KVCache | None = None  # of N entries a sequence
  last: jax.Array | None = None  # [B, D], the last token's embedding, with kv


def lay_point(
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  *,
  last: jax.Array | int,  # [], index of the last token of each sequence
  position: jax.Array,  # [B], of the next token
  spec: Layout,
  late: jax.Array | None = None,  # [B]
) -> Traces:  # one a sequence
  """Where latents stand at the end of each sequence.

  Positions are those of training, pushed back by as much as earlier latents
  have pushed back the text.
  """
  points = jnp.broadcast_to(jnp.int32(last), (len(tokens), 1))
  late = None if late is None else late[:, None]
  placed = traces.layout_traces(tokens, documents, points, spec, late)
  pushed = (position - 1 - last)[:, None, None]
  rows = placed.latent_rows
  rows = rows.replace(
    positions=rows.positions + pushed,
    context_limit=rows.context_limit + pushed,
    # The cache may have holes, and positions are not its slots.
    context_start=None,
  )
  block = placed.rows.replace(positions=placed.rows.positions + pushed)
  return placed.replace(latent_rows=rows, rows=block)


def compute_latents(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,  # its slots those of `tokens`, then what was inserted
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  *,
  last: jax.Array | int,  # [], as of `lay_point`, these three
  position: jax.Array,  # [B]
  spec: Layout,
  states: jax.Array | None = None,  # [B, S, D], of coprocessor.source_cache
  late: jax.Array | None = None,  # [B]
) -> Latents:
  """Runs the coprocessor for the end of each sequence.

  It reads the whole cache, or the states of its slots; with `late` both as
  they were so many tokens ago, when no latents may have been inserted since.

  Raises:
    UserError: a coprocessor with an attention bias, which no cache keeps.
  """
  point = dict(last=last, position=position, spec=spec, late=late)
  placed = lay_point(tokens, documents, **point)
  positions = placed.rows.positions[:, 0, : spec.latents]
  copied, repeated = objective.embedded(model, decoder, placed)
  if spec.kv_bias:
    raise UserError(
      "coprocessor.kv_bias=True: a cache keeps no bias of attention, so "
      "latents cannot be inserted; evaluate by position (lm.nll, evaluate)"
    )
  if spec.reruns:
    kv = kv_latents.latent_kv(model, coproc, cache, placed, copied)
    keys, values = (x[:, :, 0].astype(cache.keys.dtype) for x in kv)
    kv = KVCache(keys, values, positions, jnp.ones_like(positions))
    return Latents(positions, kv=kv, last=copied[:, 0, -1])
  cache = coprocessor.source_cache(model, coproc, cache, states, spec)
  z = coprocessor.latents(model, coproc, cache, placed, copied, repeated)
  return Latents(positions, z=z[:, 0])


def rerun_last_token(
  model: Transformer,
  decoder: Params,
  cache: KVCache,  # the latents' keys and values in it
  latents: Latents,
) -> jax.Array:  # [B, D]
  """Hidden state of the last token's row, read again over the latents.

  It leaves nothing and does not see itself, as in training (traces.py).
  """
  position = latents.positions[:, -1:]
  rows = QueryLayout.plain(position, jnp.ones_like(position))
  rows = rows.replace(block_mask=jnp.zeros((1, 1, 1, 1), bool))
  x = latents.last[:, None, None]
  return transformer.run_blocks(model, decoder, x, rows, cache)[:, 0, 0]


@functools.partial(
  jax.jit, static_argnames=("model", "spec"), donate_argnames="state"
)
def insert_latents(
  model: Transformer,
  decoder: Params,  # stacked, or of decode_rows.unstack_layers
  coproc: Params,
  state: DecodeState,
  count: jax.Array,  # [], augmentations before this one
  on: jax.Array,  # [B]; the others stay as they are
  spec: Layout,
) -> DecodeState:
  """N latents after the last token of each sequence that is `on`.

  The coprocessor reads the cache as it stands, earlier latents in it; or the
  states of all tokens, but of no latents.
  """
  cache = state.cache.stacked() if state.states is None else _token_slots(state)
  latents = compute_latents(
    model,
    decoder,
    coproc,
    cache,
    state.tokens,
    state.documents,
    last=state.prompt + state.step - 1,
    position=state.position,
    spec=spec,
    states=state.states,
  )
  return write_latents(
    model, decoder, state, latents, count=count, on=on, spec=spec
  )


def _token_slots(state: DecodeState) -> KVCache:
  """The tokens' positions, hidden ones too; without keys and values."""
  index = jnp.arange(state.tokens.shape[1])[None]
  exists = (state.documents >= 0) & (index < state.prompt + state.step)
  positions = state.cache.positions[:, : index.shape[1]]
  return KVCache(None, None, positions, exists.astype(jnp.int32))


def write_latents(
  model: Transformer,
  decoder: Params,
  state: DecodeState,
  latents: Latents,
  *,
  count: jax.Array,  # [], as of `insert_latents`, these three
  on: jax.Array,  # [B]
  spec: Layout,
) -> DecodeState:
  """The second half of `insert_latents`: latents enter the static cache."""
  cache, positions = state.cache, latents.positions
  if spec.positions == "replace":
    cache = cache.hide_after(jnp.where(on, positions[:, 0] - 1, NO_LIMIT))
  if spec.window:
    first = state.position - spec.window
    cache = cache.hide_before(jnp.where(on, first, -NO_LIMIT))
  segments = jnp.broadcast_to(on[:, None].astype(jnp.int32), positions.shape)
  slot = state.latent_slot(count, spec.latents)
  if latents.kv is not None:
    cache = cache.write(latents.kv.replace(segments=segments), slot)
    hidden = rerun_last_token(model, decoder, cache.stacked(), latents)
  else:
    hidden, cache = decode_rows.write_rows(
      model,
      decoder,
      cache,
      latents.z,
      positions,
      segments=segments,
      slot=slot,
    )
    hidden = hidden[:, -1]
  return state.replace(
    cache=cache,
    hidden=jnp.where(on[:, None], hidden, state.hidden),
    position=jnp.where(on, positions[:, -1] + 1, state.position),
  )


@functools.partial(
  jax.jit,
  static_argnames=("model", "sampling", "stop_ids", "pause_ids", "scored"),
  donate_argnames="state",
)
def decode(
  model: Transformer,
  decoder: Params,  # as of `insert_latents`
  state: DecodeState,
  until: jax.Array,  # [], new tokens at the end
  *,
  sampling: Sampling = GREEDY,
  stop_ids: tuple[int, ...] = (-1,),
  pause_ids: tuple[int, ...] = (),
  scored: bool = False,
  forced: jax.Array | None = None,  # [B, T] new tokens, -1 where free
) -> DecodeState:
  """Decodes tokens until there are `until`, or all sequences are done.

  A sequence ends with its first token of `stop_ids`, and is filled up with
  stop_ids[0]; the -1 by default is no token and ends none. The loop also stops
  after a step in which a sequence gets one of `pause_ids`. `scored` keeps each
  token's nll under the model (before temperature and cuts). `forced` tokens
  are taken in place of the model's own; they end nothing.
  """
  state = state.replace(paused=jnp.zeros_like(state.paused))
  return jax.lax.while_loop(
    lambda s: (s.step < until) & ~s.done.all() & ~s.paused.any(),
    lambda s: _decode_step(
      model, decoder, s, sampling, stop_ids, pause_ids, scored, forced
    ),
    state,
  )


@functools.partial(jax.jit, donate_argnames="state")
def end(
  state: DecodeState,
  ended: jax.Array,  # [B]
) -> DecodeState:
  """Ends the sequences in `ended`; those that have ended stay so."""
  return state.replace(done=state.done | ended)


def _decode_step(
  model, decoder, state, sampling, stop_ids, pause_ids, scored, forced
):
  """One token of every sequence."""
  logits = transformer.logits(model, decoder, state.hidden)
  token = choose(logits, sampling, state.keys, state.step)
  token = jnp.where(state.done, stop_ids[0], token)
  free = jnp.ones_like(state.done)
  if forced is not None:
    fixed = forced[:, state.step]
    free = fixed < 0
    token = jnp.where(free, token, fixed)

  def among(ids):
    matches = (token[:, None] == jnp.array(ids, jnp.int32)[None]).any(-1)
    return matches & free

  done = state.done | among(stop_ids)
  tokens = jax.lax.dynamic_update_slice(
    state.tokens, token[:, None], (0, state.prompt + state.step)
  )
  nll = state.nll
  if scored:
    at = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], -1)
    new = jax.nn.logsumexp(logits, -1, keepdims=True) - at
    new = jnp.where(state.done[:, None], 0.0, new)
    nll = jax.lax.dynamic_update_slice(nll, new, (0, state.step))
  x = transformer.embed(model, decoder, jnp.maximum(token, 0)[:, None])
  hidden, cache = decode_rows.write_rows(
    model,
    decoder,
    state.cache,
    x,
    state.position[:, None],
    segments=jnp.ones_like(token)[:, None],
    slot=state.first_slot + state.step,
  )
  states = state.states
  if states is not None:
    states = jax.lax.dynamic_update_slice(
      states, hidden.astype(states.dtype), (0, state.prompt + state.step, 0)
    )
  return state.replace(
    cache=cache,
    hidden=hidden[:, 0],
    states=states,
    position=state.position + 1,
    tokens=tokens,
    nll=nll,
    step=state.step + 1,
    done=done,
    paused=among(pause_ids) & ~done if pause_ids else state.paused,
  )
