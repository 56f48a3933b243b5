"""What may be added to the plain objective; without it this file is not used.

supervision: the results of an answer's steps, as labels of its latents. Result
j (of `batch["results"]` at the trace's point) is to be read off latent j by the
decoder's frozen head: off the row that the decoder runs the latent through, as
if the latents were written steps, or off the coprocessor's own output row.
Latents beyond the results are free, results beyond the latents are not taught,
and the decoder's last latent row is left to the answer. The weight may fall to
0 over the first steps: labels show a way, and the objective alone decides in
the end whether it is kept. (LOTUS and SIM-CoT supervise latents so.)

teacher: with a window the frozen decoder that still sees the whole context, the
hidden states of pass 1, gives for each ahead token the probabilities of its top
tokens and of all others together; the term is the divergence (KL) from that to
the prediction with latents, 0 where the two agree.

decay: the weight of ahead token y_j is decay ** (j - 1), of nll and divergence,
times what makes the mean of the A weights 1.

All terms are sums over the batch that are divided by the number of ahead
tokens, as the plain objective's nll is: a weight of 1 makes a label count as
much as one ahead token.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cacheaug.augment import coprocessor, objective, rounds
from cacheaug.augment.objective import Sums
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.kernels import cross_entropy
from cacheaug.model import transformer
from cacheaug.model.transformer import Params, Transformer

ROWS = ("decoder", "coprocessor")  # whose rows labels are read off

# A term by name: its sum [] and the number [] that it is over.
Extras = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Terms:
  """Weights of what is added; all 0 is the plain objective."""

  supervision: float = 0.0  # of a label's nll, beside an ahead token's
  supervision_until: int = 0  # step at which it has fallen to 0; 0: it stays
  supervision_at: str = "decoder"  # of ROWS
  teacher: float = 0.0  # of the divergence, beside the nll
  teacher_top: int = 32  # of the teacher's most likely tokens
  decay: float = 1.0  # from one ahead token's weight to the next; 1: none

  @property
  def on(self) -> tuple[str, ...]:
    """The keys that make it another than the plain objective."""
    switches = {
      "supervision.weight": self.supervision,
      "teacher.weight": self.teacher,
      "traces.decay": self.decay != 1.0,
    }
    return tuple(key for key, on in switches.items() if on)

  def check(self, layout: Layout) -> None:
    """Refuses what a layout's latents do not have.

    Raises:
      UserError: naming the keys.
    """
    for key, value in (
      ("supervision.weight", self.supervision),
      ("supervision.until", self.supervision_until),
      ("teacher.weight", self.teacher),
    ):
      if value < 0:
        raise UserError(f"{key}={value} must be 0 (off) or more")
    if self.teacher_top < 1:
      raise UserError(f"teacher.top={self.teacher_top} must be at least 1")
    if not 0.0 < self.decay <= 1.0:
      raise UserError(f"traces.decay={self.decay} must be above 0, at most 1")
    if self.teacher and not layout.window:
      raise UserError(
        f"teacher.weight={self.teacher} with traces.window=0: the frozen "
        "decoder sees no more than the latents' own rows do; set the window, "
        "or the weight to 0"
      )
    if self.supervision_at not in ROWS:
      raise UserError(
        f"supervision.at={self.supervision_at!r} is not one of "
        f"{', '.join(ROWS)}"
      )
    if not self.supervision:
      return
    layout.kind.check("labels")
    if not self.labelled(layout):
      raise UserError(
        "supervision.at='decoder' with coprocessor.latents=1: the row of the "
        "only latent predicts the answer; use more latents, or 'coprocessor'"
      )
    if self.supervision_at == "coprocessor":
      layout.kind.check("labels_of_its_own")
    if layout.stride:
      raise UserError(
        f"supervision.weight={self.supervision} with traces.stride="
        f"{layout.stride}: labels are of latents at one point; set the stride "
        "to 0, or the weight"
      )

  def labelled(self, layout: Layout) -> int:
    """How many latents of a trace can have a label."""
    # The decoder's last latent row predicts the first ahead token.
    taken = 1 if self.supervision_at == "decoder" else 0
    return layout.latents * layout.rounds - taken


def coprocessor_loss(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batch: dict[str, jax.Array],  # as of objective.coprocessor_loss, and results
  points: jax.Array,  # [B, M]
  layout: Layout,
  *,
  terms: Terms,
  step: jax.Array,  # [], steps taken before this one
) -> tuple[jax.Array, Sums, Extras]:
  """The sum to minimise, the plain objective's sums, and the terms."""
  tokens, documents = batch["tokens"], batch["documents"]
  late = batch.get("late")
  traces = rounds.layout_traces(tokens, documents, points, layout, late)
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, layout
  )
  source = coprocessor.source_cache(model, coproc, cache, hidden, layout)
  states, latents = objective.traces_states(
    model,
    decoder,
    coproc,
    cache,
    traces,
    source,
    latents_of=terms.supervision_at if terms.supervision else None,
  )
  nll = objective.rows_nll(model, decoder, states, traces.targets)
  learned = objective.learned(traces, batch)
  sums = (nll * learned).sum((0, 1)), learned.sum((0, 1))
  along = decays(terms.decay, layout.tokens_predicted)
  total, extras = (sums[0] * along).sum(), {}
  if terms.teacher:
    divergence = teacher_divergence(
      model, decoder, hidden, states, points, terms.teacher_top
    )
    divergence *= learned
    extras["teacher"] = divergence.sum(), learned.sum()
    total += terms.teacher * (divergence.sum((0, 1)) * along).sum()
  if terms.supervision:
    labels, weights = labels_of(
      batch["results"], points, terms.labelled(layout)
    )
    rows = latents[:, :, : labels.shape[-1]]
    missed = objective.rows_nll(model, decoder, rows, labels) * weights
    extras["supervision"] = missed.sum(), weights.sum()
    total += supervision_weight(terms, step) * missed.sum()
  return total, sums, extras


def decays(decay: float, ahead: int) -> jax.Array:  # [A]
  """Weights along the ahead tokens, of mean 1."""
  weights = decay ** jnp.arange(ahead, dtype=jnp.float32)
  return weights / weights.mean()


def teacher_divergence(
  model: Transformer,
  decoder: Params,
  context: jax.Array,  # [B, S, D], the hidden states of pass 1
  states: jax.Array,  # [B, M, A, D], that predict with latents
  points: jax.Array,  # [B, M], -1 = no trace
  top: int,
) -> jax.Array:  # [B, M, A] nats
  """KL from the frozen decoder's top tokens to the prediction with latents."""
  head = transformer.head_for_use(model, decoder)
  sizes = dict(
    vocab_size=model.config.vocab_size, shards=model.attention.shards
  )

  def logits(hidden):
    return transformer.logits(model, head, hidden)

  # Row p + j - 1 of the context predicts y_j.
  ahead = jnp.arange(states.shape[2])[None, None]
  at = jnp.maximum(points, 0)[..., None] + ahead
  at = jnp.minimum(at, context.shape[1] - 1)
  tokens, likely = jax.tree.map(
    lambda x: jax.vmap(lambda row, i: row[i])(x, at),
    cross_entropy.top_tokens(logits, context, top, **sizes),
  )
  rest = jnp.maximum(1.0 - likely.sum(-1, keepdims=True), 0.0)
  whole = jnp.concatenate([likely, rest], -1)
  entropy = -(whole * jnp.log(jnp.maximum(whole, 1e-30))).sum(-1)
  missed = cross_entropy.soft_nll(logits, states, tokens, likely, **sizes)
  return missed - entropy


def labels_of(
  results: jax.Array,  # [B, S, K] tokens, -1 = none
  points: jax.Array,  # [B, M], -1 = no trace
  latents: int,  # that can have a label
) -> tuple[jax.Array, jax.Array]:  # [B, M, J] tokens and weights
  """The labels of each trace's first J latents; weight 0 without a label."""
  at = jnp.maximum(points, 0)
  labels = jax.vmap(lambda row, i: row[i])(results[..., :latents], at)
  known = (points >= 0)[..., None] & (labels >= 0)
  return jnp.maximum(labels, 0), known.astype(jnp.float32)


def supervision_weight(
  terms: Terms,
  step: jax.Array,  # []
) -> jax.Array | float:
  """The labels' weight in the step after `step` of them."""
  if not terms.supervision_until:
    return terms.supervision
  left = 1.0 - step / terms.supervision_until
  return terms.supervision * jnp.maximum(left, 0.0)
