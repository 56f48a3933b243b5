"""Floating-point operations of one training step, counted by hand.

XLA's cost analysis counts a loop's body once and a Pallas call not at all, so
FLOP are counted from shapes. Only matrix products count, 2 a multiply-add. The
context is cached; a row attends to its context prefix and its own block; only
the M A predicting rows have logits.

"Useful" is this without recomputation: what MFU is a share of. It counts a
backward pass as twice its forward one, as MFU commonly does, but for the frozen
decoder's own matrices, which get no gradient (once).

A block counts as N + A rows: the last ahead token is only predicted, so a
program may leave its row out (R = N + A - 1).

Kinds of coprocessor (augment/coprocessor.py) cost what they do differently:
pause and prefix run no coprocessor; where keys and values are handed over the
decoder's block has A rows, x[p] again and y_1 .. y_{A-1}; handover makes the
last layer's keys and values alone; activations reads the context twice, once
with gradients. `augmentation` and `token` are what decoding costs.
"""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from cacheaug import config as configs
from cacheaug import trainable
from cacheaug.augment import coprocessor
from cacheaug.augment.kinds import Kind
from cacheaug.model import lora, transformer
from cacheaug.model.config import SLIDING, ModelConfig
from cacheaug.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Sizes:
  """A step's sizes (axis letters B S M N A)."""

  batch: int  # B
  sequence: int  # S
  traces: int  # M
  latents: int  # N
  ahead: int  # A
  kind: Kind = Kind.COPROCESSOR
  rounds: int = 1  # of latents a trace
  stride: int = 0  # k, tokens between them
  window: int = 0  # W, context tokens that the decoder's rows see; 0: all

  @property
  def network(self) -> bool:
    """The coprocessor has a network."""
    return bool(self.kind.network)

  @property
  def kv(self) -> bool:
    """Latents are keys and values: the decoder runs x[p] in their place."""
    return self.kind.latents_are_kv

  @property
  def kv_only(self) -> bool:
    """The network's last layer stops at its keys and values."""
    return self.kv and self.network

  @property
  def states(self) -> bool:
    """The network reads the decoder's hidden states, a context of its own."""
    return self.kind.reads_states

  @property
  def latent_rows(self) -> int:
    """Rows of one sequence in the coprocessor's pass."""
    if not self.network:
      return 0
    return self.traces * self.rounds * self.latents

  @property
  def decoder_rows(self) -> int:
    """Rows of one sequence in the decoder's second pass."""
    latents = 0 if self.kv else self.rounds * self.latents
    return self.traces * (latents + self.tokens_predicted)

  @property
  def tokens_predicted(self) -> int:
    """Tokens that one trace predicts."""
    return self.stride * (self.rounds - 1) + self.ahead


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
    kind=Kind.of(config.coprocessor.kind),
    rounds=config.traces.rounds,
    stride=config.traces.stride,
    window=config.traces.window,
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


def _context_attention(
  model: ModelConfig, s: int, window: int | None = None
) -> list[float]:
  """Forward FLOP of a context's causal attention, by layer."""
  return [
    _layer_per_pair(model)
    * _causal_pairs(s, model.window if kind == SLIDING else window)
    for kind in model.layer_kinds
  ]


def _unused_per_row(model: ModelConfig) -> float:
  """What the last layer does beyond its keys and values."""
  keys_and_values = 4.0 * model.width * model.head_dim * model.kv_heads
  return _layer_per_row(model) - keys_and_values


def context_pass(model: ModelConfig, sizes: Sizes) -> Cost:
  """One sequence's pass 1, as far as the last layer's keys and values.

  Of kind 'activations' to its end: the hidden states are what is read.
  """
  s = sizes.sequence
  if sizes.states:
    attention = sum(_context_attention(model, s))
    return Cost(s * body_per_row(model), 0.0, attention)
  return Cost(
    body=s * (body_per_row(model) - _unused_per_row(model)),
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
  context, own = trace_attention(model, sizes)
  first = context_pass(model, sizes)
  rows = sizes.latent_rows * (3 + again)
  body = (rows + sizes.decoder_rows * (2 + again)) * body_per_row(model)
  attention = 3 * (context + own)
  if sizes.kv_only:
    body -= rows * _unused_per_row(model)
  elif sizes.states:
    s, layers = sizes.sequence, _context_attention(model, sizes.sequence)
    per_row = body_per_row(model) - _unused_per_row(model)
    body += s * (3 + again) * per_row
    attention += 3 * sum(layers[:-1])
  return scaled(
    sizes.batch,
    first.body + body,
    3 * sizes.traces * sizes.tokens_predicted * logits_per_row(model),
    first.attention + attention,
  )


def useful(model: ModelConfig, sizes: Sizes) -> Cost:
  """What MFU is a share of: `structured` without recomputation."""
  return structured(model, sizes)


def trace_attention(model: ModelConfig, sizes: Sizes) -> tuple[float, float]:
  """Forward FLOP of one sequence's blocks over their context, and own rows.

  Points are uniform: a row sees on average what a context row sees.
  """
  m, n, a = sizes.traces, sizes.latents, sizes.ahead
  layers = _context_attention(model, sizes.sequence)
  in_latents = sizes.latent_rows * sum(layers)
  first = _causal_pairs(n) if sizes.latent_rows else 0.0
  first *= attention_per_pair(model)
  if sizes.kv_only:  # the last layer's rows are no queries
    in_latents -= sizes.latent_rows * layers[-1]
    first -= _causal_pairs(n) * _layer_per_pair(model)
  # Every row sees all N where they are keys and values, x[p] again none.
  if sizes.kv:
    pairs = a * n + _causal_pairs(a - 1)
  else:
    # The rows of all rounds are one triangle; a round's latents attend to those
    # of the rounds before it (all, though with 'replace' some are hidden).
    pairs = _causal_pairs(sizes.rounds * n + sizes.tokens_predicted)
    first *= sizes.rounds
    for i in range(sizes.rounds if sizes.latent_rows else 0):
      first += n * i * (n + sizes.stride) * attention_per_pair(model)
  if sizes.window:
    layers = _context_attention(model, sizes.sequence, sizes.window)
  context = in_latents + sizes.decoder_rows * sum(layers)
  own = m * (first + pairs * attention_per_pair(model))
  return context / sizes.sequence, own


def language_model(model: ModelConfig, sizes: Sizes) -> Cost:
  """A whole step of training a decoder itself: three times forward."""
  s = sizes.sequence
  return scaled(
    3 * sizes.batch,
    s * body_per_row(model),
    s * logits_per_row(model),
    sum(_context_attention(model, s)),
  )


def of_step(config: ConfigDict, model: ModelConfig) -> Cost:
  """Useful FLOP of one step of the config's objective."""
  sizes = sizes_of(config)
  if config.objective == "language_model":
    cost, rows = language_model(model, sizes), sizes.sequence
  else:
    cost, rows = useful(model, sizes), sizes.latent_rows
    if sizes.states:
      rows += sizes.sequence
  rank = configs.lora_rank(config)
  if not rank:
    return cost
  # No gradient of the adapted network's weights; the LoRA's own, three times.
  numbers = lora.parameters(model, rank, tuple(config.lora.kernels))
  each = 3 * 2.0 * numbers - body_per_row(model)
  return cost._replace(body=cost.body + sizes.batch * rows * each)


# --- decoding ----------------------------------------------------------------


def augmentation(model: ModelConfig, sizes: Sizes) -> Cost:
  """What one augmentation after `sizes.sequence` tokens adds to decoding.

  No logits: y_1 gets its own of another row, and no more of them. Of kind
  'activations' with what reading the prompt adds, once.
  """
  n, s = sizes.latents, sizes.sequence
  one = dataclasses.replace(sizes, traces=1, ahead=1)
  kv = sizes.kv  # the decoder runs x[p] alone
  seen, rows = _seen(model, s), one.latent_rows + (1 if kv else n)
  body = rows * body_per_row(model)
  attention = rows * seen + (one.latent_rows > 0) * _own(model, n)
  per_pair = attention_per_pair(model)
  attention += n * per_pair if kv else _own(model, n)
  if sizes.kv_only:
    body -= n * _unused_per_row(model)
    attention -= n * _seen_by_layer(model, s)[-1]
    attention -= _causal_pairs(n) * _layer_per_pair(model)
  elif sizes.states:
    # All but the last layer of its own, and the decoder's last.
    body += s * body_per_row(model)
    attention += sum(_context_attention(model, s))
  return Cost(body, 0.0, attention)


def token(model: ModelConfig, sizes: Sizes) -> Cost:
  """One token decoded after `sizes.sequence` tokens, and latents if any.

  Of latents = 0 the frozen decoder's. Positions 'replace' hides as many
  entries as latents come: nothing more is seen then, up to n pairs less than
  this says.
  """
  seen = _seen(model, sizes.sequence + sizes.latents)
  return Cost(body_per_row(model), logits_per_row(model), seen)


def _own(model: ModelConfig, rows: int) -> float:
  return _causal_pairs(rows) * attention_per_pair(model)


def _seen_by_layer(model: ModelConfig, s: int) -> list[float]:
  """Forward FLOP of one row's attention to the s entries before it."""
  return [
    _layer_per_pair(model) * min(s, model.window if kind == SLIDING else s)
    for kind in model.layer_kinds
  ]


def _seen(model: ModelConfig, s: int) -> float:
  return sum(_seen_by_layer(model, s))


# --- parameters ---------------------------------------------------------------


class Parameters(NamedTuple):
  """Numbers of parameters."""

  decoder: int  # frozen, but for the language_model objective
  coprocessor: int
  trained: int

  @property
  def total(self) -> int:
    """All that a run holds."""
    return self.decoder + self.coprocessor


def parameters(config: ConfigDict, model_config: ModelConfig) -> Parameters:
  """What a config's run has and trains; of arrays' shapes alone.

  Leaves that get no gradient (handover's last layer beyond its keys and
  values) count as trained: the optimizer holds them.
  """
  model, key = Transformer(model_config), jax.random.key(0)

  def count(make):
    tree = nn.unbox(jax.eval_shape(make, key))
    return sum(x.size for x in jax.tree.leaves(tree))

  def trained(key):
    return trainable.init(config, model, key, None, boxed=True)[0]

  decoder = count(functools.partial(transformer.init, model))
  own = 0
  if config.objective == "coprocessor":
    spec = configs.layout_of(config)
    own = count(functools.partial(coprocessor.init_boxed, model, spec))
  return Parameters(decoder, own, count(trained))


def scaled(count: int, *parts: float) -> Cost:
  """The cost whose parts are these, each so many times."""
  return Cost(*(count * part for part in parts))
