"""Latents before six questions that nobody has asked yet, by kind and number.

  python -m cacheaug.sweep --config=configs/sweeps/before_question.py
  python benchmarks/before_question.py \
      --workdir=runs/sweeps/before_question/N16-seed0

configs/before_question.py and what it is compared with. The second command
tells right answers by k. Figures: docs/results/before_question.md.
"""

from ml_collections import ConfigDict

from cacheaug.projects.sweep.rows import Row, Sweep, base_of

_SEEDS = (0, 1, 2)


def get_config() -> ConfigDict:
  """What all rows have in common."""
  c = base_of(__file__, "../before_question.py")
  c.optimizer.steps = 4_000
  c.eval.context = 16  # of the largest N, so that all rows are of one text
  return c


def get_sweep() -> Sweep:
  """See the module docstring."""
  return Sweep(
    rows=(
      Row("N16", {"coprocessor.latents": 16}, _SEEDS),
      Row("N8", {}),
      Row("handover", {"coprocessor.kind": "handover"}),
      Row("N4", {"coprocessor.latents": 4}),
      Row("k1and2", {"data.sources.hops.steps_min": 1}),
      Row("pause", {"coprocessor.kind": "pause"}),
    ),
    axis="coprocessor.latents",
  )
