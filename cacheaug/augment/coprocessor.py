"""The coprocessor: a context cache and N soft tokens in, N latents out.

Paper section 2.2: a network of the decoder's architecture, its weights a copy
of the decoder's at the start, reads the frozen decoder's cache with N trainable
soft tokens; its last hidden states are the latents.

A coprocessor's parameters are {transformer: {blocks, final_norm},
soft_tokens [N, D]} and, with the harmless start, latent_projection [D, D].

  as_is     input = soft token;            z = hidden
  harmless  input = soft token + copied;   z = copied + hidden @ projection

where copied is the decoder's own embedding of the context token p-N+1+i. The
projection starts at zero, so the latents begin as the context's last N tokens
said once more, and with positions 'replace' as exactly the frozen decoder.
Latents that come late (traces.py) say again the tokens up to where they are
inserted; those up to where the cache was read are the input.

What it is compared with (`TraceSpec.kind`; the above is 'coprocessor'):

  activations  the same, but the cache that its rows read is its own: it reads
               the decoder's last hidden states [B, S, D] as input embeddings.
               Gradients go through that pass too.
  pause        no network. {soft_tokens}; z = soft token (+ copied).
  handover     z is not used: for the decoder, the keys and values of the
               coprocessor's rows in all layers stand in the latents' slots.
               {transformer: {blocks}, soft_tokens}; of the last layer only
               what makes keys and values is trained.
  prefix       no network. {prefix_keys, prefix_values [L, N, K, E]} stand
               there. Keys are kept as before RoPE and rotated to where they
               stand: a score then depends on how far away a row is, and not
               on where in the text. Harmless: added to the context's own
               entries of p-N+1 .. p.

The harmless start of pause, prefix and handover needs no projection: soft
tokens or prefix begin at zero (and get gradients all the same). With 'replace'
each begins as exactly the frozen decoder; handover if it is a copy of it, as
its rows then read what the hidden entries have read, the context up to p-N,
and the tokens after it from their inputs. How y_1 is predicted where keys and
values are handed over is in traces.py.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacheaug.augment.traces import Traces, TraceSpec
from cacheaug.errors import UserError
from cacheaug.model import placement, transformer
from cacheaug.model.attention import Rows
from cacheaug.model.cache import KVCache
from cacheaug.model.rope import rope_of_layers, rotate
from cacheaug.model.transformer import Given, Params, Transformer

INITS = ("decoder", "scratch")
# The parts of a transformer that a kind trains.
NETWORK = {
  "coprocessor": ("blocks", "final_norm"),
  "activations": ("blocks", "final_norm"),
  "handover": ("blocks",),
  "pause": (),
}
SOFT_TOKEN_STDDEV = 0.02  # not stated in the paper; small beside embeddings


def init_boxed(model: Transformer, spec: TraceSpec, key: jax.Array) -> Params:
  """Random parameters, boxed with their logical axes (for shardings)."""
  body, soft = jax.random.split(key)
  c, harmless = model.config, spec.start == "harmless"
  normal = nn.initializers.normal(SOFT_TOKEN_STDDEV)
  zeros = nn.initializers.zeros

  def param(key, init, *axes):
    """Of axis letters with sizes."""
    letters, shape = zip(*axes, strict=True)
    boxed = nn.with_logical_partitioning(init, letters)
    return boxed(key, shape, model.param_dtype)

  if spec.kind == "prefix":
    axes = ("L", c.layers), ("N", spec.latents), ("K", c.kv_heads)
    axes = *axes, ("E", c.head_dim)
    init = zeros if harmless else normal
    keys = zip(("prefix_keys", "prefix_values"), (body, soft), strict=True)
    return {name: param(key, init, *axes) for name, key in keys}
  tree, parts = {}, NETWORK[spec.kind]
  if parts:
    whole = transformer.init(model, body)
    tree["transformer"] = {k: whole[k] for k in parts}
  at_zero = harmless and spec.kind in ("pause", "handover")
  axes = (None, spec.latents), ("D", c.width)
  tree["soft_tokens"] = param(soft, zeros if at_zero else normal, *axes)
  if harmless and "final_norm" in parts:
    axes = (None, c.width), ("D", c.width)
    tree["latent_projection"] = param(soft, zeros, *axes)
  return tree


def init(
  model: Transformer,
  spec: TraceSpec,
  key: jax.Array,
  decoder: Params,
  source: str = "decoder",
) -> Params:
  """Fresh coprocessor parameters; `source` is 'decoder' (copy) or 'scratch'.

  Raises:
    UserError: another `source`.
  """
  if source not in INITS:
    raise UserError(
      f"coprocessor.init={source!r} is not one of {', '.join(INITS)}"
    )
  params = nn.unbox(init_boxed(model, spec, key))
  if source == "decoder" and "transformer" in params:
    copy = {k: decoder[k] for k in params["transformer"]}
    params["transformer"] = jax.tree.map(
      lambda x: jnp.array(x, model.param_dtype, copy=True), copy
    )
  return params


def fewer(
  params: Params, spec: TraceSpec, latents: int
) -> tuple[Params, TraceSpec]:
  """The same coprocessor with fewer latents than it was trained for.

  The last soft tokens (of a prefix, entries) are kept: counted from the point,
  each then stands where it stood in training, and the last one is still last.

  Raises:
    UserError: less than one, or more than it was trained for.
  """
  if not 1 <= latents <= spec.latents:
    raise UserError(
      f"{latents} latents: this coprocessor was trained for {spec.latents} and "
      f"can be used with 1 to {spec.latents}"
    )
  first, axis = spec.latents - latents, {"soft_tokens": 0}
  axis |= {"prefix_keys": 1, "prefix_values": 1}
  kept = {
    name: jax.lax.slice_in_dim(params[name], first, None, axis=axis[name])
    for name in axis
    if name in params
  }
  return params | kept, dataclasses.replace(spec, latents=latents)


def reading(
  model: Transformer,
  params: Params,
  cache: KVCache,
  states: jax.Array | None,  # [B, S, D], the decoder's of the cache's slots
  spec: TraceSpec,
) -> KVCache:
  """What the coprocessor's rows read: the decoder's cache, or its own."""
  if not spec.reads_states:
    return cache
  assert states is not None, "the decoder's hidden states were not kept"
  rows = Rows.plain(cache.positions, cache.segments)
  own = transformer.run(
    model,
    params["transformer"],
    states[:, None],
    rows,
    None,
    trained=True,
    kv_only=True,
  )
  return cache.replace(keys=own.keys[:, :, 0], values=own.values[:, :, 0])


def latents(
  model: Transformer,
  params: Params,
  cache: KVCache,  # of `reading`
  traces: Traces,
  copied: jax.Array,  # [B, M, N, D], the decoder's embeddings of traces.copied
  repeated: jax.Array | None = None,  # [B, M, N, D], of traces.repeated
  given: Given | None = None,  # rows of the block that were run before
) -> jax.Array:  # z [B, M, N, D]
  """Pass 2: all latents of all traces in one forward call."""
  out = outputs(model, params, cache, traces, copied, given)
  place = copied if repeated is None else repeated
  return combine(place, out, traces.start == "harmless")


def outputs(
  model: Transformer,
  params: Params,
  cache: KVCache,
  traces: Traces,
  copied: jax.Array,  # [B, M, N, D], as of `latents`
  given: Given | None = None,
) -> jax.Array:  # [B, M, N, D]
  """What is trained contributes to z; `combine` makes z of it."""
  x = _inputs(params, traces, copied)
  if traces.kind == "pause":
    return x
  rows = traces.latent_rows
  if traces.kind == "activations":
    rows = rows.replace(starts=None)  # gradients of what is read are wanted
  hidden = transformer.run_blocks(
    model,
    params["transformer"],
    x,
    rows,
    cache,
    trained=True,
    given=given,
  )
  if "latent_projection" not in params:
    return hidden
  projection = params["latent_projection"].astype(hidden.dtype)
  return hidden @ placement.for_use(projection, (None, "D"))


def _inputs(params, traces, copied):
  """The coprocessor's input rows [B, M, N, D]; the soft tokens of a pause."""
  soft = params["soft_tokens"].astype(copied.dtype)[None, None]
  if traces.start == "harmless" and traces.kind != "pause":
    return soft + copied
  return jnp.broadcast_to(soft, copied.shape)


def combine(
  copied: jax.Array,  # [..., D], embeddings where z is to stand
  out: jax.Array,  # [..., D] of `outputs`
  harmless: bool,
) -> jax.Array:  # z [..., D]
  """z; where latents come late, `copied` is of a later point than `out`."""
  return copied + out if harmless else out


def given(
  model: Transformer,
  params: Params,
  cache: KVCache,
  traces: Traces,
  copied: jax.Array,  # [B, M, N, D], the decoder's embeddings of traces.copied
) -> Given:
  """Pass 2 of the kinds that hand over keys and values in place of z."""
  if traces.kind == "handover":
    own = transformer.run(
      model,
      params["transformer"],
      _inputs(params, traces, copied),
      traces.latent_rows,
      cache,
      trained=True,
      kv_only=True,
    )
    return own.keys, own.values
  keys, values = (
    params[name].astype(model.dtype)[:, None, None]  # [L, 1, 1, N, K, E]
    for name in ("prefix_keys", "prefix_values")
  )
  at = traces.latent_rows.positions  # [B, M, N]
  keys = rotate(keys, rope_of_layers(model.config, at))
  if traces.start == "harmless":
    there, here, positions = _entries(cache, traces)
    # To where the latents stand; by 'insert' these come later.
    moved = rope_of_layers(model.config, at - positions, scaled=False)
    keys, values = keys + rotate(there, moved), values + here
  return keys, jnp.broadcast_to(values, keys.shape)


def _entries(cache, traces):
  """Keys and values [L, B, M, N, K, E] of p-N+1 .. p, positions [B, M, N].

  In slots by the number of their tokens, as long as nothing stands between.
  """
  n = traces.copied.shape[-1]
  slots = traces.points[..., None] + jnp.arange(1 - n, 1)[None, None]
  slots = jnp.maximum(slots, 0)

  def take(array, axis):
    return jax.vmap(lambda x, i: jnp.take(x, i, axis), (axis, 0), axis)(
      array, slots
    )

  return take(cache.keys, 1), take(cache.values, 1), take(cache.positions, 0)
