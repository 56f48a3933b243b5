"""What the latents do, beside how much they help.

Interventions: perplexity by position where every latent keeps its place and
its contribution is taken away or comes from elsewhere. With the harmless start
z = copied + contribution, and the copied embedding stays; else the contribution
is z itself.

  right         as trained
  zeroed        contribution 0; with the harmless start z = copied, which with
                positions 'replace' is the frozen decoder to rounding
  all zero      z = 0 (the same as zeroed without the harmless start)
  shuffled      contribution of another trace of the same document
  swapped       contribution of a trace of another document
  mean          mean contribution of each of the N slots over this text

Geometry: effective rank and cosines of latents, see `Moments`. Attention: the
share of attention that the ahead tokens give to latents, see `attention_mass`.
Nearest tokens: see `nearest`.
"""

import functools
import math
from collections.abc import Iterator, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from cacheaug.augment import coprocessor, objective, traces
from cacheaug.augment.traces import Layout, Traces
from cacheaug.evals import perplexity
from cacheaug.model import attention, transformer
from cacheaug.model.cache import KVCache
from cacheaug.model.config import SLIDING
from cacheaug.model.layers import Block, RMSNorm
from cacheaug.model.rope import rope_table, rotate
from cacheaug.model.transformer import Params, Transformer

RIGHT, ZEROED, NOTHING = "right", "zeroed", "all zero"
SHUFFLED, SWAPPED, MEAN = "shuffled", "swapped", "mean"
_TABLE = ("model", "spec", "context")
# Whose scores over the vocabulary are held, 1 MiB each for 256,000 tokens.
_VECTORS_AT_ONCE = 256


# --- latents, and traces with other latents ---------------------------------


@functools.partial(jax.jit, static_argnames=_TABLE)
def contributions(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  *,
  spec: Layout,
  context: int = 0,
) -> tuple[jax.Array, jax.Array]:  # [B, S, N, D] each
  """Copied embeddings and what the coprocessor contributes, after each token.

  Row p is the trace after token p; of points that bear none it means nothing.
  """
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, spec
  )
  reading = coprocessor.source_cache(model, coproc, cache, hidden, spec)

  def some(points):  # [B, m]
    placed = traces.layout_traces(tokens, documents, points, spec)
    copied, _ = objective.embedded(model, decoder, placed)
    return copied, coprocessor.outputs(model, coproc, reading, placed, copied)

  points = perplexity.points_of(documents, spec, context)
  return perplexity.in_turns(some, points)


@functools.partial(jax.jit, static_argnames=_TABLE)
def latents_nll(
  model: Transformer,
  decoder: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  z: jax.Array,  # [B, S, N, D], row p for the trace after token p
  *,
  spec: Layout,
  context: int = 0,
) -> jax.Array:  # [B, S, A] nats
  """The decoder's nll after each token with these latents inserted there."""
  _, cache = objective.context_pass(model, decoder, tokens, documents, spec)

  def some(points):  # [B, m]
    placed = traces.layout_traces(tokens, documents, points, spec)
    return objective.decoder_pass(model, decoder, cache, _at(z, points), placed)

  points = perplexity.points_of(documents, spec, context)
  return perplexity.in_turns(some, points)


def _at(x: jax.Array, points: jax.Array) -> jax.Array:
  """Rows [B, S, ...] at points [B, M] -> [B, M, ...]."""
  return jax.vmap(lambda row, i: row[i])(x, jnp.maximum(points, 0))


def shuffled(
  documents: np.ndarray,  # [B, S]
  valid: np.ndarray,  # [B, S] bool
  rng: np.random.Generator,
) -> np.ndarray:  # [B, S] indices into [B S]
  """Another trace of the same document for each, at random, none twice.

  The only trace of a document keeps its own.
  """
  source = np.arange(documents.size)
  for _, group in _groups(documents, valid):
    order = rng.permutation(group)
    source[order] = np.roll(order, 1)
  return source.reshape(documents.shape)


def swapped(
  documents: np.ndarray,  # [B, S]
  valid: np.ndarray,  # [B, S] bool
  rng: np.random.Generator,
) -> np.ndarray | None:  # [B, S] indices into [B S]
  """A trace of another document for each, at random; None: there is one."""
  source = np.arange(documents.size)
  groups = [group for _, group in _groups(documents, valid)]
  if len(groups) < 2:
    return None if groups else source.reshape(documents.shape)
  everyone = np.concatenate(groups)
  start = 0
  for group in groups:
    # Numbers of `everyone` but for this group's own, which are contiguous.
    drawn = rng.integers(0, len(everyone) - len(group), len(group))
    drawn += np.where(drawn >= start, len(group), 0)
    source[group] = everyone[drawn]
    start += len(group)
  return source.reshape(documents.shape)


def _groups(documents, valid) -> Iterator[tuple[int, np.ndarray]]:
  """(document, indices into [B S] of its traces)."""
  flat, there = documents.reshape(-1), valid.reshape(-1)
  for document in np.unique(flat[there]):
    yield document, np.nonzero((flat == document) & there)[0]


def interventions(
  place: jax.Array,  # [B, S, N, D], copied embeddings
  out: jax.Array,  # [B, S, N, D], contributions
  mean: np.ndarray,  # [N, D]
  sources: Mapping[str, np.ndarray],  # name -> [B, S] indices into [B S]
  harmless: bool,
) -> Iterator[tuple[str, jax.Array]]:  # name, z [B, S, N, D]
  """The latents of each row of the table."""
  combine = functools.partial(coprocessor.combine, harmless=harmless)
  yield RIGHT, combine(place, out)
  if harmless:
    yield ZEROED, combine(place, jnp.zeros_like(out))
  yield NOTHING, jnp.zeros_like(out)
  flat = out.reshape(-1, *out.shape[2:])
  for name, source in sources.items():
    yield name, combine(place, flat[source])
  mean = jnp.asarray(mean, out.dtype)[None, None]
  yield MEAN, combine(place, jnp.broadcast_to(mean, out.shape))


# --- geometry ---------------------------------------------------------------


@flax.struct.dataclass
class Moments:
  """Sums over T traces of N vectors each, from which the figures come.

  Batches' moments add up.
  """

  count: jax.Array  # [], T
  sums: jax.Array  # [N, D]
  second: jax.Array  # [D, D], of x x^T over traces and slots
  units: jax.Array  # [N, D], of x / |x|
  slots: jax.Array  # [], of |sum over slots of x / |x| |^2

  @property
  def mean(self) -> np.ndarray:
    """[N, D], of each slot."""
    return np.asarray(self.sums / self.count)

  @property
  def rms(self) -> float:
    """Root of the mean squared norm of a vector."""
    vectors = float(self.count) * self.sums.shape[0]
    return float(np.sqrt(np.trace(self.second) / vectors))

  def effective_rank(self, centred: bool = False) -> float:
    """Effective rank of all vectors [T N, D]; `centred` about slots' means."""
    second = np.asarray(self.second, np.float64)
    if centred:
      mean = self.mean.astype(np.float64)
      second = second - float(self.count) * mean.T @ mean
    return effective_rank(np.linalg.eigvalsh(second))

  def overlap_of_traces(self) -> float:
    """Mean cosine of two traces' vectors in the same slot; NaN of one."""
    t = float(self.count)
    if t < 2:
      return math.nan
    squares = np.asarray(self.units, np.float64) ** 2
    return float(np.mean((squares.sum(-1) - t) / (t * (t - 1.0))))

  def overlap_of_slots(self) -> float:
    """Mean cosine of two of the N vectors of one trace; NaN where N = 1."""
    n = self.sums.shape[0]
    if n == 1:
      return math.nan
    return float((self.slots / self.count - n) / (n * (n - 1.0)))


def effective_rank(eigenvalues: np.ndarray) -> float:
  """The exponential of the entropy of singular values normalised to sum 1.

  Roy and Vetterli, "The effective rank", EUSIPCO 2007. From 1, where all rows
  lie on one line, to the width, where all directions weigh the same.

  Args:
    eigenvalues: of X^T X, the squares of X's singular values, in float32's
      precision: what is below its rounding of the largest counts as 0.
  """
  rounding = len(eigenvalues) * np.finfo(np.float32).eps * eigenvalues.max()
  singular = np.sqrt(eigenvalues[eigenvalues > max(rounding, 0.0)])
  if not len(singular):
    return 0.0
  share = singular / singular.sum()
  return float(np.exp(-(share * np.log(share)).sum()))


@jax.jit
def moments(x: jax.Array, valid: jax.Array) -> Moments:
  """Moments of the vectors [B, S, N, D] where `valid` [B, S]."""
  x = jnp.where(valid[..., None, None], x, 0).astype(jnp.float32)
  norm = jnp.sqrt((x * x).sum(-1, keepdims=True))
  unit = jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1.0), 0.0)
  second = jnp.einsum("bsnd,bsne->de", x, x, precision="highest")
  return Moments(
    valid.sum().astype(jnp.float32),
    x.sum((0, 1)),
    second,
    unit.sum((0, 1)),
    (unit.sum(2) ** 2).sum(),
  )


# --- attention --------------------------------------------------------------


def attention_mass(
  model: Transformer,
  decoder: Params,
  cache: KVCache,
  z: jax.Array,  # [B, M, N, D]
  placed: Traces,
) -> jax.Array:  # [L, B, M, A - 1, N + 2]
  """Where the rows of y_1 .. y_{A-1} attend in the decoder's pass.

  Mean over heads of the softmax: to each latent, to the context, to the ahead
  tokens. A plain masked softmax over everything, layer by layer; nothing of it
  is kept by the fast path.
  """
  c = model.config
  block = Block(c, model.dtype, model.param_dtype, model.attention)
  rows, n = placed.rows, z.shape[2]
  ropes = rope_table(c, rows.positions)
  ahead = transformer.embed(model, decoder, placed.ahead)
  x = jnp.concatenate([z.astype(ahead.dtype), ahead], axis=2)
  # What comes of the query's own projection (and norm, where there is one).
  name = "q_norm" if c.qk_norm else "q"
  asked = dict(
    capture_intermediates=lambda module, _: module.name == name,
    mutable=["intermediates"],
  )
  kv = cache.keys.astype(model.dtype), cache.values.astype(model.dtype)

  def layer(x, this):
    weights, other, kv = this
    context = cache.positions, cache.segments
    args = x, (other, kv), rows, context, ropes
    (x, own), kept = block.apply({"params": weights}, *args, **asked)
    query = kept["intermediates"]["attention"][name]["__call__"][0]
    query = query.reshape(*query.shape[:3], c.heads, c.head_dim)
    window, rope = None, ropes[0]
    if SLIDING in c.layer_kinds:
      window = jnp.where(other, c.window, attention.NO_LIMIT)
    if len(ropes) > 1:
      rope = jax.tree.map(lambda g, s: jnp.where(other, s, g), *ropes)
    query = rotate(query, rope) * jnp.asarray(c.attention_scale, model.dtype)
    seen = jnp.concatenate(
      [
        attention.context_mask(rows, cache, window),
        attention.block_mask(rows, window),
      ],
      -1,
    )
    weights = _softmax(query[:, :, n:], kv[0], own[0], seen[:, :, n:], c)
    return x, weights

  layers = decoder["blocks"], jnp.array(c.other_layers), kv
  _, weights = jax.lax.scan(layer, x.astype(model.dtype), layers)
  s = cache.positions.shape[1]
  context, latents, ahead = jnp.split(weights, [s, s + n], axis=-1)
  rest = [part.sum(-1, keepdims=True) for part in (context, ahead)]
  return jnp.concatenate([latents, *rest], -1)


def _softmax(query, keys, own, seen, config):
  """Attention [B, M, r, S + R], mean over heads.

  query [B, M, r, H, E], keys [B, S, K, E], own [B, M, R, K, E],
  seen [B, M, r, S + R].
  """
  b, m, r, h, e = query.shape
  query = query.reshape(b, m, r, keys.shape[2], -1, e)
  kw = dict(preferred_element_type=jnp.float32)
  scores = jnp.concatenate(
    [
      jnp.einsum("bmrkge,bske->bmkgrs", query, keys, **kw),
      jnp.einsum("bmrkge,bmske->bmkgrs", query, own, **kw),
    ],
    -1,
  )
  if config.attention_softcap:
    cap = config.attention_softcap
    scores = cap * jnp.tanh(scores / cap)
  scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
  return jax.nn.softmax(scores, -1).mean((2, 3))


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def mass_sums(
  model: Transformer,
  decoder: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  z: jax.Array,  # [B, S, N, D]
  valid: jax.Array,  # [B, S] bool, the traces to sum over
  *,
  spec: Layout,
) -> tuple[jax.Array, jax.Array]:  # [L, A - 1, N + 2], [A - 1]
  """`attention_mass` summed over a batch's traces, and rows it is of."""
  _, cache = objective.context_pass(model, decoder, tokens, documents, spec)

  def some(points):  # [B, m]
    placed = traces.layout_traces(tokens, documents, points, spec)
    there = placed.weights[..., :-1]  # y_j is in the document
    mass = attention_mass(model, decoder, cache, _at(z, points), placed)
    # Of rows outside of the document it may be anything.
    mass = jnp.where(there[None, ..., None] > 0, mass, 0.0)
    return mass.sum((1, 2)), there.sum((0, 1))

  points = jnp.where(valid, jnp.arange(valid.shape[1])[None], -1)
  sums = jax.lax.map(some, perplexity.turns(points))
  return jax.tree.map(lambda x: x.sum(0), sums)


# --- nearest tokens ---------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "count"))
def nearest(
  model: Transformer,
  decoder: Params,
  z: jax.Array,  # [..., D]
  count: int,
) -> tuple[jax.Array, jax.Array]:  # [..., count] tokens each
  """The vocabulary's tokens nearest to each latent, in two senses.

  First the logit lens: the decoder's final norm and head, as if z were its
  last hidden state. Second the tokens whose input embeddings have the largest
  cosine with z.
  """
  c = model.config
  norm = RMSNorm(c.norm_eps, c.norm_offset, model.param_dtype)
  table = transformer.embed(model, decoder, jnp.arange(c.vocab_size))
  table = table.astype(jnp.float32)
  table /= jnp.linalg.norm(table, axis=-1, keepdims=True) + 1e-20

  def tokens(z):  # [D]
    hidden = norm.apply({"params": decoder["final_norm"]}, z[None])
    logits = transformer.logits(model, decoder, hidden)[0]
    near = table @ z.astype(jnp.float32)
    return jax.lax.top_k(logits, count)[1], jax.lax.top_k(near, count)[1]

  flat = z.reshape(-1, z.shape[-1])
  # Each is compared with the whole vocabulary, so few of them at once.
  found = jax.lax.map(tokens, flat, batch_size=_VECTORS_AT_ONCE)
  return jax.tree.map(lambda x: x.reshape(*z.shape[:-1], count), found)
