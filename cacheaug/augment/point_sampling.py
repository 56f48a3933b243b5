"""Where traces stand: points drawn at random, and how late their latents come.

`Draw` is training's own and not part of a trace (`traces.Layout`), so that a
coprocessor is used at any point. It is kept with a trained coprocessor for the
record.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cacheaug.augment.traces import Layout, starts_of
from cacheaug.errors import UserError

LAWS = ("uniform", "stratified")

# The names on disk, of exports and of stores, that older versions gave.
_ON_DISK = {"positions": "scheme"}
# Fields that came after stores did: see `to_entries`.
_ONLY_IF_SET = ("window", "kv_bias")
# What every version has written; the rest came later.
REQUIRED = (
  *("latents", "ahead", "start", "mask_documents"),
  *("count", "law", "min_ahead", "tail"),
)


@dataclasses.dataclass(frozen=True)
class Draw:
  """How traces are drawn for training (axis letter M)."""

  count: int = 1  # M, points drawn per sequence
  law: str = "uniform"  # of LAWS
  min_ahead: int = 1  # fewest ahead tokens within the point's document
  tail: int = 0  # points this near a document's end are drawn first
  late_max: int = 0  # latents come 0 to late_max tokens late

  def __post_init__(self):
    if self.law not in LAWS:
      raise UserError(
        f"traces.law={self.law!r} is not one of {', '.join(LAWS)}"
      )
    for key in ("count", "min_ahead"):
      if getattr(self, key) < 1:
        raise UserError(f"traces.{key}={getattr(self, key)} must be at least 1")
    for key in ("tail", "late_max"):
      if getattr(self, key) < 0:
        raise UserError(
          f"traces.{key}={getattr(self, key)} must be 0 (off) or more"
        )

  def check(self, layout: Layout) -> None:
    """Refuses what no trace of that layout can be drawn by.

    Raises:
      UserError: naming the keys.
    """
    if self.late_max and layout.rounds > 1:
      raise UserError(
        f"traces.rounds={layout.rounds} with traces.late_max={self.late_max}: "
        "latents of several rounds cannot come late; set one of them to "
        "rounds=1 or late_max=0"
      )
    if self.min_ahead > layout.tokens_predicted:
      raise UserError(
        f"traces.min_ahead={self.min_ahead} exceeds the "
        f"{layout.tokens_predicted} tokens that a trace predicts "
        f"(traces.ahead={layout.ahead})"
      )
    if self.late_max:
      layout.kind.check("late")


def to_entries(layout: Layout, draw: Draw) -> dict[str, Any]:
  """Layout and draw as the one flat dictionary that exports and stores hold.

  A field that the format did not always have is left out at its default, so
  that a coprocessor without it keeps its identity in a store.
  """
  entries = {}
  for part in (layout, draw):
    for field in dataclasses.fields(part):
      value = getattr(part, field.name)
      if field.name in _ONLY_IF_SET and value == field.default:
        continue
      value = str(value) if isinstance(value, str) else value
      entries[_ON_DISK.get(field.name, field.name)] = value
  return entries


def from_entries(entries: Mapping[str, Any]) -> tuple[Layout, Draw]:
  """What `to_entries` wrote, in this version or an older one.

  Raises:
    KeyError: a field that every version has written is not there.
    UserError: a value that is none.
  """

  def make(cls):
    values = {}
    for field in dataclasses.fields(cls):
      key = _ON_DISK.get(field.name, field.name)
      if key in entries or key in REQUIRED:
        values[field.name] = entries[key]
    return cls(**values)

  layout, draw = make(Layout), make(Draw)
  draw.check(layout)
  return layout, draw


def valid_points(
  documents: jax.Array,  # [B, S]
  layout: Layout,
  context: int = 0,
  *,
  min_ahead: int = 1,
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
  for shift in (min_ahead, 1 - (context or layout.context_needed)):
    index = jnp.arange(s) + shift
    inside = (index >= 0) & (index < s)
    other = jnp.take(documents, jnp.clip(index, 0, s - 1), axis=-1)
    valid &= inside[None] & (other == documents)
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
  layout: Layout,
  draw: Draw,
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
  if draw.tail:
    noise += near_end(documents, draw.tail)
  if answers is not None:
    noise += before_beginnings(answers)
  valid = valid_points(
    documents, layout, min_ahead=draw.min_ahead, answers=answers
  )
  noise = jnp.where(valid, noise, -1.0)
  if draw.law == "uniform":
    value, points = jax.lax.top_k(noise, draw.count)
    points = jnp.where(value >= 0, points, -1)
    return jnp.sort(points, axis=-1)
  bucket = s // draw.count
  noise = noise.reshape(b, draw.count, bucket)
  points = jnp.argmax(noise, -1) + jnp.arange(0, s, bucket)[None]
  return jnp.where(noise.max(-1) >= 0, points, -1)


def late_room(
  documents: jax.Array,  # [B, S]
  points: jax.Array,  # [B, M], -1 = no trace
  layout: Layout,
) -> jax.Array:  # [B, M]
  """The most tokens that each trace's latents can come late.

  The coprocessor must have read `context_needed` tokens of the document. Below
  0 where the point itself bears no trace for want of them.
  """
  first = starts_of(documents) + layout.context_needed - 1
  p = jnp.maximum(points, 0)
  room = p - jax.vmap(lambda row, i: row[i])(first, p)
  return jnp.where(points >= 0, room, 0)


def sample_late(
  key: jax.Array,
  documents: jax.Array,  # [B, S]
  points: jax.Array,  # [B, M], valid or -1
  layout: Layout,
  late_max: int,
) -> jax.Array:  # [B, M], tokens from 0 to late_max
  """Draws how late each trace's latents come.

  Uniform, cut off where the document has no room for more: the points, and so
  the tokens that are learned from, are those of a run without lateness.
  """
  late = jax.random.randint(key, points.shape, 0, late_max + 1)
  return jnp.minimum(late, late_room(documents, points, layout))
