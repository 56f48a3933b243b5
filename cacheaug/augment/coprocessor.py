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
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from cacheaug.augment.traces import Traces, TraceSpec
from cacheaug.errors import UserError
from cacheaug.model import placement, transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, Transformer

INITS = ("decoder", "scratch")
SOFT_TOKEN_STDDEV = 0.02  # not stated in the paper; small beside embeddings


def init_boxed(model: Transformer, spec: TraceSpec, key: jax.Array) -> Params:
  """Random parameters, boxed with their logical axes (for shardings)."""
  body, soft = jax.random.split(key)
  tree = transformer.init(model, body)
  width = model.config.width
  box = nn.with_logical_partitioning
  params = {
    "transformer": {k: tree[k] for k in ("blocks", "final_norm")},
    "soft_tokens": box(nn.initializers.normal(SOFT_TOKEN_STDDEV), (None, "D"))(
      soft, (spec.latents, width), model.param_dtype
    ),
  }
  if spec.start == "harmless":
    params["latent_projection"] = box(nn.initializers.zeros, (None, "D"))(
      soft, (width, width), model.param_dtype
    )
  return params


def init(
  model: Transformer,
  spec: TraceSpec,
  key: jax.Array,
  decoder: Params,
  source: str = "decoder",
) -> Params:
  """Fresh coprocessor parameters; `source` is 'decoder' (copy) or 'scratch'."""
  if source not in INITS:
    raise UserError(
      f"coprocessor.init={source!r} is not one of {', '.join(INITS)}"
    )
  params = nn.unbox(init_boxed(model, spec, key))
  if source == "decoder":
    copy = {k: decoder[k] for k in params["transformer"]}
    params["transformer"] = jax.tree.map(
      lambda x: jnp.array(x, model.param_dtype, copy=True), copy
    )
  return params


def fewer(
  params: Params, spec: TraceSpec, latents: int
) -> tuple[Params, TraceSpec]:
  """The same coprocessor with fewer latents than it was trained for.

  The last soft tokens are kept: counted from the point, each then stands where
  it stood in training, and the last one predicts the next token.

  Raises:
    UserError: less than one, more than it was trained for, or a kind that has
      no soft tokens.
  """
  if not 1 <= latents <= spec.latents:
    raise UserError(
      f"{latents} latents: this coprocessor was trained for {spec.latents} and "
      f"can be used with 1 to {spec.latents}"
    )
  if latents == spec.latents:
    return params, spec
  if "soft_tokens" not in params:
    raise UserError("no soft tokens to leave out: use all latents as trained")
  kept = params["soft_tokens"][spec.latents - latents :]
  return params | {"soft_tokens": kept}, dataclasses.replace(
    spec, latents=latents
  )


def latents(
  model: Transformer,
  params: Params,
  cache: KVCache,
  traces: Traces,
  copied: jax.Array,  # [B, M, N, D], the decoder's embeddings of traces.copied
  repeated: jax.Array | None = None,  # the same of traces.repeated, if any
) -> jax.Array:  # z [B, M, N, D]
  """Pass 2: all latents of all traces in one forward call."""
  out = outputs(model, params, cache, traces, copied)
  place = copied if repeated is None else repeated
  return combine(place, out, "latent_projection" in params)


def outputs(
  model: Transformer,
  params: Params,
  cache: KVCache,
  traces: Traces,
  copied: jax.Array,  # as of `latents`
) -> jax.Array:  # [B, M, N, D]
  """What the network itself contributes to z; `combine` makes z of it."""
  soft = params["soft_tokens"].astype(copied.dtype)[None, None]
  harmless = "latent_projection" in params
  x = soft + copied if harmless else jnp.broadcast_to(soft, copied.shape)
  hidden = transformer.run_blocks(
    model, params["transformer"], x, traces.latent_rows, cache, trained=True
  )
  if not harmless:
    return hidden
  projection = params["latent_projection"].astype(hidden.dtype)
  return hidden @ placement.for_use(projection, (None, "D"))


def combine(
  copied: jax.Array,  # [..., D], embeddings where z is to stand
  out: jax.Array,  # [..., D] of `outputs`
  harmless: bool,
) -> jax.Array:  # z [..., D]
  """z; where latents come late, `copied` is of a later point than `out`."""
  return copied + out if harmless else out
