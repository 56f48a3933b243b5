"""FLOP of the loss computed otherwise: what the structured step is held to.

cached_dense  context cached; one dense mask over [context | all blocks]
naive         one extended sequence a pass, one dense mask, context again in
              every pass, logits of every row of the last: the literal reading
least         what no mathematics can do without: a lower bound
"""

from cacheaug import flops
from cacheaug.augment.kinds import Kind
from cacheaug.flops import Cost, Sizes
from cacheaug.model.config import ModelConfig


def least(model: ModelConfig, sizes: Sizes) -> Cost:
  """`flops.useful` less gradients that are not needed: a lower bound.

  Context keys and values are constants: the backward pass needs dP and dQ of
  them alone. The embedding is frozen: logits need d(hidden) alone.
  """
  context, own = flops.trace_attention(model, sizes)
  if sizes.kind is Kind.ACTIVATIONS:  # the coprocessor's own context is trained
    context *= sizes.decoder_rows / (sizes.latent_rows + sizes.decoder_rows)
  cost = flops.structured(model, sizes)
  predicting = (
    sizes.traces * sizes.tokens_predicted * flops.logits_per_row(model)
  )
  return cost._replace(
    logits=cost.logits - sizes.batch * predicting,
    attention=cost.attention - sizes.batch * context,
  )


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
  return flops.scaled(
    sizes.batch,
    body * flops.body_per_row(model),
    2 * three * flops.logits_per_row(model),
    (s * s + (3 + again) * pairs) * flops.attention_per_pair(model),
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
  return flops.scaled(
    sizes.batch,
    body * flops.body_per_row(model),
    2 * three * flops.logits_per_row(model),
    pairs * flops.attention_per_pair(model),
  )
