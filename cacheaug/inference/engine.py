"""Decoding on a static cache, with latents inserted wherever they are asked.

A cache of S prompt slots, T for the new tokens and N for each augmentation,
in this order. What is said has the same slots with latents and without, and a
slot that stays empty weighs exactly nothing: a sequence without latents gets
the frozen decoder's tokens and logits bit for bit, whatever stands in the
other sequences of its batch.

`start` makes the state, `insert` augments some of its sequences, `advance`
says further tokens in one loop on the device; the last two work in place.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from cacheaug.augment import coprocessor, kv_latents, traces
from cacheaug.augment.traces import Layout, Traces
from cacheaug.inference.sampling import GREEDY, Sampling, choose
from cacheaug.model import decode_rows, transformer
from cacheaug.model.attention import NO_LIMIT, Rows
from cacheaug.model.cache import KVCache
from cacheaug.model.static_cache import SlotCache
from cacheaug.model.transformer import Params, Transformer

# Caches come in multiples of it: few programs, and reductions over slots that
# end on whole vectors, so that empty slots at the end change no rounding.
SLOTS = 64


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
class State:
  """Sequences that are being decoded; of `start`, used up by what takes it."""

  cache: SlotCache
  hidden: jax.Array  # [B, D], of the row that predicts the next token
  position: jax.Array  # [B], of the next token
  tokens: jax.Array  # [B, S + T], prompts and what was said since
  documents: jax.Array  # [B, S + T], -1 = padding
  nll: jax.Array  # [B, T] nats of the tokens said, where asked for
  step: jax.Array  # [], tokens said
  done: jax.Array  # [B]
  paused: jax.Array  # [B], said a token to pause after
  keys: jax.Array  # [B] keys
  states: jax.Array | None  # [B, S + T, D] of the tokens, where they are read
  prompt: int = flax.struct.field(pytree_node=False)  # S
  first_slot: int = flax.struct.field(pytree_node=False)  # of the new tokens

  @property
  def room(self) -> int:
    """T, the most new tokens."""
    return self.tokens.shape[1] - self.prompt

  @property
  def said(self) -> jax.Array:
    """[B, T] new tokens; from `step` on not yet said."""
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
) -> State:
  """A state after a context, with slots for so many tokens and latents."""
  b, s = context.tokens.shape
  slots = context.cache.length + max_new_tokens + latents
  more = ((0, 0), (0, max_new_tokens))
  states = context.states
  if states is not None:
    states = jnp.pad(states, (*more, (0, 0)))
  return State(
    cache=SlotCache.of(context.cache, slots + -slots % SLOTS, model.dtype),
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


def widen(state: State, latents: int) -> State:
  """The same with slots for so many latents, if it has fewer; then a copy."""
  slots = state.latent_slot(0, 0) + latents
  more = slots + -slots % SLOTS - state.cache.positions.shape[1]
  return _widen(state, more) if more > 0 else state


@functools.partial(jax.jit, static_argnames="more")
def _widen(state, more):
  return state.replace(cache=state.cache.pad(more))


def lay_point(
  model: Transformer,
  decoder: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  *,
  last: jax.Array | int,  # [], index of the last token of each sequence
  position: jax.Array,  # [B], of the next token
  spec: Layout,
) -> tuple[Traces, jax.Array]:  # of one trace, copied [B, 1, N, D]
  """Where latents stand at the end of each sequence.

  Positions are those of training, pushed back by as much as earlier latents
  have pushed back the text.
  """
  points = jnp.broadcast_to(jnp.int32(last), (len(tokens), 1))
  laid = traces.lay_out(tokens, documents, points, spec)
  pushed = (position - 1 - last)[:, None, None]
  rows = laid.latent_rows
  rows = rows.replace(
    positions=rows.positions + pushed,
    limits=rows.limits + pushed,
    starts=None,  # the cache may have holes, and positions are not its slots
  )
  copied = transformer.embed(model, decoder, laid.copied)
  return laid.replace(latent_rows=rows), copied


def deliberate(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  *,
  last: jax.Array | int,  # [], as of `lay_point`, these three
  position: jax.Array,  # [B]
  spec: Layout,
  states: jax.Array | None = None,  # [B, S, D], of coprocessor.source_cache
) -> tuple[jax.Array, jax.Array]:  # z [B, N, D], their positions [B, N]
  """The coprocessor's latents for the end of each sequence.

  It reads the whole cache, or the states of its slots.
  """
  laid, copied = lay_point(
    model,
    decoder,
    tokens,
    documents,
    last=last,
    position=position,
    spec=spec,
  )
  cache = coprocessor.source_cache(model, coproc, cache, states, spec)
  z = coprocessor.latents(model, coproc, cache, laid, copied)
  return z[:, 0], laid.latent_rows.positions[:, 0]


def hand_over(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,  # its slots those of `tokens`
  tokens: jax.Array,  # [B, S], as of `deliberate`, and the rest
  documents: jax.Array,  # [B, S]
  *,
  last: jax.Array | int,  # []
  position: jax.Array,  # [B]
  spec: Layout,
) -> tuple[KVCache, jax.Array]:  # N entries a sequence, x[p] [B, D] to ask
  """`deliberate` where latents are keys and values, for `ask` to follow."""
  point = dict(last=last, position=position, spec=spec)
  laid, copied = lay_point(model, decoder, tokens, documents, **point)
  kv = kv_latents.latent_kv(model, coproc, cache, laid, copied)
  keys, values = (x[:, :, 0].astype(cache.keys.dtype) for x in kv)
  at = laid.latent_rows.positions[:, 0]
  return KVCache(keys, values, at, jnp.ones_like(at)), copied[:, 0, -1]


def ask(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  x: jax.Array,  # [B, D], the last token's embedding
  position: jax.Array,  # [B]
) -> jax.Array:  # [B, D]
  """The last token's row again, over a cache with what it is given.

  It leaves nothing and does not see itself, as in training (traces.py).
  """
  rows = Rows.plain(position[:, None], jnp.ones_like(position)[:, None])
  rows = rows.replace(order=jnp.zeros((1, 1, 1, 1), bool))
  x = x[:, None, None]
  return transformer.run_blocks(model, decoder, x, rows, cache)[:, 0, 0]


@functools.partial(
  jax.jit, static_argnames=("model", "spec"), donate_argnames="state"
)
def insert(
  model: Transformer,
  decoder: Params,  # stacked, or of decoding.split_layers
  coproc: Params,
  state: State,
  count: jax.Array,  # [], augmentations before this one
  on: jax.Array,  # [B]; the others stay as they are
  spec: Layout,
) -> State:
  """N latents after the last token of each sequence that is `on`.

  The coprocessor reads the cache as it stands, earlier latents in it; or the
  states of all tokens, but of no latents.
  """
  cache = _said(state) if spec.kind.reads_states else state.cache.stacked()
  args = model, decoder, coproc, cache, state.tokens, state.documents
  last = state.prompt + state.step - 1
  point = dict(last=last, position=state.position, spec=spec)
  where = dict(count=count, on=on, spec=spec)
  if spec.latents_are_kv:
    rows, x = hand_over(*args, **point)
    return write_given(model, decoder, state, rows, x, **where)
  z, positions = deliberate(*args, **point, states=state.states)
  return write_latents(model, decoder, state, z, positions, **where)


def _said(state: State) -> KVCache:
  """Where the tokens stand, hidden ones too; without their kv."""
  index = jnp.arange(state.tokens.shape[1])[None]
  there = (state.documents >= 0) & (index < state.prompt + state.step)
  positions = state.cache.positions[:, : index.shape[1]]
  return KVCache(None, None, positions, there.astype(jnp.int32))


def write_given(
  model: Transformer,
  decoder: Params,
  state: State,
  rows: KVCache,  # of `hand_over`, N entries a sequence
  x: jax.Array,  # [B, D], the same
  *,
  count: jax.Array,  # [], as of `insert`, these three
  on: jax.Array,  # [B]
  spec: Layout,
) -> State:
  """The second half of `insert` where keys and values are handed over."""
  cache, positions = state.cache, rows.positions
  if spec.positions == "replace":
    cache = cache.hide_after(jnp.where(on, positions[:, 0] - 1, NO_LIMIT))
  segments = jnp.broadcast_to(on[:, None].astype(jnp.int32), positions.shape)
  slot = state.latent_slot(count, spec.latents)
  cache = cache.write(rows.replace(segments=segments), slot)
  hidden = ask(model, decoder, cache.stacked(), x, positions[:, -1])
  return state.replace(
    cache=cache,
    hidden=jnp.where(on[:, None], hidden, state.hidden),
    position=jnp.where(on, positions[:, -1] + 1, state.position),
  )


def write_latents(
  model: Transformer,
  decoder: Params,
  state: State,
  z: jax.Array,  # [B, N, D]
  positions: jax.Array,  # [B, N]
  *,
  count: jax.Array,  # [], as of `insert`, these three
  on: jax.Array,  # [B]
  spec: Layout,
) -> State:
  """The second half of `insert`: the decoder reads the latents."""
  cache = state.cache
  if spec.positions == "replace":
    limits = jnp.where(on, positions[:, 0] - 1, NO_LIMIT)
    cache = cache.hide_after(limits)
  hidden, cache = decode_rows.write_rows(
    model,
    decoder,
    cache,
    z,
    positions,
    segments=jnp.broadcast_to(on[:, None].astype(jnp.int32), positions.shape),
    slot=state.latent_slot(count, spec.latents),
  )
  return state.replace(
    cache=cache,
    hidden=jnp.where(on[:, None], hidden[:, -1], state.hidden),
    position=jnp.where(on, positions[:, -1] + 1, state.position),
  )


@functools.partial(
  jax.jit,
  static_argnames=("model", "sampling", "stop_ids", "pause_ids", "scored"),
  donate_argnames="state",
)
def advance(
  model: Transformer,
  decoder: Params,  # as of `insert`
  state: State,
  until: jax.Array,  # [], tokens said at the end
  *,
  sampling: Sampling = GREEDY,
  stop_ids: tuple[int, ...] = (-1,),
  pause_ids: tuple[int, ...] = (),
  scored: bool = False,
  forced: jax.Array | None = None,  # [B, T] new tokens, -1 where free
) -> State:
  """Says tokens until there are `until`, or all sequences are done.

  A sequence ends with the first of `stop_ids` that it says, and is filled up
  with stop_ids[0]; the -1 by default is no token and ends none. The loop also
  stops after a step in which a sequence says one of `pause_ids`. `scored`
  keeps each token's nll under the model (before temperature and cuts).
  `forced` tokens are said whatever the model would; they end nothing.
  """
  state = state.replace(paused=jnp.zeros_like(state.paused))
  return jax.lax.while_loop(
    lambda s: (s.step < until) & ~s.done.all() & ~s.paused.any(),
    lambda s: _say(
      model, decoder, s, sampling, stop_ids, pause_ids, scored, forced
    ),
    state,
  )


@functools.partial(jax.jit, donate_argnames="state")
def end(
  state: State,
  ended: jax.Array,  # [B]
) -> State:
  """Ends the sequences named by `ended`, beside those that have."""
  return state.replace(done=state.done | ended)


def _say(model, decoder, state, sampling, stop_ids, pause_ids, scored, forced):
  """One token of every sequence."""
  logits = transformer.logits(model, decoder, state.hidden)
  token = choose(logits, sampling, state.keys, state.step)
  token = jnp.where(state.done, stop_ids[0], token)
  free = jnp.ones_like(state.done)
  if forced is not None:
    here = forced[:, state.step]
    free = here < 0
    token = jnp.where(free, token, here)

  def among(ids):
    found = (token[:, None] == jnp.array(ids, jnp.int32)[None]).any(-1)
    return found & free

  done = state.done | among(stop_ids)
  tokens = jax.lax.dynamic_update_slice(
    state.tokens, token[:, None], (0, state.prompt + state.step)
  )
  nll = state.nll
  if scored:
    at = jnp.take_along_axis(logits, jnp.maximum(token, 0)[:, None], -1)
    here = jax.nn.logsumexp(logits, -1, keepdims=True) - at
    here = jnp.where(state.done[:, None], 0.0, here)
    nll = jax.lax.dynamic_update_slice(nll, here, (0, state.step))
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
