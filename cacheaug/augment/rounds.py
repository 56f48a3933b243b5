"""Latents on top of earlier latents: a trace of several rounds.

A trace of `rounds` is a chain: latents after p, then, `stride` tokens k later,
latents after p + k by a coprocessor that reads the cache as it now stands, the
earlier latents and the k tokens in it, and so on. The last round predicts A
tokens, each before it the k up to the next: `reach` in all. With k = 0 all
rounds are at one point, and only the last predicts.

Each round is the passes of objective.py over the same context. The rows that
the decoder's pass of one round has run are in the cache of the next: their keys
and values are given to it (transformer.run's `given`), and gradients go back
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

Positions, hidden entries and copied tokens are those of inference with
Plan(every=k) (inference/engine.py), to which this is held in tests.
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
from cacheaug.model.attention import Rows
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, Transformer


@flax.struct.dataclass
class Round:
  """One round of M chains; G rows of the rounds before are given to it."""

  latent_rows: Rows  # pass 2: G + N rows a trace
  rows: Rows  # pass 3: G + N + Q rows a trace
  copied: jax.Array  # [B, M, N] tokens up to this round's point
  fed: jax.Array  # [B, M, Q] tokens that follow its latents
  predicts: int = flax.struct.field(pytree_node=False)  # tokens of `targets`


def lay_out(
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  points: jax.Array,  # [B, M], -1 = no trace
  layout: Layout,
  late: jax.Array | None = None,  # [B, M] tokens; of one round only
) -> Traces:
  """`traces.lay_out`, of as many rounds as the layout says.

  Of several, targets and weights are over all `layout.reach` tokens, `rounds`
  says where rows stand, and the rows of the Traces itself are not used.

  Raises:
    UserError: several rounds that come late.
  """
  if layout.rounds == 1:
    return traces.lay_out(tokens, documents, points, layout, late)
  if late is not None:
    raise UserError(
      f"traces.rounds={layout.rounds}: latents of several rounds cannot come "
      "late"
    )
  whole = dataclasses.replace(layout, rounds=1, stride=0, ahead=layout.reach)
  laid = traces.lay_out(tokens, documents, points, whole)
  rounds = tuple(_round(tokens, laid, layout, i) for i in range(layout.rounds))
  return laid.replace(rounds=rounds)


def _round(tokens, laid, layout, i):
  n, k, hides = layout.latents, layout.stride, layout.positions == "replace"
  p = jnp.maximum(laid.points, 0)[..., None]  # [B, M, 1]
  reading, decoding = masks(layout, i)
  at = offsets(layout, i)
  before = len(at) - n - fed_in(layout, i)

  def rows(offsets, order, limits):
    positions = p + jnp.asarray(offsets)[None, None]
    segments = laid.latent_rows.segments[..., :1]
    return Rows(
      positions,
      jnp.broadcast_to(segments, positions.shape),
      limits,
      order=jnp.asarray(order)[None, None],
      starts=laid.latent_rows.starts,
    )

  copied = p + k * i + jnp.arange(1 - n, 1)[None, None]
  copied = jnp.clip(copied, 0, tokens.shape[-1] - 1)
  return Round(
    latent_rows=rows(at[: before + n], reading, p - n if hides and i else p),
    rows=rows(at, decoding, p - n if hides else p),
    copied=jax.vmap(lambda row, index: row[index])(tokens, copied),
    fed=laid.targets[..., k * i : k * i + fed_in(layout, i)],
    predicts=k if i < layout.rounds - 1 else layout.ahead,
  )


def fed_in(layout: Layout, i: int) -> int:
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
    found.append(first + 1 + np.arange(fed_in(layout, j)))
  return np.concatenate(found).astype(np.int32)


def masks(layout: Layout, i: int) -> tuple[np.ndarray, np.ndarray]:
  """Who sees whom of a chain's own rows in round i (from 0).

  [G + N, G + N] bool for the coprocessor's pass and [G + N + Q] squared for the
  decoder's; of the G given rows, which ask nothing, nothing is said. Windows
  are not in it: they compare positions and are the model's business.
  """
  n, at = layout.latents, offsets(layout, i)
  sizes = [n + fed_in(layout, j) for j in range(i + 1)]
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
  laid: Traces,  # of `lay_out`, of several rounds
  *,
  latents_of: str | None = None,  # as of objective.traces_states
) -> tuple[jax.Array, jax.Array]:  # [B, M, reach, D], [B, M, rounds N, D]
  """Passes 2 and 3 of every round: `objective.traces_states`."""
  given, found, latents = None, [], []
  for this in laid.rounds:
    n = this.copied.shape[-1]
    first = 0 if latents_of == "decoder" else n - 1
    rows = laid.replace(latent_rows=this.latent_rows)
    copied = transformer.embed(model, decoder, this.copied)
    hidden = coprocessor.hidden_states(
      model, coproc, cache, rows, copied, given
    )
    z = coprocessor.to_latents(coproc, hidden, rows, copied)
    fed = transformer.embed(model, decoder, this.fed)
    out = transformer.run(
      model,
      decoder,
      jnp.concatenate([z.astype(fed.dtype), fed], axis=2),
      this.rows,
      cache,
      wanted=first,
      given=given,
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
