"""Perplexity by position (the paper's table 1), latents after every token.

For every token of the held-out text that can bear a trace, the frozen decoder
and the augmented one predict the same A following tokens from the same
context; rows are paired token by token, and intervals resample documents.
"""

import dataclasses
import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.traces import TraceSpec
from cacheaug.evals.report import PositionRow, make_row
from cacheaug.model.transformer import Params, Transformer

POSITIONS = (1, 2, 4, 8, 16, 32)
# Score elements of one run of blocks; more points than fit go in turns.
POINTS_AT_ONCE = 64


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def both_nll(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  *,
  spec: TraceSpec,
  late: jax.Array | None = None,  # [], tokens; None: not
  late_room: jax.Array | None = None,  # [], with `late`
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Frozen nll, augmented nll and weights, each [B, S, A], a row a point.

  Row p is the trace after token p; its weight is 0 where p cannot bear one or
  the ahead token is in another document. With `late` all latents come so many
  tokens after what the coprocessor has read; points whose latents could not
  come `late_room` tokens late weigh nothing, so that the tokens compared are
  the same whatever `late` is, up to `late_room`.
  """
  b, s = tokens.shape
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, spec
  )
  reading = coprocessor.reading(model, coproc, cache, hidden, spec)
  plain = objective.next_token_nll(model, decoder, hidden, tokens)
  index = jnp.arange(s)[:, None] + jnp.arange(spec.ahead)[None]  # [S, A]
  frozen = plain[:, jnp.minimum(index, s - 2)]
  valid = traces.valid_points(documents, spec)
  points = jnp.where(valid, jnp.arange(s)[None], -1)
  if late is not None:
    room = traces.late_room(documents, points, spec)
    points = jnp.where(room >= late_room, points, -1)

  def some(points):  # [B, m]
    delay = late
    if late is not None:
      delay = jnp.where(points >= 0, late, 0)
    laid = traces.lay_out(tokens, documents, points, spec, delay)
    nll = objective.traces_nll(model, decoder, coproc, cache, laid, reading)
    return nll, laid.weights

  m = min(POINTS_AT_ONCE, s)
  pad = -s % m
  points = jnp.pad(points, ((0, 0), (0, pad)), constant_values=-1)
  runs = jnp.moveaxis(points.reshape(b, -1, m), 1, 0)
  nll, weights = jax.lax.map(some, runs)  # [runs, B, m, A]

  def join(x):  # [runs, B, m, A] -> [B, S, A]
    return jnp.moveaxis(x, 0, 1).reshape(b, s + pad, -1)[:, :s]

  return frozen, join(nll), join(weights)


def by_position(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batches: Iterable[dict[str, np.ndarray]],  # tokens, documents [B, S]
  spec: TraceSpec,
  *,
  positions: tuple[int, ...] = POSITIONS,
  seed: int = 0,
  late: int = 0,
  late_room: int = 0,
) -> list[PositionRow]:
  """The table: a row for each of `positions` that a document reaches.

  Positions beyond spec.ahead are left out too.

  Args:
    model: of decoder and coprocessor.
    decoder: frozen parameters.
    coproc: the coprocessor's.
    batches: held-out text.
    spec: the coprocessor's.
    positions: ahead tokens to report, from 1.
    seed: of the intervals' resampling.
    late: tokens by which all latents come late.
    late_room: compare only points whose latents could come so late; the same
      tokens then for every `late` up to it.

  Raises:
    UserError: no document has room for a trace and a token after it.
  """
  delay = {}
  if late or late_room:
    room = np.int32(max(late, late_room))
    delay = {"late": np.int32(late), "late_room": room}
  positions = tuple(j for j in positions if j <= spec.ahead)
  # The comparison is over full documents' tokens, whatever training skipped.
  spec = dataclasses.replace(spec, min_ahead=1, law="uniform")
  found = {j: [] for j in positions}
  for batch in batches:
    frozen, augmented, weights = map(
      np.asarray,
      both_nll(
        model,
        decoder,
        coproc,
        batch["tokens"],
        batch["documents"],
        spec=spec,
        **delay,
      ),
    )
    for j in positions:
      keep = weights[..., j - 1] > 0
      found[j].append(
        (
          frozen[..., j - 1][keep],
          augmented[..., j - 1][keep],
          batch["documents"][keep],
        )
      )
  rows = []
  for j in positions:
    frozen, augmented, documents = map(
      np.concatenate, zip(*found[j], strict=True)
    )
    # Short documents may not reach the far positions; none at all is refused.
    if len(frozen) or not rows:
      rows.append(make_row(j, frozen, augmented, documents, seed=seed))
  return rows
