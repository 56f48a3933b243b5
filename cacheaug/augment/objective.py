"""The three passes and the losses.

1. Context: the frozen decoder reads x [B, S] and leaves its cache.
2. Coprocessor: reads the cache with soft tokens, gives latents z [B, M, N, D].
3. Decoder: reads [z | ahead tokens] over the cache, predicts A tokens a trace.

Where latents are keys and values, passes 2 and 3 are kv_latents.py's. Traces of
several rounds (rounds.py) do 2 and 3 again over what they left.

The context rows never change, so their keys and values are constants of passes
2 and 3: gradients are taken with respect to the coprocessor alone, and none is
formed of the context or of the decoder's weights.

A profile shows the passes by name: context_pass, coprocessor_pass and
decoder_pass; within them Linen names attention, mlp and logits.
"""

import jax
import jax.numpy as jnp

from cacheaug.augment import coprocessor, kv_latents, rounds
from cacheaug.augment.traces import (
  Layout,
  Traces,
  segments_of,
  starts_of,
)
from cacheaug.kernels.cross_entropy import token_nll
from cacheaug.model import transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.transformer import Params, Transformer

# Nll by position and the number of tokens that it is over, [A] each.
Sums = tuple[jax.Array, jax.Array]


def context_pass(
  model: Transformer,
  decoder: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  layout: Layout,
) -> tuple[jax.Array, KVCache]:  # hidden [B, S, D], cache
  """Pass 1."""
  segments = segments_of(documents, layout.mask_documents)
  starts = starts_of(segments)
  with jax.named_scope("context_pass"):
    return transformer.prefill_frozen(model, decoder, tokens, segments, starts)


def decoder_pass(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  z: jax.Array,  # [B, M, N, D]
  traces: Traces,
) -> jax.Array:  # [B, M, A] nats
  """Pass 3: negative log-likelihood of every ahead token."""
  # Rows from the last latent's on predict.
  hidden = decoder_states(model, decoder, cache, z, traces, z.shape[2] - 1)
  return rows_nll(model, decoder, hidden, traces.targets)


def decoder_states(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  z: jax.Array,  # [B, M, N, D]
  traces: Traces,
  first: int,  # the first row whose hidden state is needed
) -> jax.Array:  # [B, M, R - first, D]
  """The hidden states of pass 3."""
  ahead = transformer.embed(model, decoder, traces.ahead)
  x = jnp.concatenate([z.astype(ahead.dtype), ahead], axis=2)
  with jax.named_scope("decoder_pass"):
    return transformer.run_blocks(
      model, decoder, x, traces.rows, cache, first_output_row=first
    )


def rows_nll(
  model: Transformer,
  params: Params,
  hidden: jax.Array,  # [B, ..., D]
  targets: jax.Array,  # [B, ...]
  *,
  frozen: bool = True,
) -> jax.Array:  # [B, ...] nats
  """Nll of each row's target; `frozen` gives `params` no gradient."""
  params = transformer.head_for_use(model, params)
  return token_nll(
    lambda h: transformer.logits(model, params, h),
    hidden,
    targets,
    vocab_size=model.config.vocab_size,
    shards=model.attention.shards,
    frozen=frozen,
  )


def traces_nll(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,
  traces: Traces,
  source: KVCache | None = None,
) -> jax.Array:  # [B, M, A] nats
  """Passes 2 and 3 over a cache already made.

  Args:
    model: of decoder and coprocessor.
    decoder: frozen parameters.
    coproc: the coprocessor's.
    cache: the decoder's, of `context_pass`.
    traces: where latents stand, and the kind of the coprocessor.
    source: of coprocessor.source_cache, made once for many calls; by default
      the decoder's cache, which kind 'activations' does not read.
  """
  if source is None:
    source = cache
  hidden, _ = traces_states(model, decoder, coproc, cache, traces, source)
  return rows_nll(model, decoder, hidden, traces.targets)


def traces_states(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,
  traces: Traces,
  source: KVCache,  # of coprocessor.source_cache
  *,
  latents_of: str | None = None,  # 'decoder', 'coprocessor'; None: neither
) -> tuple[jax.Array, jax.Array | None]:  # [B, M, A, D], [B, M, N, D] or None
  """Passes 2 and 3: hidden states that predict the targets, and the latents'.

  With `latents_of` also the last hidden states of the latents' rows of all
  rounds: in the decoder's pass, or in the coprocessor's own.
  """
  if traces.rounds:
    return rounds.states(
      model, decoder, coproc, cache, traces, latents_of=latents_of
    )
  inputs, base = embedded(model, decoder, traces)
  if traces.reruns:  # over latents that are keys and values
    with jax.named_scope("coprocessor_pass"):
      kv = kv_latents.latent_kv(model, coproc, source, traces, inputs)
    with jax.named_scope("decoder_pass"):
      return kv_latents.predict(model, decoder, cache, kv, traces), None
  with jax.named_scope("coprocessor_pass"):
    own = coprocessor.hidden_states(model, coproc, source, traces, inputs)
    z = coprocessor.to_latents(coproc, own, traces, inputs, base)
  last = z.shape[2] - 1
  if latents_of != "decoder":
    return decoder_states(model, decoder, cache, z, traces, last), own
  hidden = decoder_states(model, decoder, cache, z, traces, 0)
  return hidden[:, :, last:], hidden[:, :, : last + 1]


def embedded(
  model: Transformer, decoder: Params, traces: Traces
) -> tuple[jax.Array, jax.Array | None]:  # [B, M, N, D] each
  """The decoder's embeddings of the traces' input tokens and base tokens."""
  return jax.tree.map(
    lambda tokens: transformer.embed(model, decoder, tokens),
    (traces.input_tokens, traces.base_tokens),
  )


def coprocessor_loss(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batch: dict[str, jax.Array],  # tokens, documents [B, S], maybe late [B, M]
  points: jax.Array,  # [B, M], of point_sampling.sample_points
  layout: Layout,
) -> Sums:
  """Sums over this batch: nll [A] by position, and the tokens it is over.

  The loss is nll.sum() / tokens.sum(): the mean over all ahead tokens of all
  traces. Sums, so that accumulated micro-batches equal one big batch. `late`
  is of point_sampling.sample_late; without it no trace is.
  """
  tokens, documents = batch["tokens"], batch["documents"]
  late = batch.get("late")
  traces = rounds.layout_traces(tokens, documents, points, layout, late)
  hidden, cache = context_pass(model, decoder, tokens, documents, layout)
  source = coprocessor.source_cache(model, coproc, cache, hidden, layout)
  nll = traces_nll(model, decoder, coproc, cache, traces, source)
  weights = learned(traces, batch)
  return (nll * weights).sum((0, 1)), weights.sum((0, 1))


def learned(traces: Traces, batch: dict[str, jax.Array]) -> jax.Array:
  """[B, M, A] the traces' weights, without tokens that a batch has as asked."""
  if "asked" not in batch:
    return traces.weights
  after = jnp.arange(1, traces.targets.shape[-1] + 1)
  at = jnp.maximum(traces.points, 0)[..., None] + after[None, None]
  at = jnp.minimum(at, batch["asked"].shape[-1] - 1)
  asked = jax.vmap(lambda row, i: row[i])(batch["asked"], at)
  return traces.weights * ~asked


def points_nll(
  model: Transformer,
  decoder: Params,
  coproc: Params | None,  # None: the frozen decoder's
  tokens: jax.Array,  # [B, S], each row one document
  points: jax.Array,  # [B, M]
  layout: Layout,
) -> jax.Array:  # [B, M, A] nats
  """Nll of the tokens after each point, with latents after it or without."""
  documents = jnp.zeros_like(tokens)
  hidden, cache = context_pass(model, decoder, tokens, documents, layout)
  if coproc is not None:
    traces = rounds.layout_traces(tokens, documents, points, layout)
    source = coprocessor.source_cache(model, coproc, cache, hidden, layout)
    return traces_nll(model, decoder, coproc, cache, traces, source)
  nll = next_token_nll(model, decoder, hidden, tokens)
  index = points[..., None] + jnp.arange(layout.tokens_predicted)[None, None]
  return jax.vmap(lambda row, i: row[i])(nll, index)


def frozen_loss(
  model: Transformer,
  decoder: Params,
  batch: dict[str, jax.Array],
  points: jax.Array,  # [B, M]
  layout: Layout,
) -> Sums:
  """The frozen decoder's sums over the very tokens of `coprocessor_loss`."""
  tokens, documents = batch["tokens"], batch["documents"]
  hidden, _ = context_pass(model, decoder, tokens, documents, layout)
  nll = next_token_nll(model, decoder, hidden, tokens)
  return _over_traces(nll, batch, points, layout)


def plain_traces_loss(
  model: Transformer,
  params: Params,
  batch: dict[str, jax.Array],
  points: jax.Array,  # [B, M]
  layout: Layout,
  *,
  frozen_head: bool = False,
) -> Sums:
  """`frozen_loss` of a decoder that is trained on those tokens itself."""
  tokens = batch["tokens"]
  segments = segments_of(batch["documents"], layout.mask_documents)
  hidden = transformer.train_pass(model, params, tokens, segments)
  nll = next_token_nll(model, params, hidden, tokens, frozen=frozen_head)
  return _over_traces(nll, batch, points, layout)


def _over_traces(
  nll: jax.Array,  # [B, S - 1] of next_token_nll
  batch: dict[str, jax.Array],
  points: jax.Array,  # [B, M]
  layout: Layout,
) -> Sums:
  """Sums over the tokens that traces predict, each as often as they do."""
  tokens, documents = batch["tokens"], batch["documents"]
  traces = rounds.layout_traces(tokens, documents, points, layout)
  index = jnp.maximum(points, 0)[..., None]
  index += jnp.arange(layout.tokens_predicted)[None, None]
  index = jnp.minimum(index, tokens.shape[-1] - 2)
  nll = jax.vmap(lambda row, i: row[i])(nll, index)
  weights = learned(traces, batch)
  return (nll * weights).sum((0, 1)), weights.sum((0, 1))


def next_token_nll(
  model: Transformer,
  params: Params,
  hidden: jax.Array,  # [B, S, D]
  tokens: jax.Array,  # [B, S]
  *,
  frozen: bool = True,
) -> jax.Array:  # [B, S - 1], entry t is the nll of token t + 1
  """Plain language-model nll from a context pass's hidden states."""
  rows = hidden[:, :-1], tokens[:, 1:]
  return rows_nll(model, params, *rows, frozen=frozen)


def language_model_loss(
  model: Transformer,
  params: Params,
  batch: dict[str, jax.Array],
  mask_documents: bool,
  *,
  frozen_head: bool = False,
) -> Sums:
  """Sums over this batch: nll [1] and tokens [1] (within documents).

  With `answers` in the batch, over their tokens alone.

  `frozen_head` gives the head no gradient; a tied embedding then has one as an
  embedding only.
  """
  tokens, documents = batch["tokens"], batch["documents"]
  segments = segments_of(documents, mask_documents)
  hidden = transformer.train_pass(model, params, tokens, segments)
  nll = next_token_nll(model, params, hidden, tokens, frozen=frozen_head)
  same = documents[:, 1:] == documents[:, :-1]
  same &= documents[:, 1:] >= 0
  if "answers" in batch:
    same &= batch["answers"][:, 1:]
  if "asked" in batch:
    same &= ~batch["asked"][:, 1:]
  weights = same.astype(jnp.float32)
  return (nll * weights).sum()[None], weights.sum()[None]
