"""The same loss by the two ways that most people would write first.

Both mask one long sequence of rows densely, as the paper's section 2.3 reads
literally; they are what `python -m cacheaug.benchmark` measures objective.py
against, and give the same numbers.

  naive         the context's rows are run again in each pass, beside all
                traces' rows, under one [S + M R, S + M R] mask; every row gets
                logits.
  cached_dense  the context's cache is kept; all traces' rows are one block
                under a dense [M R, S + M R] mask, and all get logits.
"""

import jax
import jax.numpy as jnp
import optax

from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.objective import Sums
from cacheaug.augment.traces import Layout, Traces
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout
from cacheaug.model.transformer import Params, Transformer


def naive_loss(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batch: dict[str, jax.Array],  # as of the objective
  points: jax.Array,  # [B, M]
  spec: Layout,
) -> Sums:
  """`objective.coprocessor_loss`, the context's rows in every pass."""
  placed, cache, x = _traces_rows(model, decoder, coproc, batch, points, spec)
  context = transformer.embed(model, decoder, batch["tokens"])[:, None]
  rows = _with_context(placed.rows, cache.positions, cache.segments)
  hidden = transformer.run_blocks(
    model, decoder, jnp.concatenate([context, x], 2), rows, None
  )
  return _sums(model, decoder, hidden, placed)


def cached_dense_loss(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batch: dict[str, jax.Array],  # as of the objective
  points: jax.Array,  # [B, M]
  spec: Layout,
) -> Sums:
  """`objective.coprocessor_loss`, the traces' rows as one dense block."""
  placed, cache, x = _traces_rows(model, decoder, coproc, batch, points, spec)
  hidden = transformer.run_blocks(
    model, decoder, x, _one_block(placed.rows), cache
  )
  return _sums(model, decoder, hidden, placed)


def _traces_rows(model, decoder, coproc, batch, points, spec):
  """Passes 1 and 2, and what pass 3 reads [B, 1, M R, D]."""
  spec.kind.check("dense")
  if spec.rounds > 1:
    raise UserError(
      f"traces.rounds={spec.rounds}: there is no dense way to compute it; "
      "compare one round"
    )
  tokens, documents = batch["tokens"], batch["documents"]
  placed = traces.layout_traces(
    tokens, documents, points, spec, batch.get("late")
  )
  _, cache = objective.context_pass(model, decoder, tokens, documents, spec)
  z = _latents(model, decoder, coproc, cache, placed)
  ahead = transformer.embed(model, decoder, placed.ahead)
  return (
    placed,
    cache,
    _flat(jnp.concatenate([z.astype(ahead.dtype), ahead], 2)),
  )


def _sums(model, decoder, hidden, placed: Traces) -> Sums:
  """Logits of every row, the last M R of which are traces'; then their nll."""
  a = placed.targets.shape[-1]
  b, m, r = placed.rows.positions.shape
  logits = transformer.logits(model, decoder, hidden)[:, 0, -m * r :]
  logits = logits.reshape(b, m, r, -1)[:, :, r - a :]
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, placed.targets)
  return (nll * placed.weights).sum((0, 1)), placed.weights.sum((0, 1))


def _latents(model, decoder, coproc, cache, placed: Traces):
  """Pass 2, all traces' rows as one block; z [B, M, N, D]."""
  places = objective.embedded(model, decoder, placed)
  b, m, n, d = places[0].shape
  # One block has all traces' soft tokens.
  soft = jnp.tile(coproc["soft_tokens"], (m, 1))
  z = coprocessor.latents(
    model,
    coproc | {"soft_tokens": soft},
    cache,
    placed.replace(latent_rows=_one_block(placed.latent_rows)),
    *jax.tree.map(_flat, places),
  )
  return z.reshape(b, m, n, d)


def _flat(x: jax.Array) -> jax.Array:
  """[B, M, R, ...] -> [B, 1, M R, ...]."""
  return x.reshape(x.shape[0], 1, -1, *x.shape[3:])


def _order(rows: QueryLayout) -> jax.Array:
  """[B, 1, M R, M R] bool: an earlier row, or itself, of the same trace."""
  b, m, r = rows.positions.shape
  index = jnp.arange(m * r)
  same = index[:, None] // r == index[None] // r
  order = same & (index[:, None] >= index[None])
  return jnp.broadcast_to(order, (b, 1, m * r, m * r))


def _one_block(rows: QueryLayout) -> QueryLayout:
  limits = jnp.broadcast_to(rows.context_limit, rows.positions.shape)
  first = rows.first_visible
  if first is not None:
    first = _flat(jnp.broadcast_to(first, rows.positions.shape))
  return QueryLayout(
    _flat(rows.positions),
    _flat(rows.segments),
    _flat(limits),
    _order(rows),
    first_visible=first,
  )


def _with_context(
  rows: QueryLayout,
  positions: jax.Array,  # [B, S]
  segments: jax.Array,  # [B, S]
) -> QueryLayout:
  """[context | all traces] as one block, and its dense mask."""
  block = _one_block(rows)
  s = positions.shape[1]
  b, _, q, _ = block.block_mask.shape
  at = positions[:, None]
  causal = jnp.broadcast_to(jnp.tri(s, dtype=bool), (b, 1, s, s))
  seen = at[:, :, None] <= block.context_limit[..., None]
  if block.first_visible is not None:
    seen &= at[:, :, None] >= block.first_visible[..., None]
  unseen = jnp.zeros((b, 1, s, q), bool)
  order = jnp.concatenate(
    [
      jnp.concatenate([causal, unseen], 3),
      jnp.concatenate([seen, block.block_mask], 3),
    ],
    2,
  )
  return QueryLayout(
    jnp.concatenate([at, block.positions], 2),
    jnp.concatenate([segments[:, None], block.segments], 2),
    jnp.zeros((b, 1, 1), jnp.int32),
    order,
  )
