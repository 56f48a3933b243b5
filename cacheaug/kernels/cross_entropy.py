"""Negative log-likelihood over a large vocabulary, in chunks of rows.

No [rows, V] array outlives its chunk. Where the head is frozen, the forward
pass also computes d(nll)/d(hidden) from the same logits, and the backward pass
only scales it: two products with the embedding, not three.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Rows of logits that a device holds at once. A small V allows many; for a large
# one the number is enough that the product with the embedding is bound by
# arithmetic and not by reading it (2304 x 256k in bfloat16: 1.2 GB a chunk).
CHUNK_ELEMENTS = 2**21
CHUNK_ROWS = 512

LogitsOf = Callable[[jax.Array], jax.Array]  # [..., D] -> [..., V]


def token_nll(
  logits_of: LogitsOf,
  hidden: jax.Array,  # [B, ..., D]
  targets: jax.Array,  # [B, ...] tokens
  *,
  vocab_size: int,  # V
  shards: int = 1,  # devices that B is split over
  frozen: bool = False,
) -> jax.Array:  # [B, ...] nats, float32
  """Nll of each row's target under the (soft-capped) logits.

  Args:
    logits_of: the head; may close over its parameters.
    hidden: rows.
    targets: of each row.
    vocab_size: V.
    shards: of B; chunks are cut from the other axes alone.
    frozen: no gradient with respect to the head's parameters is needed.
      Otherwise the backward pass computes the chunks' logits again.
  """
  b = hidden.shape[0]
  rows = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)
  size = max(1, rows // max(1, b // shards))
  flat = hidden.reshape(b, -1, hidden.shape[-1]), targets.reshape(b, -1)
  if frozen:
    out = _frozen(logits_of, size, *flat)
  else:
    nll = jax.checkpoint(lambda *args: _nll(logits_of, *args)[0])
    out = _in_chunks(nll, size, *flat)
  return out.reshape(targets.shape)


def soft_nll(
  logits_of: LogitsOf,
  hidden: jax.Array,  # [B, ..., D]
  tokens: jax.Array,  # [B, ..., C] candidates
  weights: jax.Array,  # [B, ..., C], their probabilities
  *,
  vocab_size: int,  # V
  shards: int = 1,
) -> jax.Array:  # [B, ...] nats, float32
  """Cross-entropy of each row with a distribution over C candidates and a rest.

  The rest, all other tokens together, has the probability that is left. Other
  arguments are as of `token_nll`. Chunks' logits are computed again in the
  backward pass.
  """

  def chunk(hidden, targets):
    tokens, weights = targets
    logits = logits_of(hidden)
    lse = jax.nn.logsumexp(logits, -1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens, -1) - lse
    # Below 0, so that candidates that are all there is leave a finite rest.
    together = jnp.minimum(jax.nn.logsumexp(chosen, -1), -1e-6)
    rest = jnp.log1p(-jnp.exp(together))
    left = 1.0 - weights.sum(-1)
    return -(weights * chosen).sum(-1) - left * rest

  targets = tokens, jax.lax.stop_gradient(weights)
  return _by_rows(jax.checkpoint(chunk), hidden, targets, vocab_size, shards)


def top_tokens(
  logits_of: LogitsOf,
  hidden: jax.Array,  # [B, ..., D]
  top: int,  # C
  *,
  vocab_size: int,  # V
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:  # [B, ..., C] each
  """The C most likely tokens of each row, and their probabilities."""

  def chunk(hidden, _):
    logits = logits_of(hidden)
    best, tokens = jax.lax.top_k(logits, min(top, vocab_size))
    lse = jax.nn.logsumexp(logits, -1, keepdims=True)
    return tokens, jnp.exp(best - lse)

  return _by_rows(chunk, hidden, (), vocab_size, shards)


def _by_rows(function, hidden, targets, vocab_size, shards):
  """`_in_chunks` of any leading axes; targets are a tree of [B, ..., C]."""
  b, rows = hidden.shape[0], hidden.shape[:-1]
  size = max(CHUNK_ROWS, CHUNK_ELEMENTS // vocab_size)
  size = max(1, size // max(1, b // shards))

  def flat(x):
    return x.reshape(b, -1, x.shape[-1])

  args = flat(hidden), jax.tree.map(flat, targets)
  out = _in_chunks(function, size, *args)
  return jax.tree.map(lambda x: x.reshape(*rows, *x.shape[2:]), out)


def _nll(logits_of, hidden, targets):
  """Nll, logits and log-sum-exp of each row."""
  logits = logits_of(hidden)
  lse = jax.nn.logsumexp(logits, axis=-1)
  target_logit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
  return lse - target_logit, logits, lse


def _nll_and_gradient(logits_of, hidden, targets):
  """Nll and d(nll)/d(hidden), from the same logits."""

  def head(hidden):
    logits = logits_of(hidden)
    return logits, logits

  logits, head_vjp, _ = jax.vjp(head, hidden, has_aux=True)
  lse = jax.nn.logsumexp(logits, axis=-1)
  tokens = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,))
  is_target = tokens == targets[..., None]
  out = lse - jnp.where(is_target, logits, 0.0).sum(-1)
  (gradient,) = head_vjp(jnp.exp(logits - lse[..., None]) - is_target)
  return out, gradient


def _frozen(logits_of, size, hidden, targets):
  @jax.custom_vjp
  def nll(hidden):
    return _in_chunks(
      lambda *args: _nll(logits_of, *args)[0], size, hidden, targets
    )

  def forward(hidden):
    return _in_chunks(
      lambda *args: _nll_and_gradient(logits_of, *args), size, hidden, targets
    )

  def backward(gradient, dnll):
    return ((gradient * dnll[..., None]).astype(gradient.dtype),)

  nll.defvjp(forward, backward)
  return nll(hidden)


def _in_chunks(function, size, hidden, targets):
  """Applies a function of [B, t, D] and trees of [B, t, ...] to chunks of T."""
  t = hidden.shape[1]
  if t <= size:
    return function(hidden, targets)
  chunks = -(-t // size)
  size = -(-t // chunks)
  pad = chunks * size - t

  def split(x):  # [B, T, ...] -> [chunks, B, size, ...]
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], chunks * size, *x.shape[3:])[:, :t]

  parts = split(hidden), jax.tree.map(split, targets)
  out = jax.lax.map(lambda a: function(*a), parts)
  return jax.tree.map(join, out)
