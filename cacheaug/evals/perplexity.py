"""Perplexity by position (the paper's table 1), latents after every token.

With data.answers_only, latents are where an answer begins instead.

For every token of the held-out text that can bear a trace, the frozen decoder
and the augmented one predict the same A following tokens from the same
context; rows are paired token by token, and intervals resample documents.

`document_sums` takes what is to be compared as a function of a batch, so that
other models' predictions of the same tokens (`plain_nll`) go into the same
table.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.augment import coprocessor, objective, point_sampling, rounds
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.evals.report import PositionRow, make_rows
from cacheaug.model.transformer import Params, Transformer

POSITIONS = (1, 2, 4, 8, 16, 32)
# Score elements of one run of blocks; more points than fit go in turns.
POINTS_AT_ONCE = 64

Batch = Mapping[str, np.ndarray]  # tokens, documents [B, S]
# Columns of nll [B, S, A] by name, and weights [B, S, A].
Measured = tuple[Mapping[str, jax.Array], jax.Array]


def point_weights(
  documents: jax.Array,  # [B, S]
  spec: Layout,
  context: int = 0,
) -> jax.Array:  # [B, S, A] float32
  """1 where the A tokens after each point count, 0 where they do not.

  A point bears a trace where `context` tokens (the coprocessor's own need by
  default) precede and include it in its document and one follows.
  """
  s = documents.shape[-1]
  valid = point_sampling.valid_points(documents, spec, context)
  target = (
    jnp.arange(s)[:, None] + jnp.arange(1, spec.tokens_predicted + 1)[None]
  )
  there = jnp.take(documents, jnp.minimum(target, s - 1), axis=-1)
  same = (there == documents[..., None]) & (target < s)[None]
  return (valid[..., None] & same).astype(jnp.float32)


def of_answers(weights: jax.Array, batch: Batch) -> jax.Array:  # [B, S, A]
  """0 also where no answer begins next, in batches that mark answers.

  And at tokens of later questions, where batches mark those.

  Training draws those points before all others, and latents of a prompt that
  is to be answered stand at its end. After a token within an answer they stand
  where few or no traces of the training did.
  """
  if "answers" not in batch:
    return weights
  begin = point_sampling.before_beginnings(batch["answers"])[..., None]
  if "asked" in batch:
    s, a = weights.shape[1:]
    target = jnp.arange(s)[:, None] + jnp.arange(1, a + 1)[None]
    begin = begin & ~jnp.take(
      batch["asked"], jnp.minimum(target, s - 1), axis=-1
    )
  return weights * begin


def points_of(
  documents: jax.Array,  # [B, S]
  spec: Layout,
  context: int = 0,
) -> jax.Array:  # [B, S]
  """Every point that bears a trace, -1 elsewhere; as of `point_weights`."""
  valid = point_sampling.valid_points(documents, spec, context)
  return jnp.where(valid, jnp.arange(documents.shape[-1])[None], -1)


def after_points(
  plain: jax.Array,  # [B, S - 1] of objective.next_token_nll
  ahead: int,
) -> jax.Array:  # [B, S, A]
  """Nll of the A tokens after each point; row p is the point after token p."""
  s = plain.shape[-1] + 1
  index = jnp.arange(s)[:, None] + jnp.arange(ahead)[None]  # [S, A]
  return plain[:, jnp.minimum(index, s - 2)]


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def plain_nll(
  model: Transformer,
  params: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  *,
  spec: Layout,
) -> jax.Array:  # [B, S, A] nats
  """A language model's nll of the A tokens after each point, no latents."""
  hidden, _ = objective.context_pass(model, params, tokens, documents, spec)
  plain = objective.next_token_nll(model, params, hidden, tokens)
  return after_points(plain, spec.tokens_predicted)


@functools.partial(jax.jit, static_argnames=("model", "spec", "context"))
def both_nll(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  *,
  spec: Layout,
  context: int = 0,
  late: jax.Array | None = None,  # [], tokens; None: not
  late_room: jax.Array | None = None,  # [], with `late`
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Frozen nll, augmented nll and weights, each [B, S, A], a row a point.

  Row p is the trace after token p; its weight is 0 where p cannot bear one or
  the ahead token is in another document. `context` is of `point_weights`. With
  `late` all latents come so many tokens after what the coprocessor has read;
  points whose latents could not come `late_room` tokens late weigh nothing, so
  that the tokens compared are the same whatever `late` is, up to `late_room`.
  """
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, spec
  )
  reading = coprocessor.source_cache(model, coproc, cache, hidden, spec)
  plain = objective.next_token_nll(model, decoder, hidden, tokens)
  frozen = after_points(plain, spec.tokens_predicted)
  points = points_of(documents, spec, context)
  if late is not None:
    room = point_sampling.late_room(documents, points, spec)
    points = jnp.where(room >= late_room, points, -1)

  def some(points):  # [B, m]
    delay = late
    if late is not None:
      delay = jnp.where(points >= 0, late, 0)
    placed = rounds.layout_traces(tokens, documents, points, spec, delay)
    nll = objective.traces_nll(model, decoder, coproc, cache, placed, reading)
    return nll, placed.weights

  return frozen, *in_turns(some, points)


def in_turns(
  some: Callable[[jax.Array], Any],  # points [B, m] -> tree of [B, m, ...]
  points: jax.Array,  # [B, S], -1 = none
) -> Any:  # tree of [B, S, ...]
  """`some` of all points, few enough at once for their scores to fit."""
  b, s = points.shape

  def join(x):  # [runs, B, m, ...] -> [B, S, ...]
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(b, -1, *x.shape[3:])[:, :s]

  return jax.tree.map(join, jax.lax.map(some, turns(points)))


def turns(points: jax.Array) -> jax.Array:
  """Points [B, S] -> [runs, B, m], the last run filled up with -1."""
  b, s = points.shape
  m = min(POINTS_AT_ONCE, s)
  points = jnp.pad(points, ((0, 0), (0, -s % m)), constant_values=-1)
  return jnp.moveaxis(points.reshape(b, -1, m), 1, 0)


def document_sums(
  measure: Callable[[Batch], Measured],
  batches: Iterable[Batch],
  positions: tuple[int, ...],
) -> DocumentSums:
  """Sums by document and position of what `measure` gives, batch by batch.

  Raises:
    UserError: no text at all.
  """
  total = None
  for batch in batches:
    nll, weights = measure(batch)
    part = bootstrap.sums_of_batch(batch, nll, np.asarray(weights), positions)
    total = part if total is None else bootstrap.merge([total, part])
  if total is None:
    raise UserError("config.eval: no text to compare on: give documents")
  return total


def coprocessor_sums(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batches: Iterable[Batch],
  spec: Layout,
  *,
  positions: tuple[int, ...] = POSITIONS,
  context: int = 0,
  late: int = 0,
  late_room: int = 0,
) -> DocumentSums:
  """Sums of the frozen decoder and the augmented, on the same tokens.

  Args:
    model: of decoder and coprocessor.
    decoder: frozen parameters.
    coproc: the coprocessor's.
    batches: held-out text.
    spec: the coprocessor's.
    positions: ahead tokens to report, from 1; those that no trace predicts are
      left out.
    context: tokens that must precede and include a point, at least as many as
      the coprocessor needs; 0: as many. Tables of one `context` are over the
      same tokens, whatever N is.
    late: tokens by which all latents come late.
    late_room: compare only points whose latents could come so late; the same
      tokens then for every `late` up to it.

  Raises:
    UserError: no text at all.
  """
  delay = {}
  if late or late_room:
    room = np.int32(max(late, late_room))
    delay = {"late": np.int32(late), "late_room": room}

  def measure(batch):
    text = batch["tokens"], batch["documents"]
    frozen, augmented, weights = both_nll(
      model, decoder, coproc, *text, spec=spec, context=context, **delay
    )
    nll = {bootstrap.FROZEN: frozen, bootstrap.AUGMENTED: augmented}
    return nll, of_answers(weights, batch)

  positions = tuple(j for j in positions if j <= spec.tokens_predicted)
  return document_sums(measure, batches, positions)


def plain_sums(
  models: Mapping[str, tuple[Transformer, Params]],
  batches: Iterable[Batch],
  spec: Layout,
  *,
  positions: tuple[int, ...] = POSITIONS,
  context: int = 0,
) -> DocumentSums:
  """Sums of language models without latents, on the tokens of a `spec`'s table.

  Args:
    models: column -> architecture and parameters; `bootstrap.FROZEN` and
      `bootstrap.AUGMENTED` (a continued decoder, say) make the usual table.
    batches: as of `coprocessor_sums`, and so are the others.
    spec: of the coprocessor that they are to be compared with.
    positions: ahead tokens to report.
    context: tokens that must precede and include a point.

  Raises:
    UserError: no text at all.
  """

  def measure(batch):
    text = batch["tokens"], batch["documents"]
    nll = {
      name: plain_nll(model, params, *text, spec=spec)
      for name, (model, params) in models.items()
    }
    return nll, of_answers(point_weights(text[1], spec, context), batch)

  positions = tuple(j for j in positions if j <= spec.tokens_predicted)
  return document_sums(measure, batches, positions)


def by_position(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batches: Iterable[Batch],
  spec: Layout,
  *,
  seed: int = 0,
  **options: Any,
) -> list[PositionRow]:
  """The table: a row for each position that a document reaches.

  Args:
    model: as of `coprocessor_sums`.
    decoder: as of `coprocessor_sums`.
    coproc: as of `coprocessor_sums`.
    batches: as of `coprocessor_sums`.
    spec: as of `coprocessor_sums`.
    seed: of the intervals' resampling.
    **options: the others of `coprocessor_sums`.

  Raises:
    UserError: no document has room for a trace and a token after it.
  """
  sums = coprocessor_sums(model, decoder, coproc, batches, spec, **options)
  return make_rows(sums, seed=seed)
