"""Do latents help questions that nobody has asked yet? By k and question.

  python benchmarks/before_question.py --workdir=runs/before_question

For a run of configs/before_question.py: nll of every answer's letter, frozen
and with latents where the facts end, on held-out cycles; the answers of earlier
questions stand before the later ones, the same ones for both. Intervals of the
difference resample documents.
"""

from typing import Any

import numpy as np
from absl import flags

from cacheaug import build
from cacheaug.augment import point_sampling
from cacheaug.errors import UserError
from cacheaug.evals import perplexity, report, run_report
from cacheaug.lm import LM
from cacheaug.run import command
from cacheaug.weights import trained

flags.DEFINE_string("workdir", "", "a run of configs/before_question.py")

_DRAWS = 2_000


def answers_nll(
  config: Any, found: LM, name: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Frozen and augmented nll of each answer, and its k; [documents, questions].

  Raises:
    UserError: facts that are not followed by the same number of questions.
  """
  spec = found.coprocessor.spec.with_horizon(config.eval.ahead)
  columns = []
  for batch in run_report.held_out(config, found.tokenizer, name):
    tokens, documents = batch["tokens"], batch["documents"]
    frozen, augmented, weights = perplexity.both_nll(
      found.model,
      found.decoder,
      found.coprocessor.params,
      tokens,
      documents,
      spec=spec,
    )
    starts = np.asarray(point_sampling.before_beginnings(batch["answers"]))
    for row, point in zip(*np.nonzero(starts), strict=True):
      if not np.asarray(weights)[row, point].all():
        continue
      text = found.tokenizer.decode(tokens[row, point + 1 :].tolist())
      lines = text.split("\n")[:-1]
      ends = np.cumsum([len(line) + 1 for line in lines]) - 2
      pair = (np.asarray(x)[row, point][ends] for x in (frozen, augmented))
      columns.append((*pair, [int(line[0]) for line in lines]))
  if not columns:
    raise UserError(f"{name}: no document with all its questions in a row")
  return tuple(np.array(column) for column in zip(*columns, strict=True))


def interval(difference: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
  """95 % of the mean of difference[mask], documents resampled.

  Args:
    difference: [documents, questions].
    mask: of the same shape, what the mean is over.
  """
  random = np.random.default_rng(0)
  sums, counts = (difference * mask).sum(1), mask.sum(1)
  drawn = random.integers(0, len(sums), (_DRAWS, len(sums)))
  means = sums[drawn].sum(1) / counts[drawn].sum(1)
  low, high = np.percentile(means, (2.5, 97.5))
  return float(low), float(high)


def table(
  frozen: np.ndarray, augmented: np.ndarray, k: np.ndarray
) -> list[tuple[str, ...]]:
  """Header and a row a k: nll of all questions, of the first and the last."""
  header = ("k", "frozen", "with latents", "difference, 95% interval")
  rows = [(*header, "first question", "last question")]
  for value in np.unique(k):
    mask = k == value
    low, high = interval(augmented - frozen, mask)
    cells = [
      f"{frozen[:, q][mask[:, q]].mean():.3f} -> "
      f"{augmented[:, q][mask[:, q]].mean():.3f}"
      for q in (0, -1)
    ]
    change = (augmented - frozen)[mask].mean()
    rows.append(
      (
        str(value),
        f"{frozen[mask].mean():.3f}",
        f"{augmented[mask].mean():.3f}",
        f"{change:+.3f} ({low:+.3f} to {high:+.3f})",
        *cells,
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
    print(report.aligned(table(*answers_nll(config, found, name))))


if __name__ == "__main__":
  command.run(main, __doc__)
