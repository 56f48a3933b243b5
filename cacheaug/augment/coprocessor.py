"""The coprocessor: a context cache and N soft tokens in, N latents out.

Paper section 2.2: a network of the decoder's architecture, its weights a copy
of the decoder's at the start, reads the frozen decoder's cache with N trainable
soft tokens; its last hidden states are the latents.

A coprocessor's parameters are {transformer: {blocks, final_norm},
soft_tokens [N, D]} and, with the harmless start, latent_projection [D, D].

  as_is     input = soft token;          z = hidden
  harmless  input = soft token + token;  z = token + hidden @ projection

where token is the decoder's own embedding of the context token p-N+1+i. The
projection starts at zero, so the latents begin as copies of the context's last
N tokens, and with positions 'replace' the pair begins as exactly the frozen
decoder. For latents that come late (traces.py), the token of the input is
counted from where the cache was read (`input_tokens`), the token of z from
where the latents are inserted (`base_tokens`).

The other kinds (kinds.py) change this:

  activations  `source_cache` is a cache of the network's own.
  pause        {soft_tokens} alone; z = soft token (+ token).
  handover     {transformer: {blocks}, soft_tokens}; see kv_latents.py.
  prefix       {prefix_keys, prefix_values}; see kv_latents.py.

Both of the latter may have a {kv_bias} [L, N, K].

The harmless start of pause, prefix and handover needs no projection: soft
tokens or prefix begin at zero (and get gradients all the same).
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacheaug.augment.kinds import Kind
from cacheaug.augment.traces import Layout, Traces
from cacheaug.errors import UserError
from cacheaug.model import placement, transformer
from cacheaug.model.attention import QueryLayout
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, PastKV, Transformer

INITS = ("decoder", "scratch")
SOFT_TOKEN_STDDEV = 0.02  # not stated in the paper; small beside embeddings


def init_boxed(model: Transformer, layout: Layout, key: jax.Array) -> Params:
  """Random parameters, boxed with their logical axes (for shardings)."""
  body, soft = jax.random.split(key)
  c, harmless = model.config, layout.start == "harmless"
  normal = nn.initializers.normal(SOFT_TOKEN_STDDEV)
  zeros = nn.initializers.zeros

  def param(key, init, *axes):
    """Of axis letters with sizes."""
    letters, shape = zip(*axes, strict=True)
    boxed = nn.with_logical_partitioning(init, letters)
    return boxed(key, shape, model.param_dtype)

  tree = {}
  if layout.kv_bias:
    axes = ("L", c.layers), ("N", layout.latents), ("K", c.kv_heads)
    tree["kv_bias"] = param(body, zeros, *axes)
  if layout.kind is Kind.PREFIX:
    axes = ("L", c.layers), ("N", layout.latents), ("K", c.kv_heads)
    axes = *axes, ("E", c.head_dim)
    init = zeros if harmless else normal
    keys = zip(("prefix_keys", "prefix_values"), (body, soft), strict=True)
    return tree | {name: param(key, init, *axes) for name, key in keys}
  parts = layout.kind.network
  if parts:
    tree["transformer"] = layout.kind.part(transformer.init(model, body))
  at_zero = harmless and "final_norm" not in parts  # no projection
  axes = (None, layout.latents), ("D", c.width)
  tree["soft_tokens"] = param(soft, zeros if at_zero else normal, *axes)
  if harmless and "final_norm" in parts:
    axes = (None, c.width), ("D", c.width)
    tree["latent_projection"] = param(soft, zeros, *axes)
  return tree


def init(
  model: Transformer,
  layout: Layout,
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
  params = nn.unbox(init_boxed(model, layout, key))
  if source == "decoder" and "transformer" in params:
    copy = {k: decoder[k] for k in params["transformer"]}
    params["transformer"] = jax.tree.map(
      lambda x: jnp.array(x, model.param_dtype, copy=True), copy
    )
  return params


def fewer(
  params: Params, layout: Layout, latents: int
) -> tuple[Params, Layout]:
  """The same coprocessor with fewer latents than it was trained for.

  It keeps the last soft tokens, or the last entries of a prefix: counted from
  the point, each then stands where it stood in training.

  Raises:
    UserError: less than one, or more than it was trained for.
  """
  if not 1 <= latents <= layout.latents:
    raise UserError(
      f"{latents} latents: this coprocessor was trained for {layout.latents} "
      f"and can be used with 1 to {layout.latents}"
    )
  first, axis = layout.latents - latents, {"soft_tokens": 0}
  axis |= {"prefix_keys": 1, "prefix_values": 1, "kv_bias": 1}
  kept = {
    name: jax.lax.slice_in_dim(params[name], first, None, axis=axis[name])
    for name in axis
    if name in params
  }
  return params | kept, dataclasses.replace(layout, latents=latents)


def source_cache(
  model: Transformer,
  params: Params,
  cache: KVCache,
  states: jax.Array | None,  # [B, S, D], the decoder's of the cache's slots
  layout: Layout,
) -> KVCache:
  """The cache that the coprocessor's rows read: the decoder's, or its own."""
  if not layout.kind.reads_states:
    return cache
  assert states is not None, "the decoder's hidden states were not kept"
  rows = QueryLayout.plain(cache.positions, cache.segments)
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
  cache: KVCache,  # of `source_cache`
  traces: Traces,
  inputs: jax.Array,  # [B, M, N, D], embeddings of traces.input_tokens
  base: jax.Array | None = None,  # [B, M, N, D], of traces.base_tokens
  given: PastKV | None = None,  # keys and values of rows that were run before
) -> jax.Array:  # z [B, M, N, D]
  """Pass 2: all latents of all traces in one forward call."""
  hidden = hidden_states(model, params, cache, traces, inputs, given)
  return to_latents(params, hidden, traces, inputs, base)


def to_latents(
  params: Params,
  hidden: jax.Array,  # [B, M, N, D] of `hidden_states`
  traces: Traces,
  inputs: jax.Array,  # [B, M, N, D], as of `latents`, these two
  base: jax.Array | None = None,  # [B, M, N, D]
) -> jax.Array:  # z [B, M, N, D]
  """The second half of `latents`."""
  base = inputs if base is None else base
  return combine(base, project(params, hidden), traces.start == "harmless")


def outputs(
  model: Transformer,
  params: Params,
  cache: KVCache,
  traces: Traces,
  inputs: jax.Array,  # [B, M, N, D], as of `latents`
  given: PastKV | None = None,
) -> jax.Array:  # [B, M, N, D]
  """`project(hidden_states(...))`: the trained part of z.

  It is what `combine` adds the copied embedding to. For the background and
  diagnostics; training calls `hidden_states` and `to_latents`.
  """
  return project(
    params, hidden_states(model, params, cache, traces, inputs, given)
  )


def hidden_states(
  model: Transformer,
  params: Params,
  cache: KVCache,  # of `source_cache`
  traces: Traces,
  inputs: jax.Array,  # [B, M, N, D], as of `latents`
  given: PastKV | None = None,
) -> jax.Array:  # [B, M, N, D]
  """The network's last hidden states; its input, where there is no network."""
  x = input_rows(params, traces, inputs)
  if "transformer" not in params:
    return x
  rows = traces.latent_rows
  if traces.kind.reads_states:
    # Gradients of what is read are wanted.
    rows = rows.replace(context_start=None)
  return transformer.run_blocks(
    model,
    params["transformer"],
    x,
    rows,
    cache,
    trained=True,
    past_kv=given,
  )


def project(
  params: Params,
  hidden: jax.Array,  # [..., D] of `hidden_states`
) -> jax.Array:  # [..., D]
  """Hidden states times the harmless start's projection, where there is one."""
  if "latent_projection" not in params:
    return hidden
  projection = params["latent_projection"].astype(hidden.dtype)
  return hidden @ placement.for_use(projection, (None, "D"))


def input_rows(
  params: Params,
  traces: Traces,
  inputs: jax.Array,  # [B, M, N, D], as of `latents`
) -> jax.Array:  # [B, M, N, D]
  """The network's input; without a network, what is added to `inputs`."""
  soft = params["soft_tokens"].astype(inputs.dtype)[None, None]
  if traces.start == "harmless" and "transformer" in params:
    return soft + inputs
  return jnp.broadcast_to(soft, inputs.shape)


def combine(
  base: jax.Array,  # [..., D], embeddings of the tokens where z is to stand
  out: jax.Array,  # [..., D] of `outputs`
  harmless: bool,
) -> jax.Array:  # z [..., D]
  """Z. Of latents that come late, `base` is of a later point than `out`."""
  return base + out if harmless else out
