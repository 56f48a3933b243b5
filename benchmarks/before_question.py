"""Do latents help questions that nobody has asked yet? By k and question.

  python benchmarks/before_question.py --workdir=runs/before_question

For a run of configs/before_question.py: right answers and nll of every answer's
letter, frozen and with latents where the facts end, on held-out cycles; the
answers of earlier questions stand before the later ones, the same ones for
both. Intervals resample documents.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from cacheaug import build
from cacheaug.augment import coprocessor, objective, point_sampling, rounds
from cacheaug.augment.traces import Layout
from cacheaug.errors import UserError
from cacheaug.evals import report, run_report
from cacheaug.lm import LM
from cacheaug.model import transformer
from cacheaug.model.transformer import Params, Transformer
from cacheaug.run import command
from cacheaug.weights import trained

flags.DEFINE_string("workdir", "", "a run of configs/before_question.py")

_DRAWS = 2_000


class Answers(NamedTuple):
  """Of each held-out cycle and its questions, [documents, questions] each."""

  k: np.ndarray
  frozen_nll: np.ndarray  # of the answer's letter
  nll: np.ndarray
  frozen_right: np.ndarray  # bool: letter and its line's end are the likeliest
  right: np.ndarray


@functools.partial(jax.jit, static_argnames=("model", "spec"))
def predicted(
  model: Transformer,
  decoder: Params,
  coproc: Params,
  tokens: jax.Array,  # [B, S]
  documents: jax.Array,  # [B, S]
  points: jax.Array,  # [B, 1]
  *,
  spec: Layout,
) -> tuple[jax.Array, jax.Array]:  # nll, whether likeliest; [2, B, A]
  """Of the A tokens after each point: frozen, then with latents there."""
  hidden, cache = objective.context_pass(
    model, decoder, tokens, documents, spec
  )
  source = coprocessor.source_cache(model, coproc, cache, hidden, spec)
  placed = rounds.layout_traces(tokens, documents, points, spec)
  states, _ = objective.traces_states(
    model, decoder, coproc, cache, placed, source
  )
  at = points + jnp.arange(spec.tokens_predicted)[None]
  frozen = jax.vmap(lambda row, i: row[i])(hidden, at)
  both = jnp.stack([frozen, states[:, 0]])
  logits = transformer.logits(model, decoder, both)
  target = jnp.broadcast_to(placed.targets[:, 0], both.shape[:-1])
  nll = optax.softmax_cross_entropy_with_integer_labels(logits, target)
  return nll, logits.argmax(-1) == target


def answers_of(config: Any, found: LM, name: str) -> Answers:
  """Answers of held-out cycles, earlier questions and answers before them.

  Raises:
    UserError: facts that are not followed by the same number of questions.
  """
  spec = found.coprocessor.spec.with_horizon(config.eval.ahead)
  columns = []
  for batch in run_report.held_out(config, found.tokenizer, name):
    tokens, documents = batch["tokens"], batch["documents"]
    begin = np.asarray(point_sampling.before_beginnings(batch["answers"]))
    points = np.argmax(begin, 1)
    nll, right = map(
      np.asarray,
      predicted(
        *(found.model, found.decoder, found.coprocessor.params),
        *(tokens, documents, points[:, None]),
        spec=spec,
      ),
    )
    for row in np.flatnonzero(documents[:, 0] >= 0):
      text = found.tokenizer.decode(tokens[row, points[row] + 1 :].tolist())
      lines = text.split("\n")[:-1]
      at = np.cumsum([len(line) + 1 for line in lines]) - 2
      if len(lines) != config.data.sources[name].questions:
        raise UserError(f"{name}: no document with all its questions in a row")
      hit = right[:, row, at] & right[:, row, at + 1]
      k = [int(line[0]) for line in lines]
      columns.append((k, *nll[:, row, at], *hit))
  return Answers(*map(np.array, zip(*columns, strict=True)))


def interval(values: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
  """95 % of the mean of values[mask], documents resampled.

  Args:
    values: [documents, questions].
    mask: of the same shape, what the mean is over.
  """
  random = np.random.default_rng(0)
  sums, counts = (values * mask).sum(1), mask.sum(1)
  drawn = random.integers(0, len(sums), (_DRAWS, len(sums)))
  means = sums[drawn].sum(1) / counts[drawn].sum(1)
  low, high = np.percentile(means, (2.5, 97.5))
  return float(low), float(high)


def share(right: np.ndarray, mask: np.ndarray) -> str:
  """Percent right of [documents, questions] where `mask`, with its interval."""
  low, high = interval(right.astype(float), mask)
  return f"{100 * right[mask].mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(found: Answers) -> list[tuple[str, ...]]:
  """Header and a row a k: all questions, the first and the last."""
  header = ("k", "right, frozen, %", "with latents, %", "first question")
  rows = [(*header, "last question", "nll", "difference")]
  for value in np.unique(found.k):
    mask = found.k == value
    one = [
      mask & (np.arange(mask.shape[1]) == q) for q in (0, mask.shape[1] - 1)
    ]
    difference = found.nll - found.frozen_nll
    low, high = interval(difference, mask)
    rows.append(
      (
        str(value),
        share(found.frozen_right, mask),
        share(found.right, mask),
        *(share(found.right, some) for some in one),
        f"{found.frozen_nll[mask].mean():.3f} -> {found.nll[mask].mean():.3f}",
        f"{difference[mask].mean():+.3f} ({low:+.3f} to {high:+.3f})",
      )
    )
  return rows


def main() -> None:
  """Prints the table."""
  workdir = flags.FLAGS.workdir
  if not workdir:
    raise UserError("--workdir: give a run of configs/before_question.py")
  config = trained.read_run(workdir).config
  found = build.open_lm(workdir, "", "", latents=True)
  for name in run_report.source_names(config):
    print(report.aligned(table(answers_of(config, found, name))))


if __name__ == "__main__":
  command.run(main, __doc__)
