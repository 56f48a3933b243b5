"""Negative log-likelihood over a large vocabulary, in chunks of rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

CHUNK_ELEMENTS = 2**26  # logits held at once; 256 MiB in float32


def token_nll(
  logits_of: Callable[[jax.Array], jax.Array],  # [..., D] -> [..., V]
  hidden: jax.Array,  # [..., D]
  targets: jax.Array,  # [...] tokens
  vocab_size: int,  # V
) -> jax.Array:  # [...] nats, float32
  """Nll of each row's target under the (soft-capped) logits.

  Where all logits at once would exceed CHUNK_ELEMENTS, rows go through in
  chunks whose logits are recomputed in the backward pass.
  """

  def nll(rows, wanted):
    logits = logits_of(rows)
    top = jax.nn.logsumexp(logits, axis=-1)
    return top - jnp.take_along_axis(logits, wanted[..., None], -1)[..., 0]

  if targets.size * vocab_size <= CHUNK_ELEMENTS:
    return nll(hidden, targets)
  rows = max(1, CHUNK_ELEMENTS // vocab_size)
  pad = -targets.size % rows
  flat = jnp.pad(hidden.reshape(targets.size, -1), ((0, pad), (0, 0)))
  wanted = jnp.pad(targets.reshape(-1), (0, pad))
  out = jax.lax.map(
    lambda args: jax.checkpoint(nll)(*args),
    (flat.reshape(-1, rows, flat.shape[-1]), wanted.reshape(-1, rows)),
  )
  return out.reshape(-1)[: targets.size].reshape(targets.shape)
