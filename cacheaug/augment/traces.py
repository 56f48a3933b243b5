"""The preprocessing of the input and attention mask: where traces stand.

A trace is one augmentation of a sequence: at its point p (the last visible
context token) N latents are inserted, then A ahead tokens are predicted. M
traces of a sequence are trained at once. In the decoder's pass each is a block
of R = N + A - 1 rows (N latents, then the ahead tokens y_1 .. y_{A-1}) that
sees [context up to its point | its own block, causally] and nothing else.
With one latent, one further token, and traces after b and d (figure 2b of
arXiv 2412.17747; rows are queries, primes are latents):

            a b c d e f | b' c | d' e
        a   #
        b   # #
        c   # # #
        d   # # # #
        e   # # # # #
        f   # # # # # #
        b'  # #           #
        c   # #           #  #
        d'  # # # #              #
        e   # # # #              #  #

Row b' predicts c, the row c after it predicts d, and so on: A predictions from
R rows. `lay_out` makes rows, targets and weights for the fast path, which never
forms this mask; `dense_mask` is the picture itself, for reference and drawing.

Schemes decide the positions (and so RoPE) of latents and ahead tokens, which
the paper does not state:

  insert   latents at p+1 .. p+N, ahead tokens pushed back by N: the literal
           reading, as if the latents were further tokens.
  overlay  latents at p-N+1 .. p beside the context tokens there; ahead tokens
           keep their own positions.
  replace  as overlay, and the N context entries at the latents' positions are
           hidden from the block: the latents stand in their place.

Latents that come late: the coprocessor has read the cache at p - d, and while
it was at work the decoder went on to p, where its latents are inserted. Its own
rows (pass 2) then stand where those of a trace after p - d would; everything in
the decoder's pass (positions, hidden entries, ahead tokens, targets) is that of
a trace after p. Nothing of the d tokens between reaches the coprocessor.

Kinds of coprocessor (coprocessor.py) that hand over keys and values in place
of embeddings leave no last latent to predict y_1 from. Then a trace's block is
N rows that are given and A that are run, x[p] again and y_1 .. y_{A-1}: x[p]
stands where the last latent does and asks only, so that no row sees its keys
and values, itself neither; what stands for x[p] is among the given. So

            a b c d e f | b' b c | d' d e
        b   # #           #
        c   # #           #    #
        d   # # # #                #
        e   # # # #                #    #

the rows b and d predicting c and e. `replace` gives each of the N hidden
entries its successor at the very same position.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.errors import UserError
from cacheaug.model.attention import Rows

SCHEMES = ("insert", "overlay", "replace")
LAWS = ("uniform", "stratified")
STARTS = ("as_is", "harmless")
KINDS = ("coprocessor", "pause", "prefix", "handover", "activations")
GIVEN = ("prefix", "handover")  # latents are keys and values
_LATE = ("coprocessor", "activations")


@dataclasses.dataclass(frozen=True)
class TraceSpec:
  """How traces are laid out (axis letters N, A, M)."""

  latents: int  # N
  ahead: int  # A
  scheme: str = "overlay"
  start: str = "harmless"  # see coprocessor.py
  count: int = 1  # M, points drawn per sequence
  law: str = "uniform"
  min_ahead: int = 1  # fewest ahead tokens within the point's document
  tail: int = 0  # points this near a document's end are drawn first
  mask_documents: bool = True  # False: a sequence's documents see each other
  late_max: int = 0  # latents come 0 to so many tokens late, uniformly
  kind: str = "coprocessor"  # of KINDS, see coprocessor.py
  rounds: int = 1  # of latents a trace, see rounds.py
  stride: int = 0  # k, tokens between them; 0: all at one point

  def __post_init__(self):
    for key, known in (("scheme", SCHEMES), ("law", LAWS), ("start", STARTS)):
      if getattr(self, key) not in known:
        raise UserError(
          f"traces.{key}={getattr(self, key)!r} is not one of "
          f"{', '.join(known)}"
        )
    if self.kind not in KINDS:
      raise UserError(
        f"coprocessor.kind={self.kind!r} is not one of {', '.join(KINDS)}"
      )
    for key in ("latents", "ahead", "count", "min_ahead", "rounds"):
      if getattr(self, key) < 1:
        raise UserError(f"traces.{key}={getattr(self, key)} must be at least 1")
    for key in ("tail", "late_max", "stride"):
      if getattr(self, key) < 0:
        raise UserError(
          f"traces.{key}={getattr(self, key)} must be 0 (off) or more"
        )
    if self.stride and self.rounds == 1:
      raise UserError(
        f"traces.stride={self.stride} is between rounds: set traces.rounds to "
        "2 or more, or the stride to 0"
      )
    if self.rounds > 1 and self.kind != "coprocessor":
      raise UserError(
        f"traces.rounds={self.rounds}: coprocessor.kind={self.kind!r} knows "
        "one round only; set it to 'coprocessor', or the rounds to 1"
      )
    if self.late_max and self.rounds > 1:
      raise UserError(
        f"traces.rounds={self.rounds} with traces.late_max={self.late_max}: "
        "latents of several rounds cannot come late; set one of them to "
        "rounds=1 or late_max=0"
      )
    if self.min_ahead > self.reach:
      raise UserError(
        f"traces.min_ahead={self.min_ahead} exceeds the {self.reach} tokens "
        f"that a trace predicts (traces.ahead={self.ahead})"
      )
    if self.late_max:
      self.check_late()

  def check_late(self) -> None:
    """Refuses lateness where there is no such thing.

    Raises:
      UserError: the kind reads nothing, or hands over keys that belong where
        they were made.
    """
    if self.kind not in _LATE:
      raise UserError(
        f"coprocessor.kind={self.kind!r} knows no late latents (only "
        f"{' and '.join(_LATE)} do): set traces.late_max=0, ask for none"
      )

  @property
  def given(self) -> bool:
    """Latents are keys and values for the decoder, not embeddings."""
    return self.kind in GIVEN

  @property
  def reads_states(self) -> bool:
    """The coprocessor reads the decoder's hidden states, not its cache."""
    return self.kind == "activations"

  @property
  def rows(self) -> int:
    """R, the rows of one block in the decoder's pass; N of them given or run.

    N + A - 1, and where the N are given one more: x[p] again.
    """
    return self.latents + self.ahead - (0 if self.given else 1)

  @property
  def reach(self) -> int:
    """Tokens that one trace predicts, in all its rounds."""
    return self.stride * (self.rounds - 1) + self.ahead

  @property
  def at_once(self) -> int:
    """Rounds at one point, one upon another."""
    return 1 if self.stride else self.rounds

  def reaching(self, tokens: int) -> "TraceSpec":
    """The same for so many tokens after a point, no round beyond them."""
    rounds = self.rounds
    if self.stride:
      rounds = min(rounds, 1 + (tokens - 1) // self.stride)
    stride = self.stride if rounds > 1 else 0
    return dataclasses.replace(
      self,
      rounds=rounds,
      stride=stride,
      ahead=tokens - stride * (rounds - 1),
      min_ahead=1,
    )

  @property
  def context_needed(self) -> int:
    """Context tokens that must precede and include a point."""
    literal = self.scheme == "insert" and self.start == "as_is"
    return 1 if literal else self.latents


@flax.struct.dataclass
class Traces:
  """M traces laid out over B sequences, ready for passes 2 and 3."""

  points: jax.Array  # [B, M], index of the last visible context token
  latent_rows: Rows  # pass 2: N rows a trace
  rows: Rows  # pass 3: R rows a trace, the first N given or run
  copied: jax.Array  # [B, M, N] tokens x[p-N+1 .. p], of late ones up to p-d
  ahead: jax.Array  # [B, M, A-1] tokens y_1 .. y_{A-1}
  targets: jax.Array  # [B, M, A] tokens y_1 .. y_A
  weights: jax.Array  # [B, M, A] float32, 0 where y_j is not in p's document
  # [B, M, N] tokens x[p-N+1 .. p]; None: no trace is late, they are `copied`.
  repeated: jax.Array | None = None
  kind: str = flax.struct.field(pytree_node=False, default="coprocessor")
  start: str = flax.struct.field(pytree_node=False, default="harmless")
  rounds: tuple[Any, ...] = ()  # of rounds.Round, where there are several

  @property
  def given(self) -> bool:
    """As of TraceSpec."""
    return self.kind in GIVEN


def segments_of(documents: jax.Array, mask_documents: bool) -> jax.Array:
  """Documents [B, S] (-1 = padding) -> attention segments (0 = padding)."""
  real = documents >= 0
  return jnp.where(real, documents + 1 if mask_documents else 1, 0)


def valid_points(
  documents: jax.Array,  # [B, S]
  spec: TraceSpec,
  context: int = 0,
  *,
  answers: jax.Array | None = None,  # [B, S] bool
) -> jax.Array:
  """[B, S] bool: points whose trace stays within its document.

  `min_ahead` tokens follow within the document; `context` or, where it is 0,
  `context_needed` precede and include the point. With `answers`, an answer's
  token comes next (and so only they are predicted: answers reach to their
  documents' ends).
  """
  s = documents.shape[-1]
  valid = documents >= 0
  for shift in (spec.min_ahead, 1 - (context or spec.context_needed)):
    index = jnp.arange(s) + shift
    there = (index >= 0) & (index < s)
    other = jnp.take(documents, jnp.clip(index, 0, s - 1), axis=-1)
    valid &= there[None] & (other == documents)
  if answers is not None:
    valid &= before(answers)
  return valid


def before(answers: jax.Array) -> jax.Array:
  """[B, S] bool: whether the token after is of an answer."""
  return jnp.pad(answers[:, 1:], ((0, 0), (0, 1)))


def before_beginnings(answers: jax.Array) -> jax.Array:
  """[B, S] bool: whether an answer begins with the token after."""
  return before(answers) & ~answers


def near_end(documents: jax.Array, tail: int) -> jax.Array:
  """[B, S] bool: a document ends within the `tail` tokens after."""
  after = jnp.pad(documents, ((0, 0), (0, tail)), constant_values=-1)
  ends = after[:, tail:] != documents
  # The end of the sequence cuts a document off; it need not end there.
  inside = jnp.arange(documents.shape[-1]) + tail < documents.shape[-1]
  return ends & inside[None] & (documents >= 0)


def sample_points(
  key: jax.Array,
  documents: jax.Array,  # [B, S]
  spec: TraceSpec,
  answers: jax.Array | None = None,  # [B, S] bool, as of valid_points
) -> jax.Array:  # [B, M], ascending; -1 where there is no valid point left
  """Draws M different points a sequence.

  uniform: the paper's law. stratified: one from each of M equal buckets of S.
  With either, points whose document ends within `tail` tokens come before all
  others: where a document is a question and its answer, the latents that
  matter stand there. With `answers`, those after which an answer begins come
  first.
  """
  b, s = documents.shape
  noise = jax.random.uniform(key, (b, s))
  if spec.tail:
    noise += near_end(documents, spec.tail)
  if answers is not None:
    noise += before_beginnings(answers)
  valid = valid_points(documents, spec, answers=answers)
  noise = jnp.where(valid, noise, -1.0)
  if spec.law == "uniform":
    value, points = jax.lax.top_k(noise, spec.count)
    points = jnp.where(value >= 0, points, -1)
    return jnp.sort(points, axis=-1)
  bucket = s // spec.count
  noise = noise.reshape(b, spec.count, bucket)
  points = jnp.argmax(noise, -1) + jnp.arange(0, s, bucket)[None]
  return jnp.where(noise.max(-1) >= 0, points, -1)


def late_room(
  documents: jax.Array,  # [B, S]
  points: jax.Array,  # [B, M], -1 = no trace
  spec: TraceSpec,
) -> jax.Array:  # [B, M]
  """The most tokens that each trace's latents can come late.

  The coprocessor must have read `context_needed` tokens of the document. Below
  0 where the point itself bears no trace for want of them.
  """
  first = starts_of(documents) + spec.context_needed - 1
  p = jnp.maximum(points, 0)
  room = p - jax.vmap(lambda row, i: row[i])(first, p)
  return jnp.where(points >= 0, room, 0)


def sample_late(
  key: jax.Array,
  documents: jax.Array,  # [B, S]
  points: jax.Array,  # [B, M], valid or -1
  spec: TraceSpec,
) -> jax.Array:  # [B, M], tokens from 0 to spec.late_max
  """Draws how late each trace's latents come.

  Uniform, cut off where the document has no room for more: the points, and so
  the tokens that are learned from, are those of a run without lateness.
  """
  late = jax.random.randint(key, points.shape, 0, spec.late_max + 1)
  return jnp.minimum(late, late_room(documents, points, spec))


def starts_of(segments: jax.Array) -> jax.Array:
  """Segments [B, S] -> the slot where each token's segment begins [B, S]."""
  index = jnp.arange(segments.shape[-1], dtype=jnp.int32)[None]
  new = segments[:, 1:] != segments[:, :-1]
  new = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True)
  return jax.lax.cummax(jnp.where(new, index, 0), axis=1)


def lay_out(
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  points: jax.Array,  # [B, M], -1 = no trace
  spec: TraceSpec,
  late: jax.Array | None = None,  # [B, M], up to late_room; None: none is
) -> Traces:
  """Rows, tokens, targets and weights of M traces a sequence.

  Raises:
    UserError: late traces of a kind that knows none.
  """
  if late is not None:
    spec.check_late()
  n, a, s = spec.latents, spec.ahead, tokens.shape[-1]
  p = jnp.maximum(points, 0)[..., None]  # [B, M, 1]
  read = p if late is None else p - late[..., None]

  def at(array, index):  # array[b, index[b, m, j]]
    index = jnp.clip(index, 0, s - 1)
    return jax.vmap(lambda row, i: row[i])(array, index)

  latents = jnp.arange(n, dtype=jnp.int32)[None, None]
  after = jnp.arange(1, a + 1, dtype=jnp.int32)[None, None]
  last = p - n + 1 + latents  # p-N+1 .. p
  same = (p + after < s) & (at(documents, p + after) == at(documents, p))
  shift = n if spec.scheme == "insert" else 0
  latent_positions = last + shift
  reading = last + read - p  # the same, for the coprocessor
  targets = at(tokens, p + after)
  segments = segments_of(documents, spec.mask_documents)
  segment, starts = at(segments, p), at(starts_of(segments), p)

  def rows(positions, limits):
    here = jnp.broadcast_to(segment, positions.shape)
    return Rows(positions, here, limits, starts=starts)

  first = 0 if spec.given else 1  # x[p] is run again, or not
  row_positions = jnp.concatenate(
    [latent_positions, p + shift + jnp.arange(first, a)[None, None]], -1
  )
  block = rows(row_positions, p - n if spec.scheme == "replace" else p)
  if spec.given:
    block = block.replace(order=asked_again(spec)[None, None])
  # Rows that leave just what is hidden, no more, read no more than it did.
  stand_in = spec.kind == "handover" and spec.start == "harmless"
  stand_in &= spec.scheme == "replace"
  return Traces(
    points=points,
    latent_rows=rows(reading + shift, read - n if stand_in else read),
    rows=block,
    copied=at(tokens, reading),
    ahead=targets[..., :-1],
    targets=targets,
    weights=((points >= 0)[..., None] & same).astype(jnp.float32),
    repeated=None if late is None else at(tokens, last),
    kind=spec.kind,
    start=spec.start,
  )


def asked_again(spec: TraceSpec) -> jax.Array:  # [R, R] bool
  """Whom of its block each row sees, where the N latents are given.

  Itself and those before, but for row N, which only asks: x[p] run again.
  """
  r = spec.rows
  return jnp.tri(r, dtype=bool) & (jnp.arange(r) != spec.latents)[None]


def dense_mask(
  documents: np.ndarray,  # [S]
  points: np.ndarray,  # [M]
  spec: TraceSpec,
) -> np.ndarray:  # [S + M R, S + M R] bool
  """The reference mask of one sequence, written from the definition.

  Windows are not in it: they compare positions and are the model's business.
  """
  s, r = len(documents), spec.rows
  real = documents >= 0  # padding sees and is seen by nothing
  segments = documents if spec.mask_documents else np.zeros(s, int)
  mask = np.zeros((s + len(points) * r,) * 2, bool)
  for q in range(s):
    for k in range(q + 1):
      mask[q, k] = real[q] and real[k] and segments[q] == segments[k]
  for m, p in enumerate(points):
    first = s + m * r
    seen = p - spec.latents if spec.scheme == "replace" else p
    for i in range(r):
      for k in range(seen + 1):
        mask[first + i, k] = real[k] and segments[k] == segments[p]
      mask[first + i, first : first + i + 1] = True
    if spec.given:  # x[p] again asks only
      mask[:, first + spec.latents] = False
  return mask


def dense_latent_mask(
  documents: np.ndarray,  # [S]
  points: np.ndarray,  # [M]
  spec: TraceSpec,
  late: np.ndarray | None = None,  # [M]
) -> np.ndarray:  # [M N, S + M N] bool
  """The reference mask of the coprocessor's rows, from the definition.

  Whatever the scheme, they see the whole context that has been read; but of
  `handover`, where they start as the hidden entries, what those have seen.
  """
  like_hidden = ("handover", "replace", "harmless")
  less = (spec.kind, spec.scheme, spec.start) == like_hidden
  s, n = len(documents), spec.latents
  segments = documents if spec.mask_documents else np.zeros(s, int)
  mask = np.zeros((len(points) * n, s + len(points) * n), bool)
  for m, p in enumerate(points):
    last = p if late is None else p - late[m]
    last -= spec.latents if less else 0
    for i in range(m * n, m * n + n):
      for k in range(last + 1):
        mask[i, k] = documents[k] >= 0 and segments[k] == segments[p]
      mask[i, s + m * n : s + i + 1] = True
  return mask


if __name__ == "__main__":
  # The drawing builds on this module, which therefore does not import it.
  import runpy

  runpy.run_module("cacheaug.augment.drawing", run_name="__main__")
