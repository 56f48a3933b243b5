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
R rows. `layout_traces` makes rows, targets and weights for the fast path, which
never forms this mask; dense_masks.py has it, for reference and drawing.

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

A window W throws the rest of the context away at the point: the block sees the
context tokens p-W+1 .. p, with keys and values as they were computed, and its
latents, which have read the whole context and are to stand for what is gone.

Some kinds (kinds.py) give keys and values, not embeddings, so there is no last
latent whose row could predict y_1. The block is then N given entries and A rows
that are run: x[p] a second time, then y_1 .. y_{A-1}. The second x[p] is only a
query: no row attends to it, not even itself, since the given entries already
stand for x[p]. So

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

from cacheaug.augment.kinds import Kind
from cacheaug.errors import UserError
from cacheaug.model.attention import QueryLayout

POSITIONS = ("insert", "overlay", "replace")
STARTS = ("as_is", "harmless")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How one trace is laid out (axis letters N, A).

  How traces are drawn for training is `point_sampling.Draw`.
  """

  latents: int  # N
  ahead: int  # A
  positions: str = "overlay"  # of POSITIONS
  start: str = "harmless"  # of STARTS, see coprocessor.py
  mask_documents: bool = True  # False: a sequence's documents see each other
  kind: Kind = Kind.COPROCESSOR
  rounds: int = 1  # of latents a trace, see rounds.py
  stride: int = 0  # k, tokens between rounds; 0: all rounds at one point
  window: int = 0  # W, context tokens that rows after a point see; 0: all
  kv_bias: bool = False  # latents that are keys have a bias of attention

  def __post_init__(self):
    object.__setattr__(self, "kind", Kind.of(self.kind))
    for key, known in (("positions", POSITIONS), ("start", STARTS)):
      if getattr(self, key) not in known:
        raise UserError(
          f"coprocessor.{key}={getattr(self, key)!r} is not one of "
          f"{', '.join(known)}"
        )
    for key in ("latents", "ahead", "rounds"):
      if getattr(self, key) < 1:
        raise UserError(f"traces.{key}={getattr(self, key)} must be at least 1")
    if self.stride < 0:
      raise UserError(f"traces.stride={self.stride} must be 0 (off) or more")
    if self.stride and self.rounds == 1:
      raise UserError(
        f"traces.stride={self.stride} is between rounds: set traces.rounds to "
        "2 or more, or the stride to 0"
      )
    if self.rounds > 1:
      self.kind.check("rounds", rounds=self.rounds)
    if self.kv_bias:
      self.kind.check("kv_bias")
    if self.window < 0:
      raise UserError(f"traces.window={self.window} must be 0 (off) or more")
    if self.window and self.rounds > 1:
      raise UserError(
        f"traces.window={self.window} with traces.rounds={self.rounds}: the "
        "later rounds would read what is thrown away; set one of them to "
        "window=0 or rounds=1"
      )
    if self.window and self.window < self.context_needed:
      raise UserError(
        f"traces.window={self.window} is less than the {self.context_needed} "
        f"tokens that coprocessor.latents={self.latents} stand on: raise it, "
        "or 0 for no window"
      )

  @property
  def reruns(self) -> int:
    """1 where x[p] is run again, as latents that are keys and values ask."""
    return int(self.kind.latents_are_kv)

  @property
  def stands_in(self) -> bool:
    """True for handover with the harmless start and 'replace'.

    The coprocessor's rows then begin as copies of the context entries that they
    hide, and read the context up to p - N only, as those entries did.
    """
    begins_as_copy = self.kind is Kind.HANDOVER and self.start == "harmless"
    return begins_as_copy and self.positions == "replace"

  @property
  def rows(self) -> int:
    """R, rows of one block in the decoder's pass.

    N + A - 1 and, where x[p] is run again, one more.
    """
    return self.latents + self.ahead - 1 + self.reruns

  @property
  def tokens_predicted(self) -> int:
    """Tokens that one trace predicts, in all its rounds."""
    return self.stride * (self.rounds - 1) + self.ahead

  @property
  def rounds_per_point(self) -> int:
    """Rounds at one point, one upon another."""
    return 1 if self.stride else self.rounds

  def with_horizon(self, tokens: int) -> "Layout":
    """The same for that many tokens after a point, no round beyond them."""
    rounds = self.rounds
    if self.stride:
      rounds = min(rounds, 1 + (tokens - 1) // self.stride)
    stride = self.stride if rounds > 1 else 0
    return dataclasses.replace(
      self,
      rounds=rounds,
      stride=stride,
      ahead=tokens - stride * (rounds - 1),
    )

  @property
  def context_needed(self) -> int:
    """Context tokens that must precede and include a point."""
    literal = self.positions == "insert" and self.start == "as_is"
    return 1 if literal else self.latents


@flax.struct.dataclass
class Traces:
  """M traces laid out over B sequences, ready for passes 2 and 3."""

  points: jax.Array  # [B, M], index of the last visible context token
  latent_rows: QueryLayout  # pass 2: N rows a trace
  rows: QueryLayout  # pass 3: R rows a trace, the first N given or run
  input_tokens: jax.Array  # [B, M, N] x[p-N+1 .. p]; of late traces up to p-d
  ahead: jax.Array  # [B, M, A-1] tokens y_1 .. y_{A-1}
  targets: jax.Array  # [B, M, A] tokens y_1 .. y_A
  weights: jax.Array  # [B, M, A] float32, 0 where y_j is not in p's document
  # [B, M, N] x[p-N+1 .. p]; None where no trace is late: the `input_tokens`.
  base_tokens: jax.Array | None = None
  kind: Kind = flax.struct.field(pytree_node=False, default=Kind.COPROCESSOR)
  start: str = flax.struct.field(pytree_node=False, default="harmless")
  rounds: tuple[Any, ...] = ()  # of rounds.Round, where there are several

  @property
  def reruns(self) -> int:
    """As of Layout: rows beside those of latents and ahead tokens."""
    rows = self.rows.positions.shape[-1]
    return rows - self.input_tokens.shape[-1] - self.ahead.shape[-1]


def segments_of(documents: jax.Array, mask_documents: bool) -> jax.Array:
  """Documents [B, S] (-1 = padding) -> attention segments (0 = padding)."""
  real = documents >= 0
  return jnp.where(real, documents + 1 if mask_documents else 1, 0)


def starts_of(segments: jax.Array) -> jax.Array:
  """Segments [B, S] -> the slot where each token's segment begins [B, S]."""
  index = jnp.arange(segments.shape[-1], dtype=jnp.int32)[None]
  new = segments[:, 1:] != segments[:, :-1]
  new = jnp.pad(new, ((0, 0), (1, 0)), constant_values=True)
  return jax.lax.cummax(jnp.where(new, index, 0), axis=1)


def layout_traces(
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S], -1 = padding
  points: jax.Array,  # [B, M], -1 = no trace
  layout: Layout,
  late: jax.Array | None = None,  # [B, M], up to late_room; None: none is
) -> Traces:
  """Rows, tokens, targets and weights of M traces a sequence.

  Raises:
    UserError: late traces of a kind that knows none.
  """
  if late is not None:
    layout.kind.check("late")
  n, a, s = layout.latents, layout.ahead, tokens.shape[-1]
  p = jnp.maximum(points, 0)[..., None]  # [B, M, 1]
  read = p if late is None else p - late[..., None]

  def at(array, index):  # array[b, index[b, m, j]]
    index = jnp.clip(index, 0, s - 1)
    return jax.vmap(lambda row, i: row[i])(array, index)

  latents = jnp.arange(n, dtype=jnp.int32)[None, None]
  after = jnp.arange(1, a + 1, dtype=jnp.int32)[None, None]
  last = p - n + 1 + latents  # p-N+1 .. p
  same = (p + after < s) & (at(documents, p + after) == at(documents, p))
  shift = n if layout.positions == "insert" else 0
  latent_positions = last + shift
  reading = last + read - p  # the same, for the coprocessor
  targets = at(tokens, p + after)
  segments = segments_of(documents, layout.mask_documents)
  segment, starts = at(segments, p), at(starts_of(segments), p)

  def rows(positions, limits, first_visible=None):
    here = jnp.broadcast_to(segment, positions.shape)
    return QueryLayout(
      positions, here, limits, context_start=starts, first_visible=first_visible
    )

  first = 1 - layout.reruns
  row_positions = jnp.concatenate(
    [latent_positions, p + shift + jnp.arange(first, a)[None, None]], -1
  )
  block = rows(
    row_positions,
    p - n if layout.positions == "replace" else p,
    p - layout.window + 1 if layout.window else None,
  )
  if layout.reruns:
    block = block.replace(block_mask=rerun_mask(layout)[None, None])
  return Traces(
    points=points,
    latent_rows=rows(reading + shift, read - n if layout.stands_in else read),
    rows=block,
    input_tokens=at(tokens, reading),
    ahead=targets[..., :-1],
    targets=targets,
    weights=((points >= 0)[..., None] & same).astype(jnp.float32),
    base_tokens=None if late is None else at(tokens, last),
    kind=layout.kind,
    start=layout.start,
  )


def rerun_mask(layout: Layout) -> jax.Array:  # [R, R] bool
  """Whom of its block each row sees, where the N latents are given.

  Itself and those before, but for row N, which only asks: x[p] run again.
  """
  r = layout.rows
  return jnp.tri(r, dtype=bool) & (jnp.arange(r) != layout.latents)[None]


if __name__ == "__main__":
  # The drawing builds on this module, which therefore does not import it.
  import runpy

  runpy.run_module("cacheaug.augment.drawing", run_name="__main__")
