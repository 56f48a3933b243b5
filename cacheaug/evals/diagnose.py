"""The diagnostics of one text, in two passes over it; see latent_stats.py."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.evals import bootstrap, latent_stats, perplexity
from cacheaug.evals.bootstrap import DocumentSums
from cacheaug.evals.latent_stats import Moments
from cacheaug.evals.perplexity import Batch
from cacheaug.model.transformer import Params, Transformer

# Traces of a batch whose nearest tokens are looked at: each of their latents
# is compared with the whole vocabulary.
_LOOKED_AT = 32
_NEAREST = 5  # tokens shown
_SHOWN = 3  # traces shown in full


@dataclasses.dataclass(frozen=True)
class Nearest:
  """Nearest tokens: those of the slots' means, and over single traces.

  Attributes:
    lens: [N][count] of the slot's mean z, by the decoder's norm and head.
    embedding: [N][count] of the same, by cosine with input embeddings.
    contribution: [N][count] of the slot's mean contribution, by cosine.
    itself: [N] share of traces whose latent's nearest embedding is the token
      that it stands in for.
    foretold: [N] share of traces whose logit lens's first is the token y_1.
    foretold_before: [N] the same of the copied embedding alone.
    traces: that the shares are over.
    examples: traces with their context's end, what follows, and for each slot
      the tokens by lens and by embedding.
  """

  lens: list[list[int]]
  embedding: list[list[int]]
  contribution: list[list[int]]
  itself: list[float]
  foretold: list[float]
  foretold_before: list[float]
  traces: int
  examples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """Results of `diagnose`.

  Attributes:
    sums: a column an intervention, and bootstrap.FROZEN.
    z: moments of the latents.
    contribution: of what the coprocessor contributes to them.
    copied: of the embeddings that they start from; None without the harmless
      start.
    mass: name -> [L, A - 1, N + 2] mean attention of y_1 .. y_{A-1} to each
      latent, the context and the ahead tokens; of right latents and of zeroed.
    nearest: tokens.
    left_out: interventions that this text does not allow, and why.
  """

  sums: DocumentSums
  z: Moments
  contribution: Moments
  copied: Moments | None
  mass: dict[str, np.ndarray]
  nearest: Nearest
  left_out: dict[str, str]


def diagnose(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  text: Callable[[], Iterable[Batch]],
  spec: Layout,
  *,
  positions: tuple[int, ...] = perplexity.POSITIONS,
  context: int = 0,
  seed: int = 0,
) -> Diagnosis:
  """Interventions, geometry, attention and nearest tokens on one text.

  Args:
    model: of decoder and coprocessor.
    decoder: frozen parameters.
    coproc: the coprocessor's.
    text: gives the same batches at each call.
    spec: the coprocessor's, with A of the table.
    positions: ahead tokens to report.
    context: tokens that must precede and include a point; 0: N.
    seed: of who gets whose latents.

  Raises:
    UserError: no document has room for a trace, or the coprocessor's latents
      are keys and values.
  """
  # Of the first round's latents, as far as a trace of all rounds reaches.
  spec = dataclasses.replace(
    spec, ahead=spec.tokens_predicted, rounds=1, stride=0
  )
  check_kind(spec)
  harmless = spec.start == "harmless"
  layout = dict(spec=spec, context=context)
  total, alone = None, False
  for batch in text():
    place, out, weights = _latents(model, decoder, coproc, batch, layout)
    valid = weights[..., 0] > 0
    here = [latent_stats.moments(x, valid) for x in (place + out, out, place)]
    if not harmless:
      here[0], here[2] = here[1], None
    total = here if total is None else jax.tree.map(np.add, total, here)
    rng = np.random.default_rng(seed)
    alone |= latent_stats.swapped(batch["documents"], valid, rng) is None
  if total is None or not float(total[1].count):
    raise UserError(
      "config.eval: no token has room for a trace: give longer documents"
    )
  z, contribution, copied = jax.device_get(total)
  left_out = {}
  if alone:
    left_out[latent_stats.SWAPPED] = (
      "a batch holds one document only; raise eval.batch or give more documents"
    )
  mass: dict[str, Any] = {}
  looking = _Looking(model, decoder)
  rng = np.random.default_rng(seed)

  def measure(batch):
    args = model, decoder, batch["tokens"], batch["documents"]
    place, out, weights = _latents(model, decoder, coproc, batch, layout)
    valid = weights[..., 0] > 0
    sources = {
      latent_stats.SHUFFLED: latent_stats.shuffled(
        batch["documents"], valid, rng
      ),
      latent_stats.SWAPPED: latent_stats.swapped(
        batch["documents"], valid, rng
      ),
    }
    sources = {k: v for k, v in sources.items() if k not in left_out}
    nll = {
      bootstrap.FROZEN: perplexity.plain_nll(
        model, decoder, batch["tokens"], batch["documents"], spec=spec
      )
    }
    for name, some in latent_stats.interventions(
      place, out, contribution.mean, sources, harmless
    ):
      nll[name] = latent_stats.latents_nll(*args, some, **layout)
      if name in (latent_stats.RIGHT, latent_stats.ZEROED) and spec.ahead > 1:
        found = latent_stats.mass_sums(*args, some, valid, spec=spec)
        before = mass.get(name, (0.0, 0.0))
        mass[name] = jax.tree.map(np.add, before, jax.device_get(found))
      if name == latent_stats.RIGHT:
        looking.look(batch, valid, some, place if harmless else None)
    return nll, weights

  positions = tuple(j for j in positions if j <= spec.ahead)
  sums = perplexity.document_sums(measure, text(), positions)
  return Diagnosis(
    sums,
    z,
    contribution,
    copied,
    {k: a / np.maximum(n, 1.0)[:, None] for k, (a, n) in mass.items()},
    looking.result(z.mean, contribution.mean),
    left_out,
  )


def check_kind(spec: Layout) -> None:
  """Refuses a coprocessor whose latents are keys and values.

  Raises:
    UserError: names the kind.
  """
  spec.kind.check("diagnostics")


def _latents(model, decoder, coproc, batch, layout):
  """Copied and contributed [B, S, N, D], and the table's weights [B, S, A].

  The first token of every trace counts, so that its weight says where one is.
  """
  text = batch["tokens"], batch["documents"]
  place, out = latent_stats.contributions(
    model, decoder, coproc, *text, **layout
  )
  weights = perplexity.point_weights(text[1], layout["spec"], layout["context"])
  return place, out, np.asarray(perplexity.of_answers(weights, batch))


class _Looking:
  """Nearest tokens of some traces of every batch."""

  def __init__(self, model: Transformer, decoder: Params):
    self._model, self._decoder = model, decoder
    self._shares: list[np.ndarray] = []  # [traces, 3, N]
    self._examples: list[dict[str, Any]] = []

  def look(self, batch, valid, z, place) -> None:
    """At traces spread over the batch."""
    points = np.argwhere(valid)
    if not len(points):
      return
    # A fixed number, so that one program serves all batches.
    chosen = np.linspace(0, len(points) - 1, _LOOKED_AT).astype(int)
    row, point = points[chosen].T
    tokens, n = np.asarray(batch["tokens"]), z.shape[2]
    lens, near = self._nearest(z[row, point])  # [T, N, count]
    copied = tokens[row[:, None], point[:, None] + np.arange(1 - n, 1)]
    following = tokens[row, point + 1][:, None]
    before = np.full(copied.shape, np.nan)
    if place is not None:
      before = self._nearest(place[row, point])[0][..., 0] == following
    self._shares.append(
      np.stack(
        [near[..., 0] == copied, lens[..., 0] == following, before], axis=1
      )
    )
    for t in range(0, _LOOKED_AT, _LOOKED_AT // _SHOWN):
      if len(self._examples) == _SHOWN:
        break
      numbers = np.asarray(batch["documents"])[row[t]]
      start = np.argmax(numbers == numbers[point[t]])
      self._examples.append(
        {
          "context": tokens[row[t], max(start, point[t] - 23) : point[t] + 1],
          "following": tokens[row[t], point[t] + 1 : point[t] + 9],
          "copied": copied[t],
          "lens": lens[t],
          "embedding": near[t],
        }
      )

  def _nearest(self, z):
    found = latent_stats.nearest(self._model, self._decoder, z, _NEAREST)
    return jax.device_get(found)

  def result(self, z: np.ndarray, contribution: np.ndarray) -> Nearest:
    """With the slots' means [N, D]."""
    lens, embedding = self._nearest(z)
    shares = np.concatenate(self._shares).astype(float)
    itself, foretold, before = shares.mean(0).tolist()
    return Nearest(
      lens.tolist(),
      embedding.tolist(),
      self._nearest(contribution)[1].tolist(),
      itself,
      foretold,
      before,
      len(shares),
      [{k: v.tolist() for k, v in e.items()} for e in self._examples],
    )
