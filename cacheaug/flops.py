"""Floating-point operations of one training step, counted by hand.

XLA's cost analysis counts a loop's body once and a Pallas call not at all, so
FLOP are counted from shapes. Only matrix products count, 2 a multiply-add.
Three ways to compute the same loss:

  structured    context cached; a row attends to its context prefix and its own
                block; logits of the M A predicting rows alone
  cached_dense  context cached; one dense mask over [context | all blocks]
  naive         one extended sequence a pass, one dense mask, context again in
                every pass, logits of every row of the last: the literal reading

"Useful" is structured without recomputation: what MFU is a share of. It counts
a backward pass as twice its forward one, as MFU commonly does, but for the
frozen decoder's own matrices, which get no gradient (once). `least` leaves out
what no mathematics needs either, a lower bound for floors.

A block counts as N + A rows: the last ahead token is only predicted, so a
program may leave its row out (R = N + A - 1).
"""

import dataclasses
from typing import NamedTuple

from ml_collections import ConfigDict

from cacheaug.model.config import SLIDING, ModelConfig


@dataclasses.dataclass(frozen=True)
class Sizes:
  """A step's sizes (axis letters B S M N A)."""

  batch: int  # B
  sequence: int  # S
  traces: int  # M
  latents: int  # N
  ahead: int  # A

  @property
  def latent_rows(self) -> int:
    """Rows of one sequence in the coprocessor's pass."""
    return self.traces * self.latents

  @property
  def decoder_rows(self) -> int:
    """Rows of one sequence in the decoder's second pass."""
    return self.traces * (self.latents + self.ahead)


class Cost(NamedTuple):
  """FLOP by part."""

  body: float  # projections and feed-forward
  logits: float
  attention: float  # scores, and values weighted by them

  @property
  def total(self) -> float:
    """FLOP of all parts."""
    return self.body + self.logits + self.attention


def sizes_of(config: ConfigDict) -> Sizes:
  """The sizes that a config's step has, over all its micro-batches."""
  return Sizes(
    batch=config.data.batch,
    sequence=config.data.sequence,
    traces=config.traces.count,
    latents=config.coprocessor.latents,
    ahead=config.traces.ahead,
  )


def body_per_row(model: ModelConfig) -> float:
  """Forward FLOP of one row through the matrices of all layers."""
  return model.layers * _layer_per_row(model)


def _layer_per_row(model: ModelConfig) -> float:
  d, e = model.width, model.head_dim
  projections = d * e * (2 * model.heads + 2 * model.kv_heads)
  return 2.0 * (projections + 3 * d * model.mlp_width)


def logits_per_row(model: ModelConfig) -> float:
  """Forward FLOP of one row's logits."""
  return 2.0 * model.width * model.vocab_size


def attention_per_pair(model: ModelConfig) -> float:
  """Forward FLOP of one query attending to one key, in all layers."""
  return model.layers * _layer_per_pair(model)


def _layer_per_pair(model: ModelConfig) -> float:
  return 4.0 * model.heads * model.head_dim  # scores, weighted values


def _causal_pairs(rows: int, window: int | None = None) -> float:
  """(Query, key) pairs of `rows` rows that see themselves and those before."""
  w = rows if window is None else min(window, rows)
  return w * (w + 1) / 2 + (rows - w) * w


def _context_attention(model: ModelConfig, s: int) -> list[float]:
  """Forward FLOP of a context's causal attention, by layer."""
  return [
    _layer_per_pair(model)
    * _causal_pairs(s, model.window if kind == SLIDING else None)
    for kind in model.layer_kinds
  ]


def context_pass(model: ModelConfig, sizes: Sizes) -> Cost:
  """One sequence's pass 1, as far as the last layer's keys and values."""
  s = sizes.sequence
  keys_and_values = 4.0 * model.width * model.head_dim * model.kv_heads
  unused = _layer_per_row(model) - keys_and_values
  return Cost(
    body=s * (body_per_row(model) - unused),
    logits=0.0,
    attention=sum(_context_attention(model, s)[:-1]),
  )


def structured(
  model: ModelConfig, sizes: Sizes, *, remat: bool = False
) -> Cost:
  """A whole step of B sequences; `remat` runs the bodies forward once more.

  With remat the attention's output is kept, as the policies here do.
  """
  again = 1 if remat else 0
  context, own = _trace_attention(model, sizes)
  first = context_pass(model, sizes)
  body = sizes.latent_rows * (3 + again) + sizes.decoder_rows * (2 + again)
  return _times(
    sizes.batch,
    first.body + body * body_per_row(model),
    3 * sizes.traces * sizes.ahead * logits_per_row(model),
    first.attention + 3 * (context + own),
  )


def useful(model: ModelConfig, sizes: Sizes) -> Cost:
  """What MFU is a share of: `structured` without recomputation."""
  return structured(model, sizes)


def least(model: ModelConfig, sizes: Sizes) -> Cost:
  """`useful` less gradients that are not needed: a lower bound.

  Context keys and values are constants: the backward pass needs dP and dQ of
  them alone. The embedding is frozen: logits need d(hidden) alone.
  """
  context, own = _trace_attention(model, sizes)
  cost = structured(model, sizes)
  predicting = sizes.traces * sizes.ahead * logits_per_row(model)
  return cost._replace(
    logits=cost.logits - sizes.batch * predicting,
    attention=cost.attention - sizes.batch * context,
  )


def _trace_attention(model: ModelConfig, sizes: Sizes) -> tuple[float, float]:
  """Forward FLOP of one sequence's blocks over their context, and own rows.

  Points are uniform: a row sees on average what a context row sees.
  """
  n, r = sizes.latents, sizes.latents + sizes.ahead
  rows = sizes.latent_rows + sizes.decoder_rows
  context = sum(_context_attention(model, sizes.sequence)) / sizes.sequence
  own = sizes.traces * (_causal_pairs(n) + _causal_pairs(r))
  return rows * context, own * attention_per_pair(model)


def cached_dense(
  model: ModelConfig, sizes: Sizes, *, remat: bool = True
) -> Cost:
  """A whole step with the context cached and dense masks over all blocks.

  With remat everything of a layer is computed again, attention too.
  """
  again = 1 if remat else 0
  s, two, three = sizes.sequence, sizes.latent_rows, sizes.decoder_rows
  pairs = two * (s + two) + three * (s + three)
  body = s + two * (3 + again) + three * (2 + again)
  return _times(
    sizes.batch,
    body * body_per_row(model),
    2 * three * logits_per_row(model),
    (s * s + (3 + again) * pairs) * attention_per_pair(model),
  )


def naive(model: ModelConfig, sizes: Sizes, *, remat: bool = True) -> Cost:
  """A whole step on extended sequences, every pass from the context on.

  With remat everything of a layer is computed again, attention too.
  """
  again = 1 if remat else 0
  s = sizes.sequence
  two, three = s + sizes.latent_rows, s + sizes.decoder_rows
  body = s + two * (3 + again) + three * (2 + again)
  pairs = s * s + (3 + again) * (two * two + three * three)
  return _times(
    sizes.batch,
    body * body_per_row(model),
    2 * three * logits_per_row(model),
    pairs * attention_per_pair(model),
  )


def language_model(model: ModelConfig, sizes: Sizes) -> Cost:
  """A whole step of training a decoder itself: three times forward."""
  s = sizes.sequence
  return _times(
    3 * sizes.batch,
    s * body_per_row(model),
    s * logits_per_row(model),
    sum(_context_attention(model, s)),
  )


def of_step(config: ConfigDict, model: ModelConfig) -> Cost:
  """Useful FLOP of one step of the config's objective."""
  sizes = sizes_of(config)
  if config.objective == "language_model":
    return language_model(model, sizes)
  return useful(model, sizes)


def _times(count: int, *parts: float) -> Cost:
  return Cost(*(count * part for part in parts))
