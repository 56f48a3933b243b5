"""Latents on top of earlier latents: a trace of several rounds.

A trace with `rounds` > 1 is a chain. Round 1 inserts latents after p; each
later round inserts latents `stride` = k tokens further on, by a coprocessor
that also reads the earlier latents and the k tokens between. Every round but
the last predicts those k tokens, the last predicts A: `tokens_predicted` in
all. With k = 0 all rounds are at p and only the last predicts.

Each round is the passes of objective.py over the same context. The rows that
the decoder's pass of one round has run are in the cache of the next: their keys
and values are given to it (transformer.run's `past_kv`), and gradients go back
through them into the earlier latents. With N = 1, k = 1, A = 2, a trace of two
rounds after b, the decoder's pass (positions 'insert'):

             a b c d | b' c | c' d
         b'  # #       #
         c   # #       #  #
         c'  # #       #  #   #
         d   # #       #  #   #  #

Row b' predicts c, and c' predicts d; nothing is read off row c, as latents come
before the next token. With 'replace', latents stand in place of the N entries
before them, be they of the context, earlier latents or tokens between. What
has been hidden stays so:

             a b c d | b' c | c' d
         b'  #         #
         c   #         #  #
         c'  #         #      #
         d   #         #      #  #

The coprocessor reads what the decoder sees before its latents hide anything,
the first round the whole context; N rows, here one, each round:

             a b c d | b' c | 1 2
         1   # #              #
         2   #         #  #     #

Positions, hidden entries and input tokens are those of inference with
InsertionSchedule(every=k) (inference/session.py), which tests hold this to.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.augment import coprocessor, traces
from cacheaug.augment.traces import Layout, Traces
from cacheaug.errors import UserError
from cacheaug.model import transformer
from cacheaug.model.attention import QueryLayout
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, Transformer


@flax.struct.dataclass
class Round:
  """One round of M chains; G rows of the rounds before are given to it."""

  latent_rows: QueryLayout  # pass 2: G + N rows a trace
  rows: QueryLayout  # pass 3: G + N + Q rows a trace
  input_tokens: jax.Array  # [B, M, N] tokens up to this round's point
  fed: jax.Array  # [B, M, Q] tokens that follow its latents
  predicts: int = flax.struct.field(pytree_node=False)  # tokens of `targets`


def layout_traces(
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  points: jax.Array,  # [B, M], -1 = no trace
  layout: Layout,
  late: jax.Array | None = None,  # [B, M] tokens; of one round only
) -> Traces:
  """`traces.layout_traces`, of as many rounds as the layout says.

  Of several rounds, targets and weights are over all the tokens predicted, rows
  are those of `Traces.rounds`, and the rows of the Traces itself are not used.

  Raises:
    UserError: several rounds that come late.
  """
  if layout.rounds == 1:
    return traces.layout_traces(tokens, documents, points, layout, late)
  if late is not None:
    raise UserError(
      f"traces.rounds={layout.rounds}: latents of several rounds cannot come "
      "late"
    )
  whole = dataclasses.replace(
    layout, rounds=1, stride=0, ahead=layout.tokens_predicted
  )
  chains = traces.layout_traces(tokens, documents, points, whole)
  rounds = tuple(
    _round(tokens, chains, layout, i) for i in range(layout.rounds)
  )
  return chains.replace(rounds=rounds)


def _round(tokens, chains, layout, i):
  n, k, hides = layout.latents, layout.stride, layout.positions == "replace"
  p = jnp.maximum(chains.points, 0)[..., None]  # [B, M, 1]
  reading, decoding = masks(layout, i)
  at = offsets(layout, i)
  before = len(at) - n - tokens_fed(layout, i)

  def rows(offsets, order, limits):
    positions = p + jnp.asarray(offsets)[None, None]
    segments = chains.latent_rows.segments[..., :1]
    return QueryLayout(
      positions,
      jnp.broadcast_to(segments, positions.shape),
      limits,
      block_mask=jnp.asarray(order)[None, None],
      context_start=chains.latent_rows.context_start,
    )

  index = p + k * i + jnp.arange(1 - n, 1)[None, None]
  index = jnp.clip(index, 0, tokens.shape[-1] - 1)
  return Round(
    latent_rows=rows(at[: before + n], reading, p - n if hides and i else p),
    rows=rows(at, decoding, p - n if hides else p),
    input_tokens=jax.vmap(lambda row, index: row[index])(tokens, index),
    fed=chains.targets[..., k * i : k * i + tokens_fed(layout, i)],
    predicts=k if i < layout.rounds - 1 else layout.ahead,
  )


def tokens_fed(layout: Layout, i: int) -> int:
  """Q, tokens that the decoder reads in round i (from 0), after its latents.

  Of every round but the last all k, as the next one reads them.
  """
  return layout.stride if i < layout.rounds - 1 else layout.ahead - 1


def offsets(layout: Layout, i: int) -> np.ndarray:
  """Positions, from p, of all rows up to those of round i (from 0)."""
  n, found = layout.latents, []
  for j in range(i + 1):
    # By 'insert' latents are further tokens, which push back what follows.
    pushed = n * (j + 1) if layout.positions == "insert" else 0
    first = layout.stride * j + pushed
    found.append(np.arange(first - n + 1, first + 1))
    found.append(first + 1 + np.arange(tokens_fed(layout, j)))
  return np.concatenate(found).astype(np.int32)


def masks(layout: Layout, i: int) -> tuple[np.ndarray, np.ndarray]:
  """Who sees whom of a chain's own rows in round i (from 0).

  [G + N, G + N] bool for the coprocessor's pass and [G + N + Q] squared for the
  decoder's. Rows of earlier rounds (past_kv) are not queries: their rows of the
  mask are unused. Windows are not in it: they compare positions, which the
  model does.
  """
  n, at = layout.latents, offsets(layout, i)
  sizes = [n + tokens_fed(layout, j) for j in range(i + 1)]
  of_round = np.repeat(np.arange(i + 1), sizes)
  given = len(at) - sizes[-1]
  # Whether the latents of the round after an entry's own leave it.
  left = np.ones(len(at), bool)
  if layout.positions == "replace":
    left = at <= layout.stride * (of_round + 1) - n
  causal = np.tri(len(at), dtype=bool)
  reading = causal & (left | (of_round >= i - 1))[None]
  decoding = causal & (left | (of_round == i))[None]
  return reading[: given + n, : given + n], decoding


def states(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,
  chains: Traces,  # of `layout_traces`, of several rounds
  *,
  latents_of: str | None = None,  # as of objective.traces_states
) -> tuple[jax.Array, jax.Array]:  # [B, M, A, D], [B, M, rounds N, D]
  """Passes 2 and 3 of every round: `objective.traces_states`."""
  given, found, latents = None, [], []
  for this in chains.rounds:
    n = this.input_tokens.shape[-1]
    first = 0 if latents_of == "decoder" else n - 1
    rows = chains.replace(latent_rows=this.latent_rows)
    inputs = transformer.embed(model, decoder, this.input_tokens)
    hidden = coprocessor.hidden_states(
      model, coproc, cache, rows, inputs, given
    )
    z = coprocessor.to_latents(coproc, hidden, rows, inputs)
    fed = transformer.embed(model, decoder, this.fed)
    out = transformer.run(
      model,
      decoder,
      jnp.concatenate([z.astype(fed.dtype), fed], axis=2),
      this.rows,
      cache,
      first_output_row=first,
      past_kv=given,
    )
    if latents_of == "decoder":
      hidden = out.hidden[:, :, :n]
    latents.append(hidden)
    last = n - 1 - first  # the last latent's row is the first that predicts
    found.append(out.hidden[:, :, last : last + this.predicts])
    own = out.keys, out.values
    if given is not None:
      own = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 3), given, own)
    given = own
  return jnp.concatenate(found, axis=2), jnp.concatenate(latents, axis=2)
