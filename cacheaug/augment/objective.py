"""The three passes and the losses.

1. Context: the frozen decoder reads x [B, S] and leaves its cache.
2. Coprocessor: reads the cache with soft tokens, gives latents z [B, M, N, D].
3. Decoder: reads [z | ahead tokens] over the cache, predicts A tokens a trace.

Where latents are keys and values, passes 2 and 3 are kv_latents.py's. Traces of
several rounds (rounds.py) do 2 and 3 again over what they left.

The context rows never change, so their keys and values are constants of passes
2 and 3: differentiating with respect to the coprocessor alone forms no gradient
of them, and none of the decoder's weights.
"""

import jax
import jax.numpy as jnp

from cacheaug.augment import coprocessor, kv_latents, rounds, traces
from cacheaug.augment.traces import Layout, Traces
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
  segments = traces.segments_of(documents, layout.mask_documents)
  starts = traces.starts_of(segments)
  return transformer.read(model, decoder, tokens, segments, starts)


def decoder_pass(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  z: jax.Array,  # [B, M, N, D]
  laid: Traces,
) -> jax.Array:  # [B, M, A] nats
  """Pass 3: negative log-likelihood of every ahead token."""
  # Rows from the last latent's on predict.
  hidden = decoder_states(model, decoder, cache, z, laid, z.shape[2] - 1)
  return rows_nll(model, decoder, hidden, laid.targets)


def decoder_states(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  z: jax.Array,  # [B, M, N, D]
  laid: Traces,
  first: int,  # rows before this one are not asked for
) -> jax.Array:  # [B, M, R - first, D]
  """The hidden states of pass 3."""
  ahead = transformer.embed(model, decoder, laid.ahead)
  x = jnp.concatenate([z.astype(ahead.dtype), ahead], axis=2)
  return transformer.run_blocks(
    model, decoder, x, laid.rows, cache, wanted=first
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
  laid: Traces,
  reading: KVCache | None = None,
) -> jax.Array:  # [B, M, A] nats
  """Passes 2 and 3 over a cache already made.

  Args:
    model: of decoder and coprocessor.
    decoder: frozen parameters.
    coproc: the coprocessor's.
    cache: the decoder's, of `context_pass`.
    laid: the traces, which say of which kind the coprocessor is.
    reading: of coprocessor.source_cache, made once where there are many calls;
      the decoder's cache by default, which kind 'activations' does not read.
  """
  if reading is None:
    assert not laid.kind.reads_states, "give coprocessor.source_cache's"
    reading = cache
  hidden, _ = traces_states(model, decoder, coproc, cache, laid, reading)
  return rows_nll(model, decoder, hidden, laid.targets)


def traces_states(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  cache: KVCache,
  laid: Traces,
  source: KVCache,  # of coprocessor.source_cache
  *,
  latents_of: str | None = None,  # 'decoder', 'coprocessor'; None: not wanted
) -> tuple[jax.Array, jax.Array | None]:  # [B, M, A, D], [B, M, N, D] or None
  """Passes 2 and 3: hidden states that predict the targets, and the latents'.

  With `latents_of` also the last hidden states of the latents' rows: those of
  the decoder's pass or the coprocessor's own, of all rounds.
  """
  if laid.rounds:
    return rounds.states(
      model, decoder, coproc, cache, laid, latents_of=latents_of
    )
  copied, repeated = embedded(model, decoder, laid)
  if laid.kind.latents_are_kv:
    kv = kv_latents.latent_kv(model, coproc, source, laid, copied)
    return kv_latents.predict(model, decoder, cache, kv, laid), None
  own = coprocessor.hidden_states(model, coproc, source, laid, copied)
  z = coprocessor.to_latents(coproc, own, laid, copied, repeated)
  last = z.shape[2] - 1
  if latents_of != "decoder":
    return decoder_states(model, decoder, cache, z, laid, last), own
  hidden = decoder_states(model, decoder, cache, z, laid, 0)
  return hidden[:, :, last:], hidden[:, :, : last + 1]


def embedded(
  model: Transformer, decoder: Params, laid: Traces
) -> tuple[jax.Array, jax.Array | None]:  # [B, M, N, D] each
  """The decoder's embeddings of `laid.copied` and `laid.repeated`."""
  return jax.tree.map(
    lambda tokens: transformer.embed(model, decoder, tokens),
    (laid.copied, laid.repeated),
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
  laid = rounds.lay_out(tokens, documents, points, layout, batch.get("late"))
  hidden, cache = context_pass(model, decoder, tokens, documents, layout)
  reading = coprocessor.source_cache(model, coproc, cache, hidden, layout)
  nll = traces_nll(model, decoder, coproc, cache, laid, reading)
  return (nll * laid.weights).sum((0, 1)), laid.weights.sum((0, 1))


def points_nll(
  model: Transformer,
  decoder: Params,
  coproc: Params | None,  # None: the frozen decoder's
  tokens: jax.Array,  # [B, S], each row one document
  points: jax.Array,  # [B, M]
  layout: Layout,
) -> jax.Array:  # [B, M, reach] nats
  """Nll of the tokens after each point, with latents there or without."""
  documents = jnp.zeros_like(tokens)
  hidden, cache = context_pass(model, decoder, tokens, documents, layout)
  if coproc is not None:
    laid = rounds.lay_out(tokens, documents, points, layout)
    reading = coprocessor.source_cache(model, coproc, cache, hidden, layout)
    return traces_nll(model, decoder, coproc, cache, laid, reading)
  nll = next_token_nll(model, decoder, hidden, tokens)
  index = points[..., None] + jnp.arange(layout.reach)[None, None]
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
  segments = traces.segments_of(batch["documents"], layout.mask_documents)
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
  laid = rounds.lay_out(tokens, documents, points, layout)
  index = (
    jnp.maximum(points, 0)[..., None] + jnp.arange(layout.reach)[None, None]
  )
  index = jnp.minimum(index, tokens.shape[-1] - 2)
  nll = jax.vmap(lambda row, i: row[i])(nll, index)
  return (nll * laid.weights).sum((0, 1)), laid.weights.sum((0, 1))


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

  `frozen_head` gives the head (where tied, the embedding too as far as it is
  one) no gradient.
  """
  tokens, documents = batch["tokens"], batch["documents"]
  segments = traces.segments_of(documents, mask_documents)
  hidden = transformer.train_pass(model, params, tokens, segments)
  nll = next_token_nll(model, params, hidden, tokens, frozen=frozen_head)
  same = documents[:, 1:] == documents[:, :-1]
  same &= documents[:, 1:] >= 0
  if "answers" in batch:
    same &= batch["answers"][:, 1:]
  weights = same.astype(jnp.float32)
  return (nll * weights).sum()[None], weights.sum()[None]
