"""What may be added to the plain objective; without it this file is not used.

supervision: the intermediate results of an answer, as labels of its latents.
Label j (of `batch["steps"]` at the trace's point) is to be read off latent j
by the decoder's frozen head: off the row that the decoder runs the latent
through, as if the latents were written steps, or off the coprocessor's own
output row. Latents without a label are free. The weight may fall to 0 over the
first steps: labels show a way, and the objective alone decides in the end
whether it is kept. (LOTUS and SIM-CoT supervise latents so.)

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

  @property
  def on(self) -> bool:
    """Whether there is anything but the plain objective."""
    return bool(self.supervision)

  def check(self, layout: Layout) -> None:
    """Refuses what a layout's latents do not have.

    Raises:
      UserError: naming the keys.
    """
    for key in ("supervision", "supervision_until"):
      if getattr(self, key) < 0:
        name = {"supervision": "supervision.weight"}.get(
          key, "supervision.until"
        )
        raise UserError(f"{name}={getattr(self, key)} must be 0 (off) or more")
    if self.supervision_at not in ROWS:
      raise UserError(
        f"supervision.at={self.supervision_at!r} is not one of "
        f"{', '.join(ROWS)}"
      )
    if not self.supervision:
      return
    layout.kind.check("labels")
    if self.supervision_at == "coprocessor":
      layout.kind.check("labels_of_its_own")
    if layout.stride:
      raise UserError(
        f"supervision.weight={self.supervision} with traces.stride="
        f"{layout.stride}: labels are of latents at one point; set the stride "
        "to 0, or the weight"
      )


def coprocessor_loss(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  batch: dict[str, jax.Array],  # as of objective.coprocessor_loss, and steps
  points: jax.Array,  # [B, M]
  layout: Layout,
  *,
  terms: Terms,
  step: jax.Array,  # [], steps taken before this one
) -> tuple[jax.Array, Sums, Extras]:
  """What is minimised (times the number of tokens), the plain sums, the terms.

  Raises:
    UserError: more labels than latents.
  """
  tokens, documents = batch["tokens"], batch["documents"]
  traces = rounds.lay_out(tokens, documents, points, layout, batch.get("late"))
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
  sums = (nll * traces.weights).sum((0, 1)), traces.weights.sum((0, 1))
  total, extras = sums[0].sum(), {}
  if terms.supervision:
    labels, weights = labels_of(batch["steps"], points, layout, terms)
    rows = latents[:, :, : labels.shape[-1]]
    missed = objective.rows_nll(model, decoder, rows, labels) * weights
    extras["supervision"] = missed.sum(), weights.sum()
    total += supervision_weight(terms, step) * missed.sum()
  return total, sums, extras


def labels_of(
  steps: jax.Array,  # [B, S, J] tokens, -1 = none
  points: jax.Array,  # [B, M], -1 = no trace
  layout: Layout,
  terms: Terms,
) -> tuple[jax.Array, jax.Array]:  # [B, M, J] tokens and weights
  """The labels of each trace's first J latents, and 0 where there is none.

  Raises:
    UserError: more labels than latents that can bear one.
  """
  latents = layout.latents * layout.rounds
  # The decoder's last latent row predicts the first ahead token.
  free = latents - (1 if terms.supervision_at == "decoder" else 0)
  if steps.shape[-1] > free:
    raise UserError(
      f"coprocessor.latents={layout.latents} with traces.rounds="
      f"{layout.rounds} can bear {free} labels (supervision.at="
      f"{terms.supervision_at!r}), the data has up to {steps.shape[-1]} an "
      "answer: raise the latents"
    )
  at = jnp.maximum(points, 0)
  labels = jax.vmap(lambda row, i: row[i])(steps, at)
  there = (points >= 0)[..., None] & (labels >= 0)
  return jnp.maximum(labels, 0), there.astype(jnp.float32)


def supervision_weight(terms: Terms, step: jax.Array) -> jax.Array | float:
  """The labels' weight in the step after `step` of them."""
  if not terms.supervision_until:
    return terms.supervision
  left = 1.0 - step / terms.supervision_until
  return terms.supervision * jnp.maximum(left, 0.0)
